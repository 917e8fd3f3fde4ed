"""What the READMEs say is so: commands run, examples work, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.analysis.picture import main as draw_picture
from moesim.cli import main
from moesim.policies import SEATS
from moesim.policies.presets import PRESETS
from moesim.policy import check_policy
from moesim.registry import seat_class
from moesim.traces.reader import RequestRows, TraceReader
from moesim.traces.samples import SAMPLES, trace_path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "moesim/README.md",
        "policies/README.md",
        "traces/README.md",
        "traces/models/README.md",
        "real/README.md",
        "analysis/README.md",
        "tests/README.md",
    )
]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for named, text in fences if named == language]


def pipes(page: Path) -> list[str]:
    """Lines of a page's ``sh`` blocks that need a shell."""
    return [line for line in "".join(blocks(page, "sh")).splitlines() if " | " in line]


def commands(page: Path) -> list[list[str]]:
    """The other moesim commands of these blocks, without ``moesim`` itself."""
    found = []
    for line in "".join(blocks(page, "sh")).splitlines():
        if line in pipes(page):
            continue
        words = shlex.split(line, comments=True)
        words = words[words.index("moesim") + 1 :]
        found.append(words)
    return found


EVERY_COMMAND = [(page, words) for page in PAGES if page.exists() for words in commands(page)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where a reader has saved ``mine.py`` and what pipes make."""
    path = tmp_path_factory.mktemp("reader")
    first, second, _ = blocks(ROOT / "policies" / "README.md", "python")
    (path / "mine.py").write_text(first + second)
    program = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{path}:{os.environ['PATH']}"}
    (path / "moesim").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moesim "$@"\n')
    (path / "moesim").chmod(0o755)
    for line in (line for page in PAGES if page.exists() for line in pipes(page)):
        subprocess.run(["sh", "-c", line], cwd=path, env=program, check=True)
    (path / "moesim").unlink()
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))
    sys.modules.pop("mine", None)


WAITING = {"promoe", "moe-beyond", "hobbit", "moepic"}
"""Presets that wait to be fitted, or for a model of several precisions or of parts."""


@pytest.mark.parametrize("words", [w for _, w in EVERY_COMMAND], ids=" ".join)
def test_a_command_of_a_page_works(
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(words) == 0
    out, err = capsys.readouterr()
    # Long work tells how far it is.
    usual = re.compile(r": \d+/\d+ |^moesim: (loading|waiting|compiling) ")
    said = [line for line in err.splitlines() if not usual.search(line)]
    assert out and not said
    if "--json" in words:
        assert all("not_run" not in run for run in json.loads(out)["runs"])
    else:
        refused = {line.split()[0] for line in out.splitlines() if "not run" in line}
        assert refused == (WAITING if "all" in words else set())


def setup_commands() -> list[str]:
    """The README's commands that set up and do: one for the main job, one for the tests."""
    return [text.strip() for text in blocks(ROOT / "README.md", "")]


def test_the_python_of_the_readme_works() -> None:
    pytest.importorskip("pandas")
    (code,) = blocks(ROOT / "README.md", "python")
    exec(code, {})


def test_two_commands_set_up_and_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tests = setup_commands()
    assert run.count("\n") == tests.count("\n") == 0
    *setup, job = run.split(" && ")
    assert setup == ["python3 -m venv .venv", ".venv/bin/pip install ."]
    program, *words = shlex.split(job)
    assert program == ".venv/bin/moesim"
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--limit", "1"]) == 0
    out = capsys.readouterr().out
    for name in words[words.index("--policy") + 1].split(","):
        assert len(re.findall(rf"^ {name} ", out, re.MULTILINE)) == 3
    *setup, job = tests.split(" && ")
    assert setup[0] == "python3 -m venv .venv"
    assert re.fullmatch(r"\.venv/bin/pip install torch==[0-9.]+", setup[1])
    assert setup[2:] == [".venv/bin/pip install -e '.[test,record,real]'"]
    assert job == ".venv/bin/python -m pytest"


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -E '(.+)' README.md", script)
    assert pattern
    found = re.findall(pattern[1], (ROOT / "README.md").read_text(), re.MULTILINE)
    assert found == [setup_commands()[1]]
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=False).returncode == 0
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_policies_of_the_example_are_sound(folder: Path) -> None:
    *_, check = blocks(ROOT / "policies" / "README.md", "python")
    scope: dict[str, Any] = {}
    exec(compile(check, "policies/README.md", "exec"), scope)
    assert scope["check_policy"] is check_policy


def test_the_example_has_at_most_30_lines() -> None:
    first, *_ = blocks(ROOT / "policies" / "README.md", "python")
    assert first.count("\n") <= 30


def test_one_file_and_one_line_run_in_every_host(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of policies/README.md: the same decisions in both engines and in a real run."""
    pytest.importorskip("torch")
    monkeypatch.chdir(folder)
    line = ["--trace", "demo", "--policy", "lru", "--set", "keep=mine:Recent", "--limit", "1"]
    hosts = (["replay", "--engine", "reference"], ["replay", "--engine", "fast"], ["real", "run"])
    decided, loads = set(), set()
    for host in hosts:
        assert main([*host, *line, "--json"]) == 0
        (run,) = json.loads(capsys.readouterr().out)["runs"]
        decided.add(run["decision_digest"])
        loads.add(run["loads"])
    assert len(decided) == len(loads) == 1


def test_the_tables_of_policies_are_what_the_code_says(tmp_path: Path) -> None:
    """Mended by `moesim policies --markdown policies/README.md`."""
    page = (ROOT / "policies" / "README.md").read_text()
    copy = tmp_path / "README.md"
    copy.write_text(page)
    assert main(["policies", "--markdown", str(copy)]) == 0
    assert copy.read_text() == page, "run: moesim policies --markdown policies/README.md"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    rows = re.findall(r"^\| `([\w-]+)` \|", page.partition("| seat |")[0], re.MULTILINE)
    assert [name for name in rows if name in PRESETS] == list(PRESETS)


@pytest.mark.parametrize("full", SEATS)
def test_every_seat_says_where_it_is_from_and_what_it_costs(full: str) -> None:
    made = seat_class(*full.split(".", 1))
    assert made.source and made.cost.startswith("O(") and (made.__doc__ or "").strip()


def test_tables_have_somewhere_to_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# no markers\n")
    for path, problem in ((page, "has no lines"), (tmp_path / "none.md", "No such file")):
        assert main(["policies", "--markdown", str(path)]) == 2
        assert problem in capsys.readouterr().err
    assert page.read_text() == "# no markers\n"
    assert main(["policies", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| policy |")


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_what_its_command_records(name: str, tmp_path: Path) -> None:
    """The prefill of the first prompts is recorded again: as nearly as another processor rounds."""
    pytest.importorskip("torch")
    lines = "".join(blocks(ROOT / "traces" / "README.md", "")).splitlines()
    commands = (shlex.split(line, comments=True)[1:] for line in lines)
    (words,) = [w for w in commands if w[:3] == ["record", "--model", name] and "--out" in w]
    words[words.index("--out") + 1] = str(tmp_path / "again.parquet")
    parameters = dict(pairwise(words))
    few = {"--limit": "8", "--max-new-tokens": "1"}
    for option, value in few.items():
        words += [option, value]
    assert main(words) == 0
    with TraceReader(tmp_path / "again.parquet") as made, TraceReader(trace_path(name)) as shipped:
        ours, theirs = made.meta, shipped.meta
        assert replace(theirs, **{f: getattr(ours, f) for f in DIFFER}) == ours
        assert theirs.requests == int(parameters.get("--limit", 96))
        assert f"at most {parameters['--max-new-tokens']} new tokens" in theirs.notes[1]
        pairs = zip(made.requests(), shipped.requests(), strict=False)
        alike = [prefill_agreement(one, other) for one, other in pairs]
    assert len(alike) == 8 and min(alike) > 0.98


DIFFER = ("requests", "tokens", "rows", "digest", "notes", "versions", "phases")
"""What of a sample's metadata fewer tokens and later versions change."""


def prefill_agreement(one: RequestRows, other: RequestRows) -> float:
    """Which share of the experts chosen for a prompt is the same; its tokens must be."""
    ours, theirs = one.iteration == 0, other.iteration == 0
    assert one.facts.prompt_digest == other.facts.prompt_digest
    assert one.facts.split == other.facts.split
    assert one.token is not None and other.token is not None
    assert (one.token[ours] == other.token[theirs]).all()
    return float((np.sort(one.experts[ours]) == np.sort(other.experts[theirs])).mean())


def test_the_picture_is_what_its_command_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "analysis" / "README.md"
    (words,) = commands(page)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    lru, ahead = (run["run_dir"] for run in json.loads(capsys.readouterr().out)["runs"])
    (line,) = (text for text in blocks(page, "") if "moesim.analysis.picture" in text)
    drawing = shlex.split(line.replace("RUN_OF_LRU", lru).replace("RUN_OF_NEXT_GATE", ahead))
    assert draw_picture(drawing[drawing.index("moesim.analysis.picture") + 1 :]) == 0
    drawn, shown = (tmp_path / "picture.svg").read_text(), (ROOT / "picture.svg").read_text()
    assert drawn == shown, f"draw it again: {page.name} of analysis/ has the commands"
    # The caption speaks of seven eighths.
    slow, quick = (float(ms) for ms in re.findall(r'text-anchor="end">([\d.]+) ms<', shown))
    assert 0.85 < quick / slow < 0.9


def test_every_number_of_the_answer_is_defined(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--policy", "next-gate", "--limit", "1", "--ladder", "--json")
    assert main(["replay", "--trace", "demo", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    page = (ROOT / "moesim" / "README.md").read_text()
    known = {part for name in re.findall(r"`([\w.]+)`", page) for part in name.split(".")}
    (run,) = found["runs"]
    assert not {*found, *run, *run["times_ns"], *run["served"], *run["prefetch"]} - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_map_of_folders_is_whole() -> None:
    listed = set(re.findall(r"^\| \[`(\w+)/`\]", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert listed == {"moesim", "policies", "traces", "real", "analysis", "tests"}
