"""Records how each test ended; laid out as `conftest.py` of Transformers' tests by `run_upstream_tests.py`.

One line of JSON per test goes to the file that UPSTREAM_RESULTS names, as soon as the test has ended.
"""

import json
import os
from collections import Counter
from pathlib import Path

from transformers import testing_utils


# The sizes of the causal-LM tester's models, as in 5.17: the copy of the tester imports them, 5.24 has them elsewhere.
if not hasattr(testing_utils, "_TEXT_MODEL_TESTER_DEFAULTS"):
    testing_utils._TEXT_MODEL_TESTER_DEFAULTS = {
        "batch_size": 13, "seq_length": 7, "is_training": True, "use_input_mask": True, "use_labels": True,
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "hidden_act": "gelu",
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip

RESULTS = Path(os.environ["UPSTREAM_RESULTS"])
owners: dict[str, str] = {}
reports: dict[str, dict] = {}


def owner(item) -> str:
    """The class that brings a test, one of the mixins as a rule: the deepest, as some are wrapped in each subclass."""
    return next(cls.__name__ for cls in reversed(item.cls.__mro__) if item.name in vars(cls))


def pytest_collection_modifyitems(config, items):
    # The last line of a test counts: what failed may run again.
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    last = {line["test"]: line["outcome"] for line in lines}
    done = {name for name, outcome in last.items() if outcome != "failed"}
    keep, drop = [], []
    for item in items:
        owners[item.nodeid] = owner(item)
        (drop if item.name in done else keep).append(item)
    config.hook.pytest_deselected(items=drop)
    items[:] = keep


def reason(report) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr or "")


def pytest_runtest_logreport(report):
    entry = reports.setdefault(report.nodeid, {"outcome": "passed", "reason": "", "subtests": Counter(), "seconds": 0})
    entry["seconds"] += report.duration
    if hasattr(report, "context"):  # a subtest
        entry["subtests"][report.outcome] += 1
    if report.failed or (report.skipped and entry["outcome"] == "passed"):
        is_subtest_skip = hasattr(report, "context") and report.skipped
        entry["reason"] = reason(report)
        if not is_subtest_skip:
            entry["outcome"] = report.outcome
    if report.when != "teardown":
        return
    entry = reports.pop(report.nodeid)
    subtests = entry["subtests"]
    if entry["outcome"] == "passed" and subtests["skipped"] and not subtests["passed"]:
        entry["outcome"] = "skipped"
    if entry["outcome"] == "passed":
        entry["reason"] = ""
    name = report.nodeid.rpartition("::")[2]
    line = {"test": name, "owner": owners[report.nodeid], **entry, "seconds": round(entry["seconds"], 1)}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
