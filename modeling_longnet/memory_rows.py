"""Attention to chosen blocks row by row, where PyTorch multiplies by gathered rows without copying them: on CPUs.

`torch.sparse.sampled_addmm` gives the logits of the keys that each query reads, `embedding_bag` the weighted sum of
their values; neither forms a tensor of gathered rows. What pieces do (memory_pieces.py) this does five times as fast.
All of it is in float32 or float64, the only dtypes that the first of them takes.

Where distances are clamped there are two queries in turn, turned and not, and turned keys stand behind the others. A
query reads its far blocks first, so that the order of its reads is that of both:

    rows      query 0 turned | query 0 | query 1 turned | query 1 ..
    reads     far 0, far 1   | near 5  | far 1          | near 4, near 5 ..

Letters: h query heads of one key/value head, T queries, R = h T, K reads of a query, m blocks of b tokens, D head
dimension.
"""

import warnings

import torch

from .memory_pieces import Stretch
from .memory_positions import rotate


def _bag(index: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, offsets=None) -> torch.Tensor:
    return torch.nn.functional.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights)


def _sampled(index: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor, others: torch.Tensor, scale: float = 1.0):
    """rows [R, D] times those of others [N, D] that index (int32, flat) names, and scale; row i has
    index[starts[i]:starts[i+1]]. As long as index."""
    if index.numel() >= len(rows) * len(others):  # more than a matrix has room for, which takes rows twice
        row = torch.arange(len(rows)).repeat_interleave(starts.diff())
        return (rows @ others.T)[row, index.long()] * scale
    with warnings.catch_warnings():  # PyTorch says once that this layout is a beta
        warnings.simplefilter("ignore", UserWarning)
        pattern = torch.sparse_csr_tensor(
            starts, index, rows.new_zeros(index.numel()), (len(rows), len(others)), check_invariants=False
        )  # fmt: skip
        # Into the pattern itself, which would be copied otherwise.
        torch.sparse.sampled_addmm(pattern, rows, others.T, beta=0.0, alpha=scale, out=pattern)
    return pattern.values()


class RowAttention:
    """The logits of what each query reads, [R, K, b]; -inf where the schedule shows a key already.

    Args:
        reads: [R, K] slots of blocks, negative for none, m more for one at a clamped distance; the last is the one that
            the window begins in. query: [R, D]. key, value: what `prepare` made of [m, b, D].
    """

    PAIRS = 2**17  # read in one go: logits and reads stay near the core

    @staticmethod
    def prepare(key, value, starts: torch.Tensor, inv_freq: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [m, b, D] of blocks that begin at `starts` [m] in float32 at least, and behind them, if there
        is a clamped distance, the keys turned to it and the same values: [m or 2 m, b, D]."""
        key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (key, value))
        if inv_freq is None:
            return key, value
        return torch.cat([key, rotate(key, -starts[:, None], inv_freq)]), value.repeat(2, 1, 1)

    def __init__(self, stretch: Stretch, reads: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value):
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.query, self.stretch, self.size = query.to(dtype), stretch, value.shape[1]
        self.key, self.value = key.flatten(0, 1), value.flatten(0, 1)
        self.blocks, self.clamps, self.seam = len(value), stretch.inv_freq is not None, slice(-1, None)
        if self.clamps:
            self.blocks //= 2
            far = reads >= self.blocks
            if bool((far[:, 1:] > far[:, :-1]).any()):  # an order of somebody else's
                reads = reads.gather(-1, far.int().argsort(dim=-1, descending=True, stable=True))
                self.seam = slice(None)  # anywhere
        self.reads, self.has_none = reads, bool((reads < 0).any())
        inner = torch.arange(self.size, dtype=torch.int32)
        first = (reads.clamp(min=0) if self.has_none else reads).int() * self.size
        self.tokens = (first[..., None] + inner).flatten(1)
        self.rows, self.starts = self.query, self._starts()
        if self.clamps:
            self._turn()
        logits = _sampled(self.tokens.flatten(), self.starts, self.rows, self.key, stretch.scale)
        self.logits = logits.view(*reads.shape, self.size)
        self._hide()
        self.top = self.logits.flatten(1).amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
        self.powers = self.logits.flatten(1).sub_(self.top).exp_()

    def _starts(self) -> torch.Tensor:
        return torch.arange(0, self.tokens.numel() + 1, self.tokens.shape[1], dtype=torch.int32)

    @property
    def far(self) -> torch.Tensor:
        """Which reads are at a clamped distance, [R, K]."""
        return self.reads >= self.blocks

    @property
    def slots(self) -> torch.Tensor:
        """Of the blocks that are read, [R, K]; 0 for none."""
        return self.reads.clamp(min=0) % self.blocks

    def _turn(self) -> None:
        stretch, count = self.stretch, self.far.sum(-1, dtype=torch.int32) * self.size
        self.distance = stretch.schedule.memory.max_distance - stretch.start - torch.arange(stretch.length)
        turned = self._rotated(self.query, self.distance)
        self.rows = torch.stack([turned, self.query], dim=1).flatten(0, 1)
        self.starts = torch.stack([self.starts[:-1], self.starts[:-1] + count], dim=1).flatten()
        self.starts = torch.nn.functional.pad(self.starts, (0, 1), value=self.tokens.numel())

    def _rotated(self, x: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Rows [R, D], of h heads, by distance [T]."""
        return rotate(x.unflatten(0, (-1, len(distance))), distance, self.stretch.inv_freq).flatten(0, 1)

    def _hide(self) -> None:
        schedule, size, stretch = self.stretch.schedule, self.size, self.stretch
        row, inner = torch.arange(len(self.reads)), torch.arange(size)
        t = (stretch.start + row % stretch.length)[:, None, None]
        if self.has_none:
            part = slice(None) if bool((self.reads[:, :-1] < 0).any()) else slice(-1, None)  # the latter mostly
            self.logits[:, part].masked_fill_((self.reads[:, part] < 0)[..., None], -torch.inf)
        tokens = stretch.block_starts(self.reads[:, self.seam].clamp(min=0) % self.blocks)[..., None] + inner
        self.logits[:, self.seam].masked_fill_(tokens > t - schedule.window, -torch.inf)  # where the window begins
        whole, rest = divmod(schedule.num_sink_tokens, size)
        if not rest and len(schedule.patterns) == 1:
            return
        starts = stretch.block_starts(self.slots)
        if rest:
            self.logits[..., :rest].masked_fill_((starts == whole * size)[..., None], -torch.inf)
        tokens = starts[..., None] + inner
        for offered in stretch.offered((row // stretch.length)[:, None, None], t, tokens):
            self.logits.masked_fill_(offered, -torch.inf)

    def lse(self) -> torch.Tensor:
        """The log-sum-exp of all that each query reads, [R]."""
        return self.powers.sum(-1).log_().add_(self.top[:, 0])

    def out(self, lse: torch.Tensor) -> torch.Tensor:
        """The chosen blocks' share of the output, [R, D], given the log-sum-exp of the whole softmax."""
        return _bag(self.tokens, self.value, self.powers).mul_((self.top - lse[:, None]).exp_())

    def gradients(self, grad, out, lse, key_grad: torch.Tensor, value_grad: torch.Tensor) -> torch.Tensor:
        """Adds to the gradients of all blocks [m, b, D], and returns the share in that of the queries [R, D]."""
        grad, out = grad.to(self.query.dtype), out.to(self.query.dtype)
        weights, delta = self.powers * (self.top - lse[:, None]).exp_(), (grad * out).sum(-1, keepdim=True)
        products = _sampled(self.tokens.flatten(), self._starts(), grad, self.value).view_as(weights)
        scores = weights * (products - delta) * self.stretch.scale
        self._add_to_blocks(value_grad, grad, weights.view_as(self.logits))
        if not self.clamps:
            self._add_to_blocks(key_grad, self.query, scores.view_as(self.logits))
            return _bag(self.tokens, self.key, scores)
        is_far = self.far
        near, far = (scores.view_as(self.logits).masked_fill(x[..., None], 0) for x in (is_far, ~is_far))
        self._add_to_blocks(key_grad, self.query, near)
        last = max(0, int(self.reads.max()) - self.blocks + 1)
        turned, starts = torch.zeros_like(key_grad[:last]), self.stretch.block_starts(torch.arange(last))
        self._add_to_blocks(turned, self.rows[::2], far)
        key_grad[:last] += rotate(turned, starts[:, None], self.stretch.inv_freq)
        both = _bag(self.tokens.flatten(), self.key, scores.flatten(), self.starts[:-1])
        return self._rotated(both[::2], -self.distance) + both[1::2]

    def _add_to_blocks(self, total: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor) -> None:
        """total [.., b, D] of each block += rows [R, D] of the queries that read it, times factors [R, K, b]."""
        ids = self.slots.masked_fill(self.reads < 0, -1).flatten()
        order = ids.argsort(stable=True)[int((ids < 0).sum()) :]
        order = order[: int((ids[order] < len(total)).sum())]
        starts = torch.searchsorted(ids[order], torch.arange(len(total))).int()
        index, factors = (order // self.reads.shape[1]).int(), factors.flatten(0, 1)[order]
        for i in range(self.size):
            total[:, i] += _bag(index, rows, factors[:, i].contiguous(), starts)
