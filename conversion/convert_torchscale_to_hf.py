"""Convert a LongNet checkpoint of torchscale into a Transformers folder.

A LongNetDecoder becomes a LongNetForCausalLM (a LongNetModel if it has no output layer), a LongNetEncoder a
bidirectional LongNetModel (a LongNetForMaskedLM if it has one).

    python -m conversion.convert_torchscale_to_hf --checkpoint model.pt --config args.json --output-dir my-longnet
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from conversion import checkpoint_files as files
from conversion import torchscale_format as torchscale
from modeling_longnet import LongNetForCausalLM, LongNetForMaskedLM, LongNetModel


def _read(checkpoint: str | Path, config: str | Path) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    """Side, arguments and tensors, the latter without fairseq's prefix."""
    tensors = files.read_state_dict(checkpoint)
    if any(key.startswith(("backbone.", "patch_embed.", "pos_embed")) for key in tensors):
        raise ValueError(
            f"{checkpoint}: holds an image or slide encoder; see convert_longvit_to_hf.py, convert_gigapath_to_hf.py."
        )
    prefix = None
    for side in ("decoder", "encoder"):
        if any(key.startswith(f"{side}.") for key in tensors):
            tensors, prefix = files.without_prefix(checkpoint, tensors, f"{side}."), side
    side, arguments = torchscale.read_arguments(config, prefix)
    if prefix not in (None, side):
        raise ValueError(f"{checkpoint}: has keys of a torchscale {prefix}, {config} arguments of a {side}.")
    return side, arguments, tensors


def _vocab_size(checkpoint: str | Path, config: str | Path, side: str, arguments: Mapping, tensors: Mapping) -> int:
    given, table = arguments["vocab_size"], tensors.get("embed_tokens.weight")
    if table is None:
        if side == "decoder":
            raise ValueError(f"{checkpoint}: missing 'embed_tokens.weight'.")
        return max(given, 1)  # an encoder that is given embeddings; ours has a table in any case
    if given > 0 and table.dim() > 0 and given != len(table):
        raise ValueError(
            f"{checkpoint}: 'embed_tokens.weight' has {len(table)} rows, {config} a 'vocab_size' of {given}."
        )
    return len(table) if table.dim() > 0 else 1


def _empty_model(checkpoint, config, side, arguments, tensors) -> PreTrainedModel:
    """The model that fits the arguments, on the meta device."""
    layers = files.count_layers(checkpoint, tensors)
    wanted = arguments["{side}_layers"]
    if layers != wanted:
        raise ValueError(f"{checkpoint}: has {layers} layers, {config} '{side}_layers' of {wanted}.")
    positions = tensors.get("embed_positions.weight")
    rows = None if positions is None else len(positions) if positions.dim() > 0 else 0
    vocab_size = _vocab_size(checkpoint, config, side, arguments, tensors)
    model_config = torchscale.to_config(config, side, arguments, vocab_size, rows)
    has_output_layer = arguments["vocab_size"] > 0 and not arguments["no_output_layer"]
    if not has_output_layer:
        model_config.tie_word_embeddings = False
        architecture = LongNetModel
    else:
        architecture = LongNetForCausalLM if side == "decoder" else LongNetForMaskedLM
    model_config.torchscale_embed_tokens = "embed_tokens.weight" in tensors  # for the way back
    return files.on_meta_device(architecture, model_config, config)


def load_torchscale(
    checkpoint: str | Path, config: str | Path, dtype: str | None = None
) -> tuple[PreTrainedModel, list[tuple[str, str, torch.Tensor]]]:
    """A torchscale checkpoint as one of our models.

    Args:
        checkpoint: a .pt or .safetensors file: a state dict or {"model": state dict}, with or without the prefix
            "decoder." or "encoder.".
        config: a JSON file of torchscale's arguments.
        dtype: "float32", "bfloat16" or "float16"; by default that of the checkpoint.

    Returns:
        The model, and (key in the checkpoint, our key, tensor) of each tensor.

    Raises:
        ValueError: naming file and key or argument, for whatever cannot be converted exactly.
    """
    side, arguments, tensors = _read(checkpoint, config)
    model = _empty_model(checkpoint, config, side, arguments, tensors)
    shapes = {torchscale.torchscale_key(key): (key, tuple(value.shape)) for key, value in model.state_dict().items()}
    required = {source: shape for source, (_, shape) in shapes.items()}
    optional = {}
    if model.config.tie_word_embeddings:
        optional["output_projection.weight"] = required.pop("output_projection.weight")
    if not model.config.torchscale_embed_tokens:
        required.pop("embed_tokens.weight")
    if arguments["xpos_rel_pos"]:
        width = model.config.head_dim // 2
        optional |= dict.fromkeys(torchscale.xpos_keys(model.config.num_hidden_layers), (width,))
    files.check_tensors(checkpoint, tensors, required, optional, dtype)
    _check_redundant(checkpoint, tensors, optional, model.config.head_dim)

    rows = [(source, shapes[source][0], tensors[source]) for source in required]
    weights = {target: tensor for _, target, tensor in rows}
    for source, (target, shape) in shapes.items():
        if target not in weights:
            alike = tensors["layer_norm.weight"]
            table = alike.new_zeros(shape) if source == "embed_tokens.weight" else tensors["embed_tokens.weight"]
            weights[target] = table
            rows.append(("(tied)" if source != "embed_tokens.weight" else "(zeros)", target, table))
    rows += [(key, "(computed)", tensors[key]) for key in optional if key in tensors and key.endswith("xpos.scale")]
    return files.with_weights(model, weights, dtype), rows


def _check_redundant(checkpoint, tensors, optional, head_dim) -> None:
    """What is not copied must be what we compute instead."""
    for key in optional:
        if key not in tensors:
            continue
        if key == "output_projection.weight":
            if not torch.equal(tensors[key], tensors["embed_tokens.weight"]):
                raise ValueError(f"{checkpoint}: {key!r} must equal 'embed_tokens.weight', as the arguments tie them.")
        else:
            expected = torchscale.xpos_scale(head_dim)
            tolerance = 4 * torch.finfo(tensors[key].dtype).eps
            if not torch.allclose(tensors[key].float(), expected, rtol=tolerance, atol=0):
                got = tensors[key].tolist()[:4]
                raise ValueError(f"{checkpoint}: {key!r} must hold xPos's own factors, got {got}.")


def convert_torchscale_to_hf(
    checkpoint: str | Path,
    config: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    licence: str | None = None,
    dry_run: bool = False,
) -> Path:
    """Writes the folder `output`, complete or not at all; with `dry_run` checks and lists the mapping only.

    Raises:
        ValueError: see `load_torchscale`; and for an `output` that holds something.
    """
    loaded = load_torchscale(checkpoint, config, dtype)
    return files.save_converted(
        loaded, checkpoint, output, dry_run=dry_run, converter="conversion.convert_torchscale_to_hf",
        settings=json.loads(Path(config).read_text(encoding="utf-8")), dtype=dtype, licence=licence,
        notes=torchscale.LICENCE_NOTE,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="torchscale's file, .pt or .safetensors")
    parser.add_argument("--config", required=True, help="torchscale's arguments as a JSON file")
    files.add_common_arguments(parser)
    return files.run_converter(parser, convert_torchscale_to_hf, arguments)


if __name__ == "__main__":
    main()
