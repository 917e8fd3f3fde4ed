"""The Python side of a policy in plain Python: it answers what the compiled core asks.

The core calls ``Asked.__call__`` where the reference engine would call the policy. Facts are made
from the block under way, plans become commands, notes are told before anything is asked. An error
stops the core and is raised again once it has been left.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from moesim.answers import Answers
from moesim.engine.block import Block
from moesim.engine.fields import Ask, C, Command, D, Heard, K, Q, S
from moesim.engine.machine import HostFunction, M
from moesim.engine.setup import Setup
from moesim.engine.wishes import obey
from moesim.types import (
    NEVER,
    NO_PLAN,
    AnyArray,
    Dropped,
    Evicted,
    Fact,
    Gate,
    Job,
    JobDone,
    Landed,
    LayerEvent,
    Phase,
    Plan,
    Serve,
    State,
    Status,
)
from moesim.view import Window
from moesim.workload import Step, begin_facts, end_facts, union

MISS = int(Status.MISS)
FETCH = int(Serve.FETCH)
STOPPED = 0
"""What a core gets for an answer whose policy has failed: nothing to do."""

Row = tuple[int, int, int, int, int, int]
"""A command, by the columns of ``fields.P``."""


class Asked:
    """One policy in plain Python, asked by one machine."""

    def __init__(self, setup: Setup, machine: M) -> None:
        self.error: BaseException | None = None
        self.block: Block | None = None
        self.jobs = 0
        self._setup = setup
        self._m = machine
        self._size = setup.world.size
        self._bytes_of: list[int] = machine.k[K.BYTES, : len(machine.state)].tolist()
        self._cache_of: list[int] = machine.k[K.CACHE, : len(machine.state)].tolist()
        self.view = _view(setup, machine)
        self.answers = Answers(setup.policy, setup.world, self.view, self._bytes_of)
        self._plan = NO_PLAN
        self._queued: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._named: dict[int, set[int]] = {}
        self._routed: LayerEvent | None = None
        self._expert_ns: dict[tuple[int, int], tuple[int, int]] = {}
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
        self._function = HostFunction(self)

    @property
    def address(self) -> int:
        """Where the core calls."""
        return int(ctypes.cast(self._function, ctypes.c_void_p).value or 0)

    def __call__(self, what: int, about: int) -> int:
        """Answer the core."""
        if self.error is not None:
            return STOPPED
        try:
            self._hear()
            return self._answers[what](about)
        except BaseException as error:
            # Nothing may be raised through compiled code: it is left first.
            self.error = error
            self._m.s[S.FAILED] = 1
            return STOPPED

    # ---- facts -----------------------------------------------------------------------------------

    def _hear(self) -> None:
        m, size = self._m, self._size
        count = int(m.s[S.N_NOTES])
        if not count:
            return
        m.s[S.N_NOTES] = 0
        tell = self.answers.policy.note
        for kind, key, event, ordinal, demand in m.heard[:count].tolist():
            precision, expert = divmod(key, size)
            if kind == Heard.LANDED:
                tell(Landed(expert, precision, event, ordinal, bool(demand)))
            elif kind == Heard.EVICTED:
                tell(Evicted(expert, precision, event))
            else:
                tell(Dropped(expert, precision, event))

    def _source(self, row: int) -> LayerEvent:
        assert self.block is not None and self.block.sources is not None
        m = self._m
        event, layer = int(m.s[S.EVENT]), int(m.s[S.GATE_LAYER])
        return self.block.sources.layer_event(row, event, int(m.s[S.GATE_STEP]), layer)

    def _route(self, row: int) -> int:
        self.answers.event = int(self._m.s[S.EVENT])
        source = self._routed = self._source(row)
        chosen = self.answers.route(source)
        if chosen is not None:
            self._demand(source, chosen)
        return 0

    def _demand(self, source: LayerEvent, chosen: AnyArray) -> None:
        """Put another demand in the place of the recorded one."""
        demand = union(source, self._setup.world.experts, chosen)
        n = len(demand.experts)
        m = self._m
        m.s[S.N_DEMAND] = n
        m.cur[D.EXPERT, :n] = demand.experts
        m.cur[D.TOKENS, :n] = demand.tokens
        m.cur[D.PHASE, :n] = demand.phases
        for i, tokens in enumerate(demand.tokens.tolist()):
            m.cur[D.NS, i], m.cur[D.CPU_NS, i] = self._durations(tokens, source.layer)

    def _durations(self, tokens: int, layer: int) -> tuple[int, int]:
        known = self._expert_ns.get((tokens, layer))
        if known is None:
            costs = self._setup.costs
            known = costs.expert_ns(tokens, layer), costs.cpu_expert_ns(tokens, layer)
            self._expert_ns[tokens, layer] = known
        return known

    def _gate(self, row: int) -> int:
        m = self._m
        event = self.answers.event = int(m.s[S.EVENT])
        n = int(m.s[S.N_DEMAND])
        source, self._routed = self._routed or self._source(row), None
        gate = Gate(
            source,
            m.cur[D.EXPERT, :n].copy(),
            m.cur[D.TOKENS, :n].copy(),
            m.cur[D.STATUS, :n].astype(np.uint8),
            m.cur[D.PHASE, :n].astype(np.uint8),
        )
        named = self._named.pop(event, None)
        if named is not None:
            m.s[S.NAMED] += len(named)
            m.s[S.PREDICTED] += len(named.intersection(gate.experts.tolist()))
        plan = self.answers.plan(gate)
        m.s[S.FOREGROUND] = self._setup.costs.job_ns(plan.foreground_ops, 0)
        if plan.serve:
            self._serve(gate, plan)
        self._plan = plan
        return not (plan is NO_PLAN or plan == NO_PLAN)

    def _serve(self, gate: Gate, plan: Plan) -> None:
        for i in np.flatnonzero(gate.status == MISS).tolist():
            self._m.cur[D.SERVE, i] = int(plan.serve.get(int(gate.experts[i]), FETCH))

    def _job_begin(self, worker: int) -> int:
        job = self._running[worker] = self._queued.popleft()
        return self._setup.costs.job_ns(job.ops, job.nbytes)

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
        while True:
            rows = list(islice(commands, len(told)))
            told[: len(rows)] = rows or 0
            obey(self._m, len(rows), int(phase))
            if len(rows) < len(told):
                return

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
        m = self._m
        keys: list[int] = m.q[Q.CANDIDATES, : m.s[S.N_CANDIDATES]].tolist()
        keys.sort()
        return keys

    def _victims(self, keys: list[int]) -> int:
        self._m.q[Q.VICTIMS, : len(keys)] = keys
        return len(keys)

    def _choose(self, load: int) -> int:
        """``Link._choose`` among the candidates for a load, or for a smaller cache (-1)."""
        m, keys, lacking = self._m, self._candidates(), int(self._m.s[S.LACKING])
        if load >= 0 and m.k[K.IS_PREFETCH, load] and self.answers.policy.bypass and keys:
            keys = self.answers.below(keys, load)
        if load >= 0 and self._bytes(keys) + self._computed_bytes(load) < lacking:
            return 0
        chosen: list[int] = []
        for key in self.answers.in_order(keys, lacking, self._why_not):
            if lacking <= 0:
                break
            chosen.append(key)
            lacking -= self._bytes_of[key]
        return self._victims(chosen)

    def _bytes(self, keys: list[int]) -> int:
        return sum(self._bytes_of[key] for key in keys)

    def _computed_bytes(self, load: int) -> int:
        """Bytes of the event's own experts that have computed; a prefetch may not have them."""
        m = self._m
        if m.k[K.IS_PREFETCH, load]:
            return 0
        released = m.q[Q.RELEASED, : m.s[S.R_COUNT]]
        there = released[(m.state[released] == State.RESIDENT) & (m.k[K.PINNED, released] == 0)]
        return self._bytes(there[m.k[K.CACHE, there] == m.k[K.CACHE, load]].tolist())

    def _lesser(self, key: int) -> int:
        lacking = int(self._m.s[S.LACKING])
        keys = self.answers.lesser(self._candidates(), key, lacking)
        return -1 if keys is None else self._victims(keys)

    def _why_not(self, expert: int) -> str:
        m = self._m
        if m.k[K.PINNED, expert] or m.k[K.MEMBER, expert] == m.s[S.EVENT]:
            return "pinned"
        if m.state[expert] != State.RESIDENT:
            return "absent"
        return "in another cache, or held by a plan of higher priority"


def _view(setup: Setup, m: M) -> Window:
    """What the policy may see, of the machine's own arrays."""

    def queued() -> int:
        waiting = m.q[Q.PREFETCH, : m.s[S.P_COUNT]]
        return int((m.k[K.IS_ISSUED, waiting] == 0).sum())

    def free_bytes(layer: int) -> int:
        cache = m.k[K.CACHE, layer * setup.world.experts]
        return int(m.c[C.CAPACITY, cache] - m.c[C.USED, cache])

    return Window(m.state[: setup.world.size], lambda: int(m.s[S.JOBS]), queued, free_bytes)
