"""What the scripts share around their work: options, schedules, trackers, and checkpoints of Accelerate's loops.

Options are written with hyphens, `--output-dir`; scripts whose options are a dataclass take `--output_dir` too.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from examples.reporting import write_json


REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_PRESET = str(REPOSITORY / "configuration/longnet-demo-tiny.json")


def option(default: Any, text: str | None = None, **more: Any) -> Any:
    """A field of a dataclass that HfArgumentParser reads, with its help and, for instance, its `choices`."""
    return field(default=default, metadata={"help": text} | more)


def check_least(settings: Any, names: Iterable[str], least: int = 1) -> None:
    """Refuses options below `least`.

    Raises:
        ValueError: naming the option.
    """
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {getattr(settings, name)}.")


def parse_scaled(
    parser: argparse.ArgumentParser, scales: dict[str, dict], arguments: list[str] | None
) -> argparse.Namespace:
    """The options of a parser with a --scale: those that were not given are the scale's."""
    options = parser.parse_args(arguments)
    for name, value in scales[options.scale].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def geometric_patterns(length: int, first: int, ratio: int = 2, *, clip: bool = False) -> list[tuple[int, int]]:
    """(first, 1), (first ratio, ratio), ... until a segment covers `length`: as many tokens a head in each pattern.

    Args:
        length: tokens to cover.
        first: length of the first segment.
        ratio: of each segment and rate to the one before.
        clip: no segment is longer than `length`.
    """
    patterns = [(first, 1)]
    while patterns[-1][0] < length:
        w, r = patterns[-1]
        patterns.append((w * ratio, r * ratio))
    return [(min(w, length), r) for w, r in patterns] if clip else patterns


def schedule_of(patterns: Iterable[tuple[int, int]]) -> dict[str, list[int]]:
    """Patterns (w, r) as `patch_model` and configurations take them."""
    lengths, rates = map(list, zip(*patterns))
    return {"segment_lengths": lengths, "dilation_rates": rates}


def end_script(main: Callable[[], Any], hint: str = "the same command with --resume goes on from a checkpoint") -> None:
    """Runs a script to its exit status: 0, 1 with a line for a bad option, 130 where it was interrupted (None)."""
    try:
        finished = main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        finished = None
        print(f"\ninterrupted; {hint}", file=sys.stderr)
    sys.exit(130 if finished is None else 0)


def trackers(names: str | list[str] | None) -> list[str] | None:
    """The trackers of --report-to, or None; Accelerate alone would leave out silently what is not installed.

    Raises:
        ValueError: naming those that are not.
    """
    asked = [name for name in ([names] if isinstance(names, str) else names or []) if name != "none"]
    available = [tracker.value for tracker in get_available_trackers()]
    if absent := [name for name in asked if name in LoggerType.list() and name not in (*available, "all")]:
        installed = ", ".join(available) or "none is"
        raise ValueError(f"`report_to` must name installed trackers, got {', '.join(absent)}; installed: {installed}.")
    return asked or None


def start_tracking(accelerator: Accelerator, settings: Any) -> None:
    """Begins the run in the trackers that the accelerator was made with, its settings included."""
    config = {name: x if isinstance(x, (int, float, str)) else str(x) for name, x in asdict(settings).items()}
    accelerator.init_trackers("longnet-transformers", config)


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_complete_checkpoint(output_dir: Path) -> str | None:
    """A Trainer's last checkpoint that was written to its end, which is its state; killed in between, it has none."""
    for path in reversed(checkpoints(output_dir)):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None


def open_output(settings: Any) -> Path:
    """The folder --output-dir, made now: what cannot be written shows before the work.

    Raises:
        ValueError: checkpoints of a run that is not to be resumed.
    """
    output = Path(settings.output_dir)
    if not settings.resume and checkpoints(output):
        raise ValueError(
            f"`output_dir` must hold no checkpoints without --resume, got {settings.output_dir!r}, which does."
        )
    output.mkdir(parents=True, exist_ok=True)
    return output


def save_checkpoint(accelerator: Accelerator, settings: Any, state: dict[str, Any]) -> Path:
    """Written under another name first: a folder called checkpoint-N is a complete one.

    Args:
        settings: with `output_dir` and `save_total_limit`.
        state: plain JSON with `history`, whose last row tells the step, and `identity` for `load_checkpoint`.
    """
    output_dir, step = Path(settings.output_dir), state["history"][-1]["step"]
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f"unfinished-checkpoint-{step}"
    if final.is_dir():
        return final
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / "training_state.json", state)
        temporary.rename(final)
        for old in checkpoints(output_dir)[: -settings.save_total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, output_dir: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Restores weights, optimizer, schedule, random states; returns the training state.

    Raises:
        ValueError: no checkpoint, or one of a run whose identity is another.
    """
    found = checkpoints(output_dir)
    if not found:
        raise ValueError(f"`resume` needs a checkpoint-N folder in `output_dir`, got {str(output_dir)!r} without one.")
    saved, identity = json.loads((found[-1] / "training_state.json").read_text()), json.loads(json.dumps(identity))
    for name in sorted(identity):
        if saved["identity"].get(name) != identity[name]:
            raise ValueError(
                f"`resume` goes on with the run as it was: {name} must be {saved['identity'].get(name)!r} as in "
                f"{found[-1]}, got {identity[name]!r}."
            )
    accelerator.load_state(str(found[-1]))
    return saved
