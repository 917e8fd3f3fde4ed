"""The suite of a machine: pieces that go on where they were, fail alone, and end in time."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import torch

from moesim.cli import main, parser
from moesim.errors import UsageError
from moesim.real import suite
from moesim.real.suite import MODELS, Piece, Suite, pieces_of
from tests.test_real import SMALL

QUIET = print


def scripts(*texts: str) -> list[Piece]:
    """Pieces of a line of Python each."""
    return [Piece(f"piece-{i}", ("-c", text)) for i, text in enumerate(texts)]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[Piece]:
    """What the suite does instead."""
    made: list[Piece] = []
    monkeypatch.setattr(suite, "pieces_of", lambda asked: made)
    return made


def states(told: dict[str, Any]) -> Sequence[str]:
    """Of each piece."""
    return [piece["state"] for piece in told["pieces"]]


def test_what_is_done_is_not_done_again_and_a_failure_stays_alone(
    tmp_path: Path, pieces: list[Piece]
) -> None:
    counted = tmp_path / "counted"
    count = f"open({str(counted)!r}, 'a').write('x')"
    fail = "import sys; print('the bus is gone', file=sys.stderr); sys.exit(2)"
    pieces += scripts(count, fail, f"print('all well'); {count}")
    said: list[str] = []
    told = suite.run(Suite(tmp_path / "out"), said.append)
    assert states(told) == ["done", "failed", "done"] and not told["done"]
    assert told["pieces"][1]["said"] == "the bus is gone" in said[2]
    assert (tmp_path / "out" / "logs" / "piece-2.log").read_text() == "all well\n"
    assert counted.read_text() == "xx"
    pieces[1] = replace(pieces[1], words=("-c", count))
    again = suite.run(Suite(tmp_path / "out"), said.append)
    assert states(again) == ["done", "done", "done"] and again["done"]
    assert counted.read_text() == "xxx"
    assert not [p for p in (tmp_path / "out").rglob("*") if ".tmp-" in p.name]


def test_another_question_is_another_piece(tmp_path: Path, pieces: list[Piece]) -> None:
    pieces += scripts("print(1)")
    suite.run(Suite(tmp_path), QUIET)
    pieces[:] = scripts("print(2)")
    suite.run(Suite(tmp_path), QUIET)
    assert (tmp_path / "logs" / "piece-0.log").read_text() == "1\n2\n"


def test_what_a_piece_printed_before_it_failed_is_kept(tmp_path: Path, pieces: list[Piece]) -> None:
    """The hardware tests tell their failures on stdout. An answer that is not whole is none; what
    was said last is of this time, not of the time before."""
    pieces += scripts("print('F test_a'); print('1 failed'); raise SystemExit(1)")
    told = suite.run(Suite(tmp_path), QUIET)["pieces"][0]
    assert (told["state"], told["said"]) == ("failed", "1 failed")
    assert (tmp_path / "logs" / "piece-0.log").read_text() == "F test_a\n1 failed\n"
    pieces[:] = scripts("raise SystemExit(3)")
    assert suite.run(Suite(tmp_path), QUIET)["pieces"][0]["said"] == ""
    answer = tmp_path / "answer.json"
    pieces[:] = [Piece("asked", ("-c", "print('{'); raise SystemExit(1)"), printed=answer)]
    suite.run(Suite(tmp_path), QUIET)
    assert not answer.exists()
    pieces[:] = [Piece("asked", ("-c", "print('{}')"), printed=answer)]
    suite.run(Suite(tmp_path), QUIET)
    assert answer.read_text() == "{}\n" and not (tmp_path / "logs" / "asked.log").read_text()


def test_time_that_is_up_ends_a_piece_as_ctrl_c_does(tmp_path: Path, pieces: list[Piece]) -> None:
    told = tmp_path / "told"
    pieces += scripts(
        f"""
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
open({str(tmp_path / "ready")!r}, "w").close()
try:
    time.sleep(60)
except KeyboardInterrupt:
    open({str(told)!r}, "w").write("put away")
""",
        "print('never')",
    )
    found = suite.run(Suite(tmp_path / "out", minutes=3 / 60), QUIET)
    assert states(found) == ["time is up", "time is up"]
    assert told.read_text() == "put away"
    assert not (tmp_path / "out" / "pieces" / "piece-1.json").exists()
    # There is time again.
    pieces[0] = scripts("print('now')")[0]
    assert suite.run(Suite(tmp_path / "out"), QUIET)["done"]


def test_a_piece_that_hangs_leaves_time_for_the_others(tmp_path: Path, pieces: list[Piece]) -> None:
    pieces += scripts("import time; time.sleep(60)", "print(1)")
    pieces[0] = replace(pieces[0], share=0.02)
    assert states(suite.run(Suite(tmp_path, minutes=1), QUIET)) == ["time is up", "done"]


def test_time_that_is_up_is_heard_in_the_background_too(
    tmp_path: Path, pieces: list[Piece]
) -> None:
    """A shell starts what runs in the background with Ctrl-C ignored."""
    pieces += scripts("import time; time.sleep(50)")
    begun = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert states(suite.run(Suite(tmp_path, minutes=1 / 60), QUIET)) == ["time is up"]
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 40


def test_ctrl_c_leaves_no_process(
    tmp_path: Path, pieces: list[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "_LEAVE_S", 0.5)
    here: list[Any] = []
    made = suite.subprocess.Popen

    def kept(*args: Any, **more: Any) -> Any:
        here.append(made(*args, **more))
        threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
        return here[-1]

    monkeypatch.setattr(suite.subprocess, "Popen", kept)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pieces += scripts("import time; time.sleep(60)")
    try:
        with pytest.raises(KeyboardInterrupt):
            suite.run(Suite(tmp_path), QUIET)
    finally:
        signal.signal(signal.SIGINT, before)
    assert here[0].poll() is not None
    assert not list((tmp_path / "pieces").iterdir())


def test_the_plan_names_what_was_asked_for() -> None:
    """The hardware tests first; of every model a process, and one for the longest policy."""
    made = list(pieces_of(Suite(Path("out"))))
    assert [p.name for p in made] == [
        "hardware-tests", "demo-free",
        *(name for m in MODELS for name in (f"{m}-trace", m, f"{m}-brief")),
    ]  # fmt: skip
    for piece in made:
        if piece.words[1] == "moesim":
            parser().parse_args(piece.words[2:])
    campaigns = {p.name: p.words for p in made if "campaign" in p.words}
    for name, words in campaigns.items():
        given = {word: words[at + 1] for at, word in enumerate(words[:-1]) if word[:2] == "--"}
        short = name.endswith("-brief")
        name = name.removesuffix("-brief")
        assert given["--costs"] == name and given["--repeats"] == "3"
        assert given["--device"] == "cuda" and ("--hardware" in given) is short
        assert given["--output-tokens"] == ("4" if short else "24")
        assert given["--policy"] == (
            "streaming" if short
            else "lru,lfu,moe-infinity,mixtral-offloading,finemoe,swapmoe,hindsight"
        )  # fmt: skip
        capacities = "25%" if name == "mixtral-8x7b" else "10%,25%,50%"
        assert given["--capacity"] == capacities


def test_a_trace_of_ones_own_is_taken(tmp_path: Path) -> None:
    own = tmp_path / "t.parquet"
    made = list(pieces_of(Suite(Path("out"), models=("olmoe-1b-7b",), traces={"olmoe-1b-7b": own})))
    names = ["hardware-tests", "demo-free", "olmoe-1b-7b", "olmoe-1b-7b-brief"]
    assert [p.name for p in made] == names
    assert all(str(own) in piece.words for piece in made[2:])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a suite that must be refused."""
    capsys.readouterr()
    try:
        code: object = main(["real", "suite", *map(str, words)])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1, err
    return err


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = ("--device", "cpu", "--out", tmp_path / "out")
    assert "no model profile named" in refused(capsys, *cpu, "--model", "olmo")
    assert "--trace x: write MODEL=FILE" in refused(capsys, *cpu, "--trace", "x")
    assert "--minutes" in refused(capsys, *cpu, "--minutes", "0")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        suite.run(Suite(tmp_path / "file", device="cpu"), QUIET)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "torch finds no CUDA device" in refused(capsys, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_same_command_on_the_processor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trace, calibration, simulation, runs, table: what is kept can be committed."""
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    profile = tmp_path / "tiny.toml"
    text = SMALL.replace("layers = 8", "layers = 2").replace('["decoder", 8]', '["decoder", 2]')
    profile.write_text(text.replace("experts = 16", "experts = 8", 1))
    words = [
        *("real", "suite", "--device", "cpu", "--out", tmp_path / "out", "--model", profile),
        *("--capacity", "50%", "--policy", "lru,streaming", "--requests", 1, "--no-demo"),
        *("--prompt-tokens", 3, "--output-tokens", 5, "--repeats", 2, "--threads", 1, "--json"),
    ]
    assert main([*map(str, words)]) == 0, (tmp_path / "out" / "logs" / "small.log").read_text()
    told = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in told["pieces"]] == ["small-trace", "small", "small-brief"]
    (kept,) = (tmp_path / "out" / "kept" / "small").iterdir()
    names = {p.name for p in kept.iterdir()}
    assert {"runs.csv", "hw.toml", "hw.readings.parquet", "validation.md", "facts.json"} <= names
    measured = list((tmp_path / "out").glob("small*/measured/[!.]*"))
    assert len(measured) == 4
    tokens = {
        (s["policy"], s["output_tokens"])
        for s in (json.loads((p / "summary.json").read_text()) for p in measured)
    }
    assert tokens == {("lru", 6), ("streaming", 5)}
    assert main([*map(str, words)]) == 0
    assert json.loads(capsys.readouterr().out) == told
