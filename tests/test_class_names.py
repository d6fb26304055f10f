"""Transformers, and what builds on it, know by tables of class names what a model is for: ours stand in them.

A class that is in none of them is not refused; label smoothing, for one, then compares each token with itself.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import tiny_config
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import modeling_longnet
from modeling_longnet import LongNetForCausalLM, export_patched_model, patch_model
from modeling_longnet.configuration_longnet import AUTO_MAP


HEADS = {auto: name.rpartition(".")[2] for auto, name in AUTO_MAP.items() if auto.startswith("AutoModelFor")}


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=128, **sizes))
    return patch_model(model, [8, 32], [1, 4])


def with_adapter():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(LongNetForCausalLM(tiny_config()), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


def smoothed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each token's prediction of the next one."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("make", [lambda: LongNetForCausalLM(tiny_config()), llama, with_adapter])
def test_label_smoothing_compares_each_token_with_the_next(make, tmp_path):
    model = make().eval()
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    x = torch.randint(0, 61, (2, 40))
    found = Trainer(model, arguments).compute_loss(model, {"input_ids": x, "labels": x.clone()})
    with torch.no_grad():
        torch.testing.assert_close(found, smoothed_loss(model(input_ids=x).logits, x))


@pytest.mark.parametrize("auto", HEADS)
def test_every_head_stands_in_its_table(auto):
    """By which pipelines, model cards and Trainer go."""
    names = getattr(transformers, auto)._model_mapping._model_mapping
    assert names["longnet"] == HEADS[auto]
    config = tiny_config(is_causal=auto != "AutoModelForMaskedLM", position_embedding_type="rope")
    model = getattr(transformers, auto).from_config(config)
    assert type(model) is getattr(modeling_longnet, HEADS[auto])
    assert len(getattr(transformers, auto)._model_mapping.items()) == len(getattr(transformers, auto)._model_mapping)


def test_the_loss_goes_by_the_name_of_the_class():
    names = {"AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForQuestionAnswering"}
    for auto in names | {"AutoModelForSequenceClassification", "AutoModelForTokenClassification"}:
        config = tiny_config(is_causal=auto != "AutoModelForMaskedLM", position_embedding_type="rope")
        assert getattr(transformers, auto).from_config(config).loss_type == auto.removeprefix("AutoModel")


STRANGER = """
import json, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *args, **kwargs):
        return None if name.partition(".")[0] == "modeling_longnet" else super().find_spec(name, *args, **kwargs)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

said = {}
for name in ("longnet", "llama"):
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    arguments = TrainingArguments(sys.argv[1], label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    x = torch.arange(40)[None]
    found = Trainer(model, arguments).compute_loss(model, {"input_ids": x, "labels": x.clone()})
    logits = model(input_ids=x).logits[0, :-1]
    said[name] = found.item(), torch.nn.functional.cross_entropy(logits, x[0, 1:], label_smoothing=0.1).item()
print(json.dumps(said))
"""


def test_code_from_the_hub_stands_in_the_tables_as_well(tmp_path):
    LongNetForCausalLM(tiny_config()).save_pretrained(tmp_path / "longnet")
    export_patched_model(llama(), tmp_path / "llama", license="mit", base_model="tiny/llama")
    (tmp_path / "stranger.py").write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, Path("stranger.py"), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for found, wanted in json.loads(done.stdout.splitlines()[-1]).values():
        assert found == pytest.approx(wanted, rel=1e-5)
