"""Which blocks each query reads: ranks by products with two vectors a block, the best of them exactly, causally.

The sum of mean and bound takes two products, not three: with q = q+ + q- (its positive and its negative part), mean m,
upper and lower bounds u and l, q m + sum max(q u, q l) = q+ (m + u) + q- (m + l). The index keeps m + u and m + l.

Letters: B batch, H query heads, G key/value heads, Q query tokens, N key tokens, n blocks, D head dimension.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .dilation_schedule import DilationSchedule
from .memory_positions import rotate
from .memory_spec import MemorySpec


try:
    import numpy as np
except ImportError:  # slower
    np = None

# What ranks blocks, [B, G, n, 2 d], or [1, G, n, 2 d] for all rows, in parts of blocks that follow each other.
Index = tuple[torch.Tensor, ...]
TILE_SIZE = 2**22  # ranks that are held at once
NO_BLOCK = -1
MANY_ROWS = 4096  # of queries: a CPU multiplies them faster by an index that it has turned round in memory first
FEW_THREADS = 3  # up to which one that is three times as fast is no slower


def outside_graphs(function: Callable) -> Callable:
    """The function as it is, between the graphs of a compiled model: which blocks are chosen depends on values.

    Raises:
        ValueError: in a program that is being exported, which is one graph.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        if torch.compiler.is_exporting():
            raise ValueError("`memory` cannot be exported: its choice of blocks depends on values.")
        return function(*args, **kwargs)

    return torch.compiler.disable(run, reason="a memory's choice of blocks depends on values")


def _rank_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def summarize(key: torch.Tensor, memory: MemorySpec, num_sink_tokens: int, first_block: int = 0) -> torch.Tensor:
    """The index of whole blocks: key [B, G, N, D], whose first token begins block `first_block` -> [B, G, n, 2 D].

    Sink tokens do not count: all queries see them anyway, and they are unlike all others. In float32 at least.
    """
    size, length = memory.block_size, key.shape[2]
    key = key[:, :, : length // size * size].to(_rank_dtype(key.dtype)).unflatten(2, (-1, size))
    mean, high, low = key.mean(3), key.amax(3), key.amin(3)
    partial = num_sink_tokens // size - first_block  # the block that is partly sink tokens
    rest = num_sink_tokens % size
    if rest and 0 <= partial < key.shape[2]:
        tail = key[:, :, partial, rest:]
        mean[:, :, partial], high[:, :, partial], low[:, :, partial] = tail.mean(2), tail.amax(2), tail.amin(2)
    if memory.rank == "mean":
        return torch.cat([mean, mean], dim=-1)
    if memory.rank == "bound":
        return torch.cat([high, low], dim=-1)
    return torch.cat([mean + high, mean + low], dim=-1)


class MemoryBasis(NamedTuple):
    """A few dimensions to rank blocks in, [G, D, d] each: q . k is nearly (q to_query) . (k to_key). The other two are
    for blocks at a clamped distance, or None. Made by `calibrate_memory`."""

    to_query: torch.Tensor
    to_key: torch.Tensor
    far_to_query: torch.Tensor | None = None
    far_to_key: torch.Tensor | None = None


@dataclass(frozen=True)
class Ranking:
    """How blocks are ranked: by the schedule's memory, in the dimensions of a basis, or in all of them (None).

    inv_freq: rotary frequencies, for a memory with `max_distance`.

    Raises:
        ValueError: the memory ranks in fewer dimensions and has no basis, or clamps distances and has no frequencies.
    """

    schedule: DilationSchedule
    inv_freq: torch.Tensor | None = None
    basis: MemoryBasis | None = None

    def __post_init__(self):
        memory = self.schedule.memory
        if memory.max_distance is not None and self.inv_freq is None:
            raise ValueError(
                "`memory`: `max_distance` turns rotary embeddings, and wants their frequencies `inv_freq`, got None."
            )
        if memory.dimensions is not None and self.basis is None:
            raise ValueError(
                f"`memory` ranks in dimensions={memory.dimensions} that were never calibrated: call "
                "`calibrate_memory(model, tokens)`, or leave `dimensions` out to rank in all of them."
            )

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The key/value heads whose blocks are ranked, None for all."""
        return self.schedule.memory.only_heads

    def own(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Of what has one entry for each key/value head along `dim`, those of the heads that have a memory."""
        if self.heads is None:
            return x
        return x.index_select(dim, torch.tensor(self.heads, dtype=torch.long, device=x.device))

    def own_queries(self, query: torch.Tensor, groups: int) -> torch.Tensor:
        """Of queries [B, H, T, D] that share `groups` key/value heads, those of the heads that have a memory."""
        return query if self.heads is None else self.own(query.unflatten(1, (groups, -1))).flatten(1, 2)

    def for_all_queries(self, chosen: torch.Tensor, groups: int) -> torch.Tensor:
        """The blocks [B, H, T, K] of all queries, out of those that the queries of `own_queries` chose: others none."""
        if self.heads is None:
            return chosen
        chosen = chosen.unflatten(1, (len(self.heads), -1))
        every = chosen.new_full((len(chosen), groups, *chosen.shape[2:]), NO_BLOCK)
        every[:, list(self.heads)] = chosen
        return every.flatten(1, 2)

    def _few(self, key: torch.Tensor, name: str) -> torch.Tensor:
        key = key.to(_rank_dtype(key.dtype))
        if self.schedule.memory.dimensions is None:
            return key
        return key @ self._basis(name, key)

    def _basis(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return self.own(getattr(self.basis, name), dim=0).to(like.device, like.dtype)

    def index(self, key: torch.Tensor, first_block: int = 0) -> torch.Tensor:
        """What tells of whole blocks of keys [B, G, N, D], whose first token begins block `first_block`:
        [B, G, n, 2 d], here and below of the heads that have a memory alone."""
        key, sinks = self.own(key), self.schedule.num_sink_tokens
        return summarize(self._few(key, "to_key"), self.schedule.memory, sinks, first_block)

    def far_index(self, key: torch.Tensor, first_block: int = 0) -> torch.Tensor:
        """The same of keys turned back to their blocks' beginnings, for queries that look from `max_distance`."""
        size, sinks = self.schedule.memory.block_size, self.schedule.num_sink_tokens
        start = (torch.arange(key.shape[2], device=key.device) // size + first_block) * size
        key = rotate(self.own(key).to(_rank_dtype(key.dtype)), -start, self.inv_freq)
        return summarize(self._few(key, "far_to_key"), self.schedule.memory, sinks, first_block)

    def far_query(self, query: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Queries [..., D] at `position`, which broadcasts to [...], turned to `max_distance`, in float32 at least."""
        distance = self.schedule.memory.max_distance - position
        return rotate(query.to(_rank_dtype(query.dtype)), distance, self.inv_freq)

    def ranks(
        self, query: torch.Tensor, index: Index, begin: int, end: int, far=False, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of blocks begin, ..., end - 1 of an index, n of them, for queries [B, H, T, D] (turned, if far):
        [B, G, H / G, T, n], written to `out` if there is one."""
        parts = _some_blocks(index, begin, end)
        query = query.to(_rank_dtype(query.dtype)).unflatten(1, (parts[0].shape[1], -1))
        rows = query.flatten(2, 3)
        if self.schedule.memory.dimensions is not None:
            rows = rows @ self._basis("far_to_query" if far else "to_query", rows)
        rows = torch.cat([rows.clamp(min=0), rows.clamp(max=0)], dim=-1)
        if out is None and len(parts) == 1:
            return _times(rows, parts[0]).unflatten(2, query.shape[2:4])
        if out is None:
            out = rows.new_empty(*rows.shape[:2], *query.shape[2:4], end - begin)
        whole, done = out.flatten(2, 3), 0
        for part in parts:
            own = whole[..., done : done + part.shape[2]]
            _times(rows, part, own)
            done += part.shape[2]
        return out


def _count(index: Index) -> int:
    return sum(part.shape[2] for part in index)


def _some_blocks(index: Index, begin: int, end: int) -> list[torch.Tensor]:
    parts = []
    for part in index:
        own = part[:, :, max(begin, 0) : max(end, 0)]
        if own.shape[2] or begin == end:
            parts.append(own)
        begin, end = begin - part.shape[2], end - part.shape[2]
        if end <= 0:
            break
    return parts


def _times(rows: torch.Tensor, part: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """rows [B, G, R, 2 d] times a part of an index, [B, G, R, n]; written to `out`, a view into something wider."""
    if len(part) == len(rows):
        if out is None or len(rows) > 1:
            product = rows @ part.mT
            return product if out is None else out.copy_(product)
        return torch.bmm(rows[0], part[0].mT, out=out[0])[None]
    together = rows.transpose(0, 1).flatten(1, 2) @ part[0].mT  # as one product: no copy of the index for each row
    together = together.unflatten(1, (len(rows), -1)).transpose(0, 1)
    return together if out is None else out.copy_(together)


def _stable_best(ranks: torch.Tensor, count: int) -> torch.Tensor:
    """The indices of the `count` highest along the last dimension; of equal ones the last go first."""
    last = ranks.shape[-1] - 1
    return last - ranks.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _highest(x: torch.Tensor, count: int) -> torch.Tensor:
    """The indices of the `count` highest along the last dimension, in any order."""
    if np is None or x.device.type != "cpu" or torch.get_num_threads() > FEW_THREADS:
        return x.topk(count, sorted=False).indices
    low = x.shape[-1] - count
    # Several times as fast as `topk`, by one thread.
    return torch.from_numpy(np.argpartition(x.detach().numpy(), low, axis=-1)[..., low:])


def best_blocks(ranks: torch.Tensor, count: int) -> torch.Tensor:
    """The blocks of the `count` highest ranks [..., n], rising, NO_BLOCK behind them where fewer are above -inf:
    [..., count].

    The set is exact and the newer of equal blocks wins. One more than `count` is looked for, so that a tie shows: where
    none does, the best lie in those groups of blocks that have the highest maxima, and most ranks are read once.
    """
    n = ranks.shape[-1]
    if n <= count:
        chosen = torch.arange(n, device=ranks.device).masked_fill(ranks == -torch.inf, n)
        return torch.nn.functional.pad(_in_order(chosen, n), (0, count - n), value=NO_BLOCK)
    candidates, values = None, ranks
    group = 1 << int(math.log2(n / count) / 2)  # as many maxima as candidates, nearly
    if group >= 4 and n // group > count:
        # Blocks of a group lie far from each other, so that maxima are those of whole vectors.
        width = n // group
        grouped = ranks[..., : group * width].unflatten(-1, (group, -1))
        groups = _highest(grouped.amax(-2), count + 1)
        steps = torch.arange(group, device=ranks.device)[:, None] * width
        candidates = (groups[..., None, :] + steps).flatten(-2)
        rest = torch.arange(group * width, n, device=ranks.device)
        candidates = torch.cat([candidates, rest.expand(*candidates.shape[:-1], -1)], dim=-1)
        values = ranks.gather(-1, candidates)
    chosen = _highest(values, count + 1)
    values = values.gather(-1, chosen)
    if candidates is not None:
        chosen = candidates.gather(-1, chosen)
    lowest, at = values.min(-1, keepdim=True)
    tied = ((values == lowest).sum(-1) > 1) & (lowest[..., 0] > -torch.inf)
    chosen = chosen.masked_fill_(values == -torch.inf, n)
    chosen = chosen.scatter(-1, at, chosen[..., -1:])[..., :-1]
    if bool(tied.any()):
        chosen[tied] = _stable_best(ranks[tied], count)
    return _in_order(chosen, n)


def _in_order(chosen: torch.Tensor, none: int) -> torch.Tensor:
    """Blocks, rising, NO_BLOCK behind them instead of `none`, which is higher than all."""
    if np is not None and chosen.device.type == "cpu" and torch.get_num_threads() <= FEW_THREADS:
        chosen = chosen.clone()
        chosen.numpy().sort(axis=-1)  # in place
    else:
        chosen = chosen.sort(-1).values
    return chosen.masked_fill_(chosen == none, NO_BLOCK)


def choose_blocks(
    ranking: Ranking,
    query: torch.Tensor,
    index: Index,
    far_index: Index | None,
    query_start: int,
    oldest: int = 0,
) -> torch.Tensor:
    """The blocks that queries at positions query_start, query_start + 1, ... read, rising, -1 behind them for none:
    int64 [B, H, Q, top_k].

    Args:
        query: [B, H, Q, D], of the heads that have a memory alone. index: of all blocks that may be eligible.
            far_index: the same for those at a clamped distance, or None where no query has any.
        oldest: the first block that may be chosen.
    """
    schedule, memory = ranking.schedule, ranking.schedule.memory
    (batch, heads, length, _), size = query.shape, memory.block_size
    if oldest:
        index, far_index = (x and tuple(_some_blocks(x, oldest, _count(x))) for x in (index, far_index))
    blocks = _count(index)
    first = schedule.num_sink_tokens // size - oldest  # blocks before it are sink tokens and nothing else
    chosen = torch.full((batch, heads, length, memory.top_k), NO_BLOCK, dtype=torch.long, device=query.device)
    tile = max(1, TILE_SIZE // max(1, batch * heads * blocks))
    if query.device.type == "cpu" and batch * heads * length >= MANY_ROWS:
        index, far_index = (x and tuple(part.mT.contiguous().mT for part in x) for x in (index, far_index))
    for begin in range(0, length, tile):
        end = min(begin + tile, length)
        low, stop = (min(blocks, schedule.local_start(query_start + i) // size - oldest) for i in (begin, end - 1))
        if stop <= max(0, first):
            continue
        position = torch.arange(query_start + begin, query_start + end, device=query.device)
        ranks = rank_blocks(ranking, query[:, :, begin:end], index, far_index, position, stop, oldest=oldest)
        hide_ineligible(ranks, schedule, schedule.local_start(position), low, oldest)
        chosen[:, :, begin:end] = best_blocks(ranks, memory.top_k).flatten(1, 2)
    return chosen if not oldest else torch.where(chosen >= 0, chosen + oldest, chosen)


def hide_ineligible(
    ranks: torch.Tensor, schedule: DilationSchedule, start: torch.Tensor, settled: int = 0, oldest: int = 0
) -> None:
    """Sets ranks [..., T, n] of blocks from `oldest` on to -inf, in place: of those that are but sink tokens, and of
    those that do not end before the window begins, at `start` [..., T]; the first `settled` end before all of these.
    """
    size, count = schedule.memory.block_size, ranks.shape[-1]
    ranks[..., : max(0, schedule.num_sink_tokens // size - oldest)] = -torch.inf
    if settled < count:
        ends = (torch.arange(settled, count, device=ranks.device) + oldest + 1) * size
        ranks[..., settled:].masked_fill_(ends > start[..., None], -torch.inf)


def rank_blocks(
    ranking: Ranking,
    query: torch.Tensor,
    index: Index,
    far_index: Index | None,
    position: torch.Tensor,
    count: int,
    far_query: torch.Tensor | None = None,
    oldest: int = 0,
) -> torch.Tensor:
    """The ranks [B, G, H / G, T, n] of the first n = `count` blocks of an index, of which the first is block `oldest`,
    for queries [B, H, T, D]; arguments as of `choose_blocks`.

    position: of the queries, [T] or [B, 1, 1, T]. Of blocks on one side of `max_distance` for all queries only that
    side's ranks are computed. far_query: the queries, turned, if they are at hand.
    """
    memory = ranking.schedule.memory
    if far_index is None:
        return ranking.ranks(query, index, 0, count)
    reaches = ((int(x) - memory.max_distance - 1) // memory.block_size + 1 - oldest for x in position.aminmax())
    low, reach = (min(count, max(0, x)) for x in reaches)  # blocks that are far for all queries, and for any
    if not reach:
        return ranking.ranks(query, index, 0, count)
    if far_query is None:
        far_query = ranking.far_query(query, position if position.dim() == 1 else position[:, 0])
    groups = index[0].shape[1]
    shape = len(query), groups, query.shape[1] // groups, query.shape[2], count
    ranks = query.new_empty(shape, dtype=_rank_dtype(query.dtype))
    if low < count:
        ranking.ranks(query, index, low, count, out=ranks[..., low:])
    if low:
        ranking.ranks(far_query, far_index, 0, low, far=True, out=ranks[..., :low])
    if low < reach:
        far = ranking.ranks(far_query, far_index, low, reach, far=True)
        start = (torch.arange(low, reach, device=ranks.device) + oldest) * memory.block_size
        is_far = position[..., None] - start > memory.max_distance
        ranks[..., low:reach] = torch.where(is_far, far, ranks[..., low:reach])
    return ranks
