"""A memory in some heads alone: which ones a model wants it in, and what is told of heads that there are not."""

import copy
import logging
import re

import pytest
import torch
from test_memory_patch import NAMES, NUMBERS, logits, recall_model, tiny_llama, tokens

from modeling_longnet import DilatedCache, LongNetConfig, find_memory_heads, load_patched_model, patch_model
from modeling_longnet.memory_heads import NAMES as TOLD
from modeling_longnet.memory_heads import _best
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


@pytest.mark.parametrize("finds", [0, 1, 2])
def test_the_layer_that_finds_is_found_and_finds_with_a_memory(finds):
    model, pairs, questions = recall_model(3, finds)
    tokenizer = RecallTokens(pairs, questions)
    patch_model(model, [32, 128], [1, 4])
    before = {name: x.clone() for name, x in model.state_dict().items()}, copy.deepcopy(model.config.dilated_attention)
    found = find_memory_heads(model, tokenizer, [TEXT, TEXT], 1, length=600, progress=False)
    assert found == {finds: [0]}
    assert all(torch.equal(x, before[0][name]) for name, x in model.state_dict().items())
    assert model.config.dilated_attention == before[1]
    said = [int(pairs[9, i % NUMBERS]) for i in range(900)]
    said[100], asked = int(pairs[3, 7]), int(questions[3])
    text = torch.tensor([[*said, asked]])
    for heads, expected in ((found, True), ({(finds + 1) % 3: [0]}, False)):
        patched = patch_model(recall_model(3, finds)[0], [32], [1], memory={"top_k": 8, "heads": heads})
        assert (int(logits(patched, text)[0, -1].argmax()) == 7) == expected


def test_two_rankings_are_taken_in_turn():
    worse = torch.tensor([[0.1, 0.9], [0.5, 0.8], [0.0, 0.1], [0.9, 0.0]])
    assert [_best([2, 4, 6, 8], worse, count) for count in range(1, 5)] == [[8], [2, 8], [2, 4, 8], [2, 4, 6, 8]]


@pytest.mark.parametrize("changes, message", [
    ({"num_layers": 0}, "`num_layers`"), ({"num_layers": 4}, "`num_layers`"), ({"num_layers": True}, "`num_layers`"),
    ({"length": 63}, "`length`"), ({"length": 3000}, "each of `texts` must have at least"),
    ({"texts": TEXT}, "`texts` must be a list"), ({"texts": []}, "`texts` must be a list"),
])  # fmt: skip
def test_wrong_arguments_are_refused(changes, message):
    model, *tables = recall_model(3)
    arguments = {"texts": [TEXT], "num_layers": 1, "length": 600, "progress": False} | changes
    with pytest.raises(ValueError, match="`model` must be patched"):
        find_memory_heads(model, RecallTokens(*tables), **arguments)
    with pytest.raises(ValueError, match=message):
        find_memory_heads(patch_model(model, [32], [1]), RecallTokens(*tables), **arguments)


@pytest.mark.parametrize("heads", [3, {0: 1}, {0: [-1]}, {0: [True]}, {"x": [0]}, {-1: [0]}, {0: [0], "0": [1]}, "0"])
def test_heads_that_are_none_are_refused(heads):
    with pytest.raises(ValueError, match="`heads` must be None or lists"):
        MemorySpec(heads=heads)


def test_heads_that_a_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match="`heads` are key/value heads, of which layer 1 has 2, got \\[0, 2\\]"):
        patch_model(tiny_llama(), [8], [1], memory={"heads": {1: [0, 2]}})
    with pytest.raises(ValueError, match="`heads` must be of patched layers"):
        patch_model(tiny_llama(), [8], [1], layers=[0, 1], memory={"heads": {2: [0]}})
    with pytest.raises(ValueError, match="`layers` and `heads` both"):
        patch_model(tiny_llama(), [8], [1], memory={"heads": {1: [0]}, "layers": [1]})
    longnet = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    schedule = {"segment_lengths": [8], "dilation_rates": [1], "local": "sliding", "overlap": "once"}
    for heads in ({2: [0]}, {1: [2]}):
        with pytest.raises(ValueError, match="num_hidden_layers=2|num_key_value_heads=2"):
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
    assert [sorted(layer.store.indices) for layer in cache.layers] == [[], [], ["far", "index"]]
    assert cache.layers[2].store.indices["index"].shape[1] == 1


def test_with_heads_no_layer_leaves_the_native_context(caplog):
    """Beyond it a patch without a memory warns, and its sink tokens stand at angles that were never trained."""
    text, settings = tokens(150), {"max_position_embeddings": 64}
    for heads, warns in (({1: [0]}, False), (None, True)):
        caplog.clear()
        memory = None if heads is None else {"top_k": 3, "heads": heads}
        model = patch_model(tiny_llama(**settings), [8, 32], [1, 2], memory=memory)
        with caplog.at_level(logging.WARNING):
            logits(model, text)
        assert any("native context" in record.message for record in caplog.records) == warns
