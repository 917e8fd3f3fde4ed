"""Plans in the compiled core: those of the built-in prefetch seats, and commands from Python."""

from __future__ import annotations

import numpy as np

from moesim.compiled import call_with, entry, kernel
from moesim.engine.channel import cancel, hold, new_transfer, p_insert, p_move, wake_link
from moesim.engine.fields import Command, D, E, K, O, P, Part, Q, S, Wish
from moesim.engine.keep import keep_planned
from moesim.engine.machine import (
    ABSENT,
    FAR,
    IDLE_KEY,
    MISS,
    QUEUED,
    RESIDENT,
    WORKER_DONE,
    A,
    M,
    worker_pending,
)

FIRST_WISH = 1 << 19
"""A load's place in its event: demand comes first, and is never so many."""

WAKE, WISH, CANCEL, REPRIORITISE = (
    int(part) for part in (Part.WAKE, Part.WISH, Part.CANCEL, Part.REPRIORITISE)
)


# ---- what concerns one key, or the device that owns it -------------------------------------------


@kernel
def wish(
    m: M, key: int, expires: int, priority: int, ordinal: int, replaces: int, phase: int
) -> None:
    """A plan wishes for a copy."""
    if not m.s[O.DEVICES]:
        wish_here(m, key, expires, priority, ordinal, replaces, phase)
        return
    m.s[S.A_EXPIRES], m.s[S.A_PRIORITY] = expires, priority
    m.s[S.A_ORDINAL], m.s[S.A_REPLACES], m.s[S.A_PHASE] = ordinal, replaces, phase
    call_with(m.s[O.DEVICE], m, WISH, np.int64(key))


@kernel
def take_back(m: M, key: int) -> None:
    """A plan takes back what it wished for."""
    if m.s[O.DEVICES]:
        call_with(m.s[O.DEVICE], m, CANCEL, np.int64(key))
    else:
        cancel(m, key)


@kernel
def reprioritise(m: M, key: int, priority: int) -> None:
    """A plan changes its mind about how much it wants a copy."""
    if m.s[O.DEVICES]:
        m.s[S.A_PRIORITY] = priority
        call_with(m.s[O.DEVICE], m, REPRIORITISE, np.int64(key))
    else:
        reprioritise_here(m, key, priority)


@kernel
def wake(m: M) -> None:
    """Wake the link, or all links."""
    for device in range(m.s[O.DEVICES]):
        call_with(m.s[O.DEVICE], m, WAKE, device)
    if not m.s[O.DEVICES]:
        wake_link(m)


@kernel
def wish_here(
    m: M, key: int, expires: int, priority: int, ordinal: int, replaces: int, phase: int
) -> None:
    """``ReferenceEngine._prefetch``."""
    if m.k[K.PENDING, key]:
        p_move(m, key, priority)
        m.k[K.EXPIRES, key] = expires
        m.k[K.IS_CANCELLED, key] = 0
    elif m.state[key] == RESIDENT:
        hold(m, key, priority, expires)
    elif m.state[key] == ABSENT and not is_unserved(m, key):
        new_transfer(m, key, phase, FIRST_WISH + ordinal, 1, 0, replaces)
        m.k[K.PRIORITY, key] = priority
        m.k[K.EXPIRES, key] = expires
        m.state[key] = QUEUED
        p_insert(m, key)
        m.s[S.PLANNED] += 1


@kernel
def is_unserved(m: M, key: int) -> bool:
    """A miss of the newest gate, whose plan is still being paid for."""
    return bool(
        m.s[S.UNSERVED]
        and m.k[K.MEMBER, key] == m.s[S.EVENT]
        and m.cur[D.STATUS, m.k[K.ROW, key]] == MISS
    )


# ---- from Python ---------------------------------------------------------------------------------


@entry
def obey(m: M, commands: int, phase: int) -> None:
    """``ReferenceEngine._apply`` of so many commands in ``M.told``."""
    for i in range(commands):
        does, key = m.told[i, P.DOES], m.told[i, P.KEY]
        if does == Command.PREFETCH:
            expires, priority = m.told[i, P.EXPIRES], m.told[i, P.PRIORITY]
            replaces, ordinal = m.told[i, P.REPLACES], m.told[i, P.ORDINAL]
            wish(m, key, expires, priority, ordinal, replaces, phase)
        elif does == Command.CANCEL:
            take_back(m, key)
        elif does == Command.REPRIORITISE:
            reprioritise(m, key, m.told[i, P.PRIORITY])
        else:
            m.s[S.JOBS] += 1
            m.s[S.JOBS_QUEUED] += 1
            wake_worker(m)
    wake(m)


@kernel
def reprioritise_here(m: M, key: int, priority: int) -> None:
    """``ReferenceEngine._reprioritise``."""
    if m.k[K.PENDING, key]:
        p_move(m, key, priority)
    elif m.k[K.HELD, key]:
        m.k[K.HOLD_PRIORITY, key] = priority


@kernel
def wake_worker(m: M) -> None:
    """``Host._wake``."""
    if m.s[S.ASLEEP_HEAD] != m.s[S.ASLEEP_TAIL]:
        i = m.q[Q.ASLEEP, m.s[S.ASLEEP_HEAD] & m.s[O.RING]]
        m.s[S.ASLEEP_HEAD] += 1
        m.s[S.AWAKE] += 1
        worker_pending(m, i, 0, WORKER_DONE, IDLE_KEY)


# ---- the built-in seats --------------------------------------------------------------------------


@kernel
def apply(m: M) -> None:
    """What the newest gate's plan in ``M.plan`` asks for."""
    for i in range(m.s[S.N_CANCEL]):
        take_back(m, m.plan[i, 0])
    first = m.s[S.N_CANCEL]
    for i in range(m.s[S.N_PLAN]):
        key, expires = m.plan[first + i, 0], m.plan[first + i, 1]
        if expires > m.s[S.EVENT]:
            name(m, key, expires)
            wish(m, key, expires, m.plan[first + i, 2], i, -1, m.s[S.PHASE])


@kernel
def make_plan(m: M) -> None:
    """The gate's plan, into ``M.plan``; what it wishes for and is absent is touched."""
    m.s[S.N_CANCEL] = refuted(m)
    cancels = m.s[S.N_CANCEL]
    m.s[S.N_PLAN] = plan(m, cancels)
    for i in range(m.s[S.N_PLAN]):
        key = m.plan[cancels + i, 0]
        if m.state[key] == ABSENT and m.k[K.MEMBER, key] != m.s[S.EVENT]:
            m.q[Q.ONE, 0] = key
            keep_planned(m)


@kernel
def name(m: M, key: int, expires: int) -> None:
    """Remember that a plan named a key for a layer event, once."""
    if expires >= FAR:
        return
    row = expires & (len(m.named) - 1)
    if m.named[row, 0] != expires:
        m.named[row, 0] = expires
        m.named[row, 1] = 0
    n = m.named[row, 1]
    if m.k[K.NAMED, key] == expires:
        return
    if m.s[O.PREFETCH] == Wish.FUTURE:
        for i in range(n):
            if m.named[row, 2 + i] == key:
                return
    m.k[K.NAMED, key] = expires
    m.named[row, 2 + n] = key
    m.named[row, 1] = n + 1


@kernel
def ahead(m: M, layer: int, distance: int) -> A:
    """``World.ahead``."""
    beyond = layer + distance - m.s[O.LAYERS]
    if beyond < 0:
        return layer + distance
    return m.s[O.DECODE_FROM] + beyond % (m.s[O.LAYERS] - m.s[O.DECODE_FROM])


@kernel
def plan(m: M, first: int) -> int:
    """The built-in prefetch seats: fills the plan from row ``first`` on; how many wishes."""
    what = m.s[O.PREFETCH]
    layer = m.s[S.GATE_LAYER]
    n = first
    if what == Wish.PREVIOUS:
        m.known[layer, 0] = m.s[S.N_DEMAND]
        for i in range(m.s[S.N_DEMAND]):
            m.known[layer, 1 + i] = m.cur[D.EXPERT, i]
        target = ahead(m, layer, m.s[O.DISTANCE])
        for i in range(m.known[target, 0]):
            n = put(m, n, m.known[target, 1 + i])
    elif what == Wish.AHEAD:
        base = (layer + m.s[O.DISTANCE]) * m.s[O.EXPERTS]
        row = m.ev[m.s[S.ROW], E.PLAN]
        if base < m.s[O.SIZE]:
            for i in range(m.ev[m.s[S.ROW], E.PLANS]):
                n = put(m, n, base + m.said[row + i])
    elif what == Wish.HOT:
        target = ahead(m, layer, m.s[O.DISTANCE])
        for i in range(m.known[target, 0]):
            n = put(m, n, m.known[target, 1 + i])
    elif what == Wish.WHOLE:
        base = ahead(m, layer, m.s[O.DISTANCE]) * m.s[O.EXPERTS]
        for i in range(m.s[O.EXPERTS]):
            n = put(m, n, base + i)
    elif what == Wish.FUTURE:
        last = min(m.s[S.EVENT] + m.s[O.DISTANCE], m.s[O.RUN_EVENTS] - 1)
        for event in range(m.s[S.EVENT] + 1, last + 1):
            for i in range(m.starts[event], m.starts[event + 1]):
                key = np.int64(m.future[i])
                if m.k[K.WISHED, key] == m.s[S.EVENT]:
                    continue
                m.k[K.WISHED, key] = m.s[S.EVENT]
                m.plan[n, 0] = key
                m.plan[n, 1] = event
                m.plan[n, 2] = -event
                n += 1
    return n - first


@kernel
def put(m: M, n: int, key: int) -> int:
    """One more wish, for the layer event ``distance`` on."""
    m.plan[n, 0] = key
    m.plan[n, 1] = m.s[S.EVENT] + m.s[O.DISTANCE]
    m.plan[n, 2] = 0
    return n + 1


@kernel
def refuted(m: M) -> int:
    """``NextGate._refuted``: what was named for this gate and is not demanded, into the plan."""
    n = 0
    row = m.s[S.EVENT] & (len(m.named) - 1)
    if m.s[O.CANCEL] and m.named[row, 0] == m.s[S.EVENT]:
        for i in range(m.named[row, 1]):
            key = m.named[row, 2 + i]
            if m.k[K.MEMBER, key] != m.s[S.EVENT]:
                m.plan[n, 0] = key
                n += 1
    return n
