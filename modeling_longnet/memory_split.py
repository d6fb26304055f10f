"""Where a layer keeps what it has read if a part of its heads has a memory: these keep all, the others what they see.

Letters: B batch, G key/value heads, g of them that have a memory, T new tokens, n blocks of b tokens, D head dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .memory_store import BankedStore, FileStore, Pair, Shape, TensorStore, whole_blocks


def span_or_zeros(store: TensorStore, row: slice, begin: int, end: int) -> Pair:
    """Keys and values of the tokens `begin`, ..., end - 1; zeros where they were forgotten, which no query reads."""
    low, high = store.sinks, store.sinks + store.forgotten
    if not store.forgotten or end <= low or begin >= high:
        return store.span(row, begin, end)
    before, behind = store.span(row, begin, max(begin, low)), store.span(row, high, max(high, end))
    gone = before[0].new_zeros(*before[0].shape[:2], min(end, high) - max(begin, low), before[0].shape[-1])
    return tuple(torch.cat([x, gone, y], dim=2) for x, y in zip(before, behind))


class SplitStore:
    """`own`: all tokens of the heads that have a memory, and the index of their blocks. `rest`: the other heads', which
    forgets; what it has forgotten reads as zeros."""

    is_joint = True

    def __init__(self, shape: Shape, heads: Sequence[int], on_device: bool):
        self.shape, self.heads = shape, list(heads)
        self.others = [group for group in range(shape.groups) if group not in self.heads]
        self.own = TensorStore(replace(shape, groups=len(self.heads), indexed=None), on_device)
        self.rest = TensorStore(replace(shape, groups=len(self.others), indexed=0), on_device)

    def _joined(self, own: Pair, rest: Pair) -> Pair:
        """[B, G, ...] out of [B, g, ...] and [B, G - g, ...]."""
        pairs = []
        for x, y in zip(own, rest):
            joined = x.new_empty(len(x), self.shape.groups, *x.shape[2:])
            joined[:, self.heads], joined[:, self.others] = x, y
            pairs.append(joined)
        return tuple(pairs)

    def write(self, row: slice, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.own.write(row, first, key[:, self.heads], value[:, self.heads])
        self.rest.write(row, first, key[:, self.others], value[:, self.others])

    def write_index(self, name: str, row: slice, first: int, new: torch.Tensor) -> None:
        self.own.write_index(name, row, first, new)

    def ranked(self, name: str, row: slice) -> tuple[torch.Tensor, ...]:
        return self.own.ranked(name, row)

    def whole(self, row: slice, end: int) -> None:
        return None

    def head(self, row: int, group: int, end: int) -> Pair | None:
        """The whole blocks [n, b, D] of the first `end` tokens of a head with a memory, if they are on the device."""
        pair = self.own.whole(slice(row, row + 1), end)
        return pair and tuple(whole_blocks(x, 0, self.heads.index(group), self.shape.size) for x in pair)

    def span(self, row: slice, begin: int, end: int) -> Pair:
        return self._joined(self.own.span(row, begin, end), span_or_zeros(self.rest, row, begin, end))

    def gather(self, tokens: torch.Tensor, heads: Sequence[int] | None = None) -> Pair:
        """As of other stores; `heads` are those that have a memory."""
        if heads is not None:
            assert list(heads) == self.heads
            return self.own.gather(tokens)
        return self._joined(self.own.gather(tokens[:, self.heads]), self.rest.gather(tokens[:, self.others]))

    def blocks(self, row: int, group: int, numbers: torch.Tensor) -> Pair:
        return self.own.blocks(row, self.heads.index(group), numbers)

    @property
    def sinks(self) -> int:
        return self.rest.sinks

    @property
    def forgotten(self) -> int:
        """How many tokens of the other heads, from position `sinks` on."""
        return self.rest.forgotten

    def forget(self, sinks: int, end: int) -> None:
        self.rest.forget(sinks, end)

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.own.map_batch(function)
        self.rest.map_batch(function)
        self.shape = replace(self.shape, batch=self.own.shape.batch)

    def stored(self) -> dict[str, torch.Tensor]:
        rest = self.rest.stored()
        renamed = {f"rest_{name}": rest.pop(name) for name in ("keys", "values")}
        return self.own.stored() | renamed | rest

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        if not {"rest_keys", "rest_values"} <= set(tensors):
            raise ValueError("lacks the keys and values of the heads without a memory")
        rest = {name: tensors[f"rest_{name}"] for name in ("keys", "values")}
        self.own.restore({name: x for name, x in tensors.items() if name != "forgotten"})
        self.rest.restore(rest | {name: x for name, x in tensors.items() if name == "forgotten"})
        self.shape = replace(self.shape, batch=self.own.shape.batch)

    def reset(self) -> None:
        self.own.reset()
        self.rest.reset()

    def bytes(self) -> dict[str, int]:
        own, rest = self.own.bytes(), self.rest.bytes()
        return {place: own.get(place, 0) + rest.get(place, 0) for place in own | rest}


Store = TensorStore | SplitStore | FileStore | BankedStore
