"""What a figure is drawn from: the table of a sweep, checked, and what it names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from moesim.errors import UsageError
from moesim.result import REQUESTS, SCHEMA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "results.parquet"
_WANTED = ("grid", "not_run", "policy", "capacity", "trace_digest", "source_digest", "schema")


class Absent(Exception):  # noqa: N818 - no error: a figure says what it lacks, others are drawn
    """A figure cannot be drawn from these runs; why, in a line."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure, its data (one tidy table), and the rows of runs that it rests on (or none)."""

    figure: Figure
    data: pd.DataFrame
    rows: pd.DataFrame | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The table of a sweep. measured : folder of kept measurements, where there is one."""

    path: Path
    table: pd.DataFrame
    command: str
    digest: str
    measured: Path | None = None

    def grid(self, name: str) -> pd.DataFrame:
        """The finished runs of the grids ``name/CASE``, with the column ``case``.

        Raises
        ------
        Absent
            If there is none; with the first reason why, and the command that makes them.
        """
        parts = self.table["grid"].astype(str).str.partition("/")
        some = self.table[parts[0] == name].assign(case=parts[2][parts[0] == name])
        done = some[some["not_run"].isna()]
        if done.empty:
            reasons = some["not_run"].dropna().unique()
            why = f" ({reasons[0]})" if len(reasons) else ""
            raise Absent(f"no runs of the grid {name}/*{why}; make them: {self.command}")
        return done.reset_index(drop=True)

    def requests(self, folder: object) -> pd.DataFrame:
        """Times of each request of a run.

        Raises
        ------
        Absent
            If the run's folder is not beside the table.
        """
        path = self.path.parent / str(folder) / REQUESTS
        if not path.is_file():
            raise Absent(
                f"{folder}: not beside the table; this figure needs the folders of its runs: "
                f"{self.command}"
            )
        return pd.read_parquet(path)

    def traces(self, cases: Sequence[str] | None = None) -> dict[str, Path]:
        """Case -> the trace that its runs replayed.

        Raises
        ------
        Absent
            If a trace is not where the runs found it, or is another one.
        """
        from moesim.traces.samples import trace_path

        rows = self.grid("memory").drop_duplicates("case")
        found = {}
        for case, text, digest in zip(
            rows["case"], rows["trace"], rows["trace_digest"], strict=True
        ):
            if cases is None or case in cases:
                path = trace_path(str(text))
                _refuse_other(path, str(digest))
                found[str(case)] = path
        return found


def read(path: Path, command: str, measured: Path | None = None) -> Source:
    """The table of a sweep: its folder, or the Parquet file itself.

    Parameters
    ----------
    command : what makes it, for messages and the figures' metadata.

    Raises
    ------
    UsageError
        If it is not there, not one table of one schema and one source, or empty.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file}: no such table of runs; make it: {command}")
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read ({type(error).__name__}); {command}") from None
    _check(table, file, command)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Source(file, table, command, digest, measured)


def _check(table: pd.DataFrame, file: Path, command: str) -> None:
    lacking = [name for name in _WANTED if name not in table]
    if table.empty or (not lacking and table["not_run"].notna().all()):
        raise UsageError(f"{file}: holds no finished run; make some: {command}")
    if lacking:
        raise UsageError(f"{file}: lacks {', '.join(lacking)}; it is no table of `moesim sweep`")
    done = table[table["not_run"].isna()]
    for schema in done["schema"].unique():
        if schema != SCHEMA:
            raise UsageError(
                f"{file}: has runs of schema {schema:g}, this moesim reads {SCHEMA}; {command}"
            )
    if done["source_digest"].nunique() > 1:
        raise UsageError(f"{file}: mixes runs of different versions of moesim; {command}")
    mixed = done.groupby("grid")["trace_digest"].nunique()
    for grid in mixed[mixed > 1].index:
        raise UsageError(f"{file}: the grid {grid} mixes runs of different traces; {command}")


def _refuse_other(path: Path, digest: str) -> None:
    from moesim.traces.reader import Columns, TraceReader

    if not path.is_file():
        raise Absent(f"{path}: the trace is not there; put it back to draw this figure")
    with TraceReader(path, Columns.experts_only()) as reader:
        if reader.meta.digest != digest:
            raise Absent(f"{path}: is another trace than the one that was replayed")


# ---- numbers of runs -----------------------------------------------------------------------------


def numbers(rows: pd.DataFrame) -> pd.DataFrame:
    """The columns that most figures take, in units for people; one row a run."""
    out = pd.DataFrame({"case": rows["case"], "policy": rows["policy"]})
    out["setting"] = rows["set"].fillna("") if "set" in rows else ""
    out["capacity"] = rows["capacity"]
    out["memory"] = memory(rows)
    for name in ("ttft", "tpot"):
        out[f"{name}_ms"] = rows[f"{name}_ns.mean"].astype(float) / 1e6
    out["hit_rate"] = rows["hit_rate"].astype(float)
    out["foretold"] = rows["prefetch.named_and_demanded"] / rows["accesses"]
    out["bound"], out["lossy"] = rows["oracle"].astype(bool), rows["lossy"].astype(bool)
    tie = rows.get("against_best.tie")
    out["tie"] = False if tie is None else tie.fillna(False).astype(bool)
    return out


def memory(rows: pd.DataFrame) -> pd.Series[float]:
    """Of the cache: per cent of all experts where that is how it was asked for, else GiB."""
    if is_share(rows):
        return rows["capacity"].astype(str).str.rstrip("%").astype(float)
    return rows["capacity_bytes"].astype(float) / 2**30


def is_share(rows: pd.DataFrame) -> bool:
    """Whether memory was asked for in per cent."""
    return bool(rows["capacity"].astype(str).str.endswith("%").all())


def at_memory(rows: pd.DataFrame, wanted: float = 30.0) -> pd.DataFrame:
    """The runs of the capacity nearest to one."""
    sizes = memory(rows)
    target = wanted if is_share(rows) else float(sizes.median())
    nearest = sizes.iloc[int((sizes - target).abs().to_numpy().argmin())]
    return rows[sizes == nearest].reset_index(drop=True)


def caveats(rows: pd.DataFrame | None) -> list[str]:
    """What a figure must say of its runs: stand-ins, borrowed costs, bounds, lossy policies."""
    if rows is None:
        return []
    told = []
    for names, text in (
        (_values(rows, "costs"), "Bytes and times (--costs) of {}, routing of the traces."),
        (_stand_ins(rows), "Stand-ins for what traces lack (--allow): {}."),
        (
            _where(rows, "oracle"),
            "Bounds, for they know the future (of loads; the host may compute instead): {}.",
        ),
        (_where(rows, "lossy"), "Lossy, so not ranked with the others: {}; time is fixed-path."),
    ):
        if names:
            told.append(text.format(", ".join(names)))
    if "hardware_source" in rows:
        machines = sorted(set(zip(rows["hardware_name"], rows["hardware_source"], strict=True)))
        told.append(
            "Simulated: " + ", ".join(f"{name} ({source})" for name, source in machines) + "."
        )
    return told


def _values(rows: pd.DataFrame, column: str) -> list[str]:
    return sorted(rows[column].dropna().astype(str).unique()) if column in rows else []


def _stand_ins(rows: pd.DataFrame) -> list[str]:
    """Every one of any run; a table has a run's in one text, with commas."""
    return sorted({one for text in _values(rows, "allowed") for one in text.split(",") if one})


def _where(rows: pd.DataFrame, column: str) -> list[str]:
    return sorted(rows[rows[column].astype(bool)]["policy"].unique())
