"""What a result needs beside its numbers: where it was measured, and a plot."""

import datetime
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure  # at the top, so that a missing library shows before the work, not after it


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, with a `+` if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + "+" * bool(changed.stdout.strip())


def _command() -> str:
    """As typed in the root of the checkout, without this machine's folders."""
    spec = sys.modules["__main__"].__spec__
    path = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parent.parent
    script = ["-m", spec.name] if spec else [str(path.relative_to(root)) if path.is_relative_to(root) else path.name]
    return shlex.join(["python", *script, *sys.argv[1:]])


def provenance() -> dict[str, Any]:
    """Hardware, date, commit, command and versions, as plain JSON."""
    threads = torch.get_num_threads()
    cpu = f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "command": _command(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def caption(origin: dict[str, Any]) -> str:
    """The line under a figure."""
    return f"{origin['hardware']} · {origin['date']} · commit {origin['commit']}"


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Writes in one move, so that an interrupted run leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(path)


def markdown_table(titles: list[str], rows: Iterable[list[str]], texts: int = 1) -> str:
    """A table in Markdown: `texts` columns of texts, then numbers, which stand to the right."""
    rule = "|" + "---|" * texts + "---:|" * (len(titles) - texts)
    head, *lines = (f"| {' | '.join(row)} |" for row in (titles, *rows))
    return "\n".join([head, rule, *lines]) + "\n"


def write_beside(output: Path, table: str, draw: Callable[[dict, Path], None], result: dict) -> None:
    """What is read of a result: its table, printed and beside the JSON file as .md, and its plot, .png."""
    output.with_suffix(".md").write_text(table)
    print(table)
    draw(result, output.with_suffix(".png"))


def new_figure(num_axes: int = 1):
    """A figure with axes side by side, drawn without a display; save it with `save_figure`."""
    figure = Figure(figsize=(5.5 * num_axes, 4), layout="constrained")
    return figure, figure.subplots(1, num_axes, squeeze=False)[0]


def save_figure(figure, path: str | Path, origin: dict[str, Any]) -> None:
    figure.supxlabel(caption(origin), fontsize=7, color="gray")
    figure.savefig(path, dpi=150)
