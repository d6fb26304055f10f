"""The memory benchmark, on one layer: reading four times as much takes four times the memory, not sixteen times."""

import json

import pytest

from examples.benchmarks import long_forward_memory


def test_memory_grows_linearly(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "memory.json"
    schedule = ["--segment-lengths", "256", "1024", "--dilation-rates", "1", "4"]
    long_forward_memory.main(
        ["--model", "random", "--num-layers", "1", "--lengths", "4096", "16384", "--output", str(output), *schedule]
    )
    short, long = json.loads(output.read_text())["rows"]
    # What a process holds depends on what its allocator keeps, so the bound lies halfway (as a factor) between linear
    # and quadratic. The scores of 16384 x 16384 of one head alone would be 1 GiB; there are nine.
    assert 2 * short["working_mib"] < long["working_mib"] < 8 * short["working_mib"]
    assert long["working_mib"] < 1024
    assert output.with_suffix(".png").stat().st_size > 0


def test_a_training_step_is_measured(tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "step.json"
    preset = "configuration/longnet-demo-tiny.json"
    long_forward_memory.main(["--train", preset, "--num-layers", "1", "--lengths", "512", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["of"] == "training step" and result["rows"][0]["working_mib"] > 0
    assert output.with_suffix(".png").stat().st_size > 0
