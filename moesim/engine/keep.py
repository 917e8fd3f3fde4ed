"""Keep seats in the compiled core: the arithmetic of ``moesim.policies``, compiled.

A score belongs to an expert. Residents are kept in order of it by ``moesim.engine.order``, which
must hear of every score that changes: those of a gate's demand, and what ``keep_shed`` returns.
"""

from __future__ import annotations

import numpy as np

from moesim.compiled import kernel
from moesim.engine.fields import C, D, K, Keep, O, Order, Q, S, X
from moesim.engine.machine import MISS, A, M, hash3
from moesim.policies import least_stale, lfru, lfu, lfu_decay, lru, map_frequency, slru

_touch = kernel(lru.touch)
_count = kernel(lfu.count)
_stamp = kernel(lfu.stamp)
_fade = kernel(lfu_decay.fade)
_decayed = kernel(lfu_decay.worth)
_lfru = kernel(lfru.worth)
_line = kernel(lfru.line)
_stale = kernel(least_stale.worth)
_slru = kernel(slru.worth)
_promote = kernel(slru.promote)
_demote = kernel(slru.demote)
_expected_worth = kernel(map_frequency.worth)


@kernel
def worth(m: M, key: int) -> A:
    """The keep seat's score of an expert at the newest layer event. Built-in seats ask for full
    precision alone, so its key is the expert's id."""
    keep = m.s[O.KEEP]
    if keep <= Keep.MIN:
        return np.int64(m.k[X.SCORE, key])
    if keep == Keep.SLRU:
        return np.int64(_slru(m.k[X.SCORE, key], m.k[X.SEGMENT, key]))
    if keep == Keep.LFU_DECAY:
        return np.int64(_decayed(m.k[X.COUNT, key], m.k[X.SCORE, key]))
    if keep == Keep.LFRU:
        return np.int64(_lfru(m.k[X.COUNT, key], m.k[X.LAST, key], m.s[S.EVENT]))
    if keep == Keep.LEAST_STALE:
        layer = m.k[K.HEAP, key]
        step, here = m.s[S.GATE_STEP], m.s[S.GATE_LAYER]
        return np.int64(_stale(m.k[X.SCORE, key], m.k[X.LAST, key], step, layer, here))
    return np.int64(hash3(m.s[O.SEED], m.s[S.EVENT], key) >> np.uint64(2))


@kernel
def rank(m: M, key: int) -> A:
    """What places an expert in its heap. It falls for no touch, but in MIN and where SLRU sheds."""
    keep = m.s[O.KEEP]
    if keep == Keep.LFU_DECAY:
        return np.int64(m.k[X.COUNT, key])
    if keep == Keep.LFRU:
        slope = m.c[C.SLOPE, m.k[K.HEAP, key]]
        return np.int64(_line(m.k[X.COUNT, key], m.k[X.LAST, key], slope))
    if keep == Keep.SLRU:
        return np.int64(_slru(m.k[X.SCORE, key], m.k[X.SEGMENT, key]))
    return np.int64(m.k[X.SCORE, key])


@kernel
def least_below(m: M, heap: A, placed: A, value: A) -> A:
    """What those below a place of a heap score at least; ``value`` is the score of the one there,
    ``placed`` its rank. Where it is less than that score, ties are not in order of the key."""
    keep = m.s[O.KEEP]
    if keep == Keep.LFU_DECAY:
        # Counts that fade to the same one stay in whatever order their stamps have.
        return np.int64((placed << lfu.STAMP_BITS) - 1)
    if keep == Keep.LFRU:
        newest = (m.s[S.EVENT] + 1) << lfru.LINE_SHIFT
        return np.int64(m.c[C.CEILING, heap] - 1 if placed >= newest else -1)
    return np.int64(value)


@kernel
def keep_gate(m: M) -> None:
    """The keep seat hears of a gate (``KeepSeat.gate``)."""
    n = m.s[S.N_DEMAND]
    experts = m.cur[D.EXPERT, :n]
    clock = m.s[S.CLOCK : S.CLOCK + 1]
    keep = m.s[O.KEEP]
    score = m.k[X.SCORE]
    if keep == Keep.LRU:
        _touch(score, clock, experts)
    elif keep == Keep.FIFO:
        for i in range(n):
            if m.cur[D.STATUS, i] == MISS:
                _touch(score, clock, m.cur[D.EXPERT, i : i + 1])
    elif keep == Keep.LFU or keep == Keep.LFU_INCACHE:
        _count(score, m.k[X.COUNT], clock, experts)
    elif keep == Keep.LFU_DECAY:
        layer = m.s[S.GATE_LAYER]
        first = layer * m.s[O.EXPERTS]
        _fade(m.k[X.COUNT, first : first + m.s[O.EXPERTS]], m.s[O.FACTOR])
        if m.s[O.ORDER] == Order.HEAP:
            place = m.c[C.HEAP, layer]
            _fade(m.q[Q.RANK, place : place + m.c[C.HEAPED, layer]], m.s[O.FACTOR])
        for i in range(n):
            m.k[X.COUNT, experts[i]] += lfu_decay.ONE
        _touch(score, clock, experts)
    elif keep == Keep.LFRU:
        for i in range(n):
            m.k[X.COUNT, experts[i]] += 1
            m.k[X.LAST, experts[i]] = m.s[S.EVENT]
    elif keep == Keep.LEAST_STALE:
        _touch(score, clock, experts)
        for i in range(n):
            m.k[X.LAST, experts[i]] = m.s[S.GATE_STEP]
    elif keep == Keep.SLRU:
        if not m.s[O.DEVICES]:
            promote(m)
        _touch(score, clock, experts)
    elif keep == Keep.MAP_FREQUENCY:
        for i in range(n):
            visited(m, experts[i])
    elif keep == Keep.MIN:
        for i in range(n):
            score[experts[i]] = -m.cur[D.NEXT_USE, i]


@kernel
def promote(m: M) -> None:
    """``SLRU.gate``: hits of a demand, which is of one cache, are protected."""
    n = m.s[S.N_DEMAND]
    if n:
        cache = m.k[K.CACHE, m.cur[D.EXPERT, 0]]
        head = m.s[O.KEYS] + cache
        experts = m.cur[D.EXPERT, :n]
        m.c[C.PROTECTED, cache] += _promote(
            m.k[X.SEGMENT], m.k[K.BEFORE], m.k[K.AFTER], head, experts, m.cur[D.STATUS, :n]
        )


@kernel
def visited(m: M, key: int) -> None:
    """One more visit of an expert."""
    m.k[X.COUNT, key] += 1
    m.k[X.SCORE, key] = _expected_worth(m.k[X.LAST, key], m.k[X.COUNT, key])


@kernel
def keep_shed(m: M) -> int:
    """After a gate: the next resident that loses its place in a segment; -1 if none does."""
    if m.s[O.KEEP] != Keep.SLRU or not m.s[S.N_DEMAND]:
        return -1
    cache = m.k[K.CACHE, m.cur[D.EXPERT, 0]]
    if m.c[C.PROTECTED, cache] <= m.c[C.LIMIT, cache]:
        return -1
    oldest = m.k[K.AFTER, m.s[O.KEYS] + cache]
    unprotect(m, oldest)
    m.q[Q.ONE, 0] = oldest
    _touch(m.k[X.SCORE], m.s[S.CLOCK : S.CLOCK + 1], m.q[Q.ONE, :1])
    return int(oldest)


@kernel
def unprotect(m: M, key: int) -> None:
    """``SLRU._demote``."""
    _demote(m.k[X.SEGMENT], m.k[K.BEFORE], m.k[K.AFTER], key)
    m.c[C.PROTECTED, m.k[K.CACHE, key]] -= 1


@kernel
def keep_planned(m: M) -> None:
    """The absent expert ``Q.ONE`` was just planned (``KeepSeat.planned``)."""
    clock = m.s[S.CLOCK : S.CLOCK + 1]
    keep = m.s[O.KEEP]
    score = m.k[X.SCORE]
    if keep == Keep.LFU or keep == Keep.LFU_INCACHE:
        _stamp(score, m.k[X.COUNT], clock, m.q[Q.ONE, :1])
    elif keep == Keep.LFRU:
        m.k[X.LAST, m.q[Q.ONE, 0]] = m.s[S.EVENT]
    elif keep == Keep.LEAST_STALE:
        _touch(score, clock, m.q[Q.ONE, :1])
        m.k[X.LAST, m.q[Q.ONE, 0]] = m.s[S.GATE_STEP]
    elif keep == Keep.LRU or keep == Keep.FIFO or keep == Keep.LFU_DECAY or keep == Keep.SLRU:
        _touch(score, clock, m.q[Q.ONE, :1])


@kernel
def keep_expected(m: M, layer: int, row: int, at: int) -> None:
    """What is expected of a layer: probabilities from a place of ``M.jobs`` on
    (``KeepSeat.expected``)."""
    if m.s[O.KEEP] == Keep.MAP_FREQUENCY:
        first = layer * m.s[O.EXPERTS]
        for i in range(m.s[O.EXPERTS]):
            key = first + i
            m.k[X.LAST, key] = max(m.jobs[row, at + i], 1)
            m.k[X.SCORE, key] = _expected_worth(m.k[X.LAST, key], m.k[X.COUNT, key])


@kernel
def keep_begins(m: M) -> None:
    """An iteration begins."""
    if m.s[O.KEEP] == Keep.MAP_FREQUENCY and m.s[O.UNKNOWN] >= 0:
        for key in range(m.s[O.SIZE]):
            m.k[X.LAST, key] = m.s[O.UNKNOWN]
            m.k[X.SCORE, key] = _expected_worth(m.k[X.LAST, key], m.k[X.COUNT, key])


@kernel
def keep_landed(m: M, key: int) -> None:
    """A prefetched copy has arrived, or was there at the start (``KeepSeat.note``)."""
    if m.s[O.KEEP] == Keep.MAP_FREQUENCY:
        visited(m, key)


@kernel
def keep_evicted(m: M, key: int) -> None:
    """A copy went (``KeepSeat.note``)."""
    if m.s[O.KEEP] == Keep.LFU_INCACHE:
        m.k[X.COUNT, key] = 0
    elif m.s[O.KEEP] == Keep.MAP_FREQUENCY and m.s[O.FORGETS]:
        m.k[X.COUNT, key] = 0
        m.k[X.SCORE, key] = 0
    elif m.s[O.KEEP] == Keep.SLRU and m.k[X.SEGMENT, key]:
        unprotect(m, key)
