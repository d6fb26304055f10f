"""Each cell of docs/compatibility.md names tests that exist; what it says of upstream's tests is what was recorded."""

import json
import re
from pathlib import Path

import pytest
from upstream import upstream_report


TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs/compatibility.md").read_text()
OURS = TEXT.partition("## Upstream's own test-suite")[0]
RUNS = json.loads(upstream_report.RESULTS.read_text())
CLAIMS = sorted(
    {(file, name) for file, names in re.findall(r"\b(test_\w+)(?:: ((?:`\w+`(?:, )?)+))?", OURS)
     for name in re.findall(r"`(\w+)`", names) or [""]}
)  # fmt: skip


@pytest.mark.parametrize("file, name", CLAIMS, ids=lambda value: value)
def test_named_tests_exist(file, name):
    functions = re.findall(r"^def (test_\w+)", (TESTS / f"{file}.py").read_text(), re.MULTILINE)
    assert [function for function in functions if name in function], f"no test of {file}.py is called like {name!r}"


def test_every_cell_says_something():
    rows = [line for line in TEXT.splitlines() if line.startswith("|") and not set(line) <= set("|-")]
    assert len(CLAIMS) > 40 and len(rows) > 30
    assert all(cell.strip() for row in rows for cell in row.strip("|").split("|"))


def test_upstream_section_is_made_from_the_record():
    _, _, rest = TEXT.partition(upstream_report.BEGIN)
    assert rest.partition(upstream_report.END)[0].strip() == upstream_report.section(RUNS)


@pytest.mark.parametrize(
    "release, known",
    [("5.24.0", set()), ("5.17.0", {"test_tp_generation_quantized"})],  # the page says why
)
def test_upstream_numbers_add_up(release, known):
    """No failure but those that are explained, and as many skipped tests named as counted."""
    run = RUNS[release]
    passed, skipped, failed = (sum(column) for column in zip(*run["counts"].values()))
    names = [name for names in run["skipped"].values() for name in names]
    assert passed >= 160 and failed == len(run["failed"]) and set(run["failed"]) <= known
    assert len(names) == len(set(names)) == skipped
    assert run["transformers"] == release and run["commit"] and run["hardware"]
    exported = {name for name in names if name.startswith("test_torch_export")}
    assert not exported, "slow export tests are part of the record"


def test_a_release_with_other_numbers_makes_another_section():
    changed = json.loads(json.dumps(RUNS))
    next(iter(changed["5.24.0"]["counts"].values()))[0] += 1
    assert upstream_report.section(changed) != upstream_report.section(RUNS)
