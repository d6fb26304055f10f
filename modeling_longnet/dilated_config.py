"""What the configurations of LongNet, the slide encoder and LongViT have in common."""

import math

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .dilation_schedule import DilationSchedule


class DilatedConfigMixin:
    """Goes before `PreTrainedConfig`. `class_auto_map`: every head of one checkpoint folder, so that a saved causal LM
    also opens as AutoModel and the like."""

    class_auto_map: dict[str, str]

    def prepare(self, kwargs: dict) -> None:
        """To be called before `PreTrainedConfig.__post_init__`, with its arguments."""
        self.segment_lengths = list(self.segment_lengths)  # as JSON gives them back
        self.dilation_rates = list(self.dilation_rates)
        kwargs["auto_map"] = {**self.class_auto_map, **(kwargs.get("auto_map") or {})}

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> PreTrainedConfig:
        """Refuses another model's configuration, of which Transformers warns before it makes up weights at random."""
        given = config_dict.get("model_type", cls.model_type)
        if given != cls.model_type:
            raise ValueError(
                f"`model_type` must be {cls.model_type!r} for a {cls.__name__}, got {given!r}. A decoder of another "
                "type gets dilated attention from `patch_model`."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def dilation_schedule(self) -> DilationSchedule:
        """The validated schedule that the attention follows."""
        return DilationSchedule.from_config(self)

    def check_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")

    def check_head_width(self, unless: str = "") -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of `num_attention_heads`{unless}, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )

    def check_layers(self) -> None:
        """What the fields of the layers that all three have must be."""
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be an activation that Transformers knows, got {self.hidden_act!r}.")
        self.check_positive("layer_norm_eps")
        for name in ("attention_dropout", "hidden_dropout", "activation_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")


class DilatedEncoderConfigMixin(DilatedConfigMixin):
    """What the layers of LongNet ask for and no image encoder varies; no fields, so not part of config.json."""

    is_causal = False
    overlap = "count"
    num_sink_tokens = 0
    local = "segment"
    position_embedding_type = "none"
    scale_embedding = False
    attention_bias = True
    mlp_bias = True
    mlp_chunk_size = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    def check_layers(self) -> None:
        for name in ("is_causal", "overlap", "num_sink_tokens", "local", "position_embedding_type"):
            if getattr(self, name) != getattr(type(self), name):
                model, wanted = type(self).__name__.removesuffix("Config"), getattr(type(self), name)
                raise ValueError(f"`{name}` of a {model} is {wanted!r}, got {getattr(self, name)!r}.")
        self.check_head_width()
        self.check_positive("pooler_norm_eps")
        super().check_layers()
        _ = self.dilation_schedule  # raises for what is no schedule
