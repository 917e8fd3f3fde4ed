"""The Python side of a policy in plain Python: it answers what the compiled core asks.

The core calls ``Asked.__call__`` where the reference engine would call the policy. Facts are made
from the block under way, plans become commands, notes are told before anything is asked. An error
stops the core and is raised again once it has been left.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from moesim.answers import Answers
from moesim.engine.block import Sources
from moesim.engine.clock import TOO_LONG
from moesim.engine.exchange import Exchange
from moesim.engine.fields import Ask, C, Command, D, Heard, K, Q, S
from moesim.engine.machine import HostFunction, M
from moesim.engine.setup import Setup
from moesim.engine.wishes import obey
from moesim.errors import UsageError
from moesim.precision import enough, serving
from moesim.types import (
    NEVER,
    NO_PLAN,
    AnyArray,
    Dropped,
    Evicted,
    Fact,
    Gate,
    IntArray,
    Job,
    JobDone,
    Landed,
    LayerEvent,
    Phase,
    Plan,
    Routed,
    Serve,
    State,
    Status,
    quick_maker,
)
from moesim.view import Window, serving_caches
from moesim.workload import Step, begin_facts, end_facts, union

# Plain numbers: an enumeration's members are slow to look up where every layer event does it.
NOW = int(S.NOW)
EVENT, GATE_LAYER, GATE_STEP, N_DEMAND = map(int, (S.EVENT, S.GATE_LAYER, S.GATE_STEP, S.N_DEMAND))
N_NOTES, N_CANDIDATES, LACKING = map(int, (S.N_NOTES, S.N_CANDIDATES, S.LACKING))
D_HEAD, D_TAIL, P_COUNT = map(int, (S.D_HEAD, S.D_TAIL, S.P_COUNT))
FOREGROUND, NAMED, PREDICTED = map(int, (S.FOREGROUND, S.NAMED, S.PREDICTED))
MISS = int(Status.MISS)
FETCH = int(Serve.FETCH)
make_gate = quick_maker(Gate)
STOPPED = 0
"""What a core gets for an answer whose policy has failed: nothing to do."""

Row = tuple[int, int, int, int, int, int]
"""A command, by the columns of ``fields.P``."""


class Asked:
    """One policy in plain Python, asked by one machine."""

    def __init__(self, setup: Setup, machine: M, devices: Sequence[M] = ()) -> None:
        self.error: BaseException | None = None
        self.sources: Sources | None = None
        """Of the block under way."""
        self.jobs = 0
        self._setup = setup
        self._m = machine
        # What every layer event needs: a memory view gives plain numbers, and quickly.
        self._s = memoryview(machine.s)
        self._victims_row = machine.q[Q.VICTIMS]
        self._victim = memoryview(self._victims_row)
        self._offered = machine.q[Q.CANDIDATES]
        self._exchange = None
        if setup.world.owners is not None:
            self._exchange = Exchange(setup.world, setup.costs)
        self._before = -1, -1
        """Step and layer of the newest layer event that was routed."""
        self._status = machine.cur[D.STATUS]
        self._size = setup.world.size
        self._bytes_of: list[int] = machine.k[K.BYTES, : len(machine.state)].tolist()
        self._cache_of: list[int] = machine.k[K.CACHE, : len(machine.state)].tolist()
        self.view = _view(setup, machine, devices)
        self.answers = Answers(setup.policy, setup.world, self.view, self._bytes_of)
        self._picky = setup.policy.bypass
        self._simply = setup.policy.scored and not setup.policy.bypass
        self._plan = NO_PLAN
        self._queued: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._named: dict[int, set[int]] = {}
        self._routed: LayerEvent | None = None
        self._expert_ns: dict[tuple[int, int, int], tuple[int, int]] = {}
        answers: dict[Ask, Callable[[int], int]] = {
            Ask.ROUTE: self._route,
            Ask.GATE: self._gate,
            Ask.APPLY: self._apply,
            Ask.CHOOSE: self._choose,
            Ask.LESSER: self._lesser,
            Ask.JOB_BEGIN: self._job_begin,
            Ask.JOB_DONE: self._job_done,
            Ask.NOTES: lambda _: 0,
        }
        self._answers = [answers[what] for what in Ask]
        self._function = HostFunction(self._answer)
        self._devices: list[Any] = []

    @property
    def address(self) -> int:
        """Where the core calls."""
        return int(ctypes.cast(self._function, ctypes.c_void_p).value or 0)

    def of_device(self, machine: M) -> int:
        """Where one of several devices calls: it holds the scalars, and its victims are asked."""
        row, offered = machine.q[Q.VICTIMS], machine.q[Q.CANDIDATES]
        own = memoryview(machine.s), row, memoryview(row), offered

        def answer(what: int, about: int) -> int:
            before = self._s, self._victims_row, self._victim, self._offered
            self._s, self._victims_row, self._victim, self._offered = own
            answered = self._answer(what, about)
            self._s, self._victims_row, self._victim, self._offered = before
            return answered

        self._devices.append(HostFunction(answer))
        return int(ctypes.cast(self._devices[-1], ctypes.c_void_p).value or 0)

    def _answer(self, what: int, about: int) -> int:
        """Answer the core."""
        if self.error is not None:
            return STOPPED
        try:
            if self._s[N_NOTES]:
                self._hear()
            return self._answers[what](about)
        except BaseException as error:
            # Nothing may be raised through compiled code: it is left first.
            self.error = error
            self._m.s[S.FAILED] = 1
            return STOPPED

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While the core runs. A Ctrl-C that is heard on the way into ``__call__`` is raised to
        nobody: ctypes would tell it and go on with an answer of 0."""
        before = sys.unraisablehook

        def lost(what: Any) -> None:
            if not issubclass(what.exc_type, KeyboardInterrupt):
                before(what)
                return
            self.error = KeyboardInterrupt()
            self._m.s[S.FAILED] = 1

        sys.unraisablehook = lost
        try:
            yield
        finally:
            sys.unraisablehook = before

    # ---- facts -----------------------------------------------------------------------------------

    def _hear(self) -> None:
        count = self._s[N_NOTES]
        if not count:
            return
        self._s[N_NOTES] = 0
        m, size = self._m, self._size
        tell = self.answers.policy.note
        for kind, key, event, ordinal, demand in m.heard[:count].tolist():
            precision, expert = divmod(key, size)
            if kind == Heard.LANDED:
                tell(Landed(expert, precision, event, ordinal, bool(demand)))
            elif kind == Heard.EVICTED:
                tell(Evicted(expert, precision, event))
            else:
                tell(Dropped(expert, precision, event))

    def _source(self, row: int, event: int) -> LayerEvent:
        assert self.sources is not None
        return self.sources.layer_event(row, event, self._s[GATE_STEP], self._s[GATE_LAYER])

    def _route(self, row: int) -> int:
        event = self.answers.event = self._s[EVENT]
        source = self._routed = self._source(row, event)
        routed = self.answers.route(source)
        if self._exchange is not None:
            step, layer = self._before
            chosen = self.answers.routed_experts(source)
            before = layer if step == source.step else -1
            self._m.s[S.EXCHANGE_NS] = self._exchange.again(source.layer, before, chosen)
            self._before = source.step, source.layer
        if routed.experts is not None or routed.precisions is not None:
            self._demand(source, routed)
        return 0

    def _demand(self, source: LayerEvent, routed: Routed) -> None:
        """Put another demand in the place of the recorded one."""
        chosen = source.token_experts if routed.experts is None else routed.experts
        demand = union(source, self._setup.world.experts, chosen)
        keys = demand.experts
        if routed.precisions is not None:
            keys = self._copies(demand.experts, chosen, routed.precisions)
        n = len(keys)
        m = self._m
        m.s[S.N_DEMAND] = n
        m.cur[D.EXPERT, :n] = keys
        m.cur[D.TOKENS, :n] = demand.tokens
        m.cur[D.PHASE, :n] = demand.phases
        for i, (key, tokens) in enumerate(zip(keys.tolist(), demand.tokens.tolist(), strict=True)):
            durations = self._durations(tokens, source.layer, key // self._size)
            m.cur[D.NS, i], m.cur[D.CPU_NS, i] = durations

    def _copies(self, experts: IntArray, chosen: AnyArray, precisions: AnyArray) -> IntArray:
        """The keys of the copies that serve."""
        allowed = enough(experts, chosen, precisions, self._setup.world.experts)
        found = serving(experts, allowed, self._m.state.reshape(-1, self._size))
        return experts + found.astype(np.int64) * self._size

    def _durations(self, tokens: int, layer: int, precision: int) -> tuple[int, int]:
        known = self._expert_ns.get((tokens, layer, precision))
        if known is None:
            costs = self._setup.costs
            # The host has every expert in full.
            known = costs.expert_ns(tokens, layer, precision), costs.cpu_expert_ns(tokens, layer)
            self._expert_ns[tokens, layer, precision] = known
        return known

    def _gate(self, row: int) -> int:
        s = self._s
        event = self.answers.event = s[EVENT]
        status = self._status[: s[N_DEMAND]].astype(np.uint8)
        source = self._routed
        if source is None:
            sources = self.sources
            assert sources is not None
            source = sources.layer_event(row, event, s[GATE_STEP], s[GATE_LAYER])
            experts, tokens, phases = sources.demanded(row)
            precisions, keys = None, experts
        else:
            self._routed = None
            keys, tokens = self._m.cur[[D.EXPERT, D.TOKENS], : len(status)]
            phases = self._m.cur[D.PHASE, : len(status)].astype(np.uint8)
            precisions, experts = self._told_apart(keys)
        gate = make_gate(source, experts, tokens, status, phases, precisions)
        named = self._named.pop(event, None) if self._named else None
        if named is not None:
            self._s[NAMED] += len(named)
            self._s[PREDICTED] += len(named.intersection(keys.tolist()))
        plan = self.answers.plan(gate)
        ops = plan.foreground_ops
        self._s[FOREGROUND] = self._lasting(self._setup.costs.job_ns(ops, 0)) if ops else 0
        if plan.serve:
            self._serve(gate, plan)
        self._plan = plan
        return plan is not NO_PLAN and plan != NO_PLAN

    def _told_apart(self, keys: IntArray) -> tuple[AnyArray | None, IntArray]:
        """(precisions where the policy asked for some, expert ids) of the demand."""
        if self.answers.precise:
            return None, keys
        precisions, experts = np.divmod(keys, self._size)
        return precisions.astype(np.uint8), experts

    def _serve(self, gate: Gate, plan: Plan) -> None:
        for i in np.flatnonzero(gate.status == MISS).tolist():
            self._m.cur[D.SERVE, i] = int(plan.serve.get(int(gate.experts[i]), FETCH))

    def _job_begin(self, worker: int) -> int:
        job = self._running[worker] = self._queued.popleft()
        return self._lasting(self._setup.costs.job_ns(job.ops, job.nbytes))

    def _lasting(self, duration_ns: int) -> int:
        """A duration, if the clock can hold its end."""
        if self._s[NOW] + duration_ns >= NEVER:
            raise UsageError(TOO_LONG)
        return duration_ns

    def _job_done(self, worker: int) -> int:
        self._tell(JobDone(self._running.pop(worker), self.answers.event), Phase.DECODE)
        return 0

    # ---- between layer events --------------------------------------------------------------------

    def step_begins(self, step: Step) -> None:
        """Tell what a step begins with."""
        self._hear()
        for fact, phase in begin_facts(step):
            self._tell(fact, phase)
            self._hear()

    def step_ends(self, step: Step) -> None:
        """Tell what a step ends with."""
        self._hear()
        for fact in end_facts(step):
            self._tell(fact, Phase.DECODE)
            self._hear()

    def finish(self) -> None:
        """The run has ended: the notes that are left."""
        self._hear()

    def _tell(self, fact: Fact, phase: Phase) -> None:
        self._obey(self._commands(self.answers.plan(fact)), phase)

    # ---- plans -----------------------------------------------------------------------------------

    def _apply(self, _: int) -> int:
        plan, self._plan = self._plan, NO_PLAN
        self._obey(self._commands(plan), Phase(int(self._m.s[S.PHASE])))
        return 0

    def _obey(self, commands: Iterator[Row], phase: Phase) -> None:
        """Have the core carry out commands, as many at once as it takes."""
        told = self._m.told
        rows = list(islice(commands, len(told)))
        if not rows and not self._waits_for_link():
            return
        while True:
            told[: len(rows)] = rows or 0
            obey(self._m, len(rows), int(phase))
            if len(rows) < len(told):
                return
            rows = list(islice(commands, len(told)))

    def _waits_for_link(self) -> bool:
        """Whether anything may need the link to be woken, as is done after every plan."""
        s = self._s
        return bool(s[D_HEAD] != s[D_TAIL] or s[P_COUNT] or self._exchange is not None)

    def _commands(self, plan: Plan) -> Iterator[Row]:
        answers = self.answers
        for expert in plan.cancel:
            yield Command.CANCEL, answers.key(expert), 0, 0, 0, 0
        for expert, priority in plan.reprioritise:
            yield Command.REPRIORITISE, answers.key(expert), 0, priority, 0, 0
        for order, wish in enumerate(plan.prefetches):
            key = answers.key(wish.expert, wish.precision)
            if wish.expires <= answers.event:
                continue
            if wish.expires < NEVER:
                self._named.setdefault(wish.expires, set()).add(key)
            replaces = answers.replaced(wish, key, self._cache_of)
            yield Command.PREFETCH, key, wish.expires, wish.priority, replaces, order
        for job in plan.jobs:
            self.jobs += 1
            self._queued.append(job)
            yield Command.JOB, 0, 0, 0, 0, 0

    # ---- victims ---------------------------------------------------------------------------------

    def _candidates(self) -> list[int]:
        keys: list[int] = self._offered[: self._s[N_CANDIDATES]].tolist()
        keys.sort()
        return keys

    def _victims(self, keys: list[int]) -> int:
        self._victims_row[: len(keys)] = keys
        return len(keys)

    def _choose(self, load: int) -> int:
        """``Link._choose`` among the candidates for a load, or for a smaller cache (-1)."""
        lacking = self._s[LACKING]
        if self._simply:
            offered = self._offered[: self._s[N_CANDIDATES]]
            offered.sort()
            return self._in_turn(self.answers.by_score(offered, lacking), lacking)
        keys = self._candidates()
        if self._picky and load >= 0 and self._m.k[K.IS_PREFETCH, load]:
            keys = self.answers.below(keys, load)
            if sum(self._bytes_of[key] for key in keys) < lacking:
                return 0
        return self._in_turn(self.answers.in_order(keys, lacking, self._why_not), lacking)

    def _in_turn(self, ordered: list[int], lacking: int) -> int:
        """Victims in order until the bytes suffice."""
        if len(ordered) == 1:
            self._victim[0] = ordered[0]
            return 1
        chosen: list[int] = []
        for key in ordered:
            if lacking <= 0:
                break
            chosen.append(key)
            lacking -= self._bytes_of[key]
        return self._victims(chosen)

    def _lesser(self, key: int) -> int:
        lacking = self._s[LACKING]
        keys = self.answers.lesser(self._candidates(), key, lacking)
        return -1 if keys is None else self._victims(keys)

    def _why_not(self, expert: int) -> str:
        m = self._m
        if m.k[K.PINNED, expert] or m.k[K.MEMBER, expert] == m.s[S.EVENT]:
            return "pinned"
        if m.state[expert] != State.RESIDENT:
            return "absent"
        return "in another cache, or held by a plan of higher priority"


def _view(setup: Setup, m: M, devices: Sequence[M]) -> Window:
    """What the policy may see, of the machine's own arrays."""

    def queued() -> int:
        waiting = 0
        for own in devices or (m,):
            there = own.q[Q.PREFETCH, : own.s[S.P_COUNT]]
            waiting += int((m.k[K.IS_ISSUED, there] == 0).sum())
        return waiting

    serving = serving_caches(m.k[K.CACHE, : setup.world.size].tolist(), setup.world.experts)

    def free_bytes(layer: int) -> int:
        caches = serving[layer]
        return sum(int(m.c[C.CAPACITY, cache] - m.c[C.USED, cache]) for cache in caches)

    return Window(m.state[: setup.world.size], lambda: int(m.s[S.JOBS]), queued, free_bytes)
