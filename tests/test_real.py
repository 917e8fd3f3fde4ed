"""The executor: the policies' decisions on real threads and bytes (law (a) of the design)."""

from __future__ import annotations

import json
import re
import shlex
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from moesim.cli import main, parser
from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Setup as EngineSetup
from moesim.errors import UsageError
from moesim.factlog import Watched
from moesim.real.clock import RunClock, wait_until
from moesim.real.cpu import Cpu
from moesim.real.lanes import Lanes
from moesim.real.memory import Fit, Needs, fit
from moesim.real.slots import SlotLedger
from moesim.rehearsal import overlap
from moesim.serving import Server, Setup
from moesim.tally import Tally
from tests.harness import drive, inputs_of, setup_of, spec_of, without_arrivals, works_of
from tests.strategies import DEMAND_ONLY, KEEPS, MISSES, Case, cases, decode_case, machine

ROOT = Path(__file__).resolve().parents[1]

BYTES = 96
"""A case's byte, here: enough of them for three matrices."""


def enlarged(case: Case) -> Case:
    """A case whose experts are worth computing, on a bank of slots, without arrivals."""
    model = replace(
        case.model,
        hidden=4,
        dense_bytes=256,
        head_bytes=64,
        expert_bytes=tuple(_times(sizes) for sizes in case.model.expert_bytes),
    )
    link = replace(case.hardware.link, chunk_bytes=case.hardware.link.chunk_bytes * BYTES)
    return replace(
        without_arrivals(case),
        meta=replace(case.meta, model=model),
        capacity_bytes=tuple(c * BYTES for c in case.capacity_bytes),
        hardware=replace(case.hardware, link=link),
        options=replace(case.options, allocator="slots"),
    )


def _times(sizes: int | tuple[int, ...]) -> int | tuple[int, ...]:
    return sizes * BYTES if isinstance(sizes, int) else tuple(s * BYTES for s in sizes)


def roomy(case: Case) -> Case:
    """The same, with room for the largest slot in every cache."""
    least = max(case.booked())
    return replace(case, capacity_bytes=tuple(max(c, least) for c in case.capacity_bytes))


def serving(engine: EngineSetup) -> Setup:
    """What a server is given for what an engine is given."""
    return Setup(
        engine.policy,
        engine.world,
        engine.costs,
        engine.scheduler,
        engine.initial,
        engine.initial_charged,
    )


def device_of(case: Case, ledger: SlotLedger, seed: int = 0) -> Cpu:
    """Banks for a case; every copy is compared with its expert."""
    model = case.model
    longest = max(int(rows.position.max()) + 1 for rows in case.requests)
    needs = Needs.of(model, ledger.slots, case.batch, longest)
    whole = Fit(needs.experts, needs.layers)
    return Cpu(model, ledger, needs, whole, threads=1, seed=seed, verify=True)


def really(case: Case, name: str, *sets: str, paced: bool = False) -> tuple[Tally, Watched]:
    """Run a policy on threads."""
    spec = spec_of(name, *sets)
    policy = Watched(spec.build())
    setup = serving(setup_of(case, policy, spec.initial))
    ledger = SlotLedger(setup.world, setup.world.top_k if policy.bypass else 0)
    device = device_of(case, ledger)
    with Lanes(device, ledger, setup.costs, paced=paced, watchdog_s=20) as lanes:
        server = Server(setup, lanes, ledger, timeline=True)
        for work in works_of(case, inputs_of(policy.inner), arrivals=False):
            server.offer(work)
            server.advance()
        server.close()
        assert server.advance()
    device.close()
    whole_slots(ledger)
    return server.tally, policy


def whole_slots(ledger: SlotLedger) -> None:
    """Every copy has a slot of its own, and every slot is taken or free."""
    for size, count in ledger.slots.items():
        taken = [s for key, s in ledger.slot_of.items() if ledger.bytes_of[key] == size]
        assert sorted([*taken, *ledger._free[size]]) == list(range(count))


COUNTED = ("decision_digest", "evictions", "evicted_bytes", "overflows", "served", "steps")


def equal_decisions(case: Case, name: str, *sets: str) -> None:
    """Law (a): all three hosts judge, load and evict alike."""
    spec = spec_of(name, *sets)
    real, _ = really(case, name, *sets)
    for engine in (ReferenceEngine, FastEngine):
        setup = setup_of(case, spec.build(), spec.initial)
        tally = drive(engine(setup), works_of(case, inputs_of(setup.policy), arrivals=False))  # type: ignore[arg-type]
        assert asdict(real.counts()) == asdict(tally.counts())
        for field in COUNTED:
            assert getattr(real, field) == getattr(tally, field), field


@settings(max_examples=120)
@given(case=cases(arrivals=False), name=st.sampled_from(DEMAND_ONLY))
def test_law_a_demand_only_decisions_are_equal_in_all_hosts(case: Case, name: str) -> None:
    equal_decisions(roomy(enlarged(case)), name)


@settings(max_examples=60)
@given(case=cases(arrivals=False), keep=st.sampled_from(KEEPS), miss=st.sampled_from(MISSES))
def test_law_a_for_every_keep_and_miss_seat(case: Case, keep: str, miss: str) -> None:
    equal_decisions(roomy(enlarged(case)), "lru", f"keep={keep}", f"miss={miss}")


@settings(max_examples=40)
@given(case=cases(arrivals=False), name=st.sampled_from(DEMAND_ONLY))
def test_law_a_holds_on_a_slow_link_too(case: Case, name: str) -> None:
    """Paced copies land while experts compute; what is decided stays."""
    slow = machine(bytes_per_s=20e6, latency_ns=20_000, chunk_bytes=64)
    made = roomy(enlarged(replace(case, hardware=slow)))
    assert really(made, name, paced=True)[0].decision_digest == (
        really(made, name)[0].decision_digest
    )


# ---- the command ---------------------------------------------------------------------------------


SMALL = """
schema = 1
name = "small"
source = "assumed"
provenance = "a test"
hf_id = ""
layers = 8
experts = 16
top_k = 2
shared_experts = 0
stacks = [["decoder", 8]]
score = "softmax"
dtype = "bf16"
hidden = 16
intermediate = 8
precisions = ["bf16"]
dense_bytes = 512
dense_flops_per_token = 512
expert_flops_per_token = 768
kv_bytes_per_token_per_layer = 64
kv_window_tokens = 0
head_bytes = 512
head_flops_per_token = 512
held_bytes = 0

[expert_bytes]
bf16 = 768

[config]
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A model profile of the sample's shape, with experts of 768 bytes."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """The object that a command prints."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("name", ["lru", "lfu", "static", "min", "min-bypass", "cpu", "fiddler"])
def test_law_a_on_the_sample(name: str, small: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--trace", "demo", "--policy", name, "--limit", 2, "--costs", small)
    told = answer(capsys, "real", "run", *words, "--verify")["runs"][0]
    for engine in ("reference", "fast"):
        there = answer(capsys, "replay", *words, "--engine", engine)["runs"][0]
        for key in ("decision_digest", "hits", "misses", "loads", "bytes_loaded", "evictions"):
            assert told[key] == there[key]
    assert told["simulated"]["decision_digest"] == told["decision_digest"]
    # Law (d): where nothing is prefetched, the loads of each event are the same.
    assert told["simulated"]["overlap"]["mean"] in (1.0, None)


def test_a_batch_in_chunks_per_layer(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Unions larger than a layer's cache go in waves."""
    words = ("--trace", "demo", "--limit", 4, "--costs", small, "--capacity", "2/layer")
    more = ("--batch", 3, "--chunk-tokens", 7)
    told = answer(capsys, "real", "run", *words, *more, "--verify")["runs"][0]
    there = answer(capsys, "replay", *words, *more)["runs"][0]
    assert told["overflows"] == there["overflows"] > 0
    assert told["decision_digest"] == there["decision_digest"]


def test_the_answer_has_a_replays_keys_and_its_own(
    small: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--trace", "demo", "--policy", "next-gate", "--limit", 2, "--costs", small)
    out = tmp_path / "runs"
    told = answer(capsys, "real", "run", *words, "--out", out, "--timeline")
    there = answer(capsys, "replay", *words, "--out", out)
    assert told.keys() == there.keys()
    run, replayed = told["runs"][0], there["runs"][0]
    assert run.keys() - replayed.keys() == {
        "measured", "device", "paced", "link_bytes_per_s", "simulated"
    }  # fmt: skip
    assert not replayed.keys() - run.keys()
    assert sum(run["times_ns"].values()) == run["time_ns"] > 0
    overlap_of = run["simulated"]["overlap"]
    assert 0 <= overlap_of["mean"] <= 1 and overlap_of["loads_in_either"] > 0
    folders = [Path(r["run_dir"]) for r in (run, replayed)]
    names = [{p.name for p in folder.iterdir()} for folder in folders]
    assert names[0] - names[1] == {"facts.jsonl.zst", "timeline.json"}
    assert not any(p.name.startswith(".") for p in out.iterdir())
    assert main(["diff", *map(str, folders)]) == 1
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    assert manifest["device"]["expert_buffers"] == manifest["device"]["experts"]


def test_every_repeat_is_kept(
    small: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("real", "run", "--trace", "demo", "--limit", 1, "--costs", small, "--out", tmp_path)
    first, second = (answer(capsys, *words)["runs"][0] for _ in range(2))
    assert first["run_dir"] != second["run_dir"]
    assert first["decision_digest"] == second["decision_digest"]


def test_experts_share_buffers_where_ram_is_short(
    small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--trace", "demo", "--limit", 1, "--costs", small, "--capacity", "8")
    run = answer(capsys, "real", "run", *words, "--ram", "90KB", "--verify")["runs"][0]
    assert 2 <= run["device"]["expert_buffers"] < run["device"]["experts"]
    assert run["device"]["slots"] == {"768": 8}


def test_the_commands_of_the_manual_are_understood() -> None:
    text = (ROOT / "real" / "README.md").read_text()
    found = re.findall(r"^\$ moesim (.+)$", text, re.MULTILINE)
    assert found
    for words in found:
        parser().parse_args(shlex.split(words))


# ---- parts ---------------------------------------------------------------------------------------


def test_a_wait_ends_at_its_moment() -> None:
    stopped = threading.Event()
    moment = time.perf_counter_ns() + 3_000_000
    wait_until(moment, stopped)
    assert time.perf_counter_ns() >= moment
    stopped.set()
    wait_until(time.perf_counter_ns() + 10**12, stopped)


def test_the_clock_stands_still_while_the_run_rests() -> None:
    clock = RunClock()
    assert clock.now() == 0
    clock.resume()
    time.sleep(0.002)
    clock.rest()
    at = clock.now()
    time.sleep(0.002)
    assert clock.now() == at >= 2_000_000
    clock.resume()
    assert clock.now() - at < 1_000_000_000


@given(
    st.integers(1, 9), st.integers(1, 500), st.integers(1, 40), st.integers(0, 500),
    st.integers(1, 4), st.integers(1, 40_000),
)  # fmt: skip
def test_what_is_planned_fits(
    slots: int, nbytes: int, experts: int, dense: int, least: int, ram: int
) -> None:
    needs = Needs({nbytes: slots}, nbytes, experts, dense, 3, 100, least)
    try:
        found = fit(needs, ram, "x")
    except UsageError as error:
        assert "--capacity x" in str(error) and "GB" in str(error)
        return
    round_up = lambda n: -(-n // 64) * 64  # noqa: E731
    held = needs.bank_bytes + 128 + found.expert_buffers * round_up(nbytes)
    assert held + found.dense_buffers * round_up(dense) <= ram
    assert min(least, experts) <= found.expert_buffers <= experts
    assert 1 <= found.dense_buffers <= 3


def test_overlap_by_hand() -> None:
    real = {0: {1, 2}, 1: {3}, 4: set()}
    made = {0: {2, 5}, 1: {3}, 2: {7}}
    assert overlap(real, made) == {
        "mean": (1 / 3 + 1 + 0) / 3,
        "events": 3,
        "equal_events": 1,
        "loads_in_both": 2,
        "loads_in_either": 5,
    }
    assert overlap({}, {})["mean"] is None


def test_a_paced_copy_takes_the_modelled_time() -> None:
    """Three misses of 96 bytes, 4 ms each: the run cannot be quicker."""
    hardware = machine(latency_ns=4_000_000, bytes_per_s=1e12)
    case = enlarged(decode_case([[[0]], [[1]], [[2]]], 3, 1, hardware))
    tally, _ = really(case, "lru", paced=True)
    assert tally.times.stall >= 11_000_000
    assert tally.link_busy_ns >= 12_000_000
