"""Predict classes or survival from whole slides: a linear probe on embeddings, or a slide encoder trained end to end.

Labels come from a CSV file (slide_id, patient_id, label; or time and event), splits are by patient, figures have 95 %
intervals from resampled patients. Interrupted, --resume goes on.

    python -m examples.slides.finetune --demo
    python -m examples.slides.finetune --features trident/features_gigapath --labels labels.csv \\
        --checkpoint my-slide-encoder --lora-rank 8 --output-dir runs/subtype
    python -m examples.slides.finetune --embeddings embeddings.safetensors --labels labels.csv --output-dir runs/probe

Besides the options of this file, every option of Transformers' TrainingArguments works.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_curve
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.runs import end_script, last_complete_checkpoint, option, trackers
from examples.slides import cases as cases_
from examples.slides.cases import PARTS, Case, Collator, Columns, SlideDataset
from examples.slides.feature_files import Reading, SlideFile, inspect_folder, report_skipped
from examples.slides.outcomes import KINDS, Outcome
from examples.slides.probe import MEAN, embeddings_from, fit_probe, mean_of_tiles
from modeling_longnet import LongNetSlideEncoderConfig, LongNetSlideEncoderForImageClassification


RESULTS_FILE, PLOT_FILE, RUN_FILE, PREDICTIONS_FILE = "results.json", "results.png", "run.json", "predictions.csv"
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
FREE_TO_CHANGE = ("resume", "bootstrap")


@dataclass
class Options:
    """What to learn from what."""

    labels: str | None = option(None, "CSV file")
    features: str | None = option(None, "folder of feature files (see encode.py)")
    checkpoint: str | None = option(None, "slide encoder to train end to end")
    embeddings: str | None = option(None, "a file of encode.py for a linear probe; 'mean' for the mean of the tiles")
    layer: int | None = option(None, "probe this layer's embeddings, 0 for the input's")
    task: str = option("classification", choices=list(KINDS))
    slide_column: str = "slide_id"
    patient_column: str = "patient_id"
    label_column: str = "label"
    time_column: str = "time"
    event_column: str = "event"
    split_column: str | None = option(None, "a column of train, val and test; default folds")
    folds: int = option(5, "of patients: one is for testing, the next for validation")
    fold: int = 0
    split_seed: int = 0
    intervals: int = option(4, "of time, for --task hazards")
    class_weights: bool = option(True, "rare classes count more in the loss")
    lora_rank: int = option(0, "LoRA on every projection; 0 trains all weights")
    lora_alpha: int = 16
    max_tiles: int | None = option(None, "in training, at most so many of a slide's tiles")
    bootstrap: int = option(1000, "resamples for the intervals")
    features_name: str | None = None
    coords_name: str | None = None
    tile_size: float | None = option(None, "see encode.py")
    coords: str | None = option(None, "see encode.py")
    resume: bool = option(False, "go on with an interrupted run in --output-dir")
    demo: bool = option(False, "synthetic slides, in minutes: see docs/slides.md")


DEFAULTS = {
    "output_dir": "runs/slides/finetune", "num_train_epochs": 10, "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "weight_decay": 0.05,
    "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "eval_strategy": "epoch", "save_strategy": "epoch",
    "logging_steps": 0.02, "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "greater_is_better": False, "report_to": "none", "remove_unused_columns": False, "label_names": ["labels"],
    "dataloader_pin_memory": torch.cuda.is_available(),
    "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
}  # fmt: skip


@dataclass
class Data:
    """Slides or embeddings by part, with their cases."""

    names: dict[str, list[str]]
    cases: dict[str, list[Case]]
    outcome: Outcome
    skipped: dict[str, str]
    missing: list[str]
    slides: dict[str, SlideFile] | None = None
    embeddings: dict[str, np.ndarray] | None = None


class SlideTrainer(Trainer):
    """A Trainer whose loss is the outcome's: a mean over the batch, which it divides by the batches it accumulates."""

    def __init__(self, *args, outcome: Outcome, **kwargs):
        super().__init__(*args, **kwargs)
        self.outcome = outcome

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.outcome.loss(outputs.logits.float(), labels)
        return (loss, outputs) if return_outputs else loss


def parse(arguments: list[str] | None) -> tuple[Options, TrainingArguments]:
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__.splitlines()[0])
    parser.usage = "%(prog)s [--demo] [--features DIR --checkpoint DIR | --embeddings FILE] --labels FILE ... (-h: all)"
    parser.set_defaults(**DEFAULTS)
    options, training = parser.parse_args_into_dataclasses(arguments)
    if options.demo:
        return options, training
    trackers(training.report_to)
    if options.labels is None:
        parser.error("--labels is needed (or --demo)")
    if (options.checkpoint is None) == (options.embeddings is None):
        parser.error("give either --checkpoint, to train end to end, or --embeddings, for a linear probe")
    if options.features is None and (options.checkpoint or options.embeddings == MEAN):
        parser.error("--features is needed")
    if not 0 <= options.fold < options.folds or options.folds < 3:
        parser.error(f"--folds must be at least 3 and --fold below it, got {options.folds} and {options.fold}")
    if options.task == "cox" and options.checkpoint and training.train_batch_size < 2:
        parser.error("--task cox compares the slides of a batch, so --per-device-train-batch-size must be at least 2; "
                     "--task hazards works with single slides")  # fmt: skip
    output = Path(training.output_dir)
    if not options.resume and output.is_dir() and any(output.iterdir()):
        parser.error(f"--output-dir {output} holds an earlier run: choose another one, or go on with --resume")
    return options, training


def read_data(options: Options) -> Data:
    """Everything but the model, checked before any work starts.

    Raises:
        ValueError: see `cases.py`; and features that the encoder does not read.
    """
    columns = Columns(options.slide_column, options.patient_column, options.label_column, options.time_column,
                      options.event_column, options.split_column)  # fmt: skip
    rows = cases_.read_cases(options.labels, options.task, columns)
    slides, embeddings, skipped = None, None, {}
    if options.embeddings and options.embeddings != MEAN:
        embeddings = embeddings_from(options.embeddings, options.layer)
        names = list(embeddings)
    else:
        limits = {}
        if options.checkpoint:
            config = LongNetSlideEncoderConfig.from_pretrained(options.checkpoint)
            limits = {"in_chans": config.in_chans, "slide_ngrids": config.slide_ngrids}
        coords = Path(options.coords) if options.coords else None
        reading = Reading(options.features_name, options.coords_name, options.tile_size, coords)
        found, skipped = inspect_folder(options.features, reading, **limits)
        slides = {slide.slide_id: slide for slide in found}
        names = list(slides)
    matched, missing = cases_.match(rows, names)
    if slides is not None:
        kept = cases_.drop_unreadable([slides[name] for name in matched], skipped)
        slides = {slide.slide_id: slide for slide in kept}
        matched = {name: case for name, case in matched.items() if name in slides}
    if not matched:
        raise ValueError(f"none of the {len(rows)} slides in {options.labels} has a readable file; see {names[:3]}...")
    order = sorted(matched)
    everyone = [matched[name] for name in order]
    parts = cases_.split(everyone, options.folds, options.fold, options.split_seed)
    cases = {part: [everyone[i] for i in rows] for part, rows in parts.items()}
    outcome = cases_.make_outcome(options.task, cases["train"], everyone, options.intervals, options.class_weights)
    names = {part: [order[i] for i in rows] for part, rows in parts.items()}
    if embeddings is None and options.embeddings == MEAN:
        used = [slides[name] for name in order]
        embeddings = dict(zip(order, mean_of_tiles(used)))
    return Data(names, cases, outcome, skipped, missing, slides, embeddings)


def make_model(options: Options, data: Data) -> torch.nn.Module:
    """The encoder with a new head, or with the one it has if that fits; wrapped for LoRA if asked."""
    outcome, names = data.outcome, {}
    if outcome.classes:
        names = {"id2label": dict(enumerate(outcome.classes))}
        names["label2id"] = {name: i for i, name in names["id2label"].items()}
    model = LongNetSlideEncoderForImageClassification.from_pretrained(
        options.checkpoint, num_labels=outcome.num_outputs, ignore_mismatched_sizes=True, **names
    )
    if outcome.edges is not None:
        model.config.interval_edges = outcome.edges
    if not options.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=LORA_TARGETS,
                          modules_to_save=["classifier"])  # fmt: skip
    return get_peft_model(model, settings)


def make_trainer(options: Options, training: TrainingArguments, data: Data) -> SlideTrainer:
    model = make_model(options, data)
    tile_size = model.config.tile_size
    datasets = {
        part: SlideDataset(
            [data.slides[name] for name in data.names[part]],
            [data.outcome.encode(case.target) for case in data.cases[part]],
            max_tiles=options.max_tiles if part == "train" else None,
        )
        for part in PARTS
    }
    trainer = SlideTrainer(
        model=model, args=training, train_dataset=datasets["train"], eval_dataset=datasets["val"],
        data_collator=Collator(tile_size), outcome=data.outcome,
    )  # fmt: skip
    trainer.test_dataset = datasets["test"]
    return trainer


def train(options: Options, training: TrainingArguments, data: Data) -> tuple[np.ndarray, dict]:
    """Trains end to end, writes the model; scores of the test slides and what the training took."""
    set_seed(training.seed)
    trainer = make_trainer(options, training, data)
    checkpoint = last_complete_checkpoint(Path(training.output_dir)) if options.resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    prediction = trainer.predict(trainer.test_dataset)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if options.lora_rank:
        model.save_pretrained(Path(training.output_dir) / "adapter")
        model = model.merge_and_unload()
    model.save_pretrained(Path(training.output_dir) / "model")
    log = trainer.state.log_history
    facts = {
        "steps": trainer.state.global_step, "trainable_parameters": trainable,
        "losses": [[row["step"], row["loss"]] for row in log if "loss" in row],
        "validation_losses": [[row["step"], row["eval_loss"]] for row in log if "eval_loss" in row],
        "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name,
    }  # fmt: skip
    return data.outcome.scores(torch.from_numpy(prediction.predictions)), facts


def probe(data: Data) -> tuple[np.ndarray, dict]:
    """Scores of the test slides from a linear probe, and its strength."""
    x = {part: np.stack([data.embeddings[name] for name in data.names[part]]) for part in PARTS}
    targets = {part: [case.target for case in data.cases[part]] for part in PARTS}
    _, scores, strength = fit_probe(x, targets, data.outcome)
    return scores, {"inverse_penalty": strength, "width": x["train"].shape[1]}


def write_predictions(path: Path, data: Data, scores: np.ndarray) -> None:
    """A line for each test slide."""
    columns = data.outcome.classes or ["risk"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "patient_id", "target", *columns])
        for name, case, row in zip(data.names["test"], data.cases["test"], scores.reshape(len(scores), -1)):
            target = case.target if isinstance(case.target, str) else f"{case.target[0]:g};{case.target[1]}"
            writer.writerow([name, case.patient_id, target, *(f"{value:.6g}" for value in row)])


def survival_curve(time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kaplan and Meier's estimate: times, and the share that survived each."""
    times = np.unique(time[event == 1])
    shares = [1 - ((time == t) & (event == 1)).sum() / (time >= t).sum() for t in times]
    return np.append(0, times), np.append(1, np.cumprod(shares))


def plot(path: Path, data: Data, scores: np.ndarray, facts: dict, results: dict) -> None:
    """Left: ROC curves, or survival of the halves of higher and lower risk. Right: the losses."""
    figure, axes = new_figure(2 if facts.get("losses") else 1)
    targets = [case.target for case in data.cases["test"]]
    if data.outcome.classes:
        for k, name in list(enumerate(data.outcome.classes))[-1 if len(data.outcome.classes) == 2 else 0 :]:
            false, true, _ = roc_curve([target == name for target in targets], scores[:, k])
            axes[0].plot(false, true, label=name)
        axes[0].plot([0, 1], [0, 1], color="lightgray", zorder=0)
        axes[0].set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    else:
        time, event = (np.array(column) for column in zip(*targets))
        for name, half in (("higher risk", scores > np.median(scores)), ("lower risk", scores <= np.median(scores))):
            axes[0].step(*survival_curve(time[half], event[half]), where="post", label=f"{name} ({half.sum()} slides)")
        axes[0].set(xlabel="time", ylabel="share without event", ylim=(0, 1.02))
    axes[0].legend()
    figure_name, values = next(iter(results["test"].items()))
    axes[0].set_title(f"test: {figure_name} {values['value']:.3f} ({values['low']:.3f} to {values['high']:.3f})")
    if facts.get("losses"):
        axes[1].plot(*zip(*facts["losses"]), lw=0.8, label="training")
        axes[1].plot(*zip(*facts["validation_losses"]), "o-", label="validation")
        axes[1].set(xlabel="optimizer step", ylabel="loss")
        axes[1].legend()
    save_figure(figure, path, results["provenance"])


def check_resumable(output: Path, wanted: dict, resume: bool) -> None:
    """A run is continued with the settings that it began with.

    Raises:
        ValueError: other settings.
    """
    found = json.loads((output / RUN_FILE).read_text()) if resume and (output / RUN_FILE).is_file() else wanted
    if changed := {name for name in wanted if found.get(name) != wanted[name]} - set(FREE_TO_CHANGE):
        raise ValueError(f"{output} holds a run with other {', '.join(sorted(changed))}.")
    write_json(output / RUN_FILE, wanted)


def run(options: Options, training: TrainingArguments) -> dict:
    """One split: probe or training, figures, files. Returns what results.json holds."""
    output = Path(training.output_dir)
    data = read_data(options)
    settings = {name: value for name, value in vars(options).items()}
    hyper = {name: getattr(training, name) for name in ("learning_rate", "num_train_epochs", "max_steps", "seed",
             "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay")}  # fmt: skip
    check_resumable(output, settings | hyper | {"slides": data.names}, options.resume)
    scores, facts = train(options, training, data) if options.checkpoint else probe(data)
    test = data.cases["test"]
    figures = data.outcome.figures(scores, [case.target for case in test], [case.patient_id for case in test],
                                   options.bootstrap)  # fmt: skip
    results = {
        "test": figures,
        "slides": {part: len(names) for part, names in data.names.items()},
        "patients": {part: len({case.patient_id for case in data.cases[part]}) for part in PARTS},
        "classes": data.outcome.classes, "interval_edges": data.outcome.edges,
        "skipped": data.skipped, "without_file": data.missing, "training": facts, "settings": settings | hyper,
        "provenance": provenance(),
    }  # fmt: skip
    write_predictions(output / PREDICTIONS_FILE, data, scores)
    plot(output / PLOT_FILE, data, scores, facts, results)
    write_json(output / RESULTS_FILE, results)
    report_skipped(data.skipped)
    if data.missing:
        print(f"{len(data.missing)} slides of {options.labels} have no file: {', '.join(data.missing[:5])} ...")
    for name, values in figures.items():
        print(f"{name} {values['value']:.3f} (95 % from {values['low']:.3f} to {values['high']:.3f}) on "
              f"{len(test)} slides of {results['patients']['test']} patients")  # fmt: skip
    print(f"{RESULTS_FILE}, {PLOT_FILE} and {PREDICTIONS_FILE} in {output}")
    return results


def main(arguments: list[str] | None = None) -> dict:
    options, training = parse(arguments)
    if options.demo:
        from examples.slides.demo import finetune_demo

        return finetune_demo(resume=options.resume)
    return run(options, training)


if __name__ == "__main__":
    end_script(main)
