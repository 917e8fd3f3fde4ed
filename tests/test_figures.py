# ruff: noqa: E501 - rows of made-up runs
"""The papers' figures: every one draws, alike from equal runs, says what it rests on, and refuses
what cannot be drawn."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("matplotlib")

from moesim.analysis import claims, own_figures, trace_studies
from moesim.analysis.figure_source import Absent, Source, caveats, read
from moesim.analysis.figures import PAPERS, draw
from moesim.analysis.style import LOOKS, lightness, looks, name_of
from moesim.cli import main
from moesim.errors import UsageError
from moesim.result import SCHEMA
from moesim.traces.reader import Columns, TraceReader
from moesim.traces.samples import trace_path

HERE = Path(__file__).parent
QUALITY = HERE / "data" / "validation" / "swapmoe-demo"
VALIDATION = HERE / "data" / "validation" / "amd-epyc"
SYSTEMS = ("finemoe", "moe-infinity", "promoe-speculative", "mixtral-offloading", "deepspeed-cache")
PRUNED = ("swapmoe", "prune-importance", "prune-magnitude", "prune-random")
TRACES = {"mixtral": "demo-mixtral", "qwen": "demo-qwen", "phi": "demo", "switch": "demo-switch"}
COSTS = {"mixtral": "mixtral-8x7b", "qwen": "qwen1.5-moe-a2.7b", "phi": "phi-3.5-moe"}


def _digest(name: str) -> str:
    with TraceReader(trace_path(name), Columns.experts_only()) as reader:
        return reader.meta.digest


def _row(grid: str, policy: str, number: int, **more: Any) -> dict[str, Any]:
    """A run as `moesim sweep` writes it, with made-up numbers."""
    case = grid.partition("/")[2]
    trace = TRACES.get(case, "demo")
    fates = ("used", "late", "wasted", "cancelled", "unused_at_end")
    return {
        "grid": grid, "policy": policy, "capacity": "30%", "set": "", "trace": trace,
        "costs": COSTS.get(case), "not_run": None, "folder": f"runs/run{number}",
        "trace_digest": _digest(trace), "source_digest": "s", "schema": SCHEMA,
        "model": COSTS.get(case, "olmoe-1b-7b"), "hardware_name": "rtx3090",
        "hardware_source": "datasheet", "capacity_bytes": 2**30, "allowed": "embedding=none,gate=topk",
        "oracle": policy in own_figures.RUNGS, "lossy": policy in PRUNED,
        "ttft_ns.mean": 5e6 + 1e5 * number, "tpot_ns.mean": 1e6 + 1e5 * (number % 7),
        "hit_rate": 0.3 + number % 5 / 10, "accesses": 100, "prefetch.named_and_demanded": 40,
        "batch": 1, "arrivals": "poisson:2.91", "bandwidth": "8GB/s", "steps": 10,
        "output_tokens": 10, "bytes_loaded": 2**26, "initial_bytes": 0, "peak_bytes": 2**30,
        "link_busy_ns": 10**7, "time_ns": 2 * 10**7, "stall_ns": 10**6,
        "layer_stall_ns": [10**5 * (i + 1) for i in range(8)], "quality.gate_mass_kept": 0.8,
        "serving.end_to_end_ns.p50": 1e9 + number,
        "against_best.tie": number % 4 == 1,
        **{f"times_ns.{p}": 10**6 for p in ("dense", "experts", "cpu_wait", "sync", "plan", "stall")},
        **{f"prefetch.bytes.{fate}": 2**20 for fate in fates}, **more,
    }  # fmt: skip


def _finemoe() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for case in COSTS:
        for policy in SYSTEMS:
            yield from ((f"memory/{case}", policy, {"capacity": c}) for c in ("15%", "30%", "60%"))
            yield f"fast/{case}", policy, {}
            yield f"online/{case}", policy, {}
        for policy in ("finemoe-hits", "finemoe-t", "finemoe-ts", "finemoe"):
            yield f"track/{case}", policy, {}
        yield f"speculate/{case}", "finemoe", {}
        for keep in ("lru", "lfu", "map-frequency"):
            yield f"keep/{case}", "finemoe", {"set": f"keep={keep}"}
        for policy, d in itertools.product(("finemoe", "finemoe-hits", "finemoe-t"), (1, 3, 6)):
            yield f"distance/{case}", policy, {"set": f"prefetch.distance={d}"}
    for policy, batch in itertools.product(SYSTEMS[:4], (1, 2)):
        yield "batch/mixtral", policy, {"batch": batch}


def _swapmoe() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for policy, c in itertools.product((*PRUNED, "lru"), ("25%", "50%", "100%")):
        yield "memory/switch", policy, {"capacity": c}
    yield "resident/switch", "lru", {"capacity": "100%"}
    yield from (("layerwise/switch", policy, {}) for policy in ("streaming", "lru"))


def _own() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for policy, c in itertools.product(
        ("lru", "finemoe", "swapmoe", "min", "hindsight"), ("10%", "30%")
    ):
        yield "pareto/demo", policy, {"capacity": c}
    for i, (rate, policy) in enumerate(itertools.product((4, 32, 256), ("lru", "lfu"))):
        # One is quicker on a slow link, the other on a fast one.
        tpot = {"lru": 1e9 / rate, "lfu": 2e8 / rate**0.5}[policy]
        yield "bandwidth/demo", policy, {"bandwidth": f"{rate}GB/s", "tpot_ns.mean": tpot + i}


ROWS = {"finemoe": _finemoe, "swapmoe": _swapmoe, "own": _own}
MEASURED = {"finemoe": None, "swapmoe": QUALITY, "own": VALIDATION}


def _table(paper: str) -> pd.DataFrame:
    return pd.DataFrame(
        [_row(grid, policy, i, **more) for i, (grid, policy, more) in enumerate(ROWS[paper]())]
    )


def _kept(table: pd.DataFrame, folder: Path) -> Path:
    """As a sweep leaves it: the table, and requests.parquet of each run."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "results.parquet")
    for name in table["folder"].dropna():
        run = folder / name
        run.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"end_to_end_ns": [10**9, 2 * 10**9]}).to_parquet(run / "requests.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {paper: _kept(_table(paper), root / paper) for paper in PAPERS}


@pytest.fixture(scope="module")
def drawn(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("figs")
    for paper, path in runs.items():
        made = draw(
            paper, read(path, f"moesim figures --paper {paper}", MEASURED[paper]), root / paper
        )
        assert [one for one in made if one.absent] == []
    return {paper: root / paper for paper in runs}


def _source(runs: dict[str, Path], paper: str) -> Source:
    return read(runs[paper], "moesim figures", MEASURED[paper])


@pytest.mark.parametrize("paper", PAPERS)
def test_every_figure_is_drawn_with_its_data(drawn: dict[str, Path], paper: str) -> None:
    for name in PAPERS[paper]:
        assert (drawn[paper] / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (drawn[paper] / f"{name}.png").stat().st_size > 5000
        assert len(pd.read_csv(drawn[paper] / f"{name}.csv"))


@pytest.mark.parametrize(
    ("paper", "name"), [("finemoe", "figure12"), ("own", "pareto"), ("swapmoe", "figure8")]
)
def test_twice_gives_equal_files(
    drawn: dict[str, Path], runs: dict[str, Path], tmp_path: Path, paper: str, name: str
) -> None:
    draw(
        paper,
        read(runs[paper], f"moesim figures --paper {paper}", MEASURED[paper]),
        tmp_path / "two",
        [name],
    )
    for kind in ("csv", "pdf", "png"):
        one, two = (folder / f"{name}.{kind}" for folder in (drawn[paper], tmp_path / "two"))
        assert one.read_bytes() == two.read_bytes()


def test_command_and_digests_lie_in_the_pictures(
    drawn: dict[str, Path], runs: dict[str, Path]
) -> None:
    image = pytest.importorskip("PIL.Image")
    source = _source(runs, "finemoe")
    with image.open(drawn["finemoe"] / "figure10.png") as picture:
        told = picture.info
    assert told["Subject"] == "moesim figures --paper finemoe"
    assert f"runs={source.digest}" in told["Keywords"]
    assert f"trace={_digest('demo-qwen')}" in told["Keywords"]
    assert b"/CreationDate" not in (drawn["finemoe"] / "figure10.pdf").read_bytes()


def test_series_differ_in_grey() -> None:
    values = sorted(lightness(look.colour) for look in LOOKS[:6])
    assert min(b - a for a, b in itertools.pairwise(values)) >= 8
    assert len({look.marker for look in LOOKS}) == len({look.hatch for look in LOOKS}) == len(LOOKS)
    assert len({look.dash for look in LOOKS}) == len(LOOKS)
    # The formula itself: black, white, and the middle grey of the CIE.
    assert [round(lightness(c)) for c in ("#000000", "#ffffff", "#777777")] == [0, 100, 50]


def test_a_policy_keeps_its_look_from_figure_to_figure() -> None:
    assert looks(["lru", "finemoe"])["finemoe"] == looks(["finemoe", "odds", "lfu"])["finemoe"]
    many = looks([f"p{i}" for i in range(8)])
    assert len(set(many.values())) == 8


def test_bounds_lossy_policies_costs_and_stand_ins_are_marked(runs: dict[str, Path]) -> None:
    source = _source(runs, "own")
    drawing = PAPERS["own"]["pareto"](source)
    texts = [t.get_text() for legend in drawing.figure.legends for t in legend.get_texts()]
    assert "MIN, forced (bound)" in texts
    assert "SwapMoE (lossy)" in texts
    hollow = {
        str(line.get_label()): line.get_markerfacecolor() for line in drawing.figure.axes[0].lines
    }
    assert hollow["MIN, forced (bound)"] == hollow["SwapMoE (lossy)"] == "white"
    assert hollow["FineMoE"] != "white"
    told = " ".join(caveats(_source(runs, "finemoe").grid("memory")))
    assert "(--costs) of mixtral-8x7b" in told
    assert "(--allow): embedding=none, gate=topk." in told
    assert "hindsight" in " ".join(caveats(drawing.rows))


def test_a_tie_is_marked_above_its_bar(runs: dict[str, Path]) -> None:
    drawing = PAPERS["finemoe"]["figure10"](_source(runs, "finemoe"))
    signs = [t.get_text() for axis in drawing.figure.axes for t in axis.texts]
    assert signs.count("=") == int(drawing.data["tie"].sum()) > 0


def test_policies_cross_where_their_lines_do() -> None:
    rate = np.array([1.0, 10.0, 100.0])
    parts = [
        pd.DataFrame({"bandwidth_gb_s": rate, "tpot_ms": tpot, "policy": name, "bound": bound, "lossy": False})
        for name, tpot, bound in (("a", 100 / rate, False), ("b", 0 * rate + 4.0, False), ("best", 0 * rate + 0.1, True))
    ]  # fmt: skip
    ((x, y, before, after),) = own_figures.crossings(pd.concat(parts))
    assert (round(x, 6), round(y, 6), before, after) == (25.0, 4.0, "b", "a")


def test_entropy_of_an_even_choice_and_of_a_certain_one() -> None:
    shares = np.array([[0.25] * 4, [1.0, 0, 0, 0]])
    assert np.allclose(trace_studies.entropy(shares), [np.log(4), 0])


def test_a_larger_store_matches_no_worse() -> None:
    found = trace_studies.maps(trace_path("demo-switch"))
    stored = int(found.train.sum())
    scores = trace_studies.best_scores(found, [1, stored])
    assert scores[0][2] <= scores[1][2] <= 1 + 1e-9
    assert np.allclose(found.shares.sum(axis=2)[found.used.any(axis=2)], 1)


# ---- comparison ----------------------------------------------------------------------------------


@pytest.mark.parametrize("paper", claims.CLAIMS)
def test_each_claim_has_a_verdict(runs: dict[str, Path], paper: str, tmp_path: Path) -> None:
    page = claims.compare(paper, _source(runs, paper), tmp_path)
    assert page is not None
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(claims.CLAIMS[paper])
    assert not any("not made" in row for row in rows)


@pytest.mark.parametrize(
    ("held", "sized", "verdict"),
    [((), (), "not testable here"), ((True,), (True,), "reproduced"), ((True,), (False,), "sign only"),
     ((True, False), (), "in part"), ((False,), (), "not reproduced")],
)  # fmt: skip
def test_verdicts_are_computed(
    held: tuple[bool, ...], sized: tuple[bool, ...], verdict: str
) -> None:
    assert claims.Finding("", held, sized).verdict == verdict


def test_the_manual_says_what_the_kept_tables_show() -> None:
    manual = HERE.parent / "analysis" / "README.md"
    text = manual.read_text(encoding="utf-8")
    assert text == claims.inserted(text, claims.section(HERE / "data" / "figures", QUALITY))


# ---- what cannot be drawn ------------------------------------------------------------------------


def _refusal(table: pd.DataFrame, folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read(_kept(table, folder), "moesim figures --paper own")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tables_that_are_empty_mixed_or_strange_are_refused(tmp_path: Path) -> None:
    good = _table("own")
    assert "holds no finished run" in _refusal(good[:0], tmp_path / "a")
    assert "holds no finished run" in _refusal(good.assign(not_run="no"), tmp_path / "b")
    assert "different versions" in _refusal(
        good.assign(source_digest=[str(i) for i in range(len(good))]), tmp_path / "c"
    )
    assert "different traces" in _refusal(
        good.assign(trace_digest=[str(i) for i in range(len(good))]), tmp_path / "d"
    )
    assert "schema 99" in _refusal(good.assign(schema=99), tmp_path / "e")
    assert "no table of `moesim sweep`" in _refusal(good.drop(columns="schema"), tmp_path / "f")


def test_a_figure_without_its_runs_is_named_with_the_command(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = _table("own")
    part = _kept(table[table["grid"].str.startswith("pareto")], tmp_path / "part")
    (tmp_path / "figs").mkdir()
    (tmp_path / "figs" / "bandwidth.csv").write_text("of another day")
    assert (
        main(["figures", "--paper", "own", "--runs", str(part), "--out", str(tmp_path / "figs")])
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "not drawn: bandwidth: no runs of the grid bandwidth/*; make them: moesim figures" in said
    )
    assert not (tmp_path / "figs" / "bandwidth.csv").exists()


def test_why_runs_are_absent_is_passed_on(tmp_path: Path) -> None:
    table = _table("own")
    table.loc[table["grid"] == "bandwidth/demo", "not_run"] = "not run: lacks GATE"
    source = read(_kept(table, tmp_path), "moesim figures")
    with pytest.raises(Absent, match="lacks GATE"):
        source.grid("bandwidth")


def test_hostile_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    table = _table("own").replace({"policy": {"lru": "$\\frac{$ " + "x" * 300 + "\x1b[31m\n"}})
    table["grid"] = table["grid"].str.replace("demo", "$_{^")
    made = draw(
        "own", read(_kept(table, tmp_path / "runs"), "c"), tmp_path / "figs", ["pareto", "layers"]
    )
    assert [one.absent for one in made] == ["", ""]
    assert len(name_of("x" * 300)) <= 30
    assert "\x1b" not in name_of("\x1b[31m")


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--runs", "nowhere"], "no such table of runs; make it: moesim figures --paper own"),
     (["--measured", "nowhere"], "--measured nowhere: no such folder"),
     (["--runs", "RUNS", "--only", "figure99"], "--only figure99: no such figure of own"),
     (["--only", "figure99"], "--only figure99: no such figure of own"),
     (["--trace", "a/x.parquet", "--trace", "b/x.parquet"], "two are called x")],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    typed = [word.replace("RUNS", str(runs["own"])) for word in words]
    assert main(["figures", "--paper", "own", *typed, "--out", str(tmp_path / "figs")]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    shutil.rmtree(tmp_path / "figs", ignore_errors=True)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
