"""Host workers: experts that run on the host, and a policy's background jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import simpy

from moesim.costs import Costs
from moesim.engine.clock import COMPUTE_DONE, WORKER_DONE, Clock, Process
from moesim.types import Job


class Host:
    """Workers that serve experts before jobs, each in order of submission."""

    def __init__(
        self,
        clock: Clock,
        costs: Costs,
        workers: int,
        expert_done: Callable[[int], None],
        job_done: Callable[[Job], None],
    ) -> None:
        self.clock = clock
        self.jobs_waiting = 0
        self.spans: list[tuple[str, int, int, int]] | None = None
        self._costs = costs
        self._expert_done = expert_done
        self._job_done = job_done
        self._experts: deque[tuple[int, int]] = deque()
        self._jobs: deque[Job] = deque()
        self._asleep: deque[simpy.Event] = deque()
        for _ in range(workers):
            clock.process(self._work())

    def compute(self, key: int, duration_ns: int) -> None:
        """Run an expert on the host."""
        self._experts.append((key, duration_ns))
        self._wake()

    def submit(self, job: Job) -> None:
        """Run a policy's job."""
        self.jobs_waiting += 1
        self._jobs.append(job)
        self._wake()

    def _wake(self) -> None:
        if self._asleep:
            self.clock.fire(self._asleep.popleft(), WORKER_DONE)

    def _work(self) -> Process:
        while True:
            if self._experts:
                key, duration = self._experts.popleft()
                start = self.clock.now
                yield self.clock.after(duration, COMPUTE_DONE)
                self._span("cpu", start, key)
                self._expert_done(key)
            elif self._jobs:
                job = self._jobs.popleft()
                start = self.clock.now
                yield self.clock.after(self._costs.job_ns(job.ops, job.nbytes), WORKER_DONE)
                self._span("job", start, -1)
                self.jobs_waiting -= 1
                self._job_done(job)
            else:
                asleep = self.clock.event()
                self._asleep.append(asleep)
                yield asleep

    def _span(self, lane: str, start: int, key: int) -> None:
        if self.spans is not None:
            self.spans.append((lane, start, self.clock.now, key))
