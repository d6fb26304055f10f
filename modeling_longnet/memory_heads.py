"""`find_memory_heads`: the heads that a patched model wants a memory in, since it finds and predicts by them.

Layers are left out one by one: one layer sees what the patch's schedule shows, all others all keys. *Finding* is how
much worse facts are told then that are planted in a text and asked for behind it; *reading*, how much worse the text
itself is predicted. Few layers find, half of them predict nearly as well without (docs/memory_study.md).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from .dilated_attention import scheduled_attention
from .dilation_schedule import DilationSchedule, as_integer
from .patch_attention import heads_of, run_original
from .patch_probe import tapped
from .patching import is_patched
from .transformers_compat import named_cache, text_config_of, unwrap


NAMES = ("Alma", "Bruno", "Clara", "Dario", "Edith")
FACT = "\nThe secret number of {name} is {number}.\n"
QUESTION = "\nWhat is the secret number of {name}? The secret number of {name} is"


@dataclass(frozen=True)
class Case:
    """tokens: of a text with facts in it, [N], of which `words` [N] are the text's own. asked: question, answer, each
    behind the text."""

    tokens: torch.Tensor
    words: torch.Tensor
    asked: list[tuple[torch.Tensor, torch.Tensor]]


def number_of(name: int, text: int) -> str:
    """Seven digits, that of no other name or text."""
    return str(10**6 + (7919 * name + 104729 * text + 1) * 48271 % (9 * 10**6))


def make_case(tokenizer, text: str, index: int, length: int, device: torch.device) -> Case:
    """Facts evenly spread over the first `length` tokens of a text.

    Raises:
        ValueError: a text of fewer tokens.
    """

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    own = encode(text)
    if len(own) < length:
        raise ValueError(f"each of `texts` must have at least `length` tokens, {length}, got {len(own)}.")
    step, tokens, words, asked = length // (len(NAMES) + 1), [], [], []
    for i, name in enumerate(NAMES):
        fact = encode(FACT.format(name=name, number=number_of(i, index)))
        tokens += own[i * step : (i + 1) * step] + fact
        words += [True] * step + [False] * len(fact)
        pair = encode(QUESTION.format(name=name)), encode(f" {number_of(i, index)}")
        asked.append(tuple(torch.tensor(x, device=device) for x in pair))
    rest = own[len(NAMES) * step : length]
    words = torch.tensor(words + [True] * len(rest), device=device)
    return Case(torch.tensor(tokens + rest, device=device), words, asked)


def _without(layer: int | None, schedule: DilationSchedule, groups: dict[int, int]):
    """The original attention, but in one layer that of the schedule. Notes the key/value heads by layer."""

    def attend(original, module, query, key, value, mask, **arguments):
        groups[module.layer_idx] = key.shape[1]
        if module.layer_idx != layer:
            return run_original(original, module, query, key, value, mask, **arguments)
        heads = heads_of(module, query, key)
        out = scheduled_attention(query, key, value, schedule, scale=arguments.get("scaling"), heads=heads)
        return out.transpose(1, 2).contiguous(), None

    return attend


@torch.inference_mode()
def _losses(model: nn.Module, case: Case, first: int) -> tuple[float, float]:
    """Of an answer, on average, and of a word of the text's from token `first` on."""

    def read(cache: Cache, tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens[None], use_cache=True, **named_cache(cache)).logits[0].float()

    cache, told = DynamicCache(config=model.config), []
    each = cross_entropy(read(cache, case.tokens)[:-1], case.tokens[1:], reduction="none")
    for question, answer in case.asked:
        # A copy, as layers that the patch left alone, with windows or states, cannot take tokens back.
        logits = read(copy.deepcopy(cache), torch.cat([question, answer]))[-len(answer) - 1 : -1]
        told.append(cross_entropy(logits, answer, reduction="sum").item())
    return sum(told) / len(told), each[first:][case.words[first + 1 :]].mean().item()


@dataclass(frozen=True)
class LayerWorth:
    """By how many nats an answer (`finding`) and a word of the texts (`reading`) are told worse without a layer."""

    layer: int
    heads: int
    finding: float
    reading: float


def _patched_layers(model: nn.Module) -> list[int]:
    """Those of a model.

    Raises:
        ValueError: it is not patched.
    """
    if not is_patched(unwrap(model)):
        raise ValueError("`model` must be patched: what a layer sees without a memory is the patch's schedule.")
    return text_config_of(unwrap(model).config).dilated_attention["layers"]


def leave_layers_out(
    model: PreTrainedModel, tokenizer, texts: Sequence[str], *, length: int = 2048, progress: bool = True
) -> list[LayerWorth]:
    """What each patched layer is worth; arguments as of [`find_memory_heads`].

    Raises:
        ValueError: a model that is not patched, or arguments that are not that.
    """
    layers, base = _patched_layers(model), unwrap(model)
    schedule = replace(DilationSchedule.from_config(text_config_of(base.config)), memory=None)
    least = 2 * schedule.segment_lengths[0]
    if as_integer(length) is None or length < least:
        raise ValueError(f"`length` must be an integer of at least twice the first segment, {least}, got {length!r}.")
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`texts` must be a list of texts, got {texts!r:.100}.")
    device = base.get_input_embeddings().weight.device
    cases = [make_case(tokenizer, text, i, length, device) for i, text in enumerate(texts)]
    losses, groups = [], {}
    for layer in tqdm([None, *layers], desc="layers", disable=not progress):
        with tapped(base, _without(layer, schedule, groups)):
            told = [_losses(base, case, schedule.segment_lengths[0]) for case in cases]  # before it all is dense
        losses.append(torch.tensor(told).mean(0))
    return [LayerWorth(i, groups[i], *(x - losses[0]).tolist()) for i, x in zip(layers, losses[1:])]


def best_layers(worths: Sequence[LayerWorth], count: int) -> list[int]:
    """The first `count` layers of two rankings, by finding and by reading, in turn."""
    rankings = [
        [x.layer for x in sorted(worths, key=lambda worth: getattr(worth, name), reverse=True)]
        for name in ("finding", "reading")
    ]
    return sorted(list(dict.fromkeys(layer for pair in zip(*rankings) for layer in pair))[:count])


def find_memory_heads(
    model: PreTrainedModel,
    tokenizer,
    texts: Sequence[str],
    num_layers: int,
    *,
    length: int = 2048,
    progress: bool = True,
) -> dict[int, list[int]]:
    """All key/value heads of the layers that are worth a memory most, for `memory={"heads": ...}`.

    Half of them are those without which the model would tell facts worst that are planted in the texts, half those
    without which it would predict the texts worst. One forward of `length` tokens for each layer and text; weights and
    settings stay as they are.

    Args:
        model: patched, with or without a memory; what a layer without one sees is this schedule.
        tokenizer: called with text. texts: like those to be read, of at least `length` tokens each; with one alone the
            choice is little better than chance for most layers, three are a good number.
        num_layers: how many of the patched layers; half of them is a good beginning, with twice the `top_k`.
        length: tokens of a text that are read, within the model's native context with some 200 more, and at least
            twice the first segment.

    Raises:
        ValueError: a model that is not patched, or arguments that are not that.
    """
    most = len(_patched_layers(model))
    if as_integer(num_layers) is None or not 1 <= num_layers <= most:
        raise ValueError(f"`num_layers` must be 1 to the {most} patched ones, got {num_layers!r}.")
    worths = leave_layers_out(model, tokenizer, texts, length=length, progress=progress)
    best = best_layers(worths, num_layers)
    return {worth.layer: list(range(worth.heads)) for worth in worths if worth.layer in best}


__all__ = ["LayerWorth", "best_layers", "find_memory_heads", "leave_layers_out"]
