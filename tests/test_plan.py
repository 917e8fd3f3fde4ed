"""The planner: its models against replay and closed forms, its file, its command."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli import main
from moesim.costs import make_costs
from moesim.errors import MoesimError, UsageError
from moesim.planning import rivals
from moesim.planning.file import Plan, load_plan, plan_text, save_plan
from moesim.planning.fit import (
    Fitting,
    fit_linear,
    fit_net,
    holding_out,
    lacking_slots,
    spearman,
)
from moesim.planning.genetic import Genetic
from moesim.planning.latency import fit_latency, make_terms
from moesim.planning.planner import Planner
from moesim.planning.rehearse import best_masses, rehearse
from moesim.planning.request import Request
from moesim.planning.space import Space, capacity_of
from moesim.planning.survey import survey
from moesim.planning.sweep import Tried, knee, periods_to
from moesim.planning.trials import Replays, Trial
from moesim.profile import load_hardware, load_model
from moesim.registry import resolve
from moesim.replays import Request as ReplayRequest
from moesim.shape import expert_norms
from moesim.traces.reader import TraceReader
from moesim.traces.samples import trace_path
from moesim.traces.schema import TraceMeta
from moesim.types import IntArray, Needs
from moesim.workload import Inputs, prepare

DEMO = trace_path("demo")
FEW = Genetic(population=16, generations=20)


@pytest.fixture(scope="module")
def meta() -> TraceMeta:
    with TraceReader(DEMO) as reader:
        return reader.meta


def made(**more: Any) -> Request:
    """An on-demand cache to plan: no lossy policy, hence quick to run."""
    asked: dict[str, Any] = {
        "trace": DEMO,
        "hardware": load_hardware("rtx4090"),
        "budget_bytes": 15_000_000,
        "policy": "lru",
        "quality": "hits",
        "configs": 24,
        "limit": 6,
        "genetic": FEW,
        "fitting": Fitting(steps=200),
    }
    return Request(**{**asked, **more})


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(made())


@pytest.fixture(scope="module")
def plan(planner: Planner) -> Plan:
    return planner.plan().plan


# ---- the models ----------------------------------------------------------------------------------


def test_memory_is_what_replay_reports(planner: Planner, plan: Plan) -> None:
    """On every run, to the byte, and in the plan."""
    space = planner.space
    for trial in planner.models.samples.replayed:
        room = space.memory_bytes(np.array(trial.slots)) - space.fixed_bytes
        assert trial.peak_bytes == room
    assert plan.predicted.memory_bytes == plan.replayed.memory_bytes <= plan.budget_bytes


def test_memory_with_a_spare_slot_is_what_replay_reports() -> None:
    request = made(policy="swapmoe", quality="mass", limit=3, period=1)
    planner = Planner(request)
    slots = np.array([[4] * 8, [12] * 8, [32] * 8])
    for trial, row in zip(planner.evaluate(slots, 1), slots, strict=True):
        room = planner.space.memory_bytes(row) - planner.space.fixed_bytes
        assert trial.peak_bytes == room
    full = planner.evaluate(slots[2:], 1)[0]
    assert full.quality == 1.0, "all experts held: nothing is lost"


def test_fixed_memory_by_hand(planner: Planner, meta: TraceMeta) -> None:
    model, seen = meta.model, planner.survey
    kv = int(model.kv_bytes_table().sum()) * seen.longest
    assert not model.kv_window_table().any()
    activations = seen.widest * 2 * (model.hidden + 2 * model.intermediate)
    assert planner.fixed_bytes() == model.fixed_bytes() + kv + activations


def test_latency_of_decoding_with_everything_held_is_exact(meta: TraceMeta) -> None:
    """Masked routing waits for nothing; a token computes top k experts whatever is held."""
    planner = Planner(made(policy="swapmoe", quality="mass", limit=2, period=1))
    trials = planner.evaluate(np.array([[32] * 8, [8] * 8]), 1)
    costs = make_costs(meta.model, load_hardware("rtx4090"))
    terms = make_terms(costs, planner.space, planner.survey, "tpot", 1.0)
    predicted = terms.columns(np.array([t.slots for t in trials]), 0.0)[:, 0]
    for trial, ns in zip(trials, predicted, strict=True):
        assert trial.latency_ns == pytest.approx(ns, rel=0.01)


def test_the_latency_model_recovers_what_it_was_made_from(planner: Planner) -> None:
    terms = make_terms(planner.costs, planner.space, planner.survey, "tpot", 0.0)
    slots = np.random.default_rng(0).integers(4, 33, (30, 8))
    columns = terms.columns(slots, 0.0)
    seen = columns[:, 0] + 500.0 + 0.7 * columns[:, 2]
    model = fit_latency(terms, slots, seen, np.zeros(30))
    assert model(slots) == pytest.approx(seen)
    assert model.overrun == 0.0
    assert model.demanded == pytest.approx(0.7)


def test_overrun_begins_where_swaps_take_longer_than_there_is_time(planner: Planner) -> None:
    slots = np.array([[16] * 8])
    terms = make_terms(planner.costs, planner.space, planner.survey, "tpot", 4.0)
    compute = terms.columns(slots, 0.0)[0, 0]
    whole = terms.swapped[np.arange(8), slots].sum() * terms.ns_per_byte
    just = 4.0 * compute / whole
    assert terms.columns(slots, just * 0.99)[0, 1] == 0
    assert terms.columns(slots, just * 1.5)[0, 1] == pytest.approx(0.5 * compute)


def test_the_net_never_loses_by_a_slot() -> None:
    rng = np.random.default_rng(1)
    slots, quality = rng.integers(1, 9, (60, 4)), rng.random(60)
    net = fit_net(slots, quality, lacking_slots(4, 8), Fitting(steps=300), 0)
    at = rng.integers(1, 8, (200, 4))
    for layer in range(4):
        assert (net(at + np.eye(4, dtype=np.int64)[layer]) >= net(at) - 1e-12).all()


def test_the_net_bends_where_a_line_cannot() -> None:
    rng = np.random.default_rng(2)
    slots = rng.integers(1, 17, (200, 3))
    lacking = lacking_slots(3, 16)
    quality = 1 - (lacking[np.arange(3), slots] ** 3).sum(axis=1)
    some, held = holding_out(200, 0.2, 0)
    net = fit_net(slots[some], quality[some], lacking, Fitting(), 0)
    line = fit_linear(slots[some], quality[some], lacking)
    off = [np.abs(model(slots[held]) - quality[held]).mean() for model in (net, line)]
    assert off[0] < off[1] / 3
    rank = spearman(net(slots[held]), quality[held])
    assert rank is not None and rank > 0.98


def test_the_linear_model_is_exact_on_a_line() -> None:
    rng = np.random.default_rng(3)
    slots = rng.integers(0, 9, (30, 5))
    quality = slots @ rng.random(5) + 3
    assert fit_linear(slots, quality, lacking_slots(5, 8))(slots) == pytest.approx(quality)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20))
def test_rank_correlation_is_scipy_s(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = np.array(pairs, np.float64).T
    mine = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert mine is None
    else:
        assert mine == pytest.approx(stats.spearmanr(a, b).statistic)


# ---- the rehearsal -------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4))
def test_best_masses_are_those_of_sorting(seed: int, experts: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    gate = rng.integers(0, 9, (5, experts))
    taken = rng.integers(0, width + 1, 5)
    wanted = [
        sum(int(np.sort(row[:n])[::-1][:k].sum()) for row, k in zip(gate, taken, strict=True))
        for n in range(1, experts + 1)
    ]
    assert best_masses(gate, taken).tolist() == wanted


def rehearsed(meta: TraceMeta, limit: int, period: int, uses: IntArray) -> Any:
    inputs = Inputs(Needs.GATE | Needs.WEIGHTS | Needs.NORMS)
    with TraceReader(DEMO, inputs.columns()) as reader:
        works = [
            prepare(i, rows, meta, inputs)
            for i, rows in zip(range(limit), reader.requests(), strict=False)
        ]
    return rehearse(works, uses, expert_norms(meta), period)


@pytest.mark.parametrize(("period", "quality"), [(1, "mass"), (9, "mass"), (9, "agreement")])
def test_the_rehearsal_comes_close_to_replay(meta: TraceMeta, period: int, quality: str) -> None:
    """Equal where the first sets stay; after plans only the moments of swaps differ."""
    limit, slots = 2, np.array([[6] * 8, [14] * 8])
    seen = survey(DEMO, None, limit)
    kept = rehearsed(meta, limit, period, seen.uses)
    request = ReplayRequest(
        trace=DEMO,
        hardware=load_hardware("rtx4090"),
        policies=("swapmoe",),
        scope="layer",
        limit=limit,
    )
    space = Space(tuple(meta.model.expert_bytes_table().tolist()), 32, 4)
    replays = Replays(request, space, seen.uses, quality, "tpot", "prefetch.period")
    got = [t.quality for t in replays(slots, period)]
    mine = kept.table(quality)[:, slots[:, 0]].sum(axis=0)
    assert mine == pytest.approx(got, abs=1e-9 if period > limit else 0.01)
    assert kept.table(quality)[:, 32].sum() == pytest.approx(1.0)


def test_the_rehearsal_is_replay_where_plans_come_often(meta: TraceMeta) -> None:
    """A plan after every request: whoever is wanted is loaded, and nothing adds up."""
    limit, slots = 10, np.array([[6] * 8, [14] * 8])
    seen = survey(DEMO, None, limit)
    request = ReplayRequest(
        trace=DEMO,
        hardware=load_hardware("rtx4090"),
        policies=("swapmoe",),
        scope="layer",
        limit=limit,
    )
    space = Space(tuple(meta.model.expert_bytes_table().tolist()), 32, 4)
    replays = Replays(request, space, seen.uses, "mass", "tpot", "prefetch.period")
    got = [t.quality for t in replays(slots, 1)]
    mine = rehearsed(meta, limit, 1, seen.uses).table("mass")[:, slots[:, 0]].sum(axis=0)
    assert mine == pytest.approx(got, abs=0.004)


def test_as_many_allocations_are_drawn_as_were_asked(planner: Planner) -> None:
    """Each once, also where draws repeat; fewer only where there are no more."""
    few = Planner(made(configs=60, budget_bytes=9_000_000))
    slots, near = few._drawn()
    assert len(np.unique(slots, axis=0)) == len(slots) == len(near) == 60
    memory = few.space.memory_bytes(slots)
    assert (memory[near] <= 9_000_000).all() and (memory[near] > 8_900_000).all()


# ---- the period ----------------------------------------------------------------------------------


def test_the_knee_is_the_last_before_latency_rises() -> None:
    times = {64: 10.0, 32: 10.1, 16: 9.9, 8: 10.0, 4: 11.0, 2: 9.0, 1: 30.0}
    tried = [Tried(f, ns, 0.0) for f, ns in times.items()]
    assert knee(tried, 0.02) == 8
    assert knee(tried, 0.2) == 2
    assert knee(tried[:1], 0.02) == 64
    assert periods_to(70) == tuple(times)
    assert periods_to(0) == (1,)


# ---- the planner ---------------------------------------------------------------------------------


def test_models_of_one_run_serve_every_budget(planner: Planner) -> None:
    known: list[tuple[int, ...]] = []
    qualities = []
    for budget in (12_000_000, 15_000_000, 20_000_000):
        plan = planner.plan(budget, known).plan
        known.append(plan.slots)
        qualities.append(plan.predicted.quality)
        assert plan.predicted.memory_bytes <= budget
    assert qualities == sorted(qualities)


def test_the_same_request_gives_the_same_file(plan: Plan) -> None:
    assert plan_text(Planner(made()).plan().plan) == plan_text(plan)


def test_a_planner_of_another_s_runs(tmp_path: Path) -> None:
    """Any function may run allocations: here one whose best is known."""
    tables = np.linspace(1, 2, 8)[:, None] * np.sqrt(np.arange(33) / 32)

    def evaluate(slots: IntArray, period: int) -> list[Trial]:
        quality = tables[np.arange(8), slots].sum(axis=1)
        return [
            Trial(tuple(row.tolist()), float(q), 1e6, 0, 0)
            for row, q in zip(slots, quality, strict=True)
        ]

    request = made(configs=200, genetic=Genetic(), fitting=Fitting())
    planner = Planner(request, evaluate=evaluate)
    answer = planner.plan()
    best = rivals.exact(planner.problem(request.budget_bytes), tables)
    mine = evaluate(np.array([answer.plan.slots, best.slots]), 0)
    uniform = next(a for a in answer.plan.alternatives if a.name == "uniform")
    assert uniform.replayed is not None
    assert uniform.replayed.quality <= mine[0].quality <= mine[1].quality
    assert mine[0].quality > 0.99 * mine[1].quality
    assert answer.models.report["net"]["spearman"] > 0.9
    assert answer.models.report["linear"]["spearman"] is not None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"budget_bytes": 3_000_000}, "takes at least 8"),
        ({"budget_bytes": 10**12}, "rtx4090 has"),
        ({"model": load_model("olmoe-1b-7b")}, "--model olmoe-1b-7b: has 16 layers of 64 experts"),
        ({"latency_limit_ns": 1000.0}, "--latency 0.001ms: no allocation .* the nearest is"),
        ({"least": 33}, "--least 33: a layer has 32 experts"),
        ({"configs": 3}, "--configs 3: too few"),
        ({"method": "best"}, "--method best: must be one of genetic"),
        ({"swaps": 2}, "--swaps: lru has none"),
        ({"period": 2}, "--period: lru has none"),
        (
            {"policy": "swapmoe", "settings": ("prefetch.period=2",)},
            "--set prefetch.period: is the plan's to set; give --period",
        ),
        ({"runs": "rehearsal"}, "--runs rehearsal: knows swapmoe"),
        ({"policy": "nonesuch"}, "--policy nonesuch: unknown"),
    ],
)
def test_what_cannot_be_planned_is_told(more: dict[str, Any], says: str) -> None:
    with pytest.raises(MoesimError, match=says) as told:
        Planner(made(**more)).plan()
    assert "\n" not in str(told.value)


# ---- the file ------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_file(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    save_plan(plan, path)
    assert load_plan(path) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.toml"]
    strange = dataclasses.replace(plan, hardware='a "b" \\ ü \x7f 😀', settings=("keep=lru",))
    save_plan(strange, path)
    assert load_plan(path) == strange


def test_a_run_takes_what_the_plan_decided(plan: Plan) -> None:
    run = plan.run(8, 32, plan.expert_bytes)
    space = plan.space
    assert replace(run.capacity, starts=None) == capacity_of(space, np.array(plan.slots))
    assert run.capacity.text == ":".join(map(str, plan.slots)) + "/layer"
    held = space.memory_bytes(np.array(plan.slots)) - space.fixed_bytes
    assert sum(run.capacity.capacity_bytes) == held
    assert len(run.capacity.starts or ()) == sum(plan.slots)
    resolve([run.policy], run.settings)[0].build()
    with pytest.raises(UsageError, match="made for 8 layers of 32 experts, the trace has 8 of 64"):
        plan.run(8, 64, plan.expert_bytes)
    with pytest.raises(UsageError, match="expert sizes of demo"):
        plan.run(8, 32, [1] * 8)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("schema = 1", "schema = 9", "schema: is 9, of a newer moesim"),
        ("schema = 1", "schema = 'x'", "schema: must be a whole number"),
        ("experts = 32", "", "model.experts: missing"),
        ("slots = [", "slots = [99, ", "plan.slots: must hold one number for each of 8 layers"),
        ('spare = "none"', 'spare = "two"', "plan.spare: must be one of layer, none"),
        ("initial = [\n  [", "initial = [\n  [77, ", "plan.initial"),
        ("[predicted]", "[foretold]", "predicted.memory_bytes: missing"),
        ("[plan]", "[plan", "not TOML"),
    ],
)
def test_a_damaged_plan_is_told(plan: Plan, tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "plan.toml"
    text = plan_text(plan)
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as told:
        load_plan(path)
    assert says in str(told.value) and str(path) in str(told.value)


def test_a_plan_that_is_not_there_is_told(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_plan(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="is a folder"):
        save_plan(plan, tmp_path)


# ---- the command ---------------------------------------------------------------------------------

SMALL = ("--trace", "demo", "--policy", "lru", "--quality", "hits", "--limit", "4")


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.toml"
    words = ["plan", *SMALL, "--budget", "15MB", "--configs", "12", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["plan"]["slots"] == list(load_plan(out).slots)
    assert answer["seconds"]["search: genetic"] < 60
    assert {a["name"] for a in answer["plan"]["alternatives"]} >= {"genetic", "uniform", "exact"}
    facts = tomllib.loads(out.read_text())
    assert facts["trace"]["digest"] and facts["made_with"]["seed"] == 0
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "genetic <-" in shown and "rank correlation" in shown and "took" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--budget", "1MB"), "takes at least"),
        (("--budget", "much"), "--budget much"),
        (("--budget", "15MB", "--latency", "fast"), "--latency fast: write a time such as 50ms"),
        (("--budget", "15MB", "--latency", "0ms"), "--latency 0ms: write a time"),
        (("--budget", "15MB", "--model", "olmo"), "no model profile named 'olmo'"),
        (("--budget", "15MB", "--out", "no/such/x.toml"), "cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *SMALL, *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("moesim: error: ") and err.count("\n") == 1


def test_swapmoe_is_planned_whole(tmp_path: Path) -> None:
    request = made(policy="swapmoe", quality="mass", limit=2, checks=2, configs=40)
    answer = Planner(request).plan()
    assert answer.swept[0].period == 1 and answer.plan.period == 1
    assert "prefetch.period=1" in answer.plan.settings
    assert answer.models.report["runs"] == "rehearsal"
    assert answer.plan.replayed.memory_bytes <= 15_000_000
    assert math.isfinite(answer.plan.predicted.latency_ns)
    save_plan(answer.plan, tmp_path / "p.toml")
    run = load_plan(tmp_path / "p.toml").run(8, 32, answer.plan.expert_bytes)
    resolve([run.policy], run.settings)[0].build()
