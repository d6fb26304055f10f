"""The runner of Transformers' own tests: what it lays out, refuses, records and goes on with. None of them run here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from upstream import run_upstream_tests as runner
from upstream import upstream_report as report


@pytest.fixture
def release(tmp_path):
    """A source distribution and a checkout with files of the right names."""
    source, checkout = tmp_path / "transformers-5.24.0", tmp_path / "checkout"
    for folder, names in ((source, runner.FROM_RELEASE), (checkout, (*runner.MISSING, runner.CONFIGURATION_TEST))):
        for name in names:
            path = folder / "tests" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"NAME = {name!r}\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: transformers\nVersion: 5.24.0\n")
    mixin = source / "tests/test_fsdp_mixin.py"
    mixin.write_text("from .distributed_testing_utils import _start_rank_processes\n")
    (checkout / "tests/generation/test_utils.py").write_text("self.f(past_key_values=outputs.past_key_values)\n")
    constant = checkout / "tests" / runner.CONFIGURATION_TEST
    constant.write_text("import nothing_that_exists\nconfig_common_kwargs = {'a': 1}\n")
    package = checkout / "src/transformers/__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text('__version__ = "5.16.0.dev0"\n')
    return source, checkout


def test_the_layout_holds_what_the_tests_import(release, tmp_path):
    source, checkout = release
    changes = runner.lay_out("5.24.0", source, [source, checkout], tmp_path / "layout")
    tests = tmp_path / "layout/tests"
    assert (tests / "generation/test_utils.py").read_text() == "self.f(cache=outputs.cache)\n"
    assert "`past_key_values` reads `cache` in `tests/generation/test_utils.py` (2 places)" in changes
    assert (tests / runner.CONFIGURATION_TEST).read_text() == "config_common_kwargs = {'a': 1}\n"
    assert "def run_distributed" in (tests / "distributed_testing_utils.py").read_text()
    assert "LongNetModelTest" in (tests / "models/longnet/test_modeling_longnet.py").read_text()
    assert runner.describe([checkout]) == "Transformers' repository at 5.16.0.dev0"


def test_tests_of_an_older_release_keep_its_words(release, tmp_path):
    source, checkout = release
    changes = runner.lay_out("5.17.0", source, [source, checkout], tmp_path / "layout")
    assert "past_key_values" in (tmp_path / "layout/tests/generation/test_utils.py").read_text()
    assert not any("reads `cache`" in change for change in changes)


def test_what_is_missing_is_asked_for_by_name(release, tmp_path):
    source, _ = release
    with pytest.raises(SystemExit, match=r"tests/causal_lm_tester.py.*--missing-from"):
        runner.lay_out("5.24.0", source, [source], tmp_path / "layout")
    with pytest.raises(SystemExit, match="of Transformers 5.24.0, installed is 5.17.0"):
        runner.check_release(source, "5.17.0")


SUITE = """
import os, unittest
class BringsTests:
    def test_passes(self): pass
    def test_is_skipped(self): self.skipTest("no\\ndevice for <class 'a.LongNetModel'>")
    def test_fails_once(self): self.assertTrue(os.path.exists("again"), "not yet")
    def test_has_skipped_parts(self):
        for part in range(2):
            with self.subTest(part=part): self.skipTest("nothing to do")
    def test_has_parts(self):
        for part in range(2):
            with self.subTest(part=part):
                if part: self.skipTest("nothing to do")
class LongNetModelTest(BringsTests, unittest.TestCase):
    pass
"""


def run_suite(folder: Path) -> None:
    environment = os.environ | {"UPSTREAM_RESULTS": str(folder / "results.jsonl")}
    subprocess.run([sys.executable, "-m", "pytest", "-q", "test_suite.py"], cwd=folder, env=environment)


def test_results_are_recorded_and_only_failures_run_again(tmp_path):
    (tmp_path / "conftest.py").write_text((runner.HERE / "suite_conftest.py").read_text())
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    results = tmp_path / "results.jsonl"
    run_suite(tmp_path)
    assert report.failed_tests(results) == ["test_fails_once"]
    assert report.summary(results)["counts"] == {"BringsTests": [2, 2, 1]}
    assert list(report.summary(results)["failed"]) == ["test_fails_once"]
    (tmp_path / "again").touch()
    run_suite(tmp_path)
    assert len(results.read_text().splitlines()) == 6 and not report.failed_tests(results)
    summary = report.summary(results)
    assert summary["counts"] == {"BringsTests": [3, 2, 0]} and summary["subtests_passed"] == 1
    assert "not yet (1 of 2 runs)" in summary["passed_when_run_again"]["test_fails_once"]
    assert sorted(sum(summary["skipped"].values(), [])) == ["test_has_skipped_parts", "test_is_skipped"]
    assert json.loads(results.read_text().splitlines()[0])["owner"] == "BringsTests"
