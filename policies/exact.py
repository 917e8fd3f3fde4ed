"""Routing as the model chose it."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.protocol import RouteSeat


@dataclass
class Exact(RouteSeat):
    """Bends nothing."""

    name = "exact"
    source = "-"
    cost = "O(1)"
