"""The link of the reference engine: loads, sent chunk by chunk on the clock (rules 2, 6 and 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import simpy

from moesim.answers import Answers
from moesim.costs import Costs
from moesim.engine.clock import LINK_GRANT, LOAD_DONE, Clock, Process
from moesim.ledger import Ledger
from moesim.loads import Loads, Transfer
from moesim.tally import Tally

__all__ = ["Link", "Transfer"]


class Link(Loads):
    """A serial channel. A prefetch yields at the end of a chunk; demand is never pre-empted."""

    def __init__(
        self,
        clock: Clock,
        ledger: Ledger,
        answers: Answers,
        costs: Costs,
        tally: Tally,
        staging: int,
        arrived: Callable[[Transfer], None],
        blocked: Callable[[], None],
        write_back: str = "",
    ) -> None:
        super().__init__(
            lambda: clock.now, ledger, answers, costs, tally, staging, arrived, blocked
        )
        self.clock = clock
        self.beside: Sequence[Link] = ()
        """The links of the other devices, where the host cannot serve all at their own rate."""
        self._asleep: simpy.Event | None = None
        self._write_back = write_back
        self._back_ns = 0
        """When the other direction will have sent all that left (duplex), or how long that will
        take (serial)."""
        self._shared: dict[tuple[int, int], tuple[int, ...]] = {}

    def wake(self) -> None:
        """Something changed: perhaps the link may send again."""
        if self._asleep is not None and (self._demand or self._prefetch):
            asleep, self._asleep = self._asleep, None
            self.clock.fire(asleep, LINK_GRANT)
        if self.tier is not None:
            self.tier.wake()

    @property
    def draws(self) -> bool:
        """Whether it sends, or has demand to send."""
        return self._in_service is not None or bool(self._demand)

    def run(self) -> Process:
        """Send, chunk by chunk, for ever."""
        while True:
            self._asleep = self.clock.event()
            yield self._asleep
            while (transfer := self._next()) is not None:
                yield from self._send(transfer)
                yield self.clock.after(0, LINK_GRANT)

    def _send(self, transfer: Transfer) -> Process:
        # What other links take may change at the end of each chunk.
        whole = transfer.demanded and not self.beside
        last = len(transfer.ends) if whole else transfer.sent + 1
        ends = self._ends_beside(transfer)
        duration = ends[last - 1] - (ends[transfer.sent - 1] if transfer.sent else 0)
        duration = self._crossed(duration, whole=last == len(ends))
        start = self.clock.now
        self._in_service = transfer
        yield self.clock.after(duration, LOAD_DONE)
        self._in_service = None
        self._sent(transfer, last, start, self.clock.now)

    def _ends_beside(self, transfer: Transfer) -> tuple[int, ...]:
        """The ends of a load's chunks while as many links as now draw on the host."""
        if not self.beside:
            return transfer.ends
        links = 1 + sum(link.draws for link in self.beside)
        asked = self.ledger.copy_bytes[transfer.key], links
        if asked not in self._shared:
            self._shared[asked] = self._costs.shared_ends(*asked)
        return self._shared[asked]

    # ---- the other direction (rule 13) -----------------------------------------------------------

    def _gone(self, key: int) -> None:
        super()._gone(key)
        if not self._write_back:
            return
        nbytes = self.ledger.copy_bytes[key]
        self.tally.written_bytes += nbytes
        if self._write_back == "duplex":
            self._back_ns = max(self._back_ns, self.clock.now)
        self._back_ns += self._ends(nbytes)[-1]

    def _crossed(self, duration: int, *, whole: bool) -> int:
        """How long the link is held that sends for ``duration``; ``whole``: to a load's end."""
        if self._write_back == "serial":
            duration, self._back_ns = duration + self._back_ns, 0
        elif self._write_back and whole:
            duration = max(duration, self._back_ns - self.clock.now)
        return duration
