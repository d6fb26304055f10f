"""How much does a LongNet recall, by its schedule? Multi-query associative recall (`recall.py`), K pairs in N tokens.

Settings, training and parameters are those of `compare.py`, whose column "recall" holds the other systems.

    nice -n 15 python -m examples.evidence.mqar --output docs/results/mqar.json
"""

import argparse
import functools
from pathlib import Path

import torch

from examples.evidence.compare import SCALES
from examples.evidence.neighbours.backbone import ModelShape, System
from examples.evidence.neighbours.systems import (
    REFERENCE,
    SYSTEMS,
    build_system,
    dilated_patch,
    key_memory,
    matched_width,
)
from examples.evidence.neighbours.transformers_models import llama
from examples.evidence.recall import measure_recall
from examples.evidence.records import mean, measure_missing
from examples.reporting import markdown_table, new_figure, save_figure, write_beside
from examples.runs import schedule_of


def _patch(*patterns: tuple[int, int], **settings):
    """Segments as multiples of the window w, with their rates."""

    def of(shape: ModelShape) -> dict:
        own = schedule_of((length * shape.window, rate) for length, rate in patterns)
        return {**own, "num_sink_tokens": 0, **settings}

    return of


# The window w is 8 at the small scale. Each adds one thing to the one before, or changes it.
SCHEDULES = {
    "LongNet: the table's": dilated_patch,
    "LongNet: rates grow by two": functools.partial(dilated_patch, growth=2),
    "LongNet: 4w, 64w at rate 4": _patch((4, 1), (64, 4)),
    "LongNet: 4w, 64w at rate 16": _patch((4, 1), (64, 16)),
    "LongNet: 8w, 64w at rate 8": _patch((8, 1), (64, 8)),
    "LongNet: the paper's segments": _patch((4, 1), (16, 4), (64, 16), local="segment", overlap="count"),
    "LongNet: the table's, 16 blocks of 4 from memory": lambda shape: {
        **dilated_patch(shape),
        "memory": {"block_size": 4, "top_k": 16, "dimensions": None},
    },
    "sliding window, 32 keys from memory in the first layer": lambda shape: key_memory(shape, [0]),
    "sliding window, 32 keys from memory in the last layer": lambda shape: key_memory(
        shape, [shape.num_hidden_layers - 1]
    ),
}


def build(name: str, shape: ModelShape, seed: int) -> System:
    """A LongNet of `SCHEDULES`, or a system of `SYSTEMS`."""
    if name not in SCHEDULES:
        return build_system(name, shape, seed)
    torch.manual_seed(seed)
    return llama(shape, matched_width(REFERENCE, shape), SCHEDULES[name](shape))


def table(result: dict) -> str:
    sizes = [f"{length},{pairs}" for length, pairs in result["settings"]["test_grid"]]
    rows = [
        [name, *(f"{mean(result['records'], 'accuracy', size, system=name):.2f}" for size in sizes)]
        for name in dict.fromkeys(record["system"] for record in result["records"])
    ]
    return markdown_table(["system", *(f"N = {size.replace(',', ', K = ')}" for size in sizes)], rows)


def draw(result: dict, path: Path) -> None:
    figure, (axis,) = new_figure()
    figure.set_size_inches(9, 5)
    lengths = [length for length, _ in result["settings"]["test_grid"]]
    for index, name in enumerate(dict.fromkeys(record["system"] for record in result["records"])):
        values = [
            mean(result["records"], "accuracy", f"{length},{pairs}", system=name)
            for length, pairs in result["settings"]["test_grid"]
        ]
        axis.plot(lengths, values, marker="os^"[index // 10], color=f"C{index % 10}", label=name)
    ticks = [f"{length}\nK = {pairs}" for length, pairs in result["settings"]["test_grid"]]
    axis.set(xscale="log", xlabel="tokens N, pairs K", ylabel="share of values recalled", ylim=(-0.03, 1.03))
    axis.set_xticks(lengths, ticks)
    axis.minorticks_off()
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path, result["records"][-1]["provenance"])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SCHEDULES, *SYSTEMS]
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    chosen = [REFERENCE, "sliding window", *SCHEDULES]
    parser.add_argument("--systems", nargs="+", choices=names, default=chosen, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; table and plot are written beside it")
    options = parser.parse_args(arguments)
    scale = SCALES[options.scale]

    def measure(system: str, seed: int) -> dict:
        return measure_recall(functools.partial(build, system), scale, options.device, seed)

    wanted = [{"system": name, "seed": seed} for seed in range(options.seeds) for name in options.systems]
    settings = {"shape": scale["shape"], **scale["recall"]}
    result = measure_missing(options.output, settings, wanted, measure)
    write_beside(options.output, table(result), draw, result)
    return result


if __name__ == "__main__":
    main()
