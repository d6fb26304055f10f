"""Where a bounded cache keeps which position, and which of its slots a query may see: pure functions of the position.

A pattern (w, r) ever needs only the rows of its current segment, so position p of offset class u lies in slot
`base + u * ceil(w / r) + (p % w) // r`, and what the next segment writes there replaces it:

    w = 8, r = 2, offset 0:   slots 0 1 2 3     after position 5:   0 2 4 .     after position 10:   8 10 4 6

A slot whose in-segment index lies beyond the query's holds an earlier segment (4 and 6 above) and is dead. No position
is ever stored.

Letters: B batch, H query heads, G key/value heads, S slots, w segment length, r dilation rate, s offset of a head, U
offset classes (distinct offsets among the query heads of one key/value head), c = ceil(w / r) rows of a class.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from .attention_blocks import block_positions
from .attention_token import Piece, join_blocks
from .dilation_plan import SINKS, Block, Rows, plan_blocks
from .dilation_schedule import DilationSchedule, Heads


NOWHERE = 2**31 - 1  # an in-segment index that no query ever reaches, and a slot that raises an error


@dataclass(frozen=True)
class PatternSlots:
    """The slots [base, base + classes * rows) of one pattern (w, r)."""

    index: int
    w: int
    r: int
    base: int
    classes: int
    rows: int


@dataclass(frozen=True)
class PatternTables:
    """Tensors on one device, of a pattern that has slots of its own.

    offsets: s of each head [H]. own_class: one-hot over the classes, bool [H, U, 1]. rows: in-segment index of each row
    of the head's own class, int32 [H, c]. class_offsets: s of each class or -1 [G, U]. class_rows: in-segment index of
    each slot, int32 [G, U * c].
    """

    slots: PatternSlots
    offsets: torch.Tensor
    own_class: torch.Tensor
    rows: torch.Tensor
    class_offsets: torch.Tensor
    class_rows: torch.Tensor


@dataclass(frozen=True)
class SlotLayout:
    """The slots of one layer: sink tokens, then a ring for the sliding window, then pattern after pattern.

    Args:
        schedule: causal.
        heads: of this layer, or of this rank's slice of it.
        max_length: no position will reach this, so longer segments need no more slots; None for no bound.
    """

    schedule: DilationSchedule
    heads: Heads
    max_length: int | None = None

    def __post_init__(self):
        if not self.schedule.is_causal:
            raise ValueError("`schedule` of a bounded cache must be causal, got is_causal=False.")

    def _offset(self, pattern: int, head: int) -> int:
        return self.heads.offset(self.schedule, self.schedule.dilation_rates[pattern], head)

    def _class(self, pattern: int, head: int, classes: int) -> int:
        """Distinct for the offsets of one key/value head, and the same for all heads of one block of the plan."""
        if self.schedule.head_offsets == "modulo":
            return head % self.heads.per_group % self.schedule.dilation_rates[pattern]
        return self._offset(pattern, head) % classes

    def _bounded(self, length: int) -> int:
        return length if self.max_length is None else min(length, self.max_length)

    @property
    def window_slots(self) -> int:
        """The window behind the dense start, and all of the start within it."""
        return self._bounded(self.schedule.dense_start)

    @cached_property
    def patterns(self) -> tuple[PatternSlots, ...]:
        per_group = self.heads.per_group
        base = self.schedule.num_sink_tokens + self.window_slots
        slots = []
        for i in range(bool(self.schedule.window), len(self.schedule.patterns)):
            w, r = self.schedule.patterns[i]
            groups = [range(g * per_group, (g + 1) * per_group) for g in range(self.heads.num_kv_heads)]
            classes = max(len({self._offset(i, j) for j in group}) for group in groups)
            slots.append(PatternSlots(i, w, r, base, classes, -(-self._bounded(w) // r)))
            base += classes * slots[-1].rows
        return tuple(slots)

    @cached_property
    def size(self) -> int:
        """Slots that can be live."""
        last = self.patterns[-1] if self.patterns else None
        return last.base + last.classes * last.rows if last else self.schedule.num_sink_tokens + self.window_slots

    @property
    def allocated(self) -> int:
        """`size` and at least one more, where rows go that nobody keeps; a multiple of 8, as fused kernels want it."""
        return self.size // 8 * 8 + 8

    def tables(self, device: torch.device) -> tuple[PatternTables, ...]:
        # What is made while a program is traced must not be found by others.
        return (_tables.__wrapped__ if torch.compiler.is_compiling() else _tables)(self, device)

    def live(self, positions: torch.Tensor, tables: tuple[PatternTables, ...]) -> torch.Tensor:
        """Which slots the queries at `positions` [B] see, bool [B, H, allocated]; their own rows are written before."""
        schedule, device = self.schedule, positions.device
        p = positions[:, None]
        shape = (len(positions), self.heads.num_heads, -1)
        parts = []
        if schedule.num_sink_tokens:
            sinks = torch.arange(schedule.num_sink_tokens, device=device) <= p
            parts.append(sinks[:, None].expand(shape))
        if schedule.window:
            slots = torch.arange(self.window_slots, device=device)
            held = p - (p - slots) % schedule.dense_start
            near = (held > p - schedule.window) | (p < schedule.dense_start)
            parts.append((near & (held >= schedule.num_sink_tokens))[:, None].expand(shape))
        for n, table in enumerate(tables):
            own = self._own_live(table, tables[:n], positions)
            parts.append((own[:, :, None] & table.own_class).flatten(2))
        parts.append(torch.zeros(*shape[:2], self.allocated - self.size, dtype=torch.bool, device=device))
        return torch.cat(parts, dim=-1)

    def _own_live(
        self, table: PatternTables, earlier_tables: tuple[PatternTables, ...], positions: torch.Tensor
    ) -> torch.Tensor:
        """Bool [B, H, c] over the rows of each head's own class."""
        schedule, rows = self.schedule, table.rows
        t = positions % table.slots.w
        selected = (t % table.slots.r)[:, None] == table.offsets
        at = t.int()[:, None, None]
        live = (rows <= at) & selected[..., None]
        if schedule.num_sink_tokens:
            first = (schedule.num_sink_tokens - positions + t).clamp(min=0)
            live = live & (rows >= first.int()[:, None, None])
        if schedule.overlap == "count":
            return live
        if schedule.window:
            live = live & (rows <= at - schedule.window) & (positions >= schedule.dense_start)[:, None, None]
        for earlier in earlier_tables:
            inside = positions % earlier.slots.w  # index of the query in its segment of the earlier pattern
            begin = (t - inside).int()[:, None, None]
            lattice = (rows - begin) % earlier.slots.r == earlier.offsets[:, None]
            offered = (inside % earlier.slots.r)[:, None] == earlier.offsets
            live = live & ~(lattice & (rows >= begin) & offered[..., None])
        return live

    def targets(self, positions: torch.Tensor, tables: tuple[PatternTables, ...]) -> torch.Tensor:
        """The slots [B, G, n] that take the row of `positions` [B]; `size` where a pattern does not select it."""
        schedule, p = self.schedule, positions[:, None, None]
        shape = (len(positions), self.heads.num_kv_heads, -1)
        parts = []
        if schedule.num_sink_tokens:
            parts.append(torch.where(p < schedule.num_sink_tokens, p, self.size).expand(shape))
        if schedule.window:
            parts.append((schedule.num_sink_tokens + p % schedule.dense_start).expand(shape))
        for table in tables:
            slots, t = table.slots, p % table.slots.w
            first = slots.base + slots.rows * torch.arange(slots.classes, device=positions.device)
            parts.append(torch.where(t % slots.r == table.class_offsets, first + t // slots.r, self.size))
        targets = torch.cat(parts, dim=-1)
        # Beyond the bound there is no slot: an index error, rather than another pattern's slot.
        return targets if self.max_length is None else torch.where(p < self.max_length, targets, NOWHERE)

    def sources(self, first: torch.Tensor, last: torch.Tensor, tables: tuple[PatternTables, ...]) -> torch.Tensor:
        """Which of the positions [first, last] (both [B]) each slot takes, [B, G, allocated]; -1 for none."""
        schedule, device = self.schedule, first.device
        first, last = first[:, None, None], last[:, None, None]
        shape = (len(first), self.heads.num_kv_heads, -1)
        parts = []
        if schedule.num_sink_tokens:
            held = torch.arange(schedule.num_sink_tokens, device=device)
            parts.append(torch.where((held >= first) & (held <= last), held, -1).expand(shape))
        if schedule.window:
            slots = torch.arange(self.window_slots, device=device)
            held = last - (last - slots) % schedule.dense_start
            parts.append(torch.where(held >= first, held, -1).expand(shape))
        for table in tables:
            t = last % table.slots.w
            held = last - t + table.class_rows
            parts.append(torch.where((table.class_rows <= t) & (held >= first), held, -1))
        parts.append(first.new_full((*shape[:2], self.allocated - self.size), -1))
        return torch.cat(parts, dim=-1)

    def _slot(self, block: Block, positions):
        """Slot of a key that a block reads, for an integer or a tensor of positions."""
        if block.pattern == SINKS:
            return positions
        if block.pattern == 0 and self.schedule.window:
            return self.schedule.num_sink_tokens + positions % self.schedule.dense_start
        slots = self.patterns[block.pattern - bool(self.schedule.window)]
        offset_class = self._class(block.pattern, block.heads.start, slots.classes)
        return slots.base + offset_class * slots.rows + positions % slots.w // slots.r

    def held(self, origin: int) -> list[slice]:
        """The slots that queries from position `origin` on may see: sinks, the patterns', then those of the window
        before `origin`, in the order of its positions."""
        window, length, first = self.schedule.window, self.schedule.dense_start, self.schedule.num_sink_tokens
        slots = [slice(0, first), slice(first + self.window_slots, self.size)]
        if not window:
            return slots
        begin, end = (0 if origin < length else origin - window + 1) % length, origin % length
        if begin <= end:
            return [*slots, slice(first + begin, first + end)]
        return [*slots, slice(first + begin, first + length), slice(first, first + end)]

    def locate(self, block: Block, origin: int, column: int, device: torch.device) -> Rows | torch.Tensor:
        """Where a block's keys lie in a buffer of the slots of `held`, for positions before `origin`, and behind them,
        from row `column` on, of position `origin` and the later ones."""
        keys = block.region.keys
        if keys.start >= origin or block.pattern == 0 and self.schedule.window:
            return keys.shift(column - origin)
        moved = 0 if block.pattern == SINKS else -self.window_slots
        if block.repeats == 1 and keys.start + keys.step * (keys.count - 1) < origin:
            return self._rows(block)[0].shift(moved)
        positions = block_positions(keys, block, device)
        return torch.where(positions < origin, self._slot(block, positions) + moved, positions - origin + column)

    def token_pieces(self, position: int) -> tuple[Piece, ...]:
        """What the query at `position` sees, as rows of the slots, its own row written."""
        blocks = plan_blocks(self.schedule, self.heads, position, position + 1, position + 1)
        # In the first segment the sink tokens stand in the slots of pattern 0 too, before what is read there.
        doubled = position < self.schedule.segment_lengths[0] and self.schedule.dilation_rates[0] == 1
        return join_blocks((replace(b, pattern=0) if doubled and b.pattern == SINKS else b for b in blocks), self._rows)

    def _rows(self, block: Block) -> list[Rows]:
        """The slots of a block's keys that are all in them; without its repeats."""
        keys = block.region.keys
        if block.pattern == 0 and self.schedule.window:  # a ring
            first = min(keys.count, self.schedule.dense_start - keys.start % self.schedule.dense_start)
            cuts = (keys.start, first), (keys.start + first, keys.count - first)
            return [Rows(self._slot(block, start), 1, count) for start, count in cuts if count]
        rate = 1 if block.pattern == SINKS else self.schedule.dilation_rates[block.pattern]
        return [Rows(self._slot(block, keys.start), keys.step // rate, keys.count)]


@lru_cache(maxsize=64)
def _tables(layout: SlotLayout, device: torch.device) -> tuple[PatternTables, ...]:
    tables, number = [], torch.arange(layout.heads.num_heads)
    for slots in layout.patterns:
        offsets = torch.tensor([layout._offset(slots.index, j) for j in number.tolist()])
        classes = torch.tensor([layout._class(slots.index, j, slots.classes) for j in number.tolist()])
        class_offsets = torch.full((layout.heads.num_kv_heads, slots.classes), -1)
        class_offsets[number // layout.heads.per_group, classes] = offsets
        row = slots.r * torch.arange(slots.rows)
        rows, class_rows = offsets[:, None] + row, class_offsets[..., None] + row
        class_rows = class_rows.masked_fill((class_offsets < 0)[..., None] | (class_rows >= slots.w), NOWHERE)
        own_class = classes[:, None, None] == torch.arange(slots.classes)[:, None]
        values = (offsets, own_class, rows.int(), class_offsets, class_rows.flatten(1).int())
        tables.append(PatternTables(slots, *(v.to(device) for v in values)))
    return tuple(tables)
