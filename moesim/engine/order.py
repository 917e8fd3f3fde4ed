"""Which residents a cache holds, and which of them goes first.

Three ways to keep them, chosen by the seat and the capacity; what they answer is the same: the
candidate of smallest (score, key). Searching all residents is quickest where they are few. A list
serves scores that a touch raises above all others (LRU, FIFO). A heap serves scores that only
their own expert's touches change; it is lazy upwards: a score that grew is put in its place when
somebody looks.
"""

from __future__ import annotations

import numpy as np

from moesim.engine.compiled import kernel
from moesim.engine.fields import C, D, K, O, Order, Q, S, X
from moesim.engine.keep import keep_shed, worth
from moesim.engine.machine import FAR, HIT, RESIDENT, A, M

SCAN, LIST, HEAP = (int(order) for order in Order)


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
        return
    m.q[Q.RESIDENT, m.c[C.FIRST, cache] + at] = key
    m.k[K.AT, key] = at
    if order == HEAP:
        m.k[K.RANK, key] = worth(m, key)
        rise(m, cache, key)


@kernel
def leave(m: M, key: int) -> None:
    """A resident goes; its state is the caller's."""
    cache = m.k[K.CACHE, key]
    last = m.c[C.RESIDENTS, cache] - 1
    m.c[C.RESIDENTS, cache] = last
    if m.s[O.ORDER] == LIST:
        unthread(m, key)
        return
    first = m.c[C.FIRST, cache]
    at = m.k[K.AT, key]
    other = m.q[Q.RESIDENT, first + last]
    m.q[Q.RESIDENT, first + at] = other
    m.k[K.AT, other] = at
    if m.s[O.ORDER] == HEAP and at < last:
        rise(m, cache, other)
        sink(m, cache, other)


@kernel
def moved(m: M, key: int) -> None:
    """The score of a resident changed."""
    order = m.s[O.ORDER]
    if order == LIST:
        unthread(m, key)
        thread(m, key)
    elif order == HEAP:
        value = worth(m, key)
        if value < m.k[K.RANK, key]:
            m.k[K.RANK, key] = value
            rise(m, m.k[K.CACHE, key], key)


@kernel
def reorder(m: M) -> None:
    """The scores of the demand have changed, and perhaps those of what a segment sheds."""
    for i in range(m.s[S.N_DEMAND]):
        key = m.cur[D.EXPERT, i]
        if m.cur[D.STATUS, i] == HIT:
            moved(m, key)
    key = keep_shed(m)
    while key >= 0:
        moved(m, key)
        key = keep_shed(m)


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
def goes_before(m: M, key: int, other: int) -> bool:
    """Whether a key's rank is the smaller."""
    mine, its = m.k[K.RANK, key], m.k[K.RANK, other]
    return bool(mine < its or (mine == its and key < other))


@kernel
def rise(m: M, cache: int, key: int) -> None:
    """Move a key up to its place."""
    first = m.c[C.FIRST, cache]
    at = m.k[K.AT, key]
    while at > 0:
        above = (at - 1) >> 2
        other = m.q[Q.RESIDENT, first + above]
        if not goes_before(m, key, other):
            break
        m.q[Q.RESIDENT, first + at] = other
        m.k[K.AT, other] = at
        at = above
    m.q[Q.RESIDENT, first + at] = key
    m.k[K.AT, key] = at


@kernel
def sink(m: M, cache: int, key: int) -> None:
    """Move a key down to its place."""
    first, n = m.c[C.FIRST, cache], m.c[C.RESIDENTS, cache]
    at = m.k[K.AT, key]
    while True:
        child = 4 * at + 1
        if child >= n:
            break
        least = m.q[Q.RESIDENT, first + child]
        where = child
        for i in range(child + 1, min(child + 4, n)):
            other = m.q[Q.RESIDENT, first + i]
            if goes_before(m, other, least):
                least = other
                where = i
        if not goes_before(m, least, key):
            break
        m.q[Q.RESIDENT, first + at] = least
        m.k[K.AT, least] = at
        at = where
    m.q[Q.RESIDENT, first + at] = key
    m.k[K.AT, key] = at


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
    while key != head and not may_go(m, key, load):
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
    best = np.uint64(0)
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
    first, n = m.c[C.FIRST, cache], m.c[C.RESIDENTS, cache]
    floor = m.s[S.FLOOR]
    best = -1
    least = 0
    m.q[Q.STACK, 0] = 0
    top = 1 if n else 0
    while top:
        top -= 1
        at = m.q[Q.STACK, top]
        key = m.q[Q.RESIDENT, first + at]
        value = worth(m, key)
        if value > m.k[K.RANK, key]:
            m.k[K.RANK, key] = value
            sink(m, cache, key)
            top += 1
            continue
        if best >= 0 and (value > least or (value == least and key > best)):
            continue
        taken = behind >= 0 and (value < floor or (value == floor and key <= behind))
        if not taken and may_go(m, key, load):
            best = key
            least = value
            continue
        for child in range(4 * at + 1, min(4 * at + 5, n)):
            m.q[Q.STACK, top] = child
            top += 1
    m.s[S.FLOOR] = least
    return best
