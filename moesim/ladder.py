"""The oracle ladder: how far a run is from what hindsight allows (``moesim/README.md``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RUNGS = ("static", "min-bypass", "min", "hindsight")
"""Rungs that are runs of presets, at the capacity of the run that is compared."""

ROOF = "all-resident"
"""The rung above them: every expert resident from the start."""

Summary = dict[str, Any]


def climb(
    runs: Sequence[Summary], rungs: Mapping[tuple[str, str], Summary], roof: Summary, load_ns: int
) -> None:
    """Attach to each run its ladder.

    rungs : (rung, capacity as typed) -> summary. load_ns : the quickest load of an expert.
    """
    for run in runs:
        at = {name: rungs[name, run["capacity"]] for name in RUNGS}
        # Prefetching what is known may lose to not prefetching it, on a saturated link.
        at["hindsight"] = min(at["hindsight"], at["min-bypass"], key=lambda r: int(r["time_ns"]))
        ladder = {name: _rung(rung, run) for name, rung in at.items()}
        ladder[ROOF] = _rung(roof, run)
        if _must_load(run):
            computing = roof["times_ns"]["experts"] + roof["times_ns"]["dense"]
            bound = max(computing, at["min-bypass"]["misses"] * load_ns)
            ladder["bound"] = {"time_ns": bound, "of_run": _ratio(bound, run["time_ns"])}
        run["ladder"] = ladder


def _rung(rung: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    return {
        "hits": rung["hits"],
        "misses": rung["misses"],
        "time_ns": rung["time_ns"],
        "of_run": _ratio(rung["time_ns"], run["time_ns"]),
    }


def _must_load(run: dict[str, Any]) -> bool:
    """Whether the bound on time holds: every use needs a load, and none was free at the start.

    Prefetching cannot lower the number of loads (delay each to its demand, and the same residents
    serve), so the loads of MIN with bypass occupy the link at least.
    """
    fetched = not run["lossy"] and not run["served"]["cpu"] and not run["served"]["skip"]
    return fetched and run["initial"] == "cold" and bool(run["sizes_equal"])


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
