"""Dilated attention of a stretch of queries over a buffer that holds just the keys they can see.

Whoever calls (a bounded cache, a chunk of a long text) says where each block's keys lie in the buffer.

Letters: B batch, H query heads, G key/value heads, Q queries, M rows of the buffer, D head dimension.
"""

import torch

from .attention_blocks import BlockAttention, Locate, PlannedAttention, attend_blocks_eager
from .attention_kernels import choose_backend, get_kernel, refuse_tangents
from .dilation_plan import plan_blocks
from .dilation_schedule import DilationSchedule, Heads


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
    blocks = plan_blocks(schedule, heads or Heads.of(query, key), query_start, stop, length)
    if backend == "eager":
        return attend_blocks_eager(PlannedAttention(None, blocks, query_start, scale, locate), query, key, value)[0]
    refuse_tangents(backend, query, key, value)
    way = PlannedAttention(get_kernel(backend, query), blocks, query_start, scale, locate)
    return BlockAttention.apply(way, query, key, value)[0]
