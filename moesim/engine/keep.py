"""Keep seats in the compiled core: the arithmetic of ``moesim.policies``, compiled.

A score belongs to an expert. Residents are kept in order of it by ``moesim.engine.order``, which
must hear of every score that changes: those of a gate's demand, and what ``keep_shed`` returns.
"""

from __future__ import annotations

import numpy as np

from moesim.engine.compiled import kernel
from moesim.engine.fields import C, D, Keep, O, Q, S, X
from moesim.engine.machine import MISS, A, M, hash3
from moesim.policies import least_stale, lfru, lfu, lfu_decay, lru, slru

_touch = kernel(lru.touch)
_count = kernel(lfu.count)
_stamp = kernel(lfu.stamp)
_fade = kernel(lfu_decay.fade)
_decayed = kernel(lfu_decay.worth)
_lfru = kernel(lfru.worth)
_stale = kernel(least_stale.worth)
_slru = kernel(slru.worth)
_promote = kernel(slru.promote)
_shed = kernel(slru.shed)


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
        layer = key // m.s[O.EXPERTS]
        step, here = m.s[S.GATE_STEP], m.s[S.GATE_LAYER]
        return np.int64(_stale(m.k[X.SCORE, key], m.k[X.LAST, key], step, layer, here))
    return np.int64(hash3(m.s[O.SEED], m.s[S.EVENT], key) >> np.uint64(2))


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
        first = m.s[S.GATE_LAYER] * m.s[O.EXPERTS]
        _fade(m.k[X.COUNT, first : first + m.s[O.EXPERTS]], m.s[O.FACTOR])
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
        if n:
            cache = experts[0] // (m.s[O.SIZE] // m.s[O.CACHES])
            m.c[C.PROTECTED, cache] += _promote(m.k[X.SEGMENT], experts, m.cur[D.STATUS, :n])
            _touch(score, clock, experts)
    elif keep == Keep.MIN:
        for i in range(n):
            score[experts[i]] = -m.cur[D.NEXT_USE, i]


@kernel
def keep_shed(m: M) -> int:
    """After a gate: the next resident that loses its place in a segment; -1 if none does."""
    if m.s[O.KEEP] != Keep.SLRU or not m.s[S.N_DEMAND]:
        return -1
    span = m.s[O.SIZE] // m.s[O.CACHES]
    cache = m.cur[D.EXPERT, 0] // span
    if m.c[C.PROTECTED, cache] <= m.c[C.LIMIT, cache]:
        return -1
    m.c[C.PROTECTED, cache] -= 1
    clock = m.s[S.CLOCK : S.CLOCK + 1]
    return _shed(m.k[X.SCORE], m.k[X.SEGMENT], clock, cache * span, (cache + 1) * span)


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
def keep_evicted(m: M, key: int) -> None:
    """A copy went (``KeepSeat.note``)."""
    if m.s[O.KEEP] == Keep.LFU_INCACHE:
        m.k[X.COUNT, key] = 0
    elif m.s[O.KEEP] == Keep.SLRU and m.k[X.SEGMENT, key]:
        m.k[X.SEGMENT, key] = 0
        m.c[C.PROTECTED, key // (m.s[O.SIZE] // m.s[O.CACHES])] -= 1
