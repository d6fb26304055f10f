"""What a memory is: blocks of earlier tokens that each query chooses to read beside what its schedule shows it.

Position p of a document lies in block p // block_size. A query t sees its schedule's keys: sinks, a sliding window of W
tokens, dilated rows. The window reaches on to the beginning of a block, so that no key lies between it and the blocks:

    local start   a(t) = block_size * floor((t - W + 1) / block_size), or 0 while t lies in the dense start

Blocks that end before a(t), and are more than sink tokens, are *eligible*; the query, of one head, reads the `top_k`
of highest rank. With block_size = 4, W = 4 and one sink, query 22 (S sink, the number of a block that may be chosen,
L local):

    key     0123 4567 8901 2345 6789 012
            S000 1111 2222 3333 44LL LLL           keys 16 to 18 are local though the window begins at 19

so that queries see each key once, all of them if there are no more than top_k blocks, and the choice of a token never
depends on how a text was cut into calls. Nothing here has weights, and the choice has no gradient.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral


RANKS = ("mean+bound", "mean", "bound")


def _check_count(name: str, value: object, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        wanted = "None or an integer of at least 1" if optional else "an integer of at least 1"
        raise ValueError(f"`memory`: `{name}` must be {wanted}, got {value!r}.")


def _is_indices(value: object, least: int = 1) -> bool:
    """Whether it is a list of at least so many indices, those of NumPy too."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) >= least
    return is_list and not any(isinstance(i, bool) or not isinstance(i, Integral) or i < 0 for i in value)


def _sorted(indices: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({int(i) for i in indices}))


def _heads_by_layer(heads: object) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Pairs (layer, key/value heads), rising, of a dictionary or of such pairs."""
    pairs = list(heads.items()) if isinstance(heads, Mapping) else heads
    try:
        found = {int(layer) if isinstance(layer, str) else layer: own for layer, own in pairs}
        is_right = len(found) == len(pairs) and all(_is_indices(x, 0) for x in ([*found], *found.values()))
    except (TypeError, ValueError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"`memory`: `heads` must be None or lists of key/value heads by layer, such as {{7: [2], 18: [0, 2]}}, got "
            f"{heads!r}."
        )
    return tuple(sorted((int(layer), _sorted(own)) for layer, own in found.items()))


@dataclass(frozen=True)
class MemorySpec:
    """How blocks are cut, ranked and read.

    Args:
        block_size: tokens of a block.
        top_k: blocks that a query of one head reads.
        rank: of a block for a query: `"mean"`, the query times the mean of the block's keys; `"bound"`, the largest
            product that a key within the block's bounds could have, sum over c of max(q_c min_c, q_c max_c) (Quest);
            `"mean+bound"`, their sum. The newer of two equal blocks goes first.
        layers: indices of the layers that have a memory; None for all that are dilated.
        heads: the key/value heads that have one, by layer, `{7: [2], 18: [0, 2]}`, instead of `layers`: the query heads
            that read these choose blocks, all others see what the schedule shows, and with `max_distance` sink tokens
            at a clamped distance, in every layer (which then keeps its tokens). A model finds by a part of its heads;
            `find_memory_heads` tells which. None for all heads. In JSON layers are strings.
        dimensions: rank in so many calibrated dimensions of a head (`calibrate_memory`), which is cheaper and finds
            less in prose (docs/memory_study.md); None for all.
        max_distance: blocks that begin further back are read as if they began that many tokens before the query, and so
            are sink tokens: no rotary angle leaves the range a model was trained on. None for true distances.

    Raises:
        ValueError: for a value that is not one of the above.

    Source: block choice as in MoBA (arXiv 2502.13189, q times mean key) and Quest (arXiv 2406.10774, section 3, the
    bound); the sum of both, the joint softmax with a schedule and the clamped distance are ours.
    """

    block_size: int = 4
    top_k: int = 64
    rank: str = "mean+bound"
    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    dimensions: int | None = None
    max_distance: int | None = None

    def __post_init__(self):
        _check_count("block_size", self.block_size)
        _check_count("top_k", self.top_k)
        _check_count("dimensions", self.dimensions, optional=True)
        _check_count("max_distance", self.max_distance, optional=True)
        if self.rank not in RANKS:
            raise ValueError(f"`memory`: `rank` must be one of {', '.join(map(repr, RANKS))}, got {self.rank!r}.")
        if self.layers is not None:
            if not _is_indices(self.layers):
                raise ValueError(f"`memory`: `layers` must be None or a list of layer indices, got {self.layers!r}.")
            object.__setattr__(self, "layers", _sorted(self.layers))
        if self.heads is not None:
            if self.layers is not None:
                raise ValueError("`memory`: `layers` and `heads` both tell which layers have a memory, got both.")
            object.__setattr__(self, "heads", _heads_by_layer(self.heads))

    @classmethod
    def from_dict(cls, settings: "dict | MemorySpec") -> "MemorySpec":
        """The memory that a configuration's plain dictionary tells; what it leaves out is as by default.

        Raises:
            ValueError: no dictionary, a name that is not a setting, or a wrong value.
        """
        if isinstance(settings, cls):
            return settings
        if not isinstance(settings, dict) or not set(settings) <= set(_FIELDS):
            raise ValueError(f"`memory` must be a dictionary with some of {', '.join(_FIELDS)}, got {settings!r}.")
        return cls(**settings)

    def to_dict(self) -> dict:
        """Plain JSON, of which `from_dict` makes the same memory."""
        settings = {name: getattr(self, name) for name in _FIELDS}
        settings["layers"] = None if self.layers is None else list(self.layers)
        if self.heads is None:
            del settings["heads"]  # as configurations were before there were any
        else:
            settings["heads"] = {str(layer): list(own) for layer, own in self.heads}
        return settings

    @property
    def only_layers(self) -> tuple[int, ...] | None:
        """Indices of the layers that have a memory, None for all."""
        return self.layers if self.heads is None else tuple(layer for layer, own in self.heads if own)

    @property
    def only_heads(self) -> tuple[int, ...] | None:
        """In the memory of one layer: the key/value heads that have it, None for all.

        Raises:
            ValueError: the heads of several layers.
        """
        if self.heads is None:
            return None
        if len(self.heads) > 1:
            raise ValueError(f"`memory`: one attention wants the `heads` of one layer, got {self.only_layers}.")
        return self.heads[0][1]

    @property
    def num_heads(self) -> int | None:
        """How many key/value heads of one layer have it, None for all."""
        return None if self.only_heads is None else len(self.only_heads)

    def reads_in(self, layer_idx: int) -> bool:
        """Whether the layer's attention is not the schedule's alone: it has a memory, or clamps its sinks' distance."""
        clamps = self.heads is not None and self.max_distance is not None
        return clamps or self.only_layers is None or layer_idx in self.only_layers

    def of_layer(self, layer_idx: int) -> "MemorySpec | None":
        """What one layer needs of it, None for nothing."""
        if not self.reads_in(layer_idx):
            return None
        return self if self.heads is None else replace(self, heads={layer_idx: dict(self.heads).get(layer_idx, ())})

    def local_start(self, position, window: int, dense_start: int):
        """a(t) above, of an integer or an integer tensor of positions."""
        if isinstance(position, int):
            return 0 if position < dense_start else max(0, position - window + 1) // self.block_size * self.block_size
        start = (position - window + 1).clamp(min=0) // self.block_size * self.block_size
        return start.masked_fill(position < dense_start, 0)


_FIELDS = tuple(field.name for field in fields(MemorySpec))
