"""`find_memory_heads`: the heads that a patched model wants a memory in, since it finds and predicts by them.

Layers are left out one by one: one layer sees what the patch's schedule shows, all others all keys. *Finding* is how
much worse facts are told then that are planted in a text and asked for behind it; *reading*, how much worse the text
itself is predicted. Few layers find, half of them predict nearly as well without (docs/memory_study.md).
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from .dilated_attention import scheduled_attention
from .dilation_schedule import DilationSchedule, as_integer
from .patch_attention import heads_of, run_original
from .patch_probe import tapped
from .patching import is_patched
from .transformers_compat import text_config_of, unwrap


FACTS = (("Alma", 4817), ("Bruno", 9302), ("Clara", 2658), ("Dario", 7134), ("Edith", 5469), ("Felix", 1093))
FACT = "\nThe secret number of {name} is {number}.\n"
QUESTION = "\nWhat is the secret number of {name}? The secret number of {name} is"


def _sequence(tokenizer, text: str, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [N] of the text with facts in it and questions behind it, and which of them are answers, and which text.

    Raises:
        ValueError: a text of fewer tokens than `length`.
    """

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    words = encode(text)
    if len(words) < length:
        raise ValueError(f"`text` must have at least `length` tokens, {length}, got {len(words)}.")
    parts, step = [], length // (len(FACTS) + 2)  # the last two parts lie between the last fact and the first question
    for i, (name, number) in enumerate(FACTS):
        parts.append((words[i * step : (i + 1) * step], "text"))
        parts.append((encode(FACT.format(name=name, number=number)), ""))
    parts.append((words[len(FACTS) * step : length], "text"))
    for name, number in FACTS:
        parts.append((encode(QUESTION.format(name=name)), ""))
        parts.append((encode(f" {number}"), "answer"))
    kinds = [kind for tokens, kind in parts for _ in tokens]
    told = (torch.tensor([kind == wanted for kind in kinds]) for wanted in ("answer", "text"))
    return torch.tensor([token for tokens, _ in parts for token in tokens]), *told


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


def find_memory_heads(
    model: nn.Module, tokenizer, text: str, num_layers: int, *, length: int = 2048, progress: bool = True
) -> dict[int, list[int]]:
    """All key/value heads of the layers that are worth a memory most, for `memory={"heads": ...}`.

    Half of them are those without which the model would find facts worst in the text, half those without which it would
    predict the text worst. One forward of `length` tokens for each layer; weights and settings stay as they are.

    Args:
        model: patched, with or without a memory; what a layer without one sees is this schedule.
        tokenizer: called with text. text: like that to be read, of at least `length` tokens.
        num_layers: how many of the patched layers; half of them is a good beginning, with twice the `top_k`.
        length: tokens of the text that are read, within the model's native context with some 200 more, and at least
            twice the first segment.

    Raises:
        ValueError: a model that is not patched, or arguments that are not that.
    """
    base = unwrap(model)
    if not is_patched(base):
        raise ValueError("`model` must be patched: what a layer sees without a memory is the patch's schedule.")
    config = text_config_of(base.config)
    schedule, layers = replace(DilationSchedule.from_config(config), memory=None), config.dilated_attention["layers"]
    if as_integer(num_layers) is None or not 1 <= num_layers <= len(layers):
        raise ValueError(f"`num_layers` must be 1 to the {len(layers)} patched ones, got {num_layers!r}.")
    least = 2 * schedule.segment_lengths[0]
    if as_integer(length) is None or length < least:
        raise ValueError(f"`length` must be an integer of at least twice the first segment, {least}, got {length!r}.")
    device = base.get_input_embeddings().weight.device
    ids, answers, words = (x.to(device) for x in _sequence(tokenizer, text, length))
    words[: schedule.segment_lengths[0]] = False  # read densely anyway
    losses, groups = [], {}
    for layer in tqdm([None, *layers], desc="layers", disable=not progress):
        with tapped(base, _without(layer, schedule, groups)):
            logits = base(input_ids=ids[None], use_cache=False).logits[0, :-1]
            each = cross_entropy(logits.float(), ids[1:], reduction="none")
        losses.append(torch.stack([each[kind[1:]].mean() for kind in (answers, words)]))
    worse = torch.stack(losses[1:]) - losses[0]  # [layers, 2]
    return {layer: list(range(groups[layer])) for layer in _best(layers, worse, num_layers)}


def _best(layers: list[int], worse: torch.Tensor, count: int) -> list[int]:
    """The first `count` layers of two rankings, in turn."""
    chosen: list[int] = []
    for pair in worse.argsort(dim=0, descending=True).tolist():
        chosen += [layers[i] for i in dict.fromkeys(pair) if layers[i] not in chosen]
    return sorted(chosen[:count])


__all__ = ["find_memory_heads"]
