"""Pre-gated MoE (Hwang et al., ISCA 2024, arXiv 2308.12066): routing known a layer early.

There each block's gate is retrained to choose the experts of the *next* block, so that they are
fetched while this one computes. No recorded trace has such gates. Two readings of one:

- ``prefetch=pre-gate`` supposes gates retrained so well that they choose what the model chose. It
  knows the next layer's demand exactly, from the trace: a bound (FUTURE), and no claim that such
  gates exist. The time is that of the system; the quality is not looked at.
- ``route=pre-gate`` executes what the next layer's own gate says of this layer's input
  (``ahead1``), without retraining: lossy, as Speculating Experts (arXiv 2603.19289) do. It goes
  with ``prefetch=next-gate``, which loads what will be executed.

Unlike ``look-ahead`` neither knows anything of a pass before its first gate: the source's first
block has an ordinary gate, whose experts are fetched on demand, and its last block predicts nobody.
The source drops a block's experts when it has computed; here the cache keeps what it can, by LRU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.protocol import CacheView, Future, PrefetchSeat, RouteSeat, World
from moesim.types import (
    DROPPED,
    NO_PLAN,
    AnyArray,
    Fact,
    Gate,
    LayerEvent,
    Needs,
    Plan,
    Prefetch,
)


@dataclass
class PreGate(PrefetchSeat):
    """Prefetches what the next layer of the pass will demand (bound)."""

    name = "pre-gate"
    source = "arXiv 2308.12066"
    cost = "O(n)"
    needs = Needs.FUTURE

    def begin(self, world: World) -> None:
        """Take the future."""
        assert world.future is not None
        self.world = world
        self.future: Future = world.future

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate but the last of a pass."""
        if not isinstance(fact, Gate) or fact.layer + 1 >= self.world.layers:
            return NO_PLAN
        wishes: list[Prefetch] = []
        target = fact.layer
        for event in range(fact.event + 1, self.future.events):
            demand = self.future.demand(event)
            layer = int(demand[0]) // self.world.experts if len(demand) else -1
            # In flat mode an event is an access, and others of this layer may come first.
            if layer > fact.layer == target:
                target = layer
            if layer != target:
                break
            if target > fact.layer:
                wishes += [Prefetch(e, event) for e in demand.tolist()]
        return Plan(prefetches=wishes)


def early(predicted: AnyArray, chosen: AnyArray) -> AnyArray:
    """Kernel: uint16 [T, k], the predicted experts [T, M], then as many chosen ones as lack.

    What the model dropped stays dropped.
    """
    made = chosen.copy()
    for row in range(len(chosen)):
        named = [e for e in predicted[row].tolist() if e != DROPPED]
        named += [e for e in chosen[row].tolist() if e != DROPPED and e not in named]
        kept = int((chosen[row] != DROPPED).sum())
        made[row, :kept] = named[:kept]
        made[row, kept:] = DROPPED
    return made


@dataclass
class PreGateRoute(RouteSeat):
    """Executes what the layer before foresaw, with this layer's weights for it (lossy)."""

    name = "pre-gate"
    source = "arXiv 2308.12066; 2603.19289"
    cost = "O(T k)"
    lossy = True
    needs = Needs.AHEAD | Needs.GATE

    def begin(self, world: World) -> None:
        """Nothing was foreseen."""
        self._step = self._layer = -1
        self._named: AnyArray = np.empty((0, 0), np.uint16)

    def route(self, event: LayerEvent, cache: CacheView) -> AnyArray | None:
        """None where the layer before said nothing of these tokens."""
        if 1 not in event.ahead:
            raise UsageError(
                "--set route=pre-gate: needs predictions of the next layer; give "
                "--set prefetch=next-gate and leave prefetch.distance at 1"
            )
        follows = (event.step, event.layer) == (self._step, self._layer + 1)
        named = self._named
        self._step, self._layer, self._named = event.step, event.layer, event.ahead[1]
        if not follows or len(named) != len(event.token_experts):
            return None
        return early(named, event.token_experts)
