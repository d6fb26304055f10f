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

from collections.abc import Sequence
from dataclasses import dataclass, fields


RANKS = ("mean+bound", "mean", "bound")


def _check_count(name: str, value: object, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        wanted = "None or an integer of at least 1" if optional else "an integer of at least 1"
        raise ValueError(f"`memory`: `{name}` must be {wanted}, got {value!r}.")


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
            layers = self.layers
            is_list = isinstance(layers, Sequence) and not isinstance(layers, str)
            if not is_list or not layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers):
                raise ValueError(f"`memory`: `layers` must be None or a list of layer indices, got {layers!r}.")
            object.__setattr__(self, "layers", tuple(sorted(set(layers))))

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
        return settings | {"layers": None if self.layers is None else list(self.layers)}

    def reads_in(self, layer_idx: int) -> bool:
        """Whether the layer has a memory."""
        return self.layers is None or layer_idx in self.layers

    def local_start(self, position, window: int, dense_start: int):
        """a(t) above, of an integer or an integer tensor of positions."""
        if isinstance(position, int):
            return 0 if position < dense_start else max(0, position - window + 1) // self.block_size * self.block_size
        start = (position - window + 1).clamp(min=0) // self.block_size * self.block_size
        return start.masked_fill(position < dense_start, 0)


_FIELDS = tuple(field.name for field in fields(MemorySpec))
