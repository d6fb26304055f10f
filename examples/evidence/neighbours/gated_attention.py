"""FLASH: the gated attention unit with attention inside groups and linear attention over earlier groups.

Letters: B batch, N tokens, E hidden size, F expanded size, S size of queries and keys, g group length.
"""

import torch
from torch import nn


class ScaleAndOffset(nn.Module):
    """Cheap queries and keys from one projection: [B, N, S] to `count` of them, each with its own scale and offset."""

    def __init__(self, size: int, count: int):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(count, size) * 0.02)
        self.offset = nn.Parameter(torch.zeros(count, size))

    def forward(self, shared: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (shared[..., None, :] * self.scale + self.offset).unbind(-2)


class FlashUnit(nn.Module):
    """FLASH (arXiv 2202.10447), sections 2.2 and 3.2, causal.

    U, V = SiLU(x W_u), SiLU(x W_v); Z = SiLU(x W_z), of which two queries and two keys are scaled;
    quadratic: ReLU(q k^T / g + bias)^2 over the earlier tokens of the group of g;
    linear: q' (sum over earlier groups of k'^T v) / g;
    out = (U * (quadratic + linear)) W_o.

    One group that spans the text is the gated attention unit (GAU) by itself. The bias is one number per distance
    inside a group. Divisors are the constant g where the authors divide by the length, which in a causal model is not
    known yet.
    """

    def __init__(self, hidden_size: int, group: int, expanded_size: int, query_size: int = 128):
        super().__init__()
        self.group = group
        self.gate_proj = nn.Linear(hidden_size, expanded_size, bias=False)
        self.value_proj = nn.Linear(hidden_size, expanded_size, bias=False)
        self.shared_proj = nn.Linear(hidden_size, query_size, bias=False)
        self.queries_and_keys = ScaleAndOffset(query_size, 4)
        self.distance_bias = nn.Parameter(torch.zeros(group))
        self.out_proj = nn.Linear(expanded_size, hidden_size, bias=False)

    def forward(self, hidden_states, state=None):
        gate = nn.functional.silu(self.gate_proj(hidden_states))
        value = nn.functional.silu(self.value_proj(hidden_states))
        shared = nn.functional.silu(self.shared_proj(hidden_states))
        query, key, far_query, far_key = self.queries_and_keys(shared)
        if state is None:
            state = {"keys": key[:, :0], "far_keys": far_key[:, :0], "values": value[:, :0], "memory": None}
        open_tokens = state["keys"].shape[1]  # of a group that is not full yet
        key = torch.cat([state["keys"], key], 1)
        far_key = torch.cat([state["far_keys"], far_key], 1)
        value = torch.cat([state["values"], value], 1)
        memory, outputs, length = state["memory"], [], key.shape[1]
        for start in range(0, length, self.group):
            group = slice(start, min(start + self.group, length))
            rows = slice(max(start - open_tokens, 0), group.stop - open_tokens)
            output = self._within(query[:, rows], key[:, group], value[:, group])
            if memory is not None:
                output = output + far_query[:, rows] @ memory / self.group
            outputs.append(output)
            if group.stop - start == self.group:
                update = far_key[:, group].mT @ value[:, group]
                memory = update if memory is None else memory + update
        open_rows = slice(length // self.group * self.group, None)
        kept = {"keys": key[:, open_rows], "far_keys": far_key[:, open_rows], "values": value[:, open_rows]}
        if not torch.is_grad_enabled():
            kept = {name: rows.clone() for name, rows in kept.items()}  # a view would hold the whole text
        return self.out_proj(gate * torch.cat(outputs, 1)), kept | {"memory": memory}

    def _within(self, query, key, value):
        """The last rows of a group, [B, Q, S], to all of it, [B, K, S]."""
        behind = key.shape[1] - query.shape[1]
        distance = torch.arange(behind, key.shape[1], device=key.device)[:, None] - torch.arange(
            key.shape[1], device=key.device
        )
        bias = self.distance_bias[distance.clamp_min(0)]
        weights = (query @ key.mT / self.group + bias).relu().square() * (distance >= 0)
        return weights @ value
