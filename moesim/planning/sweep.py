"""The update period: raise the update rate until latency rises, and step back (section 3.4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tried:
    """A period of the sweep, and what a uniform allocation gave with it."""

    period: int
    latency_ns: float
    quality: float


def periods_to(most: int) -> tuple[int, ...]:
    """Powers of two from the largest up to ``most`` down to 1: the rate doubles at each."""
    return tuple(1 << n for n in range(max(1, most).bit_length() - 1, -1, -1))


def knee(tried: Sequence[Tried], tolerance: float) -> int:
    """The shortest period before latency rises.

    ``tried`` begins with the lowest rate. The plateau is the lowest latency so far; the first
    period whose latency exceeds it by more than ``tolerance`` (a share) ends the sweep, and the one
    before it is taken. Where latency never rises (swaps that compute does not wait for) that is the
    last one.
    """
    plateau, chosen = tried[0].latency_ns, tried[0].period
    for one in tried:
        if one.latency_ns > plateau * (1 + tolerance):
            break
        plateau, chosen = min(plateau, one.latency_ns), one.period
    return chosen
