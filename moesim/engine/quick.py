"""Layer events in closed form: what the general way would do, without its events.

Where nothing is prefetched, every miss is fetched and no layer event needs waves, the link rests
at each gate, the victims do not depend on time, and load after load follows without a gap. Then
the times of a layer event are sums, and its log can be written at once. The result is the same to
the nanosecond and to the word (law I8, which compares both with the reference).
"""

from __future__ import annotations

import numpy as np

from moesim import log
from moesim.engine.compiled import entry, kernel
from moesim.engine.fields import C, D, Does, E, K, Keep, N, O, S, T
from moesim.engine.keep import keep_evicted, keep_gate
from moesim.engine.machine import (
    ABSENT,
    FAR,
    HIT,
    MISS,
    RESIDENT,
    STEP_BEGIN,
    A,
    M,
    folded,
    pending,
)
from moesim.engine.order import enter, leave, next_victim, reorder
from moesim.engine.steps import begin_event, begin_step, end_step

LATEST = 1 << 61
"""From this time on the general way watches for the end of the clock."""


@entry
def quick_steps(m: M) -> A:
    """Serve the block from its next step on, until it is done or a layer event must go the general
    way: that one is then pending. How many layer events it served."""
    # With nothing to load, a link that was about to look for work would only rest.
    m.s[S.L_TIME] = FAR
    m.s[S.C_TIME] = FAR
    before = m.s[S.EVENT]
    while m.s[S.STEP] < len(m.st) and m.s[S.NOW] < LATEST:
        begin_step(m)
        last = m.st[m.s[S.STEP], T.LAST]
        while m.s[S.ROW] < last:
            if not quick_event(m):
                begin_event(m)
                return m.s[S.EVENT] - before
            m.s[S.ROW] += 1
        m.s[S.T_DENSE] += m.st[m.s[S.STEP], T.HEAD_NS]
        m.s[S.NOW] += m.st[m.s[S.STEP], T.HEAD_NS]
        end_step(m)
    if m.s[S.STEP] < len(m.st):
        pending(m, 0, STEP_BEGIN, Does.STEP)
    return m.s[S.EVENT] - before


@kernel
def quick_event(m: M) -> bool:
    """One layer event; False, and nothing done, if its own experts would have to make room."""
    row = m.s[S.ROW]
    first, n = m.ev[row, E.FIRST], m.ev[row, E.COUNT]
    misses = 0
    for i in range(first, first + n):
        misses += m.state[m.dem[D.EXPERT, i]] != RESIDENT
    cache = m.k[K.CACHE, m.dem[D.EXPERT, first]] if n else 0
    evictable = m.c[C.RESIDENTS, cache] - (n - misses)
    free = m.c[C.CAPACITY, cache] - m.c[C.USED, cache]
    if free + (evictable - misses) * m.s[O.UNIT] < 0:
        return False
    m.s[S.EVENT] += 1
    m.s[S.GATE_LAYER] = m.ev[row, E.LAYER]
    m.s[S.GATE_STEP] = m.ev[row, E.STEP]
    m.s[S.PHASE] = m.ev[row, E.PHASE]
    m.s[S.N_DEMAND] = n
    dense_ns = m.ev[row, E.DENSE_NS]
    if dense_ns >= 0:
        m.s[S.NOW] += dense_ns + m.s[O.SYNC]
        m.s[S.T_DENSE] += dense_ns
        m.s[S.T_SYNC] += m.s[O.SYNC]
    claim(m, first)
    keep_gate(m)
    reorder(m)
    if dense_ns >= 0:
        m.s[S.NOW] += m.s[O.PLAN]
        m.s[S.T_PLAN] += m.s[O.PLAN]
    end_ns = compute(m, misses)
    load(m, cache, misses)
    m.s[S.NOW] = end_ns
    if m.s[O.LOG]:
        words = m.s[S.LOG_WORDS]
        parts = folded(log.END, words + 1) + folded(end_ns, words + 2)
        add(m, S.LOG_WORDS, 3, parts + folded(m.s[S.EVENT], words + 3))
    return True


@kernel
def claim(m: M, first: int) -> None:
    """The demand, judged, counted and logged."""
    n, event = m.s[S.N_DEMAND], m.s[S.EVENT]
    unit = m.s[O.UNIT]
    logged = m.s[O.LOG] != 0
    words, choices = m.s[S.LOG_WORDS] + 6, m.s[S.CHOICE_WORDS] + 5
    log_sum, choice_sum = np.uint64(0), np.uint64(0)
    for i in range(n):
        key = m.dem[D.EXPERT, first + i]
        phase = m.dem[D.PHASE, first + i]
        status = HIT if m.state[key] == RESIDENT else MISS
        m.cur[D.EXPERT, i] = key
        m.cur[D.STATUS, i] = status
        m.cur[D.PHASE, i] = phase
        m.cur[D.NS, i] = m.dem[D.NS, first + i]
        if m.s[O.KEEP] == Keep.MIN:
            m.cur[D.NEXT_USE, i] = m.dem[D.NEXT_USE, first + i]
        m.k[K.MEMBER, key] = event
        m.counts[phase, N.ACCESSES] += 1
        m.counts[phase, N.HITS + status] += 1
        if logged:
            log_sum += folded(key * 4 + status, words + 1 + i)
            choice_sum += folded(key * 4 + status, choices + 1 + i)
    m.s[S.LARGEST_UNION] = max(m.s[S.LARGEST_UNION], n * unit)
    if logged:
        layer = m.s[S.GATE_LAYER]
        log_sum += folded(log.GATE, words - 5) + folded(m.s[S.NOW], words - 4)
        log_sum += folded(event, words - 3) + folded(layer, words - 2)
        log_sum += folded(n, words - 1) + folded(log.DEMAND, words)
        choice_sum += folded(log.GATE, choices - 4) + folded(event, choices - 3)
        choice_sum += folded(layer, choices - 2) + folded(n, choices - 1)
        choice_sum += folded(log.DEMAND, choices)
        add(m, S.LOG_WORDS, 6 + n, log_sum)
        add(m, S.CHOICE_WORDS, 5 + n, choice_sum)


@kernel
def add(m: M, which: int, words: int, parts: A) -> None:
    """So many words more in a log; its sum lies behind their number."""
    m.s[which] += words
    m.s[which + 1] = np.int64(np.uint64(m.s[which + 1]) + parts)


@kernel
def compute(m: M, misses: int) -> A:
    """When the experts have computed: residents, then arrivals as they land (or all after the last
    landing)."""
    landing = m.s[S.NOW]
    end = m.s[S.NOW]
    experts = 0
    stall = 0
    if m.s[O.BARRIER]:
        stall = misses * m.s[O.LOAD]
        end += stall
    for i in range(m.s[S.N_DEMAND]):
        if m.cur[D.STATUS, i] == HIT or m.s[O.BARRIER]:
            end += m.cur[D.NS, i]
            experts += m.cur[D.NS, i]
    if misses and not m.s[O.BARRIER]:
        for i in range(m.s[S.N_DEMAND]):
            if m.cur[D.STATUS, i] == MISS:
                landing += m.s[O.LOAD]
                if landing > end:
                    stall += landing - end
                    end = landing
                end += m.cur[D.NS, i]
                experts += m.cur[D.NS, i]
    m.s[S.T_EXPERTS] += experts
    if stall:
        m.s[S.T_STALL] += stall
        m.counts[2, m.s[S.GATE_LAYER]] += stall
    return end


@kernel
def load(m: M, cache: int, misses: int) -> None:
    """The misses, one load after the other from now on."""
    if not misses:
        return
    unit = m.s[O.UNIT]
    when = m.s[S.NOW]
    free = m.c[C.CAPACITY, cache] - m.c[C.USED, cache]
    before = free
    evicted = 0
    logged = m.s[O.LOG] != 0
    words, choices = m.s[S.LOG_WORDS], m.s[S.CHOICE_WORDS]
    log_sum, choice_sum = np.uint64(0), np.uint64(0)
    for i in range(m.s[S.N_DEMAND]):
        if m.cur[D.STATUS, i] != MISS:
            continue
        key = m.cur[D.EXPERT, i]
        m.k[K.IS_DEMANDED, key] = 1
        m.k[K.IS_STAGED, key] = 0
        if free < unit:
            victim = next_victim(m, cache, key, 0)
            leave(m, victim)
            m.state[victim] = ABSENT
            keep_evicted(m, victim)
            evicted += 1
            free += unit
            if logged:
                log_sum += folded(log.EVICT, words + 1) + folded(when, words + 2)
                log_sum += folded(victim, words + 3)
                choice_sum += folded(log.EVICT, choices + 1) + folded(victim, choices + 2)
                words += 3
                choices += 2
        enter(m, key)
        free -= unit
        phase = m.cur[D.PHASE, i]
        m.counts[phase, N.LOADS] += 1
        m.counts[phase, N.BYTES_LOADED] += unit
        if logged:
            log_sum += folded(log.ISSUE, words + 1) + folded(when, words + 2)
            log_sum += folded(key, words + 3) + folded(0, words + 4)
            log_sum += folded(log.LAND, words + 5) + folded(when + m.s[O.LOAD], words + 6)
            log_sum += folded(key, words + 7)
            words += 7
        when += m.s[O.LOAD]
    m.c[C.USED, cache] += before - free
    m.s[S.HELD] += before - free
    m.s[S.PEAK] = max(m.s[S.PEAK], m.s[S.HELD])
    m.s[S.EVICTIONS] += evicted
    m.s[S.EVICTED_BYTES] += evicted * unit
    m.s[S.SERVED_FETCH] += misses
    m.s[S.TSEQ] += misses
    m.s[S.LINK_BUSY] += when - m.s[S.NOW]
    if logged:
        add(m, S.LOG_WORDS, words - m.s[S.LOG_WORDS], log_sum)
        add(m, S.CHOICE_WORDS, choices - m.s[S.CHOICE_WORDS], choice_sum)
