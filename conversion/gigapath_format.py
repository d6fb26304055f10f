"""Prov-GigaPath's keys and settings next to ours, read in both directions.

Source: gigapath/slide_encoder.py, gigapath/torchscale/model/LongNetConfig.py and, for fine-tuned models (a state dict
with the keys `slide_encoder.*` and `classifier.0.*`), gigapath/classification_head.py.
"""

from typing import Any

from conversion.torchscale_format import torchscale_key
from modeling_longnet import LongNetSlideEncoderConfig


OUTER_KEYS = {
    "embeddings.projection": "patch_embed.proj",
    "norm": "encoder.layer_norm",
    "pooler.norm": "norm",
}
# Our fields and the original's names; `depth` and `embed_dim` name the layers and their width there.
SETTINGS = {
    "in_chans": "in_chans",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_attention_heads",
    "slide_ngrids": "slide_ngrids",
    "tile_size": "tile_size",
    "max_wsi_size": "max_wsi_size",
}


ENCODER_PREFIX, CLASSIFIER = "slide_encoder.", "classifier.0"  # of fine-tuned models
USUAL_CLASSIFIER_LAYERS = [11]  # feat_layer's default in finetune/params.py


def gigapath_key(key: str) -> str:
    """The key in Prov-GigaPath's state dict of one of ours; a classifier's keys are those of a fine-tuned model.

        >>> gigapath_key("pooler.norm.weight")
        'norm.weight'
        >>> gigapath_key("model.embeddings.cls_token")
        'slide_encoder.cls_token'
    """
    if key.startswith("classifier."):
        return key.replace("classifier", CLASSIFIER)
    if key.startswith("model."):
        return ENCODER_PREFIX + gigapath_key(key.removeprefix("model."))
    if key == "embeddings.cls_token":
        return "cls_token"
    return torchscale_key(key, OUTER_KEYS, layers="encoder.layers")


def to_settings(config: LongNetSlideEncoderConfig) -> dict[str, Any]:
    """The original's settings for one of our configurations.

    Raises:
        ValueError: for settings that the original has not.
    """
    values = {ours: getattr(config, ours) for ours in SETTINGS}
    original = LongNetSlideEncoderConfig(**values, intermediate_size=4 * config.hidden_size)
    for name in (
        "intermediate_size", "segment_lengths", "dilation_rates", "head_offsets", "padding", "hidden_act",
        "sub_layernorm", "layer_norm_eps", "pooler_norm_eps",
    ):  # fmt: skip
        if getattr(config, name) != getattr(original, name):
            raise ValueError(f"`{name}` must be {getattr(original, name)!r} here, got {getattr(config, name)!r}.")
    return {theirs: values[ours] for ours, theirs in SETTINGS.items()} | {"global_pool": config.pooling == "mean"}


def to_head_settings(config: LongNetSlideEncoderConfig) -> dict[str, Any]:
    """The original's settings of the classifier of a fine-tuned model.

    Raises:
        ValueError: a classifier that reads what the original's does not.
    """
    if config.classifier_layers is None:
        raise ValueError("`classifier_layers` must name layers here, got None: the original's classifier reads those.")
    return {"feat_layer": "-".join(map(str, config.classifier_layers)), "n_classes": config.num_labels}
