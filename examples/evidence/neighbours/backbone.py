"""The shell that our own modules share: a Llama (RMSNorm, SwiGLU, tied embeddings) whose attention is a mixer.

A mixer is a module with `forward(hidden_states, state) -> (hidden_states, state)`, [B, N, E] to [B, N, E]. `state` is
None for a text from its beginning, or what the mixer returned for the tokens before; a mixer gives the same outputs for
a text read at once as for one read in pieces.

Letters: B batch, H heads, N tokens, D head dimension, E hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ModelShape:
    """What all systems of one comparison have in common.

    Attributes:
        window: the number of neighbours w that the sparse patterns are made of; each row of `systems.SYSTEMS` says how.
        max_length: the longest text of the comparison, in tokens.
    """

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    window: int = 64
    max_length: int = 8192

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Block(nn.Module):
    """Mixer, then MLP unless its width is zero, each behind a norm and beside a residual."""

    def __init__(self, mixer: nn.Module, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(hidden_size, eps=1e-6), mixer
        self.mlp = None
        if intermediate_size:
            self.mlp_norm, self.mlp = nn.RMSNorm(hidden_size, eps=1e-6), SwiGLU(hidden_size, intermediate_size)

    def forward(self, hidden_states: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        mixed, state = self.mixer(self.mixer_norm(hidden_states), state)
        hidden_states = hidden_states + mixed
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return hidden_states, state


class System(nn.Module):
    """A language model in three parts, so that tasks can put something between them.

    Subclasses define `embed`, `body` and `head`; the loop of training knows nothing else of a model.
    """

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, N] to [B, N, E]."""
        raise NotImplementedError

    def body(
        self, hidden_states: torch.Tensor, state: Any = None, keep_state: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """[B, N, E] to [B, N, E] and, with `keep_state`, what a continuation needs."""
        raise NotImplementedError

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., E] to scores [..., V]."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, state: Any = None, keep_state: bool = False) -> tuple[torch.Tensor, Any]:
        hidden_states, state = self.body(self.embed(input_ids), state, keep_state)
        return self.head(hidden_states), state

    def num_inner_parameters(self) -> int:
        """Parameters without those of the embeddings, which all systems share."""
        return sum(p.numel() for p in self.parameters()) - self.embedding_weight().numel()

    def embedding_weight(self) -> nn.Parameter:
        raise NotImplementedError


class Backbone(System):
    """A stack of blocks.

    Args:
        mixers: makes the mixer of layer i, for i in 0 to `num_mixers` - 1.
        intermediate_size: of the MLPs; 0 for none.
        num_mixers: default `shape.num_hidden_layers`.
    """

    def __init__(
        self,
        shape: ModelShape,
        mixers: Callable[[int], nn.Module],
        intermediate_size: int,
        num_mixers: int | None = None,
    ):
        super().__init__()
        num_mixers = num_mixers or shape.num_hidden_layers
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(mixers(i), shape.hidden_size, intermediate_size) for i in range(num_mixers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=1e-6)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if not getattr(module, "keeps_init", False):
                    nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, input_ids):
        return self.embed_tokens(input_ids)

    def body(self, hidden_states, state=None, keep_state=False):
        if (keep_state or state is not None) and torch.is_grad_enabled():
            raise ValueError("`keep_state` is for reading, under torch.no_grad(): training reads whole texts.")
        states = []
        for block, earlier in zip(self.blocks, state or [None] * len(self.blocks)):
            hidden_states, own = block(hidden_states, earlier)
            states.append(own if keep_state else None)
        return self.norm(hidden_states), states if keep_state else None

    def head(self, hidden_states):
        return nn.functional.linear(hidden_states, self.embed_tokens.weight)

    def embedding_weight(self):
        return self.embed_tokens.weight


def split_heads(hidden_states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, N, H * D] to [B, H, N, D]."""
    return hidden_states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(hidden_states: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] to [B, N, H * D]."""
    return hidden_states.transpose(1, 2).flatten(2)


def with_previous(chunks: torch.Tensor) -> torch.Tensor:
    """[B, H, N / c, c, ...] to [B, H, N / c, 2 c, ...]: each chunk behind the one before it, of length c."""
    return torch.cat([torch.cat([torch.zeros_like(chunks[:, :, :1]), chunks[:, :, :-1]], 2), chunks], 3)


def rotate(hidden_states: torch.Tensor, positions: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, equation 34) of [..., N, D] at positions [N]."""
    half = hidden_states.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    angles = (positions[:, None].double() * theta**-exponents).to(hidden_states.dtype)
    first, second = hidden_states[..., :half], hidden_states[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class CausalConvolution(nn.Module):
    """Depthwise convolution over the last `width` tokens, [B, N, E]; its state is the last width - 1 inputs."""

    def __init__(self, num_channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, inputs: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.weight.shape[-1]
        if state is None:
            state = inputs.new_zeros(inputs.shape[0], width - 1, inputs.shape[-1])
        padded = torch.cat([state, inputs], 1)
        outputs = nn.functional.conv1d(padded.mT, self.weight, self.bias, groups=self.weight.shape[0]).mT
        return outputs, padded[:, padded.shape[1] - width + 1 :]


def state_bytes(state: Any) -> int:
    """Bytes of the tensors in a state: in lists, dictionaries, caches, and objects that tell it themselves."""
    counted: dict[int, int] = {}

    def visit(value: Any, seen: set[int]) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            counted[storage.data_ptr()] = min(storage.nbytes(), value.nbytes)
        elif hasattr(value, "state_bytes"):
            counted[-id(value)] = value.state_bytes
        elif hasattr(value, "memory_footprint"):
            counted[-id(value)] = value.memory_footprint()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item, seen)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item, seen)
        elif hasattr(value, "layers"):
            visit([vars(layer) for layer in value.layers], seen)

    visit(state, set())
    return sum(counted.values())
