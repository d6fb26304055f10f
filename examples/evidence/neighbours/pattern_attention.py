"""Softmax attention over the pairs of a pattern, block by block, and its cache.

Letters: B batch, H heads, N tokens, Q queries, K keys, D head dimension, E hidden size.
"""

import torch
from torch import nn

from .attention_patterns import Pattern
from .backbone import merge_heads, rotate, split_heads


def pattern_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Attention of N queries to the keys at their own and earlier positions that `pattern` shows them, [B, H, N, D].

    Time and memory grow with the candidates of the pattern, not with N^2.
    """
    outputs, length = [], query.shape[2]
    for start in range(0, length, pattern.query_block):
        stop = min(start + pattern.query_block, length)
        keys = pattern.candidates(start, stop).to(query.device)
        mask = pattern.visible(torch.arange(start, stop, device=query.device), keys)
        contiguous = int(keys[-1]) - int(keys[0]) + 1 == len(keys)  # a view then, without a copy
        chosen = slice(int(keys[0]), int(keys[-1]) + 1) if contiguous else keys
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, chosen], value[:, :, chosen], attn_mask=mask
            )
        )
    return torch.cat(outputs, 2)


class KeyValueStore:
    """Keys, values and the like [B, H, K, ...] with their positions [K]; appending copies nothing most of the time.

    `state_bytes` counts the rows in use, not the room kept for the next ones.
    """

    def __init__(self, **rows: torch.Tensor):
        self._rows, self.length = rows, len(rows["positions"])

    def __getitem__(self, name: str) -> torch.Tensor:
        rows = self._rows[name]
        return rows.narrow(self._axis(rows), 0, self.length)

    @staticmethod
    def _axis(rows: torch.Tensor) -> int:
        return 0 if rows.dim() == 1 else 2

    def append(self, **new: torch.Tensor) -> None:
        count = len(new["positions"])
        for name, rows in new.items():
            kept, axis = self._rows[name], self._axis(rows)
            missing = self.length + count - kept.shape[axis]
            if missing > 0:
                shape = list(kept.shape)
                shape[axis] = max(missing, self.length // 2, 16)
                kept = self._rows[name] = torch.cat([kept, kept.new_zeros(shape)], axis)
            kept.narrow(axis, self.length, count).copy_(rows)
        self.length += count

    def keep(self, wanted: torch.Tensor) -> None:
        """Drops the rows that are not wanted, [K]."""
        index = wanted.nonzero()[:, 0]
        self._rows = {name: self[name].index_select(self._axis(rows), index) for name, rows in self._rows.items()}
        self.length = len(index)

    @property
    def state_bytes(self) -> int:
        return sum(self[name].nbytes for name in self._rows)


class PatternAttention(nn.Module):
    """Multi-head attention with rotary positions over a pattern; a mixer."""

    def __init__(self, hidden_size: int, num_heads: int, pattern: Pattern):
        super().__init__()
        self.num_heads, self.pattern = num_heads, pattern
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states, state=None):
        start = 0 if state is None else state["tokens"]
        positions = torch.arange(start, start + hidden_states.shape[1], device=hidden_states.device)
        query, key, value = (split_heads(t, self.num_heads) for t in self.qkv_proj(hidden_states).chunk(3, -1))
        query, key = rotate(query, positions), rotate(key, positions)
        if state is None:
            attended = self.attend_whole(query, key, value)
            store = KeyValueStore(keys=key, values=value, positions=positions)
        else:
            store = state["store"]
            store.append(keys=key, values=value, positions=positions)
            attended = self._attend(query, store, positions)
        stop = start + hidden_states.shape[1]
        if not torch.is_grad_enabled():
            self._forget(store, stop)
        return self.o_proj(merge_heads(attended)), {"tokens": stop, "store": store}

    def attend_whole(self, query, key, value):
        return pattern_attention(query, key, value, self.pattern)

    def _attend(self, query, store, positions):
        mask = self.pattern.visible(positions, store["positions"])
        read = mask.flatten(0, 1).any(0).nonzero()[:, 0]
        keys, values = store["keys"].index_select(2, read), store["values"].index_select(2, read)
        return nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask.index_select(2, read))

    def _forget(self, store, position):
        wanted = self.pattern.still_read(store["positions"], position)
        if len(wanted) - int(wanted.sum()) > self.pattern.query_block:  # not one row at a time
            store.keep(wanted)
