"""Slides that anyone can make: tile features and coordinates as a feature extractor writes them, and their labels.

Both tasks are built so that the mean of the tiles tells nothing, because both classes hold the same tiles on average:

- `rare`: a few tiles bear two markers at once (class 1); in class 0 all markers lie in different tiles, as many.
- `arrangement`: as many immune tiles as tumour tiles, the immune tiles within the nest of tumour (class 1) or apart
  from it (class 0).

The files are laid out as CLAM, TRIDENT and STAMP write theirs, in turns.

    python -m examples.slides.synthetic --task arrangement --slides 700 --output-dir runs/slides/arrangement
"""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from tqdm.auto import tqdm


TASKS = ("rare", "arrangement")
LAYOUTS = ("CLAM", "TRIDENT", "STAMP")
CLASSES = ("negative", "positive")
TILE_SIZE = 256  # pixels
TISSUE, MARKER, OTHER_MARKER, TUMOUR, IMMUNE = range(5)
LABELS_FILE, FEATURES_FOLDER = "labels.csv", "features"


@dataclass
class SyntheticSlide:
    """features [N, C] float32, coords [N, 2] int64 in pixels, planted [N]: the tiles that make its class."""

    slide_id: str
    patient_id: str
    label: int
    features: np.ndarray
    coords: np.ndarray
    planted: np.ndarray
    time: float
    event: int


def prototypes(width: int) -> np.ndarray:
    """One direction per kind of tile, [5, width], orthonormal and the same for every data set of that width."""
    random = np.random.default_rng(12345)
    return np.linalg.qr(random.normal(size=(width, 5)))[0].T * width**0.5


def tissue_cells(random: np.random.Generator, side: int) -> np.ndarray:
    """Cells [N, 2] of a round piece of tissue somewhere on the slide, row by row as extractors scan it."""
    radius = random.uniform(0.38, 0.5) * side
    middle = random.uniform(radius, side - radius, size=2)
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    cells = np.stack([x.ravel(), y.ravel()], axis=1)
    return cells[((cells - middle) ** 2).sum(1) < radius**2]


def _nearest(cells: np.ndarray, place: np.ndarray, count: int) -> np.ndarray:
    return ((cells - place) ** 2).sum(1).argsort(kind="stable")[:count]


def _rare_tiles(random: np.random.Generator, cells: np.ndarray, label: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Places of each marker, and the planted ones among them."""
    count, apart = int(random.integers(3, 6)), int(random.integers(2, 9))
    first, second, both, more = np.split(
        random.permutation(len(cells))[: 2 * (apart + count)], np.cumsum([apart, apart, count])
    )
    if label:  # so many tiles bear both
        return [np.append(first, both), np.append(second, both)], both
    return [np.append(first, both), np.append(second, more)], np.empty(0, dtype=int)


def _arranged_tiles(random: np.random.Generator, cells: np.ndarray, label: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Places of tumour and immune tiles, and the planted ones: those of a nest that both share."""
    count = int(random.integers(8, 13))
    nest = _nearest(cells, cells[random.integers(len(cells))], 2 * count)
    far = ((cells - cells[nest[0]]) ** 2).sum(1).argsort(kind="stable")[len(cells) // 2 :]
    other = _nearest(cells, cells[random.choice(far)], 2 * count)
    if label:  # one nest of both, and the other place is as empty as any tissue
        nest = random.permutation(nest)
        return [nest[:count], nest[count:]], nest
    return [random.permutation(nest)[:count], random.permutation(np.setdiff1d(other, nest))[:count]], np.empty(0, int)


def make_slide(task: str, index: int, *, seed: int = 0, width: int = 24, side: int = 12, noise: float = 0.5):
    """Slide number `index` of a data set; it depends on nothing but the arguments.

    Args:
        width: C of the features.
        side: cells of the slide's grid, each way.
        noise: standard deviation of each feature around its kind of tile.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    random = np.random.default_rng([seed, TASKS.index(task), index])
    label = int(random.integers(2))
    cells = tissue_cells(random, side)
    if task == "rare":
        kinds, (places, planted) = (MARKER, OTHER_MARKER), _rare_tiles(random, cells, label)
    else:
        kinds, (places, planted) = (TUMOUR, IMMUNE), _arranged_tiles(random, cells, label)
    kind_vectors = prototypes(width)
    features = np.repeat(kind_vectors[None, TISSUE], len(cells), axis=0)
    for kind, where in zip(kinds, places):
        features[where] += kind_vectors[kind] - (kind_vectors[TISSUE] if task == "arrangement" else 0)
    features += noise * random.normal(size=features.shape) + 0.1 * random.normal(size=width)  # tiles, and the stain
    hazard = np.exp(1.5 * label - 3.0)
    time, censored = random.exponential(1 / hazard), random.exponential(25.0)
    is_planted = np.zeros(len(cells), dtype=bool)
    is_planted[planted] = True
    return SyntheticSlide(
        f"{task}-{index:04d}", f"patient-{index // 2:04d}", label, features.astype(np.float32),
        (cells * TILE_SIZE).astype(np.int64), is_planted, float(min(time, censored)), int(time <= censored),
    )  # fmt: skip


def write_slide(path: Path, slide: SyntheticSlide, layout: str) -> None:
    """One slide's tiles as that pipeline writes them; STAMP keeps float16 and micrometres (here 0.5 a pixel)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if layout == "STAMP":
            file["coords"] = (slide.coords * 0.5).astype(np.float32)
            file["feats"] = slide.features.astype(np.float16)
            attributes = {"unit": "um", "tile_size_um": TILE_SIZE * 0.5, "tile_size_px": TILE_SIZE, "feat_type": "tile"}
            file.attrs.update(attributes | {"stamp_version": "2.4.0", "extractor": "synthetic"})
            return
        kind = np.int32 if layout == "CLAM" else np.int64
        width = slide.features.shape[1]
        file.create_dataset("features", data=slide.features, maxshape=(None, width), chunks=(32, width))
        file.create_dataset("coords", data=slide.coords.astype(kind), maxshape=(None, 2), chunks=(32, 2))
        if layout == "TRIDENT":
            file["coords"].attrs.update(
                {"patch_size": TILE_SIZE, "patch_size_level0": TILE_SIZE, "level0_magnification": 20,
                 "target_magnification": 20, "overlap": 0, "name": slide.slide_id}
            )  # fmt: skip


def write_data(task: str, folder: str | Path, num_slides: int, **options) -> Path:
    """`features/` with a file for each slide, and labels.csv; a folder that is complete already is left alone.

    Returns:
        The folder. labels.csv has slide_id, patient_id (two slides each), label, time and event; `planted/` tells which
        tiles make a slide's class.
    """
    folder = Path(folder)
    if (folder / LABELS_FILE).exists():  # written last
        return folder
    rows = []
    (folder / "planted").mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(num_slides), desc=f"making slides ({task})", unit="slide", delay=1):
        slide = make_slide(task, index, **options)
        write_slide(folder / FEATURES_FOLDER / f"{slide.slide_id}.h5", slide, LAYOUTS[index % len(LAYOUTS)])
        np.save(folder / "planted" / f"{slide.slide_id}.npy", slide.planted)
        rows.append([slide.slide_id, slide.patient_id, CLASSES[slide.label], f"{slide.time:.4f}", slide.event])
    with open(folder / (LABELS_FILE + ".tmp"), "w", newline="") as file:
        csv.writer(file).writerows([["slide_id", "patient_id", "label", "time", "event"], *rows])
    (folder / (LABELS_FILE + ".tmp")).replace(folder / LABELS_FILE)
    return folder


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--slides", type=int, default=700)
    parser.add_argument("--output-dir", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    folder = write_data(options.task, options.output_dir, options.slides, seed=options.seed)
    print(f"{options.slides} slides and {LABELS_FILE} in {folder}")
    return folder


if __name__ == "__main__":
    main()
