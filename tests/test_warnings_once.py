"""What is warned of once is said once: no message holds what changes from forward to forward.

`warning_once` goes by the text, and keeps each for ever: one with a length in it comes with every token.
"""

import logging

import pytest
import torch
from tiny_models import tiny_config
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import warning_once

from modeling_longnet import DilatedCache, LongNetForCausalLM, LongNetForMaskedLM, patch_model
from modeling_longnet.streaming import stream_loss
from modeling_longnet.transformers_compat import named_cache


@pytest.fixture
def said():
    """What our loggers say, each message as often as it comes through."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    library = logging.getLogger("modeling_longnet")
    library.addHandler(handler)
    warning_once.cache_clear()
    yield messages
    library.removeHandler(handler)


def patched(**config):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=61, max_position_embeddings=40, bos_token_id=None, eos_token_id=None, **sizes, **config
    )
    return patch_model(LlamaForCausalLM(config), [8, 32], [1, 4]).eval()


def longnet(**fields):
    return LongNetForCausalLM(tiny_config(max_position_embeddings=512, **fields)).eval()


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


# Each asks for what is warned of, with texts of another length each time.
WAYS = {
    "generate beyond the native context": lambda m, n: m.generate(
        torch.ones(1, 30, dtype=torch.long), max_new_tokens=20 + n, do_sample=False, pad_token_id=0
    ),
    "stream": lambda m, n: stream_loss(m, torch.ones(60 + n, dtype=torch.long), chunk_size=7, progress=False),
    "whole": lambda m, n: m(torch.ones(1, 50 + n, dtype=torch.long)),
    "weights": lambda m, n: m(torch.ones(1, 50 + n, dtype=torch.long), output_attentions=True),
    "weights, bounded": lambda m, n: m(
        torch.ones(1, 50 + n, dtype=torch.long), output_attentions=True, **named_cache(DilatedCache(m.config))
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", [patched, longnet])
@torch.no_grad()
def test_a_warning_does_not_come_again(way, make, said):
    model = make()
    way(model, 0)
    first = list(said)
    assert len(set(first)) == len(first) <= 3
    for n in (1, 2, 5):
        way(model, n)
    assert said == first


@torch.no_grad()
def test_masks_of_pairs_and_dropout_warn_once(said):
    for n in (20, 21, 22):
        longnet()(torch.ones(1, n, dtype=torch.long), attention_mask=causal(n))
    model = longnet(attention_dropout=0.1).train()
    for n in (20, 21, 22):
        model(torch.ones(1, n, dtype=torch.long))
    for _ in range(3):
        LongNetForMaskedLM(tiny_config())
    assert len(said) == len(set(said)) <= 3


def test_the_native_context_is_told(said):
    with torch.no_grad():
        for n in (41, 42, 43):
            patched()(torch.ones(1, n, dtype=torch.long))
    assert len([message for message in said if "native context of 40" in message]) == 1
