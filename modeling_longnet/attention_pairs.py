"""Attention through a matrix of counts, N x N: for the weights themselves, and for masks that say who may see whom.

Letters: B batch, H query heads, G key/value heads, N tokens (of the keys), Q tokens of the queries, D head dimension.
"""

import torch

from .dilation_schedule import DilationSchedule, Heads
from .document_ids import document_positions


def attention_counts(
    schedule: DilationSchedule,
    heads: Heads,
    document_ids: torch.Tensor,
    query_offset: int | torch.Tensor,
    query_length: int,
    pair_mask: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many patterns offer each key to each query, [B, H, Q, N], and how many zero keys do, [B, H, Q].

    In place of documents, `pair_mask` [B, Q, N] may say who may look at whom, and `position` [B, N] where each token
    stands: then the texts that share a prefix, or branch like a tree, need not lie in a row.
    """
    device = document_ids.device
    rows = query_offset + torch.arange(query_length, device=device)
    if pair_mask is None:
        position, start = document_positions(document_ids)
        visible = (start[:, rows, None] == start[:, None, :]) & (document_ids >= 0)[:, rows, None]  # [B, Q, N]
    else:
        visible = pair_mask
    q_pos, k_pos = position[:, rows, None], position[:, None, :]
    length = visible.sum(-1)  # of the query's document, [B, Q]
    if schedule.is_causal:
        visible = visible & (k_pos <= q_pos)
    counts = torch.zeros(len(document_ids), heads.num_heads, query_length, document_ids.shape[1], device=device)
    zeros = torch.zeros(counts.shape[:3], device=device)
    for i, (w, r) in enumerate(schedule.patterns):
        offsets = [heads.offset(schedule, r, j) for j in range(heads.num_heads)]
        offset = torch.tensor(offsets, device=device)[:, None, None]
        selects = (position % w % r)[:, None, None] == offset  # [B, H, 1, N]
        selected_query = selects[:, :, 0, rows, None]  # [B, H, Q, 1]
        same_segment = (q_pos // w == k_pos // w)[:, None]
        offered = visible[:, None] & same_segment & selects & selected_query
        if i == 0 and schedule.window:
            near = (k_pos > q_pos - schedule.window) | (q_pos < schedule.dense_start)
            offered = (visible & near)[:, None].expand_as(offered)
        counts += offered
        if schedule.padding == "zeros":
            rows_of_segment = -(-length.clamp(max=w) // r)[:, None]
            zeros += (rows_of_segment - offered.sum(-1)) * selected_query[..., 0]
    if schedule.overlap == "once":
        counts = counts.clamp(max=1)
    sinks = visible & (k_pos < schedule.num_sink_tokens)
    return torch.where(sinks[:, None], 1.0, counts), zeros


def attend_pairs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    schedule: DilationSchedule,
    *,
    scale: float,
    dropout: float = 0.0,
    document_ids: torch.Tensor | None = None,
    query_offset: int | torch.Tensor | None = None,
    pair_mask: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [B, H, Q, D] and attention weights [B, H, Q, N] in the dtype of the inputs; the arguments are those of
    `dilated_attention` and `attention_counts`."""
    (batch, _, query_length, _), length, heads = query.shape, key.shape[2], Heads.of(query, key)
    if document_ids is None:
        document_ids = query.new_zeros(batch, length, dtype=torch.long)
    offset = length - query_length if query_offset is None else query_offset
    counts, zeros = attention_counts(
        schedule, heads, document_ids, offset, query_length, pair_mask=pair_mask, position=position
    )
    counts, zeros = counts.to(query.dtype), zeros.to(query.dtype)
    key, value = (x.repeat_interleave(heads.per_group, dim=1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(counts == 0, -torch.inf)
    # The zero keys have logit 0, so the maximum is at least that; a query that sees nothing gets a finite one as well.
    maximum = torch.where(zeros > 0, scores.amax(-1).clamp(min=0), scores.amax(-1)).detach()
    maximum = maximum.masked_fill(maximum == -torch.inf, 0)
    weights = counts * (scores - maximum[..., None]).exp()
    total = weights.sum(-1) + zeros * (-maximum).exp()
    weights = weights / total.masked_fill(total == 0, 1)[..., None]
    return torch.nn.functional.dropout(weights, dropout) @ value, weights
