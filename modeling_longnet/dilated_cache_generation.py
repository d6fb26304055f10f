"""The cache that `generate` makes for a LongNet or a patched model."""

from transformers.utils import logging

from .dilated_cache import DilatedCache
from .dilated_cache_layer import dilated_layer_indices
from .memory_store import refuse_rows_on_disk
from .transformers_compat import CACHE, changes_frequencies, length_dependent_rope, text_config_of


logger = logging.get_logger(__name__)

_ROOM_STEP = 64  # tokens


def _refuse_changing_frequencies(config, generation_config, model_kwargs: dict, length: int) -> None:
    """Raises a ValueError where RoPE would rotate the first tokens otherwise than the last ones of up to `length`."""
    rope = length_dependent_rope(config)
    if rope is None:
        return
    positions = model_kwargs.get("position_ids")
    first = 1 if positions is None else int(positions.max()) + 1
    first = min(first, getattr(generation_config, "prefill_chunk_size", None) or first)
    if changes_frequencies(rope, first, length):
        raise ValueError(
            f"`max_length`: with rope_type {rope[0]!r} texts of more than {rope[1]} tokens have other frequencies than "
            f"shorter ones, got up to {length} tokens from a prompt of {first}: a bounded cache cannot change those of "
            "the keys that it holds. Ask for fewer tokens, or pass `cache_implementation='dynamic'` or "
            "`use_cache=False`."
        )


def prepare_dilated_cache(model, generation_config, model_kwargs: dict, max_cache_length: int) -> bool:
    """Puts a DilatedCache into `generate`'s arguments, unless another cache, or weights of all keys, are wanted.

    Raises:
        ValueError: in training with gradient checkpointing, where the layers run without any cache; where rotary
            frequencies would change on the way.
    """
    checkpointed = model.training and any(getattr(x, "gradient_checkpointing", False) for x in model.modules())
    if checkpointed and generation_config.use_cache is not False:
        raise ValueError(
            "`generate` cannot use a cache in training with gradient checkpointing, which sets caches aside: call "
            "`model.eval()` before, or pass `use_cache=False`."
        )
    if (generation_config.num_beams or 1) > 1:
        refuse_rows_on_disk(model_kwargs.get(CACHE))
    mask = model_kwargs.get("attention_mask")
    if generation_config.is_assistant and mask is not None and mask.dim() == 2:
        # `generate` has taken each padding token among the drafted ones for padding.
        model_kwargs["attention_mask"] = mask.long().cummax(1).values
    if (
        model_kwargs.get(CACHE) is not None
        or generation_config.use_cache is False
        or generation_config.cache_implementation is not None
        or generation_config.output_attentions
    ):
        return False
    if not dilated_layer_indices(text_config_of(model.config)):
        return False
    patch = getattr(model, "dilated_attention_report", None)
    if patch is not None and patch.unbounded:
        logger.warning_once(f"`generate` takes {type(model).__name__}'s own cache, which grows: {patch.unbounded}")
        return False
    _refuse_changing_frequencies(text_config_of(model.config), generation_config, model_kwargs, max_cache_length)
    # In steps, so that texts of nearly the same length get slots of the same shape.
    steps = max(1, -(-max_cache_length // _ROOM_STEP))
    model_kwargs[CACHE] = DilatedCache(model.config, max_length=steps * _ROOM_STEP)
    if generation_config.is_assistant:
        model_kwargs[CACHE].activate_past_recording()
    return True


__all__ = ["prepare_dilated_cache"]
