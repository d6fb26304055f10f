"""Queries over a buffer of rows, in any order, equal the whole attention: outputs and all gradients."""

import pytest
import torch

from modeling_longnet.attention_blocks import attend_visible, block_positions
from modeling_longnet.dilated_attention_reference import dilated_attention_reference
from modeling_longnet.dilation_schedule import DilationSchedule


SCHEDULES = {
    "count": DilationSchedule((8, 16, 32), (1, 2, 4), num_sink_tokens=2),
    "once-sliding": DilationSchedule((8, 16, 32), (1, 2, 4), overlap="once", local="sliding"),
    "once-uneven": DilationSchedule((7, 20, 33), (1, 2, 3), overlap="once", num_sink_tokens=3),
    "bidirectional": DilationSchedule((8, 16), (1, 2), is_causal=False, overlap="once"),
}


@pytest.mark.parametrize("shuffled", [True, False], ids=["indices", "stretches"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_chunk_equals_whole(schedule, backend, shuffled):
    start, count, length = 23, 20, 43
    query = torch.randn(2, 4, count, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    order = torch.randperm(length)
    place = order.argsort()

    def locate(block):
        return place[block_positions(block.region.keys, block, query.device)] if shuffled else block.region.keys

    buffers = [x[:, :, order] if shuffled else x for x in (key, value)]
    out = attend_visible(query, *buffers, schedule, locate, query_start=start, length=length, backend=backend)
    wanted = dilated_attention_reference(query, key, value, **schedule.as_arguments())
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    grads, wanted_grads = (torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (out, wanted))
    for x, y in zip(grads, wanted_grads):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
