"""Linear probes: what can be read linearly from an embedding of each slide."""

from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from examples.slides.encode import read_embeddings
from examples.slides.feature_files import SlideFile, load_features
from examples.slides.outcomes import Outcome


MEAN = "mean"  # instead of a file: the mean of each slide's tiles
STRENGTHS = tuple(10.0**power for power in range(-4, 3))


def mean_of_tiles(slides: list[SlideFile]) -> np.ndarray:
    """[S, C]: the plainest embedding of a slide, blind to the places of its tiles."""
    rows = [load_features(slide).double().mean(dim=0) for slide in tqdm(slides, desc="means", unit="slide", delay=1)]
    return torch.stack(rows).numpy()


def embeddings_from(path: str | Path, layer: int | None) -> dict[str, np.ndarray]:
    """The embedding [C] of each slide in a file of `encode.py`: the pooled one, or a layer's.

    Raises:
        ValueError: no such file, or no such layer.
    """
    ids, tensors = read_embeddings(path)
    if layer is not None and ("layers" not in tensors or not 0 <= layer < tensors["layers"].shape[1]):
        have = tensors["layers"].shape[1] if "layers" in tensors else 0
        raise ValueError(f"`layer` must be one of the {have} in {path} (see encode's --layers), got {layer}.")
    rows = tensors["pooled"] if layer is None else tensors["layers"][:, layer]
    return dict(zip(ids, rows.double().numpy()))


def _fit_classes(x: np.ndarray, labels: np.ndarray, strength: float, weighted: bool):
    model = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced" if weighted else None)
    model.fit(x, labels)

    def outputs(x):
        log = torch.from_numpy(model.predict_log_proba(x))  # its softmax is predict_proba
        return log

    return outputs


def _fit_survival(x: np.ndarray, labels: torch.Tensor, strength: float, outcome: Outcome):
    """A linear layer by L-BFGS with the same losses as end to end; deterministic."""
    inputs = torch.from_numpy(x)
    weight = torch.zeros(x.shape[1], outcome.num_outputs, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(outcome.num_outputs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = outcome.loss(inputs @ weight + bias, labels) + weight.square().sum() / (2 * strength * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda x: (torch.from_numpy(x) @ weight + bias).detach()


def fit_probe(
    x: dict[str, np.ndarray], targets: dict[str, list], outcome: Outcome
) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores of the validation and the test slides, and the strength (1 / L2 penalty) that validation chose.

    Args:
        x, targets: by part: embeddings [S, C] and targets.
    """
    middle, spread = x["train"].mean(axis=0), x["train"].std(axis=0)
    x = {part: (rows - middle) / np.where(spread > 0, spread, 1) for part, rows in x.items()}
    labels = {part: torch.stack([outcome.encode(target) for target in targets[part]]) for part in targets}
    best = None
    for strength in STRENGTHS:
        if outcome.kind == "classification":
            fitted = _fit_classes(x["train"], labels["train"].numpy(), strength, outcome.class_weights is not None)
        else:
            fitted = _fit_survival(x["train"], labels["train"], strength, outcome)
        loss = float(outcome.loss(fitted(x["val"]), labels["val"]))
        if best is None or loss < best[0]:
            best = (loss, strength, fitted)
    _, strength, fitted = best
    return outcome.scores(fitted(x["val"])), outcome.scores(fitted(x["test"])), strength
