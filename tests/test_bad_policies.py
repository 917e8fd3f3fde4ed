"""Policies in plain Python that break the protocol, raise, or never return.

Both engines refuse alike, in one line that names what was wrong; Ctrl-C ends whatever is under way,
and nothing half-written stays.
"""

from __future__ import annotations

import _thread
import math
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import main
from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import PolicyError, UsageError
from moesim.policy import CacheView, PlainPolicy
from moesim.types import AnyArray, Fact, Gate, Job, LayerEvent, Plan, Prefetch
from tests.harness import drive, setup_of, works_of
from tests.test_laws import mixed_case

ROOT = Path(__file__).resolve().parents[1]
HUGE = 1 << 80


# ---- wrong answers -------------------------------------------------------------------------------


class Wrong(PlainPolicy):
    """Answers as it is told to, from the fourth layer event on."""

    def __init__(self, where: str, answer: Callable[..., Any]) -> None:
        self.where = where
        self.answer = answer
        self.scored = where != "victims"  # type: ignore[misc]
        self.lossy = where == "route"  # type: ignore[misc]

    def _wrong(self, where: str, event: int) -> bool:
        return self.where == where and event >= 4

    def on(self, fact: Fact, cache: CacheView) -> Any:
        if isinstance(fact, Gate) and self._wrong("on", fact.event):
            return self.answer(fact)
        return Plan()

    def scores(self, experts: Any, event: int) -> Any:
        if self._wrong("scores", event):
            return self.answer(experts)
        return np.zeros(len(experts), np.int64)

    def victims(self, nbytes: int, cache: CacheView) -> Any:
        return self.answer(cache.candidates)

    def route(self, event: LayerEvent, cache: CacheView) -> Any:
        if self._wrong("route", event.event):
            return self.answer(event.token_experts)
        return None


def plan(**parts: Any) -> Callable[[Gate], Plan]:
    return lambda _: Plan(**parts)


def wish(**parts: Any) -> Callable[[Gate], Plan]:
    return lambda gate: Plan([Prefetch(**{"expert": 0, "expires": gate.event + 2, **parts})])


def serve(how: Any) -> Callable[[Gate], Plan]:
    return lambda gate: Plan(serve=dict.fromkeys(gate.experts.tolist(), how))


def full(value: Any, dtype: Any = None) -> Callable[[AnyArray], AnyArray]:
    return lambda like: np.full(len(like), value, dtype)


ANSWERS: dict[str, dict[str, Callable[..., Any]]] = {
    "on": {
        "nothing": lambda _: None,
        "another type": lambda _: {},
        "an expert below": wish(expert=-1),
        "an expert beyond": wish(expert=10**6),
        "an expert far beyond": wish(expert=HUGE),
        "no number for an expert": wish(expert=math.nan),
        "text for an expert": wish(expert="1"),
        "a float for an expert": wish(expert=1.0),
        "an end far beyond": wish(expires=HUGE),
        "no number for an end": wish(expires=math.nan),
        "an infinite end": wish(expires=math.inf),
        "no end": wish(expires=None),
        "a priority far beyond": wish(priority=-HUGE),
        "no number for a priority": wish(priority=math.nan),
        "no priority": wish(priority=None),
        "a float for a precision": wish(precision=0.0),
        "no place": wish(replaces=None),
        "no prefetches": plan(prefetches=None),
        "ids for prefetches": plan(prefetches=[1, 2]),
        "pairs for prefetches": plan(prefetches=[(1, 2)]),
        "nothing to cancel": plan(cancel=None),
        "an array to cancel": plan(cancel=np.arange(2)),
        "floats to cancel": plan(cancel=[1.5]),
        "a new priority far beyond": plan(reprioritise=[(1, HUGE)]),
        "no number for a new priority": plan(reprioritise=[(1, math.nan)]),
        "half a pair": plan(reprioritise=[(1,)]),
        "no job": plan(jobs=[None]),
        "a job of less than nothing": plan(jobs=[Job(-1, 0)]),
        "a job of no number": plan(jobs=[Job(math.nan, 0)]),
        "a job far beyond": plan(jobs=[Job(HUGE, 0)]),
        "work of less than nothing": plan(foreground_ops=-1),
        "work of no number": plan(foreground_ops=math.nan),
        "no work": plan(foreground_ops=None),
        "work far beyond": plan(foreground_ops=HUGE),
        "a list of ways to serve": plan(serve=[1]),
        "text for a way to serve": serve("fetch"),
        "a precision below": wish(precision=-1),
        "a precision beyond": wish(precision=3),
        "a place beyond": wish(replaces=10**9),
        "a cancel beyond": plan(cancel=[10**6]),
        "a cancel below": plan(cancel=[-5]),
        "a priority beyond": plan(reprioritise=[(10**6, 1)]),
        "a skip": serve(2),
        "an unknown way to serve": serve(17),
    },
    "scores": {
        "nothing": lambda _: None,
        "one number": lambda _: np.int64(0),
        "text": lambda _: "x",
        "floats": full(0.0),
        "no numbers": full(math.nan),
        "infinity": full(math.inf),
        "objects": full(None),
        "short integers": full(0, np.int32),
        "unsigned": full(0, np.uint64),
        "truth": full(True),
        "another byte order": full(0, ">i8"),
        "too many": lambda experts: np.zeros(len(experts) + 1, np.int64),
        "a table": lambda experts: np.zeros((len(experts), 1), np.int64),
    },
    "victims": {
        "nobody": lambda _: [],
        "nothing": lambda _: None,
        "a number": lambda _: 3,
        "lists": lambda candidates: [[c] for c in candidates],
        "floats": lambda candidates: [float(c) for c in candidates],
        "text": lambda _: "ab",
        "no number": lambda _: [math.nan],
        "below": lambda _: [-1],
        "beyond": lambda _: [HUGE],
        "one twice": lambda candidates: [candidates[0]] * 2,
    },
    "route": {
        "a number": lambda _: 5,
        "floats": lambda experts: experts.astype(float),
        "wider integers": lambda experts: experts.astype(np.int64),
        "too few": lambda experts: experts[:, :1],
        "no tokens": lambda experts: experts[:0],
        "a list": lambda experts: experts.tolist(),
        "one expert twice": np.zeros_like,
        "beyond": lambda experts: experts + np.uint16(1000),
    },
}


def outcome(
    engine: Any, where: str, answer: Callable[..., Any], ops_per_s: float = 1e9
) -> tuple[type, str]:
    """What a run with a wrong policy ends with."""
    case = mixed_case(np.random.default_rng(3))
    host = replace(case.hardware.host, policy_ops_per_s=ops_per_s)
    tight = replace(
        case,
        capacity_bytes=(max(case.booked()) * 2,),
        hardware=replace(case.hardware, host=host),
    )
    with pytest.raises(Exception) as caught:
        drive(engine(setup_of(tight, Wrong(where, answer))), works_of(tight))  # type: ignore[arg-type]
    # SimPy raises a copy.
    return type(caught.value.__cause__ or caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("where", "what"), [(where, what) for where, table in ANSWERS.items() for what in table]
)
def test_a_wrong_answer_is_refused_alike(where: str, what: str) -> None:
    answer = ANSWERS[where][what]
    fast = outcome(FastEngine, where, answer)
    assert fast == outcome(ReferenceEngine, where, answer)
    kind, told = fast
    assert kind is PolicyError and told.startswith("layer event ") and "\n" not in told


@pytest.mark.parametrize("error", [ValueError("no"), MemoryError(), RecursionError(), Exception()])
@pytest.mark.parametrize("where", ANSWERS)
def test_what_a_policy_raises_comes_through(where: str, error: Exception) -> None:
    def raises(_: object) -> None:
        raise error

    for engine in (FastEngine, ReferenceEngine):
        assert outcome(engine, where, raises) == (type(error), str(error))


@pytest.mark.parametrize("answer", [plan(foreground_ops=1 << 62), plan(jobs=[Job(1 << 62, 0)])])
def test_work_that_outlasts_the_clock_is_refused_alike(answer: Callable[..., Any]) -> None:
    fast = outcome(FastEngine, "on", answer, ops_per_s=1.0)
    assert fast == outcome(ReferenceEngine, "on", answer, ops_per_s=1.0)
    assert fast[0] is UsageError and "146 years" in fast[1]


# ---- on the command line -------------------------------------------------------------------------


RAISING = """
from moesim.policy import PlainPolicy
from moesim.types import Gate, Plan, Prefetch

class Base(PlainPolicy):
    scored = True
    def on(self, fact, cache):
        # Evictions and landings, so that everything is asked.
        return Plan([Prefetch(0, fact.event + 2)]) if isinstance(fact, Gate) else Plan()
    def scores(self, experts, event):
        return experts

class {name}(Base):
    {traits}
    def {method}(self, *args):
        raise {error}
"""


@pytest.mark.parametrize(
    ("method", "traits"),
    [
        ("__init__", ""),
        ("begin", ""),
        ("on", ""),
        ("scores", ""),
        ("note", ""),
        ("victims", "scored = False"),
    ],
)
def test_a_policy_that_raises_is_one_line_that_names_it(
    method: str,
    traits: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"raising_{method.strip('_')}"
    error = "RuntimeError('two\\nlines')"
    text = RAISING.format(name="Mine", method=method, traits=traits or "pass", error=error)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    words = ("replay", "--trace", "demo", "--limit", "2", "--policy", f"{name}:Mine")
    assert main([*words, "--out", str(out), "--json"]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and said.count("\n") == 1
    assert said.startswith(f"moesim: error: {name}:Mine: RuntimeError: two lines (")
    assert f"{name}.py:" in said
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("error", ["SystemExit(0)", "GeneratorExit", "StopIteration"])
@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_no_policy_ends_the_program(
    error: str,
    engine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"ending_{engine}_{error.strip('(0)')}"
    text = RAISING.format(name="Mine", method="on", traits="pass", error=error)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("replay", "--trace", "demo", "--engine", engine, "--policy", f"{name}:Mine")
    assert main([*words]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and said.count("\n") == 1 and said.startswith(f"moesim: error: {name}")


# ---- Ctrl-C --------------------------------------------------------------------------------------


def test_ctrl_c_on_the_way_into_a_policy_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the core calls Python, an error that is raised before its first line has no caller."""
    case = mixed_case(np.random.default_rng(3))
    engine = FastEngine(setup_of(case, PlainPolicy()))  # type: ignore[arg-type]
    run, entered = engine._run_core, [0]

    def pressed(machine: Any) -> int:
        entered[0] += 1
        if entered[0] != 2:
            return run(machine)
        # Nothing looks for signals between the two.
        _, stopped = map(operator.call, (_thread.interrupt_main, partial(run, machine)))
        return int(stopped)

    monkeypatch.setattr(engine, "_run_core", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            drive(engine, works_of(case))  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, before)
    assert entered[0] == 2
    assert capfd.readouterr() == ("", "")


SPINNING = """
import os, pathlib, time
from moesim.policy import PlainPolicy
from moesim.types import Gate, Plan

def ready():
    pathlib.Path(os.environ["READY"]).touch()

class InOn(PlainPolicy):
    def on(self, fact, cache):
        while isinstance(fact, Gate) and fact.event == 5:
            ready()
        return Plan()

class InScores(PlainPolicy):
    def scores(self, experts, event):
        ready()
        time.sleep(600)

class InVictims(PlainPolicy):
    scored = False
    def victims(self, nbytes, cache):
        ready()
        while True:
            yield cache.candidates[0]
"""

COMPILED = """
import os, pathlib
from moesim.engine.fast import FastEngine
from moesim.cli import program

enter = FastEngine._enter
def entered(self, machine, *, closed):
    pathlib.Path(os.environ["READY"]).touch()
    return enter(self, machine, closed=closed)
FastEngine._enter = entered
program()
"""


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace that keeps compiled code busy, where every victim is looked for among thousands."""
    path = tmp_path_factory.mktemp("busy") / "busy.parquet"
    shape = ("--layers", "32", "--experts", "256", "--top-k", "8", "--overlap", "0")
    size = ("--requests", "20", "--prompt-tokens", "0", "--output-tokens", "200")
    assert main(["trace", "synth", str(path), *shape, *size]) == 0
    return path


def interrupted(folder: Path, program: tuple[str, ...], *words: object) -> None:
    """Press Ctrl-C as soon as the program says that it is there: it leaves in order, and soon."""
    ready, out = folder / "ready", folder / "out"
    process = subprocess.Popen(
        [sys.executable, *program, "replay", *map(str, words), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "READY": str(ready), "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where tests run in the background, Ctrl-C may be ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 100
        while not ready.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
        assert process.poll() is None, "it ended before it could be interrupted"
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert time.monotonic() - pressed < 10
    assert printed == ""
    assert said == "moesim: interrupted; nothing half-written was kept\n"
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["InOn", "InScores", "InVictims"])
def test_ctrl_c_ends_a_policy_that_never_returns(name: str, tmp_path: Path) -> None:
    (tmp_path / "spinning.py").write_text(SPINNING)
    interrupted(tmp_path, ("-m", "moesim"), "--trace", "demo", "--policy", f"spinning:{name}")


@pytest.mark.parametrize("settings", [(), ("--set", "prefetch=previous-token")])
def test_ctrl_c_ends_compiled_code(settings: tuple[str, ...], busy: Path, tmp_path: Path) -> None:
    """In closed form, and event by event."""
    words = ("--trace", busy, "--policy", "random", "--capacity", "50%", *settings)
    interrupted(tmp_path, ("-c", COMPILED), *words)


@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT", "0") != "0", reason="nothing is compiled")
@pytest.mark.parametrize("pause_s", [0.0, 4.0])
def test_ctrl_c_ends_compiling(pause_s: float, tmp_path: Path) -> None:
    """What was kept until then is whole, or not there."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = ("replay", "--trace", "demo", "--policy", "lru", "--out", str(out))
    process = subprocess.Popen(
        [sys.executable, "-m", "moesim", *words],
        cwd=ROOT,
        env={**os.environ, "MOESIM_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("moesim: compiling the fast engine")
        time.sleep(pause_s)
        assert process.poll() is None, "it ended before it could be interrupted"
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert printed == "" and said == "moesim: interrupted; nothing half-written was kept\n"
    assert not out.exists() or not list(out.iterdir())
    for path in cache.rglob("*.nb?"):
        assert path.with_name(f"{path.name}.sha256").exists()
