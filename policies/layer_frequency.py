"""EdgeMoE's eviction (arXiv 2308.14352): by use and by layer. Lossless.

EdgeMoE keeps what is used often and what the order of layers needs soon. Its formula was not to be
had; here it is use times how near the layer is:

    score = uses * (L + 1 - layers until the expert's layer is served again),

so that just after a layer was served its experts weigh least, and those of the next layer most. An
expert counts once for each layer event that demanded it; counts survive eviction and do not fade.
Equal scores go to the lowest id, as the host has it. Needs nothing of a trace.

EdgeMoE also gives each expert its own bit width and loads what is used more in more bits. That
changes the model; it is the matter of the seats of precision, and not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.policies.lfu import MOST
from moesim.protocol import KeepSeat, World
from moesim.types import Gate, IntArray


def worth(uses: IntArray, layers: IntArray, now: int, count: int) -> IntArray:
    """Kernel: uses times how soon the layer comes, 1 for the present one to ``count`` for the next.

    layers : of each expert. now : the layer being served.
    """
    until = (layers - now - 1) % count + 1
    return uses * (count + 1 - until)


@dataclass
class LayerFrequency(KeepSeat):
    """Evicts what was used least and is needed latest in the order of layers."""

    name = "layer-frequency"
    source = "arXiv 2308.14352"
    cost = "O(n); O(R) an eviction"

    def begin(self, world: World) -> None:
        """Nothing was used."""
        super().begin(world)
        self.layers, self.experts = world.layers, world.experts
        self.uses = np.zeros(world.size, np.int64)
        self.layer = 0

    def gate(self, gate: Gate) -> None:
        """One use each."""
        self.layer = gate.layer
        self.uses[gate.experts] = np.minimum(self.uses[gate.experts] + 1, MOST)

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """As seen from the layer being served."""
        return worth(self.uses[experts], experts // self.experts, self.layer, self.layers)
