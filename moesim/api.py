"""moesim from Python: what the command line does, as function calls.

>>> import moesim
>>> r = moesim.replay("demo", policy="finemoe", capacity=0.25, limit=2)
>>> round(r.summary["hit_rate"], 2)
0.54
>>> r.requests  # a DataFrame, one row a request
>>> r.plot()  # matplotlib

Options are those of ``moesim replay`` with underscores; a list asks for several. Everything else is
``moesim.call("advise", trace="demo", slo="tpot=50ms")``: the object that the command prints with
``--json``. ``call`` catches what is printed for the whole process, so call from one thread at a
time; nothing here promises to be safe in several.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import MoesimError, UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

One = str | int | float | bool | Path | None
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Replay:
    """The answer of a replay.

    Attributes
    ----------
    answer : the object that ``moesim replay --json`` prints (``moesim/README.md`` defines each
        number).
    folder : where each run has a folder of its own.
    """

    answer: Mapping[str, Any]
    folder: Path

    @property
    def runs(self) -> Sequence[Summary]:
        """The summary of each run, in the order asked for; of those not run the reason."""
        runs: Sequence[Summary] = self.answer["runs"]
        return runs

    @property
    def summary(self) -> Summary:
        """The summary of the only run.

        Raises
        ------
        UsageError
            If there are several; see ``runs`` and ``table``.
        """
        if len(self.runs) != 1:
            raise UsageError(f"summary: there are {len(self.runs)} runs; see .runs or .table")
        return self.runs[0]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a run: every number of its summary, with dots where it lies deeper."""
        import pandas as pd

        return pd.json_normalize([dict(run) for run in self._ran])

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row a request and run: ``policy``, ``capacity`` and what ``requests.parquet`` has."""
        import pandas as pd

        tables = []
        for run in self._ran:
            table = pd.read_parquet(Path(run["run_dir"]) / "requests.parquet")
            table.insert(0, "policy", run["policy"])
            table.insert(1, "capacity", run["capacity"])
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    @property
    def _ran(self) -> list[Summary]:
        return [run for run in self.runs if "not_run" not in run]

    def plot(self) -> Figure:
        """Where the time of an output token goes, a bar a run; bounds and lossy runs are named.

        Time before the first request and between arrivals is no part of a bar.
        """
        from moesim.analysis.bars import time_bars

        return time_bars(self._ran)


def replay(
    trace: str | Path,
    policy: str | Sequence[str] = "lru",
    capacity: One | Sequence[One] = "25%",
    **options: One | Sequence[One],
) -> Replay:
    """Replay a trace under one or more policies and capacities, in one pass.

    Parameters
    ----------
    trace : a trace file, or the name of a shipped sample.
    policy : names, or ``module:Class``; "all" takes every preset.
    capacity : "24GiB", "25%", 0.25 (a share of all experts), 192 (experts in all), "8/layer".
    options : the other options of ``moesim replay``, as ``costs="mixtral-8x7b"``,
        ``set=["prefetch=next-gate"]``, ``arrivals="poisson:2"``. Runs lie in a temporary folder as
        long as the answer lives, unless ``out`` names one.

    Raises
    ------
    MoesimError
        For a mistake in what is asked, the trace or a policy.
    """
    from moesim.ask.replays import request_of
    from moesim.replays import replay as run

    out = options.pop("out", None)
    folder = Path(tempfile.mkdtemp(prefix="moesim-") if out is None else str(out))
    asked = {"trace": trace, "policy": policy, "capacity": capacity, **options, "out": folder}
    try:
        made = Replay(run(request_of(asked)), folder)
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if out is None:
        weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
    return made


def call(*words: str, **options: One | Sequence[One]) -> Any:
    """Run any command of ``moesim``; what it prints with ``--json``, or its text without.

    ``call("trace", "check", "my.parquet")``, ``call("advise", trace="demo", slo="tpot=50ms")``.

    Raises
    ------
    MoesimError
        With the line that the command would print.
    """
    from moesim.cli import parser

    line = [*words, *_flags(options)]
    said, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(said):
        try:
            with redirect_stderr(complained):
                args = parser().parse_args(line)
        except SystemExit as ended:
            if not ended.code:  # --help, --version
                return said.getvalue()
            raise UsageError(_told(complained.getvalue())) from None
        if hasattr(args, "json"):
            args.json = True
        code = args.func(args)
    text = said.getvalue()
    if code not in (0, 1):
        raise MoesimError(f"{' '.join(words)}: ended with code {code}")
    return json.loads(text) if getattr(args, "json", False) is True else text


def _flags(options: Mapping[str, One | Sequence[One]]) -> list[str]:
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is True:
                flags.append(flag)
            elif one is not None and one is not False:
                flags.append(f"{flag}={one}")
    return flags


def _told(text: str) -> str:
    """The mistake in what an argument parser says."""
    return text.strip().removeprefix("moesim: error: ")
