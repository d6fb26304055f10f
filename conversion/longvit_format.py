"""torchscale's LongViT next to ours: keys in both directions, and the segment lengths that go with an image's size.

Two kinds of checkpoint: pre-trained by DINO (keys `backbone.*`; its projection head, `head.mlp.*` and
`head.last_layer.*`, is no part of the encoder), and fine-tuned (keys `model.*`, `fc_norm.*`, `head.*`).

Source: examples/longvit/longvit.py, modeling_finetune.py, utils.py and pretraining/vision_transformer.py.
"""

from typing import Any

from conversion.torchscale_format import torchscale_key
from modeling_longnet import LongViTConfig


# For other sizes the original has the default of LongViTConfig.
SEGMENT_LENGTHS = {
    4096: [1024, 2048, 4096, 8192, 16384],
    8192: [1024, 4096, 8192, 16384, 65536],
    16384: [1024, 4096, 16384, 65536, 262144],
    32768: [1024, 4096, 32768, 262144, 1048576],
}
# Of the LayerNorm at the end: over each patch in pre-training, over their mean in fine-tuned models.
PRETRAINED_EPS, FINETUNED_EPS = 1e-6, 1e-5
DINO_HEAD = ("head.mlp.", "head.last_layer.")


def longvit_key(key: str, norm_before_pooling: bool) -> str:
    """The key in LongViT's state dict of one of ours, with or without our prefix `model.`.

        >>> longvit_key("model.layers.3.mlp.fc1.weight", norm_before_pooling=False)
        'model.encoder.layers.3.ffn.fc1.weight'
    """
    body = "backbone" if norm_before_pooling else "model"
    key = key.removeprefix("model.")
    if key.startswith("classifier."):
        return key.replace("classifier", "head")
    if key == "embeddings.position_embeddings":
        return f"{body}.pos_embed"
    norm = "backbone.norm" if norm_before_pooling else "fc_norm"
    outer = {"embeddings.projection": f"{body}.patch_embed.proj", "pooler.norm": norm}
    return torchscale_key(key, outer, layers=f"{body}.encoder.layers")


def to_settings(config: LongViTConfig) -> dict[str, Any]:
    """The original's settings for one of our configurations.

    Raises:
        ValueError: for settings that the original has not.
    """
    wanted = {
        "intermediate_size": 4 * config.hidden_size, "dilation_rates": LongViTConfig().dilation_rates,
        "segment_lengths": SEGMENT_LENGTHS.get(config.image_size, LongViTConfig().segment_lengths),
        "head_offsets": "contiguous", "padding": "zeros", "hidden_act": "gelu", "sub_layernorm": True,
        "layer_norm_eps": 1e-5, "num_channels": 3,
        "pooler_norm_eps": PRETRAINED_EPS if config.norm_before_pooling else FINETUNED_EPS,
    }  # fmt: skip
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{name}` must be {value!r} here, got {getattr(config, name)!r}.")
    return {
        "img_size": config.image_size, "patch_size": config.patch_size, "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers, "num_heads": config.num_attention_heads,
        "segment_length": str(config.segment_lengths), "dilated_ratio": str(config.dilation_rates),
    }  # fmt: skip
