"""What --demo stands for in each script: small data sets and encoders, made on the spot below `runs/slides/`."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.slides import finetune
from examples.slides.attribution import METHODS
from examples.slides.probe import MEAN
from examples.slides.synthetic import FEATURES_FOLDER, LABELS_FILE, write_data
from modeling_longnet import LongNetSlideEncoderConfig, LongNetSlideEncoderModel


ROOT = Path("runs/slides")
NUM_SLIDES = {"rare": 480, "arrangement": 1200}


def demo_config(**fields) -> LongNetSlideEncoderConfig:
    """An encoder for the synthetic slides: 2 layers of 48, about 40,000 parameters."""
    return LongNetSlideEncoderConfig(
        **{
            "in_chans": 24, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "segment_lengths": [64, 256], "dilation_rates": [1, 2], "padding": "mask",
            "slide_ngrids": 12, "pooling": "mean", "hidden_dropout": 0.0, "drop_path_rate": 0.0,
            # Features of unit variance must reach the layers as large as the positions: 24 ** -0.5.
            "initializer_range": 0.2,
        }
        | fields
    )  # fmt: skip


def demo_encoder() -> Path:
    """A folder with an encoder of random weights."""
    folder = ROOT / "encoder"
    if not (folder / "config.json").is_file():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LongNetSlideEncoderModel(demo_config()).save_pretrained(folder)
    return folder


def one_thread() -> None:
    """Tiny tensors gain nothing from a second core, and lose much on a busy machine: 30 times was seen."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def prepare_encode(options) -> None:
    """Sixty slides of three pipelines, and three files that no pipeline should have written."""
    one_thread()
    folder = ROOT / "encode" / FEATURES_FOLDER
    if not folder.is_dir():
        source = write_data("arrangement", ROOT / "encode" / "slides", 60)
        shutil.copytree(source / FEATURES_FOLDER, folder)
        (folder / "cut-short.h5").write_bytes((folder / "arrangement-0000.h5").read_bytes()[:3000])
        np.save(folder / "without-coordinates.npy", np.ones((5, 24), np.float32))
        (folder / "a-letter.h5").write_text("Dear pathologist,\n")
    options.features, options.checkpoint = folder, demo_encoder()
    options.output, options.layers = options.output or ROOT / "encode" / "embeddings.safetensors", True


def _training(epochs: int) -> list[str]:
    return ["--num-train-epochs", str(epochs), "--per-device-train-batch-size", "16", "--per-device-eval-batch-size",
            "32", "--gradient-accumulation-steps", "1", "--learning-rate", "2e-3",
            "--weight-decay", "0.01"]  # fmt: skip


# By name: the task, and the options of finetune.py.
RUNS = {
    "rare, mean of the tiles": ("rare", ["--embeddings", MEAN]),
    "rare, end to end": ("rare", _training(4)),
    "arrangement, mean of the tiles": ("arrangement", ["--embeddings", MEAN]),
    "arrangement, end to end": ("arrangement", _training(10)),
}


def run_folder(name: str) -> Path:
    return ROOT / "finetune" / name.replace(", ", "-").replace(" ", "-")


def demo_run(name: str) -> dict:
    """The results of one of `RUNS`: it is run, or goes on where it was interrupted, or is done already."""
    (task, more), folder = RUNS[name], run_folder(name)
    if (folder / finetune.RESULTS_FILE).is_file():
        return json.loads((folder / finetune.RESULTS_FILE).read_text())
    data = write_data(task, ROOT / task, NUM_SLIDES[task])
    arguments = ["--features", str(data / FEATURES_FOLDER), "--labels", str(data / LABELS_FILE), *more]
    arguments += ["--output-dir", str(folder)]
    if "--embeddings" not in more:
        arguments += ["--checkpoint", str(demo_encoder())]
    if folder.is_dir() and any(folder.iterdir()):
        arguments.append("--resume")
    print(f"\n== {name}")
    return finetune.main(arguments)


def finetune_demo(resume: bool) -> dict:
    """Both tasks, by the mean of the tiles and end to end: a table, and a plot."""
    one_thread()
    if not resume:
        shutil.rmtree(ROOT / "finetune", ignore_errors=True)
    results = {name: demo_run(name) for name in RUNS}
    found = {name: result["test"] | {"slides": result["slides"]["test"]} for name, result in results.items()}
    summary = {"runs": found, "provenance": provenance()}
    write_json(ROOT / "finetune" / "demo.json", summary)
    figure, (axes,) = new_figure()
    for row, (name, values) in enumerate(found.items()):
        value = values["auroc"]
        errors = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
        axes.errorbar(value["value"], -row, xerr=errors, fmt="o", capsize=3)
        print(f"{name:34} AUROC {value['value']:.3f} (95 % from {value['low']:.3f} to {value['high']:.3f})")
    axes.axvline(0.5, color="lightgray", zorder=0)
    axes.set_yticks([-row for row in range(len(found))], list(found))
    axes.set(xlabel="AUROC on test slides, with 95 % intervals", xlim=(0.3, 1.02))
    save_figure(figure, ROOT / "finetune" / "demo.png", summary["provenance"])
    print(f"demo.json and demo.png in {ROOT / 'finetune'}")
    return summary


def heatmap_demo(options, heatmaps) -> dict:
    """Test slides of the `rare` task, and how well the scores find their planted tiles (AUROC over tiles)."""
    one_thread()
    demo_run("rare, end to end")
    trained = run_folder("rare, end to end")
    data = ROOT / "rare"
    with open(trained / finetune.PREDICTIONS_FILE, newline="") as file:
        cases = [row["slide_id"] for row in csv.DictReader(file) if row["target"] == "positive"]
    options.features, options.checkpoint = data / FEATURES_FOLDER, trained / "model"
    options.planted, options.target, options.slides = data / "planted", "positive", sorted(cases)[:12]
    summary = heatmaps(options)
    found = {}
    for name in summary["slides"]:
        about = json.loads((options.output_dir / f"{name}.json").read_text())
        planted = np.load(options.planted / f"{name}.npy")
        for method in METHODS:
            scores = np.array(about["methods"][method]["scores"])
            found.setdefault(method, []).append(roc_auc_score(planted, scores))
    summary["planted_tiles_auroc"] = {method: float(np.mean(values)) for method, values in found.items()}
    write_json(options.output_dir / "summary.json", summary)
    for method, value in summary["planted_tiles_auroc"].items():
        print(f"{method}: AUROC of the planted tiles among their slide's {value:.3f}, mean of {len(cases[:12])} slides")
    return summary
