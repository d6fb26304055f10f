"""Decoding with plain caches equals the full forward, and `generate()` in its ways. Letters: B batch, N tokens."""

import pytest
import torch
from tiny_models import VARIANTS, tiny_config
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from modeling_longnet import LongNetForCausalLM
from modeling_longnet.transformers_compat import CACHE, named_cache


CLOSE = {"rtol": 1e-5, "atol": 1e-5}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
# Two segments of the largest length and a bit, so that every boundary is crossed.
LENGTH = 75


@pytest.fixture
def model():
    return LongNetForCausalLM(tiny_config(position_embedding_type="rope")).eval()


def variant(changes: dict) -> LongNetForCausalLM:
    return LongNetForCausalLM(tiny_config(**changes)).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(61, (batch, length))


@torch.no_grad()
def run_in_chunks(model, input_ids, cache, chunks, attention_mask=None) -> torch.Tensor:
    logits, start = [], 0
    for size in chunks:
        end = start + size
        mask = None if attention_mask is None else attention_mask[:, :end]
        outputs = model(input_ids[:, start:end], **named_cache(cache), attention_mask=mask, use_cache=True)
        logits.append(outputs.logits)
        start = end
    assert start == input_ids.shape[1]
    return torch.cat(logits, 1)


def caches(config) -> dict:
    return {"dynamic": DynamicCache(config=config), "static": StaticCache(config=config, max_cache_len=LENGTH + 5)}


@torch.no_grad()
def greedy(model, input_ids, steps) -> torch.Tensor:
    """The tokens that the full forward gives, without any cache."""
    for _ in range(steps):
        best = model(input_ids, use_cache=False).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, best], 1)
    return input_ids


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_variant
def test_cached_decode_equals_full_forward(changes, kind):
    model = variant(changes)
    input_ids = tokens(2, LENGTH)
    found = run_in_chunks(model, input_ids, caches(model.config)[kind], [1] * LENGTH)
    with torch.no_grad():
        assert_close(found, model(input_ids).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_variant
def test_chunked_equals_whole(changes, kind):
    model = variant(changes)
    input_ids = tokens(2, LENGTH)
    found = run_in_chunks(model, input_ids, caches(model.config)[kind], [5, 20, 1, 30, 2, 17])
    with torch.no_grad():
        assert_close(found, model(input_ids).logits, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_variant
def test_left_padded_decode_equals_the_unpadded_row(changes, kind, implementation):
    model = variant(changes)
    model.set_attn_implementation(implementation)
    input_ids, mask = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    pads = (0, 11, 24)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    found = run_in_chunks(model, input_ids, caches(model.config)[kind], [30, *[1] * 20, 25], attention_mask=mask)
    for row, count in enumerate(pads):
        with torch.no_grad():
            assert_close(found[row, count:], model(input_ids[row : row + 1, count:]).logits[0], **CLOSE)


@every_variant
def test_a_right_padded_batch_can_be_continued_with_a_dynamic_cache(changes):
    """The gap between prompt and continuation is put aside."""
    model = variant(changes)
    prompt, more = tokens(2, 30), tokens(2, 20)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, 18:30] = 0
    cache = DynamicCache(config=model.config)
    found = run_in_chunks(model, torch.cat([prompt, more], 1), cache, [30, *[1] * 12, 8], attention_mask=mask)
    for row, kept in enumerate(mask.bool()):
        with torch.no_grad():
            expected = model(torch.cat([prompt, more], 1)[row, kept][None]).logits[0]
        assert_close(found[row, kept], expected, **CLOSE)


@every_variant
def test_a_chat_goes_on_behind_the_padding_of_a_finished_answer(changes):
    """The first of the new columns is such padding: the last token of the first turn is not in the cache yet."""
    model, prompt, more = variant(changes), tokens(2, 20), tokens(2, 5)
    model.generation_config.pad_token_id = 0
    answers = torch.cat([tokens(2, 6) % 60 + 1, tokens(2, 5) % 60 + 1], 1)
    mask = torch.ones(2, 36, dtype=torch.long)
    mask[0, 23:31] = 0
    text, cache = torch.cat([prompt, answers, more], 1), DynamicCache(config=model.config)
    run_in_chunks(model, text[:, :30], cache, [20, *[1] * 10])
    found = model.generate(text, attention_mask=mask, **named_cache(cache), max_new_tokens=20, do_sample=False)[:, 36:]
    for row, kept in enumerate(mask.bool()):
        assert torch.equal(greedy(model, text[row, kept][None], 20)[0, -20:], found[row])


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@every_variant
def test_a_right_padded_batch_goes_on_as_its_rows_do_alone(changes, cache):
    """Upstream's own tests generate from such batches: the first token is the padding's, what follows it is right."""
    model = variant(changes)
    prompt, lengths = tokens(3, 20), (20, 11, 2)
    mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).long()
    kwargs = {"disable_compile": True} | ({} if cache is None else {"cache_implementation": cache})
    found = model.generate(prompt, attention_mask=mask, max_new_tokens=30, do_sample=False, **kwargs)[:, 20:]
    for row, length in enumerate(lengths):
        text = torch.cat([prompt[row, :length], found[row]])[None]
        with torch.no_grad():
            expected = model(text, use_cache=False).logits.argmax(-1)[0, length:-1]
        assert torch.equal(found[row, 1:], expected)


def test_decoding_goes_on_in_the_last_packed_document(model):
    """Position ids alone tell it: what lies before the row's current document is hidden."""
    first, second = tokens(1, 20), tokens(1, 33)
    positions = torch.cat([torch.arange(20), torch.arange(33)])[None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.cat([first, second[:, :20]], 1), position_ids=positions[:, :40], **named_cache(cache))
        found = [
            model(second[:, [i]], position_ids=torch.tensor([[i]]), **named_cache(cache)).logits for i in range(20, 33)
        ]
        assert_close(torch.cat(found, 1), model(second).logits[:, 20:], **CLOSE)


def test_training_with_a_cache_keeps_packed_documents_apart(model):
    rows = [tokens(1, 20), tokens(1, 33)]
    positions = torch.cat([torch.arange(20), torch.arange(33)])[None]
    with torch.no_grad():
        found = model(torch.cat(rows, 1), position_ids=positions, use_cache=True).logits
        assert_close(found, torch.cat([model(row).logits for row in rows], 1), **CLOSE)


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_greedy_generate_equals_the_full_forward(model, cache):
    input_ids = tokens(2, 20)
    kwargs = {} if cache is None else {"cache_implementation": cache}
    found = model.generate(input_ids, max_new_tokens=40, do_sample=False, disable_compile=True, **kwargs)
    assert torch.equal(found, greedy(model, input_ids, 40))


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_a_left_padded_batch_generates_the_tokens_of_its_rows(model, cache):
    rows = [tokens(1, length) for length in (20, 9, 14)]
    input_ids, mask = torch.full((3, 20), 5), torch.zeros(3, 20, dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, 20 - row.shape[1] :], mask[i, 20 - row.shape[1] :] = row[0], 1
    kwargs = {"disable_compile": True} | ({} if cache is None else {"cache_implementation": cache})
    found = model.generate(
        input_ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=5, **kwargs
    )
    for i, row in enumerate(rows):
        assert torch.equal(found[i, 20:], greedy(model, row, 30)[0, row.shape[1] :])


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 7},
    ],
    ids=["sampling", "beams", "beams-returned", "samples-returned", "chunked-prefill"],
)
@pytest.mark.parametrize("cache", [None, "dynamic"])
def test_generate_with_a_cache_equals_without(model, settings, cache):
    input_ids = tokens(2, 20)
    kwargs = {} if cache is None else {"cache_implementation": cache}
    plain = {name: value for name, value in settings.items() if name != "prefill_chunk_size"}
    torch.manual_seed(1)
    expected = model.generate(input_ids, max_new_tokens=25, use_cache=False, **plain)
    torch.manual_seed(1)
    assert torch.equal(model.generate(input_ids, max_new_tokens=25, **settings, **kwargs), expected)


def test_prompt_lookup_equals_greedy(model):
    input_ids = tokens(1, 10).repeat(1, 3)
    found = model.generate(
        input_ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4, cache_implementation="dynamic"
    )
    assert torch.equal(found, greedy(model, input_ids, 20))


def test_generation_continues_from_a_returned_cache(model):
    input_ids = tokens(1, 20)
    first = model.generate(
        input_ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True, cache_implementation="dynamic"
    )
    again = model.generate(first.sequences, **named_cache(first[CACHE]), max_new_tokens=10, do_sample=False)
    assert torch.equal(again, greedy(model, input_ids, 20))


def test_generate_from_embeddings(model):
    input_ids = tokens(1, 20)
    found = model.generate(
        inputs_embeds=model.get_input_embeddings()(input_ids), max_new_tokens=10, do_sample=False,
        cache_implementation="dynamic",
    )  # fmt: skip
    assert torch.equal(found, greedy(model, input_ids, 10)[:, 20:])


def test_a_compiled_static_decode_equals_the_plain_one(model):
    input_ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(input_ids, disable_compile=True, **kwargs)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(input_ids, disable_compile=True, **kwargs), expected)


def test_a_compiled_static_decode_of_a_right_padded_batch_equals_the_plain_one(model):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    input_ids = tokens(2, 12)
    expected = model.generate(input_ids, disable_compile=True, **kwargs)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(input_ids, disable_compile=True, **kwargs), expected)


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([[1, 2, 3]])
