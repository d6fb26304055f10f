"""Slide embeddings from a folder of tile features.

Reads the files that CLAM, TRIDENT, STAMP and the like write (HDF5, .pt, .npy, Zarr), runs a LongNet slide encoder over
them in batches of slides of like length, and writes one safetensors or HDF5 file: the embedding of each slide, and of
each layer with --layers. Files that cannot be read are named and left out. Interrupted, it goes on where it stopped.

    python -m examples.slides.encode --demo
    python -m examples.slides.encode --features trident/features_gigapath --checkpoint my-slide-encoder \\
        --output embeddings.safetensors --layers
"""

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import h5py
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoConfig

from examples.reporting import provenance, write_json
from examples.slides.feature_files import (
    Reading,
    SlideFile,
    UnreadableSlide,
    collate,
    inspect_folder,
    load_features,
    report_skipped,
)
from modeling_longnet import LongNetSlideEncoderConfig, LongNetSlideEncoderModel


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
METADATA = "longnet_slides"  # one entry: the order of several is left to chance, and the file's bytes with it


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which every script here is told what the files do not tell."""
    group = parser.add_argument_group("reading the features")
    group.add_argument("--features-name", help="dataset of the features, if it has an unusual name")
    group.add_argument("--coords-name", help="dataset of the coordinates, likewise")
    group.add_argument("--tile-size", type=float, help="distance of neighbouring tiles in the coordinates' unit, if "
                       "the files do not tell; 1 for indices of a grid")  # fmt: skip
    group.add_argument("--coords", type=Path, metavar="FOLDER", help="where coordinates lie, if not beside features")


def reading_of(options) -> Reading:
    return Reading(options.features_name, options.coords_name, options.tile_size, options.coords)


def make_batches(slides: list[SlideFile], max_tiles: int) -> list[list[SlideFile]]:
    """Slides of like length together, the longest first: at most `max_tiles` tiles with their padding, or one slide.

    They depend on the slides alone, so that a run that goes on makes the same ones.
    """
    batches = []
    for slide in sorted(slides, key=lambda slide: (-slide.num_tiles, slide.slide_id)):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].num_tiles <= max_tiles:
            batches[-1].append(slide)
        else:
            batches.append([slide])
    return batches


def read_batch(slides: list[SlideFile], skipped: dict[str, str]) -> tuple[list[SlideFile], list[torch.Tensor]]:
    """The slides whose features can be read, and those; the others go to `skipped`."""
    readable, features = [], []
    for slide in slides:
        try:
            features.append(load_features(slide))
            readable.append(slide)
        except UnreadableSlide as error:
            skipped[str(slide.path)] = str(error)
    return readable, features


@torch.inference_mode()
def encode_batch(model: LongNetSlideEncoderModel, slides: list[SlideFile], features: list[torch.Tensor]) -> dict:
    """pooled [B, C] and layers [B, L + 1, C] in float32 on the CPU."""
    batch = collate(slides, features, model.config.tile_size)
    outputs = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    found = {"pooled": outputs.pooler_output, "layers": torch.stack(outputs.layer_embeddings, dim=1)}
    return {name: tensor.float().cpu().contiguous() for name, tensor in found.items()}


def fingerprint(slides: list[SlideFile], options: argparse.Namespace, config: LongNetSlideEncoderConfig) -> dict:
    """What a run that goes on must have in common with the one before."""
    files = [[str(s.path), s.path.stat().st_mtime_ns, s.num_tiles, s.tile_size] for s in slides]
    return {
        "files": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "num_files": len(files),
        "checkpoint": str(options.checkpoint),
        "config": hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest(),
        "dtype": options.dtype,
        "max_tiles": options.max_tiles,
        "layers": options.layers,
    }


def open_parts(folder: Path, wanted: dict, restart: bool) -> None:
    """The folder that keeps finished batches until all are done.

    Raises:
        ValueError: it belongs to a run with other files or settings.
    """
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    found = json.loads((folder / "run.json").read_text()) if (folder / "run.json").is_file() else None
    if found is not None and found != wanted:
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        raise ValueError(f"{folder} holds a run with other {', '.join(changed)}; give --restart to begin anew.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", wanted)


def run_batches(model, batches: list[list[SlideFile]], parts: Path, layers: bool, skipped: dict[str, str]) -> None:
    """Encodes each batch that is not in `parts` yet; a part appears there complete or not at all."""
    total = sum(slide.num_tiles for batch in batches for slide in batch)
    with tqdm(total=total, desc="encoding", unit="tile", unit_scale=True) as progress:
        for index, batch in enumerate(batches):
            part = parts / f"{index:06d}.safetensors"
            if not part.exists():
                unread: dict[str, str] = {}
                slides, features = read_batch(batch, unread)
                tensors = encode_batch(model, slides, features) if slides else {}
                if not layers:
                    tensors.pop("layers", None)
                about = {"slides": [slide.slide_id for slide in slides], "skipped": unread}
                save_file(tensors, part.with_suffix(".tmp"), {METADATA: json.dumps(about)})
                part.with_suffix(".tmp").replace(part)
            progress.update(sum(slide.num_tiles for slide in batch))
            with safe_open(part, "pt") as file:
                skipped.update(json.loads(file.metadata()[METADATA])["skipped"])


def merge_parts(parts: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Slide ids in alphabetical order, and the tensors [S, ...] of all parts in that order."""
    ids, tensors = [], []
    for part in sorted(parts.glob("*.safetensors")):
        with safe_open(part, "pt") as file:
            names = json.loads(file.metadata()[METADATA])["slides"]
        if names:
            ids += names
            tensors.append(load_file(part))
    if not ids:
        raise ValueError("no slide could be read; see the list above.")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    joined = {name: torch.cat([part[name] for part in tensors])[order] for name in tensors[0]}
    return [ids[i] for i in order], joined


def write_embeddings(path: Path, ids: list[str], tensors: dict[str, torch.Tensor], about: dict) -> None:
    """One file, in one move: safetensors with the ids in its metadata, or HDF5 with a dataset of them."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".h5", ".hdf5"):
        with h5py.File(temporary, "w") as file:
            file["slide_id"] = ids
            for name, tensor in tensors.items():
                file[name] = tensor.numpy()
            file.attrs["about"] = json.dumps(about)
    else:
        save_file(tensors, temporary, {METADATA: json.dumps({"slide_id": ids, **about})})
    temporary.replace(path)


def read_embeddings(path: str | Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Slide ids, and pooled [S, C] and layers [S, L + 1, C], of a file that `write_embeddings` wrote.

    Raises:
        ValueError: another file.
    """
    path = Path(path)
    try:
        if path.suffix in (".h5", ".hdf5"):
            with h5py.File(path, "r") as file:
                ids = [name.decode() for name in file["slide_id"][...]]
                return ids, {name: torch.from_numpy(file[name][...]) for name in ("pooled", "layers") if name in file}
        with safe_open(path, "pt") as file:
            ids = json.loads(file.metadata()[METADATA])["slide_id"]
            return ids, {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise ValueError(f"{path}: is no file of slide embeddings ({str(error).splitlines()[0]}).") from None


def encode(options: argparse.Namespace) -> dict:
    """Runs the script on parsed options; returns the report that is written beside the output."""
    config = AutoConfig.from_pretrained(options.checkpoint)
    if not isinstance(config, LongNetSlideEncoderConfig):
        raise ValueError(f"`checkpoint` must hold a LongNet slide encoder, got model type {config.model_type!r}.")
    limits = {"in_chans": config.in_chans, "slide_ngrids": config.slide_ngrids}
    slides, skipped = inspect_folder(options.features, reading_of(options), **limits)
    if not slides:
        report_skipped(skipped)
        raise ValueError(f"none of the {len(skipped)} files in {options.features} can be read.")
    parts = options.output.with_name(options.output.name + ".parts")
    open_parts(parts, fingerprint(slides, options, config), options.restart)
    model = LongNetSlideEncoderModel.from_pretrained(options.checkpoint, dtype=DTYPES[options.dtype])
    batches = make_batches(slides, options.max_tiles)
    run_batches(model.to(options.device).eval(), batches, parts, options.layers, skipped)
    ids, tensors = merge_parts(parts)
    known = {slide.slide_id: slide for slide in slides}
    report = {
        "slides": {
            name: {"file": str(known[name].path), "layout": known[name].layout, "tiles": known[name].num_tiles,
                   "tile_size": known[name].tile_size, "tile_um": known[name].tile_um, "notes": known[name].notes}
            for name in ids
        },
        "skipped": skipped,
        "settings": {name: str(value) for name, value in vars(options).items()} | asdict(reading_of(options)),
        "provenance": provenance(),
    }  # fmt: skip
    report["settings"]["coords_folder"] = str(options.coords) if options.coords else None
    write_embeddings(options.output, ids, tensors, {"checkpoint": str(options.checkpoint), "dtype": options.dtype})
    write_json(options.output.with_name(options.output.name + ".report.json"), report)
    shutil.rmtree(parts)
    report_skipped(skipped)
    for slide in slides:
        for note in slide.notes:
            print(f"  note: {slide.path}: {note}")
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    print(f"\n{len(ids)} slides, {sum(s.num_tiles for s in slides):,} tiles, {len(skipped)} left out: "
          f"{shapes} in {options.output}")  # fmt: skip
    return report


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, help="the folder of feature files; folders in it are searched too")
    parser.add_argument("--checkpoint", help="a slide encoder: a folder, or a repository of the Hub")
    parser.add_argument("--output", type=Path, help="the file to write, .safetensors or .h5")
    parser.add_argument("--layers", action="store_true", help="also the embedding from each layer")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-tiles", type=int, default=20_000, help="in a batch, padding included; a longer slide "
                        "goes alone")  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="begin anew where an interrupted run would go on")
    parser.add_argument("--strict", action="store_true", help="exit with an error if a file was left out")
    parser.add_argument("--demo", action="store_true", help="a small set of slides and an encoder, made on the spot")
    add_reading_arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> dict:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.demo:
        from examples.slides.demo import prepare_encode

        prepare_encode(options)
    for name in ("features", "checkpoint", "output"):
        if getattr(options, name) is None:
            parser.error(f"--{name} is needed (or --demo)")
    if options.max_tiles < 1:
        parser.error(f"--max-tiles must be at least 1, got {options.max_tiles}")
    if options.output.suffix not in (".safetensors", ".h5", ".hdf5"):
        parser.error(f"--output must end in .safetensors or .h5, got {options.output}")
    try:
        report = encode(options)
    except ValueError as error:
        parser.error(str(error))
    if options.strict and report["skipped"]:
        parser.exit(1, "files were left out, and --strict was given\n")
    return report


if __name__ == "__main__":
    main()
