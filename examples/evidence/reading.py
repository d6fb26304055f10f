"""What is compared, and how a text is read: the forms of attention, each over as many keys, and reading by chunks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from examples.evidence.ruler_tasks import Question
from modeling_longnet import DilatedCache, patch_model, unpatch_model
from modeling_longnet.patching import is_patched
from modeling_longnet.transformers_compat import named_cache


# The key/value heads of SmolLM2-135M that benchmarks/memory_heads.py found, by layer; another model has its own.
SMOLLM2_HEADS = {
    6: [0], 7: [2], 8: [0], 14: [0, 1], 15: [2], 17: [0, 1], 18: [2], 19: [1], 20: [1, 2], 21: [0, 1, 2], 22: [1, 2],
    23: [0],
}  # fmt: skip

DEFAULT_PATCH = {"segment_lengths": [768, 3072, 8192], "dilation_rates": [1, 4, 16]}

WIDE_WINDOW = {"segment_lengths": [3072], "dilation_rates": [1]}

# Arguments of `patch_model`; None for the model as it is. A query of the patched forms sees about 500 keys on average
# (a window of w_0 / 2, the rows of the other patterns, sinks, 64 blocks of 4 of a memory), of those with a wide window
# 1,536, and in the heads that have a memory 256 more.
VARIANTS: dict[str, dict | None] = {
    "dense": None,
    "window + sinks": {"segment_lengths": [1024], "dilation_rates": [1]},
    "paper's form": DEFAULT_PATCH | {"overlap": "count", "local": "segment", "num_sink_tokens": 0},
    "default patch": DEFAULT_PATCH,
    "default patch, yarn": DEFAULT_PATCH | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "default patch, clamped sinks": DEFAULT_PATCH | {"memory": {"heads": {}}},
    "with memory": {"segment_lengths": [512], "dilation_rates": [1], "memory": {}},
    "wide window": WIDE_WINDOW | {"memory": {"heads": {}}},
    "wide window with memory": WIDE_WINDOW | {"memory": {}},
    "memory in 18 heads": WIDE_WINDOW | {"memory": {"heads": SMOLLM2_HEADS}},
}  # fmt: skip


def load_model(model: str | Path, adapter: str | Path | None = None, **kwargs) -> PreTrainedModel:
    """A folder or Hub id, with a PEFT adapter over it where one is given."""
    loaded = AutoModelForCausalLM.from_pretrained(model, **kwargs).eval()
    if adapter is None:
        return loaded
    return import_module("peft").PeftModel.from_pretrained(loaded, str(adapter)).eval()


@contextmanager
def patched(model: PreTrainedModel, arguments: dict | None) -> Iterator[PreTrainedModel]:
    """The model with these arguments of `patch_model`, None for none, and then again as it was."""
    if arguments is None:
        yield model
        return
    try:
        yield patch_model(model, **arguments)
    finally:
        unpatch_model(model)


def in_form(model: PreTrainedModel, name: str) -> AbstractContextManager[PreTrainedModel]:
    """The model in one of the forms of VARIANTS, and then again as it was."""
    return patched(model, VARIANTS[name])


def new_cache(model: PreTrainedModel) -> Cache:
    return DilatedCache(model.config) if is_patched(model) else DynamicCache(config=model.config)


def _forward(model: PreTrainedModel, cache: Cache, tokens: list[int], keep: int = 1) -> torch.Tensor:
    """Reads tokens on from a cache; the likeliest tokens [keep] behind the last ones."""
    chunk = torch.tensor([tokens], device=model.device)
    return model(input_ids=chunk, use_cache=True, logits_to_keep=keep, **named_cache(cache)).logits[0].argmax(-1)


@torch.inference_mode()
def read(model: PreTrainedModel, text: list[int], chunk_size: int = 1024) -> Cache:
    """The cache of a model that has read the text, by chunks, so that no forward grows with it."""
    cache = new_cache(model)
    for start in range(0, len(text), chunk_size):
        _forward(model, cache, text[start : start + chunk_size])
    return cache


@torch.inference_mode()
def ask(model: PreTrainedModel, cache: Cache, question: Question, tokenizer) -> str:
    """The greedy answer to a question behind the text, until nothing can change its score; the cache is as before.

    The question's draft is read with it. As far as it is what greedy decoding gives, it need not be made word by word.
    """
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    draft = list(question.draft)
    likeliest = _forward(model, cache, question.tokens + draft, len(draft) + 1).tolist()
    agreed = next((i for i, (a, b) in enumerate(zip(likeliest, draft)) if a != b), len(draft))
    answer, new, taken = likeliest[: agreed + 1], likeliest[agreed:], len(question.tokens + draft)
    if agreed < len(draft):  # a bounded cache forgets once: all, or nothing
        cache.crop(-taken)
        new, taken = question.tokens + answer, 0
    while len(answer) < question.new_tokens and not question.is_over(tokenizer.decode(answer)):
        answer += _forward(model, cache, new).tolist()
        taken += len(new)
        new = answer[-1:]
    cache.crop(-taken)
    return tokenizer.decode(answer[: question.new_tokens])
