"""Replay: one trace, many configurations, one pass.

``replay`` reads the trace once and feeds every configuration's engine request by request, then
turns what they counted into summaries (``moesim/README.md`` defines each number).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moesim import ladder, ties
from moesim.capacity import Capacity, parse_capacity, parse_dram
from moesim.costs import make_costs
from moesim.degrade import Allowed, lacking, rested_on
from moesim.diagnose import diagnostics
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Dram, Options, Setup
from moesim.errors import MoesimError, NotRunError, PolicyError, TraceError, UsageError
from moesim.past import Past, Share, past_facts, requests_of
from moesim.placement import divide, place
from moesim.profile import HardwareProfile, ModelProfile
from moesim.protocol import Policy, SeatPolicy, World, has_mixed, initially
from moesim.registry import PolicySpec, resolve
from moesim.result import RunStore, digest_of, host_facts, request_times, source_digest
from moesim.serve.arrivals import BACK_TO_BACK, LOG, RECORDED, digest_of_log, parse_arrivals
from moesim.serve.continuous import ContinuousBatch, kv_room
from moesim.serve.options import DECODE_FIRST, STATIC, Serving
from moesim.serve.report import report
from moesim.serve.stream import Bank, Plan, Recorded, is_plain, plan_of, queue_of
from moesim.shape import all_precisions, decode_from, expert_norms, fitting, shaped, shelved
from moesim.summary import summarise
from moesim.tally import Tally
from moesim.timeline import chrome_events
from moesim.traces.check import check_request
from moesim.traces.reader import Columns, TraceReader
from moesim.traces.schema import TraceMeta
from moesim.types import AnyArray, ExpertId, Fact, IntArray, Needs
from moesim.workload import (
    Inputs,
    KnownFuture,
    Scheduler,
    StaticBatch,
    Step,
    Work,
    flat_events,
    layer_events,
    prepare,
    timeless_steps,
)


@dataclass(frozen=True, slots=True)
class Request:
    """What to replay. Names are those of the command line."""

    trace: Path
    hardware: HardwareProfile
    policies: Sequence[str] = ("lru",)
    capacities: Sequence[str | Capacity] = ("25%",)
    settings: Sequence[str] = ()
    scope: str = "global"
    costs: ModelProfile | None = None
    options: Options = field(default_factory=Options)
    batch: int = 1
    chunk_tokens: int = 0
    arrivals: str = "back-to-back"
    """As typed; ``moesim.serve.arrivals`` reads it."""
    serving: Serving = field(default_factory=Serving)
    initial: str = ""
    initial_experts: tuple[ExpertId, ...] = ()
    calibration: Path | None = None
    share: Share | None = None
    """Serve one part of the trace alone; the train part is the past, unless ``calibration`` is."""
    allowed: Allowed = field(default_factory=Allowed)
    limit: int | None = None
    seed: int = 0
    devices: int = 0
    """0: as many as the hardware profile says."""
    placement: str = "round-robin"
    ladder: bool = False
    dram: str = ""
    """Room of host memory for experts; empty: it holds all of them."""
    precisions: tuple[str, ...] = ()
    """What the experts are held in, the largest first; empty: as the model profile says."""
    engine: str = "fast"
    """"fast" or "reference"."""
    out: Path | None = None
    batch_rows: int = 65536


class Fed(Protocol):
    """What takes the requests of a trace, one after the other."""

    def offer(self, work: Work) -> None:
        """The next request of the trace."""

    def close(self) -> None:
        """No request follows."""

    def advance(self) -> bool:
        """Run until the run is done (True) or the next request is needed (False)."""


class Engine(Fed, Protocol):
    """What a replay drives; both engines give the same answers."""

    setup: Setup
    tally: Tally
    spans: list[tuple[str, int, int, int]] | None

    @property
    def policy(self) -> Policy:
        """The policy that it runs."""


FACTS_ONLY = replace(Columns.experts_only(), facts=True)

Progress = Callable[[int, int], None]
"""Called with (requests replayed, requests in all)."""


@dataclass(slots=True)
class _Run:
    """One configuration under way."""

    spec: PolicySpec
    capacity: Capacity
    inputs: Inputs
    manifest: dict[str, Any]
    run_id: str
    engine_name: str
    engine: Engine | None = None
    summary: dict[str, Any] | None = None
    tpot_ns: AnyArray = field(default_factory=lambda: np.zeros(0))
    """float64 [requests], by request; NaN without one."""
    rung: str = ""
    owner: _Replay | None = None
    """Whose request it follows: a rung of the ladder has one of its own."""


@dataclass(slots=True)
class _Driver:
    """What is fed: one engine, or several that share their blocks.

    given_up : why its policy will serve no further; empty while it does.
    """

    runs: Sequence[_Run]
    fed: Fed
    given_up: str = ""

    @property
    def inputs(self) -> Inputs:
        """What its policies read."""
        return self.runs[0].inputs

    def offer(self, work: Work) -> None:
        """Serve as far as the next request of the trace allows, unless a policy has given up."""
        with self._attending():
            if not self.given_up:
                self.fed.offer(work)
                self.fed.advance()

    def close(self) -> None:
        """Serve what is left."""
        with self._attending():
            if not self.given_up:
                self.fed.close()
                while not self.fed.advance():
                    pass

    @contextmanager
    def _attending(self) -> Iterator[None]:
        try:
            with _blaming(self.runs[0].spec):
                yield
        except NotRunError as error:
            self.given_up = _reason(error)


def replay(request: Request, progress: Progress | None = None) -> dict[str, Any]:
    """Replay a trace; the object that ``--json`` prints.

    Raises
    ------
    MoesimError
        For a mistake in the request, the trace or a policy. A policy that needs what the trace
        lacks is listed as not run, unless it is the only one: then NotRunError.
    """
    return _Replay(request).run(progress)


def check(request: Request) -> None:
    """Refuse what ``replay`` would refuse before it replays, whatever the policy.

    Raises
    ------
    MoesimError
        For a mistake in the options, or options that the trace does not bear.
    """
    whole = _Replay(replace(request, out=None))
    whole._capacities()
    digest_of_log(whole.arrivals)


class _Replay:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.meta = _meta(request.trace)
        _refuse_empty(self.meta, request.trace)
        self.model = shaped(request.costs or self.meta.model, self.meta)
        self.shipped = self.model.precisions[0]
        if request.precisions:
            self.model = self.model.held_in(request.precisions)
        hardware = request.hardware
        self.hardware = hardware.tiered() if request.dram else hardware.untiered()
        self.costs = make_costs(self.model, self.hardware)
        sizes = all_precisions(self.model)
        self.dram_bytes = parse_dram(request.dram, sizes, self.meta.experts) if request.dram else 0
        self._refuse_together()
        self.store = RunStore(request.out) if request.out else None
        self.arrivals = parse_arrivals(request.arrivals)
        self._streams: dict[tuple[Inputs, ...], list[Bank]] = {}
        self._future: KnownFuture | None = None
        self._calibration: IntArray | None = None
        self._in_hindsight = False
        self._diagnosis: dict[str, Any] | None = None

    def _refuse_together(self) -> None:
        """UsageError for what no rule of the clock says how to join with a drive."""
        if not self.request.dram:
            return
        if self.devices > 1:
            raise UsageError(
                f"--dram {self.request.dram}: a drive behind several devices is not modelled; "
                "leave it out, or give --devices 1"
            )
        if self.request.options.write_back:
            raise UsageError(
                f"--dram {self.request.dram}: host memory keeps copies, so nothing is written "
                "back; leave out --write-back"
            )

    # ---- the whole -------------------------------------------------------------------------------

    def run(self, progress: Progress | None) -> dict[str, Any]:
        started = time.perf_counter()
        planned, refused = self._plan()
        if not planned:
            raise NotRunError(refused[0]["not_run"])
        given_up = self._feed([r for r in planned if r.engine is not None], progress)
        refused += [_not_run(run.spec, run.capacity, why) for run, why in given_up]
        planned = [run for run in planned if not any(run is one for one, _ in given_up)]
        if not planned:
            raise NotRunError(refused[0]["not_run"])
        wall_s = (time.perf_counter() - started) / max(1, len(planned))
        finished = [(run.rung, (run.owner or self)._finish(run, wall_s)) for run in planned]
        reported = [summary for rung, summary in finished if not rung]
        ties.mark(reported, [run.tpot_ns for run in planned if not run.rung], self.request.seed)
        if self.request.ladder:
            self._climb(reported, [pair for pair in finished if pair[0]])
        return {
            "schema": 1,
            "trace": self._trace_facts(),
            "model": self.model.name,
            "hardware": self.request.hardware.name,
            "costs": self.request.costs.name if self.request.costs else None,
            "source": self.costs.weakest_source,
            "diagnostics": [self._diagnose(c) for c in self._capacities()],
            "runs": [*reported, *refused],
        }

    def _plan(self) -> tuple[list[_Run], list[dict[str, Any]]]:
        """The configurations that can run, and those that cannot, with the reason."""
        planned, refused = [], []
        for spec in resolve(self.request.policies, self.request.settings):
            try:
                with _blaming(spec):
                    policy = spec.build()
            except NotRunError as error:
                refused += [_not_run(spec, c, _reason(error)) for c in self._capacities()]
                continue
            inputs = Inputs(policy.needs, _distances(policy), self.request.allowed)
            for capacity in self._capacities():
                try:
                    self._refuse(spec, policy, inputs)
                    with _blaming(spec):
                        planned.append(self._configure(spec, capacity, inputs))
                except NotRunError as error:
                    refused.append(_not_run(spec, capacity, _reason(error)))
        if self.request.ladder and planned:
            planned += self._rungs()
        return planned, refused

    def _capacities(self) -> list[Capacity]:
        sizes = self.model.expert_bytes_table()
        return [
            given
            if isinstance(given, Capacity)
            else parse_capacity(given, self.request.scope, sizes, self.meta.experts)
            for given in self.request.capacities
        ]

    def _configure(self, spec: PolicySpec, capacity: Capacity, inputs: Inputs) -> _Run:
        name = self.request.engine
        manifest = self._manifest(spec, capacity, name)
        run = _Run(spec, capacity, inputs, manifest, digest_of(manifest)[:16], name)
        # What a policy from outside imports may have changed unseen, so it always runs afresh.
        if self.store is not None and not spec.foreign:
            timeline = self.request.options.timeline
            run.summary = self.store.finished(run.run_id, timeline=timeline)
        if run.summary is None:
            run.engine = _engine(name, self._setup(run))
        return run

    def _rungs(self) -> list[_Run]:
        """The runs that the oracle ladder compares with."""
        if self.devices > 1:
            raise UsageError(
                "--ladder: its rungs are those of one device; leave out --devices, or say "
                "--devices 1 beside a profile of several"
            )
        if self._is_timed:
            raise UsageError("--ladder: its rungs see the future; leave out --arrivals")
        runs = [
            self._rung(name, resolve([name])[0], capacity)
            for capacity in self._capacities()
            for name in ladder.RUNGS
        ]
        everything = (int(self.model.expert_bytes_table().sum()) * self.meta.experts,)
        spec = replace(resolve(["lru"])[0], initial="all")
        return [*runs, self._rung(ladder.ROOF, spec, Capacity("100%", "global", everything))]

    def _rung(self, name: str, spec: PolicySpec, capacity: Capacity) -> _Run:
        """A rung means the same whatever the run starts from and is calibrated on."""
        options = self.request.options
        if name == ladder.ROOF:
            options = replace(options, share_kv=False)
        apart = replace(self.request, initial="", calibration=None, options=options)
        whole = _Replay(apart)
        whole._future = self._future = self.future()
        whole._calibration, whole._in_hindsight = self._future.counts, True
        run = whole._configure(spec, capacity, Inputs(spec.build().needs))
        run.rung, run.owner = name, whole
        return run

    def _climb(
        self, runs: Sequence[dict[str, Any]], rungs: Sequence[tuple[str, dict[str, Any]]]
    ) -> None:
        roof = next(summary for rung, summary in rungs if rung == ladder.ROOF)
        by_capacity = {(rung, summary["capacity"]): summary for rung, summary in rungs}
        load_ns = int(self.costs.load_ns(int(self.model.expert_bytes_table().min())))
        ladder.climb(runs, by_capacity, roof, load_ns)

    # ---- one configuration -----------------------------------------------------------------------

    def _setup(self, run: _Run) -> Setup:
        policy, capacity = run.spec.build(), run.capacity
        owners = self.owners
        world = World(
            layers=self.meta.layers,
            experts=self.meta.experts,
            top_k=self.meta.top_k,
            expert_bytes=all_precisions(self.model),
            capacity_bytes=self._caches(capacity),
            scope=capacity.scope,
            owners=owners,
            decode_from=decode_from(self.meta),
            seed=self.request.seed,
            costs=self.costs,
            calibration=self.calibration() if Needs.CALIBRATION in policy.needs else None,
            expert_norms=expert_norms(self.meta),
            past=self._past(run.inputs) if Needs.PAST in policy.needs else None,
            future=self.future() if Needs.FUTURE in policy.needs else None,
            expert_parts=self.meta.expert_parts,
        )
        if capacity.starts is None:
            initial, charged = self._initial(run.spec, policy, world)
        else:
            initial = fitting(capacity.starts, world, self.request.options.allocator)
            charged = False
        return Setup(
            policy=policy,
            world=world,
            costs=self.costs,
            scheduler=self._scheduler(capacity),
            options=self.request.options,
            initial=initial,
            initial_charged=charged,
            kv_bytes_per_token=int(self.model.kv_bytes_table().sum()),
            warm=self.request.serving.warm,
            dram=self._dram(run, policy, world, initial) if self.request.dram else None,
        )

    def _dram(self, run: _Run, policy: Policy, world: World, initial: Sequence[ExpertId]) -> Dram:
        """Host memory, filled by id, or by use where the device is too; with what the device does
        not hold, if there is no room for all."""
        given, memory = sum(run.capacity.capacity_bytes) + self.dram_bytes, self.hardware.memory
        if memory.unified and given > memory.device_bytes - memory.reserved_bytes:
            raise UsageError(
                f"--dram {self.request.dram}: with --capacity {run.capacity.text} takes {given} "
                f"bytes, and {self.hardware.name} has {memory.device_bytes} less "
                f"{memory.reserved_bytes} for both; give less"
            )
        wanted: Sequence[int] = range(world.size)
        if self._initial_kind(run.spec) == "static":
            wanted = np.argsort(-self.calibration(), kind="stable").tolist()
        there = set(initial)
        wanted = sorted(wanted, key=there.__contains__)
        if has_mixed(policy):
            wanted = [*wanted, *range(world.size, world.expert_bytes.size * world.experts)]
        sizes = world.expert_bytes.repeat(world.experts).tolist()
        return Dram(self.dram_bytes, shelved(wanted, sizes, self.dram_bytes)[::-1])

    def _scheduler(self, capacity: Capacity | None = None) -> Scheduler:
        """Without a capacity: as if there were room for every KV cache."""
        request, serving = self.request, self.request.serving
        queue, until_ns = queue_of(self.arrivals, serving), serving.until_ns
        if serving.scheduler == STATIC:
            return StaticBatch(request.batch, request.chunk_tokens, queue, until_ns)
        return ContinuousBatch(
            request.batch,
            serving.token_budget,
            request.chunk_tokens,
            decode_first=serving.scheduler == DECODE_FIRST,
            kv_tokens=-1 if capacity is None else self._kv_tokens(capacity),
            queue=queue,
            until_ns=until_ns,
        )

    def _kv_tokens(self, capacity: Capacity) -> int:
        if not self.request.options.share_kv:
            return -1
        sizes: list[int] = self.model.expert_bytes_table().tolist()
        per_token = int(self.model.kv_bytes_table().sum())
        return kv_room(self._caches(capacity), sizes, self.meta.top_k, per_token)

    @property
    def devices(self) -> int:
        """How many devices serve."""
        return self.request.devices or self.request.hardware.devices

    @cached_property
    def owners(self) -> IntArray | None:
        """int64 [layers * experts], the device that holds each expert; None: there is one."""
        how, meta = self.request.placement, self.meta
        if self.devices == 1:
            return None
        uses = self.calibration() if how == "load" else None
        return place(how, self.devices, meta.layers, meta.experts, uses)

    def _caches(self, capacity: Capacity) -> tuple[int, ...]:
        """Bytes of each cache."""
        if self.owners is None:
            return capacity.capacity_bytes
        sizes = self.model.expert_bytes_table()
        return divide(capacity.capacity_bytes, sizes, capacity.scope, self.owners)

    def _initial(
        self, spec: PolicySpec, policy: Policy, world: World
    ) -> tuple[list[ExpertId], bool]:
        how, allocator = self._initial_kind(spec), self.request.options.allocator
        if how == "cold":
            return [], True
        if how == "file":
            return fitting(self.request.initial_experts, world, allocator), False
        if how == "all":
            return fitting(range(world.size), world, allocator), False
        if how == "policy":
            return fitting(initially(policy, world), world, allocator), True
        uses = self.calibration()
        ranked = np.argsort(-uses, kind="stable")
        return fitting([int(e) for e in ranked if uses[e]], world, allocator), True

    def _refuse(self, spec: PolicySpec, policy: Policy, inputs: Inputs) -> None:
        """NotRunError where the trace or the model lacks what the policy needs."""
        needs = policy.needs
        if has_mixed(policy) and len(self.model.precisions) == 1:
            raise NotRunError(
                f"not run: {spec.name} executes experts in low precision, and {self.model.name} "
                f"has {self.model.precisions[0]} alone; name a model that has more with --costs, "
                f"or give it one with --precision {self.model.precisions[0]},int4"
            )
        missing = list(lacking(needs, inputs.distances, inputs.allowed, self.meta))
        if missing:
            name, mend = missing[0]
            raise NotRunError(f"not run: {spec.name} needs {name}, which this trace lacks{mend}")
        if Needs.FUTURE in needs and self._is_timed:
            raise NotRunError(
                f"not run: {spec.name} sees the future, which arrivals make depend on the clock; "
                "leave out --arrivals"
            )

    # ---- the passes ------------------------------------------------------------------------------

    @property
    def _is_timed(self) -> bool:
        """Whether what is served when depends on the clock."""
        serving = self.request.serving
        return self.arrivals.kind != BACK_TO_BACK or bool(serving.until_ns or serving.turns)

    @cached_property
    def plan(self) -> Plan:
        """The stream of requests, where they are not served as they stand."""
        with TraceReader(self.request.trace, FACTS_ONLY, self.request.batch_rows) as reader:
            rows = islice(requests_of(reader, self.request.share), self.request.limit)
            recorded = [Recorded.of(place, one) for place, one in enumerate(rows)]
        allowed = self.request.allowed.prefill_from_decode
        try:
            return plan_of(
                self.arrivals,
                self.request.serving,
                recorded,
                self.request.seed,
                prefill_from_decode=allowed,
            )
        except TraceError as error:
            raise TraceError(f"{self.request.trace}: {error}") from None

    def _banks(self, inputs: Sequence[Inputs]) -> list[Bank]:
        """The recordings of the stream, prepared once for each kind of input."""
        kinds = tuple(inputs)
        if kinds not in self._streams:
            used = self.plan.used
            held: list[list[tuple[int, Work]]] = [[] for _ in kinds]
            for place, works in enumerate(self._recorded(kinds)):
                for own, work in zip(held, works if place in used else (), strict=False):
                    own.append((place, work))
            self._streams[kinds] = [Bank() for _ in kinds]
            for bank, own in zip(self._streams[kinds], held, strict=True):
                bank.fill(own)
        return self._streams[kinds]

    def _works(self, inputs: Sequence[Inputs]) -> Iterator[list[Work]]:
        """Each request of the stream, prepared once for each kind of input."""
        if is_plain(self.arrivals, self.request.serving):
            yield from self._recorded(inputs)
            return
        streams = [bank.serve(self.plan) for bank in self._banks(inputs)]
        yield from (list(works) for works in zip(*streams, strict=True))

    def _recorded(self, inputs: Sequence[Inputs]) -> Iterator[list[Work]]:
        """Each request of the trace, prepared once for each kind of input."""
        # Weights are read where they are, if only so that damaged ones are refused.
        columns = replace(_join([i.columns() for i in inputs]), weights=True)
        recorded, share = self.arrivals.kind == RECORDED, self.request.share
        with TraceReader(self.request.trace, columns, self.request.batch_rows) as reader:
            for index, rows in enumerate(islice(requests_of(reader, share), self.request.limit)):
                check_request(rows, self.meta, self.request.trace)
                works = [prepare(index, rows, self.meta, i) for i in inputs]
                for work in works:
                    work.arrival_ns = work.arrival_ns if recorded else None
                    if recorded and work.arrival_ns is None:
                        raise TraceError(
                            f"{self.request.trace}: request {rows.request} has no arrival_ns; "
                            "use --arrivals back-to-back"
                        )
                yield works

    def _feed(self, runs: Sequence[_Run], progress: Progress | None) -> list[tuple[_Run, str]]:
        """One pass: every engine is fed each request, and runs until it needs the next. Runs that
        a policy gave up on the way, and why."""
        kinds = list(dict.fromkeys(run.inputs for run in runs))
        if not runs:
            return []
        total = min(self.meta.requests, self.request.limit or self.meta.requests)
        if not is_plain(self.arrivals, self.request.serving):
            total = len(self.plan.requests)
        drivers = self._drivers(runs)
        for count, works in enumerate(self._works(kinds)):
            for driver in drivers:
                driver.offer(replace(works[kinds.index(driver.inputs)]))
            if progress is not None:
                progress(count + 1, total)
        for driver in drivers:
            driver.close()
        return [(run, d.given_up) for d in drivers if d.given_up for run in d.runs]

    def _drivers(self, runs: Sequence[_Run]) -> list[_Driver]:
        """Engines that may share their blocks are fed as one."""
        if self.request.engine == "reference":
            return [_Driver([run], _made(run)) for run in runs]
        from moesim.engine.fast import FastEngine
        from moesim.engine.feed import Feed

        groups: dict[object, list[tuple[_Run, FastEngine]]] = {}
        for number, run in enumerate(runs):
            engine = _made(run)
            assert isinstance(engine, FastEngine)
            shared = None if self._is_timed else engine.shared_with
            groups.setdefault((run.inputs, shared or number), []).append((run, engine))
        return [
            _Driver([run for run, _ in group], Feed([engine for _, engine in group]))
            for group in groups.values()
        ]

    def _steps(self) -> Iterator[Step]:
        # How often an expert is used is asked for with arrivals too; then as if all were there.
        works = (
            replace(w[0], arrival_ns=None, follows=-1, followed=False)
            for w in self._works([Inputs()])
        )
        batch, chunk_tokens = self.request.batch, self.request.chunk_tokens
        return timeless_steps(
            works, self._scheduler() if not self._is_timed else StaticBatch(batch, chunk_tokens)
        )

    def future(self) -> KnownFuture:
        """The demand of the whole run, from a pass without a clock."""
        if self._future is None:
            size = self.meta.layers * self.meta.experts
            if self.request.engine == "reference":
                self._future = KnownFuture(self._demands(), size)
            else:
                from moesim.engine.future import foresee

                self._future = foresee(self._steps(), self._cutter(), size)
        return self._future

    def uses(self) -> IntArray:
        """How many layer events of the run demand each expert."""
        if self._future is not None or self.request.engine == "reference":
            return self.future().counts
        from moesim.engine.future import uses

        return uses(self._steps(), self._cutter(), self.meta.layers * self.meta.experts)

    def _cutter(self) -> Any:
        from moesim.engine.block import BlockMaker

        flat = self.request.options.flat
        return BlockMaker(self.costs, self.meta.experts, flat=flat, distance=0, width=0, cpu=False)

    def _demands(self) -> Iterator[IntArray]:
        cut = flat_events if self.request.options.flat else layer_events
        event = 0
        for step in self._steps():
            for item in cut(step, event, self.meta.experts):
                yield item.demand.experts
                event += 1

    def calibration(self) -> IntArray:
        """Uses of each expert: in the past, or in hindsight on the trace itself."""
        if self._calibration is None:
            before = self._before()
            self._calibration = self.uses() if before is None else before.uses()
        return self._calibration

    def _past(self, inputs: Inputs) -> Past | None:
        """What past requests told, prepared as for the policy itself."""
        before = self._before()
        if before is None:
            return None
        _refuse_lacking(inputs, before.meta, f"--calibration {before.request.trace}")

        def past() -> Iterator[Fact]:
            works = (replace(w[0], arrival_ns=None) for w in before._works([inputs]))
            return past_facts(works, self.meta.experts)

        return past

    def _before(self) -> _Replay | None:
        """The replay of the past: another trace, or the train part of this one."""
        request = replace(self.request, limit=None, arrivals="back-to-back", serving=Serving())
        path = self.request.calibration
        if path is None:
            share = request.share
            return None if share is None else _Replay(replace(request, share=share.before))
        before = _Replay(replace(request, trace=path, share=None, calibration=None))
        meta = before.meta
        if (meta.layers, meta.experts) != (self.meta.layers, self.meta.experts):
            raise UsageError(
                f"--calibration {path}: has {meta.layers} layers of {meta.experts} experts, the "
                f"trace {self.meta.layers} of {self.meta.experts}; use a trace of the same model"
            )
        return before

    # ---- results ---------------------------------------------------------------------------------

    def _finish(self, run: _Run, wall_s: float) -> dict[str, Any]:
        if run.summary is None:
            assert run.engine is not None
            run.summary = {
                "policy": run.spec.name,
                "set": list(self.request.settings),
                "capacity": run.capacity.text,
                "capacity_bytes": sum(run.capacity.capacity_bytes),
                "scope": run.capacity.scope,
                "engine": run.engine_name,
                "mode": "flat" if self.request.options.flat else "group",
                "oracle": self._is_bound(run),
                "lossy": run.engine.policy.lossy,
                "allowed": self._rested_on(run.inputs.needs),
                "sizes_equal": bool(len(set(self.model.expert_bytes_table().tolist())) == 1),
                "initial": run.manifest["initial"],
                **self._rests_on(),
                **self._several(),
                **summarise(run.engine.tally, self.request.serving.warm),
                "serving": self._serving(run),
            }
            self._store(run, wall_s)
        folder = self.store.path(run.run_id) if self.store is not None else None
        run.tpot_ns = _tpot_ns(run, folder)
        return {**run.summary, "run_dir": str(folder) if folder else None}

    def _serving(self, run: _Run) -> dict[str, Any] | None:
        """How well requests that arrive were served."""
        if not self._is_timed:
            return None
        assert run.engine is not None
        serving = self.request.serving
        plan = None if is_plain(self.arrivals, serving) else self.plan
        unserved = run.engine.setup.scheduler.waiting
        offered = None if plan is None else plan.offered_rate
        return {
            "arrivals": self.request.arrivals,
            "scheduler": serving.scheduler,
            **report(run.engine.tally, unserved, serving.slo, serving.warm, offered),
            "skipped": 0 if plan is None else plan.skipped,
            "matching": None if plan is None else plan.matching,
        }

    def _rested_on(self, needs: Needs) -> list[str]:
        """The stand-ins that a run rests on."""
        allowed, stands_in = self.request.allowed, self.arrivals.kind == LOG
        stands_in = stands_in and allowed.prefill_from_decode and "prefill" not in self.meta.phases
        return [*rested_on(needs, allowed, self.meta), *["prefill=decode"][: int(stands_in)]]

    def _several(self) -> dict[str, Any]:
        """Of several devices: how the experts lie."""
        if self.devices == 1:
            return {}
        joined = self.request.hardware.interconnect is not None
        return {"placement": self.request.placement, "exchange_charged": joined}

    def _rests_on(self) -> dict[str, Any]:
        """What few runs are told: host memory that does not hold all, another precision."""
        told: dict[str, Any] = {}
        if self.request.dram:
            told |= {"dram": self.request.dram, "dram_bytes": self.dram_bytes}
        if self.request.precisions:
            held = {"precisions": list(self.request.precisions), "shipped": self.shipped}
            told["held_in"] = {**held, "quality": "unknown" if self._is_requantised else "as is"}
        return told

    @property
    def _is_requantised(self) -> bool:
        return self.model.precisions[0] != self.shipped

    def _store(self, run: _Run, wall_s: float) -> None:
        if self.store is None:
            return
        assert run.engine is not None and run.summary is not None
        spans = run.engine.spans
        self.store.write(
            run.run_id,
            run.manifest,
            run.summary,
            [_request_row(r) for r in run.engine.tally.requests],
            None if spans is None else chrome_events(spans, self.meta.experts),
            host_facts(wall_s),
        )

    def _is_bound(self, run: _Run) -> bool:
        needs = run.inputs.needs
        hindsight = Needs.CALIBRATION in needs or self._initial_kind(run.spec) == "static"
        hindsight = hindsight or (self.devices > 1 and self.request.placement == "load")
        request = self.request
        blind = request.calibration is None and request.share is None
        taught = hindsight or Needs.PAST in needs
        return Needs.FUTURE in needs or (hindsight and blind) or (taught and self._taught_by_itself)

    @cached_property
    def _taught_by_itself(self) -> bool:
        """Whether ``--calibration`` is the very trace that is replayed."""
        path = self.request.calibration
        if path is None:
            return False
        with TraceReader(path, Columns.experts_only()) as reader:
            return reader.meta.digest == self.meta.digest

    def _initial_kind(self, spec: PolicySpec) -> str:
        return spec.initial if spec.initial == "all" else self.request.initial or spec.initial

    def _diagnose(self, capacity: Capacity) -> dict[str, Any]:
        return diagnostics(self.meta, self.model, self.costs, capacity, self.request.batch)

    def _trace_facts(self) -> dict[str, Any]:
        meta = self.meta
        return {
            "path": str(self.request.trace),
            "digest": meta.digest,
            "model": meta.model.name,
            "layers": meta.layers,
            "experts": meta.experts,
            "top_k": meta.top_k,
            "requests": meta.requests,
            "tokens": meta.tokens,
            "phases": list(meta.phases),
            "rank_order": meta.rank_order,
            "synthetic": meta.source.startswith("synth"),
        }

    def _manifest(self, spec: PolicySpec, capacity: Capacity, engine: str) -> dict[str, Any]:
        request, several = self.request, self.devices > 1
        calibration = request.calibration
        initial, experts = self._initial_kind(spec), request.initial_experts
        if capacity.starts is not None:
            initial, experts = "file", capacity.starts
        learned = _meta(calibration).digest if calibration else None
        return {
            "schema": 1,
            "source_digest": source_digest(),
            "trace": self.meta.digest,
            "policy": {"name": spec.name, "seats": spec.manifest()},
            "capacity": {"scope": capacity.scope, "bytes": list(capacity.capacity_bytes)},
            "capacity_as_typed": capacity.text,
            "set": list(request.settings),
            "model": self.model.to_dict(),
            "costs": request.costs.name if request.costs else None,
            "hardware": self.hardware.to_dict(),
            **({"dram": [request.dram, self.dram_bytes]} if request.dram else {}),
            **({"precisions": list(request.precisions)} if request.precisions else {}),
            "engine": engine,
            "order": request.options.order,
            "flat": request.options.flat,
            "allocator": request.options.allocator,
            "kv": "share" if request.options.share_kv else "apart",
            "write_back": request.options.write_back or None,
            "batch": request.batch,
            "chunk_tokens": request.chunk_tokens,
            "arrivals": request.arrivals,
            "arrivals_log": digest_of_log(self.arrivals),
            "serving": request.serving.manifest(),
            "limit": request.limit,
            "seed": request.seed,
            "allowed": request.allowed.names(),
            "initial": initial,
            "initial_experts": list(experts) if initial == "file" else [],
            "calibration": "hindsight" if self._in_hindsight and request.share else learned,
            "split": request.share.split.text if request.share else None,
            **({"devices": self.devices, "placement": request.placement} if several else {}),
        }


# ---- helpers -------------------------------------------------------------------------------------


def _engine(name: str, setup: Setup) -> Engine:
    if name == "reference":
        return ReferenceEngine(setup)
    from moesim.engine.fast import FastEngine

    return FastEngine(setup)


def _made(run: _Run) -> Engine:
    assert run.engine is not None
    return run.engine


def _meta(path: Path) -> TraceMeta:
    with TraceReader(path, Columns.experts_only()) as reader:
        return reader.meta


@contextmanager
def _blaming(spec: PolicySpec) -> Iterator[None]:
    """Tell which policy broke the protocol; an error in code from outside is its author's."""
    try:
        yield
    except PolicyError as error:
        raise PolicyError(f"{spec.name}: {error}") from None
    except (Exception, SystemExit, GeneratorExit) as error:
        if isinstance(error, MoesimError) or not spec.foreign:
            raise
        # SimPy raises a copy; where it came from is its cause.
        last = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
        raise PolicyError(
            f"{spec.name}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        ) from error


def _refuse_empty(meta: TraceMeta, path: Path) -> None:
    if not meta.requests:
        raise TraceError(f"{path}: holds no requests; record or convert some")


def _refuse_lacking(inputs: Inputs, meta: TraceMeta, where: str) -> None:
    for name, mend in lacking(inputs.needs, inputs.distances, inputs.allowed, meta):
        raise UsageError(f"{where}: lacks {name}, which the policy learns from{mend}")


def _distances(policy: Policy) -> tuple[int, ...]:
    return policy.prefetch.distances if isinstance(policy, SeatPolicy) else (1,)


def _join(columns: Sequence[Columns]) -> Columns:
    names = Columns.__dataclass_fields__
    return Columns(**{n: any(getattr(c, n) for c in columns) for n in names})


def _reason(error: NotRunError) -> str:
    told = str(error)
    return told if told.startswith("not run: ") else f"not run: {told}"


def _not_run(spec: PolicySpec, capacity: Capacity, reason: str) -> dict[str, Any]:
    return {"policy": spec.name, "capacity": capacity.text, "not_run": reason}


def _tpot_ns(run: _Run, folder: Path | None) -> AnyArray:
    """float64 [requests] in order of the request, NaN where a request has no TPOT."""
    if run.engine is not None:
        rows = [(times.request, times.tpot_ns) for times in run.engine.tally.requests]
    else:
        assert folder is not None
        rows = request_times(folder)
    return np.array([np.nan if tpot is None else tpot for _, tpot in sorted(rows)], np.float64)


def _request_row(times: Any) -> dict[str, Any]:
    names = ("request", "arrival_ns", "begin_ns", "first_token_ns", "end_ns", "ttft_ns", "tpot_ns")
    more = ("queue_ns", "end_to_end_ns", "prompt_tokens", "output_tokens", "stall_ns", "misses")
    row = {name: getattr(times, name) for name in (*names, *more)}
    # The run may end before a request does.
    late = [name for name in ("first_token_ns", "end_ns") if row[name] < 0]
    return {**row, **dict.fromkeys([*late, "ttft_ns"] if row["first_token_ns"] < 0 else late)}
