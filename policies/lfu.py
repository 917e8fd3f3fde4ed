"""Least frequently used, with and without memory of what was evicted.

An expert counts once per layer event, however many tokens chose it. Ties go to the least recent
touch. A score is the count above the stamp of the last touch, in one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.protocol import KeepSeat, World
from moesim.types import Evicted, ExpertId, Gate, IntArray, Note

STAMP_BITS = 38
MOST = (1 << 62 - STAMP_BITS) - 1
"""Counts saturate here, at 16.7 million."""


def count(score: IntArray, counts: IntArray, clock: IntArray, experts: IntArray) -> None:
    """Kernel: one use of each expert, in order."""
    now = clock[0]
    for expert in experts:
        now += 1
        counts[expert] = min(counts[expert] + 1, MOST)
        score[expert] = (counts[expert] << STAMP_BITS) | now
    clock[0] = now


def stamp(score: IntArray, counts: IntArray, clock: IntArray, experts: IntArray) -> None:
    """Kernel: touch without a use."""
    for expert in experts:
        clock[0] += 1
        score[expert] = (counts[expert] << STAMP_BITS) | clock[0]


@dataclass
class LFU(KeepSeat):
    """Evicts what was used least often; counts survive eviction."""

    name = "lfu"
    source = "Breslau et al., 1999"
    cost = "O(n); O(log R) an eviction"

    def begin(self, world: World) -> None:
        """Nothing was used."""
        super().begin(world)
        self.counts = np.zeros(world.size, np.int64)
        self.clock = np.zeros(1, np.int64)

    def gate(self, gate: Gate) -> None:
        """One use each."""
        count(self.score, self.counts, self.clock, gate.experts)

    def planned(self, experts: Sequence[ExpertId]) -> None:
        """A prefetch is a touch, not a use."""
        stamp(self.score, self.counts, self.clock, np.asarray(experts, np.int64))


@dataclass
class LFUInCache(LFU):
    """Evicts what was used least often since it was loaded; eviction forgets the count."""

    name = "lfu-incache"
    source = "Breslau et al., 1999"
    cost = "O(n); O(log R) an eviction"

    def note(self, fact: Note) -> None:
        """Forget the count of what went."""
        if isinstance(fact, Evicted):
            self.counts[fact.expert] = 0
