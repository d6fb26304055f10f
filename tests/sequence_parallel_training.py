"""Short trainings for test_sequence_parallel.py: `sequence_parallel_training.py FOLDER SIZE RECIPE...`.

SIZE 0 is stock training without any of our code around it. Parameters and losses go to FOLDER/RECIPE.pt.
"""

import functools
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from peft import LoraConfig, get_peft_model
from sequence_parallel_worker import VOCABULARY, longnet, patched_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from modeling_longnet import sequence_training
from modeling_longnet.sequence_parallel import SequenceParallel


LENGTH, STEPS = 45, 3


def examples(masked: bool = True, count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Texts of one length; with `masked`, most of them have targets in their last tokens only."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    labels = rows.clone()
    for index in range(count if masked else 0):
        labels[index, : LENGTH - 5 * (index % 4) - 3] = -100
    mask = torch.ones(LENGTH, dtype=torch.long)
    return [{"input_ids": ids, "attention_mask": mask, "labels": target} for ids, target in zip(rows, labels)]


def data_parallel_size(size: int) -> int:
    return int(os.environ.get("WORLD_SIZE", 1)) // max(1, size)


def result_of(model: torch.nn.Module, **extra) -> dict:
    """Parameters by name; those of FSDP2 are gathered, by all ranks."""
    state = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {"parameters": {n.removeprefix("module."): p.detach().clone() for n, p in state.items()}, **extra}


# Accelerate


def accelerate_loop(folder: Path, size: int, make_model=longnet, accumulate: int = 1, masked: bool = True, **settings):
    """A stock loop; only the three lines of the module's docstring differ with sequence parallelism."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5),
        **settings,
    )
    set_seed(0)
    model = make_model(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    # Accelerate's scheduler advances once per data-parallel rank and step.
    width = data_parallel_size(size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8 ** (step / width))
    collate, prepare = default_data_collator, accelerator.prepare
    sp = None
    if size:
        sp = SequenceParallel(accelerator, size)
        collate, prepare = sp.collator(collate), sp.prepare
    # DDP averages the means of the data-parallel ranks: they are the mean of all where ranks have as many targets.
    loader = DataLoader(examples(masked), batch_size=4 // width, shuffle=True, collate_fn=collate)
    model, optimizer, loader, scheduler = prepare(model, optimizer, loader, scheduler)
    losses, rates, steps = [], [], 0
    model.train()
    while steps < STEPS:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            if accelerator.sync_gradients:
                steps += 1
                rates += [scheduler.get_last_lr()[0]]
            if steps == STEPS:
                break
    if size:
        print(sp.report())
    return result_of(accelerator.unwrap_model(model), losses=losses, rates=rates)


def llama_with_lora(dtype, reentrant=None):
    model = patched_llama(dtype=dtype)
    torch.manual_seed(4)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return get_peft_model(model, lora)


def fully_sharded_loop(folder: Path, size: int):
    """FSDP2 as Accelerate applies it, which it does on accelerators only."""
    accelerator = Accelerator(cpu=True)
    model, collate, prepare = longnet(dtype=torch.float32), default_data_collator, accelerator.prepare
    if size:
        sp = SequenceParallel(accelerator, size)
        collate, prepare = sp.collator(collate), sp.prepare
        sp.add_hooks(model)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for batch, _ in zip(prepare(DataLoader(examples(), batch_size=4, collate_fn=collate)), range(STEPS)):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return result_of(model, losses=losses)


def checkpointed_longnet(dtype, reentrant):
    model = longnet(dtype=dtype)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def compiled_longnet(dtype):
    model = longnet(dtype=dtype)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


# Trainer


def training_arguments(cls, folder: Path, size: int, **settings):
    width = data_parallel_size(size)
    defaults = dict(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=4 // width, per_device_eval_batch_size=2,
        max_steps=STEPS, learning_rate=0.3, optim="sgd", max_grad_norm=0, lr_scheduler_type="linear", report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    return cls(**defaults | settings)


def finish_trainer(trainer, size, **kwargs):
    if size:
        SequenceParallel(trainer.accelerator, size).attach_trainer(trainer)
    trainer.train(**kwargs)
    evaluation = trainer.evaluate()["eval_loss"]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    model = trainer.accelerator.unwrap_model(trainer.model)
    return result_of(model, losses=losses, evaluation=evaluation, steps=trainer.state.global_step)


def hf_trainer(folder: Path, size: int, make_model=patched_llama, resume: bool = False, **settings):
    args = training_arguments(TrainingArguments, folder, size, **settings)
    data = examples()
    trainer = Trainer(make_model(dtype=torch.float32), args, train_dataset=data, eval_dataset=data[:7])
    return finish_trainer(trainer, size, **({"resume_from_checkpoint": True} if resume else {}))


class StopAt(TrainerCallback):
    """Ends a training as if it had been killed after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def resumed_trainer(folder: Path, size: int):
    """Two steps, saved in the middle of an epoch; then a new trainer goes on to the end."""
    args = training_arguments(TrainingArguments, folder, size, save_strategy="steps", save_steps=2, max_steps=5)
    data, callbacks = examples(), [StopAt(2)]
    first = Trainer(longnet(dtype=torch.float32), args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    finish_trainer(first, size)
    return hf_trainer(folder, size, make_model=longnet, resume=True, max_steps=5)


def sft_trainer(folder: Path, size: int):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{k: x[k].tolist() for k in ("input_ids", "labels")} for x in examples()]
    for index, row in enumerate(rows):  # of unequal lengths, so that the collator pads on the right
        row["input_ids"], row["labels"] = (x[index % 5 :] for x in (row["input_ids"], row["labels"]))
    args = training_arguments(SFTConfig, folder, size, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
                              pad_token="<pad>", gradient_checkpointing=True, bf16=False)  # fmt: skip
    data = Dataset.from_list(rows)
    model = patched_llama(dtype=torch.float32)
    trainer = SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=byte_tokenizer())
    return finish_trainer(trainer, size)


def byte_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1} | {str(i): i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


# The tests of the tests: planted bugs that only a training shows


def fast_scheduler(folder: Path, size: int):
    """Accelerate's scheduler as it is: one step per process."""
    with mock.patch.object(sequence_training, "step_as_data_parallel", lambda sp, scheduler: None):
        return accelerate_loop(folder, size)


def data_parallel_loader(folder: Path, size: int):
    """Accelerate's loader as it is: each process reads its own examples. Must be refused."""
    with mock.patch.object(sequence_training, "prepare_loader", lambda sp, loader: loader):
        try:
            accelerate_loop(folder, size)
        except ValueError as error:
            return {"error": str(error)}
    return {"error": "none"}


RECIPES = {
    "fast scheduler": fast_scheduler,
    "data parallel loader": data_parallel_loader,
    "loop without masks": functools.partial(accelerate_loop, masked=False),
    "accumulated": functools.partial(accelerate_loop, accumulate=2),
    "bf16": functools.partial(accelerate_loop, mixed_precision="bf16"),
    "lora reentrant": functools.partial(accelerate_loop, make_model=functools.partial(llama_with_lora, reentrant=True)),
    "not reentrant": functools.partial(
        accelerate_loop, make_model=functools.partial(checkpointed_longnet, reentrant=False)
    ),
    "compiled": functools.partial(accelerate_loop, make_model=compiled_longnet),
    "fsdp2": fully_sharded_loop,
    "trainer": hf_trainer,
    "trainer uninterrupted": functools.partial(hf_trainer, make_model=longnet, max_steps=5),
    "trainer resumed": resumed_trainer,
    "sft": sft_trainer,
}


def main(folder: str, size: str, *recipes: str) -> None:
    torch.set_num_threads(1)
    if int(size) and "WORLD_SIZE" not in os.environ:
        raise SystemExit("start this with torchrun")
    for recipe in recipes:
        result = RECIPES[recipe](Path(folder), int(size))
        result["world_size"] = dist.get_world_size() if dist.is_initialized() else 1
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(result, Path(folder) / f"{recipe}.pt")
        AcceleratorState._reset_state(reset_partial_state=True)  # the next recipe may want another precision
        GradientState._reset_state()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
