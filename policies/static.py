"""A fixed resident set: the experts used most on a calibration trace.

A missing expert is staged for one use and does not stay, unless it is worth more than a resident,
which happens only until the set is complete. Calibrated on the replayed trace itself it is a bound
(the best fixed set in hindsight), and is marked as one.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.protocol import KeepSeat, World
from moesim.types import Needs


@dataclass
class Static(KeepSeat):
    """Keeps what was used most on the calibration trace."""

    name = "static"
    source = "arXiv 2402.07033"
    cost = "O(log R) an eviction"
    needs = Needs.CALIBRATION
    bypass = True

    def begin(self, world: World) -> None:
        """An expert is worth its uses."""
        assert world.calibration is not None
        self.score = world.calibration.copy()
