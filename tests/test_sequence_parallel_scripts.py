"""The sequence-parallel example survives the death of a rank; the byte counts, the cost model and the YAMLs hold."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from examples import train_sequence_parallel
from examples.benchmarks import scaling_cost_model, sequence_parallel_bytes
from examples.runs import geometric_patterns
from modeling_longnet.patching import is_patched
from modeling_longnet.sequence_exchange import Heads


ROOT = Path(__file__).parent.parent
EXAMPLE = ["-m", "examples.train_sequence_parallel", "--block-size", "256", "--max-steps", "16", "--warmup-steps", "2",
           "--save-steps", "4"]  # fmt: skip


def start(processes: int, output: Path, *options: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *EXAMPLE, "--output-dir", str(output), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in json.loads((folder / "results.json").read_text())["history"]]


@pytest.mark.slow
def test_the_example_has_the_curve_of_one_process_and_goes_on_bit_for_bit_after_a_rank_was_killed(tmp_path):
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    finish(start(1, one))
    output = finish(start(2, two))
    assert "2 (ranks that share a text)" in output
    assert losses(two) == pytest.approx(losses(one), abs=1e-5) and len(losses(two)) == 16

    process = start(2, killed)
    deadline = time.monotonic() + 240
    while not (killed / "checkpoint-4").is_dir():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in output
    assert not (killed / "results.json").exists()
    finish(start(2, killed, "--resume"))
    assert losses(killed) == losses(two)
    got, wanted = (load_file(folder / "model.safetensors") for folder in (killed, two))
    assert got.keys() == wanted.keys() and all((got[name] == wanted[name]).all() for name in wanted)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"segment_lengths": [32]}, "belong together, got segment_lengths alone"),
        ({"segment_lengths": [32], "dilation_rates": [1]}, "for a checkpoint, `model`"),
        ({"block_size": 0}, "`block_size` must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        train_sequence_parallel.Settings(**settings)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT sets it right by itself
def test_a_checkpoint_is_trained_without_attention_dropout_whatever_its_family_calls_it(tmp_path):
    config = GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=259, n_positions=64, attn_pdrop=0.1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    model, _ = train_sequence_parallel.make_model(
        train_sequence_parallel.Settings(model=str(tmp_path), segment_lengths=[8, 32], dilation_rates=[1, 4])
    )
    assert is_patched(model) and model.get_base_model().config.attn_pdrop == 0


def test_received_bytes_do_not_grow_with_the_text_but_with_the_number_of_patterns(capsys):
    sizes = "--heads 4 --kv-heads 4 --head-dim 16".split()
    rows = sequence_parallel_bytes.main(["--lengths", "4096", "16384", "65536", *sizes])["rows"]
    assert [row["patterns longer than a slice"] for row in rows] == [2, 2, 2]
    most = [max(row["bytes received by each rank"]) for row in rows]
    assert most[0] > 0 and max(most) <= 1.01 * min(most)
    assert rows[2]["all keys"] == 16 * rows[0]["all keys"]
    assert "65,536" in capsys.readouterr().out


@pytest.mark.parametrize("gpus", [4, 8, 16])
def test_the_cost_model_bounds_the_bytes_of_the_plans(gpus):
    model = scaling_cost_model.Model(1e6, 2, 64, heads=4, kv_heads=4, head_dim=16)
    patterns = geometric_patterns(16384, 256, 4, clip=True)
    bound = scaling_cost_model.bytes_received(patterns, gpus, 16384, model)
    planned = max(
        sequence_parallel_bytes.measure(16384, gpus, 256, Heads(4, 4), 16, 2)["bytes received by each rank"]
    )
    assert 0.7 * bound < planned <= bound


def test_the_cost_model_prints_its_plan(capsys):
    result = scaling_cost_model.main(["--preset", str(ROOT / "configuration/longnet-125m.json"), "--gpus", "8", "64"])
    assert len(result["rows"]) == 8
    by_gpus = {(row["tokens"], row["gpus"]): row for row in result["rows"]}
    assert by_gpus[2**24, 64]["dense (s)"] == pytest.approx(by_gpus[2**24, 8]["dense (s)"] / 8)
    assert by_gpus[2**30, 8]["received (MB a layer)"] < 2 * by_gpus[2**20, 8]["received (MB a layer)"]
    assert "| 1,048,576 | 8 |" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "configuration/accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_its_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    processes = [int(part) for part in path.stem.split("_") if part.isdigit()][-1]
    assert config.num_processes == processes
    assert (config.fsdp_config or {}).get("fsdp_version", 2) == 2
