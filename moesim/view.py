"""What a policy sees of the cache (``moesim.protocol.CacheView``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from moesim.ledger import Ledger
from moesim.types import AnyArray, ExpertId


class Window:
    """A read-only window on a host's books.

    ``states`` : uint8 [layers * experts] of ``State``, always current. The others are asked when
    the policy asks.
    """

    def __init__(
        self,
        states: AnyArray,
        count_jobs: Callable[[], int],
        count_queued: Callable[[], int],
        free_bytes: Callable[[int], int],
    ) -> None:
        self._states: AnyArray = states.view()
        self._states.flags.writeable = False
        self._candidates: Sequence[ExpertId] = ()
        self.count_jobs = count_jobs
        self.count_queued = count_queued
        self._free_bytes = free_bytes

    @property
    def states(self) -> AnyArray:
        """uint8 [layers * experts] of ``State``, full precision, read-only."""
        return self._states

    @property
    def candidates(self) -> Sequence[ExpertId]:
        """Inside ``victims`` only: what may go now, ascending."""
        return self._candidates

    @property
    def jobs_waiting(self) -> int:
        """Background jobs submitted and not yet done."""
        return self.count_jobs()

    @property
    def queued(self) -> int:
        """Prefetches that wait for the link."""
        return self.count_queued()

    def free_bytes(self, layer: int) -> int:
        """Unreserved bytes of the cache that serves ``layer``, or of its caches together."""
        return self._free_bytes(layer)

    @contextmanager
    def offering(self, candidates: Sequence[ExpertId]) -> Iterator[None]:
        """Show candidates while the policy names victims."""
        self._candidates = tuple(candidates)
        try:
            yield
        finally:
            self._candidates = ()


def serving_caches(cache_of: Sequence[int], experts: int) -> list[list[int]]:
    """For each layer the caches that hold experts of it."""
    return [
        sorted(set(cache_of[first : first + experts])) for first in range(0, len(cache_of), experts)
    ]


class View(Window):
    """The window on a ledger; the host that has jobs and a queue sets ``count_jobs`` and
    ``count_queued``."""

    def __init__(self, ledger: Ledger) -> None:
        serving = serving_caches(ledger.cache_of[: ledger.size], ledger.experts)

        def free_bytes(layer: int) -> int:
            return sum(ledger.free(cache) for cache in serving[layer])

        super().__init__(ledger.state[: ledger.size], lambda: 0, lambda: 0, free_bytes)
