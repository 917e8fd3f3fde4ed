"""The time of a real run, and waiting for a moment of it."""

from __future__ import annotations

import threading
import time

SPIN_NS = 200_000
"""A sleep overshoots by less than this; the rest of a wait gives way in short turns."""


class RunClock:
    """Nanoseconds of the run; they stand still between ``rest`` and ``resume``.

    Every thread may ask; one alone rests and resumes.
    """

    def __init__(self) -> None:
        self._rested_at: int | None = time.perf_counter_ns()
        self._offset = self._rested_at

    def now(self) -> int:
        """Time of the run so far."""
        rested = self._rested_at
        return (time.perf_counter_ns() if rested is None else rested) - self._offset

    def at(self, moment_ns: int) -> int:
        """Time of the run at a moment of ``time.perf_counter_ns`` since it was last resumed."""
        return moment_ns - self._offset

    def rest(self) -> None:
        """What follows is not part of the run."""
        if self._rested_at is None:
            self._rested_at = time.perf_counter_ns()

    def resume(self) -> None:
        """It goes on."""
        if self._rested_at is not None:
            self._offset += time.perf_counter_ns() - self._rested_at
            self._rested_at = None


def wait_until(moment_ns: int, stopped: threading.Event) -> None:
    """Wait until ``time.perf_counter_ns`` has reached a moment, or ``stopped`` is set.

    A thread that sleeps to the end wakes late; so the last part yields the processor instead.
    """
    while (left := moment_ns - time.perf_counter_ns()) > 0 and not stopped.is_set():
        if left > SPIN_NS:
            stopped.wait((left - SPIN_NS) / 1e9)
        else:
            time.sleep(0)
