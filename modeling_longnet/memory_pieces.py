"""Attention to chosen blocks, turned around: not which blocks a query reads, but which queries read a block.

Pairs (query, block) are sorted by block and cut into pieces of a few queries each; a piece is two small matrix
products. Results return to their queries by a gather, never by a scatter:

    query 0 reads 3 7        block 1: query 1        piece 0   block 1   queries 1 .
    query 1 reads 1 3        block 3: queries 0 1    piece 1   block 3   queries 0 1
    query 2 reads 7 9        block 7: queries 0 2    piece 2   block 7   queries 0 2      (`.` fills up)
                             block 9: query 2        piece 3   block 9   queries 2 .

Letters: h query heads of one key/value head, T queries, K reads of a query, m blocks of b tokens, P pieces of R rows,
D head dimension. All sums are in float32 at least, whatever the dtype of the keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .dilation_schedule import DilationSchedule
from .memory_positions import rotate


@dataclass(frozen=True)
class Pieces:
    """rows: of the queries [h T] that each piece's rows are, int64 [P, R], 0 where `real`, bool [P, R], is not. blocks:
    [P], of 0..2 m - 1, slots of blocks, from m on those that are read at a clamped distance. slots: which row of P * R
    each read of each query became, [h T, K], P * R for none."""

    rows: torch.Tensor
    real: torch.Tensor
    blocks: torch.Tensor
    slots: torch.Tensor


def make_pieces(reads: torch.Tensor) -> Pieces:
    """Turns the reads [h T, K] of queries around: block numbers, negative for none."""
    ids = reads.flatten()
    order = ids.int().argsort(stable=True)
    order = order[int((ids < 0).sum()) :]
    blocks, counts = ids[order].unique_consecutive(return_counts=True)
    average = len(order) / max(1, len(blocks))
    height = 32 if average >= 48 else 16 if average >= 20 else 8 if average >= 3 else 2
    pieces = -(-counts // height)
    shift = (counts.cumsum(0) - counts) - (pieces.cumsum(0) - pieces) * height
    slot = torch.arange(len(order), device=ids.device) - shift.repeat_interleave(counts)
    blocks = blocks.repeat_interleave(pieces)
    rows = ids.new_zeros(len(blocks) * height)
    rows[slot] = order // reads.shape[-1]
    real = torch.zeros_like(rows, dtype=torch.bool)
    real[slot] = True
    slots = torch.full_like(ids, len(rows))
    slots[order] = slot
    return Pieces(rows.view(-1, height), real.view(-1, height), blocks, slots.view(reads.shape))


@dataclass(frozen=True)
class Stretch:
    """Queries of one row and one key/value head: positions start .. start + T - 1 of h heads, whose offsets in the
    patterns behind the window are `offsets`, [patterns, h]; numbers: of the blocks at hand, rising, [m], None where
    all are at hand."""

    schedule: DilationSchedule
    start: int
    length: int
    offsets: torch.Tensor
    scale: float
    inv_freq: torch.Tensor | None
    numbers: torch.Tensor | None = None

    def block_starts(self, slots: torch.Tensor) -> torch.Tensor:
        """Positions of the first tokens of the blocks in these slots."""
        return (slots if self.numbers is None else self.numbers[slots]) * self.schedule.memory.block_size

    def positions(self, pieces: Pieces) -> torch.Tensor:
        return self.start + pieces.rows % self.length

    def offered(self, head: torch.Tensor, t: torch.Tensor, k: torch.Tensor) -> Iterator[torch.Tensor]:
        """For each pattern behind the window: whether it shows keys at positions k to queries at t, of heads `head`."""
        for (w, r), offsets in zip(self.schedule.patterns[1:], self.offsets):
            s = offsets[head]
            yield (t // w == k // w) & (t % w % r == s) & (k % w % r == s)

    def shown(self, pieces: Pieces, blocks: torch.Tensor) -> torch.Tensor:
        """Which keys of the pieces, bool [P, R, b], are to be read: the schedule shows the others already."""
        size = self.schedule.memory.block_size
        t = self.positions(pieces)[..., None]
        k = (self.block_starts(blocks)[:, None] + torch.arange(size, device=blocks.device))[:, None]
        shown = (k <= t - self.schedule.window) & pieces.real[..., None]
        if self.schedule.num_sink_tokens:
            shown &= k >= self.schedule.num_sink_tokens
        for offered in self.offered((pieces.rows // self.length)[..., None], t, k):
            shown &= ~offered
        return shown


class PieceAttention:
    """The pieces' queries, keys and values, gathered, and their logits: what forward and backward both begin with.

    Args:
        reads: [h T, K] slots of blocks, negative for none, m more for one at a clamped distance. query: [h T, D].
        key, value: [m, b, D].
    """

    PAIRS = 2**19  # read in one go: its queries and results are what takes memory

    @staticmethod
    def prepare(key, value, starts: torch.Tensor, inv_freq: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys are turned as they are read."""
        return key, value

    def __init__(
        self, stretch: Stretch, reads: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ):
        pieces = make_pieces(reads)
        self.stretch, self.pieces, self.blocks = stretch, pieces, pieces.blocks % max(1, len(key))
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.far = (pieces.blocks >= len(key)).nonzero()[:, 0] if stretch.inv_freq is not None else None
        self.query, self.key, self.value = self.gather(query), key[self.blocks].to(self.dtype), value[self.blocks]
        self.value = self.value.to(self.dtype)
        if self.far is not None:
            far, distance = self.far, stretch.schedule.memory.max_distance - stretch.positions(pieces)[self.far]
            self.distance, self.block_start = distance, stretch.block_starts(self.blocks[far])
            self.query[far] = rotate(self.query[far], distance, stretch.inv_freq)
            self.key[far] = rotate(self.key[far], -self.block_start[:, None].expand(-1, key.shape[1]), stretch.inv_freq)
        self.logits = (self.query @ self.key.mT).mul_(stretch.scale)
        self.logits.masked_fill_(~stretch.shown(pieces, self.blocks), -torch.inf)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x [h T, ...] as [P, R, ...]."""
        return x.index_select(0, self.pieces.rows.flatten()).unflatten(0, self.pieces.rows.shape).to(self.dtype)

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """Sums the rows of x [P, R, D] that belong to each query, [h T, D]."""
        x = torch.nn.functional.pad(x.flatten(0, 1), (0, 0, 0, 1))
        return torch.nn.functional.embedding_bag(self.pieces.slots, x, mode="sum")

    def lse(self) -> torch.Tensor:
        """The log-sum-exp of all that each query reads, [h T]."""
        each = torch.nn.functional.pad(self.logits.logsumexp(-1).flatten(), (0, 1), value=-torch.inf)
        return each[self.pieces.slots].logsumexp(-1)

    def weights(self, lse: torch.Tensor) -> torch.Tensor:
        """[P, R, b], given the log-sum-exp [h T] of the whole softmax."""
        return (self.logits - self.gather(lse)[..., None]).exp_()

    def out(self, lse: torch.Tensor) -> torch.Tensor:
        """The chosen blocks' share of the output, [h T, D]."""
        return self.collect(self.weights(lse) @ self.value)

    def gradients(self, grad, out, lse, key_grad: torch.Tensor, value_grad: torch.Tensor) -> torch.Tensor:
        """Adds to the gradients of all blocks [m, b, D], and returns the share in that of the queries [h T, D]."""
        weights, grad_rows = self.weights(lse), self.gather(grad)
        delta = self.gather((grad.to(self.dtype) * out.to(self.dtype)).sum(-1))[..., None]
        scores = weights * (grad_rows @ self.value.mT - delta) * self.stretch.scale
        query_rows, key_rows = scores @ self.key, scores.mT @ self.query
        if self.far is not None:
            inv_freq, size = self.stretch.inv_freq, key_grad.shape[1]
            query_rows[self.far] = rotate(query_rows[self.far], -self.distance, inv_freq)
            key_rows[self.far] = rotate(key_rows[self.far], self.block_start[:, None].expand(-1, size), inv_freq)
        key_grad.index_add_(0, self.blocks, key_rows)
        value_grad.index_add_(0, self.blocks, weights.mT @ grad_rows)
        return self.collect(query_rows)
