"""Everything that a machine is asked, as pieces of one process each: hardware tests, campaigns, the
demo model.

What is finished is written down and not done again, so the suite goes on where it was stopped, and
a piece that fails does not keep the others from running.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.errors import UsageError
from moesim.profile import load_model

MODELS: Mapping[str, str] = {
    "gpt-oss-20b": "10%,25%,50%",
    "olmoe-1b-7b": "10%,25%,50%",
    "mixtral-8x7b": "25%",
}
"""Whose sizes are measured, and at which capacities."""
POLICIES = "lru,lfu,moe-infinity,mixtral-offloading,finemoe,swapmoe,hindsight,streaming"
BRIEF, BRIEF_TOKENS = ("streaming",), 4
"""It moves every expert for every token: a campaign of its own, of so many tokens."""

TESTS_SHARE = 0.4
"""Of the time, that hardware tests may take from what is measured."""

PIECES, LOGS = "pieces", "logs"
_LEAVE_S = 60.0
"""How long a piece may take to put things away when time is up."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Suite:
    """What to do.

    models : names or files of profiles. capacity : for all of them; empty: as ``MODELS`` says, a
        quarter where it does not.
    traces : model -> a trace in its shape; a synthetic one where there is none.
    minutes : after which nothing more is begun, and what is under way is stopped.
    """

    out: Path
    device: str = "cuda"
    models: tuple[str, ...] = tuple(MODELS)
    policies: str = POLICIES
    capacity: str = ""
    traces: Mapping[str, Path] = field(default_factory=dict)
    requests: int = 2
    prompt_tokens: int = 32
    output_tokens: int = 24
    repeats: int = 3
    minutes: float = 15.0
    demo: bool = True
    threads: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """One process.

    words : what Python is told. printed : where its answer is kept. share : of the suite's minutes
        that it may take.
    """

    name: str
    words: tuple[str, ...]
    printed: Path | None = None
    folder: Path | None = None
    share: float = 1.0


def run(suite: Suite, say: Say) -> dict[str, Any]:
    """Do what is not done; the object that ``--json`` prints.

    Raises
    ------
    MoesimError
        For a mistake in the suite. A piece that fails is told, and the next one begins.
    """
    pieces = list(pieces_of(suite))
    for folder in (PIECES, LOGS):
        try:
            (suite.out / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--out {suite.out}: cannot be written ({error.strerror or error}); choose another"
            ) from None
    end = time.monotonic() + 60 * suite.minutes
    told = [_told(suite, piece, end, say) for piece in pieces]
    return {
        "schema": 1,
        "out": str(suite.out),
        "device": suite.device,
        "pieces": told,
        "done": all(piece["state"] == "done" for piece in told),
    }


def pieces_of(suite: Suite) -> Iterator[Piece]:
    """In order: what tells soonest that something is wrong comes first."""
    tests = Path(__file__).resolve().parents[1] / "tests" / "test_hardware.py"
    if suite.device == "cuda" and tests.is_file():
        # What a library warns of on such a machine is no failure; what hangs shows where.
        quiet = ("-W", "default", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=120")
        words = ("-m", "pytest", "-q", "-m", "hardware", *quiet, str(tests))
        yield Piece("hardware-tests", words, folder=tests.parents[1], share=TESTS_SHARE)
    if suite.demo:
        yield _demo(suite)
    for model in suite.models:
        name = load_model(model).name
        trace = suite.traces.get(model)
        if trace is None:
            trace = suite.out / f"{name}.trace.parquet"
            yield _synth(suite, model, name, trace)
        yield from _campaigns(suite, model, name, trace)


def _synth(suite: Suite, model: str, name: str, trace: Path) -> Piece:
    words = (
        *("-m", "moesim", "trace", "synth", str(trace), "--model", model),
        *("--requests", str(suite.requests), "--prompt-tokens", str(suite.prompt_tokens)),
        *("--output-tokens", str(suite.output_tokens + 1), "--gate", "full", "--ahead", "1,2"),
        *("--embeddings", "--seed", str(suite.seed)),
    )
    return Piece(f"{name}-trace", words)


def _campaigns(suite: Suite, model: str, name: str, trace: Path) -> Iterator[Piece]:
    policies = suite.policies.split(",")
    whole = [policy for policy in policies if policy not in BRIEF]
    brief = [policy for policy in policies if policy in BRIEF]
    if whole:
        yield _campaign(suite, model, name, trace, whole, suite.output_tokens)
    if brief:
        tokens = min(BRIEF_TOKENS, suite.output_tokens)
        measured = ("--hardware", str(suite.out / name / "hw.toml")) if whole else ()
        yield _campaign(suite, model, f"{name}-brief", trace, brief, tokens, *measured)


def _campaign(
    suite: Suite,
    model: str,
    name: str,
    trace: Path,
    policies: Sequence[str],
    tokens: int,
    *more: str,
) -> Piece:
    words = (
        *("-m", "moesim", "real", "campaign", "--device", suite.device, "--trace", str(trace)),
        *("--costs", model, "--policy", ",".join(policies)),
        *("--capacity", suite.capacity or MODELS.get(model, "25%")),
        *("--limit", str(suite.requests), "--output-tokens", str(tokens)),
        *("--repeats", str(suite.repeats), "--allow", "norms=unit", "--seed", str(suite.seed)),
        *(("--threads", str(suite.threads)) if suite.threads else ()),
        *("--out", str(suite.out / name), "--keep", str(suite.out / "kept" / name), "--json"),
    )
    return Piece(name, (*words, *more), printed=suite.out / f"{name}.json")


def _demo(suite: Suite) -> Piece:
    words = (
        *("-m", "moesim", "real", "generate", "--model", "demo", "--device", suite.device),
        *("--policy", "next-gate", "--capacity", "25%", "--limit", "4"),
        *("--max-new-tokens", "32", "--check", "--out", str(suite.out / "demo"), "--json"),
    )
    return Piece("demo-free", words, printed=suite.out / "demo-free.json")


# ---- doing it ------------------------------------------------------------------------------------


def _told(suite: Suite, piece: Piece, end: float, say: Say) -> dict[str, Any]:
    """A piece's record: of now, or of when it was done."""
    path = suite.out / PIECES / f"{piece.name}.json"
    known = _known(path)
    if known is not None and known["words"] == list(piece.words) and known["state"] == "done":
        return known
    left_s = end - time.monotonic()
    if left_s <= 0:
        return {"name": piece.name, "words": list(piece.words), "state": "time is up"}
    say(f"{piece.name} ({left_s / 60:.0f} minutes left)")
    left_s = min(left_s, piece.share * 60 * suite.minutes)
    started = time.monotonic()
    code, said = _process(suite, piece, left_s)
    state = "done" if code == 0 else "time is up" if code is None else "failed"
    told = {
        "name": piece.name,
        "words": list(piece.words),
        "state": state,
        "code": code,
        "said": said,
        "seconds": round(time.monotonic() - started, 1),
    }
    if state == "failed":
        say(f"{piece.name} failed: {said or f'code {code}'}")
    _write(path, told)
    return told


def _process(suite: Suite, piece: Piece, left_s: float) -> tuple[int | None, str]:
    """(exit code, the last line that it wrote to its log); None where time was up.

    What a piece prints is its answer, kept if it comes to its end; else it goes to the log.
    """
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    log = suite.out / LOGS / f"{piece.name}.log"
    beside = (piece.printed or log).with_name(f".{piece.name}.tmp-{os.getpid()}")
    before = log.stat().st_size if log.exists() else 0
    try:
        with beside.open("wb") as out, log.open("ab") as err:
            code = _waited(
                subprocess.Popen(
                    [sys.executable, *piece.words],
                    stdout=out if piece.printed else err,
                    stderr=err,
                    stdin=subprocess.DEVNULL,
                    cwd=piece.folder,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                    preexec_fn=_hear_interrupts,
                ),
                left_s,
            )
        if code == 0 and piece.printed:
            beside.replace(piece.printed)
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
    finally:
        beside.unlink(missing_ok=True)
    return code, lines[-1] if lines else ""


def _hear_interrupts() -> None:
    """In the child: a shell has what it starts in the background ignore Ctrl-C, and that is
    inherited, but it is how a piece is told that time is up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _waited(process: subprocess.Popen[bytes], left_s: float) -> int | None:
    """Its exit code; None where it had to be stopped. It is gone in any case."""
    try:
        return process.wait(left_s)
    except subprocess.TimeoutExpired:
        # As Ctrl-C: a campaign keeps the runs that it has finished.
        process.send_signal(signal.SIGINT)
        return None
    finally:
        try:
            process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _known(path: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and {"words", "state"} <= known.keys() else None


def _write(path: Path, told: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def summary_rows(told: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """(piece, state, seconds, what it said last)."""
    return [
        (
            piece["name"],
            piece["state"],
            f"{piece['seconds']:.0f}" if "seconds" in piece else "",
            piece.get("said", "") if piece["state"] == "failed" else "",
        )
        for piece in told["pieces"]
    ]
