"""LongViT: the outputs of torchscale's own code, there and back bit by bit, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification

from conversion import convert_hf_to_torchscale, convert_longvit_to_hf
from modeling_longnet import LongViTConfig, LongViTForImageClassification, LongViTModel, make_model_card


FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 2e-5  # float32
KINDS = {"finetuned": LongViTForImageClassification, "pretrained": LongViTModel}
SMALL = {"image_size": 32, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "segment_lengths": [16, 64], "dilation_rates": [1, 2]}  # fmt: skip


def checkpoint(kind: str) -> Path:
    return FIXTURES / f"longvit_{kind}.pth"


def convert(kind: str, output: Path, *options: str) -> Path:
    arguments = ["--checkpoint", str(checkpoint(kind)), "--output", str(output), "--num-attention-heads", "4"]
    return convert_longvit_to_hf.main([*arguments, *options])


def small_model(architecture=LongViTForImageClassification, **fields):
    torch.manual_seed(0)
    model = architecture(LongViTConfig(**SMALL, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_fine_tuned_model_gives_the_outputs_of_the_original(attention, tmp_path):
    expected = load_file(FIXTURES / "longvit_finetuned.expected.safetensors")
    output = convert("finetuned", tmp_path / "m", "--labels", "luad", "lusc", "normal")
    model = AutoModelForImageClassification.from_pretrained(output, attn_implementation=attention)
    assert type(model) is LongViTForImageClassification and model.config.label2id == {"luad": 0, "lusc": 1, "normal": 2}
    with torch.no_grad():
        hidden = model.model(expected["pixel_values"]).last_hidden_state
        torch.testing.assert_close(hidden, expected["hidden"], rtol=0, atol=TOLERANCE)
        for name in ("", "other_"):
            logits = model(expected[f"{name}pixel_values"]).logits
            torch.testing.assert_close(logits, expected[f"{name}logits"], rtol=0, atol=TOLERANCE)


def test_a_pre_trained_model_gives_the_outputs_of_the_original(tmp_path):
    expected = load_file(FIXTURES / "longvit_pretrained.expected.safetensors")
    model = AutoModel.from_pretrained(convert("pretrained", tmp_path / "m"))
    assert type(model) is LongViTModel and model.config.norm_before_pooling
    with torch.no_grad():
        for name in ("", "other_"):
            embedding = model(expected[f"{name}pixel_values"]).pooler_output
            torch.testing.assert_close(embedding, expected[f"{name}embedding"], rtol=0, atol=TOLERANCE)


def test_the_comparison_notices_other_semantics(tmp_path):
    expected = load_file(FIXTURES / "longvit_pretrained.expected.safetensors")
    output = convert("pretrained", tmp_path / "m")
    changes = ({"head_offsets": "modulo"}, {"norm_before_pooling": False}, {"segment_lengths": [64, 64, 64, 64, 64]})
    for changed in changes:
        with torch.no_grad():
            embedding = AutoModel.from_pretrained(output, **changed)(expected["pixel_values"]).pooler_output
        assert (embedding - expected["embedding"]).abs().max() > 10 * TOLERANCE, changed


@pytest.mark.parametrize("kind, entry", [("finetuned", "model"), ("pretrained", "teacher")])
def test_there_and_back_is_bit_equal(kind, entry, tmp_path):
    back = convert_hf_to_torchscale.convert_hf_to_torchscale(convert(kind, tmp_path / "m"), tmp_path / "back")
    got, wanted = (torch.load(path, weights_only=True)[entry] if path.parent == back else
                   convert_longvit_to_hf.files.read_state_dict(path, (entry,))
                   for path in (back / "longvit.pth", checkpoint(kind)))  # fmt: skip
    wanted = {key: value for key, value in wanted.items() if kind == "finetuned" or not key.startswith("head.")}
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
    settings = json.loads((back / "args.json").read_text())
    assert settings["img_size"] == 64 and settings["patch_size"] == 4 and settings["num_heads"] == 4


def test_the_head_of_the_pre_training_is_listed_as_left_out(tmp_path, capsys):
    convert("pretrained", tmp_path / "m", "--dry-run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "(left out)" in line]
    assert len(lines) == 8 and all(line.startswith("head.") for line in lines)


def test_other_wrappings_of_the_weights_give_the_same_model(tmp_path):
    tensors = torch.load(checkpoint("finetuned"), weights_only=True)["model"]
    wanted = convert_longvit_to_hf.load_longvit(checkpoint("finetuned"), num_attention_heads=4)[0].state_dict()
    for content in (tensors, {"module": tensors}, {"model": {f"module.{k}": v for k, v in tensors.items()}}):
        torch.save(content, tmp_path / "x.pth")
        got = convert_longvit_to_hf.load_longvit(tmp_path / "x.pth", num_attention_heads=4)[0].state_dict()
        assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_large_images_have_the_segments_of_the_original(tmp_path):
    """longvit.py's table; the weights need not be large for it: patches of 256 pixels, 16 each way."""
    tensors = torch.load(checkpoint("finetuned"), weights_only=True)["model"]
    tensors["model.patch_embed.proj.weight"] = torch.zeros(32, 3, 256, 256)
    torch.save(tensors, tmp_path / "x.pth")
    config = convert_longvit_to_hf.load_longvit(tmp_path / "x.pth", num_attention_heads=4)[0].config
    assert config.image_size == 4096 and config.segment_lengths == [1024, 2048, 4096, 8192, 16384]


@pytest.mark.parametrize("lost", ["model.pos_embed", "fc_norm.bias", "model.encoder.layers.1.ffn.fc2.weight"])
def test_what_lacks_is_named(lost, tmp_path):
    tensors = torch.load(checkpoint("finetuned"), weights_only=True)["model"]
    del tensors[lost]
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=lost):
        convert_longvit_to_hf.load_longvit(tmp_path / "x.pth", num_attention_heads=4)


def test_a_table_that_is_no_square_is_refused(tmp_path):
    tensors = torch.load(checkpoint("finetuned"), weights_only=True)["model"]
    tensors["model.pos_embed"] = tensors["model.pos_embed"][:, :250]
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="square of positions, got 250"):
        convert_longvit_to_hf.load_longvit(tmp_path / "x.pth", num_attention_heads=4)


def test_save_load_is_the_identity(tmp_path):
    model, pixels = small_model(num_labels=3), torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is LongViTModel
    with torch.no_grad():
        assert torch.equal(body(pixels).pooler_output, model.model(pixels).pooler_output)
    assert "AutoModelForImageClassification" in make_model_card(model).text


def test_every_parameter_gets_a_gradient_also_with_checkpointing():
    model, pixels = small_model(num_labels=3).train(), torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing_enable() if checkpointing else None
        model.zero_grad()
        model(pixels, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_outputs_by_layer_and_attentions():
    model, pixels = small_model(LongViTModel), torch.randn(1, 3, 32, 32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [weights.shape for weights in output.attentions] == [(1, 4, 64, 64)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_takes_any_pixels(dtype):
    model, pixels = small_model(num_labels=3), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(pixels).logits
        got = model.to(dtype)(pixels).logits
    assert got.dtype == dtype and (got.float() - wanted).abs().max() < 16 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 3, 32)])
def test_bad_pixels_are_refused(shape):
    with pytest.raises(ValueError, match="`pixel_values` must have shape"):
        small_model()(torch.randn(shape))


@pytest.mark.parametrize(
    "fields, message",
    [({"patch_size": 64}, "`image_size`"), ({"num_attention_heads": 5}, "multiple of `num_attention_heads`"),
     ({"num_channels": 0}, "`num_channels`"), ({"segment_lengths": [16]}, "dilation_rates"),
     ({"pooler_norm_eps": 0.0}, "`pooler_norm_eps`"), ({"hidden_dropout": 1.0}, "`hidden_dropout`"),
     ({"hidden_act": "nope"}, "`hidden_act`"), ({"is_causal": True}, "`is_causal` of a LongViT is False"),
     ({"overlap": "once"}, "`overlap` of a LongViT")],
)  # fmt: skip
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LongViTConfig(**{**SMALL, **fields})


def test_the_image_classification_pipeline_takes_it():
    from transformers import ViTImageProcessor, pipeline

    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model = small_model(num_labels=3)
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    found = classify(Image.new("RGB", (50, 70), "purple"))
    assert len(found) == 3 and sum(row["score"] for row in found) == pytest.approx(1, abs=1e-4)
