"""Latency against memory: the candidates at a few sizes, then the best of them along a curve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moesim.advice.question import STATISTICS
from moesim.advice.trust import Trust
from moesim.errors import NotRunError
from moesim.profile import HardwareProfile
from moesim.replays import Progress, Request, replay

SHARES = (5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 90, 100)
"""Per cent of all experts: the points of the curve."""
TRIAL_SHARES = (10, 40)
"""Where candidates are compared before the curve is drawn."""
TRIAL_REQUESTS = 8
FLOOR = "lru"
"""Always on the curve: what a policy must beat."""

Summary = dict[str, Any]
Band = dict[str, dict[str, float | None]]
"""``low``, ``expected``, ``high`` -> statistic -> ns."""


@dataclass(frozen=True, slots=True)
class Point:
    """The quickest policy at one size of fast memory.

    share : of all experts. ties : other policies that cannot be told from it. tpot, ttft : what is
    expected, and from where to where it may lie.
    """

    capacity: str
    capacity_bytes: int
    share: float
    policy: str
    ties: tuple[str, ...]
    tpot: Band
    ttft: Band
    tokens_per_s: float | None
    stall_share: float

    def of(self, metric: str, statistic: str, side: str) -> float | None:
        """One number of the band, in ns; ``side`` is low, expected or high."""
        band: Band = getattr(self, metric)
        return band[side][statistic]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "ties": list(self.ties)}


def sizes(
    expert_bytes: int, most_bytes: int, shares: Iterable[int], least_bytes: int = 0
) -> list[str]:
    """Capacities from ``least_bytes`` to ``most_bytes``, as typed; the last takes all of it."""
    most_bytes, least = min(most_bytes, expert_bytes), 100 * least_bytes
    wanted = (s for s in shares if least <= s * expert_bytes < 100 * most_bytes)
    below = [f"{share}%" for share in wanted]
    return [*below, "100%" if most_bytes >= expert_bytes else f"{most_bytes}B"]


def finalists(
    request: Request, policies: Sequence[str], capacities: Sequence[str], most: int, tick: Progress
) -> tuple[list[str], list[Summary]]:
    """The quickest candidates at any of some sizes, LRU among them; and what was not run."""
    limit = min(request.limit or TRIAL_REQUESTS, TRIAL_REQUESTS)
    trial = replace(request, policies=policies, capacities=capacities, limit=limit)
    answer = replay(trial, tick)
    ranked = _by_capacity(usable(answer["runs"]))
    order = [run["policy"] for place in zip(*ranked, strict=False) for run in place]
    if not order:
        raise NotRunError("--policy: none of them could be used (bounds and lossy ones are not)")
    chosen = list(dict.fromkeys(order))[:most]
    if FLOOR in policies and FLOOR not in chosen:
        chosen.append(FLOOR)
    return chosen, [run for run in answer["runs"] if "not_run" in run]


def usable(runs: Iterable[Summary]) -> list[Summary]:
    """Runs of policies that could be used as they are: no bounds, nothing lossy."""
    ran = (run for run in runs if "not_run" not in run)
    return [run for run in ran if not run["oracle"] and not run["lossy"]]


def _by_capacity(runs: Sequence[Summary]) -> list[list[Summary]]:
    """Runs of each capacity, the quickest first."""
    names = dict.fromkeys(run["capacity"] for run in runs)
    return [sorted((r for r in runs if r["capacity"] == name), key=_pace) for name in names]


def _pace(run: Summary) -> float:
    """Mean TPOT, in ns; of requests of one token, TTFT."""
    mean = run["tpot_ns"]["mean"]
    return float(run["ttft_ns"]["mean"] if mean is None else mean)


def curve(
    request: Request,
    policies: Sequence[str],
    capacities: Sequence[str],
    others: Sequence[HardwareProfile],
    trust: Trust,
    tick: Progress,
) -> list[Point]:
    """The quickest policy at each size, with its band; ``others`` are what the machine may be."""
    asked = replace(request, policies=policies, capacities=capacities)
    answer = replay(asked, tick)
    whole = answer["diagnostics"][0]["all_expert_bytes"]
    ranked = _by_capacity(usable(answer["runs"]))
    # Only of the quickest the band is told.
    asked = replace(asked, policies=tuple(dict.fromkeys(runs[0]["policy"] for runs in ranked)))
    either = [_by_name(replay(replace(asked, hardware=h), tick)["runs"]) for h in others]
    points = []
    for runs in ranked:
        best = runs[0]
        ties = tuple(r["policy"] for r in runs[1:] if r.get("against_best", {}).get("tie"))
        name = (best["policy"], best["capacity"])
        same = [best, *(runs_of[name] for runs_of in either)]
        points.append(_point(best, ties, same, whole, trust))
    return sorted(points, key=lambda point: point.capacity_bytes)


def _by_name(runs: Iterable[Summary]) -> dict[tuple[str, str], Summary]:
    return {(run["policy"], run["capacity"]): run for run in runs if "not_run" not in run}


def _point(
    best: Summary, ties: tuple[str, ...], same: Sequence[Summary], whole: int, trust: Trust
) -> Point:
    return Point(
        capacity=best["capacity"],
        capacity_bytes=best["capacity_bytes"],
        share=best["capacity_bytes"] / whole,
        policy=best["policy"],
        ties=ties,
        tpot=_band([run["tpot_ns"] for run in same], trust.tpot),
        ttft=_band([run["ttft_ns"] for run in same], trust.ttft),
        tokens_per_s=best["tokens_per_s"],
        stall_share=best["stall_ns"] / best["time_ns"] if best["time_ns"] else 0.0,
    )


def _band(times: Sequence[dict[str, float | None]], error: float) -> Band:
    """The first of ``times``, and how low and high any of them may be.

    A simulated time is off by ``error``: it is (1 + e) of the true one, with \\|e\\| <= error.
    """
    known = {s: [v for t in times if (v := t[s]) is not None] for s in STATISTICS}
    return {
        "low": {s: min(v) / (1 + error) if v else None for s, v in known.items()},
        "expected": {s: v[0] if v else None for s, v in known.items()},
        "high": {s: max(v) / (1 - error) if v else None for s, v in known.items()},
    }
