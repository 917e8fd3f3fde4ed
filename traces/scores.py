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
) -> Score:
    """Return the score function that gives the weights, `Score("unknown")` if none does.

    `biased`: the router has a bias for the choice, so sigmoids are tried first. `jitter`: the
    threshold of a sparsemixer router. Tokens with a dropped choice (id -1) are left out.
    """
    kept = (ids >= 0).all(axis=1) & np.isfinite(logits).all(axis=1)
    logits, ids, weights = logits[kept], ids[kept], weights[kept]
    if not len(ids):
        return Score("unknown")
    functions = {"sigmoid": _sigmoid, "softmax": _softmax}
    names = ("sigmoid", "softmax") if biased else ("softmax", "sigmoid")
    found = []
    for name in names:
        chosen = np.take_along_axis(functions[name](logits), ids, axis=1)
        for renormalised in (False, True):
            scale = _scale(_shared(chosen) if renormalised else chosen, weights, tolerance)
            if scale is not None:
                found.append(Score(_kind(name, renormalised), renormalised, scale, biased))
    plain = [score for score in found if score.scale == 1]
    if plain or found:
        return (plain or found)[0]
    if jitter is not None and ids.shape[1] == 2 and _is_sparsemixer(logits, ids, weights, jitter):
        return Score("sparsemixer")
    return Score("unknown", biased=biased)


def _kind(name: str, renormalised: bool) -> str:
    if name == "sigmoid":
        return "sigmoid-bias-scale"
    return "softmax-renorm" if renormalised else "softmax"


def _scale(expected: Floats, weights: Floats, tolerance: float) -> float | None:
    """Return the one factor between the two, None if there is none."""
    ratio = weights / np.maximum(expected, 1e-30)
    middle = float(np.median(ratio))
    if not middle > 0 or np.abs(ratio / middle - 1).max() > tolerance:
        return None
    return 1.0 if abs(middle - 1) <= tolerance else float(f"{middle:.3g}")


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
