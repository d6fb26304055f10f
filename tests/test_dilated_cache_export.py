"""Exported programs with a bounded cache, and masks of several decoding steps put together: exported = eager."""

import copy

import pytest
import torch
from tiny_models import tiny_config
from transformers import StaticCache

from modeling_longnet import DilatedCache, LongNetForCausalLM
from modeling_longnet.dilated_cache_export import _flatten, register_for_export
from modeling_longnet.transformers_compat import named_cache


@pytest.fixture
def model():
    config = tiny_config(tie_word_embeddings=False, initializer_range=0.3, pad_token_id=0)
    return LongNetForCausalLM(config).eval()


@pytest.fixture
def registered():
    """As after the first cache that is made once Transformers' exporters are loaded."""
    register_for_export(DilatedCache)


def tokens(*shape):
    return torch.randint(3, 61, shape)


@torch.no_grad()
def exported(model, inputs):
    return torch.export.export(model, (), copy.deepcopy(inputs), strict=False).module()


@pytest.mark.parametrize("pads", [0, 2])
def test_exported_decoding_equals_eager(model, registered, pads):
    """One program of one token, called again with the cache that it gave, goes on as the model does."""
    prompt, text = tokens(2, 11), tokens(2, 9)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :pads] = 0
    cache = DilatedCache(model.config)
    with torch.no_grad():
        model(prompt, attention_mask=mask, cache=cache)
        program = exported(model, {"input_ids": text[:, :1], **named_cache(copy.deepcopy(cache))})
        ours, theirs = copy.deepcopy(cache), copy.deepcopy(cache)
        for step in range(9):
            out = program(input_ids=text[:, step : step + 1], **named_cache(theirs))
            expected = model(text[:, step : step + 1], cache=ours)
            torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
            theirs = out[next(iter(named_cache(None)))]
        assert theirs.get_seq_length() == ours.get_seq_length() == 20
        torch.testing.assert_close(theirs.positions, ours.positions)


def test_exported_prefill_fills_an_empty_cache(model, registered):
    prompt = tokens(2, 11)
    program = exported(model, {"input_ids": prompt, **named_cache(DilatedCache(model.config))})
    with torch.no_grad():
        out = program(input_ids=prompt, **named_cache(DilatedCache(model.config)))
        cache = DilatedCache(model.config)
        torch.testing.assert_close(out.logits, model(prompt, cache=cache).logits, atol=1e-5, rtol=1e-5)
        filled, following = out[next(iter(named_cache(None)))], tokens(2, 1)
        torch.testing.assert_close(
            model(following, cache=filled).logits, model(following, cache=cache).logits, atol=1e-5, rtol=1e-5
        )


def test_a_cache_is_walked_through_as_a_tree(model):
    """Exporters look at each `__dict__` that a cache reaches, and set what they have found there."""
    exporters = pytest.importorskip("transformers.exporters.utils")
    cache, twin = DilatedCache(model.config), DilatedCache(model.config)
    text, following = tokens(2, 9), tokens(2, 1)
    with torch.no_grad():
        for one in (cache, twin):
            model(text, cache=one)
        exporters.cast_leaf_tensors(cache, torch.float32, torch.device("cpu"))
        leaves = list(exporters.get_leaf_tensors(cache).values())
        assert len(leaves) == 7 and all(a is b for a, b in zip(leaves, _flatten(cache)[0]))
        torch.testing.assert_close(model(following, cache=cache).logits, model(following, cache=twin).logits)


def test_what_cannot_be_exported_is_refused(model):
    cache = DilatedCache(model.config)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="crop"):
        _flatten(cache)
    cache = DilatedCache(model.config)
    cache.layers.append(StaticCache(model.config, max_cache_len=8).layers[0])
    with pytest.raises(ValueError, match="not bounded"):
        _flatten(cache)


def steps_with_static_cache(model, prompt, mask, text):
    """The cache behind the prompt, and the mask and positions of each token of the text."""
    cache = StaticCache(model.config, max_cache_len=24)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(prompt, attention_mask=mask, position_ids=positions, cache=cache)
    behind, steps = copy.deepcopy(cache), []
    for step in range(text.shape[1]):
        token = text[:, step : step + 1]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        place = positions[:, -1:] + 1 + step
        embeds = model.get_input_embeddings()(token)
        encoded = model.create_masks_for_generate(model.config, embeds, mask, cache, place)
        steps.append((encoded, place, model(token, attention_mask=encoded, position_ids=place, cache=cache).logits))
    return behind, steps


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_masks_of_steps_put_together_equal_the_steps(model, padding):
    prompt, text, mask = tokens(2, 10), tokens(2, 3), torch.ones(2, 10, dtype=torch.long)
    mask[0, slice(0, 3) if padding == "left" else slice(7, 10)] = 0
    cache, steps = steps_with_static_cache(model, prompt, mask, text)
    masks, places, logits = (list(column) for column in zip(*steps))
    assert masks[0].dtype == (torch.int32 if padding == "left" else torch.int64) and masks[0].shape == (2, 1, 1, 24)
    together = model(text, attention_mask=torch.cat(masks, 2), position_ids=torch.cat(places, 1), cache=cache)
    torch.testing.assert_close(together.logits, torch.cat(logits, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_masks_of_pairs_are_not_taken_for_encoded_ones(model, dtype):
    cache, mask = StaticCache(model.config, max_cache_len=24), torch.ones(2, 10, dtype=torch.long)
    model(tokens(2, 10), attention_mask=mask, cache=cache)
    pairs = torch.ones(2, 1, 3, 24).tril(10).to(dtype)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(2, 3), attention_mask=pairs, cache=cache)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(2, 3), attention_mask=torch.ones(2, 1, 3, 3, dtype=dtype))
