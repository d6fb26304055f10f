"""The dimensions that a patched model ranks blocks in, as a file beside its weights or its adapter."""

import hashlib
import importlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .memory_search import MemoryBasis
from .patch_attention import LAYER_MEMORY
from .transformers_compat import text_config_of


BASIS_NAME = "dilated_attention_memory.safetensors"


def layer_memories(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules that have a memory, by layer."""
    return {module.layer_idx: module for module in model.modules() if hasattr(module, LAYER_MEMORY)}


def bases_fingerprint(model: nn.Module) -> str:
    """A hash of the dimensions that the model's memory ranks in; of nothing for a model that ranks in all."""
    digest = hashlib.sha256()
    for index, module in sorted(layer_memories(model).items()):
        for tensor in getattr(module, LAYER_MEMORY).basis or ():
            if tensor is not None:
                digest.update(f"{index}".encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def set_bases(model: nn.Module, bases: dict[int, MemoryBasis]) -> None:
    """Has each layer with a memory rank in its own dimensions.

    Raises:
        ValueError: bases of other layers than those, or of other dimensions than the settings tell.
    """
    modules = layer_memories(model)
    if set(modules) != set(bases):
        raise ValueError(f"the dimensions of a memory must be of layers {sorted(modules)}, got {sorted(bases)}.")
    wanted = text_config_of(model.config).dilated_attention["memory"]["dimensions"]
    for index, basis in bases.items():
        given = basis.to_query.shape[-1]
        if given != wanted:
            raise ValueError(f"the memory ranks in {wanted} dimensions, got {given} in layer {index}.")
    for index, module in modules.items():
        setattr(module, LAYER_MEMORY, replace(getattr(module, LAYER_MEMORY), basis=bases[index]))


def write_bases(folder: str | Path, model: nn.Module) -> None:
    """Writes the file, or removes one that belonged to what was saved there before. Whoever is killed at it leaves what
    was there."""
    tensors = {}
    for index, module in layer_memories(model).items():
        basis = getattr(module, LAYER_MEMORY).basis
        for name, tensor in (basis._asdict() if basis else {}).items():
            if tensor is not None:
                tensors[f"{index}.{name}"] = tensor.cpu().contiguous()
    path = Path(folder) / BASIS_NAME
    if not tensors:
        path.unlink(missing_ok=True)
    elif path.parent.is_dir():
        temporary = path.with_name(path.name + ".tmp")
        # No import statement: what those name, Transformers demands of all who load this code from the Hub.
        importlib.import_module("safetensors.torch").save_file(tensors, temporary)
        temporary.replace(path)


def read_bases(path: str | Path) -> dict[int, MemoryBasis]:
    """What `write_bases` wrote.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        tensors = importlib.import_module("safetensors.torch").load_file(path)
    except importlib.import_module("safetensors").SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}).") from error
    fields: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, field = name.partition(".")
        if not index.isdigit() or field not in MemoryBasis._fields or tensor.dim() != 3:
            raise ValueError(f"{path} holds {name!r} of shape {tuple(tensor.shape)}, which is nothing of a memory.")
        fields.setdefault(int(index), {})[field] = tensor
    for index, found in fields.items():
        if not {"to_query", "to_key"} <= set(found):
            raise ValueError(f"{path} holds only {sorted(found)} for layer {index}.")
    return {index: MemoryBasis(**found) for index, found in fields.items()}
