"""Labels from a CSV file, matched with feature files, and cut into training, validation and test by patient."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold
from tqdm.auto import tqdm

from examples.slides.feature_files import SlideFile, UnreadableSlide, collate, load_features
from examples.slides.outcomes import Outcome


PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Case:
    """A row of the CSV file: the target is a class's name, or (time, event)."""

    slide_id: str
    patient_id: str
    target: str | tuple[float, int]
    part: str | None = None


@dataclass
class Columns:
    """Names of the CSV file's columns."""

    slide: str = "slide_id"
    patient: str = "patient_id"
    label: str = "label"
    time: str = "time"
    event: str = "event"
    split: str | None = None


def _target(row: dict, kind: str, columns: Columns, where: str):
    if kind == "classification":
        return row[columns.label].strip()
    try:
        time, event = float(row[columns.time]), float(row[columns.event])
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from None
    if not (math.isfinite(time) and time >= 0 and event in (0, 1)):
        raise ValueError(f"{where}: a time from 0 on and an event of 0 or 1 are wanted, got {time} and {event}.")
    return time, int(event)


def read_cases(path: str | Path, kind: str, columns: Columns) -> list[Case]:
    """The rows of a CSV file whose target is not empty.

    Raises:
        ValueError: naming file and line: columns that are missing, slides that are named twice, no target at all.
    """
    path, cases, seen = Path(path), [], set()
    if not path.is_file():
        raise ValueError(f"`labels` must be a CSV file, got {str(path)!r}.")
    wanted = [columns.label] if kind == "classification" else [columns.time, columns.event]
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = {columns.slide, columns.patient, *wanted, *filter(None, [columns.split])}
        if missing := names - set(reader.fieldnames or ()):
            raise ValueError(f"{path}: must have the columns {sorted(missing)}, got {reader.fieldnames}.")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if any(not (row[name] or "").strip() for name in wanted):
                continue
            slide, patient = row[columns.slide].strip(), row[columns.patient].strip()
            part = row[columns.split].strip() if columns.split else None
            if slide in seen or not patient or (columns.split and part not in PARTS):
                reason = f"{slide!r} is named twice" if slide in seen else f"patient {patient!r}, split {part!r}"
                raise ValueError(f"{where}: {reason}; slides once, a patient, and splits {PARTS} are wanted.")
            seen.add(slide)
            cases.append(Case(slide, patient, _target(row, kind, columns, where), part))
    if not cases:
        raise ValueError(f"{path}: holds no row with a target.")
    return cases


def match(cases: list[Case], names: list[str]) -> tuple[dict[str, Case], list[str]]:
    """The case of each feature file, by its name with or without the image's suffix, and the slides without a file."""
    known = set(names)
    found, missing = {}, []
    for case in cases:
        options = (case.slide_id, case.slide_id.rpartition(".")[0], Path(case.slide_id).name)
        name = next((option for option in options if option in known), None)
        if name is None or name in found:
            missing.append(case.slide_id)
        else:
            found[name] = case
    return found, missing


def split(cases: list[Case], folds: int, fold: int, seed: int) -> dict[str, list[int]]:
    """Indices of training, validation and test: as the file says, or one fold each for the latter two.

    Raises:
        ValueError: a patient in two parts, or fewer patients than folds.
    """
    if cases[0].part:
        parts = {part: [i for i, case in enumerate(cases) if case.part == part] for part in PARTS}
        home = {}
        for case in cases:
            if home.setdefault(case.patient_id, case.part) != case.part:
                raise ValueError(f"patient {case.patient_id!r} is in {home[case.patient_id]!r} and in {case.part!r}.")
    else:
        strata = [case.target if isinstance(case.target, str) else case.target[1] for case in cases]
        patients = [case.patient_id for case in cases]
        if len(set(patients)) < folds:
            raise ValueError(f"`folds` must be at most the number of patients, {len(set(patients))}, got {folds}.")
        cutter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        tests = [test for _, test in cutter.split(strata, strata, patients)]
        test, val = tests[fold].tolist(), tests[(fold + 1) % folds].tolist()
        taken = {*test, *val}
        parts = {"train": [i for i in range(len(cases)) if i not in taken], "val": val, "test": test}
    if empty := [part for part in PARTS if not parts[part]]:
        raise ValueError(f"the parts {empty} hold no slide; more slides, or other splits, are needed.")
    return parts


def make_outcome(kind: str, train: list[Case], everyone: list[Case], intervals: int, weighted: bool) -> Outcome:
    """Classes and weights, or intervals with equally many events each, from the training slides.

    Raises:
        ValueError: classes that no training slide has, a single class, or no events.
    """
    if kind == "classification":
        classes = sorted({case.target for case in everyone})
        counts = [sum(case.target == name for case in train) for name in classes]
        if len(classes) < 2 or not all(counts):
            raise ValueError(f"two classes or more must be among the training slides, got {classes}: {counts}.")
        weights = torch.tensor([len(train) / len(classes) / count for count in counts]) if weighted else None
        return Outcome(kind, classes, class_weights=weights)
    events = sorted(case.target[0] for case in train if case.target[1])
    if not events:
        raise ValueError("no training slide has an event.")
    if kind == "cox":
        return Outcome(kind)
    return Outcome(kind, edges=np.unique(np.quantile(events, np.linspace(0, 1, intervals + 1)[1:-1])).tolist())


@dataclass
class SlideDataset(torch.utils.data.Dataset):
    """Slides with their labels; features are kept in memory while they need less than `cache_bytes`."""

    slides: list[SlideFile]
    labels: list[torch.Tensor]
    max_tiles: int | None = None
    cache_bytes: float = 2e9
    cache: dict[int, torch.Tensor] = field(default_factory=dict)
    cached: int = 0

    def __len__(self) -> int:
        return len(self.slides)

    def features(self, index: int) -> torch.Tensor:
        if index in self.cache:
            return self.cache[index]
        features = load_features(self.slides[index])
        if self.cached + features.nbytes <= self.cache_bytes:
            self.cache[index], self.cached = features, self.cached + features.nbytes
        return features

    def __getitem__(self, index: int) -> dict:
        slide, features = self.slides[index], self.features(index)
        if self.max_tiles and len(features) > self.max_tiles:  # another part of the slide each time, in its order
            kept = torch.randperm(len(features))[: self.max_tiles].sort().values
            features = features[kept]
            slide = SlideFile(slide.path, slide.slide_id, slide.layout, slide.features_name, slide.width,
                              slide.cells[kept.numpy()], slide.tile_size)  # fmt: skip
        return {"slide": slide, "features": features, "labels": self.labels[index]}


@dataclass
class Collator:
    """Batches for a model whose tiles measure `tile_size`."""

    tile_size: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate([row["slide"] for row in rows], [row["features"] for row in rows], self.tile_size)
        return batch | {"labels": torch.stack([row["labels"] for row in rows])}


def drop_unreadable(slides: list[SlideFile], skipped: dict[str, str]) -> list[SlideFile]:
    """The slides whose features can be read: each is read once, so that training does not end on a damaged one."""
    kept = []
    for slide in tqdm(slides, desc="checking the features", unit="slide", delay=1):
        try:
            load_features(slide)
            kept.append(slide)
        except UnreadableSlide as error:
            skipped[str(slide.path)] = str(error)
    return kept
