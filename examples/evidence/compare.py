"""LongNet and what the field would pick instead, in one loop: equal parameters, equal tokens, equal data.

Each system (`neighbours/systems.py`) learns Python's standard library byte by byte and is judged on files that it has
not seen; learns associative recall from nothing (`recall.py`); and is timed. What was measured stands in the output
after each part and is not made again: stop it and go on with the same command.

    nice -n 15 python -m examples.evidence.compare --output docs/results/neighbours.json
    python -m examples.evidence.compare --scale gpu --output neighbours_gpu.json
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from examples.evidence.neighbours.backbone import ModelShape, System, state_bytes
from examples.evidence.neighbours.systems import SYSTEMS, build_system
from examples.evidence.recall import measure_recall
from examples.evidence.records import mean, measure_missing
from examples.evidence.source_code import source_bytes
from examples.evidence.training import bits_per_byte, text_losses, train
from examples.measuring import clock
from examples.reporting import markdown_table, new_figure, save_figure, write_beside


SCALES = {
    "cpu": {
        "shape": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "window": 32},
        "text": {"context": 512, "rows": 4, "steps": 160, "learning_rate": 3e-3, "test_bytes": 32768},
        "recall": {
            "grid": [[32, 2], [64, 4], [32, 2], [128, 8], [32, 2], [256, 16]],
            "test_grid": [[64, 4], [128, 8], [256, 16], [512, 24]],
            "vocab_size": 64, "window": 8, "tokens_per_batch": 1024, "steps": 300, "learning_rate": 1e-2,
        },
        "speed": {"seconds_per_text": 20},
    },
    "gpu": {
        "shape": {
            "vocab_size": 256, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "window": 128,
        },
        "text": {"context": 2048, "rows": 32, "steps": 4000, "learning_rate": 1e-3, "test_bytes": 1048576},
        "recall": {
            "grid": [[64, 4], [128, 8], [256, 16], [512, 64]],
            "test_grid": [[64, 4], [128, 8], [256, 16], [512, 64], [1024, 64]],
            "vocab_size": 8192, "window": 16, "tokens_per_batch": 65536, "steps": 12000, "learning_rate": 1e-3,
        },
        "speed": {"seconds_per_text": 60},
    },
}  # fmt: skip
CONTEXTS = 512, 2048, 8192
PREFILL = 2048, 8192, 32768, 65536
DECODE = 1024, 65536
DECODED_TOKENS = 24


def measure_text(name: str, scale: dict, device: str, seed: int) -> dict:
    """Bits per byte of held-out code by context, after training; the tokens per CPU second of the training."""
    shape, setting = ModelShape(**scale["shape"], max_length=max(CONTEXTS)), scale["text"]
    model = build_system(name, shape, seed).to(device)
    batches = text_losses(model, source_bytes(held_out=False), setting["context"], setting["rows"], seed)
    trained = train(model, batches, setting["steps"], setting["learning_rate"], lambda steps: tqdm(steps, leave=False))
    test = source_bytes(held_out=True)[: setting["test_bytes"]]
    tokens = setting["steps"] * setting["context"] * setting["rows"]
    seconds = trained["wall_seconds" if device == "cuda" else "cpu_seconds"]
    return {
        "parameters": model.num_inner_parameters(),
        "tokens": tokens,
        "bits_per_byte": {str(context): bits_per_byte(model, test, context) for context in CONTEXTS},
        "train_tokens_per_second": tokens / seconds,
        **trained,
    }


@torch.no_grad()
def _read(model: System, length: int, device: str) -> tuple[float, object]:
    """Seconds of reading `length` tokens and scoring the last, and the state that remains."""
    tokens = torch.randint(model.embedding_weight().shape[0], (1, length), device=device)
    started = clock(device)
    hidden_states, state = model.body(model.embed(tokens), keep_state=True)
    model.head(hidden_states[:, -1:])
    return clock(device) - started, state


@torch.no_grad()
def _decode(model: System, state: object, device: str, count: int = DECODED_TOKENS) -> float:
    """Median seconds of one more token."""
    token, times = torch.zeros(1, 1, dtype=torch.long, device=device), []
    for _ in range(count):
        started = clock(device)
        _, state = model(token, state, keep_state=True)
        times.append(clock(device) - started)
    return sorted(times)[len(times) // 2]


def measure_speed(name: str, scale: dict, device: str, seed: int) -> dict:
    """Prefill, decoding and state. A length that would take longer than allowed, by the shorter ones, is None."""
    model = build_system(name, ModelShape(**scale["shape"], max_length=max(PREFILL)), seed).to(device).eval()
    _read(model, 512, device)
    result: dict = {"prefill_tokens_per_second": {}, "decode_ms_per_token": {}, "state_bytes": {}}
    seconds, previous = 0.0, 1
    for length in sorted({*PREFILL, *DECODE}):
        least = seconds * length / previous  # if its time grows with its length alone
        if least > scale["speed"]["seconds_per_text"]:
            own = None
        else:
            seconds, state = _read(model, length, device)
            previous, own = length, length / seconds
        if length in PREFILL:
            result["prefill_tokens_per_second"][str(length)] = own
        if length in DECODE:
            result["state_bytes"][str(length)] = state_bytes(state) if own else None
            result["decode_ms_per_token"][str(length)] = _decode(model, state, device) * 1e3 if own else None
    return result


PARTS: dict[str, Callable[[str, dict, str, int], dict]] = {
    "text": measure_text,
    "recall": lambda name, *rest: measure_recall(functools.partial(build_system, name), *rest),
    "speed": measure_speed,
}


def run(path: Path, scale_name: str, parts: list[str], systems: list[str], seeds: int, device: str) -> dict:
    """Measures what is missing, one part of all systems after the other."""
    scale = SCALES[scale_name]
    wanted = [
        {"part": part, "system": name, "seed": seed} for seed in range(seeds) for part in parts for name in systems
    ]

    def measure(part: str, system: str, seed: int) -> dict:
        return PARTS[part](system, scale, device, seed)

    settings = {name: value for name, value in scale.items() if name not in PARTS or name in parts}
    return measure_missing(path, settings, wanted, measure)


def _mean(result: dict, system: str, part: str, *path: str) -> float | None:
    return mean(result["records"], *path, system=system, part=part)


def _rows(result: dict, columns: list[tuple[str, tuple, str]]) -> str:
    """A Markdown table of means: title, path in the records, and format of each column."""
    rows = []
    for name in SYSTEMS:
        values = [_mean(result, name, *path) for _, path, _ in columns]
        if set(values) != {None}:
            cells = ("-" if value is None else format(value, form) for value, (_, _, form) in zip(values, columns))
            rows.append([name, *cells])
    return markdown_table(["system", *(title for title, _, _ in columns)], rows)


def _recall_sizes(result: dict) -> list[tuple[int, int]]:
    return [tuple(size) for size in result["settings"].get("recall", {}).get("test_grid", [])]


def table(result: dict) -> str:
    """Three tables in Markdown: what a system learns, what it costs, and what it is."""
    learns = [
        *((f"bits per byte at {context:,}", ("text", "bits_per_byte", str(context)), ".3f") for context in CONTEXTS),
        *((f"recall {n}, {k}", ("recall", "accuracy", f"{n},{k}"), ".2f") for n, k in _recall_sizes(result)),
        ("parameters", ("text", "parameters"), ",.0f"),
    ]
    costs = [
        ("trained tokens/s", ("text", "train_tokens_per_second"), ",.0f"),
        *((f"read tokens/s at {n:,}", ("speed", "prefill_tokens_per_second", str(n)), ",.0f") for n in PREFILL),
        *((f"ms/token after {n:,}", ("speed", "decode_ms_per_token", str(n)), ".2f") for n in DECODE),
        *((f"state in bytes after {n:,}", ("speed", "state_bytes", str(n)), ",.0f") for n in DECODE),
    ]
    what = [[name, row.origin, row.keys, row.note] for name, row in SYSTEMS.items()]
    systems = markdown_table(["system", "code", "a query reads", "not as published"], what, texts=4)
    return "\n".join([_rows(result, learns), _rows(result, costs), systems])


def draw(result: dict, path: Path) -> None:
    """Loss by context, recall by size, and speed by length."""
    figure, (losses, recall, speed) = new_figure(3)
    figure.set_size_inches(19, 6.5)
    sizes = _recall_sizes(result)
    lengths = [length for length, _ in sizes]
    for index, name in enumerate(SYSTEMS):
        style = {"color": f"C{index % 10}", "marker": "os^"[index // 10], "label": name, "markersize": 5}
        parts = (
            (losses, [(n, _mean(result, name, "text", "bits_per_byte", str(n))) for n in CONTEXTS]),
            (recall, [(n, _mean(result, name, "recall", "accuracy", f"{n},{k}")) for n, k in sizes]),
            (speed, [(n, _mean(result, name, "speed", "prefill_tokens_per_second", str(n))) for n in PREFILL]),
        )
        for axis, points in parts:
            axis.plot(*zip(*[(x, y) for x, y in points if y is not None] or [((), ())]), **style)
    losses.set(xlabel="context (bytes)", ylabel="bits per byte, held-out code")
    recall.set(xlabel="tokens N, pairs K", ylabel="share of values recalled")
    speed.set(yscale="log", xlabel="tokens of the text", ylabel="tokens read per second")
    for axis, ticks in ((losses, CONTEXTS), (recall, lengths), (speed, PREFILL)):
        if ticks:
            axis.set_xscale("log")
            labels = [f"{n}\nK = {k}" for n, k in sizes] if axis is recall else [f"{n:,}" for n in ticks]
            axis.set_xticks(ticks, labels)
            axis.minorticks_off()
    speed.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path, result["records"][-1]["provenance"])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; table and plot are written beside it")
    options = parser.parse_args(arguments)
    result = run(options.output, options.scale, options.parts, options.systems, options.seeds, options.device)
    write_beside(options.output, table(result), draw, result)
    return result


if __name__ == "__main__":
    main()
