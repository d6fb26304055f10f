"""torchscale's argument names, their defaults and its keys, next to ours: one table each, read in both directions.

Source: torchscale/architecture/{config,encoder,decoder}.py and torchscale/component/dilated_attention.py.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modeling_longnet import LongNetConfig


class Argument(NamedTuple):
    """An argument of torchscale: its default, what is accepted, and our field that takes the value as it is."""

    default: Any
    kind: str
    field: str | None = None


# "{side}" is decoder or encoder, "{end}" target or source.
ARGUMENTS = {
    "{side}_embed_dim": Argument(768, "positive integer", "hidden_size"),
    "{side}_attention_heads": Argument(12, "positive integer", "num_attention_heads"),
    "{side}_ffn_embed_dim": Argument(3072, "positive integer", "intermediate_size"),
    "{side}_layers": Argument(12, "positive integer", "num_hidden_layers"),
    "{side}_normalize_before": Argument(True, "boolean"),
    "share_{side}_input_output_embed": Argument(False, "boolean", "tie_word_embeddings"),
    "max_{end}_positions": Argument(1024, "positive integer"),
    "vocab_size": Argument(-1, "integer"),
    "no_output_layer": Argument(False, "boolean"),
    "activation_fn": Argument("gelu", "name"),
    "dropout": Argument(0.0, "number", "hidden_dropout"),
    "attention_dropout": Argument(0.0, "number", "attention_dropout"),
    "activation_dropout": Argument(0.0, "number", "activation_dropout"),
    "drop_path_rate": Argument(0.0, "number", "drop_path_rate"),
    "no_scale_embedding": Argument(True, "boolean"),
    "layernorm_embedding": Argument(False, "boolean", "layernorm_embedding"),
    "layernorm_eps": Argument(1e-5, "number", "layer_norm_eps"),
    "subln": Argument(True, "boolean", "sub_layernorm"),
    "xpos_rel_pos": Argument(False, "boolean"),
    "xpos_scale_base": Argument(512, "number", "xpos_scale_base"),
    "segment_length": Argument(None, "list of positive integers", "segment_lengths"),
    "dilated_ratio": Argument(None, "list of positive integers", "dilation_rates"),
}
# What LongNetConfig has no counterpart for: only these values are accepted.
FIXED = {
    "deepnorm": False, "multiway": False, "use_xmoe": False, "moe_freq": 0, "rel_pos_buckets": 0, "max_rel_pos": 0,
    "normalize_output": True,
}  # fmt: skip
# No effect on the numbers that a dense model computes.
WITHOUT_EFFECT = {
    "bert_init", "block_shift", "checkpoint_activations", "ddp_rank", "flash_attention", "fsdp", "img_size",
    "in_chans", "moe_eval_capacity_token_fraction", "moe_expert_count", "moe_gating_use_fp32",
    "moe_normalize_gate_prob_before_dropping", "moe_second_expert_policy", "moe_top1_expert", "patch_size",
    "seq_parallel",
}  # fmt: skip
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}
LICENCE_NOTE = (
    "torchscale's code is under the MIT licence. The weights stay under the licence under which they were published; "
    "the file does not say which. State it here before you pass them on."
)
POSITION_OFFSET = 2  # torchscale's learned positions begin at row 2, as fairseq's do

OUTER_KEYS = {
    "embed_tokens": "embed_tokens",
    "embed_positions": "embed_positions",
    "layernorm_embedding": "layernorm_embedding",
    "norm": "layer_norm",
    "lm_head": "output_projection",
}
LAYER_KEYS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.o_proj": "self_attn.out_proj",
    "self_attn.inner_attn_ln": "self_attn.inner_attn_ln",
    "self_attn_layer_norm": "self_attn_layer_norm",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
    "mlp.ffn_layernorm": "ffn.ffn_layernorm",
    "final_layer_norm": "final_layer_norm",
}


def torchscale_key(key: str, outer_keys: Mapping[str, str] = OUTER_KEYS, layers: str = "layers") -> str:
    """The key in torchscale's state dict of one of ours.

        >>> torchscale_key("model.layers.3.mlp.fc1.weight")
        'layers.3.ffn.fc1.weight'
    """
    module, _, parameter = key.removeprefix("model.").rpartition(".")
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        return f"{layers}.{match[1]}.{LAYER_KEYS[match[2]]}.{parameter}"
    return f"{outer_keys[module]}.{parameter}"


def xpos_keys(num_layers: int) -> list[str]:
    return [f"layers.{i}.self_attn.xpos.scale" for i in range(num_layers)]


def xpos_scale(head_dim: int) -> torch.Tensor:
    """The buffer [D / 2] that torchscale stores in each layer; it holds no more than the head dimension."""
    return (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)


def parse_integers(text: str) -> list[int] | None:
    """The integers of a text like "[2048, 4096]"; None for anything else. Nothing is evaluated."""
    if not re.fullmatch(r"\s*\[\s*\d{1,18}(\s*,\s*\d{1,18})*\s*,?\s*\]\s*", text, re.ASCII):
        return None
    return [int(number) for number in re.findall(r"\d+", text)]


def _parse(value: Any, kind: str) -> Any:
    """`value` if it is of that kind, else None."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if kind == "boolean":
        return value if isinstance(value, bool) else None
    if kind == "name":
        return value if isinstance(value, str) else None
    if kind == "integer":
        return value if is_integer else None
    if kind == "positive integer":
        return value if is_integer and value > 0 else None
    if kind == "number":
        return value if (is_integer or isinstance(value, float)) and math.isfinite(value) else None
    assert kind == "list of positive integers"
    if isinstance(value, str):
        value = parse_integers(value)
    good = isinstance(value, list) and value and all(_parse(number, "positive integer") for number in value)
    return value if good else None


def _names(side: str) -> dict[str, Argument]:
    end = {"decoder": "target", "encoder": "source"}[side]
    return {name.format(side=side, end=end): argument for name, argument in ARGUMENTS.items()}


def find_side(path: Path, arguments: Mapping[str, Any], prefix: str | None) -> str:
    """"decoder" or "encoder": by the names of the arguments, or by the prefix of the keys if those do not tell.

    Raises:
        ValueError: arguments of both, as an encoder-decoder model has, or of neither.
    """
    common = set(_names("decoder")) & set(_names("encoder"))
    own = {side: [n for n in _names(side) if n in arguments and n not in common] for side in ("decoder", "encoder")}
    sides = [side for side, names in own.items() if names] or ([prefix] if prefix else [])
    if len(sides) != 1:
        got = f"both {own['decoder'][0]!r} and {own['encoder'][0]!r}" if sides else "neither"
        raise ValueError(f"{path}: must have arguments of a decoder (decoder_*) or an encoder (encoder_*), got {got}.")
    return sides[0]


def read_arguments(path: str | Path, prefix: str | None = None) -> tuple[str, dict[str, Any]]:
    """"decoder" or "encoder", and its arguments with torchscale's defaults filled in and lists parsed.

    The names are those of ARGUMENTS before their sides are filled in: "{side}_layers".

    Raises:
        ValueError: naming file and argument: no JSON, unknown or unsupported arguments, values of another kind.
    """
    path = Path(path)
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be a JSON file, {error}.") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{path}: must hold a dictionary of arguments, got {type(arguments).__name__}.")
    side = find_side(path, arguments, prefix)
    names = _names(side)
    result = {generic: argument.default for generic, argument in ARGUMENTS.items()}
    generic_names = dict(zip(names, ARGUMENTS))
    for name, value in arguments.items():
        if name in FIXED:
            if type(value) is not type(FIXED[name]) or value != FIXED[name]:
                raise ValueError(f"{path}: {name!r} is supported only as {FIXED[name]!r}, got {value!r}.")
        elif name in names:
            parsed = _parse(value, names[name].kind)
            if parsed is None:
                raise ValueError(f"{path}: {name!r} must be a {names[name].kind}, got {value!r}.")
            result[generic_names[name]] = parsed
        elif name not in WITHOUT_EFFECT:
            raise ValueError(f"{path}: {name!r} is no argument of a LongNet {side} that this converter knows.")
    for name in ("segment_length", "dilated_ratio"):
        if result[name] is None:
            raise ValueError(f"{path}: {name!r} is missing; torchscale has no default for it.")
    if result["activation_fn"] not in ACTIVATIONS:
        raise ValueError(
            f"{path}: 'activation_fn' must be one of {', '.join(ACTIVATIONS)}, got {result['activation_fn']!r}."
        )
    if not (result["subln"] or result["{side}_normalize_before"]):
        raise ValueError(f"{path}: '{side}_normalize_before' is supported only as True, got False.")
    return side, result


def to_config(
    path: str | Path, side: str, arguments: Mapping[str, Any], vocab_size: int, position_rows: int | None
) -> LongNetConfig:
    """Our configuration of a torchscale model.

    Args:
        path: the file of the arguments, for messages.
        arguments: as from `read_arguments`.
        vocab_size: rows of the token table.
        position_rows: rows of the table of learned positions, if there is one.

    Raises:
        ValueError: what cannot be: learned positions together with xPos, and what LongNetConfig refuses.
    """
    fields = {arg.field: arguments[name] for name, arg in ARGUMENTS.items() if arg.field}
    is_causal = side == "decoder"
    longest = max(arguments["max_{end}_positions"], arguments["segment_length"][-1])
    kind = "xpos" if arguments["xpos_rel_pos"] else "none"
    offset = 0
    if position_rows is not None:
        if kind == "xpos":
            raise ValueError(f"{path}: 'xpos_rel_pos' is supported only without a table 'embed_positions.weight'.")
        kind, offset, longest = "learned", POSITION_OFFSET, position_rows - POSITION_OFFSET
    try:
        return LongNetConfig(
            **fields,
            vocab_size=vocab_size,
            hidden_act=ACTIVATIONS[arguments["activation_fn"]],
            max_position_embeddings=longest,
            head_offsets="contiguous",
            padding="mask" if is_causal else "zeros",
            is_causal=is_causal,
            position_embedding_type=kind,
            position_embedding_offset=offset,
            scale_embedding=not arguments["no_scale_embedding"],
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_expressible(config: LongNetConfig) -> None:
    """Refuses configurations that torchscale has no arguments for."""
    wanted = {
        "head_offsets": "contiguous",
        "overlap": "count",
        "num_sink_tokens": 0,
        "local": "segment",
        "padding": "mask" if config.is_causal else "zeros",
        "num_key_value_heads": config.num_attention_heads,
        "attention_bias": True,
        "mlp_bias": True,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{name}` must be {value!r} for torchscale, got {getattr(config, name)!r}.")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"`head_dim` must divide `hidden_size` into the heads for torchscale, got {config.head_dim}.")
    if config.position_embedding_type == "rope":
        raise ValueError("`position_embedding_type` must be 'xpos', 'learned' or 'none' for torchscale, got 'rope'.")
    if config.position_embedding_type == "learned" and config.position_embedding_offset != POSITION_OFFSET:
        raise ValueError(
            f"`position_embedding_offset` must be {POSITION_OFFSET} for torchscale, got "
            f"{config.position_embedding_offset}."
        )
    if config.hidden_act not in (*ACTIVATIONS.values(), "swish"):
        raise ValueError(
            f"`hidden_act` must be one of {', '.join(ACTIVATIONS.values())} for torchscale, got {config.hidden_act!r}."
        )


def to_arguments(config: LongNetConfig, has_embed_tokens: bool, has_output_layer: bool) -> dict[str, Any]:
    """torchscale's arguments for one of our configurations.

    Raises:
        ValueError: for settings that torchscale does not have.
    """
    _check_expressible(config)
    names = _names("decoder" if config.is_causal else "encoder")
    generic = {name: getattr(config, arg.field) if arg.field else arg.default for name, arg in ARGUMENTS.items()}
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {"swish": "swish"}
    generic |= {
        "max_{end}_positions": config.max_position_embeddings,
        "vocab_size": config.vocab_size if has_embed_tokens or has_output_layer else -1,
        "no_output_layer": not has_output_layer,
        "activation_fn": activations[config.hidden_act],
        "no_scale_embedding": not config.scale_embedding,
        "xpos_rel_pos": config.position_embedding_type == "xpos",
        "segment_length": str(config.segment_lengths),
        "dilated_ratio": str(config.dilation_rates),
    }
    if not has_output_layer:
        generic["share_{side}_input_output_embed"] = False
    return {name: generic[key] for name, key in zip(names, ARGUMENTS)} | {"flash_attention": True}
