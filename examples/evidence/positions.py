"""How well is a token predicted by how much was read before it, in each form of attention, and what did that cost?

    python -m examples.evidence.positions --output docs/results/evidence_positions.json

Windows of each text are read by chunks through a cache; losses, processor time and the bytes of the cache are noted by
position. Forms are compared window by window, by bucket and whole: the ratio of perplexities is that of the mean
difference of losses, with a bootstrap interval over windows. No window is read twice. Beside the JSON file lie the
plot, .png, and the table, .md. `--scale gpu` reads to four times the native context of SmolLM2 (8,192 tokens).
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer, Cache

from examples.evidence.needles import WITH_ADAPTER
from examples.evidence.reading import VARIANTS, in_form, load_model, new_cache
from examples.evidence.records import open_record, saving
from examples.perplexity import position_buckets
from examples.reporting import markdown_table, new_figure, save_figure, write_beside, write_json
from examples.runs import parse_scaled
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet.transformers_compat import named_cache


SCALES = {
    "cpu": {"length": 4096, "windows": 3, "dtype": "float32"},
    "gpu": {"length": 32768, "windows": 20, "dtype": "bfloat16"},
}
FORMS = ["dense", "window + sinks", "default patch", "with memory"]
RESAMPLES = 2000


def window_of(encode, text: str, index: int, count: int, length: int) -> torch.Tensor:
    """The `index`-th of `count` windows [N] that begin evenly spread over a text.

    Raises:
        ValueError: the text ends before.
    """
    start = len(text) * index // count
    tokens = encode(text[start : start + 12 * length])[:length]
    if len(tokens) < length:
        raise ValueError(f"`length` must fit into the texts behind the beginning of each window, got {length}.")
    return torch.tensor(tokens)


def cache_bytes(cache: Cache) -> int:
    """Of keys and values, with the index of a memory."""
    if hasattr(cache, "memory_footprint"):
        return cache.memory_footprint()
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


@torch.inference_mode()
def read_window(model, tokens: torch.Tensor, chunk_size: int) -> dict:
    """Losses of the tokens 1 to N-1 summed by bucket, and per chunk the processor's ms per token and the cache."""
    cache, losses, chunks = new_cache(model), [], []
    tokens = tokens.to(model.device)
    for start in range(0, len(tokens), chunk_size):
        chunk, began = tokens[start : start + chunk_size], time.process_time()
        logits = model(input_ids=chunk[None], use_cache=True, **named_cache(cache)).logits[0]
        targets = tokens[start + 1 : start + 1 + len(chunk)]
        losses.append(cross_entropy(logits[: len(targets)].float(), targets, reduction="none").double().cpu())
        chunks.append({"end": start + len(chunk), "cache bytes": cache_bytes(cache),
                       "ms per token": 1000 * (time.process_time() - began) / len(chunk)})  # fmt: skip
    losses = torch.cat(losses)
    buckets = [
        {"start": start, "end": end, "loss": losses[start:end].mean().item()}
        for start, end in position_buckets(len(losses), 512)
    ]
    return {"loss": losses.mean().item(), "buckets": buckets, "chunks": chunks}


def interval(differences: dict[str, list[float]]) -> dict[str, float]:
    """Ratio of perplexities from differences of losses by text, with a 95 % bootstrap interval over windows.

    Windows are drawn anew within each text, so that texts weigh the same in every resample.
    """
    generator, means = torch.Generator().manual_seed(0), []
    for values in map(torch.tensor, differences.values()):
        drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        means.append(values[drawn].mean(1))
    low, high = torch.stack(means).mean(0).quantile(torch.tensor([0.025, 0.975])).exp().tolist()
    middle = sum(sum(values) / len(values) for values in differences.values()) / len(differences)
    return {"ratio": math.exp(middle), "low": low, "high": high}


def parts_of(record: dict) -> list[dict]:
    """The buckets of a window, and the whole of it."""
    buckets = record["buckets"]
    return [*buckets, {"start": 0, "end": buckets[-1]["end"], "loss": record["loss"]}]


def summarize(records: list[dict]) -> list[dict]:
    """Per text ("all texts" last), bucket, then the whole window, and form: perplexity, and its ratio to dense with an
    interval.

    Only windows that every form has read count.
    """
    forms = list(dict.fromkeys(record["variant"] for record in records))
    by_window: dict[tuple, dict] = {}
    for record in records:
        by_window.setdefault((record["text"], record["window"]), {})[record["variant"]] = record
    whole = {key: found for key, found in by_window.items() if len(found) == len(forms)}
    texts, rows = sorted({text for text, _ in whole}), []
    for text in [*texts, None] if len(texts) > 1 else texts:
        windows = [(name, found) for (name, _), found in whole.items() if text in (name, None)]
        parts = parts_of(windows[0][1][forms[0]])
        for i, part in enumerate(parts):
            row = {"text": text or "all texts", "start": part["start"], "end": part["end"], "windows": len(windows)}
            row["whole"] = i == len(parts) - 1
            for form in forms:
                losses = [parts_of(found[form])[i]["loss"] for _, found in windows]
                row[form] = {"perplexity": math.exp(sum(losses) / len(losses))}
                if "dense" in forms and form != "dense":
                    differences: dict[str, list[float]] = {}
                    for (name, found), loss in zip(windows, losses):
                        differences.setdefault(name, []).append(loss - parts_of(found["dense"])[i]["loss"])
                    row[form] |= interval(differences)
            rows.append(row)
    return rows


def table(rows: list[dict], costs: dict[str, dict]) -> str:
    """Markdown: perplexity, and in brackets its ratio to dense with the interval; then the cost of the same runs."""
    forms, lines = list(costs), []
    for row in rows:
        cells = [
            f"{row[form]['perplexity']:.2f}" + (
                f" ({row[form]['ratio']:.3f}; {row[form]['low']:.3f} to {row[form]['high']:.3f})"
                if "ratio" in row[form] else ""
            )
            for form in forms
        ]  # fmt: skip
        read = f"{row['start']:,} to {row['end']:,}" + ", the whole" * row.get("whole", False)
        lines.append([row["text"], read, str(row["windows"]), *cells])
    for name, digits in (("ms per token in the last chunk", 2), ("CPU seconds per window", 1), ("cache, MiB", 1)):
        lines.append([f"{name} | |", *(f"{costs[form][name]:.{digits}f}" for form in forms)])  # two cells are empty
    return markdown_table(["text", "tokens read before", "windows", *forms], lines)


def costs_of(records: list[dict]) -> dict[str, dict]:
    """Medians over windows, by form."""
    costs = {}
    for form in dict.fromkeys(record["variant"] for record in records):
        rows = [record["chunks"] for record in records if record["variant"] == form]
        sizes = [[b["end"] - a["end"] for a, b in zip([{"end": 0}, *chunks], chunks)] for chunks in rows]
        seconds = [sum(n * c["ms per token"] / 1000 for n, c in zip(*pair)) for pair in zip(sizes, rows)]
        costs[form] = {
            "CPU seconds per window": sorted(seconds)[len(seconds) // 2],
            "ms per token in the last chunk": sorted(c[-1]["ms per token"] for c in rows)[len(rows) // 2],
            "cache, MiB": rows[0][-1]["cache bytes"] / 2**20,
        }
    return costs


def draw_quality(axis, rows: list[dict], forms: list[str]) -> None:
    """Ratio to dense by position with intervals; perplexity itself where dense attention failed or was not asked."""
    middles = [(row["start"] + row["end"]) / 2 for row in rows]
    ratios = [row[form]["ratio"] for row in rows for form in forms if "ratio" in row[form]]
    fails = min(ratios, default=0) < 0.5
    for i, form in enumerate(forms):
        if fails:
            axis.plot(middles, [row[form]["perplexity"] for row in rows], marker="o", color=f"C{i}", label=form)
        elif "ratio" in rows[0][form]:
            ratios = [row[form]["ratio"] for row in rows]
            # Of a single window the three are one number, but for rounding.
            spread = [[max(0.0, row[form]["ratio"] - row[form]["low"]) for row in rows],
                      [max(0.0, row[form]["high"] - row[form]["ratio"]) for row in rows]]  # fmt: skip
            shifted = [middle * 1.03 ** (i - 1) for middle in middles]
            axis.errorbar(shifted, ratios, yerr=spread, marker="o", capsize=3, color=f"C{i}", label=form)
    if fails:
        axis.set(yscale="log", ylabel="perplexity")
    else:
        axis.axhline(1, color="C0", label="dense")
        axis.set(ylabel="perplexity over dense, same windows")
    axis.set(xscale="log", xlabel="tokens read before")
    axis.set_xticks(middles, [f"{row['start']:,}\nto {row['end']:,}" for row in rows], fontsize=7)
    axis.minorticks_off()


def draw(result: dict, path: Path) -> None:
    """Quality, time per token and size of the cache by position."""
    last = result["summary"][-1]["text"]
    rows = [row for row in result["summary"] if row["text"] == last and not row.get("whole")]
    figure, (quality, speed, memory) = new_figure(3)
    draw_quality(quality, rows, list(result["costs"]))
    for i, form in enumerate(result["costs"]):
        windows = [record["chunks"] for record in result["records"] if record["variant"] == form]
        ends = [chunk["end"] for chunk in windows[0]]
        times = [sorted(c["ms per token"] for c in chunk)[len(chunk) // 2] for chunk in zip(*windows)]
        speed.plot(ends, times, marker="o", color=f"C{i}", label=form)
        memory.plot(ends, [c["cache bytes"] / 2**20 for c in windows[0]], marker="o", color=f"C{i}", label=form)
    speed.set(xlabel="tokens read", ylabel="processor ms per token (median)", ylim=(0, None))
    memory.set(xlabel="tokens read", ylabel="cache in MiB", ylim=(0, None))
    for axis in (quality, speed, memory):
        axis.legend(fontsize=8)
    save_figure(figure, path, result["provenance"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M-Instruct, from pip")
    parser.add_argument("--adapter", help="folder of a PEFT adapter for the model")
    parser.add_argument("--texts", nargs="+", default=["python-docs", "python-source"], help="names of texts.py, paths")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=FORMS, metavar="NAME")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="what is not given is taken from it")
    parser.add_argument("--length", type=int, help="tokens of a window")
    parser.add_argument("--windows", type=int, help="of each text")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; .png and .md are written beside it")
    return parse_scaled(parser, SCALES, arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Reads what is missing; returns what the file holds."""
    options = parse(arguments)
    path = options.model or str(smollm2_135m())
    model = load_model(path, options.adapter, dtype=getattr(torch, options.dtype)).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    settings = {
        "model": Path(path).name, "adapter": options.adapter and Path(options.adapter).name, "dtype": options.dtype,
        "variants": {name: VARIANTS[name] for name in options.variants}, "windows of a text": options.windows,
    }  # fmt: skip
    records, beside = open_record(options.output, settings)
    done = {(r["variant"], r["text"], r["window"], r["length"]) for r in records}
    suffix = WITH_ADAPTER if options.adapter else ""
    todo = [
        (text, window, variant)
        for window in range(options.windows) for text in options.texts for variant in options.variants
        if (variant + suffix, text, window, options.length) not in done
    ]  # fmt: skip
    texts = {name: load_text(name) for name in {text for text, *_ in todo}}
    with saving(options.output, beside | {"records": records}) as save:
        for text, window, variant in tqdm(todo, unit="window"):
            tokens = window_of(
                lambda part: tokenizer(part, add_special_tokens=False, verbose=False).input_ids,
                texts[text], window, options.windows, options.length,
            )  # fmt: skip
            with in_form(model, variant):
                row = read_window(model, tokens, options.chunk_size)
            key = {"variant": variant + suffix, "text": text, "window": window, "length": options.length}
            records.append(key | row)
            save()
    same = [record for record in records if record["length"] == options.length]
    summary, costs = summarize(same), costs_of(same)
    result = json.loads(options.output.read_text()) | {"summary": summary, "costs": costs}
    write_json(options.output, result)
    write_beside(options.output, table(summary, costs), draw, result | {"records": same})
    return result


if __name__ == "__main__":
    main()
