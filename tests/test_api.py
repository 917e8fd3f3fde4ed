"""moesim from Python: the same answers as the command line, and the same mistakes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moesim
from moesim.ask.replays import option_names, problems, request_of
from moesim.cli import main
from moesim.errors import MoesimError, UsageError

pd = pytest.importorskip("pandas")


def test_a_replay_answers_as_the_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    made = moesim.replay("demo", policy=["lru", "min"], capacity=[0.1, "25%"], limit=1)
    line = "replay --trace demo --policy lru,min --capacity 10%,25% --limit 1 --json"
    assert main(line.split()) == 0
    told = json.loads(capsys.readouterr().out)["runs"]
    without = [{k: v for k, v in run.items() if k != "run_dir"} for run in made.runs]
    assert without == [{k: v for k, v in run.items() if k != "run_dir"} for run in told]


def test_tables_have_a_row_a_run_and_a_row_a_request() -> None:
    made = moesim.replay("demo", policy="lru", capacity=["10%", "25%"], limit=3)
    assert list(made.table["capacity"]) == ["10%", "25%"]
    assert list(made.table["prefill.misses"]) == [run["prefill"]["misses"] for run in made.runs]
    assert len(made.requests) == 6
    for run in made.runs:
        rows = made.requests[made.requests["capacity"] == run["capacity"]]
        assert rows["misses"].sum() == run["misses"]
        assert rows["tpot_ns"].mean() == pytest.approx(run["tpot_ns"]["mean"])


def test_the_summary_is_that_of_the_only_run() -> None:
    one = moesim.replay("demo", limit=1)
    assert one.summary is one.runs[0]
    with pytest.raises(UsageError, match="2 runs"):
        _ = moesim.replay("demo", policy=["lru", "lfu"], limit=1).summary


def test_bars_are_as_long_as_tokens_take() -> None:
    pytest.importorskip("matplotlib")
    made = moesim.replay("demo", policy=["lru", "min"], limit=1)
    axes = made.plot().axes[0]
    for row, run in enumerate(made.runs):
        bars = [b for b in axes.patches if round(b.get_y() + b.get_height() / 2) == row]
        width = sum(bar.get_width() for bar in bars) * 1e6
        assert width == pytest.approx(run["time_ns"] / run["output_tokens"])
    assert "bound" in axes.get_yticklabels()[1].get_text()


def test_runs_are_kept_where_out_says(tmp_path: Path) -> None:
    made = moesim.replay("demo", limit=1, out=tmp_path / "runs")
    assert made.folder == tmp_path / "runs"
    assert (Path(made.summary["run_dir"]) / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"policcy": "lru"}, "policcy: no such option; did you mean policy?"),
        ({"capacity": 1.5}, "--capacity 1.5"),
        ({"batch": 0}, "--batch"),
        ({"order": "never"}, "--order"),
        ({"ladder": "yes"}, "--ladder"),
        ({"batch": [1, 2]}, "--batch"),
        ({"costs": {}}, "--costs"),
        ({"policy": "no-such"}, "--policy no-such"),
    ],
)
def test_a_mistake_names_its_option(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        moesim.replay(**{"trace": "demo", **options})
    assert str(caught.value).startswith(told)


def test_all_mistakes_are_told_at_once() -> None:
    found = problems({"trace": "demo", "batch": 0, "ordr": "ready", "limit": -1})
    assert set(found) == {"batch", "ordr", "limit"}
    assert problems({"trace": "demo", "token-budget": 5}).keys() == {""}
    assert problems({"trace": "demo"}) == {}


def test_underscores_and_dashes_name_the_same_option() -> None:
    asked = request_of({"trace": "demo", "chunk_tokens": 4})
    assert asked == request_of({"trace": "demo", "chunk-tokens": 4})
    assert asked.chunk_tokens == 4
    assert "chunk-tokens" in option_names()


def test_any_command_can_be_called(tmp_path: Path) -> None:
    path = tmp_path / "first.parquet"
    assert moesim.call("trace", "head", "demo", str(path), requests=2)["requests"] == 2
    assert moesim.call("trace", "check", str(path))["ok"] is True
    assert "schema" in moesim.call("profiles", "rtx4090")
    with pytest.raises(UsageError, match="required"):
        moesim.call("trace", "check")
    with pytest.raises(MoesimError, match="no such file"):
        moesim.call("trace", "check", str(tmp_path / "none"))


def test_help_and_version_are_text_and_no_mistake() -> None:
    assert moesim.call("--version") == f"moesim {moesim.__version__}\n"
    assert "--capacity" in moesim.call("replay", "--help")


def test_the_number_in_the_docstring_is_the_one_found() -> None:
    made = moesim.replay("demo", policy="finemoe", capacity=0.25, limit=2)
    told = (moesim.api.__doc__ or "").split("hit_rate")[1].splitlines()[1]
    assert float(told) == round(made.summary["hit_rate"], 2)


def test_bars_of_several_devices_hold_the_exchange_between_them() -> None:
    pytest.importorskip("matplotlib")
    made = moesim.replay("demo", limit=1, hardware="rtx3090x6", capacity="50%")
    times, tokens = made.summary["times_ns"], made.summary["output_tokens"]
    (bars,) = [made.plot().axes[0].patches]
    counted = sum(ns for part, ns in times.items() if part not in ("initial", "idle"))
    assert times["exchange"] > 0
    assert sum(b.get_width() for b in bars) * 1e6 == pytest.approx(counted / tokens)


def test_runs_go_with_the_answer_that_holds_them() -> None:
    made = moesim.replay("demo", limit=1)
    folder = made.folder
    assert folder.exists()
    del made
    gc.collect()
    assert not folder.exists()


def test_importing_moesim_imports_nothing_heavy() -> None:
    heavy = {"numba", "pandas", "matplotlib", "torch", "pyarrow", "rich", "simpy", "numpy"}
    code = f"import sys, moesim; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_offered_is_there() -> None:
    assert set(moesim.__all__) <= set(dir(moesim))
    with pytest.raises(AttributeError, match="no attribute"):
        _ = moesim.nothing  # type: ignore[attr-defined]
