"""Segmented LRU: what was used twice is protected from what was used once.

A load enters the probation segment; a hit moves it to the protected one, which holds at most a
share of the slots and gives back its least recent member. Probation goes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.policies.lru import LRU, touch
from moesim.protocol import World
from moesim.types import AnyArray, Evicted, Gate, IntArray, Note, Status

PROTECTED = 1 << 61
HIT = int(Status.HIT)


def worth(stamps: IntArray, protected: IntArray) -> IntArray:
    """Kernel: the stamp of the last touch, above all of probation where protected (0 or 1)."""
    return stamps + PROTECTED * protected


def promote(protected: IntArray, experts: IntArray, status: AnyArray) -> int:
    """Kernel: hits become protected; how many were not."""
    new = 0
    for i in range(len(experts)):
        if status[i] == HIT and not protected[experts[i]]:
            protected[experts[i]] = 1
            new += 1
    return new


def shed(score: IntArray, protected: IntArray, clock: IntArray, first: int, last: int) -> int:
    """Kernel: the least recent protected of experts ``first`` to ``last`` goes back to probation,
    as its most recent; which."""
    oldest = -1
    for expert in range(first, last):
        if protected[expert] and (oldest < 0 or score[expert] < score[oldest]):
            oldest = expert
    protected[oldest] = 0
    clock[0] += 1
    score[oldest] = clock[0]
    return oldest


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
        self.span = world.size // caches
        self.segment = np.zeros(world.size, np.int64)
        self.held = [0] * caches
        self.limit = [int(self.protected * world.slots(cache)) for cache in range(caches)]

    def gate(self, gate: Gate) -> None:
        """Hits are promoted; all are touched; the protected segment sheds what is too much."""
        if not len(gate.experts):
            return
        cache = int(gate.experts[0]) // self.span
        self.held[cache] += promote(self.segment, gate.experts, gate.status)
        touch(self.score, self.clock, gate.experts)
        first = cache * self.span
        while self.held[cache] > self.limit[cache]:
            self.held[cache] -= 1
            shed(self.score, self.segment, self.clock, first, first + self.span)

    def note(self, fact: Note) -> None:
        """What went starts again on probation."""
        if isinstance(fact, Evicted) and self.segment[fact.expert]:
            self.segment[fact.expert] = 0
            self.held[fact.expert // self.span] -= 1

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Probation below the protected, each by last touch."""
        return worth(self.score[experts], self.segment[experts])
