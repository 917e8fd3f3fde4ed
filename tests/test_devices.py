"""Several devices: laws V1 to V9 (``tests/README.md``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesim
from moesim.cli import main
from moesim.costs import make_costs
from moesim.engine.exchange import Exchange
from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import NotRunError, ProfileError, UsageError
from moesim.ledger import IN_FLIGHT, RESIDENT
from moesim.placement import PLACEMENTS, Travel, divide, place
from moesim.policies.presets import PRESETS
from moesim.profile import HardwareProfile, Interconnect, load_hardware
from moesim.protocol import World
from moesim.replays import Request, replay
from moesim.shape import all_precisions
from moesim.tally import Tally
from moesim.timeline import DEVICES, chrome_events
from moesim.traces.samples import trace_path
from moesim.types import Needs
from tests.harness import drive, inputs_of, setup_of, spec_of, start, works_of
from tests.strategies import (
    FITTED,
    LOSSLESS,
    Case,
    cases,
    decode_case,
    machine,
    several,
    specs,
    spread,
)
from tests.test_laws import mixed_case

ALL = [name for name, preset in PRESETS.items() if preset.prefetch not in FITTED]


def tally_of(case: Case, name: str = "lru", *settings: str) -> Tally:
    """What the reference engine counts."""
    return drive(*start(case, name, *settings))


def walk(seed: int, steps: int, layers: int, experts: int, k: int) -> list[list[list[int]]]:
    """Experts of each (step, layer), drawn at random."""
    rng = np.random.default_rng(seed)
    return [
        [sorted(rng.permutation(experts)[:k].tolist()) for _ in range(layers)] for _ in range(steps)
    ]


# ---- where experts lie ---------------------------------------------------------------------------


@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.sampled_from(PLACEMENTS), st.data()
)
def test_v1_every_device_owns_its_share(
    layers: int, experts: int, devices: int, how: str, data: st.DataObject
) -> None:
    uses = np.array(data.draw(st.lists(st.integers(0, 5), min_size=36, max_size=36)))
    uses = uses[: layers * experts]
    units = layers if how == "layers" else layers * experts
    if devices > units:
        with pytest.raises(UsageError, match=f"--devices {devices}: more than the {units}"):
            place(how, devices, layers, experts, uses)
        return
    owners = place(how, devices, layers, experts, uses).reshape(layers, experts)
    assert owners.min() >= 0 and owners.max() < devices
    if how == "layers":
        assert (owners == owners[:, :1]).all() and (np.diff(owners[:, 0]) >= 0).all()
        held = np.bincount(owners[:, 0], minlength=devices)
        assert held.max() - held.min() <= 1
    elif how == "round-robin":
        assert (np.diff(owners.reshape(-1)) % devices == 1 % devices).all()
    else:
        assert max(np.bincount(row).max() for row in owners) <= -(-experts // devices)


def test_v1_by_load_the_most_used_go_apart() -> None:
    uses = np.array([[9, 1, 5, 4, 3, 2], [0, 0, 0, 0, 7, 7]])
    owners = place("load", 2, 2, 6, uses).reshape(2, 6)
    # 9 | 5, then 4 beside 5 and 3 to the lesser (9 = 9: fewer experts), 2 and 1 fill up.
    assert owners[0].tolist() == [0, 0, 1, 1, 0, 1]
    assert owners[1, 4] != owners[1, 5]


def test_v1_by_load_is_as_even_as_any_way_for_few_experts() -> None:
    """Two devices: the best of all halves of four experts is found, or missed by the least."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        uses = np.sort(rng.integers(1, 20, 4))[::-1]
        owners = place("load", 2, 1, 4, uses)
        loads = [int(uses[owners == device].sum()) for device in range(2)]
        pairs = [(0, 1), (0, 2), (0, 3)]
        best = min(max(s := int(uses[list(p)].sum()), int(uses.sum()) - s) for p in pairs)
        assert max(loads) == best


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.data())
def test_v1_capacity_is_divided(
    layers: int, experts: int, devices: int, by_layer: bool, data: st.DataObject
) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers)))
    owners = np.arange(layers * experts) % devices
    if devices > layers * experts:
        return
    given_bytes = tuple(data.draw(st.integers(1, 200)) for _ in range(layers if by_layer else 1))
    scope = "layer" if by_layer else "global"
    try:
        parts = divide(given_bytes, sizes, scope, owners)
    except UsageError as error:
        assert "one expert has" in str(error)
        return
    world = World(layers, experts, 1, np.array([sizes]), parts, scope, owners=owners)
    assert len(parts) == int(world.caches.max()) + 1
    if not by_layer:
        assert parts == (given_bytes[0] // devices,) * devices
        return
    for layer in range(layers):
        own = np.unique(world.caches[layer * experts : (layer + 1) * experts])
        held = [parts[cache] // int(sizes[layer]) for cache in own]
        assert sum(held) == given_bytes[layer] // int(sizes[layer]) == world.slots(layer)
        assert max(held) - min(held) <= 1


# ---- one device ----------------------------------------------------------------------------------


@given(cases(), specs(LOSSLESS))
def test_v2_one_of_several_is_one(case: Case, spec: tuple[str, tuple[str, ...]]) -> None:
    """The way that several devices go, with one: every number is that of the other way."""
    size = case.meta.layers * case.meta.experts
    by_layer = len(case.capacity_bytes) > 1
    alone = replace(case, owners=(0,) * size, by_layer=by_layer)
    one, other = (asdict(tally_of(c, spec[0], *spec[1])) for c in (case, alone))
    (device,) = other.pop("devices")
    one.pop("devices")
    assert device["times"]["experts"] == one["times"]["experts"]
    assert one == other


def test_v2_one_device_is_no_option_at_all() -> None:
    request = Request(
        trace_path("demo"),
        load_hardware("rtx3090"),
        ("lru", "finemoe"),
        limit=2,
        engine="reference",
    )
    whole = [replay(r)["runs"] for r in (request, replace(request, devices=1))]
    assert whole[0] == whole[1]
    assert "devices" not in whole[0][0] and "imbalance" not in whole[0][0]


# ---- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", PLACEMENTS)
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_v3_with_all_resident_an_event_takes_its_slowest_device(how: str, devices: int) -> None:
    events = walk(3, 6, 3, 7, 4)
    hardware = machine(dense_ns=11, expert_ns=5, sync_ns=2, plan_ns=3)
    case = replace(spread(decode_case(events, 7, 7, hardware), devices, how), initial="all")
    owners = np.array(case.owners).reshape(3, 7)
    slowest = [
        max(np.bincount(owners[layer, chosen]))
        for step in events
        for layer, chosen in enumerate(step)
    ]
    tally = tally_of(replace(case, charged=False))
    assert tally.times.experts == 5 * sum(slowest)
    assert tally.times.total() == 5 * sum(slowest) + len(slowest) * (11 + 2 + 3)
    assert sum(t.times.experts for t in tally.devices) == 5 * 4 * len(slowest)
    assert sum(t.slowest for t in tally.devices) == len(slowest)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("chunk_bytes", [0, 3])
def test_v4_links_of_their_own_divide_the_time_of_loading(devices: int, chunk_bytes: int) -> None:
    """Every event misses 8 experts, a part of them on each device: 8 / devices loads in a row."""
    events = [[list(range(first, first + 8))] for first in (0, 8, 0, 8)]
    hardware = machine(bytes_per_s=1e9, latency_ns=7, chunk_bytes=chunk_bytes)
    case = decode_case(events, 16, 8, hardware, nbytes=10)
    tally = tally_of(spread(case, devices, slots=8))
    assert tally.times.stall == tally.times.total() == 4 * (8 // devices) * (10 + 7)
    assert [t.link_busy_ns for t in tally.devices] == [tally.times.stall] * devices
    assert [t.counts().misses for t in tally.devices] == [32 // devices] * devices


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("chunk_bytes", [0, 5])
@pytest.mark.parametrize("links", [1.0, 2.0])
def test_v5_a_host_that_serves_one_link_makes_many_as_slow_as_one(
    devices: int, chunk_bytes: int, links: float
) -> None:
    events = [[list(range(first, first + 8))] for first in (0, 8, 0, 8)]
    hardware = machine(bytes_per_s=1e9, chunk_bytes=chunk_bytes)
    case = decode_case(events, 16, 8, hardware, nbytes=10)
    tally = tally_of(spread(case, devices, slots=8, host=links))
    assert tally.times.total() == 4 * 8 * 10 // links


def test_v5_a_link_alone_gets_its_own_rate() -> None:
    """All misses lie on one device; the other one sleeps."""
    events = [[[0, 2, 4]], [[6, 8, 10]], [[0, 2, 4]]]
    case = decode_case(events, 12, 6, machine(bytes_per_s=1e9, chunk_bytes=4), nbytes=10)
    shared, alone = (
        tally_of(spread(case, 2, slots=6, host=host)).times.total() for host in (1.0, math.inf)
    )
    assert shared == alone == 9 * 10


# ---- what is held --------------------------------------------------------------------------------


@given(cases(single=True, arrivals=False, dropped=False))
def test_v6_whole_layers_on_devices_are_separate_caches(case: Case) -> None:
    """One layer a device, free exchange: as one device with a cache for each layer."""
    layers = case.meta.layers
    sizes = case.model.expert_bytes_table().tolist()
    capacity = tuple(2 * size for size in sizes)
    plain = replace(case, options=replace(case.options, allocator="bytes"), initial="cold")
    alone = replace(plain, capacity_bytes=capacity)
    owners = tuple(np.repeat(np.arange(layers), case.meta.experts).tolist())
    apart = replace(plain, owners=owners, capacity_bytes=capacity)
    one, many = tally_of(alone), tally_of(apart)
    assert asdict(one.counts()) == asdict(many.counts())
    assert one.times == many.times
    assert one.log_digest == many.log_digest


@given(several(), specs(ALL))
def test_v7_no_device_holds_what_it_does_not_own(
    case: Case, spec: tuple[str, tuple[str, ...]]
) -> None:
    """At every event of the clock, with the engine's own audits on (V8: bytes of each device)."""
    try:
        engine, works = start(case, spec[0], *spec[1])
    except (NotRunError, UsageError):
        return
    ledger, clock = engine.ledger, engine.clock
    inner, size = clock.step, case.meta.layers * case.meta.experts
    owner = np.tile(case.owners, len(case.model.precisions))
    layer = np.arange(size) // case.meta.experts
    place = np.array(case.owners) * case.meta.layers + (layer if case.by_layer else 0)
    known = np.unique(place)
    booked = np.repeat(all_precisions(case.model), case.meta.experts, axis=1).reshape(-1)

    def step() -> None:
        inner()
        staged = {k for lane in engine.lanes for k, t in lane.link.flying.items() if t.staged}
        held = dict.fromkeys(known.tolist(), 0)
        for key in np.flatnonzero(ledger.state >= IN_FLIGHT).tolist():
            flying = engine.lanes[owner[key]].link.flying
            assert (ledger.state[key] == RESIDENT) != (key in flying), "another device loads it"
            if key not in staged:
                held[place[key % size]] += int(booked[key])
        if case.options.allocator == "bytes":
            assert list(held.values()) == ledger.used
        assert all(
            used <= capacity
            for used, capacity in zip(ledger.used, case.capacity_bytes, strict=True)
        )

    clock.step = step  # type: ignore[method-assign]
    try:
        tally = drive(engine, works)
    except (NotRunError, UsageError):
        return
    assert tally.counts().bytes_loaded == sum(t.counts().bytes_loaded for t in tally.devices)
    assert tally.times.total() == clock.now


# ---- two engines ---------------------------------------------------------------------------------


def outcome(engine_of: Any, case: Case, name: str, *settings: str) -> dict[str, Any]:
    """All that an engine counted, of the run and of each device, and what the lanes did."""
    spec = spec_of(name, *settings)
    policy = spec.build()
    arrivals = Needs.FUTURE not in policy.needs
    try:
        engine = engine_of(setup_of(case, policy, spec.initial))
        tally = drive(engine, works_of(case, inputs_of(policy), arrivals))
    except (NotRunError, UsageError) as error:
        return {"refused": str(error)}
    return {**asdict(tally), "lanes": sorted(engine.spans or [])}


@given(several(), specs(ALL), st.booleans(), st.booleans())
def test_i8_several_devices_are_equal_in_both_engines(
    case: Case, spec: tuple[str, tuple[str, ...]], share_kv: bool, flat: bool
) -> None:
    case = replace(case, options=replace(case.options, share_kv=share_kv, flat=flat))
    reference, fast = (outcome(e, case, spec[0], *spec[1]) for e in (ReferenceEngine, FastEngine))
    assert reference == fast


@pytest.mark.parametrize("number", range(3))
def test_i8_every_preset_on_several_devices(number: int) -> None:
    rng = np.random.default_rng(40 + number)
    ran = set()
    for name in ALL:
        case = spread(
            mixed_case(rng),
            2,
            PLACEMENTS[number],
            slots=int(rng.integers(4, 10)),
            by_layer=bool(rng.integers(2)),
            host=float(rng.choice([1, 1.5, 4])),
            between=Interconnect(0.5e9, 3),
        )
        if case.by_layer:
            case = replace(case, options=replace(case.options, allocator="slots"))
        reference, fast = (outcome(engine, case, name) for engine in (ReferenceEngine, FastEngine))
        assert reference == fast, name
        ran |= {name} if "refused" not in fast else set()
    assert len(ran) >= len(ALL) - 5


def test_i8_a_policy_in_plain_python_on_several_devices() -> None:
    """The same seats, asked; one log."""
    rng = np.random.default_rng(6)
    for name in ("lru", "lfu", "next-gate", "min-bypass", "finemoe"):
        case = spread(mixed_case(rng), 3, slots=9, host=1.5, between=Interconnect(1e9, 2))
        asked = partial(FastEngine, asked=True)
        assert outcome(FastEngine, case, name) == outcome(asked, case, name), name


# ---- exchange ------------------------------------------------------------------------------------


def test_v9_what_travels_is_counted_by_hand() -> None:
    events = [[[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3, 5]]]
    case = decode_case(events, 6, 6, machine())
    model = replace(case.meta.model, hidden=8, dtype="bf16")
    case = replace(case, meta=replace(case.meta, model=model))
    between = Interconnect(1e9, 100)
    # Round robin over two: odd experts lie on device 1. Away: {1}, {3, 5}, none, {1, 3, 5}: one
    # vector of 16 bytes there and back, 3 times.
    tally = tally_of(replace(spread(case, 2, between=between), initial="all", charged=False))
    assert tally.times.exchange == 3 * 2 * (100 + 16)
    # Over three: device 1 and device 2 each get the token once.
    tally = tally_of(replace(spread(case, 3, between=between), initial="all", charged=False))
    assert tally.times.exchange == 4 * 2 * (100 + 2 * 16)
    # Whole layers: the state moves once a step, between the layers.
    tally = tally_of(replace(spread(case, 2, "layers", between=between), initial="all"))
    assert tally.times.exchange == 2 * (100 + 16)
    assert tally_of(replace(spread(case, 2), initial="all")).times.exchange == 0


@given(several())
def test_v9_a_block_and_an_event_travel_alike(case: Case) -> None:
    """``Exchange.of_block`` against ``ns`` of each layer event, and that against a plain count."""
    world = setup_of(case, spec_of("lru").build()).world
    costs = make_costs(case.model, case.hardware)
    rng = np.random.default_rng(3)
    layers = np.tile(np.arange(case.meta.layers), 3)
    steps = np.repeat(np.arange(3), case.meta.layers)
    tokens = rng.integers(1, 4, len(layers))
    starts = np.concatenate(([0], np.cumsum(tokens)))
    k = case.meta.top_k
    chosen = np.array(
        [rng.permutation(case.meta.experts)[:k] for _ in range(int(starts[-1]))], np.uint16
    )
    block = Exchange(world, costs).of_block(layers, steps, starts, chosen)
    each = Exchange(world, costs)
    assert world.owners is not None
    travel = Travel(world.layers, world.owners)
    for event, layer in enumerate(layers.tolist()):
        if event % case.meta.layers == 0:
            each.step_begins()
        rows = chosen[starts[event] : starts[event + 1]]
        assert block[event] == each.ns(layer, rows)
        own = world.owners.reshape(world.layers, -1)[layer]
        plain = sum(len({int(own[e]) for e in row} - {int(travel.home[layer])}) for row in rows)
        moves = event % case.meta.layers and travel.home[layer] != travel.home[layer - 1]
        takes = costs.exchange_ns(plain, 2) + costs.exchange_ns(len(rows) if moves else 0, 1)
        assert block[event] == takes


# ---- what a user sees ----------------------------------------------------------------------------


def demo(**more: Any) -> list[dict[str, Any]]:
    request = Request(trace_path("demo"), load_hardware("rtx3090x6"), limit=2)
    runs: list[dict[str, Any]] = replay(replace(request, **more))["runs"]
    return runs


def test_the_six_devices_of_finemoe_come_from_one_profile() -> None:
    (run,) = demo(policies=("finemoe",))
    assert len(run["devices"]) == 6 and run["placement"] == "round-robin"
    (again,) = demo(policies=("finemoe",), engine="reference")
    assert {**again, "engine": "fast"} == run
    for name in ("accesses", "hits", "misses", "loads", "bytes_loaded", "link_busy_ns"):
        assert run[name] == sum(device[name] for device in run["devices"])
    assert run["imbalance"]["accesses"] >= 1
    assert run["times_ns"]["exchange"] > 0 and run["exchange_charged"]
    (free,) = demo(hardware=load_hardware("rtx3090"), devices=2)
    assert free["times_ns"]["exchange"] == 0 and not free["exchange_charged"]
    assert sum(run["times_ns"].values()) == run["time_ns"]


def test_a_placement_fitted_on_what_is_served_is_a_bound(tmp_path: Path) -> None:
    (blind,) = demo(placement="round-robin")
    (fitted,) = demo(placement="load")
    assert (blind["oracle"], fitted["oracle"]) == (False, True)
    out = [demo(placement=how, out=tmp_path)[0]["run_dir"] for how in PLACEMENTS[:2]]
    assert out[0] != out[1]


def test_lanes_of_each_device_are_a_process_of_the_timeline() -> None:
    events = walk(1, 3, 2, 6, 3)
    hardware = machine(expert_ns=3, dense_ns=2)
    case = spread(decode_case(events, 6, 4, hardware), 2, slots=6, between=Interconnect(1e9, 5))
    engine, works = start(case)
    drive(engine, works)
    assert engine.spans is not None
    made = chrome_events(engine.spans, 6)
    names = {e["pid"]: e["args"]["name"] for e in made if e["name"] == "process_name"}
    assert names == {DEVICES: "device 0", DEVICES + 1: "device 1"}
    for event in made:
        if event["ph"] == "X" and "args" in event:
            expert = event["args"]["layer"] * 6 + event["args"]["expert"]
            assert event["pid"] == DEVICES + case.owners[expert]
    assert {e["tid"] for e in made if e["name"] == "exchange"} == {5}


def refusals() -> Sequence[tuple[dict[str, Any], str]]:
    return [
        ({"ladder": True}, "--ladder: its rungs are those of one device"),
        ({"capacities": ("5",)}, "--capacity: is what all 6 devices hold together"),
        ({"devices": 99, "placement": "layers"}, "--devices 99: more than the"),
        ({"capacities": ("3/layer",)}, "--capacity: is what all 6 devices hold together"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_what_cannot_be_is_refused(number: int) -> None:
    more, why = refusals()[number]
    with pytest.raises(UsageError, match=why):
        demo(**more)


@pytest.mark.parametrize(
    ("table", "key", "value", "why"),
    [
        (None, "devices", 0, "devices: must be at least 1"),
        (None, "devices", 65, "devices: must be at most 64"),
        ("interconnect", "bytes_per_s", 0, "interconnect.bytes_per_s: must be above 0"),
        ("interconnect", "latency", 3, "interconnect.latency: unknown key"),
        ("host", "links_bytes_per_s", 1e9, "host.links_bytes_per_s: is less than one link's"),
    ],
)
def test_bad_keys_of_a_profile_are_named(
    table: str | None, key: str, value: object, why: str
) -> None:
    data = load_hardware("rtx3090x6").to_dict()
    (data if table is None else data[table])[key] = value
    with pytest.raises(ProfileError, match=why):
        HardwareProfile.from_dict(data)


def test_a_profile_of_several_devices_comes_back() -> None:
    profile = load_hardware("rtx3090x6")
    assert HardwareProfile.from_dict(profile.to_dict()) == profile
    one = load_hardware("rtx3090").to_dict()
    assert not {"devices", "interconnect"} & set(one) and "links_bytes_per_s" not in one["host"]


@pytest.mark.parametrize("number", range(3))
def test_every_preset_serves_several_devices(number: int) -> None:
    rng = np.random.default_rng(8 + number)
    for name in ALL:
        made = spread(
            mixed_case(rng), 2, PLACEMENTS[number], slots=8, by_layer=number == 1, host=1.5
        )
        if name == "hobbit":
            with pytest.raises(NotRunError, match="in one precision alone"):
                tally_of(made, name)
            continue
        tally = tally_of(made, name)
        assert all(device.counts().accesses for device in tally.devices), name


def test_what_is_counted_after_warming_is_alike_on_several_devices() -> None:
    asked = {"limit": 3, "warm": 1, "devices": 2, "arrivals": "poisson:20", "batch": 2}
    told = [
        moesim.replay("demo", engine=engine, **asked).summary["after_warm"]
        for engine in ("fast", "reference")
    ]
    assert told[0] == told[1]
    assert told[0]["accesses"] == told[0]["hits"] + told[0]["late_hits"] + told[0]["misses"] > 0


@pytest.mark.parametrize(
    "line",
    [
        "plan --trace demo --budget 12MB --out plan.toml",
        "real run --trace demo",
        "real quality --model demo --policy swapmoe --capacity 50%",
    ],
)
def test_what_knows_one_device_refuses_a_machine_of_several(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line.split(), "--hardware", "rtx3090x6"]) == 2
    assert "has 6 devices" in capsys.readouterr().err
