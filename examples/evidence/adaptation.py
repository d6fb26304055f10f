"""What gives most back, per minute, to a model whose attention was just replaced?

    python -m examples.evidence.adaptation --output docs/results/evidence_adaptation.json

Each row is a form of attention (`reading.VARIANTS`) and a method, trained on the same tokens of a text and judged on
the text's end, which no training sees, in windows of each length:

    none            as it was patched
    lora            LoRA on the projections of the attention
    lora-norms      the same, and norms and embeddings trained directly, as LongLoRA found needed
    transfer-lora   first, for some of the tokens, attention transfer: each patched layer's attention is fitted to that
                    of the dense model on the dense model's hidden states, with the weights of LoRA and no backward
                    through the model (as in LoLCATs, arXiv 2410.10254); then LoRA on the others

A finished row is written and not made again: stop it and go on with the same command. `--rows` names some of the rows,
so that several processes share the work, each with an output of its own; `--merge` joins them. Times are processor
time on a CPU, and of a GPU by the clock: there, processes that run side by side slow each other down.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from examples.evidence.reading import VARIANTS
from examples.evidence.records import agree, mean, measure_missing
from examples.lora_finetune import Options, lora_config, tokenize
from examples.measuring import clock
from examples.perplexity import perplexities
from examples.reporting import markdown_table, new_figure, save_figure, write_beside, write_json
from examples.runs import check_least, parse_scaled
from examples.smollm2 import smollm2_135m
from modeling_longnet import patch_model


SCALES = {
    "cpu": {"max_steps": 8, "block_size": 2048, "lengths": [2048, 4096], "eval_tokens": 8192, "dtype": "float32"},
    "gpu": {"max_steps": 24, "block_size": 4096, "lengths": [4096, 8192], "eval_tokens": 8192, "dtype": "bfloat16"},
}
METHODS = {
    "none": "not trained",
    "lora": "LoRA",
    "lora-norms": "LoRA, norms, embeddings",
    "transfer-lora": "attention transfer, then LoRA",
}
DENSE_METHODS = "none", "lora", "lora-norms"  # a dense model has nothing to be fitted to
YARDSTICK = {"variant": "dense", "method": "lora"}


class Masters:
    """Weights under training in float32 beside those of a model in half precision, where small steps would vanish."""

    def __init__(self, model: nn.Module):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.pairs = [(p, p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())) for _, p in named]
        self.adapters, self.direct = (
            [master for (name, _), (_, master) in zip(named, self.pairs) if ("lora_" in name) is of_adapter]
            for of_adapter in (True, False)
        )

    def take_gradients(self) -> None:
        for own, master in self.pairs:
            if own is not master and own.grad is not None:
                master.grad, own.grad = own.grad.float(), None

    @torch.no_grad()
    def give_back(self) -> None:
        for own, master in self.pairs:
            if own is not master:
                own.copy_(master)


def optimize(
    model: nn.Module,
    blocks: list[torch.Tensor],
    backward: Callable[[torch.Tensor], float],
    rates: tuple[float, float],
    device: str,
    name: str,
) -> dict:
    """One step of AdamW for each block [N]: a tenth of them to warm up, then a cosine to zero, gradients clipped at 1.

    Args:
        backward: of a block [1, N], makes the gradients and returns what was lost.
        rates: of LoRA's weights, and of those that are trained directly.

    Returns:
        The losses and the seconds of each step.
    """
    masters = Masters(model)
    groups = [{"params": weights, "lr": rate} for weights, rate in zip((masters.adapters, masters.direct), rates)]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    warmup = max(1, len(blocks) // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, len(blocks) - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses, seconds = [], []
    for block in tqdm(blocks, desc=name, unit="step"):
        began = clock(device)
        losses.append(backward(block[None].to(device)))
        masters.take_gradients()
        nn.utils.clip_grad_norm_([master for _, master in masters.pairs], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        masters.give_back()
        seconds.append(clock(device) - began)
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"{name} has a loss that is not finite: {losses}.")
    return {"losses": losses, "seconds": seconds}


def next_token_backward(model: nn.Module) -> Callable[[torch.Tensor], float]:
    def backward(block: torch.Tensor) -> float:
        loss = model(input_ids=block, labels=block, use_cache=False).loss
        loss.backward()
        return loss.item()

    return backward


def patched_attentions(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The attention modules of the layers that a patch has changed, by their names.

    Raises:
        ValueError: not one module for each of them, in a family that names its attention otherwise.
    """
    layers = model.config.dilated_attention["layers"]
    found = {
        name: module for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and getattr(module, "layer_idx", None) in layers
    }  # fmt: skip
    if sorted(module.layer_idx for module in found.values()) != sorted(layers):
        raise ValueError(f"`model` must have one attention module for each of the layers {layers}, got {list(found)}.")
    return found


@contextmanager
def listening(modules: dict[str, nn.Module], function: Callable) -> Iterator[None]:
    """While open, `function` gets each module's name, arguments, keywords and output."""
    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, name=name: function(name, args, kwargs, output), with_kwargs=True
        )
        for name, module in modules.items()
    ]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def transfer_backward(student: PreTrainedModel, teacher: PreTrainedModel) -> Callable[[torch.Tensor], float]:
    """Gradients of each patched layer's squared error, over the mean square of what the dense layer gives.

    The dense model reads the block, and each of its layers hands its input to the student's, whose graph ends there.
    """
    students = patched_attentions(student)
    teachers = {name: teacher.get_submodule(name) for name in students}

    def backward(block: torch.Tensor) -> float:
        errors = []

        def fit(name: str, args: tuple, kwargs: dict, output) -> None:
            wanted = (output[0] if isinstance(output, tuple) else output).float()
            with torch.enable_grad():  # a block has no padding, and the patch makes a mask of its own
                got = students[name](*args, **{**kwargs, "attention_mask": None})
                got = (got[0] if isinstance(got, tuple) else got).float()
                error = (got - wanted).square().mean() / wanted.square().mean()
                error.backward()
            errors.append(error.item())

        with torch.no_grad(), listening(teachers, fit):
            teacher.get_decoder()(input_ids=block, use_cache=False)
        return statistics.fmean(errors)

    return backward


def in_order(rows: list[dict], count: int, seed: int) -> list[torch.Tensor]:
    """`count` of the blocks [N] of a text, in an order of the seed; fewer come again."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < count:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i]["input_ids"] for i in order[:count]]


def load_dense(options: argparse.Namespace) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    return model.to(options.device).eval()


def measure_row(
    options: argparse.Namespace,
    blocks: list[torch.Tensor],
    held_out: torch.Tensor,
    variant: str,
    method: str,
    seed: int,
    adapter: Path | None = None,
) -> dict:
    """Perplexity by length of a form after a method on blocks [N] each, and what its training took; the adapter is
    kept in a folder, if one is given."""
    set_seed(seed)
    model, name = load_dense(options), f"{variant}, {METHODS[method]}"
    if VARIANTS[variant] is not None:
        patch_model(model, **VARIANTS[variant])
    result: dict = {}

    def judge() -> dict[str, float]:
        return perplexities(model, held_out, options.lengths, name)

    def train(part: list[torch.Tensor], backward: Callable) -> dict:
        model.train()
        rates = options.learning_rate, options.direct_learning_rate
        return optimize(model, part, backward, rates, options.device, name)

    if method != "none":
        settings = Options(lora_rank=options.lora_rank, lora_alpha=2 * options.lora_rank,
                           train_norms_and_embeddings=method == "lora-norms")  # fmt: skip
        model = get_peft_model(model, lora_config(model, settings))
        result |= {"trained parameters": model.get_nb_trainable_parameters()[0]}
        first = options.transfer_steps if method == "transfer-lora" else 0
        if first:
            result["transfer"] = train(blocks[:first], transfer_backward(model.get_base_model(), load_dense(options)))
            result["transfer"]["perplexity"] = judge()
        result["training"] = train(blocks[first:], next_token_backward(model))
        if adapter is not None:
            model.save_pretrained(adapter)
    return result | {"tokens": len(blocks) * options.block_size * (method != "none"), "perplexity": judge()}


def seconds_of(record: dict) -> list[float]:
    """Seconds that a row's transfer and training took together, after each of them: by the median step of each.

    The first step may have compiled kernels, and others may have waited for another process.
    """
    parts = [record[part]["seconds"] for part in ("transfer", "training") if part in record]
    return [sum(len(p) * statistics.median(p) for p in parts[: i + 1]) for i in range(len(parts))]


def compare(own: list[dict], yardstick: list[dict], length: str) -> dict[str, float | None]:
    """Perplexity of a row over its seeds, and its ratio to the yardstick of the same seeds with half the range."""
    dense = {record["seed"]: record["loss"][length] for record in yardstick}
    ratios = [math.exp(r["loss"][length] - dense[r["seed"]]) for r in own if r["seed"] in dense]
    return {
        "perplexity": math.exp(statistics.fmean(record["loss"][length] for record in own)),
        "ratio": statistics.fmean(ratios) if ratios else None,
        "spread": (max(ratios) - min(ratios)) / 2 if ratios else None,
    }


def summarize(records: list[dict], lengths: list[int]) -> list[dict]:
    """Per text, form and method, means over seeds: perplexities, their ratio to dense attention with LoRA, the time,
    and how many nats a minute has won at the longest length. What there is nothing to compare with is None."""
    rows, longest = [], str(lengths[-1])
    logs = [
        record | {"loss": {length: math.log(x) for length, x in record["perplexity"].items()},
                  "seconds": (seconds_of(record) or [0.0])[-1]}
        for record in records
    ]  # fmt: skip
    for text, variant, method in product(dict.fromkeys(record["text"] for record in records), VARIANTS, METHODS):
        key = {"text": text, "variant": variant, "method": method}
        same = [record for record in logs if record["text"] == text]
        own, dense = ([r for r in same if wanted.items() <= r.items()] for wanted in (key, YARDSTICK))
        if not own:
            continue
        row = key | {"seeds": len(own), "seconds": mean(own, "seconds")}
        row["lengths"] = {str(length): compare(own, dense, str(length)) for length in lengths}
        before = mean(same, "loss", longest, variant=variant, method="none")
        won = None if before is None else before - mean(own, "loss", longest)
        row["nats per minute"] = 60 * won / row["seconds"] if won is not None and row["seconds"] else None
        rows.append(row)
    return rows


def table(summary: list[dict], lengths: list[int]) -> str:
    """Markdown: perplexity, and in brackets its ratio to dense attention with LoRA, with half the range over seeds."""
    titles = ["text", "attention", "trained", *(f"{n:,} tokens" for n in lengths), "seconds", "nats per minute"]
    lines = []
    for row in summary:
        cells = []
        for length in map(str, lengths):
            found = row["lengths"][length]
            cell = f"{found['perplexity']:.3f}"
            if found["ratio"] is not None:
                spread = f" ± {found['spread']:.3f}" if row["seeds"] > 1 else ""
                cell += f" ({found['ratio']:.3f}{spread})"
            cells.append(cell)
        won = row["nats per minute"]
        cells += [f"{row['seconds']:.1f}" if row["seconds"] else "-", "-" if won is None else f"{won:.3f}"]
        lines.append([row["text"], row["variant"], METHODS[row["method"]], *cells])
    return markdown_table(titles, lines, texts=3)


def draw(result: dict, path: Path) -> None:
    """Perplexity at the longest length over that of dense attention with LoRA, by the time of the training."""
    lengths, records = result["settings"]["lengths"], result["records"]
    longest = str(lengths[-1])
    texts = list(dict.fromkeys(record["text"] for record in records))
    figure, axes = new_figure(len(texts))
    for axis, text in zip(axes, texts):
        own = [record for record in records if record["text"] == text]
        dense = [record["perplexity"][longest] for record in own if YARDSTICK.items() <= record.items()]
        over = statistics.fmean(dense) if dense else 1.0
        for i, variant in enumerate(VARIANTS):
            begin = [r for r in own if (r["variant"], r["method"]) == (variant, "none")]
            start = [(0.0, statistics.fmean(r["perplexity"][longest] for r in begin) / over)] if begin else []
            for method, style in zip(METHODS, ("", "-o", "--s", ":^")):
                rows = [r for r in own if (r["variant"], r["method"]) == (variant, method)]
                if method == "none" or not rows:
                    continue
                for r in rows:
                    judged = [r["transfer"]["perplexity"]] if "transfer" in r else []
                    points = [x[longest] / over for x in (*judged, r["perplexity"])]
                    label = f"{variant}, {METHODS[method]}" if r is rows[0] else None
                    axis.plot(*zip(*start, *zip(seconds_of(r), points)), style, color=f"C{i}", label=label)
        over_what = "perplexity over dense + LoRA" if dense else "perplexity"
        axis.set(xlabel="seconds of training", ylabel=f"{over_what}, {int(longest):,} tokens", title=text)
        axis.legend(fontsize=7)
    save_figure(figure, path, records[-1]["provenance"])


def default_rows(variants: list[str]) -> list[str]:
    """Every form with every method, named "form:method"."""
    return [f"{v}:{m}" for v in variants for m in (DENSE_METHODS if VARIANTS[v] is None else METHODS)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M-Instruct, from pip")
    parser.add_argument("--text", nargs="+", default=["python-docs"], help="names of texts.py, paths")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME",
                        default=["dense", "default patch", "with memory"])  # fmt: skip
    parser.add_argument("--rows", nargs="+", help="some of the rows, each FORM:METHOD; default all of --variants")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="what is not given is taken from it")
    parser.add_argument("--max-steps", type=int, help="blocks that a row trains on")
    parser.add_argument("--transfer-steps", type=int, help="of these, for attention transfer; default a third")
    parser.add_argument("--block-size", type=int, help="tokens of a block")
    parser.add_argument("--lengths", type=int, nargs="+", help="of the windows in which the end of a text is read")
    parser.add_argument("--eval-tokens", type=int, help="tokens of that end")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of LoRA")
    parser.add_argument("--direct-learning-rate", type=float, default=1e-4, help="of norms and embeddings")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adapters", type=Path, help="keep adapters of the rows that are measured in this folder")
    parser.add_argument("--merge", nargs="+", type=Path, help="put these files' records into the output, measure none")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; .png and .md are written beside it")
    options = parse_scaled(parser, SCALES, arguments)
    if options.transfer_steps is None:
        options.transfer_steps = options.max_steps // 3
    check_least(options, ("block_size", "max_steps", "seeds", "lora_rank"))
    options.lengths = sorted(options.lengths)
    known = default_rows(list(VARIANTS))
    for row in options.rows or ():
        if row not in known:
            parser.error(f"--rows must be of {', '.join(map(repr, known))}, got {row!r}")
    if not 0 <= options.transfer_steps < options.max_steps:
        parser.error(
            f"--transfer-steps must leave some of --max-steps {options.max_steps}, got {options.transfer_steps}"
        )
    if options.lengths[0] < 2 or options.lengths[-1] > options.eval_tokens:
        parser.error(f"--lengths must be of 2 to --eval-tokens {options.eval_tokens}, got {options.lengths}")
    return options


def merge(paths: list[Path], output: Path) -> dict:
    """One record of several files that were measured with the same settings, written to `output`; of two records of
    the same row the first counts.

    Raises:
        ValueError: settings that differ.
    """
    parts = [(path, json.loads(path.read_text())) for path in ([output] if output.exists() else []) + paths]
    settings, records = parts[0][1]["settings"], {}
    for path, part in parts:
        settings = agree(path, part["settings"], settings)
        for record in part["records"]:
            records.setdefault(tuple(record[name] for name in ("seed", "text", "variant", "method")), record)
    result = {"settings": settings, "records": list(records.values())}
    write_json(output, result)
    return result


def run(options: argparse.Namespace) -> dict:
    """Measures the rows that the output lacks."""
    options.model = options.model or str(smollm2_135m())
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    names = ("block_size", "max_steps", "transfer_steps", "lengths", "eval_tokens", "dtype", "learning_rate",
             "direct_learning_rate", "lora_rank")  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
    rows = options.rows or default_rows(options.variants)
    used = {row.rsplit(":", 1)[0] for row in rows}
    forms = {name: form for name, form in VARIANTS.items() if name in used}
    settings |= {"model": Path(options.model).name, "variants": forms}
    texts = {Path(text).name: text for text in options.text}
    wanted = [
        {"seed": seed, "text": text, "variant": row.rsplit(":", 1)[0], "method": row.rsplit(":", 1)[1]}
        for seed in range(options.seeds) for text in texts for row in rows
        if seed == 0 or not row.endswith(":none")
    ]  # fmt: skip

    @cache
    def split(text: str) -> tuple[list[dict], torch.Tensor]:
        given = Options(text=texts[text], block_size=options.block_size, eval_tokens=options.eval_tokens)
        return tokenize(tokenizer, given)

    def measure(seed: int, text: str, variant: str, method: str) -> dict:
        rows, held_out = split(text)
        name = f"{text}-{variant}-{method}-{seed}".replace(" ", "-").replace("'", "")
        adapter = options.adapters and options.adapters / name
        return measure_row(options, in_order(rows, options.max_steps, seed), held_out, variant, method, seed, adapter)

    return measure_missing(options.output, settings, wanted, measure)


def main(arguments: list[str] | None = None) -> dict:
    """Measures what is missing, or merges; returns what the file holds."""
    options = parse(arguments)
    result = merge(options.merge, options.output) if options.merge else run(options)
    lengths = result["settings"]["lengths"]
    result["summary"] = summarize(result["records"], lengths)
    write_json(options.output, result)
    write_beside(options.output, table(result["summary"], lengths), draw, result)
    return result


if __name__ == "__main__":
    main()
