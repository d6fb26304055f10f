"""Attention to chosen blocks row by row, where PyTorch multiplies by gathered rows without copying them: on CPUs.

`torch.sparse.sampled_addmm` gives the logits of the keys that each query reads, `embedding_bag` the weighted sum of
their values; neither forms a tensor of gathered rows. What pieces do (memory_pieces.py) this does five times as fast in
float32 and float64, the only dtypes that the first of them takes.

Letters: h query heads of one key/value head, T queries, K reads of a query, n blocks of b tokens, D head dimension.
"""

import warnings

import torch

from .memory_pieces import Stretch


def _bag(index: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, offsets=None) -> torch.Tensor:
    return torch.nn.functional.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights)


def _sampled(index: torch.Tensor, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """rows [R, D] times those of others [N, D] that index [R, C] (int32) names: [R, C]."""
    starts = torch.arange(0, index.numel() + 1, index.shape[1], dtype=index.dtype)
    with warnings.catch_warnings():  # PyTorch says once that this layout is a beta
        warnings.simplefilter("ignore", UserWarning)
        pattern = torch.sparse_csr_tensor(
            starts, index.flatten(), rows.new_zeros(index.numel()), (len(rows), len(others)), check_invariants=False
        )  # fmt: skip
        # Into the pattern itself, which would be copied otherwise.
        torch.sparse.sampled_addmm(pattern, rows, others.T, beta=0.0, out=pattern)
    return pattern.values().view(index.shape)


class RowAttention:
    """The logits of what each query reads, [h T, K, b]; -inf where the schedule shows a key already.

    Args:
        reads: [h T, K] blocks, negative for none. query: [h T, D]. key, value: [n, b, D].
    """

    def __init__(self, stretch: Stretch, reads: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value):
        self.scale, self.reads, self.size = stretch.scale, reads, key.shape[1]
        self.query, self.key, self.value = query, key.flatten(0, 1), value.flatten(0, 1)
        first = reads.clamp(min=0).int() * self.size
        self.tokens = (first[..., None] + torch.arange(self.size, dtype=torch.int32)).flatten(1)
        self.logits = _sampled(self.tokens, query, self.key).mul_(self.scale).unflatten(1, (-1, self.size))
        self._hide(stretch)

    def _hide(self, stretch: Stretch) -> None:
        tokens, schedule = self.tokens.unflatten(1, (-1, self.size)), stretch.schedule
        row = torch.arange(len(tokens), dtype=torch.int32)
        t = (stretch.start + row % stretch.length)[:, None, None]
        self.logits.masked_fill_((self.reads < 0)[..., None], -torch.inf)
        self.logits[:, -1:].masked_fill_(tokens[:, -1:] > t - schedule.window, -torch.inf)  # where the window begins
        whole, rest = divmod(schedule.num_sink_tokens, self.size)
        if rest:
            self.logits[..., :rest].masked_fill_((self.reads == whole)[..., None], -torch.inf)
        for (w, r), offsets in zip(schedule.patterns[1:], stretch.offsets):
            s = offsets[row // stretch.length][:, None, None]
            self.logits.masked_fill_((t // w == tokens // w) & (t % w % r == s) & (tokens % w % r == s), -torch.inf)

    def lse(self) -> torch.Tensor:
        """The log-sum-exp of all that each query reads, [h T]."""
        return self.logits.flatten(1).logsumexp(-1)

    def _weights(self, lse: torch.Tensor) -> torch.Tensor:
        return (self.logits.flatten(1) - lse[:, None]).exp_()

    def out(self, lse: torch.Tensor) -> torch.Tensor:
        """The chosen blocks' share of the output, [h T, D], given the log-sum-exp of the whole softmax."""
        return _bag(self.tokens, self.value, self._weights(lse))

    def gradients(self, grad, out, lse, key_grad: torch.Tensor, value_grad: torch.Tensor) -> torch.Tensor:
        """Adds to the gradients of all blocks [n, b, D], and returns the share in that of the queries [h T, D]."""
        weights, delta = self._weights(lse), (grad * out).sum(-1, keepdim=True)
        scores = weights * (_sampled(self.tokens, grad, self.value) - delta) * self.scale
        ids = self.reads.flatten()
        order = ids.argsort(stable=True)[int((ids < 0).sum()) :]
        starts = torch.searchsorted(ids[order], torch.arange(len(key_grad))).int()
        rows = (order // self.reads.shape[1]).int()
        for total, other, factor in ((key_grad, self.query, scores), (value_grad, grad, weights)):
            factor = factor.view(len(ids), self.size)[order]
            for i in range(self.size):
                total[:, i] += _bag(rows, other, factor[:, i].contiguous(), starts)
        return _bag(self.tokens, self.key, scores)
