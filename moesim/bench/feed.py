"""Recorded requests in memory, and one engine's run over them, timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from moesim.capacity import parse_capacity
from moesim.costs import make_costs
from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Options, Setup
from moesim.profile import ModelProfile, load_hardware
from moesim.protocol import Policy, World
from moesim.registry import PolicySpec, resolve
from moesim.shape import all_precisions, decode_from, fitting, shaped
from moesim.tally import Tally
from moesim.traces.check import check_request
from moesim.traces.reader import TraceReader
from moesim.traces.schema import TraceMeta
from moesim.types import DROPPED, AnyArray, IntArray, Needs
from moesim.workload import (
    Inputs,
    KnownFuture,
    StaticBatch,
    Work,
    layer_events,
    prepare,
    timeless_steps,
)

HARDWARE = "rtx4090"
NOBODY = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True)
class Recording:
    """A trace's requests, read and prepared; each run gets copies of its own."""

    meta: TraceMeta
    works: Sequence[Work]

    def fresh(self) -> list[Work]:
        """The requests, none of them served yet."""
        return [replace(work) for work in self.works]

    @cached_property
    def future(self) -> KnownFuture:
        """The demand of the whole run."""
        steps = timeless_steps(self.fresh(), StaticBatch())
        experts = self.meta.experts
        demands = (item.demand.experts for step in steps for item in layer_events(step, 0, experts))
        return KnownFuture(demands, self.meta.layers * experts)

    @cached_property
    def stream(self) -> AnyArray:
        """uint32 expert ids in the order of access, as an engine serves the requests one by one:
        each layer event asks for each of its experts once, by first mention."""
        pieces = [_ids(work, self.meta.experts) for work in self.works]
        return np.concatenate([_united(*p) for p in zip(self.works, pieces, strict=True)])

    @cached_property
    def choices(self) -> AnyArray:
        """The same, once for every token that chose them (``--mode flat``)."""
        pieces = [_ids(work, self.meta.experts).reshape(-1) for work in self.works]
        return np.concatenate([piece[piece != NOBODY] for piece in pieces])

    @property
    def slots(self) -> int:
        """A quarter of a layer's experts, but no less than one token needs."""
        return max(self.meta.top_k, self.meta.experts // 4)


def read(path: Path, inputs: Inputs, limit: int | None = None) -> Recording:
    """The first ``limit`` requests of a trace."""
    works: list[Work] = []
    with TraceReader(path, inputs.columns()) as reader:
        for index, rows in enumerate(reader.requests()):
            if index == limit:
                break
            check_request(rows, reader.meta, path)
            works.append(replace(prepare(index, rows, reader.meta, inputs), arrival_ns=None))
        return Recording(reader.meta, works)


def _ids(work: Work, experts: int) -> AnyArray:
    """uint32 [rows, k] expert ids; NOBODY where a choice was dropped."""
    chosen, layer = work.rows.experts, work.rows.layer.astype(np.uint32)
    ids: AnyArray = chosen + layer[:, None] * np.uint32(experts)
    ids[chosen == DROPPED] = NOBODY
    return ids


def _united(work: Work, ids: AnyArray) -> AnyArray:
    """Each layer event's experts once, by first mention."""
    rows = work.rows
    changed = (rows.layer[1:] != rows.layer[:-1]) | (rows.iteration[1:] != rows.iteration[:-1])
    flat: AnyArray = ids.reshape(-1)
    kept: AnyArray = flat != NOBODY
    if not changed.all():
        event = np.concatenate(([0], np.cumsum(changed)))
        pair = np.repeat(event << 32, ids.shape[1]) | flat
        once = np.zeros(len(flat), bool)
        once[np.unique(pair, return_index=True)[1]] = True
        kept = kept & once
    united: AnyArray = flat[kept]
    return united


# ---- one run -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """What an engine runs. ``capacity`` as on the command line."""

    recording: Recording
    policy: PolicySpec
    capacity: str
    options: Options = field(default_factory=Options)
    fast: bool = True
    """In the fast engine; else in the reference."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run counted and took.

    whole_ns : from the first request to the end; reading and setting up apart.
    core_ns : the share inside compiled code; 0 in the reference engine.
    """

    tally: Tally
    whole_ns: int
    core_ns: int

    @property
    def accesses(self) -> int:
        """Over all phases."""
        return sum(phase.accesses for phase in self.tally.phases)

    @property
    def hits(self) -> int:
        """Over all phases."""
        return sum(phase.hits for phase in self.tally.phases)


def spec_of(name: str, *settings: str) -> PolicySpec:
    """A policy by name, with its seats swapped."""
    return resolve([name], settings)[0]


def run(case: Case) -> Ran:
    """One run from a cold start; a fixed set is there from the beginning."""
    setup = _setup(case)
    engine = FastEngine(setup) if case.fast else ReferenceEngine(setup)
    works = case.recording.fresh()
    started = time.perf_counter_ns()
    for work in works:
        engine.offer(work)
        engine.advance()
    engine.close()
    while not engine.advance():
        pass
    whole_ns = time.perf_counter_ns() - started
    core_ns = engine.core_ns if isinstance(engine, FastEngine) else 0
    return Ran(engine.tally, whole_ns, core_ns)


def _setup(case: Case) -> Setup:
    policy = case.policy.build()
    world, costs = _world(case, policy), make_costs(_model(case), load_hardware(HARDWARE))
    initial: list[int] = []
    if case.policy.initial == "static":
        hottest: IntArray = np.argsort(-case.recording.future.counts, kind="stable")
        initial = fitting(hottest.tolist(), world, case.options.allocator)
    return Setup(
        policy=policy,
        world=replace(world, costs=costs),
        costs=costs,
        scheduler=StaticBatch(),
        options=case.options,
        initial=initial,
    )


def _model(case: Case) -> ModelProfile:
    return shaped(case.recording.meta.model, case.recording.meta)


def _world(case: Case, policy: Policy) -> World:
    meta, model = case.recording.meta, _model(case)
    sizes = model.expert_bytes_table()
    capacity = parse_capacity(case.capacity, "global", sizes, meta.experts)
    needs = policy.needs
    return World(
        layers=meta.layers,
        experts=meta.experts,
        top_k=meta.top_k,
        expert_bytes=all_precisions(model),
        capacity_bytes=capacity.capacity_bytes,
        scope=capacity.scope,
        decode_from=decode_from(meta),
        calibration=case.recording.future.counts if Needs.CALIBRATION in needs else None,
        future=case.recording.future if Needs.FUTURE in needs else None,
    )
