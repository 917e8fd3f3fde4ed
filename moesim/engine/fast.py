"""The fast engine: the reference engine's answers, from compiled code.

Same interface and same results to the nanosecond as ``moesim.engine.reference``. Policies made of
built-in seats run wholly in compiled code; any other is asked from there (``moesim.engine.asked``),
which is slower. This file fills the arrays and reads them out; the rules are in
``moesim.engine.kernel``, what the arrays hold is in ``moesim.engine.fields``.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeGuard

import numba
import numpy as np

from moesim.compiled import address, load
from moesim.engine import kernel
from moesim.engine.asked import Asked
from moesim.engine.block import Block, BlockMaker, load_block_functions
from moesim.engine.clock import TOO_LONG
from moesim.engine.exchange import Exchange
from moesim.engine.feed import Feed
from moesim.engine.fields import (
    SHARED,
    Back,
    C,
    D,
    E,
    G,
    K,
    Keep,
    O,
    Order,
    P,
    Q,
    R,
    S,
    T,
    W,
    Wish,
    X,
)
from moesim.engine.foresight import Foreseer
from moesim.engine.machine import HostFunction, M
from moesim.engine.quick import quick_steps
from moesim.engine.reads import shelf
from moesim.engine.setup import Setup
from moesim.engine.sights import sights
from moesim.engine.steps import make_room
from moesim.errors import UsageError
from moesim.ledger import Ledger
from moesim.log import LogDigest
from moesim.policies.belady import MinBypass, MinForced
from moesim.policies.cpu import CPU
from moesim.policies.exact import Exact
from moesim.policies.fetch import Fetch
from moesim.policies.fiddler import Fiddler
from moesim.policies.fifo import FIFO
from moesim.policies.forecast import ForecastSeat
from moesim.policies.hot_set import HotSet
from moesim.policies.least_stale import LeastStale
from moesim.policies.lfru import LFRU
from moesim.policies.lfu import LFU, LFUInCache
from moesim.policies.lfu_decay import LFUDecay
from moesim.policies.look_ahead import LookAhead
from moesim.policies.lru import LRU
from moesim.policies.map_frequency import MapFrequency
from moesim.policies.next_gate import NextGate
from moesim.policies.no_prefetch import NoPrefetch
from moesim.policies.previous_token import PreviousToken
from moesim.policies.random_victim import Random
from moesim.policies.slru import SLRU
from moesim.policies.static import Static
from moesim.policies.whole_layer import WholeLayer
from moesim.protocol import (
    PlainPolicy,
    Policy,
    PrefetchSeat,
    Seat,
    SeatPolicy,
    World,
    parameters,
    restrict,
)
from moesim.tally import FATES, GATHERED, Counts, Reads, RequestTimes, Tally
from moesim.timeline import LANES
from moesim.types import NEVER, AnyArray, IntArray, Landed, Needs, Phase, Serve, State
from moesim.workload import KnownFuture, Passes, Step, Work, context_tokens

KEEPS: dict[type, Keep] = {
    LRU: Keep.LRU,
    FIFO: Keep.FIFO,
    LFU: Keep.LFU,
    LFUInCache: Keep.LFU_INCACHE,
    LFUDecay: Keep.LFU_DECAY,
    LFRU: Keep.LFRU,
    LeastStale: Keep.LEAST_STALE,
    SLRU: Keep.SLRU,
    Random: Keep.RANDOM,
    Static: Keep.FIXED,
    MapFrequency: Keep.MAP_FREQUENCY,
    MinForced: Keep.MIN,
    MinBypass: Keep.MIN,
}
WISHES: dict[type, Wish] = {
    NoPrefetch: Wish.NONE,
    PreviousToken: Wish.PREVIOUS,
    NextGate: Wish.AHEAD,
    HotSet: Wish.HOT,
    LookAhead: Wish.FUTURE,
    WholeLayer: Wish.WHOLE,
}


def wish_of(prefetch: PrefetchSeat) -> Wish | None:
    """How the core carries out a prefetch seat; None if it cannot."""
    if isinstance(prefetch, ForecastSeat):
        # A seat that delivers in a way of its own must be asked.
        own = any(getattr(type(prefetch), n) is not getattr(ForecastSeat, n) for n in DELIVERY)
        return None if own or prefetch.queue > MOST_JOBS else Wish.FORECAST
    return WISHES.get(type(prefetch))


SERVES: dict[type, int] = {Fetch: Serve.FETCH, CPU: Serve.CPU, Fiddler: Serve.SKIP}
"""The miss seats; the kernel reads ``SKIP`` as "the quicker of the two"."""

ORDERS: dict[Keep, Order] = {
    Keep.LRU: Order.LIST,
    Keep.FIFO: Order.LIST,
    Keep.LFU: Order.HEAP,
    Keep.LFU_INCACHE: Order.HEAP,
    Keep.SLRU: Order.HEAP,
    Keep.FIXED: Order.HEAP,
    Keep.MIN: Order.HEAP,
    Keep.LFU_DECAY: Order.HEAP,
    Keep.LFRU: Order.HEAP,
    Keep.LEAST_STALE: Order.HEAP,
}
"""How residents are kept for a keep seat; where every score is drawn anew, in no order."""

BY_LAYER = (Keep.LFU_DECAY, Keep.LEAST_STALE)
"""Keep seats that order the experts of one layer alone; a cache has a heap for each of them."""

FEW_SLOTS = 16
"""Up to so many residents a search among all of them is quicker than a heap."""

PLACE_WORDS = 1 << 10
"""More than a machine takes, which is its arrays' addresses and shapes."""

SPANS = 1 << 14
COMMANDS = 1 << 10
DELIVERY = ("plan", "hear", "_commission", "_deliver", "_named", "_outdated", "_refreshed")
"""What ``moesim.engine.sights`` does in the place of a seat."""

MOST_JOBS = 1 << 10
"""A seat that lets more of its jobs wait is asked in plain Python."""
NOTES = 1 << 10

LONGEST_CALM_NS = 1 << 40
"""Above this a block's times go the general way, which watches for the end of the clock."""


def compiled(policy: Policy) -> TypeGuard[SeatPolicy]:
    """Whether a policy is made of seats that the compiled core knows."""
    return (
        isinstance(policy, SeatPolicy)
        and type(policy.keep) in KEEPS
        and wish_of(policy.prefetch) is not None
        and type(policy.miss) in SERVES
        and type(policy.routing) is Exact
    )


class FastEngine:
    """One configuration on one device; use it as ``ReferenceEngine``.

    asked : run even a policy of built-in seats as one in plain Python.
    """

    def __init__(self, setup: Setup, *, asked: bool = False) -> None:
        self.setup = setup
        self.policy = setup.policy
        self.policy.begin(restrict(setup.world, self.policy.needs))
        self.tally = Tally(layer_stall_ns=[0] * setup.world.layers)
        if setup.world.owners is not None:
            for _ in range(setup.world.devices):
                self.tally.devices.append(Tally(layer_stall_ns=[0] * setup.world.layers))
        self.spans: list[tuple[str, int, int, int]] | None = [] if setup.options.timeline else None
        self.core_ns = 0
        """Time spent in compiled code, on the wall."""
        self._seats: SeatPolicy | None = None
        if compiled(setup.policy) and not asked and not _is_flat_forecast(setup):
            self._seats = setup.policy
        self.future = self._needed_future()
        self._machine = _machine(setup, self._seats, self.future)
        self._devices = _devices(setup, self._machine)
        """The machine of each of several devices."""
        self._asked = None if self._seats else Asked(setup, self._machine, self._devices)
        if self._asked is not None:
            self._machine.s[O.HOST] = self._asked.address
            for device in self._devices:
                device.s[O.HOST] = self._asked.of_device(device)
        self._price = HostFunction(setup.costs.job_ns)
        self._machine.s[O.PRICE] = int(ctypes.cast(self._price, ctypes.c_void_p).value or 0)
        self._run_core: Callable[[M], int] = kernel.run
        if self._devices:
            self._run_core = self._prepare_devices()
        else:
            load(*kernel.calls(self._machine), *load_block_functions())
        if self._machine.s[O.PREFETCH] == Wish.FORECAST:
            self._machine.s[O.SIGHTS] = address(sights)
        if setup.dram is not None:
            self.tally.ssd = Reads(start_bytes=int(self._machine.s[S.DRAM_USED]))
            self._machine.s[O.TIER] = address(shelf)
        self._times: dict[int, RequestTimes] = {}
        self._fill()
        self._feed: Feed | None = None

    def _prepare_devices(self) -> Callable[[M], int]:
        """Tell the core where the devices' machines lie; what runs them."""
        from moesim.engine import devices

        typeof: Any = numba.typeof
        m = typeof(self._machine)
        more = [(devices.run_devices, (m,)), (devices.lay, (m, numba.int64))]
        load(*kernel.common_calls(self._machine), *load_block_functions(), *more)
        self._machine.s[O.DEVICE] = address(devices.device)
        self._places = [np.zeros(PLACE_WORDS, np.int64) for _ in self._devices]
        for own, place in zip(self._devices, self._places, strict=True):
            nbytes = devices.lay(own, place.ctypes.data)
            assert nbytes <= place.nbytes
            own.s[O.PLACE] = place.ctypes.data
        return devices.run_devices

    # ---- feeding ---------------------------------------------------------------------------------

    @property
    def feed(self) -> Feed:
        """What serves this engine alone."""
        if self._feed is None:
            self._feed = Feed([self])
        return self._feed

    def offer(self, work: Work) -> None:
        """The next request of the trace."""
        self.feed.offer(work)

    def close(self) -> None:
        """No request follows."""
        self.feed.close()

    def advance(self) -> bool:
        """Run until the run is done (True) or the next request is needed (False)."""
        return self.feed.advance()

    def block_maker(self) -> BlockMaker:
        """What cuts the workload for this engine."""
        prefetch = self._seats.prefetch if self._seats else None
        reads = prefetch is not None and Needs.AHEAD in prefetch.needs
        return BlockMaker(
            self.setup.costs,
            self.setup.world.experts,
            flat=self.setup.options.flat,
            distance=getattr(prefetch, "distance", 1) if reads else 0,
            width=getattr(prefetch, "width", 0),
            cpu=self._seats is None or not isinstance(self._seats.miss, Fetch),
            future=self.future,
            asked=self._seats is None,
            foreseer=Foreseer(prefetch, self.setup.costs)
            if isinstance(prefetch, ForecastSeat)
            else None,
            exchange=Exchange(self.setup.world, self.setup.costs) if self._devices else None,
        )

    @property
    def shared_with(self) -> tuple[object, ...] | None:
        """Engines for which this is equal may be fed the same blocks; None: only this one."""
        if self._seats is None:
            return None
        prefetch = self._seats.prefetch
        reads = Needs.AHEAD in prefetch.needs
        foresees = isinstance(prefetch, ForecastSeat)
        return (
            self.setup.options.flat,
            (type(prefetch), *parameters(prefetch).items()) if foresees else None,
            (getattr(prefetch, "distance", 1), getattr(prefetch, "width", 0)) if reads else None,
            isinstance(self._seats.miss, Fetch),
            id(self.future),
            id(self.setup.world.owners),
        )

    @property
    def now(self) -> int:
        """The time in ns."""
        return int(self._machine.s[S.NOW])

    # ---- running ---------------------------------------------------------------------------------

    def serve(self, made: Block) -> None:
        """Run a block of steps."""
        if self.setup.is_warm(self.tally, self._times.values()):
            self.tally.before = self._counted_so_far()
        table = made.table.copy()
        if self.setup.options.share_kv:
            table[:, T.VISIT] = 1
        machine = self._machine._replace(
            ev=made.events,
            dem=made.demand,
            ids=made.ids,
            said=made.said,
            st=table,
            fore=made.fore,
            jobs=self._jobs(made),
        )
        machine.s[S.STEP] = 0
        machine.s[O.QUICK] = self._is_quick(made)
        if self._asked is not None:
            self._asked.sources = made.sources
        kernel.schedule_step(machine)
        self._run(machine, made)
        row = 0
        for item in made.items:
            if isinstance(item, Passes):
                self._account_passes(item, table[row : row + item.steps])
                row += item.steps
            else:
                self._account(item, table[row].tolist())
                row += 1
        self.tally.steps += row

    def _jobs(self, made: Block) -> IntArray:
        """The rows of jobs, as wide as the block's longest record."""
        jobs: IntArray = self._machine.jobs
        if made.longest > jobs.shape[1]:
            wider = np.zeros((len(jobs), 2 * made.longest), np.int64)
            wider[:, : jobs.shape[1]] = jobs
            self._machine = self._machine._replace(jobs=wider)
            return wider
        return jobs

    def idle(self, until_ns: int) -> None:
        """Serve nothing before a time."""
        self._machine.s[O.QUICK] = 0
        kernel.schedule_idle(self._machine, until_ns)
        self._run(self._machine, None)

    def _is_quick(self, made: Block) -> bool:
        seats, options, s = self._seats, self.setup.options, self._machine.s
        if self._devices or self.setup.dram is not None or not options.quick:
            return False
        if seats is None or options.timeline or not s[O.ONE_VICTIM]:
            return False
        if options.write_back:
            return False
        if wish_of(seats.prefetch) != Wish.NONE or not isinstance(seats.miss, Fetch):
            return False
        longest = max(int(made.demand[D.NS].max(initial=0)), int(made.events[:, E.DENSE_NS].max()))
        longest = max(longest, int(s[O.LOAD]), int(s[O.SYNC]), int(s[O.PLAN]))
        return not seats.bypass and longest < LONGEST_CALM_NS

    def _run(self, machine: M, made: Block | None) -> None:
        """Let the core run until the steps are done."""
        with nullcontext() if self._asked is None else self._asked.interruptible():
            self._take_turns(machine, made)

    def _take_turns(self, machine: M, made: Block | None) -> None:
        stopped = kernel.STEP_DONE
        while stopped != kernel.BLOCK_DONE:
            stopped = self._enter(machine, closed=stopped == kernel.STEP_DONE)
            self._drain(machine)
            if stopped == kernel.STEP_BEGINS and made is not None:
                self._step_begins(made.step(int(machine.s[S.STEP])))
            elif stopped == kernel.STEP_ENDS and made is not None:
                self._step_ends(made.step(int(machine.s[S.STEP]) - 1))
            elif stopped == kernel.FAILED:
                assert self._asked is not None and self._asked.error is not None
                raise self._asked.error
            elif stopped == kernel.TOO_LONG:
                raise UsageError(TOO_LONG)

    def _enter(self, machine: M, *, closed: bool) -> int:
        """The core until it stops; in closed form first, where that may be and a step begins."""
        began = time.perf_counter_ns()
        stopped = kernel.BLOCK_DONE
        quick = closed and machine.s[O.QUICK]
        if quick:
            quick_steps(machine)
        # While the compute lane waits for the link it has no event of its own, and yet goes on.
        if not quick or machine.s[S.STEP] < len(machine.st):
            stopped = self._run_core(machine)
        self.core_ns += time.perf_counter_ns() - began
        return stopped

    def _step_begins(self, step: Step) -> None:
        if self._asked is not None:
            self._asked.step_begins(step)
        if self.setup.options.share_kv:
            taken = self._kv_bytes(step)
            for own in self._own():
                make_room(own, taken)

    def _step_ends(self, step: Step) -> None:
        if self._asked is not None:
            self._asked.step_ends(step)

    def _drain(self, machine: M) -> None:
        if self.spans is None:
            return
        count = int(machine.s[S.N_SPANS])
        for lane, start, end, key in machine.spans[:count].tolist():
            device, lane = divmod(lane, len(LANES))
            suffix = f"@{device - 1}" if device else ""
            self.spans.append((LANES[lane] + suffix, start, end, key))
        machine.s[S.N_SPANS] = 0

    def _kv_bytes(self, step: Step) -> int:
        """What the KV cache takes of each cache."""
        whole = self.setup.world.capacity_bytes
        context = context_tokens(step)
        taken = context * self.setup.kv_bytes_per_token // len(whole)
        self.setup.refuse_crowded(context, [max(0, c - taken) for c in whole])
        return taken

    def _account(self, step: Step, row: list[int]) -> None:
        """A step's share in the times of its requests, as the reference keeps them."""
        for part in step.parts:
            times = self._times_of(part.work, row[T.BEGIN_NS])
            times.stall_ns += row[T.STALL_NS]
            times.misses += row[T.MISSES]
            if part.ends:
                times.output_tokens += 1
                if times.first_token_ns < 0:
                    times.first_token_ns = row[T.END_NS]
                if part.number == part.work.iterations - 1:
                    times.end_ns = row[T.END_NS]

    def _account_passes(self, passes: Passes, rows: IntArray) -> None:
        """The same of many steps of one request."""
        times = self._times_of(passes.work, int(rows[0, T.BEGIN_NS]))
        times.stall_ns += int(rows[:, T.STALL_NS].sum())
        times.misses += int(rows[:, T.MISSES].sum())
        times.output_tokens += passes.steps
        if times.first_token_ns < 0:
            times.first_token_ns = int(rows[0, T.END_NS])
        if passes.last == passes.work.iterations:
            times.end_ns = int(rows[-1, T.END_NS])

    def _times_of(self, work: Work, begin_ns: int) -> RequestTimes:
        times = self._times.get(work.index)
        if times is None:
            arrival = begin_ns if work.arrival_ns is None else work.arrival_ns
            prompt = work.rows.facts.prompt_tokens or 0
            times = RequestTimes(work.rows.request, arrival, begin_ns, prompt)
            self._times[work.index] = times
        return times

    # ---- beginning and end -----------------------------------------------------------------------

    def _needed_future(self) -> KnownFuture | None:
        future = self.setup.world.future if Needs.FUTURE in self.policy.needs else None
        assert future is None or isinstance(future, KnownFuture)
        return future

    def _fill(self) -> None:
        """``ReferenceEngine._fill``."""
        m = self._machine
        owner_of = m.k[K.OWNER]
        takes = [0] * max(1, len(self._devices))
        links = len(set(owner_of[list(self.setup.initial)].tolist()))
        for order, expert in enumerate(self.setup.initial):
            device = int(owner_of[expert])
            own = self._devices[device] if self._devices else m
            tally = self.tally.devices[device] if self._devices else self.tally
            nbytes = int(m.k[K.COPY, expert])
            if self.setup.initial_charged:
                load_ns = self.setup.load_ns(nbytes, links)
                takes[device] += load_ns + self._read_first(expert, nbytes)
                own.s[S.LINK_BUSY] += load_ns
            with self._lent(own):
                kernel.place(own, expert)
            tally.initial_loads += 1
            tally.initial_bytes += nbytes
            if self._asked is not None:
                self.policy.note(Landed(expert, 0, -1, order, False))
        m.s[S.NOW] += max(takes)
        self.tally.times.initial = max(takes)

    def _own(self) -> Iterator[M]:
        """The machines that have links, each while it has what all share."""
        for own in self._devices or (self._machine,):
            with self._lent(own):
                yield own

    @contextmanager
    def _lent(self, own: M) -> Iterator[None]:
        """Lend a device what all share."""
        shared = self._machine.s[:SHARED]
        if own is self._machine:
            yield
            return
        own.s[:SHARED] = shared
        yield
        shared[:] = own.s[:SHARED]

    def _read_first(self, expert: int, nbytes: int) -> int:
        """``ReferenceEngine._read_first``."""
        reads = self.tally.ssd
        if reads is None or self._machine.k[K.IS_NEAR, expert]:
            return 0
        reads.initial_reads += 1
        reads.initial_bytes += nbytes
        return self.setup.costs.read_ns(nbytes)

    def finish(self) -> None:
        """``Link.finish``, and the arrays as a tally."""
        m = self._machine
        for own in self._own():
            kernel.finish(own)
        if self._asked is not None:
            self._asked.finish()
            self.tally.jobs = self._asked.jobs
            self.tally.quality = self._asked.answers.quality
        else:
            self.tally.jobs = int(m.s[S.JOBS_MADE])
        self._read_into(self.tally)
        if self.tally.ssd is not None:
            _read_tier(m, self.tally.ssd)
        self.tally.requests = list(self._times.values())
        if self.setup.options.check:
            _audit(self.tally, self.now)

    def _read_into(self, tally: Tally) -> None:
        """What the core has counted, of one device or of all together."""
        _read(self._machine, tally)
        if not self._devices:
            return
        for phase in Phase:
            tally.phases[phase] = Counts()
        for own, device in zip(self._devices, tally.devices, strict=True):
            _read_device(own, device)
        tally.resident_bytes = 0
        tally.gather()

    def _counted_so_far(self) -> Tally:
        blank = [0] * self.setup.world.layers
        devices = [Tally(layer_stall_ns=list(blank)) for _ in self._devices]
        counted = Tally(layer_stall_ns=blank, devices=devices)
        self._read_into(counted)
        counted.steps, counted.times.initial = self.tally.steps, self.tally.times.initial
        return counted


# ---- from a setup to arrays ----------------------------------------------------------------------


def _machine(setup: Setup, seats: SeatPolicy | None, future: KnownFuture | None) -> M:
    world = setup.world
    experts, caches = world.experts, len(world.capacity_bytes)
    keys = world.expert_bytes.size * experts
    sizes = sorted({int(b) for b in world.expert_bytes.reshape(-1)})
    distance = max(1, getattr(seats.prefetch, "distance", 1)) if seats else 1
    looks_ahead = seats is not None and isinstance(seats.prefetch, LookAhead)
    wishes = experts * (distance + 1 if looks_ahead else 2)
    workers = setup.costs.hardware.host.workers
    longest = max(keys, 2 * experts + 2, workers + 1, _queue(seats) + 1)
    width = _power(longest)
    starts, wanted = _future(future if looks_ahead else None)
    machine = M(
        s=_scalars(setup, seats),
        state=np.full(keys, State.ABSENT, np.uint8),
        k=_keys(setup, seats, sizes),
        c=_caches(setup, seats, keys),
        w=np.zeros((len(W), workers + (setup.dram is not None)), np.int64),
        # Rows a power of two apart would share the same few lines of a CPU's cache.
        q=np.zeros((len(Q), width + 24), np.int64),
        cur=np.zeros((len(D), experts), np.int64),
        ends=_curves(_all_curves(setup, sizes)),
        # A forecast may be about any later layer of this pass or of the next.
        named=np.full((_power(max(distance, 2 * world.layers) + 2), experts + 2), -1, np.int64),
        plan=np.zeros((wishes + experts, 3), np.int64),
        told=np.zeros((COMMANDS, len(P)), np.int64),
        heard=np.zeros((NOTES, len(R)), np.int64),
        known=_known(seats, world.layers, experts),
        starts=starts,
        future=wanted,
        counts=np.zeros((3, max(len(Counts.__slots__), world.layers)), np.int64),
        spans=np.zeros((SPANS, 4), np.int64),
        ev=np.zeros((1, len(E)), np.int64),
        dem=np.zeros((int(D.STATUS), 1), np.int64),
        ids=np.zeros(1, np.uint32),
        said=np.zeros(1, np.int64),
        st=np.zeros((1, len(T)), np.int64),
        fore=np.zeros(1, np.int64),
        each=np.zeros((max(1, _count(world)), len(S) + len(O)), np.int64),
        jobs=np.zeros((_queue(seats) + 1, len(G)), np.int64),
    )
    heads = keys + np.arange(caches)
    machine.k[K.BEFORE, heads] = machine.k[K.AFTER, heads] = heads
    machine.s[O.RING] = width - 1
    machine.s[O.RUN_EVENTS] = len(starts) - 1
    machine.w[W.TIME] = NEVER
    machine.q[Q.ASLEEP, :workers] = np.arange(workers)
    if setup.dram is not None:
        _fill_shelf(machine, setup, len(sizes))
    return machine


def _count(world: World) -> int:
    """How many devices have machines of their own."""
    return 0 if world.owners is None else world.devices


def _devices(setup: Setup, machine: M) -> list[M]:
    """The machine of each of several devices: what is its own, beside what all share."""
    world = setup.world
    made = []
    for number in range(_count(world)):
        own = machine._replace(
            s=machine.each[number],
            q=np.zeros_like(machine.q),
            cur=np.zeros_like(machine.cur),
            counts=np.zeros_like(machine.counts),
        )
        own.s[:] = machine.s
        # Nothing that it begins is known to end before what others do.
        own.s[S.AWAKE] = 1
        own.s[S.C_TIME] = NEVER + 1
        caches = np.unique(world.caches[world.owners == number])
        own.s[O.DEVICES], own.s[O.NUMBER] = 0, number
        own.s[O.FIRST_CACHE], own.s[O.CACHES] = caches[0], len(caches)
        made.append(own)
    return made


def _all_curves(setup: Setup, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The chunks of each kind of copy on the link, then those of its reads from the drive."""
    reads = [] if setup.dram is None else [setup.costs.read_ends(size) for size in sizes]
    return [*_ends(setup, sizes), *reads]


def _ends(setup: Setup, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The chunks of each kind of copy, for each number of links that draw on the host."""
    costs, devices = setup.costs, _count(setup.world)
    if not costs.hardware.must_share(devices):
        return [costs.chunk_ends(size) for size in sizes]
    return [costs.shared_ends(size, links + 1) for links in range(devices) for size in sizes]


def _fill_shelf(m: M, setup: Setup, kinds: int) -> None:
    """Host memory as it is at the start."""
    assert setup.dram is not None and setup.costs.hardware.ssd is not None
    m.s[O.DRAM], m.s[O.READ_CHUNK] = setup.dram.nbytes, setup.costs.hardware.ssd.chunk_bytes
    head = m.s[O.SHELF] = m.k.shape[1] - 1
    keys, there = len(m.state), np.array(setup.dram.initial, np.int64)
    m.k[K.READ_CURVE, :keys] = m.k[K.CURVE, :keys] + kinds
    m.k[K.READ_SENT, :keys] = -1
    m.k[K.READ_SENT, there] = m.ends[m.k[K.READ_CURVE, there], 0]
    m.k[K.IS_NEAR, :keys] = 0
    m.k[K.IS_NEAR, there] = 1
    m.s[S.DRAM_USED] = m.k[K.COPY, there].sum()
    ring = np.concatenate(([head], there, [head]))
    m.k[K.SHELF_AFTER, ring[:-1]] = ring[1:]
    m.k[K.SHELF_BEFORE, ring[1:]] = ring[:-1]


def _power(least: int) -> int:
    """The first power of two that is not less."""
    return 1 << (least - 1).bit_length()


def _queue(seats: SeatPolicy | None) -> int:
    """How many jobs of forecasts there may be."""
    prefetch = seats.prefetch if seats else None
    return prefetch.queue if isinstance(prefetch, ForecastSeat) else 0


def _is_flat_forecast(setup: Setup) -> bool:
    """Whether forecasts count in layers, and layer events do not."""
    policy = setup.policy
    assert isinstance(policy, SeatPolicy)
    return setup.options.flat and isinstance(policy.prefetch, ForecastSeat)


def _curves(chunk_ends: Sequence[tuple[int, ...]]) -> IntArray:
    ends = np.zeros((len(chunk_ends), 1 + max(map(len, chunk_ends))), np.int64)
    for row, curve in enumerate(chunk_ends):
        ends[row, 0] = len(curve)
        ends[row, 1 : 1 + len(curve)] = curve
    return ends


def _scalars(setup: Setup, seats: SeatPolicy | None) -> IntArray:
    world, options, costs = setup.world, setup.options, setup.costs
    # Built-in seats ask for full precision alone.
    asked = world.expert_bytes if seats is None else world.expert_bytes[0]
    equal = int(asked.min()) == int(asked.max())
    s = np.zeros(len(S) + len(O), np.int64)
    s[S.EVENT] = s[S.L_KEY] = -1
    s[S.C_TIME] = s[S.L_TIME] = NEVER
    s[S.ASLEEP_TAIL] = costs.hardware.host.workers
    s[O.LAYERS], s[O.EXPERTS], s[O.SIZE] = world.layers, world.experts, world.size
    s[O.KEYS] = world.expert_bytes.size * world.experts
    s[O.CACHES] = len(world.capacity_bytes)
    s[O.HEAPS] = 1
    s[O.BYPASS] = setup.policy.bypass
    s[O.BARRIER] = options.order == "barrier"
    s[O.STAGING] = world.top_k
    s[O.WRITE_BACK] = Back[(options.write_back or "nothing").upper()]
    s[O.SYNC], s[O.PLAN] = costs.sync_ns, costs.plan_ns
    s[O.DECODE_FROM] = world.decode_from
    s[O.SEED] = world.seed
    s[O.CHUNK] = costs.hardware.link.chunk_bytes
    s[O.WORKERS] = costs.hardware.host.workers
    s[O.ACTORS] = s[O.WORKERS] + (setup.dram is not None)
    s[O.SPANS] = options.timeline
    s[O.LOG] = options.log
    s[O.ONE_VICTIM] = equal and not options.share_kv
    s[O.DEVICES] = _count(world)
    if costs.hardware.must_share(_count(world)):
        s[O.SHARES] = len(np.unique(world.expert_bytes))
    if equal:
        s[O.UNIT], s[O.LOAD] = int(asked.min()), costs.load_ns(int(asked.min()))
    if seats is None:
        s[O.ROUTES] = setup.policy.lossy
        s[O.LISTENS] = listens(setup.policy)
    else:
        _choose_seats(s, seats, setup)
    return s


def _choose_seats(s: IntArray, seats: SeatPolicy, setup: Setup) -> None:
    prefetch, keep = seats.prefetch, seats.keep
    s[O.KEEP] = KEEPS[type(keep)]
    wish = wish_of(prefetch)
    assert wish is not None
    s[O.PREFETCH] = wish
    if isinstance(prefetch, ForecastSeat):
        s[O.QUEUE], s[O.BACKGROUND] = prefetch.queue, prefetch.background
        s[O.REFRESH], s[O.RENEW] = prefetch.refresh, prefetch.renew
    s[O.MISS] = SERVES[type(seats.miss)]
    s[O.DISTANCE] = getattr(prefetch, "distance", 1)
    s[O.CANCEL] = getattr(prefetch, "cancel", False)
    s[O.FACTOR] = getattr(keep, "factor", 0)
    if isinstance(keep, MapFrequency):
        s[O.FORGETS] = keep.freq == "residency"
        s[O.UNKNOWN] = -1 if keep.unsearched == "last" else keep.unknown
    if s[O.KEEP] in BY_LAYER:
        s[O.HEAPS] = setup.world.layers // len(setup.world.capacity_bytes)
    s[O.ORDER] = setup.options.residents
    if s[O.ORDER] < 0:
        s[O.ORDER] = _order(KEEPS[type(keep)], setup)


def _order(keep: Keep, setup: Setup) -> Order:
    """How residents are kept; the answer does not depend on it."""
    order = ORDERS.get(keep, Order.SCAN)
    smallest = int(setup.world.expert_bytes[0].min())
    slots = max(setup.world.capacity_bytes) // max(1, smallest)
    if order == Order.HEAP and setup.world.owners is not None:
        # A layer event is of several caches, and heaps are put in order for one.
        return Order.SCAN
    return Order.SCAN if order == Order.HEAP and slots <= FEW_SLOTS else order


def listens(policy: Policy) -> bool:
    """Whether anything of a policy has a ``note`` of its own."""
    parts = policy.seats if isinstance(policy, SeatPolicy) else (policy,)
    return any(type(part).note not in (Seat.note, PlainPolicy.note) for part in parts)


def _keys(setup: Setup, seats: SeatPolicy | None, sizes: Sequence[int]) -> IntArray:
    world = setup.world
    ledger = Ledger(
        world.expert_bytes,
        world.experts,
        world.capacity_bytes,
        allocator=setup.options.allocator,
        caches=world.caches,
    )
    keys = len(ledger.state)
    # Behind the keys are the heads of the lists: of each cache, and of host memory.
    whole = np.zeros((len(K) + len(X), keys + len(world.capacity_bytes) + 1), np.int64)
    whole[K.IS_NEAR] = 1
    for name in (K.MEMBER, K.BLAMED, K.VICTIM, K.NAMED, K.WISHED, K.REPLACES, K.DUE):
        whole[name] = -1
    k = whole[:, :keys]
    k[K.CACHE] = k[K.HEAP] = ledger.cache_of
    if seats is not None and KEEPS[type(seats.keep)] in BY_LAYER:
        k[K.HEAP] = np.arange(keys) % world.size // world.experts
    if world.owners is not None:
        k[K.OWNER] = np.tile(world.owners, len(world.expert_bytes))
    k[K.BYTES] = ledger.bytes_of
    k[K.COPY] = ledger.copy_bytes
    places = k[K.CACHE] + k[K.BYTES] * len(world.capacity_bytes)
    k[K.PLACE] = np.unique(places, return_inverse=True)[1]
    k[K.CURVE] = np.searchsorted(sizes, k[K.COPY])
    k[K.LOAD_NS] = np.array([setup.costs.load_ns(size) for size in sizes])[k[K.CURVE]]
    if seats is not None:
        keep = seats.keep
        k[X.SCORE, : world.size] = keep.score
        if isinstance(keep, LFRU):
            k[X.LAST, : world.size] = keep.last
        if isinstance(keep, LeastStale):
            k[X.LAST, : world.size] = keep.touched
        if isinstance(keep, MapFrequency):
            k[X.LAST, : world.size] = keep.share
    return whole


def _caches(setup: Setup, seats: SeatPolicy | None, keys: int) -> IntArray:
    caches = len(setup.world.capacity_bytes)
    by_layer = seats is not None and KEEPS[type(seats.keep)] in BY_LAYER
    heaps = setup.world.layers if by_layer else caches
    c = np.zeros((len(C), max(heaps, caches)), np.int64)
    c[C.HEAP, :heaps] = np.arange(heaps) * (keys // heaps)
    c[C.CAPACITY, :caches] = c[C.WHOLE, :caches] = setup.world.capacity_bytes
    held = np.bincount(setup.world.caches, minlength=caches) * (keys // setup.world.size)
    c[C.FIRST, 1:caches] = np.cumsum(held)[:-1]
    c[C.LIMIT, :caches] = getattr(seats.keep, "limit", 0) if seats else 0
    return c


def _known(seats: SeatPolicy | None, layers: int, experts: int) -> IntArray:
    known = np.zeros((layers, 1 + experts), np.int64)
    if seats is not None and isinstance(seats.prefetch, HotSet):
        width = seats.prefetch.hot.shape[1]
        known[:, 0] = width
        known[:, 1 : 1 + width] = seats.prefetch.hot
    return known


def _future(future: KnownFuture | None) -> tuple[IntArray, AnyArray]:
    if future is None:
        return np.zeros(1, np.int64), np.zeros(1, np.int32)
    starts, ids, _ = future.table
    return starts, ids


# ---- from arrays to a tally ----------------------------------------------------------------------


def _read(m: M, tally: Tally) -> None:
    s: Callable[[S], int] = lambda row: int(m.s[row])  # noqa: E731
    for phase in Phase:
        tally.phases[phase] = _counts(m, phase)
    fates = tally.prefetch
    fates.planned, fates.overtaken, fates.dropped = s(S.PLANNED), s(S.OVERTAKEN), s(S.DROPPED)
    fates.issued, fates.polluting = s(S.ISSUED), s(S.POLLUTING)
    for fate in FATES:
        fates.count[fate] = s(S[fate.upper()])
        fates.nbytes[fate] = s(S[f"{fate.upper()}_BYTES"])
    times = tally.times
    times.dense, times.experts, times.sync = s(S.T_DENSE), s(S.T_EXPERTS), s(S.T_SYNC)
    times.plan, times.stall = s(S.T_PLAN), s(S.T_STALL)
    times.cpu_wait, times.idle = s(S.T_CPU), s(S.T_IDLE)
    times.exchange = s(S.T_EXCHANGE)
    tally.layer_stall_ns = m.counts[2, : len(tally.layer_stall_ns)].tolist()
    tally.served = {
        "fetch": s(S.SERVED_FETCH),
        "cpu": s(S.SERVED_CPU),
        "skip": s(S.SERVED_SKIP),
    }
    tally.evictions, tally.evicted_bytes = s(S.EVICTIONS), s(S.EVICTED_BYTES)
    tally.written_bytes = tally.evicted_bytes if m.s[O.WRITE_BACK] else 0
    tally.link_busy_ns = s(S.LINK_BUSY)
    tally.cancelled_bytes, tally.in_flight_bytes = s(S.MOVED_OF_CANCELLED), s(S.IN_FLIGHT_BYTES)
    there = (m.state == State.RESIDENT) & (m.k[K.OWNER, : len(m.state)] == m.s[O.NUMBER])
    tally.resident_bytes = int(m.k[K.COPY, : len(m.state)][there].sum())
    tally.predicted, tally.named = s(S.PREDICTED), s(S.NAMED)
    tally.largest_union_bytes, tally.overflows = s(S.LARGEST_UNION), s(S.OVERFLOWS)
    tally.events = s(S.EVENT) + 1
    tally.peak_bytes = s(S.PEAK)
    tally.log_digest = LogDigest.of(s(S.LOG_SUM), s(S.LOG_WORDS))
    tally.decision_digest = LogDigest.of(s(S.CHOICE_SUM), s(S.CHOICE_WORDS))


def _read_device(m: M, tally: Tally) -> None:
    """What one of several devices counts for itself."""
    whole = Tally(layer_stall_ns=tally.layer_stall_ns)
    _read(m, whole)
    for name in ("phases", "prefetch", "layer_stall_ns"):
        setattr(tally, name, getattr(whole, name))
    for name in GATHERED:
        if not name.startswith("initial"):
            setattr(tally, name, getattr(whole, name))
    for name in ("experts", "stall", "cpu_wait"):
        setattr(tally.times, name, getattr(whole.times, name))
    tally.slowest = int(m.s[S.SLOWEST])


def _read_tier(m: M, reads: Reads) -> None:
    s: Callable[[S], int] = lambda row: int(m.s[row])  # noqa: E731
    reads.reads, reads.bytes_read, reads.busy_ns = s(S.READS), s(S.BYTES_READ), s(S.READ_NS)
    reads.dram_hits, reads.dram_misses = s(S.DRAM_HITS), s(S.DRAM_MISSES)
    reads.evictions, reads.evicted_bytes = s(S.DRAM_EVICTIONS), s(S.DRAM_EVICTED)
    copies, sent = m.k[K.COPY, : len(m.state)], m.k[K.READ_SENT, : len(m.state)]
    chunk = int(m.s[O.READ_CHUNK])
    held = np.minimum(copies, sent * chunk) if chunk else copies * sent
    reads.resident_bytes = int(held[sent > 0].sum())


def _counts(m: M, phase: Phase) -> Counts:
    counts = Counts(*m.counts[phase, : len(Counts.__slots__)].tolist())
    unit = int(m.s[O.UNIT])
    if unit:
        # The closed form leaves these to be multiplied out here.
        counts.access_bytes = counts.accesses * unit
        counts.hit_bytes = counts.hits * unit
        counts.late_bytes = counts.late_hits * unit
        counts.miss_bytes = counts.misses * unit
    return counts


def _audit(tally: Tally, now_ns: int) -> None:
    broken = tally.broken_laws(now_ns)
    if broken:
        raise AssertionError(f"the run broke {', '.join(broken)}: {tally}")
