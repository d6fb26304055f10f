"""Attention with a memory: the schedule's blocks by fused kernels, chosen blocks by pieces, one softmax over both.

Forward and backward keep what dilated_attention.py keeps: query, key, value, out, lse, and here the choice. The
backward replays both parts with the final out and lse. Letters: B batch, H query heads, G key/value heads, Q query
tokens, N key tokens, K reads of a query, n blocks of b tokens, D head dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .attention_blocks import (
    BlockAttention,
    PlannedAttention,
    connected_zeros,
    empty_accumulator,
    merge_attentions,
    plan_of,
)
from .attention_kernels import get_kernel, own_precision
from .dilation_plan import SINKS, Block
from .dilation_schedule import DilationSchedule, Heads
from .memory_fetching import StoredKeys
from .memory_pieces import PieceAttention, Stretch
from .memory_positions import rotate
from .memory_reference import memory_attention_reference
from .memory_rows import RowAttention
from .memory_search import NO_BLOCK, Index, MemoryBasis, Ranking, choose_blocks, outside_graphs
from .memory_split import Store
from .memory_store import whole_blocks


FETCHED = 2**18  # tokens that one stretch of queries may have fetched for it
SINK_TILE = 1024  # queries that look at the sink tokens in one go, and stay near the core


@dataclass(frozen=True)
class MemoryCall:
    """One document: queries at positions start, start + 1, ..., keys at 0..N-1; and how to attend."""

    ranking: Ranking
    start: int
    heads: Heads
    scale: float
    backend: str

    @property
    def schedule(self) -> DilationSchedule:
        return self.ranking.schedule

    @property
    def inv_freq(self) -> torch.Tensor | None:
        return self.ranking.inv_freq

    @property
    def groups(self) -> Sequence[int]:
        """The key/value heads that have a memory."""
        return range(self.heads.num_kv_heads) if self.ranking.heads is None else self.ranking.heads

    def positions(self, query_length: int, device: torch.device) -> torch.Tensor:
        """Of the queries, [Q]."""
        return torch.arange(self.start, self.start + query_length, device=device)

    def shown(self, query: torch.Tensor, length: int, backward: bool = False) -> PlannedAttention:
        """The attention to the schedule's part of N = `length` keys, by the same blocks whatever holds the keys: every
        store gives the bits of the device. Sinks are read apart where their distance is clamped."""
        kernel, stop = get_kernel(self.backend, query), self.start + query.shape[2]
        blocks = plan_of(kernel, self.schedule, self.heads, self.start, stop, length, backward=backward)
        if self.clamps(query.shape[2]):
            blocks = tuple(x for x in blocks if x.pattern != SINKS)
        return PlannedAttention(kernel, blocks, self.start, self.scale)

    def clamps(self, query_length: int) -> bool:
        """Whether any of the queries lies beyond the clamped distance."""
        limit = self.schedule.memory.max_distance
        return limit is not None and self.start + query_length - 1 > limit

    def far_query(self, query: torch.Tensor) -> torch.Tensor:
        """The queries turned to the clamped distance from wherever they stand."""
        return self.ranking.far_query(query, self.positions(query.shape[2], query.device))

    def reads(self, chosen: torch.Tensor, begin: int, blocks: int) -> torch.Tensor:
        """The chosen blocks [H, T, top_k] of queries begin, begin + 1, ... and the one that the window begins in,
        [H, T, K]; NO_BLOCK for none, n = `blocks` more for one at a clamped distance."""
        memory, window, (heads, length, _) = self.schedule.memory, self.schedule.window, chosen.shape
        start = self.start + begin
        position = torch.arange(start, start + length, device=chosen.device)
        first = self.schedule.local_start(position)
        cut = (first <= position - window) & (position >= self.schedule.dense_start)
        cut &= first + memory.block_size > self.schedule.num_sink_tokens  # else it is seen as sink tokens
        seam = torch.where(cut, first // memory.block_size, NO_BLOCK)
        reads = torch.cat([chosen, seam[:, None].expand(heads, length, 1)], dim=-1)
        if not self.clamps(begin + length):
            return reads
        # A block is far if it begins more than max_distance before the query; so the first of those that are not is:
        near = (position - memory.max_distance - 1).div(memory.block_size, rounding_mode="floor")[:, None] + 1
        return reads + ((reads >= 0) & (reads < near)) * blocks

    def most_reads(self, query_length: int) -> int:
        """Tokens that the queries of a key/value head can read by their choices."""
        return query_length * self.heads.per_group * (self.schedule.memory.top_k + 1) * self.schedule.memory.block_size

    def offsets(self, device: torch.device) -> torch.Tensor:
        """Of each head in the patterns behind the window, [patterns, H]."""
        heads, rates = range(self.heads.num_heads), self.schedule.dilation_rates[1:]
        offsets = [[self.heads.offset(self.schedule, r, j) for j in heads] for r in rates]
        return torch.tensor(offsets, dtype=torch.long, device=device).view(-1, len(heads))


def _stretches(
    call: MemoryCall, chosen: torch.Tensor, query, keys: "StoredKeys | tuple[torch.Tensor, torch.Tensor]"
) -> Iterator[tuple]:
    """Per row, key/value head and stretch of queries that is read in one go: the row and head, where the queries lie in
    [B, H, Q], and their attention to what they read."""
    _, heads, length, count = chosen.shape
    size = call.schedule.memory.block_size
    per_group = heads // call.heads.num_kv_heads
    offsets = call.offsets(chosen.device)
    inv_freq = call.inv_freq if call.clamps(length) else None
    is_stored, attention = isinstance(keys, StoredKeys), part_attention(query.device)
    blocks = (keys.end if is_stored else keys[0].shape[2]) // size
    numbers = torch.arange(blocks, device=query.device)
    for row in range(len(chosen)):
        for group in call.groups:
            own = slice(group * per_group, (group + 1) * per_group)
            head = keys.head(row, group) if is_stored else [whole_blocks(x, row, group, size) for x in keys]
            if head is not None:
                pair = attention.prepare(*(x.contiguous() for x in head), numbers * size, inv_freq)
            tile = max(1, (FETCHED // size if head is None else attention.PAIRS) // (per_group * (count + 1)))
            for begin in range(0, length, tile):
                at = row, own, slice(begin, min(begin + tile, length))
                read, slots = call.reads(chosen[at], begin, blocks).flatten(0, 1), None
                is_read = (read >= 0).any(0)
                if not bool(is_read.all()):
                    read = read[:, is_read]
                if not read.shape[1]:
                    continue
                if head is None:
                    read, slots = _slots(read, blocks)
                    pair = attention.prepare(*keys.blocks(row, group, slots), slots * size, inv_freq)
                start, queries = call.start + begin, at[2].stop - begin
                stretch = Stretch(call.schedule, start, queries, offsets[:, own], call.scale, inv_freq, slots)
                yield row, group, at, attention(stretch, read, query[at].flatten(0, 1), *pair)


def part_attention(device: torch.device) -> type:
    """What attends to chosen blocks fastest there."""
    return RowAttention if device.type == "cpu" else PieceAttention


def _slots(reads: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same reads of those blocks alone that are read, m of them, and their numbers [m], which rise."""
    numbers = (reads[reads >= 0] % blocks).unique()
    slots = torch.searchsorted(numbers, reads % blocks) + len(numbers) * (reads >= blocks)
    return torch.where(reads >= 0, slots, NO_BLOCK), numbers


def _attend_sinks(call, query, key, value, out, lse) -> None:
    """Merges the sink tokens, of which those of queries beyond the clamped distance are read at that distance."""
    for begin in range(0, query.shape[2], SINK_TILE):
        q, o, s = (x[:, :, begin : begin + SINK_TILE] for x in (query, out, lse))
        scores, _, values = _sink_scores(replace(call, start=call.start + begin), q, key, value)
        merge_attentions((o, lambda joint: (scores - joint[..., None]).exp_() @ values), (s, scores.logsumexp(-1)))


def _sink_query(call: MemoryCall, query: torch.Tensor) -> torch.Tensor:
    near = call.schedule.memory.max_distance + 1 - call.start  # queries that are not beyond it
    if near <= 0:
        return call.far_query(query)
    far = replace(call, start=call.start + near).far_query(query[:, :, near:])
    return torch.cat([query[:, :, :near].to(far.dtype), far], dim=2)


def _sink_scores(call, query, key, value) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, H, Q, S] of the S sink tokens, their keys and values [B, H, S, D]."""
    sinks, dtype = min(call.schedule.num_sink_tokens, key.shape[2]), torch.promote_types(query.dtype, torch.float32)
    key, value = (
        x[:, :, :sinks].repeat_interleave(call.heads.per_group, 1).to(dtype) for x in (key, value)
    )
    scores = _sink_query(call, query).to(dtype) @ key.mT * call.scale
    hidden = torch.arange(sinks, device=query.device) > call.positions(query.shape[2], query.device)[:, None]
    return scores.masked_fill(hidden, -torch.inf), key, value


def _sink_gradients(call, grad, query, key, value, out, lse, grads) -> None:
    scores, keys, values = _sink_scores(call, query, key, value)
    weights = (scores - lse[..., None]).exp_()
    grad = grad.to(weights.dtype)
    scores = weights * (grad @ values.mT - (grad * out.to(weights.dtype)).sum(-1, keepdim=True)) * call.scale
    distance = call.schedule.memory.max_distance - call.positions(query.shape[2], query.device)
    grads[0].add_(rotate(scores @ keys, -distance.clamp(max=0).expand(query.shape[:3]), call.inv_freq))
    groups, sinks = (call.heads.num_kv_heads, -1), keys.shape[2]
    grads[1][:, :, :sinks] += (scores.mT @ _sink_query(call, query).to(weights.dtype)).unflatten(1, groups).sum(2)
    grads[2][:, :, :sinks] += (weights.mT @ grad).unflatten(1, groups).sum(2)


def _merge_part(part: RowAttention | PieceAttention, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Merges what one key/value head's queries read into their rows of the accumulator, [h, T, D] and [h, T]."""
    merge_attentions((out, lambda joint: part.out(joint.flatten()).view_as(out)), (lse, part.lse().view_as(lse)))


@dataclass(frozen=True)
class _WithMemory:
    """The way of `BlockAttention` through a schedule's blocks and the pieces that were chosen."""

    call: MemoryCall

    def forward(self, query, key, value, out, lse, chosen):
        call = self.call
        call.shown(query, key.shape[2]).forward(query, key, value, out, lse)
        if call.clamps(query.shape[2]) and call.schedule.num_sink_tokens:
            _attend_sinks(call, query, key, value, out, lse)
        for _, _, at, part in _stretches(call, chosen, query, (key, value)):
            _merge_part(part, out[at], lse[at])
        return ()

    def backward(self, grad, query, key, value, out, lse, grads, chosen):
        call = self.call
        call.shown(query, key.shape[2], backward=True).backward(grad, query, key, value, out, lse, grads)
        if call.clamps(query.shape[2]) and call.schedule.num_sink_tokens:
            _sink_gradients(call, grad, query, key, value, out, lse, grads)
        size = call.schedule.memory.block_size
        for row, group, at, part in _stretches(call, chosen, query, (key, value)):
            block_grads = (whole_blocks(x, row, group, size) for x in grads[1:])
            rows = [x[at].flatten(0, 1) for x in (grad, out, lse)]
            grads[0][at] += part.gradients(*rows, *block_grads).view_as(grads[0][at])


@torch.no_grad()
def choose(call: MemoryCall, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The blocks [B, H, Q, top_k] that queries read of the keys [B, G, N, D]; none, [B, H, Q, 0], if no head has a
    memory."""
    key = key[:, :, : call.schedule.local_start(call.start + query.shape[2] - 1)]
    far_index = (call.ranking.far_index(key),) if call.clamps(query.shape[2]) else ()
    return choose_indexed(call, query, (call.ranking.index(key),), far_index)


@torch.no_grad()
def choose_indexed(
    call: MemoryCall, query: torch.Tensor, index: Index, far_index: Index, oldest: int = 0
) -> torch.Tensor:
    """The same of the blocks, from `oldest` on, that an index tells of, and, for those at a clamped distance, a second
    one."""
    if not call.groups:
        return torch.full((*query.shape[:3], 0), NO_BLOCK, device=query.device)
    far_index, groups = far_index if call.clamps(query.shape[2]) else None, call.heads.num_kv_heads
    own = call.ranking.own_queries(query, groups)
    return call.ranking.for_all_queries(choose_blocks(call.ranking, own, index, far_index, call.start, oldest), groups)


@torch.no_grad()
def attend_stored(
    call: MemoryCall, query: torch.Tensor, store: Store, row: slice, chosen: torch.Tensor
) -> torch.Tensor:
    """Attention [B, H, Q, D] of rows of a store, whose keys are fetched as they are asked for. No gradient."""
    (out, lse), end = empty_accumulator(query), call.start + query.shape[2]
    shown, reads = call.shown(query, end), call.most_reads(query.shape[2])
    keys = StoredKeys(store, row, shown.blocks, call.start - call.schedule.window, end, reads)
    replace(shown, locate=keys.locate).forward(query, keys.key, keys.value, out, lse)
    if call.clamps(query.shape[2]) and call.schedule.num_sink_tokens:
        _attend_sinks(call, query, *store.span(row, 0, min(call.schedule.num_sink_tokens, end)), out, lse)
    for _, _, at, part in _stretches(call, chosen, query, keys):
        _merge_part(part, out[at], lse[at])
    return out.to(query.dtype)


def attend_memory(
    call: MemoryCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one document with a memory: query [B, H, Q, D], key and value [B, G, N, D], N = start + Q.

    Args:
        chosen: the blocks to read, [B, H, Q, top_k], -1 for none, instead of those that rank highest.
        dropout: of the attention weights, backend "eager" only.

    Returns:
        out [B, H, Q, D] and lse [B, H, Q]. The gradient reaches query, key and value, not the choice.
    """  # fmt: skip
    if chosen is None:
        chosen = choose(call, query, key)
    if call.backend == "eager":
        return memory_attention_reference(
            query, key, value, call.schedule, call.start, scale=call.scale, inv_freq=call.inv_freq, chosen=chosen,
            heads=call.heads, dropout=dropout,
        )[:2]  # fmt: skip
    return BlockAttention.apply(_WithMemory(call), query, key, value, chosen)


@outside_graphs
def attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    schedule: DilationSchedule,
    runs: list[tuple[slice, int, int]],
    query_offset: int,
    *,
    scale: float,
    backend: str,
    heads: Heads,
    inv_freq: torch.Tensor | None = None,
    basis: MemoryBasis | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_memory` of each document: runs are (rows of the batch, first key, behind the last), as `find_runs` says.

    Returns:
        out [B, H, Q, D], lse [B, H, Q]; zeros and -inf for queries in no document.

    Raises:
        ValueError: in a program that is being exported; what [`Ranking`] refuses.
    """
    ranking = Ranking(schedule, inv_freq, basis)
    length = query.shape[2]
    parts = []
    for rows, start, stop in runs:
        first, last = max(start, query_offset), min(stop, query_offset + length)
        if first >= last:
            continue
        call = MemoryCall(ranking, first - start, heads, scale, backend)
        q, k = slice(first - query_offset, last - query_offset), slice(start, last)
        with own_precision(query):
            part = attend_memory(call, query[rows, :, q], key[rows, :, k], value[rows, :, k], dropout=dropout)
        if part[0].shape == query.shape:
            return part
        parts.append((rows, q, *part))
    out = connected_zeros(query)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    for rows, q, own_out, own_lse in parts:
        out[rows, :, q], lse[rows, :, q] = own_out, own_lse
    return out, lse
