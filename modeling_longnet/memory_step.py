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


def _shared_tokens(schedule, position, start) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks and window of each row, [B, sinks + span], and which of them there are."""
    sinks = schedule.num_sink_tokens
    span = int((position - start).max()) + 1
    window = position[:, None] - torch.arange(span - 1, -1, -1, device=position.device)
    first = torch.arange(sinks, device=position.device).expand(len(position), sinks)
    seen = torch.cat([first <= position[:, None], window >= start.clamp(min=sinks)[:, None]], dim=1)
    return torch.cat([first, window.clamp(min=0)], dim=1), seen


def attend_step(
    ranking: Ranking,
    query: torch.Tensor,
    gather: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    groups: int,
    index: Index,
    far_index: Index,
    position: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one token a row, [B, H, 1, D], for schedules of a window alone.

    Args:
        query: [B, H, 1, D]. gather: gives keys and values [B, G, ..., D] of the tokens at positions [B, G, ...], those
            of the queries included, for each of the G = `groups` key/value heads.
        index, far_index: of the whole blocks among the tokens, the second at a clamped distance.
        position: of the queries, [B].
    """
    schedule, memory = ranking.schedule, ranking.schedule.memory
    start, last, sinks = schedule.local_start(position), int(position.max()), schedule.num_sink_tokens
    dtype = torch.promote_types(query.dtype, torch.float32)
    clamps = memory.max_distance is not None and last > memory.max_distance
    rows = query.unflatten(1, (groups, -1))[..., 0, :].to(dtype)  # [B, G, h, D]
    far_query = ranking.far_query(query, position[:, None, None]) if clamps else None
    tokens, seen = _shared_tokens(schedule, position, start)
    keys, values = (x.to(dtype) for x in gather(tokens[:, None].expand(-1, groups, -1)))
    scores = rows @ keys.mT * scale
    if clamps:
        far = (position > memory.max_distance)[:, None, None, None]
        far_rows = far_query.unflatten(1, (groups, -1))[..., 0, :]
        scores[..., :sinks] = torch.where(far, far_rows @ keys[:, :, :sinks].mT * scale, scores[..., :sinks])
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if int(start.max()) < memory.block_size:
        return (scores.softmax(-1) @ values).flatten(1, 2).unsqueeze(2).to(query.dtype)
    chosen = _choose(ranking, query, far_query, index, far_index if clamps else None, position, start)
    begin = chosen.clamp(min=0) * memory.block_size
    tokens = begin[..., None] + torch.arange(memory.block_size, device=keys.device)  # [B, G, h, K, b]
    own_keys, own_values = (x.to(dtype) for x in gather(tokens))
    rows = rows[..., None, :].expand(*begin.shape, -1)  # a query for each block
    if clamps:
        distance = memory.max_distance - position[:, None, None, None] + begin
        rows = rotate(rows, distance.clamp(max=0), ranking.inv_freq)
    own = (own_keys @ rows[..., None])[..., 0] * scale
    hidden = (chosen < 0)[..., None] | (tokens < sinks)
    own = own.masked_fill(hidden, -torch.inf).flatten(-2)
    weights = torch.cat([scores, own], dim=-1).softmax(-1)
    shared = weights[..., : scores.shape[-1]] @ values
    out = shared + (weights[..., None, scores.shape[-1] :] @ own_values.flatten(-3, -2))[..., 0, :]
    return out.flatten(1, 2).unsqueeze(2).to(query.dtype)
