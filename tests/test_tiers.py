"""Host memory that does not hold every expert, the drive behind it, experts in other precisions."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli import main
from moesim.costs import make_costs
from moesim.errors import ProfileError
from moesim.policies.low import light
from moesim.profile import (
    Drive,
    HardwareProfile,
    Roofline,
    list_hardware,
    list_models,
    load_hardware,
    load_model,
)
from moesim.types import DROPPED
from tests.harness import Run, run
from tests.strategies import Case, cases, decode_case, machine, specs, tiered
from tests.test_engines import equal
from tests.test_hobbit import two_precisions, weighted

Demand = list[list[list[int]]]


def reading(hardware: HardwareProfile, read_ns: int, chunk_bytes: int = 0) -> HardwareProfile:
    """With a drive that takes so long for a byte."""
    return replace(hardware, ssd=Drive(rate_of(read_ns), 0, chunk_bytes))


def rate_of(byte_ns: int) -> float:
    """Bytes a second; one that is a little high still rounds up to the whole time."""
    return math.nextafter(1e9 / byte_ns, math.inf) if byte_ns else math.inf


def shelved_case(
    events: Demand, slots: int, dram: int, read_ns: int, chunks: int = 0, **machine_: Any
) -> Case:
    """Twelve experts of one byte a layer; a copy takes a nanosecond unless told otherwise. Host
    memory begins with the first ``dram`` experts of all."""
    case = decode_case(events, 12, slots, machine(**machine_), scope="global")
    return replace(case, hardware=reading(case.hardware, read_ns, chunks), dram_bytes=dram)


def fresh(steps: int, layers: int, k: int) -> Demand:
    """Never what the last tokens asked for, and not the first ``k`` to begin with."""
    return [
        [[(step * k + k + i) % 12 for i in range(k)] for _ in range(layers)]
        for step in range(steps)
    ]


# ---- two machines that are one ------------------------------------------------------------------


def without_tier(done: Run) -> dict[str, Any]:
    return {**asdict(done.tally), "ssd": None}


@given(st.data(), cases(), specs())
def test_host_memory_for_all_is_no_tier(
    data: st.DataObject, case: Case, spec: tuple[str, tuple[str, ...]]
) -> None:
    """To the log's last word: however slow the drive, nothing is read."""
    behind = data.draw(tiered(case))
    every = int(case.model.expert_bytes_table().sum()) * case.model.experts
    all_in = run(replace(behind, dram_bytes=every), spec[0], *spec[1])
    assert without_tier(all_in) == asdict(run(case, spec[0], *spec[1]).tally)
    assert all_in.tally.ssd is not None
    assert (all_in.tally.ssd.reads, all_in.tally.ssd.dram_misses) == (0, 0)


@given(st.data(), cases(single=True, equal=True, fits=True), st.sampled_from(["lru", "lfu", "min"]))
def test_a_drive_that_takes_no_time_costs_none(data: st.DataObject, case: Case, name: str) -> None:
    """Even if host memory holds one expert: what is read there at once is copied at once."""
    behind = data.draw(tiered(case))
    quick = replace(behind, hardware=reading(behind.hardware, 0))
    with_drive, without = run(quick, name).tally, run(case, name).tally
    assert with_drive.times == without.times
    assert with_drive.counts() == without.counts()


@given(st.data(), cases(), specs(), st.booleans(), st.booleans())
def test_i8_both_engines_read_alike(
    data: st.DataObject,
    case: Case,
    spec: tuple[str, tuple[str, ...]],
    share_kv: bool,
    flat: bool,
) -> None:
    options = replace(case.options, share_kv=share_kv, flat=flat)
    equal(replace(data.draw(tiered(case)), options=options), spec[0], *spec[1])


@given(st.data(), cases(arrivals=False))
def test_i8_two_precisions_are_two_copies_in_host_memory(data: st.DataObject, case: Case) -> None:
    case = data.draw(tiered(two_precisions(case)))
    equal(case, "hobbit")
    run(case, "hobbit", "prefetch=none", "miss=cpu")


# ---- time, by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read_ns", "copy_ns", "expert_ns"),
    [(7, 3, 1), (3, 7, 1), (2, 3, 11), (5, 0, 1), (0, 5, 1), (4, 4, 4)],
)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_what_misses_both_tiers_is_stored_then_forwarded(
    k: int, read_ns: int, copy_ns: int, expert_ns: int
) -> None:
    """Read, copied, computed: three stages in a row, each expert wholly through one before the
    next; experts follow one another in them as fast as the slowest stage."""
    steps, layers, dense_ns = 4, 2, 5
    case = shelved_case(
        fresh(steps, layers, k),
        2 * k,
        k,
        read_ns,
        bytes_per_s=rate_of(copy_ns),
        dense_ns=dense_ns,
        expert_ns=expert_ns,
    )
    done = run(case, "lru").tally
    stages = (read_ns, copy_ns, expert_ns)
    each = dense_ns + sum(stages) + (k - 1) * max(stages)
    assert done.ssd is not None
    assert done.ssd.dram_hits == 0
    assert done.ssd.reads == steps * layers * k
    assert done.times.total() == steps * layers * each


def test_host_memory_for_one_expert_reads_one_at_a_time() -> None:
    """The next read waits until the link has taken the copy."""
    case = shelved_case([[[4, 5]]], 4, 1, 10, latency_ns=2, dense_ns=1, expert_ns=1)
    done = run(case, "lru")
    assert done.lane("ssd") == [(1, 11, 4), (14, 24, 5)]
    assert done.lane("demand") == [(11, 14, 4), (24, 27, 5)]


def test_what_host_memory_holds_goes_first() -> None:
    """Expert 1 is there, 5 is not: 1 is copied while 5 is read, though 5 weighs more."""
    case = shelved_case([[[5, 1]]], 4, 2, 10, dense_ns=1, expert_ns=1)
    done = run(case, "lru")
    assert done.lane("demand") == [(1, 2, 1), (11, 12, 5)]
    assert done.lane("ssd") == [(1, 11, 5)]
    assert done.tally.ssd is not None
    assert (done.tally.ssd.dram_hits, done.tally.ssd.dram_misses) == (1, 1)


def test_a_host_worker_waits_for_the_read() -> None:
    case = shelved_case([[[5]]], 4, 2, 10, dense_ns=1, cpu_ns=4)
    done = run(case, "lru", "miss=cpu")
    assert done.lane("ssd") == [(1, 11, 5)]
    assert done.lane("cpu") == [(11, 15, 5)]
    assert done.tally.times.cpu_wait == 14


def test_demand_overtakes_a_prefetch_on_the_drive() -> None:
    """Expert 6 of layer 1 is foretold, and its gate asks for 7 instead: the read of 6, four chunks
    long, stops at the end of one."""
    case = decode_case(
        [[[0], [7]]], 12, 8, machine(dense_ns=6, expert_ns=0), scope="global", nbytes=4
    )
    case = replace(case, hardware=reading(case.hardware, 5, chunk_bytes=1), dram_bytes=16)
    rows = case.requests[0]
    foretold = replace(rows, ahead={1: np.full_like(rows.experts, 6)})
    case = replace(case, requests=(foretold,))
    done = run(case, "lru", "prefetch=next-gate", "prefetch.cancel=false")
    reads = done.lane("ssd")
    assert [key for _, _, key in reads] == [18, 18, 19]
    assert reads == [(6, 11, 18), (11, 16, 18), (16, 36, 19)]


def test_the_initial_state_is_read_too() -> None:
    """Of three experts the first two are in host memory: one read, three copies."""
    case = shelved_case([[[0, 1]]] * 2, 3, 2, 10, dense_ns=1, expert_ns=1)
    filled = replace(case, initial="all", charged=True)
    done = run(filled, "lru").tally
    assert done.times.initial == 3 * 1 + 10
    assert done.ssd is not None
    assert (done.ssd.initial_reads, done.ssd.initial_bytes, done.ssd.reads) == (1, 1, 0)
    assert run(replace(filled, charged=False), "lru").tally.times.initial == 0


# ---- books ---------------------------------------------------------------------------------------


@given(st.data(), cases(), specs())
def test_every_byte_read_is_accounted_for(
    data: st.DataObject, case: Case, spec: tuple[str, tuple[str, ...]]
) -> None:
    """From the log alone: what was read and forgotten, and what is left."""
    behind = data.draw(tiered(case))
    done = run(behind, spec[0], *spec[1])
    reads, size = done.tally.ssd, behind.model.experts
    sizes = behind.model.expert_bytes_table()
    assert reads is not None
    read = [record[-1] for record in done.of("read")]
    assert reads.reads == len(read)
    whole = sum(int(sizes[key // size]) for key in read)
    assert whole <= reads.bytes_read <= whole + reads.evicted_bytes + reads.resident_bytes
    assert reads.start_bytes + reads.bytes_read == reads.evicted_bytes + reads.resident_bytes
    assert reads.evictions == len(done.of("forget"))
    assert reads.resident_bytes <= behind.dram_bytes
    served = done.tally.served
    assert reads.dram_hits + reads.dram_misses == served["fetch"] + served["cpu"]


@given(
    st.data(),
    cases(single=True, equal=True, fits=True, dropped=False),
    st.sampled_from(["lru", "lfu", "lru miss=cpu"]),
)
def test_host_memory_is_an_lru_of_what_is_asked_for(
    data: st.DataObject, case: Case, name: str
) -> None:
    """A model of a few lines, fed with the misses of each gate, forgets the same in the same order.
    There is room for the largest demand, so nothing of an event makes way for the same event."""
    behind = data.draw(tiered(case))
    nbytes = int(case.model.expert_bytes_table()[0])
    room = max(behind.dram_bytes // nbytes, case.model.top_k)
    behind = replace(behind, dram_bytes=room * nbytes)
    done = run(behind, *name.split())
    held = OrderedDict.fromkeys(range(min(room, case.model.layers * case.model.experts)))
    forgotten, hits = [], 0
    for gate in done.of("gate"):
        missing = [word // 4 for word in gate[6:] if word % 4 == 2]
        there = [key for key in missing if key in held]
        hits += len(there)
        for key in there:
            held.move_to_end(key)
        for key in missing:
            if key not in there:
                if len(held) == room:
                    forgotten.append(held.popitem(last=False)[0])
                held[key] = None
    assert done.tally.ssd is not None
    assert done.tally.ssd.dram_hits == hits
    assert [record[-1] for record in done.of("forget")] == forgotten


# ---- machines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_hardware())
def test_every_shipped_machine_has_a_drive_behind_its_memory(name: str) -> None:
    machine_ = load_hardware(name)
    behind = machine_.tiered()
    assert behind.ssd is not None
    assert behind.tiered() == behind
    assert machine_.memory.unified == (name == "jetson-orin")
    assert HardwareProfile.from_dict(behind.to_dict()) == behind
    assert "ssd" not in machine_.untiered().to_dict()


def test_the_link_of_unified_memory_is_the_drive() -> None:
    """One stage; a framework that copies has the drive's read as its first of two."""
    jetson, model = load_hardware("jetson-orin"), load_model("switch-base-16")
    two = make_costs(model, jetson.tiered())
    for nbytes in (1, 1 << 20, 18 << 20):
        assert two.read_ns(nbytes) == make_costs(model, jetson).link_ns(nbytes)
    ends = make_costs(model, jetson).chunk_ends(18 << 20)
    assert two.read_ends(18 << 20) == ends
    assert two.link_ns(82_000) == 1_000
    assert isinstance(jetson.tiered().host.cpu, Roofline)


def test_a_machine_without_a_drive_says_what_it_lacks() -> None:
    with pytest.raises(ProfileError, match=r"made: has no \[ssd\].*--ssd"):
        machine().tiered()
    told = machine().with_drive(2e9)
    assert told.ssd is not None
    assert (told.ssd.bytes_per_s, told.ssd.latency_ns) == (2e9, 100_000)


@pytest.mark.parametrize(
    ("table", "key", "value", "said"),
    [
        ("ssd", "bytes_per_s", 0, "ssd.bytes_per_s: must be above 0"),
        ("ssd", "speed", 1, "ssd.speed: unknown key"),
        ("memory", "unified", 1, "memory.unified: must be true or false"),
        ("memory", "copy_bytes_per_s", 1e9, "memory.copy_bytes_per_s: is of unified memory"),
    ],
)
def test_a_strange_drive_is_refused_by_its_key(table: str, key: str, value: Any, said: str) -> None:
    data = load_hardware("rtx4090").to_dict()
    data[table][key] = value
    with pytest.raises(ProfileError, match=said):
        HardwareProfile.from_dict(data)


# ---- precisions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_models())
def test_the_bytes_of_every_precision_add_up(name: str) -> None:
    """Held in each that it states; int8 and int4 within a scale's share of 8 and 4 bits."""
    model = load_model(name)
    for index, precision in enumerate(model.precisions):
        held = model.held_in([precision])
        assert held.precisions == (precision,)
        assert held.all_expert_bytes() == model.all_expert_bytes(index)
        assert replace(held, precisions=(), expert_bytes=()) == replace(
            model, precisions=(), expert_bytes=()
        )
    weights = model.expert_flops_per_token // 2
    for precision, bits in (("int8", 8), ("int4", 4)):
        if model.precisions[0] != "mxfp4":
            held_bytes = int(model.held_in([precision]).expert_bytes_table()[0])
            assert weights * bits / 8 <= held_bytes <= weights * bits / 8 * 1.04


def test_a_precision_that_cannot_be_had_is_refused() -> None:
    model = load_model("gpt-oss-20b")
    with pytest.raises(ProfileError, match="no precision 'fp3'; name some of mxfp4, int8, int4"):
        model.held_in(["fp3"])
    with pytest.raises(ProfileError, match="int8 would be no smaller than mxfp4"):
        model.held_in(["int8"])
    with pytest.raises(ProfileError, match="order precisions by size"):
        load_model("mixtral-8x7b").held_in(["int4", "bf16"])


@given(
    st.lists(st.lists(st.integers(0, 1 << 14), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([0, 1, 1 << 13, 1 << 14, 1 << 15]),
)
def test_light_is_less_than_a_share_of_the_mean(weights: list[list[int]], below: int) -> None:
    chosen = np.array([[0, 1, DROPPED]] * len(weights), np.uint16)
    found = light(np.array(weights, np.int32), chosen, below)
    for row, got in zip(weights, found.tolist(), strict=True):
        mean = Fraction(row[0] + row[1], 2)
        assert got == [w < Fraction(below, 1 << 14) * mean for w in row[:2]] + [False]


def test_a_light_expert_is_loaded_low_only_where_it_is_missing() -> None:
    """Weights 3 to 1, in turns: 1 is light, but in the third step it is there in full."""
    case = weighted([[0.75, 0.25]] * 4, [[0, 1], [1, 2], [0, 1], [3, 2]], 8)
    done = run(case, "lru", "miss=low", "miss.below=1")
    keys = [record[2] for record in done.of("issue")]
    # Low copies have keys from 4 on. Expert 1 is light at first, and then weighs.
    assert keys == [0, 5, 1, 6, 3]
    quality = done.tally.quality
    assert quality is not None
    assert (quality.agreed, quality.mass_kept) == (quality.chosen, quality.mass)
    assert 0 < quality.mass_low < quality.mass
    assert run(case, "lru", "miss=low", "miss.below=0").tally.quality.mass_low == 0  # type: ignore[union-attr]


@given(st.data(), cases(arrivals=False))
def test_i8_low_on_a_miss(data: st.DataObject, case: Case) -> None:
    equal(data.draw(tiered(two_precisions(case))), "lru", "miss=low", "miss.below=1")


# ---- the command line ----------------------------------------------------------------------------

REPLAY = ("replay", "--trace", "demo", "--limit", "2", "--engine", "reference")


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*REPLAY, *words, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)["runs"][0]
    return told


def test_what_is_not_used_is_not_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Neither in the answer nor in the manifest, so that no run is another for it."""
    plain = answered(capsys, "--out", str(tmp_path))
    manifest = json.loads(Path(plain["run_dir"], "manifest.json").read_text())
    assert not {"ssd", "dram", "dram_bytes", "held_in"} & {*plain}
    assert not {"dram", "precisions"} & {*manifest}
    assert "ssd" not in manifest["hardware"]
    told = answered(capsys, "--out", str(tmp_path), "--dram", "50%", "--precision", "int8")
    manifest = json.loads(Path(told["run_dir"], "manifest.json").read_text())
    nbytes = manifest["model"]["expert_bytes"]["int8"]
    assert told["dram_bytes"] == nbytes * 8 * 32 // 2
    assert manifest["dram"] == ["50%", told["dram_bytes"]]
    assert manifest["precisions"] == ["int8"]
    assert manifest["hardware"]["ssd"]["bytes_per_s"] == 3.5e9
    assert told["held_in"] == {"precisions": ["int8"], "shipped": "fp32", "quality": "unknown"}
    assert told["bytes_loaded"] == told["loads"] * nbytes


def test_host_memory_begins_with_what_the_device_does_not_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A quarter and 60 % are less than all: whatever the device starts with is read."""
    told = answered(capsys, "--initial", "static", "--dram", "60%")
    assert told["ssd"]["initial_reads"] == told["initial_loads"] > 0
    told = answered(capsys, "--initial", "static", "--dram", "100%")
    assert (told["ssd"]["initial_reads"], told["ssd"]["reads"]) == (0, 0)


def test_a_slower_drive_costs_time(capsys: pytest.CaptureFixture[str]) -> None:
    times = [
        answered(capsys, "--dram", "40%", "--ssd", rate)["time_ns"]
        for rate in ("inf", "4GB/s", "1GB/s")
    ]
    assert times == sorted(times)
    assert times[0] < times[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ssd", "3GB/s"), "--ssd: nothing is read from the drive; give --dram SIZE too"),
        (("--dram", "1KiB"), "--dram 1KiB: has room for 1024 bytes, and one expert has"),
        (("--dram", "1GiB", "--devices", "2"), "a drive behind several devices is not modelled"),
        (("--dram", "1GiB", "--write-back", "serial"), "nothing is written back"),
        (("--dram", "lots"), "--dram lots: write a size such as 24GiB"),
        (("--dram", "1GiB", "--ssd", "fast"), "--ssd fast: write a rate"),
        (("--set", "miss=low", "--trace", "demo", "--costs", "gpt-oss-20b"), "has mxfp4 alone"),
        (("--precision", "int3"), "has no precision 'int3'; name some of"),
        (
            ("--hardware", "jetson-orin", "--costs", "mixtral-8x7b", "--dram", "64GiB"),
            "--dram 64GiB: with --capacity 25% takes",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*REPLAY, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
