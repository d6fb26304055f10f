"""A LongNet, a patched Llama and a slide encoder among the tools of Transformers: generate, loading, compiling, PEFT.

What is tested elsewhere is not repeated here; docs/compatibility.md says where each feature is.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tiny_models import SCHEDULE, tiny_config
from torch.testing import assert_close
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, TextStreamer, pipeline

from modeling_longnet import (
    LongNetForCausalLM,
    LongNetSlideEncoderConfig,
    LongNetSlideEncoderModel,
)
from modeling_longnet.patching import load_patched_model, patch_model


CLOSE = {"rtol": 1e-5, "atol": 1e-5}
VOCABULARY = 259  # bytes and three special tokens, as ByT5Tokenizer counts them


@dataclass
class Case:
    """A model, what it reads, and how it is loaded."""

    model: torch.nn.Module
    load: Callable

    def inputs(self, length: int = 40) -> dict:
        if isinstance(self.model, LongNetSlideEncoderModel):
            coords = torch.randint(0, 200_000, (2, length, 2))
            return {"tile_embeds": torch.randn(2, length, 16), "coords": coords}
        return {"input_ids": torch.randint(3, VOCABULARY, (2, length))}

    def run(self, model, inputs: dict) -> torch.Tensor:
        outputs = model(**inputs)
        return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def longnet() -> Case:
    model = LongNetForCausalLM(tiny_config(vocab_size=VOCABULARY, pad_token_id=0))
    return Case(model.eval(), LongNetForCausalLM.from_pretrained)


def patched() -> Case:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Case(patch_model(LlamaForCausalLM(config).eval(), **SCHEDULE), load_patched_model)


def slide_encoder() -> Case:
    config = LongNetSlideEncoderConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, in_chans=16, **SCHEDULE
    )
    return Case(LongNetSlideEncoderModel(config).eval(), LongNetSlideEncoderModel.from_pretrained)


CASES = {"longnet": longnet, "patched": patched, "slide_encoder": slide_encoder}


@pytest.fixture
def case(request) -> Case:
    return CASES[request.param]()


every_model = pytest.mark.parametrize("case", CASES, indirect=True)
every_decoder = pytest.mark.parametrize("case", ["longnet", "patched"], indirect=True)


def generate(case: Case, input_ids: torch.Tensor, **options) -> torch.Tensor:
    defaults = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    return case.model.generate(input_ids, **(defaults | options))


# Generate

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 30},
    "guidance": {"guidance_scale": 1.5},
    "short prompt chunks": {"prefill_chunk_size": 7},
    "long prompt chunks": {"prefill_chunk_size": 33},
}


@pytest.mark.parametrize("mode", MODES)
@every_decoder
def test_each_decoding_mode_gives_the_tokens_of_the_plain_cache(case, mode):
    """The bounded cache, which is the default, against a cache of all keys; 70 tokens, segments of up to 32."""
    input_ids, found = case.inputs()["input_ids"], []
    for cache in (None, "dynamic"):
        torch.manual_seed(0)
        found.append(generate(case, input_ids, cache_implementation=cache, **MODES[mode]))
    assert torch.equal(*found) and found[0].shape[1] == 70


@pytest.mark.parametrize("mode", ["assisted", "prompt lookup"])
@every_decoder
def test_speculative_decoding_equals_greedy(case, mode):
    input_ids = case.inputs()["input_ids"][:1]
    options = {"assistant_model": case.model} if mode == "assisted" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(generate(case, input_ids, **options), generate(case, input_ids))


@every_decoder
def test_constrained_decoding_keeps_its_constraint(case):
    input_ids = case.inputs()["input_ids"]
    allowed = generate(case, input_ids, prefix_allowed_tokens_fn=lambda row, tokens: [70, 71])[:, 40:]
    assert set(allowed.flatten().tolist()) <= {70, 71}
    word = int(generate(case, input_ids)[0, 40])
    assert word not in generate(case, input_ids, bad_words_ids=[[word]])[:, 40:]


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
@every_decoder
def test_a_text_ends_with_its_stop_string(case, options):
    """For which `generate` wants the tokenizer, and hands it to each forward."""
    tokenizer, input_ids = ByT5Tokenizer(extra_ids=0), case.inputs()["input_ids"][:1]
    options = options | {"prefix_allowed_tokens_fn": lambda row, tokens: [3 + ord("ab"[len(tokens) % 7 == 0])]}
    made = generate(case, input_ids, stop_strings=["aab"], tokenizer=tokenizer, **options)[0, 40:]
    assert tokenizer.decode(made) == "aab"


REMOTE_MODES = {
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "high"},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "forced words": {"num_beams": 3, "force_words_ids": [[5, 6]]},
}


@pytest.mark.parametrize("mode", REMOTE_MODES)
@every_decoder
@pytest.mark.filterwarnings("ignore")
def test_modes_that_transformers_moved_to_the_hub_are_not_fetched_unasked(case, mode):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        generate(case, case.inputs()["input_ids"], **REMOTE_MODES[mode])


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding_window", "hybrid"])
@every_decoder
@pytest.mark.filterwarnings("ignore")
def test_cache_implementations_give_the_same_tokens(case, cache):
    """Old names of static caches are Transformers' own; no layer of ours is a sliding-window layer."""
    input_ids = case.inputs()["input_ids"]
    assert torch.equal(generate(case, input_ids, cache_implementation=cache), generate(case, input_ids))


@pytest.mark.parametrize("cache", ["dilated", "nonsense"])
@every_decoder
def test_unknown_cache_implementations_are_refused(case, cache):
    with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
        generate(case, case.inputs()["input_ids"], cache_implementation=cache)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they work")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@every_decoder
def test_offloaded_caches_want_cuda(case, cache):
    """An error of PyTorch's own, and never another cache without a word."""
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|new Stream"):
        generate(case, case.inputs()["input_ids"], cache_implementation=cache)


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="optimum-quanto may be installed")
@every_decoder
def test_quantized_caches_want_their_library(case):
    with pytest.raises(ImportError, match="optimum-quanto"):
        generate(case, case.inputs()["input_ids"], cache_implementation="quantized")


@pytest.mark.parametrize("cache", ["paged"])
@every_decoder
@pytest.mark.filterwarnings("ignore")
def test_paged_caches_are_refused(case, cache):
    with pytest.raises((ValueError, KeyError, TypeError)):
        generate(case, case.inputs()["input_ids"], cache_implementation=cache)


@every_decoder
def test_a_streamer_gets_the_tokens_as_they_come(case, capsys):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    input_ids = torch.tensor([tokenizer("How long is a long text?").input_ids[:-1]])
    expected = tokenizer.decode(generate(case, input_ids)[0, input_ids.shape[1] :], skip_special_tokens=True)
    generate(case, input_ids, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")


@every_decoder
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_generates(case):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    pipe = pipeline("text-generation", model=case.model, tokenizer=tokenizer, batch_size=2)
    texts = ["A text.", "Another, longer text."]
    found = pipe(texts, max_new_tokens=20, do_sample=False, return_full_text=False)
    for text, answers in zip(texts, found):
        alone = pipe(text, max_new_tokens=20, do_sample=False, return_full_text=False)
        assert answers[0]["generated_text"] == alone[0]["generated_text"]


# Loading and placing


@every_model
def test_shards_load_as_the_whole(case, tmp_path):
    inputs = case.inputs()
    case.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(case.run(case.load(tmp_path).eval(), inputs), case.run(case.model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_model
def test_dtypes_of_loading(case, tmp_path, dtype):
    case.model.save_pretrained(tmp_path)
    model, inputs = case.load(tmp_path, dtype=dtype).eval(), case.inputs()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    outputs = case.run(model, {k: v.to(dtype) if k == "tile_embeds" else v for k, v in inputs.items()})
    assert outputs.isfinite().all()
    # Half precisions in two layers: a few of their steps.
    assert_close(outputs.float(), case.run(case.model, inputs), rtol=0.1, atol=0.1 if dtype == torch.bfloat16 else 0.02)


@every_model
def test_a_model_made_on_the_meta_device_takes_weights_and_the_same_buffers(case, tmp_path):
    if case.load is load_patched_model:
        pytest.skip("a patched model is an ordinary one until it is patched, and patching runs a forward")
    with torch.device("meta"):
        model = type(case.model)(case.model.config)
    assert all(tensor.is_meta for tensor in model.parameters())
    case.model.save_pretrained(tmp_path)
    inputs = case.inputs()
    assert torch.equal(case.run(case.load(tmp_path).eval(), inputs), case.run(case.model, inputs))


@every_model
@pytest.mark.filterwarnings("ignore")
def test_layers_on_disk_give_the_same_numbers(case, tmp_path):
    """`device_map="auto"` with room for some of the weights only."""
    inputs = case.inputs()
    case.model.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in case.model.parameters())
    model = case.load(
        tmp_path / "model", device_map="auto", max_memory={"cpu": int(0.8 * size)}, offload_folder=tmp_path / "disk"
    ).eval()
    assert "disk" in model.hf_device_map.values()
    with torch.no_grad():
        assert_close(case.run(model, inputs), case.run(case.model, inputs), **CLOSE)
        if "input_ids" in inputs:
            found = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
            assert torch.equal(found, generate(case, inputs["input_ids"], max_new_tokens=20))


@every_decoder
def test_resized_embeddings_load_again(case, tmp_path):
    case.model.resize_token_embeddings(VOCABULARY + 5)
    case.model.save_pretrained(tmp_path)
    model, inputs = case.load(tmp_path).eval(), case.inputs()
    assert case.run(model, inputs).shape[-1] == VOCABULARY + 5
    assert torch.equal(case.run(model, inputs), case.run(case.model, inputs))


@every_model
@pytest.mark.filterwarnings("ignore")
def test_int8_weights_stay_near(case, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    case.model.save_pretrained(tmp_path)
    model, inputs = case.load(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())).eval(), case.inputs()
    assert "Int8" in repr(type(next(m for m in model.modules() if type(m) is torch.nn.Linear).weight))
    found, expected = case.run(model, inputs), case.run(case.model, inputs)
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


# Compiling and exporting


def score(case: Case, model, inputs: dict) -> torch.Tensor:
    """A loss that a last LayerNorm does not make constant."""
    outputs = case.run(model, inputs).float()
    return (outputs * torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])).mean()


@pytest.mark.parametrize("case, lengths", [
    ("longnet", (40,)), ("longnet", (24, 40)), ("patched", (24, 40)), ("slide_encoder", (40,)),
], indirect=["case"], ids=lambda value: f"{len(value)}-lengths" if isinstance(value, tuple) else value)  # fmt: skip
def test_training_compiles_to_one_graph(case, lengths):
    """Forward and gradients, at a fixed length and at dynamic ones."""
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, dynamic=len(lengths) > 1, backend="aot_eager")
    for length in lengths:
        inputs, gradients = case.inputs(length), []
        for model in (case.model, compiled):
            case.model.zero_grad()
            score(case, model, inputs).backward()
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in case.model.parameters()])
        for expected, found in zip(*gradients):
            assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.filterwarnings("ignore")
def test_torch_export_gives_a_program_for_any_length(case):
    if case.load is load_patched_model:
        pytest.skip("Transformers exports Llama with its own mask only")
    dim, inputs = torch.export.Dim.AUTO, case.inputs()
    extra = {"use_cache": False} if "input_ids" in inputs else {}
    shapes = {name: {0: dim, 1: dim} for name in inputs} | dict.fromkeys(extra)
    program = torch.export.export(case.model, (), kwargs=inputs | extra, dynamic_shapes=shapes, strict=False).module()
    longer = case.inputs(57)
    assert_close(case.run(program, longer | extra), case.run(case.model, longer), **CLOSE)


# PEFT


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@every_model
def test_adapters_train_switch_off_merge_and_load(case, options, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    inputs = case.inputs()
    with torch.no_grad():
        original = case.run(case.model, inputs)
    case.model.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(case.model, peft.LoraConfig(r=2, target_modules="all-linear", **options))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        score(case, model, inputs).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        adapted = case.run(model, inputs)
        assert (adapted - original).abs().max() > 1e-4
        with model.disable_adapter():
            assert_close(case.run(model, inputs), original, **CLOSE)
        model.save_pretrained(tmp_path / "adapter")
        base = case.load(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert_close(case.run(again, inputs), adapted, **CLOSE)
        assert_close(case.run(model.merge_and_unload(), inputs), adapted, rtol=1e-4, atol=1e-4)


def test_peft_asks_for_target_modules_by_name():
    """PEFT's table of defaults knows the models of Transformers only: say "all-linear", or name the projections."""
    peft = pytest.importorskip("peft", reason="needs peft")
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(longnet().model, peft.LoraConfig())
    model = peft.get_peft_model(longnet().model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4


# Courtesies


@every_decoder
@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_is_refused(case):
    with pytest.raises((ValueError, RuntimeError), match="(?i)continuous batching|attention|dilated"):
        case.model.generate_batch([[5, 6, 7]], max_new_tokens=3)


@every_model
def test_models_carry_their_tags(case):
    assert {"longnet", "dilated-attention"} <= set(case.model.model_tags)
