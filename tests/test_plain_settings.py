"""Settings become plain numbers at the door, or are refused there: none waits for `save_pretrained` to fail."""

import json

import numpy as np
import pytest
import torch
from tiny_models import tiny_config
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_longnet import (
    DilatedCache,
    DilationSchedule,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetSlideEncoderConfig,
    dilated_attention,
    load_patched_model,
    patch_model,
)
from modeling_longnet.streaming import TextStream, stream_loss
from modeling_longnet.transformers_compat import named_cache


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=128, **SIZES)).eval()


# Each as a plain setting, and as it comes out of NumPy, PyTorch or a sweep's grid.
SETTINGS = {
    "schedule, arrays": ({}, {"segment_lengths": np.array([8, 32]), "dilation_rates": np.array([1, 4])}),
    "schedule, scalars": ({}, {"segment_lengths": [np.int64(8), np.int32(32)], "dilation_rates": (np.uint8(1), 4)}),
    "schedule, tensors": ({}, {"segment_lengths": torch.tensor([8, 32]), "dilation_rates": list(torch.tensor([1, 4]))}),
    "schedule, generators": ({}, {"segment_lengths": range(8, 33, 24), "dilation_rates": (4**i for i in range(2))}),
    "num_sink_tokens": ({"num_sink_tokens": 2}, {"num_sink_tokens": np.int64(2)}),
    "choices": ({"overlap": "count", "local": "segment"}, {"overlap": np.str_("count"), "local": np.str_("segment")}),
    "layers": ({"layers": [1]}, {"layers": np.array([-1])}),
    "layers, scalars": ({"layers": [0, 1]}, {"layers": (np.int64(0), np.int16(1))}),
    "rope_scaling": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": np.str_("yarn"), "factor": np.float32(4)}},
    ),
    "rope_scaling, arrays": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        {"rope_scaling": {"rope_type": "longrope", "factor": torch.tensor(2.0), "short_factor": np.ones(4),
                          "long_factor": tuple(torch.full((4,), 2.0))}},
    ),
    "backend": ({"backend": "eager"}, {"backend": np.str_("eager")}),
}  # fmt: skip


@pytest.mark.parametrize(("plain", "given"), SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_a_patch_takes_numbers_of_any_kind_and_keeps_plain_ones(plain, given, tmp_path):
    x = torch.arange(50)[None]
    wanted = patch_model(llama(), **{**PLAIN, **plain})
    model = patch_model(llama(), **{**PLAIN, **given})
    assert model.config.dilated_attention == wanted.config.dilated_attention
    told = json.dumps(model.config.dilated_attention)
    assert json.loads(told) == model.config.dilated_attention
    assert torch.equal(model(input_ids=x).logits, wanted(input_ids=x).logits)
    assert str(model.dilated_attention_report) == str(wanted.dilated_attention_report)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_patched_model(tmp_path).eval()(input_ids=x).logits, wanted(input_ids=x).logits)


def test_settings_are_a_copy():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    model = patch_model(llama(), **PLAIN, rope_scaling=scaling)
    scaling["factor"] = 8.0
    assert model.config.dilated_attention["rope_scaling"]["factor"] == 4.0


WRONG = [
    ("segment_lengths", [8, "8", {8: 1, 32: 4}, None, [8.0, 32.0], np.array([8.0, 32.0]), np.eye(2, dtype=int)]),
    ("segment_lengths", [np.array([], dtype=int), [8, None]]),
    ("dilation_rates", [[True, 4], np.array([True, True])]),
    ("num_sink_tokens", [np.float64(2), np.bool_(True), None]),
    ("layers", [np.array([0.0]), 1, "01", [np.bool_(True)], np.array([5]), {0: 1}]),
    ("rope_scaling", [{"rope_type": "yarn", "factor": x} for x in (len, {1})] + [np.float32(4), [4.0]]),
    ("backend", ["fast", 1]),
    ("local", [np.int64(1)]),
]


@pytest.mark.parametrize("given", [{name: value} for name, values in WRONG for value in values], ids=str)
def test_a_patch_refuses_what_is_no_setting_and_names_it(given):
    model = llama()
    with pytest.raises(ValueError, match=f"`{next(iter(given))}"):
        patch_model(model, **{**PLAIN, **given})
    assert not hasattr(model.config, "dilated_attention")


@pytest.mark.parametrize("kind", ["rope", "xpos"])
def test_a_configuration_saves_what_it_took(kind, tmp_path):
    parameters = {"rope_type": "yarn", "rope_theta": np.float64(10000), "factor": np.float32(4)}
    config = tiny_config(position_embedding_type=kind, rope_parameters=parameters)
    LongNetForCausalLM(config).save_pretrained(tmp_path)
    assert LongNetConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    assert config.rope_parameters["factor"] == 4.0
    with pytest.raises(ValueError, match="rope_parameters"):
        tiny_config(position_embedding_type=kind, rope_parameters=parameters | {"factor": object()})


FIELDS = {
    "vocab_size": np.int64(61), "segment_lengths": np.array([8, 16, 32]), "dilation_rates": [np.int64(1), 2, 4],
    "num_sink_tokens": np.int32(2), "hidden_dropout": np.float32(0.1), "attention_dropout": np.float64(0.1),
    "layer_norm_eps": np.float32(1e-5), "is_causal": np.bool_(True), "overlap": np.str_("once"),
    "pad_token_id": np.int64(0), "eos_token_id": [np.int64(1)], "xpos_scale_base": np.float64(512),
    "initializer_range": np.float32(0.02), "local": np.str_("sliding"), "rope_scaling": {"rope_type": "linear",
    "factor": np.float32(2)},
}  # fmt: skip


CASES = [(tiny_config, name) for name in FIELDS]
CASES += [(LongNetSlideEncoderConfig, name) for name in FIELDS if name in LongNetSlideEncoderConfig.__annotations__]


@pytest.mark.parametrize(("make", "name"), CASES)
def test_what_a_configuration_accepts_it_can_save(make, name, tmp_path):
    """Transformers refuses most of NumPy's numbers in fields; those that pass are numbers of Python as well."""
    try:
        config = make(**{name: FIELDS[name]})
    except Exception as error:
        assert name in str(error)
        return
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()


@torch.no_grad()
def test_lengths_of_any_kind_of_integer():
    model = LongNetForCausalLM(tiny_config(position_embedding_type="rope")).eval()
    x = torch.randint(0, 61, (90,))
    wanted = model(x[None], use_cache=False).logits
    cache = DilatedCache(model.config, max_length=np.int64(20))
    assert type(cache.dilated_layers[0].max_length) is int
    parts = [model(part[None], use_cache=True, **named_cache(cache)).logits for part in x.split(30)]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted)
    plain, given = (stream_loss(model, x, size, progress=False) for size in (7, np.int64(7)))
    assert plain == given
    for wrong in (0, -1, 2.5, np.float32(7), "7", True, None):
        with pytest.raises(ValueError, match="`chunk_size` must be an integer"):
            TextStream(model, x, chunk_size=wrong)
        if wrong is not None:
            with pytest.raises(ValueError, match="`max_length` must be an integer"):
                DilatedCache(model.config, max_length=wrong)


def test_the_operator_takes_integers_of_any_kind():
    x = torch.randn(1, 2, 40, 8)
    given = {"query_offset": np.int64(0), "head_index_offset": np.int64(1), "total_num_heads": np.int64(4)}
    found = dilated_attention(x, x, x, np.array([8, 32]), [np.int64(1), 4], scale=np.float32(0.5), **given)
    assert torch.equal(
        found, dilated_attention(x, x, x, [8, 32], [1, 4], scale=0.5, head_index_offset=1, total_num_heads=4)
    )
    schedule = DilationSchedule(np.array([8, 32]), [np.int64(1), 4], num_sink_tokens=np.int64(1))
    assert schedule == DilationSchedule((8, 32), (1, 4), num_sink_tokens=1)
    assert all(type(value) is int for value in (*schedule.segment_lengths, *schedule.dilation_rates))
