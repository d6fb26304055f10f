"""Tile features and coordinates, read from the files that public pipelines write.

| pipeline | file | features | coords | size of a tile |
|---|---|---|---|---|
| CLAM, features | h5_files/ID.h5 | `features` | `coords`, pixels of level 0 | none: the distance of neighbours tells |
| CLAM, patches | patches/ID.h5 | - | `coords` | `patch_size` x `downsample` on `coords` |
| TRIDENT | features_NAME/ID.h5 | `features` | `coords`, pixels of level 0 | `patch_size_level0` on `coords` |
| STAMP | ID.h5 | `feats`, float16 | `coords`, micrometres | `tile_size_um` (before 2.1 `tile_size`) on the file |
| Prov-GigaPath | ID.pt, a dictionary | `tile_embeds` | `coords` | none |

All of them store a tile's corner as (x, y), which is the order in which Prov-GigaPath's encoder reads it. What the
encoder wants to know is the cell of the grid, so units do not matter: cell = coordinate / size of a tile.

Letters: N tiles, C width of the features.

Sources: the public code of CLAM (utils/file_utils.py, wsi_core/WholeSlideImage.py), TRIDENT (trident/IO.py,
trident/wsi_objects/WSI.py) and STAMP (src/stamp/preprocessing/__init__.py, src/stamp/modeling/data.py).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm


FEATURE_NAMES = ("features", "feats", "tile_embeds", "patch_embeddings", "embeddings", "feature", "x")
COORD_NAMES = ("coords", "coordinates", "coords_patching", "tile_coords", "positions")
SUFFIXES = (".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz", ".safetensors", ".zarr")
# Below this distance of neighbours, in pixels, coordinates are no pixels.
SMALLEST_TILE = 16
# Where neither the file nor neighbours tell: Prov-GigaPath's.
USUAL_TILE = 256
# A micrometre coordinate of float32 may lie just below its cell's edge.
EDGE = 1e-3


class UnreadableSlide(ValueError):
    """A file that does not hold one slide's tiles; the message names the file and says why."""


@dataclass(frozen=True)
class Reading:
    """What the files do not tell, or tell otherwise.

    Args:
        features_name, coords_name: the datasets' names, if they are not among those that are known.
        tile_size: distance of neighbouring tiles in the unit of the coordinates; 1 for indices of a grid.
        coords_folder: where coordinates lie, in files of the same name, if they are not beside the features.
    """

    features_name: str | None = None
    coords_name: str | None = None
    tile_size: float | None = None
    coords_folder: Path | None = None


@dataclass
class SlideFile:
    """A file that can be read: cells [N, 2] int64 are the tiles' places (x, y) in the grid; sizes in micrometres."""

    path: Path
    slide_id: str
    layout: str
    features_name: str
    width: int
    cells: np.ndarray
    tile_size: float
    tile_um: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def num_tiles(self) -> int:
        return len(self.cells)


@dataclass
class Arrays:
    """What a file holds: arrays by name (read only when indexed), attributes of the file and of each array."""

    arrays: Mapping[str, Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    array_attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def find_files(folder: str | Path) -> list[Path]:
    """The feature files below a folder, in order of their names; of CLAM's two folders only `h5_files`.

    Raises:
        ValueError: no folder, or nothing in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`features` must be a folder, got {str(folder)!r}.")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    found = [path for path in found if not any(parent.suffix == ".zarr" for parent in path.parents)]
    if (folder / "h5_files").is_dir():
        found = [path for path in found if folder / "pt_files" not in path.parents]
    found = [path for path in found if not path.stem.endswith("_coords")]
    if not found:
        raise ValueError(f"`features` must hold files of {', '.join(SUFFIXES)}, got {str(folder)!r} with none.")
    return sorted(found)


def _plain(attributes: Mapping) -> dict[str, Any]:
    """Attributes as Python values; h5py gives NumPy's, and bytes for some strings."""
    values = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    return {name: value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
            for name, value in values.items()}  # fmt: skip


def _hdf5_arrays(file: h5py.File) -> Arrays:
    arrays = {}

    def note(name, item):
        if isinstance(item, h5py.Dataset):
            arrays.setdefault(name.rpartition("/")[2], item)

    file.visititems(note)
    return Arrays(arrays, _plain(file.attrs), {name: _plain(item.attrs) for name, item in arrays.items()})


def _zarr_arrays(path: Path) -> Arrays:
    try:
        import zarr
    except ImportError as error:
        raise UnreadableSlide(f"{path}: reading Zarr needs the package zarr (pip install zarr).") from error
    group = zarr.open_group(str(path), mode="r")
    arrays = {name.rpartition("/")[2]: item for name, item in group.members(max_depth=None) if hasattr(item, "shape")}
    return Arrays(arrays, dict(group.attrs), {name: dict(item.attrs) for name, item in arrays.items()})


def _torch_arrays(path: Path) -> Arrays:
    """Tensors, and NumPy arrays (as TRIDENT's `.pt` holds); no code from the file is run."""
    numpy_types = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, *map(type, map(np.dtype, "efdbhilBHIL?"))]
    with torch.serialization.safe_globals(numpy_types):
        content = torch.load(path, map_location="cpu", weights_only=True)
    content = content if isinstance(content, Mapping) else {"features": content}
    arrays = {str(name): value.float().numpy() if getattr(value, "dtype", None) == torch.bfloat16 else
              np.asarray(value) for name, value in content.items() if hasattr(value, "shape")}  # fmt: skip
    return Arrays(arrays, {name: value for name, value in content.items() if isinstance(value, (int, float, str))})


@contextmanager
def open_arrays(path: Path) -> Iterator[Arrays]:
    """The arrays of a file of any kind in `SUFFIXES`. Pickles are never run."""
    suffix = path.suffix.lower()
    if suffix in (".h5", ".hdf5"):
        with h5py.File(path, "r") as file:
            yield _hdf5_arrays(file)
    elif suffix == ".zarr":
        yield _zarr_arrays(path)
    elif suffix in (".pt", ".pth"):
        yield _torch_arrays(path)
    elif suffix == ".safetensors":
        yield Arrays({name: tensor.numpy() for name, tensor in load_file(path).items()})
    else:
        content = np.load(path, allow_pickle=False)
        yield Arrays({"features": content} if isinstance(content, np.ndarray) else dict(content))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Any failure below is the file's, and says its name."""
    try:
        yield
    except UnreadableSlide:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the libraries
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnreadableSlide(f"{path}: cannot be read ({type(error).__name__}: {reason[:160]}).") from error


def _pick(path: Path, arrays: Mapping, name: str | None, known: tuple[str, ...], what: str) -> str:
    names = [name] if name else [candidate for candidate in known if candidate in arrays]
    if not names or names[0] not in arrays:
        wanted = repr(name) if name else "one of " + ", ".join(known)
        raise UnreadableSlide(f"{path}: must hold {what} as {wanted}, got {sorted(arrays) or 'nothing'}.")
    return names[0]


def _coords_file(path: Path, reading: Reading) -> Path:
    """The file with the coordinates of a file that has none."""
    places = [path.with_name(f"{path.stem}_coords.npy")]
    if reading.coords_folder:
        places += [reading.coords_folder / f"{path.stem}{end}{suffix}" for end in ("", "_patches", "_coords")
                   for suffix in SUFFIXES]  # fmt: skip
    found = [place for place in places if place.exists()]
    if not found:
        raise UnreadableSlide(
            f"{path}: holds no coordinates ({', '.join(COORD_NAMES)}), and none lie beside it; name their folder with "
            "--coords."
        )
    return found[0]


def _read_coords(path: Path, content: Arrays, reading: Reading) -> tuple[np.ndarray, dict, dict]:
    """Coordinates [N, 2], their attributes and those of their file."""
    if not reading.coords_name and not any(name in content.arrays for name in COORD_NAMES):
        other = _coords_file(path, reading)
        with _readable(other), open_arrays(other) as there:
            if set(there.arrays) == {"features"}:  # a bare array
                return np.asarray(there.arrays["features"][...]), {}, dict(there.attributes)
            name = _pick(other, there.arrays, None, COORD_NAMES, "coordinates")
            return (np.asarray(there.arrays[name][...]), dict(there.array_attributes.get(name, {})),
                    dict(there.attributes))  # fmt: skip
    name = _pick(path, content.arrays, reading.coords_name, COORD_NAMES, "coordinates")
    return (np.asarray(content.arrays[name][...]), dict(content.array_attributes.get(name, {})),
            dict(content.attributes))  # fmt: skip


def neighbour_distance(coords: np.ndarray) -> float | None:
    """Distance of neighbouring tiles in coords [N, 2], as far as it shows.

    On one grid it is the smallest difference. CLAM lays a grid of its own over each piece of tissue, whose differences
    are arbitrary; there it is the commonest step from a tile to the next in the file.
    """
    steps = [np.diff(np.unique(axis)) for axis in coords.T]
    steps = np.concatenate([step[step > 0] for step in steps])
    if not len(steps):
        return None
    smallest = float(steps.min())
    multiples = steps / smallest
    if np.abs(multiples - multiples.round()).max() < 0.05:
        return smallest
    walk = np.abs(np.diff(coords, axis=0))
    walk = walk[(walk > 0).sum(axis=1) == 1].max(axis=1)
    counts = Counter(np.round(walk, 3).tolist()).most_common()
    return min((step for step, count in counts if count == counts[0][1]), default=smallest)


def _number(value: Any) -> float | None:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None


def _tile_size(coords: np.ndarray, about: dict, file: dict, reading: Reading) -> tuple[str, float | None, float | None]:
    """Layout, size of a tile in the coordinates' unit, and in micrometres, each as far as it is known."""
    if (size := _number(file.get("tile_size_um"))) or file.get("unit") == "um":
        layout, size = "STAMP", size or _number(file.get("tile_size"))
        micrometres = size
    elif size := _number(about.get("patch_size_level0")):
        layout, magnification = "TRIDENT", _number(about.get("level0_magnification"))
        micrometres = size * 10 / magnification if magnification else None  # 40x is about 0.25 um
    elif size := _number(about.get("patch_size")):
        layout, micrometres = "CLAM", None
        size *= _number(about.get("downsample")) or 1
    else:
        layout, micrometres = "plain", None
        size = neighbour_distance(coords)
    return layout, reading.tile_size or size, micrometres


def _check_coords(path: Path, coords: np.ndarray, num_tiles: int) -> np.ndarray:
    coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise UnreadableSlide(f"{path}: coordinates must have shape [tiles, 2], got {list(coords.shape)}.")
    if len(coords) != num_tiles:
        raise UnreadableSlide(f"{path}: holds {num_tiles} rows of features and {len(coords)} of coordinates.")
    if coords.dtype.kind not in "iuf":
        raise UnreadableSlide(f"{path}: coordinates must be numbers, got {coords.dtype}.")
    coords = coords.astype(np.float64)
    if not np.isfinite(coords).all() or (coords < 0).any():
        raise UnreadableSlide(f"{path}: coordinates must be finite and not negative, got {coords.min(axis=0)}.")
    return coords


def inspect_slide(path: Path, reading: Reading, in_chans: int | None = None, slide_ngrids: int | None = None):
    """Everything about a file but its features, as a `SlideFile`.

    Args:
        in_chans, slide_ngrids: the encoder's, to be checked against.

    Raises:
        UnreadableSlide: naming the file and the reason.
    """
    with _readable(path), open_arrays(path) as content:
        kind = content.attributes.get("feat_type", "tile")
        if kind != "tile":
            raise UnreadableSlide(f"{path}: holds the embedding of a {kind} (`feat_type`), not tiles.")
        name = _pick(path, content.arrays, reading.features_name, FEATURE_NAMES, "features")
        features = content.arrays[name]
        shape = tuple(features.shape)
        shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
        if len(shape) != 2 or 0 in shape:
            raise UnreadableSlide(f"{path}: {name!r} must have shape [tiles, width], got {list(features.shape)}.")
        if np.dtype(features.dtype).kind != "f":
            raise UnreadableSlide(f"{path}: {name!r} must hold floating point numbers, got {features.dtype}.")
        if in_chans and shape[1] != in_chans:
            raise UnreadableSlide(
                f"{path}: {name!r} is {shape[1]} wide, but the encoder reads {in_chans}: features of another tile "
                "encoder?"
            )
        coords, about, file = _read_coords(path, content, reading)
        coords = _check_coords(path, coords, shape[0])
    layout, tile_size, tile_um = _tile_size(coords, about, file, reading)
    if reading.tile_size is None and (tile_size or SMALLEST_TILE) < SMALLEST_TILE and layout != "STAMP":
        raise UnreadableSlide(
            f"{path}: neighbouring tiles are {tile_size:g} apart, so these are no pixels; if they are indices of a "
            "grid, say so with --tile-size 1."
        )
    cells, notes = _cells(path, coords, tile_size or USUAL_TILE, slide_ngrids)
    return SlideFile(path, path.stem, layout, name, shape[1], cells, tile_size or USUAL_TILE, tile_um, notes)


def _cells(path: Path, coords: np.ndarray, tile_size: float, slide_ngrids: int | None) -> tuple[np.ndarray, list[str]]:
    """Cells [N, 2] of coords [N, 2], and what is odd about them."""
    cells = np.floor(coords / tile_size + EDGE).astype(np.int64)
    if slide_ngrids and cells.max() >= slide_ngrids:
        raise UnreadableSlide(
            f"{path}: coordinates up to {coords.max():g} at {tile_size:g} a tile lie outside the encoder's grid of "
            f"{slide_ngrids} cells each way."
        )
    shared = len(cells) - len(np.unique(cells, axis=0))
    if shared == len(cells) - 1 > 0:
        raise UnreadableSlide(f"{path}: all tiles fall into one cell of {tile_size:g}; see --tile-size.")
    return cells, [f"{shared} tiles share the cell of another (overlapping tiles?)"] if shared else []


def load_features(slide: SlideFile) -> torch.Tensor:
    """Features [N, C], in the dtype of the file.

    Raises:
        UnreadableSlide: damaged data, NaN or infinite values.
    """
    with _readable(slide.path), open_arrays(slide.path) as content:
        features = torch.from_numpy(np.ascontiguousarray(content.arrays[slide.features_name][...]))
    features = features.reshape(-1, features.shape[-1])
    wrong = ~features.isfinite().all(dim=1)
    if wrong.any():
        raise UnreadableSlide(f"{slide.path}: {int(wrong.sum())} tiles hold NaN or infinite features.")
    return features


def collate(slides: list[SlideFile], features: list[torch.Tensor], tile_size: int) -> dict[str, torch.Tensor]:
    """A batch for the encoder: tiles side by side, padding behind; coordinates in the encoder's own unit.

    Returns:
        tile_embeds [B, N, C] in the widest dtype of the slides, coords [B, N, 2] int64, attention_mask [B, N]; no mask
        where nothing is padded.
    """
    cells = [torch.from_numpy(slide.cells) * tile_size for slide in slides]
    widest = reduce(torch.promote_types, {x.dtype for x in features})
    features = [x.to(widest) for x in features]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"tile_embeds": pad(features, batch_first=True), "coords": pad(cells, batch_first=True)}
    lengths = torch.tensor([len(x) for x in features])
    if lengths.min() < lengths.max():
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def inspect_folder(folder: str | Path, reading: Reading, **encoder: int) -> tuple[list[SlideFile], dict[str, str]]:
    """The slides below a folder that can be read, and for each other file why not.

    Two files of one name are both left out: which is which nobody can tell.
    """
    slides, skipped = [], {}
    for path in tqdm(find_files(folder), desc="looking into the files", unit="file", delay=1):
        try:
            slides.append(inspect_slide(path, reading, **encoder))
        except UnreadableSlide as error:
            skipped[str(path)] = str(error)
    counts = Counter(slide.slide_id for slide in slides)
    for slide in [slide for slide in slides if counts[slide.slide_id] > 1]:
        slides.remove(slide)
        skipped[str(slide.path)] = f"{slide.path}: {counts[slide.slide_id]} files are named {slide.slide_id!r}."
    sizes = [slide.tile_um for slide in slides if slide.tile_um]
    if sizes and max(sizes) > 1.2 * min(sizes):
        print(f"Warning: tiles measure from {min(sizes):.0f} to {max(sizes):.0f} micrometres: several magnifications?")
    return slides, skipped


def report_skipped(skipped: Mapping[str, str]) -> None:
    """Names each file that was left out, at the end, where it is seen."""
    if skipped:
        print(f"\n{len(skipped)} file{'s' * (len(skipped) > 1)} left out:")
        for reason in skipped.values():
            print(f"  {reason}")
