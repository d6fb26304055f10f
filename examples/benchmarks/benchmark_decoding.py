"""How fast does a LongNet decode with its bounded cache? At any position alike, and against dense attention.

    python -m examples.benchmarks.benchmark_decoding --output docs/results/benchmark_decoding.json

A random LongNet of 4 layers, 256 wide, with 4 heads. All sides take turns, a few tokens each, and minima and medians
over the turns are reported, so that other work on the machine troubles all sides alike. A cache is put to its position
without reading the text before it: what is in the slots changes no speed. "Dense" is the same model with one segment
that is longer than the text, which is ordinary causal attention, with Transformers' dynamic or static cache, whichever
is faster.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from examples.measuring import in_turns, least, median
from examples.reporting import provenance, write_json
from modeling_longnet import LongNetConfig, LongNetForCausalLM
from modeling_longnet.dilated_cache import DilatedCache
from modeling_longnet.transformers_compat import named_cache


SEGMENTS, RATES = (1024, 4096, 16384, 65536), (1, 4, 16, 64)
CONTEXT = 32768


def make_model(segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...]) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=256, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        segment_lengths=segment_lengths, dilation_rates=dilation_rates, max_position_embeddings=2**20,
        position_embedding_type="rope",
    )  # fmt: skip
    return LongNetForCausalLM(config).eval()


def bounded_at(model: PreTrainedModel, *positions: int) -> DilatedCache:
    """A bounded cache of rows that have read so many tokens."""
    cache = DilatedCache(model.config)
    model(torch.zeros(len(positions), 8, dtype=torch.long), **named_cache(cache))
    for layer in cache.dilated_layers:
        layer.keys.normal_()
        layer.values.normal_()
    cache.positions.copy_(torch.tensor(positions))
    cache.seen.fill_(max(positions))
    return cache


def dense_at(model: PreTrainedModel, *positions: int, static: bool = False) -> Cache:
    """A full cache of rows that have read so many tokens, behind padding in the shorter ones."""
    config, longest = model.config, max(positions)
    cache = StaticCache(config=config, max_cache_len=longest + 4096) if static else DynamicCache(config=config)
    shape = (2, len(positions), config.num_key_value_heads, longest, config.head_dim)
    for index in range(config.num_hidden_layers):
        cache.update(*torch.randn(shape, dtype=model.dtype, device=model.device), index)
    return cache


def decode(model: LongNetForCausalLM, cache: Cache, count: int) -> None:
    token = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(count):
        model(token, cache=cache)


def read(model: LongNetForCausalLM, text: torch.Tensor, chunk_size: int | None) -> None:
    """Reads a text whole, or in chunks through a bounded cache."""
    if chunk_size is None:
        model(text, use_cache=False, logits_to_keep=1)
    else:
        cache = DilatedCache(model.config)
        for chunk in text.split(chunk_size, 1):
            model(chunk, cache=cache, logits_to_keep=1)


def per_token(sides: dict[str, Callable[[], None]], rounds: int, tokens: int) -> dict[str, dict[str, float]]:
    """Minimum and median seconds per token of each side, which does `tokens` in a turn."""
    times = in_turns(sides, rounds)
    return {name: {"minimum": least(rows) / tokens, "median": median(rows) / tokens} for name, rows in times.items()}


@torch.no_grad()
def measure(rounds: int, reading_rounds: int, tokens_per_turn: int, context: int, chunk_size: int) -> dict:
    sparse, dense = make_model(SEGMENTS, RATES), make_model((2**20,), (1,))
    caches = {
        "bounded cache at 5,000": (sparse, bounded_at(sparse, 5_000)),
        "bounded cache at 500,000": (sparse, bounded_at(sparse, 500_000)),
        f"bounded cache at {context:,}": (sparse, bounded_at(sparse, context)),
        f"dense, dynamic cache at {context:,}": (dense, dense_at(dense, context)),
        f"dense, static cache at {context:,}": (dense, dense_at(dense, context, static=True)),
    }
    sides = {name: lambda pair=pair: decode(*pair, tokens_per_turn) for name, pair in caches.items()}
    decoding = per_token(sides, rounds, tokens_per_turn)
    text = torch.randint(0, 256, (1, context))
    sides = {"whole": lambda: read(sparse, text, None), "in chunks": lambda: read(sparse, text, chunk_size)}
    reading = per_token(sides, reading_rounds, context)
    near, far, bounded, *others = decoding.values()
    return {
        "decoding_seconds_per_token": decoding,
        "reading_seconds_per_token": reading,
        "ratios": {
            key: {
                "decoding at 500,000 over decoding at 5,000": far[key] / near[key],
                f"dense over bounded at {context:,}": min(other[key] for other in others) / bounded[key],
                f"throughput in chunks of {chunk_size:,} over whole": (
                    reading["whole"][key] / reading["in chunks"][key]
                ),
            }
            for key in ("minimum", "median")
        },
    }


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--reading-rounds", type=int, default=5)
    parser.add_argument("--tokens-per-turn", type=int, default=8)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--chunk-size", type=int, default=4096)
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    given = parser.parse_args(arguments)
    result = measure(given.rounds, given.reading_rounds, given.tokens_per_turn, given.context, given.chunk_size)
    result = {"provenance": provenance(), "segment_lengths": SEGMENTS, "dilation_rates": RATES, **result}
    for name, times in (result["decoding_seconds_per_token"] | result["reading_seconds_per_token"]).items():
        print(f"{name:36} {times['minimum'] * 1e3:9.4f} ms per token at least, median {times['median'] * 1e3:9.4f}")
    for key, ratios in result["ratios"].items():
        for name, ratio in ratios.items():
            print(f"{name:56} {ratio:6.2f} (of the {key} times)")
    if given.output:
        write_json(given.output, result)
    return result


if __name__ == "__main__":
    main()
