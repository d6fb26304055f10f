"""A cache for endless texts: it keeps the rows that dilated attention can still reach, in slots that are never more.

Letters: B batch, H query heads, G key/value heads, Q query tokens, S slots, D head dimension, w segment length,
r dilation rate.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .dilated_cache_attention import attend_chunk, attend_slots, compiled_chunk, layout_name
from .dilated_cache_layout import SlotLayout
from .dilation_schedule import DilationSchedule
from .document_ids import Documents, find_documents, restore_order


def schedule_of(config) -> DilationSchedule:
    """The schedule in the configuration of a LongNet or of a patched model.

    Raises:
        ValueError: a configuration without one.
    """
    settings = getattr(config, "dilated_attention", None)
    if settings is not None:
        names = ("head_offsets", "overlap", "num_sink_tokens", "local")
        options = {name: settings[name] for name in names}
        return DilationSchedule(tuple(settings["segment_lengths"]), tuple(settings["dilation_rates"]), **options)
    if not hasattr(config, "segment_lengths"):
        raise ValueError(
            f"`config` must be that of a LongNet or of a patched model, got {type(config).__name__} without a schedule."
        )
    return DilationSchedule(
        tuple(config.segment_lengths), tuple(config.dilation_rates), config.is_causal, config.head_offsets,
        config.overlap, config.num_sink_tokens, config.padding, getattr(config, "local", "segment"),
    )  # fmt: skip


@dataclass
class Step:
    """What one forward pass needs, the same for all layers.

    query_length: Q. first: position of each row's first new token that is no padding [B]. new_pads: padding columns
    before it, in this forward [B]. pads: the same in all that waits for a `crop` and this forward [B]. is_padded: whether
    there may be any in this forward.
    """

    query_length: int
    first: torch.Tensor
    new_pads: torch.Tensor
    pads: torch.Tensor
    is_padded: bool
    places: tuple[list[int], list[int]] | None = None
    decoding: list[tuple] = field(default_factory=list)
    sources: list[tuple] = field(default_factory=list)


class Clock:
    """Where each row of the batch stands; the layers share one.

    positions: tokens of each row that are in the slots, int64 [B]. seen: all columns, padding included, int64 [].
    waiting: columns that wait for a `crop` to be kept; pads: how many of them are padding on the left, int64 [B].
    """

    def __init__(self):
        self.layers: list[DilatedLayer] = []
        self.positions = self.seen = self.pads = None
        self.waiting = 0
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
            raise ValueError(
                "`past_key_values`: a forward with this cache did not end (an error or an interruption): its layers "
                "disagree. Call `reset()`, or load the state that was saved last."
            )
        if len(self.positions) != batch:
            raise ValueError(f"`past_key_values` holds {len(self.positions)} rows, got a batch of {batch}.")
        self.make_room(query_length)
        first = self.next_positions()
        if ids is None:
            new_pads = torch.zeros_like(first)
        else:
            check_padding(ids, self.waiting > self.pads)
            new_pads = (ids < 0).sum(-1)
        self.step = Step(query_length, first, new_pads, self.pads + new_pads, ids is not None)
        return self.step

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

    def next_positions(self) -> torch.Tensor:
        """Tokens that each row has had, [B]."""
        return self.positions + self.waiting - self.pads

    def check_positions(self, position_ids: torch.Tensor | None, ids: torch.Tensor | None) -> None:
        """Refuses tokens whose `position_ids` [B, Q] say that a new document begins where a row's text should go on."""
        if position_ids is None or self.positions is None or torch.compiler.is_compiling():
            return
        restarts = position_ids < self.next_positions().to(position_ids.device)[:, None]
        if bool((restarts if ids is None else restarts & (ids >= 0).all(1, keepdim=True)).any()):
            raise ValueError(
                "`position_ids` must go on where the row's text in `past_key_values` ends: a bounded cache holds one "
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
            "`attention_mask`: a bounded cache takes padding only before the tokens (pad on the left), got padding behind "
            "tokens."
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

    `attend` does all of it: the queries see what they may, then the rows that later queries can reach are kept. `update`
    is for models that know caches by that method only; it marks the keys so that a patched attention finds the layer.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(
        self, schedule: DilationSchedule, clock: Clock, max_length: int | None, heads_per_key: int, layer_idx: int = 0
    ):
        super().__init__()
        self.layer_idx = layer_idx
        self.schedule, self.clock, self.heads_per_key = schedule, clock, heads_per_key
        self.max_length = max_length if max_length and max_length < max(schedule.segment_lengths) else None
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
                self.schedule, num_kv_heads * self.heads_per_key, num_kv_heads, head_index_offset, total_num_heads,
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

    def _set_layout(self, layout: SlotLayout) -> None:
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
                "`past_key_values`: this model's attention does not read a DilatedCache. It is for LongNet models and for "
                "layers that `patch_model` has patched."
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
        device_type, clock = query.device.type, self.clock
        if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
            query, key, value = (x.to(torch.get_autocast_dtype(device_type)) for x in (query, key, value))
        if not self.is_initialized:
            self.lazy_initialization(key, value, head_index_offset, total_num_heads)
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


def _padding_first(documents: Documents) -> Documents:
    """With an order that puts padding before the tokens, if there is some behind them; positions stay as they are."""
    ids = documents.ids
    if ids is None or documents.order is not None or torch.compiler.is_compiling():
        return documents
    padding = ids < 0
    if not (padding[:, 1:] & ~padding[:, :-1]).any():
        return documents
    order = (~padding).to(torch.uint8).argsort(dim=1, stable=True)
    return documents._replace(ids=ids.gather(1, order), order=order)


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


class DilatedCache(Cache):
    """Keys and values for texts of any length in memory that does not grow with them, and exact.

    Pattern i only ever needs the selected rows of its current segment. Each key/value head of a layer has
    S = num_sink_tokens + window + sum over i of U_i * ceil(w_i / r_i) slots, where U_i <= min(H / G, r_i) is the most
    distinct offsets that the query heads of one key/value head have, and a sliding window stands for pattern 0. That is

        2 * layers * B * G * (S rounded up to a multiple of 8, beyond S) * D * (bytes of an element)

    bytes, at position 1,000 as at position 1,000,000,000. Decoding is one masked attention over the slots, with static
    shapes, so it compiles; a chunk of several tokens runs on unmasked fused kernels. Rows of a batch may be padded on the
    left: each stands at its own position.

    Args:
        config: of a LongNet or a patched model. Layers that a patch has left alone keep the cache that they had.
        max_length: tokens to make room for at first; texts that grow longer make the cache grow, up to S. None for all
            of S at once, which compiled decoding wants.

    Raises:
        ValueError: a configuration without a causal schedule.
    """

    def __init__(self, config, max_length: int | None = None):
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        self.schedule = schedule_of(config)
        if not self.schedule.is_causal:
            raise ValueError("`config` must be that of a causal model, got is_causal=False.")
        self.clock = Clock()
        heads = config.num_attention_heads
        heads_per_key = heads // (getattr(config, "num_key_value_heads", None) or heads)
        settings = getattr(config, "dilated_attention", None)
        patched = range(config.num_hidden_layers) if settings is None else settings["layers"]
        layers = list(DynamicCache(config=config).layers) if len(patched) < config.num_hidden_layers else []
        layers += [None] * (config.num_hidden_layers - len(layers))
        for index in patched:
            layers[index] = DilatedLayer(self.schedule, self.clock, max_length, heads_per_key, index)
        super().__init__(layers=layers)
        self.dilated_layers = self.clock.layers = [layers[index] for index in patched]
        self.dilated_layers[0].is_first = self.dilated_layers[-1].is_last = True

    @property
    def _plain_layers(self) -> list:
        return [layer for layer in self.layers if not isinstance(layer, DilatedLayer)]

    def read_documents(
        self,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        batch_size: int,
        query_length: int,
        device: torch.device,
    ) -> Documents:
        """What `find_documents` says of Q new tokens alone, with each token's position in its whole text.

        Raises:
            ValueError: for masks of another shape, and for a new document where a row's text should go on.
        """
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, -query_length:]
        documents = find_documents(
            attention_mask, position_ids, batch_size=batch_size, query_length=query_length, query_offset=0,
            key_length=query_length, device=device,
        )  # fmt: skip
        self.clock.check_positions(position_ids, documents.ids)
        documents = _padding_first(documents)
        if self.clock.positions is None:
            return documents
        positions = documents.positions + self.clock.next_positions().to(device)[:, None]
        if documents.ids is not None:
            real = documents.ids if documents.order is None else restore_order(documents.ids, documents.order, 1)
            positions = positions.masked_fill(real < 0, 0)
        return documents._replace(positions=positions)

    def attention_forward(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        head_index_offset: int = 0,
        total_num_heads: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """An attention function of Transformers' signature: query [B, H, Q, D] -> ([B, Q, H, D], None).

        `attention_mask` are the ids [B, Q] of the new tokens alone, negative for padding, or None.
        """
        if dropout > 0:
            raise ValueError(f"`attention_dropout` must be 0 with a bounded cache, got {dropout}.")
        total = module.config.num_attention_heads
        if total_num_heads is None and query.shape[1] != total:
            raise ValueError(f"a bounded cache must know which of {total} heads these are, got {query.shape[1]}.")
        out = self.layers[module.layer_idx].attend(
            query, key, value, attention_mask, scale=scaling, backend=module.config._attn_implementation,
            head_index_offset=head_index_offset, total_num_heads=total_num_heads,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        # Patched and plain layers share a mask: it has to cover what the plain ones keep.
        if isinstance(self.layers[layer_idx], DilatedLayer):
            for layer in self._plain_layers:
                if isinstance(layer, CacheLayerMixin) and not getattr(layer, "is_sliding", False):
                    return layer.get_mask_sizes(query_length)
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens, exactly, and keeps what `activate_past_recording` had wait.

        Raises:
            ValueError: more tokens than were recorded since the last `crop`; a positive number.
        """
        removed, clock = -int(tokens_to_remove), self.clock
        if removed < 0:
            raise ValueError(f"`tokens_to_remove` must be negative, the tokens to forget, got {tokens_to_remove}.")
        if removed > clock.waiting:
            raise ValueError(
                f"`tokens_to_remove`: a bounded cache can forget the tokens recorded since the last `crop`, {clock.waiting}, "
                f"got {tokens_to_remove}. Call `activate_past_recording()` before the tokens that may have to go."
            )
        kept = clock.waiting - removed
        for layer in self.dilated_layers:
            layer.keep_recorded(kept)
        for layer in self._plain_layers:
            layer.crop(-removed)
        if clock.positions is not None:
            clock.positions.add_(kept - clock.pads.clamp(max=kept))
            clock.seen.sub_(removed)
            clock.pads.zero_()
        clock.waiting = 0

    def _map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.dilated_layers:
            layer.map_batch(function)
        if self.clock.positions is not None:
            self.clock.positions, self.clock.pads = function(self.clock.positions), function(self.clock.pads)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))
        for layer in self._plain_layers:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))
        for layer in self._plain_layers:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_batch(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])
        for layer in self._plain_layers:
            layer.batch_select_indices(indices)

    def reset(self) -> None:
        super().reset()
        clock = self.clock
        clock.step, clock.waiting = None, 0
        if clock.positions is not None:
            for tensor in (clock.positions, clock.pads, clock.seen):
                tensor.zero_()

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: texts have no maximum length."""
        return -1

    def memory_footprint(self) -> int:
        """Bytes of keys and values in all slots: see the formula above. 0 before the first forward."""
        layers = [layer for layer in self.dilated_layers if layer.is_initialized]
        return sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))


def prepare_dilated_cache(model, generation_config, model_kwargs: dict, batch_size: int, max_cache_length: int) -> bool:
    """Puts a DilatedCache into the arguments of `generate`, unless another cache, or weights of all keys, are wanted."""
    if (
        model_kwargs.get("past_key_values") is not None
        or generation_config.use_cache is False
        or generation_config.cache_implementation is not None
        or generation_config.output_attentions
    ):
        return False
    config = model.config
    cache = DilatedCache(config, max_length=max(1, max_cache_length))
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache
    if generation_config.prefill_chunk_size and model._valid_auto_compile_criteria(model_kwargs, generation_config):
        # The first forward is compiled, and tensors that live on cannot be made in there.
        heads = config.num_attention_heads
        cache.early_initialization(
            batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1),
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            model.dtype,
            model.device,
        )
    return True


__all__ = ["DilatedCache", "prepare_dilated_cache"]
