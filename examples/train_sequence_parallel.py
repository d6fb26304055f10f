"""Trains on texts that are split over several processes: a LongNet from scratch, or LoRA on a patched checkpoint.

    torchrun --nproc_per_node 2 -m examples.train_sequence_parallel                        # from scratch, on CPUs too
    accelerate launch --config_file configuration/accelerate/gpus_8.yaml -m examples.train_sequence_parallel \\
        --model HuggingFaceTB/SmolLM2-135M --block-size 65536 --mixed-precision bf16
    python -m examples.train_sequence_parallel                                             # one process: the same curve

All processes share each text unless --sequence-parallel-size says fewer; then the groups share the batches. What
differs from a stock Accelerate loop are the three lines marked below. Checkpoints are whole ones that know nothing of
the processes: --resume goes on from the newest, also with another --sequence-parallel-size.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    HfArgumentParser,
    default_data_collator,
    get_scheduler,
)

from examples.packing import pack
from examples.reporting import new_figure, provenance, save_figure, write_json
from examples.runs import (
    DEMO_PRESET,
    check_least,
    end_script,
    geometric_patterns,
    load_checkpoint,
    open_output,
    option,
    save_checkpoint,
    start_tracking,
    trackers,
)
from examples.texts import load_text
from modeling_longnet import LongNetConfig, LongNetForCausalLM, patch_model
from modeling_longnet.sequence_parallel import SequenceParallel
from modeling_longnet.streaming import interrupts_noted


@dataclass
class Settings:
    sequence_parallel_size: int | None = option(None, "processes that share a text; all of them if left out")
    model: str | None = option(None, "a checkpoint to patch and train with LoRA; without it, a LongNet from scratch")
    segment_lengths: list[int] | None = option(None, "of the patch; geometric up to --block-size if left out")
    dilation_rates: list[int] | None = option(None, "of the patch, as many")
    preset: str = option(DEMO_PRESET, "of the LongNet from scratch")
    text: str = option("python-docs", "a file, a folder, or a name out of texts.py")
    output_dir: str = option("runs/sequence-parallel", "where everything goes")
    block_size: int = option(2048, "tokens of a text")
    batch_size: int = option(1, "texts of a group of processes in a step")
    max_steps: int = option(100, "optimizer steps")
    learning_rate: float = option(6e-4, "peak of the schedule")
    warmup_steps: int = option(10, "optimizer steps")
    max_grad_norm: float = option(2.0, "as in the paper")
    mixed_precision: str = option("no", "no, bf16, fp16")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    save_steps: int = option(50, "steps between checkpoints")
    save_total_limit: int = option(2, "older checkpoints are removed")
    report_to: list[str] | None = option(None, "trackers, such as tensorboard, trackio or wandb, that are installed")
    resume: bool = option(False, "go on from the newest checkpoint of --output-dir")
    seed: int = option(0, "of weights and the order of the texts")

    def __post_init__(self):
        check_least(self, ("block_size", "batch_size", "max_steps", "save_steps", "save_total_limit"))
        given = [name for name in ("segment_lengths", "dilation_rates") if getattr(self, name) is not None]
        if len(given) == 1:
            raise ValueError(f"`segment_lengths` and `dilation_rates` belong together, got {given[0]} alone.")
        if given and self.model is None:
            raise ValueError("`segment_lengths` is for a checkpoint, `model`; a LongNet's schedule is in its `preset`.")


# What may differ between a run and its continuation: it changes neither the model nor the batches.
FREE_TO_CHANGE = {"output_dir", "resume", "report_to", "save_steps", "save_total_limit", "sequence_parallel_size"}


class Blocks(Dataset):
    """Endless epochs of shuffled blocks, from item `first` on: their order depends on the seed only."""

    def __init__(self, blocks: torch.Tensor, seed: int, first: int, count: int):
        self.blocks, self.seed, self.first, self.count = blocks, seed, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, item = divmod(self.first + index, len(self.blocks))
        order = torch.randperm(len(self.blocks), generator=torch.Generator().manual_seed(self.seed + epoch))
        ids = self.blocks[order[item]].long()
        return {"input_ids": ids, "labels": ids}


def make_model(settings: Settings):
    """The model and its tokenizer."""
    if settings.model is None:
        tokenizer = ByT5Tokenizer(extra_ids=0)
        positions = settings.block_size
        config = LongNetConfig.from_pretrained(
            settings.preset, vocab_size=len(tokenizer), max_position_embeddings=positions
        )
        model = LongNetForCausalLM(config)
    else:
        from peft import LoraConfig, get_peft_model

        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        config = AutoConfig.from_pretrained(settings.model)
        for name in ("attention_dropout", "attn_pdrop"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(settings.model, config=config)
        lengths, rates = settings.segment_lengths, settings.dilation_rates
        if lengths is None:
            lengths, rates = map(list, zip(*geometric_patterns(settings.block_size, 256, 4, clip=True)))
        patch_model(model, lengths, rates)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        if settings.model is not None:
            model.enable_input_require_grads()
    return model, tokenizer


class Run:
    def __init__(self, settings: Settings):
        self.settings = settings
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=settings.mixed_precision,
            log_with=trackers(settings.report_to),
            project_dir=settings.output_dir,
        )
        set_seed(settings.seed)
        model, self.tokenizer = make_model(settings)
        self.data = pack([load_text(settings.text)], self.tokenizer, settings.block_size, 0.05, 4)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        size = settings.sequence_parallel_size or self.accelerator.num_processes
        self.sp = SequenceParallel(self.accelerator, size)  # one of the three lines
        self.collate = self.sp.collator(default_data_collator)  # one of the three lines
        width = self.sp.data_parallel_size
        scheduler = get_scheduler(
            "cosine", optimizer, settings.warmup_steps * width, num_training_steps=settings.max_steps * width
        )
        prepared = self.sp.prepare(model, optimizer, scheduler)  # one of the three lines
        self.model, self.optimizer, self.scheduler = prepared
        self.history: list[dict] = []
        self.identity = {name: value for name, value in asdict(settings).items() if name not in FREE_TO_CHANGE}
        self.identity |= {"data": self.data.fingerprint, "data_parallel_size": width}

    def loader(self) -> DataLoader:
        """The batches from the next step to the last."""
        settings = self.settings
        batch = settings.batch_size * self.sp.data_parallel_size
        done, left = len(self.history) * batch, (settings.max_steps - len(self.history)) * batch
        blocks = Blocks(self.data.train, settings.seed, done, left)
        return self.sp.prepare(DataLoader(blocks, settings.batch_size, collate_fn=self.collate))

    def step(self, batch: dict) -> float:
        """One optimizer step; the loss in nats per token."""
        loss = self.model(**batch).loss
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return self.accelerator.reduce(loss.detach(), "mean").item()

    def train(self) -> bool:
        """To `max_steps`, or to an interrupt: then returns False, with a checkpoint saved."""
        settings, accelerator = self.settings, self.accelerator
        state = {"history": self.history, "identity": self.identity}
        progress = tqdm(total=settings.max_steps, initial=len(self.history), disable=not accelerator.is_main_process)
        self.model.train()
        with interrupts_noted() as noted, progress:
            for batch in self.loader():
                began = time.perf_counter()
                loss = self.step(batch)
                row = {"step": len(self.history) + 1, "loss": loss, "seconds": time.perf_counter() - began}
                self.history.append(row)
                accelerator.log({"loss": loss, "learning_rate": self.scheduler.get_last_lr()[0]}, step=row["step"])
                progress.update()
                progress.set_postfix(loss=f"{loss:.3f}")
                if row["step"] == 1 and accelerator.is_main_process:
                    progress.write(self.sp.report())
                stop = bool(accelerator.reduce(torch.tensor(len(noted), device=accelerator.device)))
                if stop or row["step"] in (settings.max_steps, *range(0, settings.max_steps, settings.save_steps)):
                    folder = save_checkpoint(accelerator, settings, state)
                if stop and row["step"] < settings.max_steps:
                    progress.write(f"stopped at step {row['step']}, saved as {folder}; go on with --resume")
                    return False
        return True

    @torch.no_grad()
    def evaluate(self) -> float:
        """Perplexity of held-out texts, sequence-parallel as well."""
        self.model.eval()
        rows = [{"input_ids": block.long(), "labels": block.long()} for block in self.data.evaluation]
        losses = []
        for row in rows:
            batch = {name: x if not isinstance(x, torch.Tensor) else x.to(self.accelerator.device)
                     for name, x in self.collate([row]).items()}  # fmt: skip
            losses.append(self.accelerator.reduce(self.model(**batch).loss, "mean").item())
        return math.exp(sum(losses) / len(losses))

    def finish(self) -> dict:
        """Writes the model, results.json and loss.png, on the first process."""
        perplexity = self.evaluate()
        model, output = self.accelerator.unwrap_model(self.model), Path(self.settings.output_dir)
        result = {
            "provenance": provenance(),
            "settings": asdict(self.settings),
            "processes": self.accelerator.num_processes,
            "sequence_parallel": self.sp.report().splitlines(),
            "history": self.history,
            "perplexity": perplexity,
        }
        if self.accelerator.is_main_process:
            model.save_pretrained(output)
            self.tokenizer.save_pretrained(output)
            write_json(output / "results.json", result)
            figure, (axes,) = new_figure()
            axes.plot([row["step"] for row in self.history], [row["loss"] for row in self.history])
            axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=self.sp.describe())
            save_figure(figure, output / "loss.png", result["provenance"])
            print(" ".join(f"{row['loss']:.4f}" for row in self.history[:: max(1, len(self.history) // 20)]))
            print(f"perplexity of held-out text {perplexity:.3f}; model, results.json and loss.png in {output}")
        return result


def main(arguments: list[str] | None = None) -> dict | None:
    """Runs the script; returns what results.json holds, or None if it was interrupted."""
    (settings,) = HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses(arguments)
    output = open_output(settings)
    run = Run(settings)
    if settings.resume:
        run.history = load_checkpoint(run.accelerator, output, run.identity)["history"]
    start_tracking(run.accelerator, settings)
    result = run.finish() if run.train() else None
    run.accelerator.end_training()
    return result


if __name__ == "__main__":
    end_script(main)
