"""A drop-in layer for models of one's own: multi-head self-attention with dilated attention inside.

Letters: B batch, H query heads, G key/value heads (H % G == 0), N tokens.
"""

import torch
from torch import nn

from .attention_kernels import check_backend
from .dilated_attention import scheduled_attention
from .dilation_schedule import DilationSchedule


class DilatedAttention(nn.Module):
    """Multi-head self-attention with dilated attention inside: [B, N, hidden_size] in, the same shape out.

    Args:
        hidden_size: width of the input, a multiple of `num_heads`.
        num_heads: H.
        segment_lengths, dilation_rates: the schedule, see [`DilationSchedule`]; so are the further `options`
            (head_offsets, overlap, num_sink_tokens, padding, local) and `backend`, see [`dilated_attention`].
        num_key_value_heads: G, `num_heads` by default.
        is_causal: whether later tokens are hidden.
        qk_norm: normalise query and key by a LayerNorm per head before the dot product.
        bias: whether the four projections have a bias.
        dropout: probability with which attention weights are dropped in training.

    Raises:
        ValueError: heads that do not divide, or a schedule that [`DilationSchedule`] refuses.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        segment_lengths: list[int],
        dilation_rates: list[int],
        *,
        num_key_value_heads: int | None = None,
        is_causal: bool = True,
        qk_norm: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        backend: str | None = None,
        **options,
    ):
        super().__init__()
        kv_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"`hidden_size` must be a multiple of `num_heads`, got {hidden_size} and {num_heads}.")
        if kv_heads < 1 or num_heads % kv_heads:
            given = f"{num_heads} and {kv_heads}"
            raise ValueError(f"`num_heads` must be a multiple of `num_key_value_heads`, got {given}.")
        check_backend(backend)
        self.schedule = DilationSchedule(segment_lengths, dilation_rates, is_causal, **options)
        self.head_dim, self.dropout, self.backend = hidden_size // num_heads, dropout, backend
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
        """[B, N, hidden_size] to [B, N, hidden_size]; `document_ids` [B, N] as in [`dilated_attention`]."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = scheduled_attention(
            self.q_norm(query), self.k_norm(key), value, self.schedule, document_ids=document_ids,
            backend=self.backend, dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).flatten(2))


__all__ = ["DilatedAttention"]
