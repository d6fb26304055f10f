"""How many bytes does a rank receive when a text is split over several? As many per pattern, however long the text.

The schedule is geometric: each pattern is four times as long and as sparse as the one before, up to the whole text.
Counted is what the exchange of the ranks' plans says they send, for a layer's forward; the backward sends as much back.
tests/test_sequence_parallel.py runs these plans. No process is started here.

    python -m examples.benchmarks.sequence_parallel_bytes --output docs/results/sequence_parallel_bytes.json
"""

import argparse
from pathlib import Path

from tqdm.auto import tqdm

from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.runs import geometric_patterns
from modeling_longnet.dilation_schedule import DilationSchedule
from modeling_longnet.sequence_exchange import Heads, Slices, plan_exchange


MIB = 2**20


def measure(length: int, ranks: int, first: int, heads: Heads, width: int, itemsize: int) -> dict:
    """Bytes that each rank receives in a layer's forward, and what an all-gather of all keys would send it."""
    schedule = DilationSchedule(*zip(*geometric_patterns(length, first, 4, clip=True)))
    slice_length = -(-length // ranks)
    slices = Slices(1, slice_length, ranks, ((0, 1, 0, length),))
    row = 2 * width * itemsize
    received = [plan_exchange(slices, rank, schedule, heads).rows_received * row for rank in range(ranks)]
    spanning = sum(w > slice_length for w in schedule.segment_lengths)
    return {
        "tokens": length,
        "patterns": len(schedule.patterns),
        "patterns longer than a slice": spanning,
        "bytes received by each rank": received,
        "most per pattern": round(max(received) / max(1, spanning)),
        "all keys": (ranks - 1) * slice_length * heads.num_kv_heads * row,
    }


def table(rows: list[dict]) -> str:
    lines = ["   tokens  patterns  longer than a slice  KiB received at most   per such pattern   all keys, KiB"]
    for row in rows:
        lines.append(
            f"{row['tokens']:9,} {row['patterns']:9} {row['patterns longer than a slice']:20} "
            f"{max(row['bytes received by each rank']) / 1024:21,.0f} {row['most per pattern'] / 1024:18,.0f} "
            f"{row['all keys'] / 1024:15,.0f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict:
    """Prints the table; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens of the text")
    parser.add_argument("--ranks", type=int, default=8, help="that share it")
    parser.add_argument("--first", type=int, default=256, help="tokens of the first segment")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of a number")
    parser.add_argument("--output", type=Path, help="a JSON file; the plot lies beside it")
    args = parser.parse_args(arguments)
    heads = Heads(args.heads, args.kv_heads)
    rows = [
        measure(length, args.ranks, args.first, heads, args.head_dim, args.itemsize)
        for length in tqdm(args.lengths, unit="text")
    ]
    print(table(rows))
    result = {"provenance": provenance(), "ranks": args.ranks, "head_dim": args.head_dim, "itemsize": args.itemsize,
              "heads": args.heads, "kv_heads": args.kv_heads, "first_segment": args.first, "rows": rows}  # fmt: skip
    if args.output:
        write_json(args.output, result)
        figure, (axes,) = new_figure()
        lengths = [row["tokens"] for row in rows]
        needed = [max(row["bytes received by each rank"]) / MIB for row in rows]
        axes.loglog(lengths, needed, "o-", label="the rows needed")
        axes.loglog(lengths, [row["all keys"] / MIB for row in rows], "s--", label="all keys and values")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        title = f"received by one of {args.ranks} ranks in a layer's forward"
        axes.set(xlabel="tokens of the text", ylabel="MiB", title=title)
        axes.legend()
        save_figure(figure, args.output.with_suffix(".png"), result["provenance"])
    return result


if __name__ == "__main__":
    main()
