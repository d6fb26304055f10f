"""Each cell of docs/compatibility.md names tests that exist."""

import re
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs/compatibility.md").read_text()
OURS, _, UPSTREAM = TEXT.partition("## Upstream's own test-suite")
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


def test_upstream_numbers_add_up():
    """The rows of the mixins, the row of the sum, and the skipped tests that are named, for both versions."""
    table, _, skipped = UPSTREAM.partition("| skipped because |")
    cells = [re.findall(r"(\d+) \((\d+)\)", line) for line in table.splitlines() if line.startswith("|")]
    *mixins, total = [[int(n) for pair in pairs for n in pair] for pairs in cells if pairs]
    assert total == [sum(column) for column in zip(*mixins)]
    tests = re.findall(r"`(\w+)`(?: \((5\.\d+)\))?(?=,| \|)", "".join(re.findall(r"\| `.*", skipped)))
    assert len(set(tests)) == len(tests)
    for version, passed, left_out in zip(("5.23", "5.17"), total[::2], total[1::2], strict=True):
        assert passed >= 140 and left_out == sum(only in ("", version) for _, only in tests)
