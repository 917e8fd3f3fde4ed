"""The planner: from a request to a plan, in the paper's order (sections 3.3 and 3.4, appendix A).

Survey the trace; sweep the update period; run random allocations with the policy's scheduler on;
fit the models of quality and latency; search; run every alternative once more and report both.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moesim import __version__
from moesim.costs import Costs, make_costs
from moesim.degrade import lacking
from moesim.errors import NotRunError, UsageError
from moesim.past import requests_of
from moesim.planning import rivals
from moesim.planning.file import Alternative, Estimate, Plan, Planned
from moesim.planning.genetic import drawn_slots, filled, search, trimmed
from moesim.planning.knobs import Knobs, knobs_of
from moesim.planning.latency import (
    ExpertProfile,
    profile_experts,
)
from moesim.planning.models import Ground, Models, Samples, fitted
from moesim.planning.rehearse import Kept, rehearse
from moesim.planning.request import Request
from moesim.planning.space import (
    BoolArray,
    FloatArray,
    Found,
    Problem,
    Slots,
    Space,
    capacity_of,
    one,
)
from moesim.planning.survey import Survey, survey
from moesim.planning.sweep import Tried, knee, periods_to
from moesim.planning.trials import (
    QUALITIES,
    Evaluate,
    Replays,
    Trial,
    Watch,
    columns,
    initial_experts,
    unwatched,
)
from moesim.profile import ModelProfile
from moesim.replays import Request as ReplayRequest
from moesim.result import source_digest
from moesim.shape import expert_norms
from moesim.traces.reader import Columns, TraceReader
from moesim.traces.schema import TraceMeta
from moesim.types import IntArray, Needs
from moesim.workload import Inputs, prepare

_WORTH_TELLING = 0.001
"""Quality by which another method must do better in replay to be named."""
_SWEEP_REQUESTS = 24
"""Requests of each run of the sweep: what it looks at, latency, is the same for all."""
_DRAWS = 8
"""Times that what came twice is drawn anew."""

Measure = Callable[[Sequence[Planned]], FloatArray]
"""Run the model itself; float64 [P], minus the loss of each run in nats a token."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A plan, and what is said of its making."""

    plan: Plan
    profile: tuple[ExpertProfile, ...]
    swept: tuple[Tried, ...]
    models: Models
    seconds: Mapping[str, float]
    """Wall time of each stage."""
    notes: tuple[str, ...]


class Planner:
    """Plans for one trace, machine and policy. Runs are made once, for however many budgets.

    Raises
    ------
    MoesimError
        For a mistake in the request or the trace.
    """

    def __init__(
        self,
        request: Request,
        watch: Watch = unwatched,
        evaluate: Evaluate | None = None,
        measure: Measure | None = None,
    ) -> None:
        self.request = request
        self.meta = _meta(request.trace)
        self.model = _model_of(request, self.meta)
        self.costs: Costs = make_costs(self.model, request.hardware)
        self.knobs: Knobs = knobs_of(request.policy)
        self.seconds: dict[str, float] = {}
        self._watch = watch
        self._evaluate = evaluate
        self._measure = measure
        self._refuse_knobs()
        self.space = self._space()
        self.budgets = self._budgets()
        for budget in self.budgets:
            self._refuse_budget(budget)

    # ---- the memory model ------------------------------------------------------------------------

    @cached_property
    def survey(self) -> Survey:
        """What the trace is like."""
        request = self.request
        with self._timed("survey"):
            return survey(request.trace, request.share, request.limit)

    def fixed_bytes(self) -> int:
        """Weights outside the routed experts, the KV cache of the longest request, and the
        activations of one expert for the widest pass."""
        model, seen = self.model, self.survey
        windows = model.kv_window_table()
        kept = np.where(windows > 0, np.minimum(windows, seen.longest), seen.longest)
        widest = min(seen.widest, self.request.chunk_tokens or seen.widest)
        activations = widest * profile_experts(self.costs)[0].activation_bytes_per_token
        return model.fixed_bytes() + int((model.kv_bytes_table() * kept).sum()) + activations

    def _space(self) -> Space:
        least = self.request.least or self.meta.top_k
        if not 1 <= least <= self.meta.experts:
            raise UsageError(f"--least {least}: a layer has {self.meta.experts} experts")
        return Space(
            expert_bytes=tuple(self.model.expert_bytes_table().tolist()),
            experts=self.meta.experts,
            least=least,
            fixed_bytes=self.fixed_bytes(),
            spare=self.request.spare or self.knobs.spare,
        )

    def _budgets(self) -> tuple[int, ...]:
        """Of all plans, in bytes."""
        request, space = self.request, self.space
        experts = sum(space.expert_bytes) * space.experts
        if request.shares:
            return tuple(space.fixed_bytes + int(share * experts) for share in request.shares)
        return (request.budget_bytes, *request.more_budgets)

    def _refuse_budget(self, budget_bytes: int) -> None:
        space, hardware = self.space, self.request.hardware
        lowest = int(space.memory_bytes(space.lowest()))
        if budget_bytes < lowest:
            spare = " and a spare slot" if space.spare == "layer" else ""
            raise UsageError(
                f"--budget of {budget_bytes} bytes: {self.model.name} takes at least {lowest} "
                f"({_gib(lowest)}): {_gib(space.fixed_bytes)} that do not depend on the plan, and "
                f"{space.least} experts{spare} in each of {space.layers} layers"
            )
        room = hardware.memory.device_bytes - hardware.memory.reserved_bytes
        if budget_bytes > room:
            raise UsageError(
                f"--budget of {budget_bytes} bytes: {hardware.name} has {room} ({_gib(room)}) "
                "beside what is reserved; give at most that, or another --hardware"
            )

    # ---- runs ------------------------------------------------------------------------------------

    @cached_property
    def evaluate(self) -> Evaluate:
        """Runs allocations."""
        if self._evaluate is not None:
            return self._evaluate
        request = self.request
        replayed = ReplayRequest(
            trace=request.trace,
            hardware=request.hardware,
            policies=(request.policy,),
            settings=self._settings(),
            scope="layer",
            costs=request.model,
            chunk_tokens=request.chunk_tokens,
            share=request.share,
            allowed=request.allowed,
            limit=request.limit,
            seed=request.seed,
        )
        return Replays(
            replayed,
            self.space,
            self.survey.uses,
            "mass" if request.quality == "loss" else request.quality,
            request.latency_of,
            self.knobs.period,
            self._watch,
        )

    def _run(self, slots: IntArray, period: int) -> list[Trial]:
        """Run allocations; where the model itself is asked, the quality is what it says."""
        trials = self.evaluate(slots, period)
        if self._measure is None:
            return trials
        measured = self._measured(slots, period)
        return [replace(t, quality=float(q)) for t, q in zip(trials, measured, strict=True)]

    def _measured(self, slots: IntArray, period: int) -> FloatArray:
        assert self._measure is not None
        return self._measure([self.decided(tuple(row), period) for row in slots.tolist()])

    def decided(self, slots: Slots, period: int) -> Planned:
        """What a run of an allocation is given."""
        capacity = capacity_of(self.space, np.array(slots, np.int64))
        starts = initial_experts(self.survey.uses, slots)
        settings = self._settings()
        if period:
            settings += (f"{self.knobs.period}={period}",)
        return Planned(self.request.policy, settings, replace(capacity, starts=starts))

    def _settings(self) -> tuple[str, ...]:
        """Without the period."""
        request, knobs = self.request, self.knobs
        settings = tuple(request.settings)
        if request.swaps:
            settings += (f"{knobs.swaps}={request.swaps}",)
        return settings

    def _refuse_knobs(self) -> None:
        request, knobs = self.request, self.knobs
        for option, value, key in (
            ("--swaps", request.swaps, knobs.swaps),
            ("--period", request.period, knobs.period),
        ):
            if value and not key:
                raise UsageError(f"{option}: {request.policy} has none; leave it out")
            if key and any(s.partition("=")[0] == key for s in request.settings):
                raise UsageError(f"--set {key}: is the plan's to set; give {option} instead")

    @cached_property
    def swept(self) -> tuple[Tried, ...]:
        """The sweep of the period, with equal slots in every layer."""
        request = self.request
        if not self.knobs.period or request.period:
            return ()
        start = one(rivals.uniform(self._unlimited(self.budgets[0])).slots)
        requests = min(self.survey.requests, _SWEEP_REQUESTS)
        evaluate = self.evaluate
        if isinstance(evaluate, Replays):
            evaluate = replace(evaluate, request=replace(evaluate.request, limit=requests))
        tried: list[Tried] = []
        with self._timed("sweep"):
            for period in periods_to(requests // 2):
                trial = evaluate(start, period)[0]
                tried.append(Tried(period, trial.latency_ns, trial.quality))
                if knee(tried, request.tolerance) != period:
                    break
        return tuple(tried)

    @property
    def period(self) -> int:
        """Inputs between two updates; 0 where the policy has no period."""
        if not self.knobs.period:
            return 0
        return self.request.period or knee(self.swept, self.request.tolerance)

    def _unlimited(self, budget_bytes: int) -> Problem:
        """Before there is any model: the more memory is used, the better."""

        def used(slots: IntArray) -> FloatArray:
            return self.space.memory_bytes(slots).astype(np.float64)

        return Problem(self.space, budget_bytes, used, _zero)

    # ---- models ----------------------------------------------------------------------------------

    @cached_property
    def models(self) -> Models:
        """The fitted models, after the runs that they need."""
        request = self.request
        slots, near = self._drawn()
        period = self.period
        if self._runs() == "replay":
            with self._timed("replays"):
                trials = self.evaluate(slots, period)
            samples = Samples(slots, columns(trials)[1], near, tuple(trials))
            tables = rivals.mass_tables(self.survey.uses, self.space)
        else:
            with self._timed("rehearsal"):
                tables = self._proxy(period)
            quality = tables[np.arange(self.space.layers), slots].sum(axis=1)
            if self._measure is not None:
                with self._timed("real runs"):
                    quality = self._measured(slots, period)
            with self._timed("replays"):
                # Of both kinds, spread over the draws.
                some = np.unique(np.linspace(0, len(slots) - 1, request.checks).astype(np.int64))
                trials = self._run(slots[some], period)
            samples = Samples(slots, quality, near, tuple(trials))
        with self._timed("fit"):
            ground = Ground(request, self.space, self.survey, self.costs, period)
            return fitted(ground, samples, tables, self._runs())

    def _runs(self) -> str:
        """Rehearsal or replay."""
        request, can = self.request, self.knobs.rehearsed and self._evaluate is None
        changed = bool(request.settings) or bool(request.swaps)
        can = can and not changed and request.quality != "hits"
        if request.runs == "real":
            if self._measure is None:
                raise UsageError("--runs real: needs --model with a model that can be run")
            return "real"
        if request.runs == "rehearsal" and not can:
            raise UsageError(
                "--runs rehearsal: knows swapmoe as it is, without --set, --swaps or --quality "
                "hits; use --runs replay"
            )
        return request.runs or ("rehearsal" if can else "replay")

    def _proxy(self, period: int) -> FloatArray:
        """float64 [layers, experts + 1]: each layer's part of a quality without the model."""
        request = self.request
        if request.runs == "real" and not self.knobs.rehearsed:
            return rivals.mass_tables(self.survey.uses, self.space)
        kind = "mass" if request.quality == "loss" else request.quality
        return self._rehearsed(period).table(kind)

    def _rehearsed(self, period: int) -> Kept:
        request = self.request
        inputs = Inputs(Needs.GATE | Needs.WEIGHTS | Needs.NORMS, allowed=request.allowed)
        for name, mend in lacking(inputs.needs, (), request.allowed, self.meta):
            raise NotRunError(
                f"not run: {request.policy} needs {name}, which this trace lacks{mend}"
            )
        with TraceReader(request.trace, inputs.columns()) as reader:
            requests = islice(requests_of(reader, request.share), request.limit)
            works = (prepare(i, rows, self.meta, inputs) for i, rows in enumerate(requests))
            return rehearse(works, self.survey.uses, expert_norms(self.meta), period)

    def _drawn(self) -> tuple[IntArray, BoolArray]:
        """Random allocations, each once, and which of them fill a budget."""
        request, space = self.request, self.space
        rng = np.random.default_rng([request.seed, 0])
        slots, near = np.zeros((0, space.layers), np.int64), np.zeros(0, bool)
        for _ in range(_DRAWS):
            more, fills = self._draw(request.configs - len(slots), rng)
            slots, near = np.concatenate((slots, more)), np.concatenate((near, fills))
            _, first = np.unique(slots, axis=0, return_index=True)
            slots, near = slots[np.sort(first)], near[np.sort(first)]
            if len(slots) == request.configs:
                break
        if len(slots) < 4:
            raise UsageError(
                f"{self.model.name}: there are only {len(slots)} allocations of {space.least} to "
                f"{space.experts} experts a layer; there is nothing to plan"
            )
        return slots, near

    def _draw(self, count: int, rng: np.random.Generator) -> tuple[IntArray, BoolArray]:
        """Random allocations, some of them perhaps twice."""
        space = self.space
        slots = drawn_slots(space, count, rng)
        near = np.arange(count) < round(self.request.near * count)
        lowest = int(space.memory_bytes(space.lowest()))
        whole = int(space.memory_bytes(np.full(space.layers, space.experts)))
        budgets = rng.integers(lowest, whole + 1, count)
        budgets[near] = np.resize(np.array(self.budgets, np.int64), int(near.sum()))
        return filled(space, trimmed(space, slots, budgets, rng), budgets, rng), near

    # ---- the plan --------------------------------------------------------------------------------

    def plan(self, budget_bytes: int | None = None, known: Iterable[Slots] = ()) -> Answer:
        """A plan for a budget, by default the request's.

        known : allocations that the genetic search starts with, as a smaller budget's plan.

        Raises
        ------
        UsageError
            If no allocation is predicted to meet the latency limit: names the nearest.
        """
        request = self.request
        budget = self.budgets[0] if budget_bytes is None else budget_bytes
        self._refuse_budget(budget)
        problem = self.problem(budget)
        found = self._searched(problem, known)
        chosen = found[request.method]
        if isinstance(chosen, str):
            raise UsageError(f"--method {request.method}: {chosen}")
        self._refuse_late(problem, chosen)
        alternatives = self._compared(problem, found)
        plan = self._made(budget, chosen, alternatives)
        notes = tuple(self._notes(plan))
        profile = tuple(profile_experts(self.costs))
        return Answer(plan, profile, self.swept, self.models, dict(self.seconds), notes)

    def problem(self, budget_bytes: int) -> Problem:
        """The search's problem with the fitted models."""
        models = self.models
        return Problem(
            self.space,
            budget_bytes,
            models.quality,
            models.latency,
            self.request.latency_limit_ns,
            self.request.latency_weight,
        )

    def _searched(self, problem: Problem, known: Iterable[Slots]) -> dict[str, Found | str]:
        """What each method finds, or why it was not run."""
        request, uses = self.request, self.survey.uses
        methods: dict[str, Callable[[], Found]] = {
            "genetic": lambda: search(problem, request.genetic, request.seed, known),
            "uniform": lambda: rivals.uniform(problem),
            "greedy": lambda: rivals.greedy(problem),
            "importance": lambda: rivals.by_importance(problem, uses),
            "evolution": lambda: rivals.evolved(problem, request.seed),
            "exact": lambda: rivals.exact(problem, self.models.tables),
        }
        found: dict[str, Found | str] = {}
        for name, run in methods.items():
            with self._timed(f"search: {name}"):
                try:
                    found[name] = run()
                except (NotRunError, UsageError) as error:
                    found[name] = str(error)
        return found

    def _refuse_late(self, problem: Problem, chosen: Found) -> None:
        if chosen.feasible:
            return
        nearest = problem.judge(one(chosen.slots)).latency_ns[0]
        raise UsageError(
            f"--latency {problem.latency_limit_ns / 1e6:g}ms: no allocation was found that meets "
            f"it within {problem.budget_bytes} bytes; the nearest is predicted to take "
            f"{nearest / 1e6:.4g}ms"
        )

    def _compared(
        self, problem: Problem, found: Mapping[str, Found | str]
    ) -> tuple[Alternative, ...]:
        """Every method's allocation by the models and by one more run."""
        distinct = dict.fromkeys(f.slots for f in found.values() if isinstance(f, Found))
        with self._timed("comparison"):
            runs = self._run(np.array(list(distinct), np.int64), self.period)
        seen = {trial.slots: trial for trial in runs}
        return tuple(
            Alternative(name, not_run=f)
            if isinstance(f, str)
            else Alternative(
                name, f.slots, self.predicted(problem, f.slots), self._replayed(seen[f.slots])
            )
            for name, f in found.items()
        )

    def predicted(self, problem: Problem, slots: Slots) -> Estimate:
        """What the models say of an allocation."""
        judged = problem.judge(one(slots))
        quality = float(problem.quality(one(slots))[0])
        return Estimate(int(judged.memory_bytes[0]), float(judged.latency_ns[0]), quality)

    def _replayed(self, trial: Trial) -> Estimate:
        fixed = self.space.fixed_bytes
        return Estimate(fixed + trial.peak_bytes, trial.latency_ns, trial.quality)

    def _made(self, budget: int, chosen: Found, alternatives: tuple[Alternative, ...]) -> Plan:
        request, space, period = self.request, self.space, self.period
        mine = next(a for a in alternatives if a.name == request.method)
        assert mine.predicted is not None and mine.replayed is not None
        run = self.decided(chosen.slots, period)
        return Plan(
            model=self.model.name,
            layers=space.layers,
            experts=space.experts,
            top_k=self.meta.top_k,
            expert_bytes=space.expert_bytes,
            fixed_bytes=space.fixed_bytes,
            hardware=request.hardware.name,
            budget_bytes=budget,
            policy=request.policy,
            settings=run.settings,
            slots=chosen.slots,
            spare=space.spare,
            period=period,
            swaps=request.swaps or self.knobs.swaps_default,
            initial=run.capacity.starts or (),
            method=request.method,
            predicted=mine.predicted,
            replayed=mine.replayed,
            alternatives=alternatives,
            facts=self._facts(),
        )

    def _facts(self) -> dict[str, dict[str, Any]]:
        request, report = self.request, self.models.report
        limit = request.latency_limit_ns
        return {
            "limits": {
                "latency_of": request.latency_of,
                "latency_limit_ns": limit if math.isfinite(limit) else 0.0,
            },
            "quality": {"kind": request.quality, "meaning": QUALITIES[request.quality]},
            "fit": {
                "runs": report["runs"],
                "configurations": report["configurations"],
                "replayed": report["replayed"],
                "held_out": report["held_out"],
                "encoding": request.encoding,
                **_flat(report),
            },
            "latency_model": {
                "fixed_ns": self.models.latency.fixed_ns,
                "overrun": self.models.latency.overrun,
                "demanded": self.models.latency.demanded,
                "turnover": self.models.latency.turnover,
            },
            "trace": {
                "name": request.trace.name,
                "digest": self.meta.digest,
                "requests": self.survey.requests,
                "split": request.share.split.text if request.share else "",
                "allowed": request.allowed.names(),
            },
            "made_with": {
                "moesim": __version__,
                "source_digest": source_digest(),
                "numpy": np.__version__,
                "python": platform.python_version(),
                "seed": request.seed,
            },
        }

    def _notes(self, plan: Plan) -> Iterator[str]:
        ran = [a for a in plan.alternatives if a.replayed is not None]
        best = max(ran, key=lambda a: _replayed_quality(a, self.request.latency_limit_ns))
        mine = next(a for a in ran if a.name == plan.method)
        gain = _replayed_quality(best, math.inf) - _replayed_quality(mine, math.inf)
        measured = self.request.quality == "loss"
        how = "measured," if measured else "in replay"
        gained = f"loses {gain:.4f} nats less" if measured else f"keeps {gain:.4f} more"
        if gain > _WORTH_TELLING:
            yield (f"{how} {best.name} {gained} than {plan.method}; --method {best.name} takes it")
        limit = self.request.latency_limit_ns
        if plan.replayed.latency_ns > limit:
            yield (
                f"in replay the plan takes {plan.replayed.latency_ns / 1e6:.4g} ms, above the "
                f"limit of {limit / 1e6:g}"
            )
        if plan.replayed.memory_bytes > plan.budget_bytes:
            yield f"in replay the plan holds {plan.replayed.memory_bytes} bytes, above the budget"

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - started


# ---- helpers -------------------------------------------------------------------------------------


def _zero(slots: IntArray) -> FloatArray:
    return np.zeros(len(slots))


def _meta(path: Path) -> TraceMeta:
    with TraceReader(path, Columns.experts_only()) as reader:
        return reader.meta


def _model_of(request: Request, meta: TraceMeta) -> ModelProfile:
    model = request.model or meta.model
    mine, traced = ((m.layers, m.experts, m.top_k) for m in (model, meta.model))
    if mine != traced:
        raise UsageError(
            f"--model {model.name}: has {mine[0]} layers of {mine[1]} experts, top {mine[2]}; "
            f"{request.trace} has {traced[0]} of {traced[1]}, top {traced[2]}; give a trace of "
            "this model"
        )
    return model


def _gib(nbytes: int) -> str:
    unit, name = (2**30, "GiB") if nbytes >= 2**30 else (2**20, "MiB")
    return f"{nbytes / unit:.4g} {name}"


def _flat(report: Mapping[str, Any]) -> dict[str, Any]:
    """Nested figures as ``net_spearman``; what could not be had is left out."""
    pairs = [
        (f"{name}_{key}", value)
        for name, figures in report.items()
        if isinstance(figures, Mapping)
        for key, value in figures.items()
    ]
    alone = ("memory_alone", "proxy", "proxy_at_budget")
    pairs += [(f"{name}_spearman", report[name]) for name in alone]
    return {key: value for key, value in pairs if value is not None}


def _replayed_quality(alternative: Alternative, limit_ns: float) -> float:
    """Of one that meets the limit in replay; else below all."""
    seen = alternative.replayed
    if seen is None or seen.latency_ns > limit_ns:
        return -math.inf
    return seen.quality
