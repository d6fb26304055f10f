"""`calibrate_memory`: the few dimensions in which a patched model ranks the blocks of its memory."""

from collections.abc import Sequence

import torch
from torch import nn

from .dilation_schedule import DilationSchedule
from .memory_calibration import make_basis
from .memory_files import layer_memories, set_bases
from .patch_attention import LAYER_MEMORY
from .patch_probe import input_device, reading
from .patching import is_patched
from .transformers_compat import text_config_of, unwrap


def calibrate_memory(model: nn.Module, tokens: Sequence[int] | torch.Tensor) -> nn.Module:
    """Finds, per layer and key/value head, the dimensions in which products of queries and keys vary most.

    One forward over the text, with the attention that the model had before the patch; a page of a few thousand tokens
    of any text like those to be read is enough. `save_pretrained` keeps what was found, and `load_patched_model` loads
    it. Does nothing but this: weights and settings stay as they are.

    Args:
        model: patched with a memory that has `dimensions`, for instance `memory={"dimensions": 16}`.
        tokens: the text, integers [N], within the model's native context.

    Returns:
        The same model.

    Raises:
        ValueError: a model without such a memory; a text of fewer tokens than `dimensions`, or of several rows.
    """
    base = unwrap(model)
    schedule = DilationSchedule.from_config(text_config_of(base.config)) if is_patched(base) else None
    if schedule is None or schedule.memory is None or schedule.memory.dimensions is None:
        raise ValueError(
            "`model` must be patched with a memory that ranks in a few dimensions, for instance "
            "`patch_model(model, ..., memory={'dimensions': 16})`."
        )
    tokens = torch.as_tensor(tokens, dtype=torch.long, device=input_device(base))
    if tokens.dim() != 1 or len(tokens) < schedule.memory.dimensions:
        raise ValueError(
            f"`tokens` must be integers [N] of at least {schedule.memory.dimensions} tokens, got {tuple(tokens.shape)}."
        )
    bases, modules = {}, layer_memories(base)

    def read(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
        if module.layer_idx in modules:
            inv_freq = getattr(module, LAYER_MEMORY).inv_freq
            bases[module.layer_idx] = make_basis(query[0], key[0], schedule, inv_freq)

    with reading(base, read):
        base(input_ids=tokens[None], use_cache=False)
    set_bases(base, bases)
    return model


__all__ = ["calibrate_memory"]
