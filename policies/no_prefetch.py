"""Demand only."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.policy import PrefetchSeat


@dataclass
class NoPrefetch(PrefetchSeat):
    """Plans nothing."""

    name = "none"
