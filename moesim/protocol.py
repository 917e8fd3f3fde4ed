"""The policy protocol, and the four seats that most policies are made of.

A policy is told facts and answers with expert ids; the host owns residency, bytes, queues and the
clock. The same object, unchanged, is driven by every host, so nothing here may know which one.

A *seat* answers one of four questions: what to ``prefetch``, what to ``keep``, how to serve a
``miss``, whether ``route`` may bend. ``SeatPolicy`` joins four seats into a policy, so that an
ablation swaps a seat and never forks a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol

import numpy as np

from moesim.errors import UsageError
from moesim.placement import caches_of
from moesim.types import (
    NO_PLAN,
    AnyArray,
    ExpertId,
    Fact,
    Forecast,
    Gate,
    IntArray,
    LayerEvent,
    Needs,
    Note,
    Plan,
    Routed,
    Serve,
    State,
    Swap,
)

ABSENT = int(State.ABSENT)
"""A plain number: an enumeration's member is slow to compare where every wish does it."""


class CostTable(Protocol):
    """What a policy with ``Needs.COSTS`` may ask: modelled durations in ns, not the time."""

    def load_ns(self, nbytes: int) -> int:
        """Copying ``nbytes`` to the device, alone on the link."""

    def expert_ns(self, tokens: int, layer: int = 0) -> int:
        """One expert on the device."""

    def cpu_expert_ns(self, tokens: int, layer: int = 0) -> int:
        """One expert on the host."""


class Future(Protocol):
    """What a policy with ``Needs.FUTURE`` may ask: the demand of the whole run."""

    @property
    def first_use(self) -> IntArray:
        """int64 [layers * experts]: first layer event that demands each expert, or NEVER."""

    @property
    def events(self) -> int:
        """How many layer events the run has."""

    def demand(self, event: int) -> IntArray:
        """Expert ids that a layer event demands, in demand order."""

    def next_use(self, event: int) -> IntArray:
        """For each expert of ``demand(event)``: the next layer event that demands it, or NEVER."""


@dataclass(frozen=True, slots=True)
class World:
    """What is true for the whole run.

    expert_bytes : int64 [precisions, layers], bytes of one expert.
    capacity_bytes : one number (scope "global") or one per layer (scope "layer"); with several
        devices one for each of the caches that ``caches`` names.
    decode_from : first layer of a decoding pass (after an encoder's layers, if there is one).
    expert_parts : in how many parts an expert of the model is kept, side by side; 1: whole.
    calibration : int64 [layers * experts] uses on the calibration trace (``Needs.CALIBRATION``).
    expert_norms : int64 [layers * experts] in 1/16384, norm of each expert's weights
        (``Needs.NORMS``).
    past : the facts of past requests, as a policy would have heard them (``Needs.PAST``); None
        where there are none.
    owners : int64 [layers * experts], the device that holds each expert; None: there is one.
    """

    layers: int
    experts: int
    top_k: int
    expert_bytes: IntArray
    capacity_bytes: tuple[int, ...]
    scope: str
    decode_from: int = 0
    seed: int = 0
    costs: CostTable | None = None
    calibration: IntArray | None = None
    expert_norms: IntArray | None = None
    past: Callable[[], Iterable[Fact]] | None = None
    future: Future | None = None
    expert_parts: int = 1
    owners: IntArray | None = None

    @property
    def size(self) -> int:
        """Number of expert ids."""
        return self.layers * self.experts

    @property
    def devices(self) -> int:
        """Number of devices."""
        return 1 if self.owners is None else int(self.owners.max()) + 1

    @property
    def caches(self) -> IntArray:
        """int64 [layers * experts]: the cache that holds each expert."""
        return caches_of(self.layers, self.experts, self.scope, self.owners)

    def ahead(self, layer: int, distance: int) -> int:
        """The layer ``distance`` events on; past the last, those of the next decoding pass."""
        beyond = layer + distance - self.layers
        if beyond < 0:
            return layer + distance
        return self.decode_from + beyond % (self.layers - self.decode_from)

    @property
    def cache_slots(self) -> list[int]:
        """How many full-precision experts each cache holds, of the first layer that it serves."""
        first = np.unique(self.caches, return_index=True)[1] // self.experts
        sizes = self.expert_bytes[0, first].tolist()
        return [held // size for held, size in zip(self.capacity_bytes, sizes, strict=True)]

    @property
    def period(self) -> int:
        """Layer events of a decoding pass."""
        return self.layers - self.decode_from

    def until(self, layers: IntArray, now: int) -> IntArray:
        """Layer events until each of ``layers`` comes again, from the gate of layer ``now`` on.

        After the last layer the next decoding pass begins; an encoder's layers come again as if
        another request did, for nobody knows when one will.
        """
        later = layers - now
        first: IntArray = np.where(layers < self.decode_from, 0, self.decode_from)
        found: IntArray = np.where(later > 0, later, later + self.layers - first)
        return found

    def slots(self, layer: int) -> int:
        """How many full-precision experts of a layer its cache holds, or its caches together."""
        nbytes = int(self.expert_bytes[0, layer])
        if self.owners is None:
            cache = layer if self.scope == "layer" else 0
            return self.capacity_bytes[cache] // nbytes
        own = np.unique(self.caches[layer * self.experts : (layer + 1) * self.experts])
        return sum(self.capacity_bytes[cache] // nbytes for cache in own.tolist())


class CacheView(Protocol):
    """What a policy may see of the cache: signals that real hardware can give equally."""

    @property
    def states(self) -> AnyArray:
        """uint8 [layers * experts] of ``State``, full precision, read-only."""

    @property
    def candidates(self) -> Sequence[ExpertId]:
        """Inside ``victims`` only: what may go now, ascending. Elsewhere empty."""

    @property
    def jobs_waiting(self) -> int:
        """Background jobs submitted and not yet done."""

    @property
    def queued(self) -> int:
        """Prefetches that wait for the link."""

    def free_bytes(self, layer: int) -> int:
        """Unreserved bytes of the cache that serves ``layer``, or of its caches together."""


class Policy(Protocol):
    """A pure function of its fact log (see the module docstring)."""

    @property
    def needs(self) -> Needs:
        """What it must be given."""

    @property
    def lossy(self) -> bool:
        """Whether it changes what is computed."""

    @property
    def scored(self) -> bool:
        """True: the host evicts the smallest of ``scores``, ties by lowest id. False: it asks
        ``victims``."""

    @property
    def bypass(self) -> bool:
        """True: misses are staged, and stay only if they beat the smallest resident score."""

    def begin(self, world: World) -> None:
        """The run starts; forget everything."""

    def route(self, event: LayerEvent, cache: CacheView) -> Routed | AnyArray | None:
        """What to execute instead, or only the experts, uint16 [T, k]; None: as recorded. Lossy
        policies only."""

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        """A fact; the answer is a plan."""

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """int64 worth of each expert at a layer event; the smallest goes first."""

    def victims(self, nbytes: int, cache: CacheView) -> Sequence[ExpertId]:
        """Who goes, of ``cache.candidates``, in order, until ``nbytes`` are free."""

    def note(self, fact: Note) -> None:
        """A load landed, a copy was evicted, a prefetch was dropped."""


class Seat:
    """What the four kinds of seat share. Parameters are the dataclass fields of a subclass."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[Needs] = Needs.NONE
    lossy: ClassVar[bool] = False
    kind: ClassVar[str]
    source: ClassVar[str] = ""
    """Where the idea comes from: a paper and its section, an engine, or "a baseline"."""
    cost: ClassVar[str] = ""
    """Of a decision, as O(...). n experts demanded, of T tokens that choose k each; M predicted for
    a token; R residents that may go; E experts in each of L layers; d layers ahead."""

    def begin(self, world: World) -> None:
        """The run starts; forget everything."""

    def note(self, fact: Note) -> None:
        """A load landed, a copy was evicted, a prefetch was dropped."""


class KeepSeat(Seat):
    """What may go first: one int64 score per expert, the smallest goes, ties by lowest id."""

    kind = "keep"
    bypass: ClassVar[bool] = False
    score: IntArray

    def begin(self, world: World) -> None:
        """Every expert starts with score 0."""
        self.score = np.zeros(world.size, np.int64)

    def on(self, fact: Fact) -> None:
        """A fact; by default only gates matter."""
        if isinstance(fact, Gate):
            self.gate(fact)

    def gate(self, gate: Gate) -> None:
        """The demand of a layer event."""

    def planned(self, experts: Sequence[ExpertId]) -> None:
        """Absent experts that were just planned as prefetches, in order, after all demand."""

    def expected(self, forecast: Forecast) -> None:
        """What the prefetch seat now expects of a layer."""

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """int64 score of each expert; ``event`` is the newest layer event."""
        return self.score[experts]


class PrefetchSeat(Seat):
    """What will be needed, in which order."""

    kind = "prefetch"

    @property
    def distances(self) -> tuple[int, ...]:
        """Layer distances of the predictions that it reads (``Needs.AHEAD``)."""
        return ()

    def initially(self, world: World) -> Sequence[ExpertId] | None:
        """What is to be resident at the start (``--initial policy``); None: it has no wish."""
        return None

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """Prefetches and cancellations; by default none."""
        return NO_PLAN


MOST_DISTANT = 1024


def check_distance(distance: int) -> None:
    """UsageError unless a prefetch seat looks 1 to 1024 layer events ahead."""
    if not 1 <= distance <= MOST_DISTANT:
        raise UsageError(f"prefetch.distance={distance}: must lie between 1 and {MOST_DISTANT}")


class MissSeat(Seat):
    """How a missing expert is served."""

    kind = "miss"
    mixed: ClassVar[bool] = False
    """True: it has missing experts loaded in lower precision, so the model must have one."""

    def serve(self, gate: Gate, cache: CacheView) -> Mapping[ExpertId, Serve]:
        """Missing expert -> how; those left out are fetched."""
        return {}

    def lowered(self, event: LayerEvent) -> AnyArray | None:
        """The lowest precision that will do, uint8 [T, k]; None: full. A better copy that is there
        serves all the same (``moesim.precision``), so it matters to what is missing alone."""
        return None


class RouteSeat(Seat):
    """Whether routing may bend to residency."""

    kind = "route"
    mixed: ClassVar[bool] = False
    """True: it has experts executed in lower precision, so the model must have one."""

    def route(self, event: LayerEvent, cache: CacheView) -> Routed | AnyArray | None:
        """What to execute instead, or only the experts, uint16 [T, k]; None: as recorded."""
        return None

    def swapped(self, swaps: Sequence[Swap], cache: CacheView) -> None:
        """What the prefetch seat has just planned to put in the place of what."""


SEAT_KINDS = ("prefetch", "keep", "miss", "route")


@dataclass(slots=True)
class SeatPolicy:
    """Four seats acting as one policy."""

    prefetch: PrefetchSeat
    keep: KeepSeat
    miss: MissSeat
    routing: RouteSeat

    scored: ClassVar[bool] = True

    @property
    def seats(self) -> tuple[Seat, ...]:
        """The seats in the order in which they hear of a fact."""
        return (self.routing, self.keep, self.prefetch, self.miss)

    @property
    def needs(self) -> Needs:
        """The union of what the seats need."""
        needs = Needs.NONE
        for seat in self.seats:
            needs |= seat.needs
        return needs

    @property
    def lossy(self) -> bool:
        """Whether any seat changes what is computed."""
        return any(seat.lossy for seat in self.seats)

    @property
    def mixed(self) -> bool:
        """Whether it has experts executed in lower precision."""
        return self.routing.mixed or self.miss.mixed

    @property
    def bypass(self) -> bool:
        """Whether a load stays only if it beats a resident."""
        return self.keep.bypass

    def begin(self, world: World) -> None:
        """Each seat sees only what it declared (the oracle boundary)."""
        for seat in self.seats:
            seat.begin(restrict(world, seat.needs))

    def initially(self, world: World) -> Sequence[ExpertId] | None:
        """What the prefetch seat wants resident at the start; None: it has no wish."""
        return self.prefetch.initially(restrict(world, self.prefetch.needs))

    def route(self, event: LayerEvent, cache: CacheView) -> Routed | AnyArray | None:
        """The route seat's answer; where it leaves all as recorded, the miss seat's precisions."""
        routed = self.routing.route(event, cache)
        if routed is None and self.miss.mixed:
            return Routed(None, self.miss.lowered(event))
        return routed

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        """Keep learns of the fact first, then prefetch plans, then misses are served."""
        self.keep.on(fact)
        plan = self.prefetch.plan(fact, cache)
        if plan.prefetches:
            states = cache.states
            # What this gate demands is loaded by demand, and was touched in demand order.
            asked = set(fact.experts.tolist()) if isinstance(fact, Gate) else ()
            absent = [
                p.expert
                for p in plan.prefetches
                if states[p.expert] == ABSENT and p.expert not in asked
            ]
            self.keep.planned(absent)
        for forecast in plan.forecasts:
            self.keep.expected(forecast)
        if plan.swaps:
            self.routing.swapped(plan.swaps, cache)
        if isinstance(fact, Gate):
            serve = self.miss.serve(fact, cache)
            if serve:
                plan = replace(plan, serve={**plan.serve, **serve})
        return plan

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """The keep seat's scores."""
        return self.keep.scores(experts, event)

    def victims(self, nbytes: int, cache: CacheView) -> Sequence[ExpertId]:
        """Never asked: the seats are scored."""
        raise NotImplementedError("a scored policy names no victims")

    def note(self, fact: Note) -> None:
        """Every seat may listen."""
        for seat in self.seats:
            seat.note(fact)


class PlainPolicy:
    """A base for policies written without seats: override what you need.

    With ``scored = True`` override ``scores``; with ``scored = False`` override ``victims``.
    """

    needs: ClassVar[Needs] = Needs.NONE
    lossy: ClassVar[bool] = False
    scored: ClassVar[bool] = True
    bypass: ClassVar[bool] = False
    version: ClassVar[int] = 1

    def begin(self, world: World) -> None:
        """The run starts; forget everything."""

    def route(self, event: LayerEvent, cache: CacheView) -> Routed | AnyArray | None:
        """As recorded."""
        return None

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        """No plan."""
        return NO_PLAN

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """All equal: the lowest id goes first."""
        return np.zeros(len(experts), np.int64)

    def victims(self, nbytes: int, cache: CacheView) -> Sequence[ExpertId]:
        """Override when not scored."""
        raise NotImplementedError

    def note(self, fact: Note) -> None:
        """Nothing."""


def initially(policy: Policy, world: World) -> Sequence[ExpertId]:
    """What a policy wants resident at the start, most wanted first; nothing if it does not say."""
    asked = policy.initially(world) if isinstance(policy, SeatPolicy) else None
    return () if asked is None else asked


def has_mixed(policy: Policy) -> bool:
    """Whether a policy of seats has experts executed in lower precision."""
    return isinstance(policy, SeatPolicy) and policy.mixed


def lacks(made: object) -> str:
    """The first part of the protocol that an object has not; empty if it has all."""
    parts = [name for name in vars(Policy) if not name.startswith("_")]
    return next((name for name in parts if not hasattr(made, name)), "")


def restrict(world: World, needs: Needs) -> World:
    """The world without what was not declared: an undeclared input is absent, not ignored."""
    return replace(
        world,
        costs=world.costs if Needs.COSTS in needs else None,
        calibration=world.calibration if Needs.CALIBRATION in needs else None,
        expert_norms=world.expert_norms if Needs.NORMS in needs else None,
        past=world.past if Needs.PAST in needs else None,
        future=world.future if Needs.FUTURE in needs else None,
    )


def parameters(seat: Seat | type[Seat]) -> dict[str, object]:
    """Names and values (or defaults) of a seat's parameters."""
    return {f.name: getattr(seat, f.name) for f in fields(seat) if f.init}  # type: ignore[arg-type]
