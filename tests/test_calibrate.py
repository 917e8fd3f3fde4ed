"""Calibration: known rates come back, what is written is read, and what lacks is said."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
import torch

from moesim.cli import main
from moesim.costs import Costs, make_costs
from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import MoesimError, UsageError
from moesim.profile import (
    HardwareProfile,
    Memory,
    ModelProfile,
    Table,
    TableExpert,
    load_hardware,
)
from moesim.real import cuda, measure_cuda
from moesim.real.calibrate import Calibration, calibrate
from moesim.real.measure import (
    ALONE,
    BYTES,
    COMPUTING,
    CONTEXTS,
    DENSE,
    EXPERT,
    HANDOVER,
    HEAD,
    HOST_EXPERT,
    LINK,
    OPS,
    PLAN,
    STEP,
    SYNC,
    Point,
    Spread,
    kinds_of,
)
from moesim.real.measure_cpu import CpuBench
from moesim.real.measure_service import (
    SETTLED,
    Served,
    bench_model,
    between,
    handover,
    kept_of,
    serve,
)
from moesim.serving import COPY, Report
from tests.cuda_stand_in import StandIn
from tests.harness import drive, inputs_of, setup_of, spec_of, works_of
from tests.strategies import Case, cases, decode_case, machine
from tests.test_real import SMALL, answer, enlarged, really

has_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODEL = replace(
    ModelProfile.generic(4, 8, 2),
    expert_bytes=((300_000, 300_000, 300_000, 900_000),),
    dense_bytes=(1000, 1000, 1000, 5000),
    head_bytes=77,
)
"""Three layers of one kind and one of another."""


class Fake:
    """A machine whose times are known, and rise in straight lines."""

    reads_context = True
    hows: Mapping[str, tuple[str, ...]] = {
        LINK: (ALONE, COMPUTING),
        DENSE: (ALONE,),
        EXPERT: (ALONE, COMPUTING),
        HOST_EXPERT: (ALONE,),
        HEAD: (ALONE,),
    }

    def __init__(self, noise: Callable[[float], float] = lambda ns: ns) -> None:
        self.noise = noise
        self.given: dict[object, list[float]] = {}
        self.closed = False

    def true_ns(self, what: str, size: int, context: int = 0, kind: int = 0) -> float:
        """What it takes, alone."""
        slower = 1 + 4 * kind
        return {
            LINK: 7_000 + size / 4,
            DENSE: slower * (9_000 + 50 * size) + context,
            EXPERT: slower * (4_000 + 100 * size),
            HOST_EXPERT: slower * (40_000 + 3_000 * size),
            HEAD: 20_000 + 10 * size,
        }[what]

    def measure(self, point: Point) -> float:
        """Twice as long beside something else."""
        ns = self.true_ns(point.what, point.size, point.context, point.kind)
        return self.note(point, self.noise(ns * (1 if point.how == ALONE else 2)))

    def overheads(self) -> Mapping[str, float]:
        """Known."""
        found = {SYNC: 1_500.0, PLAN: 700.0, HANDOVER: 300.0, STEP: 90.0}
        return {name: self.note(name, self.noise(ns)) for name, ns in found.items()}

    def rates(self) -> Mapping[str, float]:
        """Known."""
        return {OPS: 2e9, BYTES: 8e9}

    def note(self, key: object, value: float) -> float:
        """What it gave."""
        self.given.setdefault(key, []).append(value)
        return value

    def memory(self) -> Memory:
        """Known."""
        return Memory(10**9, 10**6)

    def workers(self) -> int:
        """Known."""
        return 3

    def facts(self) -> dict[str, Any]:
        """Known."""
        return {"processor_name": 'a "fake" one', "torch": "0"}

    def manifest(self) -> dict[str, Any]:
        """Known."""
        return {"kind": "fake"}

    def close(self) -> None:
        """Nothing is held."""
        self.closed = True


def calibrated(
    folder: Path, fake: Fake, *, model: ModelProfile = MODEL, **more: Any
) -> tuple[HardwareProfile, dict[str, Any]]:
    """The profile that was written, read again, and the answer."""
    request = Calibration(model, folder / "hw.toml", **{"tokens": 32, "repeats": 3, **more})
    found = calibrate(request, open_bench=lambda asked: fake)
    assert fake.closed
    return load_hardware(folder / "hw.toml"), found


def mean(fake: Fake, what: str, size: int, context: int = 0) -> float:
    """Over the layers of the model."""
    kinds = kinds_of(MODEL)
    assert [count for _, count in kinds] == [3, 1]
    parts = [fake.true_ns(what, size, context, k) * n / 4 for k, (_, n) in enumerate(kinds)]
    return sum(parts)


# ---- known rates come back -----------------------------------------------------------------------


def test_known_rates_come_back(tmp_path: Path) -> None:
    """At what was measured, between it and beyond: a machine of straight lines is its profile."""
    fake = Fake()
    hardware, _ = calibrated(tmp_path, fake)
    costs = make_costs(MODEL, hardware)
    for nbytes in (0, 1, 65_536, 100_000, 300_000, 500_000, 900_000, 5_000_000):
        assert costs.link_ns(nbytes) == pytest.approx(fake.true_ns(LINK, nbytes), abs=2)
        assert costs.load_ns(nbytes) == costs.link_ns(nbytes) + 300
    for tokens in range(1, 33):
        assert costs.expert_ns(tokens) == mean(fake, EXPERT, tokens)
        assert costs.cpu_expert_ns(tokens) == mean(fake, HOST_EXPERT, tokens)
        assert costs.head_ns(tokens) == fake.true_ns(HEAD, tokens) + 90
        for context in (0, 1, 512, 3000, 8192, 20_000):
            assert costs.dense_ns(tokens, context) == pytest.approx(
                mean(fake, DENSE, tokens, context), abs=1
            )
    assert (costs.sync_ns, costs.plan_ns) == (1_500, 700)
    assert costs.job_ns(2_000, 0) == costs.job_ns(0, 8_000) == 1_000
    assert hardware.link.bytes_per_s == pytest.approx(4e9, rel=1e-5)
    assert hardware.link.latency_ns == 7_000
    assert hardware.memory == Memory(10**9, 10**6)
    assert hardware.host.workers == 3
    assert (hardware.source, hardware.name) == ("measured", "hw")


def test_a_head_that_costs_nothing_still_ends_a_pass(tmp_path: Path) -> None:
    hardware, _ = calibrated(tmp_path, Fake(), model=replace(MODEL, head_bytes=0))
    costs = make_costs(replace(MODEL, head_bytes=0), hardware)
    assert costs.head_ns(0) == 0
    assert costs.head_ns(1) == costs.head_ns(2) == 90


def test_another_model_is_refused(tmp_path: Path) -> None:
    hardware, _ = calibrated(tmp_path, Fake())
    with pytest.raises(MoesimError, match="measured for"):
        make_costs(replace(MODEL, name="another"), hardware)


class Noisy(Fake):
    """Every reading is off by up to half, by a rule that repeats."""

    def __init__(self) -> None:
        self.turn = 0
        super().__init__(self.off)

    def off(self, ns: float) -> float:
        """The same sequence each time."""
        self.turn += 1
        return ns * (0.5 + (self.turn * 7919 % 1000) / 1000)


def test_tables_rise_and_the_spread_is_kept(tmp_path: Path) -> None:
    """Whatever the noise: the profile is read, and says quartiles of what was read last."""
    fake = Noisy()
    hardware, found = calibrated(tmp_path, fake, repeats=5)
    curve, compute = hardware.link.curve, hardware.compute
    assert isinstance(compute, Table) and isinstance(hardware.host.cpu, TableExpert)
    for rows in (curve, compute.expert, compute.head, hardware.host.cpu.expert):
        assert list(rows) == sorted(rows)
        assert [ns for _, ns in rows] == sorted(ns for _, ns in rows)
    for context in {row[1] for row in compute.dense}:
        line = [ns for _, at, ns in compute.dense if at == context]
        assert line == sorted(line)
    rows = pq.read_table(tmp_path / "hw.readings.parquet").to_pylist()
    assert len(rows) == len(found["readings"]) + len(found["overheads"])
    for row in rows:
        key = row["what"] if row["what"] in found["overheads"] else Point(
            row["what"], row["how"], row["kind"], row["size"], row["context"]
        )  # fmt: skip
        if row["what"] in (OPS, BYTES):
            continue
        # The first round warms up and is not counted.
        q1, median, q3 = quantiles(fake.given[key][1:], n=4, method="inclusive")
        assert (row["q1"], row["median"], row["q3"], row["repeats"]) == (q1, median, q3, 5)


def test_a_profile_says_its_spread_and_no_date(tmp_path: Path) -> None:
    """Equal readings make equal bytes; what may differ is in the readings' metadata."""
    texts = []
    for _ in range(2):
        calibrated(tmp_path, Noisy())
        texts.append((tmp_path / "hw.toml").read_text())
    assert texts[0] == texts[1]
    assert "half of 3 repeats from" in texts[0]
    assert 'a "fake" one' in tomllib.loads(texts[0])["provenance"]
    facts = json.loads(pq.read_schema(tmp_path / "hw.readings.parquet").metadata[b"moesim"])
    assert {"date", "moesim", "torch", "model_digest", "repeats"} <= facts.keys()
    assert facts["date"][:10] not in texts[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hw.readings.parquet", "hw.toml"]


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=9))
def test_a_spread_holds_its_median(values: list[float]) -> None:
    spread = Spread.of(values)
    assert min(values) <= spread.q1 <= spread.median <= spread.q3 <= max(values)
    assert spread.repeats == len(values)


# ---- what an engine makes of it ------------------------------------------------------------------


def measured(case: Case, handover_ns: int) -> Case:
    """A case on a machine of tables: dense, head, hosts' experts, a hand-over."""
    hardware = case.hardware
    table = Table(((1, 500), (4, 900)), ((1, 0, 300), (2, 0, 450)), "", ((1, 70), (2, 90)))
    return replace(
        case,
        hardware=replace(
            hardware,
            link=replace(hardware.link, handover_ns=handover_ns),
            compute=table,
            host=replace(hardware.host, cpu=TableExpert(((1, 2_000), (3, 5_000)))),
        ),
    )


def tallies(case: Case, *sets: str) -> list[dict[str, Any]]:
    """What both engines say."""
    found = []
    for engine in (ReferenceEngine, FastEngine):
        spec = spec_of("lru", *sets)
        setup = setup_of(case, spec.build(), spec.initial)
        tally = drive(engine(setup), works_of(case, inputs_of(setup.policy)))  # type: ignore[arg-type]
        found.append(asdict(tally))
    return found


@given(
    case=cases(),
    handover_ns=st.integers(0, 5_000),
    sets=st.sampled_from([(), ("miss=cpu",), ("prefetch=previous-token",)]),
)
def test_both_engines_honour_every_field(
    case: Case, handover_ns: int, sets: tuple[str, ...]
) -> None:
    reference, fast = tallies(measured(case, handover_ns), *sets)
    assert reference["times"] == fast["times"]
    assert reference["requests"] == fast["requests"]


@given(case=cases(), handover_ns=st.integers(0, 5_000))
def test_to_an_engine_a_handover_is_latency(case: Case, handover_ns: int) -> None:
    link = case.hardware.link
    later = replace(link, latency_ns=link.latency_ns + handover_ns, curve=())
    apart = measured(case, handover_ns)
    apart = replace(
        apart, hardware=replace(apart.hardware, link=replace(apart.hardware.link, curve=()))
    )
    whole = replace(apart, hardware=replace(apart.hardware, link=later))
    assert tallies(apart)[0]["times"] == tallies(whole)[0]["times"]


def test_a_paced_copy_does_not_wait_for_its_handover() -> None:
    """It really passes; modelled to take seconds, it takes none."""
    hardware = machine(latency_ns=1_000, bytes_per_s=1e12)
    hardware = replace(hardware, link=replace(hardware.link, handover_ns=30_000_000_000))
    case = enlarged(decode_case([[[0]], [[1]], [[2]]], 3, 1, hardware))
    tally, _ = really(case, "lru", paced=True)
    assert tally.times.total() < 5_000_000_000


def test_another_bandwidth_keeps_the_handover(tmp_path: Path) -> None:
    hardware, _ = calibrated(tmp_path, Fake())
    link = hardware.with_bandwidth(1e9).link
    assert (link.handover_ns, link.latency_ns, link.curve) == (300, 7_000, ())


def test_profiles_without_the_new_keys_mean_what_they_meant() -> None:
    hardware = load_hardware("rtx4090")
    assert hardware.link.handover_ns == 0
    costs: Costs = make_costs(MODEL, hardware)
    assert costs.load_ns(900_000) == costs.link_ns(900_000)
    data = measured(decode_case([[[0]]], 1, 1), 0).hardware.to_dict()
    del data["compute"]["head"], data["link"]["handover_ns"]
    old = HardwareProfile.from_dict(data)
    assert isinstance(old.compute, Table) and old.compute.head == ()
    assert make_costs(MODEL, old).head_ns(5) == 0


# ---- reports of a service, read by hand ----------------------------------------------------------


def report(lane: str, start: int, end: int, key: int = -1) -> Report:
    """A lane's report."""
    return Report(lane, key, 1, start, end)


def test_what_lies_between_is_read_off_the_reports() -> None:
    """Two layers of two experts: 5 before the experts, 3 after them, 11 after the head."""
    reports, now = [], 0
    for _ in range(5):
        for _ in range(2):
            reports.append(report(DENSE, now, now + 100))
            now += 105
            for key in range(2):
                reports.append(report(EXPERT, now, now + 40, key))
                now += 41
            now += 3 - 1
        reports.append(report(DENSE, now, now + 50))
        now += 61
    found = between(Served(reports, plan_ns=2.5), 2)
    assert found == {PLAN: 2.5, SYNC: 5.5, STEP: 11}


def test_a_handover_lies_between_the_copies_of_one_event() -> None:
    rows = [
        report(DENSE, 0, 10), report(COPY, 20, 30, 1), report(COPY, 37, 50, 2),
        report(EXPERT, 34, 60, 1), report(EXPERT, 61, 70, 2),
        report(DENSE, 80, 90), report(COPY, 100, 110, 3), report(COPY, 119, 130, 4),
    ]  # fmt: skip
    assert handover(Served(rows, 0)) == 8
    alone = [report(DENSE, 0, 10), report(COPY, 20, 30, 1), report(EXPERT, 36, 40, 1)]
    assert handover(Served(alone, 0)) == 6


@given(layers=st.integers(1, 4), top_k=st.integers(1, 4), more=st.integers(0, 6))
@settings(max_examples=12)
def test_a_short_service_loads_what_it_should(layers: int, top_k: int, more: int) -> None:
    """Of each event of a settled service: the kept ones never, all others always."""
    model = replace(ModelProfile.generic(layers, top_k + more, top_k), hidden=4, head_bytes=64)
    model = replace(model, expert_bytes=(96,), dense_bytes=64)
    bench = CpuBench(model, threads=1)
    try:
        for kept in {0, kept_of(bench.model)}:
            served = serve(bench.model, bench._costs, bench._device, kept)
            events: list[list[str]] = []
            for lane, *_ in served.reports:
                if lane == DENSE:
                    events.append([])
                events[-1].append(lane)
            per_pass = bench.model.layers + 1
            events = [e for i, e in enumerate(events) if (i + 1) % per_pass]
            settled = events[SETTLED * bench.model.layers :]
            assert {e.count(EXPERT) for e in settled} == {top_k}
            if kept or layers > 1 or more >= top_k:
                assert {e.count(COPY) for e in settled} == {top_k - kept}
    finally:
        bench.close()


@given(layers=st.integers(1, 9), experts=st.integers(1, 40), nbytes=st.integers(0, 10**9))
def test_a_bench_is_never_larger_than_its_model(layers: int, experts: int, nbytes: int) -> None:
    model = ModelProfile.generic(layers, experts, (experts + 1) // 2)
    made = bench_model(model, kinds_of(model), nbytes)
    assert made.layers <= layers and made.top_k <= made.experts <= experts
    assert ModelProfile.from_dict(made.to_dict()) == made


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A model profile of the sample's shape, with experts of 768 bytes."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def test_this_machine_is_measured_and_simulated(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: measure, run on the profile, replay on it in both engines."""
    out = tmp_path / "hw.toml"
    words = ("--model", small, "--out", out, "--repeats", 2, "--tokens", 4)
    told = answer(capsys, "real", "calibrate", *words)
    assert told["profile"] == load_hardware(out).to_dict()
    assert told["profile"]["source"] == "measured"
    overheads = told["overheads"]
    assert all(overheads[name]["median"] > 0 for name in (PLAN, HANDOVER, STEP, OPS, BYTES))
    measured = {(row["what"], row["how"]) for row in told["readings"]}
    assert measured == {(what, how) for what, hows in CpuBench.hows.items() for how in hows}
    assert all(row["median"] > 0 for row in told["readings"])
    words = ("--trace", "demo", "--limit", 1, "--costs", small, "--hardware", out)
    run = answer(capsys, "real", "run", *words, "--bandwidth", "1GB/s")["runs"][0]
    there = [
        answer(capsys, "replay", *words, "--engine", engine)["runs"][0]
        for engine in ("reference", "fast")
    ]
    assert there[0]["log_digest"] == there[1]["log_digest"]
    assert run["decision_digest"] == there[0]["decision_digest"]


def test_it_is_shown(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hw.toml"
    words = ["--model", small, "--out", str(out), "--repeats", "1", "--tokens", "1"]
    assert main(["real", "calibrate", *words]) == 0
    shown = capsys.readouterr().out
    assert "handover" in shown and "quartiles" in shown and str(out) in shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--model", "olmo", "--out", "{}/a.toml"), "no model profile named 'olmo'"),
        (("--model", "olmoe-1b-7b", "--out", "{}/none/a.toml"), "cannot be written"),
        (("--model", "olmoe-1b-7b", "--out", "{}/a.txt"), "must end in .toml"),
        (("--model", "olmoe-1b-7b", "--out", "{}/d.toml"), "is a folder"),
        (("--model", "olmoe-1b-7b", "--out", "{}/a.toml", "--ram", "1MB"), "of RAM"),
        (("--model", "olmoe-1b-7b", "--out", "{}/a.toml", "--repeats", "0"), "--repeats"),
        (("--model", "olmoe-1b-7b", "--out", "{}/a.toml", "--device", "tpu"), "--device"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.toml").mkdir()
    told = [word.format(tmp_path) for word in words]
    try:
        code: object = main(["real", "calibrate", *told])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2 and not out
    assert line in err and len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["d.toml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_is_said(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", small, "--out", str(tmp_path / "a.toml"), "--device", "cuda"]
    assert main(["real", "calibrate", *words]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "a.toml").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UsageError("broken")])
def test_what_ends_early_leaves_the_old_profile(tmp_path: Path, error: BaseException) -> None:
    calibrated(tmp_path, Fake())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(ns: float) -> float:
        raise error

    fake = Fake(fail)
    with pytest.raises(type(error)):
        calibrated(tmp_path, fake)
    assert fake.closed
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("refuses", [0, 1])
def test_the_cuda_bench_on_a_stand_in(
    refuses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own steps without a device: every kind of reading, and what pinning refused means."""
    StandIn.reset()
    for module in (cuda, measure_cuda):
        monkeypatch.setattr(module, "_CUDA", StandIn)
        monkeypatch.setattr(module, "_DEVICE", "cpu")
    monkeypatch.setattr(measure_cuda, "BANK_BYTES", 1 << 16)
    monkeypatch.setattr(StandIn, "refuses", refuses)
    model = replace(
        MODEL, hidden=32, kv_window_tokens=(0, 0, 128, 0), kv_bytes_per_token_per_layer=256
    )
    model = replace(model, config=(("head_dim", 8), ("num_attention_heads", 4)))
    out = tmp_path / "hw.toml"
    told = calibrate(Calibration(model, out, device="cuda", repeats=1, tokens=2))
    assert told["host"]["device"]["pinned"] is not bool(refuses)
    first = next(row["how"] for row in told["readings"] if row["what"] == LINK)
    assert first == ("pageable, alone" if refuses else "pinned, alone")
    assert {row["context"] for row in told["readings"] if row["what"] == DENSE} == set(CONTEXTS)
    assert all(row["median"] > 0 for row in told["readings"])
    memory = load_hardware(out).memory
    assert memory.device_bytes == 10**10 and 0 < memory.reserved_bytes < 9 * 10**9
    assert not StandIn.registered and StandIn.emptied == 1
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_small_things_do_not_say_whether_the_bank_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One region is registered, the large one; its refusal alone is told."""
    StandIn.reset()
    for module in (cuda, measure_cuda):
        monkeypatch.setattr(module, "_CUDA", StandIn)
        monkeypatch.setattr(module, "_DEVICE", "cpu")
    monkeypatch.setattr(measure_cuda, "BANK_BYTES", 1 << 16)
    bench = measure_cuda.CudaBench(replace(MODEL, hidden=32), threads=1)
    try:
        assert StandIn.registered == [bench._pinned.data_ptr()]
        assert bench.manifest()["pinned"] and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        bench.close()


# ---- hardware ------------------------------------------------------------------------------------


@has_cuda
def test_a_cuda_device_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hw.toml"
    words = ("--model", "olmoe-1b-7b", "--out", out, "--repeats", 3, "--tokens", 8)
    told = answer(capsys, "real", "calibrate", *words, "--device", "cuda")
    rows = {
        row["how"]: row["median"]
        for row in told["readings"]
        if row["what"] == LINK and row["size"] == 12_582_912
    }
    assert rows["pinned, alone"] < rows["pageable, alone"]
    assert told["host"]["device"]["pinned"]
    total = torch.cuda.mem_get_info()[1]
    memory = told["profile"]["memory"]
    assert memory["device_bytes"] == total
    assert 0 < memory["reserved_bytes"] < total // 2
