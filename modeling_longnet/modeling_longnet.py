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
"""PyTorch LongNet model: a MAGNETO Transformer whose attention is dilated.

Letters: B batch, H query heads, G key/value heads, Q tokens of the queries, N tokens of the keys, D head dimension.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging

from .chunked_loss import LanguageModelHead
from .configuration_longnet import AUTO_MAP, LongNetConfig
from .dilated_cache_generation import prepare_dilated_cache
from .document_ids import encode_documents, read_documents, without_gradient_of_padding
from .longnet_layers import ALL_ATTENTION_FUNCTIONS, LongNetAttention, LongNetDecoderLayer
from .longnet_positions import LongNetRotaryEmbedding, LongNetXposRotaryEmbedding
from .transformers_compat import (
    CACHE,
    CACHE_NAMES,
    CheckedGenerationMixin,
    accept_cache,
    capture_outputs,
    is_tracing,
    merge_with_config_defaults,
    named_cache,
    refuse_unread,
    register_class_names,
)


logger = logging.get_logger(__name__)


@auto_docstring
class LongNetPreTrainedModel(PreTrainedModel):
    config: LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongNetDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = False
    _supports_attention_backend = False  # another attention function would be a dense one

    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": LongNetDecoderLayer,
        "attentions": LongNetAttention,
    }

    def post_init(self):
        super().post_init()
        self.add_model_tags(["longnet", "dilated-attention"])

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        names = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
        if requested_attention == "triton":  # a name of ours, which the library would not know
            return requested_attention
        implementation = super().get_correct_attn_implementation(requested_attention, is_init_check)
        if implementation not in names:
            raise ValueError(
                f'Specified `attn_implementation="{implementation}"` is not supported: it would compute dense '
                f"attention. LongNet has {', '.join(map(repr, names))}."
            )
        return implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if hasattr(module, "magneto_gain"):
            init.xavier_normal_(module.weight, gain=module.magneto_gain)
        # CODEPATH: with the factor sqrt(hidden_size) this gives token vectors of unit variance, as in torchscale.
        if self.config.scale_embedding and isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.hidden_size**-0.5)


@auto_docstring
class LongNetModel(LongNetPreTrainedModel):
    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        config.validate_architecture()  # `from_pretrained` sets the fields that it is given after they were checked
        self.vocab_size = config.vocab_size
        # CODEPATH: torchscale's no_scale_embedding, which its learned-position and slide encoders set.
        self.embed_scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0

        # No `padding_idx`: the padding token may be text as well (pad = eos), and the states of a row of zeros stay
        # exactly zero, where each LayerNorm multiplies the gradient by 1 / sqrt(eps).
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        # CODEPATH: torchscale's decoders without xPos.
        if config.position_embedding_type == "learned":
            rows = config.max_position_embeddings + config.position_embedding_offset
            self.embed_positions = nn.Embedding(rows, config.hidden_size)
        self.layernorm_embedding = nn.Identity()
        # CODEPATH: torchscale's option of that name.
        if config.layernorm_embedding:
            self.layernorm_embedding = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            [LongNetDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # CODEPATH: the paper's models have xPos; RoPE is for schedules that xPos cannot represent.
        self.xpos = LongNetXposRotaryEmbedding(config) if config.position_embedding_type == "xpos" else None
        # CODEPATH: as above.
        self.rotary_emb = LongNetRotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.gradient_checkpointing = False

        # Initialize weights and apply final processing
        self.post_init()

    def check_positions(self, positions: torch.Tensor) -> None:
        """Refuses positions [B, Q] beyond a learned table, or beyond what xPos can represent."""
        # CODEPATH: see `LongNetConfig.position_embedding_type` and `xpos_is_centred_per_segment`.
        if self.config.position_embedding_type == "xpos" and self.config.xpos_is_centred_per_segment:
            return
        limit = self.config.max_position_embeddings
        if not is_tracing(positions) and (positions >= limit).any():
            raise ValueError(
                f"Positions must be below `max_position_embeddings={limit}` with `position_embedding_type="
                f"{self.config.position_embedding_type!r}`, got {int(positions.max())}."
            )

    def refuse_what_would_be_lost(
        self, cache: Cache | None, position_ids: torch.Tensor | None, kwargs: dict
    ) -> None:
        """Raises a ValueError for a cache that checkpointed layers do not get, and for what is told in vain."""
        refuse_unread(type(self).__name__, kwargs)
        if cache is not None and self.gradient_checkpointing and self.training:
            raise ValueError(
                "`cache` cannot be used in training with gradient checkpointing, which sets caches aside."
            )
        told = [name for name in ("cu_seq_lens_q", "seq_idx") if kwargs.get(name) is not None]
        if told and position_ids is None:
            raise ValueError(f"`{told[0]}` must come with `position_ids` that restart with each document, got none.")

    def embed(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, document_positions: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Input of the first layer [B, Q, hidden_size], and the tables by which the layers rotate queries and keys."""
        hidden_states = inputs_embeds * self.embed_scale
        if self.embed_positions is not None:
            self.check_positions(position_ids)
            rows = position_ids + self.config.position_embedding_offset
            hidden_states = hidden_states + self.embed_positions(rows)
        hidden_states = self.layernorm_embedding(hidden_states)
        hidden_states = nn.functional.dropout(hidden_states, p=self.config.hidden_dropout, training=self.training)
        if self.xpos is not None:  # it must count as the segments do, which no position_ids can change
            self.check_positions(document_positions)
            return hidden_states, self.xpos(hidden_states, position_ids=document_positions)
        if self.rotary_emb is not None:
            return hidden_states, self.rotary_emb(hidden_states, position_ids=position_ids)
        return hidden_states, None

    @accept_cache
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            Keys and values of earlier tokens, whose documents and places `attention_mask` and `position_ids` go on
            from: any cache of Transformers, or a [`DilatedCache`] of constant size. Once called `past_key_values`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.dim() != 3 or 0 in inputs_embeds.shape:
            name, given = ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)
            raise ValueError(
                f"`{name}` must be a batch of rows with at least one token each, got shape {tuple(given.shape)}."
            )
        self.refuse_what_would_be_lost(cache, position_ids, kwargs)
        # CODEPATH: encoders have no cache of their own.
        if use_cache and cache is None and self.config.is_causal:
            cache = DynamicCache(config=self.config)

        (batch_size, query_length), device = inputs_embeds.shape[:2], inputs_embeds.device
        documents = read_documents(
            attention_mask, position_ids, cache, batch_size, query_length, device, self.config.is_causal
        )
        if position_ids is None:
            position_ids = documents.positions
        elif documents.is_split is not None:
            position_ids = torch.where(documents.is_split, documents.positions, position_ids)
        hidden_states, position_embeddings = self.embed(inputs_embeds, position_ids, documents.positions)

        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=documents.ids,
                token_order=documents.order,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                query_offset=documents.query_offset,
                **named_cache(cache),  # checkpointed layers set it aside by its name
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        if documents.ids is not None and isinstance(cache, DynamicCache | None):  # a static one's mask may be wider
            hidden_states = without_gradient_of_padding(hidden_states, attention_mask)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **named_cache(cache),
        )


@auto_docstring
class LongNetForCausalLM(LanguageModelHead, LongNetPreTrainedModel, CheckedGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "`is_causal` must be True for LongNetForCausalLM, got False. Use LongNetForMaskedLM for an encoder."
            )
        self.model = LongNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    def prepare_own_cache(self, generation_config, model_kwargs: dict, max_cache_length: int) -> bool:
        """`generate` runs in memory that does not grow with the text; `cache_implementation="dynamic"` keeps it all."""
        return prepare_dilated_cache(self, generation_config, model_kwargs, max_cache_length)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: continuous batching lays keys out in pages that only dense attention functions can read."""
        raise ValueError("LongNet cannot run under continuous batching (`generate_batch`), use `generate`.")

    @staticmethod
    @accept_cache
    def create_masks_for_generate(
        config: LongNetConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | None:
        """An `attention_mask` for `forward`: the documents of the keys as integers [B, 1, 1, N]."""
        refuse_unread("LongNet's masks", kwargs)
        (batch_size, query_length), device = inputs_embeds.shape[:2], inputs_embeds.device
        documents = read_documents(attention_mask, position_ids, cache, batch_size, query_length, device)
        if documents.order is not None and query_length == documents.ids.shape[1]:
            return attention_mask
        return encode_documents(documents)

    @accept_cache
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            Keys and values of earlier tokens, whose documents and places `attention_mask` and `position_ids` go on
            from: any cache of Transformers, or a [`DilatedCache`] of constant size. Once called `past_key_values`.
        skip_logits (`bool`, *optional*):
            Whether to make the loss chunk by chunk and return no logits, which take 4 bytes times tokens times
            vocabulary. By default in training with labels, where the head and the loss are the model's own.

        Example:

        ```python
        >>> import torch
        >>> from modeling_longnet import LongNetConfig, LongNetForCausalLM

        >>> model = LongNetForCausalLM(LongNetConfig(vocab_size=256, num_hidden_layers=2))
        >>> tokens = torch.tensor([list(b"How long is a long text?")])
        >>> bytes(model.generate(tokens, max_new_tokens=20)[0].tolist())
        ```"""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = logits_to_keep
        if isinstance(kept, (int, torch.SymInt)) and kept >= 0:
            kept = slice(-kept, None)
        elif not isinstance(kept, torch.Tensor) or kept.dim() != 1:
            raise ValueError(f"`logits_to_keep` must be a count of last tokens, or their indices [n], got {kept!r}.")
        hidden_states = outputs.last_hidden_state[:, kept, :]
        loss, logits = self.loss_and_logits(hidden_states, labels, skip_logits, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **named_cache(outputs[CACHE] if CACHE in outputs else None),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(
    custom_intro="""
    A LongNet, bidirectional (`is_causal=False`) as a rule, with a language modeling head on each token.
    """
)
class LongNetForMaskedLM(LanguageModelHead, LongNetPreTrainedModel):
    shifts_labels = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        if config.is_causal:
            logger.warning_once("LongNetForMaskedLM sees only what precedes a masked token, as `is_causal` is True.")
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        skip_logits (`bool`, *optional*):
            As in [`LongNetForCausalLM`].
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "use_cache": False},
        )
        loss, logits = self.loss_and_logits(outputs.last_hidden_state, labels, skip_logits, **kwargs)

        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# These heads name their base model themselves: the generic `__init__`s ask AutoModel, which refuses code from the Hub.


class LongNetForSequenceClassification(GenericForSequenceClassification, LongNetPreTrainedModel):
    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

        # Initialize weights and apply final processing
        self.post_init()


class LongNetForTokenClassification(GenericForTokenClassification, LongNetPreTrainedModel):
    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

        # Initialize weights and apply final processing
        self.post_init()


class LongNetForQuestionAnswering(GenericForQuestionAnswering, LongNetPreTrainedModel):
    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.model = LongNetModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

        # Initialize weights and apply final processing
        self.post_init()


register_class_names(LongNetConfig.model_type, AUTO_MAP)

__all__ = [
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetPreTrainedModel",
]
