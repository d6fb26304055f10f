"""How well a causal language model predicts a text, by the position of the predicted token in its context.

Letters: B rows, N tokens of a block.
"""

import math

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from modeling_longnet import LongNetForCausalLM


def position_buckets(length: int, smallest: int = 256) -> list[tuple[int, int]]:
    """Ranges [start, end) that double: [0, 256), [256, 512), [512, 1024) and so on up to `length`."""
    edges, edge = [0], smallest
    while edge < length:
        edges.append(edge)
        edge *= 2
    return list(zip(edges, edges[1:] + [length]))


@torch.no_grad()
def token_losses(model: torch.nn.Module, input_ids: torch.Tensor, chunk_size: int = 1024) -> torch.Tensor:
    """-log p of the tokens 1 to N-1 of [B, N] given those before, in nats, float32 [B, N-1].

    A LongNet's scores are made for `chunk_size` positions at a time; all at once they would need more memory than the
    model itself. Other families make their own, which some of them scale or cap.
    """
    if isinstance(model, LongNetForCausalLM):
        hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        parts = map(model.get_output_embeddings(), hidden.split(chunk_size, 1))
    else:
        parts = model(input_ids=input_ids, use_cache=False).logits[:, :-1].split(chunk_size, 1)
    targets = input_ids[:, 1:].split(chunk_size, 1)
    losses = [cross_entropy(part.float().mT, target, reduction="none") for part, target in zip(parts, targets)]
    return torch.cat(losses, 1)


def window_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Mean loss in nats over the tokens 1 to N-1 of one window [N]."""
    return token_losses(model, ids[None].to(model.device)).double().mean().item()


def perplexities(model: torch.nn.Module, ids: torch.Tensor, lengths: list[int], name: str) -> dict[str, float]:
    """Perplexity by context length; every length reads the same tokens [N], cut into windows of its own."""
    model.eval()
    windows = {length: ids[: len(ids) // length * length].split(length) for length in lengths}
    result = {}
    with tqdm(total=sum(map(len, windows.values())), desc=f"perplexity, {name}", unit="window") as bar:
        for length, parts in windows.items():
            losses = []
            for part in parts:
                losses.append(window_loss(model, part))
                bar.update()
            result[str(length)] = math.exp(sum(losses) / len(losses))
    return result


def loss_by_position(model: torch.nn.Module, blocks: torch.Tensor, progress: bool = True) -> torch.Tensor:
    """Mean loss at each of the predicted positions 1 to N-1 over blocks [B, N], in nats, float64 [N-1]."""
    device = next(model.parameters()).device
    total = torch.zeros(blocks.shape[1] - 1, dtype=torch.float64)
    for block in tqdm(blocks, desc="evaluating", unit="block", leave=False, disable=not progress):
        total += token_losses(model, block[None].long().to(device))[0].double().cpu()
    return total / len(blocks)


def summarise(losses: torch.Tensor, bytes_per_token: float = 1.0) -> dict[str, float | list]:
    """Loss (nats), perplexity and bits per byte of mean losses [N-1], overall and by position bucket."""

    def measures(values: torch.Tensor) -> dict[str, float]:
        loss = values.mean().item()
        bits = loss / math.log(2) / bytes_per_token
        return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}

    buckets = position_buckets(len(losses))
    by_position = [{"start": start, "end": end} | measures(losses[start:end]) for start, end in buckets]
    return measures(losses) | {"by_position": by_position}
