"""The LongNet models: each law by its name. Letters: B batch, N tokens."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VARIANTS, tiny_config
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    StaticCache,
)

import modeling_longnet
from modeling_longnet import (
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
)
from modeling_longnet.transformers_compat import CACHE, named_cache


CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HEADS = {
    AutoModel: LongNetModel,
    AutoModelForCausalLM: LongNetForCausalLM,
    AutoModelForMaskedLM: LongNetForMaskedLM,
    AutoModelForSequenceClassification: LongNetForSequenceClassification,
    AutoModelForTokenClassification: LongNetForTokenClassification,
    AutoModelForQuestionAnswering: LongNetForQuestionAnswering,
}
BOTH_WAYS = {f"{name}-{way}": changes | {"is_causal": way == "causal"} for name, changes in VARIANTS.items()
             for way in ("causal", "both")}  # fmt: skip
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
every_variant_both_ways = pytest.mark.parametrize("changes", BOTH_WAYS.values(), ids=BOTH_WAYS)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(61, (batch, length))


def base_model(changes: dict, implementation: str = "sdpa") -> LongNetModel:
    model = LongNetModel(tiny_config(**changes)).eval()
    model.set_attn_implementation(implementation)
    return model


@torch.no_grad()
def hidden(model, input_ids, **kwargs) -> torch.Tensor:
    return model(input_ids, **kwargs).last_hidden_state


@pytest.fixture
def log(caplog, monkeypatch):
    """Warnings of the model file, each given anew."""
    from modeling_longnet import modeling_longnet as file

    monkeypatch.setattr(file.logger, "warning_once", file.logger.warning)
    monkeypatch.setattr(logging.getLogger("modeling_longnet"), "propagate", True)
    return caplog


# The model against its definition


@every_variant_both_ways
def test_sdpa_equals_eager(changes):
    model = base_model(changes)
    input_ids = tokens(2, 75)
    mask = torch.ones_like(input_ids)
    mask[0, :9] = 0
    fused = hidden(model, input_ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    assert_close(fused[mask.bool()], hidden(model, input_ids, attention_mask=mask)[mask.bool()], **CLOSE)


def test_eager_returns_the_joint_weights():
    model = base_model({}, "eager")
    captured = {}
    layer = model.layers[1].self_attn
    layer.o_proj.register_forward_pre_hook(lambda module, inputs: captured.update(concatenated=inputs[0]))
    layer.v_proj.register_forward_hook(lambda module, inputs, output: captured.update(value=output))
    layer.inner_attn_ln = torch.nn.Identity()
    outputs = model(tokens(2, 40), output_attentions=True)
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 40, 40)] * 2
    weights = outputs.attentions[1]
    assert_close(weights.sum(-1), torch.ones(2, 4, 40), **CLOSE)
    assert not weights.triu(1).any()
    value = captured["value"].view(2, 40, 4, 8).transpose(1, 2)
    assert_close((weights @ value).transpose(1, 2).reshape(2, 40, 32), captured["concatenated"], **CLOSE)


def test_other_backends_say_how_to_get_weights(log):
    outputs = base_model({})(tokens(1, 10), output_attentions=True)
    assert outputs.attentions == () and "set_attn_implementation('eager')" in log.text


@pytest.mark.parametrize("name", ["flex_attention", "paged|eager", "dilated"])
def test_dense_implementations_are_refused_by_name(name):
    model = LongNetModel(tiny_config())
    with pytest.raises((ValueError, ImportError), match="flex|paged|dilated"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"


def test_attention_dropout_trains_and_says_that_it_is_slower(log):
    model = LongNetModel(tiny_config(attention_dropout=0.5)).train()
    input_ids = tokens(2, 40)
    assert not torch.equal(model(input_ids).last_hidden_state, model(input_ids).last_hidden_state)
    assert "no dropout" in log.text
    model.eval()
    assert torch.equal(model(input_ids).last_hidden_state, model(input_ids).last_hidden_state)


@pytest.mark.parametrize("name", ["hidden_dropout", "activation_dropout", "drop_path_rate"])
def test_dropouts_act_in_training_only(name):
    model = LongNetModel(tiny_config(**{name: 0.5}))
    input_ids = tokens(4, 20)
    model.train()
    assert not torch.equal(model(input_ids).last_hidden_state, model(input_ids).last_hidden_state)
    model.eval()
    expected = LongNetModel(tiny_config()).eval()
    expected.load_state_dict(model.state_dict())
    assert torch.equal(hidden(model, input_ids), hidden(expected, input_ids))


def test_stochastic_depth_keeps_the_mean():
    layer = LongNetModel(tiny_config(drop_path_rate=0.4)).layers[1].train()
    updates = layer.add_to_residual(torch.zeros(20000, 1, 1), torch.ones(20000, 1, 1))
    assert set(updates.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert abs(updates.mean().item() - 1) < 0.03


# xPos


def xpos_tables(config, positions):
    return LongNetModel(config).xpos(torch.zeros(1), position_ids=torch.as_tensor(positions)[None])


def test_xpos_logits_depend_on_distance_only():
    from modeling_longnet.longnet_positions import apply_xpos

    config = tiny_config(segment_lengths=[64, 1024], dilation_rates=[1, 4])
    query, key = torch.randn(2, 8, dtype=torch.double)
    logits = []
    for start in (0, 300, 1024 * 10**6 + 17):  # up to a billion
        tables = xpos_tables(config, range(start, start + 20))
        rotated = apply_xpos(query.expand(1, 1, 20, 8), key.expand(1, 1, 20, 8), *tables)
        logits.append((rotated[0] @ rotated[1].mT)[0, 0].tril())
    assert_close(logits[1], logits[0], **CLOSE)
    assert_close(logits[2], logits[0], **CLOSE)


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_xpos_and_rope_scale_their_frequencies_alike(rope):
    xpos, plain = (base_model({"rope_parameters": rope | {"rope_theta": 10000.0}, "position_embedding_type": kind})
                   for kind in ("xpos", "rope"))  # fmt: skip
    assert torch.equal(xpos.xpos.rotary_emb.inv_freq, plain.rotary_emb.inv_freq)


def test_xpos_decays_as_the_paper_says():
    """The logit of equal unit vectors in one pair of dims is zeta ** (distance / base) * cos(angle * distance)."""
    from modeling_longnet.longnet_positions import apply_xpos

    config = tiny_config(xpos_scale_base=16)
    distance = torch.arange(32)
    for pair in range(4):
        unit = torch.eye(8)[2 * pair].expand(1, 1, 32, 8)
        query, key = apply_xpos(unit, unit, *xpos_tables(config, range(32)))
        zeta = (2 * pair + 0.4 * 8) / (1.4 * 8)
        expected = zeta ** (distance / 16) * torch.cos(distance * 10000.0 ** (-2 * pair / 8))
        assert_close((query[0, 0] @ key[0, 0, 0]), expected, **CLOSE)


@pytest.mark.parametrize("sinks", [0, 2])
def test_xpos_stays_finite_over_its_longest_range(sinks):
    """Products with keys that causality hides are formed too, in every dtype that training uses."""
    config = tiny_config(segment_lengths=[8, 32768], dilation_rates=[1, 64], num_sink_tokens=sinks,
                         max_position_embeddings=32768)  # fmt: skip
    cos, sin, scale = xpos_tables(config, [0, 32767])
    assert (scale.max() / scale.min() * 1000).isfinite() and scale.bfloat16().isfinite().all()


def test_xpos_out_of_range_for_float16_is_computed_in_float32():
    changes = {"segment_lengths": [32, 4096], "dilation_rates": [1, 2], "xpos_scale_base": 64}
    model = base_model(changes)
    assert not model.config.xpos_fits_float16
    input_ids = tokens(1, 400)
    expected = hidden(model, input_ids)
    found = hidden(model.half(), input_ids)
    assert found.dtype == torch.float16
    assert_close(found.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("changes", [{"position_embedding_type": "learned"}, {"num_sink_tokens": 2}],
                         ids=["learned", "xpos-sinks"])  # fmt: skip
def test_positions_beyond_the_table_are_refused(changes):
    model = base_model(changes | {"max_position_embeddings": 20})
    hidden(model, tokens(1, 20))
    with pytest.raises(ValueError, match="`max_position_embeddings=20`.*got 20"):
        model(tokens(1, 21))
    packed = torch.arange(40)[None] % 20
    hidden(model, tokens(1, 40), position_ids=packed)


# Padding, packing, causality


@pytest.mark.parametrize("side", ["left", "right"])
@every_variant_both_ways
def test_padding_invariance(changes, side):
    model = base_model(changes)
    lengths = [50, 71, 33]
    rows = [tokens(1, length) for length in lengths]
    input_ids, mask = torch.full((3, 71), 5), torch.zeros(3, 71, dtype=torch.long)
    places = [slice(71 - n, 71) if side == "left" else slice(0, n) for n in lengths]
    for i, (row, place) in enumerate(zip(rows, places)):
        input_ids[i, place], mask[i, place] = row[0], 1
    batch = hidden(model, input_ids, attention_mask=mask)
    assert batch.isfinite().all()
    for i, (row, place) in enumerate(zip(rows, places)):
        assert_close(batch[i, place], hidden(model, row)[0], **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@every_variant_both_ways
def test_padding_between_tokens_is_put_aside(changes, implementation):
    model = base_model(changes, implementation)
    mask = (torch.rand(3, 60) < 0.7).long()
    mask[0, 10:20] = 0
    input_ids = tokens(3, 60)
    batch = hidden(model, input_ids, attention_mask=mask)
    for row, kept, ids in zip(batch, mask.bool(), input_ids):
        assert_close(row[kept], hidden(model, ids[kept][None])[0], **CLOSE)


def test_weights_of_rows_with_padding_between_tokens_stand_where_the_tokens_do():
    model = base_model({}, "eager")
    input_ids, mask = tokens(1, 30), torch.ones(1, 30, dtype=torch.long)
    mask[0, 4:9] = 0
    weights = model(input_ids, attention_mask=mask, output_attentions=True).attentions[0][0]
    kept = mask[0].bool()
    expected = model(input_ids[:, kept], output_attentions=True).attentions[0][0]
    assert_close(weights[:, kept][:, :, kept], expected, **CLOSE)
    assert not weights[:, :, ~kept].any()


@every_variant_both_ways
def test_packed_equals_separate(changes):
    model = base_model(changes)
    lengths = [40, 1, 33, 17]
    rows = [tokens(1, length) for length in lengths]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = hidden(model, torch.cat(rows, 1), position_ids=position_ids)
    separate = torch.cat([hidden(model, row) for row in rows], 1)
    assert_close(packed, separate, **CLOSE)


def test_packed_rows_with_padding_equal_separate_ones():
    model = base_model({})
    rows = [tokens(1, 20), tokens(1, 30)]
    padding = torch.full((1, 6), 5)
    input_ids = torch.cat([padding, rows[0], padding, rows[1], padding], 1)
    position_ids = torch.cat([torch.arange(n) for n in (6, 20, 6, 30, 6)])[None]
    mask = torch.cat([torch.full((n,), i % 2) for i, n in enumerate((6, 20, 6, 30, 6))])[None]
    found = hidden(model, input_ids, position_ids=position_ids, attention_mask=mask)
    assert_close(found[:, 6:26], hidden(model, rows[0]), **CLOSE)
    assert_close(found[:, 32:62], hidden(model, rows[1]), **CLOSE)


def test_batch_invariance():
    model = base_model({})
    input_ids = tokens(4, 70)
    assert_close(hidden(model, input_ids), torch.cat([hidden(model, row[None]) for row in input_ids]), **CLOSE)


@every_variant
def test_causality(changes):
    model = base_model(changes)
    input_ids = tokens(1, 70)
    before = hidden(model, input_ids)
    for place in (1, 8, 33, 69):
        changed = input_ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 61
        after = hidden(model, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


def test_a_bidirectional_model_sees_what_follows():
    model = base_model({"is_causal": False, "position_embedding_type": "rope"})
    input_ids = tokens(1, 30)
    changed = input_ids.clone()
    changed[0, 29] = (changed[0, 29] + 1) % 61
    assert not torch.allclose(hidden(model, changed)[:, 0], hidden(model, input_ids)[:, 0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_texts_that_share_a_prefix_in_one_row_equal_each_alone(changes, implementation):
    """A mask of pairs, with positions, tells which of the endings belongs to whom.

        P P P P A A A B B      A sees P and A, B sees P and B; both stand at positions 4, 5, ...
    """
    model = base_model(changes, implementation)
    prefix, endings = tokens(1, 20), (tokens(1, 15), tokens(1, 30))
    owner = torch.tensor([0] * 20 + [1] * 15 + [2] * 30)
    visible = ((owner[:, None] == owner) | (owner == 0)).tril()[None, None]
    positions = torch.cat([torch.arange(20), 20 + torch.arange(15), 20 + torch.arange(30)])[None]
    additive = torch.zeros(1, 1, 65, 65).masked_fill(~visible, torch.finfo(torch.float32).min)
    for mask in (visible, additive):
        found = hidden(model, torch.cat([prefix, *endings], 1), attention_mask=mask, position_ids=positions)
        for i, ending in enumerate(endings):
            assert_close(found[:, owner == i + 1], hidden(model, torch.cat([prefix, ending], 1))[:, 20:], **CLOSE)


def test_a_mask_of_pairs_wants_the_whole_text_and_lengths_that_do_not_matter():
    model, mask = base_model({}), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    past = model(tokens(1, 8), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="of pairs must come with the whole text.*8 of 16"):
        model(tokens(1, 8), attention_mask=mask, **named_cache(past))
    with pytest.raises(ValueError, match="padding='zeros'"):
        base_model({"padding": "zeros"})(tokens(1, 8), attention_mask=mask)


def test_inputs_embeds_equal_input_ids():
    model = base_model({"layernorm_embedding": True})
    input_ids = tokens(2, 30)
    assert torch.equal(hidden(model, None, inputs_embeds=model.embed_tokens(input_ids)), hidden(model, input_ids))


BAD_INPUTS = {
    "both-inputs": ({"inputs_embeds": torch.zeros(2, 10, 32)}, "exactly one of input_ids or inputs_embeds"),
    "no-additive-mask": ({"attention_mask": torch.ones(2, 1, 10, 10)}, "`attention_mask` of pairs.*additive"),
    "mask-of-other-pairs": ({"attention_mask": torch.zeros(2, 1, 10, 9)}, "`attention_mask`.*shape.*2, 1, 10, 9"),
    "mask-per-head": ({"attention_mask": torch.zeros(2, 4, 10, 10)}, "`attention_mask`.*shape.*2, 4, 10, 10"),
    "dense-bool-mask": ({"attention_mask": torch.ones(2, 1, 1, 10).bool()}, "`attention_mask`.*2, 1, 1, 10"),
    "short-mask": ({"attention_mask": torch.ones(2, 9)}, r"`attention_mask`.*\(2, 10\).*\(2, 9\)"),
    "long-mask": ({"attention_mask": torch.ones(2, 12)}, r"`attention_mask`.*\(2, 10\).*\(2, 12\)"),
    "batch-of-mask": ({"attention_mask": torch.ones(1, 10)}, r"`attention_mask`.*\(2, 10\).*\(1, 10\)"),
}


@pytest.mark.parametrize("kwargs, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        base_model({})(tokens(2, 10), **kwargs)


def test_an_encoder_is_no_causal_lm():
    with pytest.raises(ValueError, match="`is_causal`.*LongNetForMaskedLM"):
        LongNetForCausalLM(tiny_config(is_causal=False))


def test_an_encoder_takes_no_cache_with_room():
    model = base_model({"is_causal": False, "position_embedding_type": "rope"})
    assert model(tokens(1, 8)).get(CACHE) is None
    with pytest.raises(ValueError, match="`cache`.*StaticCache"):
        model(tokens(1, 8), **named_cache(StaticCache(config=model.config, max_cache_len=20)))


def test_a_mask_with_a_gap_and_a_static_cache_is_refused():
    model = base_model({})
    cache = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ValueError, match="`attention_mask` has padding between"):
        model(tokens(1, 8), attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]]), **named_cache(cache))


# Weights: initialisation, saving, tying


def test_magneto_initialisation():
    config = tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    layer = LongNetModel(config).layers[2]
    gain = math.sqrt(math.log(8))
    for linear, factor in (
        (layer.self_attn.q_proj, 1),
        (layer.self_attn.k_proj, 1),
        (layer.self_attn.v_proj, gain),
        (layer.self_attn.o_proj, gain),
        (layer.mlp.fc1, gain),
        (layer.mlp.fc2, gain),
    ):
        xavier = math.sqrt(2 / (linear.in_features + linear.out_features))
        assert abs(linear.weight.std().item() / (factor * xavier) - 1) < 0.02
        assert not linear.bias.any()


def test_without_sub_layernorm_the_usual_initialisation():
    model = LongNetModel(tiny_config(hidden_size=256, sub_layernorm=False, initializer_range=0.01))
    assert abs(model.layers[0].mlp.fc1.weight.std().item() / 0.01 - 1) < 0.02
    assert isinstance(model.layers[0].self_attn.inner_attn_ln, torch.nn.Identity)


def test_scaled_embeddings_start_with_unit_variance():
    model = LongNetModel(tiny_config(vocab_size=500, pad_token_id=3))
    assert abs((model.embed_tokens.weight * model.embed_scale).std().item() - 1) < 0.05
    assert abs((model.embed_tokens.weight[3] * model.embed_scale).std().item() - 1) < 0.5  # it may be text as well


@every_variant
@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
def test_save_load_identity(auto_class, changes, tmp_path):
    is_causal = auto_class is not AutoModelForMaskedLM
    model = HEADS[auto_class](tiny_config(is_causal=is_causal, **changes)).eval()
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is HEADS[auto_class]
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    input_ids = tokens(1, 40)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids)[0], model(input_ids)[0])


def test_fields_given_to_from_pretrained_are_checked_as_a_configuration_is(tmp_path):
    LongNetForCausalLM(tiny_config()).save_pretrained(tmp_path)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[16, 64], dilation_rates=[1, 4])
    assert loaded.config.dilation_schedule.patterns == ((16, 1), (64, 4))
    with pytest.raises(ValueError, match="the same number of entries, got 1 and 3"):
        LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[16])


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
def test_a_saved_causal_lm_opens_with_every_head(auto_class, tmp_path):
    LongNetForCausalLM(tiny_config()).save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is HEADS[auto_class]


def test_a_saved_model_opens_where_the_package_is_not_installed(tmp_path):
    """The folder holds the code, and only what it needs; logits are equal, and every head opens."""
    model = LongNetForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").glob("*.py")}
    code = f"""
import sys
from pathlib import Path
sys.modules["modeling_longnet"] = None
sys.path = [p for p in sys.path if p not in ("", {str(modeling_longnet.__path__[0])!r})]
import torch
from transformers import AutoModel, AutoModelForCausalLM
folder = {str(tmp_path / "model")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "LongNetModel"
model.save_pretrained({str(tmp_path / "again")!r})
with torch.no_grad():
    torch.save(model(torch.arange(40)[None]).logits, {str(tmp_path / "logits.pt")!r})
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(torch.arange(40)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == files
    assert {"modeling_longnet.py", "configuration_longnet.py"} <= files
    assert not files & {"patching.py", "__init__.py"}
    auto_map = json.loads((tmp_path / "again/config.json").read_text())["auto_map"]
    assert len(auto_map) == 7


@pytest.mark.parametrize("model_class", [LongNetForCausalLM, LongNetForMaskedLM])
def test_tied_weights(model_class, tmp_path):
    changes = {"is_causal": model_class is LongNetForCausalLM}
    model = model_class(tiny_config(**changes))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    untied = model_class(tiny_config(tie_word_embeddings=False, **changes))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_resized_embeddings_stay_tied():
    model = LongNetForCausalLM(tiny_config())
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model(tokens(1, 5)).logits.shape[-1] == 70


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model = base_model({})
    input_ids = tokens(2, 60)
    expected = hidden(model, input_ids)
    eager_error = (hidden(base_model_like(model, "eager", dtype), input_ids).float() - expected).abs().max()
    error = (hidden(base_model_like(model, "sdpa", dtype), input_ids).float() - expected).abs().max()
    assert error <= 2 * eager_error


def base_model_like(model, implementation, dtype) -> LongNetModel:
    other = LongNetModel(tiny_config()).eval().to(dtype)
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation(implementation)
    return other


# Training


def gradients(model, input_ids, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids, labels=input_ids, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_equality(use_reentrant):
    model = LongNetForCausalLM(tiny_config()).train()
    input_ids, mask = tokens(2, 50), torch.ones(2, 50)
    mask[0, :7] = 0
    expected = gradients(model, input_ids, attention_mask=mask)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients(model, input_ids, attention_mask=mask)
    for name in expected:
        assert_close(found[name], expected[name], msg=name, **CLOSE)


def test_gradients_of_sdpa_equal_eager():
    model = LongNetForCausalLM(tiny_config(num_key_value_heads=2))
    input_ids = tokens(2, 50)
    fused = gradients(model, input_ids)
    model.set_attn_implementation("eager")
    for name, expected in gradients(model, input_ids).items():
        assert_close(fused[name], expected, msg=name, **CLOSE)


def test_loss_is_the_next_tokens_cross_entropy():
    model = LongNetForCausalLM(tiny_config()).eval()
    input_ids = tokens(2, 30)
    outputs = model(input_ids, labels=input_ids)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    assert_close(outputs.loss, expected)
    halves = [model(row[None], labels=row[None], num_items_in_batch=torch.tensor(58)).loss for row in input_ids]
    assert_close(sum(halves), expected)


def test_masked_lm_loss_is_the_same_tokens_cross_entropy():
    model = LongNetForMaskedLM(tiny_config(is_causal=False, position_embedding_type="rope")).eval()
    input_ids = tokens(2, 30)
    labels = input_ids.where(torch.rand(2, 30) < 0.3, -100)
    outputs = model(input_ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    assert_close(outputs.loss, expected)


def test_logits_to_keep():
    model = LongNetForCausalLM(tiny_config()).eval()
    input_ids = tokens(1, 30)
    logits = model(input_ids).logits
    assert_close(model(input_ids, logits_to_keep=4).logits, logits[:, -4:])
    assert_close(model(input_ids, logits_to_keep=torch.tensor([3, 7])).logits, logits[:, [3, 7]])


def test_a_small_model_memorises_a_text():
    text = torch.frombuffer(bytearray(" ".join(str(i * i) for i in range(600)).encode()[:2000]), dtype=torch.uint8)
    model = LongNetForCausalLM(tiny_config(vocab_size=256, hidden_size=128, intermediate_size=512))
    blocks = text.long().view(8, 250)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20)
        loss = model(blocks, labels=blocks).loss
        if loss < 0.08:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    with torch.no_grad():
        assert model.eval()(blocks, labels=blocks).loss < 0.1


def test_compiled_equals_plain():
    model = base_model({})
    input_ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :6] = 0
    expected = [hidden(model, input_ids), hidden(model, input_ids, attention_mask=mask)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(hidden(compiled, input_ids), expected[0], **CLOSE)
    assert_close(hidden(compiled, input_ids, attention_mask=mask)[mask.bool()], expected[1][mask.bool()], **CLOSE)


# The package


def test_public_names_are_frozen():
    assert set(modeling_longnet.__all__) == {
        "DilatedAttention", "DilatedCache", "DilationSchedule", "LongNetConfig", "LongNetForCausalLM", "Passage",
        "LongNetForMaskedLM", "LongNetForQuestionAnswering", "LongNetForSequenceClassification",
        "LongNetForTokenClassification", "LongNetModel", "LongNetPreTrainedModel", "LongNetSlideEncoderConfig",
        "LongNetSlideEncoderForImageClassification", "LongNetSlideEncoderModel", "LongViTConfig",
        "LongViTForImageClassification", "LongViTModel", "__version__", "calibrate_memory", "dilated_attention",
        "dilated_attention_reference", "export_patched_model", "is_patched", "load_patched_model", "make_model_card",
        "Answer", "MemoryBank", "find_memory_heads", "patch_model", "suggest_schedule", "unpatch_model",
    }  # fmt: skip
    assert all(hasattr(modeling_longnet, name) for name in modeling_longnet.__all__)


def test_the_cache_is_returned_on_demand():
    model = base_model({})
    assert isinstance(model(tokens(1, 5))[CACHE], DynamicCache)
    assert model(tokens(1, 5), use_cache=False).get(CACHE) is None


def test_tensor_parallel_equals_whole(tmp_path):
    LongNetForCausalLM(tiny_config(num_key_value_heads=2, vocab_size=62)).save_pretrained(tmp_path)
    worker = Path(__file__).parent / "workers/tensor_parallel.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(modeling_longnet.__file__).parent.parent)
    done = subprocess.run([*launch, str(worker), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2


@pytest.mark.parametrize("chunk_size", [1, 7, 45, 100])
def test_a_feed_forward_in_chunks_changes_no_number(chunk_size):
    ids, results = torch.randint(3, 61, (2, 45)), []
    for size in (None, chunk_size):
        torch.manual_seed(0)
        model = LongNetForCausalLM(tiny_config(mlp_chunk_size=size)).train()
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            logits = model.eval()(ids).logits
        results.append((logits, *(p.grad for p in model.parameters())))
    for a, b in zip(*results):
        assert_close(a, b, **CLOSE)


def test_a_feed_forward_in_chunks_keeps_less_for_the_backward():
    """Its inner states, 6 times the input here, are made anew: saved tensors are counted, each storage once."""
    kept = []
    for size in (None, 16):
        model = LongNetForCausalLM(tiny_config(mlp_chunk_size=size, intermediate_size=192, num_hidden_layers=1)).train()
        storages = {}

        def note(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(torch.randint(3, 61, (1, 512)), labels=torch.randint(3, 61, (1, 512)))
        kept.append(sum(storages.values()))
    assert kept[1] < 0.7 * kept[0]
