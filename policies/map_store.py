"""Expert maps: a bounded store of them, and the search for those nearest to a pass under way.

An *expert map* holds what the gates of one iteration said, layer by layer: probabilities of all
experts in 1/16384 (FineMoE, EuroSys'26, arXiv 2502.05370). A *trail* is a map under way; its dot
products with every entry of the store grow by one layer at each gate, so a search never looks back.
Embeddings are kept and searched in the same way, as maps of one layer.

Everything here is a function over arrays. Dot products are exact integers; a cosine is such a
product times the inverse norm of the entry, over the norm of the trail, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numba
import numpy as np

from moesim.compiled import entry, kernel, load
from moesim.types import PROBABILITY_ONE, AnyArray

A = Any
"""An array; numba infers the rest."""

ENTRIES, VERSION = range(2)
"""Columns of ``Store.size``."""

OPS, BYTES = range(2)
"""Columns of ``Store.work``: multiply-adds (or comparisons), bytes of memory traffic."""

STEP, FIRST, LAST, SQUARE, KNOWN, FOUND = range(6)
"""Columns of ``Trails.state``: the pass that its products are of, the layers of it that were
observed, the square of their norm, the version of the store that the products are right for, and
the nearest entry."""

BLOCK = 128
"""Entries among which the nearest is looked for at once."""

EMBEDDING_BITS = 13
EMBEDDED = 16
"""Columns of embeddings whose products fit 32 bits together (2**13 * 2**13 each); of a gate's,
whose probabilities sum to one, any number does."""


class Store(NamedTuple):
    """Maps of ``layers`` x ``experts``, up to C of them (an embedding: one layer of its numbers).

    Two stores of one version share ``written``, ``size`` and ``work``.
    """

    maps: A
    """int16 [layers, experts, C]."""
    inverse: A
    """float64 [layers, C]: 1 / norm of an entry's layers up to this one; 0 where that is 0."""
    written: A
    """int64 [C]: version in which an entry was written."""
    size: A
    """int64 [2]: entries, version (number of inserts)."""
    work: A
    """int64 [2]: what was done since it was last read."""
    block: A
    """int64 [1]: columns whose products fit 32 bits together."""
    part: A
    """int32 [C], scratch."""
    columns: A
    """int64 [experts], scratch."""
    near: A
    """float64 [C], scratch: cosines but for the norm of the trail."""
    near_bits: A
    """The same memory as int64."""


class Trails(NamedTuple):
    """S maps under way."""

    rows: A
    """int16 [S, layers, experts]; 0 in layers that have no gate yet."""
    sums: A
    """int64 [S, layers, experts], of which the rows are made."""
    totals: A
    """int64 [S, layers]: what makes a sum the probability 1."""
    dots: A
    """float64 [S, C]: products with each entry, over the observed layers of this pass; integers,
    exact below 2**53."""
    state: A
    """int64 [S, 6]: see ``STEP``."""
    score: A
    """float64 [S]: cosine with the nearest entry."""


class Choice(NamedTuple):
    """What a search chose of a layer."""

    probabilities: A
    """int64 [experts]: the largest of the maps that were found."""
    chosen: A
    """int64 [experts]: local ids, best first."""
    flags: A
    """uint8 [2, experts], scratch: taken by any, taken by this one."""


# ---- making --------------------------------------------------------------------------------------


def make_store(layers: int, experts: int, capacity: int, like: Store | None = None) -> Store:
    """An empty store; ``like``: another whose entries it shares."""
    near = np.zeros(capacity, np.float64)
    return Store(
        maps=np.zeros((layers, experts, capacity), np.int16),
        inverse=np.zeros((layers, capacity), np.float64),
        written=np.zeros(capacity, np.int64) if like is None else like.written,
        size=np.zeros(2, np.int64) if like is None else like.size,
        work=np.zeros(2, np.int64) if like is None else like.work,
        block=np.array([experts if like is None else EMBEDDED]),
        part=np.zeros(capacity, np.int32),
        columns=np.zeros(experts, np.int64),
        near=near,
        near_bits=near.view(np.int64),
    )


def make_trails(number: int, store: Store) -> Trails:
    """Room for trails of a store's shape."""
    layers, experts, capacity = store.maps.shape
    return Trails(
        rows=np.zeros((number, layers, experts), np.int16),
        sums=np.zeros((number, layers, experts), np.int64),
        totals=np.zeros((number, layers), np.int64),
        dots=np.zeros((number, capacity), np.float64),
        state=np.zeros((number, 6), np.int64),
        score=np.zeros(number, np.float64),
    )


def make_choice(experts: int) -> Choice:
    """Room for a choice."""
    return Choice(
        np.zeros(experts, np.int64), np.zeros(experts, np.int64), np.zeros((2, experts), np.uint8)
    )


class Bank:
    """Trails that are taken and given back; it grows as needed."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.trails = make_trails(4, store)
        self._free = [3, 2, 1, 0]

    def take(self) -> int:
        """A trail without rows."""
        if not self._free:
            old, number = self.trails, len(self.trails.score)
            self.trails = make_trails(2 * number, self.store)
            for new, kept in zip(self.trails, old, strict=True):
                new[:number] = kept
            self._free = list(range(2 * number - 1, number - 1, -1))
        trail = self._free.pop()
        reset(self.trails, trail)
        return trail

    def give(self, trail: int) -> None:
        """Back; it is forgotten."""
        self._free.append(trail)


def fitted(embedding: AnyArray) -> AnyArray:
    """An embedding, int32 [d], halved until all numbers are below 2**13: cosines hardly change."""
    wide = embedding.astype(np.int64)
    shift = max(0, int(np.abs(wide).max(initial=0)).bit_length() - EMBEDDING_BITS)
    return ((wide + (1 << shift >> 1)) >> shift).astype(np.int32)


# ---- kernels -------------------------------------------------------------------------------------


@kernel
def _add_four(store: Store, trails: Trails, s: int, layer: int, i: int, n: int) -> None:
    """``part`` += four columns of a layer, each times the trail's probability."""
    maps, rows, columns, part = store.maps, trails.rows, store.columns, store.part
    e0, e1 = columns[i], columns[min(i + 1, n - 1)]
    e2, e3 = columns[min(i + 2, n - 1)], columns[min(i + 3, n - 1)]
    q0 = np.int32(rows[s, layer, e0])
    q1 = np.int32(rows[s, layer, e1]) if i + 1 < n else np.int32(0)
    q2 = np.int32(rows[s, layer, e2]) if i + 2 < n else np.int32(0)
    q3 = np.int32(rows[s, layer, e3]) if i + 3 < n else np.int32(0)
    for c in range(store.size[ENTRIES]):
        # Stored as 32 bits, it is computed in them.
        part[c] += (
            q0 * maps[layer, e0, c]
            + q1 * maps[layer, e1, c]
            + q2 * maps[layer, e2, c]
            + q3 * maps[layer, e3, c]
        )


@kernel
def _multiply(store: Store, trails: Trails, s: int, layer: int) -> None:
    """A trail's dot products += those of one layer; only columns that are not 0 are read."""
    entries = store.size[ENTRIES]
    n = 0
    for e in range(store.maps.shape[1]):
        if trails.rows[s, layer, e] != 0:
            store.columns[n] = e
            n += 1
    part, dots = store.part, trails.dots[s]
    wide = store.block[0]
    for block in range(0, n, wide):
        for c in range(entries):
            part[c] = 0
        end = min(block + wide, n)
        for i in range(block, end, 4):
            _add_four(store, trails, s, layer, i, end)
        for c in range(entries):
            dots[c] += part[c]
    store.work[OPS] += n * entries
    store.work[BYTES] += (2 * n + 16) * entries


@kernel
def _repair(store: Store, trails: Trails, s: int) -> None:
    """Make a trail's dot products right for entries that were written since."""
    first, last = trails.state[s, FIRST], trails.state[s, LAST]
    known = trails.state[s, KNOWN]
    for c in range(store.size[ENTRIES]):
        if store.written[c] > known:
            dot = np.int64(0)
            for layer in range(first, last + 1):
                for e in range(store.maps.shape[1]):
                    dot += np.int64(trails.rows[s, layer, e]) * store.maps[layer, e, c]
            trails.dots[s, c] = dot
            values = (last + 1 - first) * store.maps.shape[1]
            store.work[OPS] += values
            store.work[BYTES] += 4 * values
    trails.state[s, KNOWN] = store.size[VERSION]


@kernel
def _square(trails: Trails, s: int, layer: int) -> Any:
    total = np.int64(0)
    for e in range(trails.rows.shape[2]):
        q = np.int64(trails.rows[s, layer, e])
        total += q * q
    return total


@kernel
def _restart(store: Store, trails: Trails, s: int, layer: int, step: int) -> None:
    """A pass begins: no layer of it was observed."""
    trails.state[s, STEP] = step
    trails.state[s, FIRST] = layer
    trails.state[s, LAST] = layer - 1
    trails.state[s, SQUARE] = 0
    trails.state[s, KNOWN] = store.size[VERSION]
    for c in range(trails.dots.shape[1]):
        trails.dots[s, c] = 0


@kernel
def observe_one(store: Store, trails: Trails, s: int, layer: int, step: int) -> None:
    """A trail's row of a layer is known; layers come in order within a pass."""
    if trails.state[s, STEP] != step:
        _restart(store, trails, s, layer, step)
    elif trails.state[s, KNOWN] != store.size[VERSION]:
        _repair(store, trails, s)
    _multiply(store, trails, s, layer)
    trails.state[s, SQUARE] += _square(trails, s, layer)
    trails.state[s, LAST] = layer


@kernel
def _whole(store: Store, trails: Trails, s: int) -> None:
    """Make a trail's dot products those of all its rows."""
    square = 0
    for layer in range(store.maps.shape[0]):
        square += _square(trails, s, layer)
    # A layer that was not observed in this pass is missing from the square, too.
    if trails.state[s, STEP] < 0 or trails.state[s, SQUARE] != square:
        _restart(store, trails, s, 0, 0)
        for layer in range(store.maps.shape[0]):
            _multiply(store, trails, s, layer)
        trails.state[s, LAST] = store.maps.shape[0] - 1
        trails.state[s, SQUARE] = square
    elif trails.state[s, KNOWN] != store.size[VERSION]:
        _repair(store, trails, s)


@kernel
def _nearest(store: Store, trails: Trails, s: int, layer: int, entries: int) -> int:
    """Fills ``near``; the place of the largest, the first of equals.

    Floats from 0 on are in the order of their bits, and the largest of integers is found many at a
    time, block by block; only where all are below 0 must the floats themselves be looked at.
    """
    # Arrays by names of their own: a loop that must look them up again is not made quick.
    near, bits, dots, inverse = store.near, store.near_bits, trails.dots[s], store.inverse[layer]
    top, found = np.int64(-1), 0
    for first in range(0, entries, BLOCK):
        begin, end = np.uint64(first), np.uint64(min(first + BLOCK, entries))
        most = np.int64(-1)
        for c in range(begin, end):
            near[c] = dots[c] * inverse[c]
        for c in range(begin, end):
            most = max(most, bits[c])
        if most > top:
            top, found = most, first
    if top >= 0:
        while bits[found] != top:
            found += 1
        return found
    for c in range(entries):
        if near[c] > near[found]:
            found = c
    return found


@kernel
def find(store: Store, trails: Trails, s: int, layer: int) -> None:
    """The entry of the largest cosine over the layers up to this one; ties to the lowest."""
    entries = store.size[ENTRIES]
    found = _nearest(store, trails, s, layer, entries)
    square = trails.state[s, SQUARE]
    trails.state[s, FOUND] = found
    trails.score[s] = store.near[found] / math.sqrt(square) if square > 0 else 0.0
    store.work[OPS] += entries
    store.work[BYTES] += 16 * entries


@kernel
def _choose(store: Store, c: int, layer: int, least: int, delta: float, choice: Choice) -> None:
    """Equations 6 to 8: the fewest experts, likeliest first, of mass >= delta and at least K.

    ``delta`` is a share of the row's sum, which rounding may have left beside 1. A layer that the
    entry's pass did not run names nobody. Ties go to the lowest id.
    """
    experts = store.maps.shape[1]
    total = 0
    for e in range(experts):
        total += store.maps[layer, e, c]
        choice.flags[1, e] = 0
    if total == 0:
        return
    mass, n = 0, 0
    while n < experts and (n < least or mass < delta * total):
        top, best = -1, 0
        for e in range(experts):
            if choice.flags[1, e] == 0 and store.maps[layer, e, c] > top:
                top, best = store.maps[layer, e, c], e
        choice.flags[0, best] = 1
        choice.flags[1, best] = 1
        mass += top
        n += 1
    store.work[OPS] += experts * (n + 1)
    store.work[BYTES] += 2 * experts


@kernel
def _in_order(choice: Choice) -> int:
    """``chosen``: what anyone took, likeliest first, ties by id; how many they are."""
    n = 0
    while True:
        top, best = -1, 0
        for e in range(len(choice.probabilities)):
            if choice.flags[0, e] != 0 and choice.probabilities[e] > top:
                top, best = choice.probabilities[e], e
        if top < 0:
            return n
        choice.flags[0, best] = 0
        choice.chosen[n] = best
        n += 1


@kernel
def _redundant(
    store: Store, trails: Trails, s: int, words: Store, senses: Trails, r: int, distance: int
) -> int:
    """The entry y of the largest RDY = (d/L) sem + ((L-d)/L) traj; ties to the lowest."""
    layers = store.maps.shape[0]
    near = min(distance, layers)
    square = trails.state[s, SQUARE]
    norm = math.sqrt(square) if square > 0 else 1.0
    word_norm = 1.0
    if r >= 0 and senses.state[r, SQUARE] > 0:
        word_norm = math.sqrt(senses.state[r, SQUARE])
    top, found = -np.inf, 0
    for c in range(store.size[ENTRIES]):
        redundancy = (layers - near) * (trails.dots[s, c] * store.inverse[layers - 1, c] / norm)
        if r >= 0:
            redundancy += near * (senses.dots[r, c] * words.inverse[0, c] / word_norm)
        if redundancy > top:
            top, found = redundancy, c
    store.work[OPS] += 3 * store.size[ENTRIES]
    store.work[BYTES] += 32 * store.size[ENTRIES]
    return found


@kernel
def _write(store: Store, trails: Trails, s: int, c: int) -> None:
    """A trail becomes an entry; ``s`` -1: nothing does."""
    layers, experts = store.maps.shape[0], store.maps.shape[1]
    square = 0
    for layer in range(layers):
        for e in range(experts):
            store.maps[layer, e, c] = trails.rows[s, layer, e] if s >= 0 else 0
        if s >= 0:
            square += _square(trails, s, layer)
        store.inverse[layer, c] = 1.0 / math.sqrt(square) if square > 0 else 0.0
    store.work[OPS] += layers * experts
    store.work[BYTES] += 4 * layers * experts + 8 * layers


# ---- what Python calls ---------------------------------------------------------------------------


def _reset(trails: Trails, s: int) -> None:
    """A trail without rows."""
    trails.state[s, STEP] = -1
    for layer in range(trails.rows.shape[1]):
        trails.totals[s, layer] = 0
        for e in range(trails.rows.shape[2]):
            trails.rows[s, layer, e] = 0


def _add(
    trails: Trails, s: int, layer: int, values: AnyArray, first: int, last: int, whole: int
) -> None:
    """Add the rows ``first`` to ``last`` of ``values``, int32 [T, E], to a trail's layer.

    The layer's row is the mean of all that was added: its sums over how often ``whole`` came.
    """
    before = trails.totals[s, layer]
    if before == 0:
        for e in range(trails.rows.shape[2]):
            trails.sums[s, layer, e] = 0
    total = before + (last - first) * whole
    trails.totals[s, layer] = total
    for i in range(first, last):
        for e in range(trails.rows.shape[2]):
            trails.sums[s, layer, e] += values[i, e]
    if total > 0:
        for e in range(trails.rows.shape[2]):
            doubled = 2 * PROBABILITY_ONE * trails.sums[s, layer, e]
            trails.rows[s, layer, e] = (doubled + total) // (2 * total)


def _observe_all(
    store: Store, trails: Trails, ids: AnyArray, n: int, layer: int, step: int
) -> None:
    """The rows of a layer are known: dot products grow. ``ids`` int64 [n]: the trails."""
    for i in range(n):
        observe_one(store, trails, ids[i], layer, step)


def _search(store: Store, trails: Trails, ids: AnyArray, n: int, layer: int) -> None:
    """Trajectory search (equation 5): the nearest entry of each trail, by its layers so far."""
    for i in range(n):
        find(store, trails, ids[i], layer)


def _recall(words: Store, senses: Trails, r: int) -> None:
    """Semantic search (equation 4): the entry of the nearest embedding."""
    _whole(words, senses, r)
    find(words, senses, r, 0)


def _predict(
    store: Store,
    found: Trails,
    ids: AnyArray,
    n: int,
    layer: int,
    least: int,
    dynamic: int,
    choice: Choice,
) -> int:
    """What the entries found say of a layer: union of the chosen, largest probabilities.

    found : the trails (or embeddings) that were searched for. least : K. dynamic : whether delta
    is 1 - score; else 0, which chooses K. Returns how many were chosen.
    """
    for e in range(store.maps.shape[1]):
        choice.probabilities[e] = 0
        choice.flags[0, e] = 0
    for i in range(n):
        s = ids[i]
        c = found.state[s, FOUND]
        for e in range(store.maps.shape[1]):
            p = np.int64(store.maps[layer, e, c])
            choice.probabilities[e] = max(choice.probabilities[e], p)
        delta = min(max(1.0 - found.score[s], 0.0), 1.0) if dynamic else 0.0
        _choose(store, c, layer, least, delta, choice)
    return _in_order(choice)


def _insert(
    store: Store, trails: Trails, s: int, words: Store, senses: Trails, r: int, distance: int
) -> int:
    """Keep a map; where the store is full, in the place of the most redundant.

    ``r`` : its embedding, or -1. Returns the entry.
    """
    c = int(store.size[ENTRIES])
    if c < store.maps.shape[2]:
        store.size[ENTRIES] = c + 1
    else:
        _whole(store, trails, s)
        if r >= 0:
            _whole(words, senses, r)
        c = _redundant(store, trails, s, words, senses, r, distance)
    store.size[VERSION] += 1
    store.written[c] = store.size[VERSION]
    _write(store, trails, s, c)
    _write(words, senses, r, c)
    return c


reset = entry(_reset)
add = entry(_add)
observe = entry(_observe_all)
search = entry(_search)
recall = entry(_recall)
predict = entry(_predict)
insert = entry(_insert)


def load_all(store: Store, trails: Trails, choice: Choice) -> None:
    """Compile what Python calls, or load what was kept."""
    load(*_calls(store, trails, choice))


def _calls(store: Store, trails: Trails, choice: Choice) -> Iterator[tuple[Any, Any]]:
    number, ids, values = numba.int64, numba.int64[::1], numba.int32[:, ::1]
    typeof: Any = numba.typeof
    maps, under_way, chosen = typeof(store), typeof(trails), typeof(choice)
    yield reset, (under_way, number)
    yield add, (under_way, number, number, values, number, number, number)
    yield observe, (maps, under_way, ids, number, number, number)
    yield search, (maps, under_way, ids, number, number)
    yield recall, (maps, under_way, number)
    yield predict, (maps, under_way, ids, number, number, number, number, chosen)
    yield insert, (maps, under_way, number, maps, under_way, number, number)
