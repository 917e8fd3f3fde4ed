"""LRU as a user would write it: in plain Python, its scores in NumPy."""

from __future__ import annotations

import numpy as np

from moesim.protocol import CacheView, PlainPolicy, World
from moesim.types import NO_PLAN, Fact, Gate, IntArray, Plan


class PlainLRU(PlainPolicy):
    """Evicts what was touched longest ago, as the built-in seat does."""

    def begin(self, world: World) -> None:
        """Nothing was touched."""
        self._touched = np.zeros(world.size, np.int64)
        self._clock = 0

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        """A gate touches what it demands, in demand order."""
        if isinstance(fact, Gate):
            last = self._clock + len(fact.experts)
            self._touched[fact.experts] = np.arange(self._clock + 1, last + 1)
            self._clock = last
        return NO_PLAN

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """When each was touched."""
        scores: IntArray = self._touched[experts]
        return scores
