"""Each option of a schedule means the same wherever a schedule can be given, or is refused there."""

import inspect
import json
from dataclasses import fields

import pytest
import torch
from tiny_models import tiny_config
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache

from conversion.convert_hf_to_torchscale import convert_hf_to_torchscale
from modeling_longnet import (
    DilatedCache,
    DilationSchedule,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetSlideEncoderConfig,
    dilated_attention,
    dilated_attention_reference,
    patch_model,
)
from modeling_longnet.longnet_layers import operator_arguments
from modeling_longnet.patching import SETTINGS
from modeling_longnet.sequence_parallel import SequenceParallel
from modeling_longnet.transformers_compat import named_cache


# A memory has a definition, settings and tests of its own: test_memory.py and test_memory_patch.py.
FIELDS = [field.name for field in fields(DilationSchedule) if field.name != "memory"]
# One change of each option from its default; `padding` and `is_causal` come together.
CAUSAL = {
    "segment_lengths": {"segment_lengths": [4, 24, 24], "dilation_rates": [1, 3, 4]},
    "dilation_rates": {"dilation_rates": [1, 3, 5]},
    "head_offsets": {"head_offsets": "contiguous"},
    "overlap": {"overlap": "once"},
    "num_sink_tokens": {"num_sink_tokens": 3},
    "local": {"local": "sliding"},
    "local-once-sinks": {"local": "sliding", "overlap": "once", "num_sink_tokens": 2},
}
POSITIONS = {"xpos": {}, "rope": {"position_embedding_type": "rope", "num_key_value_heads": 2}}
causal_options = pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)


def test_every_option_is_tested_here():
    told = {name for options in CAUSAL.values() for name in options}
    assert set(FIELDS) == told | {"is_causal", "padding"}


def test_every_option_is_told_everywhere():
    """A field of the schedule is one of the configuration, of a patch's settings (but for what a causal patch fixes),
    and an argument of the operator and of its definition."""
    assert set(FIELDS) <= set(LongNetConfig.__annotations__)
    assert set(FIELDS) - {"is_causal", "padding"} <= set(SETTINGS) & set(inspect.signature(patch_model).parameters)
    assert "memory" in {*LongNetConfig.__annotations__} & {*inspect.signature(patch_model).parameters}
    for function in (dilated_attention, dilated_attention_reference):
        assert set(FIELDS) <= set(inspect.signature(function).parameters)
    model = LongNetForCausalLM(tiny_config())
    schedule = operator_arguments(model.model.layers[0].self_attn, None, 1.0, 0.0)["schedule"]
    assert set(FIELDS) <= set(schedule.as_arguments())


@causal_options
def test_a_schedule_is_what_its_text_says(options):
    schedule = tiny_config(**options).dilation_schedule
    assert DilationSchedule.from_text(schedule.to_text()) == schedule


def test_a_schedule_is_built_once_and_follows_its_configuration(monkeypatch):
    model, x = LongNetForCausalLM(tiny_config()).eval(), torch.randint(0, 61, (1, 40))
    before, built, check = model(x, use_cache=False).logits, [], DilationSchedule.__post_init__
    monkeypatch.setattr(DilationSchedule, "__post_init__", lambda self: (built.append(self), check(self))[1])
    assert torch.equal(model(x, use_cache=False).logits, before)
    assert built == []
    model.config.num_sink_tokens = 39
    assert not torch.allclose(model(x, use_cache=False).logits, before)
    assert len(built) == 2  # by the first of its layers, and behind the registered operator, which takes a text
    model.config.num_sink_tokens = -1
    with pytest.raises(ValueError, match="num_sink_tokens"):
        model(x)


def make(options: dict, positions: dict, **more) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = tiny_config(**options, **positions, tie_word_embeddings=False, **more)
    model = LongNetForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return model.double()


@causal_options
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@torch.no_grad()
def test_each_way_of_reading_gives_the_same(options, positions, tmp_path):
    """Definition = kernels = cached = bounded, in chunks and token by token = sharded = saved and loaded."""
    model = make(options, positions)
    x = torch.randint(0, 61, (2, 90))
    assert model.config.dilation_schedule == DilationSchedule.from_config(model.config)
    model.set_attn_implementation("eager")
    wanted = model(x).logits
    assert not torch.allclose(wanted, make({}, positions)(x).logits, atol=1e-3)  # the option has an effect
    model.set_attn_implementation("sdpa")
    assert_close(model(x).logits, wanted)
    for make_cache in (lambda: DynamicCache(config=model.config), lambda: DilatedCache(model.config)):
        for sizes in ([40, 17, 33], [1] * 90):
            cache = make_cache()
            chunks = [model(part, **named_cache(cache)).logits for part in x.split(sizes, dim=1)]
            assert_close(torch.cat(chunks, dim=1), wanted)
    sp = SequenceParallel(None, 1)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert all(told[name] == getattr(model.config, name) for name in FIELDS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(loaded(x).logits, wanted)
    sp.add_hooks(loaded)
    shard = sp.collator()([{"input_ids": row, "labels": row} for row in x])
    assert_close(loaded(**shard, skip_logits=False).logits, wanted)


@causal_options
def test_torchscale_gets_what_it_knows_and_no_more(options, tmp_path):
    options = {"head_offsets": "contiguous", **options}
    make(options, {}).float().save_pretrained(tmp_path / "hf")
    if set(options) <= {"segment_lengths", "dilation_rates", "head_offsets"}:
        convert_hf_to_torchscale(tmp_path / "hf", tmp_path / "torchscale")
        return
    with pytest.raises(ValueError, match="for torchscale"):
        convert_hf_to_torchscale(tmp_path / "hf", tmp_path / "torchscale")


@torch.no_grad()
def test_a_bidirectional_option_reads_as_defined():
    for padding in ("mask", "zeros"):
        config = tiny_config(is_causal=False, padding=padding, position_embedding_type="rope")
        model = LongNetForMaskedLM(config).eval().double()
        x = torch.randint(0, 61, (2, 45))
        found = model(x).logits
        model.set_attn_implementation("eager")
        assert_close(found, model(x).logits)


@pytest.mark.parametrize("options", [
    {"local": "sliding", "is_causal": False}, {"local": "window"},
    {"local": "sliding", "dilation_rates": [2, 2, 4]}, {"padding": "zeros"}, {"overlap": "twice"},
], ids=str)  # fmt: skip
def test_a_configuration_refuses_what_is_no_schedule(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        tiny_config(**options)


@pytest.mark.parametrize("options", [
    {"local": "sliding"}, {"overlap": "once"}, {"num_sink_tokens": 4}, {"is_causal": True},
], ids=str)  # fmt: skip
def test_a_slide_encoder_refuses_what_it_does_not_vary(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LongNetSlideEncoderConfig(num_hidden_layers=1, **options)


def test_xpos_counts_over_the_text_where_a_window_crosses_the_segments():
    """Centred in each segment of the largest length, it would jump inside a window."""
    assert tiny_config().xpos_is_centred_per_segment
    assert not tiny_config(local="sliding").xpos_is_centred_per_segment
