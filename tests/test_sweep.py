"""Sweeps: the table is what single replays say, whoever ran them and however often they stopped."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli import main
from moesim.result import RunStore
from moesim.sweeps import read_experiment
from moesim.sweeps.experiment import SHIPPED, Configuration, ExperimentError
from moesim.sweeps.passes import MOST, passes

ROOT = Path(__file__).resolve().parents[1]

GRIDS = """
[defaults]
trace = "t.parquet"
policy = ["lru", "lfu"]
capacity = ["3/layer", "50%"]

[[grid]]
name = "memory"

[[grid]]
name = "batches"
batch = [1, 2]
capacity = "25%"
"""
FOREIGN = """
import os
import signal
from moesim.bench.plain import PlainLRU


class Mine(PlainLRU):
    pass


class Raises(PlainLRU):
    def on(self, fact, cache):
        raise ValueError("no wish")


class Dies(PlainLRU):
    def on(self, fact, cache):
        os._exit(3)
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    shape = ("--layers", "3", "--experts", "8", "--top-k", "2", "--gate", "full")
    length = ("--requests", "4", "--prompt-tokens", "3", "--output-tokens", "5")
    assert main(["trace", "synth", *shape, *length, str(path)]) == 0
    return path


@pytest.fixture
def here(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the trace, an experiment and policies of somebody else."""
    (tmp_path / "t.parquet").symlink_to(trace)
    (tmp_path / "e.toml").write_text(GRIDS)
    (tmp_path / "foreign.py").write_text(FOREIGN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    return tmp_path


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sweep(here: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """Sweep; the code, and what was said to stdout and to stderr."""

    def say(*words: str, jobs: int = 1) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["sweep", "e.toml", "--out", "out", "--jobs", str(jobs), *words])
        return code, *capsys.readouterr()

    return say


def table(folder: Path = Path("out")) -> list[dict[str, Any]]:
    return pq.read_table(folder / "results.parquet").to_pylist()


def answers(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["replay", "--trace", "t.parquet", "--json", *words]) == 0
    runs: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["runs"]
    return runs


# ---- the table -----------------------------------------------------------------------------------


def test_a_row_is_what_a_single_replay_says(
    sweep: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep()[0] == 0
    rows = table()
    assert [(r["grid"], r["policy"], r["capacity"], r["batch"]) for r in rows] == [
        *(("memory", p, c, None) for p in ("lru", "lfu") for c in ("3/layer", "50%")),
        *(("batches", p, "25%", b) for p in ("lru", "lfu") for b in (1, 2)),
    ]
    for row in rows:
        words = ("--policy", row["policy"], "--capacity", row["capacity"])
        (run,) = answers(capsys, *words, "--batch", str(row["batch"] or 1))
        for name in ("hits", "loads", "time_ns", "log_digest", "stall_ns", "layer_stall_ns"):
            assert row[name] == run[name]
        for name in ("mean", "p50", "p99"):
            assert row[f"tpot_ns.{name}"] == run["tpot_ns"][name]
        assert row["times_ns.experts"] == run["times_ns"]["experts"]
        assert (Path("out") / row["folder"] / "summary.json").is_file() and row["not_run"] is None


def test_ties_are_marked_as_by_replay(sweep: Said, capsys: pytest.CaptureFixture[str]) -> None:
    """With the seed of the run, that draws the same requests."""
    words = ("policy=lru,lfu,slru,random", "capacity=25%,50%", "seed=3", "batch=1")
    assert sweep(*(w for word in words for w in ("--with", word)))[0] == 0
    options = [w for word in words for w in ("--" + word).split("=", 1)]
    told = {(r["policy"], r["capacity"]): r["against_best"] for r in answers(capsys, *options)}
    assert len(told) == 8
    for row in table():
        mark = told[row["policy"], row["capacity"]]
        interval = [row["against_best.low"], row["against_best.high"]]
        assert interval == mark["interval"]
        for name in ("best", "slower", "tie"):
            assert row[f"against_best.{name}"] == mark[name]


def test_columns_have_one_plain_type(sweep: Said) -> None:
    """No column is nested but counts a layer; what may be empty is a text even where all are."""
    assert sweep("--with", "policy=lru")[0] == 0
    types = {f.name: f.type for f in pq.read_schema("out/results.parquet")}
    nested = {name for name, kind in types.items() if pa.types.is_nested(kind)}
    assert nested == {"layer_stall_ns"}
    assert types["not_run"] == types["folder"] == types["set"] == pa.string()
    assert types["hits"] == types["batch"] == pa.int64()
    pandas = pytest.importorskip("pandas")
    assert len(pandas.read_parquet("out/results.parquet")) == 4


def test_workers_change_no_byte(sweep: Said, tmp_path: Path) -> None:
    made = []
    for jobs in (1, 2):
        code, out, _ = sweep("--out", f"out{jobs}", "--with", "policy=lru,foreign:Mine", jobs=jobs)
        assert code == 0 and "not run" not in out
        folder = tmp_path / f"out{jobs}"
        runs = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        made.append({p.relative_to(folder): b for p, b in runs.items() if p.name != "host.json"})
    assert made[0] == made[1]


def test_a_table_is_the_same_when_it_is_made_again(sweep: Said) -> None:
    assert sweep()[0] == 0
    before, runs = Path("out/results.parquet").read_bytes(), sorted(Path("out/runs").iterdir())
    stamps = [p.stat().st_mtime_ns for p in runs]
    assert sweep()[0] == 0
    assert Path("out/results.parquet").read_bytes() == before
    assert [p.stat().st_mtime_ns for p in sorted(Path("out/runs").iterdir())] == stamps


# ---- the file ------------------------------------------------------------------------------------


def test_options_from_outside_replace_those_of_the_file(sweep: Said) -> None:
    words = ("limit=1", "batch=[1, 2]", "capacity=0.5", "set=prefetch=next-gate,keep=lfu")
    more = ("ahead=recall:0.9", "check=true")
    given = [w for word in (*words, f"allow={more[0]}", more[1]) for w in ("--with", word)]
    assert sweep(*given)[0] == 0
    rows = table()
    assert {(r["limit"], r["batch"], r["capacity"]) for r in rows} == {(1, 1, "50%"), (1, 2, "50%")}
    assert {r["set"] for r in rows} == {"prefetch=next-gate,keep=lfu"}
    assert all(r["prefetch.planned"] and r["requests"] == 1 and r["check"] for r in rows)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("smoke", [False, True], ids=["whole", "smoke"])
def test_a_shipped_experiment_has_no_mistake(path: Path, smoke: bool) -> None:
    found = read_experiment(path, smoke=smoke).configurations
    assert found and all(c.options["trace"] for c in found)


def test_the_online_setting_of_finemoe_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six configurations: five systems, and ProMoE, which waits for predictors."""
    words = ("--with", "requests=3", "--jobs", "1", "--out", str(tmp_path))
    assert main(["sweep", "finemoe-online", *words]) == 0
    rows = table(tmp_path)
    assert [r["policy"] for r in rows if r["not_run"]] == ["promoe"]
    served = [r for r in rows if not r["not_run"]]
    assert len(served) == 5 and {r["serving.arrived"] for r in served} == {3}
    assert {r["initial"] for r in served} <= {"cold", "policy"}


def test_smoke_replaces_in_all_grids_and_in_one(here: Path) -> None:
    inside = '[grid.smoke]\nbatch = 1\n[[grid]]\nname = "c"\nlimit = 3\n'
    Path("e.toml").write_text(f"{GRIDS}{inside}[smoke]\nlimit = 1\npolicy = 'lru'\n")
    found = [c.options for c in read_experiment(Path("e.toml"), smoke=True).configurations]
    assert [(o["policy"], o["limit"], o.get("batch")) for o in found] == [
        *(("lru", 1, b) for b in (None, None, 1, None, None)),
    ]
    whole = read_experiment(Path("e.toml")).configurations
    assert len(whole) == 12 and [c.options.get("limit") for c in whole] == [None] * 8 + [3] * 4


def test_all_means_every_policy_and_a_list_may_have_commas(here: Path) -> None:
    from moesim.policies.presets import PRESETS

    Path("e.toml").write_text('[[grid]]\nname = "a"\npolicy = "all"\ncapacity = ["1%, 50%", 0.5]\n')
    found = read_experiment(Path("e.toml")).configurations
    assert [c.options["policy"] for c in found[::2]] == list(PRESETS)
    assert [c.options["capacity"] for c in found[:2]] == ["1%", "50%"] and len(found) % 2 == 0


WRONG = '''
colour = "red"
note = """
[[grid]]
limit = 0
"""
[defaults]
trace = "t.parquet"
polcy = "lru"
[smoke]
limit = "x" # none
[[grid]]
name = "a"
capacity = [[1]]
[grid.smoke]
batch = 0
[[grid]]
name = "a"
out = "x"
batch = [1, true, 1.5]
check = 1
[[grid]]
policy = []
smoke = 3
'''


def test_all_mistakes_are_told_at_once_each_with_its_line(sweep: Said) -> None:
    Path("e.toml").write_text(WRONG)
    code, out, err = sweep()
    told = [line.removeprefix("moesim: error: e.toml:") for line in err.splitlines()]
    lines = ["2", "9", "11", "14", "16", "18", "19", "20", "20", "21", "22", "23", "24"]
    assert (code, out, [line.partition(":")[0] for line in told]) == (2, "", lines)
    for line, word in zip(
        told, ("colour", "did you mean policy", "'x'", "[1]", "'0'"), strict=False
    ):
        assert word in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        ('policy = ["lru", "lruu"]', "did you mean lru"),
        ('capacity = "1B"', "give at least one expert"),
        ('trace = "none.parquet"', "no such file"),
        ("token-budget = 8", "only continuous batching has one"),
        ('arrivals = "azure:none.csv"', "No such file"),
        ('set = "prefetch=next-gate, keep=lfuu"', "did you mean lfu"),
        ('set = "keep.gamma=0.5"', "no such parameter"),
        ('policy = "lru,"', "unknown"),
        ('plan = "p.json"', "replay it by itself"),
        ("costs = 2026-01-01", "must be a text, a number"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    sweep: Said, grid: str, problem: str
) -> None:
    Path("e.toml").write_text(f'{GRIDS}[[grid]]\nname = "c"\n{grid}\n')
    code, out, err = sweep()
    assert code == 2 and not out and problem in err
    assert err.startswith("moesim: error: e.toml:1") and err.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[[grid]", "not TOML"),
        (b"\xff", "not TOML: must be UTF-8"),
        (b"", "no [[grid]]"),
        (b"grid = 3", "write each as a table of its own"),
        (b"defaults = 3\n[[grid]]\nname = 'a'", "defaults: must be a table"),
        (b"[[grid]]", "give each grid a name"),
        (b"name = 3\n[[grid]]\nname = 'a'", "name: must be a text"),
    ],
)
def test_a_file_that_is_no_experiment_is_one_line(
    sweep: Said, content: bytes, problem: str
) -> None:
    Path("e.toml").write_bytes(content)
    code, out, err = sweep()
    assert code == 2 and not out and problem in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--with", "limit"), "write option=value"),
        (("--with", "limit=x"), "--with --limit: 'x' must be"),
        (("--with", "limt=1"), "--with limt: no such option; did you mean limit?"),
        (("--address", "127.0.0.1:1"), "give --executor ray too"),
    ],
)
def test_options_that_are_wrong_are_one_line(
    sweep: Said, words: Sequence[str], problem: str
) -> None:
    code, out, err = sweep(*words)
    assert code == 2 and not out and problem in err and err.count("\n") == 1


def test_a_dry_run_counts_and_writes_nothing(sweep: Said) -> None:
    code, out, err = sweep("--dry-run")
    assert (code, err) == (0, "") and "8 configurations in " in out and not Path("out").exists()


# ---- what fails ----------------------------------------------------------------------------------


def test_a_configuration_that_fails_stops_no_other(sweep: Said) -> None:
    """Policies that lack an input, are not fitted, raise, or are nowhere."""
    names = "lru,next-gate,promoe,foreign:Raises,nowhere:None"
    code, out, _ = sweep("--with", f"policy={names}", "--with", "batch=1")
    assert code == 0
    why = {row["policy"]: row["not_run"] for row in table() if row["grid"] == "memory"}
    assert why["lru"] is None and "needs AHEAD" in why["next-gate"]
    assert "ValueError: no wish" in why["foreign:Raises"] and "no module" in why["nowhere:None"]
    assert why["promoe"] and out.count("not run (") == len(set(why.values()) - {None})
    assert all(row["hits"] is None for row in table() if row["not_run"])


def test_a_bug_of_ours_in_one_costs_no_other(sweep: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RunStore.write

    def fails(store: RunStore, run_id: str, manifest: Any, *rest: Any) -> Path:
        if manifest["policy"]["name"] == "lfu":
            raise KeyError("colour")
        return write(store, run_id, manifest, *rest)

    monkeypatch.setattr(RunStore, "write", fails)
    assert sweep("--with", "capacity=50%")[0] == 0
    why = {row["policy"]: row["not_run"] for row in table()}
    assert why["lru"] is None and "KeyError: 'colour'" in why["lfu"]


def test_a_place_that_cannot_be_written_is_one_line(
    sweep: Said, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("")
    code, out, err = sweep("--out", "file/x")
    assert code == 2 and not out and "cannot be written" in err and err.count("\n") == 1

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    for words in ((), ("--with", "policy=foreign:Mine")):
        code, out, err = sweep(*words)
        assert code == 2 and not out and "No space left" in err and err.count("\n") == 1
        assert not list(Path("out/runs").iterdir()) and not Path("out/results.parquet").exists()


def test_a_full_disk_at_the_table_keeps_the_runs(
    sweep: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(table: Any, where: Path, **how: Any) -> None:
        if "results" in Path(where).name:
            raise OSError(28, "No space left on device")
        write(table, where, **how)

    write = pq.write_table
    monkeypatch.setattr(pq, "write_table", full)
    code, _, err = sweep()
    assert code == 2 and "results.parquet: cannot be written (No space" in err
    assert len(list(Path("out/runs").iterdir())) == 8
    assert [p.name for p in Path("out").iterdir()] == ["runs"]


def put(root: Path, times: int) -> None:
    for _ in range(times):
        RunStore(root).write("same", {"a": 1}, {}, [], None, {})


def test_two_workers_may_write_one_run(tmp_path: Path) -> None:
    """The same configuration in two grids."""
    many = multiprocessing.get_context("spawn")
    with many.Pool(2) as pool:
        pool.starmap(put, [(tmp_path, 150)] * 2)
    assert [p.name for p in tmp_path.iterdir()] == ["same"]
    assert len(list((tmp_path / "same").iterdir())) == 4


def test_what_is_wrong_alone_hides_nothing_that_is_wrong_together(sweep: Said, here: Path) -> None:
    lines = ("[[grid]]", 'name = "a"', 'trace = "t.parquet"', 'policy = ["lru", "nope"]')
    more = ('capacity = ["25%", "x"]', 'seed = [1, "q"]', "capacty = 1")
    (here / "e.toml").write_text("\n".join((*lines, *more)))
    code, out, err = sweep()
    assert (code, out) == (2, "") and not (here / "out").exists()
    told = err.splitlines()
    assert all(line.startswith("moesim: error: e.toml:") for line in told) and len(told) == 4
    for word in ("nope: unknown", "--capacity x: ", "e.toml:6: --seed", "e.toml:7: capacty: "):
        assert word in err


# ---- stopped, and gone on ------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import pyarrow.parquet as pq
from moesim.cli import main
from moesim.result import RunStore

def die():
    os.kill(os.getpid(), signal.SIGKILL)

write, write_table, done = RunStore.write, pq.write_table, []
when = sys.argv[1]

def keep(*given):
    made = write(*given)
    done.append(made)
    if when != "table" and len(done) == int(when):
        die()
    return made

def half(table, where, **how):
    if "results" in str(where):
        open(where, "wb").write(b"PAR1 and no more")
        die()
    write_table(table, where, **how)

RunStore.write = keep
if when == "table":
    pq.write_table = half
main(["sweep", "e.toml", "--out", "out", "--jobs", "1"])
"""


def test_killed_anywhere_it_goes_on_to_the_same_bytes(sweep: Said, here: Path) -> None:
    assert sweep("--out", "whole")[0] == 0
    whole = (here / "whole" / "results.parquet").read_bytes()
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    for kept, when in enumerate(("1", "3", "table")):
        ended = subprocess.run([sys.executable, "-c", KILLED, when], env=path, check=False)
        assert ended.returncode == -signal.SIGKILL
        assert not (here / "out" / "results.parquet").exists()
        assert len(list((here / "out" / "runs").glob("[!.]*"))) == (1, 4, 8)[kept]
    assert sweep()[0] == 0
    assert (here / "out" / "results.parquet").read_bytes() == whole
    assert {p.name for p in (here / "out").iterdir()} == {
        p.name for p in (here / "whole").iterdir()
    }


def started(*words: str) -> subprocess.Popen[str]:
    """A sweep in a group of processes of its own, as a terminal makes one."""
    return subprocess.Popen(
        [sys.executable, "-m", "moesim", "sweep", "e.toml", "--out", "out", *words],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path.cwd()}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def unforeseen(err: str) -> list[str]:
    """What was said beside progress."""
    usual = ("sweep e: ", "moesim: compiling", "moesim: waiting")
    return [line for line in err.splitlines() if not line.startswith(usual)]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_keeps_what_ended(here: Path, jobs: str) -> None:
    """With seeds enough that nobody is done before the first run is seen."""
    seeds = ", ".join(str(seed) for seed in range(400))
    Path("e.toml").write_text(f"{GRIDS}seed = [{seeds}]\n")
    child = started("--jobs", jobs)
    until = time.monotonic() + 120
    while not list(here.glob("out/runs/[!.]*")):
        assert child.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert unforeseen(err) == ["moesim: interrupted; nothing half-written was kept"]
    assert list(here.glob("out/runs/[!.]*")) and not list(here.glob("out/**/.*"))
    assert not (here / "out" / "results.parquet").exists()


def test_workers_are_of_one_sweep(here: Path, sweep: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second sweep of a process is run where it was asked for, with the policies of there."""
    assert sweep("--with", "policy=lru,foreign:Mine", jobs=2)[0] == 0
    there = here / "there"
    there.mkdir()
    (there / "e.toml").write_text(GRIDS)
    (there / "t.parquet").symlink_to(here / "t.parquet")
    (there / "foreign.py").write_text(FOREIGN.replace("class Mine", "class Other"))
    monkeypatch.chdir(there)
    monkeypatch.syspath_prepend(str(there))
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    code, out, _ = sweep("--with", "policy=lru,foreign:Other", jobs=2)
    assert code == 0 and "not run" not in out
    assert {row["policy"] for row in table()} == {"lru", "foreign:Other"}


def test_a_killed_worker_is_one_line(sweep: Said) -> None:
    code, out, err = sweep("--with", "policy=lru,foreign:Dies", jobs=2)
    assert code == 2 and not out and "a worker was killed" in err and err.count("\n") == 1
    assert sweep(jobs=2)[0] == 0


# ---- passes --------------------------------------------------------------------------------------


def spelled(policies: int, sizes: int, others: int, grids: int) -> Iterator[Configuration]:
    names, shares = [f"p{i}" for i in range(policies)], [f"{i}%" for i in range(sizes)]
    for grid, seed, policy, share in itertools.product(range(grids), range(others), names, shares):
        yield Configuration(str(grid), {"policy": policy, "seed": seed, "capacity": share})


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 2), st.data())
def test_passes_hold_every_configuration_once_and_are_whole(
    policies: int, sizes: int, others: int, grids: int, data: st.DataObject
) -> None:
    asked = list(spelled(policies, sizes, others, grids))
    cut = passes(asked, data.draw(st.integers(1, 64)))
    assert sorted(place for one in cut for place in one.places) == list(range(len(asked)))
    for one in cut:
        assert 0 < len(one.places) <= MOST
        whole = itertools.product(one.policies, one.capacities)
        for place, (policy, capacity) in zip(one.places, whole, strict=True):
            options = asked[place].options
            assert (policy, capacity) == (options["policy"], options["capacity"])
            assert asked[place].rest == one.rest


def test_the_last_passes_are_short_so_that_workers_end_together() -> None:
    asked = list(spelled(5, 10, 20, 1))
    for jobs in (2, 3, 8, 64):
        lengths = [len(one.places) for one in passes(asked, jobs)]
        assert max(lengths[-jobs:]) <= max(1, 10 // jobs)
    assert {len(one.places) for one in passes(asked, 1)} == {30, 20}


def test_a_mistake_of_the_file_is_an_error_with_lines(here: Path) -> None:
    Path("e.toml").write_text("[[grid]]\nname = 'a'\nlimit = 0\n")
    with pytest.raises(ExperimentError) as caught:
        read_experiment(Path("e.toml"))
    assert len(caught.value.lines) == 1 and caught.value.lines[0].startswith("e.toml:3: ")


# ---- Ray -----------------------------------------------------------------------------------------


def test_an_address_where_nobody_is_is_one_line(sweep: Said) -> None:
    pytest.importorskip("ray")
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:x", "127.0.0.1:99999"):
        begun = time.monotonic()
        code, out, err = sweep("--executor", "ray", "--address", address)
        assert code == 2 and not out and err.count("\n") == 1
        assert f"--address {address}: no Ray cluster answers there" in err
        assert time.monotonic() - begun < 30


def test_without_ray_its_extra_is_named(sweep: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = sweep("--executor", "ray")
    assert code == 2 and not out and "pip install 'moesim[ray]'" in err


def ended(*words: str) -> tuple[int, str, str]:
    """A process of its own: Ray leaves threads and handles behind."""
    child = started("--executor", "ray", *words)
    out, err = child.communicate(timeout=300)
    return child.returncode, out, err


@pytest.mark.slow
def test_ray_gives_the_bytes_of_local_processes(sweep: Said, here: Path) -> None:
    """A cluster of two workers; one policy dies, and is recorded while the rest goes on."""
    pytest.importorskip("ray")
    lives = ("--with", "policy=lru,foreign:Mine")
    assert sweep("--out", "local", *lives)[0] == 0
    code, out, err = ended("--out", "ray", "--jobs", "2", *lives)
    assert code == 0 and not unforeseen(err) and "8 configurations" in out
    assert (here / "ray" / "results.parquet").read_bytes() == (
        here / "local" / "results.parquet"
    ).read_bytes()
    code, out, err = ended("--jobs", "2", "--with", "policy=lru,foreign:Dies")
    assert code == 0 and not unforeseen(err) and "not run (4)" in out
    for row in table():
        assert (row["not_run"] is None) == (row["policy"] == "lru")
        assert row["not_run"] is None or "its worker was lost twice" in row["not_run"]
    assert not list(Path(tempfile.gettempdir()).glob("moesim-ray-*"))
