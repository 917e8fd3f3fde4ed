"""Whole-layer streaming: all experts of the next layer, asked for or not (ZeRO-Inference)."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.protocol import CacheView, PrefetchSeat, World, check_distance
from moesim.types import NO_PLAN, Fact, Gate, Plan, Prefetch


@dataclass
class WholeLayer(PrefetchSeat):
    """Prefetches every expert of the layer ``distance`` on."""

    name = "whole-layer"
    source = "DeepSpeed ZeRO-Inference"
    cost = "O(E)"
    distance: int = 1

    def __post_init__(self) -> None:
        """Some layers ahead."""
        check_distance(self.distance)

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
