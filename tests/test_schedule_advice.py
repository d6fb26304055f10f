"""Suggested schedules: what they promise, for any context and budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_longnet import (
    DilationSchedule,
    LongNetConfig,
    LongNetForCausalLM,
    is_patched,
    patch_model,
    suggest_schedule,
)


LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=72, intermediate_size=64, num_hidden_layers=2, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192,
)  # fmt: skip


def _schedule(suggestion, **more):
    settings = {k: v for k, v in suggestion.settings.items() if k != "rope_scaling"}
    return DilationSchedule(**settings, **more)


def _keys_of_queries(schedule, length, heads=1):
    """Mean number of keys of the queries of a text, counted position by position in head 0 to heads - 1."""
    total = 0
    for head in range(heads):
        for i, (w, r) in enumerate(schedule.patterns):
            s = schedule.offset(r, head, heads)
            for query in range(length):
                inside = query % w
                if i == 0 and schedule.window:
                    total += min(query + 1, schedule.window)
                elif inside % r == s:
                    total += inside // r + 1
    return total / length / heads


@given(context=st.integers(64, 3_000_000), budget=st.none() | st.integers(64, 4096), from_scratch=st.booleans())
def test_a_suggestion_reaches_its_context_within_its_budget(context, budget, from_scratch):
    suggestion = suggest_schedule(LongNetConfig() if from_scratch else LLAMA, context, budget)
    lengths = suggestion.settings["segment_lengths"]
    assert context <= lengths[-1] < 4 * context
    assert suggestion.keys_per_query <= 1.1 * (min(1024, context // 4) if budget is None else budget)
    assert all(later % earlier == 0 for earlier, later in zip(lengths, lengths[1:]))
    assert ("rope_scaling" in suggestion.settings) == (not from_scratch and context > 8192)


def test_the_keys_told_are_those_that_queries_see():
    suggestion = suggest_schedule(LLAMA, 1024, 80)
    schedule = _schedule(suggestion, local="sliding", overlap="once", num_sink_tokens=4)
    length = 8 * schedule.segment_lengths[-1]
    # A window has fewer keys where a text begins, and head 0 selects one query more than others.
    assert suggestion.keys_per_query == pytest.approx(_keys_of_queries(schedule, length) + 4, rel=0.02)


def test_near_keys_come_first_for_a_pretrained_model():
    for context in (2048, 8192, 32768):
        suggestion = suggest_schedule(LLAMA, context)
        window = suggestion.settings["segment_lengths"][0] / 2
        assert window >= 0.74 * suggestion.keys_per_query
    # The schedule that docs/lora_study.md measured over this context.
    settings = suggest_schedule(LLAMA, 8192).settings
    assert settings == {"segment_lengths": [2048, 8192], "dilation_rates": [1, 8]}


def test_the_paper_form_for_a_longnet_and_a_model_of_it_runs():
    suggestion = suggest_schedule(LongNetConfig(), 4096, 256)
    lengths, rates = suggestion.settings["segment_lengths"], suggestion.settings["dilation_rates"]
    assert [w // r for w, r in zip(lengths, rates)] == [lengths[0]] * len(lengths) and len(lengths) > 2
    config = LongNetConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        **suggestion.settings,
    )  # fmt: skip
    logits = LongNetForCausalLM(config)(torch.arange(64)[None]).logits
    assert torch.isfinite(logits).all()


def test_a_patch_takes_the_settings_and_reports_the_same_cost():
    suggestion = suggest_schedule(LLAMA, 16384)
    assert suggestion.settings["rope_scaling"] == {"rope_type": "yarn", "factor": 2.0}
    model = LlamaForCausalLM(LLAMA)
    patch_model(model, **suggestion.settings)
    assert is_patched(model)
    assert model.dilated_attention_report.keys_per_query == suggestion.keys_per_query
    assert str(suggestion).startswith("2048/1 8192/8 16384/16 (segment length / dilation rate) for 16384 tokens")
    assert "16" in suggestion.notes[-1]  # 9 heads do not read all 16 offsets


@pytest.mark.parametrize("name, arguments", [
    ("context", (0,)), ("context", (2.5,)), ("context", (True,)), ("context", (2**70,)), ("budget", (4096, 0)),
    ("budget", (4096, "many")), ("budget", (1_000_000, 1)),
])  # fmt: skip
def test_contexts_and_budgets_that_have_no_schedule_are_refused(name, arguments):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        suggest_schedule(LLAMA, *arguments)


def test_a_model_of_learned_positions_gets_no_schedule_beyond_them():
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=250, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    suggestion = suggest_schedule(config, 250)
    assert suggestion.settings["segment_lengths"][-1] == 250 and "rope_scaling" not in suggestion.settings
    assert is_patched(patch_model(GPT2LMHeadModel(config), **suggestion.settings))
    with pytest.raises(ValueError, match="`context` must be at most 250, the positions that the model knows, got 1024"):
        suggest_schedule(config, 1024)


def test_positions_that_are_scaled_already_are_not_scaled_again():
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 2048}
    config = LlamaConfig(**{**LLAMA.to_dict(), "rope_parameters": scaled})
    suggestion = suggest_schedule(config, 16384)
    assert "rope_scaling" not in suggestion.settings and "scaled to 8192 tokens already" in str(suggestion)


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="`model` must be a model of Transformers or its configuration, got str"):
        suggest_schedule("gpt2", 1024)
