"""The benchmark measures what it says: the same rows on both sides, complete records."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.benchmarks import benchmark_attention as benchmark
from examples.runs import geometric_patterns


def test_gathered_rows_are_those_that_the_definition_selects():
    x = torch.randn(1, 8, 64, 4)
    rows = benchmark.gathered(x, w=16, r=4)
    assert rows.shape == (4, 8, 4, 4)
    for head in range(8):
        selected = [p for p in range(64) if p % 16 % 4 == head % 4]
        assert torch.equal(rows[:, head].flatten(0, 1), x[0, head, selected])


def test_the_kernels_of_a_call_are_those_that_it_makes():
    qkv = [torch.randn(1, 2, 70, 8, requires_grad=True) for _ in range(3)]
    forward, _backward = benchmark.kernels_of(benchmark.operator(qkv, [(70, 1)], True))
    torch.testing.assert_close(forward()[0].transpose(0, 1), benchmark.dilated_attention(*qkv, [70], [1]))
    run = benchmark.operator(qkv, [(16, 1)], False, **benchmark.PATCHED)
    assert len(benchmark.kernels_of(run)) < len(benchmark.kernels_of(run, in_triangles=True))


def test_geometric_schedule_covers_the_length_at_the_same_cost_everywhere():
    patterns = geometric_patterns(1_000_000, 2048)
    assert patterns[-1][0] >= 1_000_000 > patterns[-2][0]
    assert {w // r for w, r in patterns} == {2048}


@pytest.mark.parametrize("mode", list(benchmark.MODES))
def test_each_mode_leaves_a_record_and_a_figure(mode, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark.KERNEL_RATIO, "patterns", [(64, 1), (128, 2)])
    lengths = {"kernel-ratio": ["128"], "patch-ratio": ["600"], "length": ["64", "128"], "dense": ["64", "128"]}[mode]
    arguments = ["--mode", mode, "--device", "cpu", "--repeats", "2", "--output-dir", str(tmp_path), "--lengths"]
    result = benchmark.main(arguments + lengths)
    name = f"attention_{mode.replace('-', '_')}_cpu"
    assert json.loads((tmp_path / f"{name}.json").read_text())["mode"] == mode
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {"hardware", "date", "commit", "command"} <= set(result["provenance"])
    seconds = [row["seconds"] for rows in result.get("times", {}).values() for row in rows]
    seconds += [row[name] for row in result["rows"] for name in ("dilated", "dense")] if mode == "dense" else []
    seconds += [row["bare kernels"] for row in result["rows"]] if mode == "patch-ratio" else []
    assert seconds and min(seconds) > 0


@pytest.mark.parametrize("given", [["--heads", "4"], ["--dtype", "float32"], ["--lengths", "1000"]])
def test_what_the_kernel_ratio_cannot_vary_is_refused(given, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--mode", "kernel-ratio", "--output-dir", str(tmp_path), *given])
    assert given[0] in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_peak_memory_counts_at_least_the_output_and_the_gradients():
    """In a process of its own: what others have freed could be used again unseen."""
    code = """import json; from examples.benchmarks import benchmark_attention as benchmark
print(json.dumps(benchmark.operator_memory(length=8192, heads=4, width=32, patterns=[(64, 1), (128, 2)])))"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bytes_of_qkv"] == 3 * 8192 * 4 * 32 * 4
    assert 1.3 < result["multiple_of_qkv"] < 20  # output, its gradient and three more are 5/3
