"""Transformers' own structure checker on our model files."""

import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "modeling_longnet"


def test_the_structure_checker_finds_nothing(tmp_path):
    pytest.importorskip("mlinter", reason="needs transformers-mlinter")
    done = subprocess.run(
        [sys.executable, "-m", "mlinter", "--no-progress", "--no-cache", str(PACKAGE)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK" in done.stdout + done.stderr
