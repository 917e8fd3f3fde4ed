"""Several devices in the compiled core: as ``ReferenceEngine`` with several lanes and links.

A device is a machine of its own: scalars, queues, demand and counts are its own; the facts of keys
and caches, the logs and the first ``SHARED`` scalars are everybody's, and are lent to the device
while it acts. So all that one device does in ``kernel`` and ``channel`` is done here as well, and
nothing there need know that there are several. The machine of the whole run has the compute lane's
dense part, the gates, the policy and the host.

The core comes to a device by an address, as it does to ``sights``: runs of one device need not
compile this.
"""

from __future__ import annotations

import numpy as np

from moesim import log
from moesim.compiled import call_with, entry, held_at, kernel, lay_at, outside
from moesim.engine.channel import (
    cancel,
    expire,
    link_done,
    link_grant,
    new_transfer,
    wake_link,
)
from moesim.engine.fields import SHARED, D, Does, K, Keep, N, O, Part, Q, S, W
from moesim.engine.keep import keep_gate, promote
from moesim.engine.kernel import (
    CPU,
    FAILED,
    FETCH,
    GOES_ON,
    PAUSED,
    SPANS_FULL,
    TOO_LONG,
    TURNS,
    answer,
    barrier,
    before,
    between,
    carry_out,
    claim,
    cpu_done,
    dense_done,
    end_event,
    expert_done,
    next_expert,
    open_gate,
    pays,
    stalled,
    worker,
)
from moesim.engine.machine import (
    COMPUTE_DONE,
    EXCHANGE,
    FAR,
    GATE,
    KIND,
    LATE,
    LINK_GRANT,
    LOAD_DONE,
    MISS,
    QUEUED,
    A,
    M,
    choice,
    pending,
    span,
    word,
)
from moesim.engine.order import reorder
from moesim.engine.wishes import reprioritise_here, wake, wake_worker, wish_here

LANES = 9
"""How far apart the lanes of two devices are numbered in ``M.spans``."""

GRANT, SENT, COMPUTE, GATED = (
    int(part) for part in (Part.GRANT, Part.SENT, Part.COMPUTE, Part.GATE)
)
RESTS = FAR + 1
"""The time of a lane that waits for nothing, and that no arrival wakes."""

PROMOTE, REORDER, FETCHES, BEGIN = (
    int(part) for part in (Part.PROMOTE, Part.REORDER, Part.FETCH, Part.BEGIN)
)


@entry
def lay(m: M, where: int) -> int:
    """Keep a device's machine where ``device`` finds it; how many bytes that takes."""
    return int(lay_at(np.int64(where), m))


# ---- one device ----------------------------------------------------------------------------------


@outside
def device(where: int, what: int, about: int) -> int:
    """All that the core has a device do: with a key, the row of a demand, or as the device of a
    number. COMPUTE answers whether its part of the layer event is done."""
    m = held_at(where, KIND)
    number = about
    if what == Part.FETCH:
        number = m.k[K.OWNER, m.cur[D.EXPERT, about]]
    elif what >= Part.CPU_DONE and what != Part.WAKE:
        number = m.k[K.OWNER, about]
    own = held_at(m.each[number, O.PLACE], KIND)
    for i in range(SHARED):
        own.s[i] = m.s[i]
    spans = own.s[S.N_SPANS]
    done = 0
    if what == Part.GRANT:
        own.s[S.LINKS] = m.s[S.LINKS]
        link_grant(own)
    elif what == Part.SENT:
        link_done(own)
    elif what == Part.COMPUTE:
        done = compute(own)
    elif what == Part.GATE:
        take_part(m, own, number)
    elif what == Part.PROMOTE:
        promote(own)
    elif what == Part.REORDER:
        reorder(own)
    elif what == Part.FETCH:
        await_load(m, own, about)
    elif what == Part.BEGIN:
        own.s[S.WAS_EXPERTS] = own.s[S.T_EXPERTS]
        own.s[S.WAS_STALL] = own.s[S.T_STALL]
        own.s[S.WAS_CPU] = own.s[S.T_CPU]
        pending(own, 0, LOAD_DONE, Does.BEGIN)
    elif what == Part.CPU_DONE:
        cpu_done(own, about)
    elif what == Part.WISH:
        wish_here(
            own,
            about,
            m.s[S.A_EXPIRES],
            m.s[S.A_PRIORITY],
            m.s[S.A_ORDINAL],
            m.s[S.A_REPLACES],
            m.s[S.A_PHASE],
        )
    elif what == Part.CANCEL:
        cancel(own, about)
    elif what == Part.REPRIORITISE:
        reprioritise_here(own, about, m.s[S.A_PRIORITY])
    if what == Part.WAKE or what == Part.GATE:
        wake_link(own)
    for i in range(SHARED):
        m.s[i] = own.s[i]
    for i in range(spans, own.s[S.N_SPANS]):
        m.spans[i, 0] += LANES * (number + 1)
    return int(done)


@kernel
def take_part(m: M, own: M, number: int) -> None:
    """A device's part of a gate: what it owns of the demand, judged; what is out of date goes."""
    n = 0
    for i in range(m.s[S.N_DEMAND]):
        key = m.cur[D.EXPERT, i]
        if m.k[K.OWNER, key] == number:
            for column in range(len(m.cur)):
                own.cur[column, n] = m.cur[column, i]
            m.k[K.ROW, key] = n
            n += 1
    own.s[S.N_DEMAND] = n
    own.s[S.R_COUNT] = 0
    own.s[S.WAITING] = 0
    own.s[S.CPU_RUNNING] = 0
    claim(own)
    expire(own)


@kernel
def await_load(m: M, own: M, i: int) -> None:
    """A row of the demand goes on the link, or is under way there."""
    key = m.cur[D.EXPERT, i]
    own.s[S.WAITING] += 1
    if m.cur[D.STATUS, i] == MISS:
        new_transfer(own, key, m.cur[D.PHASE, i], i, 0, own.s[O.BYPASS], -1)
        own.state[key] = QUEUED
        own.q[Q.DEMAND, own.s[S.D_TAIL] & own.s[O.RING]] = key
        own.s[S.D_TAIL] += 1


@kernel
def compute(m: M) -> int:
    """What a device's lane waited for has happened; 1 when its part of the layer event is done."""
    does = m.s[S.C_DOES]
    if does == Does.BEGIN:
        m.s[S.NEXT_HIT] = 0
        m.s[S.COMPUTED] = 0
        m.s[S.BLOCKED] = 0
    elif does == Does.HIT or does == Does.ARRIVAL:
        expert_done(m)
    elif does == Does.CPU:
        m.s[S.T_CPU] += m.s[S.NOW] - m.s[S.C_SPAN]
    else:
        stalled(m)
    waits = does == Does.BEGIN or does == Does.BARRIER
    if waits and m.s[O.BARRIER] and not barrier(m):
        return 0
    if next_expert(m):
        return 0
    m.s[S.C_TIME] = RESTS
    return 1


# ---- all of them ---------------------------------------------------------------------------------


@entry
def run_devices(m: M) -> int:
    """``kernel.run`` of several devices."""
    for _ in range(TURNS):
        if m.s[S.FAILED]:
            return FAILED
        if m.s[O.SPANS] and m.s[S.N_SPANS] > len(m.spans) - 4:
            return SPANS_FULL
        n = m.s[O.DEVICES]
        who, when, rank, seq = 0, m.s[S.C_TIME], m.s[S.C_RANK], m.s[S.C_SEQ]
        for i in range(n):
            time, its, order = m.each[i, S.L_TIME], m.each[i, S.L_RANK], m.each[i, S.L_SEQ]
            if before(time, its, order, when, rank, seq):
                who, when, rank, seq = 1 + i, time, its, order
            time, its, order = m.each[i, S.C_TIME], m.each[i, S.C_RANK], m.each[i, S.C_SEQ]
            if before(time, its, order, when, rank, seq):
                who, when, rank, seq = 1 + n + i, time, its, order
        if m.s[S.AWAKE]:
            for i in range(m.s[O.WORKERS]):
                time, its, order = m.w[W.TIME, i], m.w[W.RANK, i], m.w[W.SEQ, i]
                if before(time, its, order, when, rank, seq):
                    who, when, rank, seq = 1 + 2 * n + i, time, its, order
        if when >= FAR:
            return TOO_LONG
        m.s[S.NOW] = when
        if who > 2 * n:
            worker(m, who - 2 * n - 1)
        elif who > n:
            number = who - n - 1
            if call_with(m.s[O.DEVICE], m, COMPUTE, number):
                computed(m, number)
        elif who > 0:
            grants = rank == LINK_GRANT
            if grants:
                count_links(m, who - 1)
            call_with(m.s[O.DEVICE], m, GRANT if grants else SENT, who - 1)
        else:
            stop = coordinate(m)
            if stop != GOES_ON:
                return int(stop)
    return PAUSED


@kernel
def count_links(m: M, granted: int) -> None:
    """``Link._ends_beside``: how many links draw on the host, with the one that is granted."""
    links = 1
    for i in range(m.s[O.DEVICES]):
        sends = m.each[i, S.L_KEY] >= 0
        has_demand = m.each[i, S.D_HEAD] != m.each[i, S.D_TAIL]
        links += i != granted and (sends or has_demand)
    m.s[S.LINKS] = links


@kernel
def coordinate(m: M) -> A:
    """What all devices wait for has happened: why the core stops, or that it goes on."""
    does = m.s[S.C_DOES]
    if does == Does.DENSE:
        dense_done(m)
        m.s[S.T_SYNC] += m.s[O.SYNC]
        pending(m, m.s[O.SYNC], GATE, Does.GATE)
    elif does == Does.GATE or does == Does.PLANNED:
        if does == Does.GATE:
            gates(m)
            if pays(m):
                return GOES_ON
        demands(m)
        if not m.s[S.AT_WORK]:
            exchange(m)
    elif does == Does.JOINED:
        exchange(m)
    elif does == Does.EXCHANGED:
        m.s[S.T_EXCHANGE] += m.s[S.NOW] - m.s[S.C_SPAN]
        span(m, EXCHANGE, m.s[S.C_SPAN], -1)
        end_event(m)
    else:
        return between(m, does)
    return GOES_ON


@kernel
def gates(m: M) -> None:
    """The gate, each device's part of it, and the policy's answer."""
    open_gate(m)
    largest = 0
    overflows = 0
    for i in range(m.s[O.DEVICES]):
        over = m.each[i, S.OVERFLOWS]
        m.each[i, S.LARGEST_UNION] = 0
        call_with(m.s[O.DEVICE], m, GATED, i)
        largest += m.each[i, S.LARGEST_UNION]
        overflows += m.each[i, S.OVERFLOWS] - over
    m.s[S.LARGEST_UNION] = max(m.s[S.LARGEST_UNION], largest)
    m.s[S.OVERFLOWS] += overflows > 0
    for i in range(m.s[S.N_DEMAND]):
        m.counts[m.cur[D.PHASE, i], N.MISSES] += m.cur[D.STATUS, i] == MISS
    if not m.s[O.HOST]:
        for i in range(m.s[O.DEVICES] if m.s[O.KEEP] == Keep.SLRU else 0):
            call_with(m.s[O.DEVICE], m, PROMOTE, i)
        keep_gate(m)
        for i in range(m.s[O.DEVICES]):
            call_with(m.s[O.DEVICE], m, REORDER, i)
    answer(m)


@kernel
def demands(m: M) -> None:
    """``Desk.demand``, the plan, and the devices begin."""
    m.s[S.UNSERVED] = 0
    for i in range(m.s[S.N_DEMAND]):
        key, status, how = m.cur[D.EXPERT, i], m.cur[D.STATUS, i], m.cur[D.SERVE, i]
        if status == LATE:
            call_with(m.s[O.DEVICE], m, FETCHES, i)
        elif status == MISS and how == FETCH:
            m.s[S.SERVED_FETCH] += 1
            call_with(m.s[O.DEVICE], m, FETCHES, i)
        elif status == MISS:
            word(m, log.SERVED)
            word(m, m.s[S.NOW])
            word(m, key)
            word(m, how)
            choice(m, log.SERVED)
            choice(m, key)
            choice(m, how)
            if how == CPU:
                m.s[S.SERVED_CPU] += 1
                m.each[m.k[K.OWNER, key], S.CPU_RUNNING] += 1
                m.k[K.CPU_NS, key] = m.cur[D.CPU_NS, i]
                m.q[Q.HOST, m.s[S.H_TAIL] & m.s[O.RING]] = key
                m.s[S.H_TAIL] += 1
                wake_worker(m)
            else:
                m.s[S.SERVED_SKIP] += 1
                m.k[K.PINNED, key] = 0
    carry_out(m)
    wake(m)
    m.s[S.AT_WORK] = 0
    m.s[S.C_TIME] = FAR
    for i in range(m.s[O.DEVICES]):
        if m.each[i, S.N_DEMAND]:
            m.s[S.AT_WORK] += 1
            call_with(m.s[O.DEVICE], m, BEGIN, i)


@kernel
def computed(m: M, number: int) -> None:
    """A device is done. Where the last one's time went, the layer event's did."""
    m.s[S.AT_WORK] -= 1
    if m.s[S.AT_WORK]:
        return
    stall = m.each[number, S.T_STALL] - m.each[number, S.WAS_STALL]
    m.s[S.T_EXPERTS] += m.each[number, S.T_EXPERTS] - m.each[number, S.WAS_EXPERTS]
    m.s[S.T_STALL] += stall
    m.s[S.T_CPU] += m.each[number, S.T_CPU] - m.each[number, S.WAS_CPU]
    m.counts[2, m.s[S.GATE_LAYER]] += stall
    m.each[number, S.SLOWEST] += 1
    pending(m, 0, COMPUTE_DONE, Does.JOINED)


@kernel
def exchange(m: M) -> None:
    """The tokens' hidden states travel, and the layer event is done."""
    if m.s[S.EXCHANGE_NS]:
        pending(m, m.s[S.EXCHANGE_NS], COMPUTE_DONE, Does.EXCHANGED)
    else:
        end_event(m)
