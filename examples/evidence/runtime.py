"""The paper's figure 5: what does a token cost by the length of its text? Dense until it is too slow, LongNet on.

    python -m examples.evidence.runtime --output docs/results/evidence_runtime.json

Forward passes over one text: of the attention alone (`operator`), and of a small model (`model`, 2 layers of 128 with 4
heads). LongNet's schedule grows with the text, w = 512, 1,024, ... and r = 1, 2, ..., until a segment covers it; dense
attention is PyTorch's, and in the model the same LongNet with one segment. The paper shows the time of a forward whose
tokens are spread over ever more devices: flat for dilated attention, growing for dense. On one device that is the time
per token. A side stops where a GPU's memory ends, or its next length would take longer than `--budget` seconds ("not
tried"). Each point is written when it is measured; run it again to go on.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from examples.evidence.records import open_record
from examples.measuring import clock
from examples.reporting import markdown_table, new_figure, save_figure, write_beside, write_json
from examples.runs import geometric_patterns, parse_scaled, schedule_of
from modeling_longnet import LongNetConfig, LongNetForCausalLM, dilated_attention


FIRST, HEADS, WIDTH = 512, 2, 32  # tokens of the first segment; heads and their width where attention is alone
SIDES = ("dense", "LongNet")
SCALES = {
    "cpu": {"lengths": [4**i for i in range(5, 11)], "dtype": "float32"},
    "gpu": {"lengths": [4**i for i in range(5, 14)], "dtype": "bfloat16"},
}


def schedule(length: int) -> dict[str, list[int]]:
    """w and r that double until a segment covers the text."""
    return schedule_of(geometric_patterns(length, FIRST))


def attention(side: str, length: int, dtype: torch.dtype, device: str) -> Callable[[], torch.Tensor]:
    """A forward of causal attention alone, over random tensors [1, HEADS, N, WIDTH]."""
    query, key, value = (torch.randn(1, HEADS, length, WIDTH, dtype=dtype, device=device) for _ in range(3))
    if side == "dense":
        return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return lambda: dilated_attention(query, key, value, **schedule(length))


def small_model(side: str, length: int, dtype: torch.dtype, device: str) -> Callable[[], torch.Tensor]:
    """A forward of a small LongNet with random weights over random bytes."""
    patterns = {"segment_lengths": [length], "dilation_rates": [1]} if side == "dense" else schedule(length)
    config = LongNetConfig(
        vocab_size=259, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        position_embedding_type="rope", max_position_embeddings=length, **patterns,
    )  # fmt: skip
    model = LongNetForCausalLM(config).to(device=device, dtype=dtype).eval()
    tokens = torch.randint(0, 259, (1, length), device=device)
    return lambda: model(tokens, use_cache=False, logits_to_keep=1).logits


KINDS = {"operator": attention, "model": small_model}


def seconds_of(run: Callable[[], torch.Tensor], device: str, least: float = 0.5) -> float:
    """Seconds of one call, the least of several where it is short: processor time on a CPU, the clock's on a GPU."""
    times = []
    while not times or sum(times) < least:
        began = clock(device)
        run().isfinite().all().item()  # waits for a GPU
        times.append(clock(device) - began)
    return min(times)


def fits(rows: list[dict], kind: str, side: str, length: int, budget: float) -> bool:
    """Whether a length can be expected to stay within the budget: dense grows with the square, LongNet linearly."""
    known = [row for row in rows if (row["kind"], row["side"]) == (kind, side) and row["tokens"] < length]
    if not known:
        return True
    last = max(known, key=lambda row: row["tokens"])
    if last["seconds"] is None:
        return False
    return last["seconds"] * (length / last["tokens"]) ** (2 if side == "dense" else 1) <= budget


def draw(result: dict, path: Path) -> None:
    """Time per token against length, with the shapes of the paper's figure: constant, and growing with the length."""
    rows, kinds = result["rows"], list(dict.fromkeys(row["kind"] for row in result["rows"]))
    figure, axes = new_figure(len(kinds))
    for axis, kind in zip(axes, kinds):
        lengths = sorted({row["tokens"] for row in rows if row["kind"] == kind})
        for color, side in zip(("tab:orange", "tab:blue"), SIDES):
            points = sorted((r["tokens"], 1e3 * r["seconds"] / r["tokens"]) for r in rows
                            if (r["kind"], r["side"]) == (kind, side) and r["seconds"])  # fmt: skip
            axis.plot(*zip(*points), "o-", color=color, label=f"{side}, measured")
            (n, last), shape = points[-1], "constant" if side == "LongNet" else "in proportion to the length"
            line = [last * (1 if side == "LongNet" else length / n) for length in lengths]
            axis.plot(lengths, line, ":", color=color, label=f"the paper's shape: {shape}")
        axis.set(xscale="log", yscale="log", xlabel="tokens in one forward", ylabel="ms per token")
        axis.set_xticks(lengths, [f"{n // 1024:,}K" for n in lengths])
        axis.minorticks_off()
        axis.set_title({"operator": "attention alone", "model": "a model of two layers"}[kind])
        axis.legend(fontsize=8)
    save_figure(figure, path, result["provenance"])


def table(rows: list[dict], budget: float) -> str:
    """Markdown: microseconds per token; nothing where nothing was asked for."""
    found = {(row["kind"], row["side"], row["tokens"]): row["seconds"] for row in rows}
    columns = list(dict.fromkeys((row["kind"], side) for row in rows for side in SIDES))
    lines = []
    for length in sorted({row["tokens"] for row in rows}):
        cells = []
        for kind, side in columns:
            seconds = found.get((kind, side, length), 0)
            missing = "" if fits(rows, kind, side, length, budget) else "not tried"
            cells.append(f"{1e6 * seconds / length:,.1f}" if seconds else missing if seconds == 0 else "out of memory")
        lines.append([f"{length:,}", *cells])
    return markdown_table(["tokens", *(f"{side}, {kind}" for kind, side in columns)], lines, texts=0)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> dict:
    """Measures what is missing; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="what is not given is taken from it")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, at least 1,024")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of a forward that are worth waiting for")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; .png and .md are written beside it")
    options = parse_scaled(parser, SCALES, arguments)
    settings = {
        "first segment": FIRST, "heads": HEADS, "width": WIDTH, "dtype": options.dtype,
        "time": "clock" if options.device == "cuda" else "processor",
    }  # fmt: skip
    rows, beside = open_record(options.output, settings, "rows")
    done, result = {(row["kind"], row["side"], row["tokens"]) for row in rows}, {"rows": rows}
    todo = [(k, s, n) for n in sorted(options.lengths) for k in options.kinds for s in SIDES if (k, s, n) not in done]
    for kind, side, length in tqdm(todo, unit="point"):
        if not fits(rows, kind, side, length, options.budget):
            continue
        torch.manual_seed(0)
        try:
            run = KINDS[kind](side, length, getattr(torch, options.dtype), options.device)
            seconds = seconds_of(run, options.device)
        except torch.OutOfMemoryError:
            seconds = None
        rows.append({"kind": kind, "side": side, "tokens": length, "seconds": seconds})
        result = beside | {"rows": rows}
        write_json(options.output, result)
    if len(rows) > len(done):
        write_beside(options.output, table(rows, options.budget), draw, result)
    else:
        print(table(rows, options.budget))
    return result


if __name__ == "__main__":
    main()
