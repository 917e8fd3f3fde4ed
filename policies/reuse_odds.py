"""Reuse odds: evict what is least likely to be used soon, by what was used and what then followed.

MIN loads half of what LRU or faded counts load, and a copy takes longer than a layer's computation,
so more is left in eviction than in prefetching. Two things that the other seats leave unused tell
what will be used again, and when:

- The experts of a layer for one token name many of those of the same layer for the next.
  ``moesim.policies.odds`` counts such pairs beside faded uses, and makes probabilities of both.
- Layers come in turn, so every expert's next chance is known to the layer event. As least hit
  density has it (Beckmann et al., NSDI'18), worth is expected hits for the room taken meanwhile.

With p the probability at the layer's next event, q at any later one, d the layer events until the
next, L those of a decoding pass and theta a discount, an expert is worth its first use to come:

    theta^d * (p + (1 - p) * r),    r = q * theta^L / (1 - (1 - q) * theta^L)

What is learned of past requests (``--split``, ``--calibration``) is learned as while serving, so
nothing is fitted beforehand, and without a past the seat begins as one that fades counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import UsageError
from moesim.protocol import KeepSeat, World
from moesim.types import PROBABILITY_ONE, ExpertId, Forecast, Gate, IntArray, Needs

if TYPE_CHECKING:
    from moesim.policies.odds import Listener

ONE = PROBABILITY_ONE


def worth(p: IntArray, rest: IntArray) -> IntArray:
    """p + (1 - p) * rest, in 1/2**28; both are in 1/16384."""
    return (p << 14) + (ONE - p) * rest


def rest_of(q: IntArray, again: int) -> IntArray:
    """What is left of an expert's worth if its next chance passes, in 1/16384.

    ``again`` : the discount of a whole pass, in 1/16384.
    """
    return q * again // (ONE - ((ONE - q) * again >> 14))


@dataclass
class ReuseOdds(KeepSeat):
    """Evicts the expert of the smallest discounted chance of a use to come.

    horizon : passes after which a use counts half.
    """

    name = "reuse-odds"
    source = "ours; worth after NSDI 2018 (LHD)"
    cost = "O(k E); O(R) an eviction"
    version = 2
    needs = Needs.PAST
    horizon: float = 2.0

    def __post_init__(self) -> None:
        """A horizon that the fixed point can tell."""
        if not 0.1 <= self.horizon <= 64:
            raise UsageError(f"keep.horizon={self.horizon}: must lie between 0.1 and 64")

    def begin(self, world: World) -> None:
        """Nothing was seen but the past."""
        # Only who replays waits for the compiler.
        from moesim.policies.odds import Listener

        self.listener: Listener = Listener(world.layers, world.experts)
        self.world = world
        events = np.arange(world.layers + 1)
        discounts = np.exp2(-events / (self.horizon * world.period))
        self.discount = np.rint(discounts * ONE).astype(np.int64)
        self.rest = np.zeros((world.layers, world.experts), np.int64)
        self.worth = np.zeros((world.layers, world.experts), np.int64)
        self.layer_of = np.arange(world.size) // world.experts
        self.now = 0
        for fact in world.past() if world.past is not None else ():
            self.on(fact)
        self.listener.forget_requests()

    def gate(self, gate: Gate) -> None:
        """What the layer's experts are worth until it comes again."""
        self.now = gate.layer
        self.listener.hear(gate)
        later, soon = self.listener.odds.shares[:2]
        self.rest[gate.layer] = rest_of(later, int(self.discount[self.world.period]))
        self.worth[gate.layer] = worth(soon, self.rest[gate.layer])

    def expected(self, forecast: Forecast) -> None:
        """A prefetch seat knows more of a layer to come."""
        p = np.minimum(forecast.probabilities, ONE).astype(np.int64)
        self.worth[forecast.layer] = worth(p, self.rest[forecast.layer])

    def planned(self, experts: Sequence[ExpertId]) -> None:
        """A wish is no use; what it rests on was heard as a forecast."""

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Worth, discounted by the layer events until the next chance."""
        wait = self.world.until(self.layer_of[experts], self.now)
        found: IntArray = self.worth.reshape(-1)[experts] * self.discount[wait]
        return found
