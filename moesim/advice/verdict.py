"""From a curve to a recommendation: the knee, the least memory that does, or what is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moesim.advice.curve import Point
from moesim.advice.question import Target

WORTH = 0.05
"""Memory that makes decoding no more than this share quicker is not worth having."""
TURNS = 10
WIDEST = 1024.0
"""A link this much faster is as good as one without limit."""


def meets(point: Point, targets: Sequence[Target], side: str) -> bool:
    """Whether all targets are met at one side of the band: ``high`` is surely, ``low`` perhaps."""
    values = [(point.of(t.metric, t.statistic, side), t.most_ns) for t in targets]
    return all(value is None or value <= most_ns for value, most_ns in values)


def recommended(points: Sequence[Point], targets: Sequence[Target]) -> Point | None:
    """The setting to use: the least memory that surely meets the targets, or else that is expected
    to; without targets the least memory within 5 % of the quickest. None: no point meets them."""
    if not targets:
        return frugal(points)
    for side in ("high", "expected"):
        found = next((p for p in points if meets(p, targets, side)), None)
        if found is not None:
            return found
    return None


def frugal(points: Sequence[Point]) -> Point:
    """The least memory whose mean TPOT is within 5 % of the least on the curve."""
    paces = [pace(point) for point in points]
    return next(p for p in points if pace(p) <= (1 + WORTH) * min(paces))


def pace(point: Point) -> float:
    """Expected mean TPOT in ns; TTFT where requests have one token."""
    tpot = point.of("tpot", "mean", "expected")
    return float(point.of("ttft", "mean", "expected") or 0.0) if tpot is None else tpot


def knee(points: Sequence[Point]) -> Point | None:
    """Where more memory begins to help less: the point farthest below the chord of the curve
    (Satopaa et al., 2011, "Finding a kneedle in a haystack", without smoothing).

    None where the curve has no bend: fewer than three points, or none lies below the chord.
    """
    if len(points) < 3:
        return None
    first, last = points[0], points[-1]
    wide = last.capacity_bytes - first.capacity_bytes
    tall = pace(first) - pace(last)
    if wide <= 0 or tall <= 0:
        return None

    def below(point: Point) -> float:
        along = (point.capacity_bytes - first.capacity_bytes) / wide
        return (pace(first) - pace(point)) / tall - along

    found = max(points, key=below)
    return found if below(found) > 0 else None


def least_factor(does: Callable[[float], bool], most: float = WIDEST) -> float | None:
    """The least factor from 1 to ``most`` with which ``does`` holds, to a few per cent; None: none.

    Whatever is returned, ``does`` has been seen to hold of it. That it is the least rests on
    ``does`` holding of all larger factors as well.
    """
    if does(1.0):
        return 1.0
    if not does(most):
        return None
    low, high = 1.0, most
    for _ in range(TURNS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if does(middle) else (middle, high)
    return high
