"""A token of a Llama of SmolLM2-135M's shape, random weights: patched against dense on a plain cache, in CPU time.

    python -m examples.benchmarks.patched_decoding --output docs/results/patched_decoding.json

All sides of a position take turns. A batch of 8 lengths and bfloat16 are measured with fewer layers.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM

from examples.benchmarks.benchmark_decoding import bounded_at, dense_at
from examples.measuring import in_turns, least
from examples.reporting import provenance, write_json
from examples.smollm2 import SMOLLM2_SHAPE
from modeling_longnet import DilatedCache, patch_model
from modeling_longnet.transformers_compat import named_cache


SHAPE = SMOLLM2_SHAPE | {"max_position_embeddings": 2**17}
SCHEDULES = {"2048/1, 8192/4": ([2048, 8192], [1, 4]), "256/1, 1024/4, 4096/16": ([256, 1024, 4096], [1, 4, 16])}


def decode(model, cache: Cache, lengths: list[int], count: int) -> None:
    """`count` tokens a row; a plain cache of several rows is told of the padding before the shorter ones."""
    token, inputs = torch.zeros(len(lengths), 1, dtype=torch.long), {}
    padding = max(lengths) - torch.tensor(lengths)[:, None]
    for _ in range(count):
        if len(lengths) > 1 and not isinstance(cache, DilatedCache):
            inputs = {"attention_mask": (torch.arange(cache.get_seq_length() + 1) >= padding).long()}
        model(token, **named_cache(cache), **inputs)


@torch.no_grad()
def measure_patched(layers: int, places: list[list[int]], rounds: int, count: int = 4, dtype=torch.float32) -> dict:
    """By place, the tokens that each row of a batch has had: the smallest CPU seconds of a step, and over dense."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": layers})).eval().to(dtype)
    models = {"dense, plain cache": (dense, dense_at)}
    for name, (lengths, rates) in SCHEDULES.items():
        patched = patch_model(copy.deepcopy(dense), segment_lengths=lengths, dilation_rates=rates)
        models |= {f"{name}, bounded cache": (patched, bounded_at), f"{name}, plain cache": (patched, dense_at)}
    results = {}
    for place in places:
        sides = {
            name: partial(decode, model, make(model, *place), place, count) for name, (model, make) in models.items()
        }
        turns = in_turns(sides, rounds)
        seconds = {name: least(turns[name], "cpu_seconds") / count for name in sides}
        results[", ".join(map(str, place))] = {
            name: {"cpu_seconds": taken, "over_dense": taken / seconds["dense, plain cache"]}
            for name, taken in seconds.items()
        }
    return results


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--places", type=int, nargs="+", default=[500, 2000, 8000], help="tokens that were read")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    given = parser.parse_args(arguments)
    few, places = min(given.layers, 8), [[place] for place in given.places]
    batch = [max(given.places) * row // 16 + 1 for row in range(1, 9)]
    torch.set_num_threads(1)
    result = {
        "provenance": provenance(),
        f"{given.layers} layers": measure_patched(given.layers, places, given.rounds),
        f"{few} layers, a batch": measure_patched(few, [batch], given.rounds),
        f"{few} layers, bfloat16": measure_patched(few, places, given.rounds, dtype=torch.bfloat16),
    }
    for what in list(result)[1:]:
        for place, sides in result[what].items():
            for name, side in sides.items():
                print(f"{what}, at {place}: {name:40} {side['cpu_seconds'] * 1e3:9.3f} ms {side['over_dense']:6.2f}")
    if given.output:
        write_json(given.output, result)
    return result


if __name__ == "__main__":
    main()
