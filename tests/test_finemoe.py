"""FineMoE as a policy: what it prefetches and evicts, when, at what price, in both engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from moesim.degrade import Allowed, parse_allowed
from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import NotRunError, UsageError
from moesim.past import Share, Split
from moesim.policies.forecast import ForecastSeat, Foresight
from moesim.policies.map_frequency import MapFrequency
from moesim.policies.map_search import MapSearch
from moesim.policies.presets import PRESETS
from moesim.policy import PrefetchSeat, SeatPolicy, check_policy
from moesim.profile import ModelProfile, load_hardware
from moesim.registry import resolve
from moesim.replays import Request, replay
from moesim.traces.samples import trace_path
from moesim.traces.schema import TraceMeta
from moesim.traces.synth import Synth, synthesise
from moesim.types import (
    Evicted,
    Fact,
    Forecast,
    Gate,
    IterationBegin,
    Landed,
    LayerEvent,
    Phase,
)
from moesim.workload import Inputs
from tests.finemoe import facts_of, gated_case, told, world_of
from tests.harness import Watch, drive, inputs_of, run, setup_of, spec_of, works_of
from tests.strategies import Case, decode_case, machine

FINEMOE = ("finemoe", "finemoe-ts", "finemoe-t", "finemoe-hits")


# ---- a toy, by hand ------------------------------------------------------------------------------


def toy(passes: Sequence[Sequence[int]], dense_ns: int = 30) -> Case:
    """Each pass names an expert a layer; the gate is all but sure. One slot a layer, load 10 ns,
    dense part 30 ns, expert 1 ns, policy work 1 ns an operation."""
    case = decode_case(
        [[[expert] for expert in one] for one in passes],
        experts=2,
        slots=1,
        hardware=machine(dense_ns=dense_ns, expert_ns=1),
        nbytes=10,
    )
    rows = case.requests[0]
    logits = np.where(np.arange(2) == rows.experts, 30, -30).astype(np.float16)
    meta = TraceMeta(model=case.model, score="softmax-topk", has_gate=True)
    return replace(case, meta=meta, requests=(replace(rows, gate=logits),))


def test_a_toy_trace_by_hand() -> None:
    """Two trajectories take turns. From the third pass on the first layer tells which it is.

    With one map to compare a search is 1 product, 1 comparison and 2 * 2 looks at the row: 6 ns;
    with two 8, with three 10. The search at 153 ends at 159 and names the wrong expert, which is
    resident; that at 276 ends at 284, and its prefetch waits for the demand to have moved.
    """
    case = toy([[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]])
    settings = "prefetch.distance=1", "prefetch.delta=true", "prefetch.warm=false"
    done = run(case, "finemoe-t", *settings)
    assert [(when, [w % 4 for w in words]) for _, when, *_, words in _gates(done.records)] == [
        (30, [2]), (71, [2]), (112, [2]),
        (153, [2]), (194, [2]), (235, [2]),
        (276, [2]), (317, [0]), (348, [0]),
        (379, [2]), (420, [0]), (451, [0]),
    ]  # fmt: skip
    assert [record[1:] for record in done.of("issue")] == [
        (30, 0, 0), (71, 2, 0), (112, 4, 0),
        (153, 1, 0), (194, 3, 0), (235, 5, 0),
        (276, 0, 0), (286, 2, 1), (325, 4, 1),
        (379, 1, 0), (389, 3, 1), (430, 5, 1),
    ]  # fmt: skip
    assert [record[1:] for record in done.of("evict")] == [
        (153, 0), (194, 2), (235, 4), (276, 1), (286, 3), (325, 5), (379, 0), (389, 2), (430, 4),
    ]  # fmt: skip
    assert done.tally.requests[0].end_ns == 452
    assert [misses(case, name) for name in ("lru", "lfu", "previous-token")] == [12, 12, 12]


def _gates(records: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(*record[:5], list(record[6:])) for record in records if record[0] == "gate"]


def misses(case: Case, name: str, *settings: str) -> int:
    """Misses of a run."""
    return sum(phase.misses for phase in run(case, name, *settings).tally.phases)


def test_an_empty_store_is_demand_only_at_first_and_improves() -> None:
    one, other = [0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 1]
    case = toy([one, other] * 12, dense_ns=200)
    settings = "prefetch.distance=1", "prefetch.capacity=4", "prefetch.warm=false"
    done = run(case, "finemoe-t", *settings)
    plain = run(case, "finemoe-t", "prefetch=none")
    first = _gates(done.records)[:6]
    assert first == _gates(plain.records)[:6]
    assert min(when for _, when, _, prefetched in done.of("issue") if prefetched) > first[-1][1]
    # Of every pass only the first layer is a surprise; two layers are the same in both.
    assert _misses_by_pass(plain, 6)[2:] == [4] * 22
    assert _misses_by_pass(done, 6) == [6, 4, *[1] * 22]
    assert done.tally.requests[0].end_ns < plain.tally.requests[0].end_ns


def _misses_by_pass(done: Any, layers: int) -> list[int]:
    missed = [sum(w % 4 == 2 for w in words) for *_, words in _gates(done.records)]
    return [sum(missed[i : i + layers]) for i in range(0, len(missed), layers)]


# ---- what goes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unsearched", ["last", "uniform", "zero"])
@pytest.mark.parametrize("freq", ["residency", "global"])
@pytest.mark.parametrize("seed", range(4))
def test_a_score_is_p_times_freq(unsearched: str, freq: str, seed: int) -> None:
    """1 / (p * freq), the largest first, from the whole history each time."""
    rng = np.random.default_rng(seed)
    seat = MapFrequency(unsearched=unsearched, freq=freq)
    seat.begin(world_of(gated_case(layers=2, experts=5)))
    share = [0 if unsearched == "zero" else 16384 // 5] * 10
    visited: list[list[str]] = [[] for _ in range(10)]
    began = False
    for _ in range(200):
        what, expert = rng.integers(0, 5), int(rng.integers(0, 10))
        if what == 0:
            seat.on(IterationBegin(0, 1, Phase.DECODE, 1))
            share = share if began or unsearched == "last" else [seat.unknown] * 10
            began = True
        elif what == 1:
            seat.on(gate_of(expert // 5, [expert]))
            visited[expert].append("demand")
            began = False
        elif what == 2:
            row = rng.integers(0, 3, 5) * 1000
            seat.expected(Forecast(expert // 5, row, np.arange(1)))
            share[expert // 5 * 5 : expert // 5 * 5 + 5] = np.maximum(row, 1).tolist()
        elif what == 3:
            demand = bool(rng.integers(0, 2))
            seat.note(Landed(expert, 0, 0, 0, demand))
            visited[expert] += [] if demand else ["prefetch"]
        else:
            seat.note(Evicted(expert, 0, 0))
            visited[expert] = [] if freq == "residency" else visited[expert]
        worth = [p * len(visits) for p, visits in zip(share, visited, strict=True)]
        assert seat.scores(np.arange(10), 0).tolist() == worth


def gate_of(layer: int, experts: Sequence[int]) -> Gate:
    """One token's demand."""
    n = len(experts)
    local = np.array([experts], np.uint16) - layer * 5
    source = LayerEvent(0, 0, layer, (), local.astype(np.uint16))
    status = np.zeros(n, np.uint8)
    return Gate(source, np.array(experts, np.int64), np.ones(n, np.int64), status, status)


def test_the_least_expected_goes() -> None:
    """Three experts take turns in room for two: LRU gives up each before its turn."""
    case = _of_experts([[0], [1], [2]] * 8, 3)
    expected = Forecast(0, np.array([16000, 300, 84]), np.arange(0))
    kept = run(case, policy=_policy(_Says(expected), MapFrequency()))
    assert {key for *_, key in kept.of("evict")} == {1, 2}
    assert {key for *_, key in run(case, "lru").of("evict")} == {0, 1, 2}
    assert [misses(case, "lru"), sum(p.misses for p in kept.tally.phases)] == [24, 17]


def _of_experts(passes: Sequence[Sequence[int]], experts: int) -> Case:
    events = [[[e] for e in one] for one in passes]
    return decode_case(events, experts, 2, machine(dense_ns=30, expert_ns=1), nbytes=10)


class _Says(ForecastSeat):
    """Expects the same of layer 0 at every pass, and prefetches nothing."""

    name = "says"

    def __init__(self, forecast: Forecast) -> None:
        super().__init__(background=False)
        self.forecast = forecast

    def foresee(self, fact: Fact) -> Foresight | None:
        return Foresight([self.forecast], 0, 0) if isinstance(fact, IterationBegin) else None


def _policy(prefetch: PrefetchSeat, keep: MapFrequency) -> SeatPolicy:
    built = spec_of("lru").build()
    assert isinstance(built, SeatPolicy)
    return SeatPolicy(prefetch, keep, built.miss, built.routing)


# ---- how many ------------------------------------------------------------------------------------


def chosen_by(seat: MapSearch, case: Case, allowed: Allowed) -> list[int]:
    """How many experts each forecast of a run chose."""
    seat.begin(world_of(case))
    facts = facts_of(case, Inputs(seat.needs, allowed=allowed))
    return [len(chosen) for fact in facts for *_, chosen in told(seat.foresee(fact))]


def test_a_flat_gate_asks_for_more_than_k_and_a_topk_gate_never() -> None:
    case = gated_case(experts=16, requests=5, prompt=0, output=8, skew=0.1)
    plain, topk = parse_allowed([]), parse_allowed(["gate=topk"])
    assert max(chosen_by(MapSearch(), case, plain)) > 2
    assert set(chosen_by(MapSearch(delta=False), case, plain)) == {2}
    bare = tuple(replace(rows, gate=None) for rows in case.requests)
    without = replace(case, meta=replace(case.meta, has_gate=False), requests=bare)
    assert set(chosen_by(MapSearch(), without, topk)) == {2}


def test_no_embedding_leaves_the_first_layers_to_demand() -> None:
    for embedding, layers in ((6, {0, 1, 2, 3, 4}), (0, {3, 4})):
        case = gated_case(embedding=embedding)
        seat = MapSearch()
        seat.begin(world_of(case))
        named = {la for f in facts_of(case, Inputs(seat.needs)) for la, *_ in told(seat.foresee(f))}
        assert named == layers


# ---- in the engines ------------------------------------------------------------------------------

SETTINGS: list[tuple[str, ...]] = [
    (),
    ("prefetch.background=false",),
    ("prefetch.renew=true", "prefetch.targets=later", "keep.unsearched=uniform"),
    ("prefetch.refresh=false", "prefetch.prefill=every", "keep.freq=global"),
    ("prefetch.prefill=last", "prefetch.merge=last", "keep.unsearched=zero"),
    ("prefetch.capacity=3", "prefetch.queue=1", "prefetch.distance=1"),
    ("prefetch.frozen=true", "prefetch.capacity=7", "keep=lru"),
    ("keep=lfu", "prefetch.distance=9", "prefetch.warm=false"),
]
SERVED = ((1, 0), (3, 0), (2, 2))


def outcome(engine_of: Any, case: Case, name: str, *settings: str) -> dict[str, Any]:
    """Everything that an engine counted, and what its lanes did."""
    policy = spec_of(name, *settings).build()
    engine = engine_of(setup_of(case, policy))
    tally = drive(engine, works_of(case, inputs_of(policy)))
    return {**asdict(tally), "lanes": sorted(engine.spans or [])}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s) or "default")
def test_i8_both_engines_give_one_log(settings: tuple[str, ...]) -> None:
    for number, (batch, chunk_tokens) in enumerate(SERVED):
        case = gated_case(
            requests=4, output=4, batch=batch, chunk_tokens=chunk_tokens, seed=number, plan_ns=1
        )
        for name in FINEMOE if not settings else ("finemoe",):
            reference = outcome(ReferenceEngine, case, name, *settings)
            assert outcome(FastEngine, case, name, *settings) == reference
            assert reference["prefetch"]["issued"]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_books_hold_at_every_event(batch: int) -> None:
    case = gated_case(requests=3, output=4, batch=batch, chunk_tokens=2)
    for name in FINEMOE:
        spec = spec_of(name)
        policy = spec.build()
        engine = ReferenceEngine(setup_of(case, policy, spec.initial))
        watch = Watch(engine, case)
        watch.finished(drive(engine, works_of(case, inputs_of(policy))))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s) or "default")
def test_every_setting_conforms(settings: tuple[str, ...]) -> None:
    check_policy(resolve(["finemoe"], settings)[0].build)


def test_background_work_is_declared_and_foreground_work_is_charged() -> None:
    case = gated_case(requests=3, output=4)
    background = outcome(ReferenceEngine, case, "finemoe")
    foreground = outcome(ReferenceEngine, case, "finemoe", "prefetch.background=false")
    assert background["jobs"] > 0 and background["times"]["plan"] == 0
    assert foreground["jobs"] == 0 and foreground["times"]["plan"] > 0


# ---- from the command line -----------------------------------------------------------------------


def request(**more: Any) -> Request:
    """A replay of the shipped trace."""
    settled: dict[str, Any] = {
        "trace": trace_path("demo"),
        "hardware": load_hardware("rtx4090"),
        "policies": ("finemoe",),
        "limit": 2,
        **more,
    }
    return Request(**settled)


@pytest.mark.parametrize("more", [{}, {"batch": 3, "limit": 3}, {"chunk_tokens": 4, "limit": 1}])
def test_the_demo_trace_needs_nothing_else(more: dict[str, Any]) -> None:
    answers = [replay(request(engine=engine, **more)) for engine in ("fast", "reference")]
    digests = [[run["log_digest"] for run in answer["runs"]] for answer in answers]
    assert digests[0] == digests[1]
    assert answers[0]["runs"][0]["prefetch"]["issued"] > 0


COLD = "prefetch.warm=false"


def test_a_past_helps_from_the_first_iteration_on() -> None:
    share = Share(Split((7, 3)))
    runs = [
        replay(request(share=share, settings=settings, limit=1))["runs"][0]
        for settings in (("prefetch.background=false",), ("prefetch.background=false", COLD))
    ]
    named = [run["prefetch"]["named_and_demanded"] for run in runs]
    assert named[0] > named[1]


def test_what_the_trace_lacks_is_refused_by_name(tmp_path: Any) -> None:
    path = tmp_path / "bare.parquet"
    model = ModelProfile.generic(3, 8, 2, "bare")
    synthesise(path, Synth(model, requests=3, prompt_tokens=2, output_tokens=3))
    gate = parse_allowed(["gate=topk"])
    both = parse_allowed(["gate=topk", "embedding=none"])
    with pytest.raises(NotRunError, match=r"finemoe needs GATE.*--allow gate=topk"):
        replay(request(trace=path))
    with pytest.raises(NotRunError, match=r"finemoe needs EMBEDDING.*--allow embedding=none"):
        replay(request(trace=path, allowed=gate))
    done = replay(request(trace=path, allowed=both))["runs"][0]
    assert done["allowed"] == ["gate=topk", "embedding=none"]
    replay(request(trace=path, policies=("finemoe-t",), allowed=gate))
    replay(request(trace=path, policies=("finemoe-hits",)))


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("prefetch.prefill=some", "must be mean or last or every"),
        ("prefetch.merge=both", "must be union or last"),
        ("prefetch.targets=all", "must be one or later"),
        ("prefetch.capacity=0", "must lie between 1 and 1048576"),
        ("prefetch.distance=0", "must lie between 1 and 1024"),
        ("prefetch.queue=0", "must be 1 or more"),
        ("keep.unsearched=none", "must be last or uniform or zero"),
        ("keep.freq=local", "must be residency or global"),
    ],
)
def test_a_bad_value_is_named(setting: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"{setting}: {why}"):
        resolve(["finemoe"], [setting])[0].build()
    if setting == "prefetch.prefill=some":
        with pytest.raises(UsageError, match="leave it out"):
            resolve(["finemoe-hits"], ["prefetch.prefill=last"])[0].build()


def test_the_presets_are_the_ablations_of_the_paper() -> None:
    assert [name for name in PRESETS if name.startswith("finemoe")] == list(FINEMOE)
    assert {PRESETS[name].keep for name in FINEMOE} == {"map-frequency"}
