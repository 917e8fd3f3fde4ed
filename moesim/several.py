"""The loads of several devices: each device has queues and a link of its own, and one log.

A ``Desk`` asks for the loads ``of`` a key; what concerns them all is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from moesim.ledger import Ledger
from moesim.loads import Loads, Transfer
from moesim.tally import Tally

Own = TypeVar("Own", bound=Loads)


class Several(Generic[Own]):
    """The loads of each device, in order.

    owner_of : the device of each key. tally : of the whole run.
    """

    def __init__(
        self, each: Sequence[Own], owner_of: Sequence[int], ledger: Ledger, tally: Tally
    ) -> None:
        self.each = each
        self.owner_of = owner_of
        self._ledger = ledger
        self._tally = tally
        self.log = each[0].log
        self.decisions = each[0].decisions
        for number, loads in enumerate(each):
            loads.log, loads.decisions = self.log, self.decisions
            loads.caches = sorted(
                {
                    cache
                    for cache, owner in zip(ledger.cache_of, owner_of, strict=True)
                    if owner == number
                }
            )
            loads.suffix = f"@{number}"

    def of(self, key: int) -> Own:
        """The loads of the device that owns a key."""
        return self.each[self.owner_of[key]]

    @property
    def event(self) -> int:
        """The newest layer event."""
        return self.each[0].event

    @property
    def waiting(self) -> int:
        """Prefetches without bytes."""
        return sum(loads.waiting for loads in self.each)

    def begin(self, members: set[int]) -> None:
        """A new layer event demands these keys."""
        for loads in self.each:
            loads.begin(members)

    def expire(self) -> None:
        """Drop what the newest gate made useless."""
        for loads in self.each:
            loads.expire()

    def promote(self, keys: Sequence[int]) -> None:
        """Loads under way are demanded: they go first, by rank."""
        for key in keys:
            self.of(key).promote([key])

    def demand(self, missing: Sequence[Transfer]) -> None:
        """Put a gate's missing experts on the links, behind those under way, by rank."""
        for transfer in missing:
            self.of(transfer.key).demand([transfer])

    def shrink(self, capacity_bytes: Sequence[int]) -> None:
        """New capacities; evict by score until nothing is over, as far as nothing is pinned."""
        for loads in self.each:
            loads.shrink(capacity_bytes)

    def wake(self) -> None:
        """Something changed: perhaps a link may send again."""
        for loads in self.each:
            loads.wake()

    def finish(self) -> None:
        """The run has ended."""
        for loads in self.each:
            loads.settle()
        self._tally.gather()
        self._tally.peak_bytes = self._ledger.peak_bytes
        self._tally.log_digest = self.log.hex()
        self._tally.decision_digest = self.decisions.hex()
