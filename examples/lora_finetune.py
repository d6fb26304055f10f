"""Teach a pretrained causal language model to read long texts at linear cost: dilated attention, then LoRA.

Takes a checkpoint (Hub id or folder) and a long text, replaces the attention by dilated attention, trains a LoRA
adapter, and measures the perplexity by context length three times: the original (dense), patched without training,
patched with the adapter. Ends with a table, a plot and a continuation of the text, and checks that what was saved loads
to the same loss.

    python -m examples.lora_finetune --demo
    python -m examples.lora_finetune --model HuggingFaceTB/SmolLM2-135M --text novel.txt --output-dir runs/novel \\
        --segment-lengths 512 2048 8192 --dilation-rates 1 4 16 --block-size 8192 --max-steps 200 --bf16

Besides the options of this file, every option of Transformers' TrainingArguments works.
"""

import copy
import json
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from examples.finding import find_passkeys, in_words
from examples.perplexity import perplexities, window_loss
from examples.reporting import caption, new_figure, provenance, save_figure, write_json
from examples.runs import end_script, last_complete_checkpoint, option, trackers
from examples.smollm2 import smollm2_135m
from examples.texts import load_text
from modeling_longnet import load_patched_model, make_model_card, patch_model, unpatch_model
from modeling_longnet.patch_rope_scaling import learned_positions
from modeling_longnet.patching import report as patch_report


DENSE, ZERO_SHOT, TUNED, DENSE_TUNED = "dense", "patched", "patched + LoRA", "dense + LoRA"
RESULTS_FILE, PLOT_FILE = "results.json", "perplexity.png"
DTYPES = ["auto", "float32", "bfloat16", "float16"]
LATER_OPTIONS = ("resume", "merge", "prompt_tokens", "new_tokens")  # may change when a run is resumed


@dataclass
class Options:
    """What to train on what. The schedule's options are those of `patch_model`."""

    model: str | None = option(None, "Hub id or folder; default SmolLM2-135M, from pip")
    text: str = option("python-docs", "a name known to texts.py, a file or a folder")
    dataset: str | None = option(None, "instead of --text, for `datasets`: a Hub id, or a folder of .jsonl files")
    text_column: str = option("text", "the dataset's column to read")
    segment_lengths: list[int] | None = option(None, "default: from the model's own window")
    dilation_rates: list[int] | None = option(None, "one per segment length")
    head_offsets: str = option("modulo", choices=["modulo", "contiguous"])
    overlap: str = option("once", choices=["once", "count"])
    num_sink_tokens: int = 4
    local: str = option("sliding", choices=["segment", "sliding"])
    layers: list[int] | None = option(None, "layers to patch; default all")
    dense_layers: list[int] | None = option(None, "or the layers to leave as they are")
    backend: str | None = option(None, "eager, sdpa or flash_attention_2; default the best")
    rope_scaling: str | None = option(
        None, 'JSON, for contexts beyond the model\'s window: {"rope_type": "yarn", "factor": 4.0}'
    )
    memory: str | None = option(
        None, 'JSON, lets queries choose blocks of earlier tokens: {} for defaults, or {"block_size": 8, "top_k": 32}'
    )
    dtype: str = option("auto", "of the weights; auto: bfloat16 on a GPU that has it", choices=DTYPES)
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    train_norms_and_embeddings: bool = option(False, "as LongLoRA found needed; larger")
    block_size: int = option(4096, "tokens per training example")
    eval_lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096, 8192])
    eval_tokens: int = option(16384, "held-out tokens that each length is measured on")
    compare_dense: bool = option(False, "also train the dense model, same data and steps")
    prompt_tokens: int = 512
    new_tokens: int = 64
    merge: bool = option(False, "also write a checkpoint with the adapter merged")
    resume: bool = option(False, "go on with an interrupted run in --output-dir")
    demo: bool = option(False, "settings for minutes on 2 CPU cores; larger with a GPU")


DEFAULTS = {
    "output_dir": "runs/lora-finetune", "max_steps": 100, "per_device_train_batch_size": 1, "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "logging_steps": 0.05, "save_steps": 0.1,
    "save_total_limit": 1, "report_to": "none", "dataloader_pin_memory": torch.cuda.is_available(),
    "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
}  # fmt: skip
DEMO = DEFAULTS | {
    "output_dir": "runs/demo", "segment_lengths": [256, 1024, 4096], "dilation_rates": [1, 4, 16], "block_size": 1024,
    "max_steps": 24, "learning_rate": 1e-3, "eval_lengths": [512, 1024, 2048, 4096], "eval_tokens": 4096,
    "logging_steps": 4, "save_steps": 6, "new_tokens": 48,
}  # fmt: skip
DEMO_GPU = DEMO | {
    "segment_lengths": [512, 2048, 8192], "block_size": 8192, "max_steps": 100, "eval_tokens": 65536,
    "eval_lengths": [512, 1024, 2048, 4096, 8192], "logging_steps": 10, "save_steps": 50,
}  # fmt: skip


def parse(arguments: list[str] | None) -> tuple[Options, TrainingArguments]:
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__.splitlines()[0])
    parser.usage = "%(prog)s [--demo] [--model MODEL] [--text TEXT] [--output-dir FOLDER] ...   (-h: all options)"
    given = sys.argv[1:] if arguments is None else arguments
    demo = DEMO_GPU if torch.cuda.is_available() else DEMO
    parser.set_defaults(**(demo if "--demo" in given else DEFAULTS))
    options, training = parser.parse_args_into_dataclasses(arguments)
    if (options.segment_lengths is None) != (options.dilation_rates is None):
        parser.error("--segment-lengths and --dilation-rates belong together: give both or neither")
    if options.layers and options.dense_layers:
        parser.error("--layers and --dense-layers say the same in two ways: give one of them")
    for name, least in {"block_size": 2, "eval_lengths": 2, "prompt_tokens": 1, "new_tokens": 1}.items():
        given = getattr(options, name)
        if (min(given) if isinstance(given, list) else given) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {given}")
    trackers(training.report_to)
    if training.max_steps == 0:
        parser.error("--max-steps must be at least 1, or -1 for --num-train-epochs, got 0")
    if options.eval_tokens < max(options.eval_lengths):
        parser.error(f"--eval-tokens {options.eval_tokens} is less than the longest of --eval-lengths")
    if training.world_size > 1 or training.n_gpu > 1:
        parser.error("this script runs on one device: choose it, for instance with CUDA_VISIBLE_DEVICES=0")
    output = Path(training.output_dir)
    if not options.resume and output.is_dir() and any(output.iterdir()):
        if not options.demo:
            parser.error(f"--output-dir {output} holds an earlier run: choose another one, or go on with --resume")
        # A second `make demo` begins anew; only what a demo writes is removed.
        for path in (*output.glob("checkpoint-*"), output / "adapter", output / "merged", output / "dense"):
            shutil.rmtree(path, ignore_errors=True)
        (output / RESULTS_FILE).unlink(missing_ok=True)
    return options, training


def default_schedule(window: int) -> tuple[list[int], list[int]]:
    """Segments that reach the model's own window in steps of 4, rates alike, the shortest between 128 and 512."""
    segment_lengths = [window]
    while segment_lengths[0] > 512:
        segment_lengths.insert(0, segment_lengths[0] // 4)
    return segment_lengths, [4**i for i in range(len(segment_lengths))]


def patch_settings(options: Options, config: PreTrainedConfig) -> dict:
    """The arguments for `patch_model`."""
    lengths, rates = options.segment_lengths, options.dilation_rates
    if lengths is None:
        lengths, rates = default_schedule(getattr(config, "max_position_embeddings", 8192))
    names = ("head_offsets", "overlap", "num_sink_tokens", "local", "layers", "backend")
    settings = {"segment_lengths": lengths, "dilation_rates": rates} | {name: getattr(options, name) for name in names}
    if options.dense_layers:
        layers = range(config.num_hidden_layers)
        wrong = sorted(set(options.dense_layers) - set(layers))
        if wrong:
            raise ValueError(f"--dense-layers must be layers of 0..{len(layers) - 1}, got {wrong}.")
        settings["layers"] = sorted(set(layers) - set(options.dense_layers))
    for name in ("rope_scaling", "memory"):
        given = getattr(options, name)
        if given:
            try:
                settings[name] = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(f"--{name.replace('_', '-')} must be JSON, got {given!r}: {error}.") from None
            if not isinstance(settings[name], dict):
                raise ValueError(f"--{name.replace('_', '-')} must be a JSON object, got {given!r}.")
    if (settings.get("memory") or {}).get("dimensions"):
        raise ValueError("--memory: `dimensions` are calibrated on a model that stays as it is, not in training.")
    return settings


def load_base(options: Options, training: TrainingArguments) -> torch.nn.Module:
    bf16 = training.device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if bf16 else "float32"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    return model.to(training.device).eval()


def check_early(model: torch.nn.Module, settings: dict, options: Options) -> None:
    """Refuses what the model cannot do, before hours of other work: the patch, its backend, the lengths."""
    longest = max(options.block_size, *options.eval_lengths, options.prompt_tokens + options.new_tokens)
    for _, rows in learned_positions(model):
        if longest > rows:
            raise ValueError(
                "--block-size, --eval-lengths and --prompt-tokens + --new-tokens must not exceed the "
                f"{rows} learned positions of {type(model).__name__}, got {longest}."
            )
    patch_model(model, **settings)
    window_loss(model, torch.zeros(2, dtype=torch.long))
    unpatch_model(model)


def tokenize(tokenizer, options: Options) -> tuple[list[dict], torch.Tensor]:
    """Training blocks out of the text's beginning, and the held-out tokens [eval_tokens] of its end."""
    if options.dataset:
        from datasets import load_dataset

        text = "\n\n".join(load_dataset(options.dataset, split="train")[options.text_column])
    else:
        text = load_text(options.text)
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    blocks = ids[: -options.eval_tokens].split(options.block_size)[:-1] if len(ids) > options.eval_tokens else []
    if not blocks:
        raise ValueError(
            f"`text` must hold more than --eval-tokens + --block-size = {options.eval_tokens + options.block_size} "
            f"tokens, got {len(ids)}."
        )
    return [{"input_ids": block, "labels": block} for block in blocks], ids[-options.eval_tokens :]


def lora_config(model: torch.nn.Module, options: Options) -> LoraConfig:
    """LoRA on every projection of the attention, whatever the family calls it."""
    paths = [
        path for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and "att" in ".".join(path.split(".")[-2:-1])
    ]  # fmt: skip
    if not paths:
        raise ValueError(f"No attention projections were found in {type(model).__name__}.")
    trained = None
    if options.train_norms_and_embeddings:
        norms = {path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()}
        embeddings = {p for p, module in model.named_modules() if module is model.get_input_embeddings()}
        trained = sorted({path.rsplit(".", 1)[-1] for path in norms | embeddings})
    return LoraConfig(
        task_type="CAUSAL_LM", r=options.lora_rank, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout,
        # Two components, since GPT-2's mlp.c_proj has its name from the attention's.
        target_modules=sorted({".".join(path.rsplit(".", 2)[-2:]) for path in paths}),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        modules_to_save=trained,
        ensure_weight_tying=bool(trained) and bool(model.config.tie_word_embeddings),
    )  # fmt: skip


def train(
    model: torch.nn.Module, blocks: list[dict], options: Options, training: TrainingArguments, done: dict | None
) -> tuple:
    """The model with a trained adapter, and what the training took: `done`, if an earlier run has finished it."""
    set_seed(training.seed)
    model = get_peft_model(model, lora_config(model, options))
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    checkpoint = last_complete_checkpoint(Path(training.output_dir)) if options.resume else None
    begin = int(checkpoint.rsplit("-", 1)[-1]) if checkpoint else 0
    if done and done["steps"] == begin:
        model.load_adapter(checkpoint, model.active_adapter)  # the Trainer would take one more step
        return model.eval(), done
    trainer = Trainer(model=model, args=training, train_dataset=blocks)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    # Without the autocast that --bf16 and --fp16 wrap around it: what is measured is what loads again.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    steps = trainer.state.global_step - begin
    trainable, total = model.get_nb_trainable_parameters()
    facts = {
        "steps": trainer.state.global_step,
        "tokens_per_step": options.block_size * training.train_batch_size * training.gradient_accumulation_steps,
        "seconds": output.metrics["train_runtime"],
        "seconds_per_step": output.metrics["train_runtime"] / max(steps, 1),
        "trainable_parameters": trainable,
        "parameters": total,
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    return model.eval(), facts


def check_reload(name: str, model: torch.nn.Module, ids: torch.Tensor, expected: float, tolerance: float) -> float:
    """The loss of a reloaded model, which must be the one that was saved."""
    loss = window_loss(model, ids)
    if not abs(loss - expected) <= tolerance:
        raise RuntimeError(f"The reloaded {name} has a loss of {loss:.6f}, but {expected:.6f} when it was saved.")
    print(f"The reloaded {name} has the same loss: {loss:.6f} against {expected:.6f}.")
    return loss


def continuation(model: torch.nn.Module, tokenizer, ids: torch.Tensor, options: Options) -> tuple[str, str]:
    """The prompt out of the held-out text and what the model makes of it, greedily."""
    prompt = ids[None, : options.prompt_tokens].to(model.device)
    output = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.new_tokens, do_sample=False
    )[0]
    return tokenizer.decode(output[: prompt.shape[1]]), tokenizer.decode(output[prompt.shape[1] :])


def table(perplexity: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each context length, a column for each model."""
    names = [name for name in (DENSE, ZERO_SHOT, TUNED, DENSE_TUNED) if name in perplexity]
    lines = ["| context | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
    for length in perplexity[DENSE]:
        cells = [f"{perplexity[name][length]:.2f}" for name in names]
        lines.append(f"| {int(length):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    figure, (axes,) = new_figure()
    for name, by_length in results["perplexity"].items():
        axes.plot([int(length) for length in by_length], list(by_length.values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    ticks = [int(length) for length in results["perplexity"][DENSE]]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(xlabel="context length (tokens)", ylabel="perplexity", title=results["title"].replace(", ", "\n"))
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    save_figure(figure, path, results["run"])


class Results:
    """results.json in the output folder: what is in it is not measured again after --resume."""

    def __init__(self, folder: Path, facts: dict):
        self.path, self.data = folder / RESULTS_FILE, facts | {"perplexity": {}, "training": {}}
        if self.path.is_file():
            earlier = json.loads(self.path.read_text())
            was, now = ({"model": run["model"]} | run["options"] | run["settings"] for run in (earlier, facts))
            names = [name for name in was | now if was.get(name) != now.get(name)]
            changed = [f"{name} {now.get(name)} instead of {was.get(name)}" for name in names]
            if changed:
                raise ValueError(f"--resume wants the interrupted run's options, got {', '.join(changed)}.")
            self.data = earlier | {"run": facts["run"]}

    def trained(self, name: str, model: torch.nn.Module, *args) -> torch.nn.Module:
        """The model with its adapter; what `train` took is written at once, as the mark that it has finished."""
        model, self.data["training"][name] = train(model, *args, self.data["training"].get(name))
        write_json(self.path, self.data)
        return model

    def measure(self, name: str, model: torch.nn.Module, ids: torch.Tensor, lengths: list[int]) -> None:
        if name not in self.data["perplexity"]:
            self.data["perplexity"][name] = perplexities(model, ids, lengths, name)
            write_json(self.path, self.data)


def save_and_check(
    model: torch.nn.Module, tokenizer, held_out: torch.Tensor, options: Options, training: TrainingArguments, data: dict
) -> None:
    """Saves the adapter (and the merged model), loads it anew and continues the text; `data` takes what was found."""
    output = Path(training.output_dir)
    adapter, probe = output / "adapter", held_out[: min(options.eval_lengths)]
    data["loss"] = window_loss(model, probe)
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    prompt, text = continuation(model, tokenizer, held_out, options)
    reloaded = load_patched_model(adapter, dtype=model.dtype).to(training.device).eval()
    data["reloaded_loss"] = check_reload("adapter", reloaded, probe, data["loss"], 1e-5)
    if options.merge:
        del reloaded
        merged = model.merge_and_unload()
        merged.save_pretrained(output / "merged")
        make_model_card(merged, training.hub_model_id or output.name).save(output / "merged" / "README.md")
        tokenizer.save_pretrained(output / "merged")
        reloaded = load_patched_model(output / "merged", dtype=merged.dtype).to(training.device).eval()
        # Merging rounds the sum of weight and adapter to the weights' precision.
        tolerance = 1e-3 if merged.dtype == torch.float32 else 5e-2
        data["merged_loss"] = check_reload("merged model", reloaded, probe, data["loss"], tolerance)
    data["continuation"] = {"prompt": prompt, "text": text}


def push(folder: Path, training: TrainingArguments) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=training.hub_token)
    repository = api.create_repo(
        training.hub_model_id or Path(training.output_dir).name, private=training.hub_private_repo, exist_ok=True
    )
    api.upload_folder(folder_path=folder, repo_id=repository.repo_id)
    print(f"Pushed {folder} to {repository}.")


def main(arguments: list[str] | None = None) -> dict:
    options, training = parse(arguments)
    # The Trainer would push its own checkpoints; what is to be shared is the finished folder.
    push_to_hub, training.push_to_hub = training.push_to_hub, False
    begin, output = time.time(), Path(training.output_dir)
    options.model = options.model or str(smollm2_135m())
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    blocks, held_out = tokenize(tokenizer, options)
    model = load_base(options, training)
    settings = patch_settings(options, model.config)
    run_options = {k: v for k, v in vars(options).items() if k not in LATER_OPTIONS}
    schedule = " ".join(f"{w}/{r}" for w, r in zip(settings["segment_lengths"], settings["dilation_rates"]))
    if options.dense_layers:
        schedule += f", {len(set(options.dense_layers))} of {model.config.num_hidden_layers} layers dense"
    results = Results(output, {
        "title": f"{Path(options.model).name} on {options.dataset or Path(options.text).name}, {schedule}",
        "model": options.model, "settings": settings, "options": run_options | {"max_steps": training.max_steps},
        "run": provenance(),
    })  # fmt: skip
    data, lengths = results.data, options.eval_lengths

    check_early(model, settings, options)
    results.measure(DENSE, model, held_out, lengths)
    if options.compare_dense and DENSE_TUNED not in data["perplexity"]:
        dense_training = copy.copy(training)
        dense_training.output_dir = str(output / "dense")
        dense = results.trained(DENSE_TUNED, load_base(options, training), blocks, options, dense_training)
        results.measure(DENSE_TUNED, dense, held_out, lengths)
        del dense
    model = patch_model(model, **settings)
    print(patch_report(model))
    results.measure(ZERO_SHOT, model, held_out, lengths)
    model = results.trained(TUNED, model, blocks, options, training)
    results.measure(TUNED, model, held_out, lengths)

    save_and_check(model, tokenizer, held_out, options, training, data)
    if options.demo and "finding" not in data:
        del model
        text = tokenizer.decode(held_out)
        data["finding"] = find_passkeys(load_base(options, training), tokenizer, text, settings)
    data["seconds"] = time.time() - begin
    write_json(results.path, data)
    plot(data, output / PLOT_FILE)
    report(data, output)
    if push_to_hub:
        push(output / ("merged" if options.merge else "adapter"), training)
    return data


def report(data: dict, output: Path) -> None:
    training = data["training"][TUNED]
    print(f"\n{data['title']}: perplexity by context length\n\n{table(data['perplexity'])}\n")
    if "finding" in data:
        print(f"{in_words(data['finding'])}\n")
    print(
        f"LoRA: {training['steps']} steps of {training['tokens_per_step']:,} tokens, "
        f"{training['seconds_per_step']:.1f} s each, {training['trainable_parameters']:,} of "
        f"{training['parameters']:,} parameters. In all {data['seconds'] / 60:.1f} minutes."
    )
    print(caption(data["run"]))
    print(f"Plot: {output / PLOT_FILE}\nFigures: {output / RESULTS_FILE}\nAdapter: {output / 'adapter'}\n")
    print(f"... {data['continuation']['prompt'][-300:]}\033[1m{data['continuation']['text']}\033[0m ...")


if __name__ == "__main__":
    # PEFT 0.21 asks Transformers 5.24 for a name that it has renamed: nothing to act on for who runs this.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    end_script(main)
