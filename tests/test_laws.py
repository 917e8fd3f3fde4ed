"""The laws of ``tests/README.md``, over policies, seats, capacities, batches and chunks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Options
from moesim.errors import PolicyError, UsageError
from moesim.policy import CacheView, PlainPolicy, World
from moesim.profile import Constant, ConstantExpert, HardwareProfile
from moesim.replays import Request, replay
from moesim.traces.reader import RequestFacts
from moesim.traces.schema import TraceMeta
from moesim.traces.writer import TraceWriter
from moesim.types import (
    DROPPED,
    Fact,
    Gate,
    IntArray,
    Job,
    JobDone,
    Needs,
    Plan,
    Prefetch,
    RequestBegin,
    Serve,
    Status,
)
from moesim.workload import StaticBatch, layer_events, timeless_steps
from tests.harness import (
    drive,
    future_of,
    run,
    setup_of,
    spec_of,
    start,
    without_arrivals,
    works_of,
)
from tests.strategies import (
    BOUNDS,
    DEMAND_ONLY,
    KEEPS,
    LOSSLESS,
    MISSES,
    PREFETCHES,
    PRICED,
    RATES,
    Case,
    cases,
    decode_case,
    machine,
    rows_of,
    specs,
    trios,
)

Spec = tuple[str, tuple[str, ...]]

TIMELESS = [name for name in DEMAND_ONLY if name not in PRICED]
"""Demand-only policies whose decisions no duration enters."""


# ---- I1 to I5, I9, I10, I11: books, checked at every event of the clock by ``Watch`` -------------


@settings(max_examples=250)
@given(case=cases(), spec=specs())
def test_books_hold_at_every_event(case: Case, spec: Spec) -> None:
    """I3, I4, I5, I9 and I10 inside ``run``; I1, I2, I11 and the partition at its end."""
    done = run(case, spec[0], *spec[1])
    tally, total = done.tally, done.tally.counts()

    # I1, from the trace alone, not from what the engine judged.
    uses = future_of(case).counts if case.batch == 1 else None
    layers = Counter[int]()
    judged = Counter[int]()
    for _, _, _, layer, count, _, *words in done.of("gate"):
        layers[layer] += count
        judged.update(word % 4 for word in words)
    assert uses is None or layers == Counter(_by_layer(case, uses.tolist()))
    assert [total.hits, total.late_hits, total.misses] == [judged[s] for s in Status]
    assert total.accesses == total.hits + total.late_hits + total.misses == sum(layers.values())
    assert total.misses == sum(tally.served.values())

    # I2, by copies: what came is there, or went.
    landed = Counter(key for _, _, key in done.of("land"))
    assert total.loads == landed.total()
    assert (
        total.bytes_loaded + tally.initial_bytes
        == tally.evicted_bytes
        + tally.resident_bytes
        + tally.cancelled_bytes
        + tally.in_flight_bytes
    )
    sizes = case.model.expert_bytes_table().tolist()
    bytes_landed = sum(sizes[key // case.meta.experts] * n for key, n in landed.items())
    assert total.bytes_loaded == bytes_landed + tally.cancelled_bytes + tally.in_flight_bytes

    # The prefetch partition, in count and bytes.
    fates = tally.prefetch
    issued = [key for _, _, key, prefetch in done.of("issue") if prefetch]
    assert fates.issued == len(issued) == sum(fates.count.values())
    assert fates.planned == fates.issued + fates.overtaken + fates.dropped
    assert fates.count["cancelled"] == len(done.of("cancel"))
    assert fates.nbytes["cancelled"] == tally.cancelled_bytes

    # I11
    assert tally.times.total() == max(
        [r[1] for r in done.of("end")] + [t.end_ns for t in tally.requests]
    )


def _by_layer(case: Case, uses: list[int]) -> dict[int, int]:
    size = case.meta.experts
    sums = {la: sum(uses[la * size : (la + 1) * size]) for la in range(case.meta.layers)}
    return {la: n for la, n in sums.items() if n}


SEATS = trios(KEEPS, PREFETCHES, MISSES)


@pytest.mark.parametrize("number", range(6))
def test_every_seat_with_every_other(number: int) -> None:
    """Every two seats together, on waves, prefill, batches and chunks, under watch."""
    rng = np.random.default_rng(number)
    for keep, prefetch, miss in SEATS[number::6]:
        case = mixed_case(rng)
        run(case, "lru", f"keep={keep}", f"prefetch={prefetch}", f"miss={miss}")


def mixed_case(rng: np.random.Generator) -> Case:
    layers, experts, top_k = 2, 5, 2

    def pick() -> list[int]:
        return [int(e) for e in rng.permutation(experts)[:top_k]]

    requests = []
    for number in range(3):
        prompt = [(la, [pick() for _ in range(4)]) for la in range(layers)]
        passes = [prompt, *([(la, [pick()]) for la in range(layers)] for _ in range(3))]
        rows = sum(len(tokens) for blocks in passes for _, tokens in blocks)
        ahead = [pick() for _ in range(rows)]
        requests.append(rows_of(number, passes, prefill=True, ahead=ahead, wide=experts))
    base = decode_case([[[0, 1]] * layers], experts, 1)
    return replace(
        base,
        requests=tuple(requests),
        hardware=machine(
            bytes_per_s=RATES[int(rng.integers(len(RATES)))],
            chunk_bytes=int(rng.integers(0, 3)),
            dense_ns=3,
            expert_ns=int(rng.integers(0, 3)),
            plan_ns=int(rng.integers(0, 2)),
            cpu_ns=4,
        ),
        capacity_bytes=(int(rng.integers(1, 11)),),
        options=Options(
            order=["ready", "barrier"][int(rng.integers(2))], check=True, timeline=True
        ),
        batch=int(rng.integers(1, 4)),
        chunk_tokens=int(rng.integers(0, 4)),
    )


# ---- I6: determinism -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(case=cases(), spec=specs())
def test_i6_two_runs_are_equal(case: Case, spec: Spec) -> None:
    first, again = run(case, spec[0], *spec[1]), run(case, spec[0], *spec[1])
    assert asdict(first.tally) == asdict(again.tally)
    assert first.records == again.records
    assert first.spans == again.spans


@settings(max_examples=60)
@given(case=cases(), chosen=st.lists(specs(), min_size=2, max_size=4))
def test_i6_one_pass_for_many_is_each_alone(case: Case, chosen: list[Spec]) -> None:
    """Engines fed in turn, as replay feeds them, count what each counts alone."""
    started = [start(case, name, *sets) for name, sets in chosen]
    feeds = [list(works) for _, works in started]
    for index in range(len(case.requests)):
        for (engine, _), feed in zip(started, feeds, strict=True):
            engine.offer(feed[index])
            engine.advance()
    for engine, _ in started:
        engine.close()
        while not engine.advance():
            pass
    for (engine, _), (name, sets) in zip(started, chosen, strict=True):
        assert asdict(engine.tally) == asdict(drive(*start(case, name, *sets)))


@settings(max_examples=40)
@given(case=cases(), spec=specs())
def test_i6_feeding_early_or_late_is_equal(case: Case, spec: Spec) -> None:
    """Whether the engine starves between requests, or has all at once."""
    engine, works = start(case, spec[0], *spec[1])
    for work in works:
        engine.offer(work)
    engine.close()
    while not engine.advance():
        pass
    assert asdict(engine.tally) == asdict(drive(*start(case, spec[0], *spec[1])))


HASH_SEED_CODE = """
import json, sys
import numpy as np
sys.path.insert(0, {root!r})
from tests.test_laws import mixed_case
from tests.harness import drive, start
from tests.strategies import LOSSLESS
case = mixed_case(np.random.default_rng(0))
print(json.dumps([drive(*start(case, name)).log_digest for name in LOSSLESS]))
"""


def test_i6_hash_seed_changes_nothing() -> None:
    root = str(Path(__file__).resolve().parents[1])
    answers = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", HASH_SEED_CODE.format(root=root)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        answers.append(json.loads(done.stdout))
    assert answers[0] == answers[1]
    case = mixed_case(np.random.default_rng(0))
    assert answers[0] == [drive(*start(case, name)).log_digest for name in LOSSLESS]


# ---- I7: nothing undeclared, nothing from the future ---------------------------------------------


@dataclass
class Spy(PlainPolicy):
    """Declares nothing, and keeps what it is shown."""

    world: World | None = None
    facts: list[Fact] = field(default_factory=list)

    def begin(self, world: World) -> None:
        self.world = world

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        self.facts.append(fact)
        assert not cache.states.flags.writeable
        assert not cache.candidates
        return Plan()


@settings(max_examples=30)
@given(case=cases())
def test_i7_what_was_not_declared_is_absent(case: Case) -> None:
    spy = Spy()
    run(case, policy=spy)
    assert spy.world is not None
    assert (spy.world.costs, spy.world.calibration, spy.world.future) == (None, None, None)
    for fact in spy.facts:
        if isinstance(fact, Gate):
            source = fact.source
            assert (source.weights, source.gate, source.norms, dict(source.ahead)) == (
                None,
                None,
                None,
                {},
            )


def test_i7_embedding_is_absent_unless_declared() -> None:
    """Another policy of the same pass may have had the column decoded."""
    case = decode_case([[[0]]], 2, 1)
    vector = np.ones(4, np.float16)
    rows = replace(
        case.requests[0],
        facts=RequestFacts(prompt_embedding=vector),
        embedding={1: vector},
    )
    spy = Spy()
    run(replace(case, requests=(rows,)), policy=spy)
    shown = [f.embedding for f in spy.facts if hasattr(f, "embedding")]
    assert shown and all(vector is None for vector in shown)


@settings(max_examples=80)
@given(
    case=cases(arrivals=False, max_passes=5),
    spec=specs([name for name in LOSSLESS if name not in BOUNDS]),
    data=st.data(),
)
def test_i7_prefix(case: Case, spec: Spec, data: st.DataObject) -> None:
    """What a policy does before the rows from some layer event on are known cannot depend on them.

    Every row of a later event is replaced; log, times and answers until its gate stay.
    """
    if spec_of(spec[0], *spec[1]).build().needs & (Needs.FUTURE | Needs.CALIBRATION):
        return
    # What is resident at the start is a fact of the configuration, not of the trace.
    case = replace(case, initial="some", chunk_tokens=0)
    events = future_of(case).events
    cut = data.draw(st.integers(0, events - 1))
    first, second = run(case, spec[0], *spec[1]), run(_poisoned(case, cut), spec[0], *spec[1])
    assert _until(first.records, cut) == _until(second.records, cut)
    assert [a for a in first.answers if a[0] < cut] == [a for a in second.answers if a[0] < cut]


def _until(records: list[tuple[object, ...]], event: int) -> list[tuple[object, ...]]:
    """The log before the gate of an event."""
    for place, record in enumerate(records):
        if record[0] == "gate" and record[2] == event:
            return records[:place]
    return records


def _poisoned(case: Case, cut: int) -> Case:
    """Reverse the expert ids of all that layer event ``cut`` and later ones serve."""
    made = [replace(rows, experts=rows.experts.copy()) for rows in case.requests]
    by_number = {rows.request: rows for rows in made}
    event = 0
    for step in timeless_steps(works_of(case), StaticBatch(case.batch)):
        for item in layer_events(step, event, case.meta.experts):
            for slot in item.event.slots if event >= cut else ():
                rows = by_number[slot.request]
                served = (rows.iteration == slot.iteration) & (rows.layer == item.event.layer)
                known = rows.experts[served]
                turned = case.meta.experts - 1 - known
                rows.experts[served] = np.where(known == DROPPED, DROPPED, turned)
            event += 1
    return replace(case, requests=tuple(made))


# ---- more laws -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(case=cases(), spec=specs(), k=st.sampled_from([2, 3, 10]))
def test_all_times_k_fold_is_the_result_k_fold(case: Case, spec: Spec, k: int) -> None:
    # A rate in operations a second is exact for some k alone: here policies think in no time.
    host = replace(case.hardware.host, policy_ops_per_s=np.inf, policy_bytes_per_s=np.inf)
    case = replace(case, hardware=replace(case.hardware, host=host))
    slow = _slower(case, k)
    quick_run, slow_run = run(case, spec[0], *spec[1]), run(slow, spec[0], *spec[1])
    assert _untimed(quick_run.records) == _untimed(slow_run.records)
    assert [r[1] * k for r in quick_run.records] == [r[1] for r in slow_run.records]
    times = asdict(quick_run.tally.times)
    assert {name: ns * k for name, ns in times.items()} == asdict(slow_run.tally.times)


def _slower(case: Case, k: int) -> Case:
    hardware = case.hardware
    compute, host, link = hardware.compute, hardware.host, hardware.link
    assert isinstance(compute, Constant) and isinstance(host.cpu, ConstantExpert)
    # A rate of 1e9 / n bytes a second is exact only for some n; a curve is for all.
    per_byte = 0 if np.isinf(link.bytes_per_s) else round(1e9 / link.bytes_per_s)
    most = 1 << 10
    made = replace(
        hardware,
        link=replace(
            link,
            latency_ns=link.latency_ns * k,
            curve=((most, (link.latency_ns + per_byte * most) * k),),
        ),
        compute=Constant(compute.dense_ns * k, compute.expert_ns * k),
        host=replace(
            host,
            sync_ns=host.sync_ns * k,
            plan_ns=host.plan_ns * k,
            cpu=ConstantExpert(host.cpu.expert_ns * k),
        ),
    )
    requests = [
        replace(r, facts=replace(r.facts, arrival_ns=r.facts.arrival_ns * k))
        if r.facts.arrival_ns is not None
        else r
        for r in case.requests
    ]
    return replace(case, hardware=made, requests=tuple(requests))


def _untimed(records: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    return [(r[0], *r[2:]) for r in records]


@settings(max_examples=60)
@given(case=cases(), spec=specs(), data=st.data())
def test_order_preserving_relabelling_changes_nothing(
    case: Case, spec: Spec, data: st.DataObject
) -> None:
    """New ids in the same order, with unused experts between: the same counts and times."""
    made = spec_of(spec[0], *spec[1]).build()
    seats = {seat.name for seat in made.seats}  # type: ignore[attr-defined]
    if seats & {"random", "whole-layer", "hot-set"} or case.initial:
        return
    if made.needs & (Needs.GATE | Needs.NORMS | Needs.PAST):
        # Gates have a number for every expert, the unused ones too.
        return
    old = case.meta.experts
    new = old + data.draw(st.integers(1, 3))
    ids = np.sort(data.draw(st.permutations(range(new)).map(lambda p: p[:old])))
    table = np.full(DROPPED + 1, DROPPED, np.uint16)
    table[:old] = ids
    requests = [
        replace(r, experts=table[r.experts], ahead={d: table[a] for d, a in r.ahead.items()})
        for r in case.requests
    ]
    model = replace(case.model, experts=new)
    wider = replace(case, meta=replace(case.meta, model=model), requests=tuple(requests))
    first, second = run(case, spec[0], *spec[1]), run(wider, spec[0], *spec[1])
    first.tally.log_digest = second.tally.log_digest = ""
    first.tally.decision_digest = second.tally.decision_digest = ""
    assert asdict(first.tally) == asdict(second.tally)


@settings(max_examples=60)
@given(case=cases(), name=st.sampled_from([n for n in TIMELESS if n != "cpu"]))
def test_room_for_everything_leaves_compulsory_misses(case: Case, name: str) -> None:
    sizes = case.model.expert_bytes_table().tolist()
    everything = sum(max(sizes) for _ in sizes) * case.meta.experts
    roomy = replace(case, capacity_bytes=(everything,), initial="cold")
    uses = future_of(roomy).counts
    tally = run(roomy, name).tally
    assert tally.counts().misses == np.count_nonzero(uses)
    assert tally.evictions == 0


@settings(max_examples=80)
@given(case=cases(arrivals=False), name=st.sampled_from(TIMELESS), data=st.data())
def test_decisions_without_prefetch_are_free_of_time(
    case: Case, name: str, data: st.DataObject
) -> None:
    """Loads, victims and statuses do not depend on the machine, waves included."""
    other = replace(case, hardware=data.draw(cases()).hardware)
    other = replace(other, options=replace(case.options, order="barrier"))
    first, second = run(case, name).tally, run(other, name).tally
    assert first.decision_digest == second.decision_digest
    assert asdict(first.counts()) == asdict(second.counts())


@settings(max_examples=80)
@given(case=cases(), name=st.sampled_from(TIMELESS))
def test_more_bandwidth_never_costs_time(case: Case, name: str) -> None:
    case = without_arrivals(case)
    times = []
    for rate in sorted(RATES):
        link = replace(case.hardware.link, bytes_per_s=rate)
        faster = replace(case, hardware=replace(case.hardware, link=link))
        times.append(run(faster, name).tally.times.total())
    assert times == sorted(times, reverse=True)


@settings(max_examples=60)
@given(case=cases(equal=True, single=True, fits=True))
def test_lru_inclusion(case: Case) -> None:
    """At every gate a larger LRU holds all that a smaller one holds (batch 1, union fits)."""
    nbytes = int(case.model.expert_bytes_table()[0])
    held = []
    for slots in range(case.meta.top_k, case.meta.experts + 1):
        sized = replace(
            case,
            capacity_bytes=tuple(slots * nbytes for _ in case.capacity_bytes),
            options=Options(),
            initial="cold",
        )
        held.append(_held_at_gates(sized))
    for small, large in pairwise(held):
        assert all(a <= b for a, b in zip(small, large, strict=True))


def _held_at_gates(case: Case) -> list[set[int]]:
    engine, works = start(case, "lru")
    seen: list[set[int]] = []
    inner = engine.policy.on

    class Peek(Spy):
        def on(self, fact: Fact, cache: CacheView) -> Plan:
            if isinstance(fact, Gate):
                seen.append(set(np.flatnonzero(cache.states == 3).tolist()))
            return inner(fact, cache)

        def __getattr__(self, name: str) -> object:
            return getattr(engine.setup.policy, name)

    peek = Peek()
    peek.scores = engine.setup.policy.scores  # type: ignore[method-assign]
    peek.note = engine.setup.policy.note  # type: ignore[method-assign]
    engine.answers.policy = peek
    drive(engine, works)
    return seen


@settings(max_examples=60)
@given(case=cases(dropped=False), name=st.sampled_from(TIMELESS))
def test_phases_partition_the_totals(case: Case, name: str) -> None:
    """Each access belongs to the phase of the first token that chose it."""
    done = run(case, name)
    prefill = {0: 0, 1: 0}
    for counts in zip(done.tally.phases, strict=True):
        prefill[0] += counts[0].accesses
    assert prefill[0] == done.tally.counts().accesses
    if all((rows.phase == 1).all() for rows in case.requests):
        assert done.tally.phases[0].accesses == 0


# ---- plans that no shipped policy makes ----------------------------------------------------------


@dataclass
class Scripted(PlainPolicy):
    """Answers given plans at given layer events (-1: before the first); keeps the highest ids.

    ``after_job``: the plans for a job's result, by the newest layer event.
    """

    at_gate: dict[int, Plan] = field(default_factory=dict)
    after_job: dict[int, Plan] = field(default_factory=dict)

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        if isinstance(fact, Gate):
            return self.at_gate.get(fact.event, Plan())
        if isinstance(fact, RequestBegin):
            return self.at_gate.get(-1, Plan())
        return self.after_job.get(fact.event, Plan()) if isinstance(fact, JobDone) else Plan()

    def scores(self, experts: IntArray, event: int) -> IntArray:
        return experts.copy()


@settings(max_examples=100)
@given(case=cases(arrivals=False), data=st.data())
def test_any_legal_plan_keeps_the_books(case: Case, data: st.DataObject) -> None:
    """Prefetches with any priority and expiry, cancels, swaps, jobs: the laws hold for them all."""
    events, size = future_of(case).events, case.meta.layers * case.meta.experts
    expert, priority = st.integers(0, size - 1), st.integers(-1, 1)
    wish = st.tuples(expert, st.integers(1, 4), priority)
    prefetches = st.lists(wish, max_size=3)
    work = st.lists(st.builds(Job, st.sampled_from([0, 1, 2, 5, 30]), st.just(0)), max_size=2)
    answer = st.builds(
        lambda wishes, cancel, again, jobs, ops: (wishes, Plan((), cancel, again, {}, jobs, ops)),
        prefetches,
        st.lists(expert, max_size=2),
        st.lists(st.tuples(expert, priority), max_size=1),
        work,
        st.integers(0, 3),
    )

    def plans(jobs: bool) -> dict[int, Plan]:
        drawn = data.draw(st.lists(answer, min_size=1, max_size=5))
        made = {}
        for event in range(-1, events):
            wishes, plan = drawn[event % len(drawn)]
            named = [Prefetch(e, event + ahead, p) for e, ahead, p in wishes]
            made[event] = replace(plan, prefetches=named, jobs=plan.jobs if jobs else ())
        return made

    run(case, policy=Scripted(plans(True), plans(False)))


def one_layer(demands: list[list[int]], slots: int, hardware: HardwareProfile) -> Case:
    """A decoding case of one layer: what each token asks for."""
    return decode_case([[experts] for experts in demands], 6, slots, hardware)


def test_i7_engine_restricts_the_world() -> None:
    """Even a world that holds more than was declared."""
    spy = Spy()
    ReferenceEngine(setup_of(one_layer([[0]], 1, machine()), spy))
    assert spy.world is not None and spy.world.costs is None


def test_i10_a_hold_that_ends_at_a_gate_frees_the_link_there() -> None:
    """Event 0 wishes expert 1 for event 1 and, in vain (one slot), expert 2 for event 2. At gate 1
    the hold on 1 ends: 2 goes at once, not when the plan is paid."""
    plan = Plan([Prefetch(1, 1), Prefetch(2, 2)])
    hardware = machine(latency_ns=1, bytes_per_s=math.inf, dense_ns=50, plan_ns=20)
    run(one_layer([[0], [0], [2]], 1, hardware), policy=Scripted({0: plan}))


def test_i10_a_host_expert_that_computed_may_make_room() -> None:
    """Expert 0 computes on the host while a prefetch brings it in; then it may go for expert 1."""

    class OnHost(Scripted):
        def on(self, fact: Fact, cache: CacheView) -> Plan:
            plan = super().on(fact, cache)
            missing = fact.experts.tolist() if isinstance(fact, Gate) else []
            return replace(plan, serve=dict.fromkeys(missing, Serve.CPU))

    plan = Plan([Prefetch(0, 5)], jobs=[Job(20, 0)])
    urgent = Plan([Prefetch(2, 5, 1)])
    hardware = machine(latency_ns=1, bytes_per_s=math.inf, cpu_ns=50, dense_ns=100, workers=2)
    case = decode_case([[[0], [3]]], 6, 1, hardware, scope="global")
    run(case, policy=OnHost({0: plan}, {0: urgent}))


def test_a_job_result_may_wish_for_what_the_gate_just_missed() -> None:
    """The result arrives while the plan of gate 1 is paid for; expert 1 is already demanded."""
    hardware = machine(dense_ns=10, plan_ns=10)
    policy = Scripted({0: Plan(jobs=[Job(16, 0)])}, {1: Plan([Prefetch(1, 3)])})
    tally = run(one_layer([[0], [1]], 2, hardware), policy=policy).tally
    assert tally.counts().loads == 2


def test_a_wish_takes_back_its_cancellation() -> None:
    """Cancelled while a chunk moves and wished again before it ends: the copy arrives."""
    hardware = machine(chunk_bytes=50, dense_ns=10)
    wish = Plan([Prefetch(1, 9)])
    again = Plan([Prefetch(1, 9)], cancel=[1])
    case = decode_case([[[0]], [[0]], [[0]], [[1]]], 2, 2, hardware, nbytes=100)
    tally = run(case, policy=Scripted({0: wish, 1: again})).tally
    assert tally.counts().misses + tally.counts().late_hits == 2
    assert tally.prefetch.count["cancelled"] == 0


@pytest.mark.parametrize("replaces", [4, 99], ids=["another cache", "no expert"])
def test_a_swap_that_makes_no_room_is_no_crash(replaces: int) -> None:
    """A swap names its victim; a victim elsewhere is a policy's mistake, or ignored."""
    hardware = machine(dense_ns=3, expert_ns=3)
    case = decode_case([[[0], [1]], [[0], [1]]], 3, 1, hardware)
    policy = Scripted({1: Plan([Prefetch(2, 9, replaces=replaces)])})
    with contextlib.suppress(PolicyError):
        run(case, policy=policy)


def test_barrier_waits_after_an_overflow_too() -> None:
    """Event 0 goes in waves of two slots; event 1 fits, so its hit waits for its miss."""
    options = Options(order="barrier", check=True, timeline=True)
    hardware = machine(latency_ns=10, bytes_per_s=math.inf, expert_ns=30)
    done = run(decode_case([[[0, 1, 2, 3]], [[3, 0]]], 4, 2, hardware, options=options))
    gate = done.of("gate")[1]
    assert [word % 4 for word in gate[6:]] == [Status.HIT, Status.MISS]
    landed = done.of("land")[-1][1]
    assert all(begin >= landed for begin, _, _ in done.lane("expert") if begin >= gate[1])


def test_barrier_is_lifted_by_overflow_alone() -> None:
    """Demand that waits for a prefetch's reservation still is a barrier: nothing overflows."""
    options = Options(order="barrier", check=True, timeline=True)
    hardware = machine(chunk_bytes=10, dense_ns=5, expert_ns=3)
    case = decode_case([[[0]], [[0, 1]]], 3, 2, hardware, options=options, nbytes=100)
    done = run(case, policy=Scripted({0: Plan([Prefetch(2, 9)])}))
    gate, landed = done.of("gate")[1][1], done.of("land")[-1][1]
    assert all(begin >= landed for begin, _, _ in done.lane("expert") if begin >= gate)


def test_a_plan_for_what_is_demanded_does_not_touch_recency() -> None:
    """Recency is demand order, then prefetches. A wish for an expert of the same gate is no
    prefetch, whether it was there or not: else LRU would depend on its capacity."""
    touched = []
    for slots in (2, 6):
        engine, works = start(
            one_layer([[0, 1], [1, 2], [0, 1]], slots, machine()), "lru", "prefetch=previous-token"
        )
        drive(engine, works)
        score = engine.setup.policy.scores(np.arange(3), 3)
        touched.append(np.argsort(score).tolist())
    assert touched == [[2, 0, 1]] * 2


def test_requests_know_their_stall_and_misses() -> None:
    """Batch 1: what the requests report adds up to what the run reports."""
    hardware = machine(latency_ns=10, expert_ns=1)
    tally = run(one_layer([[0], [1], [0]], 1, hardware)).tally
    assert sum(r.misses for r in tally.requests) == tally.counts().misses == 3
    assert sum(r.stall_ns for r in tally.requests) == tally.times.stall


# ---- what replay gives an engine -----------------------------------------------------------------


@pytest.fixture
def two_sizes(tmp_path: Path) -> Path:
    """A trace on disk: layer 0's experts have 1 byte, layer 1's have 4; an arrival is recorded."""
    case = decode_case([[[0], [0]], [[1], [1]]], 3, 1)
    model = replace(case.model, expert_bytes=((1, 4),))
    facts = RequestFacts(arrival_ns=5)
    path = tmp_path / "t.parquet"
    with TraceWriter(path, TraceMeta(model=model)) as writer:
        writer.write_request(replace(case.requests[0], ahead={}, facts=facts))
    return path


def test_i3_an_initial_state_fits_a_bank_of_slots(two_sizes: Path) -> None:
    """Nine bytes are two slots of four, whatever the experts weigh."""
    options = Options(allocator="slots", check=True)
    request = Request(two_sizes, machine(), ("static",), ("9B",), options=options, initial="static")
    assert replay(request)["runs"][0]["accesses"] == 4


def test_a_calibrated_policy_runs_with_arrivals(two_sizes: Path) -> None:
    """How often an expert was used does not depend on when: ``static`` needs no FUTURE."""
    request = Request(two_sizes, machine(), ("lru", "static"), ("100%",), arrivals="recorded")
    runs = replay(request)["runs"]
    assert [run.get("not_run") for run in runs] == [None, None]


# ---- the KV cache takes its bytes ----------------------------------------------------------------


@settings(max_examples=80)
@given(case=cases(), spec=specs())
def test_i3_while_the_capacity_shrinks(case: Case, spec: Spec) -> None:
    """With ``share_kv``: what the KV cache takes is free when it takes it."""
    positions = sum(int(r.position.max()) + 1 for r in case.requests)
    taken = positions * case.meta.layers
    roomy = tuple(max(case.booked()) + taken for _ in case.capacity_bytes)
    options = replace(case.options, share_kv=True)
    run(replace(case, capacity_bytes=roomy, options=options), spec[0], *spec[1])


def test_i3_prefetches_under_way_give_way_to_the_kv_cache() -> None:
    """Two prefetches of 10 bytes are under way, 23 bytes less one a token: 19 are left at last."""
    hardware = machine(chunk_bytes=1, bytes_per_s=1e8, dense_ns=15)
    options = Options(check=True, timeline=True, share_kv=True)
    case = decode_case([[[]], [[]], [[]], [[0]]], 3, 2, hardware, options=options, nbytes=10)
    case = replace(case, capacity_bytes=(23,))
    plans = {0: Plan([Prefetch(1, 9)]), 1: Plan([Prefetch(2, 9, priority=1)])}
    run(case, policy=Scripted(plans))


def test_kv_share_leaves_room_for_the_largest_expert() -> None:
    """Layer 0's experts have 1 byte, layer 1's have 4: three bytes left are too few."""
    options = Options(share_kv=True)
    case = decode_case([[[0], [0]], [[0], [0]]], 2, 2, options=options, scope="global")
    model = replace(case.model, expert_bytes=((1, 4),))
    case = replace(case, meta=replace(case.meta, model=model), capacity_bytes=(7,))
    with pytest.raises(UsageError, match="--kv share"):
        run(case)
