"""AdapMoE's cache allocation (arXiv 2408.10284): slots by layer, by a dynamic program.

Layers differ in how well their experts are cached and predicted, so they get different numbers of
slots: those that minimise the sum over layers of the loads that block,

    best[l][n] = min over c of best[l - 1][n - c] + cost_l(c).

Lossless. Needs PAST: the costs are those of past requests (``--split``, ``--calibration``). Without
any, slots are dealt evenly.

The paper computes cost_l(c) for uniform random experts, from how often a layer's prediction was
right. Here it is counted on the past:

    cost_l(c) = misses of layer l with c slots - accuracy_l * events of it with a miss,

which is the paper's form for two experts a token, with counts in the place of chances: of the
misses of an event one is the first absent expert, and it was prefetched if the prediction was right
(``moesim.policies.first_absent``). Misses are those of LRU whose slots are the layer's own, by
stack distances, one pass for all c. accuracy_l is the share of a layer's predictions on the past,
from the layer before, that were demanded, of the first token (0 where the policy reads no
predictions, and for the first layer); ``accuracy`` sets it. Solved once: it does not follow drift.

Where the source is silent:

- The quotas are of one cache for all layers, and all of its slots are dealt. They are kept by the
  choice of victims: the least recently used expert of the layer that is most above its quota goes
  first. So slots that a layer does not fill serve the others meanwhile. With ``--scope layer``
  every layer has a cache of its own, and this is LRU.
- Slots are counted in experts of the largest size. A layer gets one at least, as in the released
  code: where every prediction is right the cost of a layer is 0 whatever it has. What is prefetched
  needs its link all the same, which this cost leaves out.
- Equal sums go to the later layer's fewer slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.policies.lru import LRU
from moesim.protocol import World
from moesim.types import (
    DROPPED,
    PROBABILITY_ONE,
    AnyArray,
    Evicted,
    ExpertId,
    Fact,
    Gate,
    IntArray,
    Landed,
    Needs,
    Note,
    Status,
)

ONE = PROBABILITY_ONE
STAMP_BITS = 40


# ---- the past ------------------------------------------------------------------------------------


class Curve:
    """One layer's misses by number of slots, as its events go by.

    misses, missing : int64 [E + 1], misses and events with a miss with 0 to E slots.
    """

    def __init__(self, experts: int) -> None:
        self.misses = np.zeros(experts + 1, np.int64)
        self.missing = np.zeros(experts + 1, np.int64)
        self._recent: list[int] = []
        """Experts, the latest last."""

    def add(self, asked: list[int]) -> None:
        """An event's demand, local ids, in demand order."""
        place = {e: d for d, e in enumerate(reversed(self._recent))}
        everywhere = len(self.misses)
        distances = [place.get(e, everywhere) for e in asked]
        for distance in distances:
            self.misses[: distance + 1] += 1
        # An event has a miss with c slots if its farthest expert lies beyond them.
        self.missing[: max(distances, default=-1) + 1] += 1
        members = set(asked)
        self._recent = [e for e in self._recent if e not in members] + asked


class Accuracy:
    """How many of the predictions for the next layer were demanded there."""

    def __init__(self, layers: int, width: int) -> None:
        self.named = np.zeros(layers, np.int64)
        self.right = np.zeros(layers, np.int64)
        self._width = width
        self._told: tuple[int, set[int]] = (-1, set())

    def add(self, gate: Gate, local: Iterable[int]) -> None:
        """A gate: check what was said of it, note what it says of the next."""
        due, said = self._told
        if said and due == gate.layer:
            self.named[due] += len(said)
            self.right[due] += len(said & set(local))
        rows = gate.source.ahead.get(1)
        first = [] if rows is None or not len(rows) else rows[0, : self._width].tolist()
        self._told = gate.layer + 1, {e for e in first if e != DROPPED}

    def shares(self) -> IntArray:
        """int64 [L] in 1/16384; 0 where nothing was said."""
        made: IntArray = self.right * ONE // np.maximum(self.named, 1)
        return made


def costs_of(curves: Iterable[Curve], accuracy: IntArray) -> IntArray:
    """Kernel: int64 [L, E + 1], loads that block in 1/16384, by layer and slots."""
    return np.array(
        [c.misses * ONE - int(a) * c.missing for c, a in zip(curves, accuracy, strict=True)]
    )


def allocate(costs: AnyArray, slots: int) -> list[int]:
    """Kernel: slots of each layer, in all ``slots`` or as many as there are, of the least cost.

    Each layer gets one at least, where there are enough. costs : int64 [L, E + 1].
    """
    layers, width = costs.shape
    total = min(slots, layers * (width - 1))
    least = int(slots >= layers)
    far = np.iinfo(np.int64).max // 2
    best = np.full(total + 1, far, np.int64)
    best[0] = 0
    choices = []
    for layer in range(layers):
        sums = np.full((width, total + 1), far, np.int64)
        for c in range(least, min(width, total + 1)):
            sums[c, c:] = np.minimum(best[: total + 1 - c] + costs[layer, c], far)
        choices.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    dealt = []
    for chosen in reversed(choices):
        dealt.append(int(chosen[total]))
        total -= dealt[-1]
    return dealt[::-1]


def even(slots: int, layers: int, experts: int) -> list[int]:
    """As many for each layer, the rest to the first ones."""
    total = min(slots, layers * experts)
    return [total // layers + (layer < total % layers) for layer in range(layers)]


def learned(facts: Iterable[Fact], world: World, accuracy: int) -> IntArray:
    """Costs [L, E + 1] from the facts of past requests; ``accuracy`` in 1/16384, or -1: counted."""
    curves = [Curve(world.experts) for _ in range(world.layers)]
    told = Accuracy(world.layers, world.top_k)
    for fact in facts:
        if isinstance(fact, Gate):
            local = (fact.experts - fact.layer * world.experts).tolist()
            curves[fact.layer].add(local)
            told.add(fact, local)
    shares = told.shares() if accuracy < 0 else np.full(world.layers, accuracy, np.int64)
    return costs_of(curves, shares)


# ---- the seat ------------------------------------------------------------------------------------


def worth(stamps: IntArray, above: IntArray) -> IntArray:
    """Kernel: the stamp of the last touch, below it by how far its layer is above its quota.

    above : experts that the layer of each one holds, less its quota, and enough more that none is
        negative.
    """
    return stamps - (above << STAMP_BITS)


@dataclass
class LayerQuota(LRU):
    """Evicts the least recently used expert of the layer that is most above its quota.

    accuracy : how often the prefetch of the first absent expert is right, 0 to 1; -1 counts it on
        the past.
    """

    name = "layer-quota"
    source = "arXiv 2408.10284"
    cost = "O(n); O(R) an eviction; O(L N E) at the start"
    needs = Needs.PAST
    accuracy: float = -1.0

    def __post_init__(self) -> None:
        """A share, or -1."""
        if self.accuracy != -1 and not 0 <= self.accuracy <= 1:
            raise UsageError(
                f"keep.accuracy={self.accuracy}: must lie between 0 and 1, or be -1 (counted)"
            )

    def begin(self, world: World) -> None:
        """Deal the slots; nothing is held."""
        super().begin(world)
        self.experts = world.experts
        held = world.capacity_bytes[0] if world.scope == "layer" else sum(world.capacity_bytes)
        slots = held // int(world.expert_bytes[0].max())
        if world.scope == "layer" or world.past is None:
            dealt = even(slots, world.layers, world.experts)
        else:
            accuracy = -1 if self.accuracy < 0 else round(self.accuracy * ONE)
            dealt = allocate(learned(world.past(), world, accuracy), slots)
        self.quota = np.array(dealt, np.int64)
        self.held = np.zeros(world.layers, np.int64)
        self.coming: set[ExpertId] = set()
        self.layer = 0

    def gate(self, gate: Gate) -> None:
        """What is demanded and absent counts for its layer before it lands."""
        super().gate(gate)
        self.layer = gate.layer
        self.coming = set(gate.experts[gate.status != Status.HIT].tolist())

    def note(self, fact: Note) -> None:
        """Keep count."""
        if isinstance(fact, Landed):
            self.held[fact.expert // self.experts] += 1
            self.coming.discard(fact.expert)
        elif isinstance(fact, Evicted):
            self.held[fact.expert // self.experts] -= 1

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Those of the layer most above its quota lowest."""
        above = self.held - self.quota
        above[self.layer] += len(self.coming)
        above -= above.min()
        return worth(self.score[experts], above[experts // self.experts])
