"""How fast one host worker does a policy's background work: a search for expert maps."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from moesim.compiled import load
from moesim.policies import map_store
from moesim.real.measure import BYTES, OPS

EXPERTS = 64
SMALL, LARGE = 1 << 10, 1 << 19
"""Maps that lie in a core's cache, and that do not fit any (64 MiB)."""
LEAST_NS = 5_000_000
"""A measurement goes on for so long."""


class PolicyArithmetic:
    """The built-in searches' own kernel, over a store in cache and one in memory.

    Operations and bytes are counted by the kernel as it counts them where it is charged.
    """

    def __init__(self, small: int = SMALL, large: int = LARGE) -> None:
        self._searches = [_Search(small), _Search(large)]
        load(*(call for call in _observing(self._searches[0])))

    def rates(self) -> Mapping[str, float]:
        """Operations a second in cache, bytes a second from memory."""
        ops, _ = self._searches[0].rates()
        _, nbytes = self._searches[1].rates()
        return {OPS: ops, BYTES: nbytes}


class _Search:
    def __init__(self, entries: int) -> None:
        self.store = map_store.make_store(1, EXPERTS, entries)
        maps = np.random.default_rng(0).integers(0, 512, (EXPERTS, entries), np.int16)
        self.store.maps[0] = maps
        self.store.size[map_store.ENTRIES] = entries
        self.trails = map_store.make_trails(1, self.store)
        self.trails.rows[0, 0] = maps[:, 0]
        self._ids = np.zeros(1, np.int64)
        self._step = 0

    def rates(self) -> tuple[float, float]:
        """(operations, bytes) a second."""
        self.store.work[:] = 0
        start = time.perf_counter_ns()
        while (spent := time.perf_counter_ns() - start) < LEAST_NS or not self.store.work[0]:
            self._step += 1
            map_store.observe(self.store, self.trails, self._ids, 1, 0, self._step)
        ops, nbytes = self.store.work[map_store.OPS], self.store.work[map_store.BYTES]
        return float(ops) * 1e9 / spent, float(nbytes) * 1e9 / spent


def _observing(search: _Search) -> list[tuple[object, object]]:
    """What ``load`` must compile: one of the kernels that Python calls."""
    choice = map_store.make_choice(EXPERTS)
    calls = map_store._calls(search.store, search.trails, choice)
    return [call for call in calls if call[0] is map_store.observe]
