"""Multi-query associative recall (MQAR): pairs of keys and values first, then each key again: what was its value?

The task of Zoology (arXiv 2312.04927), section 4 and appendix E, as the authors' code generates it: K pairs of distinct
keys and values; each key once more, at a distance drawn by a power law; the answer is asked for at the key's position;
all else is filler. Here every batch is fresh, the vocabulary is small, and the grid (N, K) is trained as a mixture, as
in Based (arXiv 2402.18668), whose first layer, a convolution of width 3, stands before every system too. At the small
scale texts of two pairs are in the mixture: without them even dense attention stays at chance for the time there is.

Letters: B rows, N tokens, K pairs, V vocabulary, E hidden size.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from examples.evidence.neighbours.backbone import CausalConvolution, ModelShape, System
from examples.evidence.training import train


IGNORED = -100
POWER = 0.01  # a of the power law: p(gap) ~ gap^(a - 1)


def make_batch(
    rows: int, length: int, num_pairs: int, vocab_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [B, N]: keys are 1 to V/2 - 1, values V/2 to V - 1, filler 0; labels -100 but at the queries.

    Raises:
        ValueError: more pairs than keys, or than a text of `length` has room for.
    """
    half = vocab_size // 2
    slots = (length - 2 * num_pairs) // 2
    if not 0 < num_pairs < half or num_pairs > slots:
        raise ValueError(
            f"`num_pairs` must be below {half} keys and {slots} places of a text of {length}, got {num_pairs}."
        )
    keys = torch.rand(rows, half - 1, generator=generator).argsort(1)[:, :num_pairs] + 1
    values = torch.rand(rows, vocab_size - half, generator=generator).argsort(1)[:, :num_pairs] + half
    weights = torch.arange(1, slots + 1, dtype=torch.float) ** (POWER - 1)
    gaps = torch.multinomial(weights.expand(rows, -1), num_pairs, generator=generator)  # without replacement
    at = 2 * num_pairs + 2 * gaps
    tokens = torch.zeros(rows, length, dtype=torch.long)
    tokens[:, 0 : 2 * num_pairs : 2], tokens[:, 1 : 2 * num_pairs : 2] = keys, values
    tokens.scatter_(1, at, keys)
    labels = torch.full((rows, length), IGNORED).scatter_(1, at, values)
    return tokens, labels


class RecallModel(nn.Module):
    """A system behind a residual convolution of width 3 over its embeddings; scores are made at the queries alone."""

    def __init__(self, system: System):
        super().__init__()
        self.system = system
        self.convolution = CausalConvolution(system.embedding_weight().shape[1], 3)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [queries, V] and labels [queries]."""
        embedded = self.system.embed(tokens)
        hidden_states, _ = self.system.body(embedded + self.convolution(embedded)[0])
        asked = labels != IGNORED
        return self.system.head(hidden_states[asked]), labels[asked]


def recall_losses(
    model: RecallModel, grid: list[tuple[int, int]], tokens_per_batch: int, vocab_size: int, seed: int
) -> Iterator[torch.Tensor]:
    """Losses of fresh batches, of the grid's sizes in turns; a size that stands there twice comes twice as often."""
    generator = torch.Generator().manual_seed(seed)
    device = model.system.embedding_weight().device
    for length, num_pairs in itertools.cycle(grid):
        batch = make_batch(max(1, tokens_per_batch // length), length, num_pairs, vocab_size, generator)
        yield nn.functional.cross_entropy(*model(*(t.to(device) for t in batch)))


def measure_recall(build: Callable[[ModelShape, int], System], scale: dict, device: str, seed: int) -> dict:
    """Accuracy by (N, K) of a system, made from a shape and a seed, after training on `scale["recall"]`."""
    setting = scale["recall"]
    vocabulary, longest = setting["vocab_size"], max(length for length, _ in setting["test_grid"])
    sizes = {**scale["shape"], "vocab_size": vocabulary, "window": setting["window"], "max_length": longest}
    model = RecallModel(build(ModelShape(**sizes), seed)).to(device)
    batches = recall_losses(model, setting["grid"], setting["tokens_per_batch"], vocabulary, seed)
    trained = train(model, batches, setting["steps"], setting["learning_rate"], lambda steps: tqdm(steps, leave=False))
    by_size = {
        f"{length},{pairs}": accuracy(model, length, pairs, vocabulary) for length, pairs in setting["test_grid"]
    }
    return {"accuracy": by_size, "parameters": model.system.num_inner_parameters(), **trained}


@torch.no_grad()
def accuracy(model: RecallModel, length: int, num_pairs: int, vocab_size: int, queries: int = 2048) -> float:
    """The share of queries whose value gets the highest score, on rows that no training has seen (another seed)."""
    model.eval()
    generator = torch.Generator().manual_seed(10**6 + length)
    device, rows = model.system.embedding_weight().device, -(-queries // num_pairs)
    right = total = 0
    for count in [min(16, rows - start) for start in range(0, rows, 16)]:
        batch = make_batch(count, length, num_pairs, vocab_size, generator)
        scores, labels = model(*(t.to(device) for t in batch))
        right, total = right + (scores.argmax(-1) == labels).sum().item(), total + len(labels)
    return right / total
