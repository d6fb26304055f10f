"""The layers that quote from far away: the figure is that of the attention weights that the model itself reports."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmarks.retrieval_layers import quoted_keys, quoting_by_head


def test_quoted_keys_are_earlier_occurrences_and_what_follows_them():
    tokens = torch.tensor([9, 9, 9, 9, 5, 6, 7, 5, 8, 5])
    found, copied = quoted_keys(tokens, torch.tensor([7, 9]), window=2)
    assert found.nonzero().tolist() == [[0, 4], [1, 4], [1, 7]]
    assert copied.nonzero().tolist() == [[0, 5], [1, 5]]  # key 8 is one token back only


def test_quoting_is_that_of_the_models_own_weights():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config).eval(), torch.randint(0, 20, (64,))
    scores = quoting_by_head(model, tokens, window=16, every=3)
    queries = torch.arange(48, 64, 3)
    weights = torch.cat(model(tokens[None], output_attentions=True).attentions)[:, :, queries]
    expected = torch.stack([(weights * keys).sum(-1).mean(-1) for keys in quoted_keys(tokens, queries, 16)])
    assert expected.amax((1, 2)).min() > 0.05
    torch.testing.assert_close(scores, expected)
    assert model.config._attn_implementation == "eager"
