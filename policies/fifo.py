"""First in, first out: the age of a copy counts from the load that brought it."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.policies.lru import LRU, touch
from moesim.types import Gate, Status


@dataclass
class FIFO(LRU):
    """Evicts what was loaded longest ago."""

    name = "fifo"
    source = "Belady, 1966"
    cost = "O(n); O(1) an eviction"

    def gate(self, gate: Gate) -> None:
        """Only what must be loaded is stamped."""
        touch(self.score, self.clock, gate.experts[gate.status == Status.MISS])
