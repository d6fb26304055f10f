"""Patched models with a memory: they find what they have read, in one forward and with a cache, and laws hold."""

import copy
import pickle

import pytest
import torch
from tiny_models import tiny_config
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_longnet import (
    DilatedCache,
    LongNetForCausalLM,
    calibrate_memory,
    export_patched_model,
    load_patched_model,
    patch_model,
    unpatch_model,
)
from modeling_longnet.dilated_cache_file import load_cache, save_cache
from modeling_longnet.memory_files import BASIS_NAME
from modeling_longnet.streaming import TextStream, stream_loss
from modeling_longnet.transformers_compat import named_cache


TOLERANCE = {"rtol": 0, "atol": 2e-5}
# Far more blocks than are chosen.
VARIANTS = {
    "alone": ([8], [1], {"block_size": 4, "top_k": 3}),
    "beside-dilated": ([8, 32], [1, 2], {"block_size": 4, "top_k": 3}),
    "some-layers": ([8], [1], {"block_size": 2, "top_k": 4, "layers": [0, 2]}),
    "clamped": ([8], [1], {"block_size": 4, "top_k": 4, "max_distance": 24}),
    "some-heads": ([8], [1], {"block_size": 4, "top_k": 3, "heads": {0: [1], 2: [0, 1]}, "max_distance": 40}),
    "few-dimensions-of-a-head": (
        [8, 32], [1, 2], {"block_size": 4, "top_k": 3, "heads": {"1": [0]}, "dimensions": 3, "max_distance": 40}
    ),
    "few-dimensions": ([8], [1], {"block_size": 4, "top_k": 3, "dimensions": 3, "max_distance": 40}),
}


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15, "pad_token_id": 0,
        "eos_token_id": None, "bos_token_id": 1,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(values | changes))).eval()


def tokens(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def with_memory(name: str, model=None):
    lengths, rates, memory = VARIANTS[name]
    model = patch_model(model or tiny_llama(), lengths, rates, num_sink_tokens=2, memory=memory)
    return calibrate_memory(model, tokens(90)[0]) if "dimensions" in memory else model


@pytest.fixture(params=VARIANTS)
def model(request):
    return with_memory(request.param)


@torch.no_grad()
def logits(model, input_ids, **kwargs):
    return model(input_ids=input_ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def read(model, text, sizes, cache=None, **kwargs):
    """Logits of a text that a model reads in pieces of these sizes, the last one repeated, and the cache."""
    cache = DilatedCache(model.config) if cache is None else cache
    outs, start, sizes = [], 0, list(sizes)
    while start < text.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        part = text[:, start : start + size]
        outs.append(model(input_ids=part, use_cache=True, **named_cache(cache), **kwargs).logits)
        start += size
    return torch.cat(outs, dim=1), cache


# The task


WIDTH, QUIET, NAMES, NUMBERS = 64, 6, 30, 11


def recall_model(layers: int = 1, finds: int = 0) -> tuple[LlamaForCausalLM, torch.Tensor, torch.Tensor]:
    """One layer, the one that finds, recalls what its text says: tokens (name, number) tell that a name has a number,
    and asked for a name it answers with the number; other layers do nothing. Also the tokens of all pairs
    [NAMES, NUMBERS] and of the questions.

    Half of a token's vector is a code of its name, the other of its number. Queries and keys are the names' codes, in
    channels that rotary embeddings hardly turn; values are the numbers' codes.
    """
    torch.manual_seed(1)
    half = WIDTH // 2
    vocabulary = NUMBERS + NAMES * NUMBERS + NAMES
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=layers, num_attention_heads=1,
        head_dim=half, max_position_embeddings=4096, rope_theta=1e9, eos_token_id=None, bos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    slow = [i for i in range(half) if i % (half // 2) >= QUIET]
    names, numbers = torch.zeros(NAMES, WIDTH), torch.zeros(NUMBERS, WIDTH)
    names[:, slow] = torch.nn.functional.normalize(torch.randn(NAMES, len(slow)), dim=-1)
    numbers[:, half:] = torch.nn.functional.normalize(torch.randn(NUMBERS, half), dim=-1)
    pairs = NUMBERS + torch.arange(NAMES * NUMBERS).view(NAMES, NUMBERS)
    questions = NUMBERS + NAMES * NUMBERS + torch.arange(NAMES)
    layer = model.model.layers[finds]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)
        embedding = model.model.embed_tokens.weight
        embedding[pairs.flatten()] = (names[:, None] + numbers[None]).flatten(0, 1)
        embedding[questions] = names
        layer.self_attn.q_proj.weight[:, :half] = 2 * torch.eye(half)
        layer.self_attn.k_proj.weight[:, :half] = torch.eye(half)
        layer.self_attn.v_proj.weight[:, half:] = torch.eye(half)
        layer.self_attn.o_proj.weight[half:] = torch.eye(half)
        model.lm_head.weight[:NUMBERS] = numbers
    return model, pairs, questions


def recall_cases(pairs: torch.Tensor, questions: torch.Tensor, length: int = 900, count: int = 8):
    """Texts [count, length] in which one name has a number, at depths 0.1 to 0.8, and answers [count]."""
    generator = torch.Generator().manual_seed(3)
    texts, answers = [], []
    for case in range(count):
        others = torch.randint(1, NAMES, (length,), generator=generator)
        said = torch.randint(0, NUMBERS, (length,), generator=generator)
        text = pairs[others, said]
        answers.append(int(torch.randint(0, NUMBERS, (1,), generator=generator)))
        text[int(length * (0.1 + 0.7 * case / (count - 1)))] = pairs[0, answers[-1]]
        text[-1] = questions[0]
        texts.append(text)
    return torch.stack(texts), torch.tensor(answers)


@pytest.mark.parametrize("dimensions", [None, 16])
def test_a_model_finds_the_needle_in_one_forward_and_in_generate(dimensions):
    model, pairs, questions = recall_model()
    texts, answers = recall_cases(pairs, questions)
    assert torch.equal(logits(model, texts)[:, -1].argmax(-1), answers)  # dense
    without = patch_model(copy.deepcopy(model), [32, 128], [1, 4])
    assert (logits(without, texts)[:, -1].argmax(-1) == answers).float().mean() < 0.5
    memory = {"block_size": 4, "top_k": 8} | ({} if dimensions is None else {"dimensions": dimensions})
    found = patch_model(model, [32], [1], memory=memory)
    if dimensions is not None:
        calibrate_memory(found, texts[0, :400])
    assert torch.equal(logits(found, texts)[:, -1].argmax(-1), answers)
    made = found.generate(texts, max_new_tokens=1, do_sample=False, attention_mask=torch.ones_like(texts))
    assert torch.equal(made[:, -1], answers)
    last = torch.stack([read(found, text[None], [300, 450, 149, 1])[0][0, -1] for text in texts])
    assert torch.equal(last.argmax(-1), answers)


# The laws


def test_any_pieces_and_decoding_give_the_full_forward(model):
    text = tokens(131, batch=2)
    expected = logits(model, text)
    for sizes in ([131], [1], [50, 1, 1, 30, 7, 42], [3, 100, 1]):
        actual, cache = read(model, text, sizes)
        torch.testing.assert_close(actual, expected, **TOLERANCE)
        assert cache.get_seq_length() == 131
    plain, _ = read(model, text, [60, 1, 70], DynamicCache(config=model.config))
    torch.testing.assert_close(plain, expected, **TOLERANCE)


def test_later_tokens_change_nothing(model):
    text = tokens(120)
    edited = torch.cat([text[:, :77], (text[:, 77:] + 5) % 97], dim=1)
    torch.testing.assert_close(logits(model, text)[:, :77], logits(model, edited)[:, :77], **TOLERANCE)


def test_a_padded_row_is_the_row(model):
    text, pad = tokens(100, batch=2), 23
    padded = torch.cat([torch.zeros(2, pad, dtype=torch.long), text], dim=1)
    padded[1] = torch.cat([text[1], tokens(pad)[0]])
    mask = torch.ones_like(padded)
    mask[0, :pad] = 0
    expected = logits(model, text[:1])
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:1, pad:], expected, **TOLERANCE)
    cache = DilatedCache(model.config)
    for begin, end in ((0, 60), (60, 61), (61, 123)):
        with torch.no_grad():
            out = model(
                input_ids=padded[:, begin:end], attention_mask=mask[:, :end], use_cache=True, **named_cache(cache)
            ).logits  # fmt: skip
        expected_part = logits(model, padded[1:, :end])[:, begin:]
        torch.testing.assert_close(out[1:], expected_part, **TOLERANCE)
        real = slice(max(pad, begin), end)
        torch.testing.assert_close(
            out[:1, real.start - begin :], expected[:, real.start - pad : real.stop - pad], **TOLERANCE
        )


WAYS = [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_generate_gives_the_tokens_of_the_plain_cache(model, options):
    prompt = torch.cat([tokens(40), tokens(40)], dim=1)
    settings = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = {k: v for k, v in options.items() if k == "num_beams"}
    expected = model.generate(prompt, **settings, **plain, cache_implementation="dynamic")
    assert torch.equal(model.generate(prompt, **settings, **options), expected)


def test_rows_are_reordered_repeated_selected_and_reset(model):
    text = tokens(90, batch=3)
    expected = logits(model, text)
    _, cache = read(model, text[:, :70], [70])
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 1, 1])
    torch.testing.assert_close(read(model, text[rows, 70:], [1, 19], cache)[0], expected[rows, 70:], **TOLERANCE)
    cache.reset()
    torch.testing.assert_close(read(model, text[rows], [90], cache)[0], expected[rows], **TOLERANCE)


def test_what_is_cropped_is_forgotten(model):
    text = tokens(100)
    _, cache = read(model, text[:, :60], [60])
    cache.activate_past_recording()
    read(model, tokens(21), [8, 13], cache)
    cache.crop(-21)
    torch.testing.assert_close(read(model, text[:, 60:], [40], cache)[0], logits(model, text)[:, 60:], **TOLERANCE)


def test_a_saved_cache_goes_on(model, tmp_path):
    text = tokens(110)
    _, cache = read(model, text[:, :70], [70])
    save_cache(tmp_path / "cache.safetensors", cache, model)
    loaded, _ = load_cache(tmp_path / "cache.safetensors", model)
    went_on = read(model, text[:, 70:], [1, 39], cache)[0]
    assert torch.equal(read(model, text[:, 70:], [1, 39], loaded)[0], went_on)
    if model.config.dilated_attention["memory"]["dimensions"]:
        with pytest.raises(ValueError, match="calibrated"):
            load_cache(tmp_path / "cache.safetensors", calibrate_memory(model, tokens(80)[0]))
    with pytest.raises(ValueError, match="schedule"):
        load_cache(tmp_path / "cache.safetensors", patch_model(tiny_llama(), [8], [1], num_sink_tokens=2))


def test_a_stream_reads_what_a_forward_reads(tmp_path):
    model, text = with_memory("clamped"), tokens(150)[0]
    whole = torch.nn.functional.cross_entropy(logits(model, text[None])[0, :-1], text[1:]).item()
    assert stream_loss(model, text, chunk_size=37, progress=False).loss == pytest.approx(whole, abs=1e-5)
    stream = TextStream(model, text, chunk_size=37)
    stream.run(stop=74, state_path=tmp_path / "state.safetensors", progress=False)
    again = stream_loss(model, text, chunk_size=37, state_path=tmp_path / "state.safetensors", progress=False)
    assert again.loss == pytest.approx(whole, abs=1e-5)
    cache = stream.cache
    kept = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.stored().values())
    assert cache.memory_footprint() == kept > 3 * 2 * 2 * 74 * 8 * 4


def test_gradients_are_those_of_the_definition(model):
    text = tokens(70, batch=2)
    naive = copy.deepcopy(model)
    naive.config.dilated_attention["backend"] = "eager"
    grads = []
    for one in (model, naive):
        one(input_ids=text, labels=text, use_cache=False).loss.backward()
        grads.append([p.grad for p in one.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
    assert all(g.abs().max() > 0 for g in grads[0])


def test_half_precision_reads_as_well_as_the_naive_path():
    text = tokens(120)
    exact = logits(with_memory("alone"), text)
    errors = []
    for backend in ("sdpa", "eager"):
        model = with_memory("alone", tiny_llama().to(torch.bfloat16))
        model.config.dilated_attention["backend"] = backend
        errors.append((logits(model, text).float() - exact).abs().mean().item())
    assert errors[0] <= 2 * errors[1] < 1


def test_under_autocast_a_text_is_read_as_well_as_by_the_naive_path(model):
    text, errors = tokens(120), {}
    exact = logits(model, text)
    with torch.autocast("cpu", torch.bfloat16):
        outs = {"whole": logits(model, text), "pieces": read(model, text, [60, 1, 1, 58])[0]}
        model.config.dilated_attention["backend"] = "eager"
        outs["naive"] = logits(model, text)
        assert model.generate(text, max_new_tokens=3, attention_mask=torch.ones_like(text)).shape == (1, 123)
    for name, out in outs.items():
        errors[name] = (out.float() - exact).abs().mean().item()
    assert max(errors.values()) <= 2 * errors["naive"] < 1


# What travels


def test_saved_and_loaded_it_is_the_same_model(model, tmp_path):
    text = tokens(100)
    model.save_pretrained(tmp_path)
    assert (tmp_path / BASIS_NAME).exists() == bool(model.config.dilated_attention["memory"]["dimensions"])
    loaded = load_patched_model(tmp_path)
    assert loaded.config.dilated_attention == model.config.dilated_attention
    assert torch.equal(logits(loaded, text), logits(model, text))
    assert torch.equal(logits(copy.deepcopy(model), text), logits(model, text))


def test_an_adapter_takes_the_dimensions_along(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(with_memory("few-dimensions", base), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_patched_model(tmp_path / "adapter")
    text = tokens(100)
    assert torch.equal(logits(loaded, text), logits(adapted.eval(), text))


def test_undone_it_is_the_original(model):
    text = tokens(60)
    unpatch_model(model)
    assert torch.equal(logits(model, text), logits(tiny_llama(), text))
    assert not any("memory" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_duplicate_is_the_same_model_and_is_undone_alone(duplicate, model):
    text, expected = tokens(80), logits(model, tokens(80))
    other = duplicate(model)
    assert torch.equal(logits(other, text), expected)
    assert torch.equal(logits(unpatch_model(other), text), logits(tiny_llama(), text))
    assert torch.equal(logits(model, text), expected)
    assert torch.equal(logits(with_memory("alone", other), text), logits(with_memory("alone"), text))


def test_without_a_memory_settings_and_numbers_are_as_before():
    plain, off = patch_model(tiny_llama(), [8, 32], [1, 4]), patch_model(tiny_llama(), [8, 32], [1, 4], memory=None)
    assert plain.config.dilated_attention == off.config.dilated_attention
    assert "memory" not in off.config.dilated_attention
    assert torch.equal(logits(plain, tokens(80)), logits(off, tokens(80)))


def test_distances_are_clamped_to_half_the_native_context_where_keys_turn():
    assert with_memory("alone").config.dilated_attention["memory"]["max_distance"] == 256
    settings = patch_model(tiny_llama(), [8], [1], memory={"max_distance": None}).config.dilated_attention
    assert settings["memory"]["max_distance"] is None
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=1)
    learned = patch_model(GPT2LMHeadModel(config).eval(), [8], [1], memory={})  # its table ends where its context does
    assert learned.config.dilated_attention["memory"]["max_distance"] is None


# What is refused


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"memory": {"layers": [7]}}, "layers"),
        ({"memory": {"layers": [0]}, "layers": [1, 2]}, "layers"),
        ({"memory": {"size": 4}}, "dictionary"),
        ({"memory": {"block_size": 4}, "local": "segment"}, "sliding"),
        ({"memory": {"max_distance": 99}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ],
    ids=str,
)
def test_wrong_settings_leave_the_model_as_it_was(options, word):
    model = tiny_llama()
    with pytest.raises(ValueError, match=word):
        patch_model(model, [8], [1], **options)
    assert torch.equal(logits(model, tokens(40)), logits(tiny_llama(), tokens(40)))
    assert not hasattr(model.config, "dilated_attention")


def test_dimensions_that_were_never_calibrated_are_refused():
    model = patch_model(tiny_llama(), [8], [1], memory={"block_size": 4, "dimensions": 4})
    with pytest.raises(ValueError, match="calibrate_memory"):
        logits(model, tokens(40))
    with pytest.raises(ValueError, match="`tokens`"):
        calibrate_memory(model, [1, 2, 3])
    with pytest.raises(ValueError, match="dimensions"):
        calibrate_memory(patch_model(tiny_llama(), [8], [1]), tokens(40)[0])


def test_exports_and_single_graphs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dimensions"):
        export_patched_model(with_memory("few-dimensions"), tmp_path)
    model, text = with_memory("alone"), tokens(40)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a memory's choice of blocks depends on values"):
        logits(compiled, text)
    with pytest.raises(ValueError, match="`memory` cannot be exported"):
        torch.export.export(model, (text,), {"use_cache": False}, strict=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's own, between graphs
@pytest.mark.parametrize("name", ["beside-dilated", "clamped", "longnet"])
def test_a_compiled_model_reads_with_its_memory_between_the_graphs(name):
    model = longnet("xpos") if name == "longnet" else with_memory(name)
    compiled, text, grads = torch.compile(model, backend="eager"), tokens(60), []
    for one in (model, compiled):
        model.zero_grad()
        one(input_ids=text, labels=text, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], **TOLERANCE)
    padded = torch.nn.functional.pad(text, (7, 0))
    out = logits(compiled, padded, attention_mask=(padded > 0).long())[:, 7:]
    torch.testing.assert_close(out, logits(model, text), **TOLERANCE)
    torch.testing.assert_close(read(compiled, text, [40, 1, 19], DilatedCache(model.config))[0], out, **TOLERANCE)


# A LongNet of its own


def longnet(kind: str) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = tiny_config(
        position_embedding_type=kind, segment_lengths=[8, 32], dilation_rates=[1, 4], overlap="once", local="sliding",
        num_sink_tokens=2, num_key_value_heads=2, memory={"block_size": 4, "top_k": 3, "layers": [1]},
        initializer_range=0.2, vocab_size=97,
    )  # fmt: skip
    return LongNetForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["rope", "xpos", "learned", "none"])
def test_a_longnet_has_a_memory_of_its_own(kind, tmp_path):
    model, text = longnet(kind), tokens(100, batch=2)
    expected = logits(model, text)
    for sizes in ([100], [60, 1, 1, 38], [1]):
        torch.testing.assert_close(read(model, text, sizes)[0], expected, **TOLERANCE)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, text), expected, **TOLERANCE)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LongNetForCausalLM.from_pretrained(tmp_path).eval(), text), expected)
    without = LongNetForCausalLM(copy.deepcopy(model.config))
    without.config.memory = None
    without.load_state_dict(model.state_dict())
    assert not torch.allclose(logits(without.eval(), text), expected, atol=1e-3)


def test_a_longnet_refuses_what_is_for_patched_models():
    options = {"overlap": "once", "local": "sliding", "position_embedding_type": "rope"}
    for memory, word in (({"dimensions": 4}, "dimensions"), ({"layers": [5]}, "layers"), ({"top": 3}, "dictionary")):
        with pytest.raises(ValueError, match=word):
            tiny_config(memory={"block_size": 2} | memory, **options)
