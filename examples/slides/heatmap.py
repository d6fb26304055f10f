"""What did the model look at? The contribution of each tile, drawn over the grid of the slide.

Three ways of scoring tiles (see attribution.py) are tried, and the deletion test tells which one is faithful: without
the tiles that it calls important the prediction must fall, and faster than without any others.

    python -m examples.slides.heatmap --demo
    python -m examples.slides.heatmap --features features/ --checkpoint runs/subtype/model --output-dir runs/heatmaps
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import CenteredNorm
from tqdm.auto import tqdm

from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.slides.attribution import FRACTIONS, MAX_ROLLOUT_TILES, METHODS, explain
from examples.slides.encode import add_reading_arguments, reading_of
from examples.slides.feature_files import (
    SlideFile,
    UnreadableSlide,
    collate,
    inspect_folder,
    load_features,
    report_skipped,
)
from modeling_longnet import LongNetSlideEncoderForImageClassification


def grid_image(cells: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, tuple[float, ...]]:
    """Scores [N] at cells [N, 2] (x, y) as an image [rows, columns], NaN where no tile is, and its extent."""
    low, high = cells.min(axis=0), cells.max(axis=0)
    image = np.full((high - low + 1)[::-1], np.nan)
    x, y = (cells - low).T
    image[y, x] = scores
    return image, (low[0] - 0.5, high[0] + 0.5, high[1] + 0.5, low[1] - 0.5)


def draw(path: Path, slide: SlideFile, about: dict, method: str, origin: dict, planted: np.ndarray | None = None):
    """Left: the heat map. Right: the deletion test of each method."""
    figure, (left, right) = new_figure(2)
    image, extent = grid_image(slide.cells, np.array(about["methods"][method]["scores"]))
    signed = method != "rollout"
    shown = left.imshow(image, extent=extent, cmap="RdBu_r" if signed else "viridis",
                        norm=CenteredNorm() if signed else None, interpolation="nearest")  # fmt: skip
    left.set_facecolor("0.8")
    figure.colorbar(shown, ax=left, label=f"{method}: contribution to {about['class']!r}")
    if planted is not None and planted.any():
        left.scatter(*slide.cells[planted].T, s=60, facecolors="none", edgecolors="black", linewidths=1.2,
                     label="planted")  # fmt: skip
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), fontsize=7)
    left.set(xlabel="column (tiles)", ylabel="row (tiles)", title=f"{slide.slide_id}: {about['class']} "
             f"{about['output']:.3f}")  # fmt: skip
    for name, values in about["methods"].items():
        style = {"ls": ":", "color": "gray"} if name == "random" else {"marker": "o"}
        right.plot([100 * f for f in FRACTIONS], values["deletion"], label=name, **style)
    right.set_xscale("symlog", linthresh=0.5)
    right.set_xticks([100 * f for f in FRACTIONS], [f"{100 * f:g}" for f in FRACTIONS], fontsize=7)
    right.set(xlabel="tiles removed, highest score first (%)", ylabel=f"output for {about['class']!r}",
              title="deletion test: lower is more faithful")  # fmt: skip
    right.legend()
    save_figure(figure, path, origin)


def explain_slide(model, slide: SlideFile, methods: list[str], target: str | None) -> dict:
    """Prediction, class and scores of one slide, as plain JSON."""
    batch = collate([slide], [load_features(slide)], model.config.tile_size)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.inference_mode():
        logits = model(**batch).logits.float()[0]
    names = [model.config.id2label[k] for k in range(len(logits))]
    index = names.index(target) if target else int(logits.argmax())
    output = float(logits.softmax(dim=-1)[index]) if len(logits) > 1 else float(logits[0])
    return {
        "slide_id": slide.slide_id, "class": names[index], "output": output, "tiles": slide.num_tiles,
        "methods": explain(model, batch, index, methods),
    }  # fmt: skip


def choose_method(found: list[dict], methods: list[str]) -> tuple[str, dict[str, float]]:
    """The method with the smallest mean of the deletion curves, and that mean for each method and for chance."""
    areas = {name: float(np.mean([np.mean(about["methods"][name]["deletion"]) for about in found]))
             for name in (*methods, "random")}  # fmt: skip
    return min(methods, key=areas.__getitem__), areas


def heatmaps(options: argparse.Namespace) -> dict:
    """Runs the script on parsed options; returns what summary.json holds.

    Raises:
        ValueError: no classifier, no slide that can be read, a class that the model does not know.
    """
    model = LongNetSlideEncoderForImageClassification.from_pretrained(options.checkpoint).to(options.device).eval()
    names = list(model.config.id2label.values())
    if options.target and options.target not in names:
        raise ValueError(f"`target` must be one of the model's classes {names}, got {options.target!r}.")
    limits = {"in_chans": model.config.in_chans, "slide_ngrids": model.config.slide_ngrids}
    slides, skipped = inspect_folder(options.features, reading_of(options), **limits)
    if options.slides:
        if unknown := sorted(set(options.slides) - {slide.slide_id for slide in slides}):
            raise ValueError(f"`slides` must be among the readable files, got {unknown}.")
        slides = [slide for slide in slides if slide.slide_id in options.slides]
    methods = [options.method] if options.method != "auto" else list(METHODS)
    longest = max((slide.num_tiles for slide in slides), default=0)
    if longest > MAX_ROLLOUT_TILES and options.method == "auto":
        methods.remove("rollout")
        print(f"rollout is left out: {longest} tiles are more than {MAX_ROLLOUT_TILES}, and it forms N x N weights")
    output, done = options.output_dir, []
    run = {"checkpoint": str(options.checkpoint), "target": options.target, "methods": methods}
    for slide in tqdm(slides, desc="explaining", unit="slide"):
        path = output / f"{slide.slide_id}.json"
        about = json.loads(path.read_text()) if path.is_file() else {}
        if about.get("run") != run:  # not done yet, or by another run
            try:
                about = explain_slide(model, slide, methods, options.target) | {"run": run}
            except UnreadableSlide as error:
                skipped[str(slide.path)] = str(error)
                continue
            write_json(path, about)
        done.append((slide, about))
    if not done:
        report_skipped(skipped)
        raise ValueError(f"no slide in {options.features} can be read.")
    method, areas = choose_method([about for _, about in done], methods)
    origin = provenance()
    for slide, about in tqdm(done, desc="drawing", unit="slide", delay=1):
        planted = np.load(options.planted / f"{slide.slide_id}.npy") if options.planted else None
        draw(output / f"{slide.slide_id}.png", slide, about, method, origin, planted)
    summary = {"method": method, "mean_of_deletion_curve": areas, "slides": [about["slide_id"] for _, about in done],
               "skipped": skipped, "provenance": origin}  # fmt: skip
    write_json(output / "summary.json", summary)
    report_skipped(skipped)
    shown = ", ".join(f"{name} {area:.3f}" for name, area in areas.items())
    print(f"mean output while tiles are removed: {shown} (lower is more faithful); drawn: {method}")
    if min(areas[name] for name in methods) >= areas["random"]:
        print("Warning: no method beats chance in the deletion test; do not trust these pictures.")
    print(f"{len(done)} heat maps and summary.json in {output}")
    return summary


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, help="the folder of feature files")
    parser.add_argument("--checkpoint", help="a trained LongNetSlideEncoderForImageClassification (finetune's model/)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/slides/heatmaps"))
    parser.add_argument("--slides", nargs="+", metavar="ID", help="only these; default all")
    parser.add_argument("--target", help="the class to explain; default the predicted one")
    parser.add_argument("--method", choices=("auto", *METHODS), default="auto", help="auto: by the deletion test")
    parser.add_argument("--planted", type=Path, help="folder of synthetic data's true tiles, to be marked")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--demo", action="store_true", help="on synthetic slides, with the model that finetune made")
    add_reading_arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> dict:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.demo:
        from examples.slides.demo import heatmap_demo

        return heatmap_demo(options, heatmaps)
    for name in ("features", "checkpoint"):
        if getattr(options, name) is None:
            parser.error(f"--{name} is needed (or --demo)")
    try:
        return heatmaps(options)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
