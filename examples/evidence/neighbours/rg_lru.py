"""Hawk's recurrence: the real-gated linear recurrent unit.

Letters: B batch, N tokens, E hidden size, R recurrence width, H blocks of the gates.
"""

import torch
from torch import nn

from .backbone import CausalConvolution
from .recurrence import linear_recurrence


EXPONENT = 8.0  # c of the paper
LARGEST_GRADIENT = 1000.0  # of the root, as in the authors' code


class _ClippedRoot(torch.autograd.Function):
    """sqrt, with a gradient that stays finite at zero."""

    @staticmethod
    def forward(ctx, square):
        ctx.save_for_backward(square)
        return square.sqrt()

    @staticmethod
    def backward(ctx, grad):
        (square,) = ctx.saved_tensors
        return grad / (4 * square).clamp_min(1 / LARGEST_GRADIENT**2).sqrt()


class BlockDiagonalLinear(nn.Module):
    """[B, N, R] to [B, N, R] with R / H inputs for each output."""

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        size = width // num_blocks
        self.weight = nn.Parameter(torch.randn(num_blocks, size, size) * size**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        blocks = inputs.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("bnhi,hij->bnhj", blocks, self.weight).flatten(-2) + self.bias


class RealGatedLRU(nn.Module):
    """Griffin (arXiv 2402.19427), equations 1 to 4:

    r = sigmoid(W_a x + b_a), i = sigmoid(W_x x + b_x), log a_t = -8 r softplus(L),
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i x).

    L starts so that exp(-8 softplus(L)) is uniform in [0.9, 0.999], as the paper says.
    """

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        self.recurrence_gate = BlockDiagonalLinear(width, num_blocks)
        self.input_gate = BlockDiagonalLinear(width, num_blocks)
        decay = torch.empty(width).uniform_(0.9, 0.999)
        self.decay_parameter = nn.Parameter(torch.log(torch.expm1(-torch.log(decay) / EXPONENT)))

    def gates(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a_t and the term that is added to the state, both [B, N, R]."""
        rate = EXPONENT * nn.functional.softplus(self.decay_parameter)
        log_decay = -rate * torch.sigmoid(self.recurrence_gate(inputs))
        gated = torch.sigmoid(self.input_gate(inputs)) * inputs
        return log_decay.exp(), _ClippedRoot.apply(-torch.expm1(2 * log_decay)) * gated

    def forward(self, inputs, state=None):
        states = linear_recurrence(*self.gates(inputs), state)
        return states, states[:, -1]


class HawkMixer(nn.Module):
    """The recurrent block: linear, convolution of 4, RG-LRU; times GELU of another linear; linear (section 2.3)."""

    def __init__(self, hidden_size: int, num_blocks: int, width: int | None = None):
        super().__init__()
        width = width or hidden_size * 4 // 3 // num_blocks * num_blocks
        self.gate_proj = nn.Linear(hidden_size, width)
        self.in_proj = nn.Linear(hidden_size, width)
        self.convolution = CausalConvolution(width, 4)
        self.recurrence = RealGatedLRU(width, num_blocks)
        self.out_proj = nn.Linear(width, hidden_size)

    def forward(self, hidden_states, state=None):
        before, recurrent = state or (None, None)
        inputs, before = self.convolution(self.in_proj(hidden_states), before)
        states, recurrent = self.recurrence(inputs, recurrent)
        gate = nn.functional.gelu(self.gate_proj(hidden_states), approximate="tanh")
        kept = before, recurrent
        if not torch.is_grad_enabled():
            kept = before.clone(), recurrent.clone()  # views would hold the whole text
        return self.out_proj(states * gate), kept
