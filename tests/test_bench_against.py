"""The comparison with another commit: a slower side fails, a broken one says so."""

import subprocess
from pathlib import Path

import pytest

from examples.benchmarks import bench_against


def test_a_slower_checkout_fails_and_is_named(monkeypatch, capsys):
    times = {"operator": (1.0, 1.0), "decode": (1.2, 1.0)}
    monkeypatch.setattr(bench_against, "compare", lambda *args: {k: a / b for k, (a, b) in times.items()})
    assert bench_against.main(["HEAD"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "SLOWER" in lines[1] and "SLOWER" not in lines[0]


@pytest.mark.slow
def test_a_checkout_is_as_fast_as_itself_within_reason():
    if subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("needs a git checkout")
    ratios = bench_against.compare("HEAD", ["operator"], 1)
    assert 0.5 < ratios["operator"] < 2
