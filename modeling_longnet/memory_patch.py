"""What a patched model's attention modules know of a memory: rotary frequencies, and the dimensions they rank in.

Letters: G key/value heads, D head dimension, R channels that turn.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from .dilation_schedule import DilationSchedule
from .memory_positions import rotate
from .memory_search import MemoryBasis, Ranking
from .memory_spec import MemorySpec
from .patch_attention import LAYER_MEMORY
from .patch_probe import AttentionCall


# Rotary embeddings whose frequencies follow the text's length: no distance can be turned back.
MOVING_ROPE_TYPES = ("dynamic", "longrope")


@dataclass(frozen=True)
class LayerMemory:
    """Stands on an attention module. Plain tensors, not buffers: half precisions must not round them."""

    inv_freq: torch.Tensor | None
    groups: int  # key/value heads
    basis: MemoryBasis | None = None

    def ranking(self, schedule: DilationSchedule) -> Ranking:
        return Ranking(schedule, self.inv_freq, self.basis)


def _frequencies(model: nn.Module) -> list[torch.Tensor]:
    """Of every rotary embedding of the model whose frequencies stay as they are."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if "RotaryEmbedding" in type(module).__name__ and kinds.isdisjoint(MOVING_ROPE_TYPES):
            buffers = dict(module.named_buffers(recurse=False))
            found += [x for name, x in buffers.items() if name.endswith("inv_freq") and "original" not in name]
    return found


def _turns_by(key: torch.Tensor, candidates: list[torch.Tensor]) -> torch.Tensor | None:
    """The frequencies by which the second of two keys [G, 2, D] of one token is turned from the first, if any.

    In a probe attention gives zeros, so equal tokens have equal states in every layer, and keys differ by their turn.
    """
    if key.device.type == "meta":
        return None
    key = key.float().cpu()
    scale = key.norm()
    if not scale > 0:
        return None
    if (key[:, 0] - key[:, 1]).norm() <= 1e-3 * scale:
        return torch.zeros(0)  # no rotary embedding in this layer: distances mean nothing to it
    for inv_freq in candidates:
        inv_freq = inv_freq.detach().float().cpu()
        if 2 * len(inv_freq) <= key.shape[-1]:
            turned = rotate(key[:, 0], torch.ones(len(key)), inv_freq)
            if (turned - key[:, 1]).norm() <= 2e-2 * scale:
                return inv_freq
    return None


def find_layer_memories(model: nn.Module, calls: list[AttentionCall], layers: list[int]) -> dict[int, LayerMemory]:
    """Per layer, what its probe tells."""
    candidates = _frequencies(model)
    by_layer = {call.module.layer_idx: call for call in calls}
    keys = {index: by_layer[index].key for index in layers}
    return {index: LayerMemory(_turns_by(key, candidates), len(key)) for index, key in keys.items()}


def check_heads(spec: MemorySpec, groups: dict[int, int]) -> None:
    """Raises a ValueError for heads that a layer does not have, out of so many key/value heads by layer."""
    for index, own in spec.heads or ():
        if own and own[-1] >= groups[index]:
            raise ValueError(
                f"`memory`: `heads` are key/value heads, of which layer {index} has {groups[index]}, got {list(own)}."
            )


def resolve_memory(
    memory: dict | None, config, layers: list[int], found: dict[int, LayerMemory], rope_scaling: dict | None
) -> MemorySpec | None:
    """The memory of a patch, checked against the model; distances are clamped to half the native context by default.

    Raises:
        ValueError: layers that are not patched; distances that cannot be clamped.
    """
    if memory is None:
        return None
    spec = MemorySpec.from_dict(memory)
    foreign = sorted(set(spec.only_layers or ()) - set(layers))
    if foreign:
        name = "layers" if spec.heads is None else "heads"
        raise ValueError(f"`memory`: `{name}` must be of patched layers, {layers}, got {foreign}.")
    check_heads(spec, {index: layer.groups for index, layer in found.items()})
    # With heads all layers clamp a distance, if any does.
    concerned = [i for i in found if spec.heads is not None or spec.reads_in(i)]
    unknown = [i for i in concerned if found[i].inv_freq is None]
    if spec.max_distance is not None:
        if rope_scaling:
            raise ValueError("`memory` with `max_distance` and `rope_scaling` are two ways to read further, got both.")
        if unknown:
            raise ValueError(
                f"`memory`: `max_distance` turns rotary embeddings, and the keys of layers {unknown} do not follow any "
                "that could be found. Leave it out."
            )
    native = getattr(config, "max_position_embeddings", None)
    given = not isinstance(memory, MemorySpec) and "max_distance" in memory
    if given or rope_scaling or unknown or not native:
        return spec
    return MemorySpec.from_dict(spec.to_dict() | {"max_distance": native // 2})


def attach_memories(calls: list[AttentionCall], spec: MemorySpec | None, found: dict[int, LayerMemory]) -> list:
    """Tells the attention modules. Returns the steps that undo this."""
    undo = []
    for call in calls if spec is not None else ():
        if call.module.layer_idx in found and spec.reads_in(call.module.layer_idx):
            setattr(call.module, LAYER_MEMORY, found[call.module.layer_idx])
            undo.append(functools.partial(delattr, call.module, LAYER_MEMORY))  # copied and pickled with the module
    return undo
