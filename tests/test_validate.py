"""Simulated beside measured: the statistics by hand, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from moesim.analysis.validate import MEAN_TPOT, Report, read_data, report, write_data
from moesim.analysis.validate_runs import PARTS, data_of, matched
from moesim.analysis.validate_text import markdown
from moesim.cli import main
from moesim.result import RunStore, canonical, digest_of, percentiles, read_run
from moesim.traces.samples import trace_path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "data" / "validation"
MS = 10**6


@dataclass(frozen=True)
class Case:
    """One run, in what the comparison reads of it. Times in ms."""

    policy: str = "lru"
    capacity: int = 64
    tpot: tuple[float | None, ...] = (10.0, 20.0)
    ttft: tuple[int, ...] = (100, 200)
    stalls: tuple[int, ...] = (30, 40)
    hits: int = 50
    late: int = 10
    loaded: int = 1000
    repeat: int | None = None
    """None: it is simulated."""

    def write(self, root: Path, **changed: Any) -> Path:
        """Its folder under ``root``; ``changed`` keys of the manifest, ``host`` among them."""
        host = {"wall_s": 1.0, "processor_name": "P", "cores": 2, **changed.pop("host", {})}
        settings: list[str] = changed.pop("set", [])
        manifest = {**self._manifest(settings), **changed}
        folder = RunStore(root).write(
            digest_of(manifest)[:16], manifest, self._summary(settings), self._rows(), None, host
        )
        assert read_run(folder)[0] == manifest
        return folder

    def _manifest(self, settings: list[str]) -> dict[str, Any]:
        link = {
            "bytes_per_s": 4e9,
            "latency_ns": 0,
            "chunk_bytes": 4,
            "curve": [],
            "handover_ns": 1,
        }
        shared = {
            "schema": 1,
            "trace": "abcdef",
            "policy": {"name": self.policy, "seats": {"keep": [self.policy, *settings]}},
            "capacity": {"scope": "global", "bytes": [self.capacity]},
            "set": settings,
            "model": {"name": "m", "experts": 8},
            "hardware": {"name": "h", "source": "measured", "link": link},
            "batch": 1,
            "limit": len(self.ttft),
            "seed": 0,
            "engine": "fast",
        }
        if self.repeat is None:
            return shared
        real = {"device": {"kind": "cpu"}, "paced": True, "repeat": self.repeat}
        return {**shared, "engine": "real", **real}

    def _summary(self, settings: list[str]) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "set": settings,
            "capacity": f"{self.capacity} bytes",
            "capacity_bytes": self.capacity,
            "scope": "global",
            "oracle": False,
            "sizes_equal": True,
            "accesses": 100,
            "hits": self.hits,
            "late_hits": self.late,
            "misses": 100 - self.hits - self.late,
            "loads": 40,
            "bytes_loaded": self.loaded,
            "access_bytes": 1600,
            "steps": 20,
            "times_ns": dict.fromkeys(PARTS, 0)
            | {"stall": sum(self.stalls) * MS, "dense": sum(self.stalls) * MS},
            "time_ns": 2 * sum(self.stalls) * MS,
            "layer_stall_ns": [stall * MS for stall in self.stalls],
            "decision_digest": "d",
        }

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"request": i, "ttft_ns": ttft * MS, "tpot_ns": tpot and tpot * MS, "stall_ns": 5}
            for i, (ttft, tpot) in enumerate(zip(self.ttft, self.tpot, strict=True))
        ]


Write = Callable[[Iterable[Case]], Path]


@pytest.fixture
def kept(tmp_path: Path) -> Write:
    """Writes runs into a folder of run folders."""

    def write(cases: Iterable[Case]) -> Path:
        root = tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        for case in cases:
            case.write(root)
        return root

    return write


def compared(sims: Path, *reals: Path) -> Report:
    """The report of run folders."""
    return report(data_of(matched(sims, reals)))


def measured(case: Case, *tpots: tuple[float, ...]) -> list[Case]:
    """Repeats of a case that differ in TPOT."""
    return [replace(case, repeat=i, tpot=tpot) for i, tpot in enumerate(tpots)]


def row(told: Report, metric: str, regime: str = "all") -> dict[str, Any]:
    """A row of the table of errors."""
    errors = told.errors
    found = errors[(errors["metric"] == metric) & (errors["regime"] == regime)]
    (only,) = found.to_dict("records")
    return dict(only)


# ---- the statistics ------------------------------------------------------------------------------


def test_errors_are_those_of_each_request_against_the_median_of_its_repeats(kept: Write) -> None:
    tpots = [(10.0, 20.0), (12.0, 26.0), (8.0, 25.0)]
    told = compared(kept([Case(tpot=(11.0, 20.0))]), kept(measured(Case(), *tpots)))
    errors = [11 / 10 - 1, 20 / 25 - 1]
    spreads = [(12 - 8) / 2 / 10, (26 - 20) / 2 / 25]
    found = row(told, "TPOT")
    assert found["pairs"] == 2
    assert found["mean_error"] == pytest.approx(fmean(errors))
    assert found["mean_spread"] == pytest.approx(fmean(spreads))
    wanted = percentiles([abs(e) for e in errors])
    assert [found[p] for p in ("p50", "p90", "p99")] == pytest.approx(
        [wanted[p] for p in ("p50", "p90", "p99")]
    )


def test_the_mean_tpot_is_one_pair_a_configuration(kept: Write) -> None:
    tpots = [(10.0, 20.0), (12.0, 26.0), (8.0, 25.0)]
    told = compared(kept([Case(tpot=(11.0, 20.0))]), kept(measured(Case(), *tpots)))
    means = [fmean(tpot) for tpot in tpots]
    found = row(told, MEAN_TPOT)
    assert found["pairs"] == 1
    assert found["mean_error"] == pytest.approx(15.5 / median(means) - 1)
    assert found["mean_spread"] == pytest.approx((max(means) - min(means)) / 2 / median(means))


def test_counts_bytes_and_stalls_by_hand(kept: Write) -> None:
    reals = [Case(repeat=i, hits=h, loaded=b, stalls=(40, s)) for i, (h, b, s) in enumerate(
        [(50, 900, 0), (58, 1000, 0), (52, 1250, 9)])]  # fmt: skip
    told = compared(kept([Case(hits=60, loaded=900, stalls=(30, 7))]), kept(reals))
    assert row(told, "hits + late hits")["mean_error"] == pytest.approx(70 / 62 - 1)
    assert row(told, "bytes")["mean_error"] == pytest.approx(900 / 1000 - 1)
    # A layer that did not stall when measured has no relative error.
    assert row(told, "stall per layer")["pairs"] == 1
    assert row(told, "stall per layer")["mean_error"] == pytest.approx(30 / 40 - 1)


def test_a_simulation_that_is_the_measurement_has_no_error(kept: Write) -> None:
    cases = [Case(name, tpot=(t, t + 1)) for name, t in (("a", 10.0), ("b", 30.0), ("c", 20.0))]
    reals = [replace(case, repeat=i) for case in cases for i in range(3)]
    told = compared(kept(cases), kept(reals))
    assert not told.errors[["mean_error", "p50", "p90", "p99", "mean_spread"]].to_numpy().any()
    (order,) = told.orders.to_dict("records")
    assert order["tau_b"] == 1.0
    assert (order["pairs"], order["clear"], order["swapped"], order["tied"]) == (3, 3, 0, 0)
    assert told.claim["error_kept"] and not told.notes
    # Three pairs are too few to claim anything of the order.
    assert not told.claim["order_kept"]


def test_the_regime_is_what_a_pass_demands_over_the_capacity(kept: Write) -> None:
    """80 bytes a pass."""
    wanted = {161: "below 1/2", 160: "1/2 to 1", 81: "1/2 to 1", 80: "1 to 2", 40: "2 and more"}
    cases = [Case(capacity=capacity) for capacity in wanted]
    told = compared(kept(cases), kept(replace(case, repeat=0) for case in cases))
    found = told.configurations.set_index("capacity_bytes")["regime"].to_dict()
    assert found == wanted
    assert row(told, "TTFT")["pairs"] == 10
    assert row(told, "TTFT", "1/2 to 1")["pairs"] == 4


def test_only_pairs_beyond_both_half_ranges_are_clear(kept: Write) -> None:
    """a: 10 ± 1, b: 12 ± 1 (not beyond), c: 12.5 ± 1 (beyond a's)."""
    middles = {"a": 10.0, "b": 12.0, "c": 12.5}
    sims = [Case(name, tpot=(t,), ttft=(1,)) for name, t in (("a", 9.0), ("b", 5.0), ("c", 8.0))]
    reals = [
        Case(name, tpot=(middle + off,), ttft=(1,), repeat=i)
        for name, middle in middles.items()
        for i, off in enumerate((0.0, -1.0, 1.0))
    ]
    told = compared(kept(sims), kept(reals))
    found = {(p["a"], p["b"]): p for p in told.policies.to_dict("records")}
    assert {pair: p["clear"] for pair, p in found.items()} == {
        ("a", "b"): False,
        ("a", "c"): True,
        ("b", "c"): False,
    }
    assert found["a", "c"]["simulated_order"] == "swapped"
    (order,) = told.orders.to_dict("records")
    assert (order["clear"], order["swapped"], order["tied"]) == (1, 1, 0)
    assert "swapped at 64 bytes: a 10.0 and c 12.5 ms measured" in markdown(told)
    assert told.claim["clear_pairs_not_in_order"] == 1


def test_a_tie_of_the_simulator_is_no_agreement(kept: Write) -> None:
    sims = [Case("a"), Case("b")]
    reals = [Case("a", repeat=0), Case("b", tpot=(30.0, 30.0), repeat=0)]
    (order,) = compared(kept(sims), kept(reals)).orders.to_dict("records")
    assert (order["clear"], order["swapped"], order["tied"]) == (1, 0, 1)


def tau_b(a: Sequence[float], b: Sequence[float]) -> float:
    """By its definition, over all pairs."""
    signs = [
        (np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)
    ]
    agree = sum(x * y for x, y in signs)
    free_a, free_b = (sum(1 for pair in signs if pair[side]) for side in (0, 1))
    return float(agree / math.sqrt(free_a * free_b)) if free_a and free_b else math.nan


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=7))
def test_kendalls_tau_counts_ties(
    tmp_path_factory: pytest.TempPathFactory, times: list[tuple[int, int]]
) -> None:
    root = tmp_path_factory.mktemp("tau")
    for number, (simulated, real) in enumerate(times):
        Case(f"p{number}", tpot=(simulated,), ttft=(1,)).write(root / "s")
        Case(f"p{number}", tpot=(real,), ttft=(1,), repeat=0).write(root / "r")
    (order,) = compared(root / "s", root / "r").orders.to_dict("records")
    wanted = tau_b([s for s, _ in times], [r for _, r in times])
    assert order["tau_b"] == pytest.approx(wanted, nan_ok=True)


def test_the_parts_of_an_error_sum_to_the_whole(kept: Write) -> None:
    reals = [Case(stalls=(s, 20), repeat=i) for i, s in enumerate((10, 20, 40))]
    told = compared(kept([Case(stalls=(20, 30))]), kept(reals))
    (parts,) = told.parts.to_dict("records")
    mean = fmean(2 * (s + 20) for s in (10, 20, 40))
    assert parts["time"] == pytest.approx(100 / mean - 1)
    assert sum(parts[part] for part in PARTS) == pytest.approx(parts["time"])
    assert parts["stall"] == parts["dense"] == pytest.approx(parts["time"] / 2)


def test_capacities_are_ordered_apart(kept: Write) -> None:
    cases = [Case(name, capacity) for name in "ab" for capacity in (32, 64)]
    told = compared(kept(cases), kept(replace(case, repeat=0) for case in cases))
    assert list(told.orders["group"]) == ["32 bytes", "64 bytes"]
    assert list(told.orders["pairs"]) == [1, 1]


def test_neither_order_nor_split_of_the_folders_matters(kept: Write) -> None:
    tpots = [(10.0, 20.0), (12.0, 26.0), (8.0, 25.0)]
    runs = [replace(c, policy=p) for p in "ab" for c in measured(Case(), *tpots)]
    sims = kept([Case("a"), Case("b", tpot=(9.0, 30.0))])
    whole = markdown(compared(sims, kept(runs)))
    apart = [kept([run]) for run in reversed(runs)]
    assert markdown(compared(sims, *apart, apart[0])) == whole


def test_the_raw_tables_give_the_same_report(kept: Write, tmp_path: Path) -> None:
    tpots = [(10.1, 20.3), (12.7, 1 / 3), (8.0, 25.0)]
    sims = kept([Case(tpot=(1 / 7, 20.0))])
    data = data_of(matched(sims, [kept(measured(Case(), *tpots))]))
    write_data(data, tmp_path)
    again = report(read_data(tmp_path))
    assert again.to_dict() == report(data).to_dict()
    assert markdown(again) == markdown(report(data))


def test_a_request_of_one_token_has_no_tpot(kept: Write) -> None:
    sims, reals = [Case(tpot=(None, 10.0))], measured(Case(), (None, 10.0), (None, 11.0))  # type: ignore[arg-type]
    assert row(compared(kept(sims), kept(reals)), "TPOT")["pairs"] == 1
    sims, reals = [Case(tpot=(None, None))], [Case(tpot=(None, None), repeat=0)]
    told = compared(kept(sims), kept(reals))
    assert any(note.startswith("TPOT: nothing to compare") for note in told.notes)
    assert json.loads(json.dumps(told.to_dict(), allow_nan=False))["claim"]["error_kept"] is False


def test_fewer_than_three_repeats_are_told_and_no_error(
    kept: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    sims, reals = kept([Case()]), kept(measured(Case(), (10.0, 20.0), (10.0, 21.0)))
    assert main(["validate", str(sims), str(reals), "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert "fewer than 3 repeats" in note and "lru at 64 bytes" in note
    assert main(["validate", str(sims), str(reals)]) == 0
    assert note in capsys.readouterr().out


# ---- what is refused -----------------------------------------------------------------------------

SIM, REAL = Case(), Case(repeat=0)


def _lone(root: Path) -> list[Path]:
    SIM.write(root / "s")
    Case("fifo").write(root / "s")
    REAL.write(root / "r")
    Case("lfu", repeat=0).write(root / "r")
    return [root / "s", root / "r"]


def _twice(root: Path) -> list[Path]:
    SIM.write(root / "s")
    SIM.write(root / "s", engine="reference")
    return [root / "s", REAL.write(root / "r")]


def _two(root: Path, sim: dict[str, Any], real: dict[str, Any], case: Case = REAL) -> list[Path]:
    return [SIM.write(root / "s", **sim), REAL.write(root / "r"), case.write(root / "r", **real)]


def _two_allocators(root: Path) -> list[Path]:
    """Experts of two sizes: bytes and slots have room for different ones."""
    made = _two(root, {"allocator": "bytes"}, {"allocator": "slots"})
    for folder in (made[0], made[2]):
        summary = folder / "summary.json"
        summary.write_text(json.dumps({**json.loads(summary.read_text()), "sizes_equal": False}))
    return [made[0], made[2]]


def test_the_allocator_is_nothing_where_sizes_are_equal(tmp_path: Path) -> None:
    sim, _, real = _two(tmp_path, {"allocator": "bytes"}, {"allocator": "slots"})
    assert main(["validate", str(sim), str(real)]) == 0


def _other_link() -> dict[str, Any]:
    hardware = json.loads(canonical(SIM._manifest([])["hardware"]))
    hardware["link"]["bytes_per_s"] = 8e9
    return {"hardware": hardware}


REFUSED: dict[str, tuple[Callable[[Path], list[Path]], str]] = {
    "no folder": (lambda r: [r / "none", REAL.write(r)], "none: no such folder"),
    "empty folder": (lambda r: [r, REAL.write(r / "r" / "r")], "holds no finished run"),
    "sim as real": (lambda r: [SIM.write(r / "s"), SIM.write(r / "t")], "was simulated"),
    "real as sim": (lambda r: [REAL.write(r), REAL.write(r)], "was measured"),
    "trace": (lambda r: _two(r, {}, {"trace": "other"}), "another trace than"),
    "model": (lambda r: _two(r, {"model": {"name": "n"}}, {}), "another model than"),
    "schema": (lambda r: _two(r, {}, {"schema": 2}), "has schema 2"),
    "machine": (
        lambda r: _two(r, {}, {"host": {"processor_name": "Q"}}, replace(REAL, repeat=1)),
        "another machine than",
    ),
    "link": (lambda r: _two(r, _other_link(), {}), "another link than"),
    "paced": (lambda r: _two(r, {}, {"paced": False}), "another use of --bandwidth"),
    "settings": (lambda r: _two(r, {"set": ["keep.x=1"]}, {}), "settings (as it is)"),
    "limit": (lambda r: _two(r, {"limit": 9}, {}), "limit 2, and simulated with 9"),
    "allocator": (_two_allocators, 'allocator "slots", and simulated with "bytes"'),
    "twice": (_twice, "both simulate lru at 64 bytes"),
    "lone": (_lone, "not measured: fifo at 64 bytes; not simulated: lfu at 64 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, wanted = REFUSED[name]
    root = tmp_path / "runs"
    root.mkdir()
    words = [str(path) for path in make(root)]
    out = tmp_path / "out"
    assert main(["validate", *words, "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert not told.out and wanted in told.err
    assert told.err.startswith("moesim: error: ") and told.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize("damage", ["summary.json", "host.json", "requests.parquet"])
def test_a_damaged_run_is_named(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sim, real = SIM.write(tmp_path / "s"), REAL.write(tmp_path / "r")
    (real / damage).write_text("{")
    assert main(["validate", str(sim), str(real)]) == 2
    told = capsys.readouterr().err
    assert str(real) in told and told.count("\n") == 1


# ---- files and figures ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated runs with timelines, and copies that pass for measurements of a machine that takes
    twice the time."""
    root = tmp_path_factory.mktemp("replayed")
    words = ["--trace", "demo", "--policy", "lru,next-gate", "--limit", "2", "--timeline"]
    assert main(["replay", *words, "--allocator", "slots", "--out", str(root / "s")]) == 0
    for folder in sorted((root / "s").iterdir()):
        for repeat in range(3):
            _slow_copy(folder, root / "r" / f"{folder.name}{repeat}", repeat)
    return root


def _slow_copy(source: Path, target: Path, repeat: int) -> None:
    import pyarrow.parquet as pq

    target.mkdir(parents=True)
    manifest, summary = read_run(source)
    real = {"engine": "real", "device": {"kind": "cpu"}, "paced": False, "repeat": repeat}
    summary["layer_stall_ns"] = [2 * ns for ns in summary["layer_stall_ns"]]
    (target / "manifest.json").write_text(json.dumps({**manifest, **real}))
    (target / "summary.json").write_text(json.dumps(summary))
    (target / "host.json").write_text((source / "host.json").read_text())
    table = pq.read_table(source / "requests.parquet")
    for name in ("ttft_ns", "tpot_ns"):
        place, column = table.schema.get_field_index(name), table[name].to_numpy() * 2
        table = table.set_column(place, name, [column])
    pq.write_table(table, target / "requests.parquet")
    timeline = json.loads((source / "timeline.json").read_text())
    for event in timeline["traceEvents"]:
        for key in ("ts", "dur"):
            if key in event:
                event[key] *= 2
    (target / "timeline.json").write_text(json.dumps(timeline))


FIGURES = [
    f"{name}.{kind}" for name in ("scatter", "overlay") for kind in ("csv", "pdf", "png", "svg")
]


def test_the_folder_holds_tables_text_and_figures(
    replayed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["validate", str(replayed / "s"), str(replayed / "r"), "--out", str(out)]
    assert main(words) == 0
    assert "next-gate" in capsys.readouterr().out
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {*FIGURES, "validation.md", "runs.csv", "pairs.csv", "errors.csv"} <= set(found)
    told = report(read_data(out))
    assert found["validation.md"].decode() == markdown(told)
    for metric in ("TTFT", "TPOT", MEAN_TPOT, "stall per layer"):
        assert row(told, metric)["mean_error"] == pytest.approx(-0.5)
    assert row(told, "bytes")["p99"] == 0
    # Written again, it is the same to the byte, figures among them.
    assert main(words) == 0
    capsys.readouterr()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == found
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_overlay_sets_one_step_beside_itself(replayed: Path, tmp_path: Path) -> None:
    import pandas as pd

    out = tmp_path / "out"
    words = [str(replayed / "s"), str(replayed / "r"), "--out", str(out), "--step", "5"]
    assert main(["validate", *words, "--overlay", "next-gate@25%"]) == 0
    spans = pd.read_csv(out / "overlay.csv")
    simulated, real = (
        spans[spans["origin"] == origin].reset_index() for origin in ("simulated", "measured")
    )
    assert len(simulated) == len(real) > 20
    assert (simulated["name"] == real["name"]).all()
    assert {"dense", "expert", "demand", "prefetch"} <= set(real["kind"])
    for edge in ("start_ms", "end_ms"):
        assert np.allclose(2 * simulated[edge], real[edge], atol=1e-9)
    assert simulated["start_ms"].min() == 0.0


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--step", "96"], "has no step 96 with one after it"),
        (["--step", "-1"], "has no step -1"),
        (["--overlay", "lfu@25%"], "not compared; choose from lru@25%, next-gate@25%"),
    ],
)
def test_a_step_that_is_not_there_is_named(
    words: list[str],
    wanted: str,
    replayed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    runs = [str(replayed / "s"), str(replayed / "r"), "--out", str(out)]
    assert main(["validate", *runs, *words]) == 2
    assert wanted in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_step_is_drawn_into_a_folder(kept: Write, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(kept([SIM])), str(kept([REAL]))]
    assert main(["validate", *runs, "--step", "1"]) == 2
    assert "give --out DIR too" in capsys.readouterr().err


# ---- a campaign ----------------------------------------------------------------------------------


def test_a_campaign_measures_what_it_has_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from moesim import campaign as campaigns
    from moesim.cli.progress import requests_progress

    wanted = campaigns.Campaign(
        out=tmp_path / "c",
        trace=trace_path("demo"),
        costs=None,
        policies=("lru", "static"),
        capacities=("25%",),
        hardware=Path("rtx4090"),
        limit=2,
        output_tokens=2,
        repeats=2,
    )
    said: list[str] = []
    told = campaigns.run(wanted, said.append, requests_progress)
    assert list(told.configurations["repeats"]) == [2, 2]
    measured_runs = sorted((tmp_path / "c" / "measured").iterdir())
    assert len(measured_runs) == 4
    # Law (a): on banks that serve one run after the other, lru decides as simulated.
    data = read_data(tmp_path / "c" / "validation")
    lru = data.runs[data.runs["policy"] == "lru"]
    assert (lru.groupby("capacity")["decision_digest"].nunique() == 1).all()
    assert (row(told, "bytes")["p99"], row(told, "hits + late hits")["p99"]) == (0, 0)

    kept_folder = campaigns.keep(wanted, tmp_path / "kept")
    assert markdown(report(read_data(kept_folder))) == (kept_folder / "validation.md").read_text()
    assert sum(path.stat().st_size for path in kept_folder.iterdir()) < 1 << 20

    made: list[Any] = []
    execute = campaigns.execute
    monkeypatch.setattr(campaigns, "execute", lambda *a, **k: made.append(a) or execute(*a, **k))
    assert campaigns.run(wanted, said.append, requests_progress).to_dict() == told.to_dict()
    assert not made
    campaigns.run(replace(wanted, repeats=3), said.append, requests_progress)
    # One of each configuration, and one to warm up.
    assert len(made) == 3


def test_a_cut_trace_keeps_prompts_and_the_first_tokens(tmp_path: Path) -> None:
    from moesim.campaign import shorten
    from moesim.traces.reader import TraceReader

    shorten(trace_path("demo"), tmp_path / "t.parquet", 3, 4)
    with TraceReader(tmp_path / "t.parquet") as cut, TraceReader(trace_path("demo")) as whole:
        pairs = list(zip(cut.requests(), whole.requests(), strict=False))
    assert len(pairs) == 3
    for ours, theirs in pairs:
        count = len(ours.layer)
        assert ours.iteration.max() == 4 and theirs.iteration[count] == 5
        assert (ours.experts == theirs.experts[:count]).all()


@pytest.mark.parametrize(
    "words", [["--bandwidth", "3"], ["--policy", "lru,nonsense"], ["--capacity", "lots"]]
)
def test_a_campaign_that_cannot_run_is_refused_at_once(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    assert main(["real", "campaign", "--out", str(tmp_path / "c"), *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and words[1].split(",")[-1] in told


# ---- what is published ---------------------------------------------------------------------------


PUBLISHED = sorted(path.parent for path in KEPT.glob("*/validation.md"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_the_published_table_follows_from_the_raw_measurements(folder: Path) -> None:
    text = (folder / "validation.md").read_text(encoding="utf-8")
    told = report(read_data(folder))
    assert markdown(told) == text
    assert told.claim["least_repeats"] >= 7
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1 << 20


def test_the_readme_publishes_no_other_numbers() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What to believe")[1]
    rows = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    texts = [path.read_text(encoding="utf-8") for path in KEPT.glob("*/validation.md")]
    assert set(rows) <= {line for text in texts for line in text.splitlines()}
