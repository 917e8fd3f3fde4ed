"""LRU over a bare stream of accesses, compiled: what counting costs without a clock.

Every access stands for itself, as generic cache simulators see it (``--mode flat``), and all
objects have one size. It decides nothing in a replay: it is the yardstick of what the engine adds,
and a second opinion on its counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from moesim.compiled import entry, load
from moesim.types import IntArray

Links = npt.NDArray[np.uint32]


class FlatLRU:
    """LRU caches that share a space of object ids, each id in one cache of its own."""

    def __init__(self, cache_of: IntArray, capacities: Sequence[int]) -> None:
        """``cache_of`` [ids] names each id's cache; ``capacities`` [caches] are in objects.

        Raises ValueError for a capacity below one object.
        """
        if min(capacities) < 1:
            raise ValueError("a cache must hold at least one object")
        load(*calls())
        ids, caches = len(cache_of), len(capacities)
        nodes = ids + caches + sum(capacities)
        self._older = np.zeros(nodes, np.uint32)
        self._newer = np.zeros(nodes, np.uint32)
        self._resident = np.zeros(nodes, np.uint8)
        self._head = (ids + cache_of).astype(np.uint32)
        # Caches start full of objects that nobody asks for, so that a miss always evicts.
        first = ids + caches
        for cache, capacity in enumerate(capacities):
            ring = np.concatenate(([ids + cache], np.arange(first, first + capacity)))
            self._older[ring] = np.roll(ring, -1)
            self._newer[ring] = np.roll(ring, 1)
            first += capacity

    def hits(self, stream: Links) -> int:
        """Hits of these accesses, uint32 ids; the caches stay as they leave them."""
        return int(_count_hits(stream, self._older, self._newer, self._resident, self._head))


def calls() -> list[tuple[Any, Any]]:
    """What Python calls here, and the types that it calls it with."""
    links, flags = numba.uint32[::1], numba.uint8[::1]
    return [(_count_hits, (links, links, links, flags, links))]


def _count(stream: Links, older: Links, newer: Links, resident: Any, head: Links) -> int:
    """Rings through each cache's head: ``older[head]`` is the newest, ``newer[head]`` the oldest.

    Ids are unsigned, which spares the compiled code a test for negative indexes at every access.
    """
    hits = 0
    for i in range(len(stream)):
        e = stream[i]
        s = head[e]
        if resident[e]:
            hits += 1
            p = newer[e]
            q = older[e]
            older[p] = q
            newer[q] = p
        else:
            v = newer[s]
            p = newer[v]
            older[p] = s
            newer[s] = p
            resident[v] = 0
            resident[e] = 1
        q = older[s]
        newer[e] = s
        older[e] = q
        newer[q] = e
        older[s] = e
    return hits


_count_hits = entry(_count)
