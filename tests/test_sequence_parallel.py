"""sharded = unsharded: outputs, losses, every gradient, and trainings, on 2, 3 and 4 processes started by torchrun.

The processes run sequence_parallel_worker.py and sequence_parallel_training.py; many cases share a start.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sequence_parallel_worker import longnet, patched_llama
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from modeling_longnet import LongNetForMaskedLM, LongNetForSequenceClassification
from modeling_longnet.patching import patch_model
from modeling_longnet.sequence_parallel import SequenceParallel
from modeling_longnet.sequence_shards import SHARD, ShardingCollator


HERE = Path(__file__).parent
# Transformers computes RMSNorm in float32 whatever the dtype, so the order of sums shows in patched models.
TOLERANCES = {"longnet": 1e-12, "patched": 1e-6}


def run_python(processes: int, script: str, *arguments: str) -> None:
    """Runs a script of this folder on that many processes; fails with the end of its output."""
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def run_checks(processes: int, folder: Path, *checks: str) -> dict:
    run_python(processes, "sequence_parallel_worker.py", str(folder / "result.json"), *checks)
    result = json.loads((folder / "result.json").read_text())
    assert result["world_size"] == processes
    return result


def check_operator_and_models(result: dict, cases: int) -> None:
    assert result["operator"]["torch.float64"] < 1e-12
    assert result["operator"]["torch.float32"] < 1e-5
    assert len(result["models"]) == cases
    wrong = {
        case: errors
        for case, errors in result["models"].items()
        if max(errors.values()) > TOLERANCES[case.split()[0]] or errors["logits"] > 1e-12
    }
    assert not wrong


@pytest.mark.slow
def test_sharded_equals_unsharded_on_two_processes_and_planted_bugs_show(tmp_path):
    checks = ("operator", "models", "mutations", "head_split", "collectives", "guards")
    result = run_checks(2, tmp_path, *checks)
    check_operator_and_models(result, cases=45)
    assert len(result["mutations"]) == 9
    for bug, errors in result["mutations"].items():
        assert errors["gradients"] > 1e-2, bug
    # A lost gradient shows neither in the outputs nor in the loss.
    assert result["mutations"]["gradients do not travel back"]["loss"] < 1e-12
    for offsets in ("modulo", "contiguous"):
        assert result["head_split"][offsets] < 1e-12
        assert result["head_split"][f"{offsets} not told"] > 1e-2
    collectives = result["collectives"]
    assert (collectives["spanning, forward"], collectives["spanning, with backward"]) == (2, 4)
    assert (collectives["local, forward"], collectives["local, with backward"]) == (0, 0)
    assert "1 (data parallel) x 2" in collectives["report"] and "layer 1: 0 bytes" in collectives["report"]
    assert [name for name, holds in result["guards"].items() if not holds] == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_sharded_equals_unsharded(processes, tmp_path):
    check_operator_and_models(run_checks(processes, tmp_path, "operator", "models"), cases=9)


def train(processes: int, size: int, folder: Path, *recipes: str) -> dict[str, dict]:
    folder.mkdir()
    run_python(processes, "sequence_parallel_training.py", str(folder), str(size), *recipes)
    results = {recipe: torch.load(folder / f"{recipe}.pt", weights_only=True) for recipe in recipes}
    assert {result["world_size"] for result in results.values()} == {processes}
    return results


def check_same_training(got: dict, wanted: dict, tolerance: float = 1e-5) -> None:
    assert got["parameters"].keys() == wanted["parameters"].keys()
    for name, parameter in wanted["parameters"].items():
        assert (got["parameters"][name] - parameter).abs().max() < tolerance, name
    assert got["losses"] == pytest.approx(wanted["losses"], abs=tolerance)
    for name in ("rates", "evaluation", "steps"):
        assert got.get(name) == pytest.approx(wanted.get(name), abs=tolerance), name


@pytest.mark.slow
def test_trainings_equal_stock_trainings(tmp_path):
    pytest.importorskip("peft")
    recipes = ["accumulated", "bf16", "lora reentrant", "not reentrant", "compiled", "fsdp2", "trainer resumed"]
    whole = ["loop without masks", "trainer", "sft"]
    try:
        import trl  # noqa: F401
    except ImportError:
        whole.remove("sft")
    stock = train(1, 0, tmp_path / "stock", "trainer uninterrupted", *whole, *recipes)
    bugs = ["fast scheduler", "data parallel loader"]
    sharded = train(2, 2, tmp_path / "two", "trainer", *recipes, *bugs)
    for name in ("trainer", *recipes):
        check_same_training(sharded[name], stock[name], tolerance=1e-2 if name == "bf16" else 1e-5)
    check_same_training(sharded["trainer resumed"], stock["trainer uninterrupted"])
    assert sharded["fast scheduler"]["rates"] != pytest.approx(stock["accumulated"]["rates"])
    assert "slices of the same texts" in sharded["data parallel loader"]["error"]
    both = train(4, 2, tmp_path / "two by two", *whole)
    for name in whole:
        for result in (both[name], stock[name]):
            result.pop("evaluation", None)  # the batches of an evaluation depend on the data-parallel width
        check_same_training(both[name], stock[name])


# What must not run


def dynamic_rope_llama():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**sizes, max_position_embeddings=64, rope_parameters=rope)
    return patch_model(LlamaForCausalLM(config), [8, 16], [1, 2])


def unpatched_llama():
    sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes))


REFUSED = {
    "dense attention": (unpatched_llama, "is not dilated"),
    "a layer left alone": (lambda: patched_llama(layers=[1]), r"layers \[0\] are not patched"),
    "eager": (lambda: longnet(attn_implementation="eager"), "eager attention does not run"),
    "eager patch": (lambda: patched_llama(backend="eager"), "eager attention does not run"),
    "attention dropout": (lambda: longnet(attention_dropout=0.1), "`attention_dropout` must be 0"),
    "stochastic depth": (lambda: longnet(drop_path_rate=0.1), "`drop_path_rate` must be 0"),
    "a loss of the last token": (lambda: longnet(LongNetForSequenceClassification), "loss is not one of each token"),
    "rope of the length": (dynamic_rope_llama, "rope_type 'dynamic' depends"),
    "no Transformers model": (lambda: torch.nn.Linear(2, 2), "must be a Transformers model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_be_wrong_are_refused(case):
    make_model, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        SequenceParallel(None, 1).add_hooks(make_model())


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(patched_llama(dtype=torch.float32), config)
    with pytest.raises(ValueError, match="virtual tokens"):
        SequenceParallel(None, 1).add_hooks(model)


@pytest.mark.parametrize("size", [0, 2, True, 1.0])
def test_a_size_that_does_not_divide_the_processes_is_refused(size):
    with pytest.raises(ValueError, match="`size` must divide the number of processes"):
        SequenceParallel(None, size)


def test_settings_of_a_trainer_that_would_be_wrong_are_refused(tmp_path):
    from transformers import Trainer, TrainingArguments

    class OwnLoss(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    def attach(cls=Trainer, compute_metrics=None, **settings):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **settings)
        trainer = cls(longnet(dtype=torch.float32), args, compute_metrics=compute_metrics)
        SequenceParallel(None, 1).attach_trainer(trainer)

    with pytest.raises(ValueError, match="average_tokens_across_devices"):
        attach(average_tokens_across_devices=False)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        attach(label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="compute_metrics"):
        attach(compute_metrics=lambda prediction: {})
    with pytest.raises(ValueError, match="in its own way"):
        attach(OwnLoss)


def test_a_size_of_one_changes_nothing_and_labels_of_encoders_are_not_shifted():
    sp = SequenceParallel(None, 1)
    model = longnet(LongNetForMaskedLM, dtype=torch.float32, is_causal=False)
    ids = torch.randint(1, 60, (2, 21))
    labels = ids.masked_fill(torch.rand(2, 21) < 0.7, -100)
    wanted = model(ids, labels=labels)
    sp.add_hooks(model)
    got = model(**sp.collator(lambda x: x, shift_labels=False)({"input_ids": ids, "labels": labels}))
    torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.loss, wanted.loss)


def test_hooks_can_be_removed_and_a_copy_has_its_own():
    sp, model = SequenceParallel(None, 1), longnet(dtype=torch.float32)
    modules = (model.model, model.model.xpos)
    hooks, ids = sp.add_hooks(model), torch.randint(1, 60, (1, 21))
    assert sp.add_hooks(model) is hooks and all(module._forward_pre_hooks for module in modules)
    twin = copy.deepcopy(model)
    assert sp.add_hooks(twin) is not hooks and sp.add_hooks(twin).sp is sp
    with pytest.raises(ValueError, match="was not cut"):
        model(ids)
    hooks.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    with pytest.raises(ValueError, match="was not cut"):
        twin(ids)
    shard = sp.collator(lambda x: x)({"input_ids": ids})
    torch.testing.assert_close(twin(**shard).logits, model(ids).logits)
    sp.add_hooks(twin).remove()
    torch.testing.assert_close(twin(ids).logits, model(ids).logits)


def test_the_collator_keeps_what_does_not_run_along_the_text_and_refuses_masks_of_pairs():
    collator = SequenceParallel(None, 1).collator(lambda x: x)
    ids = torch.arange(6)[None]
    batch = collator({"input_ids": ids, "labels": ids, "index": torch.tensor([3]), "cu_seq_lens_q": torch.tensor([0])})
    assert batch["index"].tolist() == [3] and "cu_seq_lens_q" not in batch
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4, 5, -100]] and batch["num_items_in_batch"] == 5
    with pytest.raises(ValueError, match="`attention_mask` must have the shape"):
        collator({"input_ids": ids, "attention_mask": torch.ones(1, 1, 6, 6)})
    with pytest.raises(ValueError, match="`collate` must return"):
        collator({"pixel_values": ids})
    with pytest.raises(ValueError, match="already"):
        SequenceParallel(None, 1).collator(collator)


def test_a_worker_of_a_loader_cuts_the_slices_that_the_rank_itself_would():
    examples = [{"input_ids": torch.arange(9) + i, "labels": torch.arange(9) + i} for i in range(4)]
    collator = ShardingCollator(default_data_collator, rank=1, size=2)
    # Spawned, so that all of it is pickled there and back.
    loader = DataLoader(examples, 2, collate_fn=collator, num_workers=1, multiprocessing_context="spawn")
    for start, batch in zip((0, 2), loader, strict=True):
        wanted = collator(examples[start : start + 2])
        shard, wanted_shard = batch.pop(SHARD), wanted.pop(SHARD)
        torch.testing.assert_close(batch, wanted)
        assert vars(shard) == vars(wanted_shard) and shard.rank == 1
