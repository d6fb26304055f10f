"""A layer of a bounded cache that is not bounded: a layer with a memory keeps every token, for any may be asked for.

Keys and values lie in the order of their positions, an index of their blocks beside them; both only grow, in a store
(memory_store.py). So whatever reads them - a chunk, a decoding step - sees what a full forward sees, and chooses the
same blocks.

Letters: B batch, H query heads, G key/value heads, Q query tokens, D head dimension, n blocks, d dimensions ranked in.
"""

from collections.abc import Callable

import torch

from .attention_kernels import choose_backend, own_precision
from .dilated_cache_layer import DilatedLayer, Step
from .dilation_schedule import Heads
from .memory_attention import MemoryCall, attend_memory, attend_stored, choose_indexed
from .memory_fetching import all_before
from .memory_pages import StoreFolder
from .memory_positions import anchor
from .memory_search import Ranking, outside_graphs
from .memory_split import SplitStore, Store
from .memory_step import attend_step
from .memory_store import Shape, TensorStore, make_store


class MemoryLayer(DilatedLayer):
    """`store` holds what was read: "device", "cpu" or "disk" by `kind`, the last in a `folder`."""

    def __init__(self, *args, kind: str = "device", folder: StoreFolder | None = None):
        super().__init__(*args)
        self.is_compileable = False
        self.kind, self.folder = kind, folder
        self.store: Store | None = None
        self.ranking: Ranking | None = None
        self.position_ids: torch.Tensor | None = None  # of the new tokens, [B, Q]; whoever attends may tell them before
        self.watch: Callable[..., None] | None = None  # is told of each choice: (call, query, index, far_index)
        self.reach: int | None = None  # tokens before a chunk among which it chooses; None for all

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor, heads: Heads | None = None
    ) -> None:
        (batch, groups, _, width), memory = key_states.shape, self.schedule.memory
        self.heads = heads or self.heads_of(groups)
        kind = key_states.dtype, key_states.device
        shape = Shape(batch, groups, width, *kind, memory.block_size, memory.num_heads)
        if self.kind == "disk" or memory.num_heads in (None, 0, groups):
            self.begin_with(make_store(self.kind, shape, self.folder, self.layer_idx))
        else:
            self.begin_with(SplitStore(shape, memory.only_heads, self.kind == "device"))

    def begin_with(self, store: Store) -> None:
        """Goes on with what a store holds."""
        self.store, shape = store, store.shape
        self.dtype, self.device, self.batch_size = shape.dtype, shape.device, shape.batch
        self.heads = self.heads or self.heads_of(shape.groups)
        self.is_initialized = True

    @property
    def searches(self) -> bool:
        """Whether any head has a memory."""
        return self.schedule.memory.num_heads != 0

    @outside_graphs
    def attend(self, step: Step, query, key, value, scale: float, backend: str | None) -> torch.Tensor:
        with own_precision(query):
            out = super().attend(step, query, key, value, scale, backend)
        self.let_go(min(step.news[0]))
        return out

    def let_go(self, first: int) -> None:
        """Of heads without a memory, queries from `first` on read sinks, the window, and the segments that `first` lies
        in. The other tokens are forgotten once they are as many as the window; none while tokens may be cropped, or
        that gradients may want."""
        schedule, size = self.schedule, self.schedule.memory.block_size
        begins = (first // w * w for _, w, _ in schedule.dilated_patterns)
        end = (min(begins, default=first) - schedule.window) // size * size
        may_forget = isinstance(self.store, SplitStore) or isinstance(self.store, TensorStore) and not self.searches
        if not may_forget or self.record_past or torch.is_grad_enabled() or first < schedule.dense_start:
            return
        if end >= max(schedule.num_sink_tokens, self.store.sinks + self.store.forgotten) + schedule.window:
            self.store.forget(schedule.num_sink_tokens, end)

    def _decode(self, step: Step, query, key, value, scale) -> torch.Tensor:
        if step.is_padded or len(self.schedule.patterns) > 1 or not self.store.is_joint or self.reach is not None:
            return self._attend_chunk(step, query, key, value, scale, None)
        self._prepare()
        query, key = self._anchor(step, query, key)
        if len(set(step.news[0])) == 1:
            self.append(slice(None), step.news[0][0], key, value)
        else:
            for row, first in enumerate(step.news[0]):
                own = slice(row, row + 1)
                self.append(own, first, key[own], value[own])
        position = step.first.to(query.device)
        indices = (self.store.ranked(name, slice(None)) for name in ("index", "far"))
        return attend_step(self.ranking, query, self.store, self.heads.num_kv_heads, *indices, position, scale)

    def _prepare(self) -> None:
        if self.ranking is None:
            self.ranking = Ranking(self.schedule)

    def _attend_chunk(self, step: Step, query, key, value, scale, backend) -> torch.Tensor:
        self._prepare()
        query, key = self._anchor(step, query, key)
        columns, places = query.shape[2], list(zip(*step.news))
        alike = len(set(places)) == 1 and (self.store.is_joint or len(places) == 1)
        rows = [(slice(None), *places[0])] if alike else [(slice(i, i + 1), *p) for i, p in enumerate(places)]
        wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        outs = []
        for row, first, pad in rows:
            pad = min(pad, columns)
            self.append(row, first, key[row, :, pad:], value[row, :, pad:])
            if pad == columns:
                outs.append(torch.zeros_like(query[row]))
                continue
            call = MemoryCall(self.ranking, first, self.heads, scale, choose_backend(backend, query, 0.0))
            new = key[row, :, pad:], value[row, :, pad:]
            out = self._attend_rows(call, row, query[row, :, pad:], *new, wants_grad)
            outs.append(torch.nn.functional.pad(out, (0, 0, pad, 0)))
        return outs[0] if alike else torch.cat(outs)

    def _attend_rows(self, call: MemoryCall, row: slice, query, key, value, wants_grad: bool) -> torch.Tensor:
        """Rows alike, of which the store holds the new tokens [b, G, Q, D] already."""
        indices = [self.store.ranked(name, row) for name in ("index", "far")]
        if self.watch is not None:
            self.watch(call, query, *indices)
        oldest = 0 if self.reach is None else max(0, call.start - self.reach) // self.schedule.memory.block_size
        chosen = choose_indexed(call, query, *indices, oldest)
        end = call.start + query.shape[2]
        past = self.store.whole(row, end)
        if not wants_grad and (past is None or call.most_reads(query.shape[2]) < end):
            return attend_stored(call, query, self.store, row, chosen)
        past = all_before(self.store, row, end) if past is None else past
        if wants_grad:  # gradients reach the new tokens; what came before is state
            past = [torch.cat([x[:, :, : call.start], y], 2) for x, y in zip(past, (key, value))]
        return attend_memory(call, query, *past, chosen)[0]

    def _anchor(self, step: Step, query, key) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys whose angles count from each row's first token."""
        if self.position_ids is None:
            return query, key
        last = self.position_ids.expand(len(query), -1)[:, -1]
        self.position_ids = None
        offset = last - (step.first + query.shape[2] - 1 - step.new_pads).to(last.device)
        return anchor(query, key, offset.masked_fill(step.new_pads >= query.shape[2], 0), self.ranking.inv_freq)

    @torch.no_grad()
    def append(self, row: slice, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps new tokens [b, G, T, D] of a row, or of all rows, from position `first` on; indexes what is whole."""
        size, end = self.schedule.memory.block_size, first + key.shape[2]
        self.store.write(row, first, key, value)
        begin, stop = first // size, end // size
        if begin < stop and self.searches:
            whole = self.store.span(row, begin * size, stop * size)[0]
            self.store.write_index("index", row, begin, self.ranking.index(whole, begin))
            if self.schedule.memory.max_distance is not None:
                self.store.write_index("far", row, begin, self.ranking.far_index(whole, begin))

    def keep_recorded(self, columns: int, origins: torch.Tensor, pads: torch.Tensor) -> None:
        """Nothing waits: what is forgotten is overwritten by what comes next."""

    def stored(self) -> dict[str, torch.Tensor]:
        return self.store.stored()

    def bytes(self) -> dict[str, int]:
        return self.store.bytes()

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.store.restore(tensors)

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.store.map_batch(function)
            self.batch_size = self.store.shape.batch

    def reset(self) -> None:
        self.awaited = False
        if self.is_initialized:
            self.store.reset()
