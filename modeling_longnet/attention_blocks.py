"""Runs a plan of blocks: forward into one accumulator, backward by replay, and both in plain differentiable PyTorch.

Every block's (out, log-sum-exp) is merged into one dense accumulator, which is the joint softmax; the backward calls
each block's kernel again with the final out and log-sum-exp (see attention_kernels.py for why that is exact).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from .attention_kernels import Kernel, choose_backend, get_kernel, own_precision, refuse_tangents
from .dilation_plan import Block, Rows, plan_bands, plan_blocks
from .dilation_schedule import DilationSchedule, Heads


# Elements of the queries in one kernel call on a CPU: enough for all cores, little beside the inputs of a long text.
CPU_CALL_SIZE = 2**20


# Where a block's keys lie, see `VisibleKeys`.
Locate = Callable[[Block], Rows | torch.Tensor]


def strided_rows(x: torch.Tensor, heads: slice, rows: Rows, repeats: int, stride: int) -> torch.Tensor:
    """[B, H, N, ...] as the view [B, heads, repeats, rows, ...]: no copy."""
    batch, num_heads, _, *inner = x.shape
    batch_stride, head_stride, token_stride, *inner_strides = x.stride()
    chosen = range(num_heads)[heads]
    return x.as_strided(
        (batch, len(chosen), repeats, rows.count, *inner),
        (batch_stride, chosen.step * head_stride, stride * token_stride, rows.step * token_stride, *inner_strides),
        x.storage_offset() + chosen.start * head_stride + rows.start * token_stride,
    )


def block_queries(x: torch.Tensor, block: Block, start: int) -> torch.Tensor:
    """The view of a tensor [B, H, Q, ...] of queries, the first of which has position `start`: [B, heads, repeats,
    rows, ...], or of a band, with M query heads to one of the keys, [B, heads of keys, repeats, M, rows, ...]."""
    view = strided_rows(x, block.heads, block.region.queries.shift(-start), block.repeats, block.stride)
    return view.unflatten(1, (block.kv_heads.stop, -1)).transpose(2, 3) if block.region.kind == "band" else view


def _in_order(block: Block) -> Rows:
    return block.region.keys


class VisibleKeys:
    """Keys and values [B, G, M, D] whose order `locate` knows, and where, in the backward, their gradients gather.

    This is the one hook for all that does not have every key at hand in the order of positions, the default.

    Args:
        locate: tells for a block where its keys (`block.region.keys`, `block.pattern`, `block.offset`,
            `block.kv_heads`) lie: a stretch of M (repeats follow at the block's own stride), indices of M
            [repeats * keys], or, for a buffer in which texts and heads lie in no order either, indices of B * G * M,
            [texts, heads, repeats * keys].
    """

    def __init__(self, key, value, key_grad=None, value_grad=None, locate: Locate = _in_order):
        self.pair, self.grads, self.locate = (key, value), (key_grad, value_grad), locate

    @staticmethod
    def _buffer(x: torch.Tensor, block: Block, place: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        """The rows among which indices choose, along which dimension, and the indices."""
        return (x[:, block.kv_heads], 2, place) if place.dim() == 1 else (x.view(-1, x.shape[-1]), 0, place.flatten())

    def _rows(self, x: torch.Tensor, block: Block, place: Rows | torch.Tensor) -> torch.Tensor:
        if isinstance(place, Rows):
            return strided_rows(x, block.kv_heads, place, block.repeats, block.stride)
        rows, dim, index = self._buffer(x, block, place)
        return rows.index_select(dim, index).view(self._shape(x, block, place))

    @staticmethod
    def _shape(x: torch.Tensor, block: Block, place: torch.Tensor) -> tuple[int, ...]:
        outer = place.shape[:-1] or x[:, block.kv_heads].shape[:2]
        return *outer, block.repeats, block.region.keys.count, x.shape[-1]

    def get(self, block: Block) -> tuple[torch.Tensor, ...]:
        """The block's keys and values, [B, heads, repeats, rows, D]."""
        place = self.locate(block)
        return tuple(self._rows(x, block, place) for x in self.pair)

    def index(self, block: Block) -> torch.Tensor:
        """Where the block's keys lie along M, as indices [repeats * rows]."""
        place = self.locate(block)
        return block_positions(place, block, self.pair[0].device) if isinstance(place, Rows) else place

    def open_grad(self, block: Block) -> tuple[torch.Tensor, ...]:
        """Tensors shaped like those of `get`, to which the block's gradients are added: views where there can be."""
        place = self.locate(block)
        if isinstance(place, Rows):
            return tuple(self._rows(x, block, place) for x in self.grads)
        return tuple(x.new_zeros(self._shape(x, block, place)) for x in self.grads)

    def close_grad(self, block: Block, *grads: torch.Tensor) -> None:
        """Takes them back."""
        place = self.locate(block)
        if not isinstance(place, Rows):
            for total, grad in zip(self.grads, grads):
                rows, dim, index = self._buffer(total, block, place)
                rows.index_add_(dim, index, grad.reshape(*rows.shape[:dim], -1, rows.shape[-1]))


def _four_dimensional(*views: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Kernels take two batch dimensions, views have three: slices along the shortest one.

    On a CPU, large slices are halved until the copies that a kernel makes of them no longer count.
    """
    sizes = views[0].shape[:3]
    shortest = min(range(3), key=lambda dim: (sizes[dim], dim))
    count = views[0].numel() // sizes[shortest]
    pieces = -(-count // CPU_CALL_SIZE) if views[0].device.type == "cpu" else 1
    for slices in zip(*(x.unbind(shortest) for x in views)):
        if pieces == 1:
            yield slices
            continue
        longest = max(range(2), key=lambda dim: slices[0].shape[dim])
        size = max(1, slices[0].shape[longest] // pieces)
        yield from zip(*(x.split(size, dim=longest) for x in slices))


def _flip(reverse: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Time reversed, which turns a triangle of later keys into the causal one that kernels know."""
    return tuple(x.flip(2) for x in tensors) if reverse else tensors


def merge_attentions(outs: tuple, lses: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Joins two softmaxes over different keys, in place of the first: outs [..., D], log-sum-exps [...].

    The second out is the attention to its own keys; or a function that makes their share in the joint softmax of the
    log-sum-exp that it is given, where there are only logits yet; or None, where all values are zero.
    """
    (out, other), (lse, other_lse) = outs, lses
    if isinstance(other, torch.Tensor):
        out.lerp_(other.to(out.dtype), torch.sigmoid(other_lse - lse).unsqueeze(-1))
        torch.logaddexp(lse, other_lse, out=lse)
        return
    joint = torch.logaddexp(lse, other_lse)
    out.mul_((lse - joint).exp_().unsqueeze(-1))
    if other is not None:
        out.add_(other(joint))
    lse.copy_(joint)


def _add_band(totals: tuple[torch.Tensor, ...], shares: tuple[torch.Tensor, ...]) -> None:
    """Adds a band's gradients; the keys of neighbouring bands overlap, as many of them as there are queries do not."""
    totals[0].add_(shares[0])
    rows = totals[0].shape[-2]
    for total, share in zip(totals[1:], shares[1:]):
        for part, own in zip(total.split(rows, dim=2), share.split(rows, dim=2)):
            part.add_(own)


def _zeros_lse(block: Block, like: torch.Tensor) -> torch.Tensor:
    return like.new_tensor(float(block.region.keys.count)).log().expand_as(like)


@dataclass(frozen=True)
class PlannedAttention:
    """Attention by the blocks of one plan: queries at positions start, start + 1, ..., keys in the order of `locate`.

    It is a way of `BlockAttention`; `kernel` is None where only `attend_blocks_eager` runs it.
    """

    kernel: type[Kernel] | None
    blocks: Iterable[Block]
    start: int
    scale: float
    locate: Locate = _in_order

    def forward(self, query, key, value, out, lse) -> tuple[()]:
        """Merges the blocks' attention into `out` [B, H, Q, D] and `lse` [B, H, Q]."""
        keys = VisibleKeys(key, value, locate=self.locate)
        for block in self.blocks:
            q, o, s = (block_queries(x, block, self.start) for x in (query, out, lse))
            kind = block.region.kind
            if kind == "zeros":
                merge_attentions((o, None), (s, _zeros_lse(block, s)))
                continue
            reverse = kind == "reversed"
            for q4, k4, v4, o4, s4 in _four_dimensional(q, *keys.get(block), o, s):
                if kind == "band":
                    result = self.kernel.forward_band(q4, k4, v4, self.scale)
                else:
                    result = self.kernel.forward(*_flip(reverse, q4, k4, v4), kind != "full", self.scale)
                block_out, block_lse = _flip(reverse, *result)
                if block.fresh:
                    o4.copy_(block_out)
                    s4.copy_(block_lse)
                else:
                    merge_attentions((o4, block_out), (s4, block_lse))
        return ()

    def backward(self, grad, query, key, value, out, lse, grads) -> None:
        """Adds the blocks' gradients to `grads`, those of query, key and value; out and lse are the final ones."""
        keys = VisibleKeys(key, value, *grads[1:], self.locate)
        for block in self.blocks:
            kind = block.region.kind
            if kind == "zeros":
                continue
            reverse = kind == "reversed"
            key_grads = keys.open_grad(block)
            views = [block_queries(x, block, self.start) for x in (grad, query, out, lse, grads[0])]
            for g, q, o, s, dq, k, v, dk, dv in _four_dimensional(*views, *keys.get(block), *key_grads):
                if kind == "band":
                    shares = self.kernel.backward_band(g, q, k, v, o, s, self.scale)
                    _add_band((dq, dk, dv), shares)
                    continue
                g, q, o, s, k, v = _flip(reverse, g, q, o, s, k, v)
                result = _flip(reverse, *self.kernel.backward(g, q, k, v, o, s, kind != "full", self.scale))
                for total, share in zip((dq, dk, dv), result):
                    total.add_(share)
            keys.close_grad(block, *key_grads)


def plan_of(kernel: type[Kernel], *arguments, backward: bool = False) -> tuple[Block, ...]:
    """`plan_bands` for a kernel that takes bands, else `plan_blocks`, of these arguments."""
    if hasattr(kernel, "forward_band"):
        return plan_bands(*arguments, backward=backward)
    return plan_blocks(*arguments)


def empty_accumulator(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [B, H, Q, D] and lse [B, H, Q] of no key at all, in float32 at least: what attentions are merged into."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.zeros_like(query, dtype=dtype), query.new_full(query.shape[:3], -torch.inf, dtype=dtype)


def connected_zeros(x: torch.Tensor) -> torch.Tensor:
    """Zeros shaped like x that stay part of its graph, even if no pattern selects any of these queries."""
    return x.masked_fill(x.new_ones((), dtype=torch.bool), 0)


def with_lse_gradient(grad, grad_lse, query, key, value, out) -> tuple[torch.Tensor, ...]:
    """Gradient, query, key, value and out for a backward that knows of no gradient of the log-sum-exp, [B, H, Q].

    dS = P * (dP - rowsum(dO * O) + dlse): with one more column, the row sum inside the kernels holds dlse too.
    """
    pad = torch.nn.functional.pad
    grad = torch.zeros_like(out) if grad is None else grad
    if grad_lse is None:
        return grad, query, key, value, out
    grad = torch.cat([grad, -grad_lse.unsqueeze(-1).to(grad.dtype)], dim=-1)
    return grad, *(pad(x, (0, 1)) for x in (query, key, value)), pad(out, (0, 1), value=1.0)


class BlockAttention(torch.autograd.Function):
    """The autograd shell of all that attends block by block: forward into one accumulator, backward by replay.

    `way.forward(query, key, value, out, lse, *constants)` merges into out [B, H, Q, D] and lse [B, H, Q], and returns
    what its backward wants to have beside them; `way.backward(grad, query, key, value, out, lse, grads, *constants,
    *kept)` is given the final ones, and adds to grads, those of query, key and value, in the dtype of lse.
    """

    @staticmethod
    def forward(ctx, way, query, key, value, *constants):
        out, lse = empty_accumulator(query)
        kept = way.forward(query, key, value, out, lse, *constants)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *constants, *kept)
        ctx.way = way
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_lse):
        query, key, value, out, lse, *kept = ctx.saved_tensors
        width, dtype = query.shape[-1], query.dtype
        grad, query, key, value, out = with_lse_gradient(grad, grad_lse, query, key, value, out)
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
        with own_precision(query):
            ctx.way.backward(grad, query, key, value, out, lse, grads, *kept)
        return None, *(g[..., :width].to(dtype) for g in grads), *(None for _ in ctx.needs_input_grad[4:])


def block_positions(rows: Rows, block: Block, device: torch.device) -> torch.Tensor:
    """The positions of a block's rows, [repeats * rows]."""
    repeats = torch.arange(block.repeats, device=device) * block.stride
    return (repeats[:, None] + rows.start + rows.step * torch.arange(rows.count, device=device)).flatten()


def _eager_scores(plan: PlannedAttention, block: Block, query: torch.Tensor, keys: VisibleKeys):
    """The block's logits [B, h, repeats, rows, keys] and the indices of its queries and keys."""
    q_index = block_positions(block.region.queries.shift(-plan.start), block, query.device)
    k_index = keys.index(block)
    shape = (block.repeats, -1)
    q = query[:, block.heads].index_select(2, q_index).unflatten(2, shape)
    k = keys.pair[0][:, block.kv_heads].index_select(2, k_index).unflatten(2, shape)
    scores = q @ k.mT * plan.scale
    if block.region.kind != "full":
        square = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        hidden = square.triu(1) if block.region.kind == "causal" else square.tril(-1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, q_index, k_index


def _eager_lse(plan: PlannedAttention, query, keys, dtype) -> torch.Tensor:
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    for block in plan.blocks:
        view = block_queries(lse, block, plan.start)
        if block.region.kind == "zeros":
            view.copy_(torch.logaddexp(view, _zeros_lse(block, view)))
            continue
        scores, _, _ = _eager_scores(plan, block, query, keys)
        view.copy_(torch.logaddexp(view, scores.to(dtype).logsumexp(-1)))
    return lse


def attend_blocks_eager(
    plan: PlannedAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a plan in plain PyTorch: any number of derivatives, dropout, gradient through lse."""
    keys = VisibleKeys(key, value, locate=plan.locate)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad():  # only a constant to subtract, so that no exponential overflows
        maximum = _eager_lse(plan, query, keys, dtype)
        maximum = maximum.masked_fill(maximum == -torch.inf, 0)
    total = torch.zeros_like(maximum)
    mixed = connected_zeros(query).to(dtype)
    for block in plan.blocks:
        if block.region.kind == "zeros":
            index = block_positions(block.region.queries.shift(-plan.start), block, query.device)
            share = (-maximum[:, block.heads].index_select(2, index)).exp() * block.region.keys.count
            total[:, block.heads].index_add_(2, index, share)
            continue
        scores, q_index, k_index = _eager_scores(plan, block, query, keys)
        shift = maximum[:, block.heads].index_select(2, q_index).unflatten(2, (block.repeats, -1))
        weights = (scores.to(dtype) - shift[..., None]).exp()
        total[:, block.heads].index_add_(2, q_index, weights.sum(-1).flatten(2, 3))
        weights = torch.nn.functional.dropout(weights, dropout).to(query.dtype)
        v = value[:, block.kv_heads].index_select(2, k_index).unflatten(2, (block.repeats, -1))
        mixed[:, block.heads].index_add_(2, q_index, (weights @ v).flatten(2, 3).to(dtype))
    out = mixed / total.masked_fill(total == 0, 1)[..., None]
    return out.to(query.dtype), total.log() + maximum


@dataclass(frozen=True)
class _Visible:
    """The way of `BlockAttention` through the plans of a forward and of a backward."""

    kernel: type[Kernel]
    plan: tuple[DilationSchedule, Heads, int, int, int]
    scale: float
    locate: Locate

    def _planned(self, backward: bool) -> PlannedAttention:
        blocks = plan_of(self.kernel, *self.plan, backward=backward)
        return PlannedAttention(self.kernel, blocks, self.plan[2], self.scale, self.locate)

    def forward(self, *tensors: torch.Tensor) -> tuple[()]:
        return self._planned(backward=False).forward(*tensors)

    def backward(self, *tensors) -> None:
        self._planned(backward=True).backward(*tensors)


def attend_visible(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    schedule: DilationSchedule,
    locate: Locate,
    *,
    query_start: int,
    length: int,
    scale: float | None = None,
    heads: Heads | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of the queries at positions query_start, query_start + 1, ... of a document of `length` tokens, over a
    buffer that holds just the keys they can see.

    Args:
        query: [B, H, Q, D]; all rows of the batch at the same positions.
        key, value: [B, G, M, D], a buffer of rows in an order that only `locate` knows; G divides H.
        locate: tells for a block of the plan where its keys lie in the buffer, see [`VisibleKeys`].

    Returns:
        [B, H, Q, D]. The gradient reaches query, key and value (through "eager" also the second one).

    Raises:
        ValueError: the backend that was asked for cannot run these inputs.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = choose_backend(backend, query, 0.0)
    stop = query_start + query.shape[2]
    length = stop if schedule.is_causal else length
    plan = schedule, heads or Heads.of(query, key), query_start, stop, length
    if backend == "eager":
        way = PlannedAttention(None, plan_blocks(*plan), query_start, scale, locate)
        return attend_blocks_eager(way, query, key, value)[0]
    refuse_tangents(backend, query, key, value)
    way = _Visible(get_kernel(backend, query), plan, scale, locate)
    return BlockAttention.apply(way, query, key, value)[0]
