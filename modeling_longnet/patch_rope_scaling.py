"""How far a patched model can read: scaled rotary embeddings, and the end of a learned position table."""

import copy
import functools
import importlib
from collections.abc import Callable, Collection

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .dilation_schedule import DilationSchedule
from .transformers_compat import ROPE_INIT_FUNCTIONS


logger = logging.get_logger(__name__)

PLAIN_WITHIN_NATIVE = ("default", "dynamic", "proportional")  # what scales nothing within `max_position_embeddings`
LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def _refuse_beyond_table(module: nn.Embedding, args: tuple) -> None:
    if args and not torch.compiler.is_compiling() and args[0].device.type != "meta" and args[0].numel():
        last = int(args[0].max())
        if last >= module.num_embeddings:
            raise ValueError(
                f"position {last} asked of a model with a learned table of {module.num_embeddings} positions: it "
                "cannot read further. Shorten the input, or take a model with rotary positions."
            )


def learned_positions(model: PreTrainedModel) -> list[tuple[nn.Embedding, int]]:
    """The learned position tables of a model, and how many positions each has."""
    return [
        # OPT's table has two more rows than it has positions.
        (module, min(module.num_embeddings, getattr(model.config, "max_position_embeddings", module.num_embeddings)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in LEARNED_POSITIONS
    ]


def guard_learned_positions(
    model: PreTrainedModel, schedule: DilationSchedule, read: Collection[nn.Module]
) -> list[Callable[[], None]]:
    """Refuse to read beyond a learned position table (GPT-2). Returns the steps that undo this.

    Args:
        read: the embeddings that a forward reads; another table is that of an encoder of pictures, say.

    Raises:
        ValueError: for a schedule with segments that such a table can never fill.
    """
    learned = [(module, rows) for module, rows in learned_positions(model) if module in read]
    for _, rows in learned:
        if schedule.segment_lengths[-1] > rows:
            raise ValueError(
                f"`segment_lengths` must not exceed the {rows} learned positions of {type(model).__name__}, got "
                f"{schedule.segment_lengths[-1]}: the model cannot read further."
            )
    plain = [module for module, _ in learned if type(module) is nn.Embedding]
    return [module.register_forward_pre_hook(_refuse_beyond_table).remove for module in plain]


def _merged(own: dict, rope_scaling: dict, native: int) -> dict:
    """A model's rope parameters with the given ones on top."""
    rope_scaling = dict(rope_scaling)
    kind = rope_scaling.setdefault("rope_type", rope_scaling.pop("type", None))
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"`rope_scaling['rope_type']` must be one of {sorted(ROPE_INIT_FUNCTIONS)}, got {kind!r}.")
    own_kind, both = own.get("rope_type", "default"), f"Got {rope_scaling} over {own}, for {native} positions."
    if own_kind == "proportional" != kind:  # Gemma 4: it rotates a part of each head, and the part is the model's
        raise ValueError(f"`rope_scaling` must be proportional where the model's positions are. {both}")
    # A factor could count on top of the model's own or in its place: those differ, and both run.
    if own_kind not in PLAIN_WITHIN_NATIVE or own_kind == "proportional" and own.get("factor", 1.0) != 1.0:
        if kind == "dynamic":
            raise ValueError(
                f"`rope_scaling` must not be dynamic where positions are scaled already: it would undo that. {both}"
            )
        if "original_max_position_embeddings" not in rope_scaling:
            raise ValueError(
                "`rope_scaling` must name the `original_max_position_embeddings` from which its factor is counted, as "
                f"the model's positions are scaled already and it takes the place of that scaling. {both}"
            )
    if kind != "dynamic":
        rope_scaling.setdefault("original_max_position_embeddings", native)
    if kind != own_kind:  # what another type makes of its own factor
        own = {name: value for name, value in own.items() if name != "attention_factor"}
    return {**own, **rope_scaling}


def scaled_rope_parameters(config, rope_scaling: dict) -> dict:
    """The model's `rope_parameters` with the given ones on top; of layers with several kinds, the full attention's.

    Raises:
        ValueError: a type that Transformers does not know, or a model whose positions are scaled already and no word
            on the context from which the new factor is counted.
    """
    parameters, native = copy.deepcopy(config.rope_parameters), config.max_position_embeddings
    if "full_attention" in parameters:
        return parameters | {"full_attention": _merged(parameters["full_attention"], rope_scaling, native)}
    return _merged(parameters, rope_scaling, native)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def scale_rotary_embeddings(
    model: PreTrainedModel, schedule: DilationSchedule, rope_scaling: dict | None
) -> list[Callable[[], None]]:
    """Exchange a model's rotary embeddings for scaled ones. Returns the steps that undo this.

    The model's own configuration keeps its `rope_parameters`, so that a saved model loads as the vanilla one.

    Raises:
        ValueError: for a model without rotary embeddings, or parameters that Transformers does not know.
    """
    native = getattr(model.config, "max_position_embeddings", None)
    if rope_scaling is None:
        if native and schedule.segment_lengths[-1] > native and getattr(model.config, "rope_parameters", None):
            logger.warning(
                f"the schedule reaches {schedule.segment_lengths[-1]} tokens, the model's native context is {native}: "
                "pass `rope_scaling` (for instance {'rope_type': 'yarn', 'factor': 4.0}) to read beyond it."
            )
        return []
    if not isinstance(rope_scaling, dict):
        raise ValueError(f"`rope_scaling` must be a dictionary of rope parameters, got {rope_scaling!r}.")
    named = model.named_modules()
    rotary = {name: m for name, m in named if "RotaryEmbedding" in type(m).__name__ and hasattr(m, "rope_type")}
    if not rotary:
        raise ValueError(f"`rope_scaling` was given, but {type(model).__name__} has no rotary embeddings to scale.")
    config = copy.deepcopy(model.config)
    config.rope_parameters = scaled_rope_parameters(config, rope_scaling)
    original = config.rope_parameters.get("original_max_position_embeddings")
    if original is not None and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = original  # Phi-3: Transformers puts it over the parameters
    scaled = {}
    for name, old in rotary.items():
        buffer = next(old.buffers())
        try:
            scaled[name] = type(old)(config=config).to(buffer.device)
        except KeyError as error:
            raise ValueError(f"`rope_scaling` must have {error}, got {rope_scaling}.") from error
        if hasattr(old, "_hf_hook"):
            # No import statement: what those name, Transformers demands of all who load this code from the Hub.
            importlib.import_module("accelerate.hooks").add_hook_to_module(scaled[name], old._hf_hook)
    for name, new in scaled.items():  # now that nothing can fail any more
        _replace(model, name, new)
    return [functools.partial(_restore_rotary, model, name, old) for name, old in rotary.items()]


def _restore_rotary(model: nn.Module, name: str, old: nn.Module) -> None:
    new = model.get_submodule(name)
    _replace(model, name, old.to(next(new.buffers()).device))
