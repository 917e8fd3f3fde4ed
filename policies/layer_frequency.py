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


def worth(uses: IntArray, until: IntArray, count: int) -> IntArray:
    """Kernel: uses times how soon the layer comes, 1 for the present one to ``count`` for the next.

    until : layer events until each expert's layer comes again. count : of layers.
    """
    return uses * (count + 1 - until)


@dataclass
class LayerFrequency(KeepSeat):
    """Evicts what was used least and is needed latest in the order of layers."""

    name = "layer-frequency"
    source = "arXiv 2308.14352"
    cost = "O(n); O(R) an eviction"
    version = 2

    def begin(self, world: World) -> None:
        """Nothing was used."""
        super().begin(world)
        self.world = world
        self.uses = np.zeros(world.size, np.int64)
        self.layer = 0

    def gate(self, gate: Gate) -> None:
        """One use each."""
        self.layer = gate.layer
        self.uses[gate.experts] = np.minimum(self.uses[gate.experts] + 1, MOST)

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """As seen from the layer being served."""
        until = self.world.until(experts // self.world.experts, self.layer)
        return worth(self.uses[experts], until, self.world.layers)
