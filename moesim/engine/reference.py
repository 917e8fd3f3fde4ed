"""The reference engine: the clock of ``moesim/README.md`` in SimPy, written to be read.

One serial compute lane, one link, host workers. The compute lane is the process below; the link is
``moesim.engine.link``, the workers ``moesim.engine.host``.

The engine is *fed*: it runs until its scheduler must see the next request, so that one pass over a
trace serves many configurations, and no trace need fit in memory.
"""

from __future__ import annotations

from collections import deque

import simpy

from moesim import log
from moesim.answers import Answers
from moesim.desk import HIT, Desk
from moesim.engine.clock import (
    ARRIVAL,
    COMPUTE_DONE,
    GATE,
    LOAD_DONE,
    STEP_BEGIN,
    Clock,
    Process,
)
from moesim.engine.host import Host
from moesim.engine.link import Link, Transfer
from moesim.engine.setup import Setup
from moesim.ledger import Ledger
from moesim.protocol import restrict
from moesim.tally import Tally
from moesim.types import Gate, Job, Landed, Phase
from moesim.view import View
from moesim.workload import (
    DONE,
    STARVED,
    Idle,
    Item,
    Step,
    Work,
    context_tokens,
    flat_events,
    layer_events,
)


class ReferenceEngine(Desk):
    """One configuration on one device.

    Use: ``offer`` requests and call ``advance`` until it returns False (starved) or True (done);
    ``close`` when no request follows. Then read ``tally``.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        world, options = setup.world, setup.options
        self.setup = setup
        self.world = world
        self.tally = Tally(layer_stall_ns=[0] * world.layers)
        self.clock = Clock()
        self.ledger = Ledger(
            world.expert_bytes, world.experts, world.capacity_bytes, allocator=options.allocator
        )
        self.view = View(self.ledger)
        self.answers = Answers(setup.policy, world, self.view, self.ledger.bytes_of)
        self.tally.quality = self.answers.quality
        self.link = Link(
            self.clock,
            self.ledger,
            self.answers,
            setup.costs,
            self.tally,
            staging=world.top_k,
            arrived=self._on_arrival,
            blocked=self._on_blocked,
            write_back=options.write_back,
        )
        self.loads = self.link
        workers = setup.costs.hardware.host.workers
        self.host = Host(self.clock, setup.costs, workers, self._on_cpu_done, self.job_done)
        self.view.count_jobs = lambda: self.host.jobs_waiting
        self.view.count_queued = lambda: self.link.waiting
        self.spans: list[tuple[str, int, int, int]] | None = [] if options.timeline else None
        self.link.spans = self.host.spans = self.spans
        self._arrivals: deque[Transfer] = deque()
        self._cpu_running = 0
        self._link_blocked = False
        self._waiting: simpy.Event | None = None
        self._starved: simpy.Event | None = None
        self._done = False
        self._expert_ns: dict[tuple[int, int, int], int] = {}
        self.policy.begin(restrict(world, self.policy.needs))
        self.clock.process(self._serve())
        self.clock.process(self.link.run())

    # ---- feeding ---------------------------------------------------------------------------------

    def offer(self, work: Work) -> None:
        """The next request of the trace."""
        self.setup.scheduler.offer(work)
        self._feed()

    def close(self) -> None:
        """No request follows."""
        self.setup.scheduler.close()
        self._feed()

    def _feed(self) -> None:
        if self._starved is not None:
            starved, self._starved = self._starved, None
            # Before everything else at this nanosecond: being fed takes no part in the order.
            self.clock.fire(starved, LOAD_DONE)

    def advance(self) -> bool:
        """Run until the run is done (True) or the next request is needed (False)."""
        while not self._done and self._starved is None:
            self.clock.step()
        return self._done

    # ---- serving ---------------------------------------------------------------------------------

    def _serve(self) -> Process:
        yield from self._fill()
        scheduler, times = self.setup.scheduler, self.tally.times
        while True:
            step = scheduler.next_step(self.clock.now)
            if isinstance(step, Step):
                yield self.clock.after(0, STEP_BEGIN)
                yield from self._step(step)
            elif isinstance(step, Idle):
                times.idle += step.until_ns - self.clock.now
                yield self.clock.after(step.until_ns - self.clock.now, ARRIVAL)
            elif step == STARVED:
                self._starved = self.clock.event()
                yield self._starved
            elif step == DONE:
                break
        self._finish()

    def _finish(self) -> None:
        self.link.finish()
        self.tally.requests = list(self.times.values())
        self._done = True
        if self.setup.options.check:
            self._audit()

    def _fill(self) -> Process:
        """Make the initial state resident, one load after the other, before the first request."""
        for order, expert in enumerate(self.setup.initial):
            nbytes = self.ledger.copy_bytes[expert]
            if self.setup.initial_charged:
                duration = self.setup.costs.load_ns(nbytes)
                yield self.clock.after(duration, LOAD_DONE)
                self.tally.times.initial += duration
                self.tally.link_busy_ns += duration
            self.ledger.queue(expert)
            self.ledger.reserve(expert)
            self.ledger.land(expert)
            self.tally.initial_loads += 1
            self.tally.initial_bytes += nbytes
            self.policy.note(Landed(expert, 0, -1, order, False))

    def _step(self, step: Step) -> Process:
        self.begin_step(step)
        stall, misses = self.tally.times.stall, self.misses()
        if self.setup.options.share_kv:
            self._make_room_for_kv(step)
        cut = flat_events if self.setup.options.flat else layer_events
        for item in cut(step, self.tally.events, self.setup.world.experts):
            yield from self._layer_event(item)
        head_ns = self.setup.costs.head_ns(sum(part.ends for part in step.parts))
        yield from self._busy("dense", head_ns, -1)
        self.tally.times.dense += head_ns
        for part in step.parts:
            times = self.times[part.work.index]
            times.stall_ns += self.tally.times.stall - stall
            times.misses += self.misses() - misses
        self.end_step(step)
        if self.setup.options.check:
            self.ledger.audit()

    def _make_room_for_kv(self, step: Step) -> None:
        """Capacity is what the KV cache leaves; shared between layers in equal parts."""
        context = context_tokens(step)
        taken = context * self.setup.kv_bytes_per_token
        whole = self.setup.world.capacity_bytes
        left = [max(0, c - taken // len(whole)) for c in whole]
        self.setup.refuse_crowded(context, left)
        self.link.shrink(left)
        # A request that ended may have given bytes back.
        self.link.wake()

    # ---- a layer event ---------------------------------------------------------------------------

    def _layer_event(self, item: Item) -> Process:
        costs, times, layer = self.setup.costs, self.tally.times, item.event.layer
        if item.dense_tokens:
            dense_ns = costs.dense_ns(item.dense_tokens, item.context, layer)
            yield from self._busy("dense", dense_ns, -1)
            times.dense += dense_ns
            times.sync += costs.sync_ns
        yield self.clock.after(costs.sync_ns if item.dense_tokens else 0, GATE)
        gate, plan = self.gate(item)
        # What was held for this event, or is useless from now on, may make way at once.
        self.link.wake()
        plan_ns = (costs.plan_ns if item.dense_tokens else 0) + costs.job_ns(plan.foreground_ops, 0)
        if plan_ns:
            yield self.clock.after(plan_ns, GATE)
            times.plan += plan_ns
        waiting = self.demand(gate, plan)
        self.apply(plan, Phase(gate.source.slots[0].phase))
        self.link.wake()
        yield from self._compute(gate, waiting)
        self.link.log.add(log.END, self.clock.now, gate.event)

    # ---- compute ---------------------------------------------------------------------------------

    def _compute(self, gate: Gate, waiting: int) -> Process:
        """Residents in demand order, then arrivals as they land, then wait for the host."""
        tokens = dict(zip(self.keys.tolist(), gate.tokens.tolist(), strict=True))
        if self.setup.options.order == "barrier":
            yield from self._barrier(gate.layer, waiting)
        for key in self.keys[gate.status == HIT].tolist():
            yield from self._run_expert(key, tokens[key], gate.layer)
        for _ in range(waiting):
            while not self._arrivals:
                yield from self._stalled(gate.layer)
            transfer = self._arrivals.popleft()
            yield from self._run_expert(transfer.key, tokens[transfer.key], gate.layer)
        while self._cpu_running:
            start = self.clock.now
            yield self._wait()
            self.tally.times.cpu_wait += self.clock.now - start

    def _barrier(self, layer: int, waiting: int) -> Process:
        """Wait for every arrival; a layer event that overflows its cache must compute sooner."""
        self._link_blocked = False
        while len(self._arrivals) < waiting and not self._link_blocked:
            yield from self._stalled(layer)

    def _stalled(self, layer: int) -> Process:
        start = self.clock.now
        yield self._wait()
        stall = self.clock.now - start
        self.tally.times.stall += stall
        self.tally.layer_stall_ns[layer] += stall
        if stall and self.spans is not None:
            self.spans.append(("stall", start, self.clock.now, -1))

    def _run_expert(self, key: int, tokens: int, layer: int) -> Process:
        cached = (tokens, layer, self.ledger.precision(key))
        duration = self._expert_ns.get(cached)
        if duration is None:
            duration = self._expert_ns[cached] = self.setup.costs.expert_ns(*cached)
        yield from self._busy("expert", duration, key)
        self.tally.times.experts += duration
        self.link.release(key)

    def _busy(self, lane: str, duration: int, key: int) -> Process:
        start = self.clock.now
        yield self.clock.after(duration, COMPUTE_DONE)
        if duration and self.spans is not None:
            self.spans.append((lane, start, self.clock.now, key))

    def _wait(self) -> simpy.Event:
        self._waiting = self.clock.event()
        return self._waiting

    def _notify(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.clock.fire(waiting, COMPUTE_DONE)

    def _on_arrival(self, transfer: Transfer) -> None:
        self._arrivals.append(transfer)
        self._notify()

    def _on_blocked(self) -> None:
        if self.setup.options.order == "barrier" and not self._link_blocked:
            self._link_blocked = True
            self._notify()

    def _on_cpu_done(self, key: int) -> None:
        self._cpu_running -= 1
        self.ledger.pinned.discard(key)
        self.link.wake()
        self._notify()

    # ---- for the desk ----------------------------------------------------------------------------

    def now(self) -> int:
        """The time on the clock."""
        return self.clock.now

    def run_on_host(self, key: int, tokens: int, layer: int) -> None:
        """Give it to the host's workers."""
        self._cpu_running += 1
        self.host.compute(key, self.setup.costs.cpu_expert_ns(tokens, layer))

    def submit(self, job: Job) -> None:
        """Give it to the host's workers."""
        self.host.submit(job)

    # ---- laws ------------------------------------------------------------------------------------

    def _audit(self) -> None:
        """Laws I1, I2, I3, I4 and I11 at the end of a run (``tests/README.md``)."""
        self.ledger.audit()
        broken = self.tally.broken_laws(self.clock.now)
        if broken:
            raise AssertionError(f"the run broke {', '.join(broken)}: {self.tally}")
