"""The layers that LongNet, its slide encoder and LongViT are made of, and what stands behind `attn_implementation`.

Letters: B batch, H query heads, G key/value heads, Q tokens of the queries, N tokens of the keys, D head dimension.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .attention_pairs import attend_pairs
from .configuration_longnet import LongNetConfig
from .dilated_attention import ELSEWHERE, scheduled_attention
from .dilated_cache import DilatedCache
from .dilation_schedule import DilationSchedule
from .document_ids import holds_pairs, reorder, restore_order
from .longnet_positions import apply_rotary_pos_emb, apply_xpos
from .transformers_compat import accept_cache, attention_of, closed_interface


logger = logging.get_logger(__name__)


def operator_arguments(
    module: nn.Module,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    query_offset: int | torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> dict:
    """The operator's arguments besides the tensors; `attention_mask` are the document ids [B, N] of the keys."""
    schedule = DilationSchedule.from_config(module.config).of_layer(module.layer_idx)
    is_causal = module.is_causal if is_causal is None else is_causal
    return {
        "schedule": schedule if schedule.is_causal == is_causal else replace(schedule, is_causal=is_causal),
        "scale": scaling,
        "dropout": dropout,
        "document_ids": attention_mask,
        "query_offset": query_offset,
    }


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The definition: query [B, H, Q, D], key and value [B, G, N, D] to output [B, Q, H, D], weights [B, H, Q, N]; a
    memory gives no weights."""
    arguments = operator_arguments(module, attention_mask, scaling, dropout, **kwargs)
    if arguments["schedule"].memory is not None:
        if holds_pairs(attention_mask):
            raise ValueError("`attention_mask` of pairs tells no document, of whose blocks a `memory` could choose.")
        output = scheduled_attention(query, key, value, **arguments, backend="eager")
        return output.transpose(1, 2).contiguous(), None
    if holds_pairs(attention_mask):
        if module.config.padding == "zeros":
            raise ValueError("`attention_mask` of pairs tells no document's length, which `padding='zeros'` needs.")
        pairs = {"pair_mask": attention_mask[:, 0], "position": kwargs["position_ids"].expand(len(query), -1)}
        arguments |= {"document_ids": None, **pairs}
    output, weights = attend_pairs(query, key, value, **arguments)
    return output.transpose(1, 2).contiguous(), weights


def fused_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    backend: str,
    dropout: float = 0.0,
    output_attentions: bool | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """The operator, with the kernels that `backend` names: the same shapes, and no weights."""
    if output_attentions:
        logger.warning_once(
            f"`output_attentions=True` gives none with attn_implementation='{backend}', which never forms the N x N "
            "weights: call model.set_attn_implementation('eager') first."
        )
    if holds_pairs(attention_mask):
        logger.warning_once(
            f"An `attention_mask` of pairs is computed by the definition, in N x N memory: the '{backend}' kernels "
            "know documents only."
        )
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)[0], None
    if dropout > 0:
        logger.warning_once(
            f"The '{backend}' kernels have no dropout: with `attention_dropout` > 0 training uses the operator's plain "
            "PyTorch form, which is slower."
        )
        backend = "eager"
    arguments = operator_arguments(module, attention_mask, scaling, dropout, **kwargs)
    elsewhere = getattr(kwargs.get(ELSEWHERE), "attend", None)
    output = scheduled_attention(query, key, value, **arguments, backend=backend, elsewhere=elsewhere)
    return output.transpose(1, 2).contiguous(), None


# Only these names: every function of the library's own table would compute dense attention.
ALL_ATTENTION_FUNCTIONS = closed_interface(
    {name: partial(fused_attention_forward, backend=name) for name in ("sdpa", "flash_attention_2", "triton")}
)


def mark_magneto_gains(config: LongNetConfig, linears: dict[nn.Linear, bool]) -> None:
    """Tells `_init_weights` MAGNETO's gain of each layer: sqrt(log(2 L)) for those marked True, 1 for the others.

    It stands on the linear layers themselves, because Transformers initialises no containers in code from the Hub.

    Source: https://arxiv.org/abs/2210.06423, figure 2, for models that are a decoder or an encoder alone.
    """
    # CODEPATH: models without sub-LayerNorm start from `initializer_range`.
    if config.sub_layernorm:
        for linear, is_scaled in linears.items():
            linear.magneto_gain = math.sqrt(math.log(2 * config.num_hidden_layers)) if is_scaled else 1.0


class LongNetAttention(nn.Module):
    """Dilated multi-head attention with MAGNETO's LayerNorm over the concatenated heads."""

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        self.fits_float16 = config.position_embedding_type != "xpos" or config.xpos_fits_float16
        # CODEPATH: xPos is the paper's; the other types never hand over its third table.
        self.apply_positions = apply_xpos if config.position_embedding_type == "xpos" else apply_rotary_pos_emb

        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)
        self.inner_attn_ln = nn.Identity()
        # CODEPATH: torchscale checkpoints trained with subln=False have none.
        if config.sub_layernorm:
            self.inner_attn_ln = nn.LayerNorm(query_width, eps=config.layer_norm_eps)
        mark_magneto_gains(config, {self.q_proj: False, self.k_proj: False, self.v_proj: True, self.o_proj: True})

    @accept_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, ...] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        token_order: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        output_dtype = value_states.dtype
        if output_dtype == torch.float16 and not self.fits_float16:
            query_states, key_states, value_states = query_states.float(), key_states.float(), value_states.float()

        if position_embeddings is not None:
            query_states, key_states = self.apply_positions(query_states, key_states, *position_embeddings)
        is_bounded = isinstance(cache, DilatedCache)
        if cache is not None and not is_bounded:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)
        is_whole = query_states.shape[2] == key_states.shape[2]
        if token_order is not None:
            key_states, value_states = (reorder(x, token_order, dim=2) for x in (key_states, value_states))
            query_states = reorder(query_states, token_order, dim=2) if is_whole else query_states

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention_of(self.config), eager_attention_forward
        )
        # CODEPATH: a bounded cache keeps only the rows that its own attention can still reach.
        if is_bounded:
            attention_interface = cache.attention_forward
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        if token_order is not None:
            attn_output = restore_order(attn_output, token_order, dim=1) if is_whole else attn_output
            if attn_weights is not None:
                attn_weights = restore_order(attn_weights, token_order, dim=3)
                attn_weights = restore_order(attn_weights, token_order, dim=2) if is_whole else attn_weights
        attn_output = self.inner_attn_ln(attn_output.reshape(*input_shape, -1).to(output_dtype))
        return self.o_proj(attn_output), attn_weights


class LongNetMLP(nn.Module):
    def __init__(self, config: LongNetConfig):
        super().__init__()
        self.activation_dropout = config.activation_dropout
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.ffn_layernorm = nn.Identity()
        # CODEPATH: torchscale checkpoints trained with subln=False have none.
        if config.sub_layernorm:
            self.ffn_layernorm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        mark_magneto_gains(config, {self.fc1: True, self.fc2: True})
        self.act_fn = ACT2FN[config.hidden_act]
        self.chunk_size = config.mlp_chunk_size

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        chunk_size = self.chunk_size or hidden_states.shape[1]
        if hidden_states.shape[1] <= chunk_size or not torch.is_grad_enabled():
            return self.feed_forward(hidden_states)
        chunks = hidden_states.split(chunk_size, dim=1)
        return torch.cat([checkpoint(self.feed_forward, chunk, use_reentrant=False) for chunk in chunks], dim=1)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, Q, hidden_size], each token by itself."""
        hidden_states = self.act_fn(self.fc1(hidden_states))
        hidden_states = nn.functional.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        return self.fc2(self.ffn_layernorm(hidden_states))


class LongNetDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.drop_path_rate = config.drop_path_rate * layer_idx / max(1, config.num_hidden_layers - 1)
        self.self_attn = LongNetAttention(config=config, layer_idx=layer_idx)
        self.mlp = LongNetMLP(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def add_to_residual(self, residual: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """residual + update, with dropout and stochastic depth on the update; both [B, Q, hidden_size]."""
        update = nn.functional.dropout(update, p=self.hidden_dropout, training=self.training)
        if self.training and self.drop_path_rate > 0:
            kept = torch.full((len(update), 1, 1), 1 - self.drop_path_rate, device=update.device).bernoulli()
            update = update * (kept / (1 - self.drop_path_rate)).to(update.dtype)
        return residual + update

    @accept_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(
            hidden_states=self.self_attn_layer_norm(hidden_states),
            attention_mask=attention_mask,
            cache=cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = self.add_to_residual(hidden_states, attn_output)
        return self.add_to_residual(hidden_states, self.mlp(self.final_layer_norm(hidden_states)))
