"""ARC, the adaptive replacement cache (Megiddo and Modha, FAST 2003, figure 4).

Of c slots, T1 holds what was demanded once since it came, T2 what was demanded again; B1 and B2 are
ghosts, the names of what T1 and T2 gave up last. A demand of a name in B1 says that T1 was too
small, one in B2 that T2 was; so the share ``p`` that T1 aims at moves by the ratio of the ghost
lists, and ``REPLACE`` takes the least recent of T1 or T2 accordingly.

On a stream of single accesses this is the published algorithm, victim for victim. What is adapted:

- The host asks for a score and evicts the smallest. What ``REPLACE`` would take from scores below
  the rest; where all of that is pinned, the other list gives.
- A layer event demands several experts at once. They are judged in demand order at the gate, where
  ``p`` moves; each enters T1 or T2 when it lands, and recency is by demand order.
  "x is in B2" in ``REPLACE`` looks at the first expert of the event that has not landed yet.
- A miss that is computed on the host moves ``p`` and enters no list.
- A prefetch is no demand. Its copy stands in T1 until it is demanded, which is then its first use,
  ghost or not; given up unused, it leaves no ghost.
- The published bounds on the lists (|T1| + |B1| <= c, all four <= 2c) are restored when a copy
  lands, with the same result as figure 4's case IV.

Ratios are cut to 1/16384. At unequal sizes c counts experts of the cache's first layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moesim.policies.lru import LRU, touch
from moesim.protocol import World
from moesim.types import (
    PROBABILITY_ONE,
    AnyArray,
    Evicted,
    ExpertId,
    Gate,
    IntArray,
    Landed,
    Note,
    Status,
)

ONE = PROBABILITY_ONE
NOWHERE, ONCE, AGAIN = 0, 1, 2
"""In neither, in T1, in T2."""

LATER = 1 << 50
"""Above every stamp: what ``REPLACE`` would not take."""

HIT = int(Status.HIT)
Names = dict[ExpertId, None]
"""A list by age, the oldest first, in which a name is found at once."""


def step(own: int, other: int) -> int:
    """Kernel: how far ``p`` moves for a name in a ghost list of ``own``, in 1/16384 of a slot."""
    return max(ONE, other * ONE // own)


def takes_once(held: int, aim: int, back: bool) -> bool:
    """Kernel: whether ``REPLACE`` takes from T1, which holds ``held`` and aims at ``aim``/16384.

    back : whether room is made for a name in B2.
    """
    return held > 0 and (held * ONE > aim or (back and held * ONE == aim))


def worth(stamps: IntArray, segments: AnyArray, first: AnyArray) -> IntArray:
    """Kernel: the stamp of the last touch, above all of the list that ``REPLACE`` takes from."""
    scores: IntArray = stamps + LATER * (segments != first)
    return scores


@dataclass
class Lists:
    """The ghosts of one cache, the sizes of T1 and T2, and ``aim``: T1's size in 1/16384."""

    slots: int
    aim: int = 0
    held: dict[int, int] = field(default_factory=lambda: {ONCE: 0, AGAIN: 0})
    """|T1| and |T2|."""
    once: Names = field(default_factory=dict)
    again: Names = field(default_factory=dict)
    """B1 and B2."""

    def adapt(self, expert: ExpertId) -> None:
        """A demand of what is not there: ``p`` moves where a ghost remembers it."""
        if expert in self.once:
            aim = self.aim + step(len(self.once), len(self.again))
            self.aim = min(self.slots * ONE, aim)
        elif expert in self.again:
            self.aim = max(0, self.aim - step(len(self.again), len(self.once)))

    def remembered(self, expert: ExpertId) -> bool:
        """Whether it was a ghost, which it is no more."""
        known = expert in self.once or expert in self.again
        self.once.pop(expert, None)
        self.again.pop(expert, None)
        return known

    def bound(self) -> None:
        """Drop the oldest ghosts that are too many."""
        once, again = self.once, self.again
        while once and self.held[ONCE] + len(once) > self.slots:
            del once[next(iter(once))]
        while again and sum(self.held.values()) + len(once) + len(again) > 2 * self.slots:
            del again[next(iter(again))]

    def first(self, back: bool) -> int:
        """The list that gives."""
        taken = takes_once(self.held[ONCE], self.aim, back) or not self.held[AGAIN]
        return ONCE if taken else AGAIN


@dataclass
class ARC(LRU):
    """Evicts the least recent of what was used once or of what was used again, as misses teach."""

    name = "arc"
    source = "FAST 2003, figure 4"
    cost = "O(n); O(R) an eviction"

    def begin(self, world: World) -> None:
        """Empty lists for each cache."""
        super().begin(world)
        slots = self.shares(world)
        self.group = self.groups(world)
        self.segment = np.zeros(world.size, np.int8)
        self.lists = [Lists(count) for count in slots]
        self.awaited: Names = {}
        self.unused: set[ExpertId] = set()

    def shares(self, world: World) -> list[int]:
        """Slots of each cache."""
        return world.cache_slots

    def groups(self, world: World) -> IntArray:
        """int64 [layers * experts]: whose lists each expert stands in."""
        return world.caches

    def gate(self, gate: Gate) -> None:
        """Hits move up, misses teach."""
        self.awaited = {}
        for expert, status in zip(gate.experts.tolist(), gate.status.tolist(), strict=True):
            lists = self.lists[self.group[expert]]
            if status != HIT:
                lists.adapt(expert)
                self.awaited[expert] = None
            elif expert not in self.unused:
                self._enter(expert, AGAIN)
            else:
                self.unused.discard(expert)
                lists.adapt(expert)
                self._enter(expert, AGAIN if lists.remembered(expert) else ONCE)
        touch(self.score, self.clock, gate.experts)

    def note(self, fact: Note) -> None:
        """A copy enters a list when it lands, and its name a ghost list when it goes."""
        if fact.precision:
            return
        if isinstance(fact, Landed):
            self._land(fact.expert)
        elif isinstance(fact, Evicted) and self.segment[fact.expert]:
            self._go(fact.expert)

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """What ``REPLACE`` takes from below the rest, each by last touch."""
        groups = self.group[experts]
        first = np.zeros(len(self.lists), np.int8)
        for group in np.unique(groups).tolist():
            first[group] = self.lists[group].first(self._back(group))
        return worth(self.score[experts], self.segment[experts], first[groups])

    def _back(self, group: int) -> bool:
        """Whether the first expert that has not landed is a name in B2."""
        x = next((e for e in self.awaited if self.group[e] == group), -1)
        return x in self.lists[group].again

    def _land(self, expert: ExpertId) -> None:
        lists = self.lists[self.group[expert]]
        if expert in self.awaited:
            del self.awaited[expert]
            self._enter(expert, AGAIN if lists.remembered(expert) else ONCE)
        else:
            self.unused.add(expert)
            self._enter(expert, ONCE)
        lists.bound()

    def _go(self, expert: ExpertId) -> None:
        lists = self.lists[self.group[expert]]
        ghosts = lists.once if self.segment[expert] == ONCE else lists.again
        self._enter(expert, NOWHERE)
        if expert in self.unused:
            self.unused.discard(expert)
        else:
            ghosts[expert] = None

    def _enter(self, expert: ExpertId, segment: int) -> None:
        """Stand in T1, in T2 or nowhere."""
        held = self.lists[self.group[expert]].held
        before = int(self.segment[expert])
        self.segment[expert] = segment
        if before:
            held[before] -= 1
        if segment:
            held[segment] += 1
