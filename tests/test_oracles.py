"""Oracles: small models written apart, exhaustive search, and timelines computed by hand."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.setup import Options
from moesim.policies.fiddler import Fiddler
from moesim.policies.hot_set import HotSet
from moesim.policies.look_ahead import LookAhead
from moesim.policies.next_gate import NextGate
from moesim.policies.previous_token import PreviousToken
from moesim.policies.whole_layer import WholeLayer
from moesim.policy import CacheView, PlainPolicy, PrefetchSeat, World
from moesim.types import Fact, Gate, IntArray, LayerEvent, Phase, Plan, Prefetch, Slot, Status
from moesim.workload import KnownFuture
from tests.harness import drive, fitting, future_of, run, start
from tests.strategies import DEMAND_ONLY, PRICED, Case, choices, decode_case, machine

Event = tuple[int, ...]
"""Expert ids of a layer event, in demand order."""


# ---- keep seats against models in dictionaries ---------------------------------------------------


class Model:
    """One cache of ``slots`` experts, served group by group: what is asked for never goes."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: dict[int, None] = OrderedDict()
        self.gone: list[int] = []

    def serve(self, event: int, layer: int, step: int, asked: Event) -> int:
        """The hits of a layer event."""
        hits = [e for e in asked if e in self.held]
        self.learn(event, layer, step, asked, set(hits))
        for expert in asked:
            if expert in self.held:
                continue
            if len(self.held) == self.slots:
                victim = self.victim(event, [e for e in self.held if e not in asked])
                del self.held[victim]
                self.gone.append(victim)
                self.forget(victim)
            self.held[expert] = None
        return len(hits)

    def learn(self, event: int, layer: int, step: int, asked: Event, hits: set[int]) -> None:
        """The event's demand, before anything goes."""

    def forget(self, victim: int) -> None:
        """An expert went."""

    def victim(self, event: int, free: list[int]) -> int:
        """First in, first out, unless a model says otherwise."""
        return free[0]


class LruModel(Model):
    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.order: OrderedDict[int, None] = OrderedDict()

    def learn(self, event: int, layer: int, step: int, asked: Event, hits: set[int]) -> None:
        for expert in asked:
            self.order.pop(expert, None)
            self.order[expert] = None

    def victim(self, event: int, free: list[int]) -> int:
        return next(e for e in self.order if e in free)


class LfuModel(LruModel):
    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.uses: dict[int, int] = {}

    def learn(self, event: int, layer: int, step: int, asked: Event, hits: set[int]) -> None:
        super().learn(event, layer, step, asked, hits)
        for expert in asked:
            self.uses[expert] = self.uses.get(expert, 0) + 1

    def victim(self, event: int, free: list[int]) -> int:
        return min((e for e in self.order if e in free), key=lambda e: self.uses[e])


class LfuInCacheModel(LfuModel):
    def forget(self, victim: int) -> None:
        self.uses[victim] = 0


class LfuDecayModel(LfuModel):
    experts = 0

    def learn(self, event: int, layer: int, step: int, asked: Event, hits: set[int]) -> None:
        LruModel.learn(self, event, layer, step, asked, hits)
        for expert in range(layer * self.experts, (layer + 1) * self.experts):
            self.uses[expert] = self.uses.get(expert, 0) * round(0.95 * 16384) // 16384
        for expert in asked:
            self.uses[expert] += 16384


class LfruModel(LfuModel):
    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.last: dict[int, int] = {}

    def learn(self, event: int, layer: int, step: int, asked: Event, hits: set[int]) -> None:
        super().learn(event, layer, step, asked, hits)
        self.last.update(dict.fromkeys(asked, event))

    def victim(self, event: int, free: list[int]) -> int:
        return min(sorted(free), key=lambda e: (self.uses[e] << 24) // (event - self.last[e] + 1))


class LeastStaleModel(LruModel):
    experts = 0

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.step_of: dict[int, int] = {}
        self.now = (0, 0)

    def learn(self, event: int, layer: int, step: int, asked: Event, hits: set[int]) -> None:
        super().learn(event, layer, step, asked, hits)
        self.step_of.update(dict.fromkeys(asked, step))
        self.now = (step, layer)

    def victim(self, event: int, free: list[int]) -> int:
        step, layer = self.now
        stale = [e for e in free if self.step_of[e] < step and e // self.experts < layer]
        return super().victim(event, stale or free)


class SlruModel(Model):
    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.probation: OrderedDict[int, None] = OrderedDict()
        self.protected: OrderedDict[int, None] = OrderedDict()

    def learn(self, event: int, layer: int, step: int, asked: Event, hits: set[int]) -> None:
        for expert in asked:
            self.probation.pop(expert, None)
            self.protected.pop(expert, None)
            (self.protected if expert in hits else self.probation)[expert] = None
        while len(self.protected) > int(0.8 * self.slots):
            self.probation[self.protected.popitem(last=False)[0]] = None

    def victim(self, event: int, free: list[int]) -> int:
        return next(e for e in chain(self.probation, self.protected) if e in free)

    def forget(self, victim: int) -> None:
        self.probation.pop(victim, None)
        self.protected.pop(victim, None)


class RandomModel(Model):
    seed = 0

    def victim(self, event: int, free: list[int]) -> int:
        return min(sorted(free), key=lambda e: _splitmix(self.seed, event, e) >> 2)


def _splitmix(*parts: int) -> int:
    """SplitMix64's finaliser over a chain of words, in Python's whole numbers."""
    mask, step = (1 << 64) - 1, 0x9E3779B97F4A7C15
    state = step
    for part in parts:
        word = ((state ^ part) + step) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        state = word ^ (word >> 31)
    return state


class StaticModel(Model):
    """A fixed set: a miss stays if there is room, or if it is worth more than the least."""

    worth: Sequence[int] = ()

    def serve(self, event: int, layer: int, step: int, asked: Event) -> int:
        hits = sum(e in self.held for e in asked)
        for expert in (e for e in asked if e not in set(self.held)):
            least = min(self.held, key=lambda e: (self.worth[e], e), default=-1)
            if len(self.held) == self.slots and self.worth[least] >= self.worth[expert]:
                self.gone.append(expert)
                continue
            if len(self.held) == self.slots:
                del self.held[least]
                self.gone.append(least)
            self.held[expert] = None
        return hits


MODELS: dict[str, type[Model]] = {
    "lru": LruModel,
    "fifo": Model,
    "lfu": LfuModel,
    "lfu-incache": LfuInCacheModel,
    "lfu-decay": LfuDecayModel,
    "lfru": LfruModel,
    "least-stale": LeastStaleModel,
    "slru": SlruModel,
    "random": RandomModel,
    "static": StaticModel,
}


@st.composite
def routed(
    draw: st.DrawFn, slots_from_k: bool = True, shortest: int = 1, longest: int = 30
) -> Case:
    """One request that decodes; experts of one byte; a layer event fits its cache."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    top_k = draw(st.integers(1, min(3, experts)))
    token = st.lists(st.sampled_from(choices(experts, top_k)), min_size=layers, max_size=layers)
    steps = draw(st.lists(token, min_size=shortest, max_size=longest))
    scope = draw(st.sampled_from(["layer", "global"]))
    most = experts if scope == "layer" else experts * layers
    slots = draw(st.integers(top_k if slots_from_k else 1, most))
    options = Options(order=draw(st.sampled_from(["ready", "barrier"])), check=True, timeline=True)
    case = decode_case(steps, experts, slots, scope=scope, options=options)
    return replace(case, seed=draw(st.integers(0, 5)))


def modelled(case: Case, make: type[Model], initial: Sequence[int] = ()) -> tuple[int, list[int]]:
    """Hits and victims in order, by a model for each cache."""
    size = case.meta.experts
    tuned: Any = type(make.__name__, (make,), {"experts": size, "seed": case.seed})
    tuned.worth = future_of(case).counts.tolist()
    caches = [tuned(capacity) for capacity in case.capacity_bytes]
    for expert in initial:
        caches[expert // size if len(caches) > 1 else 0].held[expert] = None
    hits, gone = 0, []
    for event, asked in enumerate(asked_by(case)):
        layer = event % case.meta.layers
        model = caches[layer if len(caches) > 1 else 0]
        before = len(model.gone)
        hits += model.serve(event, layer, event // case.meta.layers, asked)
        gone += model.gone[before:]
    return hits, gone


def asked_by(case: Case) -> list[Event]:
    """The layer events of a decoding case of one request."""
    rows = case.requests[0]
    base = rows.layer.astype(int) * case.meta.experts
    return [
        tuple(e + b for e in row)
        for row, b in zip(rows.experts.tolist(), base.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_keep_seat_equals_its_model(name: str) -> None:
    """Hits and every victim, in order."""

    @settings(max_examples=60)
    @given(case=routed(shortest=12))
    def equal(case: Case) -> None:
        done = run(case, name)
        hottest = np.argsort(-future_of(case).counts, kind="stable")
        used = [int(e) for e in hottest if future_of(case).counts[e]]
        hits, gone = modelled(case, MODELS[name], fitting(case, used) if name == "static" else ())
        assert [key for _, _, key in done.of("evict")] == gone
        assert done.tally.counts().hits == hits

    equal()


@pytest.mark.parametrize("name", ["lru", "fifo", "lfu", "lfu-incache"])
def test_flat_keep_seat_equals_its_model(name: str) -> None:
    """Every access alone, as generic cache simulators have it."""

    @settings(max_examples=30)
    @given(case=routed(slots_from_k=False))
    def equal(case: Case) -> None:
        flat = replace(case, options=Options(flat=True, check=True, timeline=True))
        done = run(flat, name)
        size, caches = case.meta.experts, [MODELS[name](c) for c in case.capacity_bytes]
        hits = number = 0
        for event, asked in enumerate(asked_by(case)):
            layer = event % case.meta.layers
            for expert in asked:
                model = caches[expert // size if len(caches) > 1 else 0]
                hits += model.serve(number, layer, event // case.meta.layers, (expert,))
                number += 1
        assert done.tally.counts().hits == hits

    equal()


# ---- bounds against exhaustive search ------------------------------------------------------------


def fewest_misses(events: Sequence[Event], slots: int, *, bypass: bool) -> int:
    """Over every choice of what to keep after every event."""

    @cache
    def best(place: int, held: frozenset[int]) -> int:
        if place == len(events):
            return 0
        asked = frozenset(events[place])
        missing = len(asked - held)
        forced = frozenset() if bypass else asked
        rest = (held | asked) - forced
        kept = combinations(sorted(rest), min(len(rest), slots - len(forced)))
        return missing + min(best(place + 1, forced | frozenset(k)) for k in kept)

    return best(0, frozenset())


@pytest.mark.parametrize("name", ["min", "min-bypass"])
def test_min_equals_exhaustive_search(name: str) -> None:
    @settings(max_examples=60)
    @given(case=routed(longest=5))
    def equal(case: Case) -> None:
        events = asked_by(case)
        layers = range(case.meta.layers) if len(case.capacity_bytes) > 1 else [None]
        fewest = sum(
            fewest_misses(
                [e for i, e in enumerate(events) if la is None or i % case.meta.layers == la],
                case.capacity_bytes[la or 0],
                bypass=name == "min-bypass",
            )
            for la in layers
        )
        assert run(case, name).tally.counts().misses == fewest

    equal()


@settings(max_examples=60)
@given(case=routed(slots_from_k=False))
def test_min_bounds_every_demand_only_policy(case: Case) -> None:
    """Forced bounds those that admit every miss; bypass bounds them all. Waves included."""
    cold = replace(case, initial="cold")
    misses = {n: run(cold, n).tally.counts().misses for n in DEMAND_ONLY}
    assert misses["min-bypass"] == min(misses.values())
    admit = [n for n in DEMAND_ONLY if n not in ("min-bypass", "static", "cpu", *PRICED)]
    assert misses["min"] == min(misses[n] for n in admit)


@settings(max_examples=40)
@given(case=routed(), prefetch=st.sampled_from(["look-ahead", "whole-layer", "previous-token"]))
def test_min_bypass_bounds_loads_with_prefetch_too(case: Case, prefetch: str) -> None:
    """A prefetch moves a load in time; it cannot avoid one."""
    cold = replace(case, initial="cold")
    bound = run(cold, "min-bypass").tally.counts().misses
    done = run(cold, "lru", f"prefetch={prefetch}").tally
    assert done.counts().loads + done.prefetch.count["cancelled"] >= bound


# ---- what the prefetch seats name ----------------------------------------------------------------

WORLD = World(
    layers=3,
    experts=4,
    top_k=2,
    expert_bytes=np.full((1, 3), 10),
    capacity_bytes=(120,),
    scope="global",
)


def gate(
    event: int, layer: int, experts: Sequence[int], ahead: Sequence[Sequence[int]] = ()
) -> Gate:
    """A gate of one request whose experts all missed; ids within the layer."""
    tokens = max(1, len(ahead))
    source = LayerEvent(
        event=event,
        step=event // 3,
        layer=layer,
        slots=(Slot(0, 1, Phase.DECODE, 0, tokens),),
        token_experts=np.array([list(experts)] * tokens, np.uint16),
        ahead={1: np.array(ahead, np.uint16)} if ahead else {},
    )
    ids = np.array(experts, np.int64) + layer * 4
    ones = np.ones(len(ids), np.int64)
    return Gate(source, ids, ones, np.full(len(ids), Status.MISS, np.uint8), ones.astype(np.uint8))


def named(seat: PrefetchSeat, fact: Fact) -> list[tuple[int, int]]:
    """(expert, expiry) of a seat's wishes, in order."""
    view: CacheView = None  # type: ignore[assignment]
    return [(p.expert, p.expires) for p in seat.plan(fact, view).prefetches]


def test_next_gate_names_each_prediction_once_by_token_then_rank() -> None:
    seat = NextGate()
    seat.begin(WORLD)
    assert named(seat, gate(7, 0, [0, 1], [[3, 1], [1, 0]])) == [(7, 8), (5, 8), (4, 8)]
    assert named(seat, gate(9, 2, [0, 1], [[3, 1]])) == []
    narrow = NextGate(width=1)
    narrow.begin(WORLD)
    assert named(narrow, gate(7, 0, [0, 1], [[3, 1], [1, 0]])) == [(7, 8), (5, 8)]


def test_next_gate_cancels_what_its_gate_refutes() -> None:
    seat = NextGate(cancel=True)
    seat.begin(WORLD)
    seat.plan(gate(0, 0, [0, 1], [[3, 1]]), None)  # type: ignore[arg-type]
    assert seat.plan(gate(1, 1, [1, 2], [[0, 1]]), None).cancel == [7]  # type: ignore[arg-type]


def test_previous_token_names_the_next_layers_last_demand() -> None:
    seat = PreviousToken()
    seat.begin(WORLD)
    assert named(seat, gate(0, 0, [2, 1])) == []
    assert named(seat, gate(1, 1, [3, 0])) == []
    assert named(seat, gate(2, 2, [0, 1])) == [(2, 3), (1, 3)]
    assert named(seat, gate(3, 0, [0, 3])) == [(7, 4), (4, 4)]
    assert named(seat, gate(4, 1, [1, 2])) == [(8, 5), (9, 5)]
    assert named(seat, gate(5, 2, [1, 2])) == [(0, 6), (3, 6)]


def test_whole_layer_names_all_and_skips_the_encoder_after_the_last() -> None:
    seat = WholeLayer()
    seat.begin(replace(WORLD, decode_from=1))
    assert named(seat, gate(0, 0, [0, 1])) == [(4, 1), (5, 1), (6, 1), (7, 1)]
    assert named(seat, gate(2, 2, [0, 1])) == [(4, 3), (5, 3), (6, 3), (7, 3)]


def test_hot_set_names_the_most_used_ties_by_lowest_id() -> None:
    seat = HotSet(width=3)
    seat.begin(replace(WORLD, calibration=np.array([0, 0, 0, 0, 5, 9, 5, 5, 1, 2, 3, 4])))
    assert named(seat, gate(0, 0, [0, 1])) == [(5, 1), (4, 1), (6, 1)]
    assert named(seat, gate(1, 1, [0, 1])) == [(11, 2), (10, 2), (9, 2)]
    assert named(seat, gate(2, 2, [0, 1])) == [(0, 3), (1, 3), (2, 3)]


def test_look_ahead_names_what_comes_nearest_first() -> None:
    demands = [np.array(d) for d in ([0, 1], [4, 5], [8, 9], [2, 1])]
    for distance, expected in ((1, [(4, 1), (5, 1)]), (2, [(4, 1), (5, 1), (8, 2), (9, 2)])):
        seat = LookAhead(distance=distance)
        seat.begin(replace(WORLD, future=KnownFuture(demands, 12)))
        assert named(seat, gate(0, 0, [0, 1])) == expected
        assert named(seat, gate(3, 0, [2, 1])) == []


def test_look_ahead_keeps_to_the_nearest_need_of_an_expert() -> None:
    """Expert 1 is needed at 1 and at 3: wished once, for 1, so that 2 does not overtake it."""
    seat = LookAhead(distance=3)
    seat.begin(replace(WORLD, future=KnownFuture([np.array([e]) for e in (0, 1, 2, 1)], 12)))
    assert named(seat, gate(0, 0, [0, 0])) == [(1, 1), (2, 2)]


# ---- serving a miss ------------------------------------------------------------------------------


@dataclass
class Table:
    """A cost table of straight lines."""

    load: int
    device: int
    host: int

    def load_ns(self, nbytes: int) -> int:
        return self.load * nbytes

    def expert_ns(self, tokens: int, layer: int = 0) -> int:
        return self.device

    def cpu_expert_ns(self, tokens: int, layer: int = 0) -> int:
        return self.host * tokens


def test_fiddler_crosses_over_where_the_host_becomes_slower() -> None:
    """10 bytes at 3 and 5 on the device: 35. The host needs 7 a token: up to 5 tokens."""
    seat = Fiddler()
    seat.begin(replace(WORLD, costs=Table(load=3, device=5, host=7)))
    asked = gate(0, 1, [0, 1, 2, 3])
    asked = replace(
        asked,
        tokens=np.array([4, 5, 6, 1]),
        status=np.array([Status.MISS, Status.MISS, Status.MISS, Status.HIT], np.uint8),
    )
    assert set(seat.serve(asked, None)) == {4, 5}  # type: ignore[arg-type]


# ---- timelines by hand ---------------------------------------------------------------------------
# Two layers of three experts (ids 0 1 2 and 3 4 5); dense part 5 ns, expert 3 ns, 1 ns a byte.


@dataclass
class Scripted(PlainPolicy):
    """Answers given plans at given layer events; the oldest touch goes first."""

    plans: dict[int, Plan] = field(default_factory=dict)

    def begin(self, world: World) -> None:
        self.last = np.zeros(world.size, np.int64)

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        if not isinstance(fact, Gate):
            return Plan()
        self.last[fact.experts] = fact.event + 1
        return self.plans.get(fact.event, Plan())

    def scores(self, experts: IntArray, event: int) -> IntArray:
        return self.last[experts]


def timeline(
    events: Sequence[Sequence[Sequence[int]]],
    slots: int,
    plans: dict[int, Plan] | None = None,
    *,
    scope: str = "global",
    nbytes: int = 10,
    order: str = "ready",
    **costs: Any,
) -> Any:
    hardware = machine(chunk_bytes=5, dense_ns=5, expert_ns=3, **costs)
    options = Options(order=order, check=True, timeline=True)
    case = decode_case(events, 3, slots, hardware, scope=scope, nbytes=nbytes, options=options)
    return run(case, policy=Scripted(plans or {}))


def test_cold_start() -> None:
    done = timeline([[[0], [1]]], 6)
    assert done.lane("demand") == [(5, 15, 0), (23, 33, 4)]
    assert done.lane("expert") == [(15, 18, 0), (33, 36, 4)]
    assert done.lane("stall") == [(5, 15, -1), (23, 33, -1)]
    assert (done.tally.times.total(), done.tally.times.stall) == (36, 20)


def test_late_hit_waits_for_the_rest_of_its_load() -> None:
    done = timeline([[[0], [1]]], 6, {0: Plan([Prefetch(4, 1)])})
    assert done.lane("prefetch") == [(15, 20, 4)]
    assert done.lane("demand") == [(5, 15, 0), (20, 25, 4)]
    assert done.lane("expert") == [(15, 18, 0), (25, 28, 4)]
    assert done.tally.times.stall == 10 + 2
    assert done.tally.counts().late_hits == done.tally.prefetch.count["late"] == 1


def test_prefetch_too_early_is_evicted_unused() -> None:
    """One slot. Expert 5 takes it at 18, blocks demand until it has landed, and goes."""
    done = timeline([[[0], [1]], [[0], [1]]], 1, {0: Plan([Prefetch(5, 3)])})
    assert done.of("evict") == [("evict", t, k) for t, k in ((18, 0), (28, 5), (46, 4), (64, 0))]
    assert done.of("land") == [
        ("land", t, k) for t, k in ((15, 0), (28, 5), (38, 4), (56, 0), (74, 4))
    ]
    assert done.tally.prefetch.count["wasted"] == 1
    assert done.tally.times.total() == 77


def test_preempted_transfer_resumes_where_it_stopped() -> None:
    plans = {0: Plan([Prefetch(5, 3)])}
    done = timeline([[[0], [1]], [[0], [2]]], 6, plans, nbytes=20)
    assert done.lane("prefetch") == [(25, 30, 5), (30, 35, 5), (55, 60, 5), (60, 65, 5)]
    assert done.lane("demand") == [(5, 25, 0), (35, 55, 4)]
    assert done.tally.counts().hits == 2
    assert done.tally.prefetch.count["used"] == 1
    assert done.tally.times.total() == 74


def test_cancel_takes_effect_at_the_end_of_the_chunk() -> None:
    plans = {0: Plan([Prefetch(5, 3)]), 1: Plan(cancel=[5])}
    done = timeline([[[0], [1]], [[0], [2]]], 6, plans, nbytes=20)
    assert done.of("cancel") == [("cancel", 35, 5)]
    assert done.lane("prefetch") == [(25, 30, 5), (30, 35, 5)]
    assert done.tally.cancelled_bytes == done.tally.prefetch.nbytes["cancelled"] == 10
    assert done.lane("demand") == [(5, 25, 0), (35, 55, 4), (71, 91, 5)]
    assert done.tally.times.total() == 94


def test_a_demanded_transfer_cannot_be_cancelled() -> None:
    plans = {0: Plan([Prefetch(4, 1)]), 1: Plan(cancel=[4])}
    done = timeline([[[0], [1]]], 6, plans)
    assert done.tally.prefetch.count["cancelled"] == 0
    assert done.tally.times.total() == 28


@pytest.mark.parametrize("order", ["ready", "barrier"])
def test_an_overflowing_event_goes_in_waves(order: str) -> None:
    """One slot a layer, two experts each: load, compute, release, load, compute."""
    done = timeline([[[0, 1], [0, 1]]], 1, scope="layer", order=order)
    assert done.lane("demand") == [(5, 15, 0), (18, 28, 1), (36, 46, 3), (49, 59, 4)]
    assert done.lane("expert") == [(15, 18, 0), (28, 31, 1), (46, 49, 3), (59, 62, 4)]
    assert done.of("evict") == [("evict", 18, 0), ("evict", 49, 3)]
    assert (done.tally.overflows, done.tally.times.stall) == (2, 40)


def test_waves_spare_residents_until_they_have_computed() -> None:
    """Two slots hold 0 and 1; the event asks for 2, 1, 0: 1 computes first and goes first."""
    done = timeline([[[0, 1], [0]], [[2, 1, 0], [0]]], 2, scope="layer")
    gates = [r for r in done.of("gate") if r[2] == 2]
    assert gates[0][6:] == (2 * 4 + 2, 1 * 4, 0 * 4)
    second = gates[0][1]
    assert [r for r in done.of("evict") if r[2] < 3] == [("evict", second + 3, 1)]
    later = [s for s in done.lane("expert") if s[0] >= second][:3]
    assert later == [
        (second, second + 3, 1),
        (second + 3, second + 6, 0),
        (second + 13, second + 16, 2),
    ]


def test_a_bypassed_copy_is_staged_beside_the_capacity() -> None:
    hardware = machine(chunk_bytes=5, dense_ns=5, expert_ns=3)
    case = decode_case([[[0]], [[1]], [[0]]], 3, 1, hardware, nbytes=10)
    done = run(case, "min-bypass")
    assert done.lane("demand") == [(5, 15, 0), (23, 33, 1)]
    assert done.lane("expert") == [(15, 18, 0), (33, 36, 1), (41, 44, 0)]
    assert done.of("evict") == [("evict", 36, 1)]
    assert done.tally.peak_bytes == 20


def test_a_miss_on_the_host() -> None:
    """Expert 0 is resident and computes meanwhile; the lane then waits for the host."""
    hardware = machine(chunk_bytes=5, dense_ns=5, expert_ns=3, cpu_ns=7)
    case = decode_case([[[0, 1]]], 3, 1, hardware, nbytes=10)
    case = replace(case, initial="some", charged=False)
    done = run(case, "lru", "miss=cpu")
    assert done.lane("expert") == [(5, 8, 0)]
    assert done.lane("cpu") == [(5, 12, 1)]
    assert (done.tally.times.cpu_wait, done.tally.counts().loads) == (4, 0)
    assert done.tally.times.total() == 12


def test_infinite_bandwidth_leaves_no_stall() -> None:
    done = timeline([[[0], [1]], [[1], [2]]], 1, bytes_per_s=math.inf)
    assert done.tally.times.stall == 0
    assert done.tally.times.total() == 4 * (5 + 3)


def test_initial_state_is_charged_before_the_first_request() -> None:
    hardware = machine(chunk_bytes=5, dense_ns=5, expert_ns=3)
    case = replace(decode_case([[[0]]], 3, 2, hardware, nbytes=10), initial="all")
    done = run(case)
    assert (done.tally.times.initial, done.tally.initial_bytes) == (20, 20)
    assert done.lane("expert") == [(25, 28, 0)]


def test_a_batch_pays_padding_in_dense_time_only() -> None:
    """Two requests, of one and two tokens: two steps; the second asks for one expert only."""
    base = decode_case([[[0], [0]]], 3, 6, machine(dense_ns=5, expert_ns=3), scope="global")
    longer = decode_case([[[0], [0]], [[1], [1]]], 3, 6)
    second = replace(longer.requests[0], request=1)
    case = replace(base, requests=(base.requests[0], second), batch=2)
    tally = run(case).tally
    assert (tally.steps, tally.events, tally.counts().accesses) == (2, 4, 4)
    assert tally.times.dense == 4 * 5


def test_arrivals_leave_the_lane_idle() -> None:
    case = decode_case([[[0]]], 3, 1, machine(dense_ns=5, expert_ns=3), nbytes=10)
    first = replace(case.requests[0], facts=replace(case.requests[0].facts, arrival_ns=7))
    second = replace(first, request=1, facts=replace(first.facts, arrival_ns=100))
    tally = drive(*start(replace(case, requests=(first, second))))
    assert tally.times.idle == 7 + (100 - 7 - 18)
    assert [(r.arrival_ns, r.ttft_ns) for r in tally.requests] == [(7, 18), (100, 8)]
