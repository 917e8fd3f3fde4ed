"""The accuracy model: quality from slots, fitted on allocations that were run (appendix A.2).

Two fully connected layers with ReLU between, fitted by least squares; a linear model beside it is
the yardstick. From the paper: the shape, the loss, random allocations. Ours, for it does not say:
the inputs (``ENCODINGS``), the width, the optimiser (Adam over all runs at once, in NumPy), the
held-out part, and the sign of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.planning.space import FloatArray
from moesim.types import IntArray

ENCODINGS = ("uses", "slots")
"""What a layer with n slots lacks, as the share of its uses that fall outside its n most used
experts, or as the share of its experts."""


@dataclass(frozen=True, slots=True)
class Net:
    """quality = mean - spread x (relu(x W + b) v + c), x the share that each layer lacks.

    lacking : float64 [layers, experts + 1], that share by slots.
    hidden : float64 [layers, width] W; bias [width] b; out [width] v.
    """

    lacking: FloatArray
    mean: float
    spread: float
    hidden: FloatArray
    bias: FloatArray
    out: FloatArray
    shift: float

    def __call__(self, slots: IntArray) -> FloatArray:
        """Quality of each allocation, int64 [P, layers] -> float64 [P]."""
        active = np.maximum(encoded(self.lacking, slots) @ self.hidden + self.bias, 0)
        quality: FloatArray = self.mean - self.spread * (active @ self.out + self.shift)
        return quality


@dataclass(frozen=True, slots=True)
class Linear:
    """quality = c - x w."""

    lacking: FloatArray
    weights: FloatArray
    shift: float

    def __call__(self, slots: IntArray) -> FloatArray:
        """Quality of each allocation, int64 [P, layers] -> float64 [P]."""
        quality: FloatArray = self.shift - encoded(self.lacking, slots) @ self.weights
        return quality


@dataclass(frozen=True, slots=True)
class Fitting:
    """How to fit the net.

    monotone : hold the weights of both layers at or above 0. A further slot then never lowers the
        predicted quality, and gains less the more there are (the net is convex in what is missing).
    """

    width: int = 32
    steps: int = 2000
    rate: float = 0.02
    decay: float = 1e-3
    monotone: bool = True


def fit_net(
    slots: IntArray, quality: FloatArray, lacking: FloatArray, how: Fitting, seed: int
) -> Net:
    """Fit the net to runs: int64 [P, layers] and float64 [P]."""
    mean, spread = float(quality.mean()), float(quality.std()) or 1.0
    inputs, wanted = encoded(lacking, slots), (mean - quality) / spread
    rng = np.random.default_rng([seed, 3])
    parts = [
        np.abs(rng.normal(0, 1 / np.sqrt(inputs.shape[1]), (inputs.shape[1], how.width))),
        -rng.random(how.width),
        np.abs(rng.normal(0, 1 / np.sqrt(how.width), how.width)),
        np.zeros(1),
    ]
    _descend(parts, inputs, wanted, how)
    return Net(lacking, mean, spread, parts[0], parts[1], parts[2], float(parts[3][0]))


def fit_linear(slots: IntArray, quality: FloatArray, lacking: FloatArray) -> Linear:
    """The linear model of least squares (of least norm where runs are too few)."""
    inputs = encoded(lacking, slots)
    design = np.column_stack((-inputs, np.ones(len(inputs))))
    answer = np.linalg.lstsq(design, quality, rcond=None)[0].astype(np.float64)
    return Linear(lacking, answer[:-1], float(answer[-1]))


def lacking_slots(layers: int, experts: int) -> FloatArray:
    """float64 [layers, experts + 1]: share of the experts outside n slots."""
    share: FloatArray = np.tile(1 - np.arange(experts + 1) / experts, (layers, 1))
    return share


def encoded(lacking: FloatArray, slots: IntArray) -> FloatArray:
    """float64 [P, layers]: what each layer of each allocation lacks."""
    inputs: FloatArray = lacking[np.arange(len(lacking)), slots]
    return inputs


def _descend(parts: list[FloatArray], x: FloatArray, wanted: FloatArray, how: Fitting) -> None:
    """Adam (Kingma and Ba 2015) with a cosine schedule, in place."""
    first = [np.zeros_like(p) for p in parts]
    second = [np.zeros_like(p) for p in parts]
    for step in range(1, how.steps + 1):
        rate = how.rate * 0.5 * (1 + np.cos(np.pi * step / how.steps))
        gradients = _gradients(parts, x, wanted, how.decay)
        for i, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
            first[i] += 0.1 * (gradient - first[i])
            second[i] += 0.001 * (gradient * gradient - second[i])
            scale = np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8
            part -= rate * first[i] / (1 - 0.9**step) / scale
            if how.monotone and i in (0, 2):
                np.maximum(part, 0, out=part)


def _gradients(
    parts: list[FloatArray], x: FloatArray, wanted: FloatArray, decay: float
) -> list[FloatArray]:
    hidden, bias, out, shift = parts
    before = x @ hidden + bias
    active = np.maximum(before, 0)
    error = (active @ out + shift[0] - wanted) / len(x)
    back = np.outer(error, out) * (before > 0)
    return [
        x.T @ back + decay * hidden,
        back.sum(axis=0),
        active.T @ error + decay * out,
        np.array([error.sum()]),
    ]


# ---- how good a model is -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """A model against runs that it was not fitted on."""

    spearman: float | None
    """Rank correlation; None where either side is constant, or of fewer than four runs."""
    mean_error: float | None
    """Mean of the absolute error; None of nothing."""


def held_out(predicted: FloatArray, seen: FloatArray) -> Held:
    """Compare predictions with what runs gave, both float64 [P]."""
    error = float(np.abs(predicted - seen).mean()) if len(seen) else None
    return Held(spearman(predicted, seen) if len(seen) >= 4 else None, error)


def spearman(a: FloatArray, b: FloatArray) -> float | None:
    """Spearman's rank correlation, ties given their mean rank; None where one side is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale else None


def _ranks(values: FloatArray) -> FloatArray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: FloatArray = (last - (counts - 1) / 2)[group]
    return ranks


def holding_out(count: int, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Places to fit on and places to hold out, at least one of each, dealt by the seed."""
    order = np.random.default_rng([seed, 4]).permutation(count)
    held = min(max(1, round(share * count)), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])
