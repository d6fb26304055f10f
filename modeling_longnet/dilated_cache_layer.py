"""One layer of a bounded cache: its slots, how one token or a chunk attends to them, and what is written into them.

Letters: B batch, H query heads, G key/value heads, Q query tokens, P tokens that are not in the slots yet (the queries
are the last of them), S slots, D head dimension.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby

import torch
from transformers.cache_utils import CacheLayerMixin

from .attention_blocks import attend_visible, empty_accumulator
from .attention_kernels import as_autocast, get_kernel, refuse_tangents
from .attention_token import attend_token
from .dilated_attention import scheduled_attention
from .dilated_cache_layout import SlotLayout
from .dilation_schedule import DilationSchedule, Heads


def dilated_layer_indices(config) -> list[int]:
    """The layers whose attention is dilated: all of a LongNet, the patched ones of a patched model."""
    settings = getattr(config, "dilated_attention", None)
    layers = range(config.num_hidden_layers)  # fewer than are patched while `generate` drafts with the first ones
    return list(layers) if settings is None else [index for index in settings["layers"] if index in layers]


@dataclass
class Step:
    """What one forward pass needs, the same for all layers.

    origins: tokens of each row that are in the slots [B]. waiting: columns behind them that wait for a `crop`.
    first: position of each row's first new token that is no padding [B]. new_pads: padding columns before it, in this
    forward [B]. pads: the same in all that waits and this forward [B]. is_padded: whether there may be any in this
    forward. shared: what layers have computed.
    """

    query_length: int
    origins: torch.Tensor
    waiting: int
    first: torch.Tensor
    new_pads: torch.Tensor
    pads: torch.Tensor
    is_padded: bool
    shared: dict[tuple, object] = field(default_factory=dict)

    @cached_property
    def news(self) -> tuple[list[int], list[int]]:
        """`first` and `new_pads` as lists."""
        return self.first.tolist(), self.new_pads.tolist()

    @cached_property
    def places(self) -> tuple[list[int], list[int]]:
        """`origins` and `pads` as lists."""
        return self.origins.tolist(), self.pads.tolist()

    def once(self, what: str, place: tuple[str, ...], make: Callable[[], object]):
        """`make()`, computed by the first layer that asks for it with such slots on such a device (`place`)."""
        if (what, *place) not in self.shared:
            self.shared[(what, *place)] = make()
        return self.shared[(what, *place)]


def attend_slots(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """One masked attention: query [B, H, 1, D], key and value [B, G, S, D], bias [B, H, S] -> [B, H, 1, D].

    The query heads of a key/value head stand as its queries, so no key is repeated.
    """
    groups = (key.shape[1], -1)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.squeeze(2).unflatten(1, groups), key, value, attn_mask=bias.unflatten(1, groups), scale=scale
    )
    return out.flatten(1, 2).unsqueeze(2)


def _same_phase(schedule: DilationSchedule, start: int) -> int:
    """A distance by which the texts' beginning may be moved towards `start` so that every segment stays as it is.

    Positions that repeat make plans that repeat, which are then looked up instead of made.
    """
    period = math.lcm(*schedule.segment_lengths, schedule.window or 1)
    reach = -(-(schedule.num_sink_tokens + schedule.dense_start + schedule.window) // period)
    return max(0, start // period - reach) * period


def _attend_rows(query, key, value, slots, layout, origin, scale, backend):
    """The rows of the batch that stand at one position and have no padding in this chunk."""
    settings = {"heads": layout.heads, "scale": scale, "backend": backend}
    if origin == 0:
        return scheduled_attention(query, key, value, layout.schedule, **settings)
    start = origin + key.shape[2] - query.shape[2]
    shift, held = _same_phase(layout.schedule, origin), layout.held(origin)
    buffer = [torch.cat([*(x[:, :, own] for own in held), new], dim=2) for x, new in zip(slots, (key, value))]
    column = buffer[0].shape[2] - key.shape[2]

    def locate(block):
        return layout.locate(block, origin - shift, column, query.device)

    return attend_visible(
        query, *buffer, layout.schedule, locate,
        query_start=start - shift, length=start - shift + query.shape[2], **settings,
    )  # fmt: skip


def attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: tuple[torch.Tensor, torch.Tensor],
    layout: SlotLayout,
    origins: list[int],
    pads: list[int],
    scale: float,
    backend: str | None,
) -> torch.Tensor:
    """Attention of the last Q of P new tokens, [B, H, Q, D]; padding queries give zeros.

    Args:
        query: [B, H, Q, D]. key, value: [B, G, P, D].
        slots: keys and values of what came before, [B, G, S, D].
        origins: per row, the position of its first new token that is no padding.
        pads: per row, how many of the P columns are padding, all on the left.
    """
    batch, _, query_length, _ = query.shape
    waiting = key.shape[2] - query_length
    groups = {}
    for row, place in enumerate(zip(origins, pads)):
        groups.setdefault(place, []).append(row)
    outs = []
    for (origin, pad), rows in groups.items():
        skipped = min(max(0, pad - waiting), query_length)
        tensors = (query[:, :, skipped:], key[:, :, pad:], value[:, :, pad:], *slots)
        q, k, v, *past = tensors if len(groups) == 1 else (x[rows] for x in tensors)
        if skipped < query_length:
            q = _attend_rows(q, k, v, past, layout, origin, scale, backend)
        outs.append(torch.nn.functional.pad(q, (0, 0, skipped, 0)))
    if len(groups) == 1:
        return outs[0]
    order = torch.tensor([row for rows in groups.values() for row in rows], device=query.device)
    return torch.cat(outs).index_select(0, order.argsort())


# A compiled forward sees chunks as one opaque operator. Operators take no Python objects, so layouts go as text.
def layout_name(layout: SlotLayout) -> str:
    """The layout as the compiled operator takes it."""
    return json.dumps(asdict(layout))


@lru_cache(maxsize=64)
def read_layout_name(name: str) -> SlotLayout:
    """The layout that `layout_name` wrote."""
    fields = json.loads(name)
    schedule = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["schedule"].items()}
    return SlotLayout(DilationSchedule(**schedule), Heads(**fields["heads"]), fields["max_length"])


def _compiled_chunk(query, key, value, slots_key, slots_value, origins, pads, layout, scale, backend):
    out = attend_chunk(
        query, key, value, (slots_key, slots_value), read_layout_name(layout), origins.tolist(), pads.tolist(), scale,
        backend or None,
    )  # fmt: skip
    return out.contiguous()


_NAMESPACE = "longnet_" + re.sub(r"\W", "_", __name__)
compiled_chunk = torch.library.custom_op(
    f"{_NAMESPACE}::chunk",
    _compiled_chunk,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor slots_key, Tensor slots_value, Tensor origins, "
    "Tensor pads, str layout, float scale, str backend) -> Tensor",
)


@compiled_chunk.register_fake
def _(query, *others):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


class DilatedLayer(CacheLayerMixin):
    """The slots of one layer: `keys` and `values` [B, G, S, D].

    `seen` is the cache's count of columns; what else there is to know of time comes with each step.
    """

    # Exporters walk through each `__dict__` as through a tree: what they would count twice, or cannot set, is in slots.
    __slots__ = ("heads", "layout", "schedule", "seen", "tables")
    is_croppable = True
    is_sliding = False

    def __init__(self, schedule: DilationSchedule, max_length: int | None, heads_per_key: int, layer_idx: int):
        super().__init__()
        self.schedule, self.heads_per_key, self.layer_idx = schedule, heads_per_key, layer_idx
        self._bound(max_length)
        self.is_compileable = max_length is None  # else it may grow, as a DynamicCache does
        self.record_past = self.awaited = False
        self.heads: Heads | None = None
        self.layout: SlotLayout | None = None
        self.place: tuple[str, str] | None = None  # layout and device, by name
        self.seen: torch.Tensor | None = None
        self.recorded: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor, heads: Heads | None = None
    ) -> None:
        layout = SlotLayout(self.schedule, heads or self.heads_of(key_states.shape[1]), self.max_length)
        slots = [x.new_zeros(*x.shape[:2], layout.allocated, x.shape[-1]) for x in (key_states, value_states)]
        if not torch.compiler.is_compiling():
            for x in slots:
                torch._dynamo.mark_static_address(x)
        self.continue_with(*slots, layout)

    def heads_of(self, groups: int) -> Heads:
        """All heads of a layer with so many key/value heads."""
        return Heads(groups * self.heads_per_key, groups)

    def continue_with(self, keys: torch.Tensor, values: torch.Tensor, layout: SlotLayout) -> None:
        """Goes on with the slots [B, G, S, D] that another layer filled in this layout."""
        self.keys, self.values = keys, values
        self.dtype, self.device, self.batch_size = keys.dtype, keys.device, len(keys)
        self._set_layout(layout)
        self.is_initialized = True

    def _set_layout(self, layout: SlotLayout) -> None:
        self.layout, self.heads, self.tables = layout, layout.heads, layout.tables(self.device)
        self.place = layout_name(layout), str(self.device)

    def _bound(self, max_length: int | None) -> None:
        """Texts of the longest segment need all the slots that there ever are."""
        self.max_length = max_length if max_length and max_length < max(self.schedule.segment_lengths) else None

    def grow(self, max_length: int) -> None:
        """Slots for texts of up to `max_length` tokens."""
        self._bound(max_length)
        if self.layout is None:  # they are not there yet, or the layer has none
            return
        old = self.layout
        self._set_layout(replace(old, max_length=self.max_length))
        self.keys, self.values = (_move_slots(x, old, self.layout) for x in (self.keys, self.values))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.awaited:
            raise ValueError(
                "`cache`: this model's attention does not read a DilatedCache. It is for LongNet models and "
                "for layers that `patch_model` has patched."
            )
        self.awaited = True
        return key_states, value_states

    def admit(self, query, key, value, backend: str | None, heads: Heads | None):
        """Queries, keys and values in the dtype that they are attended in, once it is that of the slots."""
        self.awaited = False
        query, key, value = as_autocast(query, key, value)
        refuse_tangents(backend or "sdpa", query, key, value)  # what the slots keep has no derivative
        if not self.is_initialized:
            self.lazy_initialization(key, value, heads)
        if key.dtype != self.dtype:
            raise ValueError(
                f"`cache` holds {self.dtype}, got {key.dtype}: go on in the dtype, and under the autocast, "
                "in which the cache began."
            )
        return query, key, value

    def attend(self, step: Step, query, key, value, scale: float, backend: str | None) -> torch.Tensor:
        """[B, H, Q, D], zeros for padding; then the rows of the Q tokens are kept that later ones can reach."""
        wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if query.shape[2] == 1 and not self.record_past and not step.waiting and not wants_grad:
            return self._decode(step, query, key, value, scale)
        return self._attend_chunk(step, query, key, value, scale, backend)

    def _decode(self, step: Step, query, key, value, scale) -> torch.Tensor:
        # Elsewhere to ask where a row stands would mean to wait, and a graph must hold wherever it stands.
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._decode_live(step, query, key, value, scale)

        def plan():
            positions, targets = step.first.to(self.device), self._targets(step)
            live = self.layout.live(positions, self.tables)
            blind = None if self.schedule.selects_every_query else ~live.any(-1)
            if step.is_padded:
                padding = step.new_pads.to(self.device)[:, None] > 0
                blind = padding.expand(live.shape[:2]) if blind is None else blind | padding
            bias = torch.zeros((), dtype=query.dtype, device=self.device).where(live, -torch.inf)
            return bias, targets, blind

        bias, targets, blind = step.once("decoding", self.place, plan)
        batch = torch.arange(len(query), device=self.device)[:, None, None]
        head = torch.arange(key.shape[1], device=self.device)[:, None]
        # Detached: without a gradient to keep, the slots are only state.
        self.keys[batch, head, targets] = key.detach()
        self.values[batch, head, targets] = value.detach()
        out = attend_slots(query, self.keys, self.values, bias, scale)
        return out if blind is None else out.masked_fill(blind[..., None, None], 0)

    def _targets(self, step: Step) -> torch.Tensor:
        """The slots [B, G, n] that take the rows of one token each; the one behind all others where none does."""
        targets = self.layout.targets(step.first.to(self.device), self.tables)
        if step.is_padded:
            targets = targets.masked_fill(step.new_pads.to(self.device)[:, None, None] > 0, self.layout.size)
        return targets

    def _decode_live(self, step: Step, query, key, value, scale) -> torch.Tensor:
        """The same, from those slots alone that each row's token sees."""

        def plan():
            targets = self._targets(step)
            batch, head, index = (targets != self.layout.size).nonzero(as_tuple=True)
            written = batch, head, targets[batch, head, index], torch.zeros_like(batch)
            rows, pieces = 0, []
            for place, alike in groupby(zip(*step.news)):
                count = len(list(alike))
                if not place[1]:
                    pieces.append((slice(rows, rows + count), self.layout.token_pieces(place[0])))
                rows += count
            return written, pieces

        written, pieces = step.once("decoding", self.place, plan)
        self._write(key, value, written)
        out, lse = empty_accumulator(query)
        kernel = get_kernel("sdpa", query)
        for rows, own in pieces:
            tensors = (x[rows] for x in (query, self.keys, self.values, out, lse))
            attend_token(kernel, own, *tensors, scale)
        return out.to(query.dtype)

    def _attend_chunk(self, step: Step, query, key, value, scale, backend) -> torch.Tensor:
        if self.recorded is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.recorded, (key, value)))
        self.recorded = (key.detach(), value.detach()) if self.record_past else None
        if torch.compiler.is_compiling():
            out = compiled_chunk(
                query, key, value, self.keys, self.values, step.origins.to(self.device), step.pads.to(self.device),
                self.place[0], scale, backend or "",
            )  # fmt: skip
        else:
            slots = self.keys, self.values
            out = attend_chunk(query, key, value, slots, self.layout, *step.places, scale, backend)
        if not self.record_past:
            columns = key.shape[2]
            written = step.once("written", self.place, lambda: self._sources(step.origins, step.pads, columns))
            self._write(key, value, written)
        return out

    def _sources(self, origins: torch.Tensor, pads: torch.Tensor, columns: int):
        """Which of the new columns each slot takes: [B, G, S], -1 for none; eagerly as (row, head, slot, column)."""
        origins, pads = origins.to(self.device), pads.to(self.device)
        last = origins + columns - pads.clamp(max=columns) - 1
        sources = self.layout.sources(origins, last, self.tables)
        sources = torch.where(sources < 0, -1, sources + (pads - origins)[:, None, None])
        if torch.compiler.is_compiling():
            return sources
        taken = (sources >= 0).nonzero(as_tuple=True)
        return *taken, sources[taken]

    @torch.no_grad()
    def _write(self, key: torch.Tensor, value: torch.Tensor, sources) -> None:
        pairs = (self.keys, key), (self.values, value)
        if torch.compiler.is_compiling():
            taken, index = (sources >= 0)[..., None], sources.clamp(min=0)[..., None]
            for slots, x in pairs:
                slots.copy_(torch.where(taken, x.gather(2, index.expand(*index.shape[:3], x.shape[-1])), slots))
            return
        batch, head, slot, column = sources
        for slots, x in pairs:  # detached: without a gradient to keep, the slots are only state
            slots[batch, head, slot] = x.detach()[batch, head, column]

    def keep_recorded(self, columns: int, origins: torch.Tensor, pads: torch.Tensor) -> None:
        """The first `columns` of those that wait go into the slots, the others are forgotten; `Step` tells the rest."""
        if self.recorded is None:
            return
        key, value = (x[:, :, :columns] for x in self.recorded)
        self.recorded = None
        if columns:
            self._write(key, value, self._sources(origins, pads, columns))

    def stored(self) -> dict[str, torch.Tensor]:
        """What is kept of the text, by name."""
        return {"keys": self.keys, "values": self.values}

    def bytes(self) -> dict[str, int]:
        """What that takes, by where it lies."""
        return {"device": sum(x.nbytes for x in self.stored().values())}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes what `stored` gave for another layer of this kind and size, of which `keys` and `values` exist.

        Raises:
            ValueError: of other shapes.
        """
        for name, slots in self.stored().items():
            if tensors[name].shape != slots.shape:
                raise ValueError(f"must have slots {tuple(slots.shape)}, got {tuple(tensors[name].shape)}")
            slots.copy_(tensors[name])

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)
            self.batch_size = len(self.keys)
            if self.recorded is not None:
                self.recorded = tuple(map(function, self.recorded))

    def get_seq_length(self) -> int | torch.Tensor:
        if self.seen is None:
            return 0
        return self.seen + 0 if torch.compiler.is_compiling() else int(self.seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | torch.Tensor]:
        """A mask over the new tokens alone: what came before is the cache's own affair."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        self.recorded, self.awaited = None, False
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()


def _move_slots(x: torch.Tensor, old: SlotLayout, new: SlotLayout) -> torch.Tensor:
    """Slots [B, G, S, D] of one layout in those of another with more rows."""
    out = x.new_zeros(*x.shape[:2], new.allocated, x.shape[-1])
    sinks = old.schedule.num_sink_tokens
    out[:, :, : sinks + old.window_slots] = x[:, :, : sinks + old.window_slots]
    for a, b in zip(old.patterns, new.patterns):
        source = x[:, :, a.base : a.base + a.classes * a.rows].unflatten(2, (a.classes, a.rows))
        target = out[:, :, b.base : b.base + b.classes * b.rows].unflatten(2, (b.classes, b.rows))
        target[:, :, :, : a.rows] = source
    return out
