"""The order of events at one nanosecond, and a SimPy environment that keeps it."""

from __future__ import annotations

from collections.abc import Generator
from enum import IntEnum
from typing import Any, TypeAlias

import simpy


class Rank(IntEnum):
    """What happens first when several things happen at the same nanosecond (design rule 2)."""

    LOAD_DONE = 0
    COMPUTE_DONE = 1
    WORKER_DONE = 2
    ARRIVAL = 3
    STEP_BEGIN = 4
    GATE = 5
    LINK_GRANT = 6


# Plain integers: an enumeration's members are slow to name where every event does it.
LOAD_DONE, COMPUTE_DONE, WORKER_DONE, ARRIVAL, STEP_BEGIN, GATE, LINK_GRANT = map(int, Rank)

Process: TypeAlias = Generator[simpy.Event, Any, None]


class Clock:
    """Integer nanoseconds; events at one nanosecond run by ``Rank``, then in order of creation."""

    def __init__(self) -> None:
        self._env = simpy.Environment(initial_time=0)

    @property
    def now(self) -> int:
        """The time in ns."""
        return int(self._env.now)

    def start(self, process: Process) -> None:
        """Run a process beside the others."""
        self._env.process(process)

    def after(self, delay_ns: int, rank: int) -> simpy.Event:
        """An event ``delay_ns`` from now."""
        event = simpy.Event(self._env)
        self.fire(event, rank, delay_ns)
        return event

    def signal(self) -> simpy.Event:
        """An event without a time; ``fire`` gives it one."""
        return simpy.Event(self._env)

    def fire(self, event: simpy.Event, rank: int, delay_ns: int = 0) -> None:
        """Let a signal happen."""
        # SimPy's own ``succeed`` and ``timeout`` know two priorities only; the order within a
        # nanosecond needs seven, and the queue sorts by any integer.
        event._ok = True
        event._value = None
        self._env.schedule(event, rank, delay_ns)  # type: ignore[arg-type]

    def step(self) -> None:
        """Let the next event happen."""
        self._env.step()
