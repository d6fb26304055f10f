"""Runs Transformers' own tests of a release (models, generation, training, tensor parallelism, FSDP) on LongNet.

    pip install 'transformers==5.24.0' parameterized
    python tests/upstream/run_upstream_tests.py --missing-from CHECKOUT

The tests come from the source distribution of the installed release, which pip downloads (or from `--sdist`). It lacks
some of what they import; that is taken from CHECKOUT, a folder with Transformers' repository (or those of its files
that a message asks for), as near to the release as can be had. Nothing of it is in this repository. The tests are laid
out in `runs/upstream/RELEASE` and run there on the classes that `longnet_suite.py` names. Ctrl-C stops; the same
command goes on where it was. The counts go to `docs/results/upstream_tests.json`, and from there into
`docs/compatibility.md` (`--write-docs` does that alone).
"""

import argparse
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers
from transformers import testing_utils
from transformers.exporters import base


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
RUNS = 3  # of a test that fails: some of Transformers' compare random float16 results to the last bit
# What the tests and the record of a run import beyond Transformers.
NEEDED_MODULES = ("matplotlib", "parameterized", "pytest")
FROM_RELEASE = (
    "test_configuration_common.py", "test_modeling_common.py", "test_training_mixin.py",
    "test_tensor_parallel_mixin.py", "test_fsdp_mixin.py", "test_expert_parallel_mixin.py",
)  # fmt: skip
OPTIONAL = {"test_expert_parallel_mixin.py"}  # not in each release
MISSING = ("causal_lm_tester.py", "generation/test_utils.py", "exporters/test_export.py")
CONFIGURATION_TEST = "utils/test_configuration_utils.py"  # one constant of it is wanted
# The tester's base for pipelines downloads tiny checkpoints from the Hub: an empty class is in its place.
NO_PIPELINE_TESTS = "class PipelineTesterMixin:\n    pass\n"
CACHE_RENAMED_IN = (5, 24)


def fetch_release(release: str, sdist: Path | None, work: Path) -> Path:
    """The unpacked source distribution of a release."""
    if sdist is not None and sdist.is_dir():
        return sdist
    if sdist is None:
        downloads = work / "download"
        sdist = next(downloads.glob("transformers-*.tar.gz"), None)
        if sdist is None:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
            subprocess.run([*pip, "--dest", str(downloads), f"transformers=={release}"], check=True)
            sdist = next(downloads.glob("transformers-*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "sdist", filter="data")
    return next((work / "sdist").glob("transformers-*"))


def check_release(folder: Path, release: str) -> None:
    """Refuses the tests of another release than the installed one."""
    found = re.search(r"^Version: (\S+)$", (folder / "PKG-INFO").read_text(), re.MULTILINE)[1]
    if found != release:
        sys.exit(f"The tests in {folder} are of Transformers {found}, installed is {release}: they must be the same.")


def find_missing(name: str, folders: list[Path]) -> Path:
    for folder in folders:
        if (folder / "tests" / name).is_file():
            return folder / "tests" / name
    sys.exit(
        f"The source distribution lacks tests/{name}: give `--missing-from` a folder that has it (Transformers' "
        "repository as it was at the release)."
    )


def adapted(name: str, text: str, release: str) -> tuple[str, list[str]]:
    """A file from a checkout in the words of the release, and what was changed."""
    changes, wanted = [], tuple(map(int, release.split(".")[:2]))
    if wanted >= CACHE_RENAMED_IN and not re.search(r"\b(outputs?|results?)\.cache\b", text):
        text, count = re.subn(r"\bpast_key_values\b", "cache", text)
        if count:
            changes.append(f"`past_key_values` reads `cache` in `tests/{name}` ({count} places)")
    if hasattr(base, "ExportedModel") and "ExportedModel" not in text:
        text, count = re.subn(r"\bexported_program\.module\(", "exported_program.program.module(", text)
        if count:
            changes.append(f"`exported_program.module()` reads `exported_program.program.module()` in `tests/{name}`")
    if "_TEXT_MODEL_TESTER_DEFAULTS" in text and not hasattr(testing_utils, "_TEXT_MODEL_TESTER_DEFAULTS"):
        changes.append(f"`tests/{name}` gets the sizes of its models, which this release has elsewhere, from us")
    return text, changes


def lay_out(release: str, source: Path, folders: list[Path], root: Path) -> list[str]:
    """Writes the tests into `root`; returns what was changed in them, or stands in for one of them, in words."""
    shutil.rmtree(root, ignore_errors=True)
    tests, changes = root / "tests", []
    for folder in ("", "generation", "exporters", "utils", "models", "models/longnet"):
        (tests / folder).mkdir(parents=True)
        (tests / folder / "__init__.py").touch()
    for name in FROM_RELEASE:
        if name not in OPTIONAL or (source / "tests" / name).exists():
            shutil.copy(source / "tests" / name, tests / name)
    for name in MISSING:
        text, changed = adapted(name, find_missing(name, folders).read_text(), release)
        (tests / name).write_text(text)
        changes += changed
    constant = find_constant(find_missing(CONFIGURATION_TEST, folders), "config_common_kwargs")
    (tests / CONFIGURATION_TEST).write_text(f"config_common_kwargs = {constant!r}\n")
    if "distributed_testing_utils" in "".join(path.read_text() for path in tests.glob("test_*mixin.py")):
        given = [folder for folder in folders if (folder / "tests/distributed_testing_utils.py").exists()]
        ranks = given[0] / "tests/distributed_testing_utils.py" if given else HERE / "start_ranks.py"
        shutil.copy(ranks, tests / "distributed_testing_utils.py")
        if not given:
            changes.append("`tests/distributed_testing_utils.py`, which starts the ranks, is our `start_ranks.py`")
    shutil.copy(HERE / "longnet_suite.py", tests / "models/longnet/test_modeling_longnet.py")
    shutil.copy(HERE / "suite_conftest.py", root / "conftest.py")
    (root / "pytest.ini").write_text("[pytest]\n")  # or pytest would read this repository's settings
    (tests / "test_pipeline_mixin.py").write_text(NO_PIPELINE_TESTS)
    return changes


def find_constant(path: Path, name: str) -> object:
    """A literal that a file assigns to a name, without running the file, which imports what no test here needs."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    sys.exit(f"{path} does not assign `{name}`.")


def check_commit(results: Path, commit: str | None) -> None:
    """Refuses to go on with what was run on another commit."""
    begun = results.with_suffix(".commit")
    if results.exists() and begun.read_text() != str(commit):
        sys.exit(f"{results} was begun at commit {begun.read_text()}, this is {commit}: pass --again.")
    begun.write_text(str(commit))


def describe(folders: list[Path]) -> str:
    """Which checkout it is, as far as it tells."""
    for folder in folders:
        package = folder / "src/transformers/__init__.py"
        if package.is_file():
            version = re.search(r'^__version__ = "(.*)"$', package.read_text(), re.MULTILINE)
            return f"Transformers' repository at {version[1]}"
    return "files of Transformers' repository"


def run_tests(root: Path, results: Path, is_slow: bool, arguments: list[str]) -> int:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        "UPSTREAM_RESULTS": str(results), "HF_HUB_OFFLINE": "1", "RUN_SLOW": str(int(is_slow)),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", "--disable-warnings"]
    return subprocess.run([*command, *arguments, "tests/models"], cwd=root, env=environment).returncode


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="the release's source distribution, a .tar.gz or unpacked")
    parser.add_argument("--missing-from", type=Path, action="append", default=[], help="CHECKOUT; may be given again")
    parser.add_argument("--work", type=Path, help="default: runs/upstream/RELEASE")
    parser.add_argument("--fast", action="store_true", help="without tests marked slow; is not recorded")
    parser.add_argument("--again", action="store_true", help="forgets what an earlier run has done")
    parser.add_argument("--write-docs", action="store_true", help="docs/compatibility.md from the JSON, no tests")
    parser.add_argument("pytest", nargs="*", help="after `--`: for pytest, like -k EXPRESSION; is not recorded")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    lacking = [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if lacking:
        sys.exit(f"This needs what is not installed: pip install {' '.join(lacking)}")
    sys.path.insert(0, str(REPOSITORY))
    from upstream_report import failed_tests, provenance, record, write_docs

    if arguments.write_docs:
        write_docs()
        return 0
    release = transformers.__version__
    work = (arguments.work or REPOSITORY / "runs/upstream" / release).resolve()
    source = fetch_release(release, arguments.sdist, work)
    check_release(source, release)
    root, results = work / "layout", work / "results.jsonl"
    changes = lay_out(release, source, [source, *arguments.missing_from], root)
    is_whole = not (arguments.fast or arguments.pytest)
    if not is_whole:
        results = work / "partial.jsonl"
    if arguments.again or not is_whole:
        results.unlink(missing_ok=True)
    check_commit(results, provenance()["commit"])
    for _ in range(RUNS if is_whole else 1):
        status = run_tests(root, results, not arguments.fast, arguments.pytest)
        if status not in (0, 1, 5):  # interrupted, or nothing could be run; 5: an earlier run has done all
            return status
        if not failed_tests(results):
            break
    if is_whole:
        record(release, results, describe(arguments.missing_from), changes)
        write_docs()
    return int(bool(failed_tests(results)))


if __name__ == "__main__":
    sys.exit(main())
