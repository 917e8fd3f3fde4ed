"""The drive of the reference engine: reads into host memory, chunk by chunk on the clock."""

from __future__ import annotations

import simpy

from moesim.engine.clock import LOAD_DONE, READ_GRANT, Clock, Process
from moesim.engine.link import Link
from moesim.engine.setup import Setup
from moesim.tally import Reads
from moesim.tier import Tier


class Drive(Tier):
    """A serial channel. A prefetch yields at the end of a chunk; demand is never pre-empted."""

    def __init__(self, clock: Clock, setup: Setup, link: Link, tally: Reads) -> None:
        assert setup.dram is not None
        super().__init__(
            lambda: clock.now,
            setup.costs,
            link.ledger.copy_bytes,
            link.unissued,
            link.wake,
            link.log,
            tally,
            setup.dram.nbytes,
            setup.dram.initial,
        )
        self.clock = clock
        self._link = link
        self._asleep: simpy.Event | None = None

    def wake(self) -> None:
        """Something changed: perhaps the drive may read again."""
        if self._asleep is not None:
            asleep, self._asleep = self._asleep, None
            self.clock.fire(asleep, READ_GRANT)

    def run(self) -> Process:
        """Read, chunk by chunk, for ever."""
        while True:
            yield self.clock.after(0, READ_GRANT)
            key = self.next_read()
            if key is None:
                self._asleep = self.clock.event()
                yield self._asleep
                continue
            yield from self._read(key)

    def _read(self, key: int) -> Process:
        ends, sent = self.ends(key), self.sent[key]
        last = len(ends) if key in self.waiting else sent + 1
        start = self.clock.now
        yield self.clock.after(ends[last - 1] - (ends[sent - 1] if sent else 0), LOAD_DONE)
        if self._link.spans is not None:
            self._link.spans.append(("ssd", start, self.clock.now, key))
        self.was_read(key, last, start, self.clock.now)
