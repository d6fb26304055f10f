"""Rotary position embeddings: RoPE and xPos.

Letters: B batch, H query heads, G key/value heads, Q tokens, D head dimension.
"""

from collections.abc import Callable

import torch
from torch import nn

from .configuration_longnet import LongNetConfig
from .transformers_compat import ROPE_INIT_FUNCTIONS, dynamic_rope_update


class LongNetRotaryEmbedding(nn.Module):
    def __init__(self, config: LongNetConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: LongNetConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies [D/2] of plain RoPE, and the factor 1.0 that it puts on cos and sin."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @dynamic_rope_update
    def frequencies(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Inverse frequencies [D/2] in float32, on the device of `x`, for texts that reach as far as `position_ids`."""
        return self.inv_freq.to(device=x.device, dtype=torch.float)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.frequencies(x, position_ids)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class LongNetXposRotaryEmbedding(nn.Module):
    """xPos: RoPE on neighbouring pairs, times zeta ** (p / base) on queries and its inverse on keys.

    Only distances matter, so positions are counted from the middle of the largest segment (or of the whole range,
    where a query may see beyond it): the factors then stay in range, and the angles accurate, in texts of any length.

    Source: https://arxiv.org/abs/2212.10554, and torchscale/component/xpos_relative_position.py for the constants.
    """

    def __init__(self, config: LongNetConfig):
        super().__init__()
        self.config = config
        self.rotary_emb = LongNetRotaryEmbedding(config)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """cos, sin and scale of positions [B, Q], each [B, Q, D] in float32."""
        width, span = self.config.head_dim, self.config.xpos_range
        frequencies, factor = self.rotary_emb.frequencies(x, position_ids), self.rotary_emb.attention_scaling
        # CODEPATH: sinks, or segments that do not divide the largest one, let a query see another segment's keys.
        if self.config.xpos_is_centred_per_segment:
            position_ids = position_ids % span
        centred = (position_ids - span // 2)[..., None].float()
        angles = centred * frequencies
        cos, sin = angles.cos() * factor, angles.sin() * factor
        pairs = torch.arange(0, width, 2, device=x.device, dtype=torch.float)
        scale = ((pairs + 0.4 * width) / (1.4 * width)) ** (centred / float(self.config.xpos_scale_base))
        return tuple(table.repeat_interleave(2, dim=-1) for table in (cos, sin, scale))


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotates half the hidden dims of the input."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    """Rotates each pair of neighbouring dims: (a, b, c, d) -> (-b, a, -d, c)."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE on query [B, H, Q, D] and key [B, G, Q, D] with cos and sin [B, Q, D], computed in float32."""
    cos, sin = cos[:, None], sin[:, None]
    return tuple((x * cos + rotate_half(x) * sin).to(x.dtype) for x in (query, key))


def apply_xpos(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """xPos on query [B, H, Q, D] and key [B, G, Q, D] with tables [B, Q, D], computed in float32."""
    cos, sin, scale = cos[:, None], sin[:, None], scale[:, None]
    scaled_query = (query * cos + rotate_pairs(query) * sin) * scale
    scaled_key = (key * cos + rotate_pairs(key) * sin) / scale
    return scaled_query.to(query.dtype), scaled_key.to(key.dtype)
