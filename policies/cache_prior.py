"""Cache-prior routing (Skliar et al., arXiv 2412.00099): residents get a bonus (lossy).

A gate's logits z become z' = z + bonus * D for the experts that are resident at the gate; the token
goes to its top k by z'. D is the running mean over the layer's tokens so far of max z - min z, so
that one bonus means the same in every layer and model. The ``top`` likeliest experts of a token
are always kept, resident or not. The weights are those of z, renormalised by the model's own rule.
Under it lies LRU. With ``bonus`` 0 nothing is bent: LRU exactly.

A trace gives probabilities in 1/16384, whose logarithm is z up to a constant of the token, which
changes neither the order nor the range. Here z is log2 p in 1/4096, from integers alone. A
probability below half a step counts as half a step, so ranges end at 15 (in log2) at most.

Where the source is silent: D counts the tokens of the event under way. All tokens of an event see
the same residents; the source routes one token at a time. What is on its way is not resident. Ties
go to what the gate chose, then to the lowest id. A model that chooses among groups of experts
(DeepSeek-V2 and V3) or by biased scores is bent without regard to those, where it is bent at all.
``top`` 0 is the source's J: 1 for models of at most 2 experts a token, 2 for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from moesim.errors import UsageError
from moesim.protocol import CacheView, RouteSeat, World
from moesim.types import DROPPED, PROBABILITY_ONE, AnyArray, IntArray, LayerEvent, Needs, State

FRACTION_BITS = 12
MOST = PROBABILITY_ONE
SURE = 1 << 40
"""Above every logit: what a token keeps whatever is resident."""

NOT_CHOSEN = 1 << 30
"""Behind every rank."""

RESIDENT = int(State.RESIDENT)


@cache
def logarithms() -> IntArray:
    """int64 [16385]: floor(4096 * log2 p) of p = 1, 2, ...; for p = 0 that of one half.

    By squaring a 30-bit mantissa, so that every host has the same table.
    """
    values = np.arange(1, MOST + 1)
    whole = np.array([int(v).bit_length() - 1 for v in values])
    mantissa = values << (30 - whole)
    found = whole << FRACTION_BITS
    for bit in reversed(range(FRACTION_BITS)):
        mantissa = (mantissa * mantissa) >> 30
        above = mantissa >> 31
        found += above << bit
        mantissa >>= above
    return np.concatenate(([-(1 << FRACTION_BITS)], found))


def logits(gate: AnyArray) -> IntArray:
    """Kernel: log2 of probabilities [T, E] in 1/16384, in 1/4096."""
    taken: IntArray = logarithms()[np.clip(gate, 0, MOST)]
    return taken


def favoured(chosen: AnyArray, z: IntArray, here: AnyArray, extra: int, top: int) -> AnyArray:
    """Kernel: uint16 [T, k], each token's top k where residents' logits are raised, by z.

    chosen : uint16 [T, k] of the gate, by rank; the first ``top`` stay, dropped slots stay last.
    z : int64 [T, E]. here : bool [E].
    """
    tokens, experts = z.shape
    row = np.arange(tokens)[:, None]
    there = chosen != DROPPED
    rank = np.full((tokens, experts + 1), NOT_CHOSEN)
    rank[row, np.where(there, chosen, experts)] = np.arange(chosen.shape[1])
    rank = rank[:, :experts]
    raised = z + extra * here + np.where(rank < top, SURE, 0)
    best = np.lexsort((rank, -raised), axis=1)[:, : chosen.shape[1]]
    best = np.where(np.arange(chosen.shape[1]) < there.sum(axis=1, keepdims=True), best, experts)
    padded = np.concatenate((z, np.full((tokens, 1), -SURE)), axis=1)
    ranked = np.concatenate((rank, np.full((tokens, 1), NOT_CHOSEN)), axis=1)
    order = np.lexsort((best, ranked[row, best], -padded[row, best]), axis=1)
    bent = best[row, order]
    return np.where(bent < experts, bent, DROPPED).astype(np.uint16)


@dataclass
class CachePrior(RouteSeat):
    """Raises the logits of resident experts before the top k is taken (lossy).

    bonus : lambda of the source, in mean ranges of the logits, 0 to 1.
    top : likeliest experts of a token that stay whatever is resident; 0: 1 or 2, by the top k.
    """

    name = "cache-prior"
    source = "arXiv 2412.00099"
    cost = "O(T E log E)"
    lossy = True
    needs = Needs.GATE
    bonus: float = 0.5
    top: int = 0

    def __post_init__(self) -> None:
        """A share of the range."""
        if not 0 <= self.bonus <= 1:
            raise UsageError(f"route.bonus={self.bonus}: must lie between 0 and 1")
        if self.top < 0:
            raise UsageError(f"route.top={self.top}: must be 0 (1 or 2, by the top k) or more")

    def begin(self, world: World) -> None:
        """No token has shown its range."""
        self.experts = world.experts
        self.factor = round(self.bonus * PROBABILITY_ONE)
        self.kept = self.top or (1 if world.top_k <= 2 else 2)
        self.ranges = np.zeros(world.layers, np.int64)
        self.tokens = np.zeros(world.layers, np.int64)

    def route(self, event: LayerEvent, cache: CacheView) -> AnyArray | None:
        """None where nothing is bent."""
        if not self.factor or event.gate is None or not len(event.gate):
            return None
        z = logits(event.gate)
        extra = self._extra(event.layer, z)
        own = slice(event.layer * self.experts, (event.layer + 1) * self.experts)
        here: AnyArray = cache.states[own] == RESIDENT
        chosen = event.token_experts
        absent = (chosen != DROPPED) & ~here[np.where(chosen == DROPPED, 0, chosen)]
        rows = np.flatnonzero(absent[:, self.kept :].any(axis=1))
        if not len(rows) or not here.any():
            return None
        bent = chosen.copy()
        bent[rows] = favoured(chosen[rows], z[rows], here, extra, self.kept)
        changed = (np.sort(bent, axis=1) != np.sort(chosen, axis=1)).any(axis=1)
        if not changed.any():
            return None
        return np.where(changed[:, None], bent, chosen)

    def _extra(self, layer: int, z: IntArray) -> int:
        """The bonus in units of a logit, these tokens' ranges included."""
        self.ranges[layer] += int((z.max(axis=1) - z.min(axis=1)).sum())
        self.tokens[layer] += len(z)
        return int(self.ranges[layer]) * self.factor // (int(self.tokens[layer]) * PROBABILITY_ONE)
