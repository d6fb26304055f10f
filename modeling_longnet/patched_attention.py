"""What a patched model runs: an attention function and a mask function for Transformers' own interfaces.

Letters: B batch, H query heads, G key/value heads, Q query tokens, N key tokens, D head dimension.

The mask function never builds a Q x N mask. It returns an int32 tensor [B, 1, 4, N], which Transformers, Accelerate's
hooks and gradient checkpointing carry to every layer as they would carry a mask:

    row 0   document id of each key, negative = padding   -1 -1  1  1  1  1     (left padding)
    row 1   index of the first query among the keys        4  4  4  4  4  4     (two queries)
    row 2   whether the caller gave a 2-D attention mask   1  1  1  1  1  1
    row 3   tokens before the first key, known to a        0  0  0  0  0  0     (not padding; -1: some, untold)
            bounded cache alone

The settings of a patch live in `config.dilated_attention`, nowhere else: a model that is copied or wrapped keeps them.
"""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from .dilated_attention import ELSEWHERE, scheduled_attention
from .dilated_cache_layer import DilatedLayer
from .dilation_schedule import DilationSchedule
from .document_ids import check_position_ids, document_positions, reorder, restore_order
from .memory_positions import anchor
from .transformers_compat import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    attention_of,
    causal_mask_function,
    first_unread,
)


logger = logging.get_logger(__name__)

# Code that was loaded from the Hub may be of another version than the package, or than that of another repository: each
# copy registers its functions under names of its own.
_COPY = "" if __package__ == "modeling_longnet" else "_" + hashlib.sha256(__name__.encode()).hexdigest()[:8]
# The name tells what the layers that are left alone run. "flash" or "sdpa" in a name means something to Transformers.
IMPLEMENTATIONS = {
    "sdpa": "dilated" + _COPY,
    "eager": "dilated_over_eager" + _COPY,
    "flex_attention": "dilated_over_flex" + _COPY,
    "flash_attention_2": "dilated_over_fa2" + _COPY,
    "flash_attention_3": "dilated_over_fa3" + _COPY,
}
ORIGINALS = {name: original for original, name in IMPLEMENTATIONS.items()}

# An attribute of attention modules whose rotary embeddings a patch has scaled: settings alone do not scale them.
SCALED_MARK = "_reads_scaled_positions"
# An attribute of all modules of a model that is being probed.
PROBE_MARK = "_attention_probe"
# The same of one whose queries and keys are read.
READER_MARK = "_attention_reader"
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
# Arguments of mask functions that change only how a mask is stored, or when it may be left out.
MASK_HINTS = ("dtype", "allow_is_causal_skip", "allow_is_bidirectional_skip")


@dataclass
class AttentionCall:
    """One call of the attention function during a probe: the module that called, and why it cannot be dilated.

    cache_layer: the layer of a bounded cache that its keys come from, if any. key: [G, N, D] of the first row.
    """

    module: torch.nn.Module
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
    tables: set[torch.nn.Module] = field(default_factory=set)


@contextlib.contextmanager
def probing(model: torch.nn.Module) -> Iterator[Probe]:
    """While open, the attention functions of this file record which modules of this model call, and return zeros."""
    probe, modules = Probe(), list(model.modules())
    tables = [module for module in modules if isinstance(module, torch.nn.Embedding)]
    hooks = [module.register_forward_hook(lambda module, *_: probe.tables.add(module)) for module in tables]
    for module in modules:
        setattr(module, PROBE_MARK, probe)
    try:
        yield probe
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules:
            delattr(module, PROBE_MARK)


@contextlib.contextmanager
def reading(model: torch.nn.Module, function: Callable) -> Iterator[None]:
    """While open, this model's layers run the attention that they had, and tell `function` (module, query, key)."""
    modules = list(model.modules())
    for module in modules:
        setattr(module, READER_MARK, function)
    try:
        yield
    finally:
        for module in modules:
            delattr(module, READER_MARK)


def unsupported_reason(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: dict
) -> str | None:
    """Why this layer's attention cannot be replaced by a dilated one, or None."""
    for name, reason in UNSUPPORTED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            return reason
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


def is_compact_mask(mask: object) -> bool:
    """Whether this is a mask made by `dilated_mask`."""
    return isinstance(mask, torch.Tensor) and mask.dtype == torch.int32 and mask.ndim == 4 and mask.shape[1:3] == (1, 4)


def _padding_ids(attention_mask: torch.Tensor, kv_length: int) -> torch.Tensor:
    """Document ids [B, N or more] from a 2-D mask: 1 = real, -1 = padding."""
    real = attention_mask.bool()
    real = torch.nn.functional.pad(real, (0, max(0, kv_length - real.shape[1])), value=False)
    if torch.compiler.is_compiling():  # no value can be asked for, and none must come out wrong
        begins = real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]
        torch._assert_async(
            begins.sum(1).max() <= 1,
            "`attention_mask` has padding between real tokens, which a compiled patched model does not put aside: run "
            "it without torch.compile, or pad all on one side.",
        )
    return torch.where(real, 1, -1)


def _check_width(attention_mask: torch.Tensor, end: int | torch.Tensor, room: int, new: int | None) -> None:
    """Refuses a 2-D mask that does not end with the queries, at `end`, or in a static cache's room, or has no `new`."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        got = f"shape {tuple(attention_mask.shape)}" if hasattr(attention_mask, "shape") else repr(attention_mask)
        raise ValueError(f"`attention_mask` must be a 2-D mask [B, N], got {got}.")
    width = attention_mask.shape[1]
    if torch.compiler.is_compiling() or width in (room, new) or (width < room and width >= int(end)):
        return
    raise ValueError(
        f"`attention_mask` must have shape {(len(attention_mask), int(end))}, the cached tokens included, got "
        f"{tuple(attention_mask.shape)}."
    )


def _packed_ids(mask_function: Callable, batch_size: int, length: int, device: torch.device) -> torch.Tensor:
    """Document ids [B, N] that a model's packing detection has put into its mask function, from neighbours only."""
    batch = torch.arange(batch_size, device=device)[:, None]
    later = torch.arange(1, length, device=device)[None]
    sees_past = mask_function(batch, 0, later, later - 1).expand(batch_size, -1)
    sees_future = mask_function(batch, 0, later - 1, later)
    if not torch.compiler.is_compiling() and bool(sees_future.any()):
        raise ValueError("a patched model is causal; this forward asks for a mask that lets tokens see later ones.")
    ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
    ids[:, 1:] = (~sees_past).cumsum(1)
    return ids


def dilated_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config=None,
    **kwargs,
) -> torch.Tensor | None:
    """The compact mask of this file's head, int32 [B, 1, 4, N]; a sliding-window or chunked layer gets its own mask.

    Raises:
        ValueError: for masks of another length, and for masks that are not causal or that a model adds to.
    """
    if local_size is not None:
        original = ALL_MASK_ATTENTION_FUNCTIONS[ORIGINALS[attention_of(config)]]
        return original(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            local_size=local_size, use_vmap=use_vmap, device=device, config=config, **kwargs,
        )  # fmt: skip
    if use_vmap:
        raise ValueError("this forward adds its own function to the causal mask, which a patched model cannot read.")
    unread = [name for name, value in kwargs.items() if name not in MASK_HINTS and value is not None]
    if unread:
        raise ValueError(f"this forward makes its mask with `{unread[0]}`, which a patched model does not read.")
    device = attention_mask.device if attention_mask is not None else torch.device(device)
    # A bounded cache asks for the new tokens alone, and checks what is told of those before.
    covers_past = isinstance(kv_offset, int) and kv_offset == 0
    earlier = 0 if covers_past else -1
    if attention_mask is not None:
        room = kv_offset + kv_length
        _check_width(attention_mask, q_offset + q_length, room, None if covers_past else q_length)
        ids = _padding_ids(attention_mask, kv_length)
        if ids.shape[1] > kv_length:
            earlier = (ids[:, :-kv_length] >= 0).sum(1, keepdim=True)
            ids = ids[:, -kv_length:]
    elif mask_function is not causal_mask_function and kv_length > 1:
        if q_length != kv_length:
            raise ValueError("this forward uses a mask that is not the causal one, which a patched model cannot read.")
        ids = _packed_ids(mask_function, batch_size, kv_length, device)
    else:
        ids = torch.zeros(batch_size, kv_length, dtype=torch.long, device=device)
    mask = torch.empty(batch_size, 1, 4, kv_length, dtype=torch.int32, device=device)
    mask[:, 0, 0] = ids
    # A static cache's offset is a live tensor, bumped by every layer's update: writing it here copies it.
    mask[:, 0, 1] = q_offset - kv_offset
    mask[:, 0, 2] = int(attention_mask is not None)
    mask[:, 0, 3] = earlier
    return mask


@dataclass(frozen=True)
class Layout:
    """Where documents and queries lie: ids [B, N] or None for one document a row, query index or None for the end.

    order: [B, N], the keys with all padding moved to the front, where there is some between a row's tokens: segments
    count the tokens alone. (How rotary positions count them is the model's own affair, as without a patch.)
    """

    document_ids: torch.Tensor | None
    query_offset: int | torch.Tensor | None
    is_packed: bool
    order: torch.Tensor | None = None


def _restarts(position_ids: torch.Tensor, offset: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Where documents begin, bool [B, N], by the model's own packing and by the restarts of `position_ids` [B, Q]."""
    batch, length = ids.shape
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    if position_ids is None:
        return begins
    position_ids = position_ids.expand(batch, -1)
    index = (offset + torch.arange(position_ids.shape[1], device=ids.device)).expand(batch, -1)
    jumps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    # The first query may go on with a document that began in an earlier chunk: its position says where.
    first = (offset - position_ids[:, :1]).clamp(min=torch.zeros_like(offset), max=offset)
    return begins.scatter(1, index, begins.gather(1, index) | jumps).scatter(1, first, True)


def _padding_to_front(ids: torch.Tensor, new: slice) -> torch.Tensor | None:
    """The `order` of a Layout, or None; ids [B, N], negative for padding; `new` are the queries among the keys."""
    real = ids >= 0
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1]
    if int(begins.sum(1).max()) <= 1:
        return None
    queries = real[:, new]
    if queries.shape[1] < ids.shape[1] and bool((queries[:, :-1] & ~queries[:, 1:]).any()):
        raise ValueError(
            "`attention_mask` has padding behind tokens that go on from a cache: their rows could not stand side by "
            "side. Pad these tokens on the left."
        )
    return real.to(torch.uint8).argsort(dim=1, stable=True)


def read_layout(mask: torch.Tensor, position_ids: torch.Tensor | None, query_length: int) -> Layout:
    """Decode a compact mask. Eagerly, all that is trivial becomes None, so that the operator takes its short way."""
    ids, offset, given = mask[:, 0, 0].long(), mask[0, 0, 1, 0].long(), mask[0, 0, 2, 0] > 0
    length = mask.shape[-1]
    check_position_ids(position_ids, len(mask), query_length)
    if torch.compiler.is_compiling():
        begins = _restarts(position_ids, offset, ids)
        return Layout(torch.where(given, ids, begins.cumsum(1)), offset, True)
    if bool(mask[:, 0, 3].any()):
        raise ValueError(
            "`cache` holds earlier tokens, and this forward goes on without them: gradient checkpointing "
            "sets caches aside. Call `model.eval()` or `model.gradient_checkpointing_disable()`."
        )
    at = None if int(offset) == length - query_length else int(offset)
    if bool(given):
        if bool((ids >= 0).all()):
            return Layout(None, at, False)
        return Layout(ids, at, False, _padding_to_front(ids, slice(int(offset), int(offset) + query_length)))
    begins = _restarts(position_ids, offset, ids)
    is_packed = bool(begins[:, 1:].any())
    return Layout(begins.cumsum(1) if is_packed else None, at, is_packed)


# An attribute of a compact mask, which lives as long as a forward: what `read_layout` found, and in what.
LAYOUT_MARK = "_read_layout"
# The same for the order of a chunk that a bounded cache reads.
ORDER_MARK = "_chunk_order"


def layout_of(mask: torch.Tensor, position_ids: torch.Tensor | None, query_length: int) -> Layout:
    """`read_layout`, computed once per forward although every layer asks: it looks at values, which waits for a GPU."""
    if torch.compiler.is_compiling() or any(x is not None and x.is_inference() for x in (mask, position_ids)):
        return read_layout(mask, position_ids, query_length)
    stamp = (query_length, mask._version, None if position_ids is None else position_ids._version)
    read_from, read_at, layout = getattr(mask, LAYOUT_MARK, (None, None, None))
    if layout is None or read_from is not position_ids or read_at != stamp:
        layout = read_layout(mask, position_ids, query_length)
        setattr(mask, LAYOUT_MARK, (position_ids, stamp, layout))
    return layout


@cache
def eager_attention_of(module_name: str) -> Callable:
    """The `eager_attention_forward` of the modeling file that defines an attention class."""
    return sys.modules[module_name].eager_attention_forward


def run_original(original: str, module, query, key, value, mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer that is left alone: the attention it had, with the very mask that it would have been given."""
    if is_compact_mask(mask):
        q_length, kv_length = query.shape[2], key.shape[2]
        layout = layout_of(mask, kwargs.get("position_ids"), q_length)
        ids, function = layout.document_ids, causal_mask_function
        if layout.is_packed:
            function = and_masks(function, lambda b, h, q, k: ids[b, q] == ids[b, k])
        at_end = layout.query_offset is None
        mask = ALL_MASK_ATTENTION_FUNCTIONS[original](
            batch_size=len(query),
            q_length=q_length,
            kv_length=kv_length,
            q_offset=kv_length - q_length if at_end else layout.query_offset,
            kv_offset=0,
            mask_function=function,
            attention_mask=None if ids is None else ids >= 0,
            allow_is_causal_skip=not layout.is_packed and (at_end or q_length > 1),
            dtype=query.dtype,
            config=module.config,
            use_vmap=False,
            device=query.device,
        )
    eager = original == "eager"
    function = eager_attention_of(type(module).__module__) if eager else ALL_ATTENTION_FUNCTIONS[original]
    return function(module, query, key, value, mask, **kwargs)


def head_slice(module: torch.nn.Module, num_heads: int) -> tuple[int, int]:
    """First global head and number of heads in all: under tensor parallelism a module sees its own heads only."""
    total = module.config.num_attention_heads
    if num_heads == total:
        return 0, total
    for parameter in module.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            rank = mesh.get_local_rank("tp" if "tp" in (mesh.mesh_dim_names or ()) else None)
            return rank * num_heads, total
    raise ValueError(
        f"this attention got {num_heads} of {total} heads and no tensor-parallel weights tell which: head offsets "
        "would be wrong."
    )


def _heads_problem(module: torch.nn.Module, num_heads: int) -> str | None:
    try:
        head_slice(module, num_heads)
    except (ValueError, AttributeError):
        total = getattr(module.config, "num_attention_heads", None)
        return f"it has {num_heads} heads, its configuration tells of {total}"
    return None


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


def _refuse_unsupported(module, query, key, value, arguments: dict) -> None:
    reason = unsupported_reason(module, query, key, value, arguments)
    if reason:
        raise ValueError(f"layer {module.layer_idx} is patched with dilated attention, but {reason}.")


def _warn_beyond_native_context(config, length: int, settings: dict) -> None:
    native, memory = getattr(config, "max_position_embeddings", None), settings.get("memory") or {}
    clamps = memory.get("max_distance") is not None and memory["layers"] is None
    if native and length > native and not settings["rope_scaling"] and not clamps:
        # Without the length: `warning_once` keeps each message that it has given, and gives every other one.
        logger.warning_once(
            f"more tokens are asked of a model than its native context of {native}, without position scaling: expect "
            "poor predictions beyond it. Patch with `rope_scaling={'rope_type': 'yarn', 'factor': ...}`."
        )


def _layer_memory(module: torch.nn.Module):
    memory = getattr(module, LAYER_MEMORY, None)
    if memory is None:
        raise ValueError(
            "this model's settings have a `memory`, but its layers do not know of it, as `patch_model` did not make "
            "it: use `load_patched_model(path)`, or give TRL its `ref_model=copy.deepcopy(model)`."
        )
    return memory


def _refuse_sliced_dimensions(memory, num_heads: int, total_heads: int) -> None:
    if memory.basis is not None and num_heads != total_heads:
        raise ValueError(
            "`memory`: `dimensions` are calibrated for all heads of a layer, and this rank has "
            f"{num_heads} of {total_heads}: leave `dimensions` out under tensor parallelism."
        )


def _angle_offset(layout: Layout, position_ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """What each row's `position_ids` count more than its document's tokens, [B]: the padding before them, if any."""
    if position_ids is None:
        return None
    position_ids, queries = position_ids.expand(batch, -1), position_ids.shape[-1]
    ids = layout.document_ids
    if ids is None:
        ids = position_ids.new_zeros(batch, length)
    begin = length - queries if layout.query_offset is None else int(layout.query_offset)
    position = document_positions(ids)[0][:, begin : begin + queries]
    real = (ids[:, begin : begin + queries] >= 0).long()
    last = (real * torch.arange(1, queries + 1, device=real.device)).argmax(-1, keepdim=True)
    return ((position_ids - position).gather(-1, last) * real.gather(-1, last))[:, 0]


def run_bounded(
    module, query, key, value, mask, settings: dict, layer: DilatedLayer, dropout, scaling, **kwargs
) -> torch.Tensor:
    """Dilated attention with a bounded cache: query [B, H, Q, D], key and value [B, G, Q, D] -> out [B, H, Q, D]."""
    layer.awaited = False
    _refuse_unsupported(module, query, key, value, kwargs)
    if dropout:
        raise ValueError(f"`attention_dropout` must be 0 with a bounded cache, got {dropout}.")
    if layer.layer_idx != module.layer_idx:
        raise ValueError(
            f"layer {module.layer_idx} reads the keys of layer {layer.layer_idx}, which a bounded cache cannot share: "
            "pass `cache=DynamicCache(config=model.config)`."
        )
    ids, order = None, _chunk_order(mask, query.shape[2])
    if layer.is_first:
        if mask is not None and not is_compact_mask(mask):
            raise ValueError(f"`attention_mask` must be a 2-D mask [B, N] in a patched model, got {tuple(mask.shape)}.")
        if mask is not None:
            ids = mask[:, 0, 0, -query.shape[2] :].long()
        if not torch.compiler.is_compiling():
            layer.clock.check_model(module.config)
            if mask is not None and bool((mask[:, 0, 2] * (mask[:, 0, 3] + 1) > 0).all()):
                layer.clock.check_earlier(mask[:, 0, 3, 0] + (mask[:, 0, 0, : -query.shape[2]] >= 0).sum(1))
            ids = ids if ids is not None and bool((ids < 0).any()) else None
            check_position_ids(kwargs.get("position_ids"), len(query), query.shape[2])
            layer.clock.check_positions(kwargs.get("position_ids"), ids)
            _refuse_packing(kwargs.get("position_ids"), ids)
            _refuse_untold_packing(kwargs, False)
            layer.clock.had_padding_behind |= order is not None
            _warn_beyond_native_context(module.config, int(layer.get_seq_length()) + query.shape[2], settings)
    if layer.schedule.memory is not None:
        _refuse_inner_padding(order)
        layer.ranking = _layer_memory(module).ranking(layer.schedule)
        layer.position_ids = kwargs.get("position_ids")
    first_head, total_heads = head_slice(module, query.shape[1])
    if layer.schedule.memory is not None:
        _refuse_sliced_dimensions(layer.ranking, query.shape[1], total_heads)
    if order is not None:
        query, key, value = (reorder(x, order, dim=2) for x in (query, key, value))
        ids = None if ids is None else ids.gather(1, order)
    out = layer.attend(
        query, key, value, ids, scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        backend=settings["backend"], head_index_offset=first_head, total_num_heads=total_heads,
    )  # fmt: skip
    return out if order is None else restore_order(out, order, dim=2)


def _chunk_order(mask: torch.Tensor | None, query_length: int) -> torch.Tensor | None:
    """Order [B, Q] that puts padding before the tokens of a chunk, where there is some behind them."""
    if torch.compiler.is_compiling() or query_length == 1 or not is_compact_mask(mask):
        return None
    if not hasattr(mask, ORDER_MARK):
        real = mask[:, 0, 0, -query_length:] >= 0
        is_behind = bool((real[:, :-1] & ~real[:, 1:]).any())
        setattr(mask, ORDER_MARK, real.to(torch.uint8).argsort(dim=1, stable=True) if is_behind else None)
    return getattr(mask, ORDER_MARK)


def _refuse_inner_padding(order: torch.Tensor | None) -> None:
    if order is not None:
        raise ValueError(
            "`attention_mask` has padding between the tokens of a row, which a memory does not read. Pad on the left."
        )


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


def run_dilated(module, query, key, value, mask, settings: dict, dropout, scaling, **kwargs) -> torch.Tensor:
    """Dilated attention over plain keys: query [B, H, Q, D], key and value [B, G, N, D] -> out [B, H, Q, D]."""
    _refuse_unsupported(module, query, key, value, kwargs)
    query_length, length = query.shape[2], key.shape[2]
    if mask is None:
        mask = dilated_mask(len(query), query_length, length, length - query_length, device=query.device)
    if not is_compact_mask(mask) or mask.shape[-1] != length:
        shape = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must be a 2-D mask [B, N] in a patched model, got {shape} for {length} keys: the "
            "schedule decides what each token sees, a mask of pairs would contradict it."
        )
    _warn_beyond_native_context(module.config, length, settings)
    layout = layout_of(mask, kwargs.get("position_ids"), query_length)
    _refuse_untold_packing(kwargs, layout.is_packed)
    first_head, total_heads = head_slice(module, query.shape[1])
    schedule, memory = DilationSchedule.from_config(module.config).of_layer(module.layer_idx), {}
    if schedule.memory is not None:
        _refuse_inner_padding(layout.order)
        known = _layer_memory(module)
        _refuse_sliced_dimensions(known, query.shape[1], total_heads)
        memory = {"inv_freq": known.inv_freq, "basis": known.basis}
        offset = _angle_offset(layout, kwargs.get("position_ids"), len(query), length)
        query, key = (query, key) if offset is None else anchor(query, key, offset, known.inv_freq)
    ids, query_offset, order = layout.document_ids, layout.query_offset, layout.order
    if order is not None:
        key, value = (reorder(x, order, dim=2) for x in (key, value))
        query = reorder(query, order, dim=2) if query_length == length else query
        ids, query_offset = ids.gather(1, order), None
    out = scheduled_attention(
        query, key, value, schedule, scale=scaling, dropout=dropout, head_index_offset=first_head,
        total_num_heads=total_heads, document_ids=ids, query_offset=query_offset, backend=settings["backend"],
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
        probe = getattr(module, PROBE_MARK, None)
        if probe is not None:
            reason = unsupported_reason(module, query, key, value, kwargs)
            if reason is None and attention_mask is not None and not is_compact_mask(attention_mask):
                reason = "it is given a mask of pairs that the model makes by itself"
            if reason is None:
                reason = _heads_problem(module, query.shape[1])
            if reason is None and getattr(kwargs.get("position_ids"), "ndim", 2) != 2:
                reason = "its `position_ids` have several axes, which do not tell where a document begins"
            cache_layer = getattr(getattr(key, "dilated_layer", None), "layer_idx", None)
            shape = tuple(key.shape)
            probe.calls.append(AttentionCall(module, reason, query.shape[1], shape, key.itemsize, cache_layer, key[0]))
            return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1]), None
        settings = _patched_settings(module)
        reader = getattr(module, READER_MARK, None)
        if reader is not None:
            reader(module, query, key)
        if module.layer_idx not in settings["layers"] or reader is not None:
            return run_original(
                original, module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if kwargs.get("output_attentions"):
            logger.warning_once(
                "`output_attentions=True` gives none of a patched layer, which never forms the N x N weights."
            )
        layer = getattr(key, "dilated_layer", None)
        if layer is not None:
            kwargs["layer"] = layer
        run = run_dilated if layer is None else run_bounded
        out = run(module, query, key, value, attention_mask, settings, dropout=dropout, scaling=scaling, **kwargs)
        return out.transpose(1, 2).contiguous(), None

    return dilated_attention_forward


for _original, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, make_attention_function(_original))
    AttentionMaskInterface.register(_name, dilated_mask)
