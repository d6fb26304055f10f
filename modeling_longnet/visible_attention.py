"""Dilated attention of a stretch of queries over a buffer that holds just the keys they can see.

Whoever calls (a bounded cache, a chunk of a long text) says where each block's keys lie in the buffer.

Letters: B batch, H query heads, G key/value heads, Q queries, M rows of the buffer, D head dimension.
"""

from dataclasses import dataclass

import torch

from .attention_blocks import (
    BlockAttention,
    Locate,
    VisibleKeys,
    attend_blocks,
    attend_blocks_backward,
    attend_blocks_eager,
)
from .attention_kernels import Kernel, choose_backend, get_kernel, refuse_tangents
from .dilation_plan import Block, plan_blocks
from .dilation_schedule import DilationSchedule


@dataclass(frozen=True)
class _Visible:
    """The way of `BlockAttention` through one plan over one buffer."""

    kernel: type[Kernel]
    blocks: tuple[Block, ...]
    locate: Locate
    start: int
    scale: float

    def forward(self, query, key, value, out, lse):
        keys = VisibleKeys(key, value, locate=self.locate)
        attend_blocks(self.kernel, self.blocks, query, keys, out, lse, self.start, self.scale)
        return ()

    def backward(self, grad, query, key, value, out, lse, grads):
        keys = VisibleKeys(key, value, *grads[1:], self.locate)
        attend_blocks_backward(
            self.kernel, self.blocks, grad, query, out, lse, grads[0], keys, self.start, self.scale
        )  # fmt: skip


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
    blocks = plan_blocks(
        schedule, query.shape[1], key.shape[1], query_start, stop, length, head_index_offset, total_num_heads
    )
    if backend == "eager":
        return attend_blocks_eager(blocks, query, VisibleKeys(key, value, locate=locate), query_start, scale, 0.0)[0]
    refuse_tangents(backend, query, key, value)
    way = _Visible(get_kernel(backend, query), blocks, locate, query_start, scale)
    return BlockAttention.apply(way, query, key, value)[0]
