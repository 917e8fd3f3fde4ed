"""SwapMoE's importance of an expert (ACL 2024, 2024.acl-long.363, equation 1).

importance(E_i) = sum over the tokens x that chose E_i of ||x|| * G(x)_i * ||E_i||: a cheap guess at
how much an expert adds to the output, from norms alone.

The paper does not say which norm, which gate value and which router it means. Here ||x|| is the L2
norm of the MoE layer's input, G the gate value that the model multiplies with, ||E|| the norm of
all of an expert's weights, and a token counts where the *unmasked* gate chose the expert: under the
masked gate an expert that is not resident would score 0 for ever.

Products are cut to 1/16384, sums are exact, and ||E|| counts in 1/16384 of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.protocol import KeepSeat, World
from moesim.types import DROPPED, PROBABILITY_ONE, AnyArray, Gate, IntArray, LayerEvent, Needs

ONE = PROBABILITY_ONE
SHIFT = 14

MEASURES = ("full", "inputs", "tokens")
"""Equation 1; without ||E||; the number of tokens, which the paper compares with."""

MOST = (1 << 48) - 1
"""Sums saturate here, so that a product with a norm stays below 2**62."""


def summed(chosen: AnyArray, values: IntArray, experts: int) -> IntArray:
    """Kernel: int64 [experts], the sum of ``values`` [T, k] by chosen expert [T, k].

    ``DROPPED`` counts for nobody. Exact below 2**53.
    """
    local = np.minimum(chosen.astype(np.int64), experts).reshape(-1)
    sums = np.bincount(local, values.reshape(-1), experts + 1)
    return sums[:experts].astype(np.int64)


def shares(norms: IntArray | None, weights: AnyArray | None, chosen: AnyArray) -> IntArray:
    """Kernel: int64 [T, k], ||x|| * G in 1/16384, rounded down. What is None counts as 1."""
    gates = np.full(chosen.shape, ONE, np.int64) if weights is None else weights.astype(np.int64)
    if norms is None:
        return gates
    product: IntArray = (norms.astype(np.int64)[:, None] * gates) >> SHIFT
    return product


def relative(norms: IntArray) -> IntArray:
    """Norms in 1/16384 of the largest, rounded to nearest; all equal if there is none above 0."""
    largest = int(norms.max(initial=0))
    if largest <= 0:
        return np.full(len(norms), ONE, np.int64)
    return (norms.astype(np.int64) * ONE + largest // 2) // largest


def worth(sums: IntArray, norms: IntArray) -> IntArray:
    """Kernel: a sum times the expert's norm."""
    return np.minimum(sums, MOST) * norms


def faded(sums: IntArray, factor: int) -> IntArray:
    """Kernel: sums times ``factor``/16384, rounded down, without overflow."""
    return (sums >> SHIFT) * factor + (((sums & (ONE - 1)) * factor) >> SHIFT)


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """UsageError unless a parameter is one of its names."""
    if value not in known:
        raise UsageError(f"{key}={value}: must be {', '.join(known[:-1])} or {known[-1]}")


class Sums:
    """Importance of every expert of a run, as it adds up.

    sums : int64 [layers * experts], the sum over tokens. ``worth`` is the importance.
    """

    def __init__(self, world: World, measure: str) -> None:
        self.sums = np.zeros(world.size, np.int64)
        self._experts = world.experts
        self._measure = measure
        norms = world.expert_norms if measure == "full" else None
        self.norms = np.full(world.size, ONE, np.int64) if norms is None else relative(norms)

    def add(
        self, source: LayerEvent, chosen: AnyArray | None = None, gates: AnyArray | None = None
    ) -> None:
        """Count a layer event's tokens; ``chosen`` and ``gates`` [T, k] in the place of its own."""
        taken = source.token_experts if chosen is None else chosen
        if self._measure == "tokens":
            values = np.full(taken.shape, ONE, np.int64)
        else:
            known = source.weights if gates is None else gates
            # An access alone (flat mode) comes with its token's weights, and no rank among them.
            aligned = known is not None and known.shape == taken.shape
            values = shares(source.norms, known if aligned else None, taken)
        first = source.layer * self._experts
        if len(taken) == 1:
            # The experts of a token differ; one token, as most are, is quicker this way.
            kept = (taken[0] != DROPPED).nonzero()[0]
            self.sums[first + taken[0, kept].astype(np.int64)] += values[0, kept]
        else:
            self.sums[first : first + self._experts] += summed(taken, values, self._experts)

    def fade(self, factor: int) -> None:
        """Keep ``factor``/16384 of every sum."""
        self.sums = faded(self.sums, factor)

    def worth(self) -> IntArray:
        """int64 [layers * experts]: the importance of each."""
        return worth(self.sums, self.norms)


@dataclass
class Importance(KeepSeat):
    """Evicts what mattered least so far, by SwapMoE's importance.

    In SwapMoE itself nothing is left for a keep seat to choose; as a replacement priority for loads
    on demand it is what Oracle-MoE (ICML 2025) compared with.

    measure : full, inputs (without the experts' norms) or tokens (their number alone).
    gamma : what remains of a layer's sums at its next event, above 0 to 1.
    """

    name = "importance"
    source = "ACL 2024, 2024.acl-long.363, equation 1"
    cost = "O(T k + E); O(R) an eviction"
    needs = Needs.WEIGHTS | Needs.NORMS
    measure: str = "full"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        """Known measures; sums that may fade."""
        check_choice("keep.measure", self.measure, MEASURES)
        if not 0 < self.gamma <= 1:
            raise UsageError(f"keep.gamma={self.gamma}: must lie above 0 and at most 1")

    def begin(self, world: World) -> None:
        """Nothing was used."""
        super().begin(world)
        self.total = Sums(world, self.measure)
        self.experts = world.experts
        self.factor = round(self.gamma * ONE)

    def gate(self, gate: Gate) -> None:
        """The layer's sums fade, then its tokens count."""
        if self.factor < ONE:
            first = gate.layer * self.experts
            own = slice(first, first + self.experts)
            self.total.sums[own] = faded(self.total.sums[own], self.factor)
        self.total.add(gate.source)

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """The importance now."""
        return worth(self.total.sums[experts], self.total.norms[experts])
