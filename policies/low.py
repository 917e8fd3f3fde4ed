"""A missing expert that weighs little is loaded in low precision; a full copy that is there serves.

The simple form of what HOBBIT (arXiv 2411.01433) does with all experts, without its skipping and
its way of ranking: here an expert's own weight decides, beside the mean of its token's. Of a batch
the token that asks for most decides, and a low copy that is already there serves what would do with
one: the best that is there, else the best on its way, else what was asked for.

Lossy: what is executed in low precision is counted (``quality.mass_low``), what that does to the
text is not known. A routing seat that bends the routing keeps its own say about precisions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import NotRunError, UsageError
from moesim.protocol import MissSeat, World
from moesim.types import DROPPED, PROBABILITY_ONE, AnyArray, IntArray, LayerEvent, Needs

LOWEST = -1


def light(weights: AnyArray, chosen: AnyArray, below: int) -> AnyArray:
    """Kernel: whether each weighs less than ``below`` / 16384 of its token's mean, bool [T, k].

    weights : int [T, k] in 1/16384. chosen : uint16 [T, k]; what is dropped does not count.
    """
    kept = chosen != DROPPED
    mass: IntArray = np.where(kept, weights, 0).astype(np.int64)
    count = kept.sum(axis=1, keepdims=True)
    found: AnyArray = mass * count * PROBABILITY_ONE < below * mass.sum(axis=1, keepdims=True)
    little: AnyArray = found & kept
    return little


@dataclass
class Low(MissSeat):
    """Loads a missing expert in low precision where all its tokens give it little weight.

    Parameters
    ----------
    below : what is little, as a share of the mean weight of the token's experts.
    low : which precision of the model profile is the low one; -1: its last.
    """

    name = "low"
    source = "a baseline; after arXiv 2411.01433"
    cost = "O(T k)"
    needs = Needs.WEIGHTS
    lossy = True
    mixed = True
    below: float = 0.5
    low: int = LOWEST

    def __post_init__(self) -> None:
        if not 0 <= self.below <= 1024:
            raise UsageError(f"miss.below={self.below}: must lie between 0 and 1024")

    def begin(self, world: World) -> None:
        """Which precision is low; where the model has but one, all are full."""
        precisions = len(world.expert_bytes)
        if world.expert_parts > 1:
            raise NotRunError("not run: parts of one expert would differ in precision")
        self._low = precisions - 1 if self.low == LOWEST else self.low
        if not 0 <= self._low < precisions:
            raise UsageError(
                f"miss.low={self.low}: the model has precisions 0 to {precisions - 1}, and 0 is "
                "the full one"
            )
        self._below = round(self.below * PROBABILITY_ONE)

    def lowered(self, event: LayerEvent) -> AnyArray | None:
        """Low where it weighs little."""
        assert event.weights is not None
        if not self._low:
            return None
        small = light(event.weights, event.token_experts, self._below)
        return np.where(small, self._low, 0).astype(np.uint8) if small.any() else None
