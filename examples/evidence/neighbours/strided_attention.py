"""The strided pattern of the Sparse Transformer without a mask of pairs, for whole texts.

Letters: B batch, H heads, N tokens, D head dimension, l stride.
"""

import torch
from torch import nn

from .attention_patterns import Strided
from .pattern_attention import PatternAttention


def _attend(query, key, value, mask):
    """Unnormalised attention by float scores: output, and the log of the sum of weights [...]."""
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp() @ value, total


def strided_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stride: int) -> torch.Tensor:
    """Attention over `Strided(stride)`, [B, H, N, D]: the last l keys in blocks, every l-th before in columns of a
    matrix of width l, and one softmax over both.

    Without `mask`, the first l positions of a column's own entry would be counted twice: the columns leave it out.
    """
    length = query.shape[2]
    padding = -length % stride
    query, key, value = (nn.functional.pad(t, (0, 0, 0, padding)) for t in (query, key, value))
    blocks = [t.unflatten(2, (-1, stride)) for t in (query, key, value)]  # [B, H, N / l, l, D]
    index = torch.arange(stride, device=query.device)
    own = index[:, None] - index[None]
    previous = [torch.cat([torch.zeros_like(t[:, :, :1]), t[:, :, :-1]], 2) for t in blocks[1:]]
    around = [torch.cat([before, now], 3) for before, now in zip(previous, blocks[1:])]  # [B, H, N / l, 2 l, D]
    mask = torch.cat([own < 0, own >= 0], 1).expand(blocks[0].shape[2], -1, -1).clone()
    mask[0, :, :stride] = False
    near, near_total = _attend(blocks[0], *around, mask)

    columns = [t.transpose(2, 3) for t in blocks]  # [B, H, l, N / l, D]
    rows = torch.arange(columns[0].shape[3], device=query.device)
    far, far_total = _attend_causal(*columns, rows)
    far, far_total = far.transpose(2, 3), far_total.transpose(2, 3)
    share = torch.sigmoid(far_total - near_total)[..., None]
    return (near + share * (far - near)).flatten(2, 3)[:, :, :length]


def _attend_causal(query, key, value, rows):
    """Every row's attention to strictly earlier rows; the first, which has none, gets zero with weight zero."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores.masked_fill(rows[:, None] <= rows[None], torch.finfo(scores.dtype).min)
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp() @ value, total


class StridedAttention(PatternAttention):
    """`PatternAttention` over `Strided(stride)`, faster on whole texts."""

    def __init__(self, hidden_size: int, num_heads: int, stride: int):
        super().__init__(hidden_size, num_heads, Strided(stride))

    def attend_whole(self, query, key, value):
        return strided_attention(query, key, value, self.pattern.stride)
