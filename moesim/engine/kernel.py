"""The fast engine's compiled core: the reference engine's rules on integer arrays.

It is a state machine of three kinds of actor, the compute lane, the link and the host workers, each
with at most one pending event; the earliest by (time, rank, order of creation) happens next, as in
``moesim.engine.clock``. It stops, and can be entered again, where it needs the next steps of the
workload or an answer of a policy in plain Python.

``moesim.engine.fast`` fills the arrays, ``moesim.engine.fields`` names their rows. Each function
names the part of the reference that it mirrors. Seats' arithmetic is that of ``moesim.policies``:
the same functions, compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from moesim import hashing, log
from moesim.engine import clock
from moesim.engine.compiled import entry, kernel
from moesim.engine.fields import C, D, Does, E, K, Keep, N, O, Q, S, T, W, Wish, X
from moesim.policies import least_stale, lfru, lfu, lfu_decay, lru, slru
from moesim.types import NEVER, Serve, State, Status

A = Any
"""An int64 array; numba infers the rest."""


class M(NamedTuple):
    """The machine: every array of a run. Each function takes it whole; the fewer arrays, the less
    there is to compile and to pass."""

    s: A
    """Scalars and options [S, O]."""
    k: A
    """Facts of keys, and the keep seat's state of their experts [K, X; keys]."""
    c: A
    """Facts of caches [C, caches]."""
    w: A
    """Host workers [W, workers]."""
    q: A
    """Queues and lists [Q, width]."""
    cur: A
    """Demand of the layer event under way [D, E]."""
    ends: A
    """By kind of copy: how many chunks, then the end of each [kinds, 1 + chunks]."""
    named: A
    """Ring by layer event: (event, count, keys that plans named for it)."""
    plan: A
    """Cancelled keys, then wishes: (key, expiry, priority)."""
    known: A
    """By layer: how many experts, then which: its last demand, or its hottest [layers, 1 + E]."""
    future: A
    """Where each event's demand begins, and the end; then the demand of the whole run."""
    counts: A
    """``tally.Counts`` of the two phases; then the stall by layer."""
    spans: A
    """What the lanes did: (lane, start, end, key)."""
    ev: A
    """The block's layer events [events, E]."""
    dem: A
    """The block's demand [accesses, D]."""
    said: A
    """The block's predictions."""
    st: A
    """The block's steps [steps, T]."""


FAR = NEVER
ABSENT, QUEUED, IN_FLIGHT, RESIDENT = (int(s) for s in State)
HIT, LATE, MISS = (int(s) for s in Status)
FETCH, CPU, SKIP = (int(s) for s in Serve)
LOAD_DONE, COMPUTE_DONE, WORKER_DONE, ARRIVAL, STEP_BEGIN, GATE, LINK_GRANT = range(7)
assert tuple(clock.Rank) == tuple(range(7))
PLACE: A = np.uint64(0x9E3779B97F4A7C15)

# Why the core stops.
SPANS_FULL, BLOCK_DONE, TOO_LONG = range(3)

# Lanes of a timeline, in the order of ``moesim.timeline.LANES``.
DENSE, EXPERT, STALL, DEMAND, SPECULATIVE, ON_CPU, JOB = range(7)

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
_finalise = kernel(hashing.finalise)


# ---- logs ----------------------------------------------------------------------------------------


@kernel
def word(m: M, value: int) -> None:
    """``LogDigest.add`` of one word to the log."""
    m.s[S.LOG_WORDS] += 1
    part = _finalise(np.uint64(value) + np.uint64(m.s[S.LOG_WORDS]) * PLACE)
    m.s[S.LOG_SUM] = np.int64(np.uint64(m.s[S.LOG_SUM]) + part)


@kernel
def choice(m: M, value: int) -> None:
    """``LogDigest.add`` of one word to the decisions."""
    m.s[S.CHOICE_WORDS] += 1
    part = _finalise(np.uint64(value) + np.uint64(m.s[S.CHOICE_WORDS]) * PLACE)
    m.s[S.CHOICE_SUM] = np.int64(np.uint64(m.s[S.CHOICE_SUM]) + part)


@kernel
def record(m: M, kind: int, key: int) -> None:
    """A record of (kind, time, key)."""
    word(m, kind)
    word(m, m.s[S.NOW])
    word(m, key)


@kernel
def span(m: M, lane: int, start: int, key: int) -> None:
    """What a lane did until now."""
    if m.s[O.SPANS]:
        i = m.s[S.N_SPANS]
        m.spans[i, 0] = lane
        m.spans[i, 1] = start
        m.spans[i, 2] = m.s[S.NOW]
        m.spans[i, 3] = key
        m.s[S.N_SPANS] = i + 1


# ---- the compute lane's pending event ------------------------------------------------------------


@kernel
def pending(m: M, delay: int, rank: int, does: int) -> None:
    """What the compute lane does next."""
    m.s[S.SEQ] += 1
    m.s[S.C_TIME] = m.s[S.NOW] + delay
    m.s[S.C_RANK] = rank
    m.s[S.C_SEQ] = m.s[S.SEQ]
    m.s[S.C_DOES] = does
    m.s[S.C_SPAN] = m.s[S.NOW]


@kernel
def wait(m: M, does: int) -> None:
    """The compute lane waits to be notified."""
    m.s[S.C_TIME] = FAR
    m.s[S.C_DOES] = does
    m.s[S.C_SPAN] = m.s[S.NOW]


@kernel
def notify(m: M) -> None:
    """``ReferenceEngine._notify``."""
    if m.s[S.C_TIME] == FAR:
        m.s[S.SEQ] += 1
        m.s[S.C_TIME] = m.s[S.NOW]
        m.s[S.C_RANK] = COMPUTE_DONE
        m.s[S.C_SEQ] = m.s[S.SEQ]


# ---- seats ---------------------------------------------------------------------------------------


@kernel
def hash3(a: A, b: A, c: A) -> A:
    """``moesim.hashing.hash64`` of three integers."""
    state: A = PLACE
    state = _finalise((state ^ np.uint64(a)) + PLACE)
    state = _finalise((state ^ np.uint64(b)) + PLACE)
    return _finalise((state ^ np.uint64(c)) + PLACE)


@kernel
def worth(m: M, key: int) -> A:
    """The keep seat's score of a key's expert at the newest layer event."""
    e = key % m.s[O.SIZE]
    keep = m.s[O.KEEP]
    if keep == Keep.LFU_DECAY:
        return np.int64(_decayed(m.k[X.COUNT, e], m.k[X.SCORE, e]))
    if keep == Keep.LFRU:
        return np.int64(_lfru(m.k[X.COUNT, e], m.k[X.LAST, e], m.s[S.EVENT]))
    if keep == Keep.LEAST_STALE:
        layer = e // m.s[O.EXPERTS]
        step, here = m.s[S.GATE_STEP], m.s[S.GATE_LAYER]
        return np.int64(_stale(m.k[X.SCORE, e], m.k[X.LAST, e], step, layer, here))
    if keep == Keep.SLRU:
        return np.int64(_slru(m.k[X.SCORE, e], m.k[X.SEGMENT, e]))
    if keep == Keep.RANDOM:
        return np.int64(hash3(m.s[O.SEED], m.s[S.EVENT], e) >> np.uint64(2))
    return np.int64(m.k[X.SCORE, e])


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
            first = cache * (m.s[O.SIZE] // m.s[O.CACHES])
            held = m.c[C.PROTECTED, cache] + _promote(m.k[X.SEGMENT], experts, m.cur[D.STATUS, :n])
            _touch(score, clock, experts)
            excess = max(0, held - m.c[C.LIMIT, cache])
            last = first + m.s[O.SIZE] // m.s[O.CACHES]
            _shed(score, m.k[X.SEGMENT], clock, first, last, excess)
            m.c[C.PROTECTED, cache] = held - excess
    elif keep == Keep.MIN:
        for i in range(n):
            score[experts[i]] = -m.cur[D.NEXT_USE, i]


@kernel
def keep_planned(m: M) -> None:
    """An absent expert was just planned (``KeepSeat.planned``); ``one`` is int64 [1]."""
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
    e = key % m.s[O.SIZE]
    if m.s[O.KEEP] == Keep.LFU_INCACHE:
        m.k[X.COUNT, e] = 0
    elif m.s[O.KEEP] == Keep.SLRU and m.k[X.SEGMENT, e]:
        m.k[X.SEGMENT, e] = 0
        m.c[C.PROTECTED, e // (m.s[O.SIZE] // m.s[O.CACHES])] -= 1


# ---- the ledger ----------------------------------------------------------------------------------


@kernel
def book(m: M, key: int, sign: int) -> None:
    """``Ledger._book``."""
    m.c[C.USED, m.k[K.CACHE, key]] += sign * m.k[K.BYTES, key]
    hold_bytes(m, sign * m.k[K.BYTES, key])


@kernel
def hold_bytes(m: M, nbytes: int) -> None:
    """``Ledger._hold``."""
    m.s[S.HELD] += nbytes
    m.s[S.PEAK] = max(m.s[S.PEAK], m.s[S.HELD])


@kernel
def land_copy(m: M, key: int) -> None:
    """``Ledger.land``."""
    cache = m.k[K.CACHE, key]
    at = m.c[C.FIRST, cache] + m.c[C.RESIDENTS, cache]
    m.q[Q.RESIDENT, at] = key
    m.k[K.AT, key] = at
    m.c[C.RESIDENTS, cache] += 1
    m.k[K.STATE, key] = RESIDENT


@kernel
def free_bytes(m: M, key: int) -> A:
    """``Ledger.free`` of a key's cache."""
    cache = m.k[K.CACHE, key]
    return m.c[C.CAPACITY, cache] - m.c[C.USED, cache]


# ---- the link ------------------------------------------------------------------------------------


@kernel
def new_transfer(m: M, key: int, phase: int, prefetch: int, staged: int) -> None:
    """``Link.transfer``."""
    m.s[S.TSEQ] += 1
    m.k[K.PHASE, key] = phase
    m.k[K.TSEQ, key] = m.s[S.TSEQ]
    m.k[K.PRIORITY, key] = 0
    m.k[K.EXPIRES, key] = FAR
    m.k[K.SENT, key] = 0
    m.k[K.IS_PREFETCH, key] = prefetch
    m.k[K.IS_STAGED, key] = staged
    m.k[K.IS_DEMANDED, key] = 1 - prefetch
    m.k[K.IS_CANCELLED, key] = 0
    m.k[K.IS_ISSUED, key] = 0
    m.k[K.VICTIM, key] = -1


@kernel
def p_insert(m: M, key: int) -> None:
    """Put a prefetch in its place: larger priority first, then older."""
    i = m.s[S.P_COUNT]
    while i > 0:
        before = m.q[Q.PREFETCH, i - 1]
        if m.k[K.PRIORITY, before] > m.k[K.PRIORITY, key] or (
            m.k[K.PRIORITY, before] == m.k[K.PRIORITY, key]
            and m.k[K.TSEQ, before] < m.k[K.TSEQ, key]
        ):
            break
        m.q[Q.PREFETCH, i] = before
        i -= 1
    m.q[Q.PREFETCH, i] = key
    m.s[S.P_COUNT] += 1
    m.k[K.PENDING, key] = 1


@kernel
def p_remove(m: M, key: int) -> None:
    """Take a prefetch out of its lane."""
    n = m.s[S.P_COUNT]
    i = 0
    while m.q[Q.PREFETCH, i] != key:
        i += 1
    for j in range(i, n - 1):
        m.q[Q.PREFETCH, j] = m.q[Q.PREFETCH, j + 1]
    m.s[S.P_COUNT] = n - 1
    m.k[K.PENDING, key] = 0


@kernel
def p_move(m: M, key: int, priority: int) -> None:
    """A new priority."""
    if priority != m.k[K.PRIORITY, key]:
        p_remove(m, key)
        m.k[K.PRIORITY, key] = priority
        p_insert(m, key)


@kernel
def expire(m: M) -> None:
    """``Link.expire``: drop what the newest gate made useless, oldest first."""
    while True:
        oldest = -1
        for i in range(m.s[S.P_COUNT]):
            key = m.q[Q.PREFETCH, i]
            if (
                m.k[K.EXPIRES, key] <= m.s[S.EVENT]
                and not m.k[K.IS_ISSUED, key]
                and (oldest < 0 or m.k[K.TSEQ, key] < m.k[K.TSEQ, oldest])
            ):
                oldest = key
        if oldest < 0:
            return
        drop(m, oldest)


@kernel
def was_used(m: M, key: int) -> None:
    """A prefetch proved right: what it evicted can blame it no more."""
    if m.s[O.ONE_VICTIM]:
        forgive(m, m.k[K.VICTIM, key], key)
    else:
        for victim in range(m.s[O.SIZE]):
            forgive(m, victim, key)


@kernel
def forgive(m: M, victim: int, key: int) -> None:
    """Clear the blame of one victim."""
    if (
        victim >= 0
        and m.k[K.BLAMED, victim] == key
        and m.k[K.BLAMED_SEQ, victim] == m.k[K.TSEQ, key]
    ):
        m.k[K.BLAMED, victim] = -1


@kernel
def drop(m: M, key: int) -> None:
    """``Link._drop``."""
    p_remove(m, key)
    m.k[K.STATE, key] = ABSENT
    m.s[S.DROPPED] += 1
    record(m, log.DROP, key)


@kernel
def moved_bytes(m: M, key: int) -> A:
    """``Link._moved_bytes``."""
    chunk = m.s[O.CHUNK] if m.s[O.CHUNK] else m.k[K.COPY, key]
    return min(m.k[K.COPY, key], m.k[K.SENT, key] * chunk)


@kernel
def abandon(m: M, key: int) -> None:
    """``Link._abandon``."""
    moved = moved_bytes(m, key)
    m.counts[m.k[K.PHASE, key], N.BYTES_LOADED] += moved
    m.s[S.MOVED_OF_CANCELLED] += moved
    m.s[S.CANCELLED] += 1
    m.s[S.CANCELLED_BYTES] += moved
    p_remove(m, key)
    m.k[K.STATE, key] = ABSENT
    book(m, key, -1)
    record(m, log.CANCEL, key)


@kernel
def cancel(m: M, key: int) -> None:
    """``Link.cancel``."""
    if not m.k[K.PENDING, key]:
        return
    if not m.k[K.IS_ISSUED, key]:
        drop(m, key)
    elif m.s[S.L_KEY] == key:
        m.k[K.IS_CANCELLED, key] = 1
    else:
        abandon(m, key)


@kernel
def evict(m: M, key: int, cause: int) -> None:
    """``Link._evict``; ``cause`` is the key of the load, or -1."""
    cache = m.k[K.CACHE, key]
    last = m.c[C.FIRST, cache] + m.c[C.RESIDENTS, cache] - 1
    moved = m.q[Q.RESIDENT, last]
    m.q[Q.RESIDENT, m.k[K.AT, key]] = moved
    m.k[K.AT, moved] = m.k[K.AT, key]
    m.c[C.RESIDENTS, cache] -= 1
    m.k[K.STATE, key] = ABSENT
    book(m, key, -1)
    gone(m, key)
    if m.k[K.UNUSED, key]:
        m.k[K.UNUSED, key] = 0
        m.s[S.WASTED] += 1
        m.s[S.WASTED_BYTES] += m.k[K.COPY, key]
    m.k[K.HELD, key] = 0
    if cause >= 0 and m.k[K.IS_PREFETCH, cause] and not m.k[K.IS_DEMANDED, cause]:
        m.k[K.BLAMED, key] = cause
        m.k[K.BLAMED_SEQ, key] = m.k[K.TSEQ, cause]
        m.k[K.VICTIM, cause] = key


@kernel
def gone(m: M, key: int) -> None:
    """Count, log and tell that a copy's bytes were given up."""
    m.s[S.EVICTIONS] += 1
    m.s[S.EVICTED_BYTES] += m.k[K.COPY, key]
    record(m, log.EVICT, key)
    choice(m, log.EVICT)
    choice(m, key)
    keep_evicted(m, key)


@kernel
def is_candidate(m: M, key: int, load: int, mine: int) -> bool:
    """Whether a resident may go: for a load (``_free_to_demand``, ``_free_to_prefetch``), for a
    staged copy that stays (``_lesser``), or, with ``load`` -1, for a smaller cache (``shrink``).

    ``mine`` is the worth of what comes.
    """
    if m.k[K.PINNED, key]:
        return False
    if load < 0:
        return True
    if m.k[K.IS_STAGED, load]:
        return bool(worth(m, key) < mine)
    if m.k[K.IS_DEMANDED, load]:
        return bool(m.k[K.MEMBER, key] != m.s[S.EVENT])
    if (
        m.k[K.HELD, key]
        and m.k[K.HOLD_EXPIRES, key] > m.s[S.EVENT]
        and m.k[K.HOLD_PRIORITY, key] >= m.k[K.PRIORITY, load]
    ):
        return False
    return bool(not m.s[O.BYPASS] or worth(m, key) < mine)


@kernel
def next_victim(m: M, cache: int, load: int, mine: int, chosen: int) -> int:
    """The candidate of smallest worth, then key, behind the ``chosen`` victims; -1 if none."""
    first = m.c[C.FIRST, cache]
    behind = m.q[Q.VICTIMS, chosen - 1] if chosen else -1
    floor = worth(m, behind) if chosen else 0
    best = -1
    least = 0
    for at in range(first, first + m.c[C.RESIDENTS, cache]):
        key = m.q[Q.RESIDENT, at]
        if not is_candidate(m, key, load, mine):
            continue
        value = worth(m, key)
        if chosen and (value < floor or (value == floor and key <= behind)):
            continue
        if best < 0 or value < least or (value == least and key < best):
            best = key
            least = value
    return best


@kernel
def choose(m: M, load: int, lacking: int) -> int:
    """``Link._choose``: fills the victims; how many, or -1 if room cannot be made."""
    cache = m.k[K.CACHE, load]
    mine = worth(m, load) if m.s[O.BYPASS] else 0
    victim = next_victim(m, cache, load, mine, 0)
    if victim >= 0 and m.k[K.BYTES, victim] >= lacking:
        m.q[Q.VICTIMS, 0] = victim
        return 1
    waves = not m.k[K.IS_PREFETCH, load]
    if may_free(m, cache, load, mine, waves) < lacking:
        return -1
    chosen = 0
    while lacking > 0 and victim >= 0:
        m.q[Q.VICTIMS, chosen] = victim
        chosen += 1
        lacking -= m.k[K.BYTES, victim]
        victim = next_victim(m, cache, load, mine, chosen)
    i = 0
    while lacking > 0:
        victim = m.q[Q.RELEASED, i]
        if is_released(m, victim, cache):
            m.q[Q.VICTIMS, chosen] = victim
            chosen += 1
            lacking -= m.k[K.BYTES, victim]
        i += 1
    return chosen


@kernel
def may_free(m: M, cache: int, load: int, mine: int, waves: bool) -> A:
    """Bytes of everything that may go for a load."""
    first = m.c[C.FIRST, cache]
    total = 0
    for at in range(first, first + m.c[C.RESIDENTS, cache]):
        key = m.q[Q.RESIDENT, at]
        if is_candidate(m, key, load, mine):
            total += m.k[K.BYTES, key]
    if waves:
        for i in range(m.s[S.R_COUNT]):
            if is_released(m, m.q[Q.RELEASED, i], cache):
                total += m.k[K.BYTES, m.q[Q.RELEASED, i]]
    return total


@kernel
def is_released(m: M, key: int, cache: int) -> bool:
    """A member that has computed and is still there (``_computed_members``)."""
    return m.k[K.STATE, key] == RESIDENT and m.k[K.CACHE, key] == cache and not m.k[K.PINNED, key]


@kernel
def issue(m: M, key: int) -> int:
    """``Link._issue``: 1, or 0 if there is no room now."""
    if m.k[K.IS_STAGED, key]:
        if m.s[S.STAGED] == m.s[O.STAGING]:
            return 0
        m.s[S.STAGED] += 1
        m.k[K.STATE, key] = IN_FLIGHT
        hold_bytes(m, m.k[K.BYTES, key])
    else:
        lacking = m.k[K.BYTES, key] - free_bytes(m, key)
        n = 0
        if lacking > 0:
            n = choose(m, key, lacking)
            if n < 0:
                return 0
        for i in range(n):
            evict(m, m.q[Q.VICTIMS, i], key)
        m.k[K.STATE, key] = IN_FLIGHT
        book(m, key, 1)
    m.k[K.IS_ISSUED, key] = 1
    m.k[K.BLAMED, key] = -1
    if m.k[K.IS_PREFETCH, key]:
        m.s[S.ISSUED] += 1
    word(m, log.ISSUE)
    word(m, m.s[S.NOW])
    word(m, key)
    word(m, m.k[K.IS_PREFETCH, key])
    return 1


@kernel
def link_grant(m: M) -> None:
    """``Link._next`` and the beginning of ``_send``."""
    pick = -1
    if m.s[S.D_HEAD] != m.s[S.D_TAIL]:
        head = m.q[Q.DEMAND, m.s[S.D_HEAD] % m.q.shape[1]]
        ok = 1
        if not m.k[K.IS_ISSUED, head]:
            ok = issue(m, head)
        if ok == 1:
            pick = head
    if pick < 0:
        tried = 0
        for i in range(m.s[S.P_COUNT]):
            key = m.q[Q.PREFETCH, i]
            if m.k[K.IS_ISSUED, key]:
                pick = key
                break
            place = m.k[K.PLACE, key]
            seen = False
            for j in range(tried):
                seen = seen or m.q[Q.FULL, j] == place
            if not seen:
                ok = issue(m, key)
                if ok == 1:
                    pick = key
                    break
                if not m.s[O.BYPASS]:
                    m.q[Q.FULL, tried] = place
                    tried += 1
    if pick < 0:
        m.s[S.L_TIME] = FAR
        if m.s[S.D_HEAD] != m.s[S.D_TAIL] and m.s[O.BARRIER] and not m.s[S.BLOCKED]:
            m.s[S.BLOCKED] = 1
            notify(m)
        return
    row = m.k[K.CURVE, pick]
    sent = m.k[K.SENT, pick]
    last = m.ends[row, 0] if m.k[K.IS_DEMANDED, pick] else sent + 1
    duration = m.ends[row, last] - (m.ends[row, sent] if sent else 0)
    m.s[S.L_KEY] = pick
    m.s[S.L_LAST] = last
    m.s[S.L_SPAN] = m.s[S.NOW]
    link_pending(m, duration, LOAD_DONE)


@kernel
def link_pending(m: M, delay: int, rank: int) -> None:
    """What the link does next."""
    m.s[S.SEQ] += 1
    m.s[S.L_TIME] = m.s[S.NOW] + delay
    m.s[S.L_RANK] = rank
    m.s[S.L_SEQ] = m.s[S.SEQ]


@kernel
def link_done(m: M) -> None:
    """The end of ``Link._send``."""
    key = m.s[S.L_KEY]
    row = m.k[K.CURVE, key]
    sent = m.s[S.L_LAST]
    m.k[K.SENT, key] = sent
    m.s[S.LINK_BUSY] += m.s[S.NOW] - m.s[S.L_SPAN]
    m.s[S.L_KEY] = -1
    guess = m.k[K.IS_PREFETCH, key] and not m.k[K.IS_DEMANDED, key]
    span(m, SPECULATIVE if guess else DEMAND, m.s[S.L_SPAN], key)
    if sent == m.ends[row, 0]:
        landed(m, key)
    elif m.k[K.IS_CANCELLED, key]:
        abandon(m, key)
    link_pending(m, 0, LINK_GRANT)


@kernel
def landed(m: M, key: int) -> None:
    """``Link._land``."""
    m.counts[m.k[K.PHASE, key], N.LOADS] += 1
    m.counts[m.k[K.PHASE, key], N.BYTES_LOADED] += m.k[K.COPY, key]
    record(m, log.LAND, key)
    if not m.k[K.IS_STAGED, key]:
        land_copy(m, key)
    if m.k[K.IS_DEMANDED, key]:
        # Out of the demand queue: the head, unless one under way was promoted behind it.
        i = m.s[S.D_HEAD]
        while m.q[Q.DEMAND, i % m.q.shape[1]] != key:
            i += 1
        while i > m.s[S.D_HEAD]:
            m.q[Q.DEMAND, i % m.q.shape[1]] = m.q[Q.DEMAND, (i - 1) % m.q.shape[1]]
            i -= 1
        m.s[S.D_HEAD] += 1
        m.q[Q.ARRIVED, m.s[S.A_TAIL] % m.q.shape[1]] = key
        m.s[S.A_TAIL] += 1
        notify(m)
    else:
        p_remove(m, key)
        m.k[K.UNUSED, key] = 1
        hold(m, key, m.k[K.PRIORITY, key], m.k[K.EXPIRES, key])


@kernel
def hold(m: M, key: int, priority: int, expires: int) -> None:
    """``Link.hold``."""
    m.k[K.HELD, key] = 1
    m.k[K.HOLD_PRIORITY, key] = priority
    m.k[K.HOLD_EXPIRES, key] = expires


@kernel
def wake_link(m: M) -> None:
    """``Link.wake``."""
    if m.s[S.L_TIME] == FAR and (m.s[S.D_HEAD] != m.s[S.D_TAIL] or m.s[S.P_COUNT]):
        link_pending(m, 0, LINK_GRANT)


@kernel
def release(m: M, key: int) -> None:
    """``Link.release``."""
    if m.k[K.IS_STAGED, key] and m.k[K.STATE, key] == IN_FLIGHT:
        unstage(m, key)
    else:
        m.k[K.PINNED, key] = 0
        m.q[Q.RELEASED, m.s[S.R_COUNT]] = key
        m.s[S.R_COUNT] += 1
    wake_link(m)


@kernel
def unstage(m: M, key: int) -> None:
    """``Link._unstage`` and ``_lesser``."""
    m.s[S.STAGED] -= 1
    lacking = m.k[K.BYTES, key] - free_bytes(m, key)
    mine = worth(m, key)
    n = 0
    while lacking > 0:
        victim = next_victim(m, m.k[K.CACHE, key], key, mine, n)
        if victim < 0:
            break
        m.q[Q.VICTIMS, n] = victim
        n += 1
        lacking -= m.k[K.BYTES, victim]
    adopt = lacking <= 0
    if adopt:
        for i in range(n):
            evict(m, m.q[Q.VICTIMS, i], -1)
    hold_bytes(m, -m.k[K.BYTES, key])
    m.k[K.PINNED, key] = 0
    m.k[K.IS_STAGED, key] = 0
    if adopt:
        book(m, key, 1)
        land_copy(m, key)
    else:
        m.k[K.STATE, key] = ABSENT
        gone(m, key)


# ---- the gate ------------------------------------------------------------------------------------


@kernel
def judge(m: M) -> None:
    """``ReferenceEngine._judge``, the pins and the log."""
    n = m.s[S.N_DEMAND]
    for i in range(n):
        key = m.cur[D.EXPERT, i]
        state = m.k[K.STATE, key]
        status = MISS
        if state == RESIDENT:
            status = HIT
        elif state == IN_FLIGHT:
            status = LATE
        m.cur[D.STATUS, i] = status
        m.cur[D.SERVE, i] = FETCH
        m.k[K.PINNED, key] = 1
        m.k[K.MEMBER, key] = m.s[S.EVENT]
        m.k[K.ROW, key] = i
    m.s[S.R_COUNT] = 0
    word(m, log.GATE)
    word(m, m.s[S.NOW])
    word(m, m.s[S.EVENT])
    word(m, m.s[S.GATE_LAYER])
    word(m, n)
    word(m, log.DEMAND)
    choice(m, log.GATE)
    choice(m, m.s[S.EVENT])
    choice(m, m.s[S.GATE_LAYER])
    choice(m, n)
    choice(m, log.DEMAND)
    for i in range(n):
        packed = m.cur[D.EXPERT, i] * 4 + m.cur[D.STATUS, i]
        word(m, packed)
        choice(m, packed)


@kernel
def count_predicted(m: M) -> None:
    """``ReferenceEngine._count_predicted``; ``named`` is a ring of (event, count, keys...)."""
    row = m.s[S.EVENT] % len(m.named)
    if m.named[row, 0] != m.s[S.EVENT]:
        return
    n = m.named[row, 1]
    m.s[S.NAMED] += n
    for i in range(n):
        m.s[S.PREDICTED] += m.k[K.MEMBER, m.named[row, 2 + i]] == m.s[S.EVENT]
    m.named[row, 0] = -1


@kernel
def claim(m: M) -> None:
    """``ReferenceEngine._claim``, with ``Link.use``, ``promote`` and ``miss``."""
    n = m.s[S.N_DEMAND]
    nbytes = 0
    for i in range(n):
        key = m.cur[D.EXPERT, i]
        status = m.cur[D.STATUS, i]
        phase = m.cur[D.PHASE, i]
        nbytes += m.k[K.BYTES, key]
        m.counts[phase, N.ACCESSES] += 1
        m.counts[phase, N.ACCESS_BYTES] += m.k[K.COPY, key]
        m.counts[phase, N.HITS + status] += 1
        m.counts[phase, N.HIT_BYTES + status] += m.k[K.COPY, key]
        if status == HIT:
            m.k[K.HELD, key] = 0
            if m.k[K.UNUSED, key]:
                m.k[K.UNUSED, key] = 0
                m.s[S.USED] += 1
                m.s[S.USED_BYTES] += m.k[K.COPY, key]
                was_used(m, key)
        elif status == MISS:
            if m.k[K.PENDING, key]:
                p_remove(m, key)
                m.k[K.STATE, key] = ABSENT
                m.s[S.OVERTAKEN] += 1
            if m.k[K.BLAMED, key] >= 0:
                m.k[K.BLAMED, key] = -1
                m.s[S.POLLUTING] += 1
    for i in range(n):
        if m.cur[D.STATUS, i] == LATE:
            key = m.cur[D.EXPERT, i]
            m.k[K.IS_DEMANDED, key] = 1
            m.k[K.IS_CANCELLED, key] = 0
            p_remove(m, key)
            m.q[Q.DEMAND, m.s[S.D_TAIL] % m.q.shape[1]] = key
            m.s[S.D_TAIL] += 1
            m.s[S.LATE] += 1
            m.s[S.LATE_BYTES] += m.k[K.COPY, key]
            was_used(m, key)
    m.s[S.LARGEST_UNION] = max(m.s[S.LARGEST_UNION], nbytes)
    cache = m.k[K.CACHE, m.cur[D.EXPERT, 0]] if n else 0
    m.s[S.OVERFLOWS] += nbytes > m.c[C.CAPACITY, cache]


@kernel
def demand(m: M) -> None:
    """``ReferenceEngine._demand`` and ``_serve_miss``."""
    waiting = 0
    for i in range(m.s[S.N_DEMAND]):
        key = m.cur[D.EXPERT, i]
        if m.cur[D.STATUS, i] == LATE:
            waiting += 1
        if m.cur[D.STATUS, i] != MISS:
            continue
        how = m.cur[D.SERVE, i]
        if how == FETCH:
            m.s[S.SERVED_FETCH] += 1
            new_transfer(m, key, m.cur[D.PHASE, i], 0, m.s[O.BYPASS])
            waiting += 1
            continue
        word(m, log.SERVED)
        word(m, m.s[S.NOW])
        word(m, key)
        word(m, how)
        choice(m, log.SERVED)
        choice(m, key)
        choice(m, how)
        if how == CPU:
            m.s[S.SERVED_CPU] += 1
            m.s[S.CPU_RUNNING] += 1
            m.k[K.CPU_NS, key] = m.cur[D.CPU_NS, i]
            m.q[Q.HOST, m.s[S.H_TAIL] % m.q.shape[1]] = key
            m.s[S.H_TAIL] += 1
        else:
            m.s[S.SERVED_SKIP] += 1
            m.k[K.PINNED, key] = 0
    for i in range(m.s[S.N_DEMAND]):
        if m.cur[D.STATUS, i] == MISS and m.cur[D.SERVE, i] == FETCH:
            key = m.cur[D.EXPERT, i]
            m.k[K.STATE, key] = QUEUED
            m.q[Q.DEMAND, m.s[S.D_TAIL] % m.q.shape[1]] = key
            m.s[S.D_TAIL] += 1
    m.s[S.WAITING] = waiting


@kernel
def serve(m: M) -> None:
    """The built-in miss seats."""
    if m.s[O.MISS] == FETCH:
        return
    for i in range(m.s[S.N_DEMAND]):
        if m.cur[D.STATUS, i] == MISS:
            device_ns = m.k[K.LOAD_NS, m.cur[D.EXPERT, i]] + m.cur[D.NS, i]
            if m.s[O.MISS] == CPU or m.cur[D.CPU_NS, i] <= device_ns:
                m.cur[D.SERVE, i] = CPU


# ---- plans ---------------------------------------------------------------------------------------


@kernel
def name(m: M, key: int, expires: int) -> None:
    """Remember that a plan named a key for a layer event, once."""
    if expires >= FAR:
        return
    row = expires % len(m.named)
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
def wish(m: M, key: int, expires: int, priority: int) -> None:
    """``ReferenceEngine._prefetch``."""
    if expires <= m.s[S.EVENT]:
        return
    name(m, key, expires)
    if m.k[K.PENDING, key]:
        p_move(m, key, priority)
        m.k[K.EXPIRES, key] = expires
        m.k[K.IS_CANCELLED, key] = 0
    elif m.k[K.STATE, key] == RESIDENT:
        hold(m, key, priority, expires)
    elif m.k[K.STATE, key] == ABSENT:
        new_transfer(m, key, m.s[S.PHASE], 1, 0)
        m.k[K.PRIORITY, key] = priority
        m.k[K.EXPIRES, key] = expires
        m.k[K.STATE, key] = QUEUED
        p_insert(m, key)
        m.s[S.PLANNED] += 1


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
            for i in range(m.future[event], m.future[event + 1]):
                key = m.future[m.s[O.RUN_EVENTS] + 1 + i]
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


# ---- the whole -----------------------------------------------------------------------------------


@entry
def run(m: M) -> int:
    """Let events happen until the block of steps is done, or something is in the way."""
    while True:
        if m.s[O.SPANS] and m.s[S.N_SPANS] > len(m.spans) - 4:
            return SPANS_FULL
        who, when, rank, seq = 0, m.s[S.C_TIME], m.s[S.C_RANK], m.s[S.C_SEQ]
        if before(m.s[S.L_TIME], m.s[S.L_RANK], m.s[S.L_SEQ], when, rank, seq):
            who, when, rank, seq = 1, m.s[S.L_TIME], m.s[S.L_RANK], m.s[S.L_SEQ]
        for i in range(m.s[O.WORKERS]):
            if before(m.w[W.TIME, i], m.w[W.RANK, i], m.w[W.SEQ, i], when, rank, seq):
                who, when, rank, seq = 2 + i, m.w[W.TIME, i], m.w[W.RANK, i], m.w[W.SEQ, i]
        if when >= FAR:
            return TOO_LONG
        m.s[S.NOW] = when
        if who == 1:
            if rank == LINK_GRANT:
                link_grant(m)
            else:
                link_done(m)
            continue
        if who > 1:
            worker(m, who - 2)
            continue
        does = m.s[S.C_DOES]
        if does == Does.HIT or does == Does.ARRIVAL:
            key = m.s[S.C_KEY]
            duration = m.s[S.NOW] - m.s[S.C_SPAN]
            m.s[S.T_EXPERTS] += duration
            if duration:
                span(m, EXPERT, m.s[S.C_SPAN], key)
            release(m, key)
        elif does == Does.STALLED or does == Does.BARRIER:
            stall = m.s[S.NOW] - m.s[S.C_SPAN]
            m.s[S.T_STALL] += stall
            m.counts[2, m.s[S.GATE_LAYER]] += stall
            if stall:
                span(m, STALL, m.s[S.C_SPAN], -1)
            if does == Does.BARRIER and not barrier(m):
                continue
        elif does == Does.CPU:
            m.s[S.T_CPU] += m.s[S.NOW] - m.s[S.C_SPAN]
        elif does == Does.STEP:
            begin_step(m)
            begin_event(m)
            continue
        elif does == Does.DENSE:
            m.s[S.T_DENSE] += m.s[S.NOW] - m.s[S.C_SPAN]
            if m.s[S.NOW] > m.s[S.C_SPAN]:
                span(m, DENSE, m.s[S.C_SPAN], -1)
            m.s[S.T_SYNC] += m.s[O.SYNC]
            pending(m, m.s[O.SYNC], GATE, Does.GATE)
            continue
        elif does == Does.GATE:
            gate(m)
            serve(m)
            if m.s[O.PLAN] and m.ev[m.s[S.ROW], E.DENSE_NS] >= 0:
                m.s[S.T_PLAN] += m.s[O.PLAN]
                pending(m, m.s[O.PLAN], GATE, Does.PLANNED)
                continue
            planned(m)
            if m.s[O.BARRIER] and not barrier(m):
                continue
        elif does == Does.PLANNED:
            planned(m)
            if m.s[O.BARRIER] and not barrier(m):
                continue
        elif does == Does.HEAD:
            m.s[S.T_DENSE] += m.s[S.NOW] - m.s[S.C_SPAN]
            if m.s[S.NOW] > m.s[S.C_SPAN]:
                span(m, DENSE, m.s[S.C_SPAN], -1)
            end_step(m)
            if m.s[S.STEP] == len(m.st):
                m.s[S.C_TIME] = FAR
                return BLOCK_DONE
            pending(m, 0, STEP_BEGIN, Does.STEP)
            continue
        elif does == Does.IDLE:
            m.s[S.T_IDLE] += m.s[S.NOW] - m.s[S.C_SPAN]
            m.s[S.C_TIME] = FAR
            return BLOCK_DONE
        if not next_expert(m):
            word(m, log.END)
            word(m, m.s[S.NOW])
            word(m, m.s[S.EVENT])
            m.s[S.ROW] += 1
            begin_event(m)


@kernel
def before(t: int, r: int, q: int, when: int, rank: int, seq: int) -> bool:
    """Whether a pending event happens first."""
    return t < when or (t == when and (r < rank or (r == rank and q < seq)))


@kernel
def begin_step(m: M) -> None:
    """``ReferenceEngine._step`` up to its first layer event."""
    row = m.s[S.STEP]
    m.st[row, T.BEGIN_NS] = m.s[S.NOW]
    m.st[row, T.STALL_NS] = -m.s[S.T_STALL]
    m.st[row, T.MISSES] = -m.counts[0, N.MISSES] - m.counts[1, N.MISSES]
    m.s[S.ROW] = m.st[row, T.FIRST]
    if m.st[row, T.KV_BYTES] >= 0:
        for cache in range(m.s[O.CACHES]):
            m.c[C.CAPACITY, cache] = max(0, m.c[C.WHOLE, cache] - m.st[row, T.KV_BYTES])
        for cache in range(m.s[O.CACHES]):
            shrink(m, cache)
        wake_link(m)


@kernel
def shrink(m: M, cache: int) -> None:
    """``Link.shrink`` of one cache, and ``_abandon_paused``."""
    lacking = m.c[C.USED, cache] - m.c[C.CAPACITY, cache]
    n = 0
    while lacking > 0:
        victim = next_victim(m, cache, -1, 0, n)
        if victim < 0:
            break
        m.q[Q.VICTIMS, n] = victim
        n += 1
        lacking -= m.k[K.BYTES, victim]
    for i in range(n):
        evict(m, m.q[Q.VICTIMS, i], -1)
    i = m.s[S.P_COUNT] - 1
    while i >= 0 and m.c[C.USED, cache] > m.c[C.CAPACITY, cache]:
        key = m.q[Q.PREFETCH, i]
        if m.k[K.IS_ISSUED, key] and m.s[S.L_KEY] != key and m.k[K.CACHE, key] == cache:
            abandon(m, key)
        i -= 1


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


@kernel
def gate(m: M) -> None:
    """``ReferenceEngine._gate`` and ``SeatPolicy.on``: the plan lies in ``M.plan``."""
    row = m.s[S.ROW]
    m.s[S.EVENT] += 1
    m.s[S.GATE_LAYER] = m.ev[row, E.LAYER]
    m.s[S.GATE_STEP] = m.ev[row, E.STEP]
    m.s[S.PHASE] = m.ev[row, E.PHASE]
    n = m.ev[row, E.COUNT]
    m.s[S.N_DEMAND] = n
    first = m.ev[row, E.FIRST]
    for i in range(n):
        for column in range(D.STATUS):
            m.cur[column, i] = m.dem[first + i, column]
    judge(m)
    cancels = refuted(m)
    count_predicted(m)
    claim(m)
    expire(m)
    wake_link(m)
    keep_gate(m)
    m.s[S.N_CANCEL] = cancels
    m.s[S.N_PLAN] = plan(m, cancels)
    for i in range(m.s[S.N_PLAN]):
        key = m.plan[cancels + i, 0]
        if m.k[K.STATE, key] == ABSENT and m.k[K.MEMBER, key] != m.s[S.EVENT]:
            m.q[Q.ONE, 0] = key
            keep_planned(m)


@kernel
def refuted(m: M) -> int:
    """``NextGate._refuted``: what was named for this gate and is not demanded, into the plan."""
    n = 0
    row = m.s[S.EVENT] % len(m.named)
    if m.s[O.CANCEL] and m.named[row, 0] == m.s[S.EVENT]:
        for i in range(m.named[row, 1]):
            key = m.named[row, 2 + i]
            if m.k[K.MEMBER, key] != m.s[S.EVENT]:
                m.plan[n, 0] = key
                n += 1
    return n


@kernel
def planned(m: M) -> None:
    """The gate after the policy's answer: demand, expire, apply, wake."""
    before_cpu = m.s[S.H_TAIL]
    demand(m)
    for _ in range(m.s[S.H_TAIL] - before_cpu):
        wake_worker(m)
    for i in range(m.s[S.N_CANCEL]):
        cancel(m, m.plan[i, 0])
    first = m.s[S.N_CANCEL]
    for i in range(m.s[S.N_PLAN]):
        row = first + i
        wish(m, m.plan[row, 0], m.plan[row, 1], m.plan[row, 2])
    wake_link(m)
    m.s[S.NEXT_HIT] = 0
    m.s[S.COMPUTED] = 0
    m.s[S.BLOCKED] = 0


@kernel
def barrier(m: M) -> bool:
    """``ReferenceEngine._barrier``: whether computing may begin."""
    if m.s[S.A_TAIL] - m.s[S.A_HEAD] < m.s[S.WAITING] and not m.s[S.BLOCKED]:
        wait(m, Does.BARRIER)
        return False
    return True


@kernel
def next_expert(m: M) -> bool:
    """``ReferenceEngine._compute``, one turn: False when the layer event is done."""
    while m.s[S.NEXT_HIT] < m.s[S.N_DEMAND]:
        i = m.s[S.NEXT_HIT]
        m.s[S.NEXT_HIT] += 1
        if m.cur[D.STATUS, i] == HIT:
            m.s[S.C_KEY] = m.cur[D.EXPERT, i]
            pending(m, m.cur[D.NS, i], COMPUTE_DONE, Does.HIT)
            return True
    if m.s[S.COMPUTED] < m.s[S.WAITING]:
        if m.s[S.A_HEAD] == m.s[S.A_TAIL]:
            wait(m, Does.STALLED)
            return True
        key = m.q[Q.ARRIVED, m.s[S.A_HEAD] % m.q.shape[1]]
        m.s[S.A_HEAD] += 1
        m.s[S.COMPUTED] += 1
        m.s[S.C_KEY] = key
        pending(m, m.cur[D.NS, m.k[K.ROW, key]], COMPUTE_DONE, Does.ARRIVAL)
        return True
    if m.s[S.CPU_RUNNING]:
        wait(m, Does.CPU)
        return True
    return False


def calls(machine: M) -> list[tuple[Any, Any]]:
    """What Python calls here, and the types that it calls it with."""
    typeof: Any = numba.typeof
    m, key = typeof(machine), numba.int64
    return [
        (run, (m,)),
        (schedule_step, (m,)),
        (schedule_idle, (m, key)),
        (place, (m, key)),
        (finish, (m,)),
    ]


@entry
def schedule_step(m: M) -> None:
    """Begin the block's first step now."""
    pending(m, 0, STEP_BEGIN, Does.STEP)


@entry
def schedule_idle(m: M, until_ns: int) -> None:
    """Serve nothing before a time."""
    pending(m, until_ns - m.s[S.NOW], ARRIVAL, Does.IDLE)


@entry
def place(m: M, key: int) -> None:
    """Make a copy resident before the run."""
    book(m, key, 1)
    land_copy(m, key)


@entry
def finish(m: M) -> None:
    """``Link.finish``."""
    for i in range(m.s[S.P_COUNT]):
        key = m.q[Q.PREFETCH, i]
        if m.k[K.IS_ISSUED, key]:
            moved = moved_bytes(m, key)
            m.s[S.IN_FLIGHT_BYTES] += moved
            m.counts[m.k[K.PHASE, key], N.BYTES_LOADED] += moved
            m.s[S.UNUSED_AT_END] += 1
            m.s[S.UNUSED_AT_END_BYTES] += moved
        else:
            m.s[S.DROPPED] += 1
    for key in range(m.s[O.SIZE]):
        if m.k[K.UNUSED, key]:
            m.s[S.UNUSED_AT_END] += 1
            m.s[S.UNUSED_AT_END_BYTES] += m.k[K.COPY, key]


# ---- host workers --------------------------------------------------------------------------------


@kernel
def wake_worker(m: M) -> None:
    """``Host._wake``."""
    if m.s[S.ASLEEP_HEAD] != m.s[S.ASLEEP_TAIL]:
        i = m.q[Q.ASLEEP, m.s[S.ASLEEP_HEAD] % m.q.shape[1]]
        m.s[S.ASLEEP_HEAD] += 1
        worker_pending(m, i, 0, WORKER_DONE, -1)


@kernel
def worker_pending(m: M, i: int, delay: int, rank: int, key: int) -> None:
    """What a worker does next; ``key`` -1: it wakes."""
    m.s[S.SEQ] += 1
    m.w[W.TIME, i] = m.s[S.NOW] + delay
    m.w[W.RANK, i] = rank
    m.w[W.SEQ, i] = m.s[S.SEQ]
    m.w[W.KEY, i] = key
    m.w[W.SPAN, i] = m.s[S.NOW]


@kernel
def worker(m: M, i: int) -> None:
    """``Host._work``: an expert is done, or the worker wakes; then the next one, or sleep."""
    key = m.w[W.KEY, i]
    if key >= 0:
        span(m, ON_CPU, m.w[W.SPAN, i], key)
        m.s[S.CPU_RUNNING] -= 1
        m.k[K.PINNED, key] = 0
        wake_link(m)
        notify(m)
    if m.s[S.H_HEAD] == m.s[S.H_TAIL]:
        m.w[W.TIME, i] = FAR
        m.q[Q.ASLEEP, m.s[S.ASLEEP_TAIL] % m.q.shape[1]] = i
        m.s[S.ASLEEP_TAIL] += 1
        return
    key = m.q[Q.HOST, m.s[S.H_HEAD] % m.q.shape[1]]
    m.s[S.H_HEAD] += 1
    worker_pending(m, i, m.k[K.CPU_NS, key], COMPUTE_DONE, key)
