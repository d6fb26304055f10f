"""`find_memory_heads`: the heads that a pretrained model finds by, which are those that want a memory.

Facts are planted in texts and asked for behind them. While a model tells a fact that it was asked for, a few of its
heads look at where the fact stands (retrieval heads, Wu et al. 2024, arXiv 2404.15574). The *score* of a key/value head
is the share of attention that its query heads give to the fact then, from the token before the answer on:

    text ... [The secret number of Alma is 1234567.] ... What is the secret number of Alma? ... is [1234567]
              <------------- attention ------------------------------------------------------------ |||||||

docs/memory_study.md has the map of a model, and what heads that were chosen so find.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from .dilation_schedule import as_integer
from .patch_attention import run_original
from .patch_probe import input_device, tapped
from .patching import is_patched, patch_model, unpatch_model
from .transformers_compat import LinearAttentionCacheLayerMixin, named_cache, text_config_of, unwrap


NAMES = ("Alma", "Bruno", "Clara", "Dario", "Edith")
FACT = "\nThe secret number of {name} is {number}.\n"
QUESTION = "\nWhat is the secret number of {name}? The secret number of {name} is"
LEAST = 256  # tokens of a text


@dataclass(frozen=True)
class Asked:
    """A question behind a text, its answer, and where the text tells it."""

    question: torch.Tensor
    answer: torch.Tensor
    fact: slice


def number_of(name: int, text: int) -> str:
    """Seven digits, that of no other name or text."""
    return str(10**6 + (7919 * name + 104729 * text + 1) * 48271 % (9 * 10**6))


def make_case(tokenizer, text: str, index: int, length: int, device: torch.device) -> tuple[torch.Tensor, list[Asked]]:
    """The first `length` tokens of a text, what a tokenizer sets before it included, with facts evenly spread over
    them, [N], and what is asked of it.

    Raises:
        ValueError: a text of fewer tokens.
    """

    def encode(part: str, special: bool = False) -> list[int]:
        return tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"]

    own = encode(text, special=True)  # without their first token some models look elsewhere
    if len(own) < length:
        raise ValueError(f"each of `texts` must have at least `length` tokens, {length}, got {len(own)}.")
    step, tokens, asked = length // (len(NAMES) + 1), [], []
    for i, name in enumerate(NAMES):
        number = number_of(i, index)
        tokens += own[i * step : (i + 1) * step]
        fact = encode(FACT.format(name=name, number=number))
        pair = (torch.tensor(encode(x), device=device) for x in (QUESTION.format(name=name), f" {number}"))
        asked.append(Asked(*pair, slice(len(tokens), len(tokens) + len(fact))))
        tokens += fact
    return torch.tensor(tokens + own[len(NAMES) * step : length], device=device), asked


@dataclass
class _Listener:
    """The original attention, of which it notes what is given to the fact that is asked for, by layer and head."""

    layers: Sequence[int]
    asked: Asked | None = None
    shares: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # by layer: of each question, [G]

    def __call__(self, original: str, module: nn.Module, query, key, value, mask, **arguments):
        if self.asked is not None and module.layer_idx in self.layers:
            own = self.shares.setdefault(module.layer_idx, [])
            own.append(self._share(query, key, arguments.get("scaling")))
        return run_original(original, module, query, key, value, mask, **arguments)

    def _share(self, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Of attention to the fact, by queries from the token before the answer to that before its last one."""
        (_, heads, length, width), groups = query.shape, key.shape[1]
        first = key.shape[2] - length
        position = torch.arange(first, key.shape[2], device=key.device)[-len(self.asked.answer) - 1 : -1]
        rows = query[0, :, position - first].float().unflatten(0, (groups, heads // groups))
        scores = rows @ key[0, :, None].float().mT * (width**-0.5 if scale is None else scale)
        hidden = torch.arange(key.shape[2], device=key.device) > position[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return weights[..., self.asked.fact].sum(-1).mean((1, 2))


@contextmanager
def _patched(model: PreTrainedModel) -> Iterator[Sequence[int]]:
    """The layers of a model that are patched, or can be: then they are for a moment."""
    config = text_config_of(model.config)
    if is_patched(model):
        yield config.dilated_attention["layers"]
        return
    told = getattr(config, "dilated_attention", None)  # of a model that was saved patched
    patch_model(model, [LEAST], [1])
    try:
        yield config.dilated_attention["layers"]
    finally:
        unpatch_model(model)
        if told is not None:
            config.dilated_attention = told


def _read(model: PreTrainedModel, tokens: torch.Tensor, asked: Sequence[Asked], listener: _Listener) -> None:
    """Reads a text, and each question with its answer behind it."""

    def forward(part: torch.Tensor, cache: Cache | None = None) -> None:
        # Without its head: nobody wants the scores of every word.
        model.base_model(input_ids=part[None], use_cache=cache is not None, **named_cache(cache))

    listener.asked, cache = None, DynamicCache(config=model.config)
    # Jamba and Bamba go on from states by single tokens alone.
    recurs = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    if not recurs:
        forward(tokens, cache)
    for listener.asked in asked:
        part = torch.cat([listener.asked.question, listener.asked.answer])
        if recurs:
            forward(torch.cat([tokens, part]))
        else:  # a copy, as layers that the patch left alone, with windows, cannot take tokens back
            forward(part, copy.deepcopy(cache))


def score_heads(
    model: PreTrainedModel, tokenizer, texts: Sequence[str], *, length: int = 2048, progress: bool = True
) -> dict[int, list[float]]:
    """The score of each key/value head, from 0 to 1, by layer; arguments as of [`find_memory_heads`].

    Raises:
        ValueError: arguments that are not that, or a model that cannot be patched.
    """
    if as_integer(length) is None or length < LEAST:
        raise ValueError(f"`length` must be an integer of at least {LEAST}, got {length!r}.")
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)  # what is read but once would be used up here
    if not is_list or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`texts` must be a list of texts, got {texts!r:.100}.")
    model = unwrap(model)
    device = input_device(model)
    cases = [make_case(tokenizer, text, i, length, device) for i, text in enumerate(texts)]
    with _patched(model) as layers:
        listener = _Listener(layers)
        with tapped(model, listener):
            for tokens, asked in tqdm(cases, desc="texts", disable=not progress):
                _read(model, tokens, asked, listener)
    count = len(cases) * len(NAMES)
    return {layer: (torch.stack(own).sum(0) / count).tolist() for layer, own in sorted(listener.shares.items())}


def best_heads(scores: dict[int, list[float]], count: int | None = None) -> dict[int, list[int]]:
    """The `count` heads of the highest scores, by layer; None for one in five.

    Raises:
        ValueError: there are not as many.
    """
    ranked = sorted(((-x, layer, head) for layer, own in scores.items() for head, x in enumerate(own)))
    count = -(-len(ranked) // 5) if count is None else count
    if count > len(ranked):
        raise ValueError(f"`num_heads` must be at most the {len(ranked)} key/value heads of the layers, got {count}.")
    best: dict[int, list[int]] = {}
    for _, layer, head in sorted(ranked[:count], key=lambda x: x[1:]):
        best.setdefault(layer, []).append(head)
    return best


def find_memory_heads(
    model: PreTrainedModel,
    tokenizer,
    texts: Sequence[str],
    num_heads: int | None = None,
    *,
    length: int = 2048,
    progress: bool = True,
) -> dict[int, list[int]]:
    """The key/value heads that a model finds by, for `memory={"heads": ...}`.

    They look at facts, planted in the texts, while these are told. One forward of `length` tokens for each text, and
    one of a question for each of its five facts, which a model with recurrent layers reads behind the text anew;
    weights and settings stay as they are.

    Args:
        model: patched or not; heads of layers that a patch leaves alone are none.
        tokenizer: called with text. texts: like those to be read, of at least `length` tokens each; three are enough.
        num_heads: how many; None for one in five.
        length: tokens of a text that are read, within the model's native context with some 200 more.

    Raises:
        ValueError: arguments that are not that, or a model that cannot be patched.
    """
    if num_heads is not None and (as_integer(num_heads) is None or num_heads < 1):
        raise ValueError(f"`num_heads` must be None or an integer of at least 1, got {num_heads!r}.")
    return best_heads(score_heads(model, tokenizer, texts, length=length, progress=progress), num_heads)


__all__ = ["best_heads", "find_memory_heads", "score_heads"]
