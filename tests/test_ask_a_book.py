"""The example that reads once and asks many times: an answer is that of one whole text, and leaves no trace."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.ask_a_book import ask, patch, plant
from modeling_longnet import MemoryBank, patch_model


def test_facts_are_spread_over_the_text():
    text, facts = plant(list(range(1000, 1100)), lambda line: [int(c) for c in line if c.isdigit()], 4)
    assert [x for x in text if x >= 1000] == list(range(1000, 1100))
    assert [x for x in text if x < 10] == [int(c) for _, number in facts for c in number]
    assert len({name for name, _ in facts}) == 4


class Letters:
    """A token for each letter."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 61 for letter in text]}

    def decode(self, ids):
        return "".join(chr(i + 61) for i in ids)


@pytest.mark.parametrize("native, length, is_short", [(8192, 1500, 0), (1024, 1500, 0), (8192, 300, 1), (300, 1500, 1)])
def test_a_short_book_or_context_is_read_too(native, length, is_short, tmp_path, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=native,
    )  # fmt: skip
    model, book = LlamaForCausalLM(config).eval(), torch.randint(0, 61, (length,)).tolist()
    memory = patch(model, Letters(), book, "found")
    assert ("heads" not in memory) == is_short == ("too short" in capsys.readouterr().out)
    bank = MemoryBank.from_tokens(model, [book], tmp_path, chunk_size=256, progress=False)
    assert len(bank) == length and len(ask(model, bank.start_cache(model), [1, 2, 3], 2)) == 2


@pytest.mark.parametrize("chunk_size", [16, 50])
def test_an_answer_is_that_of_the_whole_text_and_leaves_no_trace(chunk_size, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config).eval(), [8], [1], memory={"block_size": 4, "top_k": 4})
    text, questions = torch.randint(1, 61, (90,)).tolist(), torch.randint(1, 61, (3, 7)).tolist()
    bank = MemoryBank.from_tokens(model, [text], tmp_path, chunk_size=chunk_size, progress=False)
    for question in [*questions, questions[0]]:
        whole = torch.tensor([text + question])
        expected = model.generate(whole, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(whole))
        assert ask(model, bank.start_cache(model), question, 6) == expected[0, whole.shape[1] :].tolist()
