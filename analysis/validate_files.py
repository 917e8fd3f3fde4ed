"""The folder that a validation is kept in: whole, or as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moesim.analysis.validate import Report, write_data
from moesim.analysis.validate_figures import overlay, scatter
from moesim.analysis.validate_runs import Data, Matched
from moesim.analysis.validate_text import markdown
from moesim.errors import UsageError

REPORT = "validation.md"


@dataclass(frozen=True, slots=True)
class Drawn:
    """Which step is drawn.

    steps : forward passes of the run.
    """

    timelines: tuple[Path, Path]
    title: str
    steps: int
    step: int


def chosen(pairs: Sequence[Matched], asked: str | None, step: int | None) -> Drawn | None:
    """The step to draw: of the configuration asked for (``policy@capacity``), else of the first
    that has a timeline of both; None where none has.

    Raises
    ------
    UsageError
        If what was asked for is not there, or has no timeline of both.
    """
    if asked is not None:
        known = [f"{p.simulated.policy}@{p.simulated.summary['capacity']}" for p in pairs]
        if asked not in known:
            raise UsageError(f"--overlay {asked}: not compared; choose from {', '.join(known)}")
        pairs = [pairs[known.index(asked)]]
    for pair in pairs:
        timelines, steps = pair.with_timeline(), int(pair.simulated.summary["steps"])
        if timelines is not None and steps > 1:
            later = min(3 * steps // 4, steps - 2)
            return Drawn(timelines, pair.simulated.name, steps, later if step is None else step)
    if asked is not None or step is not None:
        raise UsageError("--overlay: no timeline of both; make the runs with --timeline")
    return None


def write(folder: Path, data: Data, report: Report, drawn: Drawn | None) -> None:
    """Write tables, text and figures: beside, then moved.

    Raises
    ------
    UsageError
        If the folder cannot be written, or the step is not there; nothing is left behind.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: is a file; name a folder")
    beside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        _fill(beside, data, report, drawn)
        folder.mkdir(exist_ok=True)
        for path in sorted(beside.iterdir()):
            path.replace(folder / path.name)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _fill(folder: Path, data: Data, report: Report, drawn: Drawn | None) -> None:
    write_data(data, folder)
    tables = ("configurations", "pairs", "errors", "policies", "orders", "parts")
    for name in tables:
        table = getattr(report, name)
        table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    (folder / REPORT).write_text(markdown(report), encoding="utf-8")
    scatter(report, folder)
    if drawn is not None:
        overlay(drawn.timelines, drawn.steps, drawn.step, drawn.title, folder)
