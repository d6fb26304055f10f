"""Attention of a chunk of queries over a bounded cache: against the slots, and the chunk itself.

Letters: B batch, H query heads, G key/value heads, Q query tokens, P tokens that are not in the slots yet (the queries
are the last of them), S slots, D head dimension.
"""

import json
import math
import re
from dataclasses import asdict
from functools import lru_cache

import torch

from .dilated_attention import scheduled_attention
from .dilated_cache_layout import SlotLayout
from .dilation_schedule import DilationSchedule, Heads
from .visible_attention import attend_visible


def _same_phase(schedule: DilationSchedule, start: int) -> int:
    """A distance by which the texts' beginning may be moved towards `start` so that every segment stays as it is.

    Positions that repeat make plans that repeat, which are then looked up instead of made.
    """
    period = math.lcm(*schedule.segment_lengths, schedule.window or 1)
    reach = -(-(schedule.num_sink_tokens + schedule.dense_start + schedule.window) // period)
    return max(0, start // period - reach) * period


def _attend_rows(query, key, value, slots, layout, origin, scale, backend):
    """The rows of the batch that stand at one position and have no padding in this chunk."""
    if origin == 0:
        return scheduled_attention(
            query, key, value, layout.schedule, heads=layout.heads, scale=scale, backend=backend
        )
    start = origin + key.shape[2] - query.shape[2]
    shift = _same_phase(layout.schedule, origin)

    def locate(block):
        return layout.locate(block, origin - shift, layout.allocated, query.device)

    buffer = (torch.cat(pair, dim=2) for pair in zip(slots, (key, value)))
    return attend_visible(
        query, *buffer, layout.schedule, locate,
        query_start=start - shift, length=start - shift + query.shape[2], scale=scale, backend=backend,
        heads=layout.heads,
    )  # fmt: skip


def attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: tuple[torch.Tensor, torch.Tensor],
    layout: SlotLayout,
    origins: list[int],
    pads: list[int],
    scale: float,
    backend: str | None,
) -> torch.Tensor:
    """Attention of the last Q of P new tokens, [B, H, Q, D]; padding queries give zeros.

    Args:
        query: [B, H, Q, D]. key, value: [B, G, P, D].
        slots: keys and values of what came before, [B, G, S, D].
        origins: per row, the position of its first new token that is no padding.
        pads: per row, how many of the P columns are padding, all on the left.
    """
    batch, _, query_length, _ = query.shape
    waiting = key.shape[2] - query_length
    groups = {}
    for row, place in enumerate(zip(origins, pads)):
        groups.setdefault(place, []).append(row)
    outs = []
    for (origin, pad), rows in groups.items():
        skipped = min(max(0, pad - waiting), query_length)
        tensors = (query[:, :, skipped:], key[:, :, pad:], value[:, :, pad:], *slots)
        q, k, v, *past = tensors if len(groups) == 1 else (x[rows] for x in tensors)
        if skipped < query_length:
            q = _attend_rows(q, k, v, past, layout, origin, scale, backend)
        outs.append(torch.nn.functional.pad(q, (0, 0, skipped, 0)))
    if len(groups) == 1:
        return outs[0]
    order = torch.tensor([row for rows in groups.values() for row in rows], device=query.device)
    return torch.cat(outs).index_select(0, order.argsort())


# A compiled forward sees chunks as one opaque operator. Operators take no Python objects, so layouts go as text.
def layout_name(layout: SlotLayout) -> str:
    """The layout as the compiled operator takes it."""
    return json.dumps(asdict(layout))


@lru_cache(maxsize=64)
def read_layout_name(name: str) -> SlotLayout:
    """The layout that `layout_name` wrote."""
    fields = json.loads(name)
    schedule = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["schedule"].items()}
    return SlotLayout(DilationSchedule(**schedule), Heads(**fields["heads"]), fields["max_length"])


def _compiled_chunk(query, key, value, slots_key, slots_value, origins, pads, layout, scale, backend):
    out = attend_chunk(
        query, key, value, (slots_key, slots_value), read_layout_name(layout), origins.tolist(), pads.tolist(), scale,
        backend or None,
    )  # fmt: skip
    return out.contiguous()


_NAMESPACE = "longnet_" + re.sub(r"\W", "_", __name__)
compiled_chunk = torch.library.custom_op(
    f"{_NAMESPACE}::chunk",
    _compiled_chunk,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor slots_key, Tensor slots_value, Tensor origins, "
    "Tensor pads, str layout, float scale, str backend) -> Tensor",
)


@compiled_chunk.register_fake
def _(query, *others):
    return torch.empty_like(query, memory_format=torch.contiguous_format)
