"""How much memory does a patched model need to read a long text in one forward? Linear in its length.

Each length is read in a fresh process, without a cache, and only the last token's logits are kept. What counts is the
peak above the memory that the loaded model takes; weights are SmolLM2-135M's, or random ones of that shape.

    python -m examples.benchmarks.long_forward_memory --output docs/results/long_forward_memory.json

Or how much does a LongNet need to train on it? One whole step (forward, backward, AdamW) of a preset with random
weights, in each layer's gradient checkpoint, the feed-forward in chunks of 4,096 tokens, the loss without whole logits:

    python -m examples.benchmarks.long_forward_memory --train configuration/longnet-125m.json --lengths 131072 \\
        --output docs/results/long_train_step.json
"""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from examples.measuring import measure, peak_memory, reset_peak_memory
from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.smollm2 import NATIVE_CONTEXT, SMOLLM2_SHAPE, smollm2_135m
from modeling_longnet import LongNetConfig, LongNetForCausalLM
from modeling_longnet.patching import patch_model


MIB = 2**20
MLP_CHUNK = 4096
PATCH = {"segment_lengths": [2048, 8192, 32768], "dilation_rates": [1, 4, 16]}


def load(model: str, num_layers: int | None, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A folder or Hub id, or "random" for random weights in the shape of SmolLM2-135M; its first layers, or all."""
    depth = {} if num_layers is None else {"num_hidden_layers": num_layers}
    if model == "random":
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(SMOLLM2_SHAPE | depth))).to(device, dtype).eval()
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **depth).to(device).eval()


def read(model: str, num_layers: int | None, length: int, settings: dict, dtype: torch.dtype, device: str) -> dict:
    """Patch, read `length` random tokens in one forward, and tell the peak memory and the time."""
    patched = patch_model(load(model, num_layers, dtype, device), **settings)
    tokens = torch.randint(0, patched.config.vocab_size, (1, length), device=device)

    @torch.inference_mode()
    def run(length: int) -> None:
        logits = patched(tokens[:, :length], logits_to_keep=1, use_cache=False).logits
        assert logits.isfinite().all()  # also waits for a GPU

    return watched(run, length, device)


def watched(run: Callable[[int], None], length: int, device: str) -> dict:
    """Peak memory and time of `run(length)`."""
    run(64)  # one-time allocations of the libraries
    before = reset_peak_memory(device)
    times = measure(partial(run, length), device)
    peak = peak_memory(device)
    row = {"tokens": length, "model_mib": before / MIB, "peak_mib": peak / MIB, "working_mib": (peak - before) / MIB}
    return row | times


def train(preset: str, num_layers: int | None, length: int, settings: dict, dtype: torch.dtype, device: str) -> dict:
    """One step on `length` random tokens; a first one on few has made AdamW's states, and `model_mib` holds them."""
    settings = settings | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    config = LongNetConfig.from_pretrained(preset, mlp_chunk_size=MLP_CHUNK, **settings)
    torch.manual_seed(0)
    model = LongNetForCausalLM(config).to(device, dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, config.vocab_size, (1, length), device=device)
    layers = tqdm(desc="layers of a step", total=0, disable=None)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: layers.update())  # once forward, once in the backward

    def run(length: int) -> None:
        layers.reset(2 * config.num_hidden_layers)
        loss = model(tokens[:, :length], labels=tokens[:, :length], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()

    return watched(run, length, device)


def plot(result: dict, path: Path) -> None:
    """Working memory and time against length, with the line of proportionality through the last point."""
    figure, (memory, speed) = new_figure(2)
    rows = result["rows"]
    lengths = [row["tokens"] for row in rows]
    for axes, key, label in ((memory, "working_mib", "working memory (MiB)"), (speed, "seconds", "seconds")):
        axes.plot(lengths, [row[key] for row in rows], "o-", label="measured")
        axes.plot(lengths, [rows[-1][key] * n / lengths[-1] for n in lengths], ":", color="gray", label="linear")
        axes.set(xscale="log", yscale="log", xlabel=f"tokens in one {result['of']}", ylabel=label)
        axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths], minor=False)
        axes.minorticks_off()
        axes.legend()
    save_figure(figure, path, result["provenance"])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or Hub id; default SmolLM2-135M, else 'random'")
    parser.add_argument("--train", metavar="PRESET", help="a training step of this LongNet, no forward of a patch")
    parser.add_argument(
        "--num-layers", type=int, help="keep only the first layers: quicker, and they run one after another"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--segment-lengths", type=int, nargs="+", help="default 2048 8192 32768, or the preset's")
    parser.add_argument("--dilation-rates", type=int, nargs="+", help="default 1 4 16, or the preset's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path("long_forward_memory.json"), help="a .png lies beside it")
    options = parser.parse_args(arguments)
    settings = {name: x for name in PATCH if (x := getattr(options, name)) is not None}
    if options.train is None:
        settings = PATCH | settings
        if max(options.lengths) > NATIVE_CONTEXT:
            settings["rope_scaling"] = {"rope_type": "yarn", "factor": max(options.lengths) / NATIVE_CONTEXT}
        if options.model is None:
            try:
                options.model = str(smollm2_135m())
            except ImportError:
                options.model = "random"
    model, work = (options.model, read) if options.train is None else (options.train, train)
    result = {
        "of": "forward" if options.train is None else "training step",
        "model": model if model == "random" else Path(model).name,
        "num_layers": options.num_layers,
        "dtype": options.dtype,
        "settings": settings,
        "rows": [],
        "provenance": provenance(),
    }
    print("  tokens  model MiB   peak MiB  working MiB  KiB/token  seconds  of all threads")
    fixed = settings, getattr(torch, options.dtype), options.device
    # Before glibc starts: its heap would keep what tensors of a few MB leave behind, in pieces.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")
    # A process that read a longer text before keeps freed memory; each length gets its own.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for length in tqdm(sorted(options.lengths), desc="lengths", disable=None):
            row = pool.submit(work, model, options.num_layers, length, *fixed).result()
            result["rows"].append(row)
            print(
                f"{length:>8} {row['model_mib']:>10.0f} {row['peak_mib']:>10.0f} {row['working_mib']:>12.0f} "
                f"{row['working_mib'] * 1024 / length:>10.1f} {row['seconds']:>8.1f} {row['cpu_seconds']:>15.1f}",
                flush=True,
            )
            write_json(options.output, result)
    plot(result, options.output.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
