"""The strided pattern of the Sparse Transformer without a mask of pairs, for whole texts.

Letters: B batch, H heads, N tokens, D head dimension, l stride.
"""

import torch
from torch import nn

from .attention_patterns import Strided
from .backbone import with_previous
from .pattern_attention import PatternAttention


def _attend(query, key, value, mask):
    """Output, and the log of the sum of weights [...], the lowest of numbers where there is nothing to read."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
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
    around = [with_previous(t) for t in blocks[1:]]  # [B, H, N / l, 2 l, D]
    mask = torch.cat([own < 0, own >= 0], 1).expand(blocks[0].shape[2], -1, -1).clone()
    mask[0, :, :stride] = False
    near, near_total = _attend(blocks[0], *around, mask)

    columns = [t.transpose(2, 3) for t in blocks]  # [B, H, l, N / l, D]
    rows = torch.arange(columns[0].shape[3], device=query.device)
    far, far_total = _attend(*columns, rows[:, None] > rows)  # the first row has none: its share is zero
    far, far_total = far.transpose(2, 3), far_total.transpose(2, 3)
    share = torch.sigmoid(far_total - near_total)[..., None]
    return (near + share * (far - near)).flatten(2, 3)[:, :, :length]


class StridedAttention(PatternAttention):
    """`PatternAttention` over `Strided(stride)`, faster on whole texts."""

    def __init__(self, hidden_size: int, num_heads: int, stride: int):
        super().__init__(hidden_size, num_heads, Strided(stride))

    def attend_whole(self, query, key, value):
        return strided_attention(query, key, value, self.pattern.stride)
