"""A popular part that stays, and LRU for the rest, as the engine imp offers it. Lossless.

The experts used most on the calibration trace are pinned until their bytes reach ``share`` of the
cache; what is left serves as an LRU cache. ``share=0`` is LRU. Needs CALIBRATION.

Where the source is silent: the popular experts are those of all layers together, by uses, ties by
lowest id (with ``--scope layer`` those of each layer, in its own cache); the first that would
exceed the share ends the list. A pinned expert goes after all others, and only where nothing else
may; it is not loaded but by demand, prefetch or the initial state (``--initial static``, the
preset's). Of what the run starts with and nothing has touched, the least used goes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.policies.lru import LRU
from moesim.protocol import World
from moesim.types import PROBABILITY_ONE, IntArray, Landed, Needs, Note

PIN = 1 << 60
"""Above every stamp."""


def popular(uses: IntArray, nbytes: IntArray, most: int) -> list[int]:
    """Kernel: places of the most used ones, ties by lowest place, while they fit ``most`` bytes."""
    order = [int(i) for i in np.argsort(-uses, kind="stable") if uses[i]]
    filled = np.cumsum(nbytes[order]) if order else np.zeros(0, np.int64)
    return order[: int(np.searchsorted(filled, most, side="right"))]


@dataclass
class PinnedLRU(LRU):
    """Keeps the most used experts of the calibration trace, LRU among the others.

    share : of the cache's bytes that is pinned, 0 to 1.
    """

    name = "pinned-lru"
    source = "the engine imp"
    cost = "O(n); O(R) an eviction"
    needs = Needs.CALIBRATION
    share: float = 0.5

    def __post_init__(self) -> None:
        """A share."""
        if not 0 <= self.share <= 1:
            raise UsageError(f"keep.share={self.share}: must lie between 0 and 1")

    def begin(self, world: World) -> None:
        """Pin the popular."""
        super().begin(world)
        assert world.calibration is not None
        nbytes = np.repeat(world.expert_bytes[0], world.experts)
        self.pinned = np.zeros(world.size, np.int64)
        share = round(self.share * PROBABILITY_ONE)
        caches = world.caches
        for cache, capacity in enumerate(world.capacity_bytes):
            part = np.flatnonzero(caches == cache)
            most = capacity * share // PROBABILITY_ONE
            chosen = popular(world.calibration[part], nbytes[part], most)
            self.pinned[part[chosen]] = PIN

    def note(self, fact: Note) -> None:
        """What was there at the start was touched before everything else, the first last."""
        if isinstance(fact, Landed) and fact.event < 0:
            self.score[fact.expert] = -fact.order

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """The stamp of the last touch, pinned ones above."""
        return self.score[experts] + self.pinned[experts]
