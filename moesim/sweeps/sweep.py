"""The whole of a sweep: read, cut, run, gather."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moesim import __version__
from moesim.errors import UsageError
from moesim.result import source_digest
from moesim.sweeps.execute import Executor, Outcome, local
from moesim.sweeps.experiment import Experiment
from moesim.sweeps.passes import passes
from moesim.sweeps.table import rows, write

RUNS, RESULTS, SWEEP, HOST = "runs", "results.parquet", "sweep.json", "host.json"
Progress = Callable[[int, int], None]
"""Called with (configurations done, configurations in all)."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep made.

    results : the table, one row a configuration. reasons : why some were not run, and how many.
    """

    results: Path
    configurations: int
    not_run: int
    reasons: tuple[tuple[str, int], ...]
    wall_s: float

    def to_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "schema": 1,
            "results": str(self.results),
            "configurations": self.configurations,
            "not_run": self.not_run,
            "reasons": dict(self.reasons),
            "wall_s": round(self.wall_s, 3),
        }


def run(
    experiment: Experiment,
    out: Path,
    *,
    jobs: int = 1,
    executor: Executor | None = None,
    progress: Progress = lambda done, total: None,
) -> Sweep:
    """Run every configuration that is not finished, and write the table.

    Parameters
    ----------
    out : gets ``runs/`` (a folder each, as of ``moesim replay --out``), ``results.parquet``,
        ``sweep.json`` (what was asked) and ``host.json`` (what may differ).
    jobs : passes at once. executor : who runs them; processes of this machine unless said.

    Raises
    ------
    UsageError
        If a worker is lost or the disk is full; what had ended is kept, and running again goes on.
    """
    started = time.monotonic()
    runs = _made(out)
    total = len(experiment.configurations)
    outcomes: dict[int, Outcome] = {}
    for ended in (executor or local(jobs))(partial(passes, experiment.configurations), runs):
        outcomes |= {outcome.place: outcome for outcome in ended}
        progress(len(outcomes), total)
    made = rows(experiment.configurations, outcomes, runs)
    write(made, out / RESULTS)
    wall_s = time.monotonic() - started
    _write_json(out / SWEEP, _asked(experiment))
    _write_json(out / HOST, {"wall_s": round(wall_s, 3), "jobs": jobs, "cores": os.cpu_count()})
    reasons = Counter(row["not_run"] for row in made if row["not_run"])
    return Sweep(out / RESULTS, total, reasons.total(), tuple(sorted(reasons.items())), wall_s)


def _made(out: Path) -> Path:
    runs = out / RUNS
    _tidy(out)
    _tidy(runs)
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{runs}: cannot be written ({error.strerror or error})") from None
    return runs


def _tidy(folder: Path) -> None:
    """Remove what a process that was killed left half-written."""
    for path in folder.glob(".*.tmp-*"):
        writer = path.name.rpartition(".tmp-")[2].partition("-")[0]
        if writer.isdecimal() and not _is_alive(int(writer)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _asked(experiment: Experiment) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": experiment.name,
        "note": experiment.note,
        "moesim": __version__,
        "source_digest": source_digest(),
        "configurations": [{"grid": c.grid, **c.options} for c in experiment.configurations],
    }


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_text(json.dumps(value, indent=1) + "\n")
        beside.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        beside.unlink(missing_ok=True)
