"""Segmented LRU: what was used twice is protected from what was used once.

A load enters the probation segment; a hit moves it to the protected one, which holds at most a
share of the slots and gives back its least recent member. Probation goes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.policies.lru import LRU, touch
from moesim.policy import World
from moesim.types import Evicted, Gate, IntArray, Note, Status

PROTECTED = 1 << 61


@dataclass
class SLRU(LRU):
    """Evicts the least recent of probation, then of the protected.

    protected : share of a cache's slots that the protected segment may hold, 0 to 1.
    """

    name = "slru"
    protected: float = 0.8

    def __post_init__(self) -> None:
        """A share."""
        if not 0 <= self.protected <= 1:
            raise UsageError(f"keep.protected={self.protected}: must lie between 0 and 1")

    def begin(self, world: World) -> None:
        """Everything is on probation."""
        super().begin(world)
        caches = world.layers if world.scope == "layer" else 1
        self.cache = np.arange(world.size) // (world.size // caches)
        self.segment = np.zeros(world.size, bool)
        self.members: list[set[int]] = [set() for _ in range(caches)]
        self.limit = [int(self.protected * world.slots(c)) for c in range(caches)]

    def gate(self, gate: Gate) -> None:
        """Hits are promoted; all are touched; the protected segments shed what is too much."""
        for expert in gate.experts[gate.status == Status.HIT].tolist():
            self.segment[expert] = True
            self.members[self.cache[expert]].add(expert)
        touch(self.score, self.clock, gate.experts)
        if len(gate.experts):
            self._shed(int(self.cache[gate.experts[0]]))

    def _shed(self, cache: int) -> None:
        members = self.members[cache]
        while len(members) > self.limit[cache]:
            oldest = min(members, key=lambda e: self.score[e])
            members.remove(oldest)
            self.segment[oldest] = False
            touch(self.score, self.clock, np.array([oldest]))

    def note(self, fact: Note) -> None:
        """What went starts again on probation."""
        if isinstance(fact, Evicted):
            self.segment[fact.expert] = False
            self.members[self.cache[fact.expert]].discard(fact.expert)

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Probation below the protected, each by last touch."""
        scores: IntArray = self.score[experts] + np.where(self.segment[experts], PROTECTED, 0)
        return scores
