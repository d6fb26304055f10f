"""What is compared, and how a text is read: the forms of attention, each over as many keys, and reading by chunks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from modeling_longnet import DilatedCache, patch_model, unpatch_model
from modeling_longnet.patching import is_patched
from modeling_longnet.transformers_compat import named_cache


# Arguments of `patch_model`; None for the model as it is. A query of each patched form sees about 500 keys on average
# (a window of w_0 / 2, the rows of the other patterns, sinks, 64 blocks of 4 of a memory).
VARIANTS: dict[str, dict | None] = {
    "dense": None,
    "window + sinks": {"segment_lengths": [1024], "dilation_rates": [1]},
    "paper's form": {
        "segment_lengths": [768, 3072, 8192], "dilation_rates": [1, 4, 16],
        "overlap": "count", "local": "segment", "num_sink_tokens": 0,
    },
    "default patch": {"segment_lengths": [768, 3072, 8192], "dilation_rates": [1, 4, 16]},
    "with memory": {"segment_lengths": [512], "dilation_rates": [1], "memory": {}},
}  # fmt: skip


def load_model(model: str | Path, adapter: str | Path | None = None, **kwargs) -> PreTrainedModel:
    """A folder or Hub id, with a PEFT adapter over it where one is given."""
    loaded = AutoModelForCausalLM.from_pretrained(model, **kwargs).eval()
    if adapter is None:
        return loaded
    return import_module("peft").PeftModel.from_pretrained(loaded, str(adapter)).eval()


@contextmanager
def in_form(model: PreTrainedModel, name: str) -> Iterator[PreTrainedModel]:
    """The model in one of the forms of VARIANTS, and then again as it was."""
    if VARIANTS[name] is None:
        yield model
        return
    try:
        yield patch_model(model, **VARIANTS[name])
    finally:
        unpatch_model(model)


def new_cache(model: PreTrainedModel) -> Cache:
    return DilatedCache(model.config) if is_patched(model) else DynamicCache(config=model.config)


def _forward(model: PreTrainedModel, cache: Cache, tokens: list[int]) -> torch.Tensor:
    """Reads tokens on from a cache; scores [V] of what comes next."""
    chunk = torch.tensor([tokens], device=model.device)
    return model(input_ids=chunk, use_cache=True, logits_to_keep=1, **named_cache(cache)).logits[0, -1]


@torch.inference_mode()
def read(model: PreTrainedModel, text: list[int], chunk_size: int = 1024) -> Cache:
    """The cache of a model that has read the text, by chunks, so that no forward grows with it."""
    cache = new_cache(model)
    for start in range(0, len(text), chunk_size):
        _forward(model, cache, text[start : start + chunk_size])
    return cache


@torch.inference_mode()
def ask(
    model: PreTrainedModel, cache: Cache, question: list[int], new_tokens: int, is_over: Callable[[list[int]], bool]
) -> list[int]:
    """The greedy answer to a question behind the text, until it is over; the cache is then as it was."""
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    answer, new, taken = [], question, 0
    while len(answer) < new_tokens and not is_over(answer):
        scores = _forward(model, cache, new)
        taken += len(new)
        new = [int(scores.argmax())]
        answer += new
    cache.crop(-taken)
    return answer
