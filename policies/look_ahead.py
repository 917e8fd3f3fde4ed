"""Exact look-ahead: the demand of the next layer events, known. A bound."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.protocol import CacheView, Future, PrefetchSeat, World, check_distance
from moesim.types import NO_PLAN, ExpertId, Fact, Gate, Needs, Plan, Prefetch


@dataclass
class LookAhead(PrefetchSeat):
    """Prefetches what the next ``distance`` layer events will demand, the nearest first."""

    name = "look-ahead"
    source = "a bound"
    cost = "O(d n)"
    needs = Needs.FUTURE
    distance: int = 1

    def __post_init__(self) -> None:
        """Some layer events ahead."""
        check_distance(self.distance)

    def begin(self, world: World) -> None:
        """Take the future."""
        assert world.future is not None
        self.future: Future = world.future

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        last = min(fact.event + self.distance, self.future.events - 1)
        # The nearest need of an expert counts: a later one must not put it off.
        nearest: dict[ExpertId, int] = {}
        for event in range(fact.event + 1, last + 1):
            for expert in self.future.demand(event).tolist():
                nearest.setdefault(expert, event)
        return Plan(
            prefetches=[
                Prefetch(expert, expires=event, priority=-event)
                for expert, event in nearest.items()
            ]
        )
