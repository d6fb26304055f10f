"""The paper's table 2 in small: does a longer training context help, and how near does LongNet come to dense attention?

A byte-level model for each of dense attention, the Sparse Transformer's fixed pattern and LongNet, and each training
context, with as many tokens in a batch whatever the context, on Python's standard library; judged on held-out files at
all contexts.

Beyond the context T that a model was trained with, the paper falls back to blockwise causal attention (of "A
Length-Extrapolatable Transformer", arXiv 2212.10554), in which distances stay below T. Here that is a sliding window of
T for dense attention, the fixed pattern within T, and LongNet's segments of up to T. Both are reported, with the bound
and without.

    nice -n 15 python -m examples.evidence.language_model --output docs/results/language_model.json
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from examples.evidence.neighbours.attention_patterns import Bounded, Fixed
from examples.evidence.neighbours.backbone import Backbone, ModelShape, System
from examples.evidence.neighbours.pattern_attention import PatternAttention
from examples.evidence.neighbours.systems import REFERENCE, dilated_patch, matched_width, window_patch
from examples.evidence.neighbours.transformers_models import llama
from examples.evidence.records import measure_missing
from examples.evidence.source_code import source_bytes
from examples.evidence.training import bits_per_byte, text_losses, train
from examples.reporting import markdown_table, new_figure, save_figure, write_beside
from examples.runs import schedule_of


SCALES = {
    "cpu": {
        "shape": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "window": 32, "max_length":
        8192}, "contexts": [512, 2048, 8192], "tokens_per_batch": 8192, "steps": 60, "learning_rate": 5e-3,
        "test_bytes": 32768,
    },
    "gpu": {
        "shape": {
            "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "window": 128, "max_length": 32768,
        },
        "contexts": [512, 2048, 8192, 32768], "tokens_per_batch": 65536, "steps": 4000, "learning_rate": 1e-3,
        "test_bytes": 1048576,
    },
}  # fmt: skip


def _sparse(shape: ModelShape, reach: int | None) -> System:
    """The fixed pattern, which reads about as many keys as the schedule does at the longest context."""
    pattern = Fixed(2 * shape.window, max(1, shape.window // 8))
    pattern = pattern if reach is None else Bounded(pattern, reach)

    def mixer(layer: int) -> PatternAttention:
        return PatternAttention(shape.hidden_size, shape.num_attention_heads, pattern)

    return Backbone(shape, mixer, matched_width(REFERENCE, shape))


def _dense(shape: ModelShape, reach: int | None) -> System:
    return llama(shape, matched_width(REFERENCE, shape), None if reach is None else window_patch(reach))


def _longnet(shape: ModelShape, reach: int | None) -> System:
    patch = dilated_patch(shape)
    if reach is not None:
        kept = [pattern for pattern in zip(patch["segment_lengths"], patch["dilation_rates"]) if pattern[0] <= reach]
        patch |= schedule_of(kept)
    return llama(shape, matched_width(REFERENCE, shape), patch)


SYSTEMS = {"dense": _dense, "Sparse Transformer": _sparse, "LongNet": _longnet}


def measure(system: str, context: int, seed: int, scale: dict, device: str) -> dict:
    """Bits per byte by test context, with distances bounded by the training context and without."""
    shape = ModelShape(**scale["shape"])
    torch.manual_seed(seed)
    model = SYSTEMS[system](shape, None).to(device)
    rows = scale["tokens_per_batch"] // context
    batches = text_losses(model, source_bytes(held_out=False), context, rows, seed)
    trained = train(model, batches, scale["steps"], scale["learning_rate"], lambda steps: tqdm(steps, leave=False))
    bounded = SYSTEMS[system](shape, context).to(device)
    bounded.load_state_dict(model.state_dict())
    test = source_bytes(held_out=True)[: scale["test_bytes"]]
    plain = {str(length): bits_per_byte(model, test, length) for length in scale["contexts"]}
    beyond = {
        str(length): bits_per_byte(bounded, test, length) if length > context else plain[str(length)]
        for length in scale["contexts"]
    }
    tokens = scale["steps"] * rows * context
    return {"bits_per_byte": plain, "bits_per_byte_bounded": beyond, "tokens": tokens, **trained}


def _spread(values: list[float]) -> str:
    middle = sum(values) / len(values)
    return f"{middle:.3f} ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else f"{middle:.3f}"


def _values(result: dict, system: str, context: int, kind: str, length: int) -> list[float]:
    return [
        record[kind][str(length)]
        for record in result["records"]
        if (record["system"], record["context"]) == (system, context)
    ]


def table(result: dict) -> str:
    """Bits per byte, mean and half the range over the seeds; beyond the training context bounded / unbounded."""
    contexts = result["settings"]["contexts"]
    rows = []
    for system in SYSTEMS:
        for context in contexts:
            if not _values(result, system, context, "bits_per_byte", contexts[0]):
                continue
            cells = []
            for length in contexts:
                plain = _spread(_values(result, system, context, "bits_per_byte", length))
                bounded = _spread(_values(result, system, context, "bits_per_byte_bounded", length))
                cells.append(plain if length <= context else f"{bounded} / {plain}")
            rows.append([system, f"{context:,}", *cells])
    return markdown_table(["system", "trained at", *(f"read at {length:,}" for length in contexts)], rows)


def draw(result: dict, path: Path) -> None:
    contexts = result["settings"]["contexts"]
    figure, axes = new_figure(2)
    titles = "read at the training context", f"read at {contexts[-1]:,}, distances within the training context"
    for axis, title in zip(axes, titles):
        for index, system in enumerate(SYSTEMS):
            points = []
            for context in contexts:
                length = context if axis is axes[0] else contexts[-1]
                points += [(context, v) for v in _values(result, system, context, "bits_per_byte_bounded", length)]
            means = [(c, [v for at, v in points if at == c]) for c in contexts]
            means = [(c, sum(v) / len(v)) for c, v in means if v]
            if means:
                axis.plot(*zip(*means), color=f"C{index}", label=system)
                axis.plot(*zip(*points), "o", color=f"C{index}", markersize=3)
        axis.set(xscale="log", xlabel="training context (bytes)", ylabel="bits per byte, held-out code")
        axis.set_title(title, fontsize=8)
        axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axis.minorticks_off()
    axes[0].legend()
    save_figure(figure, path, result["records"][-1]["provenance"])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; table and plot are written beside it")
    options = parser.parse_args(arguments)
    scale = SCALES[options.scale]
    wanted = [
        {"system": system, "context": context, "seed": seed}
        for seed in range(options.seeds)
        for system in SYSTEMS
        for context in scale["contexts"]
    ]
    result = measure_missing(
        options.output, scale, wanted, lambda **key: measure(**key, scale=scale, device=options.device)
    )
    write_beside(options.output, table(result), draw, result)
    return result


if __name__ == "__main__":
    main()
