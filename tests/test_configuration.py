"""LongNetConfig: what it refuses and says, schedules by length, and the way to disk and back."""

import json
import logging

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import VARIANTS, tiny_config
from transformers import AutoConfig, LlamaConfig

from modeling_longnet import DilationSchedule, LongNetConfig, LongNetSlideEncoderConfig


@pytest.fixture
def log(caplog, monkeypatch):
    """Warnings of the configuration, each given anew."""
    from modeling_longnet import configuration_longnet

    monkeypatch.setattr(configuration_longnet.logger, "warning_once", configuration_longnet.logger.warning)
    monkeypatch.setattr(logging.getLogger("modeling_longnet"), "propagate", True)
    return caplog


def test_the_default_is_the_papers_small_model():
    config = LongNetConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert config.intermediate_size == 3072 and config.head_dim == 64 and config.num_key_value_heads == 12
    assert config.segment_lengths == [2048, 4096, 8192, 16384, 32768] and config.dilation_rates == [1, 2, 4, 6, 12]
    assert config.position_embedding_type == "xpos" and config.xpos_scale_base == 512 and config.sub_layernorm
    assert config.hidden_act == "gelu"


BAD = {
    "unequal-lists": ({"segment_lengths": [8, 16], "dilation_rates": [1]}, "`segment_lengths` and `dilation_rates`"),
    "empty-lists": ({"segment_lengths": [], "dilation_rates": []}, "`segment_lengths`"),
    "zero-segment": ({"segment_lengths": [0, 16], "dilation_rates": [1, 2]}, "`segment_lengths`.*positive"),
    "negative-rate": ({"segment_lengths": [8, 16], "dilation_rates": [-1, 2]}, "`dilation_rates`.*positive"),
    "decreasing-segments": ({"segment_lengths": [16, 8], "dilation_rates": [1, 2]}, "`segment_lengths`.*decrease"),
    "decreasing-rates": ({"segment_lengths": [8, 16], "dilation_rates": [2, 1]}, "`dilation_rates`.*decrease"),
    "rate-above-segment": ({"segment_lengths": [2, 4], "dilation_rates": [1, 8]}, "`dilation_rates`.*8.*4"),
    "causal-without-rate-1": ({"segment_lengths": [8, 16], "dilation_rates": [2, 4]}, "`dilation_rates`.*begin with 1"),
    "heads-do-not-divide": ({"hidden_size": 30}, "`hidden_size`.*30 and 4"),
    "groups-do-not-divide": ({"num_key_value_heads": 3}, "`num_key_value_heads`.*4 and 3"),
    "no-layers": ({"num_hidden_layers": 0}, "`num_hidden_layers`.*positive.*0"),
    "no-vocabulary": ({"vocab_size": -1}, "`vocab_size`.*positive.*-1"),
    "no-head-dim": ({"head_dim": -4}, "`head_dim`.*positive.*-4"),
    "odd-head": ({"head_dim": 7}, "`head_dim`.*even.*7"),
    "offsets": ({"head_offsets": "random"}, "`head_offsets`.*'random'"),
    "overlap": ({"overlap": "twice"}, "`overlap`.*'twice'"),
    "padding": ({"padding": "ones"}, "`padding`.*'ones'"),
    "zeros-and-causal": ({"padding": "zeros"}, "is_causal=False"),
    "sinks": ({"num_sink_tokens": -1}, "`num_sink_tokens`.*-1"),
    "positions": ({"position_embedding_type": "alibi"}, "`position_embedding_type`.*'alibi'"),
    "xpos-too-long": (
        {"segment_lengths": [8, 65536], "dilation_rates": [1, 4]},
        "`segment_lengths`.*xPos.*65536.*rope",
    ),
    "xpos-too-long-with-sinks": (
        {"num_sink_tokens": 1, "max_position_embeddings": 10**6},
        "`max_position_embeddings`.*xPos.*1000000",
    ),
    "xpos-base": ({"xpos_scale_base": 0}, "`xpos_scale_base`.*positive"),
    "offset-without-table": ({"position_embedding_offset": 2}, "`position_embedding_offset`.*learned"),
    "partial-rope": (
        {"position_embedding_type": "rope", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    "activation": ({"hidden_act": "glu"}, "`hidden_act`.*'glu'"),
    "dropout": ({"hidden_dropout": 1.0}, "`hidden_dropout`.*1.0"),
    "drop-path": ({"drop_path_rate": -0.1}, "`drop_path_rate`.*-0.1"),
    "epsilon": ({"layer_norm_eps": 0}, "`layer_norm_eps`.*positive"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_fields_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "large"}, {"segment_lengths": "[8, 16]"}, {"segment_lengths": [8.0, 16.0]},
                {"is_causal": "yes"}], ids=["string-size", "string-list", "float-list", "string-flag"],
)  # fmt: skip
def test_fields_of_another_type_are_refused_by_name(changes):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(changes))):
        tiny_config(**changes)


def test_the_xpos_error_names_a_base_that_works():
    with pytest.raises(ValueError, match=r"at least (\d+)") as error:
        tiny_config(segment_lengths=[8, 65536], dilation_rates=[1, 4])
    base = int(str(error.value).split("at least ")[1].split(",")[0])
    tiny_config(segment_lengths=[8, 65536], dilation_rates=[1, 4], xpos_scale_base=base)
    with pytest.raises(ValueError):
        tiny_config(segment_lengths=[8, 65536], dilation_rates=[1, 4], xpos_scale_base=base - 1)


def test_unread_offsets_are_named(log):
    tiny_config(segment_lengths=[8, 16, 64], dilation_rates=[1, 2, 8])
    assert "4 to 7 of rate 8" in log.text


def test_unread_offsets_are_those_that_no_head_has():
    for head_offsets in ("modulo", "contiguous"):
        for heads, rate in ((1, 1), (3, 7), (6, 4), (4, 8), (16, 3), (5, 5)):
            schedule = DilationSchedule((64, 64), (1, rate), head_offsets=head_offsets)
            missing = set(range(rate)) - {schedule.offset(rate, head, heads) for head in range(heads)}
            assert set(schedule.unread_offsets(heads).get(rate, ())) == missing


@pytest.mark.parametrize("name", ["layer_norm_eps", "xpos_scale_base"])
def test_infinite_numbers_are_refused(name):
    """JSON has no name for them that every reader knows."""
    with pytest.raises(ValueError, match=f"`{name}` must be positive and finite, got inf"):
        tiny_config(**{name: float("inf")})


def test_sizes_that_nobody_has_are_no_wait():
    """A configuration of the Hub that names 10**18 heads and offsets is read at once, and a larger one is refused."""
    fields = {"num_attention_heads": 10**18, "head_dim": 8, "position_embedding_type": "rope"}
    tiny_config(**fields, segment_lengths=[8, 10**18], dilation_rates=[1, 10**17])
    with pytest.raises(ValueError, match="`segment_lengths`"):
        tiny_config(**fields, segment_lengths=[8, 10**20], dilation_rates=[1, 4])
    with pytest.raises(ValueError, match="`num_sink_tokens`"):
        tiny_config(num_sink_tokens=10**20)


def test_settings_without_effect_are_named(log):
    config = tiny_config(position_embedding_type="learned", rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    assert "`rope_parameters` has no effect" in log.text and not config.rope_parameters


def test_a_plain_configuration_says_nothing(log):
    tiny_config()
    LongNetConfig.from_dict(tiny_config(position_embedding_type="learned").to_dict())
    LongNetConfig()
    assert not log.text


@pytest.mark.parametrize("base, length, ratio", [(8, 8, 2), (8, 9, 2), (16, 1000, 4), (1024, 32768, 2), (5, 100, 3)])
def test_geometric_covers_the_length_and_no_more(base, length, ratio):
    config = LongNetConfig.geometric(base, length, ratio=ratio, position_embedding_type="rope")
    assert config.segment_lengths == [base * rate for rate in config.dilation_rates]
    assert config.dilation_rates == [ratio**i for i in range(len(config.dilation_rates))]
    assert config.segment_lengths[-1] >= length and config.max_position_embeddings == length
    assert len(config.segment_lengths) == 1 or config.segment_lengths[-2] < length


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 10), "`base_segment_length`.*0"),
        ((8, 0), "`max_length`.*0"),
        ((8, 10, 1), "`ratio`.*2.*1"),
        ((8, 10.5), "`max_length`.*10.5"),
    ],
)
def test_geometric_refuses_what_is_no_length(arguments, message):
    with pytest.raises(ValueError, match=message):
        LongNetConfig.geometric(*arguments)


def test_geometric_refuses_a_second_schedule():
    with pytest.raises(ValueError, match="`dilation_rates`"):
        LongNetConfig.geometric(8, 64, dilation_rates=[1, 2])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_save_load_identity(changes, tmp_path):
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LongNetConfig
    config.name_or_path = str(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.dilation_schedule == config.dilation_schedule


def test_the_schedule_is_the_fields():
    schedule = tiny_config(overlap="once", num_sink_tokens=3, head_offsets="contiguous").dilation_schedule
    assert schedule == DilationSchedule((8, 16, 32), (1, 2, 4), True, "contiguous", "once", 3, "mask", "segment")


@pytest.mark.parametrize("config_class", [LongNetConfig, LongNetSlideEncoderConfig])
def test_another_models_configuration_is_refused(config_class, tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model_type` must be 'longnet.*got 'llama'[^`]*`patch_model`"):
        config_class.from_pretrained(tmp_path)


def test_auto_map_names_every_head(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
