"""What is trained after a patch, and how: attention transfer, the table of `adaptation`, its files."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from examples.evidence import adaptation
from examples.evidence.adaptation import METHODS, Masters, optimize, transfer_backward
from examples.evidence.reading import in_form, load_model
from examples.lora_finetune import Options, lora_config
from examples.perplexity import perplexities
from modeling_longnet import patch_model


PATCH = {"segment_lengths": [32, 128], "dilation_rates": [1, 4]}
FORGETFUL = {"segment_lengths": [32], "dilation_rates": [1], "memory": {"block_size": 4, "top_k": 2}}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3, tie_word_embeddings=True,
        eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def base(tmp_path):
    """A folder with a tiny model over bytes."""
    tiny_llama().save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def arguments(base, output, *more):
    return [
        "--model", str(base), "--block-size", "600", "--max-steps", "3", "--lengths", "700", "350", "--eval-tokens",
        "700", "--device", "cpu", "--output", str(output), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("patch", [PATCH, FORGETFUL])
def test_transfer_brings_each_layer_near_to_the_dense_one(patch):
    teacher, student = tiny_llama().eval(), patch_model(tiny_llama(), **patch)
    before = [p.clone() for p in student.parameters()]
    model = get_peft_model(student, lora_config(student, Options()))
    backward = transfer_backward(model.get_base_model(), teacher)
    blocks = [torch.randint(3, 259, (96,), generator=torch.Generator().manual_seed(0))] * 20
    losses = optimize(model, blocks, backward, (1e-2, 0.0), "cpu", "transfer")["losses"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())
    after = [p for name, p in model.named_parameters() if "lora_" not in name]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_transfer_fits_on_the_hidden_states_of_the_dense_model():
    teacher, student = tiny_llama().eval(), patch_model(tiny_llama(), **PATCH)
    model = get_peft_model(student, lora_config(student, Options()))
    backward = transfer_backward(model.get_base_model(), teacher)
    assert backward(torch.randint(3, 259, (1, 32))) < 1e-10  # a segment: what is dilated there is dense
    block, layer = torch.randint(3, 259, (1, 96)), student.model.layers[1]
    with torch.no_grad():
        known = teacher(block, use_cache=False, output_hidden_states=True).hidden_states
        wanted = teacher.model.layers[1].self_attn
        turns = teacher.model.rotary_emb(known[1], torch.arange(96)[None])
        hidden = teacher.model.layers[1].input_layernorm(known[1])
        target = wanted(hidden, position_embeddings=turns, attention_mask=None)[0]
    error = (layer.self_attn(hidden, position_embeddings=turns, attention_mask=None)[0] - target).square().mean()
    weight = next(p for name, p in layer.named_parameters() if "q_proj.lora_B" in name)
    (own,) = torch.autograd.grad(error / target.square().mean(), weight)
    model.zero_grad()
    assert backward(block) > 1e-3
    torch.testing.assert_close(weight.grad, own)


def test_small_steps_are_not_lost_in_half_precision():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)

    def backward(block):
        model.weight.square().sum().backward()
        return 0.0

    optimize(model, [torch.zeros(1)] * 100, backward, (0.0, 1e-3), "cpu", "bfloat16")
    assert 0.9 < model.weight.item() < 0.97 and model.weight.dtype == torch.bfloat16
    assert Masters(model.float()).pairs[0][1] is model.weight


def test_rows_are_measured_once_and_apart_and_merged(base, tmp_path):
    rows = ["dense:none", "dense:lora", "with memory:none", "with memory:lora", "default patch:transfer-lora"]
    whole = adaptation.main(arguments(base, tmp_path / "x.json", "--rows", *rows))
    assert [f"{r['variant']}:{r['method']}" for r in whole["records"]] == rows
    for name in ("x.json", "x.md", "x.png"):
        assert (tmp_path / name).stat().st_size > 0
    trained = whole["records"][1]
    assert trained["tokens"] == 1800 and len(trained["training"]["losses"]) == 3
    assert trained["perplexity"]["700"] < whole["records"][0]["perplexity"]["700"]
    both = whole["records"][-1]
    assert len(both["transfer"]["losses"]) == 1 and len(both["training"]["losses"]) == 2
    assert adaptation.main(arguments(base, tmp_path / "x.json", "--rows", *rows)) == whole

    for i, part in enumerate((rows[:3], rows[2:])):
        adaptation.main(arguments(base, tmp_path / f"part{i}.json", "--rows", *part))
    parts = [str(tmp_path / f"part{i}.json") for i in range(2)]
    merged = adaptation.main(["--output", str(tmp_path / "merged.json"), "--merge", *parts])
    assert [r["perplexity"] for r in merged["records"]] == [r["perplexity"] for r in whole["records"]]
    assert json.loads((tmp_path / "merged.json").read_text()) == merged
    other = tmp_path / "other.json"
    other.write_text(json.dumps(merged | {"settings": merged["settings"] | {"max_steps": 4}}))
    with pytest.raises(ValueError, match=r"other.json was measured with 'max_steps' 4, not"):
        adaptation.main(["--output", str(tmp_path / "merged.json"), "--merge", str(other)])


def test_adapters_of_trained_rows_are_kept_for_others(base, tmp_path):
    rows = "with memory:none", "with memory:lora", "dense:lora"
    given = arguments(base, tmp_path / "x.json", "--rows", *rows, "--adapters", str(tmp_path / "adapters"))
    records = adaptation.main(given)["records"]
    folders = sorted((tmp_path / "adapters").iterdir())
    assert [x.name for x in folders] == ["python-docs-dense-lora-0", "python-docs-with-memory-lora-0"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    _, held_out = adaptation.tokenize(tokenizer, Options(text="python-docs", block_size=600, eval_tokens=700))
    for folder, form, record in zip(folders, ("dense", "with memory"), (records[2], records[1])):
        with in_form(load_model(base, folder), form) as model:
            assert perplexities(model, held_out, [350, 700], form) == pytest.approx(record["perplexity"], rel=1e-4)


def test_norms_and_embeddings_are_trained_in_half_precision(base, tmp_path):
    given = arguments(base, tmp_path / "x.json", "--dtype", "bfloat16", "--rows", "dense:lora-norms", "dense:lora")
    more, fewer = adaptation.main(given)["records"]
    assert more["trained parameters"] - fewer["trained parameters"] == 259 * 32 + 5 * 32  # tied once, five norms
    assert more["perplexity"] != fewer["perplexity"]


def test_the_table_compares_with_dense_attention_of_the_same_text_and_seed():
    def record(variant, method, perplexity, seed=0, **more):
        key = {"text": "a", "variant": variant, "method": method, "seed": seed}
        return key | {"perplexity": {"64": perplexity}} | more

    steps = {"training": {"seconds": [90.0, 15.0, 15.0]}}
    rows = [
        record("dense", "none", 10.0), record("dense", "lora", 8.0, **steps), record("dense", "lora", 4.0, 1, **steps),
        record("with memory", "none", 8.0 * 2.718281828), record("with memory", "transfer-lora", 8.0,
               transfer={"seconds": [30.0, 30.0, 30.0], "perplexity": {"64": 9.0}}, **steps),
        record("with memory", "lora", 8.8, **steps), record("with memory", "lora", 4.8, 1, **steps),
    ]  # fmt: skip
    found = {(row["variant"], row["method"]): row for row in adaptation.summarize(rows, [64])}
    both = found["with memory", "transfer-lora"]
    assert both["seconds"] == 135 and both["nats per minute"] == pytest.approx(60 / 135)
    assert both["lengths"]["64"]["ratio"] == 1
    seeds = found["with memory", "lora"]
    assert seeds["lengths"]["64"]["ratio"] == pytest.approx(1.15)
    assert seeds["lengths"]["64"]["spread"] == pytest.approx(0.05)
    lines = adaptation.table(list(found.values()), [64]).splitlines()
    assert len(lines) == 2 + 5
    assert lines[5].startswith(f"| a | with memory | {METHODS['lora']} | 6.499 (1.150 ± 0.050) |")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rows", "dense:transfer-lora"), "--rows must be of"),
        (("--transfer-steps", "3"), "--transfer-steps must leave some"),
        (("--lengths", "701"), "--lengths must be of"),
        (("--max-steps", "0"), "max_steps"),
    ],
)
def test_settings_that_cannot_work_are_refused(base, tmp_path, capsys, more, message):
    with pytest.raises((SystemExit, ValueError)) as error:
        adaptation.main(arguments(base, tmp_path / "x.json", *more))
    assert message in str(error.value) + capsys.readouterr().err
