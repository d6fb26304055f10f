"""The definition, naively: a matrix of counts, one softmax. Every fast path is tested against this file, which knows
nothing of them: it imports torch alone.

Letters: B batch, H query heads, G key/value heads, N tokens (of the keys), Q tokens of the queries, D head dimension,
w segment length, r dilation rate, s offset of a head.
"""

import torch


CHOICES = {
    "head_offsets": ("modulo", "contiguous"), "overlap": ("count", "once"), "padding": ("mask", "zeros"),
    "local": ("segment", "sliding"),
}  # fmt: skip


class _Schedule:
    def __init__(self, **settings):
        self.__dict__ = settings
        wrong = [name for name, known in CHOICES.items() if settings[name] not in known]
        if wrong or len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(f"this is no schedule ({', '.join(wrong) or 'lengths and rates differ'}): {settings}.")


def _read_documents(document_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of each token in its document, [B, N], and who is in one document with whom, [B, N, N].

    A document is a run of equal ids in a row; a negative id is padding, which sees nothing.
    """
    starts = [[] for _ in document_ids]
    for row, found in zip(document_ids.tolist(), starts):
        for i, document in enumerate(row):
            found.append(found[-1] if i and document == row[i - 1] else i)
    start = torch.tensor(starts, dtype=torch.long, device=document_ids.device)
    position = torch.arange(document_ids.shape[1], device=start.device) - start
    return position, (start[:, :, None] == start[:, None, :]) & (document_ids >= 0)[:, :, None]


def attention_counts(
    schedule,
    num_heads: int,
    document_ids: torch.Tensor,
    query_offset: int | torch.Tensor,
    query_length: int,
    head_index_offset: int = 0,
    total_num_heads: int | None = None,
    pair_mask: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many patterns offer each key to each query, [B, H, Q, N], and how many zero keys do, [B, H, Q].

    In place of documents, `pair_mask` [B, Q, N] may say who may look at whom, and `position` [B, N] where each token
    stands: then the texts that share a prefix, or branch like a tree, need not lie in a row. `schedule` has the fields
    of a [`DilationSchedule`].
    """
    rows = query_offset + torch.arange(query_length, device=(document_ids if position is None else position).device)
    if pair_mask is None:
        position, together = _read_documents(document_ids)
        pair_mask = together[:, rows]
    q, k = position[:, rows, None], position[:, None, :]
    visible, length = pair_mask, pair_mask.sum(-1)  # `length` is that of the query's document, [B, Q]
    if schedule.is_causal:
        visible = visible & (k <= q)
    counts, zeros = [], []
    for j in range(head_index_offset, head_index_offset + num_heads):
        count, zero = torch.zeros(visible.shape, device=q.device), torch.zeros(length.shape, device=q.device)
        for i, (w, r) in enumerate(zip(schedule.segment_lengths, schedule.dilation_rates)):
            s = j % r if schedule.head_offsets == "modulo" else j // -(-(total_num_heads or num_heads) // r)
            selects_query = q % w % r == s
            offers = visible & (q // w == k // w) & selects_query & (k % w % r == s)
            if schedule.padding == "zeros":
                zero += (-(-length.clamp(max=w) // r) - offers.sum(-1)) * selects_query[..., 0]
            if i == 0 and schedule.local == "sliding":
                offers = visible & ((q - k < max(1, w // 2)) | (q < w))
            count += offers
        if schedule.overlap == "once":
            count = count.clamp(max=1)
        counts.append(torch.where(visible & (k < schedule.num_sink_tokens), 1.0, count))
        zeros.append(zero)
    return torch.stack(counts, dim=1), torch.stack(zeros, dim=1)


def dilated_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment_lengths: list[int],
    dilation_rates: list[int],
    *,
    is_causal: bool = True,
    scale: float | None = None,
    head_offsets: str = "modulo",
    overlap: str = "count",
    num_sink_tokens: int = 0,
    padding: str = "mask",
    local: str = "segment",
    dropout: float = 0.0,
    head_index_offset: int = 0,
    total_num_heads: int | None = None,
    document_ids: torch.Tensor | None = None,
    query_offset: int | torch.Tensor | None = None,
    pair_mask: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Dilated attention by its definition, in N x N memory and in the dtype of the inputs, float64 included.

    The arguments are those of `dilated_attention`, and `attention_counts`'s pair_mask and position; so is the result:
    out [B, H, Q, D], then the log-sum-exp [B, H, Q] if `return_lse`, then the attention weights [B, H, Q, N] if
    `return_weights`.
    """
    schedule = _Schedule(
        segment_lengths=segment_lengths, dilation_rates=dilation_rates, is_causal=is_causal, head_offsets=head_offsets,
        overlap=overlap, num_sink_tokens=num_sink_tokens, padding=padding, local=local,
    )  # fmt: skip
    (batch, num_heads, query_length, width), length = query.shape, key.shape[2]
    if document_ids is None:
        document_ids = torch.zeros(batch, length, dtype=torch.long, device=query.device)
    offset = length - query_length if query_offset is None else query_offset
    counts, zeros = attention_counts(
        schedule, num_heads, document_ids, offset, query_length, head_index_offset, total_num_heads, pair_mask, position
    )
    counts, zeros = counts.to(query.dtype), zeros.to(query.dtype)
    key, value = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * (width**-0.5 if scale is None else scale)
    scores = scores.masked_fill(counts == 0, -torch.inf)
    # The zero keys have logit 0, so the maximum is at least that; a query that sees nothing gets a finite one as well.
    maximum = torch.where(zeros > 0, scores.amax(-1).clamp(min=0), scores.amax(-1)).detach()
    maximum = maximum.masked_fill(maximum == -torch.inf, 0)
    weights = counts * (scores - maximum[..., None]).exp()
    total = weights.sum(-1) + zeros * (-maximum).exp()
    weights = weights / total.masked_fill(total == 0, 1)[..., None]
    out = torch.nn.functional.dropout(weights, dropout) @ value
    extras = (total.log() + maximum,) * return_lse + (weights,) * return_weights
    return (out, *extras) if extras else out
