"""The notebook runs from top to bottom, says what it promises, and draws its pictures."""

import contextlib
import io
import json
from pathlib import Path

import pytest


NOTEBOOK = Path(__file__).parent.parent / "examples/longnet_in_ten_minutes.ipynb"


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def run() -> tuple[dict, str]:
    """The names that the cells leave behind, and what they print. The cells are Python, without magics."""
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")
    matplotlib.use("agg")
    names, printed = {"__name__": "notebook"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(cells("code")):
            exec(compile(source, f"cell {number}", "exec"), names)
    return names, printed.getvalue()


def test_the_model_learns_and_the_loaded_one_is_the_same(run):
    names, _ = run
    assert names["losses"][-1] < 0.7 * names["losses"][0]
    assert names["difference"] == 0


def test_the_cache_stops_growing(run):
    sizes = [line.split("cache of ")[1] for line in run[1].splitlines() if "cache of" in line]
    assert len(sizes) == 3 and sizes[1] == sizes[2]


def test_the_patch_leaves_short_texts_as_they_were(run):
    at_64, at_512 = run[0]["changes"]
    assert at_64 < 1e-5 < 1e-3 < at_512


def test_pictures_show_something(run):
    figures = [run[0]["plt"].figure(number) for number in run[0]["plt"].get_fignums()]
    assert len(figures) == 3
    assert all(axis.images or axis.lines for figure in figures for axis in figure.axes)
    seen = run[0]["seen"]
    assert not seen.triu(1).any() and seen.any(0)[0, 0] and seen.float().mean() < 0.4
    run[0]["plt"].close("all")


def test_the_notebook_is_small_and_shows_its_pictures():
    notebook = json.loads(NOTEBOOK.read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < 200_000 and len(cells("markdown")) >= 8
