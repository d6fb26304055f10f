"""Prov-GigaPath's slide encoder: the original's outputs, there and back bit by bit; a folder that loads anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from conversion import convert_gigapath_to_hf, convert_hf_to_torchscale
from modeling_longnet import LongNetSlideEncoderForImageClassification, LongNetSlideEncoderModel


FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = FIXTURES / "gigapath_slide_encoder.pth"
FINETUNED = FIXTURES / "gigapath_finetuned.pth"
FINETUNED_OPTIONS = (
    "--classifier-layers", "1", "3", "--num-attention-heads", "4", "--slide-ngrids", "40", "--max-wsi-size", "65536"
)  # fmt: skip
TOLERANCE = 2e-5  # float32


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "gigapath_slide_encoder.expected.safetensors")


def convert(output: Path, *options: str) -> Path:
    return convert_gigapath_to_hf.main(["--checkpoint", str(CHECKPOINT), "--output-dir", str(output), *options])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pooling, name", [("cls", "cls"), ("mean", "pool")])
def test_default_and_all_layer_embeddings_are_those_of_the_original(pooling, name, attention, expected, tmp_path):
    model = AutoModel.from_pretrained(convert(tmp_path / "m", "--pooling", pooling), attn_implementation=attention)
    assert type(model) is LongNetSlideEncoderModel
    with torch.no_grad():
        output = model(expected["tile_embeds"], expected["coords"])
    torch.testing.assert_close(output.pooler_output, expected[f"{name}_last"], rtol=0, atol=TOLERANCE)
    assert len(output.layer_embeddings) == 3
    for i, embedding in enumerate(output.layer_embeddings):
        torch.testing.assert_close(embedding, expected[f"{name}_layer_{i}"], rtol=0, atol=TOLERANCE)


def test_the_comparison_notices_other_semantics(expected, tmp_path):
    """The reference tells apart what the published weights were trained with and what LongNet's paper says."""
    output = convert(tmp_path / "model")
    for changed in ({"head_offsets": "modulo"}, {"padding": "mask"}, {"layer_norm_eps": 1e-3}, {"tile_size": 128}):
        model = AutoModel.from_pretrained(output, **changed, slide_ngrids=2000)
        with torch.no_grad():
            embedding = model(expected["tile_embeds"], expected["coords"]).pooler_output
        assert (embedding - expected["cls_last"]).abs().max() > 10 * TOLERANCE, changed


def test_there_and_back_is_bit_equal(tmp_path):
    back = convert_hf_to_torchscale.convert_hf_to_torchscale(convert(tmp_path / "model"), tmp_path / "back")
    got, wanted = (torch.load(p, weights_only=True)["model"] for p in (back / "slide_encoder.pth", CHECKPOINT))
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
    given = json.loads((FIXTURES / "gigapath_slide_encoder.args.json").read_text())
    assert given.items() <= json.loads((back / "args.json").read_text()).items()


def test_settings_that_the_original_lacks_are_refused_on_the_way_back(tmp_path):
    output = convert(tmp_path / "model")
    config = AutoConfig.from_pretrained(output)
    config.head_offsets = "modulo"
    config.save_pretrained(output)
    with pytest.raises(ValueError, match="`head_offsets` must be 'contiguous'"):
        convert_hf_to_torchscale.convert_hf_to_torchscale(output, tmp_path / "back")


def test_a_bare_state_dict_and_safetensors_give_the_same_model(tmp_path):
    tensors = torch.load(CHECKPOINT, weights_only=True)["model"]
    torch.save(tensors, tmp_path / "x.pth")
    save_file(tensors, tmp_path / "x.safetensors")
    wanted = load_file(convert(tmp_path / "model") / "model.safetensors")
    for name in ("x.pth", "x.safetensors"):
        model, _ = convert_gigapath_to_hf.load_gigapath(tmp_path / name)
        got = model.state_dict()
        assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_settings_reach_the_configuration(tmp_path):
    config = AutoConfig.from_pretrained(convert(tmp_path / "a"))
    assert config.segment_lengths == [1024, 5792, 32768, 185363, 1048576] and config.dilation_rates == [1, 2, 4, 8, 16]
    assert (config.in_chans, config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (24, 96, 384, 2)
    options = ("--num-attention-heads", "8", "--max-wsi-size", "131072", "--tile-size", "512", "--slide-ngrids", "300")
    config = AutoConfig.from_pretrained(convert(tmp_path / "b", *options))
    assert (config.num_attention_heads, config.tile_size, config.slide_ngrids) == (8, 512, 300)
    assert config.segment_lengths == [1024, 2896, 8192, 23170, 65536]


def test_a_dry_run_lists_every_tensor_and_writes_nothing(tmp_path, capsys):
    convert(tmp_path / "model", "--dry-run")
    printed = capsys.readouterr().out
    assert all(key in printed for key in torch.load(CHECKPOINT, weights_only=True)["model"])
    assert not list(tmp_path.iterdir())


def test_the_card_tells_provenance_and_terms(tmp_path):
    card = ModelCard.load(convert(tmp_path / "model") / "README.md")
    assert card.data.license == "other" and card.data.library_name == "transformers"
    for text in ("gigapath_slide_encoder.pth", "SHA-256", '"tile_size": 256', "gated", "research", "not for clinical"):
        assert text in card.text


def test_the_folder_loads_without_this_package(expected, tmp_path):
    """As from the Hub: the code beside the weights is all that there is."""
    output = convert(tmp_path / "model")
    code = f"""
import sys
sys.modules["modeling_longnet"] = None
from safetensors.torch import load_file
from transformers import AutoModel
model = AutoModel.from_pretrained({str(output)!r}, trust_remote_code=True)
data = load_file({str(FIXTURES / "gigapath_slide_encoder.expected.safetensors")!r})
error = (model(data["tile_embeds"], data["coords"]).pooler_output - data["cls_last"]).abs().max()
assert error < {TOLERANCE}, error
"""
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def convert_finetuned(output: Path, *options: str) -> Path:
    return convert_gigapath_to_hf.main(["--checkpoint", str(FINETUNED), "--output-dir", str(output), *options])


def test_a_fine_tuned_model_gives_the_logits_of_the_original(tmp_path):
    expected = load_file(FIXTURES / "gigapath_finetuned.expected.safetensors")
    output = convert_finetuned(tmp_path / "m", *FINETUNED_OPTIONS, "--labels", "a", "b", "c")
    model = AutoModelForImageClassification.from_pretrained(output)
    assert type(model) is LongNetSlideEncoderForImageClassification
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        logits = model(expected["tile_embeds"], expected["coords"]).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=TOLERANCE)
        for changed in ({"classifier_layers": [3, 1]}, {"classifier_layers": [1, 2]}, {"padding": "mask"}):
            other = AutoModelForImageClassification.from_pretrained(output, **changed)
            moved = other(expected["tile_embeds"], expected["coords"]).logits - expected["logits"]
            assert moved.abs().max() > 10 * TOLERANCE, changed


def test_a_fine_tuned_model_goes_there_and_back_bit_equal(tmp_path):
    back = convert_hf_to_torchscale.convert_hf_to_torchscale(
        convert_finetuned(tmp_path / "m", *FINETUNED_OPTIONS), tmp_path / "back"
    )
    got, wanted = (torch.load(path, weights_only=True) for path in (back / "checkpoint.pt", FINETUNED))
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
    settings = json.loads((back / "args.json").read_text())
    assert settings["feat_layer"] == "1-3" and settings["n_classes"] == 3


def test_what_a_fine_tuned_file_does_not_tell_is_asked_for(tmp_path, capsys):
    for options, message in (
        ((), "reads 2 layers of 32, but `classifier_layers`"),
        (("--classifier-layers", "1"), "reads 2 layers of 32"),
        ((*FINETUNED_OPTIONS, "--labels", "a"), "tells 3 classes"),
        (("--classifier-layers", "1", "9"), "`classifier_layers` must name layers from 0"),
    ):
        with pytest.raises(SystemExit):
            convert_finetuned(tmp_path / "m", "--num-attention-heads", "4", *options)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert(tmp_path / "m", "--labels", "a", "b")
    assert "has no classifier" in capsys.readouterr().err


def test_half_a_fine_tuned_file_is_refused_by_what_lacks(tmp_path):
    tensors = torch.load(FINETUNED, weights_only=True)
    settings = {"num_attention_heads": 4, "classifier_layers": [1, 3]}
    for lost in ("classifier.0.weight", "classifier.0.bias", "slide_encoder.norm.weight"):
        torch.save({key: value for key, value in tensors.items() if key != lost}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=lost):
            convert_gigapath_to_hf.load_gigapath(tmp_path / "x.pth", **settings)


def test_a_classifier_of_the_pooled_output_is_refused_on_the_way_back(tmp_path):
    config = AutoConfig.from_pretrained(convert(tmp_path / "m"), num_labels=2)
    LongNetSlideEncoderForImageClassification(config).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="`classifier_layers` must name layers here, got None"):
        convert_hf_to_torchscale.convert_hf_to_torchscale(tmp_path / "own", tmp_path / "back")


def test_each_converter_is_a_script_with_help():
    code = """
import runpy, sys
for name in ("convert_torchscale_to_hf", "convert_hf_to_torchscale", "convert_gigapath_to_hf", "convert_longvit_to_hf"):
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"conversion.{name}", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0
"""
    root = Path(__file__).parent.parent  # the folder that they are called in
    environment = {"PYTHONPATH": str(root), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("--dry-run") >= 4, done.stderr
