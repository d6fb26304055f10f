"""Convert a LongNet, a slide encoder or a LongViT of Transformers back into a file of torchscale or Prov-GigaPath.

    python -m conversion.convert_hf_to_torchscale --checkpoint my-longnet --output-dir torchscale-longnet

The folder holds checkpoint.pt with {"model": state dict} and args.json; for a slide encoder slide_encoder.pth, for a
fine-tuned one checkpoint.pt with a bare state dict, for a LongViT longvit.pth: what the originals read.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

import modeling_longnet
from conversion import checkpoint_files as files
from conversion import longvit_format as longvit
from conversion import torchscale_format as torchscale
from conversion.gigapath_format import gigapath_key, to_head_settings, to_settings
from modeling_longnet import LongNetConfig, LongNetSlideEncoderConfig, LongViTConfig


ARCHITECTURES = (
    "LongNetForCausalLM", "LongNetForMaskedLM", "LongNetModel", "LongNetSlideEncoderModel",
    "LongNetSlideEncoderForImageClassification", "LongViTModel", "LongViTForImageClassification",
)  # fmt: skip


def load_model(checkpoint: str | Path) -> PreTrainedModel:
    """The model in a folder, as the class that saved it.

    Raises:
        ValueError: not one of ours, or weights that do not fit the configuration.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except OSError as error:
        raise ValueError(f"{checkpoint}: {str(error).splitlines()[0]}") from None
    architecture = (config.architectures or ["none"])[0]
    ours = (LongNetConfig, LongNetSlideEncoderConfig, LongViTConfig)
    if not isinstance(config, ours) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"{checkpoint}: must hold one of {', '.join(ARCHITECTURES)}, got {architecture!r} of model type "
            f"{config.model_type!r}."
        )
    try:
        model, report = getattr(modeling_longnet, architecture).from_pretrained(
            checkpoint, dtype="auto", output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{checkpoint}: {str(error).splitlines()[0]}") from None
    if wrong := {name: sorted(keys)[:5] for name, keys in report.items() if keys and name.endswith("keys")}:
        raise ValueError(f"{checkpoint}: weights and configuration do not fit together: {wrong}.")
    return model


def to_torchscale(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and arguments of torchscale, or of Prov-GigaPath for a slide encoder.

    Raises:
        ValueError: for settings that the original does not have, and NaN or infinite weights.
    """
    config, weights = model.config, model.state_dict()
    for key, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key!r} holds NaN or infinite values.")
    if config.model_type == LongNetSlideEncoderConfig.model_type:
        settings = to_settings(config)
        if "classifier.weight" in weights:
            settings |= to_head_settings(config)
        return {gigapath_key(key): tensor for key, tensor in weights.items()}, settings
    if config.model_type == LongViTConfig.model_type:
        settings = longvit.to_settings(config)
        if "classifier.weight" in weights:
            settings["num_classes"] = config.num_labels
        return {longvit.longvit_key(key, config.norm_before_pooling): x for key, x in weights.items()}, settings
    has_embed_tokens = getattr(config, "torchscale_embed_tokens", True)
    arguments = torchscale.to_arguments(config, has_embed_tokens, "lm_head.weight" in weights)
    result = {torchscale.torchscale_key(key): tensor for key, tensor in weights.items()}
    if not has_embed_tokens:
        del result["embed_tokens.weight"]
    if config.position_embedding_type == "xpos":
        for key in torchscale.xpos_keys(config.num_hidden_layers):
            result[key] = torchscale.xpos_scale(config.head_dim).to(model.dtype)
    return result, arguments


def file_of(model: PreTrainedModel) -> tuple[str, str | None]:
    """Name of the original's file, and of the entry that holds the state dict; None where the file is one."""
    has_classifier = type(model).__name__.endswith("ForImageClassification")
    if model.config.model_type == LongNetSlideEncoderConfig.model_type:
        return ("checkpoint.pt", None) if has_classifier else ("slide_encoder.pth", "model")
    if model.config.model_type == LongViTConfig.model_type:
        return "longvit.pth", "teacher" if model.config.norm_before_pooling else "model"
    return "checkpoint.pt", "model"


def convert_hf_to_torchscale(
    checkpoint: str | Path, output: str | Path, *, prefix: str = "", safetensors: bool = False, dry_run: bool = False
) -> Path:
    """Writes the folder `output`, complete or not at all; with `dry_run` checks and lists the mapping only.

    Args:
        checkpoint: a folder with one of our models, or a repository of the Hub.
        prefix: to put before each key, such as "decoder." for fairseq.
        safetensors: write a bare state dict as .safetensors.

    Raises:
        ValueError: see `load_model` and `to_torchscale`; and for an `output` that holds something.
    """
    model = load_model(checkpoint)
    try:
        tensors, arguments = to_torchscale(model)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    if dry_run:
        files.print_mapping([("(computed)" if "xpos" in key else "", prefix + key, tensors[key]) for key in tensors])
        return Path(output)
    # Copies: tied tensors share memory, which safetensors refuses, and torchscale stores them twice.
    copy = {"memory_format": torch.contiguous_format}
    tensors = {prefix + key: tensor.detach().clone(**copy) for key, tensor in tensors.items()}
    name, entry = file_of(model)
    with files.new_folder(output) as folder:
        if safetensors:
            save_file(tensors, (folder / name).with_suffix(".safetensors"))
        else:
            torch.save({entry: tensors} if entry else tensors, folder / name)
        (folder / "args.json").write_text(json.dumps(arguments, indent=2) + "\n")
    return Path(output)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="a folder of Transformers, or a repository of the Hub")
    parser.add_argument("--prefix", default="", help="put before each key, such as 'decoder.' for fairseq")
    parser.add_argument("--safetensors", action="store_true", help="write a bare state dict as .safetensors")
    files.add_output_arguments(parser)
    return files.run_converter(parser, convert_hf_to_torchscale, arguments)


if __name__ == "__main__":
    main()
