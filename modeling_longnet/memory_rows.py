"""Attention to chosen blocks row by row, where PyTorch multiplies by gathered rows without copying them: on CPUs.

`torch.sparse.sampled_addmm` gives the logits of the keys that each query reads, `embedding_bag` the weighted sum of
their values; neither forms a tensor of gathered rows. What pieces do (memory_pieces.py) this does five times as fast.
All of it is in float32 or float64, the only dtypes that the first of them takes.

Letters: h query heads of one key/value head, T queries, K reads of a query, m blocks of b tokens, D head dimension.
"""

import warnings

import torch

from .memory_pieces import Stretch
from .memory_positions import rotate


def _bag(index: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, offsets=None) -> torch.Tensor:
    return torch.nn.functional.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights)


def _sampled(index: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """rows [R, D] times those of others [N, D] that index (int32, flat) names; row i has index[starts[i]:starts[i+1]].
    As long as index."""
    if index.numel() >= len(rows) * len(others):  # more than a matrix has room for, which takes rows twice
        row = torch.arange(len(rows)).repeat_interleave(starts.diff())
        return (rows @ others.T)[row, index.long()]
    with warnings.catch_warnings():  # PyTorch says once that this layout is a beta
        warnings.simplefilter("ignore", UserWarning)
        pattern = torch.sparse_csr_tensor(
            starts, index, rows.new_zeros(index.numel()), (len(rows), len(others)), check_invariants=False
        )  # fmt: skip
        # Into the pattern itself, which would be copied otherwise.
        torch.sparse.sampled_addmm(pattern, rows, others.T, beta=0.0, out=pattern)
    return pattern.values()


class RowAttention:
    """The logits of what each query reads, [h T, K, b]; -inf where the schedule shows a key already.

    Args:
        reads: [h T, K] slots of blocks, negative for none, m more for one at a clamped distance. query: [h T, D].
        key, value: [m, b, D].
    """

    def __init__(self, stretch: Stretch, reads: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value):
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, key, value = (x.to(dtype) for x in (query, key, value))
        self.stretch, self.scale, self.size, blocks = stretch, stretch.scale, key.shape[1], len(key)
        self.slots = reads.clamp(min=0) % blocks
        self.real = reads >= 0
        self.query, self.key, self.value = query, key.flatten(0, 1), value.flatten(0, 1)
        inner = torch.arange(self.size, dtype=torch.int32)
        self.tokens = (self.slots.int()[..., None] * self.size + inner).flatten(1)
        self.far = reads >= blocks if stretch.inv_freq is not None else None
        if self.far is not None and not bool(self.far.any()):
            self.far = None
        if self.far is not None:
            self._turn(reads, blocks, key)
        logits = self._times_keys(query, self.query_far, self.key, self.key_far) if self.far is not None else None
        if logits is None:
            logits = _sampled(self.tokens.flatten(), self._starts(self.tokens), query, self.key)
        self.logits = logits.mul_(self.scale).view(len(reads), -1, self.size)
        self._hide()

    def _turn(self, reads: torch.Tensor, blocks: int, key: torch.Tensor) -> None:
        """Queries, and keys of the blocks that are read so, at the clamped distance."""
        stretch, last = self.stretch, int(reads.max()) - blocks + 1
        self.block_start = stretch.block_starts(torch.arange(last))[:, None]
        self.key_far = rotate(key[:last], -self.block_start, stretch.inv_freq).flatten(0, 1)
        row = torch.arange(len(reads)) % stretch.length
        self.distance = stretch.schedule.memory.max_distance - stretch.start - row
        self.query_far = rotate(self.query, self.distance, stretch.inv_freq)

    @staticmethod
    def _starts(tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(0, tokens.numel() + 1, tokens.shape[1], dtype=torch.int32)

    def _times_keys(self, rows, rows_far, others, others_far) -> torch.Tensor:
        """Per read the product of the near or the far pair, [h T * K * b]."""
        tokens = self.tokens.view(*self.slots.shape, self.size)
        out = rows.new_empty(tokens.shape)
        for is_own, a, b in ((~self.far, rows, others), (self.far, rows_far, others_far)):
            counts = is_own.sum(1).mul_(self.size)
            starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
            out[is_own] = _sampled(tokens[is_own].flatten(), starts, a, b).view(-1, self.size)
        return out

    def _hide(self) -> None:
        schedule, size, stretch = self.stretch.schedule, self.size, self.stretch
        starts = stretch.block_starts(self.slots)
        row = torch.arange(len(starts))
        t = (stretch.start + row % stretch.length)[:, None, None]
        self.logits.masked_fill_(~self.real[..., None], -torch.inf)
        tokens = starts[:, -1:, None] + torch.arange(size)
        self.logits[:, -1:].masked_fill_(tokens > t - schedule.window, -torch.inf)  # where the window begins
        whole, rest = divmod(schedule.num_sink_tokens, size)
        if rest:
            self.logits[..., :rest].masked_fill_((starts == whole * size)[..., None], -torch.inf)
        if len(schedule.patterns) > 1:
            tokens = starts[..., None] + torch.arange(size)
        for offered in stretch.offered((row // stretch.length)[:, None, None], t, tokens):
            self.logits.masked_fill_(offered, -torch.inf)

    def lse(self) -> torch.Tensor:
        """The log-sum-exp of all that each query reads, [h T]."""
        return self.logits.flatten(1).logsumexp(-1)

    def _weights(self, lse: torch.Tensor) -> torch.Tensor:
        return (self.logits.flatten(1) - lse[:, None]).exp_()

    def out(self, lse: torch.Tensor) -> torch.Tensor:
        """The chosen blocks' share of the output, [h T, D], given the log-sum-exp of the whole softmax."""
        return _bag(self.tokens, self.value, self._weights(lse))

    def gradients(self, grad, out, lse, key_grad: torch.Tensor, value_grad: torch.Tensor) -> torch.Tensor:
        """Adds to the gradients of all blocks [m, b, D], and returns the share in that of the queries [h T, D]."""
        grad, out = grad.to(self.query.dtype), out.to(self.query.dtype)
        weights, delta = self._weights(lse), (grad * out).sum(-1, keepdim=True)
        products = _sampled(self.tokens.flatten(), self._starts(self.tokens), grad, self.value).view_as(weights)
        scores = (weights * (products - delta) * self.scale).view_as(self.logits)
        self._add_to_blocks(value_grad, grad, weights.view_as(self.logits))
        if self.far is None:
            self._add_to_blocks(key_grad, self.query, scores)
            return _bag(self.tokens, self.key, scores.flatten(1))
        near, far = (scores.masked_fill(hidden[..., None], 0) for hidden in (self.far, ~self.far))
        self._add_to_blocks(key_grad, self.query, near)
        last, inv_freq = len(self.block_start), self.stretch.inv_freq
        turned = torch.zeros_like(key_grad[:last])
        self._add_to_blocks(turned, self.query_far, far)
        key_grad[:last] += rotate(turned, self.block_start, inv_freq)
        end = len(self.key_far) - 1  # near reads may lie behind it: of weight 0 here, and any row will do
        query_far = _bag(self.tokens.clamp(max=end), self.key_far, far.flatten(1))
        return _bag(self.tokens, self.key, near.flatten(1)) + rotate(query_far, -self.distance, inv_freq)

    def _add_to_blocks(self, total: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor) -> None:
        """total [.., b, D] of each block += rows [h T, D] of the queries that read it, times factors [h T, K, b]."""
        ids = self.slots.masked_fill(~self.real, -1).flatten()
        order = ids.argsort(stable=True)[int((ids < 0).sum()) :]
        order = order[: int((ids[order] < len(total)).sum())]
        starts = torch.searchsorted(ids[order], torch.arange(len(total))).int()
        index, factors = (order // self.slots.shape[1]).int(), factors.flatten(0, 1)[order]
        for i in range(self.size):
            total[:, i] += _bag(index, rows, factors[:, i].contiguous(), starts)
