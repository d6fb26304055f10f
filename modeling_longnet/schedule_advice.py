"""A schedule for a model, a context and a budget, by what was measured."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_longnet import LongNetConfig
from .dilation_schedule import LARGEST, DilationSchedule, as_integer
from .patch_report import bounded_rows, keys_per_query
from .transformers_compat import text_config_of


_SMALLEST = 16  # tokens of a first segment
_LEEWAY = 1.1  # times the budget is within it
_GROWTH = 4  # each pattern reaches so much further than the one before
_FAR_SHARE = 1 / 4  # of the budget, at most, for what is not the window: before training near keys are worth more
_SINKS = 4  # what `patch_model` gives by itself


@dataclass(frozen=True)
class ScheduleSuggestion:
    """A schedule and what it costs.

    Attributes:
        settings: keyword arguments for `patch_model`, or for `LongNetConfig` where that was asked about.
        context: tokens that were asked for; the schedule reaches over these or more.
        keys_per_query: mean number of keys of a query in a long text; `dense_keys_per_query`: of dense attention.
        rows_per_key_value_head: what a bounded cache keeps, at any length of text.
        notes: what to know, a sentence each.
    """

    settings: dict
    context: int
    keys_per_query: float
    dense_keys_per_query: float
    rows_per_key_value_head: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        patterns = zip(self.settings["segment_lengths"], self.settings["dilation_rates"])
        lines = [
            f"{' '.join(f'{w}/{r}' for w, r in patterns)} (segment length / dilation rate) for {self.context} tokens",
            f"  keys per query  {self.dense_keys_per_query:.0f} -> {self.keys_per_query:.0f} (mean)",
            f"  cache rows      {self.context} -> {min(self.context, self.rows_per_key_value_head)}",
        ]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def suggest_schedule(
    model: PreTrainedModel | PreTrainedConfig, context: int, budget: int | None = None
) -> ScheduleSuggestion:
    """The schedule to begin with.

        suggestion = suggest_schedule(model, context=32768)
        print(suggestion)
        patch_model(model, **suggestion.settings)

    For a pretrained model: a sliding window that takes three quarters of the keys or more, as near ones are worth the
    most before training, and patterns of four times the length each up to the context, at the smallest rates that the
    rest pays for (docs/zero_shot_patch_study.md, docs/lora_study.md). For a LongNetConfig, which learns its attention
    from scratch: the paper's form, w and r growing together, so that each pattern costs a quarter of the one before.

    Args:
        model: a causal model of Transformers, its configuration, or a LongNetConfig.
        context: tokens that a query must be able to reach back over.
        budget: mean number of keys of a query, kept within a tenth; by default a quarter of `context`, at most 1,024.

    Raises:
        ValueError: for a context or a budget that no schedule has, a context beyond learned positions, and what is no
            model.

    Source: the geometric form is that of LongNet (arXiv 2307.02486), section 3.1; the rest are this project's studies.
    """
    config = getattr(model, "config", model)
    if not isinstance(config, PreTrainedConfig) or not hasattr(text_config_of(config), "num_attention_heads"):
        raise ValueError(f"`model` must be a model of Transformers or its configuration, got {type(model).__name__}.")
    config = text_config_of(config)
    context = _check("context", context, _SMALLEST)
    budget = min(1024, context // 4) if budget is None else _check("budget", budget, 1)
    pretrained = not isinstance(config, LongNetConfig)
    settings, notes = _positions(config, context) if pretrained else ({}, [])
    schedule = _largest(_pretrained_forms if pretrained else _paper_forms, context, budget)
    if pretrained and not getattr(config, "rope_parameters", None):
        known = getattr(config, "max_position_embeddings", None) or LARGEST
        schedule = replace(schedule, segment_lengths=[min(w, known) for w in schedule.segment_lengths])
    heads = config.num_attention_heads
    if pretrained:
        notes.append("untrained it finds no facts outside its window: `memory={}` does (docs/memory_study.md).")
    if unread := schedule.unread_offsets(heads):
        notes.append(f"its {heads} heads leave positions unread at the rates {', '.join(map(str, unread))}.")
    return ScheduleSuggestion(
        settings={
            "segment_lengths": list(schedule.segment_lengths),
            "dilation_rates": list(schedule.dilation_rates),
            **settings,
        },
        context=context,
        keys_per_query=keys_per_query(schedule),
        dense_keys_per_query=(context + 1) / 2,
        rows_per_key_value_head=bounded_rows(schedule, heads, getattr(config, "num_key_value_heads", None) or heads),
        notes=tuple(notes),
    )


def _positions(config: PreTrainedConfig, context: int) -> tuple[dict, list[str]]:
    """How a pretrained model gets positions beyond those that it was trained on, as settings and notes."""
    native, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    if not native or context <= native:
        return {}, []
    if not rope:
        raise ValueError(f"`context` must be at most {native}, the positions that the model knows, got {context}.")
    kinds = rope.get("full_attention", rope)
    if kinds.get("rope_type", "default") != "default":
        return {}, [f"the model's positions are scaled to {native} tokens already: choose a `rope_scaling` yourself."]
    settings = {"rope_scaling": {"rope_type": "yarn", "factor": float(-(-context // native))}}
    return settings, [f"the model was trained on {native} tokens: `rope_scaling` stretches its positions."]


def _check(name: str, value: object, least: int) -> int:
    number = as_integer(value)
    if number is None or not least <= number <= LARGEST:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    return number


def _largest(forms: Callable, context: int, budget: int) -> DilationSchedule:
    """The first of the forms that the budget pays for, tried from the longest first segment down."""
    first = 1 << context.bit_length() - 1  # powers of two: segments that nest make large blocks
    while first >= _SMALLEST:
        for schedule in forms(first, context, budget):
            if keys_per_query(schedule) <= _LEEWAY * budget:
                return schedule
        first //= 2
    raise ValueError(f"`budget` must be larger for a context of {context} tokens, got {budget} keys a query.")


def _lengths(first: int, context: int) -> list[int]:
    """Segment lengths of four times each, the last one of two or four times, that reach over the context."""
    lengths = [first]
    while lengths[-1] < context:
        growth = _GROWTH if 2 * lengths[-1] < context else 2
        lengths.append(lengths[-1] * growth)
    return lengths


def _pretrained_forms(first: int, context: int, budget: int) -> Iterator[DilationSchedule]:
    lengths = _lengths(first, context)
    for rate in (4, 8, 16, 32) if len(lengths) > 1 else (1,):
        rates = [1, *(min(rate, first) * length // lengths[1] for length in lengths[1:])]
        schedule = DilationSchedule(lengths, rates, local="sliding", overlap="once", num_sink_tokens=_SINKS)
        if keys_per_query(schedule) - schedule.window - _SINKS <= _FAR_SHARE * budget:
            yield schedule


def _paper_forms(first: int, context: int, budget: int) -> Iterator[DilationSchedule]:
    lengths = _lengths(first, context)
    yield DilationSchedule(lengths, [length // first for length in lengths])
