"""The same experts for everybody: a layer's most used ones on a calibration trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.protocol import CacheView, PrefetchSeat, World, check_distance
from moesim.types import NO_PLAN, Fact, Gate, Needs, Plan, Prefetch


@dataclass
class HotSet(PrefetchSeat):
    """Prefetches, for the layer ``distance`` on, its hottest experts.

    width : how many; 0 takes the model's top k.
    """

    name = "hot-set"
    source = "a baseline"
    cost = "O(k)"
    needs = Needs.CALIBRATION
    distance: int = 1
    width: int = 0

    def __post_init__(self) -> None:
        """Some layers ahead."""
        check_distance(self.distance)
        if self.width < 0:
            raise UsageError(f"prefetch.width={self.width}: must be 0 (top k) or more")

    def begin(self, world: World) -> None:
        """Rank each layer's experts once, ties by lowest id."""
        assert world.calibration is not None
        self.world = world
        uses = world.calibration.reshape(world.layers, world.experts)
        width = self.width or world.top_k
        ranked = np.argsort(-uses, axis=1, kind="stable")[:, :width]
        self.hot = ranked + np.arange(world.layers)[:, None] * world.experts

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        target = self.world.ahead(fact.layer, self.distance)
        expires = fact.event + self.distance
        return Plan(prefetches=[Prefetch(e, expires) for e in self.hot[target].tolist()])
