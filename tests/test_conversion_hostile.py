"""Checkpoints and settings that are damaged or ill-meant: refused by file and key, and nothing is left behind."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversion import checkpoint_files, convert_gigapath_to_hf, convert_hf_to_torchscale, convert_torchscale_to_hf
from conversion.torchscale_format import parse_integers


FIXTURES = Path(__file__).parent / "fixtures"
TORCHSCALE, GIGAPATH = "torchscale_decoder_xpos.pt", "gigapath_slide_encoder.pth"


class RunsCode:
    """A pickle of this makes a folder when it is loaded without care."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def convert(checkpoint: Path, output: Path, arguments: Path | None = None) -> None:
    if checkpoint.suffix == ".pth":
        convert_gigapath_to_hf.convert_gigapath_to_hf(checkpoint, output)
    else:
        arguments = arguments or FIXTURES / "torchscale_decoder_xpos.args.json"
        convert_torchscale_to_hf.convert_torchscale_to_hf(checkpoint, arguments, output)


def assert_refused(checkpoint: Path, *texts: str, arguments: Path | None = None) -> None:
    """A ValueError that holds `texts`, and neither an output folder nor remains of one."""
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(ValueError) as raised:
        convert(checkpoint, checkpoint.parent / "output", arguments)
    for text in texts:
        assert text in str(raised.value), raised.value
    assert sorted(checkpoint.parent.iterdir()) == before


@pytest.fixture(params=[TORCHSCALE, GIGAPATH])
def checkpoint(request, tmp_path):
    """A name for a bad checkpoint, and the tensors of a good one to spoil."""
    return tmp_path / request.param, torch.load(FIXTURES / request.param, weights_only=True)["model"]


def some_key(tensors: dict) -> str:
    return next(key for key in tensors if key.endswith("layers.1.ffn.fc2.weight"))


@pytest.mark.parametrize("place", ["alone", "as the model", "beside the model"])
def test_code_in_a_pickle_does_not_run(checkpoint, place, tmp_path):
    path, tensors = checkpoint
    code = RunsCode(tmp_path / "it-ran")
    places = {"alone": code, "as the model": {"model": code}, "beside the model": {"model": tensors, "x": code}}
    torch.save(places[place], path)
    assert_refused(path, str(path), "mkdir", "could run code")


@pytest.mark.parametrize("kept", [0, 1, 64, -1])
def test_a_truncated_file_is_refused(checkpoint, kept):
    path, _ = checkpoint
    path.write_bytes((FIXTURES / path.name).read_bytes()[:kept])
    assert_refused(path, str(path))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_refused(kept, tmp_path):
    tensors = torch.load(FIXTURES / TORCHSCALE, weights_only=True)["model"]
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(path, str(path), "damaged or cut short")


def test_a_missing_file_is_refused(checkpoint):
    assert_refused(checkpoint[0], str(checkpoint[0]), "no such file")


@pytest.mark.parametrize("content", [[1], {}, {"model": 3}, {"weights": {"a": torch.ones(1)}}], ids=repr)
def test_what_is_no_state_dict_is_refused(checkpoint, content):
    path, _ = checkpoint
    torch.save(content, path)
    assert_refused(path, str(path))


def test_a_missing_key_is_named(checkpoint):
    path, tensors = checkpoint
    key = some_key(tensors)
    del tensors[key]
    torch.save({"model": tensors}, path)
    assert_refused(path, str(path), "missing", repr(key))


def test_an_extra_key_is_named(checkpoint):
    path, tensors = checkpoint
    torch.save({"model": tensors | {"layers.0.encoder_attn.k_proj.weight": torch.ones(2)}}, path)
    assert_refused(path, str(path), "not part of this architecture", "'layers.0.encoder_attn.k_proj.weight'")


@pytest.mark.parametrize("shape", [(3, 5), (), (1, 2, 3), (0,)])
def test_another_shape_is_named(checkpoint, shape):
    path, tensors = checkpoint
    key = some_key(tensors)
    wanted = tuple(tensors[key].shape)
    tensors[key] = torch.ones(shape)
    torch.save({"model": tensors}, path)
    assert_refused(path, str(path), repr(key), str(wanted), str(tuple(shape)))


def test_any_tensor_of_another_shape_is_refused(checkpoint):
    path, tensors = checkpoint
    for key in tensors:
        for bad in (torch.ones(()), torch.ones(2, 2, 2, 2)):
            torch.save(tensors | {key: bad}, path)
            assert_refused(path, str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(checkpoint, value):
    path, tensors = checkpoint
    key = some_key(tensors)
    tensors[key][0, 0] = value
    torch.save({"model": tensors}, path)
    assert_refused(path, str(path), repr(key), "NaN")


# PyTorch 2.11 and 2.14 warn, in other words, of what the check of a sparse tensor takes.
@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*invariant:UserWarning")
@pytest.mark.parametrize(
    "bad",
    [torch.ones(4, dtype=torch.int64), torch.ones(2, 2).to_sparse(), "text", None],
    ids=["integers", "sparse", "text", "none"],
)
def test_other_things_than_dense_floats_are_named(checkpoint, bad):
    path, tensors = checkpoint
    key = some_key(tensors)
    torch.save({"model": tensors | {key: bad}}, path)
    assert_refused(path, str(path), repr(key))


def test_a_mixture_of_dtypes_is_refused(checkpoint):
    path, tensors = checkpoint
    key = some_key(tensors)
    tensors[key] = tensors[key].half()
    torch.save({"model": tensors}, path)
    assert_refused(path, str(path), repr(key), "--dtype")


def test_values_that_the_asked_dtype_cannot_hold_are_refused(tmp_path):
    tensors = torch.load(FIXTURES / TORCHSCALE, weights_only=True)["model"]
    tensors[some_key(tensors)][0, 0] = 1e6
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="fc2.weight.*float16 cannot represent"):
        convert_torchscale_to_hf.load_torchscale(
            tmp_path / "x.pt", FIXTURES / "torchscale_decoder_xpos.args.json", "float16"
        )


@pytest.mark.parametrize(
    "key, spoil",
    [("output_projection.weight", "must equal 'embed_tokens.weight'"),
     ("layers.1.self_attn.xpos.scale", "xPos's own factors")],
)  # fmt: skip
def test_tensors_that_we_compute_ourselves_must_agree(key, spoil, tmp_path):
    tensors = torch.load(FIXTURES / TORCHSCALE, weights_only=True)["model"]
    tensors[key] = tensors[key] + 0.01
    torch.save(tensors, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", "x.pt", repr(key), spoil)


def test_layers_must_be_numbered_without_gaps(checkpoint):
    path, tensors = checkpoint
    torch.save({key.replace("layers.1.", "layers.7."): tensor for key, tensor in tensors.items()}, path)
    assert_refused(path, str(path), "[0, 7]")


def test_half_a_prefix_is_refused(tmp_path):
    tensors = torch.load(FIXTURES / TORCHSCALE, weights_only=True)["model"]
    tensors["decoder.layer_norm.weight"] = tensors.pop("layer_norm.weight")
    torch.save(tensors, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", "x.pt", "'decoder.'")


CODE = "[__import__('os').mkdir('it-ran')]"


@pytest.mark.parametrize(
    "changed",
    [{"segment_length": CODE}, {"dilated_ratio": CODE}, {"segment_length": "[16, 2**5, 64]"},
     {"segment_length": "16, 32, 64"}, {"segment_length": "[]"}, {"segment_length": [16, "32", 64]},
     {"segment_length": [16, True, 64]}, {"dilated_ratio": "[1, 2, -4]"}, {"dilated_ratio": "[1, 2]"},
     {"dilated_ratio": [1, 2, 1e400]}, {"dilated_ratio": "[\u0661, \u0662, \u0664]"}, {"segment_length": None},
     {"decoder_layers": 3}, {"decoder_layers": 10**12}, {"decoder_layers": "2"}, {"decoder_layers": True},
     {"decoder_embed_dim": 64}, {"decoder_ffn_embed_dim": 32}, {"decoder_embed_dim": 10**15},
     {"decoder_ffn_embed_dim": 10**18}, {"decoder_attention_heads": 5},
     {"vocab_size": 98}, {"vocab_size": 97.0}, {"subln": "True"}, {"subln": 1}, {"activation_fn": "os.system"},
     {"layernorm_eps": float("nan")}, {"layernorm_eps": -1.0}, {"dropout": 1.5}, {"xpos_scale_base": 0},
     {"multiway": True}, {"use_xmoe": True}, {"moe_freq": 2}, {"rel_pos_buckets": 32}, {"max_rel_pos": 128},
     {"deepnorm": True}, {"encoder_layers": 2}, {"normalize_output": False}, {"a_new_trick": 1},
     {"subln": False, "decoder_normalize_before": False}],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(changed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = json.loads((FIXTURES / "torchscale_decoder_xpos.args.json").read_text()) | changed
    path = tmp_path / "bad.args.json"
    path.write_text(json.dumps(arguments))
    (tmp_path / TORCHSCALE).write_bytes((FIXTURES / TORCHSCALE).read_bytes())
    name = list(changed)[-1]
    # Sizes that only the weights contradict are told by their file and key.
    by_weights = name in ("decoder_embed_dim", "decoder_ffn_embed_dim") and changed[name] < 100
    ours = {"dilated_ratio": "dilation", "decoder_attention_heads": "num_attention_heads", "dropout": "hidden_dropout",
            "layernorm_eps": ""}  # fmt: skip
    texts = ["weight"] if by_weights else ["bad.args.json"]
    with pytest.raises(ValueError) as raised:
        convert(tmp_path / TORCHSCALE, tmp_path / "output", path)
    for text in texts:
        assert text in str(raised.value), raised.value
    assert by_weights or name in str(raised.value) or ours.get(name, "sizes") in str(raised.value), raised.value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.args.json", TORCHSCALE]


@pytest.mark.parametrize("text", ["", "[1]", "{", "{'subln': True}", "\ufeff{}", "[" * 100_000, "{}"])
def test_settings_that_are_no_dictionary_in_json_are_refused(text, tmp_path):
    (tmp_path / "bad.args.json").write_text(text)
    with pytest.raises(ValueError, match="bad.args.json"):
        convert(FIXTURES / TORCHSCALE, tmp_path / "output", tmp_path / "bad.args.json")


def test_lists_of_integers_are_read_and_nothing_else():
    assert parse_integers("[1,2, 4 ]") == [1, 2, 4] and parse_integers(" [ 2048, ] ") == [2048]
    for text in ("", "1", "[1", "[1 2]", "[1.0]", "[+1]", "[1]*9", "(1,2)", "[[1]]", "[1]#", "[1e3]", CODE):
        assert parse_integers(text) is None, text


@pytest.mark.parametrize("setting", ["num_attention_heads", "max_wsi_size", "tile_size", "slide_ngrids"])
def test_bad_settings_of_a_slide_encoder_are_named(setting, tmp_path, capsys):
    for value in ("0", "-3", "7" if setting == "num_attention_heads" else "0"):
        with pytest.raises(SystemExit):
            convert_gigapath_to_hf.main(
                ["--checkpoint", str(FIXTURES / GIGAPATH), "--output-dir", str(tmp_path / "o"),
                 f"--{setting.replace('_', '-')}", value]
            )  # fmt: skip
        assert f"`{setting}`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [{"teacher": {"backbone.pos_embed": torch.ones(1, 4, 8), "backbone.norm.weight": torch.ones(8)}},
     {"model": {"pos_embed": torch.ones(1, 4, 8), "patch_embed.proj.weight": torch.ones(8, 3, 32, 32)}}],
    ids=["pretrained", "finetuned"],
)  # fmt: skip
def test_longvit_is_refused_by_name(content, tmp_path):
    torch.save(content, tmp_path / "longvit.pth")
    assert_refused(tmp_path / "longvit.pth", "longvit.pth", "LongViT", "convert_longvit_to_hf.py")


def test_an_output_folder_in_use_is_left_alone(checkpoint, tmp_path):
    path, _ = checkpoint
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="output"):
        convert(FIXTURES / path.name, tmp_path / "output")
    assert [p.name for p in (tmp_path / "output").iterdir()] == ["precious.txt"] and len(list(tmp_path.iterdir())) == 1


def test_nothing_is_left_when_writing_fails(checkpoint, tmp_path, monkeypatch):
    def fail(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files.ModelCard, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(FIXTURES / checkpoint[0].name, tmp_path / "output")
    assert not list(tmp_path.iterdir())


def test_the_way_back_refuses_spoiled_weights(tmp_path):
    output = tmp_path / "model"
    convert(FIXTURES / TORCHSCALE, output)
    good = (output / "model.safetensors").read_bytes()
    (output / "model.safetensors").write_bytes(good[:-5])
    with pytest.raises(ValueError, match="model"):
        convert_hf_to_torchscale.convert_hf_to_torchscale(output, tmp_path / "back")
    (output / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model"):
        convert_hf_to_torchscale.convert_hf_to_torchscale(output, tmp_path / "back")
    assert not (tmp_path / "back").exists()
