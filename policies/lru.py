"""Least recently used.

Recency is the order of touches: layer events in order, within one the demand order (first token,
then gate rank), then the prefetches planned there. Stamping by service order instead would break
LRU's inclusion property.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.protocol import KeepSeat, World
from moesim.types import ExpertId, Gate, IntArray


def touch(score: IntArray, clock: IntArray, experts: IntArray) -> None:
    """Kernel: stamp experts in order. ``clock`` is int64 [1]."""
    now = clock[0]
    for expert in experts:
        now += 1
        score[expert] = now
    clock[0] = now


@dataclass
class LRU(KeepSeat):
    """Evicts what was touched longest ago."""

    name = "lru"
    source = "Mattson et al., 1970"
    cost = "O(n); O(1) an eviction"

    def begin(self, world: World) -> None:
        """Nothing was touched."""
        super().begin(world)
        self.clock = np.zeros(1, np.int64)

    def gate(self, gate: Gate) -> None:
        """Hits and misses alike are touched."""
        touch(self.score, self.clock, gate.experts)

    def planned(self, experts: Sequence[ExpertId]) -> None:
        """A prefetch is stamped with the event that asked for it, after its demand."""
        touch(self.score, self.clock, np.asarray(experts, np.int64))
