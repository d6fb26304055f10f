"""One way of training and judging for every system of the comparison.

Letters: B rows, N tokens of a row, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from examples.evidence.neighbours.backbone import System


RATE_FACTORS = {"time_decay": 2.0, "time_first": 3.0}  # of RWKV, as its authors' code has them
SLOW_RATE = 1e-3  # at most, for what a module names in `slow_parameters`: S4's and LRU's recurrences


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float = 0.1) -> list[dict]:
    """For AdamW: decay on matrices alone, slower rates where a module asks for them."""
    slow = {
        id(getattr(module, name)) for module in model.modules() for name in getattr(module, "slow_parameters", ())
    }  # fmt: skip
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        factor = RATE_FACTORS.get(name.rsplit(".", 1)[-1])
        rate, decay = learning_rate, weight_decay
        if id(parameter) in slow:
            rate, decay = min(rate, SLOW_RATE), 0.0
        elif factor or getattr(parameter, "_no_weight_decay", False) or parameter.squeeze().dim() < 2:
            rate, decay = rate * (factor or 1.0), 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def train(
    model: nn.Module, batch_losses: Iterator[torch.Tensor], steps: int, learning_rate: float, progress: Callable
) -> dict:
    """AdamW (0.9, 0.95), clipping at 1, a tenth of the steps to warm up, then a cosine to a tenth of the rate.

    Args:
        batch_losses: yields the loss of the next batch.
        progress: wraps the range of steps, as tqdm does.

    Returns:
        The losses, and the CPU and wall seconds.
    """
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate), betas=(0.9, 0.95))
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses, cpu, wall = [], time.process_time(), time.perf_counter()
    for _ in progress(range(steps)):
        loss = next(batch_losses)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(round(loss.item(), 4))
    return {
        "losses": losses,
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "wall_seconds": round(time.perf_counter() - wall, 2),
    }


def text_losses(model: System, tokens: torch.Tensor, context: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Losses of random pieces of a text [M], `rows` of `context` + 1 tokens each; the seed says which pieces."""
    device = model.embedding_weight().device
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - context - 1, (rows,), generator=generator)
        piece = tokens[starts[:, None] + torch.arange(context + 1)].long().to(device)
        scores, _ = model(piece[:, :-1])
        yield nn.functional.cross_entropy(scores.flatten(0, 1).float(), piece[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: System, tokens: torch.Tensor, context: int, tail: int | None = None) -> float:
    """Mean loss in bits over a text [M] of bytes in blocks of `context`, or over the last `tail` of each block."""
    model.eval()
    device, total, count = model.embedding_weight().device, 0.0, 0
    for block in tokens[: len(tokens) // context * context].view(-1, context):
        block = block[None].long().to(device)
        scores, _ = model(block[:, :-1])
        losses = nn.functional.cross_entropy(scores[0].float(), block[0, 1:], reduction="none")
        losses = losses if tail is None else losses[-tail:]
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count / math.log(2)
