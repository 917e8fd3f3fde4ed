"""The adviser: what it recommends is what replays say, and what is short is short by that much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesim.advice import Question, Target, advise, parse_slo
from moesim.advice.curve import Point, sizes
from moesim.advice.room import room
from moesim.advice.trust import SHIPPED, read_trust, variants
from moesim.advice.verdict import frugal, knee, least_factor, meets, recommended
from moesim.cli import main
from moesim.errors import UsageError
from moesim.profile import load_hardware, load_model
from moesim.replays import Progress, Request, replay
from moesim.traces.samples import trace_path

KEPT = Path(__file__).parent / "data" / "validation" / "amd-epyc"
ASKED = Request(
    trace=trace_path("demo"),
    hardware=load_hardware("rtx4090"),
    costs=load_model("olmoe-1b-7b"),
    limit=2,
)


@contextmanager
def silent(_: str) -> Iterator[Progress]:
    yield lambda done, total: None


def asked(**more: Any) -> dict[str, Any]:
    question = Question(ASKED, policies=("lru", "lfu"), budget_bytes=1_500_000_000)
    return advise(replace(question, **more), silent)


def a_point(capacity_bytes: int, tpot: float, band: float = 0.0) -> Point:
    times = {
        side: dict.fromkeys(("mean", "p50", "p90", "p99"), tpot * (1 + sign * band))
        for side, sign in (("low", -1), ("expected", 0), ("high", 1))
    }
    name = f"{capacity_bytes}B"
    return Point(name, capacity_bytes, 0.1, "lru", (), times, times, None, 0.0)


# ---- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("tpot=50ms", [Target("tpot", "p90", 50_000_000)]),
        (
            "ttft.p99=2s, tpot.mean=1.5us",
            [Target("ttft", "p99", 2 * 10**9), Target("tpot", "mean", 1500)],
        ),
    ],
)
def test_targets_are_read(text: str, targets: list[Target]) -> None:
    assert list(parse_slo(text)) == targets


@pytest.mark.parametrize(
    "text",
    ["", "tpot", "tpot=50", "tpot=-1ms", "tpot=0ms", "e2e=1s", "tpot.p95=1s", "tpot=1s,tpot=2s"],
)
def test_a_target_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--slo"):
        parse_slo(text)


def test_memory_is_a_partition_and_what_is_left_goes_to_experts() -> None:
    model, hardware = load_model("mixtral-8x7b"), load_hardware("rtx4090")
    made = room(model, hardware, context=1000, batch=4, budget=None)
    parts = made.reserved_bytes + made.weights_bytes + made.kv_bytes + made.left_bytes
    assert parts == made.device_bytes
    assert made.most_bytes == made.left_bytes < made.expert_bytes
    assert room(model, load_hardware("h200"), 1000, 1, None).most_bytes == made.expert_bytes
    assert room(model, hardware, 1000, 4, 10**9).most_bytes == 10**9


def test_a_machine_without_room_for_one_expert_is_told_what_is_missing() -> None:
    model, hardware = load_model("mixtral-8x7b"), load_hardware("rtx4090")
    with pytest.raises(UsageError, match=r"memory is short by [0-9.]+ GB"):
        room(model, hardware, context=1_000_000, batch=1, budget=None)
    with pytest.raises(UsageError, match="--budget"):
        room(model, hardware, context=1, batch=1, budget=1000)


def test_the_points_of_the_curve_stay_within_the_memory_and_reach_it() -> None:
    assert sizes(1000, 400, (10, 25, 40, 50)) == ["10%", "25%", "400B"]
    assert sizes(1000, 5000, (10, 100)) == ["10%", "100%"]


def test_the_knee_of_a_bent_curve_is_its_bend_and_a_straight_one_has_none() -> None:
    bent = [a_point(b, t) for b, t in ((1, 100), (2, 40), (3, 30), (4, 25), (5, 20))]
    bend = knee(bent)
    assert bend is not None
    assert bend.capacity_bytes == 2
    assert knee([a_point(b, 100 - 10 * b) for b in range(1, 6)]) is None
    assert knee([a_point(b, 50) for b in range(1, 6)]) is None
    assert knee(bent[:2]) is None


def test_no_memory_is_recommended_that_gains_less_than_a_twentieth() -> None:
    points = [a_point(b, t) for b, t in ((1, 100), (2, 52), (3, 50), (4, 49.9))]
    assert frugal(points).capacity_bytes == 2
    assert recommended(points, ()) is points[1]


def test_a_target_is_met_by_the_least_memory_that_meets_it_surely_if_any_does() -> None:
    points = [a_point(b, t, band=0.2) for b, t in ((1, 100), (2, 50), (3, 45), (4, 30))]
    slo = (Target("tpot", "mean", 55),)
    assert recommended(points, slo) is points[2]  # 50 may be 60, 45 may be 54
    assert not meets(points[1], slo, "high")
    assert recommended(points, (Target("tpot", "mean", 32),)) is points[3]
    assert recommended(points, (Target("tpot", "mean", 20),)) is None


def test_the_least_factor_is_found_to_a_few_per_cent() -> None:
    assert least_factor(lambda f: f >= 1) == 1.0
    assert least_factor(lambda f: False) is None
    for aim in (1.01, 3.7, 800.0):
        found = least_factor(lambda f, aim=aim: f >= aim)
        assert found is not None
        assert aim <= found <= 1.01 * aim


def test_the_shipped_trust_is_what_the_kept_validation_gives() -> None:
    read = read_trust(KEPT)
    assert read.configurations == SHIPPED.configurations
    assert read.tpot == pytest.approx(SHIPPED.tpot, abs=5e-4)
    assert read.ttft == pytest.approx(SHIPPED.ttft, abs=5e-4)


def test_validation_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--validation"):
        read_trust(tmp_path)
    (tmp_path / "requests.csv").write_text("configuration,origin\n0,simulated\n")
    with pytest.raises(UsageError, match="lacks columns"):
        read_trust(tmp_path)
    head = "configuration,origin,repeat,request,ttft_ns,tpot_ns,stall_ns\n"
    (tmp_path / "requests.csv").write_text(head + "0,simulated,0,0,1,1,1\n")
    with pytest.raises(UsageError, match="nothing is both"):
        read_trust(tmp_path)
    (tmp_path / "requests.csv").write_text(head + "0,simulated,0,0,1,x,1\n")
    with pytest.raises(UsageError, match="could not convert"):
        read_trust(tmp_path)


def test_a_measured_machine_is_not_varied_and_another_is_both_ways() -> None:
    hardware = load_hardware("rtx4090")
    slow, quick = variants(hardware)
    assert slow.link.bytes_per_s < hardware.link.bytes_per_s < quick.link.bytes_per_s
    assert variants(replace(hardware, source="measured")) == ()


# ---- the whole -----------------------------------------------------------------------------------


def test_each_point_is_the_quickest_replay_at_its_size_inside_its_band() -> None:
    answer = asked()
    for point in answer["curve"]:
        again = replay(replace(ASKED, policies=("lru", "lfu"), capacities=(point["capacity"],)))
        paces = {run["policy"]: run["tpot_ns"]["mean"] for run in again["runs"]}
        expected = point["tpot"]["expected"]["mean"]
        assert expected == min(paces.values()) == paces[point["policy"]]
        assert point["tpot"]["low"]["mean"] < expected < point["tpot"]["high"]["mean"]
    shares = [point["capacity_bytes"] for point in answer["curve"]]
    assert shares == sorted(shares)
    assert shares[-1] == 1_500_000_000
    assert answer["surely"] is True


def test_what_is_short_of_memory_is_short_by_so_much() -> None:
    answer = asked(targets=parse_slo("tpot.mean=4ms"))
    assert answer["recommended"] is None
    memory, link = answer["shortages"]
    assert (memory["resource"], link["resource"]) == ("memory", "link")
    enough = f"{round(memory['factor'] * 1_500_000_000)}B"
    run = replay(replace(ASKED, policies=("lru", "lfu"), capacities=(enough,)))["runs"]
    assert min(r["tpot_ns"]["mean"] for r in run) <= 4_000_000
    quicker = ASKED.hardware.with_bandwidth(ASKED.hardware.link.bytes_per_s * link["factor"])
    best = answer["curve"][-1]
    asked_again = replace(
        ASKED, policies=(best["policy"],), capacities=(best["capacity"],), hardware=quicker
    )
    assert replay(asked_again)["runs"][0]["tpot_ns"]["mean"] <= 4_000_000


def test_a_device_that_is_too_slow_with_all_experts_is_named() -> None:
    answer = asked(targets=parse_slo("tpot.mean=100us"))
    (short,) = answer["shortages"]
    assert short["resource"] == "compute"
    assert short["factor"] * 100_000 == pytest.approx(answer["break_even"]["all_resident_tpot_ns"])


def test_a_link_at_break_even_decodes_within_a_tenth_of_all_resident() -> None:
    answer = asked()
    even, best = answer["break_even"], answer["recommended"]
    hardware = ASKED.hardware.with_bandwidth(even["bytes_per_s"])
    run = replay(
        replace(
            ASKED, policies=(best["policy"],), capacities=(best["capacity"],), hardware=hardware
        )
    )["runs"][0]
    assert run["tpot_ns"]["mean"] <= 1.1 * even["all_resident_tpot_ns"]


def test_the_command_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "advise",
        "--trace",
        "demo",
        "--model",
        "olmoe-1b-7b",
        "--policy",
        "lru",
        "--limit",
        "1",
    ]
    assert main([*line, "--budget", "1GB"]) == 0
    text = capsys.readouterr().out
    assert "Set --policy lru --capacity 30%" in text
    assert "nobody measured this machine" in text
    assert main([*line, "--budget", "1GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recommended"]["policy"] == "lru"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--budget", "0"], "--budget"),
        (["--budget", "1kB"], "--budget"),
        (["--slo", "tpot"], "--slo"),
        (["--policy", "min"], "could be used"),
        (["--model", "no-such"], "no-such"),
        (["--validation", "nowhere"], "--validation"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", "--trace", "demo", "--limit", "1", *more]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err


def test_layers_of_sliding_attention_hold_no_more_than_their_window() -> None:
    model, hardware = load_model("gpt-oss-20b"), load_hardware("h200")
    per_token, windows = model.kv_bytes_table(), model.kv_window_table()
    assert windows.any()
    counted = sum(
        int(nbytes) * (min(int(window), 10_000) if window else 10_000)
        for nbytes, window in zip(per_token, windows, strict=True)
    )
    assert room(model, hardware, 10_000, 3, None).kv_bytes == 3 * counted


def test_several_devices_hold_several_parts_and_each_at_least_one_expert() -> None:
    model, hardware = load_model("mixtral-8x7b"), load_hardware("rtx4090")
    one, two = (room(model, hardware, 1000, 1, None, devices) for devices in (1, 2))
    assert two.left_bytes == 2 * one.left_bytes
    assert room(model, load_hardware("rtx3090x6"), 1000, 1, None).devices == 6
    largest = int(model.expert_bytes_table().max())
    with pytest.raises(UsageError, match="a device"):
        room(model, hardware, 1000, 1, 2 * largest - 1, devices=2)


def test_no_point_of_the_curve_has_less_than_an_expert() -> None:
    assert sizes(1000, 1000, (5, 10, 25), least_bytes=100) == ["10%", "25%", "100%"]


def test_times_that_are_off_by_all_of_them_say_nothing(tmp_path: Path) -> None:
    head = "configuration,origin,repeat,request,ttft_ns,tpot_ns,stall_ns\n"
    rows = "0,simulated,0,0,9,9,1\n0,measured,0,0,1,1,1\n"
    (tmp_path / "requests.csv").write_text(head + rows)
    with pytest.raises(UsageError, match="tells nothing"):
        read_trust(tmp_path)


def test_the_link_that_is_short_is_judged_by_all_requests_as_the_curve_was() -> None:
    longer = replace(ASKED, limit=10)
    curve = asked(request=longer, policies=("lru",))["curve"]
    most_ns = round(curve[-1]["tpot"]["expected"]["mean"]) - 1000
    answer = asked(request=longer, policies=("lru",), targets=(Target("tpot", "mean", most_ns),))
    link = answer["shortages"][-1]
    assert (link["resource"], link["factor"] > 1.0) == ("link", True)


def test_a_link_without_limit_is_json_and_breaks_even() -> None:
    free = replace(ASKED, hardware=ASKED.hardware.with_bandwidth(float("inf")))
    answer = asked(request=free, policies=("lru",))
    json.dumps(answer, allow_nan=False)
    assert answer["break_even"]["bytes_per_s"] is None
