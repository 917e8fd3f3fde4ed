"""SwapMoE's quality without a clock: every layer with every number of slots, in one pass.

While routing is as recorded, layers do not touch each other: what a layer of n slots keeps depends
on n and on its own importance alone. Its sets for different n are nested (the n first of one
ranking), so one pass gives the quality of all allocations: a sum over layers.

Against a replay two things are simplified: a layer's swaps are all there one pass after its turn,
and every layer takes its turn, one a pass, whether it lacks anything or not. ``moesim plan``
replays some allocations and reports how far both are apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moesim.planning.space import FloatArray
from moesim.policies.importance import relative, shares, summed, worth
from moesim.types import DROPPED, AnyArray, IntArray
from moesim.workload import Work


@dataclass(frozen=True, slots=True)
class Kept:
    """What each layer keeps by slots; int64 [layers, experts + 1] of sums over tokens.

    mass : gate mass of the executed experts, in 1/16384; agreed : chosen experts executed.
    chosen_mass, chosen : the same of the unmasked gate, in sum.
    swapped : experts that plans exchanged. updates : plans made.
    """

    mass: IntArray
    agreed: IntArray
    chosen_mass: int
    chosen: int
    swapped: IntArray
    updates: int

    def table(self, quality: str) -> FloatArray:
        """float64 [layers, experts + 1]: each layer's part of the quality; they add up to it."""
        if quality == "agreement":
            return self.agreed / max(1, self.chosen)
        return self.mass / max(1, self.chosen_mass)


def rehearse(works: Iterable[Work], uses: IntArray, norms: IntArray, period: int) -> Kept:
    """Serve requests one by one under SwapMoE's defaults.

    Parameters
    ----------
    works : prepared with weights and gates (and norms).
    uses : int64 [layers, experts]; the first sets are the most used.
    norms : int64 [layers * experts] of the experts' weights.
    period : requests between two plans.
    """
    state = _State(uses, relative(norms), period)
    for work in works:
        state.serve(work)
    return state.kept()


class _State:
    def __init__(self, uses: IntArray, norms: IntArray, period: int) -> None:
        self.layers, self.experts = uses.shape
        self.norms = norms.reshape(uses.shape)
        self.period = period
        self.place = _places(uses, np.zeros_like(uses))
        """int64 [layers, experts]: place of each expert in its layer's ranking."""
        self.next_place = self.place
        self.due = np.full(self.layers, -1, np.int64)
        """Passes until a layer's next ranking serves; below 0: it serves already."""
        self.turn = 0
        self.sums = np.zeros_like(uses)
        self.requests = self.updates = self.chosen = self.chosen_mass = 0
        shape = (self.layers, self.experts + 1)
        self.mass, self.agreed, self.swapped = (np.zeros(shape, np.int64) for _ in range(3))

    def serve(self, work: Work) -> None:
        """One request, then perhaps a plan."""
        passes = np.repeat(np.arange(work.iterations), np.diff(work.rows.starts))
        for layer in range(self.layers):
            self._serve_layer(work, layer, passes)
        self._swap(work.iterations)
        self.requests += 1
        if self.requests % self.period == 0:
            self._plan()

    def _serve_layer(self, work: Work, layer: int, passes: IntArray) -> None:
        assert work.gate is not None
        mine = work.rows.layer == layer
        chosen, gate = work.rows.experts[mine], work.gate[mine]
        norms = None if work.norms is None else work.norms[mine]
        weights = None if work.weights is None else work.weights[mine]
        self.sums[layer] += summed(chosen, shares(norms, weights, chosen), self.experts)
        old = passes[mine] < self.due[layer]
        self._count(layer, chosen[old], gate[old], self.place[layer])
        self._count(layer, chosen[~old], gate[~old], self.next_place[layer])

    def _count(self, layer: int, chosen: AnyArray, gate: AnyArray, place: IntArray) -> None:
        if not len(chosen):
            return
        there = chosen != DROPPED
        local = np.where(there, chosen, 0).astype(np.int64)
        self.chosen += int(there.sum())
        self.chosen_mass += int(np.take_along_axis(gate, local, axis=1)[there].sum())
        by_place = np.bincount(place[local[there]], minlength=self.experts)
        self.agreed[layer, 1:] += np.cumsum(by_place)
        self.mass[layer, 1:] += best_masses(gate[:, np.argsort(place)], there.sum(axis=1))

    def _swap(self, passes: int) -> None:
        """Turns that were taken in so many passes."""
        done = (self.due >= 0) & (self.due <= passes)
        self.turn = (self.turn + passes) % self.layers
        self.place = np.where(done[:, None], self.next_place, self.place)
        self.due = np.where(done, -1, self.due - passes)
        self.due = np.where(self.due <= 0, -1, self.due)

    def _plan(self) -> None:
        """New rankings from what was counted; a layer a pass takes them up."""
        # A layer whose turn never came goes on with the ranking that it has.
        served = np.where(self.due[:, None] >= 0, self.place, self.next_place)
        value = worth(self.sums.reshape(-1), self.norms.reshape(-1)).reshape(self.sums.shape)
        self.place, self.next_place = served, _places(value, served)
        for layer in range(self.layers):
            # An expert is newly held with n slots where its place was n or more and is now below.
            moved = np.zeros(self.experts + 2, np.int64)
            up = self.next_place[layer] < served[layer]
            np.add.at(moved, self.next_place[layer][up] + 1, 1)
            np.add.at(moved, served[layer][up] + 1, -1)
            self.swapped[layer] += np.cumsum(moved)[: self.experts + 1]
        self.due = (np.arange(self.layers) - self.turn) % self.layers + 1
        self.sums = np.zeros_like(self.sums)
        self.updates += 1

    def kept(self) -> Kept:
        """All that was counted."""
        return Kept(
            self.mass, self.agreed, self.chosen_mass, self.chosen, self.swapped, self.updates
        )


def _places(value: IntArray, before: IntArray) -> IntArray:
    """int64 [layers, experts]: place by value, largest first; equals as ``before``, then by id."""
    order = np.stack([np.lexsort((b, -v)) for v, b in zip(value, before, strict=True)])
    return np.argsort(order, axis=1)


def best_masses(gate: AnyArray, taken: IntArray) -> IntArray:
    """int64 [E]: sum over tokens of the largest values among the first n columns, n = 1..E.

    gate : [T, E], columns in the order in which experts are held. taken : int64 [T], how many
    experts each token takes (its top k without dropped ones).
    """
    tokens, experts = gate.shape
    width = int(taken.max(initial=0))
    held = np.zeros((tokens, width), np.int64)
    # A token that takes fewer has places that nothing can enter.
    held[np.arange(width)[None, :] >= taken[:, None]] = np.iinfo(np.int64).max
    rows = np.arange(tokens)
    sums = np.zeros(experts, np.int64)
    total = 0
    for n in range(experts if width else 0):
        least = held.argmin(axis=1)
        value, floor = gate[:, n].astype(np.int64), held[rows, least]
        enters = value > floor
        total += int((value - floor)[enters].sum())
        held[rows[enters], least[enters]] = value[enters]
        sums[n] = total
    return sums
