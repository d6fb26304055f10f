"""Causal linear attention in chunks, and cosFormer.

Letters: B batch, H heads, N tokens, D key dimension, E value dimension, M the length that cosFormer's angles span.
"""

import math

import torch
from torch import nn

from .backbone import merge_heads, split_heads


def causal_linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: torch.Tensor | None = None, chunk: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum over s <= t of (q_t . k_s) v_s, and the state sum over s of k_s v_s^T after the last token.

    Quadratic inside chunks, one state between them; exact.

    Args:
        query, key: [..., N, D].
        value: [..., N, E].
        state: of the tokens before, [..., D, E].
    """
    outputs = []
    for start in range(0, query.shape[-2], chunk):
        q, k, v = (t[..., start : start + chunk, :] for t in (query, key, value))
        output = (q @ k.mT).tril() @ v
        update = k.mT @ v
        if state is not None:
            output, update = output + q @ state, update + state
        outputs.append(output)
        state = update
    return torch.cat(outputs, -2), state


class CosFormerAttention(nn.Module):
    """cosFormer (arXiv 2202.08791), equations 9 to 12: weights ReLU(q) . ReLU(k) cos(pi (i - j) / 2M), normalised.

    The authors' code takes M from the text at hand, so that a token's output depends on how much is still to come; here
    M is fixed. Beyond distances of M the cosine would be negative: texts must not be longer than M.
    """

    def __init__(self, hidden_size: int, num_heads: int, max_length: int):
        super().__init__()
        self.num_heads, self.max_length = num_heads, max_length
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states, state=None):
        start, memory = (0, None) if state is None else (state["tokens"], state["memory"])
        stop = start + hidden_states.shape[1]
        query, key, value = (split_heads(t, self.num_heads) for t in self.qkv_proj(hidden_states).chunk(3, -1))
        angle = torch.arange(start, stop, device=query.device, dtype=query.dtype)[:, None] * (
            math.pi / 2 / self.max_length
        )
        query, key = (torch.cat([t.relu() * angle.cos(), t.relu() * angle.sin()], -1) for t in (query, key))
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)  # the last column sums the weights
        sums, memory = causal_linear_attention(query, key, value, memory)
        attended = sums[..., :-1] / sums[..., -1:].clamp_min(1e-6)
        return self.o_proj(merge_heads(attended)), {"tokens": stop, "memory": memory}
