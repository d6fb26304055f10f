"""Attention with a memory: the schedule's blocks by fused kernels, chosen blocks by pieces, one softmax over both.

Forward and backward keep what dilated_attention.py keeps: query, key, value, out, lse, and here the choice. The
backward replays both parts with the final out and lse. Letters: B batch, H query heads, G key/value heads, Q query
tokens, N key tokens, K reads of a query, n blocks of b tokens, D head dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .attention_blocks import BlockAttention, PlannedAttention, connected_zeros, merge_attentions
from .attention_kernels import get_kernel
from .dilation_plan import SINKS, plan_blocks
from .dilation_schedule import DilationSchedule, Heads
from .memory_pieces import PAIRS, PieceAttention, Stretch, make_pieces
from .memory_positions import rotate
from .memory_reference import memory_attention_reference
from .memory_rows import RowAttention
from .memory_search import NO_BLOCK, MemoryBasis, Ranking, choose_blocks


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

    def shown(self, query: torch.Tensor, key: torch.Tensor) -> PlannedAttention:
        """The schedule's part; sinks are read apart where their distance is clamped."""
        length = query.shape[2]
        blocks = plan_blocks(self.schedule, self.heads, self.start, self.start + length, key.shape[2])
        if self.clamps(length):
            blocks = tuple(x for x in blocks if x.pattern != SINKS)
        return PlannedAttention(get_kernel(self.backend, query), blocks, self.start, self.scale)

    def clamps(self, query_length: int) -> bool:
        """Whether any of the queries lies beyond the clamped distance."""
        limit = self.schedule.memory.max_distance
        return limit is not None and self.start + query_length - 1 > limit

    def far_query(self, query: torch.Tensor) -> torch.Tensor:
        """The queries turned to the clamped distance from wherever they stand."""
        position = torch.arange(self.start, self.start + query.shape[2], device=query.device)
        return self.ranking.far_query(query, position)

    def reads(self, chosen: torch.Tensor) -> torch.Tensor:
        """The chosen blocks [B, H, Q, top_k] and the one that the window begins in, [B, H, Q, K]; NO_BLOCK for none,
        n = `far_base` more for one at a clamped distance."""
        size, window = self.schedule.memory.block_size, self.schedule.window
        position = torch.arange(self.start, self.start + chosen.shape[2], device=chosen.device)
        first = self.schedule.local_start(position)
        cut = (first <= position - window) & (position >= self.schedule.dense_start)
        seam = torch.where(cut, first // size, NO_BLOCK)
        return torch.cat([chosen, seam[:, None].expand(*chosen.shape[:3], 1)], dim=-1)

    def mark_far(self, reads: torch.Tensor, blocks: int) -> torch.Tensor:
        """Reads of which those at a clamped distance are numbered from `blocks` on."""
        memory = self.schedule.memory
        if not self.clamps(reads.shape[2]):
            return reads
        position = torch.arange(self.start, self.start + reads.shape[2], device=reads.device)[:, None]
        is_far = (reads >= 0) & (position - reads * memory.block_size > memory.max_distance)
        return torch.where(is_far, reads + blocks, reads)

    def offsets(self, device: torch.device) -> torch.Tensor:
        """Of each head in the patterns behind the window, [patterns, H]."""
        heads, rates = range(self.heads.num_heads), self.schedule.dilation_rates[1:]
        offsets = [[self.heads.offset(self.schedule, r, j) for j in heads] for r in rates]
        return torch.tensor(offsets, dtype=torch.long, device=device).view(-1, len(heads))


def _stretches(call: MemoryCall, reads: torch.Tensor, query, key, value) -> Iterator[tuple]:
    """Per row, key/value head and stretch of queries that is read in one go: the row and head, where the queries lie in
    [B, H, Q], and their attention to what they read."""
    _, heads, length, count = reads.shape
    size = call.schedule.memory.block_size
    per_group = heads // call.heads.num_kv_heads
    offsets = call.offsets(reads.device)
    clamps = call.clamps(length)
    by_rows = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64) and not clamps
    tile = max(1, PAIRS // (per_group * count))
    if clamps:
        reads = call.mark_far(reads, key.shape[2] // size)
    for row in range(len(reads)):
        for group in range(call.heads.num_kv_heads):
            own = slice(group * per_group, (group + 1) * per_group)
            blocks = [_in_blocks(x, row, group, size).contiguous() for x in (key, value)]
            for begin in range(0, length, tile):
                at = row, own, slice(begin, min(begin + tile, length))
                read = reads[at].flatten(0, 1)
                stretch = Stretch(
                    call.schedule, call.start + begin, at[2].stop - begin, offsets[:, own], call.scale,
                    call.inv_freq if clamps else None,
                )  # fmt: skip
                read = read[:, (read >= 0).any(0)]
                if not read.shape[1]:
                    continue
                what, attention = (read, RowAttention) if by_rows else (make_pieces(read), PieceAttention)
                yield row, group, at, attention(stretch, what, query[at].flatten(0, 1), *blocks)


def _in_blocks(x: torch.Tensor, row: int, group: int, size: int) -> torch.Tensor:
    """The whole blocks [n, b, D] of one row and head of x [B, G, N, D]: a view."""
    return x[row, group, : x.shape[2] // size * size].unflatten(0, (-1, size))


def _attend_sinks(call, query, key, value, out, lse) -> None:
    """Merges the sink tokens, of which those of queries beyond the clamped distance are read at that distance."""
    scores, _, value = _sink_scores(call, query, key, value)
    merge_attentions((out, lambda joint: (scores - joint[..., None]).exp_() @ value), (lse, scores.logsumexp(-1)))


def _sink_query(call: MemoryCall, query: torch.Tensor) -> torch.Tensor:
    far = torch.arange(call.start, call.start + query.shape[2], device=query.device) > call.schedule.memory.max_distance
    return torch.where(far[:, None], call.far_query(query), query)


def _sink_scores(call, query, key, value) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, H, Q, S] of the S sink tokens, their keys and values [B, H, S, D]."""
    sinks, dtype = min(call.schedule.num_sink_tokens, key.shape[2]), torch.promote_types(query.dtype, torch.float32)
    key, value = (
        x[:, :, :sinks].repeat_interleave(call.heads.per_group, 1).to(dtype) for x in (key, value)
    )
    scores = _sink_query(call, query).to(dtype) @ key.mT * call.scale
    position = torch.arange(call.start, call.start + query.shape[2], device=query.device)
    hidden = torch.arange(sinks, device=query.device) > position[:, None]
    return scores.masked_fill(hidden, -torch.inf), key, value


def _sink_gradients(call, grad, query, key, value, out, lse, grads) -> None:
    scores, keys, values = _sink_scores(call, query, key, value)
    weights = (scores - lse[..., None]).exp_()
    grad = grad.to(weights.dtype)
    scores = weights * (grad @ values.mT - (grad * out.to(weights.dtype)).sum(-1, keepdim=True)) * call.scale
    position = torch.arange(call.start, call.start + query.shape[2], device=query.device)
    turned = (call.schedule.memory.max_distance - position).clamp(max=0)
    grads[0].add_(rotate(scores @ keys, -turned.expand(query.shape[:3]), call.inv_freq))
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

    def forward(self, query, key, value, out, lse, reads):
        call = self.call
        call.shown(query, key).forward(query, key, value, out, lse)
        if call.clamps(query.shape[2]) and call.schedule.num_sink_tokens:
            _attend_sinks(call, query, key, value, out, lse)
        for _, _, at, part in _stretches(call, reads, query, key, value):
            _merge_part(part, out[at], lse[at])
        return ()

    def backward(self, grad, query, key, value, out, lse, grads, reads):
        call = self.call
        call.shown(query, key).backward(grad, query, key, value, out, lse, grads)
        if call.clamps(query.shape[2]) and call.schedule.num_sink_tokens:
            _sink_gradients(call, grad, query, key, value, out, lse, grads)
        size = call.schedule.memory.block_size
        for row, group, at, part in _stretches(call, reads, query, key, value):
            block_grads = (_in_blocks(x, row, group, size) for x in grads[1:])
            rows = [x[at].flatten(0, 1) for x in (grad, out, lse)]
            grads[0][at] += part.gradients(*rows, *block_grads).view_as(grads[0][at])


@torch.no_grad()
def choose(call: MemoryCall, query: torch.Tensor, key: torch.Tensor, index=None, far_index=None) -> torch.Tensor:
    """The blocks [B, H, Q, top_k] that queries read of the keys [B, G, N, D], or of what an index of theirs tells."""
    last = call.schedule.local_start(call.start + query.shape[2] - 1)
    if index is None:
        index = call.ranking.index(key[:, :, :last])
    if not call.clamps(query.shape[2]):
        far_index = None
    elif far_index is None:
        far_index = call.ranking.far_index(key[:, :, :last])
    return choose_blocks(call.ranking, query, index, far_index, call.start)


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
    return BlockAttention.apply(_WithMemory(call), query, key, value, call.reads(chosen))


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
        ValueError: under `torch.compile`; what [`Ranking`] refuses.
    """
    if torch.compiler.is_compiling():
        raise ValueError("`memory` does not run under `torch.compile` yet: its choice depends on values.")
    ranking = Ranking(schedule, inv_freq, basis)
    length = query.shape[2]
    parts = []
    for rows, start, stop in runs:
        first, last = max(start, query_offset), min(stop, query_offset + length)
        if first >= last:
            continue
        call = MemoryCall(ranking, first - start, heads, scale, backend)
        q, k = slice(first - query_offset, last - query_offset), slice(start, last)
        part = attend_memory(call, query[rows, :, q], key[rows, :, k], value[rows, :, k], dropout=dropout)
        if part[0].shape == query.shape:
            return part
        parts.append((rows, q, *part))
    out = connected_zeros(query)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    for rows, q, own_out, own_lse in parts:
        out[rows, :, q], lse[rows, :, q] = own_out, own_lse
    return out, lse
