"""FineMoE's searches, scores, selection and store against the paper's equations in NumPy."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.hashing import hash64
from moesim.policies import map_store
from moesim.policies.map_search import HitCount, MapSearch, MapTrajectory
from moesim.policies.map_store import FOUND, STEP, Bank, Choice, Store
from moesim.types import AnyArray, IterationBegin, Needs, Phase
from moesim.workload import Inputs
from tests.finemoe import (
    Paper,
    cosines,
    facts_of,
    gated_case,
    plain,
    redundancy,
    selected,
    told,
    world_of,
)

Shape = tuple[int, int, int]


def maps_of(rng: np.random.Generator, shape: Shape, *, sparse: bool = False) -> AnyArray:
    """[number, layers, experts] probabilities in 1/16384, few of them or none 0."""
    made = rng.dirichlet(np.full(shape[2], 0.5), shape[:2])
    if sparse:
        made = np.where(made >= np.sort(made, axis=2)[:, :, -2:-1], made, 0)
    shares: AnyArray = np.rint(made / made.sum(axis=2, keepdims=True) * 16384)
    return shares.astype(np.int64)


class World:
    """A store with its embeddings, driven as a seat would."""

    def __init__(self, layers: int, experts: int, capacity: int, numbers: int) -> None:
        self.bank = Bank(map_store.make_store(layers, experts, capacity))
        self.senses = Bank(map_store.make_store(1, numbers, capacity, self.bank.store))
        self.choice = map_store.make_choice(experts)
        map_store.load_all(self.bank.store, self.bank.trails, self.choice)

    @property
    def store(self) -> Store:
        return self.bank.store

    def row(self, trail: int, layer: int, values: AnyArray) -> None:
        rows = values[None, :].astype(np.int32)
        map_store.add(self.bank.trails, trail, layer, rows, 0, 1, 16384)

    def keep(self, rows: AnyArray, embedding: AnyArray | None, distance: int = 2) -> int:
        """Insert a whole map; its entry."""
        trail, sense = self.bank.take(), -1
        for layer, values in enumerate(rows):
            self.row(trail, layer, values)
        if embedding is not None:
            sense = self.sense(embedding)
        entry = map_store.insert(
            self.store, self.bank.trails, trail, self.senses.store, self.senses.trails, sense,
            distance,
        )  # fmt: skip
        self.bank.give(trail)
        return entry

    def sense(self, embedding: AnyArray) -> int:
        trail = self.senses.take()
        self.senses.trails.rows[trail, 0] = map_store.fitted(embedding)
        return trail

    def pass_on(self, trail: int, layer: int, values: AnyArray, step: int) -> tuple[int, float]:
        """A gate of a pass: the nearest entry and its cosine."""
        self.row(trail, layer, values)
        ids = np.array([trail], np.int64)
        map_store.observe(self.store, self.bank.trails, ids, 1, layer, step)
        map_store.search(self.store, self.bank.trails, ids, 1, layer)
        return int(self.bank.trails.state[trail, FOUND]), float(self.bank.trails.score[trail])

    def predict(self, ids: list[int], layer: int, least: int, *, dynamic: bool) -> Choice:
        which = np.array(ids, np.int64)
        n = map_store.predict(
            self.store, self.bank.trails, which, len(ids), layer, least, int(dynamic), self.choice
        )
        return self.choice._replace(chosen=self.choice.chosen[:n])


# ---- kernels, one by one -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_trajectory_search_is_the_argmax_of_cosines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, experts, entries = 4, int(rng.choice([3, 8, 33])), int(rng.choice([1, 7, 40]))
    maps = maps_of(rng, (entries, layers, experts), sparse=seed % 3 == 1)
    world = World(layers, experts, 50, 1)
    for made in maps:
        world.keep(made, None)
    for step, query in enumerate(maps_of(rng, (6, layers, experts), sparse=seed % 3 > 0)):
        trail = world.bank.take()
        for layer in range(layers):
            found, score = world.pass_on(trail, layer, query[layer], step)
            near = cosines(query[: layer + 1], list(maps[:, : layer + 1]))
            assert found == int(np.argmax(near))
            assert score == near.max()


@pytest.mark.parametrize("seed", range(6))
def test_semantic_search_is_the_argmax_of_cosines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    entries, numbers = 20, int(rng.choice([1, 5, 48, 300]))
    embeddings = rng.integers(-8191, 8192, (entries, numbers))
    if seed % 2:
        # Most of them point away: the nearest may have a negative cosine.
        embeddings = -np.abs(embeddings)
    world = World(2, 3, 32, numbers)
    for embedding in embeddings:
        world.keep(maps_of(rng, (1, 2, 3))[0], embedding)
    for query in np.abs(rng.integers(-8191, 8192, (5, numbers))):
        sense = world.sense(query)
        map_store.recall(world.senses.store, world.senses.trails, sense)
        near = cosines(query, list(embeddings))
        assert world.senses.trails.state[sense, FOUND] == int(np.argmax(near))
        assert world.senses.trails.score[sense] == near.max()


@pytest.mark.parametrize("seed", range(10))
def test_selection_is_the_smallest_set_that_reaches_delta(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = int(rng.choice([2, 8, 40]))
    least = int(rng.integers(1, min(5, experts + 1)))
    world = World(1, experts, 4, 1)
    maps = maps_of(rng, (4, 1, experts), sparse=seed % 4 == 0)
    maps[3, 0, : experts // 2] = maps[3, 0, 0]
    for made in maps:
        world.keep(made, None)
    trails = world.bank.trails
    for entry, score in product(range(4), [-0.5, 0.0, *rng.random(8), 1.0, 1.0000001]):
        trails.state[0, FOUND], trails.score[0] = entry, score
        for dynamic in (True, False):
            choice = world.predict([0], 0, least, dynamic=dynamic)
            assert choice.chosen.tolist() == selected(maps[entry, 0], score, least, dynamic=dynamic)
            assert choice.probabilities.tolist() == maps[entry, 0].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_is_the_union_with_the_largest_probabilities(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = maps_of(rng, (5, 1, 9))
    world = World(1, 9, 5, 1)
    for made in maps:
        world.keep(made, None)
    entries, scores = rng.integers(0, 5, 3), rng.random(3)
    world.bank.trails.state[:3, FOUND], world.bank.trails.score[:3] = entries, scores
    choice = world.predict([0, 1, 2], 0, 2, dynamic=True)
    rows = [maps[entry, 0] for entry in entries]
    chosen = {e for row, score in zip(rows, scores, strict=True) for e in selected(row, score, 2)}
    largest = np.max(rows, axis=0)
    assert choice.probabilities.tolist() == largest.tolist()
    assert choice.chosen.tolist() == sorted(chosen, key=lambda e: (-largest[e], e))


@pytest.mark.parametrize("seed", range(8))
def test_a_full_store_gives_up_the_most_redundant(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, experts, numbers, capacity = 3, 6, 7, 5
    distance = int(rng.integers(1, 6))
    world = World(layers, experts, capacity, numbers)
    maps: list[AnyArray] = []
    embeddings: list[AnyArray] = []
    for made in maps_of(rng, (30, layers, experts)):
        embedding = rng.integers(-8191, 8192, numbers)
        entry = world.keep(made, embedding, distance)
        if len(maps) < capacity:
            assert entry == len(maps)
            maps.append(made)
            embeddings.append(embedding)
            continue
        worth = redundancy(cosines(embedding, embeddings), cosines(made, maps), distance, layers)
        assert entry == int(np.argmax(worth))
        maps[entry], embeddings[entry] = made, embedding
    assert world.store.maps.transpose(2, 0, 1).tolist() == np.array(maps).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_running_products_stay_right_when_the_store_changes(seed: int) -> None:
    """Entries may be written between any two gates of a pass."""
    rng = np.random.default_rng(seed)
    layers, experts, capacity = 4, 5, 6
    world = World(layers, experts, capacity, 1)
    known: dict[int, AnyArray] = {}
    spare = iter(maps_of(rng, (200, layers, experts)))
    for step in range(8):
        trails = [world.bank.take() for _ in range(6)]
        queries = maps_of(rng, (6, layers, experts))
        for layer in range(layers):
            for trail, query in zip(trails, queries, strict=True):
                if rng.random() < 0.3:
                    made = next(spare)
                    known[world.keep(made, None)] = made
                found, score = world.pass_on(trail, layer, query[layer], step)
                entries = [known[c][: layer + 1] for c in range(len(known))]
                near = cosines(query[: layer + 1], entries) if known else np.zeros(1)
                if known:
                    assert (found, score) == (int(np.argmax(near)), near.max())
        for trail in trails:
            world.bank.give(trail)


def test_declared_work_is_that_of_the_columns_read() -> None:
    """A multiply-add for each product; a top-k gate reads k columns."""
    rng = np.random.default_rng(0)
    world = World(1, 16, 10, 1)
    for made in maps_of(rng, (10, 1, 16)):
        world.keep(made, None)
    for columns in (16, 2):
        query = np.zeros(16, np.int64)
        query[:columns] = 16384 // columns
        world.store.work[:] = 0
        world.pass_on(world.bank.take(), 0, query, columns)
        assert world.store.work[0] == columns * 10 + 10
        assert world.store.work[1] == 2 * columns * 10 + 16 * 10 + 16 * 10


# ---- by hand -------------------------------------------------------------------------------------


def test_a_tie_goes_to_the_lowest_entry() -> None:
    world = World(2, 2, 4, 1)
    for rows in ([[0, 16384], [16384, 0]], [[16384, 0], [16384, 0]], [[16384, 0], [0, 16384]]):
        world.keep(np.array(rows), None)
    trail = world.bank.take()
    assert world.pass_on(trail, 0, np.array([16384, 0]), 0) == (1, 1.0)
    # At the second layer only one of the two is left.
    found, score = world.pass_on(trail, 1, np.array([0, 16384]), 0)
    assert found == 2 and score == pytest.approx(1.0)


def test_delta_met_exactly() -> None:
    """A score of 1/4 asks for 3/4 of the mass; 1/2 + 1/4 is enough."""
    world = World(1, 4, 1, 1)
    world.keep(np.array([[2048, 8192, 4096, 2048]]), None)
    trails = world.bank.trails
    for score, chosen in ((0.25, [1, 2]), (0.2499, [1, 2, 0]), (0.5, [1]), (1.0, [1])):
        trails.state[0, FOUND], trails.score[0] = 0, score
        assert world.predict([0], 0, 1, dynamic=True).chosen.tolist() == chosen
    trails.score[0] = 0.0
    assert world.predict([0], 0, 1, dynamic=True).chosen.tolist() == [1, 2, 0, 3]


def test_redundancy_weighs_meaning_against_trajectory() -> None:
    """Of four layers; entry 0 has the newcomer's trajectory, entry 1 its embedding."""
    one, other = np.array([[16384, 0]] * 4), np.array([[0, 16384]] * 4)
    for distance, replaced in ((1, 0), (3, 1), (9, 1)):
        world = World(4, 2, 2, 2)
        world.keep(one, np.array([8191, 0]), distance)
        world.keep(other, np.array([0, 8191]), distance)
        # d = 1: 3/4 against 1/4; d = 3: 1/4 against 3/4; beyond, meaning alone.
        assert world.keep(one, np.array([0, 8191]), distance) == replaced
        assert world.store.size.tolist() == [2, 3]
        assert world.store.maps[0, :, replaced].tolist() == [16384, 0]


def test_the_mean_of_a_prompt_is_rounded_once() -> None:
    world = World(1, 3, 1, 1)
    trails, trail = world.bank.trails, world.bank.take()
    values = np.array([[1, 2, 0], [2, 2, 16384], [0, 1, 0]], np.int32)
    map_store.add(trails, trail, 0, values, 0, 2, 16384)
    assert trails.rows[trail, 0].tolist() == [2, 2, 8192]
    map_store.add(trails, trail, 0, values, 2, 3, 16384)
    assert trails.rows[trail, 0].tolist() == [1, 2, 5461]


def test_long_numbers_of_an_embedding_are_halved() -> None:
    small = np.array([3, -8192, 0], np.int32)
    assert map_store.fitted(small).tolist() == [2, -4096, 0]
    assert map_store.fitted(small[:1]).tolist() == [3]
    largest = np.array([65504 * 16384, -65504 * 16384], np.int32)
    assert np.abs(map_store.fitted(largest)).max() <= 8192
    rng = np.random.default_rng(0)
    wide = rng.integers(-(2**24), 2**24, (2, 64)).astype(np.int32)
    kept = np.array([map_store.fitted(v) for v in wide])
    assert cosines(kept[0], [kept[1]])[0] == pytest.approx(cosines(wide[0], [wide[1]])[0], abs=1e-3)


def test_a_trail_that_was_given_back_is_blank() -> None:
    world = World(2, 3, 4, 1)
    taken = [world.bank.take() for _ in range(9)]
    assert sorted(taken) == list(range(9))
    world.row(taken[4], 1, np.array([1, 2, 3]))
    world.bank.give(taken[4])
    assert world.bank.take() == taken[4]
    assert not world.bank.trails.rows[taken[4]].any()
    assert not world.bank.trails.totals[taken[4]].any()
    assert world.bank.trails.state[taken[4], STEP] == -1


# ---- the seats -----------------------------------------------------------------------------------

BATCHES = ((1, 0), (3, 0), (2, 2))
WAYS: list[dict[str, Any]] = [
    dict(zip(("prefill", "merge", "targets", "delta", "capacity", "distance"), way, strict=True))
    for way in product(
        ("mean", "last", "every"),
        ("union", "last"),
        ("one", "later"),
        (True, False),
        (4, 99),
        (1, 3, 7),
    )
]


def assert_as_in_the_paper(seat: MapSearch, number: int, **knobs: Any) -> None:
    batch, chunk_tokens = BATCHES[number % len(BATCHES)]
    case = gated_case(batch=batch, chunk_tokens=chunk_tokens, seed=number, requests=5, **knobs)
    world = world_of(case)
    seat.begin(world)
    paper = Paper(seat, world)
    forecasts = 0
    for fact in facts_of(case, Inputs(seat.needs)):
        answer = told(seat.foresee(fact))
        assert answer == plain(paper.foresee(fact)), fact
        forecasts += len(answer)
    assert seat.frozen or (forecasts and seat.entries == len(paper.maps))


@pytest.mark.parametrize("part", range(6))
def test_forecasts_are_those_of_the_paper(part: int) -> None:
    """Batches and chunks with every parameter; each way with one of them."""
    for number in range(part, len(WAYS), 6):
        draw = int(hash64(1, number, 0) % 3)
        assert_as_in_the_paper(MapSearch(**WAYS[number]), 3 * number + draw)


@pytest.mark.parametrize("number", range(6))
def test_forecasts_without_meaning_or_without_maps(number: int) -> None:
    capacity = (4, 99)[number // 3]
    assert_as_in_the_paper(MapTrajectory(capacity=capacity), number)
    assert_as_in_the_paper(HitCount(capacity=capacity, distance=1 + number % 3), number)
    assert_as_in_the_paper(MapSearch(capacity=capacity), number, embedding=0)
    assert_as_in_the_paper(MapSearch(frozen=True), number)


def test_the_past_fills_the_store() -> None:
    """A store that learned some requests expects of others what one that served them would."""
    case = gated_case()
    inputs = Inputs(MapSearch.needs)
    facts = list(facts_of(case, inputs))
    for number in (0, 1):
        served, frozen = MapSearch(capacity=(99, 5)[number]), MapSearch(frozen=True)
        frozen.capacity = served.capacity
        served.begin(world_of(case))
        for fact in facts:
            served.foresee(fact)
        frozen.begin(world_of(case, past=lambda: iter(facts)))
        assert frozen.entries == served.entries > 0
        assert np.array_equal(frozen._bank.store.maps, served._bank.store.maps)
        before = frozen._bank.store.size.tolist()
        assert any(told(frozen.foresee(fact)) for fact in facts)
        assert frozen._bank.store.size.tolist() == before
    cold = MapSearch(warm=False)
    cold.begin(world_of(case, past=lambda: iter(facts)))
    assert cold.entries == 0


def test_what_the_past_cost_is_not_charged() -> None:
    case = gated_case()
    facts = list(facts_of(case, Inputs(MapSearch.needs)))
    seat = MapSearch()
    seat.begin(world_of(case, past=lambda: iter(facts)))
    assert not seat._bank.store.work.any()


def test_embeddings_of_two_lengths_are_refused() -> None:
    case = gated_case()
    seat = MapSearch()
    seat.begin(world_of(case))
    for fact in facts_of(case, Inputs(MapSearch.needs)):
        seat.foresee(fact)
    wrong = IterationBegin(77, 1, Phase.DECODE, 1, np.ones(5, np.int32))
    with pytest.raises(TraceError, match="an embedding of 5 numbers follows one of 6"):
        seat.foresee(wrong)


def test_only_what_is_used_is_needed() -> None:
    assert MapSearch.needs == Needs.GATE | Needs.EMBEDDING | Needs.PAST
    assert MapTrajectory.needs == Needs.GATE | Needs.PAST
    assert HitCount.needs == Needs.PAST
