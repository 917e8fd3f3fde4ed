"""Every missing expert is copied to the device."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.protocol import MissSeat


@dataclass
class Fetch(MissSeat):
    """Fetches."""

    name = "fetch"
    source = "-"
    cost = "O(1)"
