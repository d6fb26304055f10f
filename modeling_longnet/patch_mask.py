"""The mask of patched models, for Transformers' own interface: made by `dilated_mask`, read by `documents_of`.

A Q x N mask is never built. The mask function returns an int32 tensor [B, 1, 4, N], which Transformers, Accelerate's
hooks and gradient checkpointing carry to every layer as they would carry a mask:

    IDS       document id of each key, negative = padding   -1 -1  1  1  1  1     (left padding)
    OFFSET    index of the first query among the keys        4  4  4  4  4  4     (two queries)
    GIVEN     whether the caller gave a 2-D attention mask   1  1  1  1  1  1
    EARLIER   tokens before the first key, known to a        0  0  0  0  0  0     (not padding; -1: some, untold)
              bounded cache alone

Segments count the tokens of a document from 0: padding on the left moves nothing, and padding between tokens is moved
before them. A patched model tells documents as its host does without a patch, which is not quite how LongNet tells them
(document_ids.py): where a 2-D mask is given, `position_ids` that restart do not begin one.

Letters: B batch, Q query tokens, N key tokens, D head dimension.
"""

import hashlib
from collections.abc import Callable

import torch

from .document_ids import (
    Documents,
    check_position_ids,
    document_begins,
    document_positions,
    first_key,
    order_of_padding_behind,
    side_by_side_order,
)
from .transformers_compat import ALL_MASK_ATTENTION_FUNCTIONS, attention_of, causal_mask_function


IDS, OFFSET, GIVEN, EARLIER = ROWS = range(4)

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

# Arguments of mask functions that change only how a mask is stored, or when it may be left out.
MASK_HINTS = ("dtype", "allow_is_causal_skip", "allow_is_bidirectional_skip")


def is_compact_mask(mask: object) -> bool:
    """Whether this is a mask made by `dilated_mask`."""
    is_integer = isinstance(mask, torch.Tensor) and mask.dtype == torch.int32
    return is_integer and mask.ndim == 4 and mask.shape[1:3] == (1, len(ROWS))


def _padding_ids(attention_mask: torch.Tensor, kv_length: int, end: int | torch.Tensor | None) -> torch.Tensor:
    """Document ids [B, N or more] from a 2-D mask: 1 = real, -1 = padding. What a static cache has not filled yet, from
    `end` on, looks like the last query; causality hides it."""
    real = attention_mask.bool()
    real = torch.nn.functional.pad(real, (0, max(0, kv_length - real.shape[1])), value=False)
    if end is not None:
        real = real[:, torch.arange(real.shape[1], device=real.device).clamp(max=end - 1)]
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
        room, end = kv_offset + kv_length, q_offset + q_length
        _check_width(attention_mask, end, room, None if covers_past else q_length)
        has_room = covers_past and not (isinstance(end, int) and end == kv_length)
        ids = _padding_ids(attention_mask, kv_length, end if has_room else None)
        if ids.shape[1] > kv_length:
            earlier = (ids[:, :-kv_length] >= 0).sum(1, keepdim=True)
            ids = ids[:, -kv_length:]
    elif mask_function is not causal_mask_function and kv_length > 1:
        if q_length != kv_length:
            raise ValueError("this forward uses a mask that is not the causal one, which a patched model cannot read.")
        ids = _packed_ids(mask_function, batch_size, kv_length, device)
    else:
        ids = torch.zeros(batch_size, kv_length, dtype=torch.long, device=device)
    mask = torch.empty(batch_size, 1, len(ROWS), kv_length, dtype=torch.int32, device=device)
    mask[:, 0, IDS] = ids
    # A static cache's offset is a live tensor, bumped by every layer's update: writing it here copies it.
    mask[:, 0, OFFSET] = q_offset - kv_offset
    mask[:, 0, GIVEN] = int(attention_mask is not None)
    mask[:, 0, EARLIER] = earlier
    return mask


def _restarts(position_ids: torch.Tensor | None, offset: int | torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Where documents begin, bool [B, N], by the model's own packing and by the restarts of `position_ids` [B, Q]."""
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    if position_ids is None:
        return begins
    position_ids = position_ids.expand(len(ids), -1)
    real = torch.ones_like(position_ids, dtype=torch.bool)
    queries = offset + torch.arange(position_ids.shape[1], device=ids.device)
    begins = begins.index_copy(1, queries, begins[:, queries] | document_begins(position_ids, real))
    # The first query may go on with a document that began in an earlier chunk: its position says where.
    return begins.scatter(1, first_key(position_ids, real, queries), True)


def _goes_on(mask: torch.Tensor, position_ids: torch.Tensor | None, query_length: int, offset: int) -> bool:
    """Whether a single query goes on with the one document of its row, as nearly every decoding step does."""
    if query_length > 1 or bool(mask[:, 0, IDS].any()):
        return False
    return position_ids is None or min(position_ids.flatten().tolist()) >= offset


def read_compact_mask(mask: torch.Tensor, position_ids: torch.Tensor | None, query_length: int) -> Documents:
    """Decode a compact mask. Eagerly, all that is trivial becomes None, so that the operator takes its short way."""
    length = mask.shape[-1]
    check_position_ids(position_ids, len(mask), query_length)
    if torch.compiler.is_compiling():
        ids, offset, given = mask[:, 0, IDS].long(), mask[0, 0, OFFSET, 0].long(), mask[0, 0, GIVEN, 0] > 0
        begins = _restarts(position_ids, offset, ids)
        return Documents(torch.where(given, ids, begins.cumsum(1)), None, offset, is_packed=True)
    told = mask[:, 0, :, 0].tolist()  # all but the ids is alike along N; at once, as each time waits for a GPU
    offset, given = told[0][OFFSET], told[0][GIVEN] > 0
    if any(row[EARLIER] for row in told):
        raise ValueError(
            "`cache` holds earlier tokens, and this forward goes on without them: gradient checkpointing "
            "sets caches aside. Call `model.eval()` or `model.gradient_checkpointing_disable()`."
        )
    at = None if offset == length - query_length else offset
    if given:
        if bool((mask[:, 0, IDS] >= 0).all()):
            return Documents(None, None, at)
        ids = mask[:, 0, IDS].long()
        order, _ = side_by_side_order(ids, query_length, offset)
        return Documents(ids if order is None else ids.gather(1, order), order, at)
    if _goes_on(mask, position_ids, query_length, offset):
        return Documents(None, None, at)
    begins = _restarts(position_ids, offset, mask[:, 0, IDS].long())
    is_packed = bool(begins[:, 1:].any())
    return Documents(begins.cumsum(1) if is_packed else None, None, at, is_packed=is_packed)


# An attribute of a compact mask, which lives as long as a forward: what `read_compact_mask` found, and in what.
DOCUMENTS_MARK = "_read_documents"
# The same for `shared_by_layers`.
SHARED_MARK = "_shared_by_layers"
# The same for `chunk_order`.
ORDER_MARK = "_chunk_order"


def documents_of(mask: torch.Tensor, position_ids: torch.Tensor | None, query_length: int) -> Documents:
    """`read_compact_mask`, once per forward although every layer asks: it looks at values, which waits for a GPU."""
    if torch.compiler.is_compiling() or any(x is not None and x.is_inference() for x in (mask, position_ids)):
        return read_compact_mask(mask, position_ids, query_length)
    stamp = (query_length, mask._version, None if position_ids is None else position_ids._version)
    read_from, read_at, documents = getattr(mask, DOCUMENTS_MARK, (None, None, None))
    if documents is None or read_from is not position_ids or read_at != stamp:
        documents = read_compact_mask(mask, position_ids, query_length)
        setattr(mask, DOCUMENTS_MARK, (position_ids, stamp, documents))
    return documents


def shared_by_layers(mask: torch.Tensor, documents: Documents) -> dict:
    """What the layers of one forward leave to those behind them; `documents` are those of the mask."""
    read, shared = getattr(mask, SHARED_MARK, (None, None))
    if read is not documents:
        shared = {}
        setattr(mask, SHARED_MARK, (documents, shared))
    return shared


def chunk_order(mask: torch.Tensor | None, query_length: int) -> torch.Tensor | None:
    """Order [B, Q] that puts padding before the tokens of a chunk, where there is some behind them."""
    if torch.compiler.is_compiling() or query_length == 1 or not is_compact_mask(mask):
        return None
    if not hasattr(mask, ORDER_MARK):
        real = mask[:, 0, IDS, -query_length:] >= 0
        setattr(mask, ORDER_MARK, order_of_padding_behind(real))
    return getattr(mask, ORDER_MARK)


def angle_offset(
    documents: Documents, position_ids: torch.Tensor | None, batch: int, length: int
) -> torch.Tensor | None:
    """What each row's `position_ids` count more than its document's tokens, [B]: the padding before them, if any."""
    if position_ids is None:
        return None
    position_ids, queries = position_ids.expand(batch, -1), position_ids.shape[-1]
    ids = documents.ids
    if ids is None:
        ids = position_ids.new_zeros(batch, length)
    begin = length - queries if documents.query_offset is None else int(documents.query_offset)
    position = document_positions(ids)[0][:, begin : begin + queries]
    real = (ids[:, begin : begin + queries] >= 0).long()
    last = (real * torch.arange(1, queries + 1, device=real.device)).argmax(-1, keepdim=True)
    return ((position_ids - position).gather(-1, last) * real.gather(-1, last))[:, 0]
