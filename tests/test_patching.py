"""The patcher on a tiny Llama: what holds for one family; `test_patching_families.py` repeats the main laws for all."""

import copy
import json
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StaticCache,
)

from modeling_longnet import patch_attention
from modeling_longnet.dilated_attention_reference import attention_counts
from modeling_longnet.dilated_cache import DilatedCache
from modeling_longnet.dilation_schedule import DilationSchedule
from modeling_longnet.patch_rope_scaling import scaled_rope_parameters
from modeling_longnet.patching import is_patched, load_patched_model, patch_model, report, unpatch_model
from modeling_longnet.transformers_compat import ROPE_INIT_FUNCTIONS, named_cache


SCHEDULE = ([8, 32], [1, 4])
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**(values | changes))).eval()


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def patched():
    return patch_model(tiny_llama(), *SCHEDULE)


@pytest.fixture
def input_ids():
    return torch.randint(1, 97, (2, 45))


@torch.no_grad()
def logits(model, input_ids, **kwargs):
    return model(input_ids=input_ids, **kwargs).logits


def record_calls(monkeypatch) -> list[tuple[int, torch.Tensor]]:
    """Layer and mask of each dilated attention that runs from now on."""
    calls, original = [], patch_attention.run_dilated

    def recording(module, query, key, value, mask, *args, **kwargs):
        calls.append((module.layer_idx, mask))
        return original(module, query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(patch_attention, "run_dilated", recording)
    return calls


# The patch and its undoing


def test_patched_equals_original_on_short_input(model, input_ids):
    expected = logits(model, input_ids)
    actual = logits(patch_model(model, *SCHEDULE), input_ids)
    torch.testing.assert_close(actual[:, :8], expected[:, :8], **TOLERANCE)
    assert (actual[:, 8:] - expected[:, 8:]).abs().max() > 0.01


def test_unpatching_restores_every_bit(model, input_ids):
    expected, config = logits(model, input_ids), model.config.to_dict()
    patch_model(model, *SCHEDULE, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert is_patched(model) and not torch.equal(logits(model, input_ids), expected)
    assert unpatch_model(model) is model and not is_patched(model)
    assert torch.equal(logits(model, input_ids), expected)
    assert model.config.to_dict() == config
    assert "save_pretrained" not in vars(model) and "_supports_flash_attn" not in vars(model)


def test_patching_changes_neither_random_state_nor_modes(model):
    model.train()
    model.model.layers[1].eval()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    patch_model(model, *SCHEDULE)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_copy_is_patched_independently(patched, input_ids):
    other = copy.deepcopy(patched)
    assert torch.equal(logits(other, input_ids), logits(patched, input_ids))
    unpatch_model(other)
    assert is_patched(patched) and not is_patched(other)
    assert not torch.equal(logits(other, input_ids), logits(patched, input_ids))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_duplicate_saves_and_generates_with_its_own_weights(duplicate, patched, input_ids, tmp_path):
    other = duplicate(patched)
    torch.nn.init.normal_(other.lm_head.weight)
    assert is_patched(other)
    assert not torch.equal(logits(other, input_ids), logits(patched, input_ids))
    other.save_pretrained(tmp_path)
    loaded = load_patched_model(tmp_path)
    assert torch.equal(logits(loaded, input_ids), logits(other, input_ids))
    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(other.generate(input_ids, **options), loaded.generate(input_ids, **options))
    unpatch_model(other)
    assert is_patched(patched) and not is_patched(other)


def test_a_compiled_model_is_patched_as_its_original(model, input_ids):
    compiled = torch.compile(model, backend="eager")
    logits(compiled, input_ids)
    assert patch_model(compiled, *SCHEDULE) is compiled and is_patched(compiled) and is_patched(model)
    torch.testing.assert_close(logits(compiled, input_ids), logits(model, input_ids), **TOLERANCE)
    assert not is_patched(unpatch_model(compiled))


@pytest.mark.parametrize("attention", ["sdpa", {"": "eager"}])
def test_another_attention_cannot_be_set_over_a_patch(attention, patched, input_ids):
    expected = logits(patched, input_ids)
    with pytest.raises(ValueError, match="unpatch_model"):
        patched.set_attn_implementation(attention)
    assert is_patched(patched) and torch.equal(logits(patched, input_ids), expected)
    unpatch_model(patched).set_attn_implementation("eager")
    assert patched.config._attn_implementation == "eager"


def test_report_names_what_was_done(model):
    patch_model(model, *SCHEDULE, layers=[0, -1])
    done = report(model)
    assert (done.family, done.num_layers, done.layers) == ("llama", 3, (0, 2))
    assert done.left_alone == {1: "not chosen by `layers`"}
    assert (done.reach, done.native_context) == (32, 128)
    # The window of 8 // 2 offers 4 keys, 32/4 to one query in four (1 + ... + 8) / 8, and there are 4 sinks.
    assert done.keys_per_query == 4 + 4.5 / 4 + 4
    assert done.kv_bytes_per_token == 3 * 2 * 2 * 8 * 4
    rows = 8 + 8 * 2 + 4  # of a key/value head in a patched layer: two query heads with two of the four offsets
    assert done.bounded_kv_bytes_per_token == (2 * rows + 32) / 32 * 2 * 2 * 8 * 4
    assert "llama: dilated attention in 2 of 3 layers" in str(done) and "layer 1 left alone" in str(done)


def test_report_tells_what_no_head_reads(model):
    done = report(patch_model(model, [8, 32], [1, 5]))
    assert done.unread_offsets == {5: range(4, 5)} and "1 of 5 offsets" in str(done)


def test_tokens_see_what_the_schedule_says(model):
    """One layer: the gradient of a token's output by the embeddings is non-zero exactly where some head attends."""
    model = patch_model(tiny_llama(num_hidden_layers=1), *SCHEDULE, num_sink_tokens=2)
    embeddings = torch.randn(1, 40, 32, requires_grad=True)
    model(inputs_embeds=embeddings).logits[0, 36].sum().backward()
    seen = embeddings.grad[0].abs().sum(-1) > 0
    schedule = DilationSchedule(*map(tuple, SCHEDULE), overlap="once", num_sink_tokens=2, local="sliding")
    counts, _ = attention_counts(schedule, 4, torch.zeros(1, 40, dtype=torch.long), 0, 40)
    assert torch.equal(seen, counts[0, :, 36].sum(0) > 0)


# Which layers


@pytest.mark.parametrize("layers", [[1], lambda index: index == 1], ids=["list", "predicate"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unpatched_layers_keep_their_attention(layers, attention, input_ids, monkeypatch):
    """With one long segment the patched layer is dense as well, so the whole model must be the original."""
    model = tiny_llama(attn_implementation=attention)
    mask = torch.ones_like(input_ids)
    mask[0, :7] = 0
    expected, padded = logits(model, input_ids), logits(model, input_ids, attention_mask=mask)
    patch_model(model, [64], [1], layers=layers)
    calls = record_calls(monkeypatch)
    torch.testing.assert_close(logits(model, input_ids), expected, **TOLERANCE)
    assert [layer for layer, _ in calls] == [1]
    torch.testing.assert_close(logits(model, input_ids, attention_mask=mask)[mask > 0], padded[mask > 0], **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unpatched_layers_get_the_original_mask(attention, input_ids):
    """Bit for bit: the first layers' hidden states are those of the original model, also with padding and packing."""
    model, original = tiny_llama(attn_implementation=attention), tiny_llama(attn_implementation=attention)
    patch_model(model, *SCHEDULE, layers=[2])
    mask = torch.ones_like(input_ids)
    mask[0, :7] = 0
    positions = torch.cat([torch.arange(20), torch.arange(25)]).expand(2, -1)
    for kwargs in ({}, {"attention_mask": mask}, {"position_ids": positions}):
        both = [m(input_ids=input_ids, output_hidden_states=True, use_cache=False, **kwargs) for m in (model, original)]
        assert torch.equal(both[0].hidden_states[2], both[1].hidden_states[2]), kwargs.keys()
        assert not torch.equal(both[0].logits, both[1].logits)


def test_unpatched_layers_read_a_static_cache(input_ids):
    model = patch_model(tiny_llama(), *SCHEDULE, layers=[1])
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids, **options)
    assert torch.equal(model.generate(input_ids, cache_implementation="static", **options), expected)


# Padding and packing


def left_pad(input_ids, lengths):
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return mask


def test_left_padding_invariance(patched, input_ids):
    mask = left_pad(input_ids, [45, 30])
    batch = logits(patched, input_ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(batch[0], logits(patched, input_ids[:1])[0], **TOLERANCE)
    torch.testing.assert_close(batch[1, -30:], logits(patched, input_ids[1:, -30:])[0], **TOLERANCE)


def test_right_padding_invariance(patched, input_ids):
    mask = left_pad(input_ids, [45, 30]).flip(1)
    batch = logits(patched, input_ids, attention_mask=mask)
    torch.testing.assert_close(batch[0], logits(patched, input_ids[:1])[0], **TOLERANCE)
    torch.testing.assert_close(batch[1, :30], logits(patched, input_ids[1:, :30])[0], **TOLERANCE)


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_equal_single_rows(patched, input_ids, use_cache):
    lengths = [13, 1, 31]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits(patched, input_ids[:1], position_ids=positions, use_cache=use_cache)
    for part, ids in zip(packed[0].split(lengths), input_ids[:1].split(lengths, dim=1)):
        torch.testing.assert_close(part, logits(patched, ids)[0], **TOLERANCE)


def test_packed_documents_continue_over_chunks(patched, input_ids):
    lengths = [13, 32]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    whole = logits(patched, input_ids[:1], position_ids=positions)
    cache, chunks = DynamicCache(config=patched.config), []
    for ids, places in zip(input_ids[:1].split(10, dim=1), positions.split(10, dim=1)):
        chunks.append(logits(patched, ids, position_ids=places, **named_cache(cache)))
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, **TOLERANCE)


@pytest.mark.parametrize("new", [None, 15], ids=["whole", "continued"])
def test_masks_and_positions_of_another_length_are_refused(patched, input_ids, new):
    cache = DynamicCache(config=patched.config)
    if new:
        logits(patched, input_ids[:, :-new], **named_cache(cache))
    for length in (15, 44, 46)[new is None :]:
        with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(2, 45\)"):
            mask = torch.ones(2, length)
            patched(input_ids=input_ids[:, -(new or 45) :], attention_mask=mask, **named_cache(cache))
    with pytest.raises(ValueError, match=r"`attention_mask` must be a 2-D mask \[B, N\], got shape \(45,\)"):
        patched(input_ids=input_ids, attention_mask=torch.ones(45))
    with pytest.raises(ValueError, match="`position_ids` must have shape"):
        patched(input_ids=input_ids, position_ids=torch.zeros(1, 1, dtype=torch.long))


def test_packing_told_in_another_way_is_refused(patched, input_ids):
    """Other attention functions read these; a document must not see the one before it without a word."""
    positions = torch.cat([torch.arange(20), torch.arange(25)])[None]
    packed, index = {"cu_seq_lens_q": torch.tensor([0, 20, 45])}, (torch.arange(45) >= 20)[None].int()
    for told in (packed, {"seq_idx": index}, packed | {"attention_mask": torch.ones(1, 45)}):
        with pytest.raises(ValueError, match="tells of several documents"):
            patched(input_ids=input_ids[:1], **told)
    expected = logits(patched, input_ids[:1], position_ids=positions)
    assert torch.equal(logits(patched, input_ids[:1], position_ids=positions, **packed), expected)


def test_masks_of_pairs_are_refused(patched, input_ids):
    mask = torch.ones(2, 1, 45, 45, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="2-D mask"):
        patched(input_ids=input_ids, attention_mask=mask)


# Caches


VARIANTS = {
    "default": {},
    "sliding": {"local": "sliding"},
    "count-without-sinks": {"overlap": "count", "num_sink_tokens": 0},
    "contiguous": {"segment_lengths": [8, 16], "dilation_rates": [1, 2], "head_offsets": "contiguous"},
    "eager": {"backend": "eager"},
    "half-the-layers": {"layers": [0, 2]},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_cached_decode_equals_full_forward(model, input_ids, settings):
    patched = patch_model(model, **{"segment_lengths": [8, 32], "dilation_rates": [1, 4], **settings})
    mask = left_pad(input_ids, [45, 30])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for kwargs in ({}, {"attention_mask": mask, "position_ids": positions}):
        whole, cache, steps = logits(patched, input_ids, **kwargs), DynamicCache(config=patched.config), []
        for start, stop in [(0, 20), (20, 29), *((i, i + 1) for i in range(29, 45))]:
            now = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]} if kwargs else {}
            steps.append(logits(patched, input_ids[:, start:stop], **named_cache(cache), **now))
        torch.testing.assert_close(torch.cat(steps, dim=1)[mask > 0], whole[mask > 0], **TOLERANCE)


@pytest.mark.parametrize("pads", [(0, 0), (0, 7)])
def test_the_layers_of_a_decoding_step_share_its_plan(patched, input_ids, monkeypatch, pads):
    mask = torch.arange(45) >= torch.tensor(pads)[:, None]
    whole, cache = logits(patched, input_ids, attention_mask=mask.long()), DynamicCache(config=patched.config)
    logits(patched, input_ids[:, :40], attention_mask=mask[:, :40].long(), **named_cache(cache))
    prepared, original = [], patch_attention.prepare_token
    monkeypatch.setattr(patch_attention, "prepare_token", lambda *a, **k: prepared.append(k) or original(*a, **k))
    monkeypatch.setattr(patch_attention, "scheduled_attention", None)
    for i in range(40, 45):
        told = {"attention_mask": mask[:, : i + 1].long(), **named_cache(cache)}
        torch.testing.assert_close(logits(patched, input_ids[:, i : i + 1], **told)[:, 0], whole[:, i], **TOLERANCE)
    assert len(prepared) == 5


def test_a_decoding_step_that_is_differentiated_goes_the_long_way(patched, input_ids):
    embeddings = patched.get_input_embeddings()(input_ids).detach()
    expected = embeddings.clone().requires_grad_()
    patched(inputs_embeds=expected).logits[:, -1].square().sum().backward()
    cache, first, last = DynamicCache(config=patched.config), *embeddings.split([44, 1], 1)
    logits(patched, None, inputs_embeds=first, **named_cache(cache))
    last.requires_grad_()
    patched(inputs_embeds=last, **named_cache(cache)).logits.square().sum().backward()
    torch.testing.assert_close(last.grad, expected.grad[:, -1:], atol=1e-4, rtol=1e-4)


def test_static_cache_equals_full_forward(patched, input_ids):
    cache = StaticCache(config=patched.config, max_cache_len=64)
    steps = [logits(patched, ids, **named_cache(cache)) for ids in input_ids.split([20, 10, 1, 1, 13], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(patched, input_ids), **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: "-".join(options) or "dynamic",
)
def test_left_padded_generation_equals_single_rows(patched, input_ids, options):
    lengths = [45, 30]
    if "prompt_lookup_num_tokens" in options:
        input_ids, lengths = input_ids[1:], [30]
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    mask = left_pad(input_ids, lengths)
    batch = patched.generate(input_ids, attention_mask=mask, **options)[:, 45:]
    for row, length in enumerate(lengths):
        single = {**options, "prefill_chunk_size": None, "cache_implementation": None, "use_cache": True}
        single.pop("prompt_lookup_num_tokens", None)
        alone = patched.generate(input_ids[row : row + 1, -length:], **single)[:, length:]
        assert torch.equal(batch[row : row + 1], alone)


def test_no_mask_of_pairs_is_built(patched, monkeypatch):
    calls = record_calls(monkeypatch)
    logits(patched, torch.ones(1, 100, dtype=torch.long))
    assert [tuple(mask.shape) for _, mask in calls] == [(1, 1, 4, 100)] * 3


def test_compiled_equals_eager_without_graph_breaks(patched, input_ids):
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, input_ids), logits(patched, input_ids), **TOLERANCE)
    mask = left_pad(input_ids, [45, 30])
    both = [logits(m, input_ids, attention_mask=mask) for m in (compiled, patched)]
    torch.testing.assert_close(both[0][mask > 0], both[1][mask > 0], **TOLERANCE)
    positions = torch.cat([torch.arange(20), torch.arange(25)]).expand(2, -1)
    torch.testing.assert_close(
        *(logits(m, input_ids, position_ids=positions) for m in (compiled, patched)), **TOLERANCE
    )


# Saving


def test_saved_patched_loads_patched_and_plain_loads_vanilla(patched, input_ids, tmp_path):
    expected = logits(patched, input_ids)
    patched.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dilated_attention"]["segment_lengths"] == [8, 32]
    assert torch.equal(logits(load_patched_model(tmp_path), input_ids), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_patched(plain)
    assert torch.equal(logits(plain, input_ids), logits(unpatch_model(patched), input_ids))


def test_rope_scaling_is_kept_by_the_patch_and_not_by_the_vanilla_model(model, input_ids, tmp_path):
    expected = logits(model, input_ids)
    patch_model(model, *SCHEDULE, rope_scaling={"rope_type": "linear", "factor": 2.0})
    scaled = logits(model, input_ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched_model(tmp_path), input_ids), scaled)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), input_ids), expected)


def test_settings_alone_do_not_pass_for_scaled_embeddings(model, input_ids, tmp_path):
    """As TRL loads a reference model: by the folder and the name of the attention, without `patch_model`."""
    patch_model(model, *SCHEDULE, rope_scaling={"rope_type": "linear", "factor": 2.0}).save_pretrained(tmp_path)
    reference = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    with pytest.raises(ValueError, match="not scaled"):
        logits(reference, input_ids)
    assert torch.equal(logits(copy.deepcopy(model), input_ids), logits(model, input_ids))
    patch_model(unpatch_model(model), *SCHEDULE).save_pretrained(tmp_path)
    reference = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(reference, input_ids), logits(model, input_ids))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_rope_scaling_equals_a_model_configured_with_it(kind, input_ids):
    scaling = {"rope_type": kind, "factor": 4.0}
    positions = torch.arange(200, 245).expand(2, -1)  # beyond the native 128, where "dynamic" begins to act
    parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 128, **scaling}
    configured = tiny_llama(rope_parameters=parameters)
    both = [
        logits(m, input_ids, position_ids=positions)
        for m in (patch_model(tiny_llama(), [64], [1], rope_scaling=scaling), configured)
    ]
    torch.testing.assert_close(*both, **TOLERANCE)


SCALED = {  # to the 128 positions of `tiny_llama`
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "attention_factor": 1.5},
    "linear": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip


@pytest.mark.parametrize("own", SCALED)
def test_scaling_over_a_scaled_model_says_from_where_it_counts(own, input_ids):
    model = tiny_llama(rope_parameters={"rope_theta": 10000.0, **SCALED[own]})
    expected = logits(model, input_ids)
    for kind in ("yarn", "linear", "llama3"):
        with pytest.raises(ValueError, match=f"must name the `original_max_pos.*'{kind}'.*over.*'{own}'.*for 128"):
            patch_model(model, [64], [1], rope_scaling={"rope_type": kind, "factor": 4.0})
    with pytest.raises(ValueError, match="must not be dynamic"):
        patch_model(model, [64], [1], rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    assert not is_patched(model) and torch.equal(logits(model, input_ids), expected)
    scaling = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16}
    kept = {"attention_factor": 1.5} if own == "yarn" else {}
    configured = tiny_llama(rope_parameters={"rope_theta": 10000.0, **scaling, **kept})
    found = logits(patch_model(model, [64], [1], rope_scaling=scaling), input_ids)
    torch.testing.assert_close(found, logits(configured, input_ids), **TOLERANCE)


def test_factors_of_another_type_do_not_stay(input_ids):
    own = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "attention_factor": 3.0,
           "original_max_position_embeddings": 16}  # fmt: skip
    scaling = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16}
    model, configured = (tiny_llama(rope_parameters={"rope_theta": 10000.0, **given}) for given in (own, scaling))
    found = logits(patch_model(model, [64], [1], rope_scaling=scaling), input_ids)
    torch.testing.assert_close(found, logits(configured, input_ids), **TOLERANCE)


def test_positions_that_turn_in_a_part_of_the_head_are_scaled_as_such():
    own = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
    config = SimpleNamespace(rope_parameters={"full_attention": own}, max_position_embeddings=128)
    with pytest.raises(ValueError, match="must be proportional where the model's positions are"):
        scaled_rope_parameters(config, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128})
    if "proportional" in ROPE_INIT_FUNCTIONS:
        scaling = {"rope_type": "proportional", "factor": 4.0}
        scaled = scaled_rope_parameters(config, scaling)["full_attention"]
        assert scaled == own | scaling | {"original_max_position_embeddings": 128}
        config.rope_parameters["full_attention"] = own | {"factor": 2.0}
        with pytest.raises(ValueError, match="must name the `original_max_position_embeddings`"):
            scaled_rope_parameters(config, scaling)


def test_phi3_counts_from_the_context_that_it_has():
    """Its configuration names an original context of 4,096 beside the parameters, whatever its positions are."""
    scaling = {"rope_type": "yarn", "factor": 4.0}
    llama = patch_model(tiny_llama(), [64], [1], rope_scaling=scaling)
    phi3 = Phi3ForCausalLM(Phi3Config(**tiny_llama().config.to_dict()))
    rotary = patch_model(phi3, [64], [1], rope_scaling=scaling).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, llama.model.rotary_emb.inv_freq)
    assert phi3.config.original_max_position_embeddings == 4096


def test_loading_a_vanilla_folder_as_patched_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not saved from a patched model"):
        load_patched_model(tmp_path)


def test_quantized_models_say_how_to_save_them(patched, tmp_path):
    class Quantizer:
        def is_serializable(self):
            return False

    patched.hf_quantizer = Quantizer()
    with pytest.raises(ValueError, match="dequantize_gguf"):
        patched.save_pretrained(tmp_path)


# Refusals and warnings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"segment_lengths": [8, 4]}, "`segment_lengths` must not decrease"),
        ({"dilation_rates": [1]}, "same number of entries"),
        ({"overlap": "twice"}, "`overlap` must be one of"),
        ({"layers": [5]}, "`layers` must be layer indices of 0..2, got \\[5\\]"),
        ({"layers": []}, "chooses none"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "`rope_scaling\\['rope_type'\\]` must be one of"),
        ({"rope_scaling": "yarn"}, "must be a dictionary"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "`rope_scaling` must have 'factor'"),
    ],
)
def test_wrong_settings_leave_the_model_as_it_was(model, input_ids, settings, message):
    expected = logits(model, input_ids)
    with pytest.raises(ValueError, match=message):
        patch_model(model, **{"segment_lengths": [8, 32], "dilation_rates": [1, 4], **settings})
    assert not is_patched(model) and torch.equal(logits(model, input_ids), expected)


def test_patching_twice_and_unpatching_twice_are_refused(patched):
    with pytest.raises(ValueError, match="patched already"):
        patch_model(patched, *SCHEDULE)
    unpatch_model(patched)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(patched)


def test_something_else_than_a_model_is_refused():
    with pytest.raises(ValueError, match="must be a Transformers model"):
        patch_model(torch.nn.Linear(2, 2), *SCHEDULE)


def test_the_implementation_without_settings_is_refused(input_ids):
    model = tiny_llama(attn_implementation="dilated")
    with pytest.raises(ValueError, match="without settings"):
        model(input_ids=input_ids)


def test_continuous_batching_cannot_switch_to_dense_attention(patched):
    assert patched._supports_flash_attn is False
    with pytest.raises(ValueError):
        patched.generate_batch([[1, 2, 3]])


@pytest.fixture
def warnings_logged():
    """Transformers' loggers do not propagate, so `caplog` does not see them."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("modeling_longnet")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_reading_beyond_the_native_context_warns(model, warnings_logged):
    patch_model(model, [64, 256], [1, 4])
    assert any("reaches 256 tokens" in text and "rope_scaling" in text for text in warnings_logged)
    logits(model, torch.ones(1, 140, dtype=torch.long))
    assert any("native context of 128" in text for text in warnings_logged)


def test_attention_weights_that_a_patched_layer_cannot_give_are_warned_of(patched, warnings_logged, input_ids):
    assert patched(input_ids, output_attentions=True).attentions == ()
    assert any("`output_attentions=True` gives none" in text for text in warnings_logged)


# Training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_equal_plain_ones(input_ids, use_reentrant):
    mask = left_pad(input_ids, [45, 30])
    gradients = []
    for checkpointing in (False, True):
        model = patch_model(tiny_llama(), *SCHEDULE).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=input_ids, attention_mask=mask, labels=input_ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain, **TOLERANCE)


def test_attention_dropout_acts_in_training_only(input_ids):
    model = patch_model(tiny_llama(attention_dropout=0.5), *SCHEDULE)
    assert torch.equal(logits(model, input_ids), logits(patch_model(tiny_llama(), *SCHEDULE), input_ids))
    model.train()
    assert not torch.equal(logits(model, input_ids), logits(model, input_ids))


def test_bfloat16_is_close_to_float32(patched, input_ids):
    expected = logits(patched, input_ids)
    actual = logits(patched.to(torch.bfloat16), input_ids)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_device_map_hooks_carry_the_mask(input_ids, tmp_path):
    """Layers offloaded to disk: hooks load them for each call and move what they are given."""
    patch_model(tiny_llama(), *SCHEDULE).save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    offloaded = load_patched_model(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    plain, mask = load_patched_model(tmp_path / "model"), left_pad(input_ids, [45, 30])
    both = [logits(m, input_ids, attention_mask=mask) for m in (offloaded, plain)]
    torch.testing.assert_close(both[0][mask > 0], both[1][mask > 0], **TOLERANCE)


@pytest.mark.parametrize("changes", [{}, {"num_sink_tokens": 2}, {"overlap": "count"}], ids=str)
def test_refused_bounded_cache_of_another_schedule(patched, input_ids, changes):
    other = patch_model(tiny_llama(), *([8, 32], [1, 2]) if not changes else SCHEDULE, **changes)
    cache = DilatedCache(other.config)
    with pytest.raises(ValueError, match="`cache` was made for another model"):
        patched(input_ids, **named_cache(cache))
