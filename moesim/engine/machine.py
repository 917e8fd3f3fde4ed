"""The compiled core's machine: its arrays, its log, and its way to ask Python.

The core is a state machine of three kinds of actor, the compute lane, the link and the host
workers, each with at most one pending event; the earliest by (time, rank, order of creation)
happens next, as in ``moesim.engine.clock``.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir

from moesim import hashing
from moesim.compiled import call_with, kernel
from moesim.compiler import from_zero
from moesim.engine import clock
from moesim.engine.fields import Ask, C, Heard, K, O, R, S, W
from moesim.types import NEVER, State, Status

A = Any
"""An int64 array; numba infers the rest."""


@from_zero
class M(NamedTuple):
    """The machine: every array of a run. Each function takes it whole; the fewer arrays, the less
    there is to compile and to pass."""

    s: A
    """Scalars and options [S, O]."""
    state: A
    """``State`` of each key, uint8."""
    k: A
    """Facts of keys, and the keep seat's state of their experts [K, X; keys + caches]; behind the
    keys are the heads of the caches' lists."""
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
    """Ring by layer event: (event, count, keys that plans named for it); as long as a power of
    two."""
    plan: A
    """Cancelled keys, then wishes: (key, expiry, priority)."""
    told: A
    """Commands of a policy in plain Python [commands, P]."""
    heard: A
    """Notes for it [notes, R]."""
    known: A
    """By layer: how many experts, then which: its last demand, or its hottest [layers, 1 + E]."""
    starts: A
    """Where the demand of each layer event of the whole run begins, and the end."""
    future: A
    """The demand of the whole run, int32."""
    counts: A
    """``tally.Counts`` of the two phases; then the stall by layer."""
    spans: A
    """What the lanes did: (lane, start, end, key)."""
    ev: A
    """The block's layer events [events, E]."""
    dem: A
    """The block's demand [D, accesses]."""
    ids: A
    """The experts of the block's demand, uint32: unsigned, they index without a test."""
    said: A
    """The block's predictions."""
    st: A
    """The block's steps [steps, T]."""
    fore: A
    """What the block's facts foresee, record after record."""
    each: A
    """The scalars of each of several devices [devices, S + O]."""
    jobs: A
    """Jobs under way, a record each [queue + 1, width]; the last row is for what is not a job."""


_NUMBERS = {"state": numba.types.uint8, "future": numba.types.int32, "ids": numba.types.uint32}
_FLAT = ("s", "state", "starts", "future", "ids", "said", "fore")


def _kind(field: str) -> Any:
    number: Any = _NUMBERS.get(field, numba.types.int64)
    return number[::1] if field in _FLAT else number[:, ::1]


_tuple: Any = numba.types.NamedTuple
KIND = _tuple([_kind(field) for field in M._fields], M)
"""The machine's type, for numba."""

FAR = NEVER
ABSENT, QUEUED, IN_FLIGHT, RESIDENT = (int(s) for s in State)
HIT, LATE, MISS = (int(s) for s in Status)
LOAD_DONE, COMPUTE_DONE, WORKER_DONE, ARRIVAL, STEP_BEGIN, GATE, LINK_GRANT, READ_GRANT = range(8)
assert tuple(clock.Rank) == tuple(range(8))

# Lanes of a timeline, in the order of ``moesim.timeline.LANES``.
DENSE, EXPERT, STALL, DEMAND, SPECULATIVE, ON_CPU, JOB, EXCHANGE, READING = range(9)

IDLE_KEY, JOB_KEY = -1, -2
"""What a worker's pending event is when no expert: it wakes, or a job is done."""

LANDED, EVICTED, DROPPED = (int(kind) for kind in Heard)
NOTES = int(Ask.NOTES)

PLACE: A = np.uint64(0x9E3779B97F4A7C15)

finalise = kernel(hashing.finalise)


# ---- logs ----------------------------------------------------------------------------------------


@kernel
def folded(value: int, place: int) -> A:
    """A word's part of a log's digest (``LogDigest``)."""
    return finalise(np.uint64(value) + np.uint64(place) * PLACE)


@kernel
def add(m: M, which: int, words: int, parts: A) -> None:
    """So many words more in a log; its sum lies behind their number."""
    m.s[which] += words
    m.s[which + 1] = np.int64(np.uint64(m.s[which + 1]) + parts)


@kernel
def word(m: M, value: int) -> None:
    """``LogDigest.add`` of one word to the log."""
    if m.s[O.LOG]:
        m.s[S.LOG_WORDS] += 1
        part = folded(value, m.s[S.LOG_WORDS])
        m.s[S.LOG_SUM] = np.int64(np.uint64(m.s[S.LOG_SUM]) + part)


@kernel
def choice(m: M, value: int) -> None:
    """``LogDigest.add`` of one word to the decisions."""
    if m.s[O.LOG]:
        m.s[S.CHOICE_WORDS] += 1
        part = folded(value, m.s[S.CHOICE_WORDS])
        m.s[S.CHOICE_SUM] = np.int64(np.uint64(m.s[S.CHOICE_SUM]) + part)


@kernel
def record(m: M, kind: int, key: int) -> None:
    """A record of (kind, time, key)."""
    if m.s[O.LOG]:
        words = m.s[S.LOG_WORDS]
        parts = folded(kind, words + 1) + folded(m.s[S.NOW], words + 2)
        add(m, S.LOG_WORDS, 3, parts + folded(key, words + 3))


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


@kernel
def hash3(a: A, b: A, c: A) -> A:
    """``moesim.hashing.hash64`` of three integers."""
    state: A = PLACE
    state = finalise((state ^ np.uint64(a)) + PLACE)
    state = finalise((state ^ np.uint64(b)) + PLACE)
    return finalise((state ^ np.uint64(c)) + PLACE)


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


@kernel
def worker_pending(m: M, i: int, delay: int, rank: int, key: int) -> None:
    """What a worker does next."""
    m.s[S.SEQ] += 1
    m.w[W.TIME, i] = m.s[S.NOW] + delay
    m.w[W.RANK, i] = rank
    m.w[W.SEQ, i] = m.s[S.SEQ]
    m.w[W.KEY, i] = key
    m.w[W.SPAN, i] = m.s[S.NOW]


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
def free_bytes(m: M, key: int) -> A:
    """``Ledger.free`` of a key's cache."""
    cache = m.k[K.CACHE, key]
    return m.c[C.CAPACITY, cache] - m.c[C.USED, cache]


# ---- asking Python -------------------------------------------------------------------------------

HostFunction = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
"""What the core calls: (what, about) -> answer."""


def _call_compiled(typing_context: Any, address: Any, what: Any, about: Any) -> Any:
    """A call through an address. A tenth of what leaving and entering compiled code costs."""
    number = numba.types.int64
    i64 = ir.IntType(64)
    kind = ir.FunctionType(i64, [i64, i64]).as_pointer()

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.call(builder.inttoptr(values[0], kind), [values[1], values[2]])

    return number(number, number, number), generate


def _call_plain(address: int, what: int, about: int) -> int:
    answer: int = HostFunction(int(address))(int(what), int(about))
    return answer


_config: Any = numba.config
call: Any = _call_plain if _config.DISABLE_JIT else numba.extending.intrinsic(_call_compiled)


@kernel
def ask(m: M, what: int, about: int) -> int:
    """Ask the host of a policy in plain Python; 0 or less when it has failed."""
    answer: int = call(m.s[O.HOST], np.int64(what), np.int64(about))
    return answer


@kernel
def tier(m: M, what: int, about: int) -> A:
    """What concerns host memory (``moesim.engine.reads``), where it does not hold every expert."""
    return call_with(m.s[O.TIER], m, np.int64(what), np.int64(about))


@kernel
def note(m: M, kind: int, key: int) -> None:
    """The policy will hear of a copy, before it is asked anything."""
    if m.s[O.LISTENS]:
        if m.s[S.N_NOTES] == len(m.heard):
            ask(m, NOTES, 0)
        i = m.s[S.N_NOTES]
        m.heard[i, R.KIND] = kind
        m.heard[i, R.KEY] = key
        m.heard[i, R.EVENT] = m.s[S.EVENT]
        m.heard[i, R.ORDINAL] = m.k[K.ORDINAL, key]
        m.heard[i, R.DEMAND] = 1 - m.k[K.IS_PREFETCH, key]
        if kind == LANDED:
            m.heard[i, R.EVENT] = m.k[K.EVENT, key]
        m.s[S.N_NOTES] = i + 1
