# Copyright 2026 The longnet-transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""LongNet model configuration"""

import difflib

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import auto_docstring, logging

from .dilated_config import DilatedConfigMixin
from .dilation_schedule import DilationSchedule, as_plain
from .longnet_xpos_range import XposRangeMixin
from .memory_spec import MemorySpec
from .transformers_compat import CACHE_NAMES, interval


logger = logging.get_logger(__name__)

POSITION_EMBEDDING_TYPES = ("xpos", "rope", "learned", "none")

AUTO_MAP = {
    "AutoConfig": "configuration_longnet.LongNetConfig",
    "AutoModel": "modeling_longnet.LongNetModel",
    "AutoModelForCausalLM": "modeling_longnet.LongNetForCausalLM",
    "AutoModelForMaskedLM": "modeling_longnet.LongNetForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_longnet.LongNetForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_longnet.LongNetForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_longnet.LongNetForQuestionAnswering",
}


@auto_docstring(
    checkpoint="longnet-transformers/longnet-125m",
    custom_intro="""
    Configuration of a LongNet ([LongNet: Scaling Transformers to 1,000,000,000 Tokens](https://arxiv.org/abs/2307.02486)):
    a MAGNETO Transformer with dilated attention. The defaults are the 125M-parameter model of the paper.
    """,
)
@strict
class LongNetConfig(XposRangeMixin, DilatedConfigMixin, PreTrainedConfig):
    r"""
    segment_lengths (`list[int]`, *optional*, defaults to `[2048, 4096, 8192, 16384, 32768]`):
        w of each pattern of the dilated attention, in tokens, not decreasing.
    dilation_rates (`list[int]`, *optional*, defaults to `[1, 2, 4, 6, 12]`):
        r of each pattern: every r-th token of a segment takes part. As many as segment lengths, not decreasing; a
        causal model needs a first rate of 1.
    head_offsets (`str`, *optional*, defaults to `"modulo"`):
        Which tokens of a segment head j selects: `"modulo"`, those at j % r (the paper), or `"contiguous"`, those at
        j // ceil(num_attention_heads / r) (torchscale).
    overlap (`str`, *optional*, defaults to `"count"`):
        `"count"`: a key that m patterns offer counts m times in the softmax (the paper); `"once"`: it counts once.
    num_sink_tokens (`int`, *optional*, defaults to 0):
        Number of first tokens of each document that every query sees, each counted once.
    local (`str`, *optional*, defaults to `"segment"`):
        `"sliding"` replaces the first pattern by a causal sliding window of w_0 // 2 tokens, behind a dense first
        segment; see [`DilationSchedule`].
    padding (`str`, *optional*, defaults to `"mask"`):
        `"zeros"` lets the zero keys with which torchscale fills incomplete segments take part in the softmax, as its
        published bidirectional checkpoints were trained.
    memory (`dict`, *optional*):
        Lets each query choose blocks of earlier tokens to see beside its schedule: settings of [`MemorySpec`], `{}` for
        the defaults. It wants `local="sliding"` and `overlap="once"`.
    is_causal (`bool`, *optional*, defaults to `True`):
        Whether keys after the query are hidden (decoder) or not (encoder).
    position_embedding_type (`str`, *optional*, defaults to `"xpos"`):
        `"xpos"` (the paper) or `"rope"`, both rotating by the frequencies of `rope_parameters`, `"learned"` (a table
        of `max_position_embeddings` rows) or `"none"`.
    position_embedding_offset (`int`, *optional*, defaults to 0):
        Row of the learned table that holds position 0; 2 in torchscale's checkpoints.
    xpos_scale_base (`int` or `float`, *optional*, defaults to 512):
        Distance, in tokens, over which xPos decays by its basic factors.
    sub_layernorm (`bool`, *optional*, defaults to `True`):
        Whether MAGNETO's second LayerNorm stands before each output projection.
    scale_embedding (`bool`, *optional*, defaults to `True`):
        Whether token embeddings are multiplied by sqrt(hidden_size).
    layernorm_embedding (`bool`, *optional*, defaults to `False`):
        Whether a LayerNorm follows the embeddings.
    hidden_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the embeddings and on the output of each sub-layer.
    activation_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the activations inside the feed-forward network.
    drop_path_rate (`float`, *optional*, defaults to 0.0):
        Stochastic depth: probability that the last layer's sub-layers are skipped for a row; it rises linearly from
        0 at the first layer.
    mlp_chunk_size (`int`, *optional*):
        Tokens of a row that the feed-forward network computes at a time, where gradients are wanted: its inner states,
        half of what a layer keeps, are then made anew in the backward pass. Changes no number; None for all at once.

    Raises:
        ValueError: for schedules, sizes or position embeddings that have no meaning or cannot be represented.

    Example:

    ```python
    >>> from modeling_longnet import LongNetConfig, LongNetModel

    >>> configuration = LongNetConfig(num_hidden_layers=2, segment_lengths=[256, 1024], dilation_rates=[1, 4])
    >>> model = LongNetModel(configuration)
    >>> configuration = model.config
    ```"""

    model_type = "longnet"
    class_auto_map = AUTO_MAP
    keys_to_ignore_at_inference = list(CACHE_NAMES)
    # The sub-LayerNorms need all heads and the whole inner width, so outputs are gathered before them.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise_gather_output",
        "layers.*.self_attn.k_proj": "colwise_gather_output",
        "layers.*.self_attn.v_proj": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.fc1": "colwise_gather_output",
        "layers.*.mlp.fc2": "rowwise_split_input",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 64000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: int = 32768
    segment_lengths: list[int] | tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 6, 12)
    head_offsets: str = "modulo"
    overlap: str = "count"
    num_sink_tokens: int = 0
    local: str = "segment"
    padding: str = "mask"
    memory: dict | None = None
    is_causal: bool = True
    position_embedding_type: str = "xpos"
    position_embedding_offset: int = 0
    xpos_scale_base: int | float = 512
    rope_parameters: RopeParameters | dict | None = None
    sub_layernorm: bool = True
    scale_embedding: bool = True
    layernorm_embedding: bool = False
    layer_norm_eps: int | float = 1e-5
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    activation_dropout: int | float = 0.0
    drop_path_rate: int | float = 0.0
    mlp_chunk_size: int | None = None
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.prepare(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_sizes()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_spelling(kwargs)
        self.rope_parameters = as_plain("rope_parameters", self.rope_parameters)
        if "rope_scaling" in kwargs:
            kwargs["rope_scaling"] = as_plain("rope_scaling", kwargs["rope_scaling"])
        if isinstance(self.memory, dict) and self.memory.get("heads") is not None:
            # In JSON, where all keys are strings, layers that are told as both would not sort, or hide each other.
            self.memory = self.memory | {"heads": MemorySpec.from_dict(self.memory).to_dict()["heads"]}
        rope_is_given = self.rope_parameters or kwargs.get("rope_scaling")
        super().__post_init__(**kwargs)
        if self.position_embedding_type not in ("xpos", "rope"):
            self.rope_parameters = {}
            if rope_is_given:
                logger.warning_once(
                    "`rope_parameters` has no effect with "
                    f"`position_embedding_type={self.position_embedding_type!r}` and is dropped."
                )
        # Called here as well, so that these errors come as plain ValueErrors.
        self.validate_architecture()

    def _check_spelling(self, unknown: dict):
        """Transformers keeps arguments that it does not know; one that is nearly a field was meant to be that field."""
        for name in unknown:
            meant = difflib.get_close_matches(name, LongNetConfig.__annotations__, n=1, cutoff=0.92)
            if meant and not hasattr(PreTrainedConfig, name):
                raise ValueError(f"`{name}` is no field of LongNetConfig. Did you mean `{meant[0]}`?")

    def _check_sizes(self):
        self.check_positive(
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "xpos_scale_base",
        )  # fmt: skip
        if self.mlp_chunk_size is not None and self.mlp_chunk_size < 1:
            raise ValueError(f"`mlp_chunk_size` must be None or at least 1 token, got {self.mlp_chunk_size}.")
        if self.head_dim is None:
            self.check_head_width(" when `head_dim` is not given")

    def validate_architecture(self):
        """Part of `@strict`-powered validation: what the fields must satisfy together."""
        self._check_sizes()
        if self.head_dim < 1:
            raise ValueError(f"`head_dim` must be positive, got {self.head_dim}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_attention_heads` must be a multiple of `num_key_value_heads`, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}."
            )
        self.check_layers()
        schedule = self.dilation_schedule  # raises for what is no schedule
        self._check_memory(schedule)
        if self.is_causal and self.dilation_rates[0] != 1:
            raise ValueError(
                "`dilation_rates` of a causal model must begin with 1, or some tokens would not see even themselves, "
                f"got {self.dilation_rates}."
            )
        if unread := schedule.unread_offsets(self.num_attention_heads):
            named = ", ".join(f"{lacks.start} to {lacks.stop - 1} of rate {rate}" for rate, lacks in unread.items())
            logger.warning_once(
                f"With {self.num_attention_heads} heads and `head_offsets={self.head_offsets!r}` these offsets of "
                f"`dilation_rates` have no head, so those tokens are never read at that rate: {named}."
            )
        self._check_positions()

    def _check_memory(self, schedule: DilationSchedule):
        memory = schedule.memory
        if memory is None:
            return
        schedule.refuse_idle_memory()
        if memory.max_distance is not None or memory.dimensions is not None:
            raise ValueError(
                "`memory` of a LongNet takes no `max_distance` and no `dimensions`, which are for models that were "
                f"trained without a memory and patched, got {self.memory}."
            )
        layers, name = memory.only_layers, "layers" if memory.heads is None else "heads"
        if layers and layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"`memory`: layers of `{name}` must be below num_hidden_layers={self.num_hidden_layers}, got "
                f"{list(layers)}."
            )
        groups = self.num_key_value_heads or self.num_attention_heads
        if any(own and own[-1] >= groups for _, own in memory.heads or ()):
            raise ValueError(
                f"`memory`: `heads` are key/value heads, below num_key_value_heads={groups}, got {memory.heads}."
            )

    def _check_positions(self):
        kind = self.position_embedding_type
        if kind not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"`position_embedding_type` must be one of {', '.join(map(repr, POSITION_EMBEDDING_TYPES))}, "
                f"got {kind!r}."
            )
        if self.position_embedding_offset < 0:
            raise ValueError(f"`position_embedding_offset` must be at least 0, got {self.position_embedding_offset}.")
        if self.position_embedding_offset and kind != "learned":
            raise ValueError(
                "`position_embedding_offset` is for `position_embedding_type='learned'`, got "
                f"{self.position_embedding_offset} with {kind!r}."
            )
        if kind in ("xpos", "rope") and self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even for {kind}, which rotates pairs, got {self.head_dim}.")
        if self.rope_parameters and self.rope_parameters.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                "`rope_parameters` must rotate the whole head, got partial_rotary_factor="
                f"{self.rope_parameters['partial_rotary_factor']}."
            )
        if kind == "xpos":
            self.check_xpos_range()
            if not self.is_causal:
                logger.warning_once(
                    "xPos makes keys after the query grow with their distance where those before it decay; it is meant "
                    "for causal models. Consider `position_embedding_type='rope'` for a bidirectional one."
                )

    @classmethod
    def geometric(cls, base_segment_length: int, max_length: int, ratio: int = 2, **kwargs) -> "LongNetConfig":
        r"""A configuration whose schedule covers `max_length` tokens: segments base * ratio^i, rates ratio^i.

        Each pattern then costs the same per token, so the whole costs in proportion to the logarithm of the length.

            >>> LongNetConfig.geometric(1024, 5000).segment_lengths
            [1024, 2048, 4096, 8192]

        Args:
            base_segment_length: length of the dense segments, in tokens.
            max_length: the last segment is the first that reaches it; also the default `max_position_embeddings`.
            ratio: of one segment length, and one rate, to the next; at least 2.
            kwargs: any other field of the configuration.

        Raises:
            ValueError: for values that give no schedule, or other fields that do not go with it.
        """
        for name, value, least in (
            ("base_segment_length", base_segment_length, 1),
            ("max_length", max_length, 1),
            ("ratio", ratio, 2),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        for name in ("segment_lengths", "dilation_rates"):
            if name in kwargs:
                raise ValueError(f"`{name}` is what `geometric` computes, so it cannot be given, got {kwargs[name]!r}.")
        rates = [1]
        while base_segment_length * rates[-1] < max_length:
            rates.append(rates[-1] * ratio)
        kwargs.setdefault("max_position_embeddings", max_length)
        return cls(segment_lengths=[base_segment_length * rate for rate in rates], dilation_rates=rates, **kwargs)


__all__ = ["LongNetConfig"]
