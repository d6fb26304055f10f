"""One new token a row, each row at a position of its own: the keys it sees are gathered, and attended to in one go.

Letters: B batch, H query heads, G key/value heads, h = H / G, N room for tokens, n blocks of b tokens, K chosen blocks,
D head dimension, d dimensions ranked in.
"""

from collections.abc import Callable

import torch

from .memory_positions import rotate
from .memory_search import Index, Ranking, best_blocks, hide_ineligible, rank_blocks


def _choose(ranking: Ranking, query, far_query, index, far_index, position, start) -> torch.Tensor:
    """Blocks [B, G, h, K] of queries [B, H, 1, D] at `position` [B], whose windows begin at `start` [B]."""
    memory = ranking.schedule.memory
    settled, count = (int(x) // memory.block_size for x in start.aminmax())
    ranks = rank_blocks(ranking, query, index, far_index, position[:, None, None, None], count, far_query)
    hide_ineligible(ranks, ranking.schedule, start[:, None, None, None], settled)
    return best_blocks(ranks[..., 0, :], memory.top_k)


def _shared_tokens(ranking: Ranking, groups: int, position, start) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks and window of each row, [B, sinks + span], and which of them a key/value head sees, [B, G, sinks + span].

    The window reaches to a block's beginning for those that have a memory.
    """
    schedule, sinks = ranking.schedule, ranking.schedule.num_sink_tokens
    span = int((position - start).max()) + 1
    window = position[:, None] - torch.arange(span - 1, -1, -1, device=position.device)
    first = torch.arange(sinks, device=position.device).expand(len(position), sinks)
    begins = start[:, None].repeat(1, groups)
    if ranking.heads is not None:
        others = [group for group in range(groups) if group not in ranking.heads]
        alone = (position - schedule.window + 1).masked_fill(position < schedule.dense_start, 0)
        begins[:, others] = alone[:, None]
    near = window[:, None] >= begins.clamp(min=sinks)[..., None]
    seen = torch.cat([(first <= position[:, None])[:, None].expand(-1, groups, -1), near], dim=-1)
    return torch.cat([first, window.clamp(min=0)], dim=1), seen


def _read(ranking: Ranking, query, clamps: bool, gather, chosen, position, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, g, h, K b] of the tokens of chosen blocks [B, g, h, K], for the g heads that have a memory, and their
    values [B, g, h, K b, D]; queries [B, g, h, D], turned by block where it clamps distances."""
    memory = ranking.schedule.memory
    begin = chosen.clamp(min=0) * memory.block_size
    tokens = begin[..., None] + torch.arange(memory.block_size, device=query.device)  # [B, g, h, K, b]
    keys, values = (x.to(query.dtype) for x in gather(tokens, ranking.heads))
    rows = query[..., None, :].expand(*begin.shape, -1)  # a query for each block
    if clamps:
        distance = memory.max_distance - position[:, None, None, None] + begin
        rows = rotate(rows, distance.clamp(max=0), ranking.inv_freq)
    logits = (keys @ rows[..., None])[..., 0] * scale
    hidden = (chosen < 0)[..., None] | (tokens < ranking.schedule.num_sink_tokens)
    return logits.masked_fill(hidden, -torch.inf).flatten(-2), values.flatten(-3, -2)


def attend_step(
    ranking: Ranking,
    query: torch.Tensor,
    gather: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    groups: int,
    index: Index,
    far_index: Index,
    position: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one token a row, [B, H, 1, D], for schedules of a window alone.

    Args:
        query: [B, H, 1, D]. gather: gives keys and values [B, g, ..., D] of the tokens at positions [B, g, ...], those
            of the queries included, for each of the G = `groups` key/value heads, or for those that are named.
        index, far_index: of the whole blocks among the tokens, the second at a clamped distance.
        position: of the queries, [B].
    """
    schedule, memory = ranking.schedule, ranking.schedule.memory
    start, last, sinks = schedule.local_start(position), int(position.max()), schedule.num_sink_tokens
    dtype = torch.promote_types(query.dtype, torch.float32)
    clamps = memory.max_distance is not None and last > memory.max_distance
    rows = query.unflatten(1, (groups, -1))[..., 0, :].to(dtype)  # [B, G, h, D]
    far_query = ranking.far_query(query, position[:, None, None]) if clamps else None
    tokens, seen = _shared_tokens(ranking, groups, position, start)
    keys, values = (x.to(dtype) for x in gather(tokens[:, None].expand(-1, groups, -1)))
    scores = rows @ keys.mT * scale
    if clamps:
        far = (position > memory.max_distance)[:, None, None, None]
        far_rows = far_query.unflatten(1, (groups, -1))[..., 0, :]
        scores[..., :sinks] = torch.where(far, far_rows @ keys[:, :, :sinks].mT * scale, scores[..., :sinks])
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    if int(start.max()) < memory.block_size or ranking.heads == ():
        return (scores.softmax(-1) @ values).flatten(1, 2).unsqueeze(2).to(query.dtype)
    own_query, own_far = (None if x is None else ranking.own_queries(x, groups) for x in (query, far_query))
    chosen = _choose(ranking, own_query, own_far, index, far_index if clamps else None, position, start)
    own, own_values = _read(ranking, ranking.own(rows), clamps, gather, chosen, position, scale)
    has_memory = slice(None) if ranking.heads is None else list(ranking.heads)
    read = scores.new_full((*scores.shape[:-1], own.shape[-1]), -torch.inf)
    read[:, has_memory] = own
    weights = torch.cat([scores, read], dim=-1).softmax(-1)
    out = weights[..., : scores.shape[-1]] @ values
    out[:, has_memory] += (weights[:, has_memory, :, None, scores.shape[-1] :] @ own_values)[..., 0, :]
    return out.flatten(1, 2).unsqueeze(2).to(query.dtype)
