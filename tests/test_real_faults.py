"""Real runs that go wrong: one clear line, no thread left, nothing half-written, nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from moesim.cli import main
from moesim.configuration import Configuration, Request
from moesim.errors import MoesimError, NotRunError, PolicyError, TraceError, UsageError
from moesim.policy import CacheView, PlainPolicy
from moesim.profile import ModelProfile, load_hardware
from moesim.real.errors import ExecutionError
from moesim.real.lanes import Lanes
from moesim.real.run import RealRequest, execute, open_banks
from moesim.real.slots import SlotLedger
from moesim.traces.reader import TraceReader
from moesim.traces.samples import trace_path
from moesim.traces.writer import TraceWriter
from moesim.types import Fact, Gate, IntArray, Landed, Note, Plan, Prefetch
from tests.harness import setup_of, spec_of
from tests.strategies import decode_case, machine, small_model
from tests.test_real import SMALL, device_of, enlarged

ROOT = Path(__file__).resolve().parents[1]

EXPERTS = 16
PLACE = r"\(.+test_real_faults\.py:\d+\)"


def tiny() -> ModelProfile:
    """The sample's shape with experts of 96 bytes."""
    made = small_model(8, EXPERTS, 2, [96] * 8).to_dict()
    return ModelProfile.from_dict({**made, "hidden": 4, "dense_bytes": 64})


def request(out: Path, policy: str = "lru", **more: Any) -> RealRequest:
    """A short run of the sample."""
    what = Request(
        trace=trace_path("demo"),
        hardware=load_hardware("rtx4090"),
        policy=policy,
        costs=tiny(),
        limit=1,
    )
    return RealRequest(what, out=out, threads=1, **more)


def own(name: str) -> str:
    """A policy of this module, as the command line names it."""
    return f"{__name__}:{name}"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No thread of a run outlives it, and its folder is whole or not there."""
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("moesim ")]
    assert not list(tmp_path.iterdir())


# ---- lanes ---------------------------------------------------------------------------------------


class Broken:
    """A device one of whose methods does something else after some good calls."""

    def __init__(self, inner: Any, name: str, instead: Any, good: int) -> None:
        self.inner = inner
        self.name = name
        self.instead = instead
        self.good = good

    def __getattr__(self, name: str) -> Any:
        return self.called if name == self.name else getattr(self.inner, name)

    def called(self, *args: Any) -> Any:
        """The method, or what it does instead."""
        self.good -= 1
        inner = getattr(self.inner, self.name)
        return inner(*args) if self.good >= 0 else self.instead(inner, *args)


def breaking(name: str, instead: Any, good: int = 1) -> Any:
    """Opens banks that are broken."""

    def open_broken(asked: RealRequest, what: Configuration, ledger: SlotLedger) -> Any:
        return Broken(open_banks(asked, what, ledger), name, instead, good)

    return open_broken


def fail(*args: Any) -> None:
    """What a machine may do."""
    raise RuntimeError("the bus is gone")


@pytest.mark.parametrize(
    ("name", "policy", "line"),
    [
        ("copy", "lru", r"the copy thread died while loading expert \d+\.\d+: RuntimeError: the b"),
        ("expert", "lru", r"the compute thread died while computing expert \d+\.\d+: RuntimeError"),
        ("dense", "lru", r"the compute thread died while the dense part of layer \d: RuntimeErr"),
        ("host_expert", "cpu", r"the host thread died while computing expert \d+\.\d+: RuntimeErr"),
    ],
)
def test_a_lane_that_dies_is_named(tmp_path: Path, name: str, policy: str, line: str) -> None:
    started = time.monotonic()
    with pytest.raises(ExecutionError, match=line):
        execute(request(tmp_path, policy), open_device=breaking(name, fail))
    assert time.monotonic() - started < 20


def test_a_lane_that_never_starts_is_named(tmp_path: Path) -> None:
    opened = breaking("start_computing", fail, good=0)
    with pytest.raises(ExecutionError, match="the compute thread died while starting: RuntimeErr"):
        execute(request(tmp_path), open_device=opened)


@pytest.mark.parametrize(("name", "lane"), [("copy", "copy"), ("expert", "compute")])
def test_a_lane_that_hangs_is_found_out(tmp_path: Path, name: str, lane: str) -> None:
    """The watchdog."""
    release = threading.Event()
    opened = breaking(name, lambda *args: release.wait(60))
    started = time.monotonic()
    timer = threading.Timer(1.6, release.set)
    timer.start()
    with pytest.raises(
        ExecutionError, match=rf"the {lane} thread has not come forward for 1\.\d s"
    ):
        execute(request(tmp_path, watchdog_s=1.0), open_device=opened)
    assert time.monotonic() - started < 20
    timer.join()


def test_a_slow_link_is_no_hung_one() -> None:
    """What the modelled link takes does not count against a thread."""
    hardware = machine(latency_ns=1_500_000_000)
    case = enlarged(decode_case([[[0]]], 2, 1, hardware))
    setup = setup_of(case, spec_of("lru").build())
    ledger = SlotLedger(setup.world, 0)
    with Lanes(device_of(case, ledger), ledger, setup.costs, paced=True, watchdog_s=1) as lanes:
        ledger.queue(0)
        ledger.reserve(0)
        started = time.monotonic()
        lanes.copy(0, setup.costs.chunk_ends(96), 0)
        assert lanes.next().sent == 1
    assert time.monotonic() - started >= 1.5


def test_other_bytes_in_a_slot_are_found(tmp_path: Path) -> None:
    """--verify: the last bytes of a copy never arrive."""

    def short(inner: Any, key: int, slot: int, begin: int, end: int) -> None:
        inner(key, slot, begin, end - 1)

    with pytest.raises(ExecutionError, match=r"the slot of expert \d+\.\d+ held other bytes"):
        execute(request(tmp_path, verify=True), open_device=breaking("copy", short))


def test_an_interrupt_ends_the_threads(tmp_path: Path) -> None:
    def press(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(request(tmp_path), press)


# ---- policies ------------------------------------------------------------------------------------


class RaisesAtGate(PlainPolicy):
    """Fails at its third layer event."""

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        if isinstance(fact, Gate) and fact.event == 2:
            raise ValueError("no idea")
        return Plan()


class RaisesInScores(PlainPolicy):
    """Fails when a victim is asked for."""

    def scores(self, experts: IntArray, event: int) -> IntArray:
        raise KeyError("worth")


class RaisesInNote(PlainPolicy):
    """Fails when a copy lands."""

    def note(self, fact: Note) -> None:
        if isinstance(fact, Landed):
            raise IndexError("no such place")


class NaNs(PlainPolicy):
    """Scores that are no integers."""

    def scores(self, experts: IntArray, event: int) -> Any:
        return np.full(len(experts), np.nan)


class OutOfRange(PlainPolicy):
    """Wishes an expert that is none."""

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        return Plan([Prefetch(10**6)])


class NoPlan(PlainPolicy):
    """Answers nothing."""

    def on(self, fact: Fact, cache: CacheView) -> Any:
        return None


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        ("RaisesAtGate", r"layer event 2: ValueError: no idea " + PLACE),
        ("RaisesInScores", r"layer event \d+: KeyError: 'worth' " + PLACE),
        ("RaisesInNote", r"layer event 0: IndexError: no such place " + PLACE),
        ("NaNs", r"layer event \d+: scores must be int64"),
        ("OutOfRange", r"layer event -1: a plan names expert 1000000"),
        ("NoPlan", r"layer event -1: on\(\) answered NoneType"),
    ],
)
def test_a_policy_that_breaks_is_named_with_its_event(
    tmp_path: Path, policy: str, line: str
) -> None:
    name = own(policy)
    with pytest.raises(PolicyError, match=f"^{name}: {line}"):
        execute(request(tmp_path, name))


HANGS = """
import os, pathlib, time
from moesim.policy import PlainPolicy
from moesim.types import Gate, Plan

class InOn(PlainPolicy):
    def on(self, fact, cache):
        while isinstance(fact, Gate) and fact.event == 5:
            pathlib.Path(os.environ["READY"]).touch()
        return Plan()

class InScores(PlainPolicy):
    def scores(self, experts, event):
        pathlib.Path(os.environ["READY"]).touch()
        time.sleep(600)
"""

HUNG_COPY = """
import os, pathlib, threading
from moesim.cli import program
from moesim.real import run

class Hung:
    def __init__(self, inner):
        self.inner = inner
    def __getattr__(self, name):
        return getattr(self.inner, name)
    def copy(self, *args):
        pathlib.Path(os.environ["READY"]).touch()
        threading.Event().wait()

banks = run.open_banks
run.open_banks = lambda *args: Hung(banks(*args))
program()
"""


@pytest.mark.parametrize(
    "start",
    [
        ("-m", "moesim", "--policy=hangs:InOn"),
        ("-m", "moesim", "--policy=hangs:InScores"),
        ("-c", HUNG_COPY, "--policy=lru"),
    ],
    ids=["in on", "in scores", "in the copy thread"],
)
def test_ctrl_c_ends_what_never_returns(
    start: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hangs")
    (folder / "hangs.py").write_text(HANGS)
    profile = folder / "tiny.toml"
    profile.write_text(SMALL)
    out, ready = folder / "runs", folder / "ready"
    how, *policy = start[:-1], start[-1]
    command = [*how, "real", "run", "--trace", "demo", *policy, "--limit", "1"]
    with subprocess.Popen(
        [sys.executable, *command, "--costs", str(profile), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "READY": str(ready)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            _await(ready.exists, process)
            time.sleep(0.2)
            pressed = time.monotonic()
            process.send_signal(signal.SIGINT)
            printed, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert time.monotonic() - pressed < 10
    assert printed == "" and err.startswith("moesim: interrupted") and err.count("\n") == 1
    assert not list(out.iterdir())


def test_a_run_that_is_killed_leaves_nothing_that_the_next_one_keeps(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """kill -9: no run folder, and what lies beside is swept away."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "hangs.py").write_text(HANGS)
    out, ready = folder / "runs", folder / "ready"
    profile = folder / "tiny.toml"
    profile.write_text(SMALL)
    command = ["-m", "moesim", "real", "run", "--trace", "demo", "--policy=hangs:InOn"]
    with subprocess.Popen(
        [sys.executable, *command, "--costs", str(profile), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "READY": str(ready)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            _await(ready.exists, process)
        finally:
            process.kill()
    left = list(out.iterdir())
    assert [p.name.startswith(".real-") for p in left] == [True]
    elsewhere, alive = out / ".real-elsewhere-1-x", out / left[0].name.replace(
        f"-{process.pid}-", f"-{os.getpid()}-"
    )  # fmt: skip
    for kept in (elsewhere, alive):
        kept.mkdir()
    told = execute(request(out))["runs"][0]
    names = {Path(told["run_dir"]).name, elsewhere.name, alive.name}
    assert {p.name for p in out.iterdir()} == names


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gate_that_is_no_number_is_refused(
    value: float,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A damaged trace is told by its name, before anything is kept."""
    bad = tmp_path_factory.mktemp("bad") / "t.parquet"
    with TraceReader(trace_path("demo")) as reader:
        rows, meta = next(reader.requests()), reader.meta
    assert rows.gate is not None
    gate = rows.gate.copy()
    gate[len(gate) // 2, 3] = value
    with monkeypatch.context() as careless:
        careless.setattr("moesim.traces.writer.check_request", lambda *args: None)
        with TraceWriter(bad, meta) as writer:
            writer.write_request(replace(rows, gate=gate))
    asked = request(tmp_path, "finemoe")
    with pytest.raises(TraceError, match=r"t\.parquet: .*gate"):
        execute(replace(asked, what=replace(asked.what, trace=bad)))


def _await(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


# ---- requests ------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that must be refused."""
    capsys.readouterr()
    assert main(["real", "run", "--trace", "demo", "--limit", "1", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("moesim: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--capacity", "1000B"), "give at least one expert"),
        (("--capacity", "25%,50%"), "--capacity 25%,50%: a real run has one"),
        (("--policy", "lru,lfu"), "--policy lru,lfu: a real run has one"),
        (("--policy", "lrv"), "--policy lrv: unknown"),
        (("--bandwidth", "fast"), "--bandwidth fast: write a rate"),
        (("--ram", "1MB"), "of RAM may be used; give less --capacity"),
        (("--ram", "much"), "--ram much: write a size"),
        (("--costs", "mixtral-8x7b", "--capacity", "100%"), "more --ram"),
        (("--timeline",), "--timeline writes into the run's folder"),
        (("--policy", "next-gate", "--set", "prefetch.distance=4"), "needs AHEAD (4)"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(capsys, *words)


def test_ram_that_is_short_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"takes 0\.000 GB.+0\.000 GB of RAM may be used"):
        execute(request(tmp_path, ram_bytes=1000))


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoesimError, match="--device tpu: unknown; choose from cpu"):
        execute(request(tmp_path, device="tpu"))


def test_without_torch_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "moesim.real.banks", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(NotRunError, match=r"pip install 'moesim\[real\]'"):
        execute(request(tmp_path))


def test_an_out_that_cannot_be_written_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path_factory.mktemp("blocked") / "file"
    blocked.write_text("")
    assert "choose another --out" in refused(capsys, "--out", blocked)
