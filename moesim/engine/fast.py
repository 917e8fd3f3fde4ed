"""The fast engine: the reference engine's answers, from compiled code.

Same interface and same results to the nanosecond as ``moesim.engine.reference``, for policies made
of built-in seats. This file feeds ``moesim.engine.kernel`` with arrays and reads them out; the
rules are there, what the arrays hold is in ``moesim.engine.fields``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moesim.engine import block, kernel
from moesim.engine.block import BlockMaker
from moesim.engine.clock import TOO_LONG
from moesim.engine.compiled import load
from moesim.engine.fields import C, D, E, K, Keep, O, Q, S, T, W, Wish, X
from moesim.engine.setup import Setup
from moesim.errors import UsageError
from moesim.ledger import Ledger
from moesim.log import LogDigest
from moesim.policies.belady import MinBypass, MinForced
from moesim.policies.cpu import CPU
from moesim.policies.exact import Exact
from moesim.policies.fetch import Fetch
from moesim.policies.fiddler import Fiddler
from moesim.policies.fifo import FIFO
from moesim.policies.hot_set import HotSet
from moesim.policies.least_stale import LeastStale
from moesim.policies.lfru import LFRU
from moesim.policies.lfu import LFU, LFUInCache
from moesim.policies.lfu_decay import LFUDecay
from moesim.policies.look_ahead import LookAhead
from moesim.policies.lru import LRU
from moesim.policies.next_gate import NextGate
from moesim.policies.no_prefetch import NoPrefetch
from moesim.policies.previous_token import PreviousToken
from moesim.policies.random_victim import Random
from moesim.policies.slru import SLRU
from moesim.policies.static import Static
from moesim.policies.whole_layer import WholeLayer
from moesim.protocol import Policy, SeatPolicy, restrict
from moesim.tally import FATES, Counts, RequestTimes, Tally
from moesim.timeline import LANES
from moesim.types import NEVER, IntArray, Needs, Phase, Serve, State
from moesim.workload import DONE, STARVED, Idle, KnownFuture, Step, Work, context_tokens

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
SERVES: dict[type, int] = {Fetch: Serve.FETCH, CPU: Serve.CPU, Fiddler: Serve.SKIP}
"""The miss seats; the kernel reads ``SKIP`` as "the quicker of the two"."""

BLOCK_EVENTS = 1 << 16
"""Layer events that are prepared at once."""
SPANS = 1 << 14


def compiled(policy: Policy) -> bool:
    """Whether a policy is made of seats that the compiled core knows."""
    return (
        isinstance(policy, SeatPolicy)
        and type(policy.keep) in KEEPS
        and type(policy.prefetch) in WISHES
        and type(policy.miss) in SERVES
        and type(policy.routing) is Exact
    )


class FastEngine:
    """One configuration on one device; use it as ``ReferenceEngine``."""

    def __init__(self, setup: Setup) -> None:
        if not compiled(setup.policy):
            raise UsageError(
                "the fast engine runs policies made of built-in seats only; "
                "use --engine reference for this one"
            )
        assert isinstance(setup.policy, SeatPolicy)
        self.setup = setup
        self.policy = setup.policy
        self.policy.begin(restrict(setup.world, self.policy.needs))
        self.tally = Tally(layer_stall_ns=[0] * setup.world.layers)
        self.spans: list[tuple[str, int, int, int]] | None = [] if setup.options.timeline else None
        self._future = self._needed_future()
        self._machine = _machine(setup, self.policy, self._future)
        load(*kernel.calls(self._machine), *block.calls())
        self._blocks = BlockMaker(
            setup.costs,
            setup.world.experts,
            flat=setup.options.flat,
            distance=getattr(self.policy.prefetch, "distance", 1) if self._reads_ahead() else 0,
            width=getattr(self.policy.prefetch, "width", 0),
            cpu=not isinstance(self.policy.miss, Fetch),
        )
        self._times: dict[int, RequestTimes] = {}
        self._closed = False
        self._done = False
        self._timed = False
        self._fill()

    # ---- feeding ---------------------------------------------------------------------------------

    def offer(self, work: Work) -> None:
        """The next request of the trace."""
        self._timed = self._timed or work.arrival_ns is not None
        self.setup.scheduler.offer(work)

    def close(self) -> None:
        """No request follows."""
        self.setup.scheduler.close()

    def advance(self) -> bool:
        """Run until the run is done (True) or the next request is needed (False)."""
        while not self._done:
            steps, verdict = self._gather()
            if steps:
                self._serve(steps)
            if isinstance(verdict, Idle):
                self._idle(verdict.until_ns)
            elif verdict == STARVED:
                return False
            elif verdict == DONE:
                self._finish()
        return True

    def _gather(self) -> tuple[list[Step], Idle | str | None]:
        """Steps that can be prepared now. With arrivals a step may depend on the one before."""
        steps: list[Step] = []
        events = 0
        while events < BLOCK_EVENTS:
            step = self.setup.scheduler.next_step(self._now)
            if not isinstance(step, Step):
                return steps, step
            steps.append(step)
            events += self.setup.world.layers
            if self._timed:
                break
        return steps, None

    @property
    def _now(self) -> int:
        return int(self._machine.s[S.NOW])

    # ---- running ---------------------------------------------------------------------------------

    def _serve(self, steps: Sequence[Step]) -> None:
        made = self._blocks.make(steps, self._future, [self._kv_bytes(s) for s in steps])
        machine = self._machine._replace(
            ev=made.events, dem=made.demand, said=made.said, st=made.steps
        )
        machine.s[S.STEP] = 0
        kernel.schedule_step(machine)
        self._run(machine)
        for step, row in zip(steps, made.steps.tolist(), strict=True):
            self._account(step, row)

    def _idle(self, until_ns: int) -> None:
        kernel.schedule_idle(self._machine, until_ns)
        self._run(self._machine)

    def _run(self, machine: kernel.M) -> None:
        stopped = kernel.SPANS_FULL
        while stopped == kernel.SPANS_FULL:
            stopped = kernel.run(machine)
            self._drain(machine)
        if stopped == kernel.TOO_LONG:
            raise UsageError(TOO_LONG)

    def _drain(self, machine: kernel.M) -> None:
        if self.spans is None:
            return
        count = int(machine.s[S.N_SPANS])
        for lane, start, end, key in machine.spans[:count].tolist():
            self.spans.append((LANES[lane], start, end, key))
        machine.s[S.N_SPANS] = 0

    def _kv_bytes(self, step: Step) -> int:
        """What the KV cache takes of each cache; -1 where it has memory of its own."""
        if not self.setup.options.share_kv:
            return -1
        whole = self.setup.world.capacity_bytes
        context = sum(context_tokens(part) for part in step.parts)
        taken = context * self.setup.kv_bytes_per_token // len(whole)
        self.setup.refuse_crowded(context, [max(0, c - taken) for c in whole])
        return taken

    def _account(self, step: Step, row: list[int]) -> None:
        """A step's share in the times of its requests, as the reference keeps them."""
        for part in step.parts:
            work = part.work
            if part.number == 0 and part.begins:
                begin = row[T.BEGIN_NS]
                arrival = begin if work.arrival_ns is None else work.arrival_ns
                prompt = work.rows.facts.prompt_tokens or 0
                self._times[work.index] = RequestTimes(work.rows.request, arrival, begin, prompt)
            times = self._times[work.index]
            times.stall_ns += row[T.STALL_NS]
            times.misses += row[T.MISSES]
            if part.ends:
                times.output_tokens += 1
                if times.first_token_ns < 0:
                    times.first_token_ns = row[T.END_NS]
                if part.number == work.iterations - 1:
                    times.end_ns = row[T.END_NS]
        self.tally.steps += 1

    # ---- beginning and end -----------------------------------------------------------------------

    def _reads_ahead(self) -> bool:
        return Needs.AHEAD in self.policy.prefetch.needs

    def _needed_future(self) -> KnownFuture | None:
        future = self.setup.world.future if Needs.FUTURE in self.policy.needs else None
        assert future is None or isinstance(future, KnownFuture)
        return future

    def _fill(self) -> None:
        """``ReferenceEngine._fill``."""
        m, tally = self._machine, self.tally
        for expert in self.setup.initial:
            nbytes = int(m.k[K.COPY, expert])
            if self.setup.initial_charged:
                duration = self.setup.costs.load_ns(nbytes)
                m.s[S.NOW] += duration
                tally.times.initial += duration
                m.s[S.LINK_BUSY] += duration
            kernel.place(m, expert)
            tally.initial_loads += 1
            tally.initial_bytes += nbytes

    def _finish(self) -> None:
        """``Link.finish``, and the arrays as a tally."""
        m = self._machine
        kernel.finish(m)
        _read(m, self.tally)
        self.tally.requests = list(self._times.values())
        if self.setup.options.check:
            _audit(self.tally, self._now)
        self._done = True


# ---- from a setup to arrays ----------------------------------------------------------------------


def _machine(setup: Setup, policy: SeatPolicy, future: KnownFuture | None) -> kernel.M:
    world = setup.world
    experts = world.experts
    sizes = sorted({int(b) for b in world.expert_bytes[0]})
    distance = max(1, getattr(policy.prefetch, "distance", 1))
    wishes = experts * (distance + 1 if isinstance(policy.prefetch, LookAhead) else 2)
    workers = setup.costs.hardware.host.workers
    width = max(world.size, 2 * experts + 2, workers + 1)
    machine = kernel.M(
        s=_scalars(setup, policy, future),
        k=_keys(setup, policy, sizes),
        c=_caches(setup, policy),
        w=np.zeros((len(W), workers), np.int64),
        q=np.zeros((len(Q), width), np.int64),
        cur=np.zeros((len(D), experts), np.int64),
        ends=_curves([setup.costs.chunk_ends(size) for size in sizes]),
        named=np.full((distance + 2, experts + 2), -1, np.int64),
        plan=np.zeros((wishes + experts, 3), np.int64),
        known=_known(policy, world.layers, experts),
        future=_future(policy, future),
        counts=np.zeros((3, max(len(Counts.__slots__), world.layers)), np.int64),
        spans=np.zeros((SPANS, 4), np.int64),
        ev=np.zeros((1, len(E)), np.int64),
        dem=np.zeros((1, int(D.STATUS)), np.int64),
        said=np.zeros(1, np.int64),
        st=np.zeros((1, len(T)), np.int64),
    )
    machine.w[W.TIME] = NEVER
    machine.q[Q.ASLEEP, :workers] = np.arange(workers)
    return machine


def _curves(chunk_ends: Sequence[tuple[int, ...]]) -> IntArray:
    ends = np.zeros((len(chunk_ends), 1 + max(map(len, chunk_ends))), np.int64)
    for row, curve in enumerate(chunk_ends):
        ends[row, 0] = len(curve)
        ends[row, 1 : 1 + len(curve)] = curve
    return ends


def _scalars(setup: Setup, policy: SeatPolicy, future: KnownFuture | None) -> IntArray:
    world, options, costs = setup.world, setup.options, setup.costs
    prefetch, keep = policy.prefetch, policy.keep
    equal = len(set(world.expert_bytes[0].tolist())) == 1
    s = np.zeros(len(S) + len(O), np.int64)
    s[S.EVENT] = s[S.L_KEY] = -1
    s[S.C_TIME] = s[S.L_TIME] = NEVER
    s[S.ASLEEP_TAIL] = costs.hardware.host.workers
    s[O.LAYERS], s[O.EXPERTS], s[O.SIZE] = world.layers, world.experts, world.size
    s[O.CACHES] = len(world.capacity_bytes)
    s[O.KEEP] = KEEPS[type(keep)]
    s[O.PREFETCH] = WISHES[type(prefetch)]
    s[O.MISS] = SERVES[type(policy.miss)]
    s[O.BYPASS] = policy.bypass
    s[O.BARRIER] = options.order == "barrier"
    s[O.STAGING] = world.top_k
    s[O.SYNC], s[O.PLAN] = costs.sync_ns, costs.plan_ns
    s[O.DISTANCE] = getattr(prefetch, "distance", 1)
    s[O.CANCEL] = getattr(prefetch, "cancel", False)
    s[O.DECODE_FROM] = world.decode_from
    s[O.FACTOR] = getattr(keep, "factor", 0)
    s[O.SEED] = world.seed
    s[O.CHUNK] = costs.hardware.link.chunk_bytes
    s[O.WORKERS] = costs.hardware.host.workers
    s[O.SPANS] = options.timeline
    s[O.RUN_EVENTS] = future.events if future is not None else 0
    s[O.ONE_VICTIM] = equal and not options.share_kv
    return s


def _keys(setup: Setup, policy: SeatPolicy, sizes: Sequence[int]) -> IntArray:
    world, keep = setup.world, policy.keep
    ledger = Ledger(
        world.expert_bytes,
        world.experts,
        world.capacity_bytes,
        allocator=setup.options.allocator,
    )
    k = np.zeros((len(K) + len(X), world.size), np.int64)
    k[K.CACHE] = ledger.cache_of[: world.size]
    k[K.BYTES] = ledger.bytes_of[: world.size]
    k[K.COPY] = ledger.copy_bytes[: world.size]
    places = k[K.CACHE] + k[K.BYTES] * len(world.capacity_bytes)
    k[K.PLACE] = np.unique(places, return_inverse=True)[1]
    k[K.CURVE] = np.searchsorted(sizes, k[K.COPY])
    k[K.LOAD_NS] = np.array([setup.costs.load_ns(size) for size in sizes])[k[K.CURVE]]
    k[K.STATE] = State.ABSENT
    for name in (K.MEMBER, K.BLAMED, K.VICTIM, K.NAMED, K.WISHED):
        k[name] = -1
    k[X.SCORE] = keep.score
    if isinstance(keep, LFRU):
        k[X.LAST] = keep.last
    if isinstance(keep, LeastStale):
        k[X.LAST] = keep.touched
    return k


def _caches(setup: Setup, policy: SeatPolicy) -> IntArray:
    world = setup.world
    caches = len(world.capacity_bytes)
    c = np.zeros((len(C), caches), np.int64)
    c[C.CAPACITY] = c[C.WHOLE] = world.capacity_bytes
    c[C.FIRST] = np.arange(caches) * (world.size // caches)
    c[C.LIMIT] = getattr(policy.keep, "limit", 0)
    return c


def _known(policy: SeatPolicy, layers: int, experts: int) -> IntArray:
    known = np.zeros((layers, 1 + experts), np.int64)
    if isinstance(policy.prefetch, HotSet):
        width = policy.prefetch.hot.shape[1]
        known[:, 0] = width
        known[:, 1 : 1 + width] = policy.prefetch.hot
    return known


def _future(policy: SeatPolicy, future: KnownFuture | None) -> IntArray:
    if future is None or not isinstance(policy.prefetch, LookAhead):
        return np.zeros(1, np.int64)
    starts, ids, _ = future.table
    return np.concatenate([starts, ids.astype(np.int64)])


# ---- from arrays to a tally ----------------------------------------------------------------------


def _read(m: kernel.M, tally: Tally) -> None:
    s: Callable[[S], int] = lambda row: int(m.s[row])  # noqa: E731
    for phase in Phase:
        tally.phases[phase] = Counts(*m.counts[phase, : len(Counts.__slots__)].tolist())
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
    tally.layer_stall_ns = m.counts[2, : len(tally.layer_stall_ns)].tolist()
    tally.served = {
        "fetch": s(S.SERVED_FETCH),
        "cpu": s(S.SERVED_CPU),
        "skip": s(S.SERVED_SKIP),
    }
    tally.evictions, tally.evicted_bytes = s(S.EVICTIONS), s(S.EVICTED_BYTES)
    tally.link_busy_ns = s(S.LINK_BUSY)
    tally.cancelled_bytes, tally.in_flight_bytes = s(S.MOVED_OF_CANCELLED), s(S.IN_FLIGHT_BYTES)
    tally.resident_bytes = int(m.k[K.COPY][m.k[K.STATE] == State.RESIDENT].sum())
    tally.predicted, tally.named = s(S.PREDICTED), s(S.NAMED)
    tally.largest_union_bytes, tally.overflows = s(S.LARGEST_UNION), s(S.OVERFLOWS)
    tally.events = s(S.EVENT) + 1
    tally.peak_bytes = s(S.PEAK)
    tally.log_digest = LogDigest.of(s(S.LOG_SUM), s(S.LOG_WORDS))
    tally.decision_digest = LogDigest.of(s(S.CHOICE_SUM), s(S.CHOICE_WORDS))


def _audit(tally: Tally, now_ns: int) -> None:
    broken = tally.broken_laws(now_ns)
    if broken:
        raise AssertionError(f"the run broke {', '.join(broken)}: {tally}")
