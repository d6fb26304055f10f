"""The linear recurrent unit: one complex number per channel, and nothing that depends on the input.

Letters: B batch, N tokens, E hidden size, S state size.
"""

import math

import torch
from torch import nn

from .recurrence import linear_recurrence


class LinearRecurrentUnit(nn.Module):
    """LRU (arXiv 2303.06349), section 3 and appendix A:

    lambda = exp(-exp(nu) + i exp(theta)), h_t = lambda h_{t-1} + exp(gamma) B x_t, y_t = Re(C h_t) + D x_t.

    |lambda| starts uniform by area on the ring [r_min, r_max], with phases up to `max_phase`, and gamma at
    log sqrt(1 - |lambda|^2).
    """

    slow_parameters = "log_decay", "log_phase", "log_scale", "input_matrix"  # a smaller rate (appendix B)

    def __init__(
        self,
        hidden_size: int,
        state_size: int,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
    ):
        super().__init__()
        square = torch.rand(state_size) * (r_max**2 - r_min**2) + r_min**2
        self.log_decay = nn.Parameter((-0.5 * square.log()).log())  # nu
        self.log_phase = nn.Parameter((torch.rand(state_size) * max_phase).log())  # theta
        self.log_scale = nn.Parameter(0.5 * (1 - square).log())  # gamma
        self.input_matrix = nn.Parameter(torch.randn(state_size, hidden_size, 2) / math.sqrt(2 * hidden_size))
        self.output_matrix = nn.Parameter(torch.randn(hidden_size, state_size, 2) / math.sqrt(state_size))
        self.skip = nn.Parameter(torch.randn(hidden_size))

    def forward(self, inputs, state=None):
        decay = torch.exp(torch.complex(-self.log_decay.exp(), self.log_phase.exp()))
        matrix = torch.view_as_complex(self.input_matrix * self.log_scale.exp()[:, None, None])
        driven = inputs.to(matrix.dtype) @ matrix.mT
        states = linear_recurrence(decay.expand(driven.shape), driven, state)
        outputs = (states @ torch.view_as_complex(self.output_matrix).mT).real
        return outputs + self.skip * inputs, states[:, -1].clone()


class GatedMixer(nn.Module):
    """A sequence map, GELU, and a gated linear unit: the block of LRU (section 2) and of S4 (its code)."""

    def __init__(self, sequence_map: nn.Module, hidden_size: int):
        super().__init__()
        self.sequence_map = sequence_map
        self.out_proj = nn.Linear(hidden_size, 2 * hidden_size)

    def forward(self, hidden_states, state=None):
        mapped, state = self.sequence_map(hidden_states, state)
        return nn.functional.glu(self.out_proj(nn.functional.gelu(mapped)), -1), state
