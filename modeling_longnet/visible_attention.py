"""Dilated attention of a stretch of queries over a buffer that holds just the keys they can see.

This is the one hook for all that does not have every key at hand: a bounded cache (keys of the past by slot), a chunk
of a long text, a rank that received rows from others. Whoever calls says where each block's keys lie in the buffer.

Letters: B batch, H query heads, G key/value heads, Q queries, M rows of the buffer, D head dimension.
"""

from collections.abc import Callable
from functools import partial

import torch

from .attention_blocks import (
    attend_blocks,
    attend_blocks_backward,
    attend_blocks_eager,
    block_positions,
    strided_rows,
)
from .attention_kernels import choose_backend, get_kernel, refuse_tangents
from .dilation_plan import Block, Rows, plan_blocks
from .dilation_schedule import DilationSchedule


# Where a block's keys lie: a stretch of the buffer (repeats follow at the block's own stride), or one index per key.
Locate = Callable[[Block], Rows | torch.Tensor]


class VisibleKeys:
    """Keys and values [B, G, M, D] in whatever order `locate` knows, and where their gradients gather."""

    def __init__(self, locate: Locate, key, value, key_grad=None, value_grad=None):
        self.locate, self.key, self.value, self.key_grad, self.value_grad = locate, key, value, key_grad, value_grad

    @staticmethod
    def _rows(x: torch.Tensor, block: Block, place: Rows | torch.Tensor) -> torch.Tensor:
        if isinstance(place, Rows):
            return strided_rows(x, block.kv_heads, place, block.repeats, block.stride)
        return x[:, block.kv_heads].index_select(2, place).unflatten(2, (block.repeats, -1))

    def get(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        place = self.locate(block)
        return self._rows(self.key, block, place), self._rows(self.value, block, place)

    def open_grad(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        place = self.locate(block)
        views = self._rows(self.key_grad, block, place), self._rows(self.value_grad, block, place)
        return views if isinstance(place, Rows) else tuple(torch.zeros_like(x) for x in views)

    def close_grad(self, block: Block, key_grad: torch.Tensor, value_grad: torch.Tensor) -> None:
        place = self.locate(block)
        if not isinstance(place, Rows):
            for total, grad in ((self.key_grad, key_grad), (self.value_grad, value_grad)):
                total[:, block.kv_heads].index_add_(2, place, grad.flatten(2, 3))


class _AttendVisible(torch.autograd.Function):
    """Forward by blocks, backward by replaying them, as in dilated_attention.py."""

    @staticmethod
    def forward(ctx, query, key, value, locate, blocks, start, scale, kernel):
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        out = torch.zeros_like(query, dtype=lse_dtype)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=lse_dtype)
        attend_blocks(kernel, blocks, query, VisibleKeys(locate, key, value), out, lse, start, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.settings = locate, blocks, start, scale, kernel
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        query, key, value, out, lse = ctx.saved_tensors
        locate, blocks, start, scale, kernel = ctx.settings
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
        keys = VisibleKeys(locate, key, value, *grads[1:])
        attend_blocks_backward(kernel, blocks, grad, query, out, lse, grads[0], keys, start, scale)
        return *(g.to(x.dtype) for g, x in zip(grads, (query, key, value))), *(None for _ in ctx.settings)


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
    head_index_offset: int = 0,
    total_num_heads: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of the queries at positions query_start, query_start + 1, ... of a document of `length` tokens.

    Args:
        query: [B, H, Q, D]; all rows of the batch at the same positions.
        key, value: [B, G, M, D], a buffer of rows in an order that only `locate` knows; G divides H.
        locate: tells for a block of the plan where its keys (`block.region.keys`, `block.pattern`, `block.offset`,
            `block.kv_heads`) lie: `Rows` of the buffer, or an integer tensor [repeats * count] of buffer rows.

    Returns:
        [B, H, Q, D]. The gradient reaches query, key and value (through "eager" also the second one).

    Raises:
        ValueError: the backend that was asked for cannot run these inputs.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = choose_backend(backend, query, 0.0)
    stop = query_start + query.shape[2]
    length = stop if schedule.is_causal else length
    blocks = plan_blocks(
        schedule, query.shape[1], key.shape[1], query_start, stop, length, head_index_offset, total_num_heads
    )
    if backend == "eager":
        index = partial(_as_index, locate)
        return attend_blocks_eager(blocks, query, key, value, query_start, scale, 0.0, index)[0]
    refuse_tangents(backend, query, key, value)
    kernel = get_kernel(backend, query)
    return _AttendVisible.apply(query, key, value, locate, blocks, query_start, scale, kernel)[0]


def _as_index(locate: Locate, block: Block, device: torch.device) -> torch.Tensor:
    place = locate(block)
    return block_positions(place, block, device) if isinstance(place, Rows) else place
