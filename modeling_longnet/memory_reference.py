"""Attention with a memory by its definition, in N x N memory: every fast path is tested against this file.

Letters: B batch, H query heads, G key/value heads, Q query tokens, N key tokens, n blocks, D head dimension.
"""

import torch

from .attention_pairs import attention_counts
from .dilation_schedule import DilationSchedule, Heads
from .memory_positions import rotate


def rank_blocks(query: torch.Tensor, key: torch.Tensor, schedule: DilationSchedule) -> torch.Tensor:
    """The rank of each whole block for each query: query [H, Q, D], key [H, N, D] -> [H, Q, n]."""
    size, sinks = schedule.memory.block_size, schedule.num_sink_tokens
    ranks = []
    for start in range(0, key.shape[1] // size * size, size):
        block = key[:, max(start, min(sinks, start + size - 1)) : start + size]
        mean = (query * block.mean(1, keepdim=True)).sum(-1)
        low, high = (query * bound[:, None] for bound in (block.amin(1), block.amax(1)))
        bound = torch.maximum(low, high).sum(-1)
        ranks.append({"mean": mean, "bound": bound, "mean+bound": mean + bound}[schedule.memory.rank])
    return torch.stack(ranks, dim=-1) if ranks else query.new_zeros(*query.shape[:2], 0)


def _choose(near, far, schedule, positions) -> torch.Tensor:
    """The chosen blocks [H, Q, top_k], newest first among equals, -1 for none, from ranks [H, Q, n]."""
    memory, count = schedule.memory, near.shape[-1]
    start = torch.arange(count, device=near.device) * memory.block_size
    t = positions[:, None]
    if far is not None:
        near = torch.where(t - start > memory.max_distance, far, near)
    end = start + memory.block_size
    eligible = (end <= schedule.local_start(t)) & (end > schedule.num_sink_tokens)
    near = near.masked_fill(~eligible, -torch.inf)
    order = count - 1 - near.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    order = torch.where(near.gather(-1, order) == -torch.inf, -1, order)[..., : memory.top_k]
    return torch.nn.functional.pad(order, (0, memory.top_k - order.shape[-1]), value=-1)


def _has_memory(schedule: DilationSchedule, heads: Heads, query: torch.Tensor) -> torch.Tensor:
    """Which query heads choose blocks, bool [H, 1, 1]."""
    only = schedule.memory.only_heads
    chooses = [only is None or j // heads.per_group in only for j in range(query.shape[1])]
    return torch.tensor(chooses, device=query.device)[:, None, None]


def memory_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    schedule: DilationSchedule,
    query_start: int,
    *,
    scale: float | None = None,
    heads: Heads | None = None,
    inv_freq: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One document: the queries at positions query_start, query_start + 1, ... over the keys at 0..N-1.

    Args:
        query: [B, H, Q, D]. key, value: [B, G, N, D].
        schedule: with a memory.
        inv_freq: the rotary frequencies, for a memory with `max_distance`.
        chosen: the blocks to read, [B, H, Q, top_k], instead of those that rank highest.

    Returns:
        out [B, H, Q, D], the log-sum-exp [B, H, Q] and the chosen blocks [B, H, Q, top_k].
    """
    memory, (batch, _, length, width), keys = schedule.memory, query.shape, key.shape[2]
    heads = heads or Heads.of(query, key)
    scale = width**-0.5 if scale is None else scale
    key, value = (x.repeat_interleave(heads.per_group, dim=1) for x in (key, value))
    positions = torch.arange(query_start, query_start + length, device=query.device)
    k_pos = torch.arange(keys, device=query.device)
    start = k_pos // memory.block_size * memory.block_size
    scores, far_query, far_key = query @ key.mT * scale, None, None
    t = positions[:, None]
    if memory.max_distance is not None:
        far_query = rotate(query, (memory.max_distance - positions).expand(query.shape[:3]), inv_freq)
        far_key = rotate(key, -start.expand(key.shape[:3]), inv_freq)
        sees_far = t - start > memory.max_distance
        far_scores = far_query @ far_key.mT * scale
        sink_scores = far_query @ key.mT * scale  # sinks keep the order in which they stand
    if chosen is None:
        with torch.no_grad():
            rows = []
            for b in range(batch):
                far = None if far_query is None else rank_blocks(far_query[b], far_key[b], schedule)
                rows.append(_choose(rank_blocks(query[b], key[b], schedule), far, schedule, positions))
            chosen = torch.stack(rows)
    ids = k_pos.new_zeros(1, keys)
    counts, _ = attention_counts(schedule, heads, ids, query_start, length)
    has_memory = _has_memory(schedule, heads, query)
    chosen = torch.where(has_memory, chosen, -1)
    local = (k_pos <= t) & (k_pos >= schedule.local_start(t))
    shown = (counts[0] > 0) | (local & has_memory)  # [H, Q, N]
    picked = (chosen[..., None] == k_pos // memory.block_size).any(-2)  # [B, H, Q, N]
    if memory.max_distance is not None:
        scores = torch.where(picked & ~shown & sees_far, far_scores, scores)
        sinks = (k_pos < schedule.num_sink_tokens) & (t > memory.max_distance)
        scores = torch.where(sinks, sink_scores, scores)
    scores = scores.masked_fill(~(picked | shown), -torch.inf)
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout)
    return weights @ value, scores.logsumexp(-1), chosen
