"""A bounded cache on disk: a safetensors file that says which model and which schedule it belongs to.

A cache of store="disk" has its tokens there already (memory_pages.py); the file then stands beside them in their folder
and tells how many of them count.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .dilated_cache import DilatedCache
from .dilated_memory_layer import MemoryLayer
from .dilation_schedule import DilationSchedule
from .memory_files import bases_fingerprint
from .memory_pages import STATE_NAME, StoreFolder, read_numbers
from .memory_store import INDICES, BankedStore, FileStore, RowFiles, Shape
from .transformers_compat import text_config_of


FORMAT = "longnet-dilated-cache-1"
FOLDER_FORMAT = "longnet-memory-folder-1"
STORED = ("keys", "values", "rest_keys", "rest_values", "forgotten", *INDICES)  # what a layer may hold, by name
SAMPLES = 64  # values of each weight that enter the fingerprint; training changes nearly all of them
# Names in a configuration that say where a model comes from, how it is stored, or how it generates.
NOT_COMPUTED = (
    "_name_or_path", "architectures", "bos_token_id", "dtype", "dilated_attention", "eos_token_id", "id2label",
    "label2id", "memory", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
SIZES = ("groups", "width", *INDICES)  # of a layer's pages; an index that is not there has width 0


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the weights' names and shapes and of some values of each."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in sorted(model.state_dict().items()):
        values = weight.detach().flatten()
        values = values[:: max(1, len(values) // SAMPLES)].double().cpu()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _config_hash(config) -> str:
    """Of all that a configuration says of the numbers that a model computes."""
    told = {name: value for name, value in text_config_of(config).to_dict().items() if name not in NOT_COMPUTED}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _active_adapters(model: PreTrainedModel) -> str:
    """What PEFT's layers make of weights that are the same whichever adapters are switched on."""
    told = [
        (name, module.disable_adapters, list(module.active_adapters), getattr(module, "scaling", None))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # of a whole model it is a method
    ]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def _told_of(model: PreTrainedModel) -> dict[str, str]:
    """What a state says of the model that it belongs to."""
    return {
        "schedule": json.dumps(DilationSchedule.from_config(model.config).as_arguments()),
        "model": model_fingerprint(model),
        "adapters": _active_adapters(model),
        "memory": bases_fingerprint(model),
        "config": _config_hash(model.config),
    }


def _check_complete(cache: DilatedCache) -> None:
    layers = cache.dilated_layers
    if cache.positions is None:
        raise ValueError("`cache` must have seen a token before it can be saved.")
    if cache.step is not None or cache.waiting:
        raise ValueError("`cache` is in the middle of a forward, or waits for a `crop`: it cannot be saved now.")
    if len(layers) < len(cache.layers) or any(layer.heads.first for layer in layers):
        raise ValueError("`cache` has layers that are not bounded, or only some of the heads: it cannot be saved.")
    if any(isinstance(getattr(layer, "store", None), BankedStore) for layer in layers):
        raise ValueError("`cache` begins with a bank, which it does not own: it cannot be saved.")


def save_cache(path: str | Path, cache: DilatedCache, model: PreTrainedModel, **extra: torch.Tensor) -> None:
    """Writes a cache, and `extra` tensors that belong to it, in one move: the old file or the new one, never a part.

    Args:
        path: a file; the folder of a cache that was made with store="disk".

    Raises:
        ValueError: a cache that is empty, that an aborted forward left half written, of which tokens wait for a `crop`,
            or with layers whose cache is not bounded; another folder than that of the cache.
    """
    _check_complete(cache)
    folder, path = cache.folder, Path(path)
    if folder is not None and path.resolve() != folder.path.resolve():
        raise ValueError(f"`path` must be the folder of `cache`, {folder.path}, got {path}.")
    if folder is None and path.is_dir():
        raise ValueError(f"`path` must be a file, unless `cache` was made with store='disk', got the folder {path}.")
    tensors = {"positions": cache.positions, "seen": cache.seen}
    tensors |= {f"extra.{name}": value for name, value in extra.items()}
    for index, layer in enumerate(cache.dilated_layers):
        tensors |= {f"{name}.{index}": value for name, value in layer.stored().items()}
    metadata = {
        "format": FORMAT if folder is None else FOLDER_FORMAT,
        **_told_of(model),
        "max_length": json.dumps(cache.dilated_layers[0].max_length),
    }
    target = path
    if folder is not None:
        metadata |= _flush_pages(cache)
        target = folder.state_path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
    if folder is None:
        temporary.replace(target)
    else:
        folder.commit(temporary, int(cache.positions.max()))


def _flush_pages(cache: DilatedCache) -> dict[str, str]:
    """Sees to it that the pages are on disk; returns what tells of their shape."""
    told: dict[str, str] = {}
    for index, layer in enumerate(cache.dilated_layers):
        store = getattr(layer, "store", None)
        if store is not None:
            store.flush()
            # A row that is padding so far has no index yet.
            widths = {name: file.shape[-1] for row in store.rows for name, file in row.indices.items()}
            sizes = [store.shape.groups, store.shape.width, *(widths.get(name, 0) for name in INDICES)]
            told[f"pages.{index}"] = json.dumps(dict(zip(SIZES, sizes)))
            told["rows"] = json.dumps({str(i): files.row for i, files in enumerate(store.rows)})
            told["dtype"] = str(store.shape.dtype).removeprefix("torch.")
    return told


def read_state(path: Path, model: PreTrainedModel | None, format: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Metadata and tensors of a state, checked against the model if there is one.

    Raises:
        ValueError: see `load_cache`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): it cannot be gone on from.") from error
    if metadata.get("format") != format:
        raise ValueError(f"{path} is no cache of the format {format!r}, got {metadata.get('format')!r}.")
    if missing := {"schedule", "model", "max_length"} - set(metadata) or {"positions", "seen"} - set(tensors):
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}.")
    if model is not None:
        check_fingerprints(path, metadata, model)
    return metadata, tensors


def check_fingerprints(path: Path, metadata: dict, model: PreTrainedModel) -> None:
    """Refuses a state of another schedule, of other weights or adapters, or of other dimensions to rank in."""
    wanted = _told_of(model)
    told = wanted | metadata  # older states say less
    if told["schedule"] != wanted["schedule"]:
        raise ValueError(
            f"{path} was written under another schedule: wanted {wanted['schedule']}, got {told['schedule']}."
        )
    if told["model"] != wanted["model"]:
        raise ValueError(f"{path} was written with another model, or with other weights of this one.")
    if told["adapters"] != wanted["adapters"]:
        raise ValueError(f"{path} was written with other adapters switched on, or with none.")
    if told["config"] != wanted["config"]:
        raise ValueError(
            f"{path} was written with another configuration of this model (rotary frequencies, sizes, ...)."
        )
    if told["memory"] != wanted["memory"]:
        raise ValueError(f"{path} was written by a memory that was calibrated otherwise: its blocks rank differently.")


def load_cache(path: str | Path, model: PreTrainedModel) -> tuple[DilatedCache, dict[str, torch.Tensor]]:
    """The cache that `save_cache` wrote for this model, on the model's device, and the extra tensors (on the CPU).

    Raises:
        FileNotFoundError: there is no such file, or no state in this folder.
        ValueError: the file is damaged or no cache; or it belongs to another schedule or another model.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, model)
    if not path.is_file():
        raise FileNotFoundError(f"no cache file {path}")
    metadata, tensors = read_state(path, model, FORMAT)
    cache = DilatedCache(model.config, max_length=json.loads(metadata["max_length"]))
    for index, layer in enumerate(cache.dilated_layers):
        restore_layer(path, layer, index, tensors, model.device)
    return cache, _finish(cache, tensors)


def _finish(cache: DilatedCache, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    cache.start(len(tensors["positions"]), cache.dilated_layers[0].device)
    cache.positions.copy_(tensors["positions"])
    cache.seen.copy_(tensors["seen"])
    return extra_tensors(tensors)


def extra_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the tensors of a state those that whoever saved it added."""
    return {name.removeprefix("extra."): value for name, value in tensors.items() if name.startswith("extra.")}


def restore_layer(path: Path, layer, index: int, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Gives a layer what the tensors of a state hold for it."""
    stored = {name: tensors[f"{name}.{index}"] for name in STORED if f"{name}.{index}" in tensors}
    if not {"keys", "values"} <= set(stored):
        raise ValueError(f"{path} holds nothing for layer {index}.")
    stored = {name: value.to(device) for name, value in stored.items()}
    own = [[stored[name][:, :, :0] for name in (x, f"rest_{x}") if name in stored] for x in ("keys", "values")]
    layer.lazy_initialization(*(torch.cat(heads, dim=1) for heads in own))
    try:
        layer.restore(stored)
    except ValueError as error:
        raise ValueError(f"{path}: layer {index} {error}.") from error


def _load_folder(path: Path, model: PreTrainedModel) -> tuple[DilatedCache, dict[str, torch.Tensor]]:
    folder = StoreFolder(path)
    metadata, tensors = read_state(folder.state_path, model, FOLDER_FORMAT)
    cache = DilatedCache(model.config, max_length=json.loads(metadata["max_length"]), store="disk", path=folder)
    for index, layer in enumerate(cache.dilated_layers):
        if isinstance(layer, MemoryLayer):
            layer.begin_with(open_pages(folder, layer, index, metadata, tensors["positions"].tolist(), model.device))
        else:
            restore_layer(folder.state_path, layer, index, tensors, model.device)
    folder.committed = int(tensors["positions"].max())
    return cache, _finish(cache, tensors)


def open_pages(
    folder: StoreFolder, layer: MemoryLayer, index: int, metadata: dict, counts: list[int], device: torch.device
) -> FileStore:
    """The pages of a layer with a memory, the `index`-th of the dilated ones, and of rows of `counts` tokens.

    Raises:
        ValueError: the state tells nothing of them, or something impossible; a file is cut off.
    """
    try:
        groups, width, *widths = read_numbers(metadata.get(f"pages.{index}"), SIZES)
        rows = read_numbers(metadata.get("rows"), tuple(str(i) for i in range(len(counts))))
        dtype = getattr(torch, metadata.get("dtype", ""), None)
        if len(set(rows)) < len(rows) or not isinstance(dtype, torch.dtype) or not groups or not width:
            raise ValueError(f"impossible rows {rows}, dtype {metadata.get('dtype')!r} or sizes")
    except ValueError as error:
        raise ValueError(f"{folder.state_path} is damaged: layer {index} {error}.") from error
    memory = layer.schedule.memory
    shape = Shape(len(rows), groups, width, dtype, device, memory.block_size, memory.num_heads)
    held = {name: size for name, size in zip(INDICES, widths) if size}
    files = [
        RowFiles(folder, layer.layer_idx, row, shape, count, held if count >= shape.size else {})
        for row, count in zip(rows, counts)
    ]
    return FileStore(shape, files)


def is_memory_folder(path: str | Path) -> bool:
    """Whether a folder holds a saved memory."""
    return (Path(path) / STATE_NAME).is_file()


__all__ = ["is_memory_folder", "load_cache", "model_fingerprint", "save_cache"]
