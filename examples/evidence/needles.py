"""Does a model find what it has read? Needles by depth and length, and RULER's other tasks, for each form of attention.

    python -m examples.evidence.needles --output docs/results/evidence_needles.json

The same model reads the same texts with dense attention, a sliding window with sinks, dilated attention as in the paper
and as `patch_model` has it by default, and with a memory; each patched form over as many keys a query. The tasks are
those of ruler_tasks.py. With `--adapter` a PEFT adapter (of lora_finetune.py) lies over all forms, and their names say
so. Texts are read by chunks through a cache, so that memory grows with the cache alone.

Each answer is written when it is given and none is asked for twice: run it again to go on, or with more trials. Beside
the JSON file lie a heat-map of the needles by form, .png, and the table, .md. `--scale gpu` asks the same of longer
texts, more often, in bfloat16.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoTokenizer

from examples.evidence.reading import VARIANTS, ask, in_form, load_model, read
from examples.evidence.records import open_record, saving
from examples.evidence.ruler_tasks import DEPTHS, Tasks, score
from examples.reporting import markdown_table, save_figure, write_beside
from examples.runs import parse_scaled
from examples.smollm2 import smollm2_135m


SCALES = {
    "cpu": {"lengths": [1024, 2048, 4096], "trials": 5, "dtype": "float32"},
    "gpu": {"lengths": [4096, 8192, 16384, 32768, 65536, 131072], "trials": 100, "dtype": "bfloat16"},
}
WITH_ADAPTER = " + LoRA"
FORMS = ["dense", "window + sinks", "paper's form", "default patch", "with memory"]


def measure(model, tokenizer, case, chunk_size: int) -> list[dict]:
    """Reads the text once and asks each question: what was said, and its score."""
    began = time.process_time()
    cache = read(model, case.text, chunk_size)
    seconds = time.process_time() - began
    rows = []
    for question in case.questions:
        said = ask(model, cache, question, tokenizer)
        rows.append({"depth": question.depth, "answers": question.answers, "said": said,
                     "score": score(question, said), "reading seconds": round(seconds, 2)})  # fmt: skip
    return rows


def mean_scores(records: list[dict], *keys: str) -> dict[tuple, dict]:
    """Mean score and number of answers by these keys of a record."""
    found: dict[tuple, list[float]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), []).append(record["score"])
    return {key: {"score": sum(x) / len(x), "answers": len(x)} for key, x in sorted(found.items(), key=str)}


def forms_of(records: list[dict]) -> list[str]:
    """The forms in the records, in the order of VARIANTS, those with an adapter last."""
    present = {record["variant"] for record in records}
    return [name for name in (*VARIANTS, *(v + WITH_ADAPTER for v in VARIANTS)) if name in present]


def cases_of(records: list[dict], variant: str) -> set[tuple]:
    """The texts that a form has read."""
    return {(r["task"], r["length"], r["trial"]) for r in records if r["variant"] == variant}


def table(records: list[dict]) -> str:
    """Markdown: per task and length the mean score of each form, and its fraction of dense on the same texts.

    Forms need not have read as many texts; each is compared with dense on those that both have read, and stands alone
    where dense has read none of that length.
    """
    forms = forms_of(records)
    read_by = {form: cases_of(records, form) for form in forms}
    rows = []
    for task, length in sorted({case[:2] for cases in read_by.values() for case in cases}, key=_by_task):
        own, cells = [r for r in records if (r["task"], r["length"]) == (task, length)], []
        has_dense = any(r["variant"] == "dense" for r in own)
        for form in forms:
            shared = read_by[form] & read_by["dense"] if form != "dense" and has_dense else read_by[form]
            means = mean_scores([r for r in own if (task, length, r["trial"]) in shared], "variant")
            if (form,) not in means:
                cells.append("")
                continue
            score, answers = means[form,].values()
            dense = means["dense",]["score"] if form != "dense" and has_dense else 0
            cells.append(f"{score:.2f} of {answers}" + (f" ({score / dense:.2f})" if dense else ""))
        rows.append([task, f"{length:,}", *cells])
    return markdown_table(["task", "tokens", *forms], rows)


def _by_task(key: tuple) -> tuple:
    return Tasks.NAMES.index(key[0]), key[1]


def draw(result: dict, path: Path) -> None:
    """A heat-map per form and needle task: share found by depth and length."""
    records = [record for record in result["records"] if record["depth"] is not None]
    tasks = [task for task in Tasks.NAMES if any(record["task"] == task for record in records)]
    if not tasks:
        return
    lengths = sorted({record["length"] for record in records})
    forms = forms_of(records)
    means = mean_scores(records, "task", "variant", "length", "depth")
    width = max(2.6, 0.6 * len(lengths))
    figure = Figure(figsize=(width * len(forms), 2.8 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(forms), squeeze=False, sharey=True)
    for row, task in zip(axes, tasks):
        for axis, form in zip(row, forms):
            grid = [[means.get((task, form, n, d), {}).get("score", float("nan")) for n in lengths] for d in DEPTHS]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", alpha=0.75)
            for y, depth in enumerate(DEPTHS):
                for x, length in enumerate(lengths):
                    cell = means.get((task, form, length, depth))
                    if cell:
                        text = f"{cell['score'] * cell['answers']:.0f} of {cell['answers']}"
                        axis.text(x, y, text, ha="center", va="center", fontsize=8)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8, rotation=30)
            axis.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
            axis.set_title(f"{task}\n{form}", fontsize=9)
            axis.set_xlabel("tokens")
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=axes, label="share found", fraction=0.02)
    save_figure(figure, path, result["provenance"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default SmolLM2-135M-Instruct, from pip")
    parser.add_argument("--adapter", help="folder of a PEFT adapter for the model")
    parser.add_argument("--tasks", nargs="+", choices=Tasks.NAMES, default=list(Tasks.NAMES), metavar="TASK")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=FORMS, metavar="NAME")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="what is not given is taken from it")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of text, question and answer together")
    parser.add_argument("--trials", type=int, help="texts of each task and length")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--haystack", default="python-docs", help="around the needles: a name of texts.py or a path")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file; .png and .md are written beside it")
    return parse_scaled(parser, SCALES, arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Asks what is missing; returns what the file holds."""
    options = parse(arguments)
    path = options.model or str(smollm2_135m())
    model = load_model(path, options.adapter, dtype=getattr(torch, options.dtype)).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tasks = Tasks(lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids, options.haystack)
    settings = {
        "model": Path(path).name, "adapter": options.adapter and Path(options.adapter).name,
        "haystack": options.haystack, "dtype": options.dtype,
        "variants": {name: VARIANTS[name] for name in options.variants},
    }  # fmt: skip
    records, beside = open_record(options.output, settings)
    done = {(r["task"], r["length"], r["trial"], r["variant"]) for r in records}
    suffix = WITH_ADAPTER if options.adapter else ""
    # All forms read a text before the next one is made, and short texts come first: a stop leaves a fair comparison.
    todo = [
        (task, length, trial, [v for v in options.variants if (task, length, trial, v + suffix) not in done])
        for trial in range(options.trials) for length in options.lengths for task in options.tasks
    ]  # fmt: skip
    result, count = beside | {"records": records}, sum(len(missing) for *_, missing in todo)
    with saving(options.output, result) as save, tqdm(total=count, unit="reading") as bar:
        for task, length, trial, missing in todo:
            case = tasks.make(task, length, trial) if missing else None
            for variant in missing:
                bar.set_postfix_str(f"{task} {length} {variant}")
                with in_form(model, variant):
                    rows = measure(model, tokenizer, case, options.chunk_size)
                key = {"variant": variant + suffix, "task": task, "length": length, "trial": trial}
                records += [key | row for row in rows]
                save()
                bar.update()
    if count:
        write_beside(options.output, table(records), draw, result)
    else:
        print(table(records) if records else "nothing asked")
    return result


if __name__ == "__main__":
    main()
