"""Serving on lanes: what a host decides between two reports of the lanes that do the work.

A *lane* works through what it is given, one thing after the other, and reports each end: one lane
copies, one computes, others are the host's workers. ``Server`` alone tells the policy, keeps the
books and gives work out, so everything that it does is a function of the workload and of the order
of the reports. Real lanes are threads (``moesim.real``); a recorded order of reports gives the same
run again (``moesim.follow``). The rules are those of the clock in ``moesim/README.md``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moesim import log
from moesim.answers import Answers
from moesim.costs import Costs
from moesim.desk import HIT, Desk
from moesim.ledger import Ledger
from moesim.loads import Loads, Transfer, urgency
from moesim.log import LogDigest
from moesim.protocol import Policy, World, restrict
from moesim.tally import Tally
from moesim.types import ExpertId, Gate, Job, Landed, Phase, Plan
from moesim.view import View
from moesim.workload import DONE, STARVED, Item, Row, Scheduler, Step, Work, layer_events

COPY, DENSE, EXPERT, HOST, JOB = "copy", "dense", "expert", "host", "job"
_COMPUTED = ("dense", "expert", "stall")
"""Spans of the compute lane."""


class Report(NamedTuple):
    """Work that a lane has ended.

    key : the expert's key; -1 for the dense part; a job's number.
    sent : chunks of the expert that have moved by now (``COPY``).
    """

    lane: str
    key: int
    sent: int
    start_ns: int
    end_ns: int


class Lanes(Protocol):
    """Who does the work. Each request is reported once, in order within a lane."""

    def now(self) -> int:
        """Time of the run in ns; it stands still between ``rest`` and ``resume``."""

    def rest(self) -> None:
        """Stop the clock: what follows is not part of the run."""

    def resume(self) -> None:
        """Start it again."""

    def copy(self, key: int, ends: Sequence[int], sent: int) -> None:
        """Send an expert's chunks from ``sent`` on; ``ends``: their modelled ends in ns."""

    def pause(self) -> None:
        """Report the copy under way at the end of its chunk."""

    def dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        """Compute a layer's dense part; layer -1 is the output head. ``rows``: who attends."""

    def expert(self, key: int, tokens: int) -> None:
        """Compute an expert on the device, from the copy that is there."""

    def host_expert(self, key: int, tokens: int) -> None:
        """Compute an expert on the host."""

    def job(self, number: int, job: Job) -> None:
        """Do a policy's background work."""

    def next(self) -> Report:
        """Wait for the next report."""

    def computed(self) -> Sequence[tuple[int, int]] | None:
        """(begin, end) in ns of the run of what the compute lane has done since this was last
        asked, in order, by the clock of a device that works after the reports. None: the reports
        say it."""


class _Launched(NamedTuple):
    """Work given to the compute lane.

    key : the expert's; -1 for the dense part. since_ns : from when on it was waited for.
    """

    layer: int
    key: int
    hit: bool
    since_ns: int


@dataclass(frozen=True, slots=True)
class Setup:
    """One configuration: a fresh policy in its world.

    costs : times that a policy may ask for, and the chunks of a load.
    initial : experts resident at the start.
    initial_charged : whether loading them counts, in time and bytes.
    """

    policy: Policy
    world: World
    costs: Costs
    scheduler: Scheduler
    initial: Sequence[ExpertId] = ()
    initial_charged: bool = True

    def ledger(self) -> Ledger:
        """Empty books. A bank is made of equal slots, so that is what a copy takes."""
        world = self.world
        return Ledger(world.expert_bytes, world.experts, world.capacity_bytes, allocator="slots")


class _Channel(Loads):
    """The loads of a server: one at a time on the copy lane."""

    def __init__(
        self, lanes: Lanes, setup: Setup, answers: Answers, ledger: Ledger, tally: Tally,
        arrived: Callable[[Transfer], None],
    ) -> None:  # fmt: skip
        staging = setup.world.top_k
        super().__init__(
            lanes.now, ledger, answers, setup.costs, tally, staging, arrived, lambda: None
        )
        self._lanes = lanes
        self._closed = False

    def wake(self) -> None:
        """Send what comes next, or interrupt what is less urgent."""
        if self._in_service is not None:
            if self._outranked(self._in_service):
                self._lanes.pause()
        elif not self._closed and (transfer := self._next()) is not None:
            self._in_service = transfer
            self._lanes.copy(transfer.key, transfer.ends, transfer.sent)

    def reported(self, report: Report) -> None:
        """The copy lane has stopped, at the end of the copy or of a chunk."""
        transfer, self._in_service = self._in_service, None
        assert transfer is not None and transfer.key == report.key
        self._sent(transfer, report.sent, report.start_ns, report.end_ns)
        self.wake()

    def close(self) -> None:
        """Send nothing more, and let what moves stop at the end of its chunk."""
        self._closed = True
        if self._in_service is not None:
            self._lanes.pause()

    @property
    def sending(self) -> bool:
        """Whether something moves."""
        return self._in_service is not None

    def _outranked(self, sending: Transfer) -> bool:
        """Whether something would go before it, were its chunk at an end: never before the head
        of the demand."""
        if self._demand:
            return self._demand[0] is not sending
        if sending.cancelled:
            return True
        return any(urgency(t) < urgency(sending) for t in self._prefetch.values())


class Server(Desk):
    """One configuration on one device.

    Use: ``offer`` requests and call ``advance`` until it returns False (starved) or True (done);
    ``close`` when no request follows. Then read ``tally``.

    Parameters
    ----------
    heard : called with each report before it takes effect.
    deeds : takes the log of what was done; a subclass of ``LogDigest`` may keep it.
    """

    def __init__(
        self,
        setup: Setup,
        lanes: Lanes,
        ledger: Ledger | None = None,
        *,
        heard: Callable[[Report], None] = lambda report: None,
        deeds: LogDigest | None = None,
        timeline: bool = False,
    ) -> None:
        super().__init__()
        self.setup = setup
        self.world = setup.world
        self.lanes = lanes
        self.ledger = setup.ledger() if ledger is None else ledger
        self.tally = Tally(layer_stall_ns=[0] * self.world.layers)
        self.view = View(self.ledger)
        self.answers = Answers(setup.policy, self.world, self.view, self.ledger.bytes_of)
        self.tally.quality = self.answers.quality
        self.loads: _Channel = _Channel(
            lanes, setup, self.answers, self.ledger, self.tally, self._on_arrival
        )
        self.loads.log = LogDigest() if deeds is None else deeds
        self.spans: list[tuple[str, int, int, int]] | None = [] if timeline else None
        self.loads.spans = self.spans
        self._heard = heard
        self._jobs: dict[int, Job] = {}
        self._submitted = 0
        self._tokens: dict[int, int] = {}
        """Of the experts that the newest layer event demands."""
        self._hits: set[int] = set()
        self._layer = 0
        self._dense: Report | None = None
        self._launched: deque[_Launched] = deque()
        """What the compute lane was given, and has not accounted for."""
        self._since = 0
        """When the newest layer event began to wait for its experts."""
        self._left = 0
        """Experts of the layer event that the device has not computed."""
        self._on_host = 0
        self._at = 0
        """Until when the run's time is accounted for."""
        self._begun = False
        self.view.count_jobs = lambda: len(self._jobs)
        self.view.count_queued = lambda: self.loads.waiting
        self.policy.begin(restrict(self.world, self.policy.needs))

    # ---- feeding ---------------------------------------------------------------------------------

    def offer(self, work: Work) -> None:
        """The next request of the trace."""
        self.setup.scheduler.offer(work)

    def close(self) -> None:
        """No request follows."""
        self.setup.scheduler.close()

    def advance(self) -> bool:
        """Run until the run is done (True) or the next request is needed (False)."""
        if not self._begun:
            self._begun = True
            self._fill()
        self.lanes.resume()
        while isinstance(step := self.setup.scheduler.next_step(self.now()), Step):
            self._step(step)
        self._spend("plan", self.now())
        if step == STARVED:
            self.lanes.rest()
            return False
        assert step == DONE, "requests have no arrival times here"
        self._finish()
        return True

    def _finish(self) -> None:
        self.loads.close()
        self._wait(lambda: not self.loads.sending)
        self.lanes.rest()
        self.loads.finish()
        self.tally.requests = list(self.times.values())
        self.ledger.audit()
        broken = self.tally.broken_laws(self._at)
        if broken:
            raise AssertionError(f"the run broke {', '.join(broken)}: {self.tally}")

    def _fill(self) -> None:
        """Make the initial state resident, one load after the other, before the first request."""
        if self.setup.initial_charged:
            self.lanes.resume()
        for order, expert in enumerate(self.setup.initial):
            nbytes = self.ledger.copy_bytes[expert]
            self.ledger.queue(expert)
            self.ledger.reserve(expert)
            self.lanes.copy(expert, self.setup.costs.chunk_ends(nbytes), 0)
            report = self._next_report()
            self.ledger.land(expert)
            if self.setup.initial_charged:
                self._spend("initial", self.now())
                self.tally.link_busy_ns += report.end_ns - report.start_ns
            self.tally.initial_loads += 1
            self.tally.initial_bytes += nbytes
            self.policy.note(Landed(expert, 0, -1, order, False))

    # ---- a step ----------------------------------------------------------------------------------

    def _step(self, step: Step) -> None:
        self.begin_step(step)
        stall, misses = self.tally.times.stall, self.misses()
        before, drawn = self._compute_times(), len(self.spans or ())
        self._forward(step)
        self._settle(before, drawn)
        for part in step.parts:
            times = self.times[part.work.index]
            times.stall_ns += self.tally.times.stall - stall
            times.misses += self.misses() - misses
        self.end_step(step)

    def _forward(self, step: Step) -> None:
        """Every layer event, and the output head."""
        for item in layer_events(step, self.tally.events, self.world.experts):
            self._layer_event(item)
        head_tokens = sum(part.ends for part in step.parts)
        if head_tokens:
            self._compute_dense(-1, head_tokens, ())

    def _layer_event(self, item: Item) -> None:
        self._layer = item.event.layer
        self._compute_dense(self._layer, item.dense_tokens, item.rows)
        gate, plan = self.gate(item)
        self._serve(gate, plan)

    def _serve(self, gate: Gate, plan: Plan) -> None:
        """Load what a gate misses, and compute."""
        waiting = self.demand(gate, plan)
        self.apply(plan, Phase(gate.source.slots[0].phase))
        self.loads.wake()
        self._spend("plan", self.now())
        self._compute(gate, len(waiting))
        self.loads.log.add(log.END, self.now(), gate.event)

    def _compute_dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        self._spend("plan", self.now())
        self._dense = None
        self._launched.append(_Launched(layer, -1, True, 0))
        self.lanes.dense(layer, tokens, rows)
        self._wait(lambda: self._dense is not None)
        report = self._dense
        assert report is not None
        self._spend("sync", report.start_ns)
        self._spend("dense", report.end_ns)
        self._spend("sync", self.now())
        self._span("dense", report, -1)

    def _compute(self, gate: Gate, waiting: int) -> None:
        """Residents in demand order, then arrivals as they land; then wait for the host."""
        self._tokens = dict(zip(self.keys.tolist(), gate.tokens.tolist(), strict=True))
        hits = self.keys[gate.status == HIT].tolist()
        self._hits = set(hits)
        self._left = len(hits) + waiting
        self._since = self._at
        on_host = self._on_host
        for key in hits:
            self._launch(key)
        self._wait(lambda: not self._left and not self._on_host)
        self._spend("cpu_wait" if on_host else "sync", self.now())

    def _on_arrival(self, transfer: Transfer) -> None:
        self._launch(transfer.key)

    def _launch(self, key: int) -> None:
        self._launched.append(_Launched(self._layer, key, key in self._hits, self._since))
        self.lanes.expert(key, self._tokens[key])

    # ---- for the desk ----------------------------------------------------------------------------

    def now(self) -> int:
        """The time of the run."""
        return self.lanes.now()

    def run_on_host(self, key: int, tokens: int, layer: int) -> None:
        """Give it to the host's workers."""
        self._on_host += 1
        self.lanes.host_expert(key, tokens)

    def submit(self, job: Job) -> None:
        """Give it to the host's workers."""
        self._jobs[self._submitted] = job
        self.lanes.job(self._submitted, job)
        self._submitted += 1

    # ---- reports ---------------------------------------------------------------------------------

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            self._take(self._next_report())

    def _next_report(self) -> Report:
        report = self.lanes.next()
        self._heard(report)
        return report

    def _take(self, report: Report) -> None:
        if report.lane == COPY:
            self.loads.reported(report)
        elif report.lane == EXPERT:
            self._computed(report)
        elif report.lane == DENSE:
            self._dense = report
        elif report.lane == HOST:
            self._on_host -= 1
            self._span("cpu", report, report.key)
            self.ledger.pinned.discard(report.key)
            self.loads.wake()
        else:
            self._span("job", report, -1)
            self.job_done(self._jobs.pop(report.key))

    def _computed(self, report: Report) -> None:
        waited = report.start_ns - self._at
        if report.key in self._hits:
            self._spend("sync", report.start_ns)
        elif waited > 0:
            self.tally.layer_stall_ns[self._layer] += waited
            self._span("stall", report._replace(start_ns=self._at, end_ns=report.start_ns), -1)
            self._spend("stall", report.start_ns)
        self._spend("experts", report.end_ns)
        self._span("expert", report, report.key)
        self._left -= 1
        self.loads.release(report.key)

    # ---- a device's own clock --------------------------------------------------------------------

    def _compute_times(self) -> tuple[dict[str, int], list[int]]:
        """What the compute lane's time went to so far, and stall by layer."""
        times = self.tally.times
        spent = {name: getattr(times, name) for name in ("dense", "experts", "stall", "sync")}
        return spent, list(self.tally.layer_stall_ns)

    def _settle(self, before: tuple[dict[str, int], list[int]], drawn: int) -> None:
        """Account for a step anew by the device's clock, where it has one; the sum stays.

        What the device neither computed in nor waited for an expert in is ``sync``: launches, and
        threads that hand work over. before : the times when the step began. drawn : spans then.
        """
        computed = self.lanes.computed()
        if computed is None:
            self._launched.clear()
            return
        now, _ = self._compute_times()
        spent, self.tally.layer_stall_ns[:] = before
        for name, ns in spent.items():
            setattr(self.tally.times, name, ns)
        self.tally.times.sync += sum(now.values()) - sum(spent.values())
        if self.spans is not None:
            self.spans[drawn:] = [s for s in self.spans[drawn:] if s[0] not in _COMPUTED]
        ended = 0
        for begin, end in computed:
            self._account(self._launched.popleft(), ended, begin, end, spent["sync"])
            ended = end

    def _account(
        self, work: _Launched, ended_ns: int, begin_ns: int, end_ns: int, floor_ns: int
    ) -> None:
        """One piece of work, that the device began after the one before had ended."""
        waited_from = max(ended_ns, work.since_ns)
        if not work.hit and begin_ns > waited_from:
            stall = self._move("stall", begin_ns - waited_from, floor_ns)
            self.tally.layer_stall_ns[work.layer] += stall
            self._draw("stall", waited_from, begin_ns, -1)
        what, lane = ("dense", "dense") if work.key < 0 else ("experts", "expert")
        self._move(what, end_ns - begin_ns, floor_ns)
        self._draw(lane, begin_ns, end_ns, work.key)

    def _move(self, what: str, ns: int, floor_ns: int) -> int:
        """Take a time out of the step's ``sync``, as much as is there; how much that was.

        What a device does while the policy is asked or the host computes is in those times.
        """
        times = self.tally.times
        ns = max(0, min(ns, times.sync - floor_ns))
        times.sync -= ns
        setattr(times, what, getattr(times, what) + ns)
        return ns

    def _spend(self, what: str, until_ns: int) -> None:
        """Account for the compute lane's time up to a moment."""
        if until_ns > self._at:
            times = self.tally.times
            setattr(times, what, getattr(times, what) + until_ns - self._at)
            self._at = until_ns

    def _span(self, lane: str, report: Report, key: int) -> None:
        self._draw(lane, report.start_ns, report.end_ns, key)

    def _draw(self, lane: str, start_ns: int, end_ns: int, key: int) -> None:
        if self.spans is not None:
            self.spans.append((lane, start_ns, end_ns, key))
