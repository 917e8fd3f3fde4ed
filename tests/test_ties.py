"""Ties: what chance could have made is not ranked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import ties
from moesim.cli import main
from moesim.policies.presets import PRESETS
from moesim.traces.samples import trace_path

DEMO = trace_path("demo")


def a_run(policy: str, values: Any, **more: Any) -> dict[str, Any]:
    """A summary with the TPOT of these requests."""
    mean = float(np.nanmean(values)) if len(values) else None
    made = {"policy": policy, "capacity": "25%", "oracle": False, "lossy": False}
    return made | {"tpot_ns": {"mean": mean}} | more


def marked(*pairs: tuple[dict[str, Any], Any]) -> list[dict[str, Any]]:
    runs = [run for run, _ in pairs]
    ties.mark(runs, [np.asarray(values, float) for _, values in pairs])
    return runs


def test_what_always_loses_is_no_tie_and_what_wins_as_often_is_one() -> None:
    quick = np.random.default_rng(1).normal(100, 30, 200)
    noise = np.random.default_rng(2).normal(0, 10, 200)
    names = ("quick", quick), ("slow", quick + 1), ("even", quick + noise - noise.mean() + 0.01)
    best, slow, even = marked(*((a_run(n, v), v) for n, v in names))
    assert {r["against_best"]["best"] for r in (best, slow, even)} == {"quick"}
    assert not best["against_best"]["tie"]
    # A small difference that every request shows is known well, however much requests differ.
    assert not slow["against_best"]["tie"]
    assert even["against_best"]["tie"]


def test_the_interval_is_that_of_the_normal_law_where_it_holds() -> None:
    values = np.random.default_rng(3).normal(5, 20, 900)
    low, high = ties.interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_blocks_change_nothing_where_neighbours_are_independent() -> None:
    values = np.random.default_rng(4).normal(5, 20, 10 * ties.MOST_BLOCKS)
    low, high = ties.interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_bounds_and_lossy_policies_are_not_ranked() -> None:
    values = np.array([4.0, 5.0, 6.0])
    one, two, bound, lossy = marked(
        (a_run("one", values), values),
        (a_run("two", values + 3), values + 3),
        (a_run("bound", values - 3, oracle=True), values - 3),
        (a_run("lossy", values - 3, lossy=True), values - 3),
    )
    assert one["against_best"]["best"] == "one" == two["against_best"]["best"]
    assert "against_best" not in bound and "against_best" not in lossy


def test_capacities_are_ranked_apart_and_one_alone_is_not() -> None:
    values = np.array([4.0, 5.0])
    alone, *_ = marked(
        (a_run("one", values, capacity="10%"), values),
        (a_run("one", values), values),
        (a_run("two", values), values),
    )
    assert "against_best" not in alone


def test_requests_without_a_tpot_are_left_out() -> None:
    values = np.array([4.0, np.nan, 6.0])
    one, two = marked((a_run("one", values), values), (a_run("two", values + 1), values + 1))
    assert two["against_best"]["interval"] == pytest.approx([0.2, 0.2])
    none = np.full(2, np.nan)
    (empty, _) = marked((a_run("one", []), none), (a_run("two", []), none))
    assert "against_best" not in empty
    assert one["against_best"]["slower"] == 0


def test_all_is_every_preset_with_its_ladder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.parquet"
    size = ("--requests", "3", "--prompt-tokens", "2", "--output-tokens", "3", "--layers", "2")
    shape = (*size, "--experts", "4", "--top-k", "2", "--ahead", "1")
    assert main(["trace", "synth", str(trace), *shape]) == 0
    capsys.readouterr()
    words = ["replay", "--trace", str(trace), "--policy", "all", "--capacity", "50%"]
    assert main([*words, "--out", str(tmp_path / "runs")]) == 0
    first = capsys.readouterr().out
    for name in PRESETS:
        assert name in first
    assert "x min-bypass" in first and "quickest" in first
    # What was kept is marked as what was just made.
    assert main([*words, "--out", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == first


def test_a_policy_without_room_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """At 10 % masked routing lacks room for one token's experts; the others are compared."""
    command = ["replay", "--trace", "demo", "--policy", "lru,swapmoe", "--capacity", "10%,25%"]
    assert main([*command, "--split", "marked", "--limit", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    ran = [(run["policy"], run["capacity"]) for run in found if "not_run" not in run]
    assert ran == [("lru", "10%"), ("lru", "25%"), ("swapmoe", "25%")]


@pytest.mark.parametrize("policy", ["static", "finemoe", "odds"])
def test_what_learns_from_the_very_trace_is_a_bound(
    policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["replay", "--trace", "demo", "--policy", policy, "--limit", "1", "--json"]
    for learns, bound in ((["--split", "marked"], False), (["--calibration", str(DEMO)], True)):
        assert main([*command, *learns]) == 0
        (run,) = json.loads(capsys.readouterr().out)["runs"]
        assert run["oracle"] is bound
