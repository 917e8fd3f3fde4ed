"""Which residents a cache holds, and which of them goes first.

Three ways to keep them, chosen by the seat and the capacity; what they answer is the same: the
candidate of smallest (score, key). Searching all residents is quickest where they are few. A list
serves scores that a touch raises above all others (LRU, FIFO). Heaps serve scores in whose order a
*rank* can be found that only their own expert's touches change, or that all of a heap change alike
(``moesim.engine.keep``): for most seats the score itself. A heap is lazy upwards: a rank that grew
is put in its place when somebody looks.
"""

from __future__ import annotations

import numpy as np

from moesim.compiled import kernel
from moesim.engine.fields import C, D, K, Keep, O, Order, Q, S, X
from moesim.engine.keep import keep_shed, least_below, rank, worth
from moesim.engine.machine import FAR, HIT, RESIDENT, A, M
from moesim.policies import lfru

SCAN, LIST, HEAP = (int(order) for order in Order)

ENOUGH = 128
"""Residents that a search may look at before it counts as looking in vain."""


@kernel
def enter(m: M, key: int) -> None:
    """A copy becomes resident."""
    cache = m.k[K.CACHE, key]
    at = m.c[C.RESIDENTS, cache]
    m.c[C.RESIDENTS, cache] = at + 1
    m.state[key] = RESIDENT
    order = m.s[O.ORDER]
    if order == LIST:
        thread(m, key)
    elif order == HEAP:
        heap = m.k[K.HEAP, key]
        at = m.c[C.HEAPED, heap]
        m.c[C.HEAPED, heap] = at + 1
        rise(m, m.c[C.HEAP, heap], at, key, rank(m, key))
    else:
        m.q[Q.RESIDENT, m.c[C.FIRST, cache] + at] = key
        m.k[K.AT, key] = at


@kernel
def leave(m: M, key: int) -> None:
    """A resident goes; its state is the caller's."""
    cache = m.k[K.CACHE, key]
    last = m.c[C.RESIDENTS, cache] - 1
    m.c[C.RESIDENTS, cache] = last
    order = m.s[O.ORDER]
    if order == LIST:
        unthread(m, key)
        return
    at = m.k[K.AT, key]
    if order == HEAP:
        heap = m.k[K.HEAP, key]
        first = m.c[C.HEAP, heap]
        last = m.c[C.HEAPED, heap] - 1
        m.c[C.HEAPED, heap] = last
        other = m.q[Q.RESIDENT, first + last]
        if at < last:
            mine = m.q[Q.RANK, first + last]
            at = rise(m, first, at, other, mine)
            sink(m, first, last, at, other, mine)
    else:
        first = m.c[C.FIRST, cache]
        other = m.q[Q.RESIDENT, first + last]
        m.q[Q.RESIDENT, first + at] = other
        m.k[K.AT, other] = at


@kernel
def reorder(m: M) -> None:
    """The scores of the demand have changed, and perhaps those of what a segment sheds."""
    order, keep = m.s[O.ORDER], m.s[O.KEEP]
    n = m.s[S.N_DEMAND]
    if order == LIST and keep == Keep.LRU:
        for i in range(n):
            if m.cur[D.STATUS, i] == HIT:
                unthread(m, m.cur[D.EXPERT, i])
                thread(m, m.cur[D.EXPERT, i])
    if keep == Keep.LFRU and n and order == HEAP:
        steer(m, m.k[K.HEAP, m.cur[D.EXPERT, 0]])
    # Of all ranks only these may fall.
    i = 0
    while (i < n and keep == Keep.MIN) or keep == Keep.SLRU:
        key = m.cur[D.EXPERT, i] if keep == Keep.MIN else keep_shed(m)
        if key < 0:
            break
        if order == HEAP and m.state[key] == RESIDENT:
            first, at = m.c[C.HEAP, m.k[K.HEAP, key]], m.k[K.AT, key]
            mine = rank(m, key)
            if mine < m.q[Q.RANK, first + at]:
                rise(m, first, at, key, mine)
        i += 1


# ---- a list --------------------------------------------------------------------------------------


@kernel
def thread(m: M, key: int) -> None:
    """Put a key where its score belongs: mostly at the end."""
    head = m.s[O.KEYS] + m.k[K.CACHE, key]
    before = m.k[K.BEFORE, head]
    # A load was stamped when it was asked for; what was touched since then stays behind it.
    while before != head and (
        m.k[X.SCORE, before] > m.k[X.SCORE, key]
        or (m.k[X.SCORE, before] == m.k[X.SCORE, key] and before > key)
    ):
        before = m.k[K.BEFORE, before]
    after = m.k[K.AFTER, before]
    m.k[K.AFTER, before] = key
    m.k[K.BEFORE, key] = before
    m.k[K.AFTER, key] = after
    m.k[K.BEFORE, after] = key


@kernel
def unthread(m: M, key: int) -> None:
    """Take a key out of its list."""
    before, after = m.k[K.BEFORE, key], m.k[K.AFTER, key]
    m.k[K.AFTER, before] = after
    m.k[K.BEFORE, after] = before


# ---- a heap of four children a node --------------------------------------------------------------


@kernel
def put(m: M, first: A, at: A, key: A, mine: A) -> None:
    """Put a key of a rank in a place."""
    m.q[Q.RESIDENT, first + at] = key
    m.q[Q.RANK, first + at] = mine
    m.k[K.AT, key] = at


@kernel
def rise(m: M, first: A, at: A, key: A, mine: A) -> A:
    """Put a key where it belongs, at a free place or above it; where."""
    while at > 0:
        above = (at - 1) >> 2
        other, its = m.q[Q.RESIDENT, first + above], m.q[Q.RANK, first + above]
        if its < mine or (its == mine and other < key):
            break
        put(m, first, at, other, its)
        at = above
    put(m, first, at, key, mine)
    return at


@kernel
def sink(m: M, first: A, n: A, at: A, key: A, mine: A) -> None:
    """Put a key where it belongs, at its place or below it, in a heap of ``n``."""
    while True:
        where = 4 * at + 1
        if where >= n:
            break
        its = m.q[Q.RANK, first + where]
        for i in range(where + 1, min(where + 4, n)):
            next_one = m.q[Q.RANK, first + i]
            if next_one < its or (
                next_one == its and m.q[Q.RESIDENT, first + i] < m.q[Q.RESIDENT, first + where]
            ):
                its, where = next_one, i
        least = m.q[Q.RESIDENT, first + where]
        if mine < its or (mine == its and key < least):
            break
        put(m, first, at, least, its)
        at = where
    put(m, first, at, key, mine)


@kernel
def steer(m: M, heap: A) -> None:
    """Choose a new slope for a heap of LFRU where too many were looked at in vain. No answer
    depends on the slope: it decides how few lie above the ceiling."""
    n = m.c[C.HEAPED, heap]
    if m.c[C.SPENT, heap] <= n:
        return
    m.c[C.SPENT, heap] = 0
    least = m.c[C.LEAST, heap]
    wide = m.c[C.CEILING, heap] > least
    m.c[C.SHARP, heap] = max(1, min(20, m.c[C.SHARP, heap] + (1 if wide else -1)))
    ceiling = least + (least >> m.c[C.SHARP, heap]) + 1
    slope = max(1, min(lfru.STEEPEST, (1 << lfru.SHIFT + lfru.LINE_SHIFT) // ceiling))
    m.c[C.SLOPE, heap] = slope
    m.c[C.CEILING, heap] = (1 << lfru.SHIFT + lfru.LINE_SHIFT) // slope
    first = m.c[C.HEAP, heap]
    for at in range(n):
        key = m.q[Q.RESIDENT, first + at]
        rise(m, first, at, key, rank(m, key))


# ---- who may go ----------------------------------------------------------------------------------


@kernel
def may_go(m: M, key: int, load: int) -> bool:
    """Whether a resident may go for a load (``Link._free_to_demand``, ``_free_to_prefetch``) or,
    with ``load`` -1, whether nothing pins it."""
    if m.k[K.PINNED, key]:
        return False
    if load < 0 or m.k[K.IS_STAGED, load]:
        return True
    if m.k[K.IS_DEMANDED, load]:
        return bool(m.k[K.MEMBER, key] != m.s[S.EVENT])
    # ``Link._held_against``.
    return bool(
        not m.k[K.HELD, key]
        or m.k[K.HOLD_EXPIRES, key] <= m.s[S.EVENT]
        or m.k[K.HOLD_PRIORITY, key] < m.k[K.PRIORITY, load]
    )


@kernel
def choose_victims(m: M, cache: int, load: int, lacking: int) -> int:
    """Fills the victims, the smallest (score, key) first, until the bytes suffice or there are no
    more; how many. What is only worth keeping itself drives out what is worth less."""
    picky = load >= 0 and m.s[O.BYPASS]
    mine = worth(m, load) if picky else 0
    chosen = 0
    while lacking > 0:
        victim = next_victim(m, cache, load, chosen)
        if victim < 0 or (picky and m.s[S.FLOOR] >= mine):
            break
        m.q[Q.VICTIMS, chosen] = victim
        chosen += 1
        lacking -= m.k[K.BYTES, victim]
    return chosen


@kernel
def next_victim(m: M, cache: int, load: int, chosen: int) -> A:
    """The next one behind the ``chosen`` victims, -1 if there is none; its score becomes the
    floor."""
    behind = m.q[Q.VICTIMS, chosen - 1] if chosen else -1
    if m.s[O.ORDER] == LIST:
        return next_in_list(m, cache, load, behind)
    if m.s[O.ORDER] == HEAP:
        return next_in_heap(m, cache, load, behind)
    return next_of_all(m, cache, load, behind)


@kernel
def next_in_list(m: M, cache: int, load: int, behind: int) -> A:
    """The first candidate."""
    head = m.s[O.KEYS] + cache
    key = m.k[K.AFTER, behind if behind >= 0 else head]
    while key != head:
        if may_go(m, key, load):
            break
        key = m.k[K.AFTER, key]
    if key == head:
        return -1
    m.s[S.FLOOR] = m.k[X.SCORE, key]
    return key


@kernel
def next_of_all(m: M, cache: int, load: int, behind: int) -> int:
    """The least of all candidates."""
    first = m.c[C.FIRST, cache]
    floor = m.s[S.FLOOR]
    best = -1
    least = 0
    for at in range(first, first + m.c[C.RESIDENTS, cache]):
        key = m.q[Q.RESIDENT, at]
        if not may_go(m, key, load):
            continue
        value = worth(m, key)
        if behind >= 0 and (value < floor or (value == floor and key <= behind)):
            continue
        if best < 0 or value < least or (value == least and key < best):
            best = key
            least = value
    m.s[S.FLOOR] = least
    return best


@kernel
def place_of_least(m: M, first: A, last: A) -> A:
    """Where among the residents the least of those stands that the layer event does not demand;
    for stored scores, where nothing else may not go."""
    place = first
    best = np.uint64(1 << 62)
    least = FAR
    for at in range(first, last):
        key = np.uint64(m.q[Q.RESIDENT, at])
        value = m.k[X.SCORE, key]
        if value > least or m.k[K.MEMBER, key] == m.s[S.EVENT]:
            continue
        if value < least or key < best:
            best, least, place = key, value, at
    return place


@kernel
def next_in_heap(m: M, cache: int, load: int, behind: int) -> int:
    """The least candidate: down through those that may not go, and no further than needed."""
    floor = m.s[S.FLOOR]
    best = -1
    least = 0
    top = 0
    for root in range(cache * m.s[O.HEAPS], (cache + 1) * m.s[O.HEAPS]):
        if m.c[C.HEAPED, root]:
            m.q[Q.STACK, top] = m.c[C.HEAP, root]
            top += 1
    seen = 0
    while top:
        top -= 1
        seen += 1
        place = m.q[Q.STACK, top]
        key = m.q[Q.RESIDENT, place]
        at = m.k[K.AT, key]
        heap = m.k[K.HEAP, key]
        n = m.c[C.HEAPED, heap]
        mine = rank(m, key)
        if mine > m.q[Q.RANK, place]:
            sink(m, place - at, n, at, key, mine)
            top += 1
            continue
        value = worth(m, key)
        below = least_below(m, heap, mine, value)
        if best >= 0 and (below > least or (below == least and key > best)):
            continue
        taken = behind >= 0 and (value < floor or (value == floor and key <= behind))
        better = best < 0 or value < least or (value == least and key < best)
        if better and not taken and may_go(m, key, load):
            best = key
            least = value
            if below == value:
                continue
        for child in range(4 * at + 1, min(4 * at + 5, n)):
            m.q[Q.STACK, top] = place - at + child
            top += 1
    m.s[S.FLOOR] = least
    if m.s[O.KEEP] == Keep.LFRU:
        m.c[C.LEAST, cache] = least
        m.c[C.SPENT, cache] += max(0, seen - ENOUGH)
    return best
