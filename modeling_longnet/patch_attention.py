"""The attention function of patched models, for Transformers' own interface; their mask is made in patch_mask.py.

Letters: B batch, H query heads, G key/value heads, Q query tokens, N key tokens, D head dimension.

The settings of a patch live in `config.dilated_attention`, nowhere else: a model that is copied or wrapped keeps them.
"""

import sys
from collections.abc import Callable
from functools import cache

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from .attention_kernels import as_autocast
from .dilated_attention import ELSEWHERE, prepare_token, scheduled_attention
from .dilated_cache import DilatedCache
from .dilation_schedule import DilationSchedule, Heads
from .document_ids import check_position_ids, reorder, restore_order
from .memory_positions import anchor
from .memory_search import outside_graphs
from .patch_mask import (
    EARLIER,
    GIVEN,
    IDS,
    IMPLEMENTATIONS,
    angle_offset,
    chunk_order,
    dilated_mask,
    documents_of,
    is_compact_mask,
    shared_by_layers,
)
from .transformers_compat import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    first_unread,
)


logger = logging.get_logger(__name__)

# An attribute of attention modules whose rotary embeddings a patch has scaled: settings alone do not scale them.
SCALED_MARK = "_reads_scaled_positions"
# An attribute of all modules of a model whose attention is listened to: what takes their calls, see patch_probe.py.
TAP = "_attention_tap"
# An attribute of attention modules that have a memory: what they know for it, see memory_patch.py.
LAYER_MEMORY = "_layer_memory"

# Arguments that some model passes to its attention and that change the result.
UNSUPPORTED_ARGUMENTS = {
    "softcap": "it caps its attention scores (softcap)",
    "s_aux": "it has learned attention sinks (s_aux)",
    "sinks": "it has learned attention sinks (sinks)",
    "position_bias": "it adds a position bias to its scores (position_bias)",
    "indices": "it selects its keys itself (indices)",
    "block_indices": "it selects its keys itself (block_indices)",
    "sliding_window": "it is a sliding-window layer",
    "cache": "it reads a paged cache (continuous batching)",
    "block_table": "it reads a paged cache (continuous batching)",
}


def unsupported_reason(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: dict
) -> str | None:
    """Why this layer's attention cannot be replaced by a dilated one, or None."""
    for name in arguments.keys() & UNSUPPORTED_ARGUMENTS.keys():
        if arguments[name] is not None:
            return UNSUPPORTED_ARGUMENTS[name]
    unread = first_unread(arguments)
    if unread is not None:
        return f"it is given `{unread}`, which dilated attention does not read"
    if arguments.get("is_causal") is False or not getattr(module, "is_causal", True):
        return "it is not causal (an encoder or cross-attention)"
    if getattr(module, "is_cross_attention", False):
        return "it is cross-attention"
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        return f"its keys and values differ in width ({key.shape[-1]} and {value.shape[-1]}: latent attention)"
    if query.shape[1] % key.shape[1]:
        return f"its {query.shape[1]} query heads are not a multiple of its {key.shape[1]} key/value heads"
    return None


@cache
def eager_attention_of(module_name: str) -> Callable:
    """The `eager_attention_forward` of the modeling file that defines an attention class."""
    return sys.modules[module_name].eager_attention_forward


def run_original(original: str, module, query, key, value, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer that is left alone: the attention it had, with the very mask that it would have been given."""
    if is_compact_mask(mask):
        q_length, kv_length = query.shape[2], key.shape[2]
        documents = documents_of(mask, kwargs.get("position_ids"), q_length)
        ids, function = documents.ids, causal_mask_function
        if documents.order is not None:
            ids = restore_order(ids, documents.order, dim=1)
        if documents.is_packed:
            function = and_masks(function, lambda b, h, q, k: ids[b, q] == ids[b, k])
        at_end = documents.query_offset is None
        mask = ALL_MASK_ATTENTION_FUNCTIONS[original](
            batch_size=len(query),
            q_length=q_length,
            kv_length=kv_length,
            q_offset=kv_length - q_length if at_end else documents.query_offset,
            kv_offset=0,
            mask_function=function,
            attention_mask=None if ids is None else ids >= 0,
            allow_is_causal_skip=not documents.is_packed and (at_end or q_length > 1),
            dtype=query.dtype,
            config=module.config,
            use_vmap=False,
            device=query.device,
        )
    eager = original == "eager"
    function = eager_attention_of(type(module).__module__) if eager else ALL_ATTENTION_FUNCTIONS[original]
    return function(module, query, key, value, mask, **kwargs)


def heads_of(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> Heads:
    """The heads of a call: under tensor parallelism a module sees its own ones only."""
    total, num_heads = module.config.num_attention_heads, query.shape[1]
    if num_heads == total:
        return Heads.of(query, key, 0, total)
    for parameter in module.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            rank = mesh.get_local_rank("tp" if "tp" in (mesh.mesh_dim_names or ()) else None)
            return Heads.of(query, key, rank * num_heads, total)
    raise ValueError(
        f"this attention got {num_heads} of {total} heads and no tensor-parallel weights tell which: head offsets "
        "would be wrong."
    )


def _patched_settings(module: torch.nn.Module) -> dict:
    settings = getattr(module.config, "dilated_attention", None)
    if settings is None:
        raise ValueError(
            "this model runs the attention implementation 'dilated' without settings: use "
            "`patch_model(model, segment_lengths, dilation_rates)` or `load_patched_model(path)`. TRL loads a "
            "reference model like that by itself: pass `ref_model=copy.deepcopy(model)`."
        )
    if settings["rope_scaling"] and not hasattr(module, SCALED_MARK):
        raise ValueError(
            "this model's settings have `rope_scaling`, but its rotary embeddings are not scaled, as `patch_model` did "
            "not make it: use `load_patched_model(path)`, or give TRL its `ref_model=copy.deepcopy(model)`."
        )
    return settings


def _warn_beyond_native_context(config, length: int, settings: dict) -> None:
    native, memory = getattr(config, "max_position_embeddings", None), settings.get("memory") or {}
    is_clamped = memory.get("max_distance") is not None and memory["layers"] is None
    clamps = is_clamped and native and max(settings["segment_lengths"]) <= native
    if native and length > native and not settings["rope_scaling"] and not clamps:
        # Without the length: `warning_once` keeps each message that it has given, and gives every other one.
        logger.warning_once(
            f"more tokens are asked of a model than its native context of {native}, without position scaling: expect "
            "poor predictions beyond it. Patch with segments within it and `memory={'heads': {}}`, which clamps the "
            "distance of sink tokens, or with `rope_scaling={'rope_type': 'yarn', 'factor': ...}`."
        )


@outside_graphs
def _layer_memory(module: torch.nn.Module, settings: dict, order: torch.Tensor | None, heads: Heads):
    """What a layer with a memory knows for it: a `LayerMemory`."""
    memory = getattr(module, LAYER_MEMORY, None)
    if memory is None:
        raise ValueError(
            "this model's settings have a `memory`, but its layers do not know of it, as `patch_model` did not make "
            "it: use `load_patched_model(path)`, or give TRL its `ref_model=copy.deepcopy(model)`."
        )
    if order is not None:
        raise ValueError(
            "`attention_mask` has padding between the tokens of a row, which a memory does not read. Pad on the left."
        )
    told = "dimensions" if memory.basis is not None else "heads" if settings["memory"].get("heads") else None
    if told and heads.num_heads != heads.total:
        raise ValueError(
            f"`memory`: `{told}` are told for all heads of a layer, and this rank has {heads.num_heads} of "
            f"{heads.total}: leave `{told}` out under tensor parallelism."
        )
    return memory


def run_bounded(
    module, query, key, value, mask, settings: dict, bounded: DilatedCache, dropout, scaling, **kwargs
) -> torch.Tensor:
    """Dilated attention with a bounded cache: query [B, H, Q, D], key and value [B, G, Q, D] -> out [B, H, Q, D]."""
    layer = bounded.layers[key.cache_layer]
    if layer.layer_idx != module.layer_idx:
        raise ValueError(
            f"layer {module.layer_idx} reads the keys of layer {layer.layer_idx}, which a bounded cache cannot share: "
            "pass `cache=DynamicCache(config=model.config)`."
        )
    ids, order = None, chunk_order(mask, query.shape[2])
    if bounded.step is None:
        if mask is not None and not is_compact_mask(mask):
            raise ValueError(f"`attention_mask` must be a 2-D mask [B, N] in a patched model, got {tuple(mask.shape)}.")
        if mask is not None:
            ids = mask[:, 0, IDS, -query.shape[2] :].long()
        if not torch.compiler.is_compiling():
            if mask is not None and bool((mask[:, 0, GIVEN] * (mask[:, 0, EARLIER] + 1) > 0).all()):
                bounded.check_earlier(mask[:, 0, EARLIER, 0] + (mask[:, 0, IDS, : -query.shape[2]] >= 0).sum(1))
            ids = ids if ids is not None and bool((ids < 0).any()) else None
            check_position_ids(kwargs.get("position_ids"), len(query), query.shape[2])
            bounded.check_positions(kwargs.get("position_ids"), ids)
            _refuse_packing(kwargs.get("position_ids"), ids)
            _refuse_untold_packing(kwargs, False)
            bounded.had_padding_behind |= order is not None
            _warn_beyond_native_context(module.config, int(layer.get_seq_length()) + query.shape[2], settings)
    heads = heads_of(module, query, key)
    if layer.schedule.memory is not None:
        layer.ranking = _layer_memory(module, settings, order, heads).ranking(layer.schedule)
        layer.position_ids = kwargs.get("position_ids")
    if order is not None:
        query, key, value = (reorder(x, order, dim=2) for x in (query, key, value))
        ids = None if ids is None else ids.gather(1, order)
    out = bounded.attend(
        layer.layer_idx, query, key, value, ids, config=module.config, dropout=dropout, backend=settings["backend"],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling, heads=heads,
    )  # fmt: skip
    return out if order is None else restore_order(out, order, dim=2)


def _refuse_untold_packing(arguments: dict, is_packed: bool) -> None:
    """Raises a ValueError for documents told in a way that only other attention functions read."""
    lengths, index = arguments.get("cu_seq_lens_q"), arguments.get("seq_idx")
    if is_packed or torch.compiler.is_compiling():
        return
    for name, told in (("cu_seq_lens_q", lengths), ("seq_idx", index)):
        if told is not None and not isinstance(told, torch.Tensor):
            raise ValueError(f"`{name}` must be a tensor, got {told!r}.")
    if (lengths is not None and lengths.numel() > 2) or (index is not None and bool((index != index[:, :1]).any())):
        raise ValueError(
            "`cu_seq_lens_q` or `seq_idx` tells of several documents: a patched model wants `position_ids` that "
            "restart with each, no `attention_mask`, and no bounded cache."
        )


def _refuse_packing(position_ids: torch.Tensor | None, ids: torch.Tensor | None) -> None:
    if position_ids is None:
        return
    jumps = position_ids.diff(dim=1) != 1
    if bool((jumps if ids is None else jumps & (ids[:, 1:] >= 0) & (ids[:, :-1] >= 0)).any()):
        raise ValueError("`position_ids`: a bounded cache holds one document per row, got several in one.")


def _asked_of_token(query, key, value, settings: dict, dropout, scaling, arguments: dict) -> tuple | None:
    """What the attention of a decoding step depends on, the same in most layers; None where each goes its own way."""
    if query.shape[2] > 1 or torch.compiler.is_compiling() or dropout or settings.get("memory"):
        return None
    tensors = query, key, value
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    if arguments.get(ELSEWHERE) is not None or as_autocast(query)[0] is not query:
        return None
    return id(settings), scaling, *((type(x), x.shape, x.dtype, x.device) for x in tensors)


def run_dilated(module, query, key, value, mask, settings: dict, dropout, scaling, **kwargs) -> torch.Tensor:
    """Dilated attention over plain keys: query [B, H, Q, D], key and value [B, G, N, D] -> out [B, H, Q, D]."""
    query_length, length = query.shape[2], key.shape[2]
    if mask is None:
        mask = dilated_mask(len(query), query_length, length, length - query_length, device=query.device)
    if not is_compact_mask(mask) or mask.shape[-1] != length:
        shape = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must be a 2-D mask [B, N] in a patched model, got {shape} for {length} keys: the "
            "schedule decides what each token sees, a mask of pairs would contradict it."
        )
    documents = documents_of(mask, kwargs.get("position_ids"), query_length)
    _refuse_untold_packing(kwargs, documents.is_packed)
    asked = _asked_of_token(query, key, value, settings, dropout, scaling, kwargs)
    shared = {} if asked is None else shared_by_layers(mask, documents)
    prepared = shared.get(asked)
    if prepared is not None:
        return prepared(query, key, value)
    _warn_beyond_native_context(module.config, length, settings)
    heads = heads_of(module, query, key)
    schedule, memory = DilationSchedule.from_config(module.config).of_layer(module.layer_idx), {}
    if schedule.memory is not None:
        known = _layer_memory(module, settings, documents.order, heads)
        memory = {"inv_freq": known.inv_freq, "basis": known.basis}
        offset = angle_offset(documents, kwargs.get("position_ids"), len(query), length)
        query, key = (query, key) if offset is None else anchor(query, key, offset, known.inv_freq)
    order = documents.order
    if asked is not None and order is None and heads.num_heads == heads.total:
        prepared = shared[asked] = prepare_token(
            query, key, value, schedule, scale=scaling, heads=heads, document_ids=documents.ids,
            query_offset=documents.query_offset, backend=settings["backend"],
        )  # fmt: skip
        if prepared is not None:
            return prepared(query, key, value)
    if order is not None:
        key, value = (reorder(x, order, dim=2) for x in (key, value))
        query = reorder(query, order, dim=2) if query_length == length else query
    out = scheduled_attention(
        query, key, value, schedule, scale=scaling, dropout=dropout, heads=heads, document_ids=documents.ids,
        query_offset=documents.query_offset, backend=settings["backend"],
        elsewhere=getattr(kwargs.get(ELSEWHERE), "attend", None), **memory,
    )  # fmt: skip
    return out if order is None or query_length < length else restore_order(out, order, dim=2)


def make_attention_function(original: str) -> Callable:
    """The function registered for models whose attention was `original`."""

    def dilated_attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        arguments = {"dropout": dropout, "scaling": scaling, **kwargs}
        tap = vars(module).get(TAP)  # `getattr` would look for a parameter of that name first
        if tap is not None:
            return tap(original, module, query, key, value, attention_mask, **arguments)
        settings = _patched_settings(module)
        if module.layer_idx not in settings["layers"]:
            return run_original(original, module, query, key, value, attention_mask, **arguments)
        bounded = getattr(key, "dilated_cache", None)
        if bounded is not None:
            bounded.layers[key.cache_layer].awaited = False
        reason = unsupported_reason(module, query, key, value, kwargs)
        if reason is not None:
            raise ValueError(f"layer {module.layer_idx} is patched with dilated attention, but {reason}.")
        if kwargs.get("output_attentions"):
            logger.warning_once(
                "`output_attentions=True` gives none of a patched layer, which never forms the N x N weights."
            )
        if bounded is None:
            out = run_dilated(module, query, key, value, attention_mask, settings, **arguments)
        else:
            out = run_bounded(module, query, key, value, attention_mask, settings, bounded, **arguments)
        return out.transpose(1, 2).contiguous(), None

    return dilated_attention_forward


for _original, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, make_attention_function(_original))
    AttentionMaskInterface.register(_name, dilated_mask)
