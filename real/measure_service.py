"""What lies between a run's work, read off the reports of short services.

Routing is made up, the policy never thinks: what remains is what the deciding thread does at every
layer event, and how long work takes from one thread to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np

from moesim.costs import Costs
from moesim.factlog import FACTS, FactLog, LoggedDeeds, Watched
from moesim.profile import ModelProfile, Stack
from moesim.protocol import World
from moesim.real.device import Device
from moesim.real.lanes import Lanes
from moesim.real.measure import PLAN, STEP, SYNC
from moesim.real.slots import SlotLedger
from moesim.registry import resolve
from moesim.serving import COPY, DENSE, EXPERT, Report, Server, Setup
from moesim.traces.reader import RequestRows
from moesim.traces.schema import TraceMeta
from moesim.types import Phase
from moesim.workload import Inputs, StaticBatch, Work, prepare

LAYERS = 4
"""Enough for layers that follow layers."""
STEPS = 6
SETTLED = 2
"""Steps at the start that are not looked at."""


@dataclass(frozen=True, slots=True)
class Served:
    """A short service: the reports of its lanes as they came, without those of the filling.

    plan_ns : what the deciding thread took for each layer event.
    """

    reports: list[Report]
    plan_ns: float


def world_of(model: ModelProfile, costs: Costs, slots: int) -> World:
    """A world with room for so many of the largest experts."""
    sizes = model.expert_bytes_table()
    return World(
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        expert_bytes=sizes[None, :],
        capacity_bytes=(slots * int(sizes.max()),),
        scope="layer" if model.layers == 1 else "global",
        costs=costs,
    )


def serve(model: ModelProfile, costs: Costs, device: Device, kept: int) -> Served:
    """Decode one request. Of the experts of each layer event ``kept`` are resident, the others
    never; all where that is so many.

    Copies last as long as ``costs`` say, and the facts are logged, as in every run that is kept.
    """
    layers, top_k = model.layers, model.top_k
    slots = layers * model.experts if kept == top_k else max(1, layers * bool(kept)) * top_k
    world = world_of(model, costs, slots)
    initial = list(range(world.size)) if kept == top_k else []
    reports: list[Report] = []
    with TemporaryDirectory(prefix="moesim-") as folder:
        log = FactLog(Path(folder) / FACTS)
        policy = Watched(resolve(["lru"], ())[0].build(), log)
        setup = Setup(policy, world, costs, StaticBatch(), initial, False)
        try:
            server = _served(setup, device, log, reports, _work(model, kept))
        finally:
            log.abandon()
    plan_ns = server.tally.times.plan / server.tally.events
    return Served(reports[len(initial) :], plan_ns)


def _served(
    setup: Setup, device: Device, log: FactLog, reports: list[Report], work: Work
) -> Server:
    """A server that has served one request, in the way of ``run.py``."""
    ledger = SlotLedger(setup.world, 0)

    def heard(report: Report) -> None:
        reports.append(report)
        log.heard(report)

    with Lanes(device, ledger, setup.costs, paced=True) as lanes:
        server = Server(setup, lanes, ledger, heard=heard, deeds=LoggedDeeds(log))
        server.offer(work)
        server.advance()
        server.close()
        server.advance()
    return server


def kept_of(model: ModelProfile) -> int:
    """How many experts of an event to keep, so that loads go on beside what lies between: half;
    all, where a token chooses one or too few are left to choose from."""
    mixed = model.top_k > 1 and model.experts >= 2 * model.top_k
    return model.top_k // 2 if mixed else model.top_k


def between(served: Served, layers: int) -> Mapping[str, float]:
    """SYNC and PLAN of a layer event and STEP of a forward pass.

    Of a service in which an expert of each event is resident: that one computes first.
    """
    computed = [r for r in served.reports if r.lane in (DENSE, EXPERT)]
    passes = _passes(computed, layers)[SETTLED:]
    around = [
        experts[0].start_ns - dense.end_ns + after.start_ns - experts[-1].end_ns
        for parts in passes
        for (dense, *experts), (after, *_) in pairwise(parts)
    ]
    steps = [follower[0][0].start_ns - parts[-1][0].end_ns for parts, follower in pairwise(passes)]
    whole = fmean(around)
    return {
        PLAN: min(served.plan_ns, whole),
        SYNC: max(0.0, whole - served.plan_ns),
        STEP: fmean(steps),
    }


def handover(served: Served) -> float:
    """HANDOVER: between two copies of one layer event; where there is one only, until it computes.

    0 for a model all of whose experts are always needed: it never loads.
    """
    gaps: list[int] = []
    arrivals: list[int] = []
    copied: Report | None = None
    ended: dict[int, int] = {}
    for report in served.reports:
        if report.lane == DENSE:
            copied = None
        elif report.lane == COPY:
            if copied is not None:
                gaps.append(report.start_ns - copied.end_ns)
            copied = report
            ended[report.key] = report.end_ns
        elif report.lane == EXPERT and report.key in ended:
            arrivals.append(report.start_ns - ended[report.key])
    return fmean(gaps or arrivals or [0])


def bench_model(model: ModelProfile, kinds: Sequence[tuple[int, int]], nbytes: int) -> ModelProfile:
    """A few layers of a model, every kind among them, with experts of so many bytes in all.

    Never more than the model has: a small one may well lie in the processor's cache.
    """
    count = min(model.layers, max(LAYERS, len(kinds)))
    layers = [kinds[i % len(kinds)][0] for i in range(count)]
    least = min(model.experts, 2 * model.top_k)
    wanted = -(-nbytes // int(model.expert_bytes_table()[layers].sum()))

    def pick(table: Sequence[int]) -> int | tuple[int, ...]:
        picked = tuple(int(table[layer]) for layer in layers)
        return picked[0] if len(set(picked)) == 1 else picked

    return replace(
        model,
        layers=count,
        experts=min(model.experts, max(least, wanted)),
        stacks=(Stack("decoder", count),),
        precisions=model.precisions[:1],
        expert_bytes=(pick(model.expert_bytes_table().tolist()),),
        dense_bytes=pick(model.dense_bytes_table().tolist()),
        dense_flops_per_token=pick(model.dense_flops_table().tolist()),
        kv_bytes_per_token_per_layer=pick(model.kv_bytes_table().tolist()),
        kv_window_tokens=pick(model.kv_window_table().tolist()),
    )


def _passes(computed: Sequence[Report], layers: int) -> list[list[list[Report]]]:
    """Reports by forward pass and dense part: the last part of each is the head, alone."""
    parts: list[list[Report]] = []
    for report in computed:
        if report.lane == DENSE:
            parts.append([report])
        else:
            parts[-1].append(report)
    return [parts[i : i + layers + 1] for i in range(0, len(parts), layers + 1)]


def _work(model: ModelProfile, kept: int) -> Work:
    """One request that decodes: each token chooses the same ``kept`` experts of a layer (if all,
    they move on as well), then others than the token before it."""
    events = STEPS * model.layers
    kept %= model.top_k
    moving = model.top_k - kept
    first = np.arange(events) // model.layers * moving
    others = kept + (first[:, None] + np.arange(moving)) % (model.experts - kept)
    chosen = np.concatenate([np.tile(np.arange(kept), (events, 1)), others], axis=1)
    iteration = np.repeat(np.arange(1, STEPS + 1, dtype=np.int32), model.layers)
    rows = RequestRows(
        request=0,
        starts=np.arange(0, events + 1, model.layers, dtype=np.int64),
        iteration=iteration,
        position=iteration - 1,
        layer=np.tile(np.arange(model.layers, dtype=np.int16), STEPS),
        phase=np.full(events, Phase.DECODE, np.uint8),
        experts=chosen.astype(np.uint16),
    )
    work = prepare(0, rows, TraceMeta(model=model), Inputs())
    work.arrival_ns = None
    return work
