"""Each cell of docs/compatibility.md names tests that exist."""

import re
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs/compatibility.md").read_text()
CLAIMS = sorted(
    {(file, name) for file, names in re.findall(r"\b(test_\w+)(?:: ((?:`\w+`(?:, )?)+))?", TEXT)
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
