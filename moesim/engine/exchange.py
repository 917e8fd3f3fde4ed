"""What it takes that tokens' hidden states travel between devices, layer event by layer event."""

from __future__ import annotations

import numpy as np

from moesim.costs import Costs
from moesim.placement import Travel
from moesim.protocol import World
from moesim.types import AnyArray, IntArray


class Exchange:
    """Two trips, there and back, for tokens whose experts lie elsewhere; one more for all tokens of
    a layer event where the dense part has changed its device since the one before."""

    def __init__(self, world: World, costs: Costs) -> None:
        assert world.owners is not None
        self._travel = Travel(world.layers, world.owners)
        self._costs = costs
        self._before = -1
        self._known: dict[tuple[int, int], int] = {}

    def step_begins(self) -> None:
        """No layer lies before the next one."""
        self._before = -1

    def ns(self, layer: int, chosen: AnyArray) -> int:
        """Of the next layer event, whose tokens chose uint16 [T, k]."""
        away = int(self._travel.away(np.full(len(chosen), layer), chosen).sum())
        moved = len(chosen) if self._travel.moves(self._before, layer) else 0
        self._before = layer
        return self._takes(away, moved)

    def of_block(
        self, layers: IntArray, steps: IntArray, starts: IntArray, chosen: AnyArray
    ) -> IntArray:
        """int64 [n] of layer events, whose rows begin at ``starts`` and end where the next ones do;
        ``steps`` says which are of one step."""
        tokens = np.diff(starts)
        of_row = self._travel.away(np.repeat(layers, tokens), chosen)
        away = np.diff(np.concatenate(([0], np.cumsum(of_row)))[starts])
        home = self._travel.home[layers]
        moves = (home[1:] != home[:-1]) & (steps[1:] == steps[:-1])
        moved = tokens * np.concatenate(([False], moves))
        return np.array(
            [self._takes(*pair) for pair in zip(away.tolist(), moved.tolist(), strict=True)],
            np.int64,
        )

    def again(self, layer: int, before: int, chosen: AnyArray) -> int:
        """``ns`` of a layer event in the middle of a step; ``before`` is the layer of the one
        before it, -1 for the first."""
        self._before = before
        return self.ns(layer, chosen)

    def _takes(self, away: int, moved: int) -> int:
        if (away, moved) not in self._known:
            costs = self._costs
            ns = costs.exchange_ns(away, 2) + costs.exchange_ns(moved, 1)
            self._known[away, moved] = ns
        return self._known[away, moved]
