"""HOBBIT (arXiv 2411.01433): a missing expert that matters little is loaded in low precision.

*Route*. The experts of a token are ranked by gate value; what lies before the i-th is its
unimportance, u_i = sum of the heavier gate values over the sum of all. An expert with u <= T1 is
executed in full, with u <= T2 in low precision, and any other not at all (0.6 and 0.9 in the
paper). The best copy that is there serves, so a resident full copy is never replaced by a low one,
and of a batch the token that asks for most decides.

*Keep*. Four terms, each from 0 to 1: how lately (LRU), how often (LFU) and how often in full
precision (LHU) this sequence has used the expert, and how soon its layer comes (FLD). What a
sequence used is forgotten when the next begins.

Lossy. Choices made where the source is silent: the four terms weigh the same; full and low copies
share one memory, in bytes (``--allocator bytes``; the paper splits it by a fixed share); a low copy
beside a full one goes first (that is the host's rule); counts are of layer events, not of tokens;
in a batch, what was used is forgotten when a sequence begins while no other runs; predicted experts
are loaded in full, for a prediction carries no gate value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import NotRunError, UsageError
from moesim.protocol import CacheView, KeepSeat, RouteSeat, World
from moesim.types import (
    DROPPED,
    PROBABILITY_ONE,
    AnyArray,
    ExpertId,
    Fact,
    Gate,
    IntArray,
    LayerEvent,
    Needs,
    RequestBegin,
    RequestEnd,
    Routed,
)

LOWEST = -1


def unimportance(weights: AnyArray, chosen: AnyArray) -> tuple[IntArray, IntArray]:
    """Kernel: (mass of the heavier experts of a token, int64 [T, k]; its whole mass, [T, 1]).

    The quotient is u; of equal ones the first counts as heavier. weights : int [T, k], in any
    order. chosen : uint16 [T, k].
    """
    mass = np.where(chosen == DROPPED, 0, weights).astype(np.int64)
    order = np.argsort(-mass, axis=1, kind="stable")
    falling = np.take_along_axis(mass, order, axis=1)
    before = np.empty_like(mass)
    np.put_along_axis(before, order, falling.cumsum(axis=1) - falling, axis=1)
    return before, mass.sum(axis=1, keepdims=True)


def worth(
    age: IntArray,
    uses: IntArray,
    full_uses: IntArray,
    events: int,
    layers_off: IntArray,
    layers: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Kernel: the terms LRU, LFU, LHU and FLD, each int64 in 1/16384.

    Parameters
    ----------
    age : layer events since the last use, at most ``events``, those of the sequence so far.
    uses, full_uses : layer events of the sequence that used the expert, and used it in full.
    layers_off : layers until the expert's own comes again, 0 to ``layers`` - 1.
    """
    passes = -(-events // layers)
    return (
        PROBABILITY_ONE * (events - age) // events,
        # An encoder's layers stand still while a decoder passes: no use counts more than once.
        PROBABILITY_ONE * np.minimum(uses, passes) // passes,
        PROBABILITY_ONE * np.minimum(full_uses, passes) // passes,
        PROBABILITY_ONE * (layers - layers_off) // layers,
    )


@dataclass
class MixedPrecision(RouteSeat):
    """Executes what weighs little in low precision, and what weighs least not at all.

    Parameters
    ----------
    t1, t2 : u up to which an expert is executed in full, and up to which it is executed.
    low : which precision of the model profile is the low one; -1: its last.
    """

    name = "mixed-precision"
    source = "arXiv 2411.01433"
    cost = "O(T k)"
    needs = Needs.WEIGHTS
    lossy = True
    mixed = True
    t1: float = 0.6
    t2: float = 0.9
    low: int = LOWEST

    def __post_init__(self) -> None:
        if not 0 <= self.t1 <= self.t2 <= 1:
            raise UsageError(
                f"route.t1={self.t1}, route.t2={self.t2}: must rise from 0 to 1, t1 first"
            )

    def begin(self, world: World) -> None:
        """Which precision is low; NotRunError if the model has but one."""
        precisions = len(world.expert_bytes)
        if precisions == 1:
            raise NotRunError("not run: the model has its experts in one precision alone")
        if world.expert_parts > 1:
            raise NotRunError("not run: parts of one expert would differ in precision")
        self._low = precisions - 1 if self.low == LOWEST else self.low
        if not 0 < self._low < precisions:
            raise UsageError(
                f"route.low={self.low}: the model has precisions 0 to {precisions - 1}, and 0 is "
                "the full one"
            )
        self._t1, self._t2 = (round(t * PROBABILITY_ONE) for t in (self.t1, self.t2))

    def route(self, event: LayerEvent, cache: CacheView) -> Routed | None:
        """What each token executes, and in what precision it will do."""
        assert event.weights is not None
        before, whole = unimportance(event.weights, event.token_experts)
        heavy = before * PROBABILITY_ONE
        skipped = heavy > self._t2 * whole
        low = heavy > self._t1 * whole
        if not low.any():
            return None
        experts = np.where(skipped, np.uint16(DROPPED), event.token_experts)
        return Routed(experts, np.where(low, self._low, 0).astype(np.uint8))


@dataclass
class Hobbit(KeepSeat):
    """Evicts by recency, frequency, use in full precision and layer distance together.

    Parameters
    ----------
    lru, lfu, lhu, fld : weights of the four terms, integers.
    """

    name = "hobbit"
    source = "arXiv 2411.01433"
    cost = "O(n); O(R) an eviction"
    version = 2
    lru: int = 1
    lfu: int = 1
    lhu: int = 1
    fld: int = 1

    def __post_init__(self) -> None:
        for term in ("lru", "lfu", "lhu", "fld"):
            if not 0 <= getattr(self, term) <= 1024:
                raise UsageError(f"keep.{term}={getattr(self, term)}: must lie between 0 and 1024")

    def begin(self, world: World) -> None:
        """No sequence has begun."""
        super().begin(world)
        self.world = world
        self.layers, self.experts = world.layers, world.experts
        self.running = 0
        self.layer = 0
        self.first = 0
        self._forget(0)

    def on(self, fact: Fact) -> None:
        """A sequence that begins alone has no past."""
        if isinstance(fact, RequestBegin):
            if not self.running:
                self._forget(self.newest + 1)
            self.running += 1
        elif isinstance(fact, RequestEnd):
            self.running -= 1
        else:
            super().on(fact)

    def gate(self, gate: Gate) -> None:
        """Used; in full, unless a low copy serves."""
        self.newest, self.layer = gate.event, gate.layer
        self.last[gate.experts] = gate.event
        self.uses[gate.experts] += 1
        full = gate.experts if gate.precisions is None else gate.experts[gate.precisions == 0]
        self.full_uses[full] += 1

    def planned(self, experts: Sequence[ExpertId]) -> None:
        """A prefetch is as recent as what asked for it."""
        self.last[np.asarray(experts, np.int64)] = self.newest

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """The weighted sum of the four terms."""
        events = max(1, event - self.first + 1)
        layers = experts // self.experts
        off = np.where(layers == self.layer, 0, self.world.until(layers, self.layer))
        age = np.minimum(event - self.last[experts], events)
        terms = worth(age, self.uses[experts], self.full_uses[experts], events, off, self.layers)
        weights = (self.lru, self.lfu, self.lhu, self.fld)
        worths = np.zeros(len(experts), np.int64)
        for weight, term in zip(weights, terms, strict=True):
            worths += weight * term
        return worths

    def _forget(self, first: int) -> None:
        self.first, self.newest = first, first - 1
        self.last = np.full(len(self.score), first - 1, np.int64)
        self.uses = np.zeros(len(self.score), np.int64)
        self.full_uses = np.zeros(len(self.score), np.int64)
