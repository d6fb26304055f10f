"""The layers that copy from far away: the figure is that of the attention weights that the model itself reports."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmarks.retrieval_layers import copying_by_head, copying_keys


def test_copying_keys_follow_earlier_occurrences_of_the_token():
    tokens = torch.tensor([9, 9, 9, 9, 5, 6, 7, 5, 8, 5])
    keys = copying_keys(tokens, torch.tensor([7, 9]), window=2)
    assert keys.nonzero().tolist() == [[0, 5], [1, 5]]  # 6 followed the first 5; key 8 is one token back only


def test_copying_is_that_of_the_models_own_weights():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config).eval(), torch.randint(0, 20, (64,))
    scores = copying_by_head(model, tokens, window=16, every=3)
    queries = torch.arange(48, 64, 3)
    weights = torch.cat(model(tokens[None], output_attentions=True).attentions)[:, :, queries]
    expected = (weights * copying_keys(tokens, queries, 16)).sum(-1).mean(-1)
    assert expected.max() > 0.05
    torch.testing.assert_close(scores, expected)
    assert model.config._attn_implementation == "eager"
