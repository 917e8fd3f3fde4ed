"""The league of policies: what is ranked, what is set apart, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from moesim.analysis.league import league, main
from moesim.cli import main as moesim

POLICIES = "lru,lfu-decay,min,cpu,swapmoe"


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("league") / "answer.json"
    command = ["replay", "--trace", "demo", "--policy", POLICIES, "--capacity", "25%,50%"]
    with path.open("w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        assert moesim([*command, "--split", "marked", "--limit", "3", "--json"]) == 0
    return path


def test_the_ranked_come_first_then_bounds_then_lossy_ones(answer: Path) -> None:
    lines = league(json.loads(answer.read_text()))
    assert lines[0] == "| policy | 25% | 50% |"
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert set(names[:3]) == {"`lru`", "`lfu-decay`", "`cpu` +"}
    assert names[3:] == ["`min` (bound)", "`swapmoe` (lossy)"]
    assert "mass 0." in lines[-1]


def test_the_order_is_that_of_time(answer: Path) -> None:
    """A policy that is slower at every capacity never stands above."""
    found = json.loads(answer.read_text())
    times: dict[str, list[float]] = {}
    for run in found["runs"]:
        times.setdefault(run["policy"], []).append(run["tpot_ns"]["mean"])
    ranked = [line.split("`")[1] for line in league(found)[2:5]]
    for above, below in pairwise(ranked):
        assert not all(a > b for a, b in zip(times[above], times[below], strict=True))


def test_one_quickest_a_capacity(answer: Path) -> None:
    lines = league(json.loads(answer.read_text()))
    for column in (2, 3):
        assert sum("**<**" in line.split("|")[column] for line in lines) == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"runs": [], "trace": {}}', "{"])
def test_what_is_no_answer_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main([str(path)]) == 2
    assert f"{path}: is not what `moesim replay --json` prints" in capsys.readouterr().err


def test_a_missing_file_and_no_file_are_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moesim.analysis.league"]
    missing = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True)
    assert missing.returncode == 2 and "cannot be read" in missing.stderr
    assert subprocess.run(command, capture_output=True).returncode == 2
