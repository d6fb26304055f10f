"""Convert torchscale's LongViT into a Transformers folder: a LongViTModel, or a LongViTForImageClassification.

A checkpoint of the pre-training (DINO; its teacher is taken, its projection head left out and listed) becomes the
former, a fine-tuned one the latter. The shape is read from the weights, but for the number of heads.

    python -m conversion.convert_longvit_to_hf --checkpoint longvit_small_patch32_1024.pth --output-dir my-longvit
"""

import argparse
import functools
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from conversion import checkpoint_files as files
from conversion.longvit_format import DINO_HEAD, FINETUNED_EPS, PRETRAINED_EPS, SEGMENT_LENGTHS, longvit_key
from conversion.torchscale_format import LICENCE_NOTE
from modeling_longnet import LongViTConfig, LongViTForImageClassification, LongViTModel


def _read(checkpoint: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The encoder's tensors, with `backbone.` or `model.` before the keys, and what is left out."""
    tensors = files.read_state_dict(checkpoint, ("teacher", "model", "module"))
    tensors = files.without_prefix(checkpoint, tensors, "module.")
    if not any(key.startswith("backbone.") for key in tensors):
        return tensors, {}
    left_out = {key: value for key, value in tensors.items() if key.startswith(DINO_HEAD)}
    return {key: value for key, value in tensors.items() if key not in left_out}, left_out


def _config(checkpoint: str | Path, tensors: Mapping[str, torch.Tensor], heads: int, **labels) -> LongViTConfig:
    """The configuration that the shapes give."""
    pretrained = any(key.startswith("backbone.") for key in tensors)
    body = "backbone" if pretrained else "model"
    wanted = {"pos_embed": 3, "patch_embed.proj.weight": 4, "encoder.layers.0.ffn.fc1.weight": 2}
    wanted = {f"{body}.{key}": rank for key, rank in wanted.items()}
    for key, rank in wanted.items():
        if key not in tensors:
            raise ValueError(f"{checkpoint}: missing {key!r}; is it a LongViT of torchscale?")
        if tensors[key].dim() != rank or 0 in tensors[key].shape:
            raise ValueError(f"{checkpoint}: {key!r} must have {rank} dimensions, got {tuple(tensors[key].shape)}.")
    positions, projection, fc1 = (tensors[key] for key in wanted)
    side, patch = math.isqrt(positions.shape[1]), projection.shape[-1]
    if side**2 != positions.shape[1]:
        raise ValueError(f"{checkpoint}: '{body}.pos_embed' must hold a square of positions, got {positions.shape[1]}.")
    lengths = {"segment_lengths": SEGMENT_LENGTHS[side * patch]} if side * patch in SEGMENT_LENGTHS else {}
    try:
        return LongViTConfig(
            image_size=side * patch, patch_size=patch, num_channels=projection.shape[1],
            hidden_size=projection.shape[0], intermediate_size=fc1.shape[0], num_attention_heads=heads,
            num_hidden_layers=files.count_layers(checkpoint, tensors, f"{body}.encoder.layers."),
            norm_before_pooling=pretrained, pooler_norm_eps=PRETRAINED_EPS if pretrained else FINETUNED_EPS,
            **lengths, **labels,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def _labels(checkpoint: str | Path, tensors: Mapping[str, torch.Tensor], names: list[str] | None) -> dict:
    head = tensors.get("head.weight")
    if head is None:
        if names:
            raise ValueError(f"{checkpoint}: has no classifier, so `labels` mean nothing.")
        return {}
    return files.label_settings(checkpoint, "head.weight", len(head), names)


def load_longvit(
    checkpoint: str | Path, dtype: str | None = None, num_attention_heads: int = 16, labels: list[str] | None = None
) -> tuple[LongViTModel | LongViTForImageClassification, list[tuple[str, str, torch.Tensor]]]:
    """A LongViT checkpoint as our model, and (key in the checkpoint, our key, tensor) of each tensor.

    Args:
        checkpoint: a .pth file with "teacher", "model" or "module", or a bare state dict, also as .safetensors.
        dtype: "float32", "bfloat16" or "float16"; by default that of the checkpoint.
        num_attention_heads: which the weights do not tell.
        labels: names of the classes of a fine-tuned model, in the order of its outputs.

    Raises:
        ValueError: naming file and key, for whatever cannot be converted exactly.
    """
    tensors, left_out = _read(checkpoint)
    config = _config(checkpoint, tensors, num_attention_heads, **_labels(checkpoint, tensors, labels))
    architecture = LongViTForImageClassification if "head.weight" in tensors else LongViTModel
    model = files.on_meta_device(architecture, config, checkpoint)
    key_of = functools.partial(longvit_key, norm_before_pooling=config.norm_before_pooling)
    model, rows = files.filled(model, checkpoint, tensors, key_of, dtype)
    return model, rows + [(source, "(left out)", tensor) for source, tensor in left_out.items()]


def convert_longvit_to_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    licence: str | None = None,
    dry_run: bool = False,
    **settings,
) -> Path:
    """Writes the folder `output`, complete or not at all; with `dry_run` checks and lists the mapping only.

    Raises:
        ValueError: see `load_longvit`; and for an `output` that holds something.
    """
    return files.save_converted(
        load_longvit(checkpoint, dtype, **settings), checkpoint, output, dry_run=dry_run,
        converter="conversion.convert_longvit_to_hf", settings=settings, dtype=dtype, licence=licence,
        notes=LICENCE_NOTE,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="torchscale's file, .pth")
    parser.add_argument("--num-attention-heads", type=int, default=16, help="by default 16")
    parser.add_argument("--labels", nargs="+", help="names of a fine-tuned model's classes, in order")
    files.add_common_arguments(parser)
    return files.run_converter(parser, convert_longvit_to_hf, arguments)


if __name__ == "__main__":
    main()
