"""The paper's figure 5: what does a token cost by the length of its text? Dense until it is too slow, LongNet on.

    python -m examples.evidence.runtime --output docs/results/evidence_runtime.json

Forward passes over one text: of the attention alone (`operator`), and of a small model (`model`, 2 layers of 128 with 4
heads). LongNet's schedule grows with the text, w = 512, 1,024, ... and r = 1, 2, ..., until a segment covers it; dense
attention is PyTorch's, and in the model the same LongNet with one segment. The paper shows the time of a forward whose
tokens are spread over ever more devices: flat for dilated attention, growing for dense. On one device that is the time
per token. A side stops where a GPU's memory ends, or its next length would take longer than `--budget` seconds ("not
tried"); the model at 1,048,576 tokens takes 8 GB. Longer texts are read by `stream`: chunk after chunk through the
bounded cache of such a model, whose schedule covers the whole text; a point tells the tokens since the one before.
Each point is written when it is measured, the stream's state beside it; run it again to go on.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from examples.evidence.records import open_record
from examples.measuring import clock, memory_in_use, peak_memory, reset_peak_memory
from examples.reporting import markdown_table, new_figure, save_figure, write_beside, write_json
from examples.runs import geometric_patterns, parse_scaled, schedule_of
from modeling_longnet import LongNetConfig, LongNetForCausalLM, dilated_attention
from modeling_longnet.streaming import TextStream


FIRST, HEADS, WIDTH = 512, 2, 32  # tokens of the first segment; heads and their width where attention is alone
SIDES = ("dense", "LongNet")
CHUNK, PART = 8192, 65536  # tokens of a stream's forward; tokens after which it is saved
SCALES = {
    "cpu": {"lengths": [4**i for i in range(5, 11)], "stream_tokens": 10 * 2**20, "dtype": "float32"},
    "gpu": {"lengths": [4**i for i in range(5, 14)], "stream_tokens": 2**27, "dtype": "bfloat16"},
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


def small_model(side: str, length: int, dtype: torch.dtype, device: str) -> LongNetForCausalLM:
    """A small LongNet with random weights, over bytes."""
    patterns = {"segment_lengths": [length], "dilation_rates": [1]} if side == "dense" else schedule(length)
    config = LongNetConfig(
        vocab_size=259, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        position_embedding_type="rope", max_position_embeddings=length, **patterns,
    )  # fmt: skip
    return LongNetForCausalLM(config).to(device=device, dtype=dtype).eval()


def whole_model(side: str, length: int, dtype: torch.dtype, device: str) -> Callable[[], torch.Tensor]:
    """A forward of the small model over random bytes."""
    model = small_model(side, length, dtype, device)
    tokens = torch.randint(0, 259, (1, length), device=device)
    return lambda: model(tokens, use_cache=False, logits_to_keep=1).logits


KINDS = {"operator": attention, "model": whole_model}


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


def read_stream(
    rows: list[dict], write: Callable[[], None], state: Path, length: int, dtype: torch.dtype, device: str
) -> None:
    """Reads `length` random bytes with the small model by chunks; a row of `rows` ends where the position doubled.

    Args:
        write: called when `rows` have changed.
        state: a file to go on from, written after each part and removed at the end.
    """
    torch.manual_seed(0)
    model, text = small_model("LongNet", length, dtype, device), torch.randint(0, 256, (length,), dtype=torch.uint8)
    stream, own = TextStream(model, text, CHUNK), [row for row in rows if row["kind"] == "stream"]
    if own and state.exists():
        stream.load(state)
    if own and own[-1]["tokens"] != stream.position:  # no state, or one of another moment
        stream, rows[:] = TextStream(model, text, CHUNK), [row for row in rows if row["kind"] != "stream"]
        own = []
    with tqdm(total=length, initial=stream.position, unit="tok", unit_scale=True, desc="stream") as bar:
        while stream.position < length:
            start, began = stream.position, clock(device)
            stream.run(stop=start + PART, progress=False)
            seconds = clock(device) - began
            if not own or start % PART == 0 and (start // PART).bit_count() == 1:
                own.append({"kind": "stream", "side": "LongNet", "tokens": start, "seconds": 0.0, "start": start})
                rows.append(own[-1])
            own[-1] |= {"tokens": stream.position, "seconds": own[-1]["seconds"] + seconds,
                        "resident bytes": memory_in_use(device)}  # fmt: skip
            stream.save(state)
            write()
            bar.update(stream.position - start)
    state.unlink(missing_ok=True)


def microseconds(row: dict) -> float:
    """Per token; a stream's row begins where the one before ended."""
    return 1e6 * row["seconds"] / (row["tokens"] - row.get("start", 0))


def draw(result: dict, path: Path) -> None:
    """Time per token against length, with the shapes of the paper's figure: constant, and growing with the length."""
    rows = [row | {"panel": "model" if row["kind"] == "stream" else row["kind"]} for row in result["rows"]]
    kinds = [kind for kind in KINDS if any(row["panel"] == kind for row in rows)]
    figure, axes = new_figure(len(kinds))
    for axis, kind in zip(axes, kinds):
        lengths = sorted({row["tokens"] for row in rows if row["panel"] == kind})
        for color, side in zip(("tab:orange", "tab:blue"), SIDES):
            points = sorted((r["tokens"], microseconds(r)) for r in rows
                            if (r["kind"], r["side"]) == (kind, side) and r["seconds"])  # fmt: skip
            if not points:
                continue
            axis.plot(*zip(*points), "o-", color=color, label=f"{side}, in one forward")
            (n, last), shape = points[-1], "constant" if side == "LongNet" else "in proportion to the length"
            line = [last * (1 if side == "LongNet" else length / n) for length in lengths]
            axis.plot(lengths, line, ":", color=color, label=f"the paper's shape: {shape}")
        streamed = [(r["tokens"], microseconds(r)) for r in rows if r["kind"] == "stream" and r["panel"] == kind]
        if streamed:
            axis.plot(*zip(*streamed), "s-", color="tab:green", markersize=5, label="LongNet, by stream")
        ticks = sorted({r["tokens"] for r in rows if r["kind"] == kind} | {lengths[-1]})
        axis.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="µs per token")
        axis.set_xticks(ticks, [f"{n / 2**20:g}M" if n >= 2**20 else f"{n / 2**10:g}K" for n in ticks])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.set_title({"operator": "attention alone", "model": "a model of two layers"}[kind])
        axis.legend(fontsize=8)
    save_figure(figure, path, result["provenance"])


def table(rows: list[dict], budget: float) -> str:
    """Markdown: microseconds per token, and the process's memory by stream; nothing where nothing was asked for."""
    found = {(row["kind"], row["side"], row["tokens"]): row for row in rows}
    kinds = [kind for kind in (*KINDS, "stream") if any(row["kind"] == kind for row in rows)]
    columns = [(kind, side) for kind in kinds for side in (SIDES if kind in KINDS else ("LongNet",))]
    lines = []
    for length in sorted({row["tokens"] for row in rows}):
        cells = []
        for kind, side in columns:
            row = found.get((kind, side, length))
            if row is None:
                too_long = kind in KINDS and not fits(rows, kind, side, length, budget)
                cells.append("not tried" if too_long else "")
            else:
                cells.append("out of memory" if row["seconds"] is None else f"{microseconds(row):,.1f}")
        if "stream" in kinds:
            row = found.get(("stream", "LongNet", length))
            cells.append(f"{row['resident bytes'] / 2**20:,.0f}" if row else "")
        lines.append([f"{length:,}", *cells])
    titles = [f"{side}, {kind}" for kind, side in columns] + ["MiB, stream"] * ("stream" in kinds)
    return markdown_table(["tokens", *titles], lines, texts=0)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> dict:
    """Measures what is missing; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = [*KINDS, "stream"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="what is not given is taken from it")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a forward, at least 1,024")
    parser.add_argument("--stream-tokens", type=int, help="of the stream, for instance 10485760")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of a forward that are worth waiting for")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; .png and .md are written beside it")
    options = parse_scaled(parser, SCALES, arguments)
    settings = {
        "first segment": FIRST, "heads": HEADS, "width": WIDTH, "dtype": options.dtype,
        "time": "clock" if options.device == "cuda" else "processor",
        "stream tokens": options.stream_tokens if "stream" in options.kinds else None,
    }  # fmt: skip
    rows, beside = open_record(options.output, settings, "rows")
    done, result = {(row["kind"], row["side"], row["tokens"]) for row in rows}, beside | {"rows": rows}
    dtype, write = getattr(torch, options.dtype), partial(write_json, options.output, result)
    # First, while the process holds no memory of other work.
    if "stream" in options.kinds and ("stream", "LongNet", options.stream_tokens) not in done:
        state = options.output.with_suffix(".safetensors")
        read_stream(rows, write, state, options.stream_tokens, dtype, options.device)
    forwards = [kind for kind in KINDS if kind in options.kinds]
    todo = [(k, s, n) for n in sorted(options.lengths) for k in forwards for s in SIDES if (k, s, n) not in done]
    for kind, side, length in tqdm(todo, unit="point"):
        if not fits(rows, kind, side, length, options.budget):
            continue
        torch.manual_seed(0)
        reset_peak_memory(options.device)
        try:
            seconds = seconds_of(KINDS[kind](side, length, dtype, options.device), options.device)
        except torch.OutOfMemoryError:
            seconds = None
        peak = {"peak bytes": peak_memory(options.device)}
        rows.append({"kind": kind, "side": side, "tokens": length, "seconds": seconds} | peak)
        write()
    if {(row["kind"], row["side"], row["tokens"]) for row in rows} != done:
        write_beside(options.output, table(rows, options.budget), draw, result)
    else:
        print(table(rows, options.budget))
    return result


if __name__ == "__main__":
    main()
