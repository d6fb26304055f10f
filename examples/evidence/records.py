"""Measurements that are written when they are made, and not made twice: those of a file, and what it still lacks."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from examples.reporting import provenance, write_json


def check_settings(path: Path, found: dict, settings: dict) -> None:
    """Refuses settings that a file has too, but with other values.

    Raises:
        ValueError: naming the first.
    """
    for name, value in settings.items():
        if name in found and found[name] != value:
            raise ValueError(
                f"`output`: {path} was measured with {name!r} {found[name]!r}, not {value!r}: name another file."
            )


def agree(path: Path, found: dict, settings: dict) -> dict:
    """The settings of a file and of this run together, whose dictionaries may have grown.

    Raises:
        ValueError: they contradict each other.
    """
    together = found | settings
    for name, value in settings.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            check_settings(path, found[name], value)
            together[name] = found[name] | value
        else:
            check_settings(path, found, {name: value})
    return together


def open_record(path: Path, settings: dict, rows: str = "records") -> tuple[list[dict], dict]:
    """The rows that a JSON file holds already, and what stands beside them when this run writes: its provenance, those
    of the runs before it, and `settings`, of which None agrees with everything, and dictionaries may have grown.

    Raises:
        ValueError: the file was measured with other settings.
    """
    beside, settings = {"provenance": provenance(), "earlier runs": []}, json.loads(json.dumps(settings))
    found = json.loads(path.read_text()) if path.exists() else {rows: []}
    known = {name: found[name] for name in settings if found.get(name) is not None}
    settings |= agree(path, known, {name: value for name, value in settings.items() if value is not None})
    if "provenance" in found:
        runs = [*found.get("earlier runs", []), found["provenance"]]
        beside["earlier runs"] = [run for i, run in enumerate(runs) if run not in (*runs[:i], beside["provenance"])]
    return found[rows], beside | settings


@contextmanager
def saving(path: Path, result: dict, every: float = 5.0) -> Iterator[Callable[[], None]]:
    """Gives what is called when `result` has changed. It writes `result` unless it did so within the last `every`
    seconds; what is left is written at the end, also that of an error or Ctrl-C.

    A write takes as long as there are records, and ten thousands of answers are not written anew for each one. A
    process that is killed loses the records of at most `every` seconds.
    """
    written, waits = -math.inf, False

    def save() -> None:
        nonlocal written, waits
        waits = time.monotonic() - written < every
        if not waits:
            write_json(path, result)
            written = time.monotonic()

    try:
        yield save
    finally:
        if waits:
            write_json(path, result)


def measure_missing(path: Path, settings: dict, wanted: list[dict], measure: Callable[..., dict]) -> dict:
    """What the file at `path` holds after `measure(**key)` for every key of `wanted` that it did not hold.

    A record is its key, what `measure` returned, and where it was measured. Interrupt it and call it again to go on.

    Raises:
        ValueError: the file was measured with other settings.
    """
    result = json.loads(path.read_text()) if path.exists() else {"settings": {}, "records": []}
    settings = json.loads(json.dumps(settings))
    check_settings(path, result["settings"], {name: x for name, x in settings.items() if name != "variants"})
    result["settings"] = agree(path, result["settings"], settings)
    records = result["records"]
    missing = [key for key in wanted if not any(key.items() <= record.items() for record in records)]
    with saving(path, result) as save:
        for key in tqdm(missing, unit="record"):
            records.append({**key, **measure(**key), "provenance": provenance()})
            save()
    return result


def mean(records: list[dict], *path: str, **key) -> float | None:
    """Mean over the records that match `key` of the number at `path`; None where there is none."""
    values = []
    for record in records:
        if all(record[name] == value for name, value in key.items()):
            value = record
            for name in path:
                value = value[name]
            values.append(value)
    return None if not values or None in values else sum(values) / len(values)
