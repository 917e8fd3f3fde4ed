"""Least frequently and recently used: uses divided by age (a vLLM proposal; moe-cache-eval).

Age counts layer events since the last touch. Where the sources are silent: counts survive eviction,
and a prefetch renews the age.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.protocol import KeepSeat, World
from moesim.types import ExpertId, Gate, IntArray

SHIFT = 24
"""Fraction bits of a score."""
MOST = (1 << 38) - 1
LINE_SHIFT = 20
MOST_OF_LINE = (1 << 23) - 1
STEEPEST = 1 << 38


def worth(counts: IntArray, last: IntArray, event: int) -> IntArray:
    """Kernel: floor(2**24 * count / age)."""
    scores: IntArray = (np.minimum(counts, MOST) << SHIFT) // (event - last + 1)
    return scores


def line(counts: IntArray, last: IntArray, slope: int) -> IntArray:
    """Kernel: an order that time alone does not change (for keeping a heap).

    2**20 times (ages a use * count + last touch), with ``slope`` = 2**20 ages a use. Whose line
    lies at or beyond the next event has no more than so many ages a use, so it scores at least
    2**44 / slope.
    """
    lines: IntArray = slope * np.minimum(counts, MOST_OF_LINE) + (last << LINE_SHIFT)
    return lines


@dataclass
class LFRU(KeepSeat):
    """Evicts the smallest uses / age."""

    name = "lfru"
    source = "vLLM pull request 37190"
    cost = "O(n); O(log R) an eviction"

    def begin(self, world: World) -> None:
        """Nothing was used."""
        super().begin(world)
        self.counts = np.zeros(world.size, np.int64)
        self.last = np.full(world.size, -1, np.int64)
        self.event = -1

    def gate(self, gate: Gate) -> None:
        """One use each."""
        self.event = gate.event
        self.counts[gate.experts] += 1
        self.last[gate.experts] = gate.event

    def planned(self, experts: Sequence[ExpertId]) -> None:
        """A prefetch renews the age."""
        self.last[np.asarray(experts, np.int64)] = self.event

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Uses / age at ``event``."""
        return worth(self.counts[experts], self.last[experts], event)
