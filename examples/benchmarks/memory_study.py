"""Which memory finds what a model has read? Needles, passkeys and perplexity by the settings of `patch_model(memory=)`.

Every measurement is written when it is made, and none is made twice: run it again to go on, or with more trials.

    python -m examples.benchmarks.memory_study --tasks needles-2048 passkey-2048 --output docs/results/memory_study.json
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.evidence.records import check_settings, open_record, saving
from examples.evidence.ruler_tasks import DEPTHS, NOISE, PASSKEY
from examples.perplexity import window_loss
from examples.reporting import new_figure, save_figure
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet import calibrate_memory, patch_model, unpatch_model


WINDOW = {"segment_lengths": [512], "dilation_rates": [1]}
DILATED = {"segment_lengths": [512, 2048, 8192], "dilation_rates": [1, 4, 16]}
CALIBRATION = "python-docs", 4096  # the text, and how many tokens of its beginning


def _memory(top_k: int, block_size: int, dimensions: int | None = None, patch: dict = WINDOW, **more) -> dict:
    return patch | {"memory": {"block_size": block_size, "top_k": top_k, "dimensions": dimensions} | more}


# Of `patch_model`; None for the model as it is. Named by blocks x tokens of a block.
SETTINGS = {
    "dense": None,
    "patch without memory": DILATED,
    "32 x 8, 16 dimensions": _memory(32, 8, 16),
    "32 x 8": _memory(32, 8),
    "64 x 4": _memory(64, 4),
    "64 x 4, 16 dimensions": _memory(64, 4, 16),
    "64 x 8, 16 dimensions": _memory(64, 8, 16),
    "32 x 8, 24 dimensions": _memory(32, 8, 24),
    "32 x 8, 32 dimensions": _memory(32, 8, 32),
    "32 x 8, 8 dimensions": _memory(32, 8, 8),
    "16 x 16, 16 dimensions": _memory(16, 16, 16),
    "32 x 8, 16 dimensions, mean": _memory(32, 8, 16, rank="mean"),
    "32 x 8, 16 dimensions, bound": _memory(32, 8, 16, rank="bound"),
    "32 x 8, 16 dimensions, beside dilated": _memory(32, 8, 16, patch=DILATED),
    "32 x 8, 16 dimensions, layers 5-29": _memory(32, 8, 16, layers=list(range(5, 30))),
    "32 x 8, 16 dimensions, true distances": _memory(32, 8, 16, max_distance=None),
    "32 x 8, 16 dimensions, distances to 2048": _memory(32, 8, 16, max_distance=2048),
    "32 x 8, 16 dimensions, distances to 7936": _memory(32, 8, 16, max_distance=7936),
}
WORDS = (
    "apple river stone cloud tiger maple ocean candle violin garden rocket silver window pepper bridge forest mirror "
    "castle dragon helmet island jacket kitten ladder magnet needle orange pencil quartz ribbon"
).split()


class Cases:
    """Prompts of `length` tokens and the tokens of their answers."""

    def __init__(self, tokenizer):
        self.encode = lambda text: tokenizer(text, verbose=False).input_ids
        self.filler = self.encode(NOISE + " ")

    def passkey(self, length: int, trial: int) -> tuple[list[int], list[int]]:
        """One number in filler, at one depth after the other."""
        key = str(random.Random(trial).randrange(10000, 99999))
        head, needle, tail = (self.encode(part.format(key=key)) for part in PASSKEY)
        answer = self.encode(f" {key}")
        room = length - len(head) - len(needle) - len(tail) - len(answer)
        text = (self.filler * (room // len(self.filler) + 1))[:room]
        at = int(DEPTHS[trial % len(DEPTHS)] * room) // len(self.filler) * len(self.filler)
        return head + text[:at] + needle + text[at:] + tail, answer

    def needles(self, length: int, trial: int, count: int = 12) -> tuple[list[int], list[int]]:
        """Twelve numbers under twelve names, of which one is asked for."""
        chosen = random.Random(77 + trial)
        names = chosen.sample(WORDS, count)
        numbers = [str(chosen.randrange(1000, 9999)) for _ in names]
        asked = chosen.randrange(count)
        head = self.encode("Some special magic numbers are hidden within the following text. Memorize them.\n")
        name = names[asked]
        tail = self.encode(f"\nWhat is the special magic number for {name}? The special magic number for {name} is")
        lines = [self.encode(f"\nThe special magic number for {k} is {v}.\n") for k, v in zip(names, numbers)]
        answer = self.encode(f" {numbers[asked]}")
        room = length - len(head) - len(tail) - sum(map(len, lines)) - len(answer)
        text, step, middle = self.filler * (room // len(self.filler) + 2), room // (count + 1), []
        for i, line in enumerate(lines):
            middle += text[i * step : (i + 1) * step] + line
        return head + middle + text[count * step : room] + tail, answer


@torch.inference_mode()
def answers(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> dict:
    """Log-likelihood of the answer, and whether greedy decoding would give it."""
    tokens = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    target = tokens[0, -len(answer) :]
    likelihood = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
    return {"log_likelihood": likelihood, "found": bool((logits.argmax(-1) == target).all())}


def measure(model, tokenizer, task: str, trial: int) -> dict:
    """One trial of `needles-LENGTH`, `passkey-LENGTH` or `perplexity-TEXT-LENGTH` (the text's end; one trial)."""
    kind, *text, length = task.split("-")
    began = time.perf_counter()
    if kind == "perplexity":
        tokens = tokenizer(load_text("-".join(text)), verbose=False).input_ids[-int(length) :]
        result = {"loss": window_loss(model, torch.tensor(tokens))}
    else:
        result = answers(model, *getattr(Cases(tokenizer), kind)(int(length), trial))
    return result | {"seconds": round(time.perf_counter() - began, 2)}


def summarize(records: list[dict]) -> dict[str, dict[str, dict]]:
    """Per task and setting: share found and mean log-likelihood, or perplexity."""
    summary: dict = {}
    for record in records:
        summary.setdefault(record["task"], {}).setdefault(record["setting"], []).append(record)
    for by_setting in summary.values():
        for name, rows in by_setting.items():
            if "loss" in rows[0]:
                by_setting[name] = {"perplexity": round(math.exp(rows[0]["loss"]), 3)}
            else:
                found, total = sum(row["found"] for row in rows), len(rows)
                mean = sum(row["log_likelihood"] for row in rows) / total
                by_setting[name] = {"found": found, "trials": total, "log_likelihood": round(mean, 3)}
    return summary


def draw(result: dict, path: Path) -> None:
    """Share found, or perplexity over dense, by task and setting."""
    tasks = list(result["summary"])
    names = [name for name in SETTINGS if any(name in result["summary"][task] for task in tasks)]
    figure, axes = new_figure(2)
    for axis, is_text in zip(axes, (False, True)):
        own = [task for task in tasks if task.startswith("perplexity") == is_text]
        for i, task in enumerate(own):
            rows, height, label = result["summary"][task], 0.8 / len(own), task
            for y, name in enumerate(names):
                if name in rows and is_text and "dense" in rows:
                    width = rows[name]["perplexity"] / rows["dense"]["perplexity"] - 1
                elif name in rows and not is_text:
                    width = rows[name]["found"] / rows[name]["trials"]
                else:
                    continue
                axis.barh(y + i * height, width, height, color=f"C{i}", label=label)
                label = None  # once in the legend
        axis.set_yticks([y + 0.4 for y in range(len(names))], names if not is_text else [], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("perplexity above dense" if is_text else "share found")
        if own:
            axis.legend(fontsize=7)
    save_figure(figure, path, result["provenance"])


def bring_into(model: PreTrainedModel, tokenizer, current: str, name: str) -> None:
    """From one of the SETTINGS into another, calibrated where it needs that."""
    if SETTINGS[current] is not None:
        unpatch_model(model)
    if SETTINGS[name] is not None:
        patch_model(model, **SETTINGS[name])
        if SETTINGS[name].get("memory", {}).get("dimensions"):
            text, count = CALIBRATION
            calibrate_memory(model, tokenizer(load_text(text), verbose=False).input_ids[:count])


def open_study(path: Path, model: str) -> tuple[list[dict], dict]:
    """The records of a file, and what stands beside them. `SETTINGS` may have grown since, but not changed.

    Raises:
        ValueError: a file of another model, calibration, or meaning of a setting.
    """
    settings = json.loads(json.dumps(SETTINGS))
    found = json.loads(path.read_text())["settings"] if path.exists() else {}
    check_settings(path, found, settings)
    records, beside = open_record(path, {"model": model, "calibration": CALIBRATION})
    return records, beside | {"settings": found | settings}


def main(arguments: list[str] | None = None) -> dict:
    """Measures what is missing; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M, from pip")
    parser.add_argument("--tasks", nargs="+", default=["needles-2048"], help="needles-N, passkey-N, perplexity-TEXT-N")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--trials", type=int, default=8, help="of each needle and passkey task")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; the plot is written beside it")
    options = parser.parse_args(arguments)
    path = options.model or str(smollm2_135m())
    records, beside = open_study(options.output, Path(path).name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    done = {(r["setting"], r["task"], r["trial"]) for r in records}
    todo = [
        (name, task, trial)
        for task in options.tasks
        for name in options.settings
        for trial in range(1 if task.startswith("perplexity") else options.trials)
        if (name, task, trial) not in done
    ]
    current = "dense"
    result = beside | {"summary": summarize(records), "records": records}
    with saving(options.output, result) as save:
        for name, task, trial in tqdm(todo, unit="trial"):
            if name != current:
                bring_into(model, tokenizer, current, name)
                current = name
            records.append({"setting": name, "task": task, "trial": trial} | measure(model, tokenizer, task, trial))
            result["summary"] = summarize(records)
            save()
    for task, rows in result["summary"].items():
        for name, row in rows.items():
            print(f"{task:32} {name:42} {row}")
    if records and todo:
        draw(result, options.output.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
