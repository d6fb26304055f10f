"""The study's masks are those of the definition, so that its figures are those of patched models."""

import pytest
import torch

from examples.benchmarks.zero_shot_patch_study import compare, schedule_of_variant, variant_mask, variants
from modeling_longnet.dilated_attention_reference import attention_counts


SCHEDULES = {name: schedule for name, v in variants().items() if (schedule := schedule_of_variant(v)) is not None}


def test_most_variants_are_schedules_of_the_patch():
    assert len(SCHEDULES) > 15
    assert {s.local for s in SCHEDULES.values()} == {"segment", "sliding"}
    assert {s.overlap for s in SCHEDULES.values()} == {"once", "count"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_mask_is_that_of_the_definition(name):
    length, heads = 600, 9
    mask, _ = variant_mask(variants()[name], heads, 3, length)
    counts = mask.float() if mask.dtype == torch.bool else mask.exp()
    expected, _ = attention_counts(SCHEDULES[name], heads, torch.zeros(1, length, dtype=torch.long), 0, length)
    # A bare window is the patch's from its second segment on; the patch reads the first one densely.
    bare = variants()[name][0][0] == "window" and len(variants()[name][0]) == 2
    start = SCHEDULES[name].dense_start if bare else 0
    torch.testing.assert_close(counts[:, start:], expected[0, :, start:])


def test_a_variant_is_compared_with_dense_on_the_same_windows():
    dense = {"losses": {"English": {"0": 1.0, "1": 9.0}, "code": {"0": 2.0}}}
    result = compare({"losses": {"English": {"0": 1.5}, "code": {"0": 2.1}}}, dense)
    assert result["ratio"] == pytest.approx({"English": 1.6487213, "code": 1.1051709})
    assert result["mean_ratio"] == pytest.approx(2.7182818**0.3)
