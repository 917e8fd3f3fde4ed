"""Closed forms of the clock, exact in nanoseconds.

L layers, dense part D, expert g, copy c, k experts of E demanded by every layer event. Options: no
synchronisation, no plan cost, steady state as T(2n) - T(n) over n tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.degrade import parse_allowed
from moesim.engine.setup import Options
from moesim.profile import (
    Constant,
    ConstantExpert,
    HardwareProfile,
    Host,
    Link,
    Memory,
    ModelProfile,
)
from moesim.replays import Request, replay
from moesim.traces.convert import convert

L, E, K, TOKENS = 3, 12, 2, 12
BYTES = int(ModelProfile.generic(L, E, K).expert_bytes_table()[0])


def machine(d: int, g: int, c: int, chunks: int = 1) -> HardwareProfile:
    """Dense d ns, expert g ns, copy c ns in a number of chunks."""
    return HardwareProfile(
        name="closed-form",
        source="assumed",
        provenance="a test",
        memory=Memory(1 << 40, 0),
        link=Link(_rate(c), 0, BYTES // chunks),
        compute=Constant(d, g),
        host=Host(0, 0, math.inf, math.inf, 1, ConstantExpert(1)),
    )


def _rate(c: int) -> float:
    """A copy's time is all bandwidth, so that chunks are equal parts of it. A rate that is a little
    high still rounds up to c, one that is a little low does not."""
    return math.nextafter(BYTES * 1e9 / c, math.inf) if c else math.inf


def trace(path: Path, demands: Any, tokens: int = TOKENS, experts: int = E) -> Path:
    """A decoding trace: ``demands(token, layer)`` lists experts."""
    rows = np.array([[demands(t, la) for la in range(L)] for t in range(tokens)], np.uint16)
    source = path / f"{tokens}.npz"
    np.savez(source, experts=rows)
    target = path / f"{tokens}.parquet"
    imported(source, target, experts)
    return target


def imported(source: Path, target: Path, experts: int) -> None:
    """Every token an iteration, ranks as they stand."""
    convert(
        source, target, model=None, experts=experts, phase="decode", keep_order=True, format=None
    )


def fresh(token: int, layer: int) -> list[int]:
    """Never what the last five tokens asked for: with room for 2k everything misses."""
    return [(token * K + i) % E for i in range(K)]


def everything(token: int, layer: int) -> list[int]:
    return list(range(K))


def run(path: Path, demands: Any, hardware: HardwareProfile, **more: Any) -> dict[str, Any]:
    """One replay of ``tokens`` tokens with the laws on."""
    tokens = more.pop("tokens", TOKENS)
    experts = more.pop("experts", E)
    order = more.pop("order", "ready")
    request = Request(
        trace=trace(path, demands, tokens, experts),
        hardware=hardware,
        options=Options(order=order, check=True),
        **more,
    )
    (only,) = replay(request)["runs"]
    return dict(only)


def steady(path: Path, demands: Any, hardware: HardwareProfile, **more: Any) -> dict[str, int]:
    """What TOKENS more tokens add."""
    once = run(path, demands, hardware, tokens=TOKENS, **more)
    twice = run(path, demands, hardware, tokens=2 * TOKENS, **more)
    return {n: twice[n] - once[n] for n in ("time_ns", "stall_ns", "misses", "accesses")}


EVENTS = TOKENS * L
NUMBERS = [(100, 10, 40), (7, 30, 30), (0, 5, 1000), (1000, 1, 1)]


@pytest.mark.parametrize(("d", "g", "c"), NUMBERS)
def test_barrier_all_miss(tmp_path: Path, d: int, g: int, c: int) -> None:
    added = steady(tmp_path, fresh, machine(d, g, c), order="barrier", capacities=("4/layer",))
    assert added["misses"] == added["accesses"] == EVENTS * K
    assert added["time_ns"] == EVENTS * (d + K * c + K * g)
    assert added["stall_ns"] == added["misses"] * c


@pytest.mark.parametrize(("d", "g", "c"), [n for n in NUMBERS if n[2] >= n[1]])
def test_residents_first_all_miss(tmp_path: Path, d: int, g: int, c: int) -> None:
    added = steady(tmp_path, fresh, machine(d, g, c), capacities=("4/layer",))
    assert added["misses"] == EVENTS * K
    assert added["time_ns"] == EVENTS * (d + K * c + g)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("capacity", ["4/layer", "4"])
@pytest.mark.parametrize(("d", "g", "c"), NUMBERS)
def test_exact_look_ahead(
    tmp_path: Path, d: int, g: int, c: int, capacity: str, chunks: int
) -> None:
    added = steady(
        tmp_path,
        fresh,
        machine(d, g, c, chunks),
        policies=("look-ahead",),
        capacities=(capacity,),
    )
    assert added["time_ns"] == EVENTS * max(d + K * g, K * c)


@pytest.mark.parametrize(("d", "g", "c"), NUMBERS)
def test_whole_layer_streaming(tmp_path: Path, d: int, g: int, c: int) -> None:
    """All K experts that a layer has are demanded; two layers fit."""
    added = steady(
        tmp_path,
        everything,
        machine(d, g, c),
        policies=("streaming",),
        capacities=(f"{2 * K}",),
        experts=K,
    )
    assert added["time_ns"] == EVENTS * max(d + K * g, K * c)


def test_infinite_bandwidth_never_stalls(tmp_path: Path) -> None:
    for policy in ("lru", "next-gate", "streaming", "look-ahead", "min-bypass"):
        one = run(
            tmp_path,
            fresh,
            machine(10, 3, 0),
            policies=(policy,),
            capacities=("4/layer",),
            allowed=parse_allowed(["ahead=recall:0.5@1"]),
        )
        assert one["misses"] > 0 or policy != "lru"
        assert one["stall_ns"] == 0
        assert one["time_ns"] == EVENTS * (10 + K * 3)


@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_demand_waits_at_most_one_chunk_behind_a_prefetch(tmp_path: Path, chunks: int) -> None:
    """The wrong prefetch is on the link at every gate; it may cost each layer event one chunk."""
    d, g, c = 5, 1, 800
    hardware = machine(d, g, c, chunks)
    wrong = parse_allowed(["ahead=recall:0@1"])
    more: dict[str, Any] = {"capacities": ("8/layer",), "experts": 3000, "allowed": wrong}
    demand_only = run(tmp_path, fresh, hardware, policies=("lru",), **more)
    speculating = run(tmp_path, fresh, hardware, policies=("next-gate",), **more)
    late = speculating["time_ns"] - demand_only["time_ns"]
    assert speculating["misses"] == demand_only["misses"]
    assert 0 < late <= EVENTS * c // chunks


def test_a_stall_is_misses_times_the_copy(tmp_path: Path) -> None:
    """Demand only, barrier: the stall is exactly what the link carried."""
    rng = np.random.default_rng(5)
    table = [[rng.permutation(E)[:K].tolist() for _ in range(L)] for _ in range(2 * TOKENS)]
    for capacity in ("2/layer", "5/layer", "7", "20"):
        one = run(
            tmp_path,
            lambda t, la: table[t][la],
            machine(13, 7, 90),
            order="barrier",
            capacities=(capacity,),
        )
        assert one["stall_ns"] == one["misses"] * 90 == one["link_busy_ns"]


def test_flood_cliff(tmp_path: Path) -> None:
    """A global LRU below one token's bytes hits nothing, and the diagnostics said so."""

    def cyclic(token: int, layer: int) -> list[int]:
        return [0, 1]

    whole = (TOKENS - 1) * L * K
    for slots, hits in ((1, 0), (L * K - K, 0), (L * K, whole), (L * K + 1, whole)):
        request = Request(
            trace=trace(tmp_path, cyclic),
            hardware=machine(10, 1, 5),
            capacities=(str(slots),),
        )
        answer = replay(request)
        warned = any("hits nothing" in w for w in answer["diagnostics"][0]["warnings"])
        assert answer["runs"][0]["hits"] == hits
        assert warned == (hits == 0)


def test_a_slice_below_the_active_set_goes_in_waves_and_reports_its_bytes(tmp_path: Path) -> None:
    request = Request(
        trace=trace(tmp_path, fresh),
        hardware=machine(10, 1, 5),
        policies=("lru", "min", "min-bypass"),
        capacities=("1/layer",),
        options=Options(check=True),
    )
    answer = replay(request)
    assert any("slice too small" in w for w in answer["diagnostics"][0]["warnings"])
    for one in answer["runs"]:
        assert one["overflows"] == EVENTS
        assert one["largest_union_bytes"] == K * BYTES
        staging = K * BYTES if one["policy"] == "min-bypass" else 0
        assert one["peak_bytes"] <= L * BYTES + staging


def test_the_kv_cache_shrinks_the_capacity(tmp_path: Path) -> None:
    """With --kv share the residents make room as the context grows."""
    path = trace(tmp_path, fresh)
    for policy in ("lru", "min", "next-gate"):
        shared, apart = (
            replay(
                Request(
                    trace=path,
                    hardware=machine(10, 1, 5),
                    policies=(policy,),
                    capacities=("30",),
                    allowed=parse_allowed(["ahead=recall:0.8@1"]),
                    options=Options(share_kv=share, check=True),
                    costs=changed(
                        ModelProfile.generic(L, E, K),
                        kv_bytes_per_token_per_layer=BYTES // 2,
                    ),
                )
            )["runs"][0]
            for share in (True, False)
        )
        assert shared["accesses"] == apart["accesses"]
        assert shared["evictions"] > apart["evictions"]
        assert shared["misses"] >= apart["misses"]


def test_both_regimes_of_prefetching(shared: Path, tmp_path: Path) -> None:
    """On a saturated link prefetching raises the hit rate and loses time; on a faster link, cut
    into chunks, it wins."""
    source = shared / "data" / "traces" / "gpt-oss-20b" / "decode.npz"
    with np.load(source) as arrays:
        head = arrays["experts"][:300]
    np.savez(tmp_path / "head.npz", experts=head)
    path = tmp_path / "head.parquet"
    imported(tmp_path / "head.npz", path, 32)
    d, g, c = 100_000, 50_000, 400_000

    def measured(hardware: HardwareProfile) -> tuple[dict[str, Any], dict[str, Any]]:
        answer = replay(
            Request(
                trace=path,
                hardware=hardware,
                policies=("lru", "next-gate"),
                capacities=("12/layer",),
                allowed=parse_allowed(["ahead=recall:0.8@1"]),
            )
        )
        return answer["runs"][0], answer["runs"][1]

    def served(one: dict[str, Any]) -> int:
        return int(one["hits"] + one["late_hits"])

    demand, speculating = measured(machine(d, g, c))
    assert served(speculating) > served(demand)
    assert speculating["time_ns"] > demand["time_ns"]
    demand, speculating = measured(machine(d, g, c // 8, chunks=8))
    assert served(speculating) > served(demand)
    assert speculating["hits"] > demand["hits"]
    assert speculating["time_ns"] < demand["time_ns"]
