"""What is to be predicted of a slide, its loss and its figures: classes, or survival by Cox's model or by intervals.

Letters: S slides, K outputs of the model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score


KINDS = ("classification", "cox", "hazards")


def class_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Cross entropy of logits [S, K] and classes [S], a mean over slides of which each counts as its class does."""
    losses = torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none")
    return losses.mean() if weights is None else (losses * weights.to(losses.device)[labels.long()]).mean()


def cox_loss(risk: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
    """Negative partial log likelihood of risk [S, 1] and outcome [S, 2] = (time, event), over the slides at hand.

    Ties after Breslow (1974). Without an event it is zero, with a gradient of zeros.
    """
    time, event = outcome.float().unbind(-1)
    risk = risk.squeeze(-1)
    at_risk = time[None, :] >= time[:, None]  # [event's slide, other slide]
    denominator = torch.where(at_risk, risk[None, :], -torch.inf).logsumexp(dim=1)
    return ((denominator - risk) * event).sum() / event.sum().clamp(min=1)


def hazard_loss(logits: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of hazards sigmoid(logits [S, K]) in K intervals and outcome [S, 2] = (interval, event).

    A slide survived each interval before its own; in its own it has the event, or is censored at the interval's end.
    """
    interval, event = outcome.long().unbind(-1)
    survived = torch.arange(logits.shape[1], device=logits.device) < (interval + 1 - event)[:, None]
    log_survival = torch.where(survived, torch.nn.functional.logsigmoid(-logits), 0).sum(dim=1)
    log_hazard = torch.nn.functional.logsigmoid(logits.gather(1, interval[:, None]).squeeze(1))
    return -(log_survival + event * log_hazard).mean()


def concordance(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    """Harrell's C: of the pairs whose order of events is known, the share that risk [S] orders so; ties count half."""
    comparable = (time[:, None] < time[None, :]) & (event[:, None] == 1)
    if not comparable.any():
        return math.nan
    difference = risk[:, None] - risk[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0))[comparable].mean())


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of the last of two classes, or the mean over classes against the rest."""
    classes = probabilities.shape[1]
    if len(np.unique(labels)) < classes:
        return math.nan  # a resample may lack a class
    if classes == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(roc_auc_score(labels, probabilities, multi_class="ovr", labels=range(classes)))


def bootstrap(
    measure: Callable[..., float], arrays: tuple[np.ndarray, ...], patients: list[str], times: int, seed: int = 0
) -> dict[str, float]:
    """A figure and its 95 % interval, from resampled patients: slides of one patient are no independent evidence."""
    random = np.random.default_rng(seed)
    names = sorted(set(patients))
    rows = {name: [i for i, patient in enumerate(patients) if patient == name] for name in names}
    found = []
    for _ in range(times):
        picked = np.concatenate([rows[names[i]] for i in random.integers(len(names), size=len(names))]).astype(int)
        value = measure(*(array[picked] for array in arrays))
        if not math.isnan(value):
            found.append(value)
    low, high = np.quantile(found, [0.025, 0.975]) if found else (math.nan, math.nan)
    return {"value": float(measure(*arrays)), "low": float(low), "high": float(high)}


@dataclass
class Outcome:
    """What the model gives and how it is scored.

    Args:
        kind: one of `KINDS`.
        classes: their names, in the order of the outputs; two classes: the last is the positive one.
        edges: ends of the intervals but the last, for "hazards".
        class_weights: [K], or none.
    """

    kind: str
    classes: list[str] | None = None
    edges: list[float] | None = None
    class_weights: torch.Tensor | None = None

    @property
    def num_outputs(self) -> int:
        return {"classification": len(self.classes or []), "cox": 1, "hazards": len(self.edges or []) + 1}[self.kind]

    def encode(self, target) -> torch.Tensor:
        """A target (a class's name, or (time, event)) as the loss wants it."""
        if self.kind == "classification":
            return torch.tensor(self.classes.index(target))
        time, event = target
        if self.kind == "hazards":
            return torch.tensor([int(np.searchsorted(self.edges, time)), event])
        return torch.tensor([time, float(event)])

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.kind == "classification":
            return class_loss(outputs, labels, self.class_weights)
        return (cox_loss if self.kind == "cox" else hazard_loss)(outputs, labels)

    def scores(self, outputs: torch.Tensor) -> np.ndarray:
        """Probabilities [S, K] of classes, or risk [S]: with intervals, minus the expected number survived."""
        outputs = outputs.float()
        if self.kind == "classification":
            return outputs.softmax(dim=-1).numpy()
        if self.kind == "cox":
            return outputs[:, 0].numpy()
        return -(1 - outputs.sigmoid()).cumprod(dim=1).sum(dim=1).numpy()

    def figures(self, scores: np.ndarray, targets: list, patients: list[str], times: int) -> dict[str, dict]:
        """Each figure with its interval."""
        if self.kind != "classification":
            time, event = (np.array(column) for column in zip(*targets))
            return {"c_index": bootstrap(concordance, (scores, time, event), patients, times)}
        labels = np.array([self.classes.index(target) for target in targets])

        def balanced_accuracy(scores, labels):
            return float(balanced_accuracy_score(labels, scores.argmax(axis=1)))

        with np.errstate(all="ignore"):
            return {
                "auroc": bootstrap(auroc, (scores, labels), patients, times),
                "balanced_accuracy": bootstrap(balanced_accuracy, (scores, labels), patients, times),
            }
