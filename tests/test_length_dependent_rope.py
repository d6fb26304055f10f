"""RoPE whose frequencies depend on a text's length: numbers that would depend on how it is cut are refused.

Keys in a cache keep the frequencies of the forward that brought them, so only a whole forward is right beyond the
length where they change; up to it, and behind it where they change but once (longrope), every way of reading is.
"""

import pytest
import torch
from tiny_models import tiny_config
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from modeling_longnet import DilatedCache, LongNetForCausalLM, patch_model
from modeling_longnet.sequence_parallel import SequenceParallel
from modeling_longnet.streaming import stream_loss
from modeling_longnet.transformers_compat import named_cache, release


LIMIT = 64
SCHEDULE = {"segment_lengths": [16, 64], "dilation_rates": [1, 4]}
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def longnet(parameters: dict) -> LongNetForCausalLM:
    reach = LIMIT if parameters is DYNAMIC else 4 * LIMIT
    positions = {"position_embedding_type": "rope", "rope_parameters": parameters, "max_position_embeddings": reach}
    return LongNetForCausalLM(tiny_config(**positions, initializer_range=0.3, tie_word_embeddings=False))


def llama(parameters: dict) -> LlamaForCausalLM:
    reach = LIMIT if parameters is DYNAMIC else 4 * LIMIT
    config = LlamaConfig(**SIZES, max_position_embeddings=reach, rope_parameters=parameters, initializer_range=0.3)
    return patch_model(LlamaForCausalLM(config), **SCHEDULE)


def scaled_llama(parameters: dict) -> LlamaForCausalLM:
    """The patch brings the scaling; the model's own configuration does not tell of it."""
    config = LlamaConfig(**SIZES, max_position_embeddings=LIMIT, initializer_range=0.3)
    return patch_model(LlamaForCausalLM(config), **SCHEDULE, rope_scaling=parameters)


def phi3(parameters: dict) -> Phi3ForCausalLM:
    config = Phi3Config(
        **SIZES, max_position_embeddings=4 * LIMIT, original_max_position_embeddings=LIMIT, rope_parameters=parameters,
        initializer_range=0.3,
    )  # fmt: skip
    return patch_model(Phi3ForCausalLM(config), **SCHEDULE)


MODELS = {
    "longnet-dynamic": (longnet, DYNAMIC), "llama-dynamic": (llama, DYNAMIC), "scaled-dynamic": (scaled_llama, DYNAMIC),
    "longnet-longrope": (longnet, LONGROPE), "llama-longrope": (llama, LONGROPE),
    "scaled-longrope": (scaled_llama, LONGROPE), "phi3": (phi3, LONGROPE),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    make, parameters = MODELS[request.param]
    made = make(dict(parameters) if parameters is LONGROPE else parameters).eval()
    made.generation_config.eos_token_id = None
    return made


def changes_once(model) -> bool:
    return "longrope" in str(model.config)


def text(length: int) -> torch.Tensor:
    return torch.randint(1, 61, (length,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def whole_loss(model, tokens) -> float:
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).item()


def test_streams_equal_the_whole_text_or_are_refused(model):
    assert whole_loss(model, text(150)) > 0  # whole texts are read at any length
    for chunk_size in (1, 16, 100, 150):
        assert stream_loss(model, text(LIMIT), chunk_size, progress=False).loss == pytest.approx(
            whole_loss(model, text(LIMIT)), abs=1e-5
        )
        # From the first chunk on behind the change, or in one chunk.
        if chunk_size == 150 or chunk_size == 100 and changes_once(model):
            found = stream_loss(model, text(150), chunk_size, progress=False).loss
            assert found == pytest.approx(whole_loss(model, text(150)), abs=1e-5)
        else:
            with pytest.raises(ValueError, match=f"rope_type .* beyond {LIMIT} tokens"):
                stream_loss(model, text(150), chunk_size, progress=False)


@torch.no_grad()
def test_a_bounded_cache_equals_the_whole_forward_or_refuses(model):
    x = text(150)[None]
    for cuts in ([30, 34], [1] * 64, [70], [70, 1, 79], [60, 10], [64, 1]):
        total = sum(cuts)
        fits = total <= LIMIT or len(cuts) == 1 or cuts[0] > LIMIT and changes_once(model)
        cache = DilatedCache(model.config)
        logits, refused = [], False
        for part in x[:, :total].split(cuts, dim=1):
            try:
                logits.append(model(input_ids=part, use_cache=True, **named_cache(cache)).logits)
            except ValueError as error:
                assert "have other frequencies" in str(error)
                refused = True
                break
        assert refused is not fits
        if fits:
            # Logits of up to 7, and either side within 1e-5 of float64, where they are equal.
            whole = model(input_ids=x[:, :total], use_cache=False).logits
            assert_close(torch.cat(logits, dim=1), whole, atol=2e-5, rtol=0)


def forget(model) -> None:
    """Transformers' "dynamic" keeps the frequencies of the longest text until a short one comes."""
    with torch.no_grad():
        model(input_ids=text(5)[None], use_cache=False)


def greedy_by_hand(model, x: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        forget(model)
        with torch.no_grad():
            x = torch.cat([x, model(input_ids=x, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return x


@pytest.mark.parametrize("prompt", [10, LIMIT - 5, LIMIT, LIMIT + 1])
def test_generate_equals_reading_anew_or_is_refused_before_it_begins(model, prompt):
    x, forwards = text(prompt)[None], []
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(x)}
    wanted = greedy_by_hand(model, x, 20)
    forget(model)
    if prompt + 19 <= LIMIT or prompt > LIMIT and changes_once(model):
        found = model.generate(x, **settings, return_dict_in_generate=True)
        assert torch.equal(found.sequences, wanted)
        assert any(isinstance(value, DilatedCache) for value in found.values())
        return
    model.register_forward_pre_hook(lambda *args: forwards.append(1))
    with pytest.raises(ValueError, match=f"`max_length`: with rope_type .* more than {LIMIT} tokens"):
        model.generate(x, **settings)
    assert not forwards
    assert torch.equal(model.generate(x, **settings, use_cache=False), wanted)
    forget(model)
    fits = {**settings, "max_new_tokens": LIMIT - prompt} if prompt < LIMIT else None
    if fits:
        assert torch.equal(model.generate(x, **fits), wanted[:, :LIMIT])


def test_phi3_reads_anew_where_it_switches_with_the_cache_that_the_advice_names():
    torch.manual_seed(0)
    model, x = phi3(dict(LONGROPE)).eval(), text(LIMIT - 5)[None]
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(x)}
    if release() < (5, 20):  # which went on without the text
        with pytest.raises(ValueError, match="Pass `use_cache=False`"):
            model.generate(x, **settings, cache_implementation="dynamic")
        return
    found = model.generate(x, **settings, cache_implementation="dynamic")
    assert torch.equal(found, greedy_by_hand(model, x, 20))


def test_a_chunked_prefill_counts_as_what_its_first_chunk_reads():
    torch.manual_seed(0)
    model, x = longnet(dict(LONGROPE)).eval(), text(LIMIT + 30)[None]
    with pytest.raises(ValueError, match="from a prompt of 32"):
        model.generate(x, max_new_tokens=5, prefill_chunk_size=32, attention_mask=torch.ones_like(x))


def test_sequence_parallelism_refuses_them(model):
    with pytest.raises(ValueError, match="depends on the length"):
        SequenceParallel(None, 1).add_hooks(model)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_other_scaling_streams(kind):
    torch.manual_seed(0)
    model = scaled_llama({"rope_type": kind, "factor": 4.0}).eval()
    for chunk_size in (1, 40):
        found = stream_loss(model, text(150), chunk_size, progress=False).loss
        assert found == pytest.approx(whole_loss(model, text(150)), abs=1e-5)


def test_a_dynamic_cache_of_ones_own_is_transformers_affair(model):
    x = text(20)[None]
    with torch.no_grad():
        model(input_ids=x, **named_cache(DynamicCache(config=model.config)))
