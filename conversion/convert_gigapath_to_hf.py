"""Convert Prov-GigaPath's slide encoder into a Transformers folder: a LongNetSlideEncoderModel.

The shape is read from the weights; what they do not tell are options, with the published values as defaults.

    python conversion/convert_gigapath_to_hf.py --checkpoint slide_encoder.pth --output my-slide-encoder
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from modeling_longnet import LongNetSlideEncoderConfig, LongNetSlideEncoderModel


try:
    from conversion import checkpoint_files as files
    from conversion.gigapath_format import gigapath_key
except ModuleNotFoundError:  # run as a script, with this folder instead of the one above it on the path
    import checkpoint_files as files
    from gigapath_format import gigapath_key


DEFAULTS = LongNetSlideEncoderConfig()
LICENCE_NOTE = """The weights stay under the licence under which they were published; converting them changes nothing.
Prov-GigaPath is gated: its authors ask you to agree to terms at https://huggingface.co/prov-gigapath/prov-gigapath,
which offer it for research only, not for clinical care or any other deployment. Whoever gets these weights from you
needs the same terms, so keep a repository of them private or gated. Weights of your own: state their licence here."""


def _refuse_longvit(checkpoint: str | Path) -> None:
    """LongViT reads pixels and has a learned table of positions: another model, which this project does not have."""
    content = files.read_file(checkpoint)
    tensors = next((content[name] for name in ("teacher", "model") if isinstance(content.get(name), dict)), content)
    image_encoder = any("pos_embed" in str(key) or str(key).startswith(("backbone.", "model.")) for key in tensors)
    if "teacher" in content or image_encoder:
        raise ValueError(
            f"{checkpoint}: is a LongViT (an image encoder with learned positions: keys 'teacher', 'backbone.', "
            "'pos_embed'), which is not supported; only Prov-GigaPath's slide encoder is."
        )


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
    checkpoint: str | Path, dtype: str | None = None, **settings
) -> tuple[LongNetSlideEncoderModel, list[tuple[str, str, torch.Tensor]]]:
    """A Prov-GigaPath slide encoder as our model, and (key in the checkpoint, our key, tensor) of each tensor.

    Args:
        checkpoint: {"model": state dict} or a bare state dict, .pth or .safetensors.
        dtype: "float32", "bfloat16" or "float16"; by default that of the checkpoint.
        settings: other fields of `LongNetSlideEncoderConfig`, which the weights do not tell.

    Raises:
        ValueError: naming file and key, for whatever cannot be converted exactly.
    """
    _refuse_longvit(checkpoint)
    tensors = files.read_state_dict(checkpoint)
    model = files.on_meta_device(LongNetSlideEncoderModel, _config(checkpoint, tensors, **settings), checkpoint)
    targets = {gigapath_key(key): key for key in model.state_dict()}
    shapes = {source: tuple(model.state_dict()[target].shape) for source, target in targets.items()}
    files.check_tensors(checkpoint, tensors, shapes, dtype=dtype)
    weights = {target: tensors[source] for source, target in targets.items()}
    rows = [(source, target, tensors[source]) for source, target in targets.items()]
    return files.with_weights(model, weights, dtype), rows


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
    model, rows = load_gigapath(checkpoint, dtype, **settings)
    if dry_run:
        files.print_mapping(rows)
        return Path(output)
    card = files.model_card(
        Path(checkpoint),
        type(model).__name__,
        what="Prov-GigaPath's slide encoder as a `LongNetSlideEncoderModel`.",
        converter="convert_gigapath_to_hf.py",
        settings=settings,
        dtype=dtype,
        licence=licence,
        notes=LICENCE_NOTE,
    )
    return files.save_model(model, card, output)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="Prov-GigaPath's file, slide_encoder.pth")
    for name in ("num_attention_heads", "max_wsi_size", "tile_size", "slide_ngrids"):
        default = getattr(DEFAULTS, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"by default {default}")
    parser.add_argument("--pooling", choices=("cls", "mean"), default="cls", help="'mean' is global_pool there")
    files.add_common_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        output = convert_gigapath_to_hf(
            options.checkpoint, options.output, dtype=options.dtype, licence=options.license, dry_run=options.dry_run,
            num_attention_heads=options.num_attention_heads, max_wsi_size=options.max_wsi_size,
            tile_size=options.tile_size, slide_ngrids=options.slide_ngrids, pooling=options.pooling,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    return files.finish(output, options)


if __name__ == "__main__":
    main()
