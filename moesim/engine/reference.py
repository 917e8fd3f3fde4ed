"""The reference engine: the clock of ``moesim/README.md`` in SimPy, written to be read.

One serial compute lane, one link, host workers, perhaps a drive. The compute lane is the process
below; the link is ``moesim.engine.link``, the workers ``moesim.engine.host``, the drive
``moesim.engine.drive``. With several devices each has a lane for its experts and a link; the
process below waits for the slowest.

The engine is *fed*: it runs until its scheduler must see the next request, so that one pass over a
trace serves many configurations, and no trace need fit in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
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
from moesim.engine.drive import Drive
from moesim.engine.exchange import Exchange
from moesim.engine.host import Host
from moesim.engine.link import Link, Transfer
from moesim.engine.setup import Setup
from moesim.ledger import Ledger
from moesim.protocol import restrict
from moesim.several import Several
from moesim.tally import Reads, Tally, Times
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


@dataclass(eq=False, slots=True)
class Lane:
    """Where one device computes its experts, and what it waits for."""

    link: Link
    tally: Tally
    """The run's, or its own where there are several devices."""
    suffix: str = ""
    """What the names of its spans end with."""
    arrivals: deque[Transfer] = field(default_factory=deque)
    cpu_running: int = 0
    blocked: bool = False
    """Its link has demand and no room for it."""
    waiting: simpy.Event | None = None

    def add(self, times: Times, before: Times) -> None:
        """Add to ``times`` where its own time has gone since ``before``."""
        mine = self.tally.times
        times.experts += mine.experts - before.experts
        times.stall += mine.stall - before.stall
        times.cpu_wait += mine.cpu_wait - before.cpu_wait


class ReferenceEngine(Desk):
    """One configuration on one device, or on several.

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
            world.expert_bytes,
            world.experts,
            world.capacity_bytes,
            allocator=options.allocator,
            caches=world.caches,
        )
        self.view = View(self.ledger)
        self.answers = Answers(setup.policy, world, self.view, self.ledger.bytes_of)
        self.tally.quality = self.answers.quality
        self._owner_of: list[int] = []
        """The device of each key, where there are several."""
        self.lanes = self._make_lanes()
        self.link = self.lanes[0].link
        self.loads = self.link
        if world.owners is not None:
            self._owner_of = np.tile(world.owners, len(world.expert_bytes)).tolist()
            links = [lane.link for lane in self.lanes]
            self.loads = Several(links, self._owner_of, self.ledger, self.tally)
        self.exchange = None if world.owners is None else Exchange(world, setup.costs)
        self.drive: Drive | None = None
        if setup.dram is not None:
            self.tally.ssd = Reads()
            self.drive = self.link.tier = Drive(self.clock, setup, self.link, self.tally.ssd)
        workers = setup.costs.hardware.host.workers
        self.host = Host(self.clock, setup.costs, workers, self._on_cpu_done, self.job_done)
        self.view.count_jobs = lambda: self.host.jobs_waiting
        self.view.count_queued = lambda: self.loads.waiting
        self.spans: list[tuple[str, int, int, int]] | None = [] if options.timeline else None
        self.host.spans = self.spans
        for lane in self.lanes:
            lane.link.spans = self.spans
        self._at_work = 0
        """Devices that still compute the layer event."""
        self._last_done: simpy.Event | None = None
        self._starved: simpy.Event | None = None
        self._done = False
        self._expert_ns: dict[tuple[int, int, int], int] = {}
        self.policy.begin(restrict(world, self.policy.needs))
        self.clock.process(self._serve())
        for lane in self.lanes:
            self.clock.process(lane.link.run())
        if self.drive is not None:
            self.clock.process(self.drive.run())

    def _make_lanes(self) -> list[Lane]:
        """One for each device, in order."""
        setup, several = self.setup, self.world.owners is not None
        lanes: list[Lane] = []
        for number in range(self.world.devices):
            tally = Tally(layer_stall_ns=[0] * self.world.layers) if several else self.tally
            link = Link(
                self.clock,
                self.ledger,
                self.answers,
                setup.costs,
                tally,
                staging=self.world.top_k,
                arrived=self._on_arrival,
                blocked=partial(self._on_blocked, number),
                write_back=setup.options.write_back,
            )
            lanes.append(Lane(link, tally, f"@{number}" if several else ""))
        if several:
            self.tally.devices = [lane.tally for lane in lanes]
        for lane in lanes if setup.costs.hardware.must_share(len(lanes)) else ():
            lane.link.beside = [other.link for other in lanes if other is not lane]
        return lanes

    def _lane(self, key: int) -> Lane:
        """The lane of the device that owns a key."""
        return self.lanes[self._owner_of[key] if self._owner_of else 0]

    def tally_of(self, key: int) -> Tally:
        """What counts the accesses and loads of a key."""
        return self._lane(key).tally

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
                if self.setup.is_warm(self.tally, self.times.values()):
                    self.tally.before = deepcopy(self.tally)
                    self.tally.before.gather()
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
        self.loads.finish()
        self.tally.requests = list(self.times.values())
        self._done = True
        if self.setup.options.check:
            self._audit()

    def _fill(self) -> Process:
        """Make the initial state resident before the first request: on each device one load after
        the other, on all of them at once."""
        takes = [0] * len(self.lanes)
        links = len({id(self._lane(expert)) for expert in self.setup.initial})
        for order, expert in enumerate(self.setup.initial):
            nbytes = self.ledger.copy_bytes[expert]
            tally = self.tally_of(expert)
            if self.setup.initial_charged:
                load_ns = self.setup.load_ns(nbytes, links)
                duration = load_ns + self._read_first(expert, nbytes)
                takes[self.lanes.index(self._lane(expert))] += duration
                tally.link_busy_ns += load_ns
            self.ledger.queue(expert)
            self.ledger.reserve(expert)
            self.ledger.land(expert)
            tally.initial_loads += 1
            tally.initial_bytes += nbytes
            self.policy.note(Landed(expert, 0, -1, order, False))
        if max(takes):
            yield self.clock.after(max(takes), LOAD_DONE)
            self.tally.times.initial = max(takes)

    def _read_first(self, expert: int, nbytes: int) -> int:
        """What reading an expert of the initial state takes; it passes through host memory."""
        if self.drive is None or self.drive.has(expert):
            return 0
        self.drive.tally.initial_reads += 1
        self.drive.tally.initial_bytes += nbytes
        return self.setup.costs.read_ns(nbytes)

    def _step(self, step: Step) -> Process:
        self.begin_step(step)
        stall, misses = self.tally.times.stall, self.misses()
        if self.setup.options.share_kv:
            self._make_room_for_kv(step)
        cut = flat_events if self.setup.options.flat else layer_events
        if self.exchange is not None:
            self.exchange.step_begins()
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
        self.loads.shrink(left)
        # A request that ended may have given bytes back.
        self.loads.wake()

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
        self.loads.wake()
        plan_ns = (costs.plan_ns if item.dense_tokens else 0) + costs.job_ns(plan.foreground_ops, 0)
        if plan_ns:
            yield self.clock.after(plan_ns, GATE)
            times.plan += plan_ns
        awaited = self.demand(gate, plan)
        self.apply(plan, Phase(gate.source.slots[0].phase))
        self.loads.wake()
        if self.exchange is None:
            yield from self._compute(self.lanes[0], gate, self.keys.tolist(), len(awaited))
        else:
            yield from self._side_by_side(gate, awaited)
            yield from self._exchange(self.exchange, gate)
        self.loads.log.add(log.END, self.clock.now, gate.event)

    # ---- several devices -------------------------------------------------------------------------

    def _side_by_side(self, gate: Gate, awaited: Sequence[int]) -> Process:
        """Each device computes its own experts; wait for the slowest."""
        parts: dict[int, list[int]] = {}
        for key in self.keys.tolist():
            parts.setdefault(self._owner_of[key], []).append(key)
        if not parts:
            return
        self._at_work = len(parts)
        self._last_done = self.clock.event()
        for device, keys in sorted(parts.items()):
            waiting = sum(self._owner_of[key] == device for key in awaited)
            self.clock.process(self._device(self.lanes[device], gate, keys, waiting))
        yield self._last_done

    def _device(self, lane: Lane, gate: Gate, keys: Sequence[int], waiting: int) -> Process:
        """One device's part of a layer event. Where the last one's time went, the event's did."""
        before = replace(lane.tally.times)
        yield from self._compute(lane, gate, keys, waiting)
        self._at_work -= 1
        if not self._at_work:
            assert self._last_done is not None
            times = self.tally.times
            lane.add(times, before)
            self.tally.layer_stall_ns[gate.layer] += lane.tally.times.stall - before.stall
            lane.tally.slowest += 1
            self.clock.fire(self._last_done, COMPUTE_DONE)

    def _exchange(self, exchange: Exchange, gate: Gate) -> Process:
        """The tokens' hidden states travel between devices."""
        chosen = self.answers.routed_experts(gate.source)
        duration = exchange.ns(gate.layer, chosen)
        if duration:
            yield from self._busy("exchange", duration, -1)
            self.tally.times.exchange += duration

    # ---- compute ---------------------------------------------------------------------------------

    def _compute(self, lane: Lane, gate: Gate, keys: Sequence[int], waiting: int) -> Process:
        """Residents in demand order, then arrivals as they land, then wait for the host."""
        tokens = dict(zip(self.keys.tolist(), gate.tokens.tolist(), strict=True))
        hits = set(self.keys[gate.status == HIT].tolist())
        if self.setup.options.order == "barrier":
            yield from self._barrier(lane, gate.layer, waiting)
        for key in keys:
            if key in hits:
                yield from self._run_expert(key, tokens[key], gate.layer)
        for _ in range(waiting):
            while not lane.arrivals:
                yield from self._stalled(lane, gate.layer)
            transfer = lane.arrivals.popleft()
            yield from self._run_expert(transfer.key, tokens[transfer.key], gate.layer)
        while lane.cpu_running:
            start = self.clock.now
            yield self._wait(lane)
            lane.tally.times.cpu_wait += self.clock.now - start

    def _barrier(self, lane: Lane, layer: int, waiting: int) -> Process:
        """Wait for every arrival; a layer event that overflows its cache must compute sooner."""
        lane.blocked = False
        while len(lane.arrivals) < waiting and not lane.blocked:
            yield from self._stalled(lane, layer)

    def _stalled(self, lane: Lane, layer: int) -> Process:
        start = self.clock.now
        yield self._wait(lane)
        stall = self.clock.now - start
        lane.tally.times.stall += stall
        lane.tally.layer_stall_ns[layer] += stall
        if stall and self.spans is not None:
            self.spans.append(("stall" + lane.suffix, start, self.clock.now, -1))

    def _run_expert(self, key: int, tokens: int, layer: int) -> Process:
        cached = (tokens, layer, self.ledger.precision(key))
        duration = self._expert_ns.get(cached)
        if duration is None:
            duration = self._expert_ns[cached] = self.setup.costs.expert_ns(*cached)
        lane = self._lane(key)
        yield from self._busy("expert" + lane.suffix, duration, key)
        lane.tally.times.experts += duration
        lane.link.release(key)

    def _busy(self, lane: str, duration: int, key: int) -> Process:
        start = self.clock.now
        yield self.clock.after(duration, COMPUTE_DONE)
        if duration and self.spans is not None:
            self.spans.append((lane, start, self.clock.now, key))

    def _wait(self, lane: Lane) -> simpy.Event:
        lane.waiting = self.clock.event()
        return lane.waiting

    def _notify(self, lane: Lane) -> None:
        if lane.waiting is not None:
            waiting, lane.waiting = lane.waiting, None
            self.clock.fire(waiting, COMPUTE_DONE)

    def _on_arrival(self, transfer: Transfer) -> None:
        lane = self._lane(transfer.key)
        lane.arrivals.append(transfer)
        self._notify(lane)

    def _on_blocked(self, number: int) -> None:
        lane = self.lanes[number]
        if self.setup.options.order == "barrier" and not lane.blocked:
            lane.blocked = True
            self._notify(lane)

    def _on_cpu_done(self, key: int) -> None:
        lane = self._lane(key)
        lane.cpu_running -= 1
        self.ledger.pinned.discard(key)
        if self.drive is not None:
            self.drive.unpin(key)
        lane.link.wake()
        self._notify(lane)

    # ---- for the desk ----------------------------------------------------------------------------

    def now(self) -> int:
        """The time on the clock."""
        return self.clock.now

    def run_on_host(self, key: int, tokens: int, layer: int) -> None:
        """Give it to the host's workers."""
        self._lane(key).cpu_running += 1
        compute = partial(self.host.compute, key, self.setup.costs.cpu_expert_ns(tokens, layer))
        if self.drive is None:
            compute()
        else:
            self.drive.need(key, compute)

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
