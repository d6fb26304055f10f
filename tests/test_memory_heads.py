"""A memory in some heads alone: which ones a model wants it in, and what is told of heads that there are not."""

import re

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from test_memory_patch import NAMES, NUMBERS, TOLERANCE, logits, read, recall_model, tiny_llama, tokens
from test_warnings_once import said  # noqa: F401  a fixture
from tiny_families import make_tiny
from transformers import LlamaForCausalLM

from modeling_longnet import (
    DilatedCache,
    LongNetConfig,
    LongNetForCausalLM,
    calibrate_memory,
    find_memory_heads,
    load_patched_model,
    make_model_card,
    patch_model,
)
from modeling_longnet.dilated_cache_file import load_cache, save_cache
from modeling_longnet.dilated_memory_layer import MemoryLayer
from modeling_longnet.memory_heads import NAMES as TOLD
from modeling_longnet.memory_heads import best_heads, make_case, score_heads
from modeling_longnet.memory_pages import ROOM_STEP
from modeling_longnet.memory_spec import MemorySpec
from modeling_longnet.transformers_compat import named_cache


class RecallTokens:
    """What `find_memory_heads` says, in the tokens of `recall_model`; words are pairs of other names."""

    PIECES = re.compile(r"\nThe secret number of (\w+) is (\d+)\.\n|\nWhat is the secret number of (\w+)\?.* is|(\S+)")

    def __init__(self, pairs: torch.Tensor, questions: torch.Tensor):
        self.pairs, self.questions = pairs, questions

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        return {"input_ids": [self._token(*match) for match in self.PIECES.findall(text)]}

    def _token(self, told: str, number: str, asked: str, word: str) -> int:
        if told:
            return int(self.pairs[TOLD.index(told), int(number) % NUMBERS])
        if asked:
            return int(self.questions[TOLD.index(asked)])
        if len(word) == 7:  # an answer
            return int(word) % NUMBERS
        return int(self.pairs[len(TOLD) + int(word) % (NAMES - len(TOLD)), int(word) // 7 % NUMBERS])


TEXT = " ".join(str(i) for i in range(2000))


@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.parametrize("finds", [0, 1, 2])
def test_the_head_that_finds_is_found_and_finds_with_a_memory(finds, is_patched):
    model, pairs, questions = recall_model(3, finds)
    tokenizer = RecallTokens(pairs, questions)
    if is_patched:
        patch_model(model, [32, 128], [1, 4])
    before = {name: x.clone() for name, x in model.state_dict().items()}, model.config.to_dict()
    model.train()
    # In so long a text layers that attend to all alike give each token less than the one that finds gives to the fact.
    found = find_memory_heads(model, tokenizer, [TEXT, TEXT], 1, length=1500, progress=False)
    assert found == {finds: [0]}
    assert all(torch.equal(x, before[0][name]) for name, x in model.state_dict().items())
    assert model.config.to_dict() == before[1] and model.training
    words = [int(pairs[9, i % NUMBERS]) for i in range(900)]
    words[100], asked = int(pairs[3, 7]), int(questions[3])
    text = torch.tensor([[*words, asked]])
    for heads, expected in ((found, True), ({(finds + 1) % 3: [0]}, False)):
        patched = patch_model(recall_model(3, finds)[0], [32], [1], memory={"top_k": 8, "heads": heads})
        assert (int(logits(patched, text)[0, -1].argmax()) == 7) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "jamba", "bamba"])
def test_scores_are_the_shares_of_attention_to_the_fact(family):
    """By Transformers' own weights: of the rows that tell the answer, the mean over the query heads of a group. Also
    beside layers with windows or states, which cannot take back a question that was read."""
    model = tiny_llama() if family == "llama" else make_tiny(family)
    tokenizer = RecallTokens(torch.arange(NAMES * NUMBERS).view(NAMES, NUMBERS) % 60, torch.arange(NAMES))
    scores = score_heads(model, tokenizer, [TEXT], length=300, progress=False)
    assert list(scores) == ([0, 1, 2] if family == "llama" else [1])
    tokens, asked = make_case(tokenizer, TEXT, 0, 300, torch.device("cpu"))
    model.set_attn_implementation("eager")
    expected = torch.zeros(len(scores), 2)
    for one in asked:
        ids = torch.cat([tokens, one.question, one.answer])
        weights = model(input_ids=ids[None], use_cache=False, output_attentions=True).attentions[-len(scores) :]
        rows = slice(len(ids) - len(one.answer) - 1, -1)
        told = torch.stack([x[0, :, rows, one.fact].sum(-1).unflatten(0, (2, -1)).mean((1, 2)) for x in weights])
        expected += told.detach() / len(asked)
    torch.testing.assert_close(torch.tensor([*scores.values()]), expected, rtol=0, atol=1e-6)


def test_what_a_tokenizer_sets_before_a_text_is_read_too():
    def tokenizer(text, add_special_tokens=True, **_):
        return {"input_ids": [1] * add_special_tokens + [ord(x) for x in text]}

    text = "a" * 400
    tokens, asked = make_case(tokenizer, text, 0, 300, torch.device("cpu"))
    heard = "".join(map(chr, tokens[1:]))
    assert int(tokens[0]) == 1 and not (tokens[1:] == 1).any()
    for name, one in zip(TOLD, asked):
        assert f"The secret number of {name} is" in heard[one.fact.start - 1 : one.fact.stop - 1]
        assert not (torch.cat([one.question, one.answer]) == 1).any()


def test_heads_of_an_offloaded_model_are_those_of_the_model():
    numbers = RecallTokens(torch.arange(NAMES * NUMBERS).view(NAMES, NUMBERS) % 60, torch.arange(NAMES))
    model = tiny_llama()
    expected = score_heads(model, numbers, [TEXT], length=300, progress=False)
    calibrated = patch_model(tiny_llama(), [8], [1], memory={"dimensions": 3})
    for offloaded in (model, calibrated):
        offloaded.hf_device_map = {"": "cpu"}  # as `from_pretrained(device_map=...)` leaves it
        cpu_offload(offloaded)
        assert offloaded.get_input_embeddings().weight.device.type == "meta"
    assert score_heads(model, numbers, [TEXT], length=300, progress=False) == expected
    assert torch.isfinite(logits(calibrate_memory(calibrated, tokens(90)[0]), tokens(40))).all()


def test_a_model_that_was_saved_patched_keeps_its_settings(tmp_path):
    patch_model(tiny_llama(), [64], [1], memory={"heads": {0: [1]}}).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    before = model.config.to_dict()
    numbers = RecallTokens(torch.full((NAMES, NUMBERS), 7), torch.full((NAMES,), 9))
    find_memory_heads(model, numbers, [TEXT], 1, length=300, progress=False)
    assert model.config.to_dict() == before and "dilated_attention" in before


def test_the_best_heads_are_told_by_layer():
    scores = {2: [0.1, 0.9], 5: [0.4, 0.4], 7: [0.0, 0.0]}
    assert [best_heads(scores, count) for count in (1, 2, 3)] == [{2: [1]}, {2: [1], 5: [0]}, {2: [1], 5: [0, 1]}]


@pytest.mark.parametrize("changes, message", [
    ({"num_heads": 0}, "`num_heads`"), ({"num_heads": 99}, "`num_heads` must be at most the"),
    ({"num_heads": True}, "`num_heads`"), ({"length": 255}, "`length`"),
    ({"length": 3000}, "each of `texts` must have at least"), ({"texts": TEXT}, "`texts` must be a list"),
    ({"texts": []}, "`texts` must be a list"), ({"texts": iter([TEXT])}, "`texts` must be a list"),
])  # fmt: skip
def test_wrong_arguments_are_refused(changes, message):
    model, *tables = recall_model(3)
    arguments = {"texts": [TEXT], "num_heads": 1, "length": 600, "progress": False} | changes
    with pytest.raises(ValueError, match=message):
        find_memory_heads(model, RecallTokens(*tables), **arguments)
    longnet = LongNetForCausalLM(LongNetConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="has dilated attention of its own"):
        find_memory_heads(longnet, RecallTokens(*tables), [TEXT], length=600, progress=False)


@pytest.mark.parametrize("heads", [3, {0: 1}, {0: [-1]}, {0: [True]}, {"x": [0]}, {-1: [0]}, {0: [0], "0": [1]}, "0"])
def test_heads_that_are_none_are_refused(heads):
    with pytest.raises(ValueError, match="`heads` must be None or lists"):
        MemorySpec(heads=heads)


def test_heads_that_numpy_chose_are_heads(tmp_path):
    model = tiny_llama()
    chosen = {np.int64(1): list(np.argsort([0.5, 0.25])[:1])}
    patch_model(model, [8], [1], memory={"heads": chosen, "block_size": 4, "top_k": 2})
    model.save_pretrained(tmp_path)
    told = load_patched_model(tmp_path).config.dilated_attention["memory"]["heads"]
    assert told == {"1": [1]}


def test_heads_that_a_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match="`heads` are key/value heads, of which layer 1 has 2, got \\[0, 2\\]"):
        patch_model(tiny_llama(), [8], [1], memory={"heads": {1: [0, 2]}})
    with pytest.raises(ValueError, match="`heads` must be of patched layers"):
        patch_model(tiny_llama(), [8], [1], layers=[0, 1], memory={"heads": {2: [0]}})
    with pytest.raises(ValueError, match="`layers` and `heads` both"):
        patch_model(tiny_llama(), [8], [1], memory={"heads": {1: [0]}, "layers": [1]})
    with pytest.raises(ValueError, match="256, which for a patched model is half its native context"):
        patch_model(tiny_llama(), [512], [1], memory={"heads": {1: [0]}})  # nobody told that distance
    no_distance = {"heads": {0: []}, "max_distance": None}
    for settings in ({"num_sink_tokens": 0, "memory": {"heads": {}}}, {"memory": no_distance}):
        with pytest.raises(ValueError, match="so nothing would change"):
            patch_model(tiny_llama(), [8], [1], **settings)
    longnet = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    schedule = {"segment_lengths": [8], "dilation_rates": [1], "local": "sliding", "overlap": "once"}
    for heads in ({2: [0]}, {1: [2]}, {}):
        with pytest.raises(ValueError, match="num_hidden_layers=2|num_key_value_heads=2|nothing would change"):
            LongNetConfig(**longnet, **schedule, memory={"heads": heads})


def test_heads_are_saved_loaded_and_indexed_alone(tmp_path):
    model = patch_model(tiny_llama(), [8, 32], [1, 2], memory={"top_k": 3, "heads": {2: [1]}})
    assert model.config.dilated_attention["memory"]["heads"] == {"2": [1]}
    model.save_pretrained(tmp_path)
    again, text = load_patched_model(tmp_path), tokens(200)
    assert again.config.dilated_attention == model.config.dilated_attention
    torch.testing.assert_close(logits(again, text), logits(model, text), rtol=0, atol=0)
    cache = DilatedCache(model.config)
    with torch.no_grad():
        model(input_ids=text, use_cache=True, **named_cache(cache))
    held = cache.layers[2].stored()
    assert not any({"far", "index"} & set(layer.stored()) for layer in cache.layers[:2])
    assert [held[name].shape[1] for name in ("index", "far", "keys", "rest_keys")] == [1, 1, 1, 1]


def test_a_configuration_with_heads_is_the_same_once_saved(tmp_path):
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    settings |= {"segment_lengths": [8], "dilation_rates": [1], "local": "sliding", "overlap": "once"}
    config = LongNetConfig(**settings, memory={"top_k": 3, "heads": {0: [1], "1": (0,)}})
    config.save_pretrained(tmp_path)
    assert config.memory == {"top_k": 3, "heads": {"0": [1], "1": [0]}}
    assert LongNetConfig.from_pretrained(tmp_path).memory == config.memory
    with pytest.raises(ValueError, match="`heads` must be None or lists"):
        LongNetConfig(**settings, memory={"heads": {0: [1], "0": [0]}})


def test_with_heads_no_layer_leaves_the_native_context(said):  # noqa: F811
    """Beyond it a patch without a memory warns, and its sink tokens stand at angles that were never trained."""
    text, settings = tokens(150), {"max_position_embeddings": 64}
    for heads, warns in (({1: [0]}, False), (None, True)):
        said.clear()
        memory = None if heads is None else {"top_k": 3, "heads": heads}
        model = patch_model(tiny_llama(**settings), [8, 32], [1, 2], memory=memory)
        logits(model, text)
        assert any("native context" in message for message in said) == warns


@pytest.mark.parametrize("kind", ["device", "cpu"])
def test_without_a_memory_a_layer_forgets_and_gives_the_full_forward(kind, tmp_path):
    """Also behind a crop, for rows that stand elsewhere, and for a cache that was saved."""
    model = patch_model(tiny_llama(max_position_embeddings=64), [8, 32], [1, 2], memory={"top_k": 3, "heads": {2: [1]}})
    text = tokens(333, batch=2)
    expected, cache = logits(model, text), DilatedCache(model.config, store=kind)
    outs = [read(model, text[:, :200], [50, 1, 1, 30, 7, 42], cache)[0]]
    assert all(layer.store.forgotten > 90 for layer in cache.layers)
    cache.activate_past_recording()
    read(model, tokens(40, batch=2), [11], cache)
    cache.crop(-40)
    save_cache(tmp_path / "cache.safetensors", cache, model)
    cache.batch_select_indices(torch.tensor([1, 0]))
    for own, rows in ((cache, [1, 0]), (load_cache(tmp_path / "cache.safetensors", model)[0], [0, 1])):
        again, _ = read(model, text[rows, 200:], [100, 1, 32], own)
        torch.testing.assert_close(again, expected[rows, 200:], **TOLERANCE)
    torch.testing.assert_close(outs[0], expected[:, :200], **TOLERANCE)
    held = [layer.bytes()["device" if kind == "device" else "cpu"] for layer in cache.layers]
    assert held[0] <= held[2]
    last = text[[1, 0], -9:]
    with_gradients = model(input_ids=last, use_cache=True, **named_cache(cache)).logits
    whole = logits(model, torch.cat([text[[1, 0]], last], dim=1))
    torch.testing.assert_close(with_gradients, whole[:, -9:], **TOLERANCE)
    with pytest.raises(ValueError, match="has forgotten the tokens 4 to"):
        cache.layers[0].store.span(slice(None), 20, 30)


@pytest.mark.parametrize("kind", ["device", "cpu", "disk"])
@pytest.mark.parametrize("heads", [{0: [1], 2: [0]}, {1: [0, 1]}])
def test_heads_apart_give_the_full_forward_from_every_store(kind, heads, tmp_path):
    """In long chunks, of which whole heads are read in place, in short ones, token by token, and with gradients."""
    memory = {"top_k": 9, "heads": heads}
    model = patch_model(tiny_llama(max_position_embeddings=64), [16], [1], memory=memory)
    text, path = tokens(600, batch=1), {"path": tmp_path / "pages"} if kind == "disk" else {}
    expected, cache = logits(model, text), DilatedCache(model.config, store=kind, **path)
    out, _ = read(model, text[:, :560], [200, 3, *[1] * 20, 37, 300], cache)
    torch.testing.assert_close(out, expected[:, :560], **TOLERANCE)
    end = model(input_ids=text[:, 560:], use_cache=True, **named_cache(cache)).logits
    torch.testing.assert_close(end, expected[:, 560:], **TOLERANCE)
    cache.close()


def test_padded_rows_forget_what_the_last_of_them_can_spare():
    model = patch_model(tiny_llama(max_position_embeddings=64), [8, 32], [1, 2], memory={"top_k": 3, "heads": {0: [0]}})
    text, pad = tokens(300, batch=2), 120
    mask = torch.ones_like(text)
    mask[0, :pad] = 0
    cache, outs = DilatedCache(model.config), []
    for begin, end in ((0, 150), (150, 151), (151, 250), (250, 300)):
        given = {"input_ids": text[:, begin:end], "attention_mask": mask[:, :end]}
        with torch.no_grad():
            outs.append(model(**given, use_cache=True, **named_cache(cache)).logits)
    out = torch.cat(outs, dim=1)
    torch.testing.assert_close(out[0, pad:], logits(model, text[:1, pad:])[0], **TOLERANCE)
    torch.testing.assert_close(out[1], logits(model, text[1:])[0], **TOLERANCE)
    assert cache.layers[1].store.forgotten > 0


@pytest.mark.parametrize("schedule, most", [(([8, 32], [1, 2]), 32 + 4), (([64], [1]), 2 * 32)])
def test_what_a_layer_forgets_bounds_its_bytes(schedule, most):
    """Two windows, or the longest segment and the window before it, whatever the text's length; and room to grow."""
    model = patch_model(tiny_llama(), *schedule, memory={"heads": {}})
    cache, text = DilatedCache(model.config), tokens(1500)
    out, _ = read(model, text, [300, *[1] * 300, 200, 700], cache)
    torch.testing.assert_close(out, logits(model, text), **TOLERANCE)
    for _ in range(80):
        read(model, tokens(1), [1], cache)
        for layer in cache.layers:
            assert cache.get_seq_length() - layer.store.forgotten <= 4 + most + 4  # and a block begun
            assert layer.store.keys.shape[2] <= 4 + most + 700 + ROOM_STEP


def test_a_shorter_segment_may_begin_before_the_longest_and_is_kept():
    model = patch_model(tiny_llama(), [8, 32, 48], [1, 2, 3], memory={"heads": {}})
    text = tokens(200)
    for sizes in ([50, 1], [49, 2, 5]):
        out, cache = read(model, text, sizes)
        torch.testing.assert_close(out, logits(model, text), **TOLERANCE)
        assert all(layer.store.forgotten for layer in cache.layers)


def test_without_sinks_a_layer_without_a_memory_is_as_the_schedule_has_it():
    model = patch_model(tiny_llama(), [8, 32], [1, 2], num_sink_tokens=0, memory={"top_k": 3, "heads": {2: [1]}})
    assert [isinstance(layer, MemoryLayer) for layer in DilatedCache(model.config).layers] == [False, False, True]
    text = tokens(300)
    torch.testing.assert_close(read(model, text, [70, 1, 29])[0], logits(model, text), **TOLERANCE)


def test_a_card_tells_of_the_memory_and_what_it_costs():
    def card(**memory):
        patched = patch_model(tiny_llama(), [8, 32], [1, 2], **memory)
        return make_model_card(patched, "me/mine").text

    assert "in proportion to the text's length" in card() and "Memory:" not in card()
    clamped = card(memory={"heads": {}})
    assert "in proportion" in clamped and '"heads": {}' in clamped and '"max_distance": 256' in clamped
    searched = card(memory={"heads": {1: [0]}, "top_k": 5})
    assert "in 1 of these a query also chooses 5 of the blocks" in searched and "in proportion" not in searched
