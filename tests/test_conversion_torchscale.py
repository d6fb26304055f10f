"""torchscale's checkpoints: the original's outputs, there and back bit by bit; what has no counterpart is refused."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from conversion import convert_hf_to_torchscale, convert_torchscale_to_hf
from conversion.torchscale_format import parse_integers, to_arguments
from modeling_longnet import LongNetConfig, LongNetForCausalLM, LongNetForMaskedLM, LongNetModel


FIXTURES = Path(__file__).parent / "fixtures"
DECODERS = ["torchscale_decoder_xpos", "torchscale_decoder_learned_positions"]
NAMES = [*DECODERS, "torchscale_encoder"]
TOLERANCE = 2e-5  # float32


def convert(name: str, output: Path, *options: str) -> Path:
    files = ["--checkpoint", str(FIXTURES / f"{name}.pt"), "--config", str(FIXTURES / f"{name}.args.json")]
    return convert_torchscale_to_hf.main([*files, "--output-dir", str(output), *options])


def original_weights(name: str) -> dict[str, torch.Tensor]:
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)["model"]


def assert_same_tensors(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_give_the_logits_of_the_original(name, attention, tmp_path):
    expected = load_file(FIXTURES / f"{name}.expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(convert(name, tmp_path / "model"), attn_implementation=attention)
    assert type(model) is LongNetForCausalLM
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoder_gives_the_hidden_states_of_the_original(attention, tmp_path):
    expected = load_file(FIXTURES / "torchscale_encoder.expected.safetensors")
    output = convert("torchscale_encoder", tmp_path / "model")
    model = AutoModel.from_pretrained(output, attn_implementation=attention)
    assert type(model) is LongNetModel
    with torch.no_grad():
        hidden = model(inputs_embeds=expected["inputs_embeds"]).last_hidden_state
    torch.testing.assert_close(hidden, expected["hidden"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_equal(name, tmp_path):
    model = convert(name, tmp_path / "model")
    back = convert_hf_to_torchscale.main(["--checkpoint", str(model), "--output-dir", str(tmp_path / "back")])
    assert_same_tensors(torch.load(back / "checkpoint.pt", weights_only=True)["model"], original_weights(name))
    given, returned = (json.loads(path.read_text()) for path in (FIXTURES / f"{name}.args.json", back / "args.json"))
    given.pop("no_output_layer", None)  # the encoder without a vocabulary has none in either spelling
    lists = ("segment_length", "dilated_ratio")
    assert {k: parse_integers(given.pop(k)) for k in lists} == {k: parse_integers(returned[k]) for k in lists}
    assert given.items() <= returned.items()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_a_checkpoint_is_kept_and_comes_back(dtype, tmp_path):
    tensors = {key: tensor.to(dtype) for key, tensor in original_weights(DECODERS[0]).items()}
    torch.save(tensors, tmp_path / "half.pt")
    arguments = FIXTURES / f"{DECODERS[0]}.args.json"
    output = convert_torchscale_to_hf.convert_torchscale_to_hf(tmp_path / "half.pt", arguments, tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(output).dtype == dtype
    back = convert_hf_to_torchscale.convert_hf_to_torchscale(output, tmp_path / "back")
    assert_same_tensors(torch.load(back / "checkpoint.pt", weights_only=True)["model"], tensors)


def test_weights_are_rounded_only_when_asked_for(tmp_path):
    output = convert(DECODERS[1], tmp_path / "model", "--dtype", "bfloat16")
    weight = load_file(output / "model.safetensors")["lm_head.weight"]
    original = original_weights(DECODERS[1])["output_projection.weight"]
    assert torch.equal(weight, original.bfloat16()) and not torch.equal(weight.float(), original)


def _wrapped(tensors, path):
    torch.save({"model": tensors, "epoch": 3}, path)


def _bare(tensors, path):
    torch.save(tensors, path)


def _prefixed(tensors, path):
    torch.save({"model": {f"decoder.{key}": tensor for key, tensor in tensors.items()}}, path)


def _without_redundant_tensors(tensors, path):
    redundant = ("output_projection.weight", "xpos.scale")
    torch.save({key: tensor for key, tensor in tensors.items() if not key.endswith(redundant)}, path)


@pytest.mark.parametrize("write", [_wrapped, _bare, _prefixed, _without_redundant_tensors])
def test_every_form_of_a_checkpoint_gives_the_same_model(write, tmp_path):
    write(original_weights(DECODERS[0]), tmp_path / "x.pt")
    model, _ = convert_torchscale_to_hf.load_torchscale(tmp_path / "x.pt", FIXTURES / f"{DECODERS[0]}.args.json")
    wanted = load_file(convert(DECODERS[0], tmp_path / "model") / "model.safetensors")
    assert_same_tensors({key: model.state_dict()[key] for key in wanted}, wanted)


def test_safetensors_come_and_go(tmp_path):
    save_file({f"decoder.{k}": v for k, v in original_weights(DECODERS[1]).items()}, tmp_path / "x.safetensors")
    arguments = FIXTURES / f"{DECODERS[1]}.args.json"
    output = convert_torchscale_to_hf.convert_torchscale_to_hf(tmp_path / "x.safetensors", arguments, tmp_path / "m")
    back = convert_hf_to_torchscale.convert_hf_to_torchscale(
        output, tmp_path / "back", prefix="decoder.", safetensors=True
    )
    assert_same_tensors(load_file(back / "checkpoint.safetensors"), load_file(tmp_path / "x.safetensors"))


SMALL = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "segment_lengths": [8, 16], "dilation_rates": [1, 2], "head_offsets": "contiguous",
}  # fmt: skip
ENCODER = {"is_causal": False, "padding": "zeros", "position_embedding_type": "none"}


@pytest.mark.parametrize(
    "architecture, auto_class, fields",
    [
        (LongNetForCausalLM, AutoModelForCausalLM, {"layernorm_embedding": True, "hidden_act": "relu"}),
        (LongNetForCausalLM, AutoModelForCausalLM, {"tie_word_embeddings": False, "xpos_scale_base": 64}),
        (LongNetForCausalLM, AutoModelForCausalLM,
         {"position_embedding_type": "learned", "position_embedding_offset": 2, "hidden_act": "silu"}),
        (LongNetModel, AutoModel, {"tie_word_embeddings": False, "layer_norm_eps": 1e-6}),
        (LongNetForMaskedLM, AutoModelForMaskedLM, {**ENCODER, "scale_embedding": False, "drop_path_rate": 0.1}),
        (LongNetModel, AutoModel, {**ENCODER, "sub_layernorm": False, "tie_word_embeddings": False}),
    ],
    ids=["layernorm-embedding", "untied", "learned", "headless", "masked-lm", "encoder-with-tokens"],
)  # fmt: skip
def test_back_and_there_is_the_identity(architecture, auto_class, fields, tmp_path):
    model = architecture(LongNetConfig(**SMALL, **fields)).eval()
    model.save_pretrained(tmp_path / "model")
    back = convert_hf_to_torchscale.convert_hf_to_torchscale(tmp_path / "model", tmp_path / "back")
    again = convert_torchscale_to_hf.convert_torchscale_to_hf(
        back / "checkpoint.pt", back / "args.json", tmp_path / "again"
    )
    returned = auto_class.from_pretrained(again)
    assert type(returned) is architecture
    assert_same_tensors(returned.state_dict(), model.state_dict())
    left_out = {"torchscale_embed_tokens", "_name_or_path", "architectures", "dtype"}
    for name, value in model.config.to_dict().items():
        assert name in left_out or getattr(returned.config, name) == value, name


@pytest.mark.parametrize(
    "field, value",
    [("head_offsets", "modulo"), ("overlap", "once"), ("num_sink_tokens", 2), ("num_key_value_heads", 2),
     ("attention_bias", False), ("head_dim", 6), ("position_embedding_type", "rope"), ("hidden_act", "gelu_new"),
     ("position_embedding_type", "learned")],
)  # fmt: skip
def test_what_torchscale_does_not_have_is_refused(field, value):
    named = "position_embedding_offset" if value == "learned" else field
    with pytest.raises(ValueError, match=f"`{named}` must"):
        to_arguments(LongNetConfig(**{**SMALL, field: value}), True, True)


def test_other_models_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        convert_hf_to_torchscale.convert_hf_to_torchscale(tmp_path, tmp_path / "back")


def test_a_dry_run_lists_every_tensor_and_writes_nothing(tmp_path, capsys):
    convert(DECODERS[0], tmp_path / "model", "--dry-run")
    printed = capsys.readouterr().out
    assert all(key in printed for key in original_weights(DECODERS[0]) if key != "output_projection.weight")
    assert "(tied)" in printed and "model.layers.1.self_attn.o_proj.weight" in printed
    assert not list(tmp_path.iterdir())


def test_the_card_tells_provenance_and_licence(tmp_path):
    card = ModelCard.load(convert(DECODERS[0], tmp_path / "a") / "README.md")
    assert card.data.license == "other" and card.data.library_name == "transformers" and "longnet" in card.data.tags
    for text in ("torchscale_decoder_xpos.pt", "SHA-256", '"xpos_rel_pos": true', "bit for bit", "## Licence", "MIT"):
        assert text in card.text
    card = ModelCard.load(convert(DECODERS[0], tmp_path / "b", "--license", "mit", "--dtype", "float16") / "README.md")
    assert card.data.license == "mit" and "rounded to float16" in card.text


def test_push_to_hub_is_the_ordinary_method(tmp_path, monkeypatch):
    pushed = []
    for pushable in (PreTrainedModel, ModelCard):
        monkeypatch.setattr(pushable, "push_to_hub", lambda self, *args, **named: pushed.append((self, args, named)))
    convert(DECODERS[0], tmp_path / "model", "--push-to-hub", "someone/longnet", "--private")
    (model, *call), (card, *card_call) = pushed
    assert type(model) is LongNetForCausalLM and call == [("someone/longnet",), {"private": True}]
    assert "SHA-256" in card.text and card_call[0] == ("someone/longnet",)
