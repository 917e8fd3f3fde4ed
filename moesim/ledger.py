"""The ledger: which copies hold device bytes, and how many.

Mechanism only. It knows residents, reservations, pins and bytes; it never chooses a victim and has
no clock. Every host, simulated or real, keeps its books here.

A *cache* is one pool of bytes: one for all layers (scope "global") or one a layer (scope "layer").
A copy is named by its key (``moesim.types``), so two precisions of an expert are two entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moesim.types import IntArray, State

SCOPES = ("global", "layer")
ALLOCATORS = ("bytes", "slots")

# Plain integers: an enumeration's members are slow to name where every event does it.
ABSENT, QUEUED, IN_FLIGHT, RESIDENT = (int(state) for state in State)


class LedgerError(RuntimeError):
    """The host broke a law of the ledger: a bug, not a user's mistake."""


class Ledger:
    """Books of one host.

    Parameters
    ----------
    expert_bytes : int64 [precisions, layers]
    experts : experts a layer
    capacity_bytes : one number, or one a layer; its length decides the scope
    allocator : "bytes" books what a copy weighs; "slots" books the largest copy of its cache for
        every copy, as a bank of equal slots must.
    caches : int64 [layers * experts], the cache of each expert; None: as the scope says.
    """

    def __init__(
        self,
        expert_bytes: IntArray,
        experts: int,
        capacity_bytes: Sequence[int],
        *,
        allocator: str = "bytes",
        caches: IntArray | None = None,
    ) -> None:
        precisions, layers = (int(n) for n in expert_bytes.shape)
        self.experts = experts
        self.size: int = layers * experts
        self.capacity = [int(c) for c in capacity_bytes]
        if caches is None:
            own = len(self.capacity) > 1 or layers == 1
            caches = np.repeat(np.arange(layers) * own, experts)
        sizes = np.repeat(expert_bytes, experts, axis=1)
        self._states = bytearray(precisions * self.size)
        self.state = np.frombuffer(self._states, np.uint8)
        """uint8 [keys] of ``State``: a view, always current."""
        self.cache_of: list[int] = np.tile(caches, precisions).tolist()
        """The cache that holds each key."""
        self.bytes_of: list[int] = _booked(sizes, caches, allocator).reshape(-1).tolist()
        """Bytes booked for each key."""
        self.copy_bytes: list[int] = sizes.reshape(-1).tolist()
        """Bytes that a load of each key moves."""
        self.residents: list[set[int]] = [set() for _ in self.capacity]
        self.used = [0] * len(self.capacity)
        self.pinned: set[int] = set()
        self.staged_bytes = 0
        self.held_bytes = 0
        self.peak_bytes = 0

    # ---- questions -------------------------------------------------------------------------------

    def expert(self, key: int) -> int:
        """The expert id of a key."""
        return key % self.size

    def precision(self, key: int) -> int:
        """The precision of a key."""
        return key // self.size

    def free(self, cache: int) -> int:
        """Unreserved bytes of a cache; negative after it shrank below what it holds."""
        return self.capacity[cache] - self.used[cache]

    def resident_bytes(self, caches: Iterable[int]) -> int:
        """Copied bytes of all residents of some caches."""
        return sum(self.copy_bytes[k] for cache in caches for k in self.residents[cache])

    # ---- changes ---------------------------------------------------------------------------------

    def queue(self, key: int) -> None:
        """A load of the copy is wanted; no bytes are held."""
        self._expect(key, ABSENT)
        self._states[key] = QUEUED

    def forget(self, key: int) -> None:
        """A queued load is no longer wanted."""
        self._expect(key, QUEUED)
        self._states[key] = ABSENT

    def reserve(self, key: int) -> None:
        """The link was granted: book the copy's bytes."""
        self._expect(key, QUEUED)
        cache = self.cache_of[key]
        if self.bytes_of[key] > self.free(cache):
            raise LedgerError(f"cache {cache} has no room for key {key}")
        self._states[key] = IN_FLIGHT
        self._book(cache, self.bytes_of[key])

    def land(self, key: int) -> None:
        """The last byte has arrived."""
        self._expect(key, IN_FLIGHT)
        self._states[key] = RESIDENT
        self.residents[self.cache_of[key]].add(key)

    def abandon(self, key: int) -> None:
        """A load in flight was cancelled: its bytes are free again."""
        self._expect(key, IN_FLIGHT)
        self._states[key] = ABSENT
        self._book(self.cache_of[key], -self.bytes_of[key])

    def evict(self, key: int) -> None:
        """A resident, unpinned copy goes."""
        self._expect(key, RESIDENT)
        if key in self.pinned:
            raise LedgerError(f"key {key} is pinned")
        cache = self.cache_of[key]
        self._states[key] = ABSENT
        self.residents[cache].remove(key)
        self._book(cache, -self.bytes_of[key])

    def stage(self, key: int) -> None:
        """Book a copy outside the capacity, for the time of one use."""
        self._expect(key, QUEUED)
        self._states[key] = IN_FLIGHT
        self.staged_bytes += self.bytes_of[key]
        self._hold(self.bytes_of[key])

    def unstage(self, key: int, *, adopt: bool) -> None:
        """A staged copy was used: it becomes a resident, or goes."""
        self._expect(key, IN_FLIGHT)
        nbytes = self.bytes_of[key]
        self.staged_bytes -= nbytes
        self._hold(-nbytes)
        self._states[key] = ABSENT
        if adopt:
            self._states[key] = QUEUED
            self.reserve(key)
            self.land(key)

    def resize(self, capacity_bytes: Iterable[int]) -> None:
        """Change the capacities; the host must then evict until nothing is over."""
        self.capacity = [int(c) for c in capacity_bytes]

    # ---- inside ----------------------------------------------------------------------------------

    def _expect(self, key: int, state: int) -> None:
        if self._states[key] != state:
            there = State(self._states[key]).name
            raise LedgerError(f"key {key} is {there}, not {State(state).name}")

    def _book(self, cache: int, nbytes: int) -> None:
        self.used[cache] += nbytes
        self._hold(nbytes)

    def _hold(self, nbytes: int) -> None:
        self.held_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def audit(self) -> None:
        """Recompute the books from the residents' states; raise ``LedgerError`` if they differ."""
        for cache, held in enumerate(self.residents):
            flying = [
                k
                for k in np.flatnonzero(self.state == IN_FLIGHT).tolist()
                if self.cache_of[k] == cache
            ]
            booked = sum(self.bytes_of[k] for k in held)
            moving = sum(self.bytes_of[k] for k in flying)
            if not booked <= self.used[cache] <= booked + moving:
                raise LedgerError(f"cache {cache} books {self.used[cache]}, holds {booked}")
        wrong = [k for held in self.residents for k in held if self.state[k] != RESIDENT]
        if wrong:
            raise LedgerError(f"keys {wrong} are listed but not resident")


def _booked(sizes: IntArray, caches: IntArray, allocator: str) -> IntArray:
    """Bytes booked for a copy of each (precision, expert)."""
    if allocator == "bytes":
        return sizes
    largest = np.zeros(int(caches.max()) + 1, np.int64)
    np.maximum.at(largest, caches, sizes.max(axis=0))
    return np.broadcast_to(largest[caches], sizes.shape)
