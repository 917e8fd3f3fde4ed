"""How well requests were served. Each number is defined in ``moesim/README.md``."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from moesim.result import percentiles
from moesim.serve.options import Slo
from moesim.tally import RequestTimes, Tally
from moesim.workload import Work

KEPT = 0.9
"""A system that finishes a smaller share of what arrives is overloaded."""
FEWEST = 10
"""Arrivals from which on that can be said."""


def counted(tally: Tally, warm: int) -> list[RequestTimes]:
    """The requests without the first ``warm`` to arrive."""
    return sorted(tally.requests, key=lambda r: r.arrival_ns)[warm:] if warm else tally.requests


def report(
    tally: Tally, unserved: Sequence[Work], slo: Slo, warm: int, offered_per_s: float | None
) -> dict[str, Any]:
    """The ``serving`` part of a summary, plain JSON values.

    unserved : who had arrived when the run ended, and nothing had been computed of.
    """
    end_ns = tally.times.total()
    finished = [r for r in tally.requests if r.end_ns >= 0]
    waiting = [work.arrival_ns or 0 for work in unserved]
    mine = counted(tally, warm)
    whole = [r for r in mine if r.end_ns >= 0]
    good = [r for r in whole if _keeps(r, slo)]
    overloaded, why = _verdict(tally.requests, waiting)
    return {
        "arrived": len(tally.requests) + len(waiting),
        "finished": len(finished),
        "running": len(tally.requests) - len(finished),
        "waiting": len(waiting),
        "offered_per_s": offered_per_s,
        "served_per_s": len(finished) * 10**9 / end_ns if end_ns else None,
        "mean_in_system": _in_system_ns(tally.requests, waiting, end_ns) / end_ns
        if end_ns
        else None,
        "queue_ns": percentiles([r.queue_ns for r in mine]),
        "end_to_end_ns": percentiles([r.end_to_end_ns or 0 for r in whole]),
        "counted": len(mine),
        "good": len(good),
        "good_share": len(good) / (len(mine) + len(waiting)) if mine or waiting else None,
        "goodput_per_s": _per_s(good, whole),
        "overloaded": overloaded,
        "why": why,
    }


def _per_s(good: Sequence[RequestTimes], whole: Sequence[RequestTimes]) -> float | None:
    """Good requests over the time from the first counted arrival to the last counted end."""
    if not whole:
        return None
    span = max(r.end_ns for r in whole) - min(r.arrival_ns for r in whole)
    return len(good) * 10**9 / span if span else None


def _keeps(times: RequestTimes, slo: Slo) -> bool:
    asked = (
        (slo.ttft_ns, times.ttft_ns),
        (slo.tpot_ns, times.tpot_ns),
        (slo.end_to_end_ns, times.end_to_end_ns),
    )
    return all(limit is None or took is None or took <= limit for limit, took in asked)


def _in_system_ns(requests: Sequence[RequestTimes], waiting: Sequence[int], end_ns: int) -> int:
    """The sum of the times in the system, which is the integral of the number in it."""
    inside = sum((r.end_ns if r.end_ns >= 0 else end_ns) - r.arrival_ns for r in requests)
    return inside + sum(end_ns - arrival for arrival in waiting)


def _verdict(requests: Sequence[RequestTimes], waiting: Sequence[int]) -> tuple[bool | None, str]:
    """Whether requests arrive faster than they are served, and by what sign.

    Looked at is the second half of the time in which requests arrive, when the system has filled.
    """
    arrivals = sorted([*(r.arrival_ns for r in requests), *waiting])
    if not arrivals or arrivals[-1] == arrivals[0]:
        return None, "all requests arrived at once"
    last = arrivals[-1]
    half = (arrivals[0] + last) // 2
    came = len(arrivals) - bisect_right(arrivals, half)
    if came < FEWEST:
        return None, f"{came} arrivals in the second half of the time are too few to say"
    ends = sorted(r.end_ns for r in requests if r.end_ns >= 0)
    went = bisect_right(ends, last) - bisect_right(ends, half)
    begins = sorted(r.begin_ns for r in requests)
    queued = bisect_left(arrivals, last) - bisect_left(begins, last)
    overloaded = went < KEPT * came and queued > 0
    return overloaded, (
        f"in the second half of the time {came} requests arrived and {went} ended; "
        f"{queued} waited when the last arrived"
    )
