"""S4D: the diagonal structured state space, as a convolution for a text and as a recurrence for what follows.

Letters: B batch, N tokens, E hidden size, S complex states per channel.
"""

import math

import torch
from torch import nn


class S4D(nn.Module):
    """S4D-Lin (arXiv 2206.11893), section 4; S4's diagonal-plus-low-rank form adds nothing on text (Mamba, table 7).

    Per channel: A = -exp(a) + i omega (at first -1/2 + i pi n), B = 1, step exp(log_step), zero-order hold:
    h_t = exp(step A) h_{t-1} + x_t,  y_t = 2 Re sum over n of C (exp(step A) - 1) / A h_t + D x_t.
    """

    slow_parameters = "log_step", "log_decay", "frequency"  # at most 1e-3, no decay, as the authors advise

    def __init__(self, hidden_size: int, state_size: int = 32, smallest_step: float = 1e-3, largest_step: float = 1e-1):
        super().__init__()
        steps = torch.rand(hidden_size) * math.log(largest_step / smallest_step) + math.log(smallest_step)
        self.log_step = nn.Parameter(steps)
        self.log_decay = nn.Parameter(torch.full((hidden_size, state_size), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(state_size).expand(hidden_size, -1).clone().float())
        self.output_matrix = nn.Parameter(torch.randn(hidden_size, state_size, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(hidden_size))

    def _discrete(self) -> tuple[torch.Tensor, torch.Tensor]:
        """step A and the output weights, both complex [E, S]."""
        rate = torch.complex(-self.log_decay.exp(), self.frequency)
        exponent = rate * self.log_step.exp()[:, None]
        return exponent, torch.view_as_complex(self.output_matrix) * torch.expm1(exponent) / rate

    def kernel(self, length: int) -> torch.Tensor:
        """The response to an impulse, real [E, N]: powers of exp(step A) as products of two short lists of them."""
        exponent, weights = self._discrete()
        inner = max(1, math.isqrt(length))
        steps = (
            torch.arange(inner, device=exponent.device),
            torch.arange(-(-length // inner), device=exponent.device) * inner,
        )
        near, far = (torch.exp(exponent[..., None] * count) for count in steps)  # [E, S, inner], [E, S, outer]
        return 2 * torch.einsum("es,eso,esi->eoi", weights, far, near).real.flatten(1)[:, :length]

    def forward(self, inputs, state=None):
        exponent, weights = self._discrete()
        if state is not None and inputs.shape[1] == 1:
            state = torch.exp(exponent) * state + inputs[:, 0, :, None]
            outputs = 2 * (weights * state).sum(-1).real[:, None]
            return outputs + self.skip * inputs, state
        length, rows = inputs.shape[1], inputs.mT
        spectrum = torch.fft.rfft(rows, n=2 * length) * torch.fft.rfft(self.kernel(length), n=2 * length)
        outputs = torch.fft.irfft(spectrum, n=2 * length)[..., :length].mT + self.skip * inputs
        if state is not None:
            counts = torch.arange(1, length + 1, device=inputs.device)
            outputs = (
                outputs
                + 2 * torch.einsum("es,bes,esn->bne", weights, state, torch.exp(exponent[..., None] * counts)).real
            )
        if torch.is_grad_enabled():
            return outputs, None  # training reads whole texts
        return outputs, self._last_state(rows, exponent, state)

    def _last_state(self, rows, exponent, state, piece: int = 512):
        """The state [B, E, S] after `rows` [B, E, N], in pieces, so that powers of exp(step A) are few."""
        state = exponent.new_zeros(rows.shape[0], *exponent.shape) if state is None else state
        ages = torch.arange(min(piece, rows.shape[-1]) - 1, -1, -1, device=rows.device)
        powers = torch.exp(exponent[..., None] * ages)
        for part in rows.split(piece, -1):
            length = part.shape[-1]
            new = torch.einsum("ben,esn->bes", part.to(powers.dtype), powers[..., -length:])
            state = torch.exp(exponent * length) * state + new
        return state
