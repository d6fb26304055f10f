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
token at a time; the operator gets the keys and values that lie elsewhere through `sequence_hooks`. The first `size`
ranks share the first batch, the next ones the second. Nothing of this is part of a checkpoint.

Letters: B batch, N tokens of a text, n tokens of a rank's slice.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from .sequence_hooks import SequenceHooks, ShardedForward, model_problem
from .sequence_shards import Shard, ShardingCollator
from .transformers_compat import unwrap


logger = logging.get_logger(__name__)


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
        self.is_disabled = False
        self.forward: ShardedForward | None = None  # the running one, then the last one
        self._checked: dict[str, Any] | None = None

    def describe(self) -> str:
        return (
            f"sequence parallelism: {self.data_parallel_size * self.size} processes = {self.data_parallel_size} (data "
            f"parallel) x {self.size} (ranks that share a text)"
        )

    def __deepcopy__(self, memo: dict) -> "SequenceParallel":
        return self  # hooks of a copied model belong to the same processes

    def __getstate__(self) -> dict[str, Any]:
        """Process groups do not travel: a pickled one leaves forwards alone."""
        return vars(self) | {"accelerator": None, "group": None, "is_disabled": True, "forward": None}

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

    def add_hooks(self, model: nn.Module) -> SequenceHooks:
        """Readies a model for sharded batches; `prepare` calls it. `remove()` of what it returns takes that back.

        Raises:
            ValueError: for a model whose numbers would be wrong on slices of a text.
        """
        base = unwrap(model, parallel=True)
        problem = model_problem(base, model)
        if problem:
            raise ValueError(f"{type(base).__name__} cannot run sequence-parallel: {problem}.")
        for hook in base.base_model._forward_pre_hooks.values():
            there = getattr(hook, "__self__", None)
            if isinstance(there, SequenceHooks) and there.sp is self:
                return there
        if self.data_parallel_rank == self.rank == 0:
            logger.warning(f"{self.describe()}; {type(base).__name__} runs on slices of its texts.")
        return SequenceHooks(self, base)

    def check_group(self, shard: Shard, device: torch.device) -> None:
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

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model runs on whole texts, as on a single device: for generation, or a comparison."""
        before, self.is_disabled = self.is_disabled, True
        try:
            yield
        finally:
            self.is_disabled = before

    def gather_sequence(self, tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """The whole texts' [B, N, ...] of a slice's [B, n, ...] (logits, hidden states), on every rank of the group.

        The gradient is the sum over the ranks of what each did with the result. `length` is N, by default that of the
        last forward.
        """
        if length is None:
            if self.forward is None:
                raise ValueError("`length` must be given before the first forward.")
            length = self.forward.shard.length
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
        if self.forward is None or self._checked is None:
            return "\n".join([*lines, "no forward yet"])
        shard = self.forward.shard
        lines.append(
            f"last forward: {shard.batch} x {shard.length} tokens, this rank holds {shard.slice_length} from "
            f"{shard.rank * shard.slice_length} on"
        )
        sizes = [(e.rows_received * b, e.rows_sent * b) for e, b in self.forward.exchanges]
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
