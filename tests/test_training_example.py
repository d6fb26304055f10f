"""Training from scratch: the loss falls, a resumed run is the run that was never stopped, results are complete."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from examples import packing, perplexity, runs, texts, train_causal_lm
from modeling_longnet import LongNetConfig, LongNetForCausalLM


PRESETS = Path(__file__).parent.parent / "configuration"


@pytest.fixture
def run(tmp_path):
    """Runs the script on a small text with a tiny model that drops activations, so that random states matter."""
    config = LongNetConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=259,
        max_position_embeddings=64, segment_lengths=[16, 32], dilation_rates=[1, 2], hidden_dropout=0.1,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "preset")
    (tmp_path / "text.txt").write_text("She sells sea shells on the sea shore. " * 60)

    def run(name, **settings):
        settings = {
            "text": tmp_path / "text.txt", "preset": tmp_path / "preset/config.json", "output_dir": tmp_path / name,
            "block_size": 64, "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 12, "warmup_steps": 2,
            "learning_rate": 1e-2, "eval_steps": 100, "save_steps": 100, "sample_tokens": 0,
        } | settings  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in settings.items() if value is not True]
        arguments += [f"--{name}" for name, value in settings.items() if value is True]
        return train_causal_lm.main(arguments), tmp_path / name

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_loss_falls_and_the_results_are_complete(run):
    result, folder = run("once", sample_tokens=8)
    losses = [row["loss"] for row in result["history"]]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 1
    assert result["evaluations"][-1]["perplexity"] < 100
    assert result == json.loads((folder / "results.json").read_text())
    assert {"hardware", "date", "commit", "command"} <= set(result["provenance"])
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert result["sample"]["continuation"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("She sells sea shells", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids, labels=ids).loss < losses[0] - 1


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory):
    """A folder with a tokenizer of a few words, which closes a text by a token of its own when asked to."""
    words = ["[UNK]", "[END]", "She", "sells", "sea", "shells", "on", "the", "shore", "."]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]").save_pretrained(folder)
    return folder


def test_a_dataset_and_another_tokenizer(run, word_tokenizer, tmp_path):
    (tmp_path / "dataset").mkdir()
    rows = [{"body": "She sells sea shells on the sea shore. " * 30}] * 4
    (tmp_path / "dataset/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset_name": tmp_path / "dataset", "tokenizer": word_tokenizer, "max_steps": 3}
    with pytest.raises(ValueError, match=r"`text_column` must be one of \['body'\], got 'text'"):
        run("wrong column", **settings)
    result, folder = run("words", text_column="body", **settings)
    assert result["settings"]["dataset_name"] == str(tmp_path / "dataset")
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 10
    last = result["evaluations"][-1]
    assert last["bits_per_byte"] * math.log(2) * 4.2 == pytest.approx(last["loss"], rel=0.05)  # 39 bytes, 9 words


def test_a_long_text_gives_the_tokens_of_a_short_one(word_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    text = "She sells\n sea shells on\nthe sea shore .\n" * 5
    pieces = packing.encode(text, tokenizer, piece_size=20)
    assert pieces.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(pieces) == 45


def stop_after(monkeypatch, steps: int) -> None:
    """Ctrl-C in the middle of the step that follows `steps` others."""
    step = train_causal_lm.Trainer.step

    def interrupted(self, batches):
        if len(self.history) == steps:
            signal.raise_signal(signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(train_causal_lm.Trainer, "step", interrupted)


@pytest.mark.parametrize("steps", [2, 7], ids=["first epoch", "third epoch"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(run, monkeypatch, steps):
    whole, whole_folder = run("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        stopped, folder = run("parts")
    assert stopped is None
    assert [path.name for path in runs.checkpoints(folder)] == [f"checkpoint-{steps + 1}"]
    assert not (folder / "model.safetensors").exists()
    resumed, _ = run("parts", resume=True)
    assert [row["loss"] for row in resumed["history"]] == [row["loss"] for row in whole["history"]]
    assert resumed["evaluations"] == whole["evaluations"]
    expected, got = weights(whole_folder), weights(folder)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def gradients(trainer: train_causal_lm.Trainer, batch: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.eval()
    trainer.model.zero_grad()
    loss = trainer.backward(batch)
    return loss.item(), {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}


def test_chunks_give_the_loss_of_the_whole_and_cut_only_the_gradient_through_the_past(run, monkeypatch):
    made = []
    monkeypatch.setattr(train_causal_lm.Trainer, "train", lambda self: made.append(self))
    for name, chunk_size in (("whole", None), ("one", 64), ("cut", 20)):
        run(name, gradient_accumulation_steps=1, **({} if chunk_size is None else {"chunk_size": chunk_size}))
    batch = torch.randint(0, 259, (2, 64))
    (loss, whole), (one_loss, one), (cut_loss, cut) = (gradients(trainer, batch) for trainer in made)
    assert one_loss == pytest.approx(loss, abs=1e-5) and cut_loss == pytest.approx(loss, abs=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(one[name], gradient, atol=1e-5, rtol=1e-4)
    # Of the last layer, all but the keys and values of tokens that later chunks see gets its whole gradient.
    for name in ("model.norm.weight", "model.layers.1.mlp.fc2.weight", "model.layers.1.self_attn.q_proj.weight"):
        torch.testing.assert_close(cut[name], whole[name], atol=1e-5, rtol=1e-4)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert not torch.allclose(cut[name], whole[name], atol=1e-5)


def test_training_in_chunks_learns(run):
    result, _ = run("chunks", chunk_size=24)
    losses = [row["loss"] for row in result["history"]]
    assert losses[-1] < losses[0] - 1


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), train_causal_lm.interrupts_noted() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)


def test_old_checkpoints_are_removed_and_unfinished_ones_ignored(run):
    _, folder = run("kept", max_steps=5, save_steps=1, save_total_limit=2)
    (folder / "unfinished-checkpoint-9").mkdir()
    assert [path.name for path in runs.checkpoints(folder)] == ["checkpoint-4", "checkpoint-5"]
    result, _ = run("kept", max_steps=6, resume=True)
    assert [row["step"] for row in result["history"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"resume": True, "learning_rate": 0.5}, "learning_rate must be 0.01"),
        ({"resume": True, "seed": 5}, "seed must be 0"),
        ({"resume": True, "max_steps": 1}, "`max_steps` must be at least the 3 steps"),
        ({}, "`output_dir` must hold no checkpoints without --resume"),
    ],
    ids=["learning rate", "seed", "fewer steps", "no resume"],
)
def test_another_run_is_refused(run, settings, message):
    run("first", max_steps=3)
    with pytest.raises(ValueError, match=message):
        run("first", **({"max_steps": 3} | settings))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"text": "no-such-text"}, "`text` must be a path or one of python-docs"),
        ({"block_size": 4096}, "`block_size` must not exceed"),
        ({"block_size": 0}, "`block_size` must be at least 2, got 0"),
        ({"sample_tokens": -1}, "`sample_tokens` must be at least 0, got -1"),
        ({"batch_size": 1000}, "`batch_size` must leave a batch"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"eval_fraction": 1.5}, "`eval_fraction` must lie between 0 and 1, got 1.5"),
        ({"resume": True}, "`resume` needs a checkpoint-N folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named(run, settings, message):
    with pytest.raises(ValueError, match=message):
        run("bad", **settings)


def test_order_of_blocks_is_a_permutation_in_each_epoch():
    trainer = train_causal_lm.Trainer.__new__(train_causal_lm.Trainer)
    trainer.settings = train_causal_lm.Settings(batch_size=2)
    trainer.accelerator = train_causal_lm.Accelerator()
    trainer.data = packing.Blocks(torch.arange(10)[:, None], torch.arange(0), 1.0, "")
    trainer.batches_per_epoch = 5
    drawn = [batch.flatten().tolist() for _, batch in zip(range(15), trainer.batches(0))]
    epochs = [sum(drawn[start : start + 5], []) for start in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [batch.flatten().tolist() for _, batch in zip(range(8), trainer.batches(7))] == drawn[7:]


def test_bytes_are_those_of_the_byte_tokenizer():
    text = "Straße, ½ × 2 = 1\n\tend\0"
    assert packing.encode_bytes(text).tolist() == ByT5Tokenizer(extra_ids=0)(text, add_special_tokens=False).input_ids


def test_packing_keeps_every_token_in_order_and_the_end_of_each_document():
    blocks = packing.pack(["abc", "de", "fghijk"], ByT5Tokenizer(extra_ids=0), 4, eval_fraction=0.3, eval_blocks=9)
    ids = torch.cat([blocks.train, blocks.evaluation]).flatten().tolist()
    assert bytes(id - 3 if id > 2 else ord(".") for id in ids) == b"abc.de.fghij"
    assert len(blocks.train) == 2 and len(blocks.evaluation) == 1
    assert blocks.bytes_per_token == 11 / 14


def test_loss_by_position_averages_to_the_loss_of_the_model():
    torch.manual_seed(0)
    config = LongNetConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        segment_lengths=[16], dilation_rates=[1],
    )  # fmt: skip
    model = LongNetForCausalLM(config).eval()
    blocks = torch.randint(50, (3, 40))
    losses = perplexity.loss_by_position(model, blocks, progress=False)
    expected = model(input_ids=blocks, labels=blocks).loss
    torch.testing.assert_close(losses.mean().float(), expected.detach())
    chunked = torch.stack([perplexity.token_losses(model, block[None], chunk_size=7)[0] for block in blocks])
    torch.testing.assert_close(chunked.double().mean(0), losses, atol=1e-5, rtol=0)


def test_position_buckets_cover_every_position_once():
    for length in (1, 255, 256, 257, 1000, 2048):
        buckets = perplexity.position_buckets(length)
        assert [position for start, end in buckets for position in range(start, end)] == list(range(length))


def test_bits_per_byte_of_a_uniform_guess():
    summary = perplexity.summarise(torch.full((600,), 256.0, dtype=torch.float64).log(), bytes_per_token=2.0)
    assert summary["bits_per_byte"] == pytest.approx(4)
    assert summary["perplexity"] == pytest.approx(256)
    assert [bucket["end"] for bucket in summary["by_position"]] == [256, 512, 600]


@pytest.mark.parametrize("name", ["python-docs", "python-source"])
def test_texts_of_every_python_are_long_and_the_same_each_time(name):
    text = texts.load_text(name)
    assert len(text) > 400_000
    assert text == texts.load_text(name)


def test_a_folder_is_read_in_sorted_order(tmp_path):
    for name, content in (("b.txt", "second"), ("a.md", "first"), ("c.png", "no text"), ("d.gz", "neither")):
        (tmp_path / name).write_text(content)
    assert texts.load_text(tmp_path) == "# a.md\nfirst\n# b.txt\nsecond"


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="`text` must hold some text"):
        texts.load_text(tmp_path / "empty.txt")


NOMINAL_PARAMETERS = {
    "longnet-demo-tiny": 0.8e6, "longnet-enwik8-small": 38e6, "longnet-125m": 125e6, "longnet-350m": 350e6,
    "longnet-760m": 760e6, "longnet-2.7b": 2.7e9,
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_every_preset_opens_and_has_its_nominal_size(path):
    config = LongNetConfig.from_pretrained(path)
    assert json.loads(path.read_text()).items() <= config.to_dict().items()
    assert config.segment_lengths[-1] == config.max_position_embeddings
    with torch.device("meta"):
        parameters = LongNetForCausalLM(config).num_parameters()
    assert parameters == pytest.approx(NOMINAL_PARAMETERS[path.stem], rel=0.05)
