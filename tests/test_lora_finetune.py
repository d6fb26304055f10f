"""The main job, end to end, on a tiny random Llama: figures, files, and what was saved loads to the same loss."""

import json

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from examples import lora_finetune
from examples.lora_finetune import DENSE, TUNED, ZERO_SHOT
from modeling_longnet.patching import load_patched_model


TEXT = "".join(f"{i} times {i} is {i * i}, and {i} plus one is {i + 1}. " for i in range(400))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama with a byte tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("base")
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def arguments(base, output, *more):
    return [
        "--model", str(base), "--text", str(base / "text.txt"), "--output-dir", str(output), "--use-cpu",
        "--segment-lengths", "32", "128", "--dilation-rates", "1", "4", "--block-size", "64", "--max-steps", "4",
        "--eval-lengths", "32", "128", "--eval-tokens", "256", "--learning-rate", "0.02", "--prompt-tokens", "40",
        "--new-tokens", "4", "--save-steps", "2", "--logging-steps", "2", "--disable-tqdm", "true", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain_run(base, tmp_path_factory):
    """The results of a run without further options."""
    return lora_finetune.main(arguments(base, tmp_path_factory.mktemp("plain") / "run"))


def test_main_measures_trains_saves_and_reloads(base, tmp_path, capsys):
    output = tmp_path / "run"
    data = lora_finetune.main(arguments(base, output, "--merge", "--compare-dense"))
    for name in ("results.json", "perplexity.png", "adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (output / name).stat().st_size > 0
    assert "load_patched_model" in (output / "merged" / "README.md").read_text()
    assert json.loads((output / "results.json").read_text()) == data
    assert set(data["perplexity"][TUNED]) == {"32", "128"}
    assert data["perplexity"][TUNED]["128"] < 0.9 * data["perplexity"][ZERO_SHOT]["128"]
    assert data["reloaded_loss"] == data["loss"]
    assert data["merged_loss"] == pytest.approx(data["loss"], abs=1e-4)
    assert data["training"][TUNED]["steps"] == 4
    assert "| 128 |" in capsys.readouterr().out

    ids = lora_finetune.AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids[:, -256:]
    model = load_patched_model(output / "adapter").eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in ids.split(128, dim=1)]
    assert data["perplexity"][TUNED]["128"] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-5)


def test_dense_perplexity_is_that_of_plain_transformers(base, plain_run):
    ids = lora_finetune.AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids[:, -256:]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in ids.split(128, dim=1)]
    assert plain_run["perplexity"][DENSE]["128"] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-5)


def test_short_contexts_are_unchanged_by_blocks(base, tmp_path):
    data = lora_finetune.main(arguments(base, tmp_path / "run", "--local", "segment"))
    dense, patched = data["perplexity"][DENSE], data["perplexity"][ZERO_SHOT]
    assert patched["32"] == pytest.approx(dense["32"], rel=1e-5)
    assert patched["128"] != pytest.approx(dense["128"], rel=1e-5)


def test_layers_left_dense_are_those_that_are_not_patched(base, tmp_path):
    data = lora_finetune.main(arguments(base, tmp_path / "run", "--dense-layers", "1"))
    assert data["settings"]["layers"] == [0] and data["title"].endswith("1 of 2 layers dense")
    assert load_patched_model(tmp_path / "run" / "adapter").config.dilated_attention["layers"] == [0]


def test_resume_continues_to_the_result_of_an_uninterrupted_run(base, plain_run, tmp_path, monkeypatch):
    class Interrupted(lora_finetune.Trainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            if self.state.global_step == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lora_finetune, "Trainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            lora_finetune.main(arguments(base, tmp_path / "run"))
    with pytest.raises(SystemExit):  # what is there is not overwritten
        lora_finetune.main(arguments(base, tmp_path / "run"))
    with pytest.raises(ValueError, match="options, got num_sink_tokens 2 instead of 4"):
        lora_finetune.main(arguments(base, tmp_path / "run", "--resume", "--num-sink-tokens", "2"))
    data = lora_finetune.main(arguments(base, tmp_path / "run", "--resume"))
    assert data["perplexity"] == plain_run["perplexity"]
    again = lora_finetune.main(arguments(base, tmp_path / "run", "--resume", "--merge"))
    assert again["loss"] == data["loss"] and again["training"] == data["training"]  # finished: not a step more


def test_mixed_precision_trains_and_what_is_saved_loads_to_the_same_loss(base, plain_run, tmp_path):
    data = lora_finetune.main(arguments(base, tmp_path / "run", "--bf16", "--merge"))
    assert data["reloaded_loss"] == pytest.approx(data["loss"], abs=1e-6)
    assert data["perplexity"][TUNED] == pytest.approx(plain_run["perplexity"][TUNED], rel=0.02)
    assert data["perplexity"][TUNED] != plain_run["perplexity"][TUNED]


def test_a_learned_position_table_bounds_the_lengths(base, tmp_path):
    config = GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=256, n_positions=100)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="must not exceed the 100 learned positions of GPT2LMHeadModel, got 128"):
        lora_finetune.main(arguments(base, tmp_path / "run", "--model", str(tmp_path / "gpt2")))


def test_gradient_checkpointing_trains_the_same(base, plain_run, tmp_path):
    lean = lora_finetune.main(arguments(base, tmp_path / "lean", "--gradient-checkpointing"))
    assert lean["perplexity"][TUNED] == pytest.approx(plain_run["perplexity"][TUNED], rel=1e-5)


def test_push_to_hub_uploads_the_adapter_with_its_settings(base, tmp_path, monkeypatch):
    uploads = []

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, **kwargs):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/somebody/{name}")

        def upload_folder(self, folder_path, repo_id):
            uploads.append((repo_id, {path.name for path in folder_path.iterdir()}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    lora_finetune.main(arguments(base, tmp_path / "novel", "--push-to-hub"))
    [(repository, files)] = uploads
    assert repository == "somebody/novel"
    assert {"adapter_model.safetensors", "adapter_config.json", "dilated_attention.json", "tokenizer.json"} <= files


def test_norms_and_embeddings_train_and_reload(base, plain_run, tmp_path):
    data = lora_finetune.main(arguments(base, tmp_path / "run", "--train-norms-and-embeddings"))
    assert data["reloaded_loss"] == data["loss"]
    more = data["training"][TUNED]["trainable_parameters"] - plain_run["training"][TUNED]["trainable_parameters"]
    assert more == 256 * 32 + 5 * 32  # the tied embedding once, and five norms


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--eval-tokens", "100"), "longest of --eval-lengths"),
        (("--block-size", "100000"), "must hold more than"),
        (("--layers", "0", "--dense-layers", "1"), "give one of them"),
        (("--dense-layers", "1", "2"), "layers of 0..1, got [2]"),
        (("--eval-lengths", "1", "32"), "--eval-lengths must be at least 2, got [1, 32]"),
        (("--new-tokens", "0"), "--new-tokens must be at least 1, got 0"),
        (("--max-steps", "0"), "--max-steps must be at least 1"),
        (("--rope-scaling", "{yarn"), "--rope-scaling must be JSON"),
        (("--memory", "{8"), "--memory must be JSON"),
        (("--memory", '{"dimensions": 4}'), "calibrated"),
        (("--dtype", "float8"), "invalid choice"),
    ],
)
def test_settings_that_cannot_work_are_refused(base, tmp_path, capsys, more, message):
    with pytest.raises((SystemExit, ValueError)) as error:
        lora_finetune.main(arguments(base, tmp_path / "run", *more))
    assert message in str(error.value) + capsys.readouterr().err
