"""Which score function turns a router's logits into the weights that the model multiplies with.

No table of model families: the logits, the chosen experts and the weights of a few real tokens
tell it. Arrays are NumPy; `logits` is [tokens, E], `ids` and `weights` are [tokens, K].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TOLERANCES: Final = {"float32": 1e-4, "float64": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}
"""Relative error allowed, by the dtype of the weights."""


@dataclass(frozen=True, slots=True)
class Score:
    """How weights come from logits; `kind` is one of the words of `ModelProfile.score`."""

    kind: str
    renormalised: bool = False
    """Divided by the sum over the chosen experts."""
    scale: float = 1.0
    biased: bool = False
    """The choice adds a learned bias for each expert, the weights do not."""

    def in_words(self) -> str:
        """Return one line for the trace's notes."""
        if self.kind == "unknown":
            return "weights: no known score function of the logits gives them"
        if self.kind == "sparsemixer":
            return "weights: sparsemixer, a softmax over near-ties for each of the two choices"
        words = [f"weights: {self.kind.partition('-')[0]} of the logits"]
        words.append("renormalised over the chosen" if self.renormalised else "not renormalised")
        if self.scale != 1:
            words.append(f"times {self.scale:g}")
        if self.biased:
            words.append("the choice adds a bias for each expert, which is not stored")
        return ", ".join(words)


def explain(
    logits: Floats,
    ids: Ints,
    weights: Floats,
    *,
    tolerance: float = 1e-4,
    biased: bool = False,
    jitter: float | None = None,
    factor: float = 1.0,
) -> tuple[Score, ...]:
    """Return the score functions that give the weights, the likeliest first; empty if none does.

    `biased`: the router has a bias for the choice, so sigmoids are tried first. `jitter`: the
    threshold of a sparsemixer router. `factor`: what the router is known to scale by, taken for
    what is found near it. Tokens with a dropped choice (id -1) are left out.
    """
    kept = (ids >= 0).all(axis=1) & np.isfinite(logits).all(axis=1)
    logits, ids, weights = logits[kept], ids[kept], weights[kept]
    if not len(ids):
        return ()
    functions = {"sigmoid": _sigmoid, "softmax": _softmax}
    found = []
    for name in ("sigmoid", "softmax") if biased else ("softmax", "sigmoid"):
        chosen = np.take_along_axis(functions[name](logits), ids, axis=1)
        for renormalised in (False, True):
            expected = _shared(chosen) if renormalised else chosen
            scale = _scale(expected, weights, tolerance, (1.0, factor))
            if scale is not None:
                found.append(Score(_kind(name, renormalised), renormalised, scale, biased))
    if jitter is not None and ids.shape[1] == 2 and _is_sparsemixer(logits, ids, weights, jitter):
        found.append(Score("sparsemixer"))
    return tuple(sorted(found, key=lambda score: score.scale not in (1, factor)))


def _kind(name: str, renormalised: bool) -> str:
    if name == "sigmoid":
        return "sigmoid-bias-scale"
    return "softmax-renorm" if renormalised else "softmax"


def _scale(
    expected: Floats, weights: Floats, tolerance: float, likely: tuple[float, ...] = (1.0,)
) -> float | None:
    """Return the one factor between the two, None if there is none."""
    ratio = weights / np.maximum(expected, 1e-30)
    middle = float(np.median(ratio))
    if not middle > 0 or np.abs(ratio / middle - 1).max() > tolerance:
        return None
    near = (scale for scale in likely if abs(middle / scale - 1) <= tolerance)
    return next(near, float(f"{middle:.3g}"))


def _shared(chosen: Floats) -> Floats:
    shares: Floats = chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1e-30)
    return shares


def _softmax(logits: Floats) -> Floats:
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = scores / scores.sum(axis=1, keepdims=True)
    return shares


def _sigmoid(logits: Floats) -> Floats:
    values: Floats = 0.5 + 0.5 * np.tanh(0.5 * logits)
    return values


def _is_sparsemixer(logits: Floats, ids: Ints, weights: Floats, jitter: float) -> bool:
    """Whether weights are those of Phi-MoE's sparsemixer (arXiv 2409.12136, inference form)."""
    left = logits.copy()
    for column in (0, 1):
        best = left.max(axis=1, keepdims=True)
        distance = (best - logits) / np.maximum(np.abs(logits), best)
        near = np.where(distance > 2 * jitter, -np.inf, left)
        chosen = np.take_along_axis(_softmax(near), ids[:, column : column + 1], axis=1)
        if _scale(chosen, weights[:, column : column + 1], 1e-2) != 1:
            return False
        np.put_along_axis(left, ids[:, column : column + 1], -np.inf, axis=1)
    return True
