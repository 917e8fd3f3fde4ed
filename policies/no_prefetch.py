"""Demand only."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.protocol import PrefetchSeat


@dataclass
class NoPrefetch(PrefetchSeat):
    """Plans nothing."""

    name = "none"
    source = "-"
    cost = "O(1)"
