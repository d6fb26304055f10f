"""The command for GPU machines, tried on a CPU: every part leaves its rows, and what is wrong ends it with an error."""

import json

import pytest
import torch

from examples.benchmarks import gpu_suite
from modeling_longnet import DilationSchedule
from modeling_longnet.dilated_attention_reference import attention_counts


def test_a_dry_run_leaves_every_part_a_table_and_a_figure(tmp_path, monkeypatch):
    record = gpu_suite.main(["--dry-run", "--output-dir", str(tmp_path)])
    assert record == json.loads((tmp_path / "gpu_suite.json").read_text()) and record["dry_run"]
    parts = record["parts"]
    assert set(parts) == set(gpu_suite.PARTS) and not parts["tiles"]  # which a GPU alone can measure
    assert len(parts["correctness"]) == 7 and all(len(row["errors"]) == 4 for row in parts["correctness"])
    sides = {"dilated, sdpa", "dense", "dense, equal arithmetic", "sliding window"}
    assert [row["tokens"] for row in parts["lengths"] if row["pass"] == "both"] == gpu_suite.DRY["lengths"]
    assert all(set(row["sides"]) == sides for row in parts["lengths"])
    assert all(found["seconds"] > 0 for row in parts["lengths"] for found in row["sides"].values())
    assert {row["side"] for row in parts["training"]} == {"dilated, sdpa", "dense"}
    assert parts["launches"][0]["both"] > parts["launches"][0]["forward"] > 0
    assert "| sdpa |" in (tmp_path / "gpu_suite.md").read_text()
    assert (tmp_path / "gpu_suite.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(gpu_suite, "PARTS", dict.fromkeys(gpu_suite.PARTS))  # nothing is run again
    assert gpu_suite.main(["--dry-run", "--resume", "--output-dir", str(tmp_path)])["parts"] == parts


def test_a_wrong_result_ends_it_with_an_error_and_stays_in_the_record(tmp_path, monkeypatch):
    right = gpu_suite.dilated_attention
    monkeypatch.setattr(gpu_suite, "dilated_attention", lambda *args, **options: right(*args, **options) * 1.001)
    with pytest.raises(ValueError, match="results are wrong"):
        gpu_suite.main(["--dry-run", "--parts", "correctness", "--output-dir", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]["correctness"]
    assert not any(row["passed"] for row in rows)


def test_a_spent_budget_leaves_out_the_rest_and_says_so(tmp_path):
    arguments = ["--dry-run", "--budget", "0", "--parts", "correctness", "launches", "--output-dir", str(tmp_path)]
    record = gpu_suite.main(arguments)
    assert [len(rows) for rows in record["parts"].values()] == [1, 1] and len(record["left_out"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refused_without_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="--dry-run"):
        gpu_suite.main(["--output-dir", str(tmp_path)])


def test_equal_arithmetic_counts_the_scores_of_the_definition():
    """Keys a query and head sees on average, in the middle of a text, all heads' offsets taken together."""
    patterns = [(16, 1), (32, 2), (64, 4)]
    schedule = DilationSchedule(*zip(*patterns))
    counts, _ = attention_counts(schedule, 4, torch.zeros(1, 128, dtype=torch.long), 0, 128)
    found = counts[..., 64:, :].sum().item() / (4 * 64)
    assert found == pytest.approx(gpu_suite.scores_per_query(patterns), abs=1)
