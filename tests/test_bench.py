"""``moesim bench``: what it reports, that both sides did the same work; never how long it took.

libCacheSim is played by a few lines of Python (``FAKE``), so that the process, the files and the
counts are tested everywhere. Where ``MOESIM_LIBCACHESIM_PYTHON`` names an interpreter that has the
real one, it is asked as well.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.bench import processes, sweeping
from moesim.bench.engines import kept
from moesim.bench.feed import Recording, read, spec_of
from moesim.bench.figures import Beside, Figure, Promise, Samples
from moesim.bench.measure import interleave, one_core
from moesim.bench.plain import PlainLRU
from moesim.bench.rival import OPTION
from moesim.bench.suite import BENCHMARKS, chosen
from moesim.cli import main
from moesim.engine.flat import FlatLRU
from moesim.errors import UsageError
from moesim.policy import check_policy
from moesim.traces.samples import trace_path
from moesim.workload import (
    Inputs,
    StaticBatch,
    flat_events,
    layer_events,
    prepare,
    timeless_steps,
)
from tests.test_libcachesim import SHAPES, STORED, VARIABLE

FAKE = """
from collections import OrderedDict
from enum import Enum
import numpy as np

class TraceType(Enum):
    ORACLE_GENERAL_TRACE = 1

class TraceReader:
    def __init__(self, path, kind):
        record = [("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")]
        self.ids = np.fromfile(path, record)["object"].tolist()

class LRU:
    def __init__(self, cache_size, hashpower):
        self.size = cache_size

    def process_trace(self, reader):
        print("native code may print")
        held, misses = OrderedDict(), {lie}
        for one in reader.ids:
            misses += one not in held
            held[one] = None
            held.move_to_end(one)
            if len(held) > self.size:
                held.popitem(last=False)
        return misses / len(reader.ids), 0.0

LFU = LRU
"""

TINY = ("--tokens", "40", "--head-tokens", "10", "--scale-accesses", "480", "--memory-size", "20KB")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], str]:
    """Make this interpreter one that has libCacheSim; one that miscounts by so many."""

    def make(lie: int = 0) -> str:
        (tmp_path / "libcachesim.py").write_text(FAKE.format(lie=lie))
        info = tmp_path / "libcachesim-9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: libcachesim\nVersion: 9\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return sys.executable

    return make


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON answer of one round on next to nothing."""

    def run(*words: str) -> dict[str, Any]:
        assert main(["bench", *words, *TINY, "--repeats", "1", "--json"]) == 0
        out, err = capsys.readouterr()
        assert all(line.startswith(("bench: ", "moesim: compiling")) for line in err.splitlines())
        answer: dict[str, Any] = json.loads(out)
        for figure in answer["figures"]:
            sound(figure)
        return answer

    return run


def sound(figure: dict[str, Any]) -> None:
    """What holds of every figure."""
    assert figure["benchmark"] in {b.name for b in BENCHMARKS}
    assert figure["samples"] and min(figure["samples"]) > 0
    assert (figure["ratio"] is None) == (figure["reference"] is None)
    assert (figure["kept"] is None) == (figure["promise"] is None)
    if figure["reference"] is not None:
        assert figure["ratio"] == figure["median"] / figure["reference"]["value"]


def cases(answer: dict[str, Any]) -> list[str]:
    return [figure["case"] for figure in answer["figures"]]


# ---- each benchmark, on next to nothing ----------------------------------------------------------


@pytest.mark.parametrize("name", ["lru", "lfu"])
def test_counting_with_a_clock(
    name: str, fake: Callable[[int], str], bench: Callable[..., Any]
) -> None:
    answer = bench(name, OPTION, fake(0))
    assert cases(answer) == [
        "8/layer, log",
        "8/layer, no log",
        "192 global, log",
        "192 global, no log",
    ]
    assert answer["machine"]["libcachesim"] == "9"
    for figure in answer["figures"]:
        assert figure["facts"]["accesses"] == 40 * 24 * 4
        assert figure["reference"]["name"] == f"libCacheSim {name.upper()}"
        assert figure["reference"]["how"] == "best of 1"
    with_log, without = [f["facts"]["hits"] for f in answer["figures"][:2]]
    assert with_log == without


def test_counting_without_a_clock(
    fake: Callable[[int], str], bench: Callable[..., dict[str, Any]]
) -> None:
    demo = str(trace_path("demo"))
    answer = bench("flat", OPTION, fake(0), "--trace", demo, "--limit", "3")
    assert cases(answer) == ["8/layer", "64 global"]
    assert answer["settings"]["trace"] == demo
    assert {f["promise"]["at_least"] for f in answer["figures"]} == {4}


def test_fast_over_reference(bench: Callable[..., dict[str, Any]]) -> None:
    for words, ahead in (((), "ahead=recall:0.9@0"), (("--trace", "demo"), "recorded")):
        lru, lru_core, gate, gate_core = bench("reference", *words)["figures"]
        assert (lru["promise"], gate["promise"]) == ({"at_least": 300}, {"at_least": 200})
        assert lru_core["promise"] is gate_core["promise"] is None
        assert lru["reference"] == lru_core["reference"]
        assert gate["facts"]["ahead"] == gate_core["facts"]["ahead"] == ahead


def test_plain_python(bench: Callable[..., dict[str, Any]]) -> None:
    (figure,) = bench("python")["figures"]
    assert figure["case"] == "PlainLRU, 8/layer, whole"
    assert figure["facts"]["layer_events"] == 10 * 24


def test_scale(bench: Callable[..., dict[str, Any]]) -> None:
    figures = bench("scale")["figures"]
    seats = [figure["case"].partition(",")[0] for figure in figures]
    assert seats == kept() and {"lru", "lfu", "min", "random", "slru"} <= set(seats)
    most = {s: f["promise"]["at_most"] for s, f in zip(seats, figures, strict=True)}
    assert most.pop("lru") == 1.3
    assert set(most.values()) == {2.5}


def test_maps(bench: Callable[..., dict[str, Any]]) -> None:
    answer = bench("maps", "--trace", str(trace_path("demo")), "--limit", "2")
    assert [case.partition(",")[0] for case in cases(answer)] == [
        "trajectory search and p * freq",
        "search",
        "search",
    ]
    whole, full, sparse = answer["figures"]
    assert whole["facts"]["gates"] == "recorded" and whole["facts"]["jobs"] > 0
    assert [f["promise"]["at_most"] for f in (full, sparse)] == [1.5, 0.5]


def test_start(bench: Callable[..., dict[str, Any]]) -> None:
    assert cases(bench("start")) == ["--help", "second replay of the sample"]


def test_compile(bench: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    # What it waits for takes long; here a process keeps something and waits the first time.
    keeps = (
        "import os, pathlib, time\n"
        "path = pathlib.Path(os.environ['MOESIM_CACHE']) / 'kept'\n"
        "path.exists() or (path.write_text('x' * 7), time.sleep(1))\n"
    )
    monkeypatch.setattr(processes, "EVERYTHING", (sys.executable, "-c", keeps))
    (figure,) = bench("compile")["figures"]
    assert figure["facts"]["kept_bytes"] == 7
    assert figure["facts"]["first_replay_s"] > figure["facts"]["second_replay_s"]


@pytest.mark.skipif(not processes.STATUS.exists(), reason="needs /proc")
def test_memory(bench: Callable[..., dict[str, Any]]) -> None:
    answer = bench("memory")
    assert [case.partition(",")[0] for case in cases(answer)] == ["lru", "min"]
    for figure in answer["figures"]:
        assert figure["facts"]["decoded_bytes"] >= 20_000
        assert 1 << 20 < figure["median"] <= figure["facts"]["resident_bytes"]


def test_a_child_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "DEMO", (sys.executable, "-c", "raise SystemExit('no luck')"))
    assert main(["bench", "start", "--repeats", "1"]) == 2
    assert "failed: no luck" in capsys.readouterr().err.splitlines()[-1]


# ---- both sides do the same work -----------------------------------------------------------------


def test_a_miscount_is_no_figure(
    fake: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "flat", *TINY, OPTION, fake(1)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "lru, 8/layer: hits, libCacheSim: " in err.splitlines()[-1]


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no interpreter")
def test_the_real_one_counts_alike(bench: Callable[..., dict[str, Any]]) -> None:
    answer = bench("lru", "lfu", "flat", OPTION, os.environ[VARIABLE])
    assert len(answer["figures"]) == 10


def demanded(recording: Recording, cut: Callable[..., Any]) -> list[int]:
    """Expert ids in the order in which the workload asks for them."""
    steps = timeless_steps(recording.fresh(), StaticBatch())
    items = [item for step in steps for item in cut(step, 0, recording.meta.experts)]
    return [int(e) for item in items for e in item.demand.experts]


def with_drops(recording: Recording) -> Recording:
    """Every third choice dropped."""
    works = []
    for work in recording.works:
        experts = work.rows.experts.copy()
        experts.reshape(-1)[::3] = 65535
        rows = replace(work.rows, experts=experts)
        works.append(prepare(work.index, rows, recording.meta, Inputs()))
    return Recording(recording.meta, works)


@pytest.mark.parametrize("drops", [False, True])
def test_the_stream_is_what_the_workload_asks_for(drops: bool) -> None:
    recording = read(trace_path("demo"), Inputs(), limit=3)
    recording = with_drops(recording) if drops else recording
    for stream, cut in ((recording.stream, layer_events), (recording.choices, flat_events)):
        assert stream.dtype == np.uint32
        assert stream.tolist() == demanded(recording, cut)


@pytest.mark.parametrize("name", SHAPES)
def test_flat_lru_counts_what_libcachesim_counted(name: str) -> None:
    stored = json.loads(STORED.read_text())["streams"]
    for stream, (ids, capacities) in SHAPES[name].jobs().items():
        for capacity in capacities:
            cache = FlatLRU(np.zeros(ids.max() + 1, np.int64), [capacity])
            assert cache.hits(ids.astype(np.uint32)) == stored[stream]["hits"]["LRU"][str(capacity)]


@given(st.lists(st.integers(0, 11), max_size=60), st.integers(1, 3), st.data())
def test_flat_lru_is_lru(stream: list[int], caches: int, data: st.DataObject) -> None:
    capacities = data.draw(st.lists(st.integers(1, 5), min_size=caches, max_size=caches))
    cache_of = np.arange(12) % caches
    made = FlatLRU(cache_of, capacities)
    half = len(stream) // 2
    counted = [made.hits(np.array(part, np.uint32)) for part in (stream[:half], stream[half:])]
    assert sum(counted) == slow_hits(stream, cache_of.tolist(), capacities)


def slow_hits(stream: Sequence[int], cache_of: Sequence[int], capacities: Sequence[int]) -> int:
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in capacities]
    hits = 0
    for one in stream:
        cache = held[cache_of[one]]
        hits += one in cache
        cache[one] = None
        cache.move_to_end(one)
        if len(cache) > capacities[cache_of[one]]:
            cache.popitem(last=False)
    return hits


def test_flat_lru_needs_room() -> None:
    with pytest.raises(ValueError, match="at least one"):
        FlatLRU(np.zeros(3, np.int64), [0])


def test_plain_lru_is_lru() -> None:
    from moesim.bench.feed import Case, run

    check_policy(PlainLRU)
    recording = read(trace_path("demo"), Inputs(), limit=2)
    names = ("lru", "moesim.bench.plain:PlainLRU")
    cases = [Case(recording, spec_of(name), "25%", fast=False) for name in names]
    assert len({run(case).tally.log_digest for case in cases}) == 1


# ---- what is reported ----------------------------------------------------------------------------


def test_a_figure_judges_its_ratio_or_itself() -> None:
    samples = Samples((2.0, 3.0, 5.0))
    alone = Figure("start", "x", "s", samples, promise=Promise(most=3))
    assert (alone.ratio, alone.kept) == (None, True)
    beside = Beside.best_rate("other", Samples((1.0, 2.0)))
    against = Figure("lru", "x", "accesses/s", samples, beside, Promise(least=2))
    assert (against.ratio, against.kept, beside.how) == (1.5, False, "best of 2")
    assert replace(against, promise=None).kept is None
    assert samples.half_spread == 0.5


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) or 1 for name in "ab"}  # type: ignore[misc]
    assert interleave(3, sides) == {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert "".join(order) == "ababab"


def test_one_core_is_given_back() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("needs sched_getaffinity")
    before = os.sched_getaffinity(0)
    with one_core() as core:
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


# ---- the command ---------------------------------------------------------------------------------


def test_the_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert all(f"\n {b.name} " in out and b.summary in out for b in BENCHMARKS)


def test_without_names_the_quick_ones_run() -> None:
    assert [b.name for b in chosen([])] == [b.name for b in BENCHMARKS if b.quick]
    assert chosen(["all"]) == list(BENCHMARKS)


def test_sweeps_of_one_worker_and_of_two_must_give_one_table(
    bench: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "find_spec", lambda name: None)
    monkeypatch.setattr(sweeping, "SHARES", ("50%",))
    (figure,) = bench("sweep", "--configurations", "4")["figures"]
    assert figure["facts"] == {"configurations": 5, "workers": 2}
    assert figure["reference"]["name"] == "one worker" and figure["promise"] == {"at_least": 1.8}
    assert [b.name for b in chosen(["start", "lru"])] == ["lru", "start"]
    with pytest.raises(UsageError, match="did you mean memory"):
        chosen(["memroy"])


def test_without_libcachesim_the_rest_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    assert main(["bench", "flat", "reference", *TINY, "--repeats", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"flat: not run: needs libCacheSim: {OPTION} PATH" in shown
    assert "reference engine" in shown and "≥ 300" in shown
    answer = json.loads(out.read_text())
    assert [r["benchmark"] for r in answer["not_run"]] == ["flat"]
    assert answer["machine"]["cpu"] and answer["machine"]["numba"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing"], "no such benchmark"),
        (["lru", "--repeats", "0"], "--repeats 0"),
        (["memory", "--memory-size", "big"], "--memory-size big"),
        (["reference", "--trace", "absent.parquet"], "absent.parquet: no such file"),
        (["flat", OPTION, "/absent/python"], "/absent/python: No such file"),
        (["flat", OPTION, "/bin/echo"], "/bin/echo: no answer"),
        (["flat", OPTION, sys.executable], "No module named 'libcachesim'"),
        (["start", "--out", "/absent/x.json"], "/absent/x.json: cannot be"),
        (["start", "--out", "."], "is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("bench: ")]
    assert not out and len(lines) == 1
    assert lines[0].startswith("moesim: error: ") and told in lines[0]
