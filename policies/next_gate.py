"""Next-layer gate speculation: a later layer's gate applied to this layer's input.

Mixtral-Offloading (arXiv 2312.17238) and Fate (arXiv 2502.12224) for distance 1. The predictions
are the trace's ``ahead`` columns, recorded from live hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moesim.errors import UsageError
from moesim.protocol import CacheView, PrefetchSeat, World, check_distance
from moesim.types import DROPPED, NO_PLAN, ExpertId, Fact, Gate, Needs, Plan, Prefetch


@dataclass
class NextGate(PrefetchSeat):
    """Prefetches what the gate of ``layer + distance`` would choose now.

    distance : layers ahead.
    width : predicted experts taken of each token, best first; 0 takes all that were recorded.
    cancel : whether a prefetch that its gate did not confirm is taken back while it moves
        (ProMoE's early pre-emption).
    """

    name = "next-gate"
    source = "arXiv 2312.17238, section 3.2"
    cost = "O(T M)"
    needs = Needs.AHEAD
    distance: int = 1
    width: int = 0
    cancel: bool = False
    _named: dict[int, list[ExpertId]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Some layers ahead."""
        check_distance(self.distance)
        if self.width < 0:
            raise UsageError(f"prefetch.width={self.width}: must be 0 (all) or more")

    @property
    def distances(self) -> tuple[int, ...]:
        """The one that it reads."""
        return (self.distance,)

    def begin(self, world: World) -> None:
        """Nothing was predicted."""
        self.world = world
        self._named = {}

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        cancel = self._refuted(fact) if self.cancel else []
        target = fact.layer + self.distance
        if target >= self.world.layers or self.distance not in fact.source.ahead:
            return Plan(cancel=cancel) if cancel else NO_PLAN
        rows = fact.source.ahead[self.distance]
        rows = rows[:, : self.width] if self.width else rows
        named = in_order(rows.reshape(-1), target * self.world.experts)
        expires = fact.event + self.distance
        if self.cancel:
            self._named[expires] = named
        return Plan(prefetches=[Prefetch(e, expires) for e in named], cancel=cancel)

    def _refuted(self, gate: Gate) -> list[ExpertId]:
        """Named for this gate and not demanded by it."""
        demanded = set(gate.experts.tolist())
        return [e for e in self._named.pop(gate.event, []) if e not in demanded]


def in_order(local: np.ndarray, base: int) -> list[ExpertId]:
    """Expert ids, each once, by first mention."""
    return list(dict.fromkeys((base + int(e)) for e in local if e != DROPPED))
