"""Belady's MIN: evict what is used again last (L. A. Belady, 1966).

Both are bounds: they see the future. At equal sizes, forced admission is the attainable optimum of
demand-only policies in loads; bypass may also leave a miss outside and bounds them all. Neither
bounds time. At unequal sizes both are heuristics.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.protocol import Future, KeepSeat, World
from moesim.types import Gate, Needs


@dataclass
class MinForced(KeepSeat):
    """Every miss is admitted; the victim is the evictable resident used again last."""

    name = "min"
    source = "Belady, 1966"
    cost = "O(n); O(log R) an eviction"
    needs = Needs.FUTURE

    def begin(self, world: World) -> None:
        """An expert is worth the nearness of its next use."""
        assert world.future is not None
        self.future: Future = world.future
        self.score = -self.future.first_use

    def gate(self, gate: Gate) -> None:
        """The demand's next uses become known."""
        self.score[gate.experts] = -self.future.next_use(gate.event)


@dataclass
class MinBypass(MinForced):
    """A miss stays only if it is used again before some resident."""

    name = "min-bypass"
    source = "Belady, 1966"
    cost = "O(n); O(log R) an eviction"
    bypass = True
