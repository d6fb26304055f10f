"""Padding masks and restarting positions, read as `Documents`: which tokens belong together. These are LongNet's laws;
what a patched model does otherwise is told in patch_mask.py.

Letters: B batch, Q tokens of the queries, N tokens of the keys (cached ones first).
"""

from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from .transformers_compat import is_tracing


def document_positions(document_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Position of each token in its document, and the index at which that document starts, both [B, N].

    A document is a run of equal ids in a row; a negative id is padding.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    start = torch.where(begins, index, 0).cummax(1).values
    return index - start, start


class Documents(NamedTuple):
    """What the attention of a LongNet or of a patched model has to know about a batch.

    ids: [B, N], the document of each key, negative for padding; None where each row is one document without padding.
    order: [B, N], the keys' indices with the padding moved to the front, for rows that have padding between their
        tokens: segments count the tokens alone. Then `ids` are in this order. None where tokens lie side by side.
    query_offset: index of the first query among the keys, a 0-dim tensor for static caches; None for the end.
    positions: [B, Q] or [1, Q], the place of each query in its document; 0 for padding. None for a patched model, whose
        host counts positions itself.
    is_split: [B, 1] or [1, 1], rows whose earlier text has padding between its tokens. `generate` counts their
        `position_ids` on from the padding's, so the place in the document has to stand in. None: there are none.
    is_packed: of a patched model, whether a row may hold several documents; then it has no padding.
    """

    ids: torch.Tensor | None
    order: torch.Tensor | None
    query_offset: int | torch.Tensor | None
    positions: torch.Tensor | None = None
    is_split: torch.Tensor | None = None
    is_packed: bool = False


def holds_pairs(attention_mask: torch.Tensor | None) -> bool:
    """Whether it says who may look at whom, bool or floats [B, 1, Q, N]; document ids are integers."""
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"`attention_mask` must be a tensor, got {attention_mask!r}.")
    if attention_mask is None or attention_mask.dim() != 4:
        return False
    return attention_mask.dtype == torch.bool or attention_mask.is_floating_point()


# What `encode_documents` adds, so that other integers are told from ids: they are then negative, or of this size.
_NO_DOCUMENT = torch.iinfo(torch.int32).min
_FIRST = 2**31


def _is_encoded(attention_mask: torch.Tensor) -> bool:
    if attention_mask.dtype == torch.int32:
        return is_tracing(attention_mask) or bool((attention_mask < 0).all())
    if attention_mask.dtype != torch.int64:
        return False
    return is_tracing(attention_mask) or bool((attention_mask & (2 * _FIRST - 1) >= _FIRST).all())


def _check_attention_mask(
    attention_mask: torch.Tensor, batch_size: int, query_length: int, query_offset: int | torch.Tensor, key_length: int
) -> None:
    length = query_offset + query_length if isinstance(query_offset, int) else query_length
    encoded = ((batch_size, 1, 1, key_length), (batch_size, 1, query_length, key_length))
    if attention_mask.shape in encoded and _is_encoded(attention_mask):
        return
    if attention_mask.dim() != 2:
        raise ValueError(
            "`attention_mask` must have shape [batch, tokens] and tell padding (0) from tokens (1), got shape "
            f"{tuple(attention_mask.shape)}."
        )
    if attention_mask.shape[0] != batch_size or not length <= attention_mask.shape[1] <= key_length:
        raise ValueError(
            f"`attention_mask` must have shape {(batch_size, length)}, the cached tokens included, got "
            f"{tuple(attention_mask.shape)}."
        )
    if attention_mask.is_floating_point() and not is_tracing(attention_mask):
        if not ((attention_mask == 0) | (attention_mask == 1)).all():
            raise ValueError(
                "`attention_mask` must hold 1 for tokens and 0 for padding, got other numbers; an additive mask (0 and "
                "-inf) says the opposite."
            )


def check_position_ids(position_ids: torch.Tensor | None, batch_size: int, query_length: int) -> None:
    """Refuses positions of another shape than [B, Q] or [1, Q], and what is no tensor."""
    if position_ids is not None and not isinstance(position_ids, torch.Tensor):
        raise ValueError(f"`position_ids` must be a tensor, got {position_ids!r}.")
    if position_ids is not None and tuple(position_ids.shape) not in ((1, query_length), (batch_size, query_length)):
        raise ValueError(
            f"`position_ids` must have shape {(batch_size, query_length)}, got {tuple(position_ids.shape)}."
        )


def find_pairs(
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    *,
    batch_size: int,
    query_length: int,
    key_length: int,
    device: torch.device,
) -> Documents:
    """A mask of pairs, and the positions, as Documents whose `ids` are bool [B, 1, N, N], True where one may look.

    Args:
        attention_mask: [B or 1, 1, N, N], bool, or additive floats: 0 where a query may look, the dtype's least number
            or -inf elsewhere.
        position_ids: [B, N] or [1, N], the place of each token in its text; the default counts all tokens.

    Raises:
        ValueError: for masks of another shape, dtype or content, and with cached tokens, whose positions nobody knows.
    """
    if key_length != query_length:
        raise ValueError(
            "`attention_mask` of pairs must come with the whole text in one forward, without a filled or static "
            f"`cache`, got {query_length} of {key_length} tokens."
        )
    shape, wanted = tuple(attention_mask.shape), (1, query_length, query_length)
    if shape[0] not in (1, batch_size) or shape[1:] != wanted:
        raise ValueError(f"`attention_mask` of pairs must have shape {(batch_size, *wanted)}, got {shape}.")
    visible = attention_mask.to(device)
    if visible.is_floating_point():
        hidden = visible <= torch.finfo(torch.float16).min
        if not is_tracing(visible) and not (hidden | (visible == 0)).all():
            raise ValueError(
                "`attention_mask` of pairs must be bool or additive, 0 where a query may look and -inf (or the dtype's "
                "least number) elsewhere: dilated attention adds no other numbers to its scores."
            )
        visible = ~hidden
    if position_ids is None:
        position_ids = torch.arange(query_length, device=device)[None]
    return Documents(visible.expand(batch_size, -1, -1, -1), None, 0, position_ids)


def document_begins(position_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Which tokens begin a new document, [B, Q]: where the positions [B, Q] do not go on by one.

    After padding a higher position goes on as well, be it that the positions count the padding or not.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    previous = torch.where(real, index, -1).cummax(1).values[:, :-1]  # the last token before, -1 if there is none
    step = position_ids[:, 1:] - position_ids.gather(1, previous.clamp(min=0))
    goes_on = torch.where(previous == index[:, :-1], step == 1, step > 0)
    begins = torch.zeros_like(real)
    begins[:, 1:] = (previous >= 0) & ~goes_on
    return begins & real


def padding_to_front(real: torch.Tensor) -> torch.Tensor:
    """The order [B, N] that moves what is not `real` [B, N] before the tokens, which keep their own order."""
    return real.to(torch.uint8).argsort(dim=1, stable=True)


def order_of_padding_behind(real: torch.Tensor) -> torch.Tensor | None:
    """`padding_to_front`, where there is padding behind a row's tokens."""
    return padding_to_front(real) if bool((real[:, :-1] & ~real[:, 1:]).any()) else None


def side_by_side_order(
    ids: torch.Tensor, query_length: int, query_offset: int | torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Order [B, N] that moves padding to the front, if there is some between the tokens of a document; `ids` [B, N].

    With it, which rows have such padding before the new tokens, [B, 1].
    """
    real = ids >= 0
    seen = ids.cummax(1).values[:, :-1]
    split = real[:, 1:] & ~real[:, :-1] & (ids[:, 1:] == seen)
    is_whole = query_length == ids.shape[1]
    if is_tracing(ids):
        # The values cannot be asked for. Reordering does no harm; with a cache the tokens must lie side by side.
        return padding_to_front(real) if is_whole else None, None
    if not split.any():
        return None, None
    # Padding before the new tokens may be moved away from among them: what its queries then give is nobody's.
    if not is_whole and real[:, int(query_offset) :].int().diff(dim=1).lt(0).any():
        raise ValueError(
            "`attention_mask` has padding between the tokens of a row, which a static cache or a padded continuation "
            "cannot put aside. Pad these tokens on the left."
        )
    return padding_to_front(real), split[:, : int(query_offset)].any(1, keepdim=True)


def encode_documents(documents: Documents) -> torch.Tensor | None:
    """Documents as an `attention_mask` of integers [B, 1, 1, N] for another call of `find_documents`, None for None.

    Without an order the dtype is int32, with one it is int64: a traced program can tell dtypes apart, not values. Masks
    of consecutive steps may be put together along the dimension of the queries.
    """
    ids, order = documents.ids, documents.order
    if ids is None:
        return None
    code = (ids + (1 + _NO_DOCUMENT)).int() if order is None else (ids << 32) + order + _FIRST
    return code[:, None, None]


def _read_ids(attention_mask: torch.Tensor, query_offset: int | torch.Tensor, slots: torch.Tensor) -> Documents:
    """The documents that `encode_documents` wrote down; slots [Q].

    Of several steps the last one counts: it knows all tokens, and no earlier query sees those behind it.
    """
    code = attention_mask[:, 0, -1].long()
    if attention_mask.dtype == torch.int32:
        ids = code - (1 + _NO_DOCUMENT)
        return Documents(ids, None, query_offset, _positions(ids)[:, slots])
    ids, order = code >> 32, (code & (2 * _FIRST - 1)) - _FIRST
    is_split = (order != torch.arange(order.shape[1], device=order.device)).any(1, keepdim=True)
    return Documents(ids, order, query_offset, _positions(ids)[:, slots], is_split)


def first_key(position_ids: torch.Tensor, real: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Index of the key at which each row's first document begins by its `position_ids`, [B, 1]; all else is [B, Q]."""
    at = real.int().argmax(1, keepdim=True)  # a row may begin with padding, which has no place
    return (slots[at] - position_ids.gather(1, at)).clamp(min=0)


def _real_keys(
    attention_mask: torch.Tensor | None, batch_size: int, key_length: int, device: torch.device
) -> torch.Tensor:
    """Which keys are no padding, bool [B, N]."""
    if attention_mask is None:
        return torch.ones(batch_size, key_length, dtype=torch.bool, device=device)
    # What a static cache has not filled yet looks like the last token; causality hides it.
    unfilled = attention_mask[:, -1:].expand(-1, key_length - attention_mask.shape[1])
    return torch.cat([attention_mask, unfilled], dim=1).to(device).bool()


def find_documents(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    *,
    batch_size: int,
    query_length: int,
    query_offset: int | torch.Tensor,
    key_length: int,
    device: torch.device,
) -> Documents:
    """The documents of a batch: padding is no part of any, and each counts its positions from 0.

    A new document begins where `position_ids` do not go on by one. When a row's positions say that its document
    began after the first cached token, what lies before it is another document (or padding) and is hidden.

        attention_mask  0 0 1 1 1 1        position_ids  0 1 2 0 1 0
        ids            -1-1 0 0 0 0        ids           0 0 0 1 1 2
        positions       0 0 0 1 2 3        positions     0 1 2 0 1 0

    Args:
        attention_mask: [B, query_offset + Q], 1 for tokens, 0 for padding; or what `encode_documents` made of what this
            function gave, [B, 1, 1 or Q, N].
        position_ids: [B, Q] or [1, Q].
        query_offset: index of the first query among the keys; a 0-dim tensor for static caches.
        key_length: N. Beyond the last query there may be room that a static cache has not filled yet.

    Raises:
        ValueError: for masks and positions of another shape, and for padding between tokens that cannot be put aside.
    """
    check_position_ids(position_ids, batch_size, query_length)
    slots = query_offset + torch.arange(query_length, device=device)
    if attention_mask is not None:
        _check_attention_mask(attention_mask, batch_size, query_length, query_offset, key_length)
        if attention_mask.dim() == 4:
            return _read_ids(attention_mask, query_offset, slots)
    elif position_ids is None:
        return Documents(None, None, query_offset, slots[None])

    real = _real_keys(attention_mask, batch_size, key_length, device)
    begins = torch.zeros_like(real)
    first = torch.zeros(batch_size, 1, dtype=torch.long, device=device)  # index at which the queries' documents begin
    if position_ids is not None:
        position_ids, real_queries = position_ids.expand(batch_size, -1), real[:, slots]
        begins_of_queries = document_begins(position_ids, real_queries)
        if not isinstance(query_offset, int) or query_offset > 0:
            first = first_key(position_ids, real_queries, slots)
        if attention_mask is None and not is_tracing(first) and not (begins_of_queries.any() or first.any()):
            return Documents(None, None, query_offset, slots[None])  # a decoding step, as a rule: spare it what follows
        begins = begins.index_copy(1, slots, begins_of_queries)
    ids = torch.where(real, begins.cumsum(1), -1)
    order, is_split = side_by_side_order(ids, query_length, query_offset)
    if order is not None:
        ids = ids.gather(1, order)
    first = first if is_split is None else first.masked_fill(is_split, 0)  # their positions tell no beginning
    ids = torch.where(torch.arange(key_length, device=device) >= first, ids, -1)
    if not is_tracing(ids) and not ids.any():
        return Documents(None, None, query_offset, slots[None])
    is_moved = order is not None and query_length == key_length
    positions = restore_order(_positions(ids), order, dim=1) if is_moved else _positions(ids)
    return Documents(ids, order, query_offset, positions[:, slots], is_split)


def read_documents(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    batch_size: int,
    query_length: int,
    device: torch.device,
    is_causal: bool = True,
) -> Documents:
    """The documents of the keys that the attention will be given.

    Raises:
        ValueError: for a bidirectional model with a cache that holds room for later tokens, which it would see.
    """
    # CODEPATH: a bounded cache has forgotten the earlier keys, and knows where each row's text goes on.
    if hasattr(cache, "read_documents"):
        return cache.read_documents(attention_mask, position_ids, batch_size, query_length, device)
    offset, key_length = 0, query_length
    if cache is not None:
        offset, (key_length, _) = cache.get_seq_length(), cache.get_mask_sizes(query_length, 0)
        if isinstance(offset, torch.Tensor):
            offset = offset.to(device) + 0  # a copy: the first layer's update moves the cache's own tensor on
        if not is_causal and (isinstance(offset, torch.Tensor) or key_length != offset + query_length):
            raise ValueError(
                "`cache` of a bidirectional model must hold nothing but its tokens, got "
                f"{type(cache).__name__} with room for {key_length}."
            )
    extent = {"batch_size": batch_size, "query_length": query_length, "key_length": key_length, "device": device}
    if holds_pairs(attention_mask):
        return find_pairs(attention_mask, position_ids, **extent)
    return find_documents(attention_mask, position_ids, query_offset=offset, **extent)


def _positions(document_ids: torch.Tensor) -> torch.Tensor:
    return document_positions(document_ids)[0].masked_fill(document_ids < 0, 0)


def without_gradient_of_padding(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """x [B, Q, C] as it is, but no gradient passes through the rows that a mask [B, N], N >= Q, calls padding.

    Padded queries see nothing, so their states can be exactly zero, where each LayerNorm multiplies a gradient by
    1 / sqrt(eps): a loss that looks at padded rows (question answering) would be ruined by what nobody reads.
    """
    if attention_mask is None or attention_mask.dim() != 2 or not x.requires_grad:
        return x
    return torch.where(attention_mask[:, -x.shape[1] :].to(x.device).bool()[..., None], x, x.detach())


def reorder(x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    """x [B, ...] with the tokens along `dim` in `order` [B, N]."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    return x.gather(dim, order.view(shape).expand(*(order.shape[1] if i == dim else n for i, n in enumerate(x.shape))))


def restore_order(x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `reorder`."""
    return reorder(x, order.argsort(dim=1), dim)


def padding_first(documents: Documents) -> Documents:
    """With an order that puts padding before the tokens, if there is some behind them; positions stay as they are."""
    ids = documents.ids
    if ids is None or documents.order is not None or torch.compiler.is_compiling():
        return documents
    order = order_of_padding_behind(ids >= 0)
    return documents if order is None else documents._replace(ids=ids.gather(1, order), order=order)


def check_padding(ids: torch.Tensor, has_waiting: torch.Tensor) -> None:
    """Refuses what slots cannot hold: `ids` [B, Q]; `has_waiting` [B], rows of which tokens wait for a `crop`."""
    if torch.compiler.is_compiling():
        return
    padding = ids < 0
    if bool((padding[:, 1:] & ~padding[:, :-1]).any() or (padding[:, 0] & has_waiting).any()):
        raise ValueError(
            "`attention_mask`: a bounded cache takes padding only before the tokens (pad on the left), got padding "
            "behind tokens."
        )
    if bool(((ids != ids.amax(1, keepdim=True)) & ~padding).any()):
        raise ValueError("`position_ids`: a bounded cache holds one document per row, got several in one.")
