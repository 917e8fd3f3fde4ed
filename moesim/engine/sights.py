"""Forecasts in the compiled core: ``moesim.policies.forecast.ForecastSeat`` on arrays.

What a fact foresees depends on the workload alone, so it comes with the block (``foresight.py``)
and serves every configuration; when it is delivered depends on the clock, and that is done here.
A record of it is copied out of the block, which may be over before the job is done.
"""

from __future__ import annotations

from moesim.compiled import kernel
from moesim.engine.channel import cancel, p_move, wake_link
from moesim.engine.fields import E, G, H, K, O, Q, S, W
from moesim.engine.keep import keep_expected, keep_planned
from moesim.engine.machine import ABSENT, A, M, call
from moesim.engine.wishes import name, wake_worker, wish
from moesim.policies import forecast

DECODE = 1
RECORD, TITLE = len(G), len(H)

_priority = kernel(forecast.priority)


# ---- facts ---------------------------------------------------------------------------------------


@kernel
def foresee(m: M) -> None:
    """``ForecastSeat.plan`` of a gate: what is past is forgotten, the rest has nearer priorities;
    what is new is commissioned, or expected at once."""
    forget(m)
    refresh(m)
    at = m.ev[m.s[S.ROW], E.SIGHT]
    m.s[S.FOREGROUND] = m.ev[m.s[S.ROW], E.OWED_NS]
    m.s[S.COMMISSION] = -1
    if at >= 0 and not m.s[O.BACKGROUND]:
        take(m, at, m.s[O.QUEUE])
        expect(m, m.s[O.QUEUE], 1)
        m.s[S.COMMISSION] = at
    elif at >= 0 and has_room(m, at):
        m.s[S.COMMISSION] = at


@kernel
def answer(m: M) -> None:
    """What ``foresee`` has planned takes effect."""
    foreground = m.s[S.COMMISSION] >= 0 and not m.s[O.BACKGROUND]
    if foreground:
        renew(m, m.s[O.QUEUE])
    for i in range(m.s[S.N_FRESH]):
        key = m.q[Q.FRESH, i]
        if m.k[K.PENDING, key]:
            p_move(m, key, m.q[Q.FRESHER, i])
        elif m.k[K.HELD, key]:
            m.k[K.HOLD_PRIORITY, key] = m.q[Q.FRESHER, i]
    if foreground:
        wish_for(m, m.s[O.QUEUE], m.s[S.PHASE])
    elif m.s[S.COMMISSION] >= 0:
        submit(m, m.s[S.COMMISSION])


@kernel
def tell(m: M, at: int, count: int) -> None:
    """Facts between layer events: so many records from a place on."""
    for _ in range(count):
        if not m.s[O.BACKGROUND]:
            take(m, at, m.s[O.QUEUE])
            deliver(m, m.s[O.QUEUE], m.fore[at + G.PHASE])
        elif has_room(m, at):
            submit(m, at)
        wake_link(m)
        at += m.fore[at + G.LENGTH]


# ---- jobs ----------------------------------------------------------------------------------------


@kernel
def take(m: M, at: int, row: int) -> None:
    """Copy a record out of the block."""
    length = m.fore[at + G.LENGTH]
    for i in range(length):
        m.jobs[row, i] = m.fore[at + i]
    m.jobs[row, G.IS_TAKEN] = 1
    m.jobs[row, G.BASE] = m.s[S.EVENT]


@kernel
def has_room(m: M, at: int) -> bool:
    """Whether a job may wait; if not, what later ones build upon is left to the next of them."""
    if m.s[S.JOBS] < m.s[O.QUEUE]:
        return True
    m.s[S.OWED_OPS] += m.fore[at + G.KEPT_OPS]
    m.s[S.OWED_BYTES] += m.fore[at + G.KEPT_BYTES]
    return False


@kernel
def submit(m: M, at: int) -> None:
    """``Host.submit``."""
    row = 0
    while m.jobs[row, G.IS_TAKEN]:
        row += 1
    take(m, at, row)
    m.jobs[row, G.NS] = takes_ns(m, at)
    m.q[Q.JOBS, m.s[S.W_TAIL] & m.s[O.RING]] = row
    m.s[S.W_TAIL] += 1
    m.s[S.JOBS] += 1
    m.s[S.JOBS_MADE] += 1
    m.s[S.JOBS_QUEUED] += 1
    wake_worker(m)


@kernel
def takes_ns(m: M, at: int) -> A:
    """What a job takes, with the work that it inherits."""
    if not m.s[S.OWED_OPS] and not m.s[S.OWED_BYTES]:
        return m.fore[at + G.NS]
    ops = m.fore[at + G.OPS] + m.s[S.OWED_OPS]
    nbytes = m.fore[at + G.BYTES] + m.s[S.OWED_BYTES]
    m.s[S.OWED_OPS] = m.s[S.OWED_BYTES] = 0
    return call(m.s[O.PRICE], ops, nbytes)


@kernel
def job_begins(m: M, worker: int) -> A:
    """A worker takes the oldest job; what it takes."""
    row = m.q[Q.JOBS, m.s[S.W_HEAD] & m.s[O.RING]]
    m.s[S.W_HEAD] += 1
    m.w[W.JOB, worker] = row
    return m.jobs[row, G.NS]


@kernel
def job_done(m: M, worker: int) -> None:
    """``ForecastSeat.plan`` of a job's result."""
    row = m.w[W.JOB, worker]
    deliver(m, row, DECODE)
    m.jobs[row, G.IS_TAKEN] = 0
    wake_link(m)


# ---- delivery ------------------------------------------------------------------------------------


@kernel
def deliver(m: M, row: int, phase: int) -> None:
    """``ForecastSeat._deliver``, and its plan carried out."""
    expect(m, row, 0)
    renew(m, row)
    wish_for(m, row, phase)


@kernel
def expect(m: M, row: int, at_gate: int) -> None:
    """The seats hear of the forecasts in a row of ``M.jobs``: what is wished for, what was absent
    of it, what is expected of each layer."""
    base = m.jobs[row, G.BASE]
    at = RECORD
    for _ in range(m.jobs[row, G.COUNT]):
        due = base + m.jobs[row, at + H.EVENTS]
        first = m.jobs[row, at + H.LAYER] * m.s[O.EXPERTS]
        chosen = m.jobs[row, at + H.CHOSEN]
        shares = at + TITLE + chosen
        if due > m.s[S.EVENT]:
            for i in range(at + TITLE, shares):
                wished(m, first + m.jobs[row, i], m.jobs[row, shares + m.jobs[row, i]], due)
        at = shares + m.s[O.EXPERTS]
    at = RECORD
    for _ in range(m.jobs[row, G.COUNT]):
        due = base + m.jobs[row, at + H.EVENTS]
        first = m.jobs[row, at + H.LAYER] * m.s[O.EXPERTS]
        shares = at + TITLE + m.jobs[row, at + H.CHOSEN]
        if due > m.s[S.EVENT]:
            for i in range(at + TITLE, shares):
                touch(m, first + m.jobs[row, i], at_gate)
        at = shares + m.s[O.EXPERTS]
    at = RECORD
    for _ in range(m.jobs[row, G.COUNT]):
        shares = at + TITLE + m.jobs[row, at + H.CHOSEN]
        keep_expected(m, m.jobs[row, at + H.LAYER], row, shares)
        at = shares + m.s[O.EXPERTS]


@kernel
def wished(m: M, key: int, share: int, due: int) -> None:
    """Remember what a forecast wishes for."""
    if m.k[K.DUE, key] < 0:
        m.q[Q.WISHED, m.s[S.N_WISHED]] = key
        m.s[S.N_WISHED] += 1
    m.k[K.SHARE, key] = share
    m.k[K.DUE, key] = due


@kernel
def touch(m: M, key: int, at_gate: int) -> None:
    """``SeatPolicy.on``: an absent expert was planned."""
    if m.state[key] == ABSENT and not (at_gate and m.k[K.MEMBER, key] == m.s[S.EVENT]):
        m.q[Q.ONE, 0] = key
        keep_planned(m)


@kernel
def renew(m: M, row: int) -> None:
    """``ForecastSeat._outdated``: take back what older forecasts of these layers wish for."""
    if not m.s[O.RENEW]:
        return
    at = RECORD
    for _ in range(m.jobs[row, G.COUNT]):
        due = m.jobs[row, G.BASE] + m.jobs[row, at + H.EVENTS]
        first = m.jobs[row, at + H.LAYER] * m.s[O.EXPERTS]
        shares = at + TITLE + m.jobs[row, at + H.CHOSEN]
        if due > m.s[S.EVENT]:
            left = 0
            for j in range(m.s[S.N_WISHED]):
                key = m.q[Q.WISHED, j]
                named = m.k[K.DUE, key] != due
                for i in range(at + TITLE, shares):
                    named = named or first + m.jobs[row, i] == key
                if named:
                    m.q[Q.WISHED, left] = key
                    left += 1
                else:
                    m.k[K.DUE, key] = -1
                    cancel(m, key)
            m.s[S.N_WISHED] = left
        at = shares + m.s[O.EXPERTS]


@kernel
def wish_for(m: M, row: int, phase: int) -> None:
    """The wishes of the forecasts in a row of ``M.jobs``."""
    at = RECORD
    ordinal = 0
    for _ in range(m.jobs[row, G.COUNT]):
        due = m.jobs[row, G.BASE] + m.jobs[row, at + H.EVENTS]
        first = m.jobs[row, at + H.LAYER] * m.s[O.EXPERTS]
        shares = at + TITLE + m.jobs[row, at + H.CHOSEN]
        if due > m.s[S.EVENT]:
            for i in range(at + TITLE, shares):
                key = first + m.jobs[row, i]
                urgency = _priority(m.jobs[row, shares + m.jobs[row, i]], due - m.s[S.EVENT])
                name(m, key, due)
                wish(m, key, due, urgency, ordinal, -1, phase)
                ordinal += 1
        at = shares + m.s[O.EXPERTS]


# ---- what is on its way --------------------------------------------------------------------------


@kernel
def forget(m: M) -> None:
    """Wishes for layer events that have come are past."""
    left = 0
    for i in range(m.s[S.N_WISHED]):
        key = m.q[Q.WISHED, i]
        if m.k[K.DUE, key] > m.s[S.EVENT]:
            m.q[Q.WISHED, left] = key
            left += 1
        else:
            m.k[K.DUE, key] = -1
    m.s[S.N_WISHED] = left


@kernel
def refresh(m: M) -> None:
    """``ForecastSeat._refreshed``: priorities as seen from this gate."""
    n = 0
    if m.s[O.REFRESH]:
        for i in range(m.s[S.N_WISHED]):
            key = m.q[Q.WISHED, i]
            if m.state[key] != ABSENT:
                m.q[Q.FRESH, n] = key
                distance = m.k[K.DUE, key] - m.s[S.EVENT]
                m.q[Q.FRESHER, n] = _priority(m.k[K.SHARE, key], distance)
                n += 1
    m.s[S.N_FRESH] = n
