"""Dilated attention of one rank's slice of a sequence: which rows of keys and values travel, and attention over them.

Every rank holds n tokens in a row. The plan of the blocks of its queries names all keys that they see; those that lie
on other ranks, each only once, come by one all-to-all with unequal parts. What is needed follows from the plan, so each
rank knows without asking what to send. For patterns w, r = 4, 1 and 12, 2 and head 0, causal:

    rank            0               1               2
    position        0  1  2  3      4  5  6  7      8  9 10 11
    rank 1 gets     0     2
    rank 2 gets     0     2         4     6

The blocks over own keys are computed while the rows are on their way. In the backward the gradients of the received
rows go back by the reverse all-to-all while the blocks over own keys are differentiated.

Letters: B batch, H query heads, G key/value heads, n tokens of a rank, D head dimension, M received rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist

from .attention_blocks import BlockAttention, PlannedAttention
from .attention_kernels import Kernel
from .dilation_plan import Block, Region, Rows, plan_blocks
from .dilation_schedule import DilationSchedule, Heads


@dataclass(frozen=True)
class Slices:
    """How texts are cut: a batch of rows, each into `size` slices of `slice_length` tokens.

    `documents` are (first row, row after the last, start, stop): what lies in none of them is padding.
    """

    batch: int
    slice_length: int
    size: int
    documents: tuple[tuple[int, int, int, int], ...]

    def own(self, rank: int) -> tuple[int, int]:
        """The interval of global positions that `rank` holds."""
        return rank * self.slice_length, (rank + 1) * self.slice_length


@dataclass(frozen=True)
class DocumentPart:
    """One document as a rank sees it: batch rows, its tokens within the slice, the position of the first of them.

    Keys of `local` blocks are indices of `tokens`; each `remote` block has the index of its keys among the received
    rows, [rows, heads, keys].
    """

    rows: slice
    tokens: slice
    start: int
    local: tuple[Block, ...]
    remote: tuple[tuple[Block, torch.Tensor], ...]


def _cut(rows: Rows, first: int, stop: int) -> Rows:
    """Rows number `first` to `stop`, the latter left out."""
    return Rows(rows.start + first * rows.step, rows.step, stop - first)


def _rows_before(rows: Rows, position: int) -> int:
    """How many of the rows lie before a position."""
    return min(rows.count, max(0, -(-(position - rows.start) // rows.step)))


def _split_region(region: Region, first: int, last: int) -> Iterator[tuple[Region, bool]]:
    """The region in pieces whose keys lie all in [first, last), which the flag tells, or all outside."""
    kind, queries, keys = region.kind, region.queries, region.keys
    low, high, count = _rows_before(keys, first), _rows_before(keys, last), keys.count
    if kind == "full":
        pieces = [(kind, 0, queries.count, a, b) for a, b in ((0, low), (low, high), (high, count))]
    else:
        # A square of `count` queries and keys, cut after `low` keys into two squares and the rectangle between them.
        assert high == count and queries.count == count, "squares have no keys after their queries"
        rectangle = ("full", low, count, 0, low) if kind == "causal" else ("full", 0, low, low, count)
        pieces = [(kind, 0, low, 0, low), rectangle, (kind, low, count, low, count)]
    for kind, q0, q1, k0, k1 in pieces:
        if q0 < q1 and k0 < k1:
            yield Region(kind, _cut(queries, q0, q1), _cut(keys, k0, k1)), low <= k0 and k1 <= high


def split_block(block: Block, first: int, last: int) -> Iterator[tuple[Block, bool]]:
    """The block in pieces, each with a flag: whether all its keys lie at positions [first, last)."""
    block = replace(block, fresh=False)  # the order of the blocks changes: none may overwrite what others left
    if block.region.kind == "zeros":
        yield block, True
        return
    # Repeats begin within the own segments; only a sliding window's first ones look back over the border.
    looking_back = 0
    if block.repeats > 1:
        looking_back = min(block.repeats, max(0, -(-(first - block.region.keys.start) // block.stride)))
        if looking_back < block.repeats:
            shifted = block.region.shift(looking_back * block.stride)
            yield replace(block, region=shifted, repeats=block.repeats - looking_back), True
    for repeat in range(looking_back if block.repeats > 1 else 1):
        for region, is_local in _split_region(block.region.shift(repeat * block.stride), first, last):
            yield replace(block, region=region, repeats=1), is_local


def _parts(
    slices: Slices, rank: int, schedule: DilationSchedule, heads: Heads
) -> Iterator[tuple[slice, int, int, int, list[tuple[Block, bool]]]]:
    """Per document in the slice: batch rows, its start, first and last global position in the slice, its blocks."""
    low, high = slices.own(rank)
    for first_row, last_row, start, stop in slices.documents:
        first, last = max(start, low), min(stop, high)
        if first >= last:
            continue
        length = (last if schedule.is_causal else stop) - start
        blocks = plan_blocks(schedule, heads, first - start, last - start, length)
        pieces = [piece for block in blocks for piece in split_block(block, first - start, last - start)]
        yield slice(first_row, last_row), start, first, last, pieces


def _row_codes(slices: Slices, heads: Heads, rows: slice, kv_heads: slice, positions: Rows) -> torch.Tensor:
    """(row of the batch * G + head) * tokens + global position of keys, [rows, heads, keys]."""
    batch = torch.arange(rows.start, rows.stop)[:, None, None] * heads.num_kv_heads
    head = torch.tensor(range(heads.num_kv_heads)[kv_heads])[None, :, None]
    position = positions.start + positions.step * torch.arange(positions.count)
    return (batch + head) * (slices.size * slices.slice_length) + position


def _wanted(slices, rank, schedule, heads, low: int, high: int) -> torch.Tensor:
    """Sorted codes of the rows that `rank` needs from positions [low, high), which it does not hold."""
    codes = [torch.empty(0, dtype=torch.long)]
    for rows, start, _, _, pieces in _parts(slices, rank, schedule, heads):
        for block, is_local in pieces:
            keys = block.region.keys.shift(start)
            keys = _cut(keys, _rows_before(keys, low), _rows_before(keys, high))
            if not is_local and keys.count > 0:
                codes.append(_row_codes(slices, heads, rows, block.kv_heads, keys).flatten())
    return torch.cat(codes).unique()


class Exchange:
    """What one rank sends, receives and computes, for one cut, schedule and number of heads; built without talking.

    Received and sent rows are ordered by rank, then by row of the batch, head and position. `send_index` are the
    indices of the rows to send along B, G and n; this and the other indices are on `device`.
    """

    def __init__(self, slices: Slices, rank: int, schedule: DilationSchedule, heads: Heads, device):
        self._plan, ranks = (slices, schedule, heads), range(slices.size)
        received = [_wanted(slices, rank, schedule, heads, *slices.own(owner)) for owner in ranks]
        sent = [_wanted(slices, other, schedule, heads, *slices.own(rank)) for other in ranks]
        self.receive_counts, self.send_counts = [len(c) for c in received], [len(c) for c in sent]
        self.rows_received, self.rows_sent = sum(self.receive_counts), sum(self.send_counts)
        codes, total = torch.cat(sent), slices.size * slices.slice_length
        head, token = codes // total, codes % total - slices.own(rank)[0]
        send_index = head // heads.num_kv_heads, head % heads.num_kv_heads, token
        self.send_index = tuple(index.to(device) for index in send_index)
        codes = torch.cat(received)
        order = codes.argsort()

        def find(wanted: torch.Tensor) -> torch.Tensor:
            return order[torch.searchsorted(codes, wanted, sorter=order)].to(device)

        parts = _parts(slices, rank, schedule, heads)
        self.parts = tuple(self._document_part(slices, rank, heads, part, find) for part in parts)

    @cached_property
    def is_needed(self) -> bool:
        """Whether any rank needs a row of another one: the collective is called by all of them, or by none."""
        slices, *rest = self._plan
        parts = (part for rank in range(slices.size) for part in _parts(slices, rank, *rest))
        return any(not is_local for *_, pieces in parts for _, is_local in pieces)

    @staticmethod
    def _document_part(slices, rank, heads, part, find: Callable[[torch.Tensor], torch.Tensor]) -> DocumentPart:
        rows, start, first, last, pieces = part
        own = first - start
        local, remote = [], []
        for block, is_local in pieces:
            if is_local:
                region = replace(block.region, keys=block.region.keys.shift(-own))
                local.append(replace(block, region=region))
            else:
                keys = block.region.keys.shift(start)
                remote.append((block, find(_row_codes(slices, heads, rows, block.kv_heads, keys))))
        low = slices.own(rank)[0]
        return DocumentPart(rows, slice(first - low, last - low), own, tuple(local), tuple(remote))


@lru_cache(maxsize=64)
def plan_exchange(
    slices: Slices,
    rank: int,
    schedule: DilationSchedule,
    heads: Heads,
    device: torch.device | str = "cpu",
) -> Exchange:
    """The exchange of `rank`; texts of one length share it, layer after layer and step after step."""
    return Exchange(slices, rank, schedule, heads, device)


def send_rows(
    rows: torch.Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> tuple[torch.Tensor, dist.Work]:
    """Starts an all-to-all of rows [sum(send_counts), ...]; the result [sum(receive_counts), ...] is there after
    `work.wait()`."""
    received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
    work = dist.all_to_all_single(received, rows, receive_counts, send_counts, group=group, async_op=True)
    return received, work


@dataclass(frozen=True)
class _Sharded:
    """The way of `BlockAttention` through own keys, and received ones [M, 2, D]."""

    exchange: Exchange
    group: dist.ProcessGroup | None
    scale: float
    kernel: type[Kernel]

    def _cut(self, *tensors: torch.Tensor) -> list[list[torch.Tensor]]:
        """Tensors [B, H, n, ...] in the parts of the slice."""
        return [[x[part.rows, :, part.tokens] for x in tensors] for part in self.exchange.parts]

    def _local(self, part: DocumentPart) -> PlannedAttention:
        return PlannedAttention(self.kernel, part.local, part.start, self.scale)

    def _remote(self, part: DocumentPart) -> Iterator[PlannedAttention]:
        for block, index in part.remote:
            yield PlannedAttention(self.kernel, (block,), part.start, self.scale, lambda _, index=index: index)

    def forward(self, query, key, value, out, lse):
        exchange, received, work = self.exchange, None, None
        if exchange.is_needed:
            rows = torch.stack([x[exchange.send_index] for x in (key, value)], dim=1)
            received, work = send_rows(rows, exchange.send_counts, exchange.receive_counts, self.group)
        views = self._cut(query, key, value, out, lse)
        for part, own in zip(exchange.parts, views):
            self._local(part).forward(*own)
        if work is not None:
            work.wait()
        for part, (q, _, _, *merged) in zip(exchange.parts, views):
            for plan in self._remote(part):
                plan.forward(q, *_as_buffer(received), *merged)
        return (received,)

    def backward(self, grad, query, key, value, out, lse, grads, received):
        exchange, work = self.exchange, None
        views, grad_views = self._cut(grad, query, key, value, out, lse), self._cut(*grads)
        if received is not None:
            received_grad = torch.zeros_like(received, dtype=lse.dtype)
            for part, (g, q, _, _, *final), own_grads in zip(exchange.parts, views, grad_views):
                for plan in self._remote(part):
                    plan.backward(g, q, *_as_buffer(received), *final, (own_grads[0], *_as_buffer(received_grad)))
            if key.requires_grad or value.requires_grad:
                rows = received_grad.to(key.dtype)
                returned, work = send_rows(rows, exchange.receive_counts, exchange.send_counts, self.group)
        for part, own, own_grads in zip(exchange.parts, views, grad_views):
            self._local(part).backward(*own, own_grads)
        if work is not None:
            work.wait()
            for total, rows in zip(grads[1:], returned.to(lse.dtype).unbind(1)):
                total.index_put_(exchange.send_index, rows, accumulate=True)


def _as_buffer(received: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values of received rows, each as a buffer [1, 1, M, D]."""
    return received[None, None].unbind(3)


def sharded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    exchange: Exchange,
    group: dist.ProcessGroup | None,
    scale: float,
    kernel: type[Kernel],
) -> torch.Tensor:
    """Dilated attention of a rank's queries over all keys that they see, wherever these lie.

    All ranks of `group` call it together, and together differentiate what it returned.

    Args:
        query: [B, H, n, D], this rank's slice. key, value: [B, G, n, D].
        exchange: of this rank, from `plan_exchange`, on the device of the tensors.
        kernel: from `get_kernel`.

    Returns:
        [B, H, n, D]; padding gives zeros.
    """
    return BlockAttention.apply(_Sharded(exchange, group, scale, kernel), query, key, value)[0]
