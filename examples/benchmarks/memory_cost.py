"""What a memory costs: one layer of SmolLM2's shape, forward and decoding, beside dense attention and no memory.

    python -m examples.benchmarks.memory_cost --output docs/results/memory_cost.json
    python -m examples.benchmarks.memory_cost --device cuda --dtype bfloat16 --output memory_cost_gpu.json

Random queries, keys and values. The ways take turns; each figure is the least of the rounds' processor times (on a GPU
by the clock), so that other work on the machine counts little. Choice and attention of the memory are told apart.
Decoding is one token after so many, in place and from files of which the system has the pages in memory (on a GPU from
pinned memory of the host); with the bytes that it reads.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from examples.measuring import in_turns, least
from examples.reporting import new_figure, provenance, save_figure, write_json
from modeling_longnet.dilated_attention import dilated_attention
from modeling_longnet.dilation_schedule import DilationSchedule, Heads
from modeling_longnet.memory_attention import MemoryCall, attend_memory, choose
from modeling_longnet.memory_pages import StoreFolder
from modeling_longnet.memory_search import Ranking
from modeling_longnet.memory_step import attend_step
from modeling_longnet.memory_store import Shape, make_store


HEADS, GROUPS, WIDTH, NATIVE, THETA = 9, 3, 64, 8192, 100000.0
SETTINGS = {
    "segment_lengths": [512],
    "dilation_rates": [1],
    "overlap": "once",
    "local": "sliding",
    "num_sink_tokens": 4,
}
MEMORY = {"block_size": 4, "top_k": 64, "max_distance": NATIVE // 2}
INV_FREQ = THETA ** -(torch.arange(0, WIDTH, 2) / WIDTH)


def forward_ways(length: int, like: dict) -> dict:
    """What to time, by name, for a text of so many tokens; like: dtype and device."""
    query, key, value = (torch.randn(1, n, length, WIDTH, **like) for n in (HEADS, GROUPS, GROUPS))
    schedule = DilationSchedule(**SETTINGS, memory=MEMORY)
    call = MemoryCall(Ranking(schedule, INV_FREQ.to(like["device"])), 0, Heads(HEADS, GROUPS), WIDTH**-0.5, "sdpa")
    chosen = choose(call, query, key)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "dense": lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True),
        "without memory": lambda: dilated_attention(query, key, value, **SETTINGS),
        "memory: choice": lambda: choose(call, query, key),
        "memory: attention": lambda: attend_memory(call, query, key, value, chosen),
    }


def decoding_ways(length: int, folder: Path, like: dict) -> tuple[dict, dict]:
    """What to time for one token behind so many, and the bytes that each way reads."""
    shapes = (HEADS, 1), (GROUPS, length), (GROUPS, length)
    query, key, value = (torch.randn(1, n, m, WIDTH, **like) for n, m in shapes)
    schedule = DilationSchedule(**SETTINGS, memory=MEMORY)
    ranking, shape = (
        Ranking(schedule, INV_FREQ.to(like["device"])),
        Shape(1, GROUPS, WIDTH, key.dtype, key.device, MEMORY["block_size"]),
    )
    sdpa, position = torch.nn.functional.scaled_dot_product_attention, torch.tensor([length - 1], device=query.device)
    ways = {"dense": lambda: sdpa(query, key, value, enable_gqa=True)}
    index_bytes = 0
    for name in ("device", "cpu" if like["device"] == "cuda" else "disk"):
        store = make_store(name, shape, StoreFolder(folder, is_new=True) if name == "disk" else None, 0)
        store.write(slice(None), 0, key, value)
        for index, made in (("index", ranking.index(key)), ("far", ranking.far_index(key))):
            store.write_index(index, slice(None), 0, made)
            index_bytes = made.nbytes  # a block is ranked by one of the two
        indices = [store.ranked(x, slice(None)) for x in ("index", "far")]
        ways[f"memory, {name}"] = lambda store=store, indices=indices: attend_step(
            ranking, query, store, GROUPS, *indices, position, WIDTH**-0.5
        )
    tokens = HEADS * MEMORY["top_k"] * MEMORY["block_size"] + GROUPS * (schedule.window + schedule.num_sink_tokens)
    read = {"dense": key.nbytes + value.nbytes, "memory": index_bytes + 2 * tokens * WIDTH * key.itemsize}
    return ways, read


def least_seconds(ways: dict, rounds: int, device: str) -> dict[str, float]:
    counted = "seconds" if device == "cuda" else "cpu_seconds"
    return {name: least(turns, counted) for name, turns in in_turns(ways, rounds, device).items()}


def measure_forward(length: int, rounds: int, like: dict) -> dict:
    seconds = least_seconds(forward_ways(length, like), rounds, like["device"])
    seconds["memory"] = seconds["memory: choice"] + seconds["memory: attention"]
    return {"seconds": seconds, "dense over memory": seconds["dense"] / seconds["memory"]}


def measure_decoding(length: int, rounds: int, like: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        ways, read = decoding_ways(length, Path(folder) / "pages", like)
        return {"seconds": least_seconds(ways, 20 * rounds, like["device"]), "bytes read": read}


def draw(result: dict, path: Path) -> None:
    figure, axes = new_figure(2)
    for axis, part, factor, unit in ((axes[0], "forward", 1, "s"), (axes[1], "decoding", 1000, "ms")):
        rows = result[part]
        for name in rows[0]["seconds"]:
            axis.plot([r["tokens"] for r in rows], [r["seconds"][name] * factor for r in rows], marker="o", label=name)
        axis.set(xlabel="tokens", ylabel=f"{part}: time of one layer ({unit})", xscale="log", yscale="log")
        axis.legend(fontsize=7)
    save_figure(figure, path, result["provenance"])


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> dict:
    """Measures, prints, writes; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--decoding-lengths", type=int, nargs="+", help="for one token; default: --lengths")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; the plot is written beside it")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    like = {"dtype": getattr(torch, options.dtype), "device": options.device}
    result = {
        "provenance": provenance(), "memory": MEMORY, "settings": SETTINGS, "dtype": options.dtype, "forward": [],
        "decoding": [],
    }  # fmt: skip
    parts = {"forward": (options.lengths, measure_forward),
             "decoding": (options.decoding_lengths or options.lengths, measure_decoding)}  # fmt: skip
    for part, (lengths, measure) in parts.items():
        for length in tqdm(lengths, unit="length", desc=part):
            result[part].append({"tokens": length} | measure(length, options.rounds, like))
            tqdm.write(f"{part} {result[part][-1]}")
            write_json(options.output, result)
    draw(result, options.output.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
