"""What a memory costs a whole model: a forward, and a token behind so many, beside dense attention and a plain patch.

    python -m examples.benchmarks.memory_model_cost --output docs/results/memory_model_cost.json
    python -m examples.benchmarks.memory_model_cost --dtype bfloat16 --lengths --decoding-lengths 4096 262144 \
        --store cpu --output docs/results/memory_model_cost_bf16.json

SmolLM2-135M-Instruct in forms of `examples.evidence.reading.VARIANTS`, which take turns. A forward reads so many tokens
of a text at once into a cache. A token is decoded behind a cache of random keys and values: what is in it changes no
speed. Each figure is the least processor time of the rounds (on a GPU the least by the clock).
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel

from examples.benchmarks.benchmark_decoding import dense_at
from examples.evidence.reading import VARIANTS, in_form, new_cache
from examples.measuring import clock, measure
from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet import DilatedCache
from modeling_longnet.dilated_memory_layer import MemoryLayer
from modeling_longnet.patching import is_patched
from modeling_longnet.transformers_compat import named_cache


FORMS = ["dense", "default patch", "with memory", "memory in 18 heads"]
STEP = 4096  # tokens that are put into a cache at once
WARM_UP = 512  # tokens that each form reads before forwards are timed


def random_keys(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Keys and values [2, 1, G, N, D]."""
    config = model.config
    shape = 2, 1, config.num_key_value_heads, length, config.head_dim
    return torch.randn(shape, dtype=model.dtype, device=model.device)


def cache_behind(model: PreTrainedModel, length: int, store: str) -> Cache:
    """The cache of a model that has read so many tokens, but for what these were."""
    if not is_patched(model):
        return dense_at(model, length)
    cache = DilatedCache(model.config, store=store)
    begin = 8
    model(torch.zeros(1, begin, dtype=torch.long, device=model.device), **named_cache(cache))
    for layer in cache.dilated_layers:
        if not isinstance(layer, MemoryLayer):
            layer.keys.normal_()
            layer.values.normal_()
            continue
        for first in range(begin, length, STEP):
            layer.append(slice(None), first, *random_keys(model, min(STEP, length - first)))
            layer.let_go(first)
    cache.positions.fill_(length)
    cache.seen.fill_(length)
    return cache


def read(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    model(input_ids=tokens[None], use_cache=True, logits_to_keep=1, **named_cache(new_cache(model)))


def decode(model: PreTrainedModel, cache: Cache, steps: int) -> list[float]:
    """Seconds of each of so many tokens."""
    token, seconds = torch.zeros(1, 1, dtype=torch.long, device=model.device), []
    for _ in range(steps):
        began = clock(model.device.type)
        model(input_ids=token, use_cache=True, **named_cache(cache))
        seconds.append(clock(model.device.type) - began)
    return seconds


def measure_forward(model: PreTrainedModel, forms: list[str], tokens: torch.Tensor, rounds: int) -> dict[str, float]:
    """The least seconds of each form, which take turns."""
    counted, found = "seconds" if model.device.type == "cuda" else "cpu_seconds", {name: [] for name in forms}
    for name in forms:  # what a device does but once does not count
        with in_form(model, name):
            read(model, tokens[:WARM_UP])
    for _ in range(rounds):
        for name in forms:
            with in_form(model, name):
                found[name].append(measure(partial(read, model, tokens), model.device.type)[counted])
    return {name: min(seconds) for name, seconds in found.items()}


def measure_decoding(model: PreTrainedModel, forms: list[str], length: int, rounds: int, store: str) -> dict:
    """The least seconds of a token of each form, and the bytes of its cache by where they lie."""
    seconds, held = {name: [] for name in forms}, {}
    for _ in range(rounds):
        for name in forms:
            with in_form(model, name):
                cache = cache_behind(model, length, "device" if VARIANTS[name] is None else store_of(name, store))
                seconds[name] += decode(model, cache, 8)
                if isinstance(cache, DilatedCache):
                    held[name] = cache.memory_by_place()
                else:
                    held[name] = {"device": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)}
                del cache
    return {"seconds": {name: min(x) for name, x in seconds.items()}, "cache bytes": held}


def store_of(form: str, store: str) -> str:
    """Where a form's cache keeps what it has read: a patch without a memory has no choice."""
    return store if "memory" in VARIANTS[form] else "device"


def draw(result: dict, path: Path) -> None:
    """Time by length."""
    parts = [(result["forward"], 1, "a forward (s)"), (result["decoding"], 1000, "a token (ms)")]
    measured = [part for part in parts if part[0]]
    figure, axes = new_figure(len(measured))
    for axis, (rows, factor, unit) in zip(axes, measured):
        tokens = [row["tokens"] for row in rows]
        for name in rows[0]["seconds"]:
            axis.plot(tokens, [row["seconds"][name] * factor for row in rows], marker="o", label=name)
        axis.set(xlabel="tokens", ylabel=unit, xscale="log", yscale="log")
        axis.set_xticks(tokens, [f"{x // 1024}K" for x in tokens])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    save_figure(figure, path, result["provenance"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M-Instruct, from pip")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=FORMS, metavar="NAME")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768], help="of a forward")
    parser.add_argument("--decoding-lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=1, help="of a forward; a token has twice as many, of 8 tokens")
    parser.add_argument("--store", choices=["device", "cpu"], default="device", help="of caches with a memory")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; the plot is written beside it")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> dict:
    """Measures, prints, writes; returns what the file holds."""
    options = parse(arguments)
    path = options.model or str(smollm2_135m())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype)).eval().to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    longest = max(options.lengths, default=0)
    text = tokenizer(load_text("python-docs")[: 8 * longest], verbose=False, return_tensors="pt").input_ids[0]
    torch.manual_seed(0)
    result = {
        "provenance": provenance(), "model": Path(path).name, "dtype": options.dtype, "store": options.store,
        "forms": {name: VARIANTS[name] for name in options.variants}, "forward": [], "decoding": [],
    }  # fmt: skip
    for length in tqdm(options.decoding_lengths, unit="length", desc="decoding"):
        row = measure_decoding(model, options.variants, length, 2 * options.rounds, options.store)
        result["decoding"].append({"tokens": length} | row)
        tqdm.write(str(result["decoding"][-1]))
        write_json(options.output, result)
    for length in tqdm(options.lengths, unit="length", desc="forward"):
        row = measure_forward(model, options.variants, text[:length].to(options.device), options.rounds)
        result["forward"].append({"tokens": length, "seconds": row})
        tqdm.write(str(result["forward"][-1]))
        write_json(options.output, result)
    if result["forward"] or result["decoding"]:
        draw(result, options.output.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
