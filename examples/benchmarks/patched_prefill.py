"""A text read in one forward into the cache that generation goes on with: patched against dense, time and peak memory.

    python -m examples.benchmarks.patched_prefill --output docs/results/patched_prefill.json

The first layers of a Llama of SmolLM2-135M's shape, random weights; only the last token's logits are made, so that all
else grows with the number of layers. All sides of a length take turns in one process. Peak memory is that of one layer
in a fresh process, above what the model takes, the cache included.
"""

import argparse
import copy
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from examples.benchmarks.patched_decoding import SCHEDULES, SHAPE
from examples.measuring import in_turns, least, peak_memory, reset_peak_memory
from examples.reporting import new_figure, provenance, save_figure, write_json
from modeling_longnet import DilatedCache, patch_model
from modeling_longnet.transformers_compat import named_cache


DENSE = "dense"


def make_models(layers: int) -> dict[str, LlamaForCausalLM]:
    """The dense model, and patched copies of it by their schedule's name."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": layers})).eval()
    patched = {
        name: patch_model(copy.deepcopy(dense), segment_lengths=lengths, dilation_rates=rates)
        for name, (lengths, rates) in SCHEDULES.items()
    }
    return {DENSE: dense, **patched}


@torch.inference_mode()
def read(model: LlamaForCausalLM, kind: type, length: int) -> None:
    cache = kind(config=model.config)
    logits = model(torch.zeros(1, length, dtype=torch.long), **named_cache(cache), logits_to_keep=1).logits
    assert logits.isfinite().all()


def kind_of(side: str) -> type:
    return DynamicCache if side == DENSE else DilatedCache


def measure_memory(side: str, length: int) -> float:
    """MiB at the peak, above what the model takes."""
    torch.set_num_threads(1)
    model = make_models(1)[side]
    read(model, kind_of(side), 64)  # one-time allocations of the libraries
    before = reset_peak_memory()
    read(model, kind_of(side), length)
    return (peak_memory() - before) / 2**20


def measure_prefill(layers: int, lengths: list[int], rounds: int) -> dict[str, dict]:
    """By length and side: the smallest CPU seconds, the time of dense over it, the peak in MiB."""
    models, results = make_models(layers), {}
    for length in tqdm(lengths, desc="lengths", disable=None):
        turns = in_turns({side: partial(read, x, kind_of(side), length) for side, x in models.items()}, rounds)
        seconds = {side: least(turns[side], "cpu_seconds") for side in models}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            peaks = {side: pool.submit(measure_memory, side, length).result() for side in models}
        results[str(length)] = {
            side: {"cpu_seconds": taken, "times_faster": seconds[DENSE] / taken, "peak_mib": peaks[side]}
            for side, taken in seconds.items()
        }
    return results


def crossover(results: dict[str, dict], side: str) -> int | None:
    """The first length from which on a patched model is at least as fast as dense at all lengths measured."""
    slower = [int(length) for length, sides in results.items() if sides[side]["times_faster"] < 1]
    return next((n for n in map(int, results) if not slower or n > max(slower)), None)


def plot(result: dict, path: Path) -> None:
    figure, (speed, memory) = new_figure(2)
    rows = result["lengths"]
    for axes, key, label in ((speed, "cpu_seconds", "CPU seconds"), (memory, "peak_mib", "MiB above the model")):
        for side in next(iter(rows.values())):
            axes.plot([int(n) for n in rows], [row[side][key] for row in rows.values()], "o-", label=side)
        axes.set(xscale="log", yscale="log", xlabel="tokens read", ylabel=label)
        axes.set_xticks([int(n) for n in rows], [f"{int(n) // 1024}K" for n in rows], minor=False)
        axes.minorticks_off()
        axes.legend()
    save_figure(figure, path, result["provenance"])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--output", type=Path, help="a JSON file for the result; a .png lies beside it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = {"provenance": provenance(), "layers": given.layers}
    result["lengths"] = measure_prefill(given.layers, sorted(given.lengths), given.rounds)
    result["crossover"] = {side: crossover(result["lengths"], side) for side in SCHEDULES}
    for length, sides in result["lengths"].items():
        for side, row in sides.items():
            print(
                f"{length:>6} tokens, {side:24} {row['cpu_seconds']:9.3f} s, {row['times_faster']:6.2f} times as fast "
                f"as dense, {row['peak_mib']:7.0f} MiB"
            )
    for side, first in result["crossover"].items():
        print(f"{side}: not slower than dense from {first} tokens on")
    if given.output:
        write_json(given.output, result)
        plot(result, given.output.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
