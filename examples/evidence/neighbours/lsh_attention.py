"""Reformer's attention by locality-sensitive hashing, made exactly causal.

Letters: B batch, H heads, N tokens, D head dimension, R rounds of hashing, U buckets, c chunk length.
"""

import torch
from torch import nn

from .backbone import merge_heads, split_heads, with_previous
from .pattern_attention import KeyValueStore


SELF_PENALTY = -1e5  # a token reads itself only when it has nothing else to read (section 2, "causal masking")


class LSHAttention(nn.Module):
    """Reformer (arXiv 2001.04451), section 2: queries serve as keys (normalised), and a token reads its bucket.

    In each round a token's bucket is argmax([x R; -x R]). Sorted by bucket, a token reads its own chunk of c and the
    one before. Where chunks are cut depends on tokens that come later; what holds in every cut is kept here: a token
    reads the last c tokens of its bucket, itself included, so nothing depends on the future. Rounds are joined by their
    sums of weights, a key counting once per round. The rotations are drawn once. Without the reversible residuals,
    which save memory only.
    """

    def __init__(self, hidden_size: int, num_heads: int, chunk: int, num_rounds: int = 2, num_buckets: int = 16):
        super().__init__()
        self.num_heads, self.chunk = num_heads, chunk
        self.query_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        rotations = torch.randn(num_heads, num_rounds, hidden_size // num_heads, num_buckets // 2)
        self.register_buffer("rotations", rotations)

    def buckets(self, query: torch.Tensor) -> torch.Tensor:
        """[B, H, N, D] to bucket numbers [B, H, N, R]."""
        turned = torch.einsum("bhnd,hrdu->bhnru", query.detach(), self.rotations.to(query.dtype))
        return torch.cat([turned, -turned], -1).argmax(-1)

    def forward(self, hidden_states, state=None):
        query = split_heads(self.query_proj(hidden_states), self.num_heads)
        value = split_heads(self.value_proj(hidden_states), self.num_heads)
        key = nn.functional.normalize(query, dim=-1)
        buckets = self.buckets(query)
        start = 0 if state is None else state.length
        positions = torch.arange(start, start + query.shape[2], device=query.device)
        if state is None:
            state = KeyValueStore(keys=key, values=value, buckets=buckets, positions=positions)
            rounds = [lsh_round(query, key, value, buckets[..., i], self.chunk) for i in range(buckets.shape[-1])]
            outputs, totals = (torch.stack(parts, -1) for parts in zip(*rounds))
        else:
            state.append(keys=key, values=value, buckets=buckets, positions=positions)
            outputs, totals = self._continue(query, buckets, positions, state)
        attended = (outputs * totals.softmax(-1)[..., None, :]).sum(-1)
        return self.o_proj(merge_heads(attended)), state

    def _continue(self, query, buckets, positions, state):
        """New tokens, one after the other, against all that was kept."""
        outputs, totals = [], []
        for i, position in enumerate(positions):
            same = state["buckets"][:, :, : position + 1] == buckets[:, :, i : i + 1]  # [B, H, K, R]
            recent = same.flip(2).cumsum(2).flip(2) <= self.chunk
            scores = (state["keys"][:, :, : position + 1] @ query[:, :, i, :, None]) * query.shape[-1] ** -0.5
            scores = scores.masked_fill(~(same & recent), float("-inf"))
            scores[:, :, -1] += SELF_PENALTY
            total = scores.logsumexp(2)
            weights = (scores - total[:, :, None]).exp()
            outputs.append(state["values"][:, :, : position + 1].mT @ weights)  # [B, H, D, R]
            totals.append(total)
        return torch.stack(outputs, 2), torch.stack(totals, 2)


def lsh_round(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, buckets: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One round: outputs [B, H, N, D] and the logs of the sums of their weights [B, H, N]; buckets [B, H, N]."""
    length = query.shape[2]
    order = buckets.argsort(dim=-1, stable=True)
    padding = -length % chunk
    ordered = [t.gather(2, order[..., None].expand_as(t)) for t in (query, key, value)]
    query, key, value = (nn.functional.pad(t, (0, 0, 0, padding)).unflatten(2, (-1, chunk)) for t in ordered)
    bucket = nn.functional.pad(buckets.gather(2, order), (0, padding), value=-1).unflatten(2, (-1, chunk))
    key, value, around = (with_previous(t) for t in (key, value, bucket))
    around[:, :, 0, :chunk] = -2  # there is no chunk before the first
    index = torch.arange(chunk, device=query.device)
    behind = index[:, None] + chunk - torch.arange(2 * chunk, device=query.device)  # in the sorted order
    mask = (bucket[..., None] == around[..., None, :]) & (behind >= 0) & (behind < chunk)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    scores = scores + SELF_PENALTY * (behind == 0)
    total = scores.logsumexp(-1)
    outputs = (scores - total[..., None]).exp() @ value
    inverse = order.argsort(-1)
    outputs, total = outputs.flatten(2, 3)[:, :, :length], total.flatten(2, 3)[:, :, :length]
    return outputs.gather(2, inverse[..., None].expand_as(outputs)), total.gather(2, inverse)
