"""EdgeMoE's preloading (arXiv 2308.14352): what followed before. Lossless.

EdgeMoE profiles offline which experts of a layer are chosen after which ones of the layers before,
and preloads the next layer's likeliest while the present one computes. Here for each layer, each
expert i of one of the last ``history`` layers and each expert j the tokens that chose both are
counted, and at a gate the next layer's experts are ranked by

    sum over its tokens, the last layers and the experts i chosen there of n(i, j) / n(i),

in 1/16384, each quotient rounded down. Counts come from past requests (PAST: ``--split``,
``--calibration``); without any it starts knowing nothing.

Where the source is silent (its table is of whole paths of the two layers before, for one expert a
token, which for k experts of many would be empty): pairs in the place of paths, two layers of
history, ``learn`` (on: counts go on while serving, as seen at each gate), the model's k best of a
token, the union over tokens by falling sum, ties by lowest id, nobody without a count. Of a chunk
or batch each token is followed by its own row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.protocol import CacheView, PrefetchSeat, World
from moesim.types import (
    NO_PLAN,
    PROBABILITY_ONE,
    AnyArray,
    Fact,
    Gate,
    IntArray,
    Needs,
    Plan,
    Prefetch,
)

ONE = PROBABILITY_ONE


def paired(counts: IntArray, before: AnyArray, after: AnyArray) -> None:
    """Kernel: one more for each (i, j) that a token chose, in place.

    counts : int64 [E + 1, E + 1]; the last row and column are those of ``DROPPED``.
    before, after : [T, k] local ids.
    """
    last = len(counts) - 1
    i = np.minimum(before.astype(np.int64), last)
    j = np.minimum(after.astype(np.int64), last)
    np.add.at(counts, (i[:, :, None], j[:, None, :]), 1)


def likely(counts: IntArray, uses: IntArray, chosen: AnyArray) -> IntArray:
    """Kernel: int64 [T, E] in 1/16384, what is expected after each token's experts [T, k]."""
    last = len(counts) - 1
    i = np.minimum(chosen.astype(np.int64), last)
    shares = counts[i, :last] * ONE // np.maximum(uses[i], 1)[:, :, None]
    shares[i == last] = 0
    made: IntArray = shares.sum(axis=1)
    return made


class Tables:
    """Counts of pairs, for each layer and lag; lag 0 is the layer just before."""

    def __init__(self, layers: int, experts: int, history: int) -> None:
        self.history = history
        self.pairs = np.zeros((history, layers, experts + 1, experts + 1), np.int64)
        self.uses = np.zeros((history, layers, experts + 1), np.int64)
        self._step = self._layer = -1
        self.path: list[AnyArray] = []
        """Choices [T, k] of the pass so far, the last layer last."""

    def follow(self, gate: Gate) -> None:
        """A gate of the same pass continues the path; any other begins one."""
        chosen, source = gate.source.token_experts, gate.source
        goes_on = self.path and source.step == self._step and len(self.path[-1]) == len(chosen)
        if not goes_on or gate.layer <= self._layer:
            self.path = []
        self._step, self._layer = source.step, gate.layer
        self.path = [*self.path[-self.history :], chosen]

    def count(self) -> None:
        """The newest layer's pairs with those before it."""
        after = self.path[-1]
        for lag, before in enumerate(self.path[-2::-1]):
            paired(self.pairs[lag, self._layer], before, after)
            ids = np.minimum(before.astype(np.int64), self.uses.shape[2] - 1)
            np.add.at(self.uses[lag, self._layer], ids, 1)

    def next(self) -> IntArray:
        """int64 [T, E], what is expected of the layer after the newest."""
        target = self._layer + 1
        sums = np.zeros((len(self.path[-1]), self.pairs.shape[2] - 1), np.int64)
        for lag, chosen in enumerate(self.path[: -self.history - 1 : -1]):
            sums += likely(self.pairs[lag, target], self.uses[lag, target], chosen)
        return sums


@dataclass
class LayerStatistics(PrefetchSeat):
    """Prefetches what most often followed the last layers' choices.

    history : layers looked back at, the present one included.
    width : experts a token; 0 takes the model's top k.
    learn : whether what is served is counted too.
    """

    name = "layer-statistics"
    source = "arXiv 2308.14352"
    cost = "O(k E)"
    needs = Needs.PAST
    history: int = 2
    width: int = 0
    learn: bool = True

    def __post_init__(self) -> None:
        """Some history, some experts."""
        if not 1 <= self.history <= 16:
            raise UsageError(f"prefetch.history={self.history}: must lie between 1 and 16")
        if self.width < 0:
            raise UsageError(f"prefetch.width={self.width}: must be 0 (top k) or more")

    def begin(self, world: World) -> None:
        """Count what is past."""
        self.world = world
        self.tables = Tables(world.layers, world.experts, self.history)
        for fact in world.past() if world.past is not None else ():
            if isinstance(fact, Gate):
                self.tables.follow(fact)
                self.tables.count()

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate but the last layer's."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        self.tables.follow(fact)
        if self.learn:
            self.tables.count()
        if fact.layer + 1 >= self.world.layers:
            return NO_PLAN
        base = (fact.layer + 1) * self.world.experts
        return Plan(prefetches=[Prefetch(base + e, fact.event + 1) for e in self._named()])

    def _named(self) -> list[int]:
        """Each token's likeliest, together by falling sum."""
        sums = self.tables.next()
        best = np.argsort(-sums, axis=1, kind="stable")[:, : self.width or self.world.top_k]
        kept = np.zeros_like(sums)
        np.put_along_axis(kept, best, np.take_along_axis(sums, best, axis=1), axis=1)
        total = kept.sum(axis=0)
        return [int(e) for e in np.argsort(-total, kind="stable") if total[e]]
