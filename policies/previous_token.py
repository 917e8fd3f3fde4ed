"""The last forward pass as a prediction: a layer will ask for what it asked for last time."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.protocol import CacheView, PrefetchSeat, World, check_distance
from moesim.types import NO_PLAN, Fact, Gate, IntArray, Plan, Prefetch


@dataclass
class PreviousToken(PrefetchSeat):
    """Prefetches, for the layer ``distance`` on, its demand of the last pass.

    Under LRU with room for a token they are still resident, so this seat then loads nothing.
    """

    name = "previous-token"
    source = "a baseline"
    cost = "O(n)"
    distance: int = 1

    def __post_init__(self) -> None:
        """Some layers ahead."""
        check_distance(self.distance)

    def begin(self, world: World) -> None:
        """No pass has been seen."""
        self.world = world
        self.last: dict[int, IntArray] = {}

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        self.last[fact.layer] = fact.experts
        target = self.world.ahead(fact.layer, self.distance)
        expected = self.last.get(target)
        if expected is None:
            return NO_PLAN
        expires = fact.event + self.distance
        return Plan(prefetches=[Prefetch(e, expires) for e in expected.tolist()])
