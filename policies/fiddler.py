"""Fiddler's crossover (arXiv 2402.07033, section 3.2): copy, or compute where the weights are.

A missing expert with s tokens runs on the host if that takes no longer than the copy and the device
together. The times are those of the cost table; Fiddler's code uses constants of its testbed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesim.protocol import CacheView, MissSeat, World
from moesim.types import ExpertId, Gate, Needs, Serve, Status


@dataclass
class Fiddler(MissSeat):
    """Takes the quicker of the two for each missing expert, alone."""

    name = "fiddler"
    source = "arXiv 2402.07033, section 3.2"
    cost = "O(n)"
    needs = Needs.COSTS

    def begin(self, world: World) -> None:
        """Take the cost table."""
        assert world.costs is not None
        self.costs = world.costs
        self.expert_bytes = world.expert_bytes

    def serve(self, gate: Gate, cache: CacheView) -> Mapping[ExpertId, Serve]:
        """The host, where it is no slower."""
        load_ns = self.costs.load_ns(int(self.expert_bytes[0, gate.layer]))
        served: dict[ExpertId, Serve] = {}
        for row in (gate.status == Status.MISS).nonzero()[0].tolist():
            tokens = int(gate.tokens[row])
            device_ns = load_ns + self.costs.expert_ns(tokens, gate.layer)
            if self.costs.cpu_expert_ns(tokens, gate.layer) <= device_ns:
                served[int(gate.experts[row])] = Serve.CPU
        return served
