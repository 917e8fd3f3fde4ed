"""Fate (Fang et al., arXiv 2502.12224): the cross-layer gate, and a cache for the first layers.

What the paper leaves open is filled from the released code (FFFzy/Fate_open).

*Prefetching*: the next layer's gate is applied to this layer's gate input; those are the trace's
``ahead1``. Of a prompt's tokens each names the model's top k, and what most tokens name comes
first. A decoded token names as many as can be copied while a layer computes: the code divides the
measured time of a layer by that of a transfer, of 4-bit experts. So where the link is quick more
than k are named, which is what lifts the share of the demand that was named from 79 to 97 % in the
paper; and nothing is named where a copy takes longer than a layer. A policy has no clock: the
number is the parameter ``width``, by default all that the trace recorded, and ``prefetch=none``
stands for 0.

*Caching* (``shallow-arc``): predictions of the first layers are poor and there is none of the very
first, so the cache holds the first four MoE layers whole, and divides the rest evenly; where it
cannot hold four, it holds the first ones as far as it reaches. Each layer's share is managed by ARC
(``moesim.policies.arc``).

The source keeps what is being computed or prefetched apart from its caches. Here both share the
bytes of ``--capacity``, and room for two layers' top k is left out of the shares; a layer that
holds more than its share gives first, and the layers within theirs after it. With ``--scope layer``
the shares are what the user gave each layer, and this is ARC by layer.

Left out: 2-bit transfers of unpopular experts during a prompt, which are lossy. Where the source is
silent: equally popular experts go by first mention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.policies.arc import ARC
from moesim.policies.next_gate import in_order
from moesim.protocol import CacheView, PrefetchSeat, World
from moesim.types import (
    DROPPED,
    NO_PLAN,
    AnyArray,
    ExpertId,
    Fact,
    Gate,
    IntArray,
    Needs,
    Phase,
    Plan,
    Prefetch,
)

WITHIN = 1 << 55
"""Above every score of ARC: what a layer holds within its share."""


def popular(rows: AnyArray, base: int) -> list[ExpertId]:
    """Kernel: experts of predictions [T, M] by how many tokens name them, then by first mention."""
    named = in_order(rows.reshape(-1), base)
    votes = np.bincount(rows[rows != DROPPED].astype(np.int64), minlength=1)
    return sorted(named, key=lambda e: -int(votes[e - base]))


@dataclass
class CrossGate(PrefetchSeat):
    """Prefetches what the next layer's gate says of this layer's input, the most popular first.

    width : experts that a decoded token names, best first; 0 takes all that were recorded.
    """

    name = "cross-gate"
    source = "arXiv 2502.12224; FFFzy/Fate_open"
    cost = "O(T M log E)"
    needs = Needs.AHEAD
    width: int = 0

    def __post_init__(self) -> None:
        """Some experts."""
        if self.width < 0:
            raise UsageError(f"prefetch.width={self.width}: must be 0 (all) or more")

    @property
    def distances(self) -> tuple[int, ...]:
        """The next layer."""
        return (1,)

    def begin(self, world: World) -> None:
        """Take the shapes."""
        self.world = world

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate but the last of a pass."""
        target = fact.layer + 1 if isinstance(fact, Gate) else self.world.layers
        if not isinstance(fact, Gate) or target >= self.world.layers or 1 not in fact.source.ahead:
            return NO_PLAN
        rows = fact.source.ahead[1]
        taken = np.full_like(rows, DROPPED)
        for slot in fact.source.slots:
            own = slice(slot.first, slot.first + slot.tokens)
            wide = self.world.top_k if slot.phase == Phase.PREFILL else self.width
            wide = wide or rows.shape[1]
            taken[own, :wide] = rows[own, :wide]
        named = popular(taken, target * self.world.experts)
        return Plan(prefetches=[Prefetch(e, fact.event + 1) for e in named])


def shares(slots: int, layers: int, experts: int, shallow: int) -> list[int]:
    """Kernel: slots of each layer: the first ``shallow`` whole, the rest evenly."""
    whole = min(shallow, layers)
    if slots // experts < whole:
        return [min(experts, max(0, slots - layer * experts)) for layer in range(layers)]
    deep = layers - whole
    even = min(experts, (slots - whole * experts) // deep) if deep else 0
    return [experts] * whole + [even] * deep


@dataclass
class ShallowARC(ARC):
    """ARC by layer, where the first layers are held whole.

    shallow : layers that are held whole as far as the cache reaches.
    """

    name = "shallow-arc"
    source = "arXiv 2502.12224; FFFzy/Fate_open"
    cost = "O(R) an eviction"
    shallow: int = 4

    def __post_init__(self) -> None:
        """Some layers, or none."""
        if self.shallow < 0:
            raise UsageError(f"keep.shallow={self.shallow}: must be 0 or more")

    def shares(self, world: World) -> list[int]:
        """Slots of each layer."""
        if world.scope == "layer":
            return super().shares(world)
        slots = max(0, world.slots(0) - 2 * world.top_k)
        return shares(slots, world.layers, world.experts, self.shallow)

    def groups(self, world: World) -> IntArray:
        """Those of its layer, or of its layer's cache."""
        if world.scope == "layer":
            return super().groups(world)
        return np.repeat(np.arange(world.layers), world.experts)

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Layers above their share below the others, each by ARC."""
        held = np.array([sum(one.held.values()) for one in self.lists])
        held += np.bincount(self.group[list(self.awaited)], minlength=len(self.lists))
        within = held <= np.array([one.slots for one in self.lists])
        return super().scores(experts, event) + WITHIN * within[self.group[experts]]
