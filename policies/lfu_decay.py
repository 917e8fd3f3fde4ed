"""Decayed LFU: counts fade by a factor at each event of their layer.

Counts are fixed-point integers in 1/16384, so every host fades them alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.policies.lfu import STAMP_BITS
from moesim.policies.lru import LRU
from moesim.protocol import World
from moesim.types import PROBABILITY_ONE, Gate, IntArray

ONE = PROBABILITY_ONE


def fade(counts: IntArray, factor: int) -> None:
    """Kernel: counts times ``factor``/16384, rounded down, in place."""
    for i in range(len(counts)):
        counts[i] = (counts[i] * factor) >> 14


def worth(counts: IntArray, stamps: IntArray) -> IntArray:
    """Kernel: the count above the stamp of the last touch."""
    return (counts << STAMP_BITS) | stamps


@dataclass
class LFUDecay(LRU):
    """Evicts the smallest faded count, ties by least recent touch.

    gamma : what remains of a count at the next event of its layer, above 0 to 0.9995.
    """

    name = "lfu-decay"
    source = "after Lee et al., 1999 (LRFU)"
    cost = "O(E); O(log R) an eviction"
    gamma: float = 0.95

    def __post_init__(self) -> None:
        """Above 0.9995 counts would outgrow their bits."""
        if not 0 < self.gamma <= 0.9995:
            raise UsageError(f"keep.gamma={self.gamma}: must lie above 0 and at most 0.9995")

    def begin(self, world: World) -> None:
        """Nothing was used."""
        super().begin(world)
        self.counts = np.zeros(world.size, np.int64)
        self.factor = round(self.gamma * ONE)
        self.experts = world.experts

    def gate(self, gate: Gate) -> None:
        """The layer fades, then its demand counts one each."""
        first = gate.layer * self.experts
        fade(self.counts[first : first + self.experts], self.factor)
        self.counts[gate.experts] += ONE
        super().gate(gate)

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """The count above the stamp of the last touch."""
        return worth(self.counts[experts], self.score[experts])
