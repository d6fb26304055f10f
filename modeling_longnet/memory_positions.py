"""Rotary angles of what lies further back than a model was trained to look: queries and keys are turned by distances.

Rotary embeddings turn a query at t and a key at k by t and k, so their product knows t - k alone. A block that begins
at b, too far back, is to be read as if it began `max_distance` before the query: turn the query to `max_distance` and
the block's keys back by b. Pairs of channels are halves apart (Llama, GPT-NeoX), and the
first 2 * len(inv_freq) channels turn.
"""

import torch


def rotate(x: torch.Tensor, distance: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """x [..., D] turned by `distance` (tokens), which broadcasts to [...].

    inv_freq: [R / 2], of the R <= D channels that turn.
    """
    angle = distance[..., None].to(torch.float64) * inv_freq.to(x.device, torch.float64)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    half = inv_freq.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def anchor(query: torch.Tensor, key: torch.Tensor, offset: torch.Tensor, inv_freq: torch.Tensor | None) -> tuple:
    """Query [B, H, Q, D] and key [B, G, N, D] of rows whose angles count from `offset` [B], turned to count from 0.

    Their products stay as they are, but bounds of keys are those of channels, and so would be the choice of blocks.
    """
    if inv_freq is None or not bool(offset.any()):
        return query, key
    return tuple(rotate(x, -offset[:, None, None].expand(x.shape[:3]), inv_freq) for x in (query, key))
