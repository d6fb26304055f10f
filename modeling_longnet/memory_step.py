"""One new token a row, each row at a position of its own: the keys it sees are gathered, and attended to in one go.

Letters: B batch, H query heads, G key/value heads, h = H / G, N room for tokens, n blocks of b tokens, K chosen blocks,
D head dimension, d dimensions ranked in.
"""

import torch

from .memory_positions import rotate
from .memory_search import Index, Ranking, best_blocks, hide_ineligible, rank_blocks
from .memory_split import Store
from .memory_store import Pair


def _choose(ranking: Ranking, query, far_query, index, far_index, position, starts: list[int]) -> torch.Tensor:
    """Blocks [B, G, h, K] of queries [B, H, 1, D] at `position` [B], whose windows begin at `starts`, B of them."""
    memory, start = ranking.schedule.memory, ranking.schedule.local_start(position)
    settled, count = (x // memory.block_size for x in (min(starts), max(starts)))
    ranks = rank_blocks(ranking, query, index, far_index, position[:, None, None, None], count, far_query)
    hide_ineligible(ranks, ranking.schedule, start[:, None, None, None], settled)
    return best_blocks(ranks[..., 0, :], memory.top_k)


def _shared_tokens(ranking: Ranking, groups: int, position, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks and window of each row, [B, sinks + span], and which of them a key/value head sees, [B, G, sinks + span].

    The window reaches to a block's beginning for those that have a memory.
    """
    schedule, sinks = ranking.schedule, ranking.schedule.num_sink_tokens
    start = schedule.local_start(position)
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


def _shared_parts(
    store: Store, tokens: torch.Tensor, groups: int, sinks: int, places: list[int], starts: list[int]
) -> list[Pair]:
    """Keys and values [B, G, S, D] of tokens [B, sinks + span], sinks first, in parts. Those of rows that stand at one
    position lie side by side, and are not copied."""
    if len(set(places)) == 1 and sinks <= places[0]:
        return [store.span(slice(None), *ends) for ends in ((0, sinks), (starts[0], places[0] + 1))]
    return [store.gather(tokens[:, None].expand(-1, groups, -1))]


def _weighted(weights: torch.Tensor, parts: list[Pair]) -> torch.Tensor:
    """Weights [B, G, h, S] of all parts' tokens times their values: [B, G, h, D]."""
    own = weights.split([value.shape[2] for _, value in parts], dim=-1)
    return sum(x @ value.to(x.dtype) for x, (_, value) in zip(own, parts))


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
    store: Store,
    groups: int,
    index: Index,
    far_index: Index,
    position: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one token a row, [B, H, 1, D], for schedules of a window alone.

    Args:
        query: [B, H, 1, D]. store: keys and values of all tokens, those of the queries included, whose rows are joint.
            groups: G, the key/value heads.
        index, far_index: of the whole blocks among the tokens, the second at a clamped distance.
        position: of the queries, [B].
    """
    schedule, memory = ranking.schedule, ranking.schedule.memory
    places, sinks = position.tolist(), schedule.num_sink_tokens  # once: a GPU is waited for
    starts = [schedule.local_start(place) for place in places]
    span = max(place - start for place, start in zip(places, starts)) + 1
    dtype = torch.promote_types(query.dtype, torch.float32)
    clamps = memory.max_distance is not None and max(places) > memory.max_distance
    rows = query.unflatten(1, (groups, -1))[..., 0, :].to(dtype)  # [B, G, h, D]
    far_query = ranking.far_query(query, position[:, None, None]) if clamps else None
    tokens, seen = _shared_tokens(ranking, groups, position, span)
    parts = _shared_parts(store, tokens, groups, sinks, places, starts)
    scores = torch.cat([rows @ key.to(dtype).mT for key, _ in parts], dim=-1) * scale
    if clamps:
        far = (position > memory.max_distance)[:, None, None, None]
        far_rows = far_query.unflatten(1, (groups, -1))[..., 0, :]
        far_scores = far_rows @ parts[0][0][:, :, :sinks].to(dtype).mT * scale
        scores[..., :sinks] = torch.where(far, far_scores, scores[..., :sinks])
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    if max(starts) < memory.block_size or ranking.heads == ():
        return _weighted(scores.softmax(-1), parts).flatten(1, 2).unsqueeze(2).to(query.dtype)
    own_query, own_far = (None if x is None else ranking.own_queries(x, groups) for x in (query, far_query))
    chosen = _choose(ranking, own_query, own_far, index, far_index if clamps else None, position, starts)
    own, own_values = _read(ranking, ranking.own(rows), clamps, store.gather, chosen, position, scale)
    has_memory = slice(None) if ranking.heads is None else list(ranking.heads)
    read = scores.new_full((*scores.shape[:-1], own.shape[-1]), -torch.inf)
    read[:, has_memory] = own
    weights = torch.cat([scores, read], dim=-1).softmax(-1)
    out = _weighted(weights[..., : scores.shape[-1]], parts)
    out[:, has_memory] += (weights[:, has_memory, :, None, scores.shape[-1] :] @ own_values)[..., 0, :]
    return out.flatten(1, 2).unsqueeze(2).to(query.dtype)
