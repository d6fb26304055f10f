"""Training a patched model with the tools people use: HF Trainer, TRL, PEFT; each against a loop written by hand."""

import copy
import gc
import inspect
import json

import pytest
import torch
from test_dequantize_gguf import file, original  # noqa: F401  fixtures that write a tiny GGUF file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from modeling_longnet.patching import SETTINGS_NAME, is_patched, load_patched_model, patch_model, unpatch_model
from modeling_longnet.transformers_compat import UPLOAD


SCHEDULE = ([8, 32], [1, 4])
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
ARGUMENTS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, pad_token_id=0, **sizes, **heads))


def texts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", bos_token=None
    )


def record_steps(trainer) -> tuple[list[dict], list[float]]:
    """What each training step of `trainer` is given, and the loss that comes out."""
    batches, losses = [], []
    step = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        batches.append({name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)})
        loss = step(model, inputs, *args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    trainer.training_step = training_step
    return batches, losses


def documents_of(batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels) of each document of a batch, be it padded or packed, without padding."""
    found = []
    for row in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        if "attention_mask" in batch:
            real = batch["attention_mask"][row].bool()
            ids, labels = ids[real], labels[real]
        begins = [0]
        if "position_ids" in batch:
            begins = (batch["position_ids"][row] == 0).nonzero()[:, 0].tolist()
        found += [(ids[a:b], labels[a:b]) for a, b in zip(begins, begins[1:] + [len(ids)])]
    return found


def loop_by_hand(model, batches: list[dict]) -> list[float]:
    """The same steps, one document at a time and nothing padded or packed."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=ARGUMENTS["learning_rate"], weight_decay=0.0)
    losses = []
    for batch in batches:
        total, count = 0.0, 0
        for ids, labels in documents_of(batch):
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def assert_same_training(model, batches, losses):
    assert len(losses) == 3
    other = patch_model(tiny_llama(), *SCHEDULE)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(loop_by_hand(other, batches)), **TOLERANCE)
    dense = loop_by_hand(tiny_llama(), batches)
    assert abs(dense[0] - losses[0]) > 1e-3  # the patch is what was trained


def pad(rows: list[list[int]]) -> list[dict]:
    longest = max(map(len, rows))
    padded = []
    for row in rows:
        missing = longest - len(row)
        padded.append(
            {
                "input_ids": row + [0] * missing,
                "attention_mask": [1] * len(row) + [0] * missing,
                "labels": row + [-100] * missing,
            }
        )
    return padded


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_trainer_equals_a_loop_by_hand(checkpointing, tmp_path):
    model = patch_model(tiny_llama(), *SCHEDULE)
    arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=checkpointing, **ARGUMENTS)
    trainer = Trainer(model, arguments, train_dataset=pad(texts([40, 25, 33, 40, 9, 21])))
    batches, losses = record_steps(trainer)
    trainer.train()
    assert_same_training(model, batches, losses)


def test_trainer_checkpoints_load_patched(tmp_path):
    model = patch_model(tiny_llama(), *SCHEDULE)
    arguments = TrainingArguments(str(tmp_path), **{**ARGUMENTS, "save_strategy": "steps", "save_steps": 3})
    Trainer(model, arguments, train_dataset=pad(texts([40] * 6))).train()
    ids = torch.randint(3, 97, (1, 40))
    with torch.no_grad():
        loaded = load_patched_model(tmp_path / "checkpoint-3")
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    arguments = TrainingArguments(str(tmp_path), **{**ARGUMENTS, "max_steps": 4})
    resumed = Trainer(loaded, arguments, train_dataset=pad(texts([40] * 6)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 4 and is_patched(resumed.model)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 48}],
    ids=["padded", "padding-free", "packing"],
)
def test_sft_trainer_equals_a_loop_by_hand(options, tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"input_ids": texts([40, 25, 33, 40, 9, 21, 30, 12, 17, 35, 22, 11])})
    model = patch_model(tiny_llama(), *SCHEDULE)
    arguments = trl.SFTConfig(str(tmp_path), bf16=False, **{**ARGUMENTS, **options})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    batches, losses = record_steps(trainer)
    trainer.train()
    assert any(len(documents_of(batch)) > len(batch["input_ids"]) for batch in batches) == bool(options)
    assert_same_training(model, batches, losses)


# Adapters


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )


@pytest.fixture
def base_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("order", ["patch-then-adapt", "adapt-then-patch"])
def test_adapters_record_the_patch_and_load_onto_a_patched_base(order, base_folder, tmp_path):
    base, ids = LlamaForCausalLM.from_pretrained(base_folder), torch.randint(3, 97, (2, 40))
    if order == "patch-then-adapt":
        model = lora(patch_model(base, *SCHEDULE))
    else:
        model = lora(base)
        assert patch_model(model, *SCHEDULE) is model
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / SETTINGS_NAME).read_text()) == base.config.dilated_attention
    loaded = load_patched_model(tmp_path / "adapter")
    assert is_patched(loaded) and torch.equal(logits(loaded, ids), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = load_patched_model(tmp_path / "adapter", is_trainable=True, base_model=base_folder)
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    unpatch_model(model)
    assert not torch.equal(logits(model, ids), expected)


def test_named_adapters_record_the_patch(base_folder, tmp_path):
    model = lora(patch_model(LlamaForCausalLM.from_pretrained(base_folder), *SCHEDULE))
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / SETTINGS_NAME).is_file()
    assert is_patched(load_patched_model(tmp_path / "adapters" / "second"))


def test_adapters_of_transformers_own_kind_record_the_patch(base_folder, tmp_path):
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
    model, ids = patch_model(LlamaForCausalLM.from_pretrained(base_folder), *SCHEDULE), torch.randint(3, 97, (2, 40))
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_patched_model(tmp_path / "adapter", base_model=base_folder)
    torch.testing.assert_close(logits(loaded, ids), expected, **TOLERANCE)


def test_merged_adapters_save_as_a_patched_model(base_folder, tmp_path):
    ids = torch.randint(3, 97, (2, 40))
    model = lora(patch_model(LlamaForCausalLM.from_pretrained(base_folder), *SCHEDULE))
    expected = logits(model, ids)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_patched_model(tmp_path / "merged"), ids), expected, **TOLERANCE)


def test_adapters_of_unpatched_models_are_saved_as_ever(base_folder, tmp_path):
    model, card = lora(patch_model(LlamaForCausalLM.from_pretrained(base_folder), *SCHEDULE)), "adapter/README.md"
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / card).read_text().count("load_patched_model(") == 1
    unpatch_model(model).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / SETTINGS_NAME).exists()
    assert "load_patched_model" not in (tmp_path / card).read_text()
    with pytest.raises(ValueError, match="was not saved from a patched model"):
        load_patched_model(tmp_path / "adapter")


def test_pefts_class_is_its_own_again_when_the_last_patched_model_is_gone(monkeypatch, tmp_path):
    peft_class = pytest.importorskip("peft").PeftModel
    for name in ("save_pretrained", UPLOAD):  # without what patched models of other tests have put there
        monkeypatch.setattr(peft_class, name, inspect.unwrap(getattr(peft_class, name)))
    before = dict(vars(peft_class))
    model = patch_model(tiny_llama(), *SCHEDULE)
    twin = copy.deepcopy(model)
    assert dict(vars(peft_class)) != before
    unpatch_model(model)
    del model
    gc.collect()
    lora(twin).save_pretrained(tmp_path)  # a copy is as patched as what it was copied from
    assert (tmp_path / SETTINGS_NAME).is_file()
    del twin
    gc.collect()
    assert dict(vars(peft_class)) == before


def test_trainer_trains_an_adapter_and_its_checkpoint_loads(base_folder, tmp_path):
    model = lora(patch_model(LlamaForCausalLM.from_pretrained(base_folder), *SCHEDULE))
    arguments = TrainingArguments(
        str(tmp_path), gradient_checkpointing=True, **{**ARGUMENTS, "save_strategy": "steps", "save_steps": 3}
    )
    Trainer(model, arguments, train_dataset=pad(texts([40] * 6))).train()
    ids = torch.randint(3, 97, (2, 40))
    torch.testing.assert_close(
        logits(load_patched_model(tmp_path / "checkpoint-3"), ids), logits(model, ids), **TOLERANCE
    )


def test_bfloat16_training_follows_float32():
    batch = {"input_ids": torch.tensor(texts([40, 40])), "labels": torch.tensor(texts([40, 40]))}
    model = patch_model(tiny_llama(), *SCHEDULE)
    expected = loop_by_hand(model, [batch] * 3)
    half = patch_model(tiny_llama().to(torch.bfloat16), *SCHEDULE)
    actual = loop_by_hand(half, [batch] * 3)
    assert actual[2] < actual[0]
    assert max(abs(a - b) / b for a, b in zip(actual, expected)) < 0.05


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks for one, a GGUF file has none
def test_gguf_bases_are_trained_and_only_their_adapters_saved(file, tmp_path):  # noqa: F811
    source, ids = {"gguf_file": file.name, "dtype": torch.float32}, torch.randint(0, 11, (2, 40))
    base = patch_model(AutoModelForCausalLM.from_pretrained(file.parent, **source), *SCHEDULE)
    with pytest.raises(ValueError, match="dequantize_gguf"):
        base.save_pretrained(tmp_path / "model")
    model = lora(base)
    loss = loop_by_hand(model, [{"input_ids": ids, "labels": ids}] * 3)
    assert loss[2] < loss[0]
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_patched_model(tmp_path / "adapter", base_model=file.parent, **source)
    torch.testing.assert_close(logits(loaded, ids), expected, **TOLERANCE)
