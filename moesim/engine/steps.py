"""The beginning and the end of a step in the compiled core."""

from __future__ import annotations

from moesim.compiled import entry, kernel
from moesim.engine.channel import abandon, candidates, evict, wake_link
from moesim.engine.fields import Ask, C, Does, E, K, N, O, Q, S, T
from moesim.engine.machine import COMPUTE_DONE, GATE, M, ask, pending
from moesim.engine.order import choose_victims

CHOOSE = int(Ask.CHOOSE)


@kernel
def begin_step(m: M) -> None:
    """``ReferenceEngine._step`` up to its first layer event."""
    row = m.s[S.STEP]
    m.st[row, T.BEGIN_NS] = m.s[S.NOW]
    m.st[row, T.STALL_NS] = -m.s[S.T_STALL]
    m.st[row, T.MISSES] = -m.counts[0, N.MISSES] - m.counts[1, N.MISSES]
    m.s[S.ROW] = m.st[row, T.FIRST]


@kernel
def end_step(m: M) -> None:
    """``ReferenceEngine._step`` after its last layer event."""
    row = m.s[S.STEP]
    m.st[row, T.END_NS] = m.s[S.NOW]
    m.st[row, T.STALL_NS] += m.s[S.T_STALL]
    m.st[row, T.MISSES] += m.counts[0, N.MISSES] + m.counts[1, N.MISSES]
    m.s[S.STEP] += 1


@kernel
def begin_event(m: M) -> None:
    """The dense part of the next layer event, or the head of the step."""
    if m.s[S.ROW] == m.st[m.s[S.STEP], T.LAST]:
        pending(m, m.st[m.s[S.STEP], T.HEAD_NS], COMPUTE_DONE, Does.HEAD)
    elif m.ev[m.s[S.ROW], E.DENSE_NS] >= 0:
        pending(m, m.ev[m.s[S.ROW], E.DENSE_NS], COMPUTE_DONE, Does.DENSE)
    else:
        pending(m, 0, GATE, Does.GATE)


@entry
def make_room(m: M, kv_bytes: int) -> None:
    """``ReferenceEngine._make_room_for_kv``: so many bytes of each cache."""
    first = m.s[O.FIRST_CACHE]
    for cache in range(first, first + m.s[O.CACHES]):
        m.c[C.CAPACITY, cache] = max(0, m.c[C.WHOLE, cache] - kv_bytes)
    for cache in range(first, first + m.s[O.CACHES]):
        shrink(m, cache)
    wake_link(m)


@kernel
def shrink(m: M, cache: int) -> None:
    """``Link.shrink`` of one cache, and ``_abandon_paused``."""
    lacking = m.c[C.USED, cache] - m.c[C.CAPACITY, cache]
    n = 0
    if lacking > 0 and m.s[O.HOST]:
        candidates(m, cache, -1, lacking)
        n = ask(m, CHOOSE, -1)
    elif lacking > 0:
        n = choose_victims(m, cache, -1, lacking)
    for i in range(n):
        evict(m, m.q[Q.VICTIMS, i], -1)
    i = m.s[S.P_COUNT] - 1
    while i >= 0 and m.c[C.USED, cache] > m.c[C.CAPACITY, cache]:
        key = m.q[Q.PREFETCH, i]
        if m.k[K.IS_ISSUED, key] and m.s[S.L_KEY] != key and m.k[K.CACHE, key] == cache:
            abandon(m, key)
        i -= 1
