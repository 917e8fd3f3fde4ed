"""Least-Stale (SpecMD, arXiv 2602.03921): first goes what this pass no longer needs.

A resident is *stale* when its layer already ran in the current forward pass and did not use it.
Stale residents go first, least recent first; then the others, least recent first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.policies.lru import LRU
from moesim.protocol import World
from moesim.types import ExpertId, Gate, IntArray

FRESH = 1 << 61


def worth(stamps: IntArray, touched: IntArray, step: int, layers: IntArray, layer: int) -> IntArray:
    """Kernel: the stamp of the last touch; above all stale ones where this pass may need it.

    ``touched``: the step that touched it last; ``layers``: its layer.
    """
    return stamps + FRESH * (1 - (touched < step) * (layers < layer))


@dataclass
class LeastStale(LRU):
    """Evicts the least recently touched stale resident, else the least recently touched one."""

    name = "least-stale"
    source = "arXiv 2602.03921"
    cost = "O(n); O(log R) an eviction"

    def begin(self, world: World) -> None:
        """No pass has begun."""
        super().begin(world)
        self.experts = world.experts
        self.touched = np.full(world.size, -1, np.int64)
        self.step = -1
        self.layer = 0

    def gate(self, gate: Gate) -> None:
        """The demand belongs to this pass."""
        super().gate(gate)
        self.step, self.layer = gate.source.step, gate.layer
        self.touched[gate.experts] = self.step

    def planned(self, experts: Sequence[ExpertId]) -> None:
        """So does what this pass prefetches."""
        super().planned(experts)
        self.touched[np.asarray(experts, np.int64)] = self.step

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Stale ones below all others."""
        layers = experts // self.experts
        return worth(self.score[experts], self.touched[experts], self.step, layers, self.layer)
