"""Host memory and the drive in the compiled core: ``moesim.tier`` and ``moesim.engine.drive``.

The drive stands behind the host workers, as one more that has a pending event. The core comes here
by an address: most runs have room for every expert, and need not compile this.
"""

from __future__ import annotations

from moesim import log
from moesim.compiled import held_at, kernel, outside
from moesim.engine.channel import wake_sender
from moesim.engine.fields import K, O, Q, S, Shelf, W
from moesim.engine.machine import (
    FAR,
    KIND,
    LOAD_DONE,
    READ_GRANT,
    READING,
    A,
    M,
    record,
    span,
    worker_pending,
)
from moesim.engine.wishes import wake_worker

FETCHED, HOSTED = 1, 2
"""What waits for a copy: the link, or a host worker."""


@outside
def shelf(where: int, what: int, about: int) -> int:
    """All that the core does about host memory. Of a demand, whether the copy is there."""
    m = held_at(where, KIND)
    there = 1
    if what == Shelf.WAKE:
        wake(m)
    elif what == Shelf.TURN:
        turn(m)
    elif what == Shelf.PIN:
        pin(m, about)
    elif what == Shelf.UNPIN:
        m.k[K.USES, about] -= 1
        wake(m)
    else:
        there = need(m, about, HOSTED if what == Shelf.HOST else FETCHED)
    return int(there)


# ---- who needs copies ----------------------------------------------------------------------------


@kernel
def need(m: M, key: int, how: int) -> A:
    """``Tier.need``."""
    if m.k[K.IS_NEAR, key]:
        m.s[S.DRAM_HITS] += 1
        pin(m, key)
    else:
        m.s[S.DRAM_MISSES] += 1
        m.k[K.NEEDED, key] = how
        m.q[Q.READS, m.s[S.N_READS]] = key
        m.s[S.N_READS] += 1
        wake(m)
    return m.k[K.IS_NEAR, key]


@kernel
def pin(m: M, key: int) -> None:
    """``Tier.pin``."""
    m.k[K.USES, key] += 1
    touch(m, key)


@kernel
def touch(m: M, key: int) -> None:
    """``Tier._touch``."""
    take_off(m, key)
    put_on(m, key)


@kernel
def put_on(m: M, key: int) -> None:
    """Into the list of what there is, as the last used."""
    head = m.s[O.SHELF]
    before = m.k[K.SHELF_BEFORE, head]
    m.k[K.SHELF_AFTER, before] = key
    m.k[K.SHELF_BEFORE, key] = before
    m.k[K.SHELF_AFTER, key] = head
    m.k[K.SHELF_BEFORE, head] = key


@kernel
def take_off(m: M, key: int) -> None:
    """Out of that list."""
    before, after = m.k[K.SHELF_BEFORE, key], m.k[K.SHELF_AFTER, key]
    m.k[K.SHELF_AFTER, before] = after
    m.k[K.SHELF_BEFORE, after] = before


# ---- the drive -----------------------------------------------------------------------------------


@kernel
def wake(m: M) -> None:
    """``Drive.wake``."""
    drive = m.s[O.WORKERS]
    if m.w[W.TIME, drive] == FAR and (m.s[S.N_READS] or m.s[S.P_COUNT]):
        m.s[S.AWAKE] += 1
        worker_pending(m, drive, 0, READ_GRANT, -1)


@kernel
def turn(m: M) -> None:
    """``Drive.run``, one turn."""
    drive = m.s[O.WORKERS]
    key = m.w[W.KEY, drive]
    if key >= 0:
        was_read(m, key)
        worker_pending(m, drive, 0, READ_GRANT, -1)
        return
    key = next_read(m)
    if key < 0:
        m.w[W.TIME, drive] = FAR
        m.s[S.AWAKE] -= 1
        return
    row, sent = m.k[K.READ_CURVE, key], m.k[K.READ_SENT, key]
    last = m.ends[row, 0] if m.k[K.NEEDED, key] else sent + 1
    m.s[S.READ_LAST] = last
    worker_pending(m, drive, m.ends[row, last] - (m.ends[row, sent] if sent else 0), LOAD_DONE, key)


@kernel
def next_read(m: M) -> A:
    """``Tier.next_read``; -1 if there is none."""
    demanded = m.s[S.N_READS]
    full = FAR
    for i in range(demanded + m.s[S.P_COUNT]):
        key = m.q[Q.READS, i] if i < demanded else m.q[Q.PREFETCH, i - demanded]
        if m.k[K.IS_NEAR, key]:
            continue
        if m.k[K.READ_SENT, key] >= 0:
            return key
        nbytes = m.k[K.COPY, key]
        if nbytes >= full:
            continue
        if make_room(m, nbytes - (m.s[O.DRAM] - m.s[S.DRAM_USED]), i < demanded):
            m.k[K.READ_SENT, key] = 0
            m.s[S.DRAM_USED] += nbytes
            put_on(m, key)
            return key
        full = nbytes
    return -1


@kernel
def make_room(m: M, lacking: A, demanded: bool) -> bool:
    """``Tier._make_room``."""
    head = m.s[O.SHELF]
    left = lacking
    key = m.k[K.SHELF_AFTER, head]
    while left > 0 and key != head:
        if may_leave(m, key, demanded):
            left -= m.k[K.COPY, key]
        key = m.k[K.SHELF_AFTER, key]
    if left > 0:
        return False
    key = m.k[K.SHELF_AFTER, head]
    while lacking > 0:
        after = m.k[K.SHELF_AFTER, key]
        if may_leave(m, key, demanded):
            lacking -= m.k[K.COPY, key]
            forget(m, key)
        key = after
    return True


@kernel
def may_leave(m: M, key: A, demanded: bool) -> bool:
    """Whether nothing holds a copy, or the beginning of one."""
    if m.k[K.USES, key] or m.k[K.NEEDED, key]:
        return False
    return bool(demanded or not m.k[K.PENDING, key] or m.k[K.IS_ISSUED, key])


@kernel
def forget(m: M, key: A) -> None:
    """``Tier._forget``."""
    m.s[S.DRAM_EVICTIONS] += 1
    m.s[S.DRAM_EVICTED] += read_bytes(m, key)
    m.s[S.DRAM_USED] -= m.k[K.COPY, key]
    take_off(m, key)
    m.k[K.IS_NEAR, key] = 0
    m.k[K.READ_SENT, key] = -1
    record(m, log.FORGET, key)


@kernel
def read_bytes(m: M, key: A) -> A:
    """``Tier._moved_bytes``."""
    chunk = m.s[O.READ_CHUNK] if m.s[O.READ_CHUNK] else m.k[K.COPY, key]
    return min(m.k[K.COPY, key], m.k[K.READ_SENT, key] * chunk)


@kernel
def was_read(m: M, key: A) -> None:
    """``Tier.was_read``."""
    start = m.w[W.SPAN, m.s[O.WORKERS]]
    span(m, READING, start, key)
    m.s[S.BYTES_READ] -= read_bytes(m, key)
    m.k[K.READ_SENT, key] = m.s[S.READ_LAST]
    m.s[S.BYTES_READ] += read_bytes(m, key)
    m.s[S.READ_NS] += m.s[S.NOW] - start
    if m.s[S.READ_LAST] < m.ends[m.k[K.READ_CURVE, key], 0]:
        return
    m.k[K.IS_NEAR, key] = 1
    m.s[S.READS] += 1
    record(m, log.READ, key)
    touch(m, key)
    how = m.k[K.NEEDED, key]
    if how:
        stop_waiting(m, key)
        pin(m, key)
    if how == FETCHED:
        m.q[Q.DEMAND, m.s[S.D_TAIL] & m.s[O.RING]] = key
        m.s[S.D_TAIL] += 1
    elif how == HOSTED:
        m.q[Q.HOST, m.s[S.H_TAIL] & m.s[O.RING]] = key
        m.s[S.H_TAIL] += 1
        wake_worker(m)
    wake_sender(m)


@kernel
def stop_waiting(m: M, key: A) -> None:
    """Out of what demand waits for."""
    m.k[K.NEEDED, key] = 0
    i = 0
    while m.q[Q.READS, i] != key:
        i += 1
    m.s[S.N_READS] -= 1
    while i < m.s[S.N_READS]:
        m.q[Q.READS, i] = m.q[Q.READS, i + 1]
        i += 1
