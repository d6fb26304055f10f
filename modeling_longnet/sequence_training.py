"""Sequence parallelism and the training loops of others: Accelerate's loaders and schedulers, Trainer, SFTTrainer."""

import functools
import types
from typing import Any

import torch
import torch.distributed as dist
from accelerate import data_loader
from accelerate.scheduler import AcceleratedScheduler

from .transformers_compat import shifts_labels


def _shared_seed(sp: Any, seed: int | None) -> int:
    """One seed for all processes: with one data-parallel rank Accelerate does not synchronise the random order."""
    seed = torch.random.initial_seed() if seed is None else seed
    if sp.data_parallel_size * sp.size == 1:
        return seed
    value = torch.tensor([seed - 2**63], dtype=torch.long, device=sp.accelerator.device)
    dist.broadcast(value, src=0)
    return int(value) + 2**63


def prepare_loader(sp: Any, loader: torch.utils.data.DataLoader) -> torch.utils.data.DataLoader:
    """The loader as `accelerator.prepare` would make it, for as many processes as there are data-parallel ranks."""
    if getattr(loader, "_is_accelerate_prepared", False):
        return loader
    accelerator = sp.accelerator
    prepared = data_loader.prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=sp.data_parallel_size,
        process_index=sp.data_parallel_rank,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types),
        dispatch_batches=False,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=True,
        data_seed=_shared_seed(sp, accelerator.dataloader_config.data_seed),
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    prepared._is_accelerate_prepared = True
    return prepared


def step_as_data_parallel(sp: Any, scheduler: Any) -> None:
    """Accelerate advances a scheduler once per process; `size` processes share a batch here."""
    if not isinstance(scheduler, AcceleratedScheduler) or not scheduler.step_with_optimizer:
        return

    def step(self, *args, **kwargs):
        if not self.gradient_state.sync_gradients:
            if self.gradient_state.adjust_scheduler:
                self.scheduler._step_count += 1
            return
        if any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        for _ in range(sp.data_parallel_size):
            if self.scheduler._step_count <= getattr(self.scheduler, "total_steps", float("inf")):
                self.scheduler.step(*args, **kwargs)

    scheduler.step = types.MethodType(step, scheduler)


def _check_trainer(trainer: Any) -> None:
    args = trainer.args
    loss = type(trainer).compute_loss.__qualname__
    problems = {
        f"`{type(trainer).__name__}` computes its loss in its own way ({loss}), which slices of texts would change": (
            loss not in ("Trainer.compute_loss", "SFTTrainer.compute_loss")
        ),
        "`average_tokens_across_devices` must be True, got False: each rank would count its own targets only": (
            not args.average_tokens_across_devices
        ),
        f"`label_smoothing_factor` must be 0, got {args.label_smoothing_factor}: it is averaged rank by rank": (
            args.label_smoothing_factor
        ),
        "`compute_loss_func` must be None: what it does with a slice of the targets cannot be known": (
            trainer.compute_loss_func is not None
        ),
        "`compute_metrics` must be None: predictions are slices (gather them with `gather_sequence`)": (
            trainer.compute_metrics is not None
        ),
        f"{type(trainer.model).__name__}.forward takes no keyword arguments, so that the number of targets of all "
        "ranks does not reach its loss": not trainer.model_accepts_loss_kwargs,
        "attach before the trainer has wrapped its model": trainer.model_wrapped is not trainer.model,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise ValueError(f"this trainer cannot run sequence-parallel: {problem}.")


def attach(sp: Any, trainer: Any) -> Any:
    """See `SequenceParallel.attach_trainer`."""
    _check_trainer(trainer)
    if sp.accelerator is None:
        sp.accelerator = trainer.accelerator
    sp.add_hooks(trainer.model)
    shifts = shifts_labels(trainer)
    trainer.data_collator = sp.collator(trainer.data_collator, shift_labels=shifts)
    accelerator = trainer.accelerator
    accelerator.prepare_data_loader = functools.partial(_prepare_trainer_loader, sp, accelerator.prepare_data_loader)
    wrappers = {"compute_loss": _compute_loss, "prediction_step": _prediction_step, "evaluation_loop": _evaluation_loop}
    for name, wrapper in wrappers.items():
        original = getattr(trainer, name)
        setattr(trainer, name, functools.update_wrapper(functools.partial(wrapper, sp, trainer, original), original))
    return trainer


def _prepare_trainer_loader(sp, original, loader, *args, **kwargs):
    return original(prepare_loader(sp, loader), *args, **kwargs)


def _compute_loss(sp, trainer, original, model, inputs, *args, num_items_in_batch=None, **kwargs):
    """In evaluation the number of targets may be left out; each rank would then divide by that of its own ones."""
    if num_items_in_batch is None and "num_items_in_batch" in inputs:
        # The trainer multiplies by the number of processes; the mean over the group is then that of all its targets.
        num_items_in_batch = inputs["num_items_in_batch"] * trainer.accelerator.num_processes
    return original(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)


def _prediction_step(sp, trainer, original, model, inputs, prediction_loss_only, *args, **kwargs):
    """The loss of a batch is the mean over the ranks that share it."""
    if not prediction_loss_only:
        raise ValueError("`predict` and metrics are not sequence-parallel: predictions would be slices of texts.")
    loss, *rest = original(model, inputs, prediction_loss_only, *args, **kwargs)
    if sp.size > 1:
        dist.all_reduce(loss, group=sp.group)
        loss = loss / sp.size
    return loss, *rest


def _evaluation_loop(sp, trainer, original, *args, **kwargs):
    """Losses are gathered from one rank of each group, so that Trainer's count of examples is right."""
    trainer.gather_function = functools.partial(_gather_for_metrics, sp)
    return original(*args, **kwargs)


def _gather_for_metrics(sp, x: torch.Tensor, **kwargs) -> torch.Tensor:
    gathered = sp.accelerator.gather(x)
    gathered = gathered.unflatten(0, (sp.data_parallel_size, sp.size, -1))[:, 0].flatten()
    state = sp.accelerator.gradient_state
    if state.end_of_dataloader and state.remainder > 0:
        return gathered[: state.remainder]
    return gathered
