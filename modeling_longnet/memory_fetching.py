"""Keys and values out of a store for an attention: all of them, or what a plan's blocks show and a choice asks for.

Letters: B batch, G key/value heads, M keys that are fetched, m blocks of b tokens, D head dimension.
"""

from collections.abc import Iterable

import torch

from .attention_blocks import block_positions
from .dilation_plan import Block, Rows
from .memory_split import SplitStore, Store, span_or_zeros
from .memory_store import Pair, TensorStore


def all_before(store: Store, row: slice, end: int) -> Pair:
    """Keys and values of all tokens before `end`; zeros where they were forgotten, which no query reads."""
    return span_or_zeros(store, row, 0, end) if isinstance(store, TensorStore) else store.span(row, 0, end)


class StoredKeys:
    """What a plan's blocks show of a store's rows alike, fetched: `key` and `value` [B, G, M, D], in the order that
    `locate` tells (see `VisibleKeys`); and the blocks that are chosen, as they are asked for.

    Args:
        recent: the first position from which on all keys lie in `key`, up to `end`; behind them what else is shown.
        reads: tokens that are chosen, at most, by all queries.
    """

    def __init__(self, store: Store, row: slice, blocks: Iterable[Block], recent: int, end: int, reads: int):
        self.store, self.row, self.first, self.end, self.reads = store, row, max(0, recent), end, reads
        pairs, length = [store.span(row, self.first, end)], end - self.first
        self.places: dict[int, torch.Tensor] = {}
        for block in blocks:
            if block.region.kind != "zeros" and block.region.keys.start < self.first:
                position = block_positions(block.region.keys, block, store.shape.device)
                begin = int(position.min())
                pair = store.span(row, begin, int(position.max()) + 1)
                pairs.append(tuple(x.index_select(2, position - begin) for x in pair))
                self.places[id(block)] = torch.arange(length, length + len(position), device=position.device)
                length += len(position)
        self._shown = blocks  # that their ids stay theirs
        self.key, self.value = pairs[0] if len(pairs) == 1 else (torch.cat(x, dim=2) for x in zip(*pairs))

    def locate(self, block: Block) -> Rows | torch.Tensor:
        """Where a block's keys lie in `key`."""
        place = self.places.get(id(block))
        return block.region.keys.shift(-self.first) if place is None else place

    def head(self, row: int, group: int) -> Pair | None:
        """All blocks [n, b, D] of a head in place, where they can be had so and more tokens are read than there are."""
        if self.reads < self.end or not isinstance(self.store, SplitStore):
            return None
        return self.store.head((self.row.start or 0) + row, group, self.end)

    def blocks(self, row: int, group: int, numbers: torch.Tensor) -> Pair:
        return self.store.blocks((self.row.start or 0) + row, group, numbers)
