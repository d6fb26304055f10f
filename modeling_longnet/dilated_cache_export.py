"""A bounded cache as input and output of an exported program (`torch.export`): its tensors, and what tells them apart.

Transformers' exporters take any cache apart attribute by attribute, as a tree. The layers of a bounded cache share a
tensor with it, which would come back as one of each layer's own.
"""

import torch
from torch.utils import _pytree

from .configuration_longnet import LongNetConfig
from .dilated_cache_layer import DilatedLayer, read_layout_name


# Exporters before 5.20 count tensors by walking through `__dict__`s: the order is the one in which they come there.
TIMES = ("positions", "seen", "pads")


def _flatten(cache) -> tuple[list[torch.Tensor], dict]:
    layers = cache.dilated_layers
    if any(type(layer) is not DilatedLayer for layer in cache.layers):
        raise ValueError("`cache` has layers that are not bounded: it cannot be part of an exported program.")
    if cache.step is not None or cache.waiting or layers[0].record_past:
        raise ValueError("`cache` waits for a `crop`, or for the end of a forward: it cannot be exported now.")
    if cache.rope is not None:
        raise ValueError(f"`cache` of a model with rope_type {cache.rope[0]!r} cannot be part of an exported program.")
    context = {
        "layers": len(layers),
        "schedule": cache.schedule.as_arguments(),
        "heads_per_key": layers[0].heads_per_key,
        "max_length": layers[0].max_length,
        "had_padding_behind": bool(cache.had_padding_behind),
        "layout": layers[0].place and layers[0].place[0],
    }
    if cache.positions is None:
        return [], context
    return [getattr(cache, name) for name in TIMES] + [x for y in layers for x in (y.keys, y.values)], context


def _flatten_with_keys(cache):
    tensors, context = _flatten(cache)
    return [(_pytree.SequenceKey(index), tensor) for index, tensor in enumerate(tensors)], context


def _maker(kind: type):
    def unflatten(tensors, context: dict):
        tensors, groups = list(tensors), max(context["schedule"]["dilation_rates"])
        num_heads = groups * context["heads_per_key"]
        config = LongNetConfig(
            num_hidden_layers=context["layers"], num_attention_heads=num_heads, num_key_value_heads=groups,
            hidden_size=2 * num_heads, **context["schedule"],
        )  # fmt: skip
        cache = kind(config, max_length=context["max_length"])
        cache.had_padding_behind = context["had_padding_behind"]
        if not tensors:
            return cache
        cache.keep_time(*(tensors.pop(0) for _ in TIMES))
        for layer in cache.dilated_layers:
            keys, values = tensors.pop(0), tensors.pop(0)
            if isinstance(keys, torch.Tensor):  # `torch.export` also asks for caches of numbers
                layer.continue_with(keys, values, read_layout_name(context["layout"]))
            else:
                layer.keys, layer.values = keys, values
        return cache

    return unflatten


def register_for_export(kind: type) -> None:
    """Tells `torch.export` how caches of this class are taken apart; Transformers' exporters then leave it at that."""
    known = _pytree.SUPPORTED_NODES.get(kind)
    if known is not None and known.flatten_fn is _flatten:
        return
    if known is not None:  # an exporter came first, with a model that had no cache
        _pytree._deregister_pytree_node(kind)
    _pytree._private_register_pytree_node(
        kind, _flatten, _maker(kind), serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=_flatten_with_keys,
    )  # fmt: skip


__all__ = ["register_for_export"]
