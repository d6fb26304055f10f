"""What every converter shares: foreign checkpoints read safely, mappings checked, folders that appear only complete.

A checkpoint is untrusted: it is read as tensors or not at all, and every refusal names the file and the key.
"""

import argparse
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

import modeling_longnet
from modeling_longnet import make_model_card


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_file(path: str | Path) -> dict:
    """The dictionary that a .safetensors or torch file holds, on the CPU. No code from the file is run.

    Raises:
        ValueError: no such file, a truncated one, one that holds more than tensors and plain values, no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts like to store their command line, which is a plain container of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else "it is no plain file of tensors"
        raise ValueError(f"{path}: refused, because {what}; files that could run code are never loaded.") from None
    except Exception as error:  # a damaged file can fail anywhere
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be read, it is damaged or cut short ({reason}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a dictionary of tensors, got {type(content).__name__}.")
    return content


def read_state_dict(path: str | Path, entries: tuple[str, ...] = ("model",)) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint: the file itself, or the first of `entries` that it has.

    Raises:
        ValueError: what `read_file` refuses, and entries that are not dense tensors of real numbers.
    """
    content = read_file(path)
    entry = next((name for name in entries if isinstance(content.get(name), dict)), None)
    if entry is not None:
        content = content[entry]
    elif not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(
            f"{path}: must be a state dict or hold one under the key {' or '.join(map(repr, entries))}, got the keys "
            f"{list(map(str, content))[:5]}."
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: key {key!r} must hold a tensor, got {type(value).__name__}.")
        if value.layout != torch.strided or value.is_quantized or not value.is_floating_point():
            raise ValueError(f"{path}: key {key!r} must hold floating point numbers, got {value.dtype}.")
    return content


def without_prefix(path: str | Path, tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """`tensors` with `prefix` taken off every key, if every key has it.

    Raises:
        ValueError: some keys have it and some have not.
    """
    others = [key for key in tensors if not key.startswith(prefix)]
    if len(others) == len(tensors):
        return dict(tensors)
    if others:
        raise ValueError(f"{path}: either all keys begin with {prefix!r} or none, got {others[0]!r} among others.")
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def count_layers(path: str | Path, tensors: Mapping[str, torch.Tensor], prefix: str = "layers.") -> int:
    """Number of layers in a state dict.

    Raises:
        ValueError: there are none, or numbers are left out.
    """
    found = {int(match[1]) for key in tensors if (match := re.match(re.escape(prefix) + r"(\d{1,6})\.", key))}
    if found != set(range(len(found))) or not found:
        raise ValueError(f"{path}: keys {prefix}0.*, {prefix}1.* and so on are wanted, got layers {sorted(found)}.")
    return len(found)


def _some(keys: list[str]) -> str:
    shown = ", ".join(map(repr, keys[:5]))
    return shown + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def check_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str | None = None,
) -> None:
    """Refuses missing and extra keys, other shapes, NaN and infinite values, and a mixture of dtypes.

    Args:
        shapes: shape of each tensor that must be there.
        optional: shape of each tensor that may be there.
        dtype: the dtype that all will be converted to; without one they must agree.

    Raises:
        ValueError: naming the file and the keys.
    """
    if dtype is not None and dtype not in list(DTYPES):
        raise ValueError(f"`dtype` must be None or one of {', '.join(map(repr, DTYPES))}, got {dtype!r}.")
    optional = optional or {}
    if missing := [key for key in shapes if key not in tensors]:
        raise ValueError(f"{path}: missing {_some(missing)}.")
    if extra := [key for key in tensors if key not in shapes and key not in optional]:
        raise ValueError(f"{path}: not part of this architecture: {_some(extra)}.")
    wanted = {**shapes, **optional}
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(wanted[key]):
            raise ValueError(f"{path}: {key!r} must have shape {tuple(wanted[key])}, got {tuple(tensor.shape)}.")
    for key, tensor in tqdm(tensors.items(), desc="Checking", unit="tensor", leave=False, delay=1):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key!r} holds NaN or infinite values.")
        if dtype and not torch.isfinite(tensor.to(DTYPES[dtype])).all():
            raise ValueError(f"{path}: {key!r} holds values that {dtype} cannot represent.")
    dtypes = {tensors[key].dtype: key for key in shapes}
    if dtype is None and len(dtypes) > 1:
        listed = ", ".join(f"{kind} ({key!r})" for kind, key in dtypes.items())
        raise ValueError(f"{path}: holds tensors of several dtypes, {listed}; choose one with --dtype.")


def print_mapping(rows: list[tuple[str, str, torch.Tensor]]) -> None:
    """One line a tensor: its key in the source, its key in the result, shape and dtype."""
    lines = [("source", "result", "shape", "dtype")]
    for source, result, tensor in rows:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        lines.append((source, result, shape, str(tensor.dtype).removeprefix("torch.")))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write in that takes the name `output` when the block ends well, and vanishes when it does not.

    Raises:
        ValueError: `output` exists and is not an empty folder.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` must be a new or empty folder, got {str(output)!r}, which holds something already.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.partial-") as partial:
        complete = Path(partial) / "model"
        complete.mkdir()
        yield complete
        os.rename(complete, output)


def label_settings(path: str | Path, key: str, count: int, labels: list[str] | None) -> dict[str, dict]:
    """What the names of `count` classes, which the tensor `key` tells, add to a configuration.

    Raises:
        ValueError: another number of names.
    """
    if labels and len(labels) != count:
        raise ValueError(f"{path}: {key!r} tells {count} classes, `labels` names {labels}.")
    names = labels or [f"LABEL_{k}" for k in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}


def on_meta_device(architecture: type[PreTrainedModel], config: PreTrainedConfig, path: str | Path) -> PreTrainedModel:
    """A model without memory for its weights; `path`, named in errors, is where its sizes come from."""
    try:
        with torch.device("meta"):
            return architecture(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: asks for sizes that no tensor can have ({str(error).splitlines()[0]}).") from None


def with_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], dtype: str | None) -> PreTrainedModel:
    """`model`, made on the meta device, with copies of `weights` for each of its parameters."""
    copies = {key: tensor.detach().to(DTYPES[dtype] if dtype else tensor.dtype) for key, tensor in weights.items()}
    copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in copies.items()}
    model.load_state_dict(copies, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def filled(
    model: PreTrainedModel,
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    key_of: Callable[[str], str],
    dtype: str | None,
) -> tuple[PreTrainedModel, list[tuple[str, str, torch.Tensor]]]:
    """A model of the meta device with the checkpoint's `tensors`, and (key there, our key, tensor) of each.

    Args:
        key_of: the checkpoint's key for one of ours.

    Raises:
        ValueError: what `check_tensors` refuses.
    """
    state = model.state_dict()
    targets = {key_of(key): key for key in state}
    check_tensors(path, tensors, {source: tuple(state[key].shape) for source, key in targets.items()}, dtype=dtype)
    rows = [(source, key, tensors[source]) for source, key in targets.items()]
    return with_weights(model, {key: tensor for _, key, tensor in rows}, dtype), rows


PROVENANCE = """
## Provenance

| | |
|---|---|
| original file | `{file}`, {size:,} bytes |
| SHA-256 | `{digest}` |
| converted by | `{converter}` |
| settings | `{settings}` |
| versions | longnet-transformers {version}, transformers {transformers} |

Nothing was trained; the weights are {weights}.

## Licence of the original

{notes}
"""


def converted_card(
    model: PreTrainedModel,
    name: str,
    source: Path,
    *,
    converter: str,
    settings: Mapping,
    dtype: str | None,
    licence: str | None,
    notes: str,
) -> ModelCard:
    """The model's card, which says besides where the weights come from and under which licence.

    Args:
        model, name: whose card it is, and the name to load it by.
        source: the original checkpoint; name, size and SHA-256 are recorded.
        converter: the module that converted it.
        settings: what it was told besides.
        dtype: what the weights were rounded to, if they were.
        licence: an identifier of the Hub's; "other" with a note when it is not given.
        notes: Markdown for the section on the licence.
    """
    card = make_model_card(model, name, license=licence)
    if licence is None:
        card.data.license, card.data.license_name = "other", "as-published"
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    card.text += PROVENANCE.format(
        file=source.name, size=source.stat().st_size, digest=digest, converter=converter, notes=notes,
        settings=json.dumps(settings), version=modeling_longnet.__version__, transformers=transformers.__version__,
        weights=f"the original's, rounded to {dtype}" if dtype else "bit for bit the original's",
    )  # fmt: skip
    return card


def save_converted(
    loaded: tuple[PreTrainedModel, list], checkpoint: str | Path, output: str | Path, *, dry_run: bool, **about
) -> Path:
    """Writes config, weights, model code and card as the folder `output`, all or nothing; or lists the mapping only.

    Args:
        loaded: model and rows, as the converters' `load_...` give them.
        about: what `converted_card` wants to know.
    """
    (model, rows), output = loaded, Path(output)
    if dry_run:
        print_mapping(rows)
        return output
    card = converted_card(model, output.name, Path(checkpoint), **about)
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        card.save(folder / "README.md")
    return output


def run_converter(parser: argparse.ArgumentParser, convert: Callable[..., Path], arguments: list[str] | None) -> Path:
    """A converter's command line: `convert` gets the options by their names; uploads what it made if asked to."""
    options = vars(parser.parse_args(arguments))
    repo_id, private = options.pop("push_to_hub", None), options.pop("private", False)
    try:
        output = convert(**options)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    if options.get("dry_run"):
        print(f"All checks passed; {output} was not written.")
        return output
    print(f"Saved {output}.")
    if repo_id:
        architecture = getattr(modeling_longnet, transformers.AutoConfig.from_pretrained(output).architectures[0])
        architecture.from_pretrained(output, dtype="auto").push_to_hub(repo_id, private=private)
        ModelCard.load(output / "README.md").push_to_hub(repo_id)
        print(f"Uploaded to {repo_id}.")
    return output


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir", dest="output", required=True, help="the folder to make; it must not exist, or be empty"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and list the mapping, write nothing")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; by default that of the checkpoint")
    parser.add_argument(
        "--license", dest="licence", help="licence of the weights, as an identifier of the Hub's, for the model card"
    )
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload the result to this repository")
    parser.add_argument("--private", action="store_true", help="make that repository private")
