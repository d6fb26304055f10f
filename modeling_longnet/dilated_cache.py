"""A cache for endless texts: it keeps the rows that dilated attention can still reach, in slots that are never more.

The cache alone knows the time: how many tokens each row has had. `attend` tells its layers with each step.

Letters: B batch, H query heads, G key/value heads, Q query tokens, S slots, D head dimension, w segment length,
r dilation rate.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.utils import logging

from .dilated_cache_export import register_for_export
from .dilated_cache_layer import DilatedLayer, Step, dilated_layer_indices
from .dilated_memory_layer import MemoryLayer
from .dilation_schedule import DilationSchedule, Heads, as_integer
from .document_ids import Documents, check_padding, find_documents, padding_first, restore_order
from .memory_store import open_store
from .transformers_compat import (
    LinearAttentionCacheLayerMixin,
    attention_of,
    changes_frequencies,
    exporter_is_loaded,
    length_dependent_rope,
    text_config_of,
)


logger = logging.get_logger(__name__)

ABORTED = (
    "`cache`: a forward with this cache did not end (an error or an interruption): its layers disagree. Call "
    "`reset()`, or load the state that was saved last."
)


class DilatedCache(DynamicCache):
    """Keys and values for texts of any length in memory that does not grow with them, and exact.

    Pattern i only ever needs the selected rows of its current segment. Each key/value head of a layer has
    S = num_sink_tokens + sum over i of U_i * ceil(w_i / r_i) slots, where U_i <= min(H / G, r_i) is the most
    distinct offsets that the query heads of one key/value head have (a sliding window keeps the w_0 slots of pattern 0,
    for the dense start of a text). That is

        2 * layers * B * G * (S rounded up to a multiple of 8, beyond S) * D * (bytes of an element)

    bytes, at position 1,000 as at position 1,000,000,000. A token attends, on a CPU, to the slots that it sees alone;
    elsewhere all slots are one masked attention of static shapes, which compiles. A chunk of several tokens runs on
    fused kernels. Rows of a batch may be padded on the left: each stands at its own position. A layer with a
    memory is the exception: it keeps every token, since any may be asked for, and its memory grows with the text.

    Args:
        config: of a LongNet or a patched model. Layers that a patch has left alone keep the cache that they had.
        max_length: tokens to make room for at first; texts that grow longer make the cache grow, up to S. None for all
            of S at once: shapes are then static, and `generate` compiles decoding where it does so for a StaticCache.
        store: where layers with a memory keep their tokens: `"device"`; `"cpu"`, pinned if the device is a GPU, which
            then holds the window, the index of the blocks and what is read of them; or `"disk"`, in files of the new
            folder `path`, which `save_cache(path, ...)` makes a state that `load_cache(path, ...)` goes on from.

    Attributes:
        positions: tokens of each row that are in the slots, int64 [B]; None before the first forward.
        seen: all columns, padding included, int64 [].
        waiting: columns that wait for a `crop` to be kept. pads: how many of them are padding on the left, int64 [B].
        had_padding_behind: whether padding ever stood behind a row's tokens: `position_ids` may then have lost count.
        step: what the forward that runs needs, between its first and its last dilated layer.

    Raises:
        ValueError: a configuration without a causal schedule, or of layers that keep more than keys and values; a store
            without a memory, a folder that holds one already.
    """

    __slots__ = ("dilated_layers", "folder", "rope", "schedule", "step")  # see `DilatedLayer`

    def __init__(self, config, max_length: int | None = None, *, store: str = "device", path=None):
        if exporter_is_loaded():
            register_for_export(type(self))
        if max_length is not None:
            given, max_length = max_length, as_integer(max_length)
            if max_length is None or max_length < 1:
                raise ValueError(f"`max_length` must be an integer of at least 1, got {given!r}.")
        config = text_config_of(config)
        self.schedule = DilationSchedule.from_config(config)
        if not self.schedule.is_causal:
            raise ValueError("`config` must be that of a causal model, got is_causal=False.")
        depth, dilated = config.num_hidden_layers, dilated_layer_indices(config)
        layers = list(DynamicCache(config=config).layers)[:depth]
        if any(isinstance(layers[i], LinearAttentionCacheLayerMixin) for i in dilated if i < len(layers)):  # Falcon-H1
            raise ValueError(
                f"`config`: the dilated layers of {type(config).__name__} keep recurrent states beside their keys, "
                "which a bounded cache does not. Use DynamicCache(config=model.config)."
            )
        self.rope, self.step = length_dependent_rope(config), None
        self.positions = self.seen = self.pads = None
        self.waiting, self.had_padding_behind = 0, False
        self.folder = open_store(store, path, self.schedule.memory is not None)
        kept = {"kind": store, "folder": self.folder}
        num_heads = config.num_attention_heads
        heads_per_key = num_heads // (getattr(config, "num_key_value_heads", None) or num_heads)
        layers += [None] * (depth - len(layers))
        for index in dilated:
            schedule = self.schedule.of_layer(index)
            kind, where = (DilatedLayer, {}) if schedule.memory is None else (MemoryLayer, kept)
            layers[index] = kind(schedule, max_length, heads_per_key, index, **where)
        Cache.__init__(self, layers=layers)
        self.dilated_layers = [layers[index] for index in dilated]

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
        self._check_batch(batch_size)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = self._new_columns(attention_mask, query_length)
        documents = find_documents(
            attention_mask, position_ids, batch_size=batch_size, query_length=query_length, query_offset=0,
            key_length=query_length, device=device,
        )  # fmt: skip
        self.check_positions(position_ids, documents.ids)
        documents = padding_first(documents)
        self.had_padding_behind |= documents.order is not None
        if self.positions is None:
            return documents
        positions = documents.positions + self._next_positions().to(device)[:, None]
        if documents.ids is not None:
            real = documents.ids if documents.order is None else restore_order(documents.ids, documents.order, 1)
            positions = positions.masked_fill(real < 0, 0)
        is_split = torch.ones(1, 1, dtype=torch.bool, device=device) if self.had_padding_behind else None
        return documents._replace(positions=positions, is_split=is_split)

    def _new_columns(self, attention_mask: torch.Tensor, query_length: int) -> torch.Tensor:
        """The last Q columns of a mask [B, earlier + Q] or [B, Q], which must tell of the others what was told then."""
        width = attention_mask.shape[1]
        if width == query_length or torch.compiler.is_compiling():
            return attention_mask[:, -query_length:]
        if width != self.get_seq_length() + query_length:
            raise ValueError(
                f"`attention_mask` must have shape {(len(attention_mask), self.get_seq_length() + query_length)}, the "
                f"cached tokens included, got {tuple(attention_mask.shape)}."
            )
        self.check_earlier((attention_mask[:, :-query_length] != 0).sum(1))
        return attention_mask[:, -query_length:]

    def _next_positions(self) -> torch.Tensor:
        """Tokens that each row has had, [B]."""
        return self.positions + self.waiting - self.pads

    def _check_batch(self, batch: int) -> None:
        if self.positions is not None and len(self.positions) != batch:
            raise ValueError(f"`cache` holds {len(self.positions)} rows, got a batch of {batch}.")

    def check_earlier(self, tokens: torch.Tensor) -> None:
        """Refuses a mask that tells of other earlier tokens [B], padding left out, than those that were read."""
        read = torch.zeros_like(tokens) if self.positions is None else self._next_positions().to(tokens.device)
        if bool((tokens != read).any()):
            raise ValueError(
                f"`attention_mask` has {tokens.tolist()} earlier tokens in its rows, `cache` was given "
                f"{read.tolist()}: a bounded cache cannot take back what a token was when it came. Use a DynamicCache, "
                "or read the text anew."
            )

    def check_positions(self, position_ids: torch.Tensor | None, ids: torch.Tensor | None) -> None:
        """Refuses tokens whose `position_ids` [B, Q] say that a new document begins where a row's text should go on."""
        if position_ids is None or self.positions is None or torch.compiler.is_compiling():
            return
        if self.had_padding_behind:  # `generate` then counts on from the padding's position
            return
        restarts = position_ids < self._next_positions().to(position_ids.device)[:, None]
        if bool((restarts if ids is None else restarts & (ids >= 0).all(1, keepdim=True)).any()):
            raise ValueError(
                "`position_ids` must go on where the row's text in `cache` ends: a bounded cache holds one "
                "document per row. Call `reset()` before a new one."
            )

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ids: torch.Tensor | None = None,
        *,
        config,
        scale: float,
        dropout: float = 0.0,
        backend: str | None = None,
        heads: Heads | None = None,
    ) -> torch.Tensor:
        """Attention of Q new tokens in one layer, whose rows are then kept as far as later ones can reach them.

        The first dilated layer of a forward begins the step and the last one ends it.

        Args:
            query: [B, H, Q, D]. key, value: [B, G, Q, D].
            ids: integers [B, Q], negative for padding, which lies before the tokens; the first layer reads it.
            config: of the model that asks.

        Returns:
            [B, H, Q, D]; zeros for padding.

        Raises:
            ValueError: padding behind tokens, another batch size, another model, dropout, a cache that an aborted
                forward left half written.
        """
        layer = self.layers[layer_idx]
        if dropout > 0:
            raise ValueError(f"`attention_dropout` must be 0 with a bounded cache, got {dropout}.")
        is_first = layer is self.dilated_layers[0]
        if is_first and not torch.compiler.is_compiling():
            self._check_model(config)
        query, key, value = layer.admit(query, key, value, backend, heads)
        if is_first:
            self._begin(query, ids)
        out = layer.attend(self.step, query, key, value, scale, backend)
        if layer is self.dilated_layers[-1]:
            self._end(layer.record_past)
        return out

    def attention_forward(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """An attention function of Transformers' signature: query [B, H, Q, D] -> ([B, Q, H, D], None).

        `attention_mask` are the ids [B, Q] of the new tokens alone, negative for padding, or None.
        """
        if kwargs.get("output_attentions"):
            logger.warning_once(
                "`output_attentions=True` gives none with a bounded cache, which has forgotten what the weights of "
                "earlier tokens would belong to: pass `cache=DynamicCache(config=model.config)`."
            )
        total = module.config.num_attention_heads
        if kwargs.get("heads") is None and query.shape[1] != total:
            raise ValueError(f"a bounded cache must know which of {total} heads these are, got {query.shape[1]}.")
        out = self.attend(
            module.layer_idx, query, key, value, attention_mask, config=module.config, scale=scaling, dropout=dropout,
            backend=attention_of(module.config), heads=kwargs.get("heads"),
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """For models that know no other method: marks a dilated layer's keys for the patched attention to find it."""
        key_states, value_states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(self.layers[layer_idx], DilatedLayer):
            key_states.dilated_cache, key_states.cache_layer = self, layer_idx
        return key_states, value_states

    def keep_time(self, positions: torch.Tensor, seen: torch.Tensor, pads: torch.Tensor) -> None:
        """Counts on from here, in these very tensors."""
        self.positions, self.seen, self.pads = positions, seen, pads
        for layer in self.dilated_layers:
            layer.seen = seen

    def start(self, batch: int, device: torch.device) -> None:
        """Begins to count, if it has not begun."""
        if self.positions is not None:
            return
        shapes = (batch,), (), (batch,)
        self.keep_time(*(torch.zeros(shape, dtype=torch.long, device=device) for shape in shapes))
        if not torch.compiler.is_compiling():
            for tensor in (self.positions, self.seen, self.pads):
                torch._dynamo.mark_static_address(tensor)

    def early_initialization(self, batch_size: int, num_heads, head_dim, dtype, device) -> None:
        super().early_initialization(batch_size, num_heads, head_dim, dtype, device)
        self.start(batch_size, device)

    def _begin(self, query: torch.Tensor, ids: torch.Tensor | None) -> None:
        """The step of a forward with Q new columns, of which `ids` [B, Q] < 0 are padding."""
        if self.step is not None:
            raise ValueError(ABORTED)
        batch, query_length = len(query), query.shape[2]
        self._check_batch(batch)
        self.start(batch, query.device)
        self._make_room(query_length)
        first = self._next_positions()
        if ids is None:
            new_pads = torch.zeros_like(first)
        else:
            check_padding(ids, self.waiting > self.pads)
            new_pads = (ids < 0).sum(-1)
        if self.rope is not None:
            self._check_frequencies(first, first + query_length - new_pads)
        pads = self.pads + new_pads
        self.step = Step(query_length, self.positions, self.waiting, first, new_pads, pads, ids is not None)

    def _end(self, recording: bool) -> None:
        step, self.step = self.step, None
        self.seen.add_(step.query_length)
        if recording:
            self.waiting += step.query_length
            self.pads.copy_(step.pads)
        else:
            self.positions.add_(self.waiting + step.query_length - step.pads)
            self.pads.zero_()
            self.waiting = 0

    def _make_room(self, query_length: int) -> None:
        """Lets a cache that was made with `max_length` grow before `query_length` more tokens come."""
        bound = self.dilated_layers[0].max_length
        if bound is None or torch.compiler.is_compiling():
            return
        needed = int(self.seen) + query_length
        if needed > bound:
            for layer in self.dilated_layers:
                layer.grow(max(needed, 2 * bound))

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

    def _check_model(self, config) -> None:
        """Refuses a model of another schedule, or with other dilated layers, than this cache was made for."""
        made_for = self.schedule, [layer.layer_idx for layer in self.dilated_layers]
        given = DilationSchedule.from_config(config), dilated_layer_indices(config)
        if made_for != given:
            raise ValueError(
                f"`cache` was made for another model, of {made_for[0]} in the layers {made_for[1]}; this one "
                f"has {given[0]} in the layers {given[1]}."
            )

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        layer = self.layers[layer_idx]
        if not isinstance(layer, CacheLayerMixin):  # it holds no keys; Transformers 5.17 asks the first layer for all
            layer = self.dilated_layers[0]
        plain = [other for other in self._plain_layers if isinstance(other, CacheLayerMixin)]
        if plain and not torch.compiler.is_compiling():
            seen = self.dilated_layers[0].get_seq_length()
            if any(other.get_seq_length() != seen for other in plain):
                raise ValueError(ABORTED)
        # Patched and plain layers share a mask: it has to cover what the plain ones keep.
        if isinstance(layer, DilatedLayer):
            layer = next((other for other in plain if not getattr(other, "is_sliding", False)), layer)
        return layer.get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens, exactly, and keeps what `activate_past_recording` had wait.

        Raises:
            ValueError: more tokens than were recorded since the last `crop`; a positive number.
        """
        removed = -int(tokens_to_remove)
        if removed < 0:
            raise ValueError(f"`tokens_to_remove` must be negative, the tokens to forget, got {tokens_to_remove}.")
        if removed > self.waiting:
            raise ValueError(
                f"`tokens_to_remove`: a bounded cache can forget the tokens recorded since the last `crop`, "
                f"{self.waiting}, got {tokens_to_remove}. Call `activate_past_recording()` before the tokens that may "
                "have to go."
            )
        kept = self.waiting - removed
        for layer in self.dilated_layers:
            layer.keep_recorded(kept, self.positions, self.pads)
        for layer in self._plain_layers:
            layer.crop(-removed)
        if self.positions is not None:
            self.positions.add_(kept - self.pads.clamp(max=kept))
            self.seen.sub_(removed)
            self.pads.zero_()
        self.waiting = 0

    def _map_batch(self, function: Callable[[torch.Tensor], torch.Tensor], name: str, argument) -> None:
        for layer in self.layers:
            if isinstance(layer, DilatedLayer):
                layer.map_batch(function)
            else:
                getattr(layer, name)(argument)
        if self.positions is not None:
            self.positions, self.pads = function(self.positions), function(self.pads)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)), "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0), "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = torch.as_tensor(indices)
        self._map_batch(lambda x: x[rows.to(x.device)], "batch_select_indices", indices)

    def reset(self) -> None:
        for layer in self._plain_layers:
            if isinstance(layer, CacheLayerMixin):  # Transformers 5.17 would keep as many rows of zeros
                layer.keys, layer.values, layer.is_initialized = None, None, False
        super().reset()
        self.step, self.waiting, self.had_padding_behind = None, 0, False
        if self.positions is not None:
            for tensor in (self.positions, self.pads, self.seen):
                tensor.zero_()

    def memory_footprint(self) -> int:
        """Bytes of keys and values in all slots: see the formula above. 0 before the first forward.

        Layers with a memory keep all tokens, and room for up to half as many more, with the index of their blocks;
        files count, those of a bank do not. `memory_by_place` tells them apart.
        """
        return sum(self.memory_by_place().values())

    def memory_by_place(self) -> dict[str, int]:
        """The same bytes by where they lie: "device", "cpu" (beside a device that is none), "disk"."""
        places: dict[str, int] = {}
        for layer in self.dilated_layers:
            for place, size in layer.bytes().items() if layer.is_initialized else ():
                places[place] = places.get(place, 0) + size
        return places

    def close(self) -> None:
        """Lets others open the folder of a cache on disk; nothing more can be read into this one."""
        if self.folder is not None:
            self.folder.close()


__all__ = ["DilatedCache"]
