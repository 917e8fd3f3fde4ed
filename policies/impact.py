"""HybriMoE's impact-driven prefetching (arXiv 2504.05897). Lossless.

At a layer's gate the gates of the next three layers are applied to the same hidden state (the
trace's ``ahead`` columns). For each of those layers its schedule is simulated
(``moesim.policies.hybrid_schedule``) with the experts that are absent now, once as things stand and
once for each of them made resident; the one that shortens its layer most is prefetched, then the
next with that one taken as resident, until nothing shortens any layer. Needs AHEAD and the cost
table. The gain is what the schedule gains, so the seat belongs with ``miss=hybrid-schedule``; with
other miss seats it is a guess.

Where the source is silent:

- The tokens of a predicted expert are the tokens of this event that name it.
- Gains are compared across the three layers as they are, the nearer layer first among equals, then
  the more often, then the earlier named expert. The gain is the prefetch's priority (in ns), judged
  anew at each gate while it waits.
- ``width`` picks at a gate are made at most (0: the model's k), since what is planned beyond what
  the link can bring until the next gate is planned anew there.
- A copy under way counts as resident. What a newer prediction no longer names stays in the queue at
  the gain it had until its layer has passed.
- The released code differs: it prefetches the experts of the next layer with the highest cache
  priority, without simulating (not offered here).
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.policies.gates_ahead import GatesAhead
from moesim.policies.hybrid_schedule import ending
from moesim.policies.prices import Prices
from moesim.protocol import CacheView, World
from moesim.types import (
    DROPPED,
    NO_PLAN,
    AnyArray,
    ExpertId,
    Fact,
    Gate,
    Needs,
    Plan,
    Prefetch,
    State,
)

IN_FLIGHT = int(State.IN_FLIGHT)


@dataclass
class Ahead:
    """A predicted layer event: the tokens of its experts, by where they are.

    absent : expert -> tokens, most tokens first.
    """

    layer: int
    distance: int
    here: list[int]
    absent: dict[ExpertId, int]

    def ending(self, prices: Prices, also: ExpertId = -1) -> int:
        """When the layer ends, ns (rounded down), perhaps with one more expert resident."""
        here = [*self.here, self.absent[also]] if also >= 0 else self.here
        missing = [tokens for expert, tokens in self.absent.items() if expert != also]
        return ending(prices.layer(self.layer, here, (), missing)) // 2

    def take(self, expert: ExpertId) -> None:
        """It counts as resident from now on."""
        self.here.append(self.absent.pop(expert))


def predicted(rows: AnyArray, base: int) -> dict[ExpertId, int]:
    """Expert ids and how many tokens name them, by falling number, then first mention."""
    tokens: dict[ExpertId, int] = {}
    for local in rows.reshape(-1).tolist():
        if local != DROPPED:
            tokens[base + local] = tokens.get(base + local, 0) + 1
    return dict(sorted(tokens.items(), key=lambda item: -item[1]))


@dataclass
class Impact(GatesAhead):
    """Prefetches what shortens one of the next layers most, by simulating their schedules.

    distance : layers ahead.
    width : prefetches planned at a gate at most; 0 takes the model's top k.
    """

    name = "impact"
    source = "arXiv 2504.05897"
    cost = "O(k d n^2)"
    needs = Needs.AHEAD | Needs.COSTS

    def begin(self, world: World) -> None:
        """Take the shapes and the cost table."""
        super().begin(world)
        self.prices = Prices(world)

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        layers = [
            self._ahead(fact.layer, distance, fact.source.ahead[distance], cache.states)
            for distance in self.distances
            if fact.layer + distance < self.world.layers and distance in fact.source.ahead
        ]
        wishes = []
        for _ in range(self.width or self.world.top_k):
            gain, layer, expert = self._best(layers)
            if gain <= 0:
                break
            layer.take(expert)
            wishes.append(Prefetch(expert, fact.event + layer.distance, gain))
        return Plan(prefetches=wishes) if wishes else NO_PLAN

    def _ahead(self, layer: int, distance: int, rows: AnyArray, states: AnyArray) -> Ahead:
        target = layer + distance
        named = predicted(rows, target * self.world.experts)
        here = [tokens for e, tokens in named.items() if states[e] >= IN_FLIGHT]
        absent = {e: tokens for e, tokens in named.items() if states[e] < IN_FLIGHT}
        return Ahead(target, distance, here, absent)

    def _best(self, layers: list[Ahead]) -> tuple[int, Ahead, ExpertId]:
        """The greatest gain in ns, and whose; a gain of 0 names nobody to be fetched."""
        best = (0, Ahead(0, 0, [], {}), -1)
        for layer in layers:
            whole = layer.ending(self.prices) if layer.absent else 0
            tried: set[int] = set()
            for expert, tokens in layer.absent.items():
                # Experts of one number of tokens gain alike; the first named stands for them.
                if tokens not in tried:
                    tried.add(tokens)
                    gain = whole - layer.ending(self.prices, expert)
                    if gain > best[0]:
                        best = (gain, layer, expert)
        return best
