"""The table of a sweep: one row a configuration, one column a number; made from run folders alone.

Equal experiments give equal bytes, whoever ran them, in whatever order, and however often they were
stopped.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim import ties
from moesim.errors import UsageError
from moesim.result import read_run, request_times
from moesim.sweeps.execute import Outcome
from moesim.sweeps.experiment import Configuration

Row = dict[str, Any]
FACTS = {
    "trace_digest": "trace",
    "source_digest": "source_digest",
    "schema": "schema",
}
"""Column -> key of the manifest: what rows of one table must agree on, for those who draw it."""
TEXTS = ("not_run", "folder")
"""Columns that are texts even where they are empty."""


def rows(
    configurations: Sequence[Configuration], outcomes: Mapping[int, Outcome], runs: Path
) -> list[Row]:
    """A row for each configuration, in the order of the experiment.

    ``grid``, the options as given, ``not_run`` (the reason, or nothing), ``folder`` of the run,
    what its manifest says of machine and trace, then its summary, with dots where it lies deeper.
    """
    made = []
    for place, configuration in enumerate(configurations):
        outcome = outcomes[place]
        row: Row = {"grid": configuration.grid, **configuration.options}
        row |= {
            "not_run": outcome.reason or None,
            "folder": f"{runs.name}/{outcome.run_id}" if outcome.run_id else None,
        }
        if outcome.run_id:
            manifest, summary = read_run(runs / outcome.run_id)
            row |= {column: manifest[key] for column, key in FACTS.items()}
            row |= {"model": manifest["model"]["name"]}
            row |= {"hardware_name": manifest["hardware"]["name"]}
            row |= {"hardware_source": manifest["hardware"]["source"]}
            row |= {k: v for k, v in _flat(summary) if k not in row}
        made.append(row)
    _mark_ties(configurations, made, runs)
    return made


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        elif key == "interval":
            yield from zip((f"{before}low", f"{before}high"), value, strict=True)
        elif isinstance(value, list) and not (value and type(value[0]) is int):
            yield f"{before}{key}", ",".join(map(str, value))
        else:
            yield f"{before}{key}", value


def _mark_ties(configurations: Sequence[Configuration], made: Sequence[Row], runs: Path) -> None:
    """How each run differs from the quickest of its like: another policy, all else equal."""
    alike: dict[object, list[Row]] = defaultdict(list)
    for configuration, row in zip(configurations, made, strict=True):
        if row["not_run"] is None and not (row["oracle"] or row["lossy"]):
            alike[configuration.grid, configuration.rest, row["capacity"]].append(row)
    for some in alike.values():
        marked = [_told(row) for row in some]
        times = [_times(runs.parent / row["folder"]) for row in some]
        ties.mark(marked, times, int(some[0].get("seed", 0)))
        for row, mark in zip(some, marked, strict=True):
            row |= dict(_flat({"against_best": mark.get("against_best", {})}))


def _told(row: Row) -> dict[str, Any]:
    """What ``ties`` reads of a summary."""
    names = ("policy", "capacity", "oracle", "lossy")
    return {**{name: row[name] for name in names}, "tpot_ns": {"mean": row["tpot_ns.mean"]}}


def _times(folder: Path) -> Any:
    times = sorted(request_times(folder))
    return np.array([np.nan if tpot is None else tpot for _, tpot in times], np.float64)


def write(made: Sequence[Row], path: Path) -> None:
    """Write rows as Parquet, beside and then renamed; ``pandas.read_parquet(path)`` reads them.

    Raises
    ------
    UsageError
        Naming the file, if it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in made for name in row))
    columns = {name: _column(name, [row.get(name) for row in made]) for name in names}
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        pq.write_table(pa.table(columns), beside, compression="zstd")
        beside.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        beside.unlink(missing_ok=True)


def _column(name: str, values: Iterable[Any]) -> Any:
    """Numbers where all are numbers, else texts: an option may be 25 here and "25%" there."""
    import pyarrow as pa

    values = list(values)
    if all(value is None for value in values):
        return pa.array(values, pa.string() if name in TEXTS else None)
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1:
        return pa.array([None if value is None else str(value) for value in values])
    return pa.array(values)
