"""HybriMoE's cache priority, "minus recent score" (arXiv 2504.05897). Lossless.

At each event of a layer its experts' priorities become

    S = alpha * TopP(s) + (1 - alpha) * S,

where s are the gate's probabilities and TopP keeps the p largest, 0 for the others. The smallest S
is evicted. alpha = 0.5; p = 2k, k experts a token (the released code has alpha 0.5 and p 12, for
models of k = 6). Needs GATE.

Where the source is silent: of several tokens, TopP is taken of each and s is their mean, rounded
down (the released code looks at the first token alone); equal probabilities at the p-th place go to
the lower id; equal priorities go to the least recent touch, prefetches included. In one cache for
all layers the priorities of all layers are compared as they are; the paper's cache has a fixed
number of experts a layer (``--scope layer``).

S is kept in 2**-24 and rounded down at each event: after 24 events without a place in the top p
nothing of a score is left at alpha 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.policies.lru import touch
from moesim.protocol import KeepSeat, World
from moesim.types import PROBABILITY_ONE, AnyArray, ExpertId, Gate, IntArray, Needs

ONE = PROBABILITY_ONE
FINER = 10
"""Priorities have so many bits more than probabilities."""
STAMP_BITS = 38
"""Below a priority of at most 2**24: the stamp of the last touch."""


def top(gate: AnyArray, width: int) -> IntArray:
    """Kernel: int64 [E], the mean over tokens of the ``width`` largest probabilities of each.

    gate : int32 [T, E] in 1/16384. The result is in 2**-24, rounded down.
    """
    scores = gate.astype(np.int64)
    if width < scores.shape[1]:
        order = np.argsort(-scores, axis=1, kind="stable")[:, width:]
        np.put_along_axis(scores, order, 0, axis=1)
    made: IntArray = (scores.sum(axis=0) << FINER) // len(scores)
    return made


def renewed(old: IntArray, new: IntArray, alpha: int) -> IntArray:
    """Kernel: ``alpha``/16384 of the new scores and the rest of the old ones, rounded down."""
    return (alpha * new + (ONE - alpha) * old) >> 14


@dataclass
class RecentScore(KeepSeat):
    """Evicts the expert that the gate has liked least of late.

    alpha : weight of the newest scores, above 0 to 1.
    top : experts of a token whose score counts; 0 takes twice the model's k.
    """

    name = "recent-score"
    source = "arXiv 2504.05897"
    cost = "O(T E); O(R) an eviction"
    needs = Needs.GATE
    alpha: float = 0.5
    top: int = 0

    def __post_init__(self) -> None:
        """Numbers in their range."""
        if not 0 < self.alpha <= 1:
            raise UsageError(f"keep.alpha={self.alpha}: must lie above 0 and at most 1")
        if self.top < 0:
            raise UsageError(f"keep.top={self.top}: must be 0 (twice k) or more")

    def begin(self, world: World) -> None:
        """Nothing was scored."""
        super().begin(world)
        self.experts = world.experts
        self.width = self.top or 2 * world.top_k
        self.weight = round(self.alpha * ONE)
        self.priority = np.zeros(world.size, np.int64)
        self.clock = np.zeros(1, np.int64)

    def gate(self, gate: Gate) -> None:
        """The layer's priorities move towards the newest scores."""
        probabilities = gate.source.gate
        assert probabilities is not None
        own = slice(gate.layer * self.experts, (gate.layer + 1) * self.experts)
        newest = top(probabilities, self.width)
        self.priority[own] = renewed(self.priority[own], newest, self.weight)
        touch(self.score, self.clock, gate.experts)

    def planned(self, experts: Sequence[ExpertId]) -> None:
        """A prefetch is a touch."""
        touch(self.score, self.clock, np.asarray(experts, np.int64))

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """The priority above the stamp of the last touch."""
        return (self.priority[experts] << STAMP_BITS) | self.score[experts]
