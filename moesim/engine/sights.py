"""Forecasts in the compiled core: ``moesim.policies.forecast.ForecastSeat`` on arrays.

What a fact foresees depends on the workload alone, so it comes with the block (``foresight.py``)
and serves every configuration; when it is delivered depends on the clock, and that is done here.
A record of it is copied out of the block, which may be over before the job is done.

The core comes here by an address: most runs forecast nothing, and need not compile this.
"""

from __future__ import annotations

import numpy as np

from moesim.compiled import held_at, kernel, outside
from moesim.engine.fields import E, G, H, K, O, Q, S, See, W
from moesim.engine.keep import keep_expected, keep_planned
from moesim.engine.machine import ABSENT, KIND, A, M, call
from moesim.engine.wishes import name, reprioritise, take_back, wake, wake_worker, wish
from moesim.policies import forecast

DECODE = 1
RECORD, TITLE = len(G), len(H)

_priority = kernel(forecast.priority)


@outside
def sights(where: int, what: int, about: int) -> int:
    """All that the core does about forecasts. After a fact between layer events, where the record
    of the next one begins."""
    m = held_at(where, KIND)
    row = -1
    phase = DECODE
    after = 0
    if what == See.GATE:
        row = foresee(m)
    elif what == See.PLANNED:
        row = foreground(m)
        phase = m.s[S.PHASE]
    elif what == See.FACT:
        row = hear(m, about)
        phase = m.fore[about + G.PHASE]
        after = about + m.fore[about + G.LENGTH]
    else:
        row = m.w[W.JOB, about]
    # ``ForecastSeat._deliver``, and its plan carried out; at a gate, between the two, demand is.
    if row >= 0 and what != See.PLANNED:
        expect(m, row, what == See.GATE)
    if row >= 0 and what != See.GATE:
        renew(m, row)
    if what == See.PLANNED:
        answer(m)
    if row >= 0 and what != See.GATE:
        wish_for(m, row, phase)
    if what == See.JOB:
        m.jobs[row, G.IS_TAKEN] = 0
    if what == See.JOB or what == See.FACT:
        wake(m)
    return int(after)


# ---- facts ---------------------------------------------------------------------------------------


@kernel
def foresee(m: M) -> A:
    """``ForecastSeat.plan`` of a gate: what is past is forgotten, the rest has nearer priorities;
    what is new is commissioned, or to be expected at once: its row."""
    forget(m)
    refresh(m)
    at = m.ev[m.s[S.ROW], E.SIGHT]
    m.s[S.FOREGROUND] = m.ev[m.s[S.ROW], E.OWED_NS]
    m.s[S.COMMISSION] = -1
    if at >= 0 and not m.s[O.BACKGROUND]:
        m.s[S.COMMISSION] = at
        return take(m, at, m.s[O.QUEUE])
    if at >= 0 and has_room(m, at):
        m.s[S.COMMISSION] = at
    return np.int64(-1)


@kernel
def foreground(m: M) -> A:
    """The row of what was expected at once; -1 if there is none."""
    return m.s[O.QUEUE] if m.s[S.COMMISSION] >= 0 and not m.s[O.BACKGROUND] else np.int64(-1)


@kernel
def answer(m: M) -> None:
    """What else ``foresee`` has planned takes effect."""
    for i in range(m.s[S.N_FRESH]):
        reprioritise(m, m.q[Q.FRESH, i], m.q[Q.FRESHER, i])
    if m.s[S.COMMISSION] >= 0 and m.s[O.BACKGROUND]:
        submit(m, m.s[S.COMMISSION])


@kernel
def hear(m: M, at: int) -> A:
    """A fact between layer events, with its record: the row of what is to be delivered at once."""
    if not m.s[O.BACKGROUND]:
        return take(m, at, m.s[O.QUEUE])
    if has_room(m, at):
        submit(m, at)
    return np.int64(-1)


# ---- jobs ----------------------------------------------------------------------------------------


@kernel
def take(m: M, at: int, row: A) -> A:
    """Copy a record out of the block, to a row; which."""
    length = m.fore[at + G.LENGTH]
    for i in range(length):
        m.jobs[row, i] = m.fore[at + i]
    m.jobs[row, G.IS_TAKEN] = 1
    m.jobs[row, G.BASE] = m.s[S.EVENT]
    return row


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
    row = np.int64(0)
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


# ---- delivery ------------------------------------------------------------------------------------


@kernel
def expect(m: M, row: A, at_gate: bool) -> None:
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
def touch(m: M, key: int, at_gate: bool) -> None:
    """``SeatPolicy.on``: an absent expert was planned."""
    if m.state[key] == ABSENT and not (at_gate and m.k[K.MEMBER, key] == m.s[S.EVENT]):
        m.q[Q.ONE, 0] = key
        keep_planned(m)


@kernel
def renew(m: M, row: A) -> None:
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
                    take_back(m, key)
            m.s[S.N_WISHED] = left
        at = shares + m.s[O.EXPERTS]


@kernel
def wish_for(m: M, row: A, phase: int) -> None:
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
