"""One scan for Hawk, LRU, RWKV and Mamba: h_t = a_t h_{t-1} + b_t.

Letters: B batch, N tokens, E channels (one axis or more).
"""

import math

import torch


def linear_recurrence(decay: torch.Tensor, inputs: torch.Tensor, initial: torch.Tensor | None = None) -> torch.Tensor:
    """All states h_t = decay_t h_{t-1} + inputs_t, real or complex, [B, N, E...].

    The text is cut into chunks of about sqrt(N) tokens. All chunks run at once from zero, keeping the product of their
    decays; then the chunks' ends are carried from one to the next and added: 2 sqrt(N) steps instead of N, exact.

    Args:
        decay, inputs: [B, N, E...].
        initial: the state before the first token, [B, E...]; None for zero.
    """
    length = inputs.shape[1]
    chunk = max(1, math.isqrt(length))
    missing = -length % chunk
    if missing:
        decay = torch.cat([decay, decay.new_ones(decay.shape[0], missing, *decay.shape[2:])], 1)
        inputs = torch.cat([inputs, inputs.new_zeros(inputs.shape[0], missing, *inputs.shape[2:])], 1)
    decay, inputs = (t.unflatten(1, (-1, chunk)).unbind(2) for t in (decay, inputs))  # chunk x [B, N / chunk, E...]
    states, products = [inputs[0]], [decay[0]]
    for step_decay, step_inputs in zip(decay[1:], inputs[1:]):
        states.append(step_decay * states[-1] + step_inputs)
        products.append(step_decay * products[-1])
    carry = torch.zeros_like(states[-1][:, 0]) if initial is None else initial
    carries = []
    for end, product in zip(states[-1].unbind(1), products[-1].unbind(1)):
        carries.append(carry)
        carry = product * carry + end
    carried = torch.stack(carries, 1)[:, :, None]
    return (torch.stack(states, 2) + torch.stack(products, 2) * carried).flatten(1, 2)[:, :length]
