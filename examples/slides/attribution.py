"""What each tile contributes to a prediction, and how faithful that is.

- `gradient`: gradient of the output times the tile's features, less those of the slide's mean tile: how the output
  would change, to first order, if the tile were like any other (Shrikumar et al. 2017, arXiv 1704.02685).
- `integrated`: the same gradient, averaged on the way from a slide of mean tiles to the slide as it is (integrated
  gradients, Sundararajan et al. 2017, arXiv 1703.01365): it does not vanish where the output is saturated.
- `rollout`: attention of the class token (of all tiles, where those are averaged), followed through the layers and
  residuals (Abnar and Zuidema 2020, arXiv 2005.00928). The same for every class; needs memory for N x N weights.

Letters: N tiles, C width of the features, K outputs.
"""

from collections.abc import Callable

import numpy as np
import torch

from modeling_longnet import LongNetSlideEncoderForImageClassification
from modeling_longnet.transformers_compat import attention_of


METHODS = ("gradient", "integrated", "rollout")
MAX_ROLLOUT_TILES = 6_000
INTEGRATION_STEPS = 16
FRACTIONS = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


def output_of(logits: torch.Tensor, target: int) -> torch.Tensor:
    """What is explained: the log odds of a class, or the output itself where there is but one."""
    if logits.shape[-1] == 1:
        return logits[..., 0]
    others = [k for k in range(logits.shape[-1]) if k != target]
    return logits[..., target] - logits[..., others].logsumexp(dim=-1)


def gradient_scores(
    model: LongNetSlideEncoderForImageClassification, batch: dict, target: int, places: tuple[float, ...] = (1.0,)
) -> np.ndarray:
    """[N]: positive for tiles that speak for the target. `places`: 0 is a slide of mean tiles, 1 the slide itself."""
    tiles = batch["tile_embeds"].to(model.dtype).detach()
    mean = tiles.mean(dim=1, keepdim=True)
    total = torch.zeros_like(tiles)
    for place in places:
        point = torch.lerp(mean.expand_as(tiles), tiles, place).requires_grad_()
        with torch.enable_grad():
            output = output_of(model(point, batch["coords"]).logits.float(), target).sum()
            total += torch.autograd.grad(output, point)[0] / len(places)
    return (total.float() * (tiles - mean).float()).sum(dim=-1)[0].cpu().numpy()


def integrated_scores(model: LongNetSlideEncoderForImageClassification, batch: dict, target: int) -> np.ndarray:
    """[N]: as `gradient_scores`, by the midpoint rule; the scores sum to what the slide changes in the output."""
    places = tuple((step + 0.5) / INTEGRATION_STEPS for step in range(INTEGRATION_STEPS))
    return gradient_scores(model, batch, target, places)


@torch.no_grad()
def rollout_scores(model: LongNetSlideEncoderForImageClassification, batch: dict, target: int) -> np.ndarray:
    """[N]: shares of the attention; they sum to at most 1.

    Raises:
        ValueError: a slide whose N x N weights would not fit.
    """
    count = batch["tile_embeds"].shape[1]
    if count > MAX_ROLLOUT_TILES:
        raise ValueError(f"`rollout` forms N x N weights and is offered up to {MAX_ROLLOUT_TILES} tiles, got {count}.")
    implementation = attention_of(model.config)
    model.set_attn_implementation("eager")
    try:
        attentions = model(batch["tile_embeds"], batch["coords"], output_attentions=True).attentions
    finally:
        model.set_attn_implementation(implementation)
    pooled = torch.zeros(count + 1, device=attentions[0].device)
    if model.config.pooling == "cls":
        pooled[0] = 1
    else:
        pooled[1:] = 1 / count
    for weights in reversed(attentions):
        pooled = 0.5 * pooled + 0.5 * (pooled @ weights[0].float().mean(dim=0))
    return pooled[1:].cpu().numpy()


SCORERS: dict[str, Callable] = {
    "gradient": gradient_scores, "integrated": integrated_scores, "rollout": rollout_scores
}  # fmt: skip


@torch.inference_mode()
def deletion_curve(model, batch: dict, order: np.ndarray, target: int) -> list[float]:
    """Probability of the target (the output itself where there is one) after the first tiles of `order` were removed.

    One value for each of `FRACTIONS`; tiles are taken out of the slide, not blackened.
    """
    curve = []
    for fraction in FRACTIONS:
        kept = np.sort(order[int(np.ceil(fraction * len(order))) :])
        if not len(kept):
            kept = order[-1:]
        kept = torch.from_numpy(kept).to(batch["coords"].device)
        logits = model(batch["tile_embeds"][:, kept], batch["coords"][:, kept]).logits.float()[0]
        curve.append(float(logits.softmax(dim=-1)[target] if len(logits) > 1 else logits[0]))
    return curve


def explain(model, batch: dict, target: int, methods: list[str], seed: int = 0) -> dict[str, dict]:
    """By method: scores [N] and the deletion curve; and `random`, the mean curve of three orders by chance."""
    random = np.random.default_rng(seed)
    results = {}
    for method in methods:
        scores = SCORERS[method](model, batch, target)
        order = (-scores).argsort(kind="stable")
        results[method] = {"scores": scores.tolist(), "deletion": deletion_curve(model, batch, order, target)}
    count = batch["coords"].shape[1]
    chance = [deletion_curve(model, batch, random.permutation(count), target) for _ in range(3)]
    results["random"] = {"deletion": np.mean(chance, axis=0).tolist()}
    return results
