"""The net under the other tests holds: memory that nobody wrote reads as NaN."""

import pytest
import torch


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3),
        lambda: torch.empty(3, requires_grad=True),
        lambda: torch.empty_like(torch.ones(3)),
        lambda: torch.empty_strided((3,), (1,), dtype=torch.bfloat16),
        lambda: torch.ones(2).new_empty(3),
        lambda: torch.ones(2).new_empty_strided((3,), (1,)),
    ],
    ids=["empty", "requires_grad", "empty_like", "empty_strided", "new_empty", "new_empty_strided"],
)
def test_uninitialised_floats_are_nan(allocate):
    assert allocate().isnan().all()


def test_device_contexts_still_reach_the_allocation():
    with torch.device("meta"):
        assert torch.empty(1 << 40).device.type == "meta"
