"""Sequence parallelism through Accelerate: one text split over many processes, with the numbers of a single one.

    accelerator = Accelerator()
    sp = SequenceParallel(accelerator, size=4)                                                   # new
    loader = DataLoader(dataset, batch_size=1, collate_fn=sp.collator(collate))                   # changed
    model, optimizer, loader, scheduler = sp.prepare(model, optimizer, loader, scheduler)         # changed
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step(); scheduler.step(); optimizer.zero_grad()

To DDP and FSDP2 a rank is a data-parallel rank that holds a slice of the tokens. Everything but attention looks at one
token at a time; the operator gets the keys and values that lie elsewhere from `sequence_exchange`. The first `size`
ranks share the first batch, the next ones the second. Nothing of this is part of a checkpoint.

Letters: B batch, N tokens of a text, n tokens of a rank's slice, D head dimension.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from .attention_kernels import get_kernel
from .dilation_schedule import DilationSchedule
from .document_ids import without_gradient_of_padding
from .sequence_exchange import Exchange, Heads, plan_exchange, sharded_attention
from .sequence_shards import SHARD, Place, Shard, ShardingCollator, locate_longnet, locate_patched
from .transformers_compat import (
    CACHE_NAMES,
    attention_of,
    causal_lm_class_names,
    length_dependent_rope,
    text_config_of,
)


logger = logging.get_logger(__name__)

PER_TOKEN_LOSSES = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification")


class ShardedForward:
    """One forward of a slice: it travels to the attention functions as an argument, so that a recomputation (gradient
    checkpointing) finds the place of its own batch, in whatever order forwards and backwards follow each other."""

    is_read_by_hooks = True  # so that models pass it on

    def __init__(self, place: Place, shard: Shard, group: dist.ProcessGroup | None):
        self.place, self.shard, self.group = place, shard, group
        self.exchanges: list[tuple[Exchange, int]] = []  # of each call of the operator, and bytes of a row

    @torch.compiler.disable
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        schedule: DilationSchedule,
        head_index_offset: int,
        total_num_heads: int | None,
        *,
        scale: float,
        dropout: float,
        backend: str,
        return_lse: bool,
    ) -> torch.Tensor:
        """What `dilated_attention` returns, for this rank's queries [B, H, n, D] over the keys of all ranks."""
        layout = self.place.layout
        if dropout > 0 or backend == "eager" or return_lse:
            raise ValueError(
                "sequence parallelism runs the fused kernels, without attention dropout and log-sum-exp, got "
                f"dropout={dropout}, backend={backend!r}, return_lse={return_lse}."
            )
        if not query.shape[2] == key.shape[2] == layout.slice_length:
            raise ValueError(
                f"a rank's slice has {layout.slice_length} tokens, got {query.shape[2]} queries and {key.shape[2]} "
                "keys: caches do not work in a sharded forward, generate under `disabled()`."
            )
        heads = Heads(query.shape[1], key.shape[1], head_index_offset, total_num_heads)
        exchange = plan_exchange(layout, self.shard.rank, schedule, heads, query.device)
        self.exchanges.append((exchange, 2 * key.shape[-1] * key.itemsize))
        return sharded_attention(query, key, value, exchange, self.group, scale, get_kernel(backend, query))


def _base_model(model: nn.Module) -> nn.Module:
    """The Transformers model inside wrappers (DDP, torch.compile, PEFT)."""
    while not hasattr(model, "config") or hasattr(model, "get_base_model") or hasattr(model, "_orig_mod"):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None:
            raise ValueError(f"`model` must be a Transformers model, got {type(model).__name__}.")
        model = inner
    return model


def _loss_type(model: nn.Module) -> str | None:
    """The library's name of a model's loss; classes whose name does not tell (GPT2LMHeadModel) fall back to causal."""
    loss_type = getattr(model, "loss_type", None)
    is_causal = type(model).__name__ in causal_lm_class_names().values()
    return "ForCausalLM" if loss_type is None and is_causal else loss_type


def _is_longnet(config: Any) -> bool:
    return hasattr(config, "segment_lengths")


def _model_problem(model: nn.Module, outer: nn.Module) -> str | None:
    """Why a model's numbers would be wrong on slices of a text, or None."""
    config, name = model.config, type(model).__name__
    rope = length_dependent_rope(config)  # its longest position differs from rank to rank
    settings = getattr(config, "dilated_attention", None)
    if text_config_of(config) is not config:
        return "it is a composite model, whose pictures or sounds do not lie in one slice: only text models are sharded"
    if not _is_longnet(config) and settings is None:
        return "its attention is not dilated: call `patch_model` first"
    if not _is_longnet(config) and len(settings["layers"]) < config.num_hidden_layers:
        left = sorted(set(range(config.num_hidden_layers)) - set(settings["layers"]))
        return f"its layers {left} are not patched, and would see their own slice only"
    if (attention_of(config) if settings is None else settings["backend"]) == "eager":
        return "eager attention does not run across ranks: use the kernels of attn_implementation='sdpa'"
    for setting in ("attention_dropout", "attn_pdrop", "drop_path_rate"):
        if getattr(config, setting, 0):
            return f"`{setting}` must be 0, got {getattr(config, setting)}: its random numbers cannot span ranks"
    if name != type(model.base_model).__name__ and _loss_type(model) not in PER_TOKEN_LOSSES:
        return "its loss is not one of each token by itself"
    if rope is not None:
        return f"rope_type {rope[0]!r} depends on the length of the text, which a slice does not show"
    if getattr(config, "output_router_logits", False):
        return "the load-balancing loss of its experts (`output_router_logits`) looks at whole texts"
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(outer, "peft_config", {}).values()):
        return "prompt learning puts virtual tokens before each slice"
    return None


def _pre_hooks(module: nn.Module) -> list[Callable]:
    return list(module._forward_pre_hooks.values())


class _GatherSequence(torch.autograd.Function):
    """All-gather along the tokens [B, n, ...]; backward, the sum of all ranks' gradients of the own slice."""

    @staticmethod
    def forward(ctx, x, group, size):
        ctx.settings = group, size
        parts = x.new_empty(size, *x.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        gather(parts.flatten(0, 1), x.contiguous(), group=group)
        return parts.transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        group, size = ctx.settings
        parts = grad.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
        total = torch.empty_like(parts[0])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(total, parts.flatten(0, 1), group=group)
        return total, None, None


def _detached(size: int) -> "SequenceParallel":
    """What a pickled `SequenceParallel` becomes: process groups do not travel, so it leaves forwards alone."""
    sp = object.__new__(SequenceParallel)
    sp.accelerator, sp.size, sp.rank, sp.group = None, size, 0, None
    sp._is_disabled, sp._forward, sp._checked = True, None, None
    return sp


class SequenceParallel:
    """Splits each text over `size` processes; the groups of `size` processes share the batches among them.

    Args:
        accelerator: of the training, or None where only `torch.distributed` is set up: then `prepare` adds the hooks
            to the model and the rest (DDP, loader, scheduler) is the caller's.
        size: processes that share a text; divides the number of processes.

    Raises:
        ValueError: for a size that the number of processes does not allow, and for settings of the accelerator
            that would give wrong numbers.
    """

    def __init__(self, accelerator: Any | None, size: int):
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or world % size:
            raise ValueError(
                f"`size` must divide the number of processes, got {size} for {world}. Start them with `torchrun "
                "--nproc_per_node` (`accelerate launch --cpu --num_processes 2` starts one)."
            )
        if accelerator is not None:
            _check_accelerator(accelerator, world)
        self.accelerator, self.size = accelerator, size
        process = dist.get_rank() if world > 1 else 0
        self.data_parallel_size, self.data_parallel_rank, self.rank = world // size, process // size, process % size
        self.group: dist.ProcessGroup | None = None
        if size > 1:
            groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
            self.group = groups[self.data_parallel_rank]
        self._is_disabled = False
        self._forward: ShardedForward | None = None  # the running one, then the last one
        self._checked: dict[str, Any] | None = None

    def describe(self) -> str:
        return (
            f"sequence parallelism: {self.data_parallel_size * self.size} processes = {self.data_parallel_size} (data "
            f"parallel) x {self.size} (ranks that share a text)"
        )

    def __deepcopy__(self, memo: dict) -> "SequenceParallel":
        return self  # hooks of a copied model belong to the same processes

    def __reduce__(self):
        return _detached, (self.size,)

    def collator(self, collate: Callable | None = None, *, shift_labels: bool = True) -> ShardingCollator:
        """`collate` (Transformers' default one) whose batches are cut to this rank's slice; see `ShardingCollator`.

        Args:
            shift_labels: False for masked language models and token classification.
        """
        if collate is None:
            from transformers import default_data_collator as collate
        if isinstance(collate, ShardingCollator):
            raise ValueError("`collate` is a sharding collator already.")
        return ShardingCollator(collate, self.rank, self.size, shift_labels)

    def prepare(self, *objects: Any) -> Any:
        """What `accelerator.prepare` does, for data-parallel ranks that are groups of processes.

        Models get the hooks; loaders read the same batches within a group; schedulers advance once per data-parallel
        rank as they would in data-parallel training, not once per process.

        Raises:
            ValueError: for a model whose numbers would be wrong on slices of a text.
        """
        for x in objects:
            if isinstance(x, nn.Module):
                self.add_hooks(x)
        if self.accelerator is not None:
            from .sequence_training import prepare_loader, step_as_data_parallel

            loaders = [prepare_loader(self, x) if isinstance(x, torch.utils.data.DataLoader) else x for x in objects]
            prepared = self.accelerator.prepare(*loaders)
            objects = prepared if len(objects) > 1 else (prepared,)
            for x in objects:
                step_as_data_parallel(self, x)
        return objects if len(objects) > 1 else objects[0]

    def attach_trainer(self, trainer: Any) -> Any:
        """Makes a Hugging Face `Trainer` or TRL's `SFTTrainer` train and evaluate sequence-parallel. Returns it."""
        from .sequence_training import attach

        return attach(self, trainer)

    def add_hooks(self, model: nn.Module) -> None:
        """Readies a model for sharded batches; `prepare` calls it.

        Raises:
            ValueError: for a model whose numbers would be wrong on slices of a text.
        """
        base = _base_model(model)
        problem = _model_problem(base, model)
        if problem:
            raise ValueError(f"{type(base).__name__} cannot run sequence-parallel: {problem}.")
        backbone = base.base_model
        if any(getattr(getattr(hook, "func", None), "__self__", None) is self for hook in _pre_hooks(backbone)):
            return
        if getattr(base.config, "position_embedding_type", None) == "xpos":
            backbone.xpos.register_forward_pre_hook(self._place_xpos, with_kwargs=True)
        loss_type = None if base is backbone else _loss_type(base)
        backbone.register_forward_pre_hook(functools.partial(self._enter, loss_type), with_kwargs=True)
        backbone.register_forward_hook(self._leave)
        if self.data_parallel_rank == self.rank == 0:
            logger.warning(f"{self.describe()}; {type(base).__name__} runs on slices of its texts.")

    def _enter(
        self, loss_type: str | None, backbone: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """Before the backbone: replaces what would be read from a slice by what the whole texts say."""
        shard = kwargs.get(SHARD)
        if self._is_disabled:
            if shard is not None:
                raise ValueError("this batch is a slice of its texts: `disabled()` wants whole ones.")
            return None
        if not isinstance(shard, Shard):
            raise ValueError(
                "sequence parallelism is active, but this batch was not cut by `sp.collator(...)`. Use the collator, "
                "or run the forward on whole texts under `sp.disabled()`."
            )
        tokens = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        self._check_call(loss_type, shard, tokens, kwargs)
        if _is_longnet(backbone.config):
            place = locate_longnet(shard)
        else:
            place = locate_patched(shard, bool(getattr(backbone.config, "rope_parameters", None)))
        self._check_group(shard, tokens.device)
        self._forward = ShardedForward(place, shard, self.group)
        position_ids = place.position_ids.to(tokens.device)
        return args, kwargs | {
            SHARD: self._forward,
            "position_ids": position_ids,
            "attention_mask": torch.ones_like(position_ids),  # what is padding is told by the layout
            "use_cache": False,
        }

    def _check_call(self, loss_type: str | None, shard: Shard, tokens: torch.Tensor, kwargs: dict) -> None:
        if any(kwargs.get(name) is not None for name in CACHE_NAMES):
            raise ValueError("`cache` does not work in a sharded forward: generate under `sp.disabled()`.")
        if tokens.shape[:2] != (shard.batch, shard.slice_length) or shard.size != self.size:
            raise ValueError(
                f"the batch was cut for {(shard.batch, shard.slice_length)} tokens on {shard.size} ranks, got "
                f"{tuple(tokens.shape[:2])} on {self.size}: it was changed after the collator."
            )
        is_causal = loss_type == "ForCausalLM"
        if shard.has_labels and loss_type is not None and shard.labels_are_shifted != is_causal:
            raise ValueError(f"`shift_labels` of `sp.collator` must be {is_causal} for this model.")

    def _check_group(self, shard: Shard, device: torch.device) -> None:
        """In the first forward: do all ranks of a group hold slices of the same texts, in order?"""
        if self._checked is not None or self.size == 1:
            self._checked = self._checked or {"fingerprints": [shard.fingerprint], "ranks": [0]}
            return
        own = torch.tensor([shard.fingerprint, shard.rank, shard.length, shard.batch], device=device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        prints, ranks, lengths, batches = zip(*(x.tolist() for x in everyone))
        if len(set(prints)) > 1 or len(set(lengths)) > 1 or len(set(batches)) > 1 or ranks != tuple(range(self.size)):
            raise ValueError(
                "the ranks of a group must hold slices of the same texts, got different ones: "
                f"fingerprints {prints}, slices {ranks}, lengths {lengths}, rows {batches}. Is the loader prepared by "
                "`sp.prepare`, and its order the same on all ranks?"
            )
        self._checked = {"fingerprints": list(prints), "ranks": list(ranks)}

    def _place_xpos(self, xpos: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """xPos counts from the start of the document, which may lie on another rank."""
        if self._is_disabled:
            return None
        place, config = self._forward.place, xpos.config
        longest = max((stop - start for *_, start, stop in place.layout.documents), default=0)
        if longest > config.max_position_embeddings and not config.xpos_is_centred_per_segment:
            raise ValueError(
                f"Positions must be below `max_position_embeddings={config.max_position_embeddings}` with this xPos, "
                f"got a document of {longest} tokens."
            )
        return args, kwargs | {"position_ids": place.document_positions.to(args[0].device)}

    def _leave(self, backbone: nn.Module, args: tuple, output: Any) -> Any:
        """After the backbone: did every layer's attention look across the ranks?"""
        if self._is_disabled:
            return None
        layers, calls = backbone.config.num_hidden_layers, len(self._forward.exchanges)
        if calls != layers:
            raise ValueError(
                f"{layers} layers, but {calls} looked across the ranks: the others saw their own slice only. Does the "
                "model pass its keyword arguments on to its attention?"
            )
        shard = self._forward.shard
        if not _is_longnet(backbone.config) or shard.attention_mask is None:
            return None
        # As a LongNet does, from whose sight the hook before has taken the padding.
        states = without_gradient_of_padding(output[0], shard.cut(shard.attention_mask))
        if isinstance(output, tuple):
            return states, *output[1:]
        output.last_hidden_state = states
        return output

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model runs on whole texts, as on a single device: for generation, or a comparison."""
        before, self._is_disabled = self._is_disabled, True
        try:
            yield
        finally:
            self._is_disabled = before

    def gather_sequence(self, tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """The whole texts' [B, N, ...] of a slice's [B, n, ...] (logits, hidden states), on every rank of the group.

        The gradient is the sum over the ranks of what each did with the result. `length` is N, by default that of the
        last forward.
        """
        if length is None:
            if self._forward is None:
                raise ValueError("`length` must be given before the first forward.")
            length = self._forward.shard.length
        if tensor.shape[1] * self.size < length or (tensor.shape[1] - 1) * self.size >= length:
            raise ValueError(
                f"`tensor` must be a slice of {-(-length // self.size)} of {length} tokens along its second dimension, "
                f"got shape {tuple(tensor.shape)}."
            )
        if self.size > 1:
            tensor = _GatherSequence.apply(tensor, self.group, self.size)
        return tensor[:, :length]

    def report(self) -> str:
        """Groups, rows and bytes of the last forward, and the self-check of the first one."""
        lines = [self.describe()]
        if self._forward is None or self._checked is None:
            return "\n".join([*lines, "no forward yet"])
        shard = self._forward.shard
        lines.append(
            f"last forward: {shard.batch} x {shard.length} tokens, this rank holds {shard.slice_length} from "
            f"{shard.rank * shard.slice_length} on"
        )
        sizes = [(e.rows_received * b, e.rows_sent * b) for e, b in self._forward.exchanges]
        for layer, (received, sent) in enumerate(sizes):
            lines.append(f"layer {layer}: {received:,} bytes received, {sent:,} sent; as much back in the backward")
        received, sent = (sum(s) for s in zip(*sizes))
        lines.append(f"a step: {received + sent:,} bytes received, {received + sent:,} sent by this rank")
        prints, ranks = self._checked["fingerprints"], self._checked["ranks"]
        lines.append(
            f"first forward: all {len(ranks)} ranks of the group hold the same texts (fingerprint {prints[0]:08x}), "
            f"slices {ranks}"
        )
        return "\n".join(lines)


def _check_accelerator(accelerator: Any, world: int) -> None:
    """Refuses what would give wrong numbers, or not be sequence parallelism."""
    if accelerator.num_processes != world:
        raise ValueError(
            f"`accelerator` must know all {world} processes, got {accelerator.num_processes}. Without a GPU it wants "
            "Accelerator(cpu=True)."
        )
    kind = accelerator.distributed_type.value
    fsdp1 = kind == "FSDP" and not accelerator.is_fsdp2
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP") or fsdp1:
        raise ValueError(f"`accelerator` must use DDP or FSDP2, got {'FSDP version 1' if fsdp1 else kind}.")
    config = getattr(accelerator, "parallelism_config", None)
    if config is not None and (config.cp_size > 1 or config.tp_size > 1 or getattr(config, "sp_size", 1) > 1):
        raise ValueError("`accelerator` must not shard sequences or tensors by its own ParallelismConfig.")
    if accelerator.split_batches or accelerator.dispatch_batches:
        raise ValueError(
            "`accelerator` must have split_batches=False and dispatch_batches=None or False: every rank of a group "
            "reads whole batches."
        )
