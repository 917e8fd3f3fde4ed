"""The searches of the planner against exhaustive search, exact programming, and their own laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import UsageError
from moesim.planning import rivals
from moesim.planning.genetic import Genetic, drawn_slots, filled, search, trimmed
from moesim.planning.space import FloatArray, Found, Model, Problem, Space, one
from moesim.types import IntArray

QUICK = Genetic(population=32, generations=80, patience=30)


def nothing(slots: IntArray) -> FloatArray:
    return np.zeros(len(slots))


def summed(tables: FloatArray) -> Model:
    """A quality that is a sum over layers."""

    def quality(slots: IntArray) -> FloatArray:
        total: FloatArray = tables[np.arange(len(tables)), slots].sum(axis=1)
        return total

    return quality


def tables_of(rng: np.random.Generator, layers: int, experts: int) -> FloatArray:
    """Rising, of any curvature."""
    steps = rng.random((layers, experts)) * rng.random((layers, 1))
    return np.concatenate((np.zeros((layers, 1)), np.cumsum(steps, axis=1)), axis=1)


def crossed(rng: np.random.Generator, space: Space) -> Model:
    """A quality in which neighbouring layers help each other: no sum over layers."""
    tables = tables_of(rng, space.layers, space.experts)

    def quality(slots: IntArray) -> FloatArray:
        own = tables[np.arange(space.layers), slots]
        pairs: FloatArray = own.sum(axis=1) + (own[:, 1:] * own[:, :-1]).sum(axis=1)
        return pairs

    return quality


@st.composite
def spaces(draw: Any, layers: int = 4, experts: int = 5) -> tuple[Space, int, int]:
    """A space, a budget in which at least the smallest allocation fits, a seed."""
    sizes = draw(st.lists(st.sampled_from((4, 6, 8)), min_size=1, max_size=layers))
    space = Space(
        tuple(sizes),
        draw(st.integers(2, experts)),
        draw(st.integers(1, 2)),
        draw(st.integers(0, 20)),
        draw(st.sampled_from(("layer", "none"))),
    )
    lowest = int(space.memory_bytes(space.lowest()))
    whole = int(space.memory_bytes(np.full(space.layers, space.experts)))
    return space, draw(st.integers(lowest, whole + 5)), draw(st.integers(0, 1000))


@given(spaces())
def test_exact_programming_is_as_good_as_trying_all(drawn: tuple[Space, int, int]) -> None:
    space, budget, seed = drawn
    tables = tables_of(np.random.default_rng(seed), space.layers, space.experts)
    problem = Problem(space, budget, summed(tables), nothing)
    assert rivals.exact(problem, tables).score == pytest.approx(rivals.exhaustive(problem).score)


@given(spaces(layers=3, experts=4))
def test_the_genetic_search_is_as_good_as_trying_all(drawn: tuple[Space, int, int]) -> None:
    space, budget, seed = drawn
    problem = Problem(space, budget, crossed(np.random.default_rng(seed), space), nothing)
    found, best = search(problem, QUICK, seed), rivals.exhaustive(problem)
    assert found.score == pytest.approx(best.score)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_genetic_search_comes_close_to_the_optimum_of_24_layers(share: float) -> None:
    rng = np.random.default_rng(5)
    space = Space((12,) * 12 + (8,) * 12, 32, 4)
    importance = (rng.dirichlet(np.full(32, 0.4), 24) * 10**6).astype(np.int64)
    tables = rivals.mass_tables(importance, space)
    whole = int(space.memory_bytes(np.full(24, 32)))
    problem = Problem(space, int(share * whole), summed(tables), nothing)
    best = rivals.exact(problem, tables).score
    found = search(problem, Genetic(), 0).score
    assert 0.997 * best <= found <= best + 1e-9
    assert rivals.uniform(problem).score < found


@given(spaces())
def test_every_answer_fits(drawn: tuple[Space, int, int]) -> None:
    space, budget, seed = drawn
    rng = np.random.default_rng(seed)
    problem = Problem(space, budget, crossed(rng, space), nothing)
    importance = rng.integers(0, 100, (space.layers, space.experts))
    found = [
        search(problem, QUICK, seed),
        rivals.uniform(problem),
        rivals.greedy(problem),
        rivals.by_importance(problem, importance),
        rivals.exact(problem, rivals.mass_tables(importance, space)),
    ]
    for answer in found:
        slots = np.array(answer.slots)
        assert answer.feasible
        assert space.memory_bytes(slots) <= budget
        assert (slots >= space.least).all() and (slots <= space.experts).all()


@pytest.mark.parametrize("repair", ["fill", "trim", "none"])
def test_any_repair_ends_within_the_budget(repair: str) -> None:
    space = Space((4, 8, 4), 6, 1)
    problem = Problem(space, 60, crossed(np.random.default_rng(1), space), nothing)
    found = search(problem, Genetic(population=16, generations=40, repair=repair), 3)
    assert found.feasible and space.memory_bytes(np.array(found.slots)) <= 60


def test_a_seed_determines_the_answer() -> None:
    space = Space((4,) * 8, 9, 2)
    problem = Problem(space, 200, crossed(np.random.default_rng(2), space), nothing)
    few = Genetic(population=8, generations=3)
    answers = [search(problem, few, seed) for seed in (0, 0, 1, 2, 3)]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_more_memory_never_makes_a_plan_worse() -> None:
    space = Space((4, 6) * 5, 9, 2)
    quality = crossed(np.random.default_rng(4), space)
    # So small a search that, left alone, it does get worse.
    few = Genetic(population=6, generations=2, elite=1, repair="none")
    known: list[tuple[int, ...]] = [tuple(space.lowest().tolist())]
    scores = []
    for budget in range(int(space.memory_bytes(space.lowest())), 480, 20):
        found = search(Problem(space, budget, quality, nothing), few, 0, known)
        known.append(found.slots)
        scores.append(found.score)
    assert scores == sorted(scores)
    alone = [search(Problem(space, b, quality, nothing), few, 0).score for b in range(200, 480, 20)]
    assert alone != sorted(alone), "the law above would hold of itself"


def test_a_latency_limit_is_kept_where_it_can_be() -> None:
    space = Space((4,) * 3, 6, 1, spare="none")
    quality = crossed(np.random.default_rng(6), space)

    def latency(slots: IntArray) -> FloatArray:
        weighed: FloatArray = (slots * np.array([1.0, 3.0, 2.0])).sum(axis=1)
        return weighed

    for limit in (6.0, 9.0, 20.0):
        problem = Problem(space, 48, quality, latency, limit)
        found, best = search(problem, QUICK, 0), rivals.exhaustive(problem)
        assert found.feasible and found.score == pytest.approx(best.score)
        assert latency(one(found.slots))[0] <= limit
    nobody = search(Problem(space, 48, quality, latency, 5.0), QUICK, 0)
    assert not nobody.feasible
    assert nobody.slots == (1, 1, 1), "the nearest"


def test_equal_scores_go_to_the_quicker() -> None:
    space = Space((4, 4), 4, 1, spare="none")

    def latency(slots: IntArray) -> FloatArray:
        return slots[:, 0].astype(np.float64)

    problem = Problem(space, 20, lambda s: np.minimum(s.sum(axis=1), 5.0), latency)
    assert search(problem, QUICK, 0).slots == (1, 4)


@given(spaces())
def test_repair_trims_to_the_budget_and_fills_it(drawn: tuple[Space, int, int]) -> None:
    space, budget, seed = drawn
    rng = np.random.default_rng(seed)
    slots = drawn_slots(space, 6, rng)
    slots = np.clip(slots, space.least, space.experts)
    less = trimmed(space, slots, budget, rng)
    assert (less <= slots).all()
    assert (space.memory_bytes(less) <= budget).all()
    more = filled(space, less, budget, rng)
    assert (more >= less).all()
    assert (space.memory_bytes(more) <= budget).all()
    room = budget - space.memory_bytes(more)
    assert not ((more < space.experts) & (space.growth(more) <= room[:, None])).any()


def test_memory_by_hand() -> None:
    slots = np.array([[2, 3], [1, 4], [4, 4]])
    with_spare = Space((10, 100), 4, 1, 7)
    assert with_spare.memory_bytes(slots).tolist() == [7 + 30 + 400, 7 + 20 + 400, 7 + 40 + 400]
    without = Space((10, 100), 4, 1, 7, "none")
    assert without.memory_bytes(slots).tolist() == [7 + 20 + 300, 7 + 10 + 400, 7 + 40 + 400]


def test_importance_takes_the_best_experts_of_all_layers() -> None:
    space = Space((1, 1), 4, 1, spare="none")
    importance = np.array([[97, 1, 1, 1], [25, 25, 25, 25]])
    problem = Problem(space, 4, nothing, nothing)
    assert rivals.by_importance(problem, importance).slots == (1, 3)


def test_differential_evolution_answers_within_the_limits() -> None:
    pytest.importorskip("scipy")
    space = Space((4, 6, 8), 6, 1)
    problem = Problem(space, 90, crossed(np.random.default_rng(3), space), nothing)
    found, best = rivals.evolved(problem, 0), rivals.exhaustive(problem)
    assert found.feasible and 0.9 * best.score <= found.score <= best.score + 1e-12
    assert found == rivals.evolved(problem, 0)


@pytest.mark.parametrize(
    "wrong",
    [{"population": 0}, {"elite": 64}, {"survivors": 1.5}, {"step": 0}, {"repair": "some"}],
)
def test_impossible_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"genetic search: {next(iter(wrong))}="):
        Genetic(**wrong)


def test_too_much_for_exhaustive_search_is_told() -> None:
    space = Space((1,) * 24, 8)
    with pytest.raises(UsageError, match="exhaustive search: 8 choices in each of 24 layers"):
        rivals.exhaustive(Problem(space, 100, nothing, nothing))


def test_sizes_without_a_common_divisor_are_told() -> None:
    space = Space((10**9 + 7, 10**9 + 9), 8)
    problem = Problem(space, 10**10, nothing, nothing)
    with pytest.raises(UsageError, match="no large common divisor"):
        rivals.exact(problem, np.zeros((2, 9)))


def test_nothing_is_better_than_the_best() -> None:
    space = Space((1,), 3)
    judged = Problem(space, 3, lambda s: -s[:, 0].astype(np.float64), nothing, math.inf).judge(
        np.array([[3], [1], [2]])
    )
    assert judged.best() == Found((1,), -1.0, True)
