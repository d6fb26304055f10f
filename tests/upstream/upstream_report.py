"""What came of running Transformers' own tests: `docs/results/upstream_tests.json`, and `docs/compatibility.md`."""

import json
import re
from collections import defaultdict
from pathlib import Path

from examples.reporting import provenance, write_json


DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
RESULTS, PAGE = DOCS / "results/upstream_tests.json", DOCS / "compatibility.md"
BEGIN, END = "<!-- from docs/results/upstream_tests.json: do not edit -->", "<!-- end -->"
COMMAND = "python tests/upstream/run_upstream_tests.py --missing-from CHECKOUT"


def read_lines(path: Path) -> dict[str, list[dict]]:
    """The records of each test, in the order of its runs."""
    tests = defaultdict(list)
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        tests[entry["test"]].append(entry)
    return tests


def failed_tests(path: Path) -> list[str]:
    return [name for name, runs in read_lines(path).items() if runs[-1]["outcome"] == "failed"]


def _in_words(reason: str) -> str:
    """A reason without the name of the class that happened to be the first."""
    first = reason.splitlines()[0] if reason else "no reason given"
    return re.sub(r"<class '[\w.]*'>|LongNet\w+", "the model", first).strip().rstrip(".").replace("|", "/")


def _gist(reason: str) -> str:
    """The line of a traceback that says what was wrong, which is another process's where ranks have failed."""
    lines = reason.splitlines() or ["no reason given"]
    said = [line for line in lines if re.match(r"(\w+\.)*\w*Error: ", line)]
    return (said or lines)[-1 if said else 0].replace("|", "/")


def summary(path: Path) -> dict:
    """Counts by the class that brings the tests, [passed, skipped, failed], and what did not simply pass."""
    counts, skipped, failed, again, subtests = defaultdict(lambda: [0, 0, 0]), defaultdict(list), {}, {}, 0
    for name, runs in read_lines(path).items():
        outcome, reason = runs[-1]["outcome"], runs[-1]["reason"]
        counts[runs[-1]["owner"]][("passed", "skipped", "failed").index(outcome)] += 1
        subtests += runs[-1]["subtests"].get("passed", 0)
        if outcome == "skipped":
            skipped[_in_words(reason)].append(name)
        elif outcome == "failed":
            failed[name] = _gist(reason)
        elif len(runs) > 1:
            again[name] = f"{_gist(runs[0]['reason'])} ({len(runs) - 1} of {len(runs)} runs)"
    return {
        "counts": dict(sorted(counts.items())),
        "subtests_passed": subtests,
        "failed": failed,
        "passed_when_run_again": again,
        "skipped": {reason: sorted(names) for reason, names in sorted(skipped.items())},
    }


def record(release: str, results: Path, checkout: str, changes: list[str]) -> None:
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    origin = provenance() | {"command": COMMAND, "checkout": checkout, "changes": changes}
    runs[release] = origin | summary(results)
    newest_first = sorted(runs, key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    write_json(RESULTS, {name: runs[name] for name in newest_first})


def _table(header: list[str], rows: list[list]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def _counts(runs: dict[str, dict]) -> list[str]:
    owners = sorted({owner for run in runs.values() for owner in run["counts"]})
    rows = [[f"`{owner}`", *(run["counts"].get(owner, [0, 0, 0]) for run in runs.values())] for owner in owners]
    total = [[sum(column) for column in zip(*run["counts"].values())] for run in runs.values()]
    rows.append(["all", *total])
    cells = [[name, *("{} ({}), {}".format(*n) for n in numbers)] for name, *numbers in rows]
    return _table(["passed (skipped), failed", *runs], cells)


def _skipped(runs: dict[str, dict]) -> list[str]:
    reasons = sorted({reason for run in runs.values() for reason in run["skipped"]})
    rows = []
    for reason in reasons:
        names = {}
        for release, run in runs.items():
            for name in run["skipped"].get(reason, ()):
                names.setdefault(name.removeprefix("test_"), []).append(release)
        cells = [f"`{x}`" + f" ({', '.join(y)})" * (len(y) < len(runs)) for x, y in sorted(names.items())]
        rows.append([reason, ", ".join(cells)])
    return _table(["skipped, in upstream's words", "tests, without `test_` in front"], rows)


def section(runs: dict[str, dict]) -> str:
    lines = _counts(runs) + [""]
    for release, run in runs.items():
        lines.append(
            f"- {release}: {run['date']}, commit {run['commit']}, PyTorch {run['torch']}, {run['hardware']}; "
            f"{run['subtests_passed']} subtests passed. What the source distribution lacks is from {run['checkout']}."
        )
        lines += [f"  - {change}." for change in run["changes"]]
        lines += [f"  - failed: `{name}`: {reason}" for name, reason in run["failed"].items()]
        lines += [
            f"  - passed when run again: `{name}`: {reason}" for name, reason in run["passed_when_run_again"].items()
        ]
    return "\n".join([*lines, "", *_skipped(runs)])


def write_docs() -> None:
    """Puts the section between its two marks."""
    before, found, rest = PAGE.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{PAGE} must have the lines {BEGIN!r} and {END!r}.")
    PAGE.write_text(f"{before}{BEGIN}\n{section(json.loads(RESULTS.read_text()))}\n{END}{after}")
