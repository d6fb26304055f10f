"""--report-to in every training script: what Accelerate and the Trainer tell a tracker, with none installed."""

import importlib.machinery
import sys
import types

import accelerate
import pytest
from accelerate.utils import LoggerType
from test_lora_finetune import arguments as lora_arguments
from test_lora_finetune import base  # noqa: F401  a fixture: a tiny checkpoint and a text
from test_slides_scripts import data, end_to_end  # noqa: F401  a fixture: thirty slides

from examples import lora_finetune, runs, train_causal_lm, train_sequence_parallel
from examples.slides import finetune


pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' on small data


@pytest.fixture
def logged(monkeypatch) -> list[tuple[str, float, int]]:
    """What a tensorboardX of ours is given: (name, value, step)."""
    rows: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, log_dir, **options):
            self.log_dir = log_dir

        def add_scalar(self, name, value, global_step=None):
            rows.append((name, value, global_step))

        def nothing(self, *args, **options):
            """Texts, hyperparameters and the ends of writing."""

        add_text = add_hparams = flush = close = nothing

    stub = types.ModuleType("tensorboardX")
    stub.__spec__, stub.SummaryWriter = importlib.machinery.ModuleSpec("tensorboardX", None), SummaryWriter
    for name, module in {"tensorboardX": stub, "tensorboard": None, "torch.utils.tensorboard": None}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    return rows


def loop_arguments(checkpoint, output, *more):
    return ["--text", str(checkpoint / "text.txt"), "--output-dir", str(output), "--block-size", "64",
            "--max-steps", "3", "--warmup-steps", "1", *more]  # fmt: skip


def run(script, checkpoint, slides, output, *more):
    """The losses in a script's own record, by step."""
    if script is finetune:
        more = ("--logging-steps", "1", "--num-train-epochs", "1", *more)
        return dict(finetune.main(end_to_end(slides, output, *more))["training"]["losses"])
    if script is lora_finetune:
        training = lora_finetune.main(lora_arguments(checkpoint, output, *more))["training"][lora_finetune.TUNED]
        return {row["step"]: row["loss"] for row in training["losses"]}
    sample = ["--sample-tokens", "0"] if script is train_causal_lm else []
    history = script.main(loop_arguments(checkpoint, output, *sample, *more))["history"]
    return {row["step"]: row["loss"] for row in history}


SCRIPTS = [train_causal_lm, train_sequence_parallel, lora_finetune, finetune]
NAMES = [script.__name__.rpartition(".")[2] for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_tracker_is_told_the_losses_of_the_record(script, base, data, logged, tmp_path):  # noqa: F811
    losses = run(script, base, data, tmp_path / "run", "--report-to", "tensorboard")
    told = {step: value for name, value, step in logged if name in ("loss", "train/loss")}
    assert len(losses) >= 2 and told == pytest.approx(losses)
    assert any(name.endswith("learning_rate") for name, _, _ in logged)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_tracker_that_is_not_installed_is_refused_before_the_work(script, base, data, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="`report_to` must name installed trackers, got aim"):
        run(script, base, data, tmp_path / "run", "--report-to", "aim")


def test_none_is_no_tracker():
    assert runs.trackers(None) is None and runs.trackers("none") is None and runs.trackers(["none"]) is None
