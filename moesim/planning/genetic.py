"""The genetic search over slots (SwapMoE, section 3.4.2).

From the paper: random allocations at first; each iteration changes one random number of each;
crossover exchanges numbers between two allocations or averages them; selection removes those that
violate a limit or score poorly. Ours, for the paper does not say: every number in ``Genetic``,
elitism, repair, and that violations are ranked (by size, below all that fit) instead of removed, so
that a search which begins outside the limits finds its way in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.planning.space import FloatArray, Found, Problem, Slots, Space
from moesim.types import IntArray

REPAIRS = ("fill", "trim", "none")
_HALVINGS = 8


@dataclass(frozen=True, slots=True)
class Genetic:
    """How to search.

    Raises UsageError for a value out of its range.
    """

    population: int = 64
    generations: int = 200
    step: int = 3
    """A mutation adds or takes 1 to so many slots."""
    elite: int = 4
    """So many of the best go on unchanged."""
    survivors: float = 0.5
    """Share that selection leaves as parents."""
    crossover: float = 0.8
    """Share of children with two parents; half exchange numbers, half average them."""
    patience: int = 60
    """Stop after so many generations without a better one."""
    repair: str = "fill"
    """An allocation above the budget loses slots of random layers (trim), and room that is left is
    given to random layers (fill; under a latency limit for every second one). One above the latency
    limit shrinks (``eased``)."""

    def __post_init__(self) -> None:
        for name in ("population", "generations", "step", "patience"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"genetic search: {name}={getattr(self, name)}: must be at least 1"
                )
        if not 0 <= self.elite < self.population:
            raise UsageError(f"genetic search: elite={self.elite}: must be below the population")
        for name in ("survivors", "crossover"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(
                    f"genetic search: {name}={getattr(self, name)}: must lie between 0 and 1"
                )
        if self.repair not in REPAIRS:
            raise UsageError(
                f"genetic search: repair={self.repair}: must be one of {', '.join(REPAIRS)}"
            )


def search(problem: Problem, how: Genetic, seed: int, known: Iterable[Slots] = ()) -> Found:
    """The best allocation found. It is no worse than any of ``known``, which join the first
    population; so a search at a larger budget that knows a smaller one's answer keeps it."""
    rng = np.random.default_rng([seed, 1])
    space = problem.space
    given = np.array(list(known), np.int64).reshape(-1, space.layers)
    drawn = _repaired(problem, how, drawn_slots(space, how.population, rng), rng)
    judged = problem.judge(np.concatenate((given, drawn)))
    best, waited = judged.best(), 0
    for _ in range(how.generations):
        order = judged.order()
        elite = judged.slots[order[: how.elite]]
        parents = judged.slots[order[: max(2, int(how.survivors * len(order)))]]
        children = _children(parents, how, how.population - how.elite, rng)
        children = _repaired(problem, how, _mutated(children, space, how, rng), rng)
        judged = problem.judge(np.concatenate((elite, children)))
        newest = judged.best()
        waited = waited + 1 if newest == best else 0
        best = _better(problem, best, newest)
        if waited == how.patience:
            break
    return best


def drawn_slots(space: Space, count: int, rng: np.random.Generator) -> IntArray:
    """int64 [count, layers], every number drawn evenly and alone."""
    return rng.integers(space.least, space.experts + 1, (count, space.layers))


def trimmed(
    space: Space, slots: IntArray, budget_bytes: int | IntArray, rng: np.random.Generator
) -> IntArray:
    """Take slots of random layers until each allocation fits, or has only the least left.

    budget_bytes : one number, or one for each allocation.
    """
    slots = slots.copy()
    while True:
        may = slots > space.least
        rows = np.flatnonzero((space.memory_bytes(slots) > budget_bytes) & may.any(axis=1))
        if not len(rows):
            return slots
        slots[rows, _random_layer(may[rows], rng)] -= 1


def filled(
    space: Space, slots: IntArray, budget_bytes: int | IntArray, rng: np.random.Generator
) -> IntArray:
    """Give slots to random layers until no further one fits."""
    slots = slots.copy()
    while True:
        room = budget_bytes - space.memory_bytes(slots)
        may = (slots < space.experts) & (space.growth(slots) <= room[:, None])
        rows = np.flatnonzero(may.any(axis=1))
        if not len(rows):
            return slots
        slots[rows, _random_layer(may[rows], rng)] += 1


def _random_layer(may: np.ndarray, rng: np.random.Generator) -> IntArray:
    layer: IntArray = np.where(may, rng.random(may.shape), -1.0).argmax(axis=1)
    return layer


def eased(problem: Problem, slots: IntArray) -> IntArray:
    """Take allocations above the latency limit back towards the least one, each number by the same
    share and no further than needed; where that does not help they stay as they are."""
    least, limit = problem.space.least, problem.latency_limit_ns
    late = np.flatnonzero(problem.latency_ns(slots) > limit)
    more = slots[late] - least
    low, high = np.zeros(len(late)), np.ones(len(late))
    for _ in range(_HALVINGS if len(late) else 0):
        middle = (low + high) / 2
        meets = problem.latency_ns(least + _shared(more, middle)) <= limit
        low, high = np.where(meets, middle, low), np.where(meets, high, middle)
    back = least + _shared(more, low)
    meets = problem.latency_ns(back) <= limit
    answer = slots.copy()
    answer[late[meets]] = back[meets]
    return answer


def _shared(slots: IntArray, share: FloatArray) -> IntArray:
    part: IntArray = np.floor(slots * share[:, None]).astype(np.int64)
    return part


def _repaired(
    problem: Problem, how: Genetic, slots: IntArray, rng: np.random.Generator
) -> IntArray:
    space, budget = problem.space, problem.budget_bytes
    if how.repair != "none":
        slots = trimmed(space, slots, budget, rng)
    if how.repair == "fill":
        # Under a latency limit the best may leave memory free.
        limited = math.isfinite(problem.latency_limit_ns)
        rows = np.flatnonzero(rng.random(len(slots)) < (0.5 if limited else 1.0))
        slots[rows] = filled(space, slots[rows], budget, rng)
    return eased(problem, slots) if how.repair != "none" else slots


def _children(parents: IntArray, how: Genetic, count: int, rng: np.random.Generator) -> IntArray:
    first, second = rng.integers(0, len(parents), (2, count))
    a, b = parents[first], parents[second]
    exchanged = np.where(rng.random(a.shape) < 0.5, a, b)
    # A half is rounded up or down by chance: rounding one way would drift.
    averaged = (a + b + rng.integers(0, 2, a.shape)) // 2
    kind = rng.random((count, 1))
    crossed = np.where(kind < how.crossover / 2, exchanged, averaged)
    children: IntArray = np.where(kind < how.crossover, crossed, a)
    return children


def _mutated(slots: IntArray, space: Space, how: Genetic, rng: np.random.Generator) -> IntArray:
    count = len(slots)
    steps = rng.integers(1, how.step + 1, count) * rng.choice((-1, 1), count)
    mutated = slots.copy()
    mutated[np.arange(count), rng.integers(0, space.layers, count)] += steps
    return np.clip(mutated, space.least, space.experts)


def _better(problem: Problem, a: Found, b: Found) -> Found:
    return problem.judge(np.array([a.slots, b.slots], np.int64)).best()
