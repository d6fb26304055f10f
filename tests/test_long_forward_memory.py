"""The memory benchmark, on one layer: reading twice as much takes twice the memory, not four times."""

import json

import pytest

from examples.benchmarks import long_forward_memory


def test_memory_grows_linearly(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "memory.json"
    schedule = ["--segment-lengths", "256", "1024", "--dilation-rates", "1", "4"]
    long_forward_memory.main(
        ["--model", "random", "--num-layers", "1", "--lengths", "4096", "8192", "--output", str(output), *schedule]
    )
    short, long = json.loads(output.read_text())["rows"]
    # Scores of 8192 x 8192 alone, for nine heads, would be 2.3 GiB.
    assert 1.5 * short["working_mib"] < long["working_mib"] < 2.5 * short["working_mib"]
    assert output.with_suffix(".png").stat().st_size > 0
