"""Policies from outside: always run as they are now, and blamed in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesim.ask.arguments import initial
from moesim.cli import main
from moesim.errors import MoesimError, UsageError
from moesim.profile import load_hardware
from moesim.replays import Request, replay
from moesim.traces.samples import trace_path

POLICY = """
import numpy as np
from moesim.policy import PlainPolicy

class Mine(PlainPolicy):
    def scores(self, experts, event):
        {body}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that a user writes, importable as ``mine``."""
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)


def write(module: Path, body: str) -> None:
    """Save it, as an editor would between two runs."""
    module.write_text(POLICY.format(body=body))
    sys.modules.pop("mine", None)


def run(out: Path | None = None, **more: Any) -> dict[str, Any]:
    request = Request(
        trace=trace_path("demo"),
        hardware=load_hardware("rtx4090"),
        policies=("mine:Mine",),
        limit=1,
        out=out,
        **more,
    )
    return dict(replay(request)["runs"][0])


def test_an_edited_policy_is_run_again(module: Path, tmp_path: Path) -> None:
    write(module, "return np.asarray(experts, np.int64)")
    before = run(tmp_path / "runs")
    write(module, "return -np.asarray(experts, np.int64)  # edited, another length")
    after = run(tmp_path / "runs")
    assert after["log_digest"] == run()["log_digest"] != before["log_digest"]
    assert after["run_dir"] != before["run_dir"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("assert False, 'oops'", "AssertionError: oops"),
        ("return experts[99999]", "IndexError"),
        ("return experts / 2", "scores must be int64"),
    ],
)
def test_its_errors_are_its_author_s(module: Path, body: str, told: str) -> None:
    write(module, body)
    with pytest.raises(MoesimError, match=told) as caught:
        run()
    assert str(caught.value).startswith("mine:Mine: ") and "\n" not in str(caught.value)


def test_a_module_that_cannot_be_imported(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.write_text("def broken(:\n")
    for words in (["--policy", "mine:Mine"], ["--set", "keep=mine:Mine", "--set", "keep.x=1"]):
        assert main(["replay", "--trace", "demo", *words]) == 2
        error = capsys.readouterr().err
        assert "cannot be imported: SyntaxError" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--policy", "look-ahead", "--set", "prefetch.distance=1000000000000"],
        ["--policy", "streaming", "--set", "prefetch.distance=0"],
        ["--policy", "next-gate", "--allow", "ahead=recall:0.5@99999999999999999999999"],
        ["--capacity", "101%"],
        ["--ladder", "--arrivals", "recorded"],
    ],
)
def test_numbers_out_of_reach(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--trace", "demo", "--limit", "1", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words[-1].partition("=")[2] in error


def test_an_initial_state_that_nests_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UsageError, match="not JSON"):
        initial(str(path))


def test_everything_resident_misses_nothing_whatever_the_run_gives_up() -> None:
    """The ladder's rungs mean the same under every option."""
    from moesim.engine.setup import Options
    from moesim.profile import load_model

    for options in (Options(), Options(share_kv=True), Options(order="barrier")):
        request = Request(
            trace=trace_path("demo"),
            hardware=load_hardware("rtx4090"),
            options=options,
            costs=load_model("olmoe-1b-7b"),
            initial="cold",
            limit=3,
            ladder=True,
        )
        (only,) = replay(request)["runs"]
        assert only["ladder"]["all-resident"]["misses"] == 0
        assert only["ladder"]["static"]["misses"] <= only["misses"]
        assert only["ladder"]["min-bypass"]["misses"] <= only["ladder"]["min"]["misses"]
