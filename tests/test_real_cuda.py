"""The CUDA device without one: its streams' order, its memory, what goes wrong.

What no stand-in can show (times, real copies beside real kernels) is in ``test_hardware.py``.
"""

from __future__ import annotations

import mmap
import re
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
import torch

from moesim.cli import main
from moesim.errors import NotRunError, UsageError
from moesim.profile import ModelProfile
from moesim.real import banks, cuda, measure_cuda
from moesim.real.cuda import Claim, Cuda, Meter, Pins
from moesim.real.errors import ExecutionError
from moesim.real.host_bank import HostBank, whole_pages
from moesim.real.lanes import Lanes
from moesim.real.memory import Fit, Needs, fit_beside
from moesim.real.offload_bank import StreamMover
from moesim.real.run import Banks, RealRequest, execute, open_banks
from moesim.real.slots import SlotLedger
from moesim.real.suite import Suite, pieces_of
from moesim.serving import Server
from moesim.tally import Tally
from tests.cuda_stand_in import Event, StandIn, Stream, Watched, base_of
from tests.harness import inputs_of, setup_of, spec_of, works_of
from tests.strategies import DEMAND_ONLY, LOSSLESS, Case, cases, machine
from tests.test_real import SMALL, enlarged, really, roomy, serving, whole_slots
from tests.test_real_faults import request


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No device is needed, and none is used."""
    StandIn.reset()
    monkeypatch.setattr(cuda, "_CUDA", StandIn)
    monkeypatch.setattr(cuda, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda, "_LOCKS", tmp_path_factory.mktemp("locks"))


@pytest.fixture
def nothing_is_pinned() -> Iterator[None]:
    """What was registered is let go."""
    yield
    assert not StandIn.registered


def judged(device: Cuda) -> Cuda:
    """Its slots tell when they are written, its experts when they are read."""
    for size, slots in device._slots.items():
        device._slots[size] = slots.as_subclass(Watched)
        StandIn.strides[slots.untyped_storage().data_ptr()] = slots.stride(0)
    compute = device._experts.compute

    def reading(weights: torch.Tensor, tokens: int) -> None:
        StandIn.touch(base_of(weights), False, "an expert")
        compute(weights.as_subclass(torch.Tensor), tokens)

    device._experts.compute = reading  # type: ignore[method-assign]
    return device


def on_streams(case: Case, name: str, *, verify: bool = True) -> Tally:
    """Run a policy on a CUDA device that is none."""
    spec = spec_of(name)
    policy = spec.build()
    setup = serving(setup_of(case, policy, spec.initial))
    ledger = SlotLedger(setup.world, setup.world.top_k if policy.bypass else 0)
    longest = max(int(rows.position.max()) + 1 for rows in case.requests)
    needs = Needs.of(case.model, ledger.slots, case.batch, longest)
    pins = Pins()
    bank = HostBank(needs.expert_bytes, needs.experts, torch.bfloat16, 0, pins.pin)
    whole = Fit(needs.experts, needs.layers)
    device = Cuda(case.model, ledger, needs, whole, bank, threads=1, verify=verify,
                  closing=pins.close)  # fmt: skip
    with Lanes(judged(device), ledger, setup.costs, watchdog_s=20) as lanes:
        server = Server(setup, lanes, ledger)
        for work in works_of(case, inputs_of(policy), arrivals=False):
            server.offer(work)
            server.advance()
        server.close()
        assert server.advance()
    moved, _ = device._meter.total()
    tally = server.tally
    assert moved == tally.counts().bytes_loaded + tally.initial_bytes
    device.close()
    whole_slots(ledger)
    return tally


def opened(model: ModelProfile, positions: int = 4, **more: Any) -> Cuda:
    """A device with two slots."""
    size = int(model.expert_bytes_table().max())
    needs = Needs.of(model, {size: 2}, 1, positions)
    bank = HostBank(needs.expert_bytes, needs.experts, torch.bfloat16, 0)
    ledger: Any = SimpleNamespace(slots={size: 2})
    whole = Fit(needs.experts, needs.layers)
    return Cuda(model, ledger, needs, whole, bank, threads=1, **more)


def small_model() -> ModelProfile:
    """One layer of two experts."""
    from tests.strategies import decode_case

    return enlarged(decode_case([[[0]]], 2, 1, machine())).model


few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(case=cases(arrivals=False), name=st.sampled_from(DEMAND_ONLY))
def test_law_a_on_streams(case: Case, name: str) -> None:
    """What is decided is what the processor's lanes decide; every copy holds its expert."""
    made = roomy(enlarged(case))
    assert on_streams(made, name).decision_digest == really(made, name)[0].decision_digest
    assert not StandIn.registered


@few
@given(case=cases(arrivals=False), name=st.sampled_from(LOSSLESS))
def test_no_slot_is_touched_out_of_order(case: Case, name: str) -> None:
    """Whatever the policy: no copy overwrites what still computes, no expert reads what still
    arrives, by the events alone."""
    StandIn.reset()
    small = machine(chunk_bytes=64)
    on_streams(roomy(enlarged(Case(**{**_fields(case), "hardware": small}))), name, verify=False)
    assert not StandIn.hazards


def _fields(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in Case.__slots__}


def test_the_judge_sees_streams_that_do_not_wait() -> None:
    """The law above can fail."""
    from tests.strategies import decode_case

    StandIn.deaf = True
    case = enlarged(decode_case([[[0]], [[1]], [[0]], [[1]]], 2, 1, machine()))
    on_streams(roomy(case), "lru", verify=False)
    assert any("an expert races with a write" in told for told in StandIn.hazards)


def test_a_chunk_is_given_while_the_one_before_moves() -> None:
    """The host waits for all chunks of a copy but the last, which the device waits for."""
    from tests.strategies import decode_case

    case = enlarged(decode_case([[[0]]], 2, 1, machine(chunk_bytes=1)))
    case = Case(**{**_fields(case), "hardware": machine(chunk_bytes=16)})
    on_streams(case, "lru", verify=False)
    gates = 3 * 2 + 2  # layer and head, to warm up and once
    chunks = 96 // 16
    assert StandIn.waits == gates + chunks - 1


@pytest.mark.parametrize("misses", [2, 7])
def test_copies_of_one_chunk_do_not_queue_up(misses: int) -> None:
    """Each is reported when the one before has come: what is more urgent overtakes the rest."""
    from tests.strategies import decode_case

    case = enlarged(decode_case([[list(range(misses))]], 8, 8, machine()))
    on_streams(roomy(case), "lru", verify=False)
    gates = 3 * 2 + 2
    assert StandIn.waits == gates + misses - 1


def test_kernels_are_warm_for_each_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token and a prompt, with what they read; the run's times begin afterwards."""
    from tests.strategies import decode_case

    case = enlarged(decode_case([[[0], [1]]], 2, 1, machine()))
    model = replace(case.model, layers=2, expert_bytes=((96, 96),), dense_bytes=(640, 1280),
                    stacks=(("decoder", 2),))  # fmt: skip
    seen: list[tuple[int, int, int]] = []
    made = cuda.DenseParts.dense

    def dense(self: Any, layer: int, tokens: int, rows: Any) -> None:
        seen.extend((layer, tokens, row.context) for row in rows)
        made(self, layer, tokens, rows)

    monkeypatch.setattr(cuda.DenseParts, "dense", dense)
    monkeypatch.setattr(cuda, "_PROMPT", 3)
    device = opened(model, positions=5)
    device.start_computing()
    assert set(seen) == {(i, t, c) for i in (0, 1) for t, c in ((3, 3), (1, 3), (1, 1))}
    assert not device.computed()
    device.close()


# ---- its own clock -------------------------------------------------------------------------------


MS = 1_000_000


class Late:
    """A device that works after the calls are back: copies of 4 ms one after the other, experts of
    2 ms behind their copy, dense parts of 1 ms, which the host waits for."""

    def __init__(self) -> None:
        self.copied = 0
        self.ended = 0
        self.arrival: dict[int, int] = {}
        self.spans: list[tuple[int, int]] = []

    def copy(self, key: int, slot: int, begin: int, end: int) -> None:
        self.copied = max(self.copied, time.perf_counter_ns()) + 4 * MS
        self.arrival[key] = self.copied

    def start_computing(self) -> None:
        pass

    def dense(self, layer: int, tokens: int, rows: Any) -> None:
        self._work(0, 1)
        while (left := self.ended - time.perf_counter_ns()) > 0:
            time.sleep(left / 1e9)

    def expert(self, key: int, slot: int, tokens: int) -> None:
        self._work(self.arrival[key], 2)

    def computed(self) -> list[tuple[int, int]]:
        spans, self.spans = self.spans, []
        return spans

    def _work(self, after: int, ms: int) -> None:
        begin = max(after, self.ended, time.perf_counter_ns())
        self.ended = begin + ms * MS
        self.spans.append((begin, self.ended))


def test_a_device_that_works_later_tells_where_the_time_went() -> None:
    """Three misses, then three hits: the reports alone would call it all dense."""
    from tests.strategies import decode_case

    tokens = [[[0, 1, 2]], [[0, 1, 2]], [[0, 1, 3]]]
    case = roomy(enlarged(decode_case(tokens, 4, 4, machine())))
    policy = spec_of("lru").build()
    setup = serving(setup_of(case, policy, "cold"))
    ledger = SlotLedger(setup.world, 0)
    device: Any = Late()
    with Lanes(device, ledger, setup.costs, watchdog_s=20) as lanes:
        server = Server(setup, lanes, ledger, timeline=True)
        for work in works_of(case, inputs_of(policy), arrivals=False):
            server.offer(work)
            server.advance()
        server.close()
        assert server.advance()
    tally = server.tally
    times = tally.times
    heads = 3
    assert times.experts == 9 * 2 * MS and times.dense == (3 + heads) * MS
    # Copies of 4 ms and experts of 2: waited for are the first wholly, two of each other copy.
    assert times.stall == sum(tally.layer_stall_ns) == tally.requests[0].stall_ns
    assert times.stall >= (4 + 2 + 2) * MS
    assert server.spans is not None
    lengths = [end - start for lane, start, end, _ in server.spans if lane == "expert"]
    assert lengths == 9 * [2 * MS]
    assert sum(e - s for lane, s, e, _ in server.spans if lane == "stall") == times.stall


def test_a_stopwatch_reads_what_the_host_has_waited_for() -> None:
    watch, stream = cuda.Stopwatch(), Stream()
    moments = [100, 150, 170, 300, 400, 450]
    ends = []
    for begin, end in zip(moments[::2], moments[1::2], strict=True):
        begun = watch.start(stream)
        ends.append(watch.stop(begun, stream))
        begun.ns, ends[-1].ns = begin * MS, end * MS
    watch.passed(ends[1], 5_000 * MS)
    assert watch.told() == [(4_800 * MS, 4_850 * MS), (4_870 * MS, 5_000 * MS),
                            (5_100 * MS, 5_150 * MS)]  # fmt: skip
    assert not watch.told()


# ---- memory --------------------------------------------------------------------------------------


NEEDS = Needs({1024: 8}, 1024, 64, 4096, 4, 2048, 2, position_bytes=16, sequences=2, positions=64)


@given(st.integers(0, 60_000), st.integers(0, 100_000))
def test_what_is_planned_fits_both_memories(device: int, ram: int) -> None:
    fixed = 8 * 1024 + 2048 + 16 * 2 * 64
    try:
        found = fit_beside(NEEDS, device, ram, "12%")
    except UsageError as error:
        assert device < fixed + 4096 or ram < 2 * 1024
        assert "--capacity 12%" in str(error) or str(error).startswith("--ram")
        return
    assert fixed + found.dense_buffers * 4096 <= device and 1 <= found.dense_buffers <= 4
    assert found.expert_buffers * 1024 <= ram and 2 <= found.expert_buffers <= 64


def test_a_bank_too_large_names_what_would_fit() -> None:
    rest = 2048 + 16 * 2 * 64 + 4096
    with pytest.raises(UsageError, match="give --capacity 5 experts or less") as refused:
        fit_beside(NEEDS, rest + 5 * 1024 + 1023, 10**6, "12%")
    assert "0.000 GB of the device's memory are free" in str(refused.value)
    assert fit_beside(
        Needs({1024: 5}, 1024, 64, 4096, 4, 2048, 2, 16, 2, 64), rest + 5 * 1024 + 1023, 10**6, ""
    )


def cuda_request(out: Path, **more: Any) -> RealRequest:
    """A short run of the sample on the device."""
    return request(out, device="cuda", **more)


@pytest.mark.parametrize("refuses", [0, 2])
def test_a_run_says_whether_memory_was_pinned(
    refuses: int, tmp_path: Path, nothing_is_pinned: None
) -> None:
    StandIn.refuses = refuses
    told = execute(cuda_request(tmp_path, verify=True))["runs"][0]
    device = told["device"]
    assert device["kind"] == "cuda" and device["pinned"] is not bool(refuses)
    assert ("was refused (error 2)" in device["why_pageable"]) is bool(refuses)
    assert told["link_bytes_per_s"] > 0
    assert StandIn.emptied == 1
    assert [p.name for p in tmp_path.iterdir()] == [Path(told["run_dir"]).name]


def test_memory_that_runs_out_on_the_way_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_pinned: None
) -> None:
    """mem_get_info said yes; then somebody else was quicker."""

    def full(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(cuda.DenseParts, "random", full)
    with pytest.raises(UsageError, match="the device's memory ran out while the banks were made"):
        execute(cuda_request(tmp_path))
    assert not list(tmp_path.iterdir()) and StandIn.emptied == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_stops_a_device_that_opens_leaves_nothing(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any) -> Any:
        raise error

    closed: list[int] = []
    monkeypatch.setattr(cuda.DenseParts, "random", stopped)
    with pytest.raises(error):
        opened(small_model(), closing=lambda: closed.append(1))
    assert closed == [1] and StandIn.emptied == 1
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_an_idle_device_gives_back_what_libraries_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS's workspaces first, or the cache would hold on to them; cuDNN's attention is off as
    long as a device is open."""
    before: list[int] = []
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: before.append(StandIn.emptied), raising=False)
    device = opened(small_model())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    device.close()
    assert before == [0] and StandIn.emptied == 1
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_device_that_is_full_is_refused_by_name(tmp_path: Path, nothing_is_pinned: None) -> None:
    StandIn.free = 1000
    with pytest.raises(UsageError, match="of the device's memory are free; give --capacity"):
        execute(cuda_request(tmp_path))
    assert not list(tmp_path.iterdir())


def test_experts_stay_where_they_are_between_runs(
    nothing_is_pinned: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process serves many runs of a model."""
    kept = Banks()
    try:
        first = execute(cuda_request(tmp_path), open_device=kept.open)["runs"][0]
        held = kept._held
        assert held is not None
        bank, pinned = held._bank, list(StandIn.registered)
        assert pinned
        # Something else has grown meanwhile; what is pinned is not filled again for that.
        nbytes = bank.count * bank.stride
        monkeypatch.setattr(banks, "usable_bytes", lambda: -nbytes // 2)
        again = execute(cuda_request(tmp_path, policy="lfu"), open_device=kept.open)["runs"][0]
        assert held._bank is bank and pinned == StandIn.registered
        assert first["run_dir"] != again["run_dir"]
    finally:
        kept.close()


def test_a_copy_that_fails_is_named(tmp_path: Path, nothing_is_pinned: None) -> None:
    """An error of the device comes to light where somebody waits."""

    def open_broken(*args: Any) -> Any:
        device = open_banks(*args)
        start = device.start_computing

        def started() -> None:
            start()
            StandIn.broken = True

        device.start_computing = started  # type: ignore[method-assign]
        return device

    with pytest.raises(ExecutionError) as told:
        execute(cuda_request(tmp_path), open_device=open_broken)
    assert re.search(r"thread died while .+: RuntimeError: CUDA error: an illegal", str(told.value))
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_what_fails_unheard_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_pinned: None
) -> None:
    """The last copies and kernels are waited for by nobody else."""

    def fail() -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might")

    facts = Cuda.facts

    def facts_of_a_broken_one(self: Cuda) -> Any:
        monkeypatch.setattr(StandIn, "synchronize", fail)
        return facts(self)

    monkeypatch.setattr(Cuda, "facts", facts_of_a_broken_one)
    with pytest.raises(ExecutionError, match=r"end of the run: CUDA error: unspecified .+failure$"):
        execute(cuda_request(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_device_that_hangs_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog's line comes; nothing is freed under work that goes on."""
    monkeypatch.setattr(cuda, "_LEAVE_S", 0.05)
    left: list[Any] = []
    monkeypatch.setattr(cuda, "_ABANDONED", left)
    # It would be held to the end of the process.
    monkeypatch.setattr(banks, "Claim", SimpleNamespace)

    def open_hung(*args: Any) -> Any:
        device = open_banks(*args)

        def dense(*args: Any) -> None:
            StandIn.hangs = True
            time.sleep(1.5)

        device.start_computing = lambda: None  # type: ignore[method-assign]
        device.dense = dense  # type: ignore[method-assign]
        return device

    with pytest.raises(ExecutionError, match="the compute thread has not come forward"):
        execute(cuda_request(tmp_path, watchdog_s=0.5), open_device=open_hung)
    assert StandIn.emptied == 0 and not list(tmp_path.iterdir())
    assert StandIn.registered
    # Whatever it may still read is held on to: slots, experts, streams.
    (kept, bank), *_ = left
    assert isinstance(kept, Cuda) and kept._slots and kept._parts and kept._bank is bank
    assert all(region.data_ptr() in StandIn.registered for region in bank.regions)
    StandIn.registered.clear()
    time.sleep(1)


def test_a_device_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy() -> Any:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore")

    monkeypatch.setattr(StandIn, "mem_get_info", busy)
    with pytest.raises(NotRunError, match=r"cannot be used \(CUDA error: all.+busy\); see who"):
        execute(cuda_request(tmp_path))
    assert not list(tmp_path.iterdir())


def test_registered_regions_share_no_page() -> None:
    """A page is registered once, so small regions may not lie side by side."""
    bank = HostBank(100, 3, torch.bfloat16, 0, Pins().pin)
    regions = [whole_pages(100) for _ in range(8)] + bank.regions
    pages = {region.data_ptr() // mmap.PAGESIZE for region in regions}
    assert len(pages) == 9 and not any(region.data_ptr() % mmap.PAGESIZE for region in regions)
    StandIn.registered.clear()


# ---- the free executor's copies ------------------------------------------------------------------


@pytest.fixture
def mover(monkeypatch: pytest.MonkeyPatch) -> StreamMover:
    """Copies of an offloaded model, on streams that are none."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", StandIn.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: StandIn.current())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return StreamMover(torch.device("cuda"))


@pytest.mark.parametrize("deaf", [False, True])
def test_an_offloaded_copy_waits_for_the_last_use_of_its_slot(
    mover: StreamMover, deaf: bool
) -> None:
    """And the host for its last chunk alone: the one before moves while that is given."""
    StandIn.deaf = deaf
    source = torch.arange(64, dtype=torch.uint8)
    slots = torch.zeros(1, 64, dtype=torch.uint8)
    StandIn.strides[slots.untyped_storage().data_ptr()] = 64
    slot = slots.as_subclass(Watched)[0]
    computing = Stream()
    for _ in range(2):
        chunks = [mover.copy(slot, source, at, at + 16) for at in range(0, 64, 16)]
        assert [chunk is None for chunk in chunks] == [False, False, False, True]
        # The host has waited, so what it launches now comes after.
        computing.clock |= mover._stream.clock  # type: ignore[attr-defined]
        with StandIn.stream(computing):
            StandIn.touch(base_of(slot), False, "an expert")
            mover.used(slot)
    assert StandIn.waits == 2 and torch.equal(slots[0], source)
    assert bool(StandIn.hazards) is deaf


# ---- one device, one process ---------------------------------------------------------------------


def test_two_processes_on_one_device_are_told_apart(tmp_path: Path) -> None:
    first = Claim()
    try:
        with pytest.raises(UsageError, match=r"process \d+ of moesim uses this device"):
            execute(cuda_request(tmp_path))
        assert not list(tmp_path.iterdir())
    finally:
        first.close()
    execute(cuda_request(tmp_path))
    assert list(tmp_path.iterdir())


def test_without_a_device_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StandIn, "is_available", staticmethod(lambda: False))
    with pytest.raises(NotRunError, match="torch finds no CUDA device here"):
        execute(cuda_request(tmp_path))
    words = ["real", "run", "--trace", "demo", "--limit", "1", "--device", "cuda"]
    assert main([*words, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--device cuda" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_campaign_on_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_pinned: None
) -> None:
    """All that a suite asks of a device, step by step: what is kept has its name."""
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measure_cuda, "_CUDA", StandIn)
    monkeypatch.setattr(measure_cuda, "_DEVICE", "cpu")
    monkeypatch.setattr(measure_cuda, "BANK_BYTES", 1 << 20)
    model, trace = tmp_path / "small.toml", tmp_path / "t.parquet"
    text = SMALL.replace("layers = 8", "layers = 2").replace('["decoder", 8]', '["decoder", 2]')
    model.write_text(text.replace("experts = 16", "experts = 8", 1))
    told = Suite(tmp_path / "out", models=(str(model),), policies="lru,swapmoe", capacity="50%",
                 requests=1, prompt_tokens=3, output_tokens=4, repeats=2, threads=1,
                 traces={str(model): trace})  # fmt: skip
    synth = ["trace", "synth", trace, "--model", model, "--requests", 1, "--prompt-tokens", 3]
    synth += ["--output-tokens", 5, "--gate", "full", "--ahead", "1,2"]
    assert main([*map(str, synth)]) == 0
    (campaign,) = [piece for piece in pieces_of(told) if "campaign" in piece.words]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*campaign.words[2:]]) == 0
    finally:
        torch.set_num_threads(before)
    (kept,) = (tmp_path / "out" / "kept" / "small").iterdir()
    assert kept.name == "none" and (kept / "hw.readings.parquet").is_file()
    assert len(list((tmp_path / "out").glob("small/measured/[!.]*"))) == 4


# ---- parts ---------------------------------------------------------------------------------------


def test_a_meter_adds_up_what_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_SETTLED", 2)
    meter = Meter()
    for i in range(5):
        begin, end = Event(), Event()
        begin.ns, end.ns = 1000 * i, 1000 * i + 10 * (i + 1)
        meter.add(begin, end, i)
    assert len(meter._pending) == 2
    assert meter.total() == (10, 150)


def test_a_stream_follows_what_it_waited_for() -> None:
    """The judge's own clock."""
    one, two, event = Stream(), Stream(), Event()
    with StandIn.stream(one):
        StandIn.touch(0, True, "a write")
    event.record(one)
    with StandIn.stream(two):
        StandIn.touch(0, False, "a read")
    assert len(StandIn.hazards) == 1
    two.wait_event(event)
    with StandIn.stream(two):
        StandIn.touch(0, False, "a read")
    assert len(StandIn.hazards) == 1


def test_asking_for_a_device_need_not_take_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite asks; its pieces, which may each need the device alone, use it."""

    def used() -> Any:
        raise AssertionError

    monkeypatch.setattr(StandIn, "mem_get_info", used)
    cuda.require(use=False)


def test_banks_need_no_device_to_be_imported() -> None:
    assert banks.HeldBank("cpu")._claim is None
    assert "moesim.real.cuda" in sys.modules
