"""Whole-layer streaming: all experts of the next layer, asked for or not (ZeRO-Inference)."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import UsageError
from moesim.protocol import CacheView, PrefetchSeat, World
from moesim.types import NO_PLAN, Fact, Gate, Plan, Prefetch


@dataclass
class WholeLayer(PrefetchSeat):
    """Prefetches every expert of the layer ``distance`` on."""

    name = "whole-layer"
    distance: int = 1

    def __post_init__(self) -> None:
        """At least the next layer."""
        if self.distance < 1:
            raise UsageError(f"prefetch.distance={self.distance}: must be at least 1")

    def begin(self, world: World) -> None:
        """Take the shapes."""
        self.world = world

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        first = self.world.ahead(fact.layer, self.distance) * self.world.experts
        expires = fact.event + self.distance
        return Plan(prefetches=[Prefetch(first + e, expires) for e in range(self.world.experts)])
