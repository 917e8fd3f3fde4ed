"""Speculative loading into staging buffers: Mixtral-Offloading (arXiv 2312.17238, section 3.2).

At a layer's gate the next layer's gate is applied to the same hidden state, and the one or two
likeliest experts are loaded into ``buffers`` = 4 buffers that all layers share. A speculated expert
evicts no cached one; demanded at the next layer, it enters the cache in the place of the least
recently used.

The buffers are part of ``--capacity``: give ``L * k + 4`` experts for the paper's k a layer. Device
bytes are fungible, so a buffer is not a place but a claim:

- A prefetch first replaces a *stale* copy, one whose layer has passed without demanding it.
- While fewer than ``buffers`` copies are staged (at the start; and when a staged copy was demanded,
  which makes it a cached one), a prefetch takes free room or the keep seat's victim. That is the
  eviction of the least recently used expert, made when the buffer is next needed and not before.
- With ``buffers`` copies staged, none of them stale, the rest of the wishes are not made.

Where the source is silent: of a prompt's tokens the first come first; at the last layer nothing is
speculated; a speculated copy under way is not aborted.

The released code has no speculative loading (``--set prefetch=none``), and swaps: host and device
hold each expert once between them, so the evicted one is copied back. Both copies go through one
stream: ``--write-back serial``. On two streams PCIe would carry them at once: ``--write-back
duplex``.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import UsageError
from moesim.policies.next_gate import in_order
from moesim.protocol import CacheView, PrefetchSeat, World, check_distance
from moesim.types import (
    NO_PLAN,
    AnyArray,
    ExpertId,
    Fact,
    Gate,
    Landed,
    Needs,
    Note,
    Plan,
    Prefetch,
    State,
)


@dataclass
class StagedGate(PrefetchSeat):
    """Prefetches what the next layer's gate would choose now into a few shared buffers.

    distance : layers ahead.
    width : predicted experts taken of each token, best first; 0 takes all that were recorded.
    buffers : speculated copies held at once, demanded ones apart.
    """

    name = "staged-gate"
    source = "arXiv 2312.17238, section 3.2"
    cost = "O(T M + b)"
    needs = Needs.AHEAD
    distance: int = 1
    width: int = 2
    buffers: int = 4

    def __post_init__(self) -> None:
        """Some layers ahead, some experts, some buffers."""
        check_distance(self.distance)
        if self.width < 0:
            raise UsageError(f"prefetch.width={self.width}: must be 0 (all) or more")
        if self.buffers < 1:
            raise UsageError(f"prefetch.buffers={self.buffers}: must be 1 or more")

    @property
    def distances(self) -> tuple[int, ...]:
        """The one that it reads."""
        return (self.distance,)

    def begin(self, world: World) -> None:
        """Nothing is staged."""
        self.world = world
        self.caches: list[int] = world.caches.tolist()
        self.staged: dict[ExpertId, int] = {}
        """Speculated copy, planned or there -> the layer event that it is for."""
        self.promised: dict[ExpertId, ExpertId] = {}
        """Stale copy -> the prefetch that will take its place."""

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        for expert in fact.experts.tolist():
            self._leaves(expert)
        target = fact.layer + self.distance
        if target >= self.world.layers or self.distance not in fact.source.ahead:
            return NO_PLAN
        rows = fact.source.ahead[self.distance]
        rows = rows[:, : self.width] if self.width else rows
        named = in_order(rows.reshape(-1), target * self.world.experts)
        return Plan(prefetches=self._wishes(named, fact.event, cache.states))

    def note(self, fact: Note) -> None:
        """A staged copy went, or will not come."""
        if not isinstance(fact, Landed):
            self._leaves(fact.expert)

    def _wishes(self, named: list[ExpertId], event: int, states: AnyArray) -> list[Prefetch]:
        expires = event + self.distance
        for expert in named:
            # A copy that is there, or on its way, serves the new prediction.
            if expert in self.staged:
                self.staged[expert] = expires
        stale = [e for e, due in self.staged.items() if due <= event and e not in self.promised]
        stale = [e for e in stale if states[e] == State.RESIDENT]
        wishes = []
        for expert in named:
            if states[expert] != State.ABSENT:
                wishes.append(Prefetch(expert, expires))
                continue
            victim = next((e for e in stale if self._together(e, expert)), -1)
            if victim >= 0:
                stale.remove(victim)
                self.promised[victim] = expert
            elif len(self.staged) - len(self.promised) >= self.buffers:
                continue
            self.staged[expert] = expires
            wishes.append(Prefetch(expert, expires, replaces=victim))
        return wishes

    def _together(self, one: ExpertId, other: ExpertId) -> bool:
        """Whether one cache holds both."""
        return self.caches[one] == self.caches[other]

    def _leaves(self, expert: ExpertId) -> None:
        """No longer staged; what was promised its place, or its own promise, is settled."""
        self.staged.pop(expert, None)
        self.promised.pop(expert, None)
        for stale, prefetch in list(self.promised.items()):
            if prefetch == expert:
                del self.promised[stale]
