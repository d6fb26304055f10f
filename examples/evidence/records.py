"""Measurements that are written when they are made, and not made twice."""

import json
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from examples.reporting import provenance, write_json


def measure_missing(path: Path, settings: dict, wanted: list[dict], measure: Callable[..., dict]) -> dict:
    """What the file at `path` holds after `measure(**key)` for every key of `wanted` that it did not hold.

    A record is its key, what `measure` returned, and where it was measured. Interrupt it and call it again to go on.

    Raises:
        ValueError: the file was measured with other settings.
    """
    settings = json.loads(json.dumps(settings))
    result = json.loads(path.read_text()) if path.exists() else {"settings": {}, "records": []}
    for name, value in settings.items():
        if result["settings"].setdefault(name, value) != value:
            raise ValueError(f"{path} was measured with another {name!r}: choose another `--output`, or move it away.")
    done = [{name: record.get(name) for name in key} for record in result["records"] for key in wanted[:1]]
    for key in tqdm([key for key in wanted if key not in done], unit="record"):
        result["records"].append({**key, **measure(**key), "provenance": provenance()})
        write_json(path, result)
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
