"""The order of events at one nanosecond, and a SimPy environment that keeps it."""

from __future__ import annotations

from collections.abc import Generator
from enum import IntEnum
from typing import Any, TypeAlias

import simpy

from moesim.errors import UsageError
from moesim.types import NEVER


class Rank(IntEnum):
    """What happens first when several things happen at the same nanosecond (design rule 2)."""

    LOAD_DONE = 0
    COMPUTE_DONE = 1
    WORKER_DONE = 2
    ARRIVAL = 3
    STEP_BEGIN = 4
    GATE = 5
    LINK_GRANT = 6
    READ_GRANT = 7


TOO_LONG = (
    "the run takes more than 146 years on the clock; raise the bandwidth or the rates of the "
    "hardware profile, or replay fewer requests (--limit)"
)

# Plain integers: an enumeration's members are slow to name where every event does it.
LOAD_DONE, COMPUTE_DONE, WORKER_DONE, ARRIVAL, STEP_BEGIN, GATE, LINK_GRANT, READ_GRANT = map(
    int, Rank
)

Process: TypeAlias = Generator[simpy.Event, Any, None]


class Clock(simpy.Environment):
    """Integer nanoseconds; events at one nanosecond run by ``Rank``, then in order of creation."""

    @property
    def now(self) -> int:
        """The time in ns; whole, as every delay is."""
        return int(self._now)

    def after(self, delay_ns: int, rank: int) -> simpy.Event:
        """An event ``delay_ns`` from now."""
        event = simpy.Event(self)
        self.fire(event, rank, delay_ns)
        return event

    def fire(self, event: simpy.Event, rank: int, delay_ns: int = 0) -> None:
        """Let an event without a time happen."""
        # SimPy's own ``succeed`` and ``timeout`` know two priorities only; the order within a
        # nanosecond needs seven, and the queue sorts by any integer.
        if self._now + delay_ns >= NEVER:
            raise UsageError(TOO_LONG)
        event._ok = True
        event._value = None
        self.schedule(event, rank, delay_ns)  # type: ignore[arg-type]
