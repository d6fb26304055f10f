"""Padding masks and restarting positions, read as document ids: which tokens belong together.

Letters: B batch, Q tokens of the queries, N tokens of the keys (cached ones first).
"""

import torch
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from .dilated_attention_reference import document_positions


def query_extent(
    past_key_values: Cache | None, query_length: int, device: torch.device, is_causal: bool = True
) -> tuple[int | torch.Tensor, int]:
    """Index of the first query among the keys (a 0-dim tensor for a static cache in use), and N.

    Raises:
        ValueError: for a bidirectional model with a cache that holds room for later tokens, which it would see.
    """
    if past_key_values is None:
        return 0, query_length
    offset = past_key_values.get_seq_length()
    if isinstance(offset, torch.Tensor):
        offset = offset.to(device) + 0  # a copy: the first layer's update moves the cache's own tensor on
    key_length = past_key_values.get_mask_sizes(query_length, 0)[0]
    if not is_causal and (isinstance(offset, torch.Tensor) or key_length != offset + query_length):
        raise ValueError(
            "`past_key_values` of a bidirectional model must hold nothing but its tokens, got "
            f"{type(past_key_values).__name__} with room for {key_length}."
        )
    return offset, key_length


def _check_attention_mask(attention_mask: torch.Tensor, batch_size: int, length: int, key_length: int) -> None:
    if attention_mask.dim() == 4 and not attention_mask.is_floating_point() and attention_mask.dtype != torch.bool:
        if attention_mask.shape == (batch_size, 1, 1, key_length):
            return
    if attention_mask.dim() != 2:
        raise ValueError(
            "`attention_mask` must have shape [batch, tokens] and tell padding (0) from tokens (1): dilated attention "
            f"has no dense mask to combine another one with, got shape {tuple(attention_mask.shape)}."
        )
    if attention_mask.shape[0] != batch_size or not length <= attention_mask.shape[1] <= key_length:
        raise ValueError(
            f"`attention_mask` must have shape {(batch_size, length)}, the cached tokens included, got "
            f"{tuple(attention_mask.shape)}."
        )


def _refuse_padding_between_tokens(real: torch.Tensor, restarts: torch.Tensor) -> None:
    """`real`, `restarts` [B, N]. A row's tokens lie side by side, unless a document that restarts at 0 follows."""
    rises = real[:, 1:] & ~real[:, :-1]
    earlier = real.cumsum(1)[:, :-1] > 0
    if not is_tracing(real) and (rises & earlier & ~restarts[:, 1:]).any():
        raise ValueError(
            "`attention_mask` has padding between the tokens of a row (right padding that is then continued gives "
            "that too). Pad on the left, or pass `position_ids` that restart at 0 where a new document begins."
        )


def find_document_ids(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    *,
    batch_size: int,
    query_length: int,
    query_offset: int | torch.Tensor,
    key_length: int,
) -> torch.Tensor | None:
    """Ids [B, N] of the keys' documents, or None when all is one document and nothing has to be masked.

    A new document begins where `position_ids` do not go on by one. When a row's positions say that its document
    began after the first cached token, what lies before it is another document (or padding) and is hidden.

        attention_mask  0 0 1 1 1 1        position_ids  0 1 2 0 1 0
        document_ids   -1-1 0 0 0 0        document_ids  0 0 0 1 1 2

    Args:
        attention_mask: [B, query_offset + Q], 1 for tokens, 0 for padding; or what this function made of one, as an
            integer tensor [B, 1, 1, N].
        position_ids: [B, Q] or [1, Q].
        query_offset: index of the first query among the keys; a 0-dim tensor for static caches.
        key_length: N. Beyond the last query there may be room that a static cache has not filled yet.

    Raises:
        ValueError: for masks of another shape, and for padding in the middle of a document.
    """
    length = query_offset + query_length if isinstance(query_offset, int) else query_length
    if attention_mask is not None:
        _check_attention_mask(attention_mask, batch_size, length, key_length)
        if attention_mask.dim() == 4:
            return attention_mask[:, 0, 0]
    elif position_ids is None:
        return None
    device = (attention_mask if position_ids is None else position_ids).device
    shape = (batch_size, key_length)
    begins, restarts = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
    first = torch.zeros(batch_size, 1, dtype=torch.long, device=device)  # index at which the queries' documents begin
    if position_ids is not None:
        position_ids = position_ids.expand(batch_size, -1)
        slots = query_offset + torch.arange(query_length, device=device)
        jumps = position_ids.diff(dim=1) != 1
        if not isinstance(query_offset, int) or query_offset > 0:
            first = (slots[0] - position_ids[:, :1]).clamp(min=0)
        if attention_mask is None and not is_tracing(jumps) and not (jumps.any() or first.any()):
            return None
        begins = begins.index_copy(1, slots[1:], jumps)
        restarts = restarts.index_copy(1, slots, position_ids == 0)
    real = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask is not None:
        # What a static cache has not filled yet looks like the last token; causality hides it.
        unfilled = key_length - attention_mask.shape[1]
        real = torch.cat([attention_mask, attention_mask[:, -1:].expand(-1, unfilled)], dim=1).bool()
        _refuse_padding_between_tokens(real, restarts)
    real = real & (torch.arange(key_length, device=device) >= first)
    document_ids = torch.where(real, begins.cumsum(1), -1)
    if not is_tracing(document_ids) and not document_ids.any():
        return None
    return document_ids


def query_positions(
    document_ids: torch.Tensor | None, query_offset: int | torch.Tensor, query_length: int, device: torch.device
) -> torch.Tensor:
    """Position of each query in its document, [B, Q] (or [1, Q] without ids); 0 for padding."""
    slots = query_offset + torch.arange(query_length, device=device)
    if document_ids is None:
        return slots[None]
    return document_positions(document_ids)[0].masked_fill(document_ids < 0, 0)[:, slots]
