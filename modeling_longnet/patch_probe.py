"""What a model's layers do with their attention: found out before a patch, by forwards of two tokens.

Letters: B batch, H query heads, G key/value heads, N tokens, D head dimension.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging

from .dilated_cache import DilatedCache
from .dilation_schedule import as_integer
from .patched_attention import AttentionCall, Probe, probing
from .transformers_compat import named_cache, text_config_of


logger = logging.get_logger(__name__)

# Layers of these types keep the attention they have.
OTHER_LAYER_TYPES = ("sliding_attention", "chunked_attention", "linear_attention", "mamba", "conv", "recurrent")


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


def probe_attention(model: PreTrainedModel, **kwargs) -> Probe:
    """Which modules call the registered attention in a forward of two tokens; the model's state is left as it was.

    Raises:
        ValueError: a forward that a model cannot do with a patch's mask, or without what it wants beside tokens.
    """
    embedding = model.get_input_embeddings().weight
    # The weights of an offloaded model lie on "meta" between forwards; its hooks bring the input where it is needed.
    offloaded = embedding.device.type == "meta" and hasattr(model, "hf_device_map")
    token = int(getattr(text_config_of(model.config), "pad_token_id", None) == 0)  # a padding row may be 0
    input_ids = torch.full((1, 2), token, device="cpu" if offloaded else embedding.device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), probing(model) as probe:
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
        for module, mode in training.items():
            module.training = mode
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


def find_layers(
    model: PreTrainedModel, part: PreTrainedModel, calls: list[AttentionCall]
) -> dict[int, str | None]:
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
