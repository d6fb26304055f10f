"""Convert Prov-GigaPath's slide encoder into a Transformers folder: a LongNetSlideEncoderModel.

A fine-tuned checkpoint (keys `slide_encoder.*` and `classifier.*`) becomes a LongNetSlideEncoderForImageClassification.
The shape is read from the weights; what they do not tell are options, with the published values as defaults.

    python -m conversion.convert_gigapath_to_hf --checkpoint slide_encoder.pth --output-dir my-slide-encoder
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from conversion import checkpoint_files as files
from conversion.gigapath_format import CLASSIFIER, ENCODER_PREFIX, USUAL_CLASSIFIER_LAYERS, gigapath_key
from modeling_longnet import (
    LongNetSlideEncoderConfig,
    LongNetSlideEncoderForImageClassification,
    LongNetSlideEncoderModel,
)


DEFAULTS = LongNetSlideEncoderConfig()
LICENCE_NOTE = """The weights stay under the licence under which they were published; converting them changes nothing.
Prov-GigaPath is gated: its authors ask you to agree to terms at https://huggingface.co/prov-gigapath/prov-gigapath,
which offer it for research only, not for clinical care or any other deployment. Whoever gets these weights from you
needs the same terms, so keep a repository of them private or gated. Weights of your own: state their licence here."""


def _refuse_longvit(checkpoint: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """LongViT reads pixels and has a learned table of positions: another model, with a converter of its own."""
    if any(str(key).endswith("pos_embed") for key in tensors):
        raise ValueError(
            f"{checkpoint}: is a LongViT (an image encoder with learned positions, key 'pos_embed'); "
            "convert_longvit_to_hf.py converts it."
        )


def _head_settings(
    checkpoint: str | Path, tensors: Mapping[str, torch.Tensor], layers: list[int] | None, labels: list[str] | None
) -> dict:
    """What a fine-tuned model's classifier adds to the configuration."""
    weight = tensors.get(f"{CLASSIFIER}.weight")
    if weight is None or weight.dim() != 2:
        got = "none" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise ValueError(f"{checkpoint}: a fine-tuned model must hold a matrix '{CLASSIFIER}.weight', got {got}.")
    width = tensors[f"{ENCODER_PREFIX}patch_embed.proj.weight"].shape[0]
    layers = layers or (USUAL_CLASSIFIER_LAYERS if weight.shape[1] == width else None)
    if layers is None or len(layers) * width != weight.shape[1]:
        raise ValueError(
            f"{checkpoint}: '{CLASSIFIER}.weight' reads {weight.shape[1] / width:g} layers of {width}, but `classifier_"
            f"layers` (feat_layer there) names {layers or 'none'}."
        )
    names = files.label_settings(checkpoint, f"{CLASSIFIER}.weight", len(weight), labels)
    return {"classifier_layers": layers} | names


def _config(checkpoint: str | Path, tensors: Mapping[str, torch.Tensor], **settings) -> LongNetSlideEncoderConfig:
    """The configuration that the shapes and the settings give."""
    named = ("patch_embed.proj.weight", "encoder.layers.0.ffn.fc1.weight")
    for key in named:
        if key not in tensors:
            raise ValueError(f"{checkpoint}: missing {key!r}; is it a slide encoder of Prov-GigaPath?")
        if tensors[key].dim() != 2:
            raise ValueError(f"{checkpoint}: {key!r} must be a matrix, got shape {tuple(tensors[key].shape)}.")
    projection, fc1 = (tensors[key] for key in named)
    try:
        return LongNetSlideEncoderConfig(
            in_chans=projection.shape[1],
            hidden_size=projection.shape[0],
            intermediate_size=fc1.shape[0],
            num_hidden_layers=files.count_layers(checkpoint, tensors, "encoder.layers."),
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def load_gigapath(
    checkpoint: str | Path,
    dtype: str | None = None,
    classifier_layers: list[int] | None = None,
    labels: list[str] | None = None,
    **settings,
) -> tuple[LongNetSlideEncoderModel | LongNetSlideEncoderForImageClassification, list[tuple[str, str, torch.Tensor]]]:
    """A Prov-GigaPath checkpoint as our model, and (key in the checkpoint, our key, tensor) of each tensor.

    Args:
        checkpoint: {"model": state dict} or a bare state dict, .pth or .safetensors; of the slide encoder, or of a
            fine-tuned model.
        dtype: "float32", "bfloat16" or "float16"; by default that of the checkpoint.
        classifier_layers: a fine-tuned model's `feat_layer`, [11] by default if its classifier reads one layer.
        labels: names of its classes, in the order of its outputs.
        settings: other fields of `LongNetSlideEncoderConfig`, which the weights do not tell.

    Raises:
        ValueError: naming file and key, for whatever cannot be converted exactly.
    """
    tensors = files.read_state_dict(checkpoint, ("model", "teacher"))
    _refuse_longvit(checkpoint, tensors)
    architecture, encoder = LongNetSlideEncoderModel, tensors
    if any(key.startswith(ENCODER_PREFIX) for key in tensors):
        architecture = LongNetSlideEncoderForImageClassification
        encoder = {key.removeprefix(ENCODER_PREFIX): value for key, value in tensors.items()
                   if key.startswith(ENCODER_PREFIX)}  # fmt: skip
        _config(checkpoint, encoder, **settings)  # its checks come first
        settings |= _head_settings(checkpoint, tensors, classifier_layers, labels)
    elif classifier_layers or labels:
        raise ValueError(f"{checkpoint}: has no classifier, so `classifier_layers` and `labels` mean nothing.")
    config = _config(checkpoint, encoder, **settings)
    model = files.on_meta_device(architecture, config, checkpoint)
    return files.filled(model, checkpoint, tensors, gigapath_key, dtype)


def convert_gigapath_to_hf(
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
        ValueError: see `load_gigapath`; and for an `output` that holds something.
    """
    return files.save_converted(
        load_gigapath(checkpoint, dtype, **settings), checkpoint, output, dry_run=dry_run,
        converter="conversion.convert_gigapath_to_hf", settings=settings, dtype=dtype, licence=licence,
        notes=LICENCE_NOTE,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="Prov-GigaPath's file, slide_encoder.pth")
    for name in ("num_attention_heads", "max_wsi_size", "tile_size", "slide_ngrids"):
        default = getattr(DEFAULTS, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"by default {default}")
    parser.add_argument("--pooling", choices=("cls", "mean"), default="cls", help="'mean' is global_pool there")
    group = parser.add_argument_group("fine-tuned models")
    group.add_argument("--classifier-layers", type=int, nargs="+", help="feat_layer there; by default 11")
    group.add_argument("--labels", nargs="+", help="names of the classes, in the order of the outputs")
    files.add_common_arguments(parser)
    return files.run_converter(parser, convert_gigapath_to_hf, arguments)


if __name__ == "__main__":
    main()
