"""One layer of a bounded cache: its slots, and the clock that all layers share.

Letters: B batch, H query heads, G key/value heads, Q query tokens, S slots, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers.cache_utils import CacheLayerMixin

from .attention_kernels import as_autocast, refuse_tangents
from .dilated_cache_attention import attend_chunk, attend_slots, compiled_chunk, layout_name
from .dilated_cache_layout import SlotLayout
from .dilation_schedule import DilationSchedule
from .transformers_compat import changes_frequencies


ABORTED = (
    "`cache`: a forward with this cache did not end (an error or an interruption): its layers disagree. Call "
    "`reset()`, or load the state that was saved last."
)


@dataclass
class Step:
    """What one forward pass needs, the same for all layers.

    query_length: Q. first: position of each row's first new token that is no padding [B]. new_pads: padding columns
    before it, in this forward [B]. pads: the same in all that waits for a `crop` and this forward [B]. is_padded:
    whether there may be any in this forward. places: first position in the new columns and `pads`, per row, once a
    layer has asked. news: first position and padding of the new columns alone, likewise. decoding, sources: what layers
    have computed, with the layout and device that it is for.
    """

    query_length: int
    first: torch.Tensor
    new_pads: torch.Tensor
    pads: torch.Tensor
    is_padded: bool
    places: tuple[list[int], list[int]] | None = None
    news: tuple[list[int], list[int]] | None = None
    decoding: list[tuple] = field(default_factory=list)
    sources: list[tuple] = field(default_factory=list)


def dilated_layer_indices(config) -> list[int]:
    """The layers whose attention is dilated: all of a LongNet, the patched ones of a patched model."""
    settings = getattr(config, "dilated_attention", None)
    layers = range(config.num_hidden_layers)  # fewer than are patched while `generate` drafts with the first ones
    return list(layers) if settings is None else [index for index in settings["layers"] if index in layers]


class Clock:
    """Where each row of the batch stands; the layers share one.

    positions: tokens of each row that are in the slots, int64 [B]. seen: all columns, padding included, int64 [].
    waiting: columns that wait for a `crop` to be kept; pads: how many of them are padding on the left, int64 [B].
    had_padding_behind: whether padding ever stood behind a row's tokens, so that `position_ids` may have lost count.
    rope: the model's `length_dependent_rope`.

    What is found elsewhere too, or cannot be set, stands in slots: Transformers' exporters walk through the `__dict__`
    of whatever a cache holds as through a tree, counting tensors and setting each attribute.
    """

    __slots__ = ("__dict__", "layers", "rope", "schedule")

    def __init__(self, rope: tuple[str, int] | None = None):
        self.layers: list[DilatedLayer] = []
        self.rope = rope
        self.schedule: DilationSchedule | None = None
        self.positions = self.seen = self.pads = None
        self.waiting = 0
        self.had_padding_behind = False
        self.step: Step | None = None

    def start(self, batch: int, device: torch.device) -> None:
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)
        self.pads = torch.zeros(batch, dtype=torch.long, device=device)
        self.seen = torch.zeros((), dtype=torch.long, device=device)
        if not torch.compiler.is_compiling():
            for tensor in (self.positions, self.pads, self.seen):
                torch._dynamo.mark_static_address(tensor)

    def begin(self, batch: int, query_length: int, ids: torch.Tensor | None) -> Step:
        """The step of a forward with Q new columns, of which `ids` [B, Q] < 0 are padding."""
        if self.step is not None:
            raise ValueError(ABORTED)
        self.check_batch(batch)
        self.make_room(query_length)
        first = self.next_positions()
        if ids is None:
            new_pads = torch.zeros_like(first)
        else:
            check_padding(ids, self.waiting > self.pads)
            new_pads = (ids < 0).sum(-1)
        if self.rope is not None:
            self._check_frequencies(first, first + query_length - new_pads)
        self.step = Step(query_length, first, new_pads, self.pads + new_pads, ids is not None)
        return self.step

    def _check_frequencies(self, first: torch.Tensor, last: torch.Tensor) -> None:
        """Refuses a forward from position `first` to `last` [B] that rotates otherwise than those before it did."""
        kind, limit = self.rope
        if torch.compiler.is_compiling():
            raise ValueError(f"a bounded cache does not compile with rope_type {kind!r}: its frequencies must be seen.")
        start, stop = int(first.max()), int(last.max())
        if start > 0 and changes_frequencies(self.rope, start, stop):
            raise ValueError(
                f"`cache` holds {start} tokens, and with rope_type {kind!r} texts of more than {limit}, such as the "
                f"{stop} with these, have other frequencies: the result would depend on how the text is cut. Read "
                "it in one forward, or patch with a rope_scaling that does not depend on the length (yarn)."
            )

    def end(self, recording: bool) -> None:
        step, self.step = self.step, None
        self.seen.add_(step.query_length)
        if recording:
            self.waiting += step.query_length
            self.pads.copy_(step.pads)
        else:
            self.positions.add_(self.waiting + step.query_length - step.pads)
            self.pads.zero_()
            self.waiting = 0

    def check_model(self, config) -> None:
        """Refuses a model of another schedule, or with other dilated layers, than this cache was made for."""
        made_for = self.schedule, [layer.layer_idx for layer in self.layers]
        given = DilationSchedule.from_config(config), dilated_layer_indices(config)
        if made_for != given:
            raise ValueError(
                f"`cache` was made for another model, of {made_for[0]} in the layers {made_for[1]}; this one "
                f"has {given[0]} in the layers {given[1]}."
            )

    def check_batch(self, batch: int) -> None:
        if self.positions is not None and len(self.positions) != batch:
            raise ValueError(f"`cache` holds {len(self.positions)} rows, got a batch of {batch}.")

    def check_earlier(self, tokens: torch.Tensor) -> None:
        """Refuses a mask that tells of other earlier tokens [B], padding left out, than those that were read."""
        read = torch.zeros_like(tokens) if self.positions is None else self.next_positions().to(tokens.device)
        if bool((tokens != read).any()):
            raise ValueError(
                f"`attention_mask` has {tokens.tolist()} earlier tokens in its rows, `cache` was given "
                f"{read.tolist()}: a bounded cache cannot take back what a token was when it came. Use a DynamicCache, "
                "or read the text anew."
            )

    def next_positions(self) -> torch.Tensor:
        """Tokens that each row has had, [B]."""
        return self.positions + self.waiting - self.pads

    def check_positions(self, position_ids: torch.Tensor | None, ids: torch.Tensor | None) -> None:
        """Refuses tokens whose `position_ids` [B, Q] say that a new document begins where a row's text should go on."""
        if position_ids is None or self.positions is None or torch.compiler.is_compiling():
            return
        if self.had_padding_behind:  # `generate` then counts on from the padding's position
            return
        restarts = position_ids < self.next_positions().to(position_ids.device)[:, None]
        if bool((restarts if ids is None else restarts & (ids >= 0).all(1, keepdim=True)).any()):
            raise ValueError(
                "`position_ids` must go on where the row's text in `cache` ends: a bounded cache holds one "
                "document per row. Call `reset()` before a new one."
            )

    def make_room(self, query_length: int) -> None:
        """Lets a cache that was made with `max_length` grow before `query_length` more tokens come."""
        bound = self.layers[0].max_length
        if bound is None or torch.compiler.is_compiling():
            return
        needed = int(self.seen) + query_length
        if needed > bound:
            for layer in self.layers:
                layer.grow(max(needed, 2 * bound))


def check_padding(ids: torch.Tensor, has_waiting: torch.Tensor) -> None:
    """Refuses what slots cannot hold: `ids` [B, Q]; `has_waiting` [B], rows of which tokens wait for a `crop`."""
    if torch.compiler.is_compiling():
        return
    padding = ids < 0
    if bool((padding[:, 1:] & ~padding[:, :-1]).any() or (padding[:, 0] & has_waiting).any()):
        raise ValueError(
            "`attention_mask`: a bounded cache takes padding only before the tokens (pad on the left), got padding "
            "behind tokens."
        )
    if bool(((ids != ids.amax(1, keepdim=True)) & ~padding).any()):
        raise ValueError("`position_ids`: a bounded cache holds one document per row, got several in one.")


def _lookup(tables: list[tuple], layout: SlotLayout, device: torch.device, make: Callable):
    for known, at, value in tables:
        if known is layout and at == device:
            return value
    tables.append((layout, device, make()))
    return tables[-1][2]


class DilatedLayer(CacheLayerMixin):
    """The slots of one layer: `keys` and `values` [B, G, S, D].

    `attend` does all of it: the queries see what they may, then the rows that later queries can reach are kept.
    `update` is for models that know no other method; it marks the keys so that a patched attention finds the layer.
    """

    __slots__ = ("clock", "layout", "schedule", "tables")  # see `Clock`
    is_croppable = True
    is_sliding = False

    def __init__(
        self, schedule: DilationSchedule, clock: Clock, max_length: int | None, heads_per_key: int, layer_idx: int = 0
    ):
        super().__init__()
        self.layer_idx = layer_idx
        self.schedule, self.clock, self.heads_per_key = schedule, clock, heads_per_key
        self.max_length = max_length if max_length and max_length < max(schedule.segment_lengths) else None
        self.is_compileable = max_length is None  # else it may grow, as a DynamicCache does
        self.is_first = self.is_last = False
        self.record_past = False
        self.layout: SlotLayout | None = None
        self.recorded: tuple[torch.Tensor, torch.Tensor] | None = None
        self.awaited = False

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor, head_index_offset: int = 0, total_num_heads=None
    ) -> None:
        (batch, num_kv_heads, _, width), device = key_states.shape, key_states.device
        self.dtype, self.device, self.batch_size = key_states.dtype, device, batch
        self._set_layout(
            SlotLayout(
                self.schedule,
                num_kv_heads * self.heads_per_key,
                num_kv_heads,
                head_index_offset,
                total_num_heads,
                self.max_length,
            )  # fmt: skip
        )
        self.keys = key_states.new_zeros(batch, num_kv_heads, self.layout.allocated, width)
        self.values = value_states.new_zeros(batch, num_kv_heads, self.layout.allocated, value_states.shape[-1])
        if self.clock.positions is None:
            self.clock.start(batch, device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def continue_with(self, keys: torch.Tensor, values: torch.Tensor, layout: SlotLayout) -> None:
        """Goes on with the slots [B, G, S, D] that another layer filled in this layout."""
        self.keys, self.values = keys, values
        self.dtype, self.device, self.batch_size = keys.dtype, keys.device, len(keys)
        self._set_layout(layout)
        self.is_initialized = True

    def _set_layout(self, layout: SlotLayout) -> None:
        # One object for all layers alike: what a step computes for one of them is then found by the others.
        layout = next((layer.layout for layer in self.clock.layers if layer.layout == layout), layout)
        self.layout, self.layout_name = layout, layout_name(layout)
        self.tables = layout.tables(self.device)

    def grow(self, max_length: int) -> None:
        """Slots for texts of up to `max_length` tokens."""
        self.max_length = max_length if max_length < max(self.schedule.segment_lengths) else None
        if not self.is_initialized:
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
        key_states.dilated_layer = self
        return key_states, value_states

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ids: torch.Tensor | None = None,
        *,
        scale: float,
        backend: str | None = None,
        head_index_offset: int = 0,
        total_num_heads: int | None = None,
    ) -> torch.Tensor:
        """Attention of Q new tokens, whose rows are then kept as far as later ones can reach them.

        Args:
            query: [B, H, Q, D]. key, value: [B, G, Q, D].
            ids: integers [B, Q], negative for padding, which lies before the tokens; the first layer reads it.

        Returns:
            [B, H, Q, D]; zeros for padding.

        Raises:
            ValueError: padding behind tokens, another batch size, a cache that an aborted forward left half written.
        """
        self.awaited = False
        clock = self.clock
        query, key, value = as_autocast(query, key, value)
        refuse_tangents(backend or "sdpa", query, key, value)  # what the slots keep has no derivative
        if not self.is_initialized:
            self.lazy_initialization(key, value, head_index_offset, total_num_heads)
        if key.dtype != self.dtype:
            raise ValueError(
                f"`cache` holds {self.dtype}, got {key.dtype}: go on in the dtype, and under the autocast, "
                "in which the cache began."
            )
        step = clock.begin(len(query), query.shape[2], ids) if self.is_first else clock.step
        wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if query.shape[2] == 1 and not self.record_past and not clock.waiting and not wants_grad:
            out = self._decode(step, query, key, value, scale)
        else:
            out = self._attend_chunk(step, query, key, value, scale, backend)
        if self.is_last:
            clock.end(self.record_past)
        return out

    def _decode(self, step, query, key, value, scale) -> torch.Tensor:
        def tables():
            positions = step.first.to(self.device)
            live = self.layout.live(positions, self.tables)
            targets = self.layout.targets(positions, self.tables)
            blind = None if self.schedule.selects_every_query else ~live.any(-1)
            if step.is_padded:
                padding = step.new_pads.to(self.device) > 0
                targets = torch.where(padding[:, None, None], self.layout.spill, targets)
                blind = padding[:, None].expand(live.shape[:2]) if blind is None else blind | padding[:, None]
            bias = torch.zeros((), dtype=query.dtype, device=self.device).where(live, -torch.inf)
            return bias, targets, blind

        bias, targets, blind = _lookup(step.decoding, self.layout, self.device, tables)
        batch = torch.arange(len(query), device=self.device)[:, None, None]
        head = torch.arange(key.shape[1], device=self.device)[:, None]
        # Detached: without a gradient to keep, the slots are only state.
        self.keys[batch, head, targets] = key.detach()
        self.values[batch, head, targets] = value.detach()
        out = attend_slots(query, self.keys, self.values, bias, scale)
        return out if blind is None else out.masked_fill(blind[..., None, None], 0)

    def _attend_chunk(self, step, query, key, value, scale, backend) -> torch.Tensor:
        if self.recorded is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.recorded, (key, value)))
        self.recorded = (key.detach(), value.detach()) if self.record_past else None
        origins = self.clock.positions
        if torch.compiler.is_compiling():
            out = compiled_chunk(
                query, key, value, self.keys, self.values, origins.to(self.device), step.pads.to(self.device),
                self.layout_name, scale, backend or "",
            )  # fmt: skip
        else:
            if step.places is None:
                step.places = origins.tolist(), step.pads.tolist()
            slots = (self.keys, self.values)
            out = attend_chunk(query, key, value, slots, self.layout, *step.places, scale, backend)
        if not self.record_past:
            sources = _lookup(
                step.sources, self.layout, self.device, lambda: self._sources(origins, step.pads, key.shape[2])
            )
            self._write(key, value, sources)
        return out

    def _sources(self, origins: torch.Tensor, pads: torch.Tensor, columns: int) -> torch.Tensor:
        """Which of the new columns each slot takes, [B, G, S], -1 for none."""
        origins, pads = origins.to(self.device), pads.to(self.device)
        last = origins + columns - pads.clamp(max=columns) - 1
        sources = self.layout.sources(origins, last, self.tables)
        return torch.where(sources < 0, -1, sources + (pads - origins)[:, None, None])

    @torch.no_grad()
    def _write(self, key: torch.Tensor, value: torch.Tensor, sources: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            taken, index = (sources >= 0)[..., None], sources.clamp(min=0)[..., None]
            for slots, x in ((self.keys, key), (self.values, value)):
                slots.copy_(torch.where(taken, x.gather(2, index.expand(*index.shape[:3], x.shape[-1])), slots))
            return
        batch, head, slot = (sources >= 0).nonzero(as_tuple=True)
        column = sources[batch, head, slot]
        self.keys[batch, head, slot] = key.detach()[batch, head, column]
        self.values[batch, head, slot] = value.detach()[batch, head, column]

    def keep_recorded(self, columns: int) -> None:
        """The first `columns` of those that wait go into the slots, the others are forgotten."""
        if self.recorded is None:
            return
        key, value = (x[:, :, :columns] for x in self.recorded)
        self.recorded = None
        if columns:
            self._write(key, value, self._sources(self.clock.positions, self.clock.pads, columns))

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
        seen = self.clock.seen
        if seen is None:
            return 0
        return seen + 0 if torch.compiler.is_compiling() else int(seen)

    def get_query_offset(self) -> int | torch.Tensor:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | torch.Tensor]:
        """A mask over the new tokens alone: what came before is the cache's own affair."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
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
