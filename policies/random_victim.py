"""A random victim: the floor that every other keep seat must beat.

Draws are a counter-based hash of (seed, layer event, expert), so they need no state and agree on
every host.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.hashing import hash64
from moesim.protocol import KeepSeat, World
from moesim.types import IntArray


@dataclass
class Random(KeepSeat):
    """Evicts at random."""

    name = "random"
    source = "Belady, 1966"
    cost = "O(R) an eviction"

    def begin(self, world: World) -> None:
        """Take the seed."""
        super().begin(world)
        self.seed = world.seed

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """A fresh draw for each expert at each layer event."""
        draws: IntArray = (hash64(self.seed, event, experts) >> 2).astype("int64")
        return draws
