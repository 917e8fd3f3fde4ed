"""SwapMoE's Virtual Experts (ACL 2024, 2024.acl-long.363): resident sets that follow the input.

Every layer l has n_l slots. Every f inputs the n_l most important experts of each layer
(``moesim.policies.importance``) become its target, and in the steps that follow the experts that
lack are loaded in the place of the least important ones, a layer at a time, while inference goes
on. With ``route=masked`` there are no other loads.

Where the paper is silent:

- An expert may be used once it has wholly landed. The one whose place it takes may be used until
  then; it retires at that moment and its bytes are the spare room for the next newcomer. So a layer
  holds n_l + ``spare`` experts and always routes among n_l. A layer with room for all experts needs
  no spare slot, and one that would be left with fewer than k gives it up: there, and with
  ``spare=0``, the old expert goes when its successor starts to load.
- The most important newcomer comes first, in the place of the least important expert; equal
  importance changes nothing.
- A new plan takes back the loads that wait. One that moves is finished; who then retires is judged
  by the new plan, and is the newcomer itself if it is wanted no more.
- The first set is the most important on past requests; where there are none, whatever the run
  starts with stays until the first plan.
- One resident set serves all sequences of a batch; the layers of all stacks are one list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moesim.errors import UsageError
from moesim.hashing import hash64
from moesim.policies.importance import MEASURES, ONE, Sums, check_choice
from moesim.policies.masked_gate import Retired, masked, routable, slots_of
from moesim.protocol import CacheView, PrefetchSeat, World
from moesim.types import (
    DROPPED,
    NO_PLAN,
    AnyArray,
    Dropped,
    ExpertId,
    Fact,
    Gate,
    IntArray,
    IterationBegin,
    IterationEnd,
    Landed,
    LayerEvent,
    Needs,
    Note,
    Plan,
    Prefetch,
    RequestEnd,
    State,
    Swap,
)

UNITS = ("request", "pass", "token")
ROUTERS = ("unmasked", "masked")
WINDOWS = ("sum", "last", "decay")
FIRST = ("past", "magnitude", "random")

QUEUED, IN_FLIGHT, RESIDENT = int(State.QUEUED), int(State.IN_FLIGHT), int(State.RESIDENT)


# ---- who shall be resident -----------------------------------------------------------------------


def ranked(worth: IntArray, prior: IntArray, inside: AnyArray) -> IntArray:
    """Kernel: local ids, most important first; then those inside, larger prior, lowest id."""
    return np.lexsort((-prior, ~inside, -worth))


def target(
    worth: IntArray, prior: IntArray, inside: AnyArray, slots: int, gain: int = 0
) -> AnyArray:
    """bool [E]: who of a layer shall be resident.

    The ``slots`` most important; but the best newcomer and the worst resident change places only
    if the first is worth more than the second by ``gain``/16384 of it, then the second best, and so
    on.
    """
    order = ranked(worth, prior, inside)
    entering = [int(e) for e in order[:slots] if not inside[e]]
    leaving = [int(e) for e in order[slots:][::-1] if inside[e]]
    held = int(inside.sum())
    free, surplus = max(0, slots - held), max(0, held - slots)
    wanted = inside.copy()
    wanted[leaving[:surplus]] = False
    wanted[entering[:free]] = True
    for comes, goes in zip(entering[free:], leaving[surplus:], strict=True):
        if int(worth[comes]) * ONE <= int(worth[goes]) * (ONE + gain):
            break
        wanted[comes], wanted[goes] = True, False
    return wanted


class _Layer(NamedTuple):
    """A layer as it stands: local masks, bool [E]. ``coming``: copies on their way."""

    inside: AnyArray
    coming: AnyArray
    wanted: AnyArray


@dataclass
class VirtualExperts(PrefetchSeat):
    """Keeps the most important experts of each layer resident, by swaps in the background.

    every : unit of an input: request, pass (forward pass of a request) or token.
    period : inputs between two plans (the paper's f); 0 never plans: the first set stays.
    layers : layers that a step may serve, in turn; 0 serves all at once.
    swaps : most loads that a step may plan; 0 sets no limit.
    spare : slots of each layer in which a newcomer lands while the old expert still serves.
    gain : by how much of its importance a newcomer must exceed the expert that it replaces.
    measure : full, inputs (without the experts' norms) or tokens (their number alone).
    router : whose choices count: unmasked, or masked (under which newcomers starve).
    window : sum since the last plan, of the last input alone, or decay (sums fade at each plan).
    decay : what remains of a sum at a plan, with window=decay.
    initial : the first set: past (importance on past requests), magnitude (norms) or random.
    slots : n_l of each layer, comma-separated; empty takes what the capacity holds.
    """

    name = "virtual-experts"
    source = "ACL 2024, 2024.acl-long.363"
    cost = "O(T k); O(L E log E) a swap"
    needs = Needs.WEIGHTS | Needs.NORMS | Needs.PAST
    every: str = "request"
    period: int = 1
    layers: int = 1
    swaps: int = 0
    spare: int = 1
    gain: float = 0.0
    measure: str = "full"
    router: str = "unmasked"
    window: str = "sum"
    decay: float = 0.5
    initial: str = "past"
    slots: str = ""
    plans: int = field(default=0, init=False, repr=False)
    """Plans made so far, without the first set."""

    def __post_init__(self) -> None:
        """Known names, sensible numbers."""
        check_choice("prefetch.every", self.every, UNITS)
        check_choice("prefetch.measure", self.measure, MEASURES)
        check_choice("prefetch.router", self.router, ROUTERS)
        check_choice("prefetch.window", self.window, WINDOWS)
        check_choice("prefetch.initial", self.initial, FIRST)
        for name in ("period", "layers", "swaps", "spare"):
            if getattr(self, name) < 0:
                raise UsageError(f"prefetch.{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.gain <= 1024:
            raise UsageError(f"prefetch.gain={self.gain}: must lie between 0 and 1024")
        if not 0 <= self.decay <= 1:
            raise UsageError(f"prefetch.decay={self.decay}: must lie between 0 and 1")

    def begin(self, world: World) -> None:
        """Nothing was seen; the first set is known."""
        self.world = world
        self.caches: list[int] = world.caches.tolist()
        self.held = self._slots(world)
        self.prior = self._prior(world, self.initial)
        self.worth = self.prior
        self.wanted = np.zeros((world.layers, world.experts), bool)
        self.total = Sums(world, self.measure)
        self.retired = Retired(world.size)
        self.plans = 0
        self._nbytes: list[int] = [int(b) for b in world.expert_bytes[0]]
        self._places: dict[ExpertId, ExpertId] = {}
        """Newcomer on its way -> whose bytes it takes, or -1 for free ones."""
        self._turns: deque[int] = deque()
        """Layers that lack something, in the order of their turns."""
        self._turn = 0
        self._inputs = 0
        self._ended = self._begun = False
        self._step = -1
        self._tokens: dict[int, int] = {}

    def initially(self, world: World) -> Sequence[ExpertId]:
        """Layer by layer the first set, best first; without a past that of the largest norms."""
        blind = self.initial == "past" and world.past is None
        prior = self._prior(world, "magnitude" if blind else self.initial)
        nobody = np.zeros(world.experts, bool)
        chosen: list[ExpertId] = []
        for layer, held in enumerate(self._slots(world)):
            own = prior[layer * world.experts : (layer + 1) * world.experts]
            order = ranked(own, own, nobody)[:held]
            chosen += (order + layer * world.experts).tolist()
        return chosen

    def note(self, fact: Note) -> None:
        """A newcomer is there, or will not come."""
        self.retired.note(fact)
        if isinstance(fact, Landed | Dropped):
            self._places.pop(fact.expert, None)

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """Count; where an input ends, perhaps choose anew; where a step begins, swap."""
        if not self._begun:
            self._begun = True
            self._hear(fact, cache)
            return self._choose(cache)
        if self._hear(fact, cache):
            return self._replan(cache)
        if isinstance(fact, Gate) and fact.source.step != self._step:
            self._step = fact.source.step
            if self._turns:
                return self._swap(cache)
        return NO_PLAN

    # ---- what counts -----------------------------------------------------------------------------

    def _hear(self, fact: Fact, cache: CacheView) -> bool:
        """Count importance and inputs; whether a plan is due."""
        if isinstance(fact, Gate):
            self._count(fact.source, cache)
        elif isinstance(fact, IterationBegin):
            self._tokens[fact.request] = fact.tokens
        elif isinstance(fact, IterationEnd):
            tokens = self._tokens.pop(fact.request, 0)
            return self._input({"pass": 1, "token": tokens}.get(self.every, 0))
        elif isinstance(fact, RequestEnd):
            return self._input(int(self.every == "request"))
        return False

    def _count(self, source: LayerEvent, cache: CacheView) -> None:
        if self._ended and self.window == "last":
            self.total.fade(0)
        self._ended = False
        if self.router == "unmasked":
            self.total.add(source)
            return
        here = routable(source.layer, self.world.experts, cache.states, self.retired)
        chosen = masked(source.token_experts, source.gate, here)
        gates = None
        if source.gate is not None:
            local = np.where(chosen == DROPPED, 0, chosen).astype(np.int64)
            gates = np.take_along_axis(source.gate, local, axis=1)
        self.total.add(source, chosen, gates)

    def _input(self, count: int) -> bool:
        """Inputs have ended; whether a plan is due."""
        self._ended |= count > 0
        self._inputs += count
        if not self.period or self._inputs < self.period:
            return False
        self._inputs = 0
        return True

    # ---- a plan ----------------------------------------------------------------------------------

    def _replan(self, cache: CacheView) -> Plan:
        """New targets from what was counted."""
        self.plans += 1
        self.worth = self.total.worth()
        if self.window == "sum":
            self.total.fade(0)
        elif self.window == "decay":
            self.total.fade(round(self.decay * ONE))
        return self._choose(cache)

    def _choose(self, cache: CacheView) -> Plan:
        """Set the targets, take back what waits, judge anew who makes room for what moves."""
        states = cache.states
        lacking: list[int] = []
        swaps: list[Swap] = []
        for layer in range(self.world.layers):
            now = self._judged(layer, states)
            self.wanted[layer] = now.wanted
            made = self._retiring(layer, now)
            self.retired.swapped(made, states)
            swaps += made
            if (now.wanted & ~now.inside).any():
                lacking.append(layer)
        lacking.sort(key=lambda layer: (layer - self._turn) % self.world.layers)
        self._turns = deque(lacking)
        waiting = [e for e in self._places if states[e] == QUEUED]
        return Plan(cancel=waiting, swaps=swaps) if waiting or swaps else NO_PLAN

    def _judged(self, layer: int, states: AnyArray) -> _Layer:
        first, experts = layer * self.world.experts, self.world.experts
        own = slice(first, first + experts)
        inside = routable(layer, experts, states, self.retired)
        coming = states[own] == IN_FLIGHT
        wanted = target(
            self.worth[own],
            self.prior[own],
            inside | coming,
            self.held[layer],
            round(self.gain * ONE),
        )
        return _Layer(inside, coming, wanted)

    def _retiring(self, layer: int, now: _Layer) -> list[Swap]:
        """Who goes for each copy on its way, and who is one too many already."""
        first = layer * self.world.experts
        surplus = int(now.inside.sum()) + int(now.coming.sum()) - self.held[layer]
        going = self._worst_first(layer, now.inside & ~now.wanted)
        swaps = []
        # What is wanted no more goes first: it never comes into use.
        for local in sorted(np.flatnonzero(now.coming).tolist(), key=lambda e: now.wanted[e]):
            comes, goes = first + local, -1
            if surplus > 0:
                goes = going.pop(0) if now.wanted[local] else comes
            surplus -= 1
            if self.retired.leaving.get(comes, -1) != goes:
                swaps.append(Swap(comes, goes))
        return swaps + [Swap(e, e) for e in going[: max(0, surplus)]]

    def _worst_first(self, layer: int, mask: AnyArray) -> list[ExpertId]:
        first, experts = layer * self.world.experts, self.world.experts
        own = slice(first, first + experts)
        order = ranked(self.worth[own], self.prior[own], mask)
        return [first + int(e) for e in order[::-1] if mask[e]]

    # ---- swaps -----------------------------------------------------------------------------------

    def _swap(self, cache: CacheView) -> Plan:
        """The next layers in turn, until the step's share is used up."""
        wishes: list[Prefetch] = []
        swaps: list[Swap] = []
        most = self.swaps or self.world.size
        turns = self.layers or self.world.layers
        for _ in range(len(self._turns)):
            if not turns or len(wishes) == most:
                break
            layer = self._turns.popleft()
            if self._busy(layer, cache.states):
                self._turns.append(layer)
                continue
            before = len(wishes)
            if not self._swap_layer(layer, cache, most, wishes, swaps):
                self._turns.append(layer)
            if len(wishes) > before:
                turns -= 1
                self._turn = layer + 1
        return Plan(prefetches=wishes, swaps=swaps) if wishes or swaps else NO_PLAN

    def _busy(self, layer: int, states: AnyArray) -> bool:
        """Whether loads of a layer are still on their way."""
        own = states[layer * self.world.experts : (layer + 1) * self.world.experts]
        return bool(((own == QUEUED) | (own == IN_FLIGHT)).any())

    def _swap_layer(
        self,
        layer: int,
        cache: CacheView,
        most: int,
        wishes: list[Prefetch],
        swaps: list[Swap],
    ) -> bool:
        """Plan what a layer lacks; whether that is all. ``wishes`` and ``swaps`` are added to."""
        inside = routable(layer, self.world.experts, cache.states, self.retired)
        wanted = self.wanted[layer]
        coming = self._worst_first(layer, wanted & ~inside)[::-1]
        going = self._worst_first(layer, inside & ~wanted)
        unfilled = self.held[layer] - int(inside.sum())
        given: list[ExpertId] = []
        for comes in coming:
            goes = going.pop(0) if unfilled <= 0 and going else -1
            unfilled -= 1
            if not self.retired.mask[comes]:
                place = self._place(comes, goes, given, cache) if len(wishes) < most else None
                if place is None:
                    return False
                self._places[comes] = place
                wishes.append(Prefetch(comes, replaces=place))
            swap = Swap(comes, goes)
            self.retired.swapped([swap], cache.states)
            swaps.append(swap)
            given.append(goes)
        return True

    def _place(
        self, comes: ExpertId, goes: ExpertId, given: list[ExpertId], cache: CacheView
    ) -> ExpertId | None:
        """Whose bytes a newcomer takes: free ones (-1), one retired or about to be, or the very one
        that it replaces; None if there is no room."""
        layer = comes // self.world.experts
        if self._free_bytes(layer, cache) >= self._nbytes[layer]:
            return -1
        taken = set(self._places.values())
        retired = np.flatnonzero(self.retired.mask & (cache.states == RESIDENT)).tolist()
        for place in [*retired, *given, goes]:
            together = place >= 0 and self.caches[place] == self.caches[comes]
            if together and place not in taken and self._fits(place, layer):
                return int(place)
        return None

    def _fits(self, place: ExpertId, layer: int) -> bool:
        """Whether a newcomer of a layer may take the bytes of an expert that has to go."""
        there = place // self.world.experts
        wanted = self.wanted[there, place % self.world.experts]
        return not wanted and self._nbytes[there] >= self._nbytes[layer]

    def _free_bytes(self, layer: int, cache: CacheView) -> int:
        """Bytes that neither a copy holds nor a newcomer in the queue will take."""
        free = cache.free_bytes(layer)
        for comes, place in self._places.items():
            there = comes // self.world.experts
            same = there == layer or self.world.scope != "layer"
            if place < 0 and same and cache.states[comes] < IN_FLIGHT:
                free -= self._nbytes[there]
        return free

    # ---- the world -------------------------------------------------------------------------------

    def _slots(self, world: World) -> list[int]:
        """n_l of each layer."""
        room = slots_of(world)
        if self.slots:
            return self._asked_slots(world, room)
        # Room for all needs no spare slot; a token's k experts come before it.
        return [
            n if n == world.experts else n - max(0, min(self.spare, n - world.top_k)) for n in room
        ]

    def _asked_slots(self, world: World, room: Sequence[int]) -> list[int]:
        words = self.slots.split(",")
        if len(words) != world.layers or not all(w.strip().isdecimal() for w in words):
            raise UsageError(
                f"prefetch.slots={self.slots}: write {world.layers} whole numbers, one a layer, "
                "as 4,6,8"
            )
        asked = [int(word) for word in words]
        if not all(world.top_k <= n <= world.experts for n in asked):
            raise UsageError(
                f"prefetch.slots={self.slots}: each must lie between {world.top_k} (the experts of "
                f"a token) and {world.experts}"
            )
        sizes = [int(b) for b in world.expert_bytes[0]]
        nbytes = sum(n * size for n, size in zip(asked, sizes, strict=True))
        over = [n > r for n, r in zip(asked, room, strict=True)]
        if any(over) if world.scope == "layer" else nbytes > sum(world.capacity_bytes):
            raise UsageError(
                f"prefetch.slots={self.slots}: more than --capacity holds; give more, with "
                "--scope global one number of bytes for all layers"
            )
        return asked

    def _prior(self, world: World, how: str) -> IntArray:
        """int64 [layers * experts]: by what the first set is chosen, larger first."""
        if how == "random":
            draws = hash64(world.seed, 0, np.arange(world.size)) >> np.uint64(2)
            return np.asarray(draws).astype(np.int64)
        if how == "magnitude":
            norms = world.expert_norms
            return np.zeros(world.size, np.int64) if norms is None else norms.astype(np.int64)
        total = Sums(world, self.measure)
        for fact in world.past() if world.past is not None else ():
            if isinstance(fact, Gate):
                total.add(fact.source)
        return total.worth()
