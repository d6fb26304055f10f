"""Trains a LongNet language model from scratch on any text.

    python -m examples.train_causal_lm                              # the language reference inside every Python
    python -m examples.train_causal_lm --text my_book.txt --preset configuration/longnet-enwik8-small.json
    accelerate launch -m examples.train_causal_lm --text python-source --block-size 16384
    python -m examples.train_causal_lm --resume                     # from the newest checkpoint of --output-dir

Bytes are the tokens unless --tokenizer names one. Ctrl-C ends the run after the current step, with a checkpoint. On one
machine and one device, a resumed run gives the weights of a run that was never stopped, to the last bit on a CPU.
In --output-dir: the model and its tokenizer for `from_pretrained`, checkpoint-N folders, results.json, training.png.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from tqdm.auto import tqdm
from transformers import AutoTokenizer, ByT5Tokenizer, HfArgumentParser, PreTrainedTokenizerBase, get_scheduler

from examples.packing import pack
from examples.perplexity import loss_by_position, summarise
from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.runs import (
    DEMO_PRESET,
    check_least,
    end_script,
    load_checkpoint,
    open_output,
    option,
    save_checkpoint,
    start_tracking,
    trackers,
)
from examples.texts import load_text
from modeling_longnet import DilatedCache, LongNetConfig, LongNetForCausalLM
from modeling_longnet.streaming import interrupts_noted


# It reports at every checkpoint that tied weights are stored once.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


@dataclass
class Settings:
    text: str = option("python-docs", "a file, a folder, or a name out of texts.py")
    dataset_name: str | None = option(None, "a dataset for `datasets.load_dataset`, in place of --text")
    dataset_config_name: str | None = option(None, "its configuration")
    dataset_split: str = option("train", "its split")
    text_column: str = option("text", "its column with the text")
    tokenizer: str | None = option(None, "a tokenizer's folder or Hub id; without it, bytes")
    preset: str = option(DEMO_PRESET, "a model configuration")
    output_dir: str = option("runs/train", "where everything goes")
    block_size: int | None = option(None, "tokens of a block; the configuration's max_position_embeddings if left out")
    chunk_size: int | None = option(
        None,
        "read blocks in chunks of that many tokens with a bounded cache: a step's memory is that of a chunk, whatever "
        "the block size. Gradients end at a chunk's beginning: the keys and values of earlier chunks are constants",
    )
    batch_size: int = option(1, "blocks of a device in a forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes of an optimizer step")
    max_steps: int = option(1000, "optimizer steps")
    learning_rate: float = option(6e-4, "peak of the schedule")
    lr_scheduler_type: str = option("cosine", "cosine, linear, or another name `get_scheduler` knows")
    warmup_steps: int = option(100, "optimizer steps")
    adam_beta1: float = option(0.9, "as in the paper")
    adam_beta2: float = option(0.98, "as in the paper")
    weight_decay: float = option(0.01, "as in the paper, on all parameters")
    max_grad_norm: float = option(2.0, "as in the paper")
    mixed_precision: str = option("auto", "no, bf16, fp16; auto is bf16 on a GPU that has it, else no")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    eval_fraction: float = option(0.05, "the end of the text, kept out of training")
    eval_blocks: int = option(16, "at most that many of its blocks are evaluated")
    eval_steps: int = option(250, "steps between evaluations; the last step is always followed by one")
    save_steps: int = option(250, "steps between checkpoints")
    save_total_limit: int = option(2, "older checkpoints are removed")
    report_to: list[str] | None = option(None, "trackers, such as tensorboard, trackio or wandb, that are installed")
    resume: bool = option(False, "go on from the newest checkpoint of --output-dir")
    seed: int = option(0, "of weights, dropout and the order of the blocks")
    sample_tokens: int = option(256, "tokens sampled after training, 0 for none")

    def __post_init__(self):
        counts = "batch_size gradient_accumulation_steps max_steps eval_blocks eval_steps save_steps save_total_limit"
        check_least(self, counts.split())
        check_least(self, ["sample_tokens"], 0)
        if self.block_size is not None:
            check_least(self, ["block_size"], 2)
        if self.chunk_size is not None:
            check_least(self, ["chunk_size"])
        if self.chunk_size is not None and self.gradient_checkpointing:
            raise ValueError("`gradient_checkpointing` cannot be had with `chunk_size`: it runs without a cache.")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must lie between 0 and 1, got {self.eval_fraction}.")


# What may differ between a run and its continuation: it changes neither the model nor the batches.
FREE_TO_CHANGE = {"output_dir", "resume", "report_to", "max_steps", "eval_blocks", "eval_steps", "save_steps",
                  "save_total_limit", "sample_tokens"}  # fmt: skip


def load_documents(settings: Settings) -> list[str]:
    if settings.dataset_name is None:
        return [load_text(settings.text)]
    import datasets

    name, split = settings.dataset_name, settings.dataset_split
    dataset = datasets.load_dataset(name, settings.dataset_config_name, split=split)
    if settings.text_column not in dataset.column_names:
        raise ValueError(f"`text_column` must be one of {dataset.column_names}, got {settings.text_column!r}.")
    return list(dataset[settings.text_column])


def make_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(settings.tokenizer) if settings.tokenizer else ByT5Tokenizer(extra_ids=0)


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> LongNetForCausalLM:
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LongNetConfig.from_pretrained(settings.preset, vocab_size=len(tokenizer), **special)
    if settings.block_size is not None and settings.block_size > config.max_position_embeddings:
        raise ValueError(
            f"`block_size` must not exceed the configuration's max_position_embeddings "
            f"({config.max_position_embeddings}), got {settings.block_size}."
        )
    model = LongNetForCausalLM(config)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def make_accelerator(settings: Settings) -> Accelerator:
    precision = settings.mixed_precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it torchrun's processes would not know of each other
        mixed_precision=precision,
        log_with=trackers(settings.report_to),
        project_dir=settings.output_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation_steps),
        step_scheduler_with_optimizer=False,  # by default it would advance once per process
    )


class Trainer:
    def __init__(self, settings: Settings):
        self.settings = settings
        self.accelerator = make_accelerator(settings)
        set_seed(settings.seed)
        self.tokenizer = make_tokenizer(settings)
        model = make_model(settings, self.tokenizer)
        self.block_size = settings.block_size or model.config.max_position_embeddings
        documents = load_documents(settings)
        self.data = pack(documents, self.tokenizer, self.block_size, settings.eval_fraction, settings.eval_blocks)
        self.batches_per_epoch = len(self.data.train) // (settings.batch_size * self.accelerator.num_processes)
        if not self.batches_per_epoch:
            raise ValueError(
                f"`batch_size` must leave a batch for every process, got {settings.batch_size} "
                f"for {len(self.data.train)} blocks and {self.accelerator.num_processes} processes."
            )
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
        )
        scheduler = get_scheduler(
            settings.lr_scheduler_type, optimizer, settings.warmup_steps, num_training_steps=settings.max_steps
        )
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.history: list[dict] = []
        self.evaluations: list[dict] = []

    @property
    def identity(self) -> dict[str, Any]:
        """What a continuation must have in common with the run that it continues."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in FREE_TO_CHANGE}
        config = json.loads(self.accelerator.unwrap_model(self.model).config.to_json_string())
        return settings | {
            "block_size": self.block_size,
            "data": self.data.fingerprint,
            "num_processes": self.accelerator.num_processes,
            "preset": {name: value for name, value in config.items() if name != "transformers_version"},
        }

    @property
    def tokens_per_step(self) -> int:
        settings = self.settings
        blocks = settings.batch_size * settings.gradient_accumulation_steps * self.accelerator.num_processes
        return blocks * self.block_size

    def batches(self, first_step: int) -> Iterator[torch.Tensor]:
        """Endless batches [B, N] from the one that follows `first_step` steps: their order depends on the seed only."""
        size, rank = self.settings.batch_size, self.accelerator.process_index
        for index in itertools.count(first_step * self.settings.gradient_accumulation_steps):
            epoch, batch = divmod(index, self.batches_per_epoch)
            order = torch.Generator().manual_seed(self.settings.seed + epoch)
            rows = torch.randperm(len(self.data.train), generator=order)
            start = (batch * self.accelerator.num_processes + rank) * size
            yield self.data.train[rows[start : start + size]].long().to(self.accelerator.device)

    def backward(self, batch: torch.Tensor) -> torch.Tensor:
        """Adds the gradients of a batch [B, N]; returns its mean loss, detached."""
        if self.settings.chunk_size is None:
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
            self.accelerator.backward(loss)
            return loss.detach()
        cache = DilatedCache(self.accelerator.unwrap_model(self.model).config, max_length=batch.shape[1])
        total = torch.zeros((), device=batch.device)
        for start in range(0, batch.shape[1] - 1, self.settings.chunk_size):
            targets = batch[:, start + 1 : start + 1 + self.settings.chunk_size]
            chunk = batch[:, start : start + targets.shape[1]]
            logits = self.model(input_ids=chunk, cache=cache).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="sum") / batch[:, 1:].numel()
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def step(self, batches: Iterator[torch.Tensor]) -> float:
        """One optimizer step; returns its mean loss in nats per token."""
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.settings.gradient_accumulation_steps):
            batch = next(batches)
            with self.accelerator.accumulate(self.model):
                loss = self.backward(batch)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss
        self.scheduler.step()
        loss = self.accelerator.reduce(total, "mean").item() / self.settings.gradient_accumulation_steps
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss}; a smaller learning rate or a longer warmup may help")
        return loss

    def evaluate(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        mine = self.data.evaluation[self.accelerator.process_index :: self.accelerator.num_processes]
        total = torch.zeros(self.block_size - 1, dtype=torch.float64)
        if len(mine):
            with self.accelerator.autocast():
                total = loss_by_position(model, mine, self.accelerator.is_main_process) * len(mine)
        total = self.accelerator.reduce(total.to(self.accelerator.device), "sum").cpu()
        model.train()
        return summarise(total / len(self.data.evaluation), self.data.bytes_per_token)

    def stop_asked(self, noted: list[int]) -> bool:
        """On any process, so that all of them save the same step."""
        if self.accelerator.num_processes == 1:
            return bool(noted)
        return self.accelerator.reduce(torch.tensor(len(noted), device=self.accelerator.device)).item() > 0

    def record(self, step: int, loss: float, seconds: float, progress: tqdm) -> None:
        speed = round(self.tokens_per_step / seconds)
        row = {"loss": loss, "learning_rate": self.scheduler.get_last_lr()[0], "tokens_per_second": speed}
        self.history.append({"step": step} | row)
        self.accelerator.log(row, step=step)
        progress.update()
        progress.set_postfix_str(f"loss {loss:.3f}, {speed} tokens/s")

    def save(self) -> Path:
        state = {"identity": self.identity, "history": self.history, "evaluations": self.evaluations}
        return save_checkpoint(self.accelerator, self.settings, state)

    def load(self) -> None:
        saved = load_checkpoint(self.accelerator, Path(self.settings.output_dir), self.identity)
        self.history, self.evaluations = saved["history"], saved["evaluations"]
        done, asked = len(self.history), self.settings.max_steps
        if done > asked:
            raise ValueError(f"`max_steps` must be at least the {done} steps already done, got {asked}.")

    def train(self) -> bool:
        """Trains to `max_steps`, or to an interrupt: then returns False, with a checkpoint saved."""
        settings, first = self.settings, len(self.history)
        batches, show = self.batches(first), self.accelerator.is_main_process
        self.model.train()
        progress = tqdm(total=settings.max_steps, initial=first, desc="training", unit="step", disable=not show)
        with interrupts_noted() as noted, progress:
            for step in range(first + 1, settings.max_steps + 1):
                began = time.perf_counter()
                self.record(step, self.step(batches), time.perf_counter() - began, progress)
                last, stop = step == settings.max_steps, self.stop_asked(noted)
                if last or (step % settings.eval_steps == 0 and not stop):
                    self.evaluations.append({"step": step} | (found := self.evaluate()))
                    self.accelerator.log({f"eval_{k}": x for k, x in found.items() if isinstance(x, float)}, step=step)
                    progress.write(describe(self.evaluations[-1]))
                if last or stop or step % settings.save_steps == 0:
                    folder = self.save()
                if stop and not last:
                    progress.write(f"stopped at step {step}, saved as {folder}; go on with --resume")
                    return False
        return True

    def sample(self) -> dict[str, str]:
        """What the model writes after the first quarter of the first evaluation block."""
        prompt = self.data.evaluation[:1, : max(1, self.block_size // 4)].long().to(self.accelerator.device)
        model = self.accelerator.unwrap_model(self.model).eval()
        new = min(self.settings.sample_tokens, self.block_size - prompt.shape[1])
        mask = torch.ones_like(prompt)
        tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=True, temperature=0.7)[0]
        decode = self.tokenizer.decode
        return {"prompt": decode(tokens[: prompt.shape[1]]), "continuation": decode(tokens[prompt.shape[1] :])}


def describe(evaluation: dict[str, Any]) -> str:
    buckets = ", ".join(f"{b['start']}-{b['end']}: {b['perplexity']:.2f}" for b in evaluation["by_position"])
    return (
        f"step {evaluation['step']}: loss {evaluation['loss']:.3f}, perplexity {evaluation['perplexity']:.2f}, "
        f"{evaluation['bits_per_byte']:.3f} bits per byte; perplexity by position {buckets}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (left, right) = new_figure(2)
    left.plot(*zip(*((row["step"], row["loss"]) for row in result["history"])), lw=0.8, label="training")
    left.plot(*zip(*((row["step"], row["loss"]) for row in result["evaluations"])), "o-", label="held-out text")
    left.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    left.legend()
    buckets = result["evaluations"][-1]["by_position"]
    names = [f"{bucket['start']}-{bucket['end']}" for bucket in buckets]
    right.bar(names, [bucket["perplexity"] for bucket in buckets])
    right.set(xlabel="position in the block", ylabel="perplexity, held-out text")
    right.tick_params(axis="x", rotation=30)
    save_figure(figure, path, result["provenance"])


def finish(trainer: Trainer) -> dict[str, Any]:
    """Writes the model, the tokenizer, results.json and training.png; prints a sample."""
    output_dir = Path(trainer.settings.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    result = {
        "provenance": provenance(),
        "settings": asdict(trainer.settings),
        "parameters": model.num_parameters(),
        "history": trainer.history,
        "evaluations": trainer.evaluations,
    }
    if trainer.settings.sample_tokens:
        result["sample"] = trainer.sample()
        print(f"\n{result['sample']['prompt'][-200:]}\n---- and the model goes on ----\n"
              f"{result['sample']['continuation']}\n")  # fmt: skip
    model.save_pretrained(output_dir)
    trainer.tokenizer.save_pretrained(output_dir)
    write_json(output_dir / "results.json", result)
    plot(result, output_dir / "training.png")
    losses = [row["loss"] for row in trainer.history]
    few = max(1, min(10, len(losses) // 2))
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    print(f"training loss, mean of {few} steps: first {first:.3f}, last {last:.3f} nats per token")
    print(f"model, results.json and training.png in {output_dir}")
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Runs the script; returns what results.json holds (nothing on other processes), or None if it was interrupted."""
    (settings,) = HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses(arguments)
    open_output(settings)
    trainer = Trainer(settings)
    if settings.resume:
        trainer.load()
    trainer.accelerator.print(
        f"{trainer.accelerator.unwrap_model(trainer.model).num_parameters():,} parameters, "
        f"{trainer.data.train.numel():,} tokens to train on, {trainer.tokens_per_step:,} a step"
    )
    start_tracking(trainer.accelerator, settings)
    result = None
    if trainer.train():
        result = finish(trainer) if trainer.accelerator.is_main_process else {}
    trainer.accelerator.end_training()
    return result


if __name__ == "__main__":
    end_script(main)
