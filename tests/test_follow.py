"""Law (c): a run's fact log tells a policy all that it was told, and gives the run again."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from moesim import log
from moesim.cli import main
from moesim.configuration import Configuration, Request
from moesim.errors import UsageError
from moesim.factlog import FACTS, FactReader, plain, restored
from moesim.follow import FollowError, follow, refeed
from moesim.policy import CacheView, PlainPolicy
from moesim.real.device import Device
from moesim.real.run import RealRequest, execute, open_banks
from moesim.real.slots import SlotLedger
from moesim.traces.writer import TraceWriter
from moesim.types import (
    ExpertId,
    Fact,
    Gate,
    IntArray,
    IterationBegin,
    Job,
    JobDone,
    Landed,
    LayerEvent,
    Phase,
    Plan,
    Prefetch,
    Slot,
)
from moesim.workload import Row
from tests.strategies import KEEPS, MISSES, PREFETCHES, Case, cases, machine
from tests.test_laws import mixed_case
from tests.test_real import enlarged, roomy


class Slow:
    """A device whose dense part takes its time, so that loads are late and overtaken."""

    def __init__(self, inner: Device, dense_s: float) -> None:
        self.inner = inner
        self.dense_s = dense_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        """After a while."""
        time.sleep(self.dense_s)
        self.inner.dense(layer, tokens, rows)


def opener(dense_s: float) -> Any:
    """Opens slow banks."""

    def open_slow(request: RealRequest, what: Configuration, ledger: SlotLedger) -> Any:
        return Slow(open_banks(request, what, ledger), dense_s)

    return open_slow


def written(case: Case, path: Path) -> Path:
    """A case's trace on disk."""
    with TraceWriter(path, case.meta) as writer:
        for rows in case.requests:
            writer.write_request(rows)
    return path


def ran(
    case: Case,
    folder: Path,
    policy: str,
    *sets: str,
    dense_s: float = 0.0,
    initial: str = "",
) -> tuple[Path, dict[str, Any]]:
    """A real run of a case, kept in a folder, with its summary."""
    size = max(case.booked())
    what = Request(
        trace=written(case, folder / "t.parquet"),
        hardware=case.hardware,
        policy=policy,
        capacity=f"{max(size, min(case.capacity_bytes))}B",
        settings=sets,
        batch=case.batch,
        chunk_tokens=case.chunk_tokens,
        initial=initial,
        seed=case.seed,
    )
    request = RealRequest(
        what, paced=True, out=folder / "runs", verify=True, threads=1, watchdog_s=20
    )
    told = execute(request, open_device=opener(dense_s))["runs"][0]
    return Path(told["run_dir"]), told


def slow_link(case: Case) -> Case:
    """Loads of tens to hundreds of microseconds, in chunks."""
    return replace(case, hardware=machine(bytes_per_s=10e6, latency_ns=10_000, chunk_bytes=64))


# ---- law (c) -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    case=cases(arrivals=False),
    # Halves are kept of experts that the trace has in parts.
    keep=st.sampled_from([name for name in KEEPS if name != "top-halves"]),
    prefetch=st.sampled_from(PREFETCHES),
    miss=st.sampled_from(MISSES),
)
def test_law_c_every_answer_and_every_load_again(
    tmp_path_factory: pytest.TempPathFactory, case: Case, keep: str, prefetch: str, miss: str
) -> None:
    case = roomy(enlarged(slow_link(case)))
    folder = tmp_path_factory.mktemp("run")
    sets = (f"keep={keep}", f"prefetch={prefetch}", f"miss={miss}")
    run, told = ran(case, folder, "lru", *sets)
    assert refeed(run) > 0
    again = follow(run)
    assert again["loads"] == told["loads"]
    assert again["layer_events"] == told["layer_events"]


@pytest.mark.parametrize("cancel", ["true", "false"])
def test_law_c_with_late_overtaken_and_waves(tmp_path: Path, cancel: str) -> None:
    """The same, where it is known that loads come late, are overtaken, and events go in waves."""
    seen = Counter(dict.fromkeys(("late", "overtaken", "waves"), 0))
    number = 0
    # A loaded machine may deliver in time; then once more.
    while number < 3 or (min(seen.values()) == 0 and number < 30):
        number += 1
        case = enlarged(mixed_case(np.random.default_rng(number)))
        hardware = machine(latency_ns=1_500_000, bytes_per_s=1e9, chunk_bytes=32)
        case = replace(
            case, hardware=hardware, batch=3, capacity_bytes=((4 + 2 * (number % 4)) * 96,)
        )
        folder = tmp_path / str(number)
        folder.mkdir()
        sets = ("prefetch=next-gate", f"prefetch.cancel={cancel}")
        run, told = ran(case, folder, "lru", *sets, dense_s=0.002)
        seen["late"] += told["late_hits"]
        seen["overtaken"] += told["prefetch"]["overtaken"]
        seen["waves"] += told["overflows"]
        assert refeed(run) > 0
        assert follow(run)["loads"] == told["loads"]
    assert min(seen.values()) > 0, seen


class Restless(PlainPolicy):
    """Names its victims, swaps, asks for work, and wishes by what it sees of the cache."""

    scored = False

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        if isinstance(fact, JobDone):
            return Plan([Prefetch(fact.job.result, fact.event + 3)])
        if not isinstance(fact, Gate):
            return Plan()
        absent = np.flatnonzero(cache.states == 0).tolist()
        free = cache.free_bytes(fact.layer)
        work = [Job(10, 0, absent[-1])] if absent and cache.jobs_waiting < 2 else []
        wishes = [Prefetch(e, fact.event + 2, priority=free % 3) for e in absent[:2]]
        return Plan(wishes, cancel=absent[2:3], jobs=work)

    def victims(self, nbytes: int, cache: CacheView) -> list[ExpertId]:
        return sorted(cache.candidates, reverse=True)


@pytest.mark.parametrize("number", range(3))
def test_law_c_for_a_policy_of_ones_own(tmp_path: Path, number: int) -> None:
    """With jobs, whose results come back when the worker is done, and victims that it names."""
    case = enlarged(mixed_case(np.random.default_rng(number)))
    hardware = machine(latency_ns=200_000, bytes_per_s=1e9, chunk_bytes=32)
    case = replace(case, hardware=hardware, capacity_bytes=(480,))
    run, told = ran(case, tmp_path, f"{__name__}:Restless", dense_s=0.0005)
    assert told["jobs"] > 0 and told["evictions"] > 0
    assert refeed(run) > 0
    assert follow(run)["victims"] == told["evictions"]


def test_law_c_with_the_future_and_a_fixed_set(tmp_path: Path) -> None:
    """What a bound was shown of the future is in the log: every demand."""
    case = enlarged(slow_link(mixed_case(np.random.default_rng(5))))
    case = replace(case, capacity_bytes=(576,))
    for name in ("hindsight", "min", "static", "fiddler"):
        folder = tmp_path / name
        folder.mkdir()
        run, _ = ran(case, folder, name)
        assert refeed(run) > 0
        follow(run)


# ---- differences are found -----------------------------------------------------------------------


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """A run with prefetches."""
    case = enlarged(slow_link(mixed_case(np.random.default_rng(2))))
    return ran(replace(case, capacity_bytes=(576,)), tmp_path, "next-gate")[0]


Change = Callable[[list[Any]], list[Any] | None]


def rewritten(run: Path, change: Change) -> None:
    """The run's log with its records changed; None leaves one out."""
    reader = FactReader(run / FACTS)
    records = [reader.header, *(made for r in reader if (made := change(r)) is not None)]
    with pa.CompressedOutputStream(str(run / FACTS), "zstd") as out:
        for record in records:
            out.write(json.dumps(record).encode() + b"\n")


def first(what: Callable[[list[Any]], bool], change: Change) -> Change:
    """A change of the first record that is meant."""
    left = iter([True])

    def apply(record: list[Any]) -> list[Any] | None:
        return change(record) if what(record) and next(left, False) else record

    return apply


def test_another_victim_is_found_and_named(a_run: Path) -> None:
    def evicts(record: list[Any]) -> bool:
        return record[:2] == ["did", log.EVICT]

    rewritten(a_run, first(evicts, lambda r: [*r[:3], r[3] + 1 if r[3] % 5 < 4 else r[3] - 1]))
    with pytest.raises(FollowError, match=r"the run evicts expert \d.\d, and .* evicts expert"):
        follow(a_run)


def test_a_missing_landing_is_found(a_run: Path) -> None:
    def copied(record: list[Any]) -> bool:
        return record[0] == "came" and record[1] == "copy"

    rewritten(a_run, first(copied, lambda r: None))
    with pytest.raises(FollowError, match="followed now it"):
        follow(a_run)


def test_another_answer_is_found(a_run: Path) -> None:
    def scored(record: list[Any]) -> bool:
        return record[0] == "scores"

    rewritten(a_run, first(scored, lambda r: [*r[:3], [v + 1 for v in r[3]]]))
    with pytest.raises(FollowError, match="scores answered"):
        refeed(a_run)


def test_the_command_follows(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--follow", str(a_run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] and told["loads"] > 0
    assert main(["replay", "--follow", str(a_run)]) == 0
    assert capsys.readouterr().out.startswith("equal: next-gate")
    rewritten(a_run, first(lambda r: r[:2] == ["did", log.ISSUE], lambda r: [*r[:3], r[3] + 1]))
    assert main(["replay", "--follow", str(a_run)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1


def test_another_trace_is_refused(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--follow", str(a_run), "--trace", "demo"]) == 2
    assert "is not the trace of the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"no zstd"),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
    ],
    ids=["missing", "no zstd", "cut", "empty"],
)
def test_a_damaged_log_is_one_line(
    a_run: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(a_run / FACTS)
    assert main(["replay", "--follow", str(a_run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moesim: error: ") and err.count("\n") == 1
    with pytest.raises((UsageError, FollowError)):
        refeed(a_run)


# ---- the log's values ----------------------------------------------------------------------------


def facts() -> Iterator[Any]:
    """One of each kind."""
    slot = Slot(1, 2, Phase.PREFILL, 0, 2)
    source = LayerEvent(
        event=3,
        step=1,
        layer=2,
        slots=(slot,),
        token_experts=np.array([[1, 65535], [0, 1]], np.uint16),
        weights=np.array([[1, 2], [3, 4]], np.int32),
        ahead={1: np.array([[1], [2]], np.uint16)},
    )
    ids: IntArray = np.array([9, 8], np.int64)
    bytes_ = np.array([0, 2], np.uint8)
    yield Gate(source, ids, ids, bytes_, bytes_)
    yield IterationBegin(1, 2, Phase.DECODE, 1, np.array([-5, 7], np.int32))
    yield Landed(5, 0, 3, 1, True)


@pytest.mark.parametrize("fact", list(facts()), ids=lambda fact: type(fact).__name__)
def test_a_fact_comes_back_as_it_was(fact: Any) -> None:
    text = json.dumps(plain(fact))
    back = restored(json.loads(text))
    assert type(back) is type(fact)
    assert json.dumps(plain(back)) == text
    if isinstance(fact, Gate):
        assert back.source.token_experts.dtype == np.uint16
        assert back.source.slots == fact.source.slots
        assert isinstance(back.source.slots[0].phase, Phase)
        assert np.array_equal(back.source.ahead[1], fact.source.ahead[1])
