"""Runs a plan of blocks: forward into one accumulator, backward by replay, and both in plain differentiable PyTorch.

Every block's (out, log-sum-exp) is merged into one dense accumulator, which is the joint softmax; the backward calls
each block's kernel again with the final out and log-sum-exp (see attention_kernels.py for why that is exact).
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from .attention_kernels import Kernel
from .dilation_plan import Block, Rows


# Elements of the queries in one kernel call on a CPU: enough for all cores, little beside the inputs of a long text.
CPU_CALL_SIZE = 2**20


def strided_rows(x: torch.Tensor, heads: slice, rows: Rows, repeats: int, stride: int) -> torch.Tensor:
    """[B, H, N, ...] as the view [B, heads, repeats, rows, ...]: no copy."""
    x = x[:, heads]
    batch_stride, head_stride, token_stride, *inner = x.stride()
    return x.as_strided(
        (*x.shape[:2], repeats, rows.count, *x.shape[3:]),
        (batch_stride, head_stride, stride * token_stride, rows.step * token_stride, *inner),
        x.storage_offset() + rows.start * token_stride,
    )


def block_queries(x: torch.Tensor, block: Block, start: int) -> torch.Tensor:
    """The view of a tensor [B, H, Q, ...] of queries, the first of which has position `start`."""
    return strided_rows(x, block.heads, block.region.queries.shift(-start), block.repeats, block.stride)


class DenseKeys:
    """Keys and values [B, G, N, D] of positions 0..N-1, and, for the backward, where their gradients gather."""

    def __init__(self, key, value, key_grad=None, value_grad=None):
        self.key, self.value, self.key_grad, self.value_grad = key, value, key_grad, value_grad

    def _rows(self, x: torch.Tensor, block: Block) -> torch.Tensor:
        return strided_rows(x, block.kv_heads, block.region.keys, block.repeats, block.stride)

    def get(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's keys and values, [B, heads, repeats, rows, D]."""
        return self._rows(self.key, block), self._rows(self.value, block)

    def open_grad(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors shaped like those of `get`, to which the block's gradients are added."""
        return self._rows(self.key_grad, block), self._rows(self.value_grad, block)

    def close_grad(self, block: Block, key_grad: torch.Tensor, value_grad: torch.Tensor) -> None:
        """Takes them back; here they are views, and nothing is left to do."""


def _four_dimensional(*views: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Kernels take two batch dimensions, views have three: slices along the shortest one.

    On a CPU, large slices are halved until the copies that a kernel makes of them no longer count.
    """
    sizes = views[0].shape[:3]
    shortest = min(range(3), key=lambda dim: (sizes[dim], dim))
    for index in range(sizes[shortest]):
        slices = tuple(x.select(shortest, index) for x in views)
        longest = max(range(2), key=lambda dim: slices[0].shape[dim])
        pieces = -(-slices[0].numel() // CPU_CALL_SIZE) if slices[0].device.type == "cpu" else 1
        size = max(1, slices[0].shape[longest] // pieces)
        yield from zip(*(x.split(size, dim=longest) for x in slices))


def _flip(reverse: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Time reversed, which turns a triangle of later keys into the causal one that kernels know."""
    return tuple(x.flip(2) for x in tensors) if reverse else tensors


def _merge(out, lse, block_out, block_lse, fresh: bool) -> None:
    """Joins a block's softmax with what the accumulator holds, in place."""
    if fresh:
        out.copy_(block_out)
        lse.copy_(block_lse)
        return
    joint = torch.logaddexp(lse, block_lse)
    out.mul_((lse - joint).exp_().unsqueeze(-1))
    if block_out is not None:
        out.addcmul_(block_out.to(out.dtype), (block_lse - joint).exp_().unsqueeze(-1))
    lse.copy_(joint)


def _zeros_lse(block: Block, like: torch.Tensor) -> torch.Tensor:
    return like.new_tensor(float(block.region.keys.count)).log().expand_as(like)


def attend_blocks(
    kernel: type[Kernel],
    blocks: Iterable[Block],
    query: torch.Tensor,
    keys: DenseKeys,
    out: torch.Tensor,
    lse: torch.Tensor,
    start: int,
    scale: float,
) -> None:
    """Merges the blocks' attention into `out` [B, H, Q, D] and `lse` [B, H, Q], whose first position is `start`."""
    for block in blocks:
        q, o, s = (block_queries(x, block, start) for x in (query, out, lse))
        kind = block.region.kind
        if kind == "zeros":
            _merge(o, s, None, _zeros_lse(block, s), False)
            continue
        reverse = kind == "reversed"
        for q4, k4, v4, o4, s4 in _four_dimensional(q, *keys.get(block), o, s):
            result = kernel.forward(*_flip(reverse, q4, k4, v4), kind != "full", scale)
            _merge(o4, s4, *_flip(reverse, *result), block.fresh)


def attend_blocks_backward(
    kernel: type[Kernel],
    blocks: Iterable[Block],
    grad: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_grad: torch.Tensor,
    keys: DenseKeys,
    start: int,
    scale: float,
) -> None:
    """Adds the gradients of the blocks to `query_grad` and to those of `keys`; out and lse are the final ones."""
    for block in blocks:
        kind = block.region.kind
        if kind == "zeros":
            continue
        reverse = kind == "reversed"
        key_grads = keys.open_grad(block)
        views = [block_queries(x, block, start) for x in (grad, query, out, lse, query_grad)]
        for g, q, o, s, dq, k, v, dk, dv in _four_dimensional(*views, *keys.get(block), *key_grads):
            g, q, o, s, k, v = _flip(reverse, g, q, o, s, k, v)
            grads = _flip(reverse, *kernel.backward(g, q, k, v, o, s, kind != "full", scale))
            dq.add_(grads[0])
            dk.add_(grads[1])
            dv.add_(grads[2])
        keys.close_grad(block, *key_grads)


def block_positions(rows: Rows, block: Block, device: torch.device) -> torch.Tensor:
    """The positions of a block's rows, [repeats * rows]."""
    repeats = torch.arange(block.repeats, device=device) * block.stride
    return (repeats[:, None] + rows.start + rows.step * torch.arange(rows.count, device=device)).flatten()


def _dense_index(block: Block, device: torch.device) -> torch.Tensor:
    return block_positions(block.region.keys, block, device)


def _eager_scores(block: Block, query, key, start: int, scale: float, key_index):
    """The block's logits [B, h, repeats, rows, keys] and the indices of its queries and keys."""
    q_index = block_positions(block.region.queries.shift(-start), block, query.device)
    k_index = key_index(block, query.device)
    shape = (block.repeats, -1)
    q = query[:, block.heads].index_select(2, q_index).unflatten(2, shape)
    k = key[:, block.kv_heads].index_select(2, k_index).unflatten(2, shape)
    scores = q @ k.mT * scale
    if block.region.kind != "full":
        square = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        hidden = square.triu(1) if block.region.kind == "causal" else square.tril(-1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, q_index, k_index


def _eager_lse(blocks, query, key, start, scale, key_index, dtype) -> torch.Tensor:
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    for block in blocks:
        view = block_queries(lse, block, start)
        if block.region.kind == "zeros":
            view.copy_(torch.logaddexp(view, _zeros_lse(block, view)))
            continue
        scores, _, _ = _eager_scores(block, query, key, start, scale, key_index)
        view.copy_(torch.logaddexp(view, scores.to(dtype).logsumexp(-1)))
    return lse


def attend_blocks_eager(
    blocks: tuple[Block, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: int,
    scale: float,
    dropout: float,
    key_index: Callable[[Block, torch.device], torch.Tensor] = _dense_index,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the blocks in plain PyTorch: any number of derivatives, dropout, gradient through lse.

    `key_index` tells where the keys of a block lie along the third dimension of `key` and `value`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad():  # only a constant to subtract, so that no exponential overflows
        maximum = _eager_lse(blocks, query, key, start, scale, key_index, dtype)
        maximum = maximum.masked_fill(maximum == -torch.inf, 0)
    total = torch.zeros_like(maximum)
    # Zeros that stay part of the graph, even if no pattern selects any of these queries.
    mixed = query.masked_fill(query.new_ones((), dtype=torch.bool), 0).to(dtype)
    for block in blocks:
        if block.region.kind == "zeros":
            index = block_positions(block.region.queries.shift(-start), block, query.device)
            share = (-maximum[:, block.heads].index_select(2, index)).exp() * block.region.keys.count
            total[:, block.heads].index_add_(2, index, share)
            continue
        scores, q_index, k_index = _eager_scores(block, query, key, start, scale, key_index)
        shift = maximum[:, block.heads].index_select(2, q_index).unflatten(2, (block.repeats, -1))
        weights = (scores.to(dtype) - shift[..., None]).exp()
        total[:, block.heads].index_add_(2, q_index, weights.sum(-1).flatten(2, 3))
        weights = torch.nn.functional.dropout(weights, dropout).to(query.dtype)
        v = value[:, block.kv_heads].index_select(2, k_index).unflatten(2, (block.repeats, -1))
        mixed[:, block.heads].index_add_(2, q_index, (weights @ v).flatten(2, 3).to(dtype))
    out = mixed / total.masked_fill(total == 0, 1)[..., None]
    return out.to(query.dtype), total.log() + maximum
