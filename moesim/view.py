"""What a policy sees of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from moesim.ledger import Ledger
from moesim.types import AnyArray, ExpertId


class View:
    """A read-only window on the ledger (``moesim.protocol.CacheView``)."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._states: AnyArray = ledger.state[: ledger.size]
        self._states = self._states.view()
        self._states.flags.writeable = False
        self._candidates: Sequence[ExpertId] = ()
        self.count_jobs: Callable[[], int] = lambda: 0
        self.count_queued: Callable[[], int] = lambda: 0

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
        """Unreserved bytes of the cache that serves ``layer``."""
        ledger = self._ledger
        return ledger.free(ledger.cache_of[layer * ledger.experts])

    @contextmanager
    def offering(self, candidates: Sequence[ExpertId]) -> Iterator[None]:
        """Show candidates while the policy names victims."""
        self._candidates = tuple(candidates)
        try:
            yield
        finally:
            self._candidates = ()
