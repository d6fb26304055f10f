"""The Memorizing Transformer's layer: a window, and the nearest keys of all that was read before.

Letters: B batch, H heads, N tokens, D head dimension, M tokens in memory.
"""

import torch
from torch import nn

from .attention_patterns import SlidingWindow
from .backbone import merge_heads, rotate, split_heads
from .pattern_attention import KeyValueStore, pattern_attention


class MemorizingAttention(nn.Module):
    """Memorizing Transformers (arXiv 2203.08913), section 3.1.

    Queries of a segment of `segment` tokens also choose, each for itself, `top_k` keys among those of all earlier
    segments, by dot product; what they give and what the window gives are mixed by a learned sigmoid gate per head.
    Keys of both are normalised, as queries are, with a learned temperature per head. No gradient flows into the memory.
    Positions are rotary, in the window alone. The memory holds the whole text, where the paper's forgets the oldest of
    a fixed number.
    """

    def __init__(self, hidden_size: int, num_heads: int, window: int, segment: int, top_k: int = 32):
        super().__init__()
        self.num_heads, self.segment, self.top_k = num_heads, segment, top_k
        self.pattern = SlidingWindow(window)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(num_heads))
        self.log_temperature = nn.Parameter(torch.full((num_heads,), 10.0).log())

    def forward(self, hidden_states, state=None):
        start = 0 if state is None else state["tokens"]
        positions = torch.arange(start, start + hidden_states.shape[1], device=hidden_states.device)
        query, key, value = (split_heads(t, self.num_heads) for t in self.qkv_proj(hidden_states).chunk(3, -1))
        query = nn.functional.normalize(query, dim=-1) * self.log_temperature.exp()[:, None, None]
        key = nn.functional.normalize(key, dim=-1)
        scale = query.shape[-1] ** 0.5  # the attention functions divide by it
        if state is None:
            turned = rotate(query, positions) * scale, rotate(key, positions)
            near = pattern_attention(*turned, value, self.pattern)
            store = KeyValueStore(keys=key, values=value, positions=positions)
        else:
            store = state["store"]
            store.append(keys=key, values=value, positions=positions)
            near = self._near(query * scale, store, positions)
        attended = self._with_memory(near, query, store, start)
        return self.o_proj(merge_heads(attended)), {"tokens": start + len(positions), "store": store}

    def _near(self, query, store, positions):
        first = max(0, int(positions[0]) - self.pattern.window + 1)
        near = store["positions"][first:]
        keys, values = rotate(store["keys"][:, :, first:], near), store["values"][:, :, first:]
        mask = self.pattern.visible(positions, near)
        return nn.functional.scaled_dot_product_attention(rotate(query, positions), keys, values, attn_mask=mask)

    def _with_memory(self, near, query, store, start):
        """The outputs of the window, mixed with those of the memory wherever there is one."""
        outputs, done = [], 0
        keys, values = store["keys"].detach(), store["values"].detach()
        gate = torch.sigmoid(self.gate)[:, None, None]
        while done < query.shape[2]:
            memory = (start + done) // self.segment * self.segment  # tokens of earlier segments
            rows = slice(done, min(memory + self.segment - start, query.shape[2]))
            part = near[:, :, rows]
            if memory:
                far = self.recall(query[:, :, rows], keys[:, :, :memory], values[:, :, :memory])
                part = gate * far + (1 - gate) * part
            outputs.append(part)
            done = rows.stop
        return torch.cat(outputs, 2)

    def recall(self, query, keys, values):
        """Attention of queries [B, H, N, D] to each one's `top_k` best keys among [B, H, M, D]."""
        scores, chosen = (query @ keys.mT).topk(min(self.top_k, keys.shape[2]), -1)
        index = chosen.flatten(2)[..., None].expand(-1, -1, -1, values.shape[-1])
        picked = values.gather(2, index).unflatten(2, chosen.shape[2:])  # [B, H, N, top_k, D]
        return (scores.softmax(-1)[..., None, :] @ picked)[..., 0, :]
