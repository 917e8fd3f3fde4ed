"""MoEpic (arXiv 2509.08342): keep the top halves of many experts rather than few whole ones.

Each expert is cut in two halves that are kept and loaded by themselves (``moesim trace parts``). A
resident top half computes while the bottom half comes, so half of the bytes of a hit stay hidden
behind compute that is needed anyhow. The bottom halves of predicted experts are prefetched: that is
`next-gate`, which names both halves, of which resident ones are not loaded again.

Lossless. Needs a trace whose experts are in parts. Choices made where the source is silent: the
halves are the first and second half of the intermediate rows, and compute in equal time; what is
evicted is the least recently used bottom half while there are more of them than ``whole`` allows,
else the least recently used half of any kind. The paper sizes each layer's cache by divide and
conquer on measured times; here one share serves all layers, found by trying.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.policies.lru import LRU
from moesim.protocol import World
from moesim.types import PROBABILITY_ONE, Evicted, IntArray, Landed, Needs, Note

FIRST_TO_GO = 1 << 61


def worth(stamps: IntArray, is_top: IntArray, crowded: bool) -> IntArray:
    """Kernel: the stamp of the last touch; bottom halves below all others while crowded."""
    return stamps - FIRST_TO_GO * (crowded * (1 - is_top))


@dataclass
class TopHalves(LRU):
    """LRU over halves that lets the bottom ones go first while they are too many.

    whole : share of the resident halves that may be bottom ones before they go first; 0.5 is LRU
        where halves are used in pairs.
    """

    name = "top-halves"
    source = "arXiv 2509.08342"
    cost = "O(n); O(R) an eviction"
    needs = Needs.PARTS
    whole: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.whole <= 1:
            raise UsageError(f"keep.whole={self.whole}: must lie between 0 and 1")

    def begin(self, world: World) -> None:
        """Nothing is resident."""
        super().begin(world)
        self.is_top = (np.arange(world.size) % world.expert_parts == 0).astype(np.int64)
        self.tops = self.bottoms = 0

    def note(self, fact: Note) -> None:
        """Count what is resident."""
        if isinstance(fact, Landed | Evicted):
            change = 1 if isinstance(fact, Landed) else -1
            if self.is_top[fact.expert]:
                self.tops += change
            else:
                self.bottoms += change

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Bottom halves first while they are more than their share."""
        share = round(self.whole * PROBABILITY_ONE)
        crowded = self.bottoms * PROBABILITY_ONE > share * (self.tops + self.bottoms)
        return worth(self.score[experts], self.is_top[experts], crowded)
