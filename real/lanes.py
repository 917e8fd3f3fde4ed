"""Threads that work for a ``Server``: one copies, one computes, others are the host's workers.

The server's thread gives work out and waits for reports; it alone touches the ledger and the
policy. A thread that dies reports its error instead; one that is silent for too long is found out
by the server's thread, which waits no longer than it may.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from moesim.costs import Costs
from moesim.real.clock import RunClock, wait_until
from moesim.real.device import Arrival, Device
from moesim.real.errors import ExecutionError
from moesim.real.slots import SlotLedger
from moesim.serving import COPY, DENSE, EXPERT, HOST, JOB, Report
from moesim.types import Job
from moesim.workload import Row

_JOIN_S = 1.0
"""How long a thread may take to stop; one that hangs is left behind, and ends with the process."""


class Failed(NamedTuple):
    """A thread has died."""

    lane: str
    what: str
    error: BaseException


class Task(NamedTuple):
    """Work for a thread: ``run`` returns the chunks that have moved, if any move."""

    report: str
    key: int
    what: str
    run: Callable[[], int | None]


_Ranked = tuple[int, int, Task | None]
_Tasks = queue.SimpleQueue[_Ranked] | queue.PriorityQueue[_Ranked]
"""Tasks with their rank (jobs come after experts) and number."""


class Lane:
    """Threads that take tasks from one queue.

    ``beat_ns`` : when one of them last began, ended or came forward.
    """

    def __init__(
        self,
        name: str,
        clock: RunClock,
        reports: queue.SimpleQueue[Report | Failed],
        tasks: _Tasks,
        threads: int = 1,
    ) -> None:
        self.name = name
        self.beat_ns = time.perf_counter_ns()
        self.given = 0
        """Tasks that have not been reported."""
        self.stopped = threading.Event()
        self._clock = clock
        self._reports = reports
        self._what = "starting"
        self._tasks = tasks
        self._number = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"moesim {name} {i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def give(self, task: Task) -> None:
        """Queue a task."""
        if not self.given:
            self.beat_ns = time.perf_counter_ns()
        self.given += 1
        self._put(task.report == JOB, task)

    def take(self, timeout_s: float) -> Task | None:
        """The next task, for a thread that is not the lane's own; None: the lane has stopped.

        Raises
        ------
        queue.Empty
            If there is none by then.
        """
        task = self._tasks.get(timeout=timeout_s)[2]
        return None if self.stopped.is_set() else task

    def beat(self) -> None:
        """The work under way comes forward."""
        self.beat_ns = time.perf_counter_ns()

    def stop(self) -> None:
        """Take up nothing more."""
        self.stopped.set()
        for _ in self._threads:
            self._put(-1, None)

    def join(self) -> None:
        """Wait for the threads to end, for a while."""
        for thread in self._threads:
            thread.join(_JOIN_S)

    def doing(self) -> str:
        """What was begun last."""
        return self._what

    def _put(self, rank: int, task: Task | None) -> None:
        self._number += 1
        self._tasks.put((rank, self._number, task))

    def _work(self) -> None:
        try:
            while (task := self._tasks.get()[2]) is not None and not self.stopped.is_set():
                self.do(task)
        except BaseException as error:
            self._reports.put(Failed(self.name, self._what, error))

    def do(self, task: Task) -> None:
        """Work on a task, and report it."""
        self._what = task.what
        self.beat()
        start = self._clock.now()
        sent = task.run() or 0
        self.beat()
        self._reports.put(Report(task.report, task.key, sent, start, self._clock.now()))


class Lanes:
    """The lanes of one device (``moesim.serving.Lanes``). A context manager: it ends its threads.

    paced : a copy takes at least as long as the cost model says, chunk by chunk.
    watchdog_s : how long a lane may be silent with work under way, beside the modelled time of
        what it does.
    """

    def __init__(
        self,
        device: Device,
        ledger: SlotLedger,
        costs: Costs,
        *,
        paced: bool = False,
        watchdog_s: float = 120.0,
        workers: int = 1,
    ) -> None:
        self.clock = RunClock()
        self._device = device
        self._ledger = ledger
        self._costs = costs
        self._paced = paced
        self._watchdog_ns = int(watchdog_s * 1e9)
        self._reports: queue.SimpleQueue[Report | Failed] = queue.SimpleQueue()
        self._chunk = costs.hardware.link.chunk_bytes
        self._handover_ns = costs.hardware.link.handover_ns
        self._paused = threading.Event()
        self._before: Arrival | None = None
        """The copy under way when the newest was given; the copy lane's own."""
        self._longest_ns = 0
        self._copying = Lane("copy", self.clock, self._reports, queue.SimpleQueue())
        self._computing = self._compute_lane()
        tasks: _Tasks = queue.PriorityQueue()
        self._working = Lane("host", self.clock, self._reports, tasks, workers)
        self._lanes = (self._copying, self._computing, self._working)

    def __enter__(self) -> Self:
        start = self._device.start_computing
        self._computing.give(Task(DENSE, -1, "starting", start))
        try:
            self.next()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        for lane in self._lanes:
            lane.stop()
        for lane in self._lanes:
            lane.join()

    # ---- what a server asks ----------------------------------------------------------------------

    def now(self) -> int:
        """Time of the run in ns."""
        return self.clock.now()

    def rest(self) -> None:
        """Stop the clock."""
        self.clock.rest()

    def resume(self) -> None:
        """Start it again."""
        self.clock.resume()

    def copy(self, key: int, ends: Sequence[int], sent: int) -> None:
        """Send an expert's chunks from ``sent`` on."""
        self._paused.clear()
        slot = self._ledger.slot_of[key]
        self._give(self._copying, COPY, key, "loading", lambda: self._send(key, slot, ends, sent))

    def pause(self) -> None:
        """Report the copy under way at the end of its chunk."""
        self._paused.set()

    def dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        """Compute a layer's dense part; layer -1 is the output head."""
        what = "computing the output head" if layer < 0 else f"the dense part of layer {layer}"
        device = self._device
        self._computing.give(Task(DENSE, -1, what, lambda: device.dense(layer, tokens, rows)))

    def expert(self, key: int, tokens: int) -> None:
        """Compute an expert on the device, from the copy that is there."""
        device, slot = self._device, self._ledger.slot_of[key]
        self._give(
            self._computing, EXPERT, key, "computing",
            lambda: device.expert(key, slot, tokens),
        )  # fmt: skip

    def host_expert(self, key: int, tokens: int) -> None:
        """Compute an expert on the host."""
        device = self._device
        self._give(self._working, HOST, key, "computing", lambda: device.host_expert(key, tokens))

    def job(self, number: int, job: Job) -> None:
        """Let the modelled time of a policy's work pass: it is declared, not done."""
        length_ns = self._costs.job_ns(job.ops, job.nbytes)

        def wait() -> None:
            wait_until(time.perf_counter_ns() + length_ns, self._working.stopped)

        self._longest_ns = max(self._longest_ns, length_ns)
        self._working.give(Task(JOB, number, f"job {number}", wait))

    def computed(self) -> Sequence[tuple[int, int]] | None:
        """By the device's own clock, where it has one: (begin, end) in ns of the run."""
        found = self._device.computed()
        at = self.clock.at
        return None if found is None else [(at(begin), at(end)) for begin, end in found]

    def next(self) -> Report:
        """Wait for the next report.

        Raises
        ------
        ExecutionError
            If a lane has died or hangs.
        """
        if not any(lane.given for lane in self._lanes):
            raise AssertionError("the server waits, and no lane has work")
        while True:
            try:
                report = self._reports.get(timeout=self._patience_s())
            except queue.Empty:
                continue
            if isinstance(report, Failed):
                raise _death(report) from report.error
            self._lane_of(report.lane).given -= 1
            return report

    # ---- inside ----------------------------------------------------------------------------------

    def _give(
        self, lane: Lane, report: str, key: int, doing: str, run: Callable[[], int | None]
    ) -> None:
        experts = self._ledger.experts
        expert = self._ledger.expert(key)
        what = f"{doing} expert {expert // experts}.{expert % experts}"
        lane.give(Task(report, key, what, run))

    def _compute_lane(self) -> Lane:
        """The lane that computes."""
        return Lane("compute", self.clock, self._reports, queue.SimpleQueue())

    def _lane_of(self, report: str) -> Lane:
        if report == COPY:
            return self._copying
        return self._working if report in (HOST, JOB) else self._computing

    def _send(self, key: int, slot: int, ends: Sequence[int], sent: int) -> int:
        """The copy lane's work: chunks, until the last, a pause, or the end of the run.

        A device that copies by itself is given a chunk while the one before moves, of whatever
        expert that is: two are under way at most. The last one is left on its way: what computes
        from the slot waits for it there.
        """
        nbytes = self._ledger.copy_bytes[key]
        # The modelled hand-over is what really passes between two copies: it is not waited for.
        ends = [end - self._handover_ns for end in ends]
        chunk = self._chunk or nbytes
        began = time.perf_counter_ns() - (ends[sent - 1] if sent else 0)
        while sent < len(ends):
            coming = self._device.copy(key, slot, sent * chunk, min(nbytes, (sent + 1) * chunk))
            if self._paced:
                _arrive(coming)
                wait_until(began + ends[sent], self._copying.stopped)
            else:
                _arrive(self._before)
                self._before = coming
            sent += 1
            self._copying.beat()
            if self._paused.is_set() or self._copying.stopped.is_set():
                break
        return sent

    def _patience_s(self) -> float:
        """How long to wait for a report; ExecutionError if a lane has been silent for too long."""
        now = time.perf_counter_ns()
        left = self._watchdog_ns
        for lane in self._lanes:
            if lane.given:
                silent = now - lane.beat_ns
                left = min(left, self._watchdog_ns + self._modelled_ns(lane) - silent)
                if left <= 0:
                    raise ExecutionError(
                        f"the {lane.name} thread has not come forward for {silent / 1e9:.1f} s "
                        f"while {lane.doing()}; see what holds it, or raise --watchdog"
                    )
        return left / 1e9

    def _modelled_ns(self, lane: Lane) -> int:
        """The longest time that a lane may rightly wait, within one task, for its clock."""
        if lane is self._copying and self._paced:
            return max(self._costs.load_ns(n) for n in set(self._ledger.copy_bytes))
        return self._longest_ns if lane is self._working else 0


def _arrive(copy: Arrival | None) -> None:
    if copy is not None:
        copy.synchronize()


def _death(failed: Failed) -> ExecutionError:
    if isinstance(failed.error, ExecutionError):
        return failed.error
    # CUDA's errors go on for paragraphs.
    kind, said = type(failed.error).__name__, str(failed.error).partition("\n")[0]
    return ExecutionError(f"the {failed.lane} thread died while {failed.what}: {kind}: {said}")
