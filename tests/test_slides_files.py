"""Feature files: what CLAM, TRIDENT, STAMP and others write is read without options; what is broken is named."""

import sys

import h5py
import numpy as np
import pytest
import torch

from examples.slides.feature_files import (
    Reading,
    UnreadableSlide,
    collate,
    inspect_folder,
    inspect_slide,
    load_features,
)
from examples.slides.synthetic import LAYOUTS, make_slide, write_data, write_slide


SLIDE = make_slide("arrangement", 0)
LIMITS = {"in_chans": 24, "slide_ngrids": 12}


def inspect(path, **options):
    return inspect_slide(path, Reading(**options), **LIMITS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_pipeline_is_read_without_options(layout, tmp_path):
    path = tmp_path / "slide.h5"
    write_slide(path, SLIDE, layout)
    slide = inspect(path)
    assert np.array_equal(slide.cells * 256, SLIDE.coords) and slide.slide_id == "slide"
    assert slide.layout == {"CLAM": "plain"}.get(layout, layout)
    features = load_features(slide)
    assert features.dtype == (torch.float16 if layout == "STAMP" else torch.float32)
    wanted = torch.from_numpy(SLIDE.features)
    torch.testing.assert_close(features.float(), wanted, rtol=0, atol=2e-3 if layout == "STAMP" else 0)
    assert slide.tile_um == {"CLAM": None, "TRIDENT": 128, "STAMP": 128}[layout]


def write_pt(path, coords):
    torch.save({"tile_embeds": torch.from_numpy(SLIDE.features), "coords": torch.from_numpy(coords)}, path)


def write_zarr(path, coords):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(path), mode="w")
    for name, data in (("features", SLIDE.features), ("coords", coords)):
        group.create_array(name, shape=data.shape, dtype=data.dtype)[...] = data


def write_batch_dimension(path, coords):
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = SLIDE.features[None], coords[None]


def write_group(path, coords):
    with h5py.File(path, "w") as file:
        file["tiles/embeddings"], file["tiles/coords_patching"] = SLIDE.features, coords


OTHERS = {
    "gigapath.pt": write_pt,
    "lazy.zarr": write_zarr,
    "titan.h5": write_batch_dimension,
    "nested.hdf5": write_group,
    "arrays.npz": lambda path, coords: np.savez(path, features=SLIDE.features, coords=coords),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_file_are_read(name, tmp_path):
    OTHERS[name](tmp_path / name, SLIDE.coords)
    slide = inspect(tmp_path / name)
    assert np.array_equal(slide.cells * 256, SLIDE.coords)
    assert torch.equal(load_features(slide), torch.from_numpy(SLIDE.features))


def test_bare_features_find_their_coordinates(tmp_path):
    """CLAM's pt_files hold features alone; its patches hold coordinates with the size of a patch at another level."""
    torch.save(torch.from_numpy(SLIDE.features), tmp_path / "a.pt")
    torch.save(SLIDE.features, tmp_path / "b.pt")  # TRIDENT's: an array of NumPy
    (tmp_path / "patches").mkdir()
    for name in ("a", "b_patches"):
        with h5py.File(tmp_path / "patches" / f"{name}.h5", "w") as file:
            file["coords"] = SLIDE.coords * 4
            attributes = {"patch_size": 256, "patch_level": 1, "downsample": np.array([4.0, 4.0])}
            file["coords"].attrs.update(attributes)
    for name in ("a", "b"):
        slide = inspect(tmp_path / f"{name}.pt", coords_folder=tmp_path / "patches")
        assert slide.layout == "CLAM" and slide.tile_size == 1024 and np.array_equal(slide.cells * 256, SLIDE.coords)
        assert torch.equal(load_features(slide), torch.from_numpy(SLIDE.features))
    np.save(tmp_path / "c.npy", SLIDE.features)
    np.save(tmp_path / "c_coords.npy", SLIDE.coords)
    assert np.array_equal(inspect(tmp_path / "c.npy").cells * 256, SLIDE.coords)


def test_grids_of_several_pieces_of_tissue_are_told_by_their_steps(tmp_path):
    """CLAM lays a grid of its own over each contour, so differences between pieces are arbitrary."""
    other = SLIDE.coords + np.array([37, 91])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["features"], file["coords"] = np.tile(SLIDE.features, (2, 1)), np.concatenate([SLIDE.coords, other])
    assert inspect_slide(tmp_path / "x.h5", Reading()).tile_size == 256


def test_indices_of_a_grid_are_refused_unless_declared(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["features"], file["coords"] = SLIDE.features, SLIDE.coords // 256
    with pytest.raises(UnreadableSlide, match="x.h5.*indices of a grid.*--tile-size 1"):
        inspect(tmp_path / "x.h5")
    assert np.array_equal(inspect(tmp_path / "x.h5", tile_size=1).cells * 256, SLIDE.coords)


def hdf5(features=SLIDE.features, coords=SLIDE.coords, **attributes):
    def write(path):
        with h5py.File(path, "w") as file:
            for name, data in (("features", features), ("coords", coords)):
                if data is not None:
                    file[name] = data
            file.attrs.update(attributes)

    return write


def spoilt(value):
    features = SLIDE.features.copy()
    features[3, 5] = value
    return features


def write_cut(path):
    hdf5()(path)
    path.write_bytes(path.read_bytes()[:5000])


class Evil:
    def __reduce__(self):
        return (sys.exit, ("code from a file was run",))


BROKEN = {
    "cut short": (write_cut, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "a letter": (lambda path: path.write_text("Dear pathologist"), "cannot be read"),
    "no features": (hdf5(features=None), "must hold features as one of"),
    "no coordinates": (hdf5(coords=None), "holds no coordinates"),
    "lengths differ": (hdf5(coords=SLIDE.coords[:-1]), "rows of features and"),
    "no tiles": (hdf5(SLIDE.features[:0], SLIDE.coords[:0]), r"shape \[tiles, width\]"),
    "nan": (hdf5(spoilt(np.nan)), "1 tiles hold NaN"),
    "infinite": (hdf5(spoilt(np.inf)), "1 tiles hold NaN"),
    "another width": (hdf5(SLIDE.features[:, :7]), "7 wide, but the encoder reads 24"),
    "integers": (hdf5(SLIDE.features.astype(int)), "floating point"),
    "three coordinates": (hdf5(coords=np.tile(SLIDE.coords, 2)[:, :3]), r"shape \[tiles, 2\]"),
    "negative": (hdf5(coords=SLIDE.coords - 4000), "not negative"),
    "outside": (hdf5(coords=SLIDE.coords + 4096), "outside the encoder's grid"),
    "one cell": (hdf5(coords=SLIDE.coords * 0), "all tiles fall into one cell"),
    "slide embedding": (hdf5(feat_type="slide"), "embedding of a slide"),
    "pickle": (lambda path: torch.save(Evil(), path), "cannot be read"),
    "objects": (lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True), "cannot be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_with_its_reason(kind, tmp_path):
    write, message = BROKEN[kind]
    path = tmp_path / f"broken{'.pt' if kind == 'pickle' else '.npy' if kind == 'objects' else '.h5'}"
    write(path)
    with pytest.raises(UnreadableSlide, match=message) as caught:
        load_features(inspect(path))
    assert str(path) in str(caught.value)


def test_files_of_one_name_are_left_out_and_named(tmp_path):
    for folder in ("a", "b"):
        write_slide(tmp_path / folder / "same.h5", SLIDE, "CLAM")
    write_slide(tmp_path / "other.h5", SLIDE, "CLAM")
    slides, skipped = inspect_folder(tmp_path, Reading())
    assert [slide.slide_id for slide in slides] == ["other"] and len(skipped) == 2
    assert all("2 files are named 'same'" in reason for reason in skipped.values())


def test_clam_features_are_read_once(tmp_path):
    write_slide(tmp_path / "h5_files" / "s.h5", SLIDE, "CLAM")
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.from_numpy(SLIDE.features), tmp_path / "pt_files" / "s.pt")
    slides, skipped = inspect_folder(tmp_path, Reading())
    assert len(slides) == 1 and not skipped


def test_a_batch_holds_each_slide_and_says_what_is_padding(tmp_path):
    write_data("rare", tmp_path, 3)
    slides, _ = inspect_folder(tmp_path / "features", Reading())
    features = [load_features(slide) for slide in slides]
    batch = collate(slides, features, 100)
    assert batch["attention_mask"].sum(dim=1).tolist() == [slide.num_tiles for slide in slides]
    for b, slide in enumerate(slides):
        assert torch.equal(batch["coords"][b, : slide.num_tiles], torch.from_numpy(slide.cells * 100))
        assert torch.equal(batch["tile_embeds"][b, : slide.num_tiles], features[b].float())


@pytest.mark.parametrize("task", ["rare", "arrangement"])
def test_the_mean_of_the_tiles_tells_nothing_by_construction(task):
    slides = [make_slide(task, index, noise=0.0) for index in range(400)]
    means = np.stack([slide.features.mean(axis=0) for slide in slides])
    labels = np.array([slide.label for slide in slides])
    difference = means[labels == 1].mean(axis=0) - means[labels == 0].mean(axis=0)
    error = means.std(axis=0) * (1 / labels.sum() + 1 / (1 - labels).sum()) ** 0.5
    assert (np.abs(difference) < 4 * error).all()
    assert all(slide.planted.any() == bool(slide.label) for slide in slides)
