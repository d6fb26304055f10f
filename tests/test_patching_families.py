"""The patcher's laws for every family that passes through Transformers' attention interface, and its refusals."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
)

from modeling_longnet.dilated_attention_reference import dilated_attention_reference
from modeling_longnet.patching import is_patched, load_patched_model, patch_model, report, unpatch_model
from modeling_longnet.transformers_compat import named_cache, release


SCHEDULE = ([8, 32], [1, 4])
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
FAMILIES = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma": {**GROUPED, "head_dim": 8},
    "phi3": GROUPED,
    "phi": COMMON,
    "gpt2": {**COMMON, "n_inner": 64},
    "gpt_neox": COMMON,
    "olmo2": GROUPED,
    "stablelm": GROUPED,
    "granite": GROUPED,
    "smollm3": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": None},
    "opt": {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "glm": {**GROUPED, "head_dim": 8},
    "cohere": GROUPED,
    "olmo": GROUPED,
    "mixtral": {**GROUPED, "sliding_window": None, "num_local_experts": 2},
}

GPTJ = {**COMMON, "n_inner": 64, "rotary_dim": 4}
if release() >= (5, 24):  # since when GPT-J passes through the interface
    FAMILIES["gptj"] = GPTJ


def make(family: str, auto_class=AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, COMMON), **changes})
    return auto_class.from_config(config).eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def input_ids():
    return torch.randint(1, 97, (2, 45))


@torch.no_grad()
def logits(model, input_ids, **kwargs):
    return model(input_ids=input_ids, **kwargs).logits


def reference_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    settings = {"overlap": "once", "num_sink_tokens": 4, "local": "sliding", "scale": scaling}
    out = dilated_attention_reference(query, key, value, *SCHEDULE, **settings)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("reference_of_tests", reference_attention)
AttentionMaskInterface.register("reference_of_tests", lambda **kwargs: None)


def test_patched_equals_original_on_short_input(family, input_ids):
    model = make(family)
    expected = logits(model, input_ids[:, :8])
    patch_model(model, *SCHEDULE)
    assert report(model).layers == (0, 1) and report(model).family == family
    torch.testing.assert_close(logits(model, input_ids[:, :8]), expected, **TOLERANCE)


def test_patched_equals_the_reference_attention_on_long_input(family, input_ids):
    model = make(family)
    dense = logits(model, input_ids)
    model.set_attn_implementation("reference_of_tests")
    expected = logits(model, input_ids)
    model.set_attn_implementation("sdpa")
    actual = logits(patch_model(model, *SCHEDULE), input_ids)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert (actual - dense).abs().max() > 1e-3


def test_cached_generation_equals_full_forward(family, input_ids):
    model = patch_model(make(family), *SCHEDULE)
    tokens = model.generate(input_ids[:, :20], attention_mask=torch.ones(2, 20), max_new_tokens=15, do_sample=False)
    whole = logits(model, tokens)
    assert torch.equal(whole[:, 19:-1].argmax(-1), tokens[:, 20:])
    cache = DynamicCache(config=model.config)
    steps = [logits(model, ids, **named_cache(cache)) for ids in tokens.split([20, 7, 1, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **TOLERANCE)


def test_left_padding_invariance(family, input_ids):
    model = patch_model(make(family), *SCHEDULE)
    mask = torch.ones_like(input_ids)
    mask[1, :15] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = logits(model, input_ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(batch[0], logits(model, input_ids[:1])[0], **TOLERANCE)
    torch.testing.assert_close(batch[1, 15:], logits(model, input_ids[1:, 15:])[0], **TOLERANCE)
    tokens = model.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[1, 45:]
    alone = model.generate(input_ids[1:, 15:], attention_mask=mask[1:, 15:], max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, alone[0, 30:])


def test_save_load_and_unpatch_are_identities(family, input_ids, tmp_path):
    model = make(family)
    original = logits(model, input_ids)
    expected = logits(patch_model(model, *SCHEDULE), input_ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched_model(tmp_path), input_ids), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_patched(plain) and torch.equal(logits(plain, input_ids), original)
    assert torch.equal(logits(unpatch_model(model), input_ids), original)


# Models and layers that are left as they are


REFUSED = {
    "falcon": ({}, "AttentionInterface"),
    "bloom": ({}, "AttentionInterface"),
    "mpt": ({}, "AttentionInterface"),
    "mamba": ({}, "AttentionInterface|does not pass through"),
    "gemma2": ({"num_key_value_heads": 2, "head_dim": 8}, "softcap"),
    "gpt_oss": ({"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "sinks"),
    "mistral": ({"num_key_value_heads": 2, "sliding_window": 16}, "sliding"),
    "deepseek_v3": (
        {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
         "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        "differ in width",
    ),
}  # fmt: skip
if "gptj" not in FAMILIES:
    REFUSED["gptj"] = GPTJ, "AttentionInterface"


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_say_why_and_stay_as_they_were(family, input_ids):
    changes, message = REFUSED[family]
    model = make(family, **changes)
    before = logits(model, input_ids)
    with pytest.raises(ValueError, match=message):
        patch_model(model, *SCHEDULE)
    assert not is_patched(model) and not hasattr(model.config, "dilated_attention")
    assert torch.equal(logits(model, input_ids), before)


def test_encoders_and_encoder_decoders_are_refused():
    with pytest.raises(ValueError, match="is causal"):
        patch_model(make("bert", AutoModelForMaskedLM), *SCHEDULE)
    with pytest.raises(ValueError, match="encoder-decoder"):
        patch_model(make("bart", AutoModelForSeq2SeqLM, d_model=32, encoder_layers=1, decoder_layers=1), *SCHEDULE)


SLIDING = {"num_key_value_heads": 2, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
HYBRIDS = {
    "gemma3_text": ({**SLIDING, "head_dim": 8}, "sliding"),
    "qwen2": ({**SLIDING, "use_sliding_window": True}, "sliding"),
    "lfm2": ({"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64}, "interface"),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_with_another_attention_are_left_alone_and_named(family, input_ids):
    """A dense second layer (one long segment, r = 1) must give the original model: the first kept its attention."""
    changes, reason = HYBRIDS[family]
    model = make(family, **changes)
    expected = logits(model, input_ids)
    patch_model(model, [64], [1])
    assert report(model).layers == (1,) and reason in report(model).left_alone[0]
    assert "layer 0 left alone" in str(report(model))
    torch.testing.assert_close(logits(model, input_ids), expected, **TOLERANCE)
    unpatch_model(model)
    with pytest.raises(ValueError, match="`layers` asks for layer 0"):
        patch_model(model, [64], [1], layers=[0])
    options = {"attention_mask": torch.ones(2, 45), "max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(input_ids, **options)
    patch_model(model, [64], [1])
    assert torch.equal(model.generate(input_ids, **options), tokens)
    if model._can_compile_fullgraph:
        assert torch.equal(model.generate(input_ids, cache_implementation="static", **options), tokens)


def test_a_model_without_a_head_is_patched(input_ids):
    model = make("llama", AutoModel)
    expected = model(input_ids[:, :8]).last_hidden_state
    torch.testing.assert_close(patch_model(model, *SCHEDULE)(input_ids[:, :8]).last_hidden_state, expected, **TOLERANCE)


# Learned positions end somewhere


def test_learned_positions_refuse_to_read_beyond_their_table(input_ids):
    with pytest.raises(ValueError, match="`segment_lengths` must not exceed the 128 learned positions"):
        patch_model(make("gpt2"), [64, 256], [1, 4])
    model = patch_model(make("gpt2"), *SCHEDULE)
    with pytest.raises(ValueError, match="position 129 asked of a model with a learned table of 128 positions"):
        model(torch.ones(1, 130, dtype=torch.long))
    with pytest.raises(ValueError, match="no rotary embeddings"):
        patch_model(unpatch_model(model), *SCHEDULE, rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(IndexError):  # the vanilla model's own way to say it
        model(torch.ones(1, 130, dtype=torch.long))
