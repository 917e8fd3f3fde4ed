"""Lanes of which one is the model's own thread: it computes, and stops at every gate.

The thread that runs the model and the one that serves it (``offload_serve``) take turns. The model
*arrives* (at a gate, at the next forward pass, at the end of a batch); the server answers with
tasks, and last with the word to go on. Copies and work on the host go on beside.

*Steady* lanes report a copy only where the server waits for one and nothing computes. What is
resident at a gate then depends on what was decided alone, never on how long anything took.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from moesim.costs import Costs
from moesim.real.device import Device
from moesim.real.errors import ExecutionError
from moesim.real.lanes import Failed, Lane, Lanes, Task
from moesim.real.offload_bank import SlotBank, Views
from moesim.real.slots import SlotLedger
from moesim.serving import DENSE, EXPERT, Report
from moesim.workload import Row

_NEVER_NS = 1 << 62
_TURN_S = 0.5
"""How often a thread that waits for its turn looks whether the other is still there."""


class AbandonedError(ExecutionError):
    """The model's thread has left: an error in the model, or Ctrl-C."""


class Computes(Protocol):
    """A layer under way."""

    def compute(self, expert: int, weights: Views) -> None:
        """Compute an expert of the layer, from its tensors."""


class OffloadLanes(Lanes):
    """The lanes of an offloaded model.

    ``layer`` : what the newest gate asked for; its experts are the tasks.
    ``steady`` : whether reports come in an order that no clock decides.
    """

    def __init__(
        self,
        bank: SlotBank,
        ledger: SlotLedger,
        costs: Costs,
        *,
        paced: bool,
        watchdog_s: float,
        workers: int,
        steady: bool = False,
    ) -> None:
        device: Device = bank
        super().__init__(device, ledger, costs, paced=paced, watchdog_s=watchdog_s, workers=workers)
        self.steady = steady
        self._held: deque[Report] = deque()
        """Reports that wait for the computing to end."""
        self.layer: Computes | None = None
        self.arrived: Any = None
        """Where the model has come to."""
        self._bank = bank
        self._door: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._began = 0
        self._asked_ns: int | None = None
        """Since when the server has been deciding; None while it waits for a lane."""

    def __enter__(self) -> OffloadLanes:
        return self

    def close(self) -> None:
        """End the threads of a run that has not begun."""
        self._end()

    def _compute_lane(self) -> Lane:
        return Lane("model", self.clock, self._reports, queue.SimpleQueue(), threads=0)

    # ---- the server's side -----------------------------------------------------------------------

    def dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        """Let the model go on, until it arrives somewhere."""
        self._computing.give(Task(DENSE, -1, "the model between two gates", lambda: None))

    def expert(self, key: int, tokens: int) -> None:
        """Let the model compute an expert, from the copy that is there."""
        bank, slot = self._bank, self._ledger.slot_of[key]
        layer, expert = self.layer, self._ledger.expert(key) % self._ledger.experts
        assert layer is not None

        def compute() -> None:
            layer.compute(expert, bank.views(key, slot))
            bank.used(key, slot)

        self._give(self._computing, EXPERT, key, "computing", compute)

    def pause(self) -> None:
        """Report the copy under way at the end of its chunk; steady, at its own end."""
        if not self.steady:
            super().pause()

    def next(self) -> Report:
        """Wait for the next report."""
        self._asked_ns = None
        try:
            return self._next_steady() if self.steady else super().next()
        finally:
            self._asked_ns = time.perf_counter_ns()

    def answer_door(self) -> Any:
        """Wait for the first forward pass of a batch; None: none will come."""
        self._asked_ns = None
        knocked = self._door.get()
        self._asked_ns = time.perf_counter_ns()
        if isinstance(knocked, BaseException):
            raise knocked
        return knocked

    def released(self) -> None:
        """Let the model go on at the end of a batch; nothing is waited for."""
        self._computing.give(Task(DENSE, -1, "the end of a batch", lambda: None))
        self._computing.given -= 1

    def fail(self, error: BaseException) -> None:
        """Tell the model's thread that the run is over."""
        self._failure = error
        self._computing.stop()
        self._wake()

    # ---- the model's side ------------------------------------------------------------------------

    def knock(self, begun: Any) -> None:
        """The first forward pass of a batch begins, or (None) none will."""
        self._door.put(begun)

    def arrive(self, where: Any) -> None:
        """The model has come to a gate, to the next pass, or to the end of its batch."""
        self.arrived = where
        self._computing.beat()
        self._reports.put(Report(DENSE, -1, 0, self._began, self.clock.now()))

    def work(self) -> None:
        """Do what the server asks for, until it lets the model go on.

        Raises
        ------
        MoesimError
            What ended the run.
        """
        tasks = self._computing
        while True:
            task = self._turn()
            if task is None:
                raise self._failure or AbandonedError("the run has ended; generate again")
            if task.report == DENSE:
                tasks.beat()
                self._began = self.clock.now()
                return
            tasks.do(task)

    def abandon(self) -> None:
        """The model will not come back."""
        error = AbandonedError("the model's thread has left")
        self._reports.put(Failed("model", "computing", error))
        self._door.put(error)

    # ---- inside ----------------------------------------------------------------------------------

    def _next_steady(self) -> Report:
        """What the model's thread has ended; the others' reports once it has nothing to do."""
        while self._computing.given:
            report = super().next()
            if report.lane in (DENSE, EXPERT):
                return report
            self._held.append(report)
        return self._held.popleft() if self._held else super().next()

    def _turn(self) -> Task | None:
        """The next task; a policy that does not answer is found out."""
        while True:
            if self._failure is not None:
                return None
            try:
                return self._computing.take(_TURN_S)
            except queue.Empty:
                self._check_policy()

    def _check_policy(self) -> None:
        asked = self._asked_ns
        silent = 0 if asked is None else time.perf_counter_ns() - asked
        if silent > self._watchdog_ns:
            raise ExecutionError(
                f"the policy has not answered for {silent / 1e9:.1f} s; see what holds it, or "
                "raise watchdog_s"
            )

    def _wake(self) -> None:
        self._computing.give(Task(EXPERT, -1, "ending", lambda: None))

    def _modelled_ns(self, lane: Lane) -> int:
        # The model's thread runs what its user wrote: nobody knows how long that takes.
        return _NEVER_NS if lane is self._computing else super()._modelled_ns(lane)
