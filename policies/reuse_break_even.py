"""Copy an expert only if it will be used often enough: r*. Lossless.

"Seconds, Not Blocks" (a draft of 2026): a copy pays only if the expert is used more than

    r* = load / (host time - device time)

times while it is resident. Fiddler (arXiv 2402.07033) is the special case that looks at the present
use alone. Here a missing expert with s tokens is copied if

    (host(s) - device(s)) + R * (host(1) - device(1)) > load,

that is, if what the present use and R later ones of one token each gain exceeds the copy; with
``stay=0`` R is 0 and this is Fiddler's rule to the tie. Needs the cost table.

The source says nothing of how to expect R. Here R = rate * stay:

- rate is an expert's uses in a pass: its count of earlier layer events that demanded it, fading by
  ``gamma`` at each event of its layer, times 1 - gamma. The present use does not count: whatever is
  asked for is used now, so with it every rate would be too high.
- stay is how many passes a copy remains, by Little's law: slots over copies a pass, as counted so
  far (halved together when ``WINDOW`` layer events have passed, so that the newest half
  counts). While few are copied the stay is long and more are worth it; when many are, it falls. The
  cache fills first: while nothing was copied yet the stay is the passes so far times the slots.
  ``stay`` above 0 sets it.

Rates are integers in 1/16384 and the comparison multiplies out, so nothing is rounded after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.policies.prices import Prices
from moesim.protocol import CacheView, MissSeat, World
from moesim.types import PROBABILITY_ONE, ExpertId, Gate, Needs, Serve, Status

ONE = PROBABILITY_ONE
WINDOW = 4096
"""Layer events after which what was counted weighs half."""


def pays(now_ns: int, later_ns: int, load_ns: int, rate: int, stay: tuple[int, int]) -> bool:
    """Kernel: whether a copy gains more than it takes.

    now_ns, later_ns : what the present use, and each later one, gains on the device.
    rate : uses a pass in 1/16384. stay : passes, as a fraction.
    """
    passes, of = stay
    return (load_ns - now_ns) * ONE * of < rate * passes * later_ns


@dataclass
class ReuseBreakEven(MissSeat):
    """Copies what is expected to be used more often than break-even, computes the rest on the host.

    gamma : what remains of an expert's count at the next event of its layer, above 0 to 0.9995.
    stay : passes that a copy is expected to stay; 0 is Fiddler's rule; -1 counts copies.
    """

    name = "reuse-break-even"
    source = "Seconds, Not Blocks (draft, 2026)"
    cost = "O(n)"
    needs = Needs.COSTS
    gamma: float = 0.95
    stay: int = -1

    def __post_init__(self) -> None:
        """Numbers in their range."""
        if not 0 < self.gamma <= 0.9995:
            raise UsageError(f"miss.gamma={self.gamma}: must lie above 0 and at most 0.9995")
        if self.stay < -1:
            raise UsageError(f"miss.stay={self.stay}: must be -1 (counted), 0 or more")

    def begin(self, world: World) -> None:
        """Nothing was used or copied."""
        self.prices = Prices(world)
        self.layers, self.experts = world.layers, world.experts
        self.counts = np.zeros(world.size, np.int64)
        self.factor = round(self.gamma * ONE)
        held = [world.slots(layer) for layer in range(world.layers)]
        self.slots = sum(held) if world.scope == "layer" else max(held)
        self.events = self.copies = 0

    def serve(self, gate: Gate, cache: CacheView) -> Mapping[ExpertId, Serve]:
        """The host, unless a copy pays."""
        self._fade(gate.layer)
        layer = gate.layer
        load = self.prices.load(layer)
        later = self.prices.host(1, layer) - self.prices.device(1, layer)
        served: dict[ExpertId, Serve] = {}
        for row in (gate.status == Status.MISS).nonzero()[0].tolist():
            expert, tokens = int(gate.experts[row]), int(gate.tokens[row])
            now = self.prices.host(tokens, layer) - self.prices.device(tokens, layer)
            rate = int(self.counts[expert]) * (ONE - self.factor) >> 14
            if pays(now, later, load, rate, self._stay()):
                self.copies += 1
            else:
                served[expert] = Serve.CPU
        self.counts[gate.experts] += ONE
        return served

    def _fade(self, layer: int) -> None:
        own = slice(layer * self.experts, (layer + 1) * self.experts)
        self.counts[own] = self.counts[own] * self.factor >> 14
        self.events += 1
        if self.events >= WINDOW:
            self.events, self.copies = self.events // 2, self.copies // 2

    def _stay(self) -> tuple[int, int]:
        """Residents over copies a pass, or what was set."""
        if self.stay >= 0:
            return self.stay, 1
        return self.slots * self.events, self.layers * max(1, self.copies)
