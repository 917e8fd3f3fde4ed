"""Pair odds: prefetch what the layers just passed name, while the link has nothing better to do.

A token's experts in a layer tell much of its experts in the layers after it. Counts of pairs over
past requests (``moesim.policies.odds``) name them without a gate, a hidden state or a network, for
any trace; across the end of a pass as well.

What keeps it from prefetching itself into saturation: demand overtakes prefetches at the end of a
chunk, so a wish costs the link nothing but time in which it would idle. Hence

- no more than ``width`` wishes wait for the link: what cannot move before the next gate is chosen
  better there, by one layer more;
- a wish must be likelier than ``floor``: others mostly push out what is as good as they are;
- the likeliest goes first: each right one saves one load, whichever layer it is for.

The keep seat hears of all probabilities: ``reuse-odds`` holds what is expected soon. Finding them
is charged on the critical path, an operation for each count that is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import UsageError
from moesim.protocol import CacheView, PrefetchSeat, World
from moesim.types import (
    NO_PLAN,
    PROBABILITY_ONE,
    Fact,
    Forecast,
    Gate,
    Needs,
    Plan,
    Prefetch,
    State,
)

if TYPE_CHECKING:
    from moesim.policies.odds import Listener

ABSENT = int(State.ABSENT)
MOST_DISTANT = 16


@dataclass
class PairOdds(PrefetchSeat):
    """Prefetches the likeliest experts of the next layers, by counts of what follows what.

    distance : layer events ahead, at most; one less than a decoding pass has counts the same.
    window : layer events just passed that are heard.
    width : wishes that may wait for the link.
    floor : least probability of a wish.
    """

    name = "pair-odds"
    source = "ours"
    cost = "O(d w k E), w layers back"
    version = 2
    needs = Needs.PAST
    distance: int = 3
    window: int = 3
    width: int = 2
    floor: float = 0.3

    def __post_init__(self) -> None:
        """Everything in range."""
        for name in ("distance", "window", "width"):
            value = getattr(self, name)
            if not 1 <= value <= MOST_DISTANT:
                raise UsageError(f"prefetch.{name}={value}: must lie between 1 and {MOST_DISTANT}")
        if not 0 <= self.floor <= 1:
            raise UsageError(f"prefetch.floor={self.floor}: must lie between 0 and 1")

    def begin(self, world: World) -> None:
        """Nothing was seen but the past."""
        # Only who replays waits for the compiler.
        from moesim.policies.odds import Listener

        self.listener: Listener = Listener(
            world.layers, world.experts, self.distance, self.window, world.decode_from
        )
        self.world, self.experts = world, world.experts
        self.least = round(self.floor * PROBABILITY_ONE)
        for fact in world.past() if world.past is not None else ():
            if isinstance(fact, Gate):
                self._forecasts(fact)
        self.listener.forget_requests()

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate: learn, foresee, wish."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        forecasts = self._forecasts(fact)
        if not forecasts:
            return NO_PLAN
        read = self.window * len(fact.source.slots) * fact.source.token_experts.shape[1]
        return Plan(
            prefetches=self._wishes(fact.event, forecasts, cache),
            forecasts=forecasts,
            foreground_ops=len(forecasts) * read * self.experts,
        )

    def _forecasts(self, gate: Gate) -> list[Forecast]:
        self.listener.hear(gate)
        if not self.listener.reach:
            return []
        return [
            Forecast(self.world.ahead(gate.layer, d), p.copy(), np.flatnonzero(p >= self.least))
            for d, p in enumerate(self.listener.foresee(gate.layer), 1)
        ]

    def _wishes(self, event: int, forecasts: list[Forecast], cache: CacheView) -> list[Prefetch]:
        room = self.width - cache.queued
        if room <= 0:
            return []
        states = cache.states
        likely = [
            (int(forecast.probabilities[e]), -d, forecast.layer * self.experts + e)
            for d, forecast in enumerate(forecasts, 1)
            for e in forecast.chosen.tolist()
            if states[forecast.layer * self.experts + e] == ABSENT
        ]
        likely.sort(reverse=True)
        return [Prefetch(expert, event - d, share) for share, d, expert in likely[:room]]
