"""What a model's layers do with their attention: found out before a patch by forwards of two tokens, or listened to.

Letters: B batch, H query heads, G key/value heads, N tokens, D head dimension.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging

from .dilated_cache import DilatedCache
from .dilation_schedule import as_integer
from .patch_attention import TAP, heads_of, run_original, unsupported_reason
from .patch_mask import is_compact_mask
from .transformers_compat import named_cache, text_config_of


logger = logging.get_logger(__name__)

# Layers of these types keep the attention they have.
OTHER_LAYER_TYPES = ("sliding_attention", "chunked_attention", "linear_attention", "mamba", "conv", "recurrent")


@dataclass
class AttentionCall:
    """One call of the attention function during a probe: the module that called, and why it cannot be dilated.

    cache_layer: the layer of a bounded cache that its keys come from, if any. key: [G, N, D] of the first row.
    """

    module: nn.Module
    reason: str | None
    num_heads: int
    key_shape: tuple[int, ...]
    itemsize: int
    cache_layer: int | None
    key: torch.Tensor


@dataclass
class Probe:
    """Records the attention calls of a forward pass instead of computing them, and which embeddings it reads."""

    calls: list[AttentionCall] = field(default_factory=list)
    embeddings: set[nn.Module] = field(default_factory=set)

    def __call__(self, original: str, module, query, key, value, mask, **arguments) -> tuple[torch.Tensor, None]:
        """Stands in for the attention function: zeros [B, Q, H, D]."""
        reason = _why_not(module, query, key, value, mask, arguments)
        shape, cache_layer = tuple(key.shape), getattr(key, "cache_layer", None)
        self.calls.append(AttentionCall(module, reason, query.shape[1], shape, key.itemsize, cache_layer, key[0]))
        return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1]), None


def _why_not(module: nn.Module, query, key, value, mask, arguments: dict) -> str | None:
    """Why this call cannot be dilated, or None."""
    reason = unsupported_reason(module, query, key, value, arguments)
    if reason is not None:
        return reason
    if mask is not None and not is_compact_mask(mask):
        return "it is given a mask of pairs that the model makes by itself"
    try:
        heads_of(module, query, key)
    except (ValueError, AttributeError):
        total = getattr(module.config, "num_attention_heads", None)
        return f"it has {query.shape[1]} heads, its configuration tells of {total}"
    if getattr(arguments.get("position_ids"), "ndim", 2) != 2:
        return "its `position_ids` have several axes, which do not tell where a document begins"
    return None


@contextlib.contextmanager
def tapped(model: nn.Module, tap: Callable) -> Iterator[None]:
    """While open, the model is in eval mode without gradients, and `tap` gets its calls of the attention function."""
    modules = {module: module.training for module in model.modules()}
    for module in modules:
        setattr(module, TAP, tap)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modules.items():
            module.training = mode
            delattr(module, TAP)


@contextlib.contextmanager
def reading(model: nn.Module, function: Callable) -> Iterator[None]:
    """While open, in eval mode, this model's layers run the attention that they had, and tell `function` (module,
    query, key)."""

    def read(original: str, module, query, key, *rest, **arguments):
        function(module, query, key)
        return run_original(original, module, query, key, *rest, **arguments)

    with tapped(model, read):
        yield


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a composite model that writes text (of a LLaVA its Llama), or the model itself.

    Raises:
        ValueError: a composite model without such a part.
    """
    config = text_config_of(model.config)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is config:
            return part
    raise ValueError(
        f"{type(model).__name__} ({model.config.model_type}) has several parts, of which none has its text "
        "configuration, so it cannot be patched; it was left as it is."
    )


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its tokens.

    The weights of an offloaded one lie on "meta" between forwards; its hooks bring the input where it is needed.
    """
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" and hasattr(model, "hf_device_map") else device


def probe_attention(model: PreTrainedModel, **kwargs) -> Probe:
    """Which modules call the registered attention in a forward of two tokens; the model's state is left as it was.

    Raises:
        ValueError: a forward that a model cannot do with a patch's mask, or without what it wants beside tokens.
    """
    token = int(getattr(text_config_of(model.config), "pad_token_id", None) == 0)  # a padding row may be 0
    input_ids = torch.full((1, 2), token, device=input_device(model))
    probe = Probe()
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [module.register_forward_hook(lambda module, *_: probe.embeddings.add(module)) for module in embeddings]
    try:
        with tapped(model, probe):
            model(input_ids=input_ids, **{"use_cache": False, **kwargs})
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code makes of a mask that it does not expect
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be patched: its forward of two tokens with "
            f"dilated attention fails ({type(error).__name__}: {said}). It was left as it is."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return probe


def why_unbounded(model: PreTrainedModel) -> str | None:
    """Why `generate` of a model that is being patched cannot use the bounded cache, or None."""
    if not isinstance(model, GenerationMixin):
        return None
    try:
        cache = DilatedCache(model.config)
        calls = probe_attention(model, use_cache=True, **named_cache(cache)).calls
    except ValueError as error:
        return " ".join(str(error.__cause__ or error).split())[:200]
    dilated = {layer.layer_idx: layer.heads_per_key for layer in cache.dilated_layers}
    for call in calls:
        index = call.module.layer_idx
        if index not in dilated:
            continue
        if call.cache_layer is None:
            return f"layer {index} changes the keys that come from the cache"
        if call.cache_layer != index:
            return f"layer {index} reads the keys of layer {call.cache_layer}"
        if call.num_heads != call.key_shape[1] * dilated[index]:
            return f"layer {index} has {call.key_shape[1]} heads of keys, its configuration tells of another number"
    return None


def find_layers(model: PreTrainedModel, part: PreTrainedModel, calls: list[AttentionCall]) -> dict[int, str | None]:
    """Per layer index of the text part, why it must be left alone, or None."""
    config = part.config
    reasons = dict.fromkeys(range(config.num_hidden_layers), "its attention does not pass through the interface")
    seen = set()
    for call in calls:
        index = getattr(call.module, "layer_idx", None)
        if index not in reasons:
            raise ValueError(
                f"{type(model).__name__} ({config.model_type}) cannot be patched: its {type(call.module).__name__} "
                f"has the `layer_idx` {index!r}, not one of its {len(reasons)} layers. It was left as it is."
            )
        reason = call.reason
        if call.module.config is not config:
            reason = "its configuration is not the model's"
        if index in seen:
            reason = "its attention runs several times a forward"
        reasons[index] = reason
        seen.add(index)
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind in OTHER_LAYER_TYPES and index in seen:
            reasons[index] = f"its type is {kind}"
    return reasons


def choose_layers(
    model: PreTrainedModel, reasons: dict[int, str | None], layers: Sequence[int] | Callable[[int], bool] | None
) -> list[int]:
    """The layers to patch, sorted; a ValueError where nothing is left or something asked for cannot be done."""
    able = [index for index, reason in reasons.items() if reason is None]
    if not able:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) has no layer that can be dilated: "
            + "; ".join(sorted(set(reasons.values())))
            + ". It was left as it is."
        )
    if layers is None:
        left = [f"layer {index}: {reason}" for index, reason in reasons.items() if reason]
        if left:
            logger.warning(f"left alone in {type(model).__name__}: {'; '.join(left)}")
        return able
    count = len(reasons)
    if callable(layers):
        chosen = [index for index in reasons if layers(index)]
    else:
        is_list = isinstance(layers, Iterable) and not isinstance(layers, (str, Mapping))
        is_list = is_list and getattr(layers, "ndim", 1) == 1
        given = list(layers) if is_list else []
        wrong = [i for i in given if (index := as_integer(i)) is None or not -count <= index < count]
        if wrong or not is_list:
            raise ValueError(f"`layers` must be layer indices of 0..{count - 1}, got {wrong or layers!r}.")
        chosen = sorted({as_integer(index) % count for index in given})
    if not chosen:
        raise ValueError(f"`layers` chooses none of the {count} layers.")
    refused = {index: reasons[index] for index in chosen if reasons[index]}
    if refused:
        raise ValueError("`layers` asks for " + "; ".join(f"layer {i}, but {r}" for i, r in refused.items()) + ".")
    return chosen
