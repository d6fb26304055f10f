"""Which sparse attention hurts a pretrained model least, before any training, at equal cost?

Every variant is put into the same model as a mask, layer by layer, and its perplexity is measured on the same windows
of 2,048 tokens. The cost is the mean number of (query, key) pairs per query; duplicates between patterns are paid for,
as a kernel that runs pattern by pattern pays for them. Results are kept in a JSON file and not computed twice.

    python -m examples.benchmarks.zero_shot_patch_study --output docs/results/zero_shot_patch_study.json
"""

import _pydecimal
import argparse
import json
import math
import pydoc_data.topics
import typing
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

from examples.perplexity import window_loss
from examples.reporting import provenance, write_json
from examples.smollm2 import smollm2_135m
from modeling_longnet.dilation_schedule import DilationSchedule


NAME = "masked_variant"
NUM_WINDOWS = {"English": 4, "code": 2}
PAPER = ((256, 1), (512, 2), (1024, 4), (2048, 8))

# A variant is a tuple of components, each adding (query, key) pairs:
#   ("segment", w, r)   LongNet's pattern: a head's queries p % w % r == s see the keys of their segment so selected
#   ("shifted", w, r)   the same, every second head's segments moved by w / 2
#   ("window", n, d)    the last n tokens; queries below d, if given, see all before them
#   ("strided", w, r)   EVERY query sees the selected keys of its segment
#   ("relative", n, r)  the last n tokens at distances that are multiples of r
#   ("powers", n)       the tokens at distances 1, 2, 4, 8, ... below n
#   ("sinks", n)        the first n tokens; counted once, as "once" counts every key
#   ("dense",)          all
#   ("retrieval", k)    the k heads of the model (KV groups, with their query heads) that look furthest are dense
#   ("modulo",) | ("contiguous",) | ("group",)   how heads get their offset s; ("count",) duplicates weigh more
# A dict {"default": variant, layer: variant, ...} gives layers their own.


def component_mask(component: tuple, heads: int, group: int, length: int, offsets: str) -> torch.Tensor:
    """Bool [H, N, N], causality not yet applied."""
    kind, *numbers = component
    position = torch.arange(length)
    q, k, head = position[:, None], position[None, :], torch.arange(heads)[:, None, None]
    if kind == "window":
        start = numbers[1] if len(numbers) > 1 else 0
        return ((k > q - numbers[0]) | (q < start)).expand(heads, -1, -1)
    if kind == "relative":
        return ((k > q - numbers[0]) & ((q - k) % numbers[1] == 0)).expand(heads, -1, -1)
    if kind == "powers":
        distance = (q - k).clamp(min=1)
        return ((distance & (distance - 1) == 0) & (distance < numbers[0])).expand(heads, -1, -1)
    if kind == "sinks":
        return (k < numbers[0]).expand(heads, length, -1)
    if kind == "dense":
        return torch.ones(heads, length, length, dtype=torch.bool)
    w, r = numbers
    numbering = {"modulo": head % r, "contiguous": head // -(-heads // r), "group": (head // group) % r}[offsets]
    if kind == "shifted":
        q, k = q + (head % 2) * (w // 2), k + (head % 2) * (w // 2)
    selects_q, selects_k = (q % w % r) == numbering, (k % w % r) == numbering
    return (q // w == k // w) & selects_k & (selects_q if kind != "strided" else True)


@lru_cache(maxsize=12)
def variant_mask(variant: tuple, heads: int, group: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of one layer, bool or float (log counts) [H, N, N], and the pairs per query of each head, [H]."""
    offsets = next((c[0] for c in variant if c[0] in ("modulo", "contiguous", "group")), "modulo")
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    counts = torch.zeros(heads, length, length, dtype=torch.int8)
    sinks = torch.zeros_like(causal)
    for component in variant:
        if component[0] == "sinks":
            sinks = component_mask(component, 1, 1, length, offsets)[0] & causal
        elif component[0] not in ("modulo", "contiguous", "group", "count", "retrieval"):
            counts += component_mask(component, heads, group, length, offsets) & causal
    work = counts.sum((1, 2), dtype=torch.long) / length + (sinks & (counts == 0)).sum((1, 2)) / length
    if ("count",) in variant:
        return torch.where(sinks, 1, counts).float().log(), work
    return (counts > 0) | sinks, work


def schedule_of_variant(variant: tuple | dict | None) -> DilationSchedule | None:
    """The schedule with which `patch_model` does the same, or None where it cannot.

    The patch has a dense first segment in front of its window, as ("window", n, 2 * n) has.
    """
    if not isinstance(variant, tuple):
        return None
    kinds = [component[0] for component in variant]
    options = {"overlap": "count" if "count" in kinds else "once", "num_sink_tokens": 0}
    patterns = []
    for i, (kind, *numbers) in enumerate(variant):
        if kind == "segment":
            patterns.append(tuple(numbers))
        elif kind == "window" and i == 0:
            patterns.append((2 * numbers[0], 1))
            options["local"] = "sliding"
        elif kind == "sinks":
            options["num_sink_tokens"] = numbers[0]
        elif kind in ("modulo", "contiguous"):
            options["head_offsets"] = kind
        elif kind != "count":
            return None
    if patterns != sorted(patterns):
        return None
    return DilationSchedule(*(tuple(x) for x in zip(*patterns)), **options)


class Study:
    """The model, its texts, and the attention function that reads the current variant."""

    def __init__(self, model_path: Path, length: int):
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self.length, self.variant, self.work, self.mass, self.far_mass = length, None, [], None, None
        config = self.model.config
        self.heads, self.group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
        texts = {
            "English": "\n".join(pydoc_data.topics.topics.values()),
            "code": Path(_pydecimal.__file__).read_text(),
        }
        self.calibration = tokenizer(Path(typing.__file__).read_text(), return_tensors="pt").input_ids[:, :length]
        self.windows = {}
        for name, text in texts.items():
            ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
            count = NUM_WINDOWS[name]
            starts = [i * (len(ids) - length) // (count - 1) for i in range(count)]
            self.windows[name] = {str(i): ids[s : s + length][None] for i, s in enumerate(starts)}
        AttentionInterface.register(NAME, self.attention)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)

    def attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        variant = self.variant
        if isinstance(variant, dict):
            variant = variant.get(module.layer_idx, variant["default"])
        mask, work = variant_mask(variant, self.heads, self.group, query.shape[2])
        k = next((c[1] for c in variant if c[0] == "retrieval"), 0)
        if k:
            dense = torch.zeros(self.heads, dtype=torch.bool)
            for head in self.far_heads(k):
                dense[head[1]] |= head[0] == module.layer_idx
            causal = torch.ones(mask.shape[1:], dtype=torch.bool).tril()
            mask = torch.where(dense[:, None, None], causal, mask)
            work = torch.where(dense, (mask.shape[1] + 1) / 2, work)
        self.work.append(work.mean().item())
        key, value = (x.repeat_interleave(self.group, 1) for x in (key, value))
        if self.mass is not None:
            weights = (query @ key.mT * scaling).masked_fill(~torch.ones_like(mask[0]).tril(), -torch.inf).softmax(-1)
            self.mass.append((weights * ~mask).sum(-1).mean((0, 2)))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[None], scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    def far_heads(self, count: int) -> list[tuple[int, int]]:
        """(layer, query head) of the KV groups with the most attention beyond 128 tokens and 4 sinks.

        Calibrated on a text of its own, which no variant is judged by.
        """
        if self.far_mass is None:
            self.variant, self.mass = (("window", 128), ("sinks", 4)), []
            self.model.set_attn_implementation(NAME)
            self.model.model(self.calibration)
            self.far_mass = torch.stack(self.mass).view(len(self.mass), -1, self.group).mean(-1)
            self.mass = None
        mass = self.far_mass
        chosen = mass.flatten().topk(count // self.group).indices
        groups = [(int(i) // mass.shape[1], int(i) % mass.shape[1]) for i in chosen]
        return [(layer, g * self.group + j) for layer, g in groups for j in range(self.group)]

    @torch.no_grad()
    def loss(self, variant: tuple | dict | None, ids: torch.Tensor) -> tuple[float, float]:
        """Mean loss in nats on one window [1, N] and the pairs per query; None is the model's own attention."""
        if isinstance(variant, tuple) and (heads := next((c[1] for c in variant if c[0] == "retrieval"), 0)):
            self.far_heads(heads)
        self.variant, self.work = variant, []
        self.model.set_attn_implementation("sdpa" if variant is None else NAME)
        loss = window_loss(self.model, ids[0])
        pairs = sum(self.work) / len(self.work) if self.work else (self.length + 1) / 2
        return loss, pairs


def compare(result: dict, dense: dict) -> dict:
    """Perplexity per text and its ratio to dense on the same windows; the mean of the texts' ratios is geometric."""
    ratios = {}
    for text, losses in result["losses"].items():
        ratios[text] = math.exp(sum(loss - dense["losses"][text][i] for i, loss in losses.items()) / len(losses))
    return {
        "perplexity": {text: math.exp(sum(x.values()) / len(x)) for text, x in result["losses"].items()},
        "ratio": ratios,
        "mean_ratio": math.exp(sum(map(math.log, ratios.values())) / len(ratios)),
    }


def variants() -> dict[str, tuple | dict | None]:
    """Everything that was tried, by name. A name of the form "256/1 512/2 ..." is a schedule of patch_model."""
    dilated = tuple(("segment", w, r) for w, r in PAPER[1:])
    sliding, sinks = ("window", 128), ("sinks", 4)
    tried = {
        "dense": None,
        "blocks, count": (("segment", 256, 1), *dilated, ("count",)),
        "blocks, once": (("segment", 256, 1), *dilated),
        "blocks, once, 4 sinks": (("segment", 256, 1), *dilated, sinks),
        "blocks shifted in odd heads, 4 sinks": (*(("shifted", w, r) for w, r in PAPER), sinks),
        "sliding, 4 sinks": (sliding, *dilated, sinks),
        "sliding, dense first segment, 4 sinks (the default patch)": (("window", 128, 256), *dilated, sinks),
        "sliding, count, 4 sinks": (sliding, *dilated, sinks, ("count",)),
        "sliding, contiguous, 4 sinks": (sliding, *dilated, sinks, ("contiguous",)),
        "sliding, offset per KV group, 4 sinks": (sliding, *dilated, sinks, ("group",)),
        "sliding, shifted dilated, 4 sinks": (sliding, *(("shifted", w, r) for w, r in PAPER[1:]), sinks),
    }
    schedules = {
        "480/1": (240,),
        "448/1 2048/8": (224, (2048, 8)),
        "384/1 1024/4 2048/8": (192, (1024, 4), (2048, 8)),
        "416/1 1024/4": (208, (1024, 4)),
        "352/1 512/2": (176, (512, 2)),
        "424/1 512/4 1024/8 2048/16": (212, (512, 4), (1024, 8), (2048, 16)),
        "352/1 2048/4": (176, (2048, 4)),
        "256/1 2048/3": (128, (2048, 3)),
        "224/1 1024/2": (112, (1024, 2)),
    }
    for name, (window, *rest) in schedules.items():
        tried[f"sliding {name}, 4 sinks"] = (("window", window), *(("segment", *p) for p in rest), sinks)
    for n in (0, 1, 8, 16, 32):
        tried[f"sliding, {n} sinks"] = (sliding, *dilated, ("sinks", n))
    tried |= {
        "window 128, strided keys 2048/9, 4 sinks": (sliding, ("strided", 2048, 9), sinks),
        "window 192, strided keys 2048/20, 4 sinks": (("window", 192), ("strided", 2048, 20), sinks),
        "window 128, relative 2048/9, 4 sinks": (sliding, ("relative", 2048, 9), sinks),
        "window 230, powers of two, 4 sinks": (("window", 230), ("powers", 2048), sinks),
        "window 128, 33 heads dense, 4 sinks": (sliding, sinks, ("retrieval", 33)),
        "window 64, 51 heads dense, 4 sinks": (("window", 64), sinks, ("retrieval", 51)),
    }
    for dense_layers in ((0, 10, 20), (8, 15, 22)):
        tried[f"window 156, layers {dense_layers} dense, 4 sinks"] = {
            "default": (("window", 156), sinks), **{i: (("dense",),) for i in dense_layers}
        }  # fmt: skip
    local, far = (("window", 128), sinks), (("window", 256), (("segment", 1024, 2)), sinks)
    tried["even layers window 128, odd 256 + 1024/2, 4 sinks"] = {"default": far, **{i: local for i in range(0, 30, 2)}}
    sparse = (("segment", 512, 4), ("segment", 1024, 8), ("segment", 2048, 16))
    tried |= {
        "sliding 424/1 512/4 1024/8 2048/16, contiguous, 4 sinks": (("window", 212), *sparse, sinks, ("contiguous",)),
        "sliding 416/1 512/4 1024/8 2048/16, 8 sinks": (("window", 208), *sparse, ("sinks", 8)),
        "window 190, 15 heads dense, 4 sinks": (("window", 190), sinks, ("retrieval", 15)),
    }
    return tried


def table(results: dict) -> str:
    """Markdown: the variants from best to worst on the windows that all of them have read."""
    tried = results["variants"]
    shared = {text: set.intersection(*(set(r["losses"][text]) for r in tried.values())) for text in NUM_WINDOWS}
    lines = ["| variant | pairs per query | English | code | ratio | ratio, all windows |", "|---|" + "---:|" * 5]
    rows = []
    for name, result in tried.items():
        losses = {text: {i: x for i, x in result["losses"][text].items() if i in shared[text]} for text in NUM_WINDOWS}
        measured = compare({"losses": losses}, tried["dense"])
        more = result["losses"] != losses
        cells = [
            name + " *" * (schedule_of_variant(variants()[name]) is None and name != "dense"),
            f"{result['pairs_per_query']:.0f}",
            *(f"{measured['perplexity'][text]:.2f} ({measured['ratio'][text]:.2f}x)" for text in NUM_WINDOWS),
            f"{measured['mean_ratio']:.3f}",
            f"{result['mean_ratio']:.3f}" if more else "",
        ]
        rows.append((measured["mean_ratio"], "| " + " | ".join(cells) + " |"))
    return "\n".join(lines + [row for _, row in sorted(rows)])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="folder or Hub id; default SmolLM2-135M out of its pip package")
    parser.add_argument("--output", type=Path, default=Path("docs/results/zero_shot_patch_study.json"))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--all-windows", action="store_true", help="not only every second window of each text")
    parser.add_argument("--only", nargs="+", help="only the variants of these names")
    options = parser.parse_args(arguments)
    study = Study(options.model or smollm2_135m(), options.length)
    results = json.loads(options.output.read_text()) if options.output.exists() else {"variants": {}}
    windows = [
        (text, i)
        for text, by_index in study.windows.items()
        for i in by_index
        if options.all_windows or int(i) % 2 == 0
    ]
    wanted = {name: variant for name, variant in variants().items() if not options.only or name in options.only}
    for name, variant in (bar := tqdm(wanted.items())):
        bar.set_description(name)
        result = results["variants"].setdefault(name, {"losses": {text: {} for text in study.windows}})
        for text, i in windows:
            if i not in result["losses"][text]:
                loss, result["pairs_per_query"] = study.loss(variant, study.windows[text][i])
                result["losses"][text][i] = loss
        result |= compare(result, results["variants"]["dense"])
        results["run"] = provenance() | {"length": options.length}
        write_json(options.output, results)
        tqdm.write(f"{result['pairs_per_query']:7.1f} {result['mean_ratio']:.3f} {result['ratio']} {name}")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
