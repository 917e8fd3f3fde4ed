"""Segmented LRU: what was used twice is protected from what was used once.

A load enters the probation segment; a hit moves it to the protected one, which holds at most a
share of the slots and gives back its least recent member. Probation goes first.

The protected experts of a cache are a list by recency, in two arrays that name each one's
neighbours; the list's head lies behind the experts.
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


def promote(
    protected: IntArray,
    before: IntArray,
    after: IntArray,
    head: int,
    experts: IntArray,
    status: AnyArray,
) -> int:
    """Kernel: hits become protected, the last of them the most recent; how many were not."""
    new = 0
    for i in range(len(experts)):
        if status[i] == HIT:
            expert = experts[i]
            if protected[expert]:
                before[after[expert]] = before[expert]
                after[before[expert]] = after[expert]
            else:
                protected[expert] = 1
                new += 1
            before[expert] = before[head]
            after[expert] = head
            after[before[head]] = expert
            before[head] = expert
    return new


def demote(protected: IntArray, before: IntArray, after: IntArray, expert: int) -> None:
    """Kernel: a protected expert is so no more."""
    protected[expert] = 0
    before[after[expert]] = before[expert]
    after[before[expert]] = after[expert]


@dataclass
class SLRU(LRU):
    """Evicts the least recent of probation, then of the protected.

    protected : share of a cache's slots that the protected segment may hold, 0 to 1.
    """

    name = "slru"
    source = "Karedla et al., 1994"
    cost = "O(n); O(log R) an eviction"
    protected: float = 0.8

    def __post_init__(self) -> None:
        """A share."""
        if not 0 <= self.protected <= 1:
            raise UsageError(f"keep.protected={self.protected}: must lie between 0 and 1")

    def begin(self, world: World) -> None:
        """Everything is on probation."""
        super().begin(world)
        caches = len(world.capacity_bytes)
        self.size = world.size
        self.cache: list[int] = world.caches.tolist()
        self.segment = np.zeros(world.size, np.int64)
        self.before = np.arange(world.size + caches)
        self.after = np.arange(world.size + caches)
        self.held = [0] * caches
        self.limit = [int(self.protected * slots) for slots in world.cache_slots]

    def gate(self, gate: Gate) -> None:
        """Hits are promoted; all are touched; the protected segment sheds what is too much, least
        recent first, as the most recent of probation."""
        caches = np.array([self.cache[expert] for expert in gate.experts.tolist()])
        asked = np.unique(caches).tolist()
        for cache in asked:
            own = caches == cache
            self.held[cache] += promote(
                self.segment,
                self.before,
                self.after,
                self.size + cache,
                gate.experts[own],
                gate.status[own],
            )
        touch(self.score, self.clock, gate.experts)
        for cache in asked:
            while self.held[cache] > self.limit[cache]:
                oldest = int(self.after[self.size + cache])
                self._demote(oldest)
                touch(self.score, self.clock, np.array([oldest]))

    def note(self, fact: Note) -> None:
        """What went starts again on probation."""
        if isinstance(fact, Evicted) and self.segment[fact.expert]:
            self._demote(fact.expert)

    def _demote(self, expert: int) -> None:
        demote(self.segment, self.before, self.after, expert)
        self.held[self.cache[expert]] -= 1

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Probation below the protected, each by last touch."""
        return worth(self.score[experts], self.segment[experts])
