"""A bounded cache on disk: one safetensors file that says which model and which schedule it belongs to."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .dilated_cache import DilatedCache
from .dilation_schedule import DilationSchedule
from .memory_files import bases_fingerprint


FORMAT = "longnet-dilated-cache-1"
STORED = ("keys", "values", "index", "far_index")  # what a layer may hold, by name
SAMPLES = 64  # values of each weight that enter the fingerprint; training changes nearly all of them


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the weights' names and shapes and of some values of each."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in sorted(model.state_dict().items()):
        values = weight.detach().flatten()
        values = values[:: max(1, len(values) // SAMPLES)].double().cpu()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _schedule_text(config) -> str:
    return json.dumps(DilationSchedule.from_config(config).as_arguments())


def save_cache(path: str | Path, cache: DilatedCache, model: PreTrainedModel, **extra: torch.Tensor) -> None:
    """Writes a cache, and `extra` tensors that belong to it, in one move: the old file or the new one, never a part.

    Raises:
        ValueError: a cache that is empty, that an aborted forward left half written, of which tokens wait for a `crop`,
            or with layers whose cache is not bounded.
    """
    layers = cache.dilated_layers
    if cache.positions is None:
        raise ValueError("`cache` must have seen a token before it can be saved.")
    if cache.step is not None or cache.waiting:
        raise ValueError("`cache` is in the middle of a forward, or waits for a `crop`: it cannot be saved now.")
    if len(layers) < len(cache.layers) or any(layer.heads.first for layer in layers):
        raise ValueError("`cache` has layers that are not bounded, or only some of the heads: it cannot be saved.")
    tensors = {"positions": cache.positions, "seen": cache.seen}
    tensors |= {f"extra.{name}": value for name, value in extra.items()}
    for index, layer in enumerate(layers):
        tensors |= {f"{name}.{index}": value for name, value in layer.stored().items()}
    metadata = {
        "format": FORMAT,
        "schedule": _schedule_text(model.config),
        "model": model_fingerprint(model),
        "memory": bases_fingerprint(model),
        "max_length": json.dumps(layers[0].max_length),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
    temporary.replace(path)


def load_cache(path: str | Path, model: PreTrainedModel) -> tuple[DilatedCache, dict[str, torch.Tensor]]:
    """The cache that `save_cache` wrote for this model, on the model's device, and the extra tensors (on the CPU).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no cache; or it belongs to another schedule or another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no cache file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): it cannot be gone on from.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no cache of the format {FORMAT!r}, got {metadata.get('format')!r}.")
    wanted = _schedule_text(model.config)
    if metadata["schedule"] != wanted:
        raise ValueError(f"{path} was written under another schedule: wanted {wanted}, got {metadata['schedule']}.")
    if metadata["model"] != model_fingerprint(model):
        raise ValueError(f"{path} was written with another model, or with other weights of this one.")
    if metadata.get("memory", bases_fingerprint(model)) != bases_fingerprint(model):
        raise ValueError(f"{path} was written by a memory that was calibrated otherwise: its blocks rank differently.")
    cache = DilatedCache(model.config, max_length=json.loads(metadata["max_length"]))
    for index, layer in enumerate(cache.dilated_layers):
        stored = {name: tensors.pop(f"{name}.{index}") for name in STORED if f"{name}.{index}" in tensors}
        if not {"keys", "values"} <= set(stored):
            raise ValueError(f"{path} holds nothing for layer {index}.")
        stored = {name: value.to(model.device) for name, value in stored.items()}
        layer.lazy_initialization(stored["keys"][:, :, :0], stored["values"][:, :, :0])
        try:
            layer.restore(stored)
        except ValueError as error:
            raise ValueError(f"{path}: layer {index} {error}.") from error
    cache.start(len(tensors["positions"]), cache.dilated_layers[0].device)
    cache.positions.copy_(tensors["positions"])
    cache.seen.copy_(tensors["seen"])
    extra = {name.removeprefix("extra."): value for name, value in tensors.items() if name.startswith("extra.")}
    return cache, extra


__all__ = ["load_cache", "model_fingerprint", "save_cache"]
