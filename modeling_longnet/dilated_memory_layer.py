"""A layer of a bounded cache that is not bounded: a layer with a memory keeps every token, for any may be asked for.

Keys and values lie in the order of their positions, an index of their blocks beside them; both only grow. So whatever
reads them - a chunk, a decoding step - sees what a full forward sees, and chooses the same blocks.

Letters: B batch, H query heads, G key/value heads, Q query tokens, D head dimension, n blocks, d dimensions ranked in.
"""

from collections.abc import Callable

import torch

from .attention_kernels import choose_backend
from .dilated_cache_layer import DilatedLayer, Step
from .dilation_schedule import Heads
from .memory_attention import MemoryCall, attend_memory, choose
from .memory_positions import anchor
from .memory_search import Ranking
from .memory_step import attend_step


ROOM_STEP = 256  # tokens


class MemoryLayer(DilatedLayer):
    """`keys` and `values` [B, G, tokens and room for more, D], `index` [B, G, n, 2 d] of the whole blocks among them,
    and `far_index`, the same for blocks at a clamped distance."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_compileable = False
        self.ranking: Ranking | None = None
        self.position_ids: torch.Tensor | None = None  # of the new tokens, [B, Q]; whoever attends may tell them before
        self.index = self.far_index = None

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor, heads: Heads | None = None
    ) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, len(key_states)
        self.heads = heads or self.heads_of(key_states)
        self.keys, self.values = (x.new_zeros(*x.shape[:2], 0, x.shape[-1]) for x in (key_states, value_states))
        self.is_initialized = True

    def grow(self, max_length: int) -> None:
        """The other layers need slots before tokens come; this one makes its own room."""
        self.max_length = max_length if max_length < max(self.schedule.segment_lengths) else None

    def _decode(self, step: Step, query, key, value, scale) -> torch.Tensor:
        if step.is_padded or len(self.schedule.patterns) > 1:
            return self._attend_chunk(step, query, key, value, scale, None)
        self._prepare(step)
        query, key = self._anchor(step, query, key)
        if len(set(step.news[0])) == 1:
            self._append(slice(None), step.news[0][0], key, value)
        else:
            for row, first in enumerate(step.news[0]):
                own = slice(row, row + 1)
                self._append(own, first, key[own], value[own])
        position = step.first.to(query.device)
        indices = self.index, self.far_index
        return attend_step(self.ranking, query, self.keys, self.values, *indices, position, scale)

    def _prepare(self, step: Step) -> None:
        if torch.compiler.is_compiling():
            raise ValueError("`memory` does not run under `torch.compile` yet: its choice depends on values.")
        if self.ranking is None:
            self.ranking = Ranking(self.schedule)
        if step.news is None:
            step.news = step.first.tolist(), step.new_pads.tolist()

    def _attend_chunk(self, step: Step, query, key, value, scale, backend) -> torch.Tensor:
        self._prepare(step)
        query, key = self._anchor(step, query, key)
        columns, places = query.shape[2], list(zip(*step.news))
        alike = len(set(places)) == 1
        rows = [(slice(None), *places[0])] if alike else [(slice(i, i + 1), *p) for i, p in enumerate(places)]
        wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        outs = []
        for row, first, pad in rows:
            pad = min(pad, columns)
            self._append(row, first, key[row, :, pad:], value[row, :, pad:])
            if pad == columns:
                outs.append(torch.zeros_like(query[row]))
                continue
            past = [x[row, :, : first + columns - pad] for x in (self.keys, self.values)]
            if wants_grad:  # gradients reach the new tokens; what came before is state
                past = [torch.cat([x[:, :, :first], y[row, :, pad:]], 2) for x, y in zip(past, (key, value))]
            call = MemoryCall(self.ranking, first, self.heads, scale, choose_backend(backend, query, 0.0))
            own = query[row, :, pad:]
            indices = (x if x is None else x[row] for x in (self.index, self.far_index))
            out, _ = attend_memory(call, own, *past, choose(call, own, past[0], *indices))
            outs.append(torch.nn.functional.pad(out, (0, 0, pad, 0)))
        return outs[0] if alike else torch.cat(outs)

    def _anchor(self, step: Step, query, key) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys whose angles count from each row's first token."""
        if self.position_ids is None:
            return query, key
        last = self.position_ids.expand(len(query), -1)[:, -1]
        self.position_ids = None
        offset = last - (step.first + query.shape[2] - 1 - step.new_pads).to(last.device)
        return anchor(query, key, offset.masked_fill(step.new_pads >= query.shape[2], 0), self.ranking.inv_freq)

    @torch.no_grad()
    def _append(self, row: slice, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps new tokens [b, G, T, D] of a row, or of all rows, from position `first` on; indexes what is whole."""
        size, end = self.schedule.memory.block_size, first + key.shape[2]
        if end > self.keys.shape[2]:
            room = -(-max(end, self.keys.shape[2] * 3 // 2) // ROOM_STEP) * ROOM_STEP - self.keys.shape[2]
            self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, room)) for x in (self.keys, self.values))
        self.keys[row, :, first:end] = key
        self.values[row, :, first:end] = value
        begin, stop = first // size, end // size
        if begin < stop:
            whole = self.keys[row, :, begin * size : stop * size]
            self.index = self._fill(self.index, row, begin, self.ranking.index(whole, begin))
            if self.schedule.memory.max_distance is not None:
                self.far_index = self._fill(self.far_index, row, begin, self.ranking.far_index(whole, begin))

    def _fill(self, index: torch.Tensor | None, row: slice, begin: int, new: torch.Tensor) -> torch.Tensor:
        room = self.keys.shape[2] // self.schedule.memory.block_size
        if index is None:
            index = new.new_zeros(self.batch_size, self.heads.num_kv_heads, room, new.shape[-1])
        elif index.shape[2] < room:
            index = torch.nn.functional.pad(index, (0, 0, 0, room - index.shape[2]))
        index[row, :, begin : begin + new.shape[2]] = new
        return index

    def keep_recorded(self, columns: int, origins: torch.Tensor, pads: torch.Tensor) -> None:
        """Nothing waits: what is forgotten is overwritten by what comes next."""

    def stored(self) -> dict[str, torch.Tensor]:
        tensors = {"keys": self.keys, "values": self.values, "index": self.index, "far_index": self.far_index}
        return {name: x for name, x in tensors.items() if x is not None}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.keys, self.values = tensors["keys"], tensors["values"]
        self.index, self.far_index = tensors.get("index"), tensors.get("far_index")

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.restore({name: function(x) for name, x in self.stored().items()})
            self.batch_size = len(self.keys)

    def reset(self) -> None:
        self.awaited = False
        if self.is_initialized:
            self.keys, self.values, self.index, self.far_index = self.keys[:, :, :0], self.values[:, :, :0], None, None
