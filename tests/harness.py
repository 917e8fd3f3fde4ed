"""Runs the reference engine on a case without files, and watches it from outside.

``Watch`` keeps its own books from the calls it sees (what was reserved, landed, evicted, demanded)
and asserts the laws at every event of the clock, so that an engine cannot be right by its own word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from moesim import log
from moesim.costs import make_costs
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Dram, Setup
from moesim.past import Past, past_facts
from moesim.policy import Policy, SeatPolicy, World
from moesim.protocol import initially
from moesim.registry import PolicySpec, resolve
from moesim.shape import all_precisions, expert_norms
from moesim.shape import fitting as fitting_world
from moesim.tally import Tally
from moesim.types import Needs, Plan, State
from moesim.workload import (
    Inputs,
    KnownFuture,
    StaticBatch,
    Work,
    flat_events,
    layer_events,
    prepare,
    timeless_steps,
)
from tests.strategies import Case, choices, rows_of

NAMES = {getattr(log, n): n.lower() for n in ("GATE", "END", "ISSUE", "LAND", "EVICT", "DROP")}
NAMES |= {log.CANCEL: "cancel", log.SERVED: "served", log.READ: "read", log.FORGET: "forget"}

Record = tuple[Any, ...]
"""(what, when_ns, words...), as the engine logged it."""


# ---- building ------------------------------------------------------------------------------------


PLAIN = Inputs()


def works_of(case: Case, inputs: Inputs = PLAIN, arrivals: bool = True) -> Iterator[Work]:
    """The requests of a case, prepared."""
    for index, rows in enumerate(case.requests):
        work = prepare(index, rows, case.meta, inputs)
        if not arrivals:
            work.arrival_ns = None
        yield work


def future_of(case: Case) -> KnownFuture:
    """The demand of the whole run; arrivals are left out."""
    scheduler = StaticBatch(case.batch, case.chunk_tokens)
    cut = flat_events if case.options.flat else layer_events
    demands = [
        item.demand.experts
        for step in timeless_steps(works_of(case, arrivals=False), scheduler)
        for item in cut(step, 0, case.meta.experts)
    ]
    return KnownFuture(demands, case.meta.layers * case.meta.experts)


def past_of(case: Case, inputs: Inputs) -> Past:
    """Its past, or else a request that is none of the case's, whatever they are."""
    meta = case.meta
    if case.past:
        before = replace(case, requests=case.past)
        return lambda: past_facts(works_of(before, inputs, arrivals=False), meta.experts)
    layers = range(meta.stack_ranges()[-1][1], meta.layers)
    ways = choices(meta.experts, meta.top_k)
    passes = [[(la, [ways[(5 * la + 3 * step) % len(ways)]]) for la in layers] for step in range(3)]
    ahead = [ways[row % len(ways)] for row in range(3 * len(layers))]
    rows = rows_of(97, passes, ahead=ahead, wide=meta.experts)
    for known in case.requests[0].embedding.values():
        # Embeddings of one trace have one length.
        resized = {i: np.resize(vector, len(known)) for i, vector in rows.embedding.items()}
        rows = replace(rows, embedding=resized)
    return lambda: past_facts([prepare(0, rows, meta, inputs)], meta.experts)


def inputs_of(policy: Policy) -> Inputs:
    """What a policy reads from the trace."""
    distances = policy.prefetch.distances if isinstance(policy, SeatPolicy) else (1,)
    return Inputs(policy.needs, distances)


def fitting(case: Case, experts: Sequence[int]) -> list[int]:
    """As many of these experts as fit, in order."""
    if case.owners:
        return fitting_world(experts, world_of(case), case.options.allocator)
    left, booked = list(case.capacity_bytes), case.booked()
    chosen = []
    for expert in experts:
        layer = expert // case.meta.experts
        cache = layer if case.scope == "layer" else 0
        if booked[layer] <= left[cache]:
            left[cache] -= booked[layer]
            chosen.append(expert)
    return chosen


def world_of(case: Case) -> World:
    """The shape of a case's world."""
    return World(
        layers=case.meta.layers,
        experts=case.meta.experts,
        top_k=case.meta.top_k,
        expert_bytes=all_precisions(case.model),
        capacity_bytes=case.capacity_bytes,
        scope="layer" if case.meta.layers == 1 and not case.owners else case.scope,
        decode_from=case.meta.stack_ranges()[-1][1],
        seed=case.seed,
        expert_norms=expert_norms(case.meta),
        expert_parts=case.meta.expert_parts,
        owners=np.array(case.owners) if case.owners else None,
    )


def setup_of(case: Case, policy: Policy, initial: str = "cold") -> Setup:
    """A configuration as ``moesim.replays`` would make it."""
    future = future_of(case)
    size = case.meta.layers * case.meta.experts
    costs = make_costs(case.model, case.hardware)
    world = replace(
        world_of(case),
        costs=costs,
        calibration=future.counts if Needs.CALIBRATION in policy.needs else None,
        past=past_of(case, inputs_of(policy)) if Needs.PAST in policy.needs else None,
        future=future if Needs.FUTURE in policy.needs else None,
    )
    hottest = [int(e) for e in np.argsort(-future.counts, kind="stable") if future.counts[e]]
    order = {"cold": [], "static": hottest, "some": list(range(0, size, 2))}
    order["policy"] = list(initially(policy, world))
    chosen = order.get(case.initial or initial, list(range(size)))
    return Setup(
        policy=policy,
        world=world,
        costs=costs,
        scheduler=StaticBatch(case.batch, case.chunk_tokens),
        options=case.options,
        initial=fitting(case, chosen),
        initial_charged=case.charged,
        kv_bytes_per_token=int(case.model.kv_bytes_table().sum()),
        dram=dram_of(case),
    )


def dram_of(case: Case) -> Dram | None:
    """Host memory with the first copies that fit."""
    if not case.dram_bytes:
        return None
    left, chosen = case.dram_bytes, []
    sizes = all_precisions(case.model).repeat(case.meta.experts).tolist()
    for key, nbytes in enumerate(sizes):
        if nbytes <= left:
            chosen.append(key)
            left -= nbytes
    return Dram(case.dram_bytes, chosen)


def drive(engine: ReferenceEngine, works: Iterator[Work]) -> Tally:
    """Feed and run to the end."""
    for work in works:
        engine.offer(work)
        engine.advance()
    engine.close()
    while not engine.advance():
        pass
    return engine.tally


# ---- running -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """A finished run: its tally, the log, the spans of the lanes, what the policy answered."""

    tally: Tally
    records: list[Record]
    spans: list[tuple[str, int, int, int]]
    answers: list[tuple[int, str]]

    def of(self, what: str) -> list[Record]:
        """The records of one kind."""
        return [r for r in self.records if r[0] == what]

    def lane(self, *names: str) -> list[tuple[int, int, int]]:
        """(start, end, key) of the spans of some lanes, in order of their end."""
        return [s[1:] for s in self.spans if s[0] in names]


def run(case: Case, name: str = "lru", *settings: str, policy: Policy | None = None) -> Run:
    """Run one policy under watch. A policy that sees the future has no arrivals."""
    engine, works = start(case, name, *settings, policy=policy)
    watch = Watch(engine, case)
    tally = drive(engine, works)
    return watch.finished(tally)


def start(
    case: Case, name: str = "lru", *settings: str, policy: Policy | None = None
) -> tuple[ReferenceEngine, Iterator[Work]]:
    """An engine and what to feed it."""
    spec = spec_of(name, *settings)
    made = spec.build() if policy is None else policy
    engine = ReferenceEngine(setup_of(case, made, spec.initial))
    arrivals = Needs.FUTURE not in made.needs
    return engine, works_of(case, inputs_of(made), arrivals)


@cache
def spec_of(name: str, *settings: str) -> PolicySpec:
    """A policy by name, with its seats swapped. Looking for installed ones takes long."""
    return resolve([name], settings)[0]


def without_arrivals(case: Case) -> Case:
    """Requests that are there from the start."""
    facts = [replace(r.facts, arrival_ns=None) for r in case.requests]
    made = [replace(r, facts=f) for r, f in zip(case.requests, facts, strict=True)]
    return replace(case, requests=tuple(made))


# ---- watching ------------------------------------------------------------------------------------


class Watch:
    """Asserts laws I3, I4, I5, I9 and I10 while an engine runs."""

    def __init__(self, engine: ReferenceEngine, case: Case) -> None:
        self.engine = engine
        self.case = case
        precisions = range(len(case.model.precisions))
        self.booked = [n for p in precisions for n in case.booked(p)]
        """By (precision, layer)."""
        self.records: list[Record] = []
        self.answers: list[tuple[int, str]] = []
        self._uncomputed: set[int] = set()
        self._wrap(engine.clock, "step", self._step)
        self._wrap(engine.link.log, "add", self._log)
        self._wrap(engine.ledger, "evict", self._evict)
        self._wrap(engine, "_run_expert", self._run_expert)
        self._wrap(engine.host, "_expert_done", self._computed)
        engine.answers.policy = Recorder(engine.policy, self.answers)

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args: wrapper(inner, *args))

    def _step(self, inner: Callable[[], None]) -> None:
        clock, before = self.engine.clock, self.engine.clock.now
        idle, rests = self._idle(), self._drive_rests()
        inner()
        assert clock.now >= before, "I5: the clock goes back"
        assert clock.now == before or not idle, f"I10: the link rests from {before} on, and {idle}"
        assert clock.now == before or not rests, f"I10: the drive rests from {before} on: {rests}"
        self._capacity()
        self._shelf()

    def _shelf(self) -> None:
        """I3 and I9 of host memory: what it holds fits, and what is read from it is there."""
        tier = self.engine.drive
        if tier is None:
            return
        held = sum(self.engine.ledger.copy_bytes[key] for key in tier.sent)
        assert held == tier.used <= tier.capacity, "I3: host memory is over its room"
        moving = [key for key, t in self.engine.link.flying.items() if self._moves(t)]
        needed = {*tier.pins, *moving}
        assert all(tier.has(key) for key in needed), "I9: a copy left host memory while it was read"
        assert set(moving) <= set(tier.pins), "I9: the link reads what nothing pins"

    def _moves(self, transfer: Any) -> bool:
        return bool(transfer.sent < len(transfer.ends))

    def _drive_rests(self) -> str:
        """I10 of the drive: what a resting one may read; empty if nothing."""
        tier, link = self.engine.drive, self.engine.link
        if tier is None or tier._asleep is None:
            return ""
        wished = [k for k, t in link._prefetch.items() if not t.issued]
        for kept, keys in (({*tier.waiting}, [*tier.waiting]), ({*tier.waiting, *wished}, wished)):
            for key in keys:
                if tier.has(key):
                    continue
                if key in tier.sent:
                    return f"{key} is half read"
                sizes = self.engine.ledger.copy_bytes
                freed = sum(sizes[k] for k in tier.sent if k not in kept and k not in tier.pins)
                if tier.capacity - tier.used + freed >= sizes[key]:
                    return f"{key} has room"
        return ""

    def _capacity(self) -> None:
        """I3: reserved and resident bytes, counted here, fit."""
        ledger, case = self.engine.ledger, self.case
        staged = {k for k, t in self.engine.link.flying.items() if t.staged}
        held = [0] * len(ledger.capacity)
        for key in np.flatnonzero(ledger.state >= 2).tolist():
            if key not in staged:
                held[self._cache(key)] += self.booked[key // self.case.meta.experts]
        assert held == ledger.used, "I3: the ledger's books are wrong"
        over = [h > c for h, c in zip(held, ledger.capacity, strict=True)]
        assert not any(over), f"I3: {held} bytes held of {ledger.capacity}"
        assert len(staged) <= case.meta.top_k, "rule 8: more staged than k"

    def _idle(self) -> str:
        """I10: what a resting link may send; empty if nothing."""
        link = self.engine.link
        if link._in_service is not None:
            return ""
        if link._demand and self._demand_fits(link._demand[0]):
            return "a demand has room"
        for transfer in link._prefetch.values():
            if transfer.issued:
                return "a prefetch is under way"
            if link.tier is not None and not link.tier.has(transfer.key):
                continue
            if self._prefetch_fits(transfer):
                return "a prefetch has room"
        return ""

    def _demand_fits(self, transfer: Any) -> bool:
        ledger, link = self.engine.ledger, self.engine.link
        if transfer.staged:
            return sum(t.staged for t in link.flying.values()) < self.case.meta.top_k
        return self._room(transfer.key, ledger.residents[self._cache(transfer.key)])

    def _prefetch_fits(self, transfer: Any) -> bool:
        """Rule 5, stated again: what another wish of no lower priority still holds stays."""
        link, policy = self.engine.link, self.engine.policy
        if transfer.replaces >= 0:
            there = transfer.replaces in self.engine.ledger.residents[self._cache(transfer.key)]
            return self._room(transfer.key, {transfer.replaces} if there else set())
        free = set()
        for key in self.engine.ledger.residents[self._cache(transfer.key)]:
            priority, expires = link.holds.get(key, (0, -1))
            if expires <= link.event or priority < transfer.priority:
                free.add(key)
        if policy.bypass and free:
            worth = self.engine.answers.scores([transfer.key, *sorted(free)])
            free = {k for k, w in zip(sorted(free), worth[1:], strict=True) if w < worth[0]}
        return self._room(transfer.key, free)

    def _room(self, key: int, may_go: set[int]) -> bool:
        ledger, cache = self.engine.ledger, self._cache(key)
        freed = sum(self.booked[k // self.case.meta.experts] for k in may_go - ledger.pinned)
        return (
            ledger.capacity[cache] - ledger.used[cache] + freed
            >= self.booked[key // self.case.meta.experts]
        )

    def _log(self, inner: Callable[..., None], what: int, *words: int) -> None:
        inner(what, *words)
        self.records.append((NAMES[what], *words))
        if what == log.GATE:
            self._uncomputed = {word // 4 for word in words[5:]}

    def _evict(self, inner: Callable[[int], None], key: int) -> None:
        assert key not in self._uncomputed, f"I9: {key} is demanded and goes before it computed"
        inner(key)

    def _run_expert(self, inner: Callable[..., Any], key: int, *more: int) -> Any:
        link, ledger = self.engine.link, self.engine.ledger
        flying = link.flying.get(key)
        staged = flying is not None and flying.staged and flying.sent == len(flying.ends)
        assert ledger.state[key] == State.RESIDENT or staged, f"I5: {key} has not arrived"
        assert key in self._uncomputed, f"I5: {key} computes twice, or unasked"
        yield from self._until_computed(inner(key, *more), key)

    def _until_computed(self, inner: Any, key: int) -> Any:
        # The copy must stay until its compute has ended, which is when ``inner`` releases it.
        for event in inner:
            yield event
            self._uncomputed.discard(key)
        self._uncomputed.discard(key)

    def _computed(self, inner: Callable[[int], None], key: int) -> None:
        self._uncomputed.discard(key)
        inner(key)

    def _layer(self, key: int) -> int:
        return key // self.case.meta.experts % self.case.meta.layers

    def _cache(self, key: int) -> int:
        return self._layer(key) if len(self.engine.ledger.capacity) > 1 else 0

    def finished(self, tally: Tally) -> Run:
        """The end of a run: I4."""
        spans = self.engine.spans or []
        sent = [s[1:3] for s in spans if s[0] in ("demand", "prefetch")]
        assert all(a[1] <= b[0] for a, b in pairwise(sent)), "I4: transfers overlap"
        reads = [s[1:3] for s in spans if s[0] == "ssd"]
        assert all(a[1] <= b[0] for a, b in pairwise(reads)), "I4: reads overlap"
        read_ns = sum(end - begin for begin, end in reads)
        setup = self.engine.setup
        sizes = [self.engine.ledger.copy_bytes[key] for key in setup.initial]
        filled = sum(map(setup.costs.load_ns, sizes)) if setup.initial_charged else 0
        busy = sum(end - begin for begin, end in sent) + filled
        assert busy == tally.link_busy_ns, "I4: busy time is not the sum"
        reads = [s[1:3] for s in spans if s[0] == "ssd"]
        assert all(a[1] <= b[0] for a, b in pairwise(reads)), "I4: reads overlap"
        read_ns = sum(end - begin for begin, end in reads)
        assert read_ns == (tally.ssd.busy_ns if tally.ssd else 0), "I4: so for the drive"
        computed = [s[1:3] for s in spans if s[0] in ("dense", "expert")]
        assert all(a[1] <= b[0] for a, b in pairwise(computed)), "I4: the compute lane overlaps"
        assert not self._uncomputed or not tally.events, "I1: an expert was never computed"
        return Run(tally, self.records, spans, self.answers)


class Recorder:
    """Passes everything to a policy and notes what was asked and answered."""

    def __init__(self, inner: Any, answers: list[tuple[int, str]]) -> None:
        self.inner = inner
        self.answers = answers
        self.event = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def on(self, fact: Any, cache: Any) -> Plan:
        self.event = getattr(fact, "event", self.event)
        plan: Plan = self.inner.on(fact, cache)
        self.answers.append((self.event, f"{type(fact).__name__} {plan}"))
        return plan

    def note(self, fact: Any) -> None:
        self.inner.note(fact)
        # What a gate drops is noted before the policy hears of the gate.
        self.answers.append((max(self.event, fact.event), repr(fact)))
