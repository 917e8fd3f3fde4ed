"""The report: what it says, what it refuses, and that it is the same page each time."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesim.cli import main
from moesim.result import read_run

pytest.importorskip("bokeh")

from moesim.analysis import report_timeline
from moesim.analysis.report import page
from moesim.analysis.report_facts import answer
from moesim.analysis.report_runs import Run, read, settings
from moesim.analysis.report_text import plain

REPLAY = ["--trace", "demo", "--limit", "2", "--timeline", "--ladder", "--json"]
POLICIES = ["--policy", "lru,lfu,next-gate,swapmoe", "--capacity", "25%,50%"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of two capacities, rungs of the ladder among them."""
    out = tmp_path_factory.mktemp("runs")
    assert main(["replay", *REPLAY, *POLICIES, "--out", str(out)]) == 0
    return out


@pytest.fixture
def runs(kept: Path, tmp_path: Path) -> Path:
    """A copy to change, without the timelines."""
    ignored = shutil.ignore_patterns("timeline.json")
    return shutil.copytree(kept, tmp_path / "runs", ignore=ignored)


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite one JSON file of a run."""
    told = json.loads((folder / name).read_text())
    change(told)
    (folder / name).write_text(json.dumps(told))


def one(runs: Path, policy: str, capacity: str = "25%") -> Path:
    """The folder of a policy's run."""
    for folder in sorted(runs.iterdir()):
        summary = read_run(folder)[1]
        if (summary["policy"], summary["capacity"]) == (policy, capacity):
            return folder
    raise AssertionError(policy)


def data(html: str) -> dict[str, Any]:
    """What the page's figures draw."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    told: dict[str, Any] = json.loads(found[1])
    return told


# ---- what it says --------------------------------------------------------------------------------


def test_the_answer_is_that_of_the_replay(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ladder and chance as `moesim replay --ladder` weighs them, made again from folders alone."""
    assert main(["replay", *REPLAY, *POLICIES, "--out", str(kept)]) == 0
    told = json.loads(capsys.readouterr().out)
    (setting,) = settings(read([kept]))
    answer(setting, [setting])
    by_folder = {run.folder.resolve(): run.summary for run in setting.runs}
    for run in told["runs"]:
        ours = by_folder[Path(run["run_dir"]).resolve()]
        assert ours["ladder"] == run["ladder"]
        assert ours.get("against_best") == run.get("against_best")
    diagnoses = answer(setting, [setting]).diagnoses
    assert [line.partition(":")[0] for line in diagnoses] == ["25%", "50%"]


def test_a_bound_or_a_lossy_policy_never_leads(runs: Path) -> None:
    """However quick it is."""
    for policy in ("min", "swapmoe"):
        changed(one(runs, policy), "summary.json", lambda s: s["tpot_ns"].update(mean=1.0))
    made = page([runs])
    ((_, told),) = made.answers
    assert "next-gate" in told.headline
    assert not any(name in told.headline for name in ("min", "swapmoe"))
    assert [line.partition(" ms")[0][:7] for line in told.lines] == ["At 25%:", "At 50%:"]
    assert all("with next-gate" in line and "lower bound" in line for line in told.lines)


def test_what_chance_cannot_tell_apart_is_no_ranking(runs: Path) -> None:
    """The same times under another name: a tie, said and marked."""
    twin = runs / "twin"
    shutil.copytree(one(runs, "next-gate"), twin)
    changed(twin, "summary.json", lambda s: s.update(policy="twin"))
    changed(twin, "manifest.json", lambda m: m["policy"].update(name="twin"))
    made = page([runs])
    ((_, told),) = made.answers
    assert "at 25% the quickest next-gate cannot be told from the next" in told.headline
    assert "not told apart from twin" in told.lines[0]
    assert made.html.count('<span class="best">=</span></td>') == 1


def test_degrees_of_belief_are_said(runs: Path) -> None:
    ((_, told),) = page([runs]).answers
    assert any("from its datasheet, not measured" in line for line in told.belief)
    assert any("No measured run" in line for line in told.belief)
    real = runs / "real"
    shutil.copytree(one(runs, "lru"), real)
    changed(real, "manifest.json", lambda m: m.update(engine="real", repeat=0))
    changed(real, "summary.json", lambda s: s["tpot_ns"].update(mean=s["tpot_ns"]["mean"] * 2))
    by_name = dict(page([runs]).answers)
    assert "the only policy here" in by_name["runs measured"].headline
    assert list(by_name) == ["runs simulated", "runs measured"]
    (line,) = (s for s in by_name["runs simulated"].belief if "Against" in s)
    assert "Against 1 configuration measured on unknown" in line and "off by -50.0%" in line


def test_repeats_are_one_row_with_their_spread(runs: Path) -> None:
    """The median stands for them; the spread can make a tie."""
    first = one(runs, "lru")
    for name in ("summary", "manifest"):
        assert (first / f"{name}.json").exists()
    for number, factor in enumerate((0.9, 1.1)):
        again = shutil.copytree(first, runs / f"again{number}")
        changed(again, "manifest.json", lambda m, n=number: m.update(repeat=n + 1))
        changed(again, "summary.json", lambda s, f=factor: s["tpot_ns"].update(
            mean=s["tpot_ns"]["mean"] * f))  # fmt: skip
    (setting,) = settings(read([runs]))
    (lru,) = (r for r in setting.runs if r.label == "lru" and r.summary["capacity"] == "25%")
    assert lru.repeats == 3 and lru.folder == first
    assert lru.spread == pytest.approx(0.1)


def test_settings_are_not_compared(runs: Path) -> None:
    """Another trace, another link: said, and each has its answer."""
    for folder in runs.iterdir():
        if folder.name.startswith(("0", "1", "2", "3", "4", "5", "6", "7")):
            changed(folder, "manifest.json", lambda m: m.update(trace="f" * 64))
    made = page([runs])
    assert sorted(name for name, _ in made.answers) == ["trace 817497dd", "trace ffffffff"]
    assert "These runs are of 2 traces; nothing is compared across them." in made.html


def test_the_example_of_the_manual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manual = (Path(__file__).resolve().parents[1] / "analysis" / "README.md").read_text()
    (block,) = re.findall(r"^```\n(moesim replay.*?moesim report.*?)^```", manual, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        assert main(shlex.split(line)[1:]) == 0
    out = capsys.readouterr().out
    assert "next-gate is the quickest at" in out
    html = (tmp_path / "report.html").read_text()
    assert f"{len(list((tmp_path / 'runs').iterdir()))} runs · experts of demo" in html


# ---- the clock -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_hits_from_the_clock_are_those_counted(engine: str, tmp_path: Path) -> None:
    """Law: of every simulated run, hits counted from its timeline are its summary's."""
    policies = "lru,next-gate,speculating-experts,moe-infinity,deepspeed-cache,swapmoe,fiddler"
    words = ["--policy", policies, "--capacity", "12.5%", "--limit", "1", "--engine", engine]
    base = ["replay", "--trace", "demo", "--timeline", "--json", "--out", str(tmp_path)]
    assert main([*base, *words]) == 0
    made = read([tmp_path])
    assert len(made) >= 6
    for run in made:
        clock = clock_of(run)
        hits, accesses = clock.hits(8)
        assert hits.sum() == run.summary["hits"], run.folder
        assert accesses.sum() == run.summary["accesses"]
        assert clock.steps == run.summary["steps"]


def clock_of(run: Run) -> report_timeline.Timeline:
    made = report_timeline.read(run.folder, run.manifest["hardware"]["host"]["sync_ns"], 8)
    assert made is not None
    return made


def test_what_is_demanded_was_needed_before(kept: Path) -> None:
    """Without prefetches, a load starts after the gate that needs it, and is always used."""
    (lru,) = read([one(kept, "lru")])
    clock = clock_of(lru)
    loads = [span for span in clock.spans if span.lane == "demand"]
    assert len(loads) == lru.summary["misses"] > 0
    for load in loads:
        need = clock.need(load)
        assert need is not None and need <= load.start


def test_passes_follow_each_other(kept: Path) -> None:
    clock = clock_of(read([one(kept, "next-gate")])[0])
    ends = [clock.window(step) for step in range(clock.steps)]
    assert all(a[1] == b[0] for a, b in pairwise(ends))
    assert ends[-1][1] <= clock.spans[-1].end


def test_a_step_is_drawn_as_asked(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clocks = data(page([one(kept, "lru"), one(kept, "next-gate")], step=7).html)["clocks"]
    assert clocks and all(c["passes"][c["chosen"]]["step"] == 7 for c in clocks)
    assert main(["report", str(one(kept, "lru")), "--step", "9999"]) == 2
    assert "has steps 0 to" in capsys.readouterr().err


def test_entropy_is_that_of_the_gates(kept: Path) -> None:
    """Between none and an even choice; the trace must be the one that was replayed."""
    from moesim.traces.samples import trace_path

    told = data(page([one(kept, "lru")], trace=trace_path("demo")).html)["entropy"]
    assert told["of"] == "all experts" and told["most"] == 5.0
    known = [v for row in told["bits"] for v in row if v is not None]
    assert len(told["bits"]) == 8 and 0 < min(known) <= max(known) <= 5


# ---- the same page -------------------------------------------------------------------------------


def test_equal_runs_give_equal_bytes(kept: Path, tmp_path: Path) -> None:
    """Twice in one process, and in another that hashes otherwise."""
    some = [one(kept, "next-gate"), one(kept, "lru")]
    first = page(some).html
    assert page(some).html == first
    out = tmp_path / "page.html"
    command = [sys.executable, "-m", "moesim", "report", *map(str, some), "-o", str(out)]
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}
    )
    assert ended.returncode == 0, ended.stderr
    assert out.read_text() == first


def many(kept: Path, out: Path, count: int = 200) -> None:
    """A sweep: copies of runs with other names, capacities and numbers."""
    some = [one(kept, name) for name in ("lru", "lfu", "next-gate", "swapmoe", "min")]
    for number in range(count):
        folder = shutil.copytree(
            some[number % 5], out / f"{number:016x}", ignore=shutil.ignore_patterns("timeline*")
        )
        capacity, link = 5 * (number // 5 % 10 + 1), (number // 50 + 1) * 8e9
        changed(folder, "manifest.json", lambda m, b=link: m["hardware"]["link"].update(
            bytes_per_s=b))  # fmt: skip
        wide = {"capacity": f"{capacity}%", "capacity_bytes": capacity * 251658}
        more = {"layer_stall_ns": [number * 1000 + layer for layer in range(48)]}
        changed(folder, "summary.json", lambda s, w=wide, m=more: s.update(**w, **m))


def test_a_sweep_of_200_runs_is_small(kept: Path, tmp_path: Path) -> None:
    many(kept, tmp_path)
    made = page([tmp_path])
    assert made.runs == 200 and len(made.answers) == 4
    assert len(made.html.encode()) < 5_000_000


def test_nothing_is_asked_of_the_network(kept: Path) -> None:
    """The page's own policy names the two scripts that may run, and allows no address."""
    html = page([one(kept, "lru")]).html
    shell = html.partition("<script>")[0]
    assert not re.findall(r'(?:src|href)="(?!data:)', shell)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy and "default-src 'none'" in policy[1] and policy[1].count("'sha256-") == 2
    assert "unsafe-eval" not in policy[1]


# ---- text from outside ---------------------------------------------------------------------------


def test_hidden_text_is_shown() -> None:
    assert plain("a\u202eb\x00c\ud800") == "a\\u202eb\\u0000c\\ud800"
    assert "$$" not in plain("$$\\int$$") and "\\(" not in plain("\\(x\\)")
    assert len(plain("x" * 1000)) == 72
    assert plain("naïve 25 % – ok") == "naïve 25 % – ok"


# ---- bad input -----------------------------------------------------------------------------------


def _newer(folder: Path) -> None:
    changed(folder, "manifest.json", lambda m: m.update(schema=2))


def _broken(folder: Path) -> None:
    (folder / "summary.json").write_text('{"policy": ')


def _lacking(folder: Path) -> None:
    changed(folder, "summary.json", lambda s: s.pop("prefetch"))


def _text_for_a_number(folder: Path) -> None:
    changed(folder, "summary.json", lambda s: s.update(hits="<script>"))


def _clock_from_elsewhere(folder: Path) -> None:
    (folder / "timeline.json").write_text('{"traceEvents": [{"ph": "X", "cat": "?"}]}')


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_newer, "has schema 2, this moesim reads 1"),
        (_broken, "not a finished run"),
        (_lacking, "is not as moesim writes it (KeyError: 'prefetch')"),
        (_text_for_a_number, "'<script>' is no number"),
        (_clock_from_elsewhere, "timeline.json: is not as moesim writes it"),
    ],
)
def test_a_damaged_run_is_named(
    damage: Callable[[Path], None],
    told: str,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = one(runs, "lru")
    damage(folder)
    refused([str(runs), "-o", str(tmp_path / "page.html")], folder.name, told, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def refused(words: list[str], where: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert where in err and told in err


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused([str(tmp_path)], tmp_path.name, "holds no finished run", capsys)
    refused([str(tmp_path / "none")], "none", "no such folder", capsys)
    table = tmp_path / "results.parquet"
    pq.write_table(pa.table({"policy": ["lru"]}), table)
    refused([str(table)], table.name, "has no column run_dir", capsys)
    table.write_bytes(b"PAR1")
    refused([str(table)], table.name, "cannot be read", capsys)
    pq.write_table(pa.table({"run_dir": pa.array([], pa.string())}), table)
    refused([str(table)], "no runs", "moesim replay --out", capsys)


def test_another_trace(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(one(kept, "lru")), "-o", str(tmp_path / "page.html"), "--trace"]
    refused([*words, "demo-qwen"], "--trace", "its digest is", capsys)
    refused([*words, "nowhere.parquet"], "nowhere.parquet", "no such file", capsys)


def test_nowhere_to_write(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused([str(runs), "-o", str(tmp_path / "no" / "p.html")], "p.html", "cannot be", capsys)
    refused([str(runs), "-o", str(runs)], "-o", "cannot be written", capsys)
    assert list(tmp_path.iterdir()) == [runs]


def test_without_the_library(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)
    monkeypatch.delitem(sys.modules, "moesim.analysis.report_charts", raising=False)
    refused([str(kept)], "needs bokeh", "pip install 'moesim[report]'", capsys)


def test_a_sweep_is_read_from_its_table(kept: Path, tmp_path: Path) -> None:
    """Folders as named, or beside the table when the whole was moved."""
    shutil.copytree(kept, tmp_path / "runs", ignore=shutil.ignore_patterns("timeline.json"))
    folders = [f"elsewhere/runs/{path.name}" for path in sorted(kept.iterdir())]
    pq.write_table(pa.table({"run_dir": folders}), tmp_path / "runs" / "results.parquet")
    made = page([tmp_path / "runs" / "results.parquet"])
    assert made.runs == len(folders)


def test_runs_that_serve_arrivals_and_several_devices_are_told_as_what_they_are(
    tmp_path: Path,
) -> None:
    base = ["replay", "--trace", "demo", "--policy", "lru", "--out", str(tmp_path)]
    timed = ["--arrivals", "poisson:2", "--scheduler", "decode-first", "--limit", "3"]
    assert main([*base, *timed, "--batch", "2"]) == 0
    assert main([*base, "--hardware", "rtx3090x6", "--capacity", "50%", "--limit", "1"]) == 0
    found = settings(read([tmp_path]))
    told = {bool(s.runs[0].summary["serving"]): answer(s, found) for s in found}
    assert any("3 of 3 requests were served" in line for line in told[True].lines)
    for one_of in told.values():
        assert any("such runs have no ladder" in line for line in one_of.belief)
    assert any("decode-first" in setting.name for setting in found)
    drawn = data(page([tmp_path]).html)
    assert drawn["parts"][-1] == "exchange"
    assert [sum(run["parts"]) for run in drawn["runs"]] == [run["time"] for run in drawn["runs"]]
    assert any(run["parts"][-1] for run in drawn["runs"])


def test_an_overloaded_run_is_called_so(tmp_path: Path) -> None:
    line = ["--policy", "lru", "--limit", "2", "--arrivals", "poisson:1", "--out", str(tmp_path)]
    assert main(["replay", "--trace", "demo", *line]) == 0
    (folder,) = tmp_path.iterdir()
    changed(folder, "summary.json", lambda s: s["serving"].update(overloaded=True))
    ((_, told),) = page([tmp_path]).answers
    assert any(line.startswith("Overloaded: lru at 25%") for line in told.belief)
