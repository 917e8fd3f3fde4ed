"""How a policy is told what a planner decides: the names of its parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Knobs:
    """Seat parameters (``seat.parameter``); "" where the policy has none.

    period : inputs between updates. swaps : most swaps of a step, 0 for no limit.
    """

    period: str = ""
    swaps: str = ""
    swaps_default: int = 0
    spare: str = "none"
    rehearsed: bool = False
    """Whether ``moesim.planning.rehearse`` knows it."""


_KNOBS = {"swapmoe": Knobs("prefetch.period", "prefetch.swaps", 0, "layer", True)}


def knobs_of(policy: str) -> Knobs:
    """The knobs of a policy by name; one without any is planned with what it has."""
    return _KNOBS.get(policy, Knobs())
