"""The schedule of a dilated attention: which positions each head sees. The one definition that every path agrees with.

Letters, here and everywhere in this package: B batch, H query heads, G key/value heads (H % G == 0), N tokens,
D head dimension, w segment length, r dilation rate, s offset of a head, i pattern index.
"""

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache

import torch

from .memory_spec import MemorySpec
from .transformers_compat import text_config_of


CHOICES = {
    "head_offsets": ("modulo", "contiguous"), "overlap": ("count", "once"), "padding": ("mask", "zeros"),
    "local": ("segment", "sliding"),
}  # fmt: skip
LARGEST = 2**62  # what tensors can count with


def as_integer(value: object) -> int | None:
    """A Python integer out of any kind of one (NumPy's, a tensor's), or None for what is none."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_plain(name: str, value: object) -> object:
    """A setting as JSON holds it, out of NumPy's or PyTorch's numbers too.

    Raises:
        ValueError: for what is neither number nor text, nor a list or dictionary of such.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(name, item) for item in value]
    raise ValueError(f"`{name}` must be a number, a text, or a list or dictionary of such, got {value!r}.")


def _check_integers(name: str, values: Iterable[int]) -> tuple[int, ...]:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise ValueError(f"`{name}` must be a list of integers, got {values!r}.")
    given = list(values)
    values = [as_integer(value) for value in given]
    if not values or any(v is None or not 1 <= v <= LARGEST for v in values):
        raise ValueError(f"`{name}` must be a non-empty list of positive integers, got {given!r}.")
    if any(later < earlier for earlier, later in zip(values, values[1:])):
        raise ValueError(f"`{name}` must not decrease from one pattern to the next, got {list(values)!r}.")
    return tuple(values)


@dataclass(frozen=True)
class Heads:
    """The H query and G key/value heads of a call. Its first query head is number `first` of the layer's `total` ones,
    where it has a slice of them: the offsets follow the numbers in the layer."""

    num_heads: int
    num_kv_heads: int
    first: int = 0
    total: int | None = None

    @classmethod
    def of(cls, query, key, first: int = 0, total: int | None = None) -> "Heads":
        """Those of query [B, H, Q, D] and key [B, G, N, D]."""
        return cls(query.shape[1], key.shape[1], first, query.shape[1] if total is None else total)

    @property
    def per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def offset(self, schedule: "DilationSchedule", rate: int, j: int) -> int:
        """s of query head j of the call in a pattern of rate `rate`."""
        return schedule.offset(rate, self.first + j, self.total or self.num_heads)


@dataclass(frozen=True)
class DilationSchedule:
    r"""A list of patterns (w_i, r_i) and how they are mixed.

    Position p counts from 0 at a document's first token. In pattern i it lies in segment `p // w_i`, and head j
    *selects* it when `(p % w_i) % r_i == s_ij`. A query that a pattern selects attends there to the keys of its
    segment that its head selects too; the result is one softmax over the union of all patterns' keys. For
    `segment_lengths=[4, 8], dilation_rates=[1, 2]`, causal, head 0 (`2` = offered by both patterns):

        query 0   2 . . . . . . .
        query 1   1 1 . . . . . .
        query 2   2 1 2 . . . . .
        query 3   1 1 1 1 . . . .
        query 4   1 . 1 . 2 . . .
        query 5   . . . . 1 1 . .
        query 6   1 . 1 . 2 1 2 .
        query 7   . . . . 1 1 1 1

    Args:
        segment_lengths: w_i in tokens, not decreasing.
        dilation_rates: r_i, not decreasing, as many as segment lengths.
        is_causal: keys after the query are hidden.
        head_offsets: `"modulo"`, s_ij = j % r_i (the paper), or `"contiguous"`, s_ij = j // ceil(H / r_i)
            (torchscale's code, with which every published checkpoint was trained). j is the query head.
        overlap: `"count"`, a key that m patterns offer counts m times (the paper), or `"once"`.
        num_sink_tokens: every query also sees the document's first tokens, each counted exactly once.
        padding: `"mask"`, or `"zeros"` for checkpoints of torchscale's bidirectional encoders: there each segment is
            filled with zero keys up to min(w, N), and then up to a multiple of r, and they take part in the softmax.
        local: `"sliding"` replaces the first pattern by a causal sliding window of w_0 // 2 tokens (the query
            included), which costs as much as the segments of w_0. The first segment alone stays as it is, so that a
            text of up to w_0 tokens is read densely in either case.
        memory: blocks of earlier tokens that each query chooses to see too, a [`MemorySpec`] or its dictionary; None
            for none.

    Raises:
        ValueError: for a value that is not one of the above, or a combination that has no meaning.

    Source: LongNet (arXiv 2307.02486), equations 5 to 15; overlap "once", sinks and sliding window are ours.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    is_causal: bool = True
    head_offsets: str = "modulo"
    overlap: str = "count"
    num_sink_tokens: int = 0
    padding: str = "mask"
    local: str = "segment"
    memory: MemorySpec | None = None

    def __post_init__(self):
        object.__setattr__(self, "segment_lengths", _check_integers("segment_lengths", self.segment_lengths))
        object.__setattr__(self, "dilation_rates", _check_integers("dilation_rates", self.dilation_rates))
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                "`segment_lengths` and `dilation_rates` must have the same number of entries, got "
                f"{len(self.segment_lengths)} and {len(self.dilation_rates)}."
            )
        for w, r in self.patterns:
            if r > w:
                raise ValueError(f"`dilation_rates` must not exceed their segment length, got rate {r} for length {w}.")
        if not isinstance(self.is_causal, bool):
            raise ValueError(f"`is_causal` must be True or False, got {self.is_causal!r}.")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        sinks = as_integer(self.num_sink_tokens)
        if sinks is None or not 0 <= sinks <= LARGEST:
            raise ValueError(f"`num_sink_tokens` must be an integer of at least 0, got {self.num_sink_tokens!r}.")
        object.__setattr__(self, "num_sink_tokens", sinks)
        if self.padding == "zeros" and (self.is_causal or self.overlap == "once" or sinks):
            raise ValueError(
                "`padding='zeros'` reproduces bidirectional torchscale encoders: it wants is_causal=False, "
                f"overlap='count' and no sink tokens, got is_causal={self.is_causal}, overlap={self.overlap!r}, "
                f"num_sink_tokens={sinks}."
            )
        if self.local == "sliding" and not self.is_causal:
            raise ValueError("`local='sliding'` is a causal window, got is_causal=False.")
        if self.local == "sliding" and self.dilation_rates[0] != 1:
            raise ValueError(
                f"`local='sliding'` wants a first dilation rate of 1, got {self.dilation_rates[0]} in `dilation_rates`."
            )
        if self.memory is not None:
            object.__setattr__(self, "memory", MemorySpec.from_dict(self.memory))
            self._check_memory()

    def refuse_idle_memory(self) -> None:
        """Raises a ValueError for a memory of a whole model that changes nothing."""
        memory, sinks = self.memory, self.num_sink_tokens
        if memory is not None and memory.only_layers == () and not (memory.max_distance and sinks):
            raise ValueError(
                "`memory`: `heads` names none, and no sink tokens' distance is clamped, so nothing would change, got "
                f"max_distance={memory.max_distance} and num_sink_tokens={sinks}. Leave it out."
            )

    def _check_memory(self) -> None:
        if self.local != "sliding" or self.overlap != "once":
            raise ValueError(
                "`memory` wants a sliding window and keys that count once, local='sliding' and overlap='once', got "
                f"local={self.local!r}, overlap={self.overlap!r}."
            )
        if self.window < self.memory.block_size:
            raise ValueError(
                f"`memory` wants a window of at least a block, got segment_lengths[0] // 2 = {self.window} and "
                f"block_size={self.memory.block_size}."
            )
        reach = self.memory.max_distance
        if reach is not None and reach < self.segment_lengths[0]:
            raise ValueError(
                f"`memory`: `max_distance` must be at least segment_lengths[0], {self.segment_lengths[0]}, got {reach}"
                ", which for a patched model is half its native context unless `memory` tells another."
            )

    @classmethod
    def from_config(cls, config) -> "DilationSchedule":
        """The schedule in the configuration of a LongNet or of a patched model; what it does not tell is as above.

        It is built when a configuration first says so, and not by each layer that asks.

        Raises:
            ValueError: a configuration without a schedule.
        """
        if not hasattr(config, "dilated_attention") and not hasattr(config, "segment_lengths"):
            config = text_config_of(config)
        settings = getattr(config, "dilated_attention", None)
        if settings is None:
            settings = {name: x for name in _FIELDS if (x := getattr(config, name, MISSING)) is not MISSING}
        if "segment_lengths" not in settings:
            raise ValueError(
                "`config` must be that of a LongNet or of a patched model, got "
                f"{type(config).__name__} without a schedule."
            )
        settings = {name: settings[name] for name in _FIELDS if name in settings}
        if torch.compiler.is_compiling():  # a traced program looks behind what keeps results
            return cls(**settings)
        try:
            return cls._from_json(json.dumps(settings))
        except TypeError:  # no plain numbers, NumPy's for instance
            return cls(**settings)

    @staticmethod
    @lru_cache(maxsize=64)
    def _from_json(settings: str) -> "DilationSchedule":
        return DilationSchedule(**json.loads(settings))

    def to_text(self) -> str:
        """The schedule without its memory, as registered operators take it, which take no Python objects."""
        lists = (",".join([str(x) for x in values]) for values in (self.segment_lengths, self.dilation_rates))
        flags = (self.head_offsets, self.overlap, self.padding, self.local)
        return ";".join([*lists, str(int(self.is_causal)), str(self.num_sink_tokens), *flags])

    @staticmethod
    @lru_cache(maxsize=64)
    def from_text(text: str) -> "DilationSchedule":
        """What `to_text` wrote."""
        lengths, rates, is_causal, sinks, head_offsets, overlap, padding, local = text.split(";")
        lengths, rates = ([int(x) for x in values.split(",")] for values in (lengths, rates))
        return DilationSchedule(lengths, rates, is_causal == "1", head_offsets, overlap, int(sinks), padding, local)

    @property
    def patterns(self) -> tuple[tuple[int, int], ...]:
        """The pairs (w_i, r_i)."""
        return tuple(zip(self.segment_lengths, self.dilation_rates))

    @property
    def dilated_patterns(self) -> tuple[tuple[int, int, int], ...]:
        """(i, w_i, r_i) of all patterns but the one that a sliding window replaces."""
        return tuple((i, w, r) for i, (w, r) in enumerate(self.patterns) if i or not self.window)

    def as_arguments(self) -> dict:
        """The keyword arguments of `dilated_attention` that say the same, as JSON holds them."""
        arguments = {name: getattr(self, name) for name in _FIELDS if name != "memory" or self.memory is not None}
        arguments |= {"segment_lengths": [*self.segment_lengths], "dilation_rates": [*self.dilation_rates]}
        return arguments if self.memory is None else arguments | {"memory": self.memory.to_dict()}

    def of_layer(self, layer_idx: int) -> "DilationSchedule":
        """The schedule of a layer: this one, with what it needs of the memory, or without where it needs none."""
        if self.memory is None or (self.memory.heads is None and self.memory.reads_in(layer_idx)):
            return self
        memory = self.memory.of_layer(layer_idx)
        is_idle = memory is not None and memory.only_heads == () and not self.num_sink_tokens  # nothing to clamp
        return replace(self, memory=None if is_idle else memory)

    @property
    def dense_start(self) -> int:
        """Positions below this see all before them under `local="sliding"`: w_0, or 0 when there is no window."""
        return self.segment_lengths[0] if self.local == "sliding" else 0

    @property
    def window(self) -> int:
        """Tokens of the sliding window, the query included; 0 when the first pattern is an ordinary one."""
        return max(1, self.segment_lengths[0] // 2) if self.local == "sliding" else 0

    def local_start(self, position):
        """The first key of the window as a memory extends it, of a position (an integer or an integer tensor)."""
        return self.memory.local_start(position, self.window, self.dense_start)

    def offset(self, rate: int, head: int, num_heads: int) -> int:
        """s of query head `head` out of `num_heads` in a pattern of rate `rate`."""
        return head % rate if self.head_offsets == "modulo" else head // -(-num_heads // rate)

    def unread_offsets(self, num_heads: int) -> dict[int, range]:
        """Per rate, the offsets that no head has: the positions that pattern never reads. They are its last ones."""
        distinct = {r: min(num_heads, r) if self.head_offsets == "modulo" else num_heads for r in self.dilation_rates}
        first = {rate: self.offset(rate, count - 1, num_heads) + 1 for rate, count in distinct.items()}
        return {rate: range(start, rate) for rate, start in first.items() if start < rate}

    @property
    def selects_every_query(self) -> bool:
        """Whether each query sees at least itself, whatever its position and head."""
        return self.dilation_rates[0] == 1 or self.num_sink_tokens > 0


_FIELDS = tuple(field.name for field in fields(DilationSchedule))
