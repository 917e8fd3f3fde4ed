"""The link in the compiled core: ``moesim.engine.link`` on arrays."""

from __future__ import annotations

from moesim import log
from moesim.compiled import kernel
from moesim.engine.fields import Ask, Back, C, K, N, O, Q, S, Shelf
from moesim.engine.keep import keep_evicted, keep_landed
from moesim.engine.machine import (
    ABSENT,
    DEMAND,
    DROPPED,
    EVICTED,
    FAR,
    IN_FLIGHT,
    LANDED,
    LINK_GRANT,
    LOAD_DONE,
    RESIDENT,
    SPECULATIVE,
    A,
    M,
    ask,
    book,
    choice,
    free_bytes,
    hold_bytes,
    note,
    notify,
    record,
    span,
    tier,
    word,
)
from moesim.engine.order import choose_victims, enter, leave, may_go

DUPLEX = int(Back.DUPLEX)
CHOOSE, LESSER = int(Ask.CHOOSE), int(Ask.LESSER)

# ---- the link ------------------------------------------------------------------------------------


@kernel
def new_transfer(
    m: M, key: int, phase: int, ordinal: int, prefetch: int, staged: int, replaces: int
) -> None:
    """``Link.transfer``."""
    m.k[K.EVENT, key] = m.s[S.EVENT]
    m.k[K.ORDINAL, key] = ordinal
    m.k[K.REPLACES, key] = replaces
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
        for victim in range(m.s[O.KEYS]):
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
    m.state[key] = ABSENT
    m.s[S.DROPPED] += 1
    record(m, log.DROP, key)
    note(m, DROPPED, key)


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
    m.state[key] = ABSENT
    book(m, key, -1)
    if m.s[O.TIER]:
        tier(m, Shelf.UNPIN, key)
    record(m, log.CANCEL, key)
    note(m, DROPPED, key)


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
    leave(m, key)
    m.state[key] = ABSENT
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
    if m.s[O.WRITE_BACK]:
        if m.s[O.WRITE_BACK] == DUPLEX:
            m.s[S.BACK] = max(m.s[S.BACK], m.s[S.NOW])
        m.s[S.BACK] += m.k[K.LOAD_NS, key]
    if m.s[O.HOST]:
        note(m, EVICTED, key)
    else:
        keep_evicted(m, key)


@kernel
def choose(m: M, load: int, lacking: int) -> int:
    """``Link._victims`` and ``_choose``: fills the victims; how many, or -1 if room cannot be made
    now."""
    cache = m.k[K.CACHE, load]
    if m.k[K.REPLACES, load] >= 0:
        return replaced(m, m.k[K.REPLACES, load], lacking)
    if lacking <= 0:
        return 0
    if m.s[O.HOST]:
        chosen = asked_for(m, cache, load, lacking)
    else:
        chosen = choose_victims(m, cache, load, lacking)
    for i in range(chosen):
        lacking -= m.k[K.BYTES, m.q[Q.VICTIMS, i]]
    if lacking > 0 and not m.k[K.IS_PREFETCH, load]:
        # An event larger than its cache goes in waves: its own experts, once they have computed.
        for i in range(m.s[S.R_COUNT]):
            victim = m.q[Q.RELEASED, i]
            if lacking > 0 and is_released(m, victim, cache):
                m.q[Q.VICTIMS, chosen] = victim
                chosen += 1
                lacking -= m.k[K.BYTES, victim]
    return chosen if lacking <= 0 else -1


@kernel
def replaced(m: M, victim: int, lacking: int) -> int:
    """``Link._replaced``."""
    if m.state[victim] != RESIDENT:
        return 0 if lacking <= 0 else -1
    if m.k[K.PINNED, victim] or m.k[K.BYTES, victim] < lacking:
        return -1
    m.q[Q.VICTIMS, 0] = victim
    return 1


@kernel
def asked_for(m: M, cache: int, load: int, lacking: int) -> int:
    """``choose_victims`` by a policy in plain Python; it is not asked in vain."""
    candidates(m, cache, load, lacking)
    enough = m.s[S.MAY_FREE]
    if not m.k[K.IS_PREFETCH, load]:
        for i in range(m.s[S.R_COUNT]):
            victim = m.q[Q.RELEASED, i]
            if is_released(m, victim, cache):
                enough += m.k[K.BYTES, victim]
    if enough < lacking or not m.s[S.N_CANDIDATES]:
        return 0
    return ask(m, CHOOSE, load)


@kernel
def candidates(m: M, cache: int, load: int, lacking: int) -> None:
    """Fills the candidates, for Python to choose from."""
    n = 0
    may_free = 0
    first = m.c[C.FIRST, cache]
    for at in range(first, first + m.c[C.RESIDENTS, cache]):
        key = m.q[Q.RESIDENT, at]
        if may_go(m, key, load):
            m.q[Q.CANDIDATES, n] = key
            n += 1
            may_free += m.k[K.BYTES, key]
    m.s[S.N_CANDIDATES] = n
    m.s[S.MAY_FREE] = may_free
    m.s[S.LACKING] = lacking


@kernel
def is_released(m: M, key: int, cache: int) -> bool:
    """A member that has computed and is still there (``_computed_members``)."""
    return m.state[key] == RESIDENT and m.k[K.CACHE, key] == cache and not m.k[K.PINNED, key]


@kernel
def issue(m: M, key: int) -> int:
    """``Link._issue``: 1, or 0 if there is no room now."""
    if m.k[K.IS_STAGED, key]:
        if m.s[S.STAGED] == m.s[O.STAGING]:
            return 0
        m.s[S.STAGED] += 1
        m.state[key] = IN_FLIGHT
        hold_bytes(m, m.k[K.BYTES, key])
    else:
        n = choose(m, key, m.k[K.BYTES, key] - free_bytes(m, key))
        if n < 0:
            return 0
        for i in range(n):
            evict(m, m.q[Q.VICTIMS, i], key)
        m.state[key] = IN_FLIGHT
        book(m, key, 1)
    m.k[K.IS_ISSUED, key] = 1
    m.k[K.BLAMED, key] = -1
    if m.k[K.IS_PREFETCH, key]:
        m.s[S.ISSUED] += 1
        if m.s[O.TIER]:
            tier(m, Shelf.PIN, key)
    word(m, log.ISSUE)
    word(m, m.s[S.NOW])
    word(m, key)
    word(m, m.k[K.IS_PREFETCH, key])
    return 1


@kernel
def next_load(m: M) -> int:
    """``Link._next``: the oldest demand, or the first prefetch that there is room for; -1 if there
    is none."""
    tried = 0
    for i in range(0 if m.s[S.D_HEAD] == m.s[S.D_TAIL] else -1, m.s[S.P_COUNT]):
        key = m.q[Q.DEMAND, m.s[S.D_HEAD] & m.s[O.RING]] if i < 0 else m.q[Q.PREFETCH, i]
        if m.k[K.IS_ISSUED, key]:
            return int(key)
        if not m.k[K.IS_NEAR, key]:
            continue
        seen = False
        for j in range(tried):
            seen = seen or m.q[Q.FULL, j] == m.k[K.PLACE, key]
        if seen:
            continue
        if issue(m, key):
            return int(key)
        if i >= 0 and not m.s[O.BYPASS] and m.k[K.REPLACES, key] < 0:
            m.q[Q.FULL, tried] = m.k[K.PLACE, key]
            tried += 1
    return -1


@kernel
def link_grant(m: M) -> None:
    """The beginning of ``Link._send``."""
    pick = next_load(m)
    if pick < 0:
        m.s[S.L_TIME] = FAR
        if m.s[S.D_HEAD] != m.s[S.D_TAIL] and m.s[O.BARRIER] and not m.s[S.BLOCKED]:
            m.s[S.BLOCKED] = 1
            notify(m)
        return
    row = m.k[K.CURVE, pick]
    sent = m.k[K.SENT, pick]
    whole = m.k[K.IS_DEMANDED, pick]
    if m.s[O.SHARES]:
        # What other links take may change at the end of each chunk.
        row += (m.s[S.LINKS] - 1) * m.s[O.SHARES]
        whole = 0
    last = m.ends[row, 0] if whole else sent + 1
    duration = m.ends[row, last] - (m.ends[row, sent] if sent else 0)
    m.s[S.L_KEY] = pick
    m.s[S.L_LAST] = last
    m.s[S.L_SPAN] = m.s[S.NOW]
    if m.s[O.WRITE_BACK]:
        duration = crossed(m, duration, last == m.ends[row, 0])
    link_pending(m, duration, LOAD_DONE)


@kernel
def crossed(m: M, duration: int, whole: bool) -> A:
    """``Link._crossed``."""
    if m.s[O.WRITE_BACK] != DUPLEX:
        duration += m.s[S.BACK]
        m.s[S.BACK] = 0
    elif whole:
        duration = max(duration, m.s[S.BACK] - m.s[S.NOW])
    return duration


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
    if m.s[O.TIER]:
        tier(m, Shelf.UNPIN, key)
    if not m.k[K.IS_STAGED, key]:
        enter(m, key)
    if m.k[K.IS_DEMANDED, key]:
        # Out of the demand queue: the head, unless one under way was promoted behind it.
        i = m.s[S.D_HEAD]
        while m.q[Q.DEMAND, i & m.s[O.RING]] != key:
            i += 1
        while i > m.s[S.D_HEAD]:
            m.q[Q.DEMAND, i & m.s[O.RING]] = m.q[Q.DEMAND, (i - 1) & m.s[O.RING]]
            i -= 1
        m.s[S.D_HEAD] += 1
        m.q[Q.ARRIVED, m.s[S.A_TAIL] & m.s[O.RING]] = key
        m.s[S.A_TAIL] += 1
        notify(m)
    else:
        p_remove(m, key)
        m.k[K.UNUSED, key] = 1
        hold(m, key, m.k[K.PRIORITY, key], m.k[K.EXPIRES, key])
    if m.k[K.IS_PREFETCH, key] and not m.s[O.HOST]:
        keep_landed(m, key)
    note(m, LANDED, key)


@kernel
def hold(m: M, key: int, priority: int, expires: int) -> None:
    """``Link.hold``."""
    m.k[K.HELD, key] = 1
    m.k[K.HOLD_PRIORITY, key] = priority
    m.k[K.HOLD_EXPIRES, key] = expires


@kernel
def wake_link(m: M) -> None:
    """``Link.wake``."""
    wake_sender(m)
    if m.s[O.TIER]:
        tier(m, Shelf.WAKE, 0)


@kernel
def wake_sender(m: M) -> None:
    """The link's own part of that."""
    if m.s[S.L_TIME] == FAR and (m.s[S.D_HEAD] != m.s[S.D_TAIL] or m.s[S.P_COUNT]):
        link_pending(m, 0, LINK_GRANT)


@kernel
def release(m: M, key: int) -> None:
    """``Link.release``."""
    if m.k[K.IS_STAGED, key] and m.state[key] == IN_FLIGHT:
        unstage(m, key)
        wake_link(m)
    else:
        unpin(m, key)


@kernel
def unpin(m: M, key: int) -> None:
    """A copy that stays may go from now on."""
    m.k[K.PINNED, key] = 0
    m.q[Q.RELEASED, m.s[S.R_COUNT]] = key
    m.s[S.R_COUNT] += 1
    wake_link(m)


@kernel
def unstage(m: M, key: int) -> None:
    """``Link._unstage`` and ``_lesser``."""
    m.s[S.STAGED] -= 1
    n = lesser(m, key, m.k[K.BYTES, key] - free_bytes(m, key))
    adopt = n >= 0
    if adopt:
        for i in range(n):
            evict(m, m.q[Q.VICTIMS, i], -1)
    hold_bytes(m, -m.k[K.BYTES, key])
    m.k[K.PINNED, key] = 0
    m.k[K.IS_STAGED, key] = 0
    if adopt:
        book(m, key, 1)
        enter(m, key)
    else:
        m.state[key] = ABSENT
        gone(m, key)


@kernel
def lesser(m: M, key: int, lacking: int) -> int:
    """``Link._lesser``: fills the victims; how many, or -1 if the copy does not stay."""
    if lacking <= 0:
        return 0
    cache = m.k[K.CACHE, key]
    if m.s[O.HOST]:
        candidates(m, cache, key, lacking)
        return ask(m, LESSER, key)
    chosen = choose_victims(m, cache, key, lacking)
    for i in range(chosen):
        lacking -= m.k[K.BYTES, m.q[Q.VICTIMS, i]]
    return chosen if lacking <= 0 else -1
