"""Streams a text of any length through a small LongNet on one machine: constant memory, constant speed.

    python -m examples.stream_a_billion                          # 200,000 tokens
    python -m examples.stream_a_billion --tokens 1e9             # on a GPU; hours to days on a CPU
    python -m examples.stream_a_billion --model runs/train       # a model that train_causal_lm has trained on bytes

The text is repeated as often as it takes; bytes are the tokens. Without --model the weights are random, which does not
change the speed. Run it again after Ctrl-C, a kill or a crash: it goes on from the saved state, to the very same loss.
In --output-dir: state.safetensors, results.json (loss by position, tokens/s and memory over position), stream.png.
"""

import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedModel

from examples.measuring import memory_in_use, peak_memory
from examples.packing import encode_bytes
from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.runs import check_least, end_script, option
from examples.texts import load_text
from modeling_longnet import LongNetConfig, LongNetForCausalLM
from modeling_longnet.streaming import TextStream


VOCABULARY = 259  # of ByT5Tokenizer(extra_ids=0): the bytes behind three special tokens


@dataclass
class Settings:
    tokens: float = option(2e5, "how many, for instance 1e9")
    text: str = option("python-docs", "a file, a folder, or a name out of texts.py; repeated")
    model: str | None = option(None, "a folder with a LongNet over bytes; by default one with random weights")
    chunk_size: int = option(8192, "tokens of a forward pass")
    num_points: int = option(100, "how often speed and memory are noted, and the state saved")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run")
    dtype: str = option("float32", "float32, bfloat16 or float16")
    output_dir: str = option("runs/stream", "where the state and the results go")
    kill_after: int | None = option(None, "kill this process, unprepared, after that many tokens (to test resuming)")

    def __post_init__(self):
        check_least(self, ("tokens", "chunk_size", "num_points"))
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {self.dtype!r}.")


class RepeatedBytes:
    """A text's bytes, as train_causal_lm.py reads them, over and over up to `length`, of which nothing is stored."""

    def __init__(self, text: str, length: int):
        self.bytes = encode_bytes(text)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> torch.Tensor:
        return self.bytes[torch.arange(*part.indices(self.length)) % len(self.bytes)]


def make_model(settings: Settings) -> PreTrainedModel:
    dtype = getattr(torch, settings.dtype)
    if settings.model is not None:
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).to(settings.device)
        if not isinstance(model, LongNetForCausalLM) or model.config.vocab_size != VOCABULARY:
            raise ValueError(
                f"`model` must be a LongNet over bytes, with a vocabulary of {VOCABULARY}, got {type(model).__name__} "
                f"with one of {model.config.vocab_size}."
            )
        return model
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        segment_lengths=(256, 1024, 4096), dilation_rates=(1, 2, 4), max_position_embeddings=4096,
    )  # fmt: skip
    return LongNetForCausalLM(config).to(device=settings.device, dtype=dtype)


def saved_points(path: Path, position: int) -> list[dict]:
    """The points up to where the state was saved."""
    if not path.is_file():
        return []
    return [point for point in json.loads(path.read_text())["points"] if point["position"] <= position]


def stream_on(stream: TextStream, settings: Settings, folder: Path, points: list[dict]) -> bool:
    """Reads to the end, noting a point and saving after each part of it; False if it was interrupted."""
    total = len(stream.tokens)
    part = math.ceil(total / settings.num_points / settings.chunk_size) * settings.chunk_size
    bar = tqdm(total=total, initial=stream.position, unit="tok", unit_scale=True)
    with bar:
        while stream.position < total:
            start, began = stream.position, time.perf_counter()
            went_on = stream.run(stop=start + part, progress=False, state_path=folder / "state.safetensors")
            read, seconds = stream.position - start, time.perf_counter() - began
            memory = (peak_memory if stream.model.device.type == "cuda" else memory_in_use)(settings.device)
            point = {"position": stream.position, "tokens_per_second": read / seconds, "memory_bytes": memory}
            points.append(point)
            write_json(folder / "results.json", describe(stream, settings, points))
            bar.update(read)
            bar.set_postfix_str(f"perplexity {stream.result().perplexity:.2f}")
            if settings.kill_after is not None and stream.position >= settings.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if not went_on:
                return False
    return True


def describe(stream: TextStream, settings: Settings, points: list[dict]) -> dict[str, Any]:
    return {
        "provenance": provenance(),
        "settings": asdict(settings),
        "parameters": stream.model.num_parameters(),
        "cache_bytes": stream.cache.memory_footprint(),
        **asdict(stream.result()),
        "points": points,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (speed, memory) = new_figure(2)
    positions = [point["position"] for point in result["points"]]
    speed.plot(positions, [point["tokens_per_second"] for point in result["points"]])
    speed.set(xlabel="position in the text", ylabel="tokens per second", ylim=(0, None))
    memory.plot(positions, [point["memory_bytes"] / 2**20 for point in result["points"]], label="process")
    memory.axhline(result["cache_bytes"] / 2**20, ls="--", color="tab:orange", label="cache")
    memory.set(xlabel="position in the text", ylabel="memory in MiB", ylim=(0, None))
    memory.legend()
    save_figure(figure, path, result["provenance"])


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Runs the script; returns what results.json holds, or None if it was interrupted."""
    (settings,) = HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses(arguments)
    folder = Path(settings.output_dir)
    text = RepeatedBytes(load_text(settings.text), int(settings.tokens))
    stream = TextStream(make_model(settings), text, settings.chunk_size)
    if (folder / "state.safetensors").exists():
        stream.load(folder / "state.safetensors")
        print(f"going on at token {stream.position:,}")
    points = saved_points(folder / "results.json", stream.position)
    if not stream_on(stream, settings, folder, points):
        print(f"stopped at token {stream.position:,}; run the same command to go on")
        return None
    result = describe(stream, settings, points)
    write_json(folder / "results.json", result)
    plot(result, folder / "stream.png")
    speeds = [point["tokens_per_second"] for point in points]
    print(
        f"{len(text):,} tokens, perplexity {result['perplexity']:.3f}; "
        f"{min(speeds):,.0f} to {max(speeds):,.0f} tokens/s; cache {result['cache_bytes'] / 2**20:.1f} MiB; "
        f"results.json and stream.png in {folder}"
    )
    return result


if __name__ == "__main__":
    end_script(main, "the same command goes on from the last saved state")
