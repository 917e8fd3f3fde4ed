"""Layer events in closed form: what the general way would do, without its events.

Where nothing is prefetched, every miss is fetched and no layer event needs waves, the link rests
at each gate, the victims do not depend on time, and load after load follows without a gap. Then
the times of a layer event are sums, and its log can be written at once. The result is the same to
the nanosecond and to the word (law I8, which compares both with the reference).

What needs no order is counted after many layer events at once (``settle``).
"""

from __future__ import annotations

import numpy as np

from moesim import log
from moesim.compiled import entry, kernel
from moesim.engine.fields import C, D, Does, E, K, Keep, N, O, Order, Q, S, T, X
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
    add,
    folded,
    pending,
)
from moesim.engine.order import enter, leave, next_victim, place_of_least, reorder
from moesim.engine.steps import begin_event, begin_step, end_step
from moesim.policies import lfu

LATEST = 1 << 61
"""From this time on the general way watches for the end of the clock."""


SCAN, LIST = int(Order.SCAN), int(Order.LIST)

_count = kernel(lfu.count)


@entry
def quick_steps(m: M) -> A:
    """Serve the block from its next step on, until it is done or a layer event must go the general
    way: that one is then pending. How many layer events it served."""
    # With nothing to load, a link that was about to look for work would only rest.
    m.s[S.L_TIME] = FAR
    m.s[S.C_TIME] = FAR
    event = m.s[S.EVENT]
    misses = m.counts[0, N.MISSES] + m.counts[1, N.MISSES]
    listed = m.s[O.ORDER] == LIST
    first = m.st[m.s[S.STEP], T.FIRST] if m.s[S.STEP] < len(m.st) else 0
    whole = True
    while whole and m.s[S.STEP] < len(m.st) and m.s[S.NOW] < LATEST:
        begin_step(m)
        row, last = m.s[S.ROW], m.st[m.s[S.STEP], T.LAST]
        # Not in the condition, which Python puts twice into its code.
        while row < last:
            served = list_event(m, row) if listed else quick_event(m, row)
            if not served:
                break
            row += 1
        m.s[S.ROW] = row
        whole = row == last
        if whole:
            m.s[S.T_DENSE] += m.st[m.s[S.STEP], T.HEAD_NS]
            m.s[S.NOW] += m.st[m.s[S.STEP], T.HEAD_NS]
            end_step(m)
    if m.s[S.EVENT] > event:
        settle(m, first, m.s[S.ROW])
        settle_loads(m, m.counts[0, N.MISSES] + m.counts[1, N.MISSES] - misses)
    if not whole:
        begin_event(m)
    elif m.s[S.STEP] < len(m.st):
        pending(m, 0, STEP_BEGIN, Does.STEP)
    return m.s[S.EVENT] - event


@kernel
def settle(m: M, first: int, last: int) -> None:
    """Count what layer events ``first`` to ``last`` of the block did, whatever their order."""
    dense = 0
    dense_ns = 0
    largest = 0
    for row in range(first, last):
        if m.ev[row, E.DENSE_NS] >= 0:
            dense += 1
            dense_ns += m.ev[row, E.DENSE_NS]
        largest = max(largest, m.ev[row, E.COUNT])
    m.s[S.T_DENSE] += dense_ns
    m.s[S.T_SYNC] += dense * m.s[O.SYNC]
    m.s[S.T_PLAN] += dense * m.s[O.PLAN]
    m.s[S.LARGEST_UNION] = max(m.s[S.LARGEST_UNION], largest * m.s[O.UNIT])
    experts_ns = 0
    begin, end = m.ev[first, E.FIRST], m.ev[last - 1, E.FIRST] + m.ev[last - 1, E.COUNT]
    for i in range(begin, end):
        experts_ns += m.dem[D.NS, i]
    m.s[S.T_EXPERTS] += experts_ns


@kernel
def settle_loads(m: M, misses: int) -> None:
    """Count loads: each miss was one, and evicted one unless it took free bytes."""
    unit = m.s[O.UNIT]
    held = 0
    for cache in range(m.s[O.CACHES]):
        held += m.c[C.USED, cache]
    # Nothing is staged, and bytes in use only grow: the most held is what is held now.
    evicted = misses - (held - m.s[S.HELD]) // unit if unit else misses
    m.s[S.HELD] = held
    m.s[S.PEAK] = max(m.s[S.PEAK], held)
    m.s[S.EVICTIONS] += evicted
    m.s[S.EVICTED_BYTES] += evicted * unit
    m.s[S.SERVED_FETCH] += misses
    m.s[S.TSEQ] += misses
    m.s[S.LINK_BUSY] += misses * m.s[O.LOAD]


# ---- residents in a list: LRU and FIFO -----------------------------------------------------------


@kernel
def list_event(m: M, row: int) -> bool:
    """``quick_event`` for a list, where a touch is a move to its end."""
    first, n = np.uint64(m.ev[row, E.FIRST]), m.ev[row, E.COUNT]
    last = first + np.uint64(n)
    misses = 0
    for i in range(first, last):
        misses += m.state[m.ids[i]] != RESIDENT
    cache = np.uint64(m.k[K.CACHE, m.ids[first]] if n else 0)
    if misses and not fits(m, cache, n, misses):
        return False
    m.s[S.EVENT] += 1
    m.s[S.GATE_LAYER] = m.ev[row, E.LAYER]
    now = m.s[S.NOW]
    dense_ns = m.ev[row, E.DENSE_NS]
    if dense_ns >= 0:
        now += dense_ns + m.s[O.SYNC]
    count(m, row, misses)
    if m.s[O.LOG]:
        log_gate(m, row, now)
    if dense_ns >= 0:
        now += m.s[O.PLAN]
    end = now + relist(m, first, last, cache)
    if misses:
        end = list_load(m, first, last, cache, now, end)
    m.s[S.NOW] = end
    if m.s[O.LOG]:
        log_end(m, end)
    return True


@kernel
def relist(m: M, first: A, last: A, cache: A) -> A:
    """Touch the demand: residents move to the end, what is missing joins there (in FIFO residents
    keep their places). How long the residents compute."""
    head = np.uint64(m.s[O.KEYS]) + cache
    clock = m.s[S.CLOCK]
    fifo = m.s[O.KEEP] == Keep.FIFO
    resident_ns = 0
    for i in range(first, last):
        key = m.ids[i]
        resident = m.state[key] == RESIDENT
        if resident:
            resident_ns += m.dem[D.NS, i]
        if fifo:
            m.k[K.MEMBER, key] = m.s[S.EVENT]
            if resident:
                continue
        clock += 1
        m.k[X.SCORE, key] = clock
        if resident:
            before, after = np.uint64(m.k[K.BEFORE, key]), np.uint64(m.k[K.AFTER, key])
            m.k[K.AFTER, before] = after
            m.k[K.BEFORE, after] = before
        tail = np.uint64(m.k[K.BEFORE, head])
        m.k[K.AFTER, tail] = key
        m.k[K.BEFORE, key] = tail
        m.k[K.AFTER, key] = head
        m.k[K.BEFORE, head] = key
    m.s[S.CLOCK] = clock
    return resident_ns


@kernel
def list_load(m: M, first: A, last: A, cache: A, now: int, end: int) -> A:
    """Load what is missing from ``now`` on; when all has computed. ``end``: when the residents
    have, if they may begin at once."""
    head = np.uint64(m.s[O.KEYS]) + cache
    unit, load_ns, barrier = m.s[O.UNIT], m.s[O.LOAD], m.s[O.BARRIER]
    free = m.c[C.CAPACITY, cache] - m.c[C.USED, cache]
    landing = now
    stall = 0
    for i in range(first, last):
        key = m.ids[i]
        if m.state[key] == RESIDENT:
            continue
        victim = -1
        if free < unit:
            victim = pop(m, head)
        else:
            free -= unit
            m.c[C.USED, cache] += unit
            m.c[C.RESIDENTS, cache] += 1
        m.state[key] = RESIDENT
        if m.s[O.LOG]:
            log_load(m, np.int64(key), victim, landing)
        landing += load_ns
        if landing > end and not barrier:
            stall += landing - end
            end = landing
        end += m.dem[D.NS, i]
    if barrier:
        stall = landing - now
        end += stall
    if stall:
        m.s[S.T_STALL] += stall
        m.counts[2, m.s[S.GATE_LAYER]] += stall
    return end


@kernel
def pop(m: M, head: A) -> A:
    """Evict the first of a list that its layer event does not demand; in LRU the demand stands at
    the end, and is never come to."""
    victim = np.uint64(m.k[K.AFTER, head])
    if m.s[O.KEEP] == Keep.FIFO:
        while m.k[K.MEMBER, victim] == m.s[S.EVENT]:
            victim = np.uint64(m.k[K.AFTER, victim])
    before, after = np.uint64(m.k[K.BEFORE, victim]), np.uint64(m.k[K.AFTER, victim])
    m.k[K.AFTER, before] = after
    m.k[K.BEFORE, after] = before
    m.state[victim] = ABSENT
    return np.int64(victim)


# ---- any other order -----------------------------------------------------------------------------


@kernel
def fits(m: M, cache: A, n: int, misses: int) -> bool:
    """Whether others make room for the misses."""
    evictable = m.c[C.RESIDENTS, cache] - (n - misses)
    free = m.c[C.CAPACITY, cache] - m.c[C.USED, cache]
    return bool(free + (evictable - misses) * m.s[O.UNIT] >= 0)


@kernel
def quick_event(m: M, row: int) -> bool:
    """One layer event; False, and nothing done, if its own experts would have to make room."""
    first, n = np.uint64(m.ev[row, E.FIRST]), m.ev[row, E.COUNT]
    last = first + np.uint64(n)
    misses = 0
    for i in range(first, last):
        misses += m.state[m.ids[i]] != RESIDENT
    cache = np.uint64(m.k[K.CACHE, m.ids[first]] if n else 0)
    if misses and not fits(m, cache, n, misses):
        return False
    m.s[S.EVENT] += 1
    m.s[S.GATE_LAYER] = m.ev[row, E.LAYER]
    m.s[S.GATE_STEP] = m.ev[row, E.STEP]
    now = m.s[S.NOW]
    dense_ns = m.ev[row, E.DENSE_NS]
    if dense_ns >= 0:
        now += dense_ns + m.s[O.SYNC]
    count(m, row, misses)
    if m.s[O.LOG]:
        log_gate(m, row, now)
    touch(m, row)
    if dense_ns >= 0:
        now += m.s[O.PLAN]
    if misses:
        for i in range(first, last):
            m.k[K.MEMBER, m.ids[i]] = m.s[S.EVENT]
        end = computed_at(m, first, last, misses, now)
        load(m, first, last, cache, now)
    else:
        end = now
        for i in range(first, last):
            end += m.dem[D.NS, i]
    m.s[S.NOW] = end
    if m.s[O.LOG]:
        log_end(m, end)
    return True


@kernel
def count(m: M, row: int, misses: int) -> None:
    """Accesses by phase and by status."""
    first, n, phase = m.ev[row, E.FIRST], m.ev[row, E.COUNT], m.ev[row, E.PHASE]
    if m.ev[row, E.MIXED]:
        for i in range(first, first + n):
            phase = m.dem[D.PHASE, i]
            missed = m.state[m.ids[i]] != RESIDENT
            count_loads(m, phase, missed)
            m.counts[phase, N.ACCESSES] += 1
            m.counts[phase, N.HITS] += 1 - missed
        return
    m.counts[phase, N.ACCESSES] += n
    m.counts[phase, N.HITS] += n - misses
    if misses:
        count_loads(m, phase, misses)


@kernel
def count_loads(m: M, phase: int, misses: int) -> None:
    """Misses of a phase, each a load."""
    m.counts[phase, N.MISSES] += misses
    m.counts[phase, N.LOADS] += misses
    m.counts[phase, N.BYTES_LOADED] += misses * m.s[O.UNIT]


@kernel
def touch(m: M, row: int) -> None:
    """The keep seat hears of the demand, and the residents' order of their new scores."""
    first, n = m.ev[row, E.FIRST], m.ev[row, E.COUNT]
    experts = m.ids[first : first + n]
    clock = m.s[S.CLOCK : S.CLOCK + 1]
    keep = m.s[O.KEEP]
    if keep == Keep.LFU or keep == Keep.LFU_INCACHE:
        # Scores grow: a heap is lazy about that.
        _count(m.k[X.SCORE], m.k[X.COUNT], clock, experts)
    else:
        m.s[S.N_DEMAND] = n
        for i in range(n):
            m.cur[D.EXPERT, i] = experts[i]
            m.cur[D.STATUS, i] = HIT if m.state[experts[i]] == RESIDENT else MISS
            m.cur[D.NEXT_USE, i] = m.dem[D.NEXT_USE, first + i]
        keep_gate(m)
        reorder(m)


@kernel
def computed_at(m: M, first: A, last: A, misses: int, now: int) -> A:
    """When the experts have computed: residents, then arrivals as they land (or all after the last
    landing)."""
    end = now
    landing = now
    stall = 0
    if m.s[O.BARRIER]:
        stall = misses * m.s[O.LOAD]
        end += stall
        for i in range(first, last):
            end += m.dem[D.NS, i]
    else:
        for i in range(first, last):
            if m.state[m.ids[i]] == RESIDENT:
                end += m.dem[D.NS, i]
        for i in range(first, last):
            if m.state[m.ids[i]] != RESIDENT:
                landing += m.s[O.LOAD]
                if landing > end:
                    stall += landing - end
                    end = landing
                end += m.dem[D.NS, i]
    if stall:
        m.s[S.T_STALL] += stall
        m.counts[2, m.s[S.GATE_LAYER]] += stall
    return end


@kernel
def load(m: M, first: A, last: A, cache: A, now: int) -> None:
    """The misses, one load after the other from now on."""
    unit = m.s[O.UNIT]
    for i in range(first, last):
        key: A = np.int64(m.ids[i])
        if m.state[key] == RESIDENT:
            continue
        victim = -1
        if m.c[C.CAPACITY, cache] - m.c[C.USED, cache] >= unit:
            m.c[C.USED, cache] += unit
            enter(m, key)
        elif m.s[O.ORDER] == SCAN and m.s[O.KEEP] <= Keep.MIN:
            victim = take_place(m, cache, key)
        else:
            victim = give_up(m, cache, key)
            enter(m, key)
        if m.s[O.LOG]:
            log_load(m, key, victim, now)
        now += m.s[O.LOAD]


@kernel
def take_place(m: M, cache: A, key: A) -> A:
    """``give_up`` and ``enter`` where residents are in no order and scores are stored."""
    first = np.uint64(m.c[C.FIRST, cache])
    at = place_of_least(m, first, first + np.uint64(m.c[C.RESIDENTS, cache]))
    victim = m.q[Q.RESIDENT, at]
    m.q[Q.RESIDENT, at] = key
    m.k[K.AT, key] = np.int64(at - first)
    m.state[victim] = ABSENT
    m.state[key] = RESIDENT
    keep_evicted(m, victim)
    return victim


@kernel
def give_up(m: M, cache: A, key: A) -> A:
    """Evict the victim of a load; which."""
    m.k[K.IS_DEMANDED, key] = 1
    m.k[K.IS_STAGED, key] = 0
    victim = next_victim(m, np.int64(cache), key, 0)  # type: ignore[arg-type]
    leave(m, victim)
    m.state[victim] = ABSENT
    keep_evicted(m, victim)
    return victim


# ---- logs ----------------------------------------------------------------------------------------


@kernel
def log_gate(m: M, row: int, now: int) -> None:
    """What ``judge`` writes."""
    first, n = m.ev[row, E.FIRST], m.ev[row, E.COUNT]
    event, layer = m.s[S.EVENT], m.s[S.GATE_LAYER]
    words, choices = m.s[S.LOG_WORDS] + 6, m.s[S.CHOICE_WORDS] + 5
    log_sum = folded(log.GATE, words - 5) + folded(now, words - 4) + folded(event, words - 3)
    log_sum += folded(layer, words - 2) + folded(n, words - 1) + folded(log.DEMAND, words)
    choice_sum = folded(log.GATE, choices - 4) + folded(event, choices - 3)
    choice_sum += folded(layer, choices - 2) + folded(n, choices - 1)
    choice_sum += folded(log.DEMAND, choices)
    for i in range(n):
        key: A = np.int64(m.ids[first + i])
        packed = key * 4 + (HIT if m.state[key] == RESIDENT else MISS)
        log_sum += folded(packed, words + 1 + i)
        choice_sum += folded(packed, choices + 1 + i)
    add(m, S.LOG_WORDS, 6 + n, log_sum)
    add(m, S.CHOICE_WORDS, 5 + n, choice_sum)


@kernel
def log_load(m: M, key: A, victim: A, when: int) -> None:
    """A load's eviction, if any, its issue and its landing."""
    words = m.s[S.LOG_WORDS]
    log_sum = np.uint64(0)
    if victim >= 0:
        choices = m.s[S.CHOICE_WORDS]
        log_sum += folded(log.EVICT, words + 1) + folded(when, words + 2)
        log_sum += folded(victim, words + 3)
        add(m, S.CHOICE_WORDS, 2, folded(log.EVICT, choices + 1) + folded(victim, choices + 2))
        words += 3
    log_sum += folded(log.ISSUE, words + 1) + folded(when, words + 2)
    log_sum += folded(key, words + 3) + folded(0, words + 4)
    log_sum += folded(log.LAND, words + 5) + folded(when + m.s[O.LOAD], words + 6)
    log_sum += folded(key, words + 7)
    add(m, S.LOG_WORDS, 10 if victim >= 0 else 7, log_sum)


@kernel
def log_end(m: M, end_ns: int) -> None:
    """The end of a layer event."""
    words = m.s[S.LOG_WORDS]
    parts = folded(log.END, words + 1) + folded(end_ns, words + 2)
    add(m, S.LOG_WORDS, 3, parts + folded(m.s[S.EVENT], words + 3))
