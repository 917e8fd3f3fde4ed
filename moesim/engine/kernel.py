"""The compiled core: the reference engine's rules on integer arrays.

It stops, and can be entered again, where it needs the next steps of the workload, after a while
(so that a Ctrl-C is heard), or when a policy in plain Python has failed. ``moesim.engine.fast``
fills the arrays, ``moesim.engine.fields`` names their rows. Each function names the part of the
reference that it mirrors.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from moesim import log
from moesim.compiled import call_with, entry, kernel
from moesim.engine.channel import (
    expire,
    link_done,
    link_grant,
    moved_bytes,
    new_transfer,
    p_remove,
    release,
    unpin,
    wake_link,
    was_used,
)
from moesim.engine.fields import Ask, C, D, Does, E, G, K, N, O, Part, Q, S, See, Shelf, T, W, Wish
from moesim.engine.keep import keep_begins, keep_gate, keep_landed
from moesim.engine.machine import (
    ABSENT,
    ARRIVAL,
    COMPUTE_DONE,
    DENSE,
    EXPERT,
    FAR,
    GATE,
    HIT,
    IN_FLIGHT,
    JOB,
    JOB_KEY,
    LATE,
    LINK_GRANT,
    MISS,
    ON_CPU,
    QUEUED,
    RESIDENT,
    STALL,
    STEP_BEGIN,
    WORKER_DONE,
    A,
    M,
    ask,
    book,
    choice,
    notify,
    pending,
    span,
    tier,
    wait,
    word,
    worker_pending,
)
from moesim.engine.order import enter, reorder
from moesim.engine.quick import quick_steps
from moesim.engine.steps import begin_event, begin_step, end_step, make_room
from moesim.engine.wishes import apply, make_plan, obey, wake_worker
from moesim.types import Serve

FETCH, CPU = int(Serve.FETCH), int(Serve.CPU)
ROUTE, ASK_GATE, APPLY = int(Ask.ROUTE), int(Ask.GATE), int(Ask.APPLY)
JOB_BEGIN, JOB_DONE = int(Ask.JOB_BEGIN), int(Ask.JOB_DONE)
CPU_DONE = int(Part.CPU_DONE)

# Why the core stops.
SPANS_FULL, BLOCK_DONE, TOO_LONG, PAUSED, FAILED, STEP_BEGINS, STEP_ENDS, STEP_DONE = range(8)
GOES_ON = 8

TURNS = 1 << 17
"""Events after which it stops, so that Python can look for signals."""


# ---- the gate ------------------------------------------------------------------------------------


@kernel
def judge(m: M) -> None:
    """``ReferenceEngine._judge``, the pins and the log."""
    n = m.s[S.N_DEMAND]
    for i in range(n):
        key = m.cur[D.EXPERT, i]
        state = m.state[key]
        status = MISS
        if state == RESIDENT:
            status = HIT
        elif state == IN_FLIGHT:
            status = LATE
        m.cur[D.STATUS, i] = status
        m.cur[D.SERVE, i] = FETCH
        m.k[K.PINNED, key] = 1
        m.k[K.MEMBER, key] = m.s[S.EVENT]
        m.k[K.ROW, key] = i
    m.s[S.R_COUNT] = 0
    m.s[S.UNSERVED] = 1
    word(m, log.GATE)
    word(m, m.s[S.NOW])
    word(m, m.s[S.EVENT])
    word(m, m.s[S.GATE_LAYER])
    word(m, n)
    word(m, log.DEMAND)
    choice(m, log.GATE)
    choice(m, m.s[S.EVENT])
    choice(m, m.s[S.GATE_LAYER])
    choice(m, n)
    choice(m, log.DEMAND)
    for i in range(n):
        packed = m.cur[D.EXPERT, i] * 4 + m.cur[D.STATUS, i]
        word(m, packed)
        choice(m, packed)


@kernel
def count_predicted(m: M) -> None:
    """``ReferenceEngine._count_predicted``; ``named`` is a ring of (event, count, keys...)."""
    row = m.s[S.EVENT] & (len(m.named) - 1)
    if m.named[row, 0] != m.s[S.EVENT]:
        return
    n = m.named[row, 1]
    m.s[S.NAMED] += n
    for i in range(n):
        m.s[S.PREDICTED] += m.k[K.MEMBER, m.named[row, 2 + i]] == m.s[S.EVENT]


@kernel
def claim(m: M) -> None:
    """``ReferenceEngine._claim``, with ``Link.use``, ``promote`` and ``miss``."""
    n = m.s[S.N_DEMAND]
    nbytes = 0
    for i in range(n):
        key = m.cur[D.EXPERT, i]
        status = m.cur[D.STATUS, i]
        phase = m.cur[D.PHASE, i]
        nbytes += m.k[K.BYTES, key]
        m.counts[phase, N.ACCESSES] += 1
        m.counts[phase, N.ACCESS_BYTES] += m.k[K.COPY, key]
        m.counts[phase, N.HITS + status] += 1
        m.counts[phase, N.HIT_BYTES + status] += m.k[K.COPY, key]
        if status == HIT:
            m.k[K.HELD, key] = 0
            if m.k[K.UNUSED, key]:
                m.k[K.UNUSED, key] = 0
                m.s[S.USED] += 1
                m.s[S.USED_BYTES] += m.k[K.COPY, key]
                was_used(m, key)
        elif status == MISS:
            if m.k[K.PENDING, key]:
                p_remove(m, key)
                m.state[key] = ABSENT
                m.s[S.OVERTAKEN] += 1
            if m.k[K.BLAMED, key] >= 0:
                m.k[K.BLAMED, key] = -1
                m.s[S.POLLUTING] += 1
    for i in range(n):
        if m.cur[D.STATUS, i] == LATE:
            key = m.cur[D.EXPERT, i]
            m.k[K.IS_DEMANDED, key] = 1
            m.k[K.IS_CANCELLED, key] = 0
            p_remove(m, key)
            m.q[Q.DEMAND, m.s[S.D_TAIL] & m.s[O.RING]] = key
            m.s[S.D_TAIL] += 1
            m.s[S.LATE] += 1
            m.s[S.LATE_BYTES] += m.k[K.COPY, key]
            was_used(m, key)
    m.s[S.LARGEST_UNION] = max(m.s[S.LARGEST_UNION], nbytes)
    cache = m.k[K.CACHE, m.cur[D.EXPERT, 0]] if n else 0
    m.s[S.OVERFLOWS] += nbytes > m.c[C.CAPACITY, cache]


@kernel
def demand(m: M) -> None:
    """``ReferenceEngine._demand`` and ``_serve_miss``."""
    m.s[S.UNSERVED] = 0
    waiting = 0
    for i in range(m.s[S.N_DEMAND]):
        key = m.cur[D.EXPERT, i]
        if m.cur[D.STATUS, i] == LATE:
            waiting += 1
        if m.cur[D.STATUS, i] != MISS:
            continue
        how = m.cur[D.SERVE, i]
        if how == FETCH:
            m.s[S.SERVED_FETCH] += 1
            new_transfer(m, key, m.cur[D.PHASE, i], i, 0, m.s[O.BYPASS], -1)
            waiting += 1
            continue
        word(m, log.SERVED)
        word(m, m.s[S.NOW])
        word(m, key)
        word(m, how)
        choice(m, log.SERVED)
        choice(m, key)
        choice(m, how)
        if how == CPU:
            m.s[S.SERVED_CPU] += 1
            m.s[S.CPU_RUNNING] += 1
            m.k[K.CPU_NS, key] = m.cur[D.CPU_NS, i]
            if m.s[O.TIER] and not tier(m, Shelf.HOST, key):
                continue
            m.q[Q.HOST, m.s[S.H_TAIL] & m.s[O.RING]] = key
            m.s[S.H_TAIL] += 1
        else:
            m.s[S.SERVED_SKIP] += 1
            m.k[K.PINNED, key] = 0
    for i in range(m.s[S.N_DEMAND]):
        if m.cur[D.STATUS, i] == MISS and m.cur[D.SERVE, i] == FETCH:
            key = m.cur[D.EXPERT, i]
            m.state[key] = QUEUED
            if m.s[O.TIER] and not tier(m, Shelf.FETCH, key):
                continue
            m.q[Q.DEMAND, m.s[S.D_TAIL] & m.s[O.RING]] = key
            m.s[S.D_TAIL] += 1
    m.s[S.WAITING] = waiting


@kernel
def serve(m: M) -> None:
    """The built-in miss seats."""
    if m.s[O.MISS] == FETCH:
        return
    for i in range(m.s[S.N_DEMAND]):
        if m.cur[D.STATUS, i] == MISS:
            device_ns = m.k[K.LOAD_NS, m.cur[D.EXPERT, i]] + m.cur[D.NS, i]
            if m.s[O.MISS] == CPU or m.cur[D.CPU_NS, i] <= device_ns:
                m.cur[D.SERVE, i] = CPU


# ---- the whole -----------------------------------------------------------------------------------


@entry
def run(m: M) -> int:
    """Let events happen until the block of steps is done, or something is in the way."""
    for _ in range(TURNS):
        if m.s[S.FAILED]:
            return FAILED
        if m.s[O.SPANS] and m.s[S.N_SPANS] > len(m.spans) - 4:
            return SPANS_FULL
        who, when, rank, seq = 0, m.s[S.C_TIME], m.s[S.C_RANK], m.s[S.C_SEQ]
        if before(m.s[S.L_TIME], m.s[S.L_RANK], m.s[S.L_SEQ], when, rank, seq):
            who, when, rank, seq = 1, m.s[S.L_TIME], m.s[S.L_RANK], m.s[S.L_SEQ]
        if m.s[S.AWAKE]:
            for i in range(m.s[O.ACTORS]):
                if before(m.w[W.TIME, i], m.w[W.RANK, i], m.w[W.SEQ, i], when, rank, seq):
                    who, when, rank, seq = 2 + i, m.w[W.TIME, i], m.w[W.RANK, i], m.w[W.SEQ, i]
        if when >= FAR:
            return TOO_LONG
        m.s[S.NOW] = when
        if who > 1:
            worker(m, who - 2)
            continue
        if who == 1:
            if rank != LINK_GRANT:
                link_done(m)
                # Its next grant comes last of what happens now.
                if m.s[S.C_TIME] <= when or m.s[S.AWAKE] or m.s[S.FAILED]:
                    continue
            link_grant(m)
            continue
        # The compute lane: what it waited for has happened; what does it do next?
        does = m.s[S.C_DOES]
        if does == Does.DENSE:
            dense_done(m)
            m.s[S.T_SYNC] += m.s[O.SYNC]
            pending(m, m.s[O.SYNC], GATE, Does.GATE)
            if not is_next(m):
                continue
            does = m.s[S.C_DOES]
        if does == Does.HIT or does == Does.ARRIVAL:
            expert_done(m)
        elif does == Does.STALLED or does == Does.BARRIER:
            stalled(m)
            if does == Does.BARRIER and not barrier(m):
                continue
        elif does == Does.CPU:
            m.s[S.T_CPU] += m.s[S.NOW] - m.s[S.C_SPAN]
        elif does == Does.GATE or does == Does.PLANNED:
            if does == Does.GATE:
                gate(m)
                if pays(m):
                    continue
            planned(m)
            if m.s[O.BARRIER] and not barrier(m):
                continue
        else:
            stop = between(m, does)
            if stop != GOES_ON:
                return int(stop)
            continue
        if not next_expert(m):
            end_event(m)
    return PAUSED


@kernel
def between(m: M, does: int) -> A:
    """What the compute lane does outside layer events: why the core stops, or that it goes on."""
    row = m.s[S.STEP]
    if does == Does.STEP:
        if not m.s[S.VISITED]:
            if m.st[row, T.BEGINS]:
                keep_begins(m)
            tell(m, m.st[row, T.SIGHT], m.st[row, T.SIGHTS])
            if m.st[row, T.VISIT]:
                return visit(m, STEP_BEGINS)
        m.s[S.VISITED] = 0
        begin_step(m)
        begin_event(m)
        return GOES_ON
    if does == Does.HEAD:
        dense_done(m)
        end_step(m)
        tell(m, m.st[row, T.END_SIGHT], m.st[row, T.END_SIGHTS])
        m.s[S.C_DOES] = Does.ENDED
        if m.st[row, T.VISIT]:
            return visit(m, STEP_ENDS)
        m.s[S.C_RANK] = -1
        return GOES_ON
    if does == Does.ENDED:
        m.s[S.VISITED] = 0
        if row < len(m.st):
            pending(m, 0, STEP_BEGIN, Does.STEP)
            return STEP_DONE if m.s[O.QUICK] else GOES_ON
    else:
        m.s[S.T_IDLE] += m.s[S.NOW] - m.s[S.C_SPAN]
    m.s[S.C_TIME] = FAR
    return BLOCK_DONE


@kernel
def end_event(m: M) -> None:
    """The layer event is done; the next one begins."""
    word(m, log.END)
    word(m, m.s[S.NOW])
    word(m, m.s[S.EVENT])
    m.s[S.ROW] += 1
    begin_event(m)


@kernel
def is_next(m: M) -> bool:
    """Whether what the compute lane has just begun ends before anything else happens; if so, it is
    that time. Nobody watches."""
    if m.s[S.C_TIME] >= m.s[S.L_TIME] or m.s[S.AWAKE] or m.s[O.SPANS]:
        return False
    m.s[S.NOW] = m.s[S.C_TIME]
    return True


@kernel
def visit(m: M, why: int) -> int:
    """Stop for Python to look; what the compute lane does next comes before anything else."""
    m.s[S.VISITED] = 1
    m.s[S.C_RANK] = -1
    return why


@kernel
def pays(m: M) -> bool:
    """Whether the gate's plan takes time on the critical path, which then passes first."""
    delay = m.s[S.FOREGROUND]
    if m.ev[m.s[S.ROW], E.DENSE_NS] >= 0:
        delay += m.s[O.PLAN]
    if delay:
        m.s[S.T_PLAN] += delay
        pending(m, delay, GATE, Does.PLANNED)
    return bool(delay)


@kernel
def dense_done(m: M) -> None:
    """``ReferenceEngine._busy`` of a dense part has ended."""
    m.s[S.T_DENSE] += m.s[S.NOW] - m.s[S.C_SPAN]
    if m.s[S.NOW] > m.s[S.C_SPAN]:
        span(m, DENSE, m.s[S.C_SPAN], -1)


@kernel
def expert_done(m: M) -> None:
    """``ReferenceEngine._run_expert`` has ended."""
    key = m.s[S.C_KEY]
    m.s[S.T_EXPERTS] += m.s[S.NOW] - m.s[S.C_SPAN]
    if m.s[S.NOW] > m.s[S.C_SPAN]:
        span(m, EXPERT, m.s[S.C_SPAN], key)
    release(m, key)


@kernel
def stalled(m: M) -> None:
    """``ReferenceEngine._stalled`` has ended."""
    stall = m.s[S.NOW] - m.s[S.C_SPAN]
    m.s[S.T_STALL] += stall
    m.counts[2, m.s[S.GATE_LAYER]] += stall
    if stall:
        span(m, STALL, m.s[S.C_SPAN], -1)


@kernel
def before(t: int, r: int, q: int, when: int, rank: int, seq: int) -> bool:
    """Whether a pending event happens first."""
    return t < when or (t == when and (r < rank or (r == rank and q < seq)))


@kernel
def open_gate(m: M) -> None:
    """``ReferenceEngine._gate`` and ``SeatPolicy.on``: the plan lies in ``M.plan``, or with the
    host of a policy in plain Python."""
    row = m.s[S.ROW]
    m.s[S.EVENT] += 1
    m.s[S.GATE_LAYER] = m.ev[row, E.LAYER]
    m.s[S.GATE_STEP] = m.ev[row, E.STEP]
    m.s[S.PHASE] = m.ev[row, E.PHASE]
    n = m.ev[row, E.COUNT]
    m.s[S.N_DEMAND] = n
    first = m.ev[row, E.FIRST]
    for column in range(D.STATUS):
        for i in range(n):
            m.cur[column, i] = m.dem[column, first + i]
    m.s[S.EXCHANGE_NS] = m.ev[row, E.EXCHANGE_NS]
    if m.s[O.ROUTES]:
        ask(m, ROUTE, row)
    judge(m)
    count_predicted(m)


@kernel
def gate(m: M) -> None:
    """The gate of the one device."""
    open_gate(m)
    claim(m)
    expire(m)
    wake_link(m)
    if not m.s[O.HOST]:
        keep_gate(m)
        reorder(m)
    answer(m)


@kernel
def answer(m: M) -> None:
    """The policy's answer to a gate."""
    if m.s[O.HOST]:
        m.s[S.N_PLAN] = ask(m, ASK_GATE, m.s[S.ROW])
        return
    if m.s[O.PREFETCH] == Wish.FORECAST:
        see(m, See.GATE, 0)
    else:
        make_plan(m)
    serve(m)


@kernel
def planned(m: M) -> None:
    """The gate after the policy's answer: demand, expire, apply, wake."""
    before_cpu = m.s[S.H_TAIL]
    demand(m)
    for _ in range(m.s[S.H_TAIL] - before_cpu):
        wake_worker(m)
    carry_out(m)
    wake_link(m)
    m.s[S.NEXT_HIT] = 0
    m.s[S.COMPUTED] = 0
    m.s[S.BLOCKED] = 0


@kernel
def carry_out(m: M) -> None:
    """What else the gate's plan asks for."""
    if m.s[O.PREFETCH] == Wish.FORECAST:
        see(m, See.PLANNED, 0)
    elif not m.s[O.HOST]:
        apply(m)
    elif m.s[S.N_PLAN] > 0:
        ask(m, APPLY, 0)


@kernel
def see(m: M, what: int, about: int) -> A:
    """What concerns forecasts (``moesim.engine.sights``)."""
    return call_with(m.s[O.SIGHTS], m, np.int64(what), np.int64(about))


@kernel
def tell(m: M, at: A, count: int) -> None:
    """Facts between layer events: so many records of what they foresee."""
    for _ in range(count):
        at = see(m, See.FACT, at)


@kernel
def barrier(m: M) -> bool:
    """``ReferenceEngine._barrier``: whether computing may begin."""
    if m.s[S.A_TAIL] - m.s[S.A_HEAD] < m.s[S.WAITING] and not m.s[S.BLOCKED]:
        wait(m, Does.BARRIER)
        return False
    return True


@kernel
def next_expert(m: M) -> bool:
    """``ReferenceEngine._compute``, one turn: False when the layer event is done."""
    while m.s[S.NEXT_HIT] < m.s[S.N_DEMAND]:
        i = m.s[S.NEXT_HIT]
        m.s[S.NEXT_HIT] += 1
        if m.cur[D.STATUS, i] == HIT:
            key = m.cur[D.EXPERT, i]
            m.s[S.C_KEY] = key
            pending(m, m.cur[D.NS, i], COMPUTE_DONE, Does.HIT)
            if not is_next(m):
                return True
            # ``expert_done`` of a copy that is not staged.
            m.s[S.T_EXPERTS] += m.cur[D.NS, i]
            unpin(m, key)
    if m.s[S.COMPUTED] < m.s[S.WAITING]:
        if m.s[S.A_HEAD] == m.s[S.A_TAIL]:
            wait(m, Does.STALLED)
            return True
        key = m.q[Q.ARRIVED, m.s[S.A_HEAD] & m.s[O.RING]]
        m.s[S.A_HEAD] += 1
        m.s[S.COMPUTED] += 1
        m.s[S.C_KEY] = key
        pending(m, m.cur[D.NS, m.k[K.ROW, key]], COMPUTE_DONE, Does.ARRIVAL)
        return True
    if m.s[S.CPU_RUNNING]:
        wait(m, Does.CPU)
        return True
    return False


def calls(machine: M) -> list[tuple[Any, Any]]:
    """What Python calls, and the types that it calls it with."""
    typeof: Any = numba.typeof
    m = typeof(machine)
    return [(run, (m,)), (quick_steps, (m,)), *common_calls(machine)]


def common_calls(machine: M) -> list[tuple[Any, Any]]:
    """Those of them that Python calls with several devices as well."""
    typeof: Any = numba.typeof
    m, number = typeof(machine), numba.int64
    return [
        (make_room, (m, number)),
        (obey, (m, number, number)),
        (schedule_step, (m,)),
        (schedule_idle, (m, number)),
        (place, (m, number)),
        (finish, (m,)),
    ]


@entry
def schedule_step(m: M) -> None:
    """Begin the block's first step now."""
    pending(m, 0, STEP_BEGIN, Does.STEP)


@entry
def schedule_idle(m: M, until_ns: int) -> None:
    """Serve nothing before a time."""
    pending(m, until_ns - m.s[S.NOW], ARRIVAL, Does.IDLE)


@entry
def place(m: M, key: int) -> None:
    """Make a copy resident before the run."""
    book(m, key, 1)
    enter(m, key)
    if not m.s[O.HOST]:
        keep_landed(m, key)


@entry
def finish(m: M) -> None:
    """``Link.finish``."""
    for i in range(m.s[S.P_COUNT]):
        key = m.q[Q.PREFETCH, i]
        if m.k[K.IS_ISSUED, key]:
            moved = moved_bytes(m, key)
            m.s[S.IN_FLIGHT_BYTES] += moved
            m.counts[m.k[K.PHASE, key], N.BYTES_LOADED] += moved
            m.s[S.UNUSED_AT_END] += 1
            m.s[S.UNUSED_AT_END_BYTES] += moved
        else:
            m.s[S.DROPPED] += 1
    for key in range(m.s[O.KEYS]):
        if m.k[K.UNUSED, key] and m.k[K.OWNER, key] == m.s[O.NUMBER]:
            m.s[S.UNUSED_AT_END] += 1
            m.s[S.UNUSED_AT_END_BYTES] += m.k[K.COPY, key]


# ---- host workers --------------------------------------------------------------------------------


@kernel
def job_begins(m: M, worker: int) -> A:
    """A worker takes the oldest job of a forecast; what it takes."""
    row = m.q[Q.JOBS, m.s[S.W_HEAD] & m.s[O.RING]]
    m.s[S.W_HEAD] += 1
    m.w[W.JOB, worker] = row
    return m.jobs[row, G.NS]


@kernel
def cpu_done(m: M, key: int) -> None:
    """``ReferenceEngine._on_cpu_done``."""
    m.s[S.CPU_RUNNING] -= 1
    m.k[K.PINNED, key] = 0
    if m.s[O.TIER]:
        tier(m, Shelf.UNPIN, key)
    wake_link(m)
    notify(m)


@kernel
def worker(m: M, i: int) -> None:
    """``Host._work``: something is done, or the worker wakes; then the next expert, or the next
    job, or sleep. Behind the workers stands the drive."""
    if i == m.s[O.WORKERS]:
        tier(m, Shelf.TURN, 0)
        return
    key = m.w[W.KEY, i]
    if key >= 0:
        span(m, ON_CPU, m.w[W.SPAN, i], key)
        if m.s[O.DEVICES]:
            call_with(m.s[O.DEVICE], m, CPU_DONE, np.int64(key))
        else:
            cpu_done(m, key)
    elif key == JOB_KEY:
        span(m, JOB, m.w[W.SPAN, i], -1)
        m.s[S.JOBS] -= 1
        if m.s[O.HOST]:
            ask(m, JOB_DONE, i)
        else:
            see(m, See.JOB, i)
    if m.s[S.H_HEAD] != m.s[S.H_TAIL]:
        key = m.q[Q.HOST, m.s[S.H_HEAD] & m.s[O.RING]]
        m.s[S.H_HEAD] += 1
        worker_pending(m, i, m.k[K.CPU_NS, key], COMPUTE_DONE, key)
    elif m.s[S.JOBS_QUEUED]:
        m.s[S.JOBS_QUEUED] -= 1
        takes = ask(m, JOB_BEGIN, i) if m.s[O.HOST] else job_begins(m, i)
        worker_pending(m, i, takes, WORKER_DONE, JOB_KEY)
    else:
        m.w[W.TIME, i] = FAR
        m.s[S.AWAKE] -= 1
        m.q[Q.ASLEEP, m.s[S.ASLEEP_TAIL] & m.s[O.RING]] = i
        m.s[S.ASLEEP_TAIL] += 1
