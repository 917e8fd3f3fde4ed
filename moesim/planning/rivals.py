"""Other ways to allocate slots, to hold the genetic search against, and exact ones to test it."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from moesim.errors import NotRunError, UsageError
from moesim.planning.genetic import filled
from moesim.planning.space import FloatArray, Found, Problem, Space
from moesim.types import IntArray

_MOST_ALLOCATIONS = 2_000_000
_MOST_UNITS = 2_000_000


def uniform(problem: Problem) -> Found:
    """Equal slots in every layer, the best of those within the limits (the paper's simple plan)."""
    space = problem.space
    counts = np.arange(space.least, space.experts + 1)
    return problem.judge(np.repeat(counts[:, None], space.layers, axis=1)).best()


def greedy(problem: Problem) -> Found:
    """From the least allocation, always the slot that gains most score a byte."""
    space = problem.space
    path = [space.lowest()]
    while True:
        now = problem.judge(path[-1][None, :])
        growth = space.growth(path[-1])
        fits = now.memory_bytes[0] + growth <= problem.budget_bytes
        layers = np.flatnonzero(fits & (path[-1] < space.experts))
        if not len(layers):
            return problem.judge(np.array(path)).best()
        more = problem.judge(path[-1] + np.eye(space.layers, dtype=np.int64)[layers])
        gain = (more.score - now.score[0]) / np.maximum(growth[layers], 1)
        path.append(more.slots[np.lexsort((-gain, more.violation))[0]])


def by_importance(problem: Problem, importance: IntArray) -> Found:
    """The most important experts of all layers, whatever the layer, until the budget is full.

    importance : int64 [layers, experts]; each layer's is taken as shares of the layer.
    """
    return exact(problem, mass_tables(importance, problem.space), greedily=True)


def mass_tables(importance: IntArray, space: Space) -> FloatArray:
    """float64 [layers, experts + 1]: share of a layer's importance in its n best, over the layers.

    The sum over layers is the mean share: the quality of a set that never changes.
    """
    ordered = -np.sort(-importance, axis=1).astype(np.float64)
    total = np.maximum(ordered.sum(axis=1, keepdims=True), 1)
    tables = np.concatenate((np.zeros((len(ordered), 1)), np.cumsum(ordered, axis=1) / total), 1)
    shares: FloatArray = tables / space.layers
    return shares


def exact(problem: Problem, tables: FloatArray, *, greedily: bool = False) -> Found:
    """The best allocation where the score is a sum over layers, by dynamic programming over bytes.

    tables : float64 [layers, experts + 1], each layer's part of the score by its slots. The answer
        is judged by ``problem``, which may score otherwise; its latency limit is not looked at.
    greedily : take the best slot a byte at each turn instead.

    Raises
    ------
    UsageError
        If the budget is too many times the common divisor of the sizes.
    """
    space = problem.space
    room = problem.budget_bytes - space.fixed_bytes
    slots = _by_turns(space, tables, room) if greedily else _by_stages(space, tables, room)
    return problem.judge(slots[None, :]).best()


def _by_turns(space: Space, tables: FloatArray, room: int) -> IntArray:
    slots, layers = space.lowest(), np.arange(space.layers)
    while True:
        growth = space.growth(slots)
        left = room - int(space.capacity_bytes(slots).sum())
        may = (slots < space.experts) & (growth <= left)
        if not may.any():
            return slots
        more = tables[layers, np.minimum(slots + 1, space.experts)] - tables[layers, slots]
        slots[np.where(may, more / np.maximum(growth, 1), -math.inf).argmax()] += 1


def _by_stages(space: Space, tables: FloatArray, room: int) -> IntArray:
    unit = math.gcd(*space.table.reshape(-1).tolist())
    units = room // unit
    if units > _MOST_UNITS:
        raise UsageError(
            f"exact search: {room} bytes in units of {unit} are too many stages; the sizes of the "
            "experts have no large common divisor"
        )
    weights = space.table // unit
    value = np.zeros(units + 1)
    choices = []
    for layer in range(space.layers):
        value, choice = _stage(value, weights[layer], tables[layer], space)
        choices.append(choice)
    slots, left = space.lowest(), units
    for layer in range(space.layers - 1, -1, -1):
        slots[layer] = choices[layer][left]
        left -= weights[layer, slots[layer]]
    return slots


def _stage(
    value: FloatArray, weights: IntArray, table: FloatArray, space: Space
) -> tuple[FloatArray, IntArray]:
    best = np.full(len(value), -math.inf)
    choice = np.full(len(value), space.least)
    for n in range(space.least, space.experts + 1):
        weight = int(weights[n])
        if weight >= len(value):
            break
        offered = np.full(len(value), -math.inf)
        offered[weight:] = value[: len(value) - weight] + table[n]
        better = offered > best
        best[better], choice[better] = offered[better], n
    return best, choice


def exhaustive(problem: Problem) -> Found:
    """Every allocation judged. Raises UsageError where there are more than two million."""
    space = problem.space
    counts = range(space.least, space.experts + 1)
    if len(counts) ** space.layers > _MOST_ALLOCATIONS:
        raise UsageError(
            f"exhaustive search: {len(counts)} choices in each of {space.layers} layers are too "
            "many; take a smaller model"
        )
    return problem.judge(np.array(list(product(counts, repeat=space.layers)), np.int64)).best()


def evolved(problem: Problem, seed: int, generations: int = 200) -> Found:
    """SciPy's differential evolution with its defaults; room that its answer leaves is filled.

    Raises
    ------
    NotRunError
        Without SciPy.
    """
    try:
        from scipy.optimize import differential_evolution
    except ModuleNotFoundError:
        raise NotRunError("not run: needs scipy, which the extra `plan` installs") from None
    space = problem.space

    def cost(x: FloatArray) -> FloatArray:
        judged = problem.judge(np.rint(np.atleast_2d(x.T)).astype(np.int64))
        # Any score within the limits beats any outside them.
        return np.where(judged.violation > 0, 1e6 * (1 + judged.violation), -judged.score)

    answer = differential_evolution(
        cost,
        bounds=[(space.least, space.experts)] * space.layers,
        integrality=np.ones(space.layers, bool),
        maxiter=generations,
        updating="deferred",
        vectorized=True,
        polish=False,
        seed=seed,
    )
    rng = np.random.default_rng([seed, 2])
    found = np.rint(answer.x).astype(np.int64)[None, :]
    both = np.concatenate((found, filled(space, found, problem.budget_bytes, rng)))
    return problem.judge(both).best()
