"""The benchmark of reading: all sides, and where a patch begins to pay."""

import json

import pytest

from examples.benchmarks import patched_prefill


def test_all_sides_are_measured_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "prefill.json"
    patched_prefill.main(["--rounds", "1", "--layers", "1", "--lengths", "64", "300", "--output", str(output)])
    result = json.loads(output.read_text())
    for sides in result["lengths"].values():
        assert sides[patched_prefill.DENSE]["times_faster"] == 1
        assert all(row["cpu_seconds"] > 0 and row["peak_mib"] >= 0 for row in sides.values()) and len(sides) == 3
    assert output.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize("faster, first", [([0.5, 1.1, 2], 2), ([1, 2, 3], 1), ([2, 0.9, 0.9], None), ([2, 0.9, 1], 4)])
def test_the_crossover_is_the_first_length_behind_all_slower_ones(faster, first):
    results = {str(n): {"a patch": {"times_faster": x}} for n, x in zip((1, 2, 4), faster)}
    assert patched_prefill.crossover(results, "a patch") == first
