"""MoE-Infinity's matrices, matches, weights and eviction against their equations, written again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.errors import UsageError
from moesim.policies.activation_matrix import (
    ActivationMatrix,
    ActivationMatrixKeep,
    Collection,
    Request,
    best,
    proximity,
    shares,
    tokens_of,
    worth,
)
from moesim.policies.forecast import PRIORITY_SHIFT
from moesim.policy import World, check_policy
from moesim.types import (
    DROPPED,
    PROBABILITY_ONE,
    AnyArray,
    Forecast,
    Gate,
    IterationBegin,
    LayerEvent,
    Phase,
    Plan,
    RequestBegin,
    RequestEnd,
    Slot,
)
from tests.harness import run
from tests.test_laws import mixed_case

LAYERS, EXPERTS = 5, 6


class Equations:
    """The paper's equations in floats, and the released code's, straight from their description."""

    @staticmethod
    def normalised(matrix: AnyArray) -> AnyArray:
        sums = matrix.sum(axis=1, keepdims=True)
        return matrix / np.where(sums == 0, 1, sums)

    @classmethod
    def paper(cls, now: AnyArray, entry: AnyArray, layer: int) -> float:
        seen = [la for la in range(layer + 1) if now[la].any()]
        a, b = cls.normalised(now)[seen].ravel(), cls.normalised(entry)[seen].ravel()
        return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))

    @staticmethod
    def code(whole: AnyArray, entry: AnyArray, layer: int) -> float:
        rows = [
            whole[la] @ entry[la] / (np.linalg.norm(whole[la]) * np.linalg.norm(entry[la]))
            for la in range(layer + 1)
        ]
        return float(np.mean(rows))

    @classmethod
    def weights(cls, matched: AnyArray, layer: int, span: int) -> AnyArray:
        """p (1 - (i - l) / L) for every later layer."""
        later = np.arange(layer + 1, LAYERS)
        made = np.zeros((LAYERS, EXPERTS))
        made[later] = cls.normalised(matched.sum(axis=0))[later]
        made[later] *= (1 - (later - layer) / span)[:, None]
        return made


def matrices(rng: np.random.Generator, count: int) -> AnyArray:
    made: AnyArray = rng.integers(0, 9, (count, LAYERS, EXPERTS))
    made[:, :, 0] += 1  # no row is empty
    return made


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_a_match_is_the_cosine_of_what_was_observed(variant: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        collection = Collection(8, LAYERS, EXPERTS, variant)
        entries = matrices(rng, int(rng.integers(1, 8)))
        for entry in entries:
            collection.insert(entry)
        request = Request(LAYERS, EXPERTS)
        before, now = matrices(rng, 2)
        for layer, counts in enumerate(before):
            request.observe(layer, counts, variant)
        request.begin_pass()
        for layer, counts in enumerate(now):
            request.observe(layer, counts, variant)
            found = request.match(collection)
            if variant == "paper":
                wanted = [Equations.paper(now, e, layer) for e in entries]
                assert np.abs(found - wanted).max() < 1e-3
            else:
                wanted = [Equations.code(before + now, e, layer) for e in entries]
                assert np.abs(found / 2**30 / (layer + 1) - wanted).max() < 1e-8
            # Rows that were matched before count on: the same as all rows matched afresh.
            afresh = Request(LAYERS, EXPERTS)
            afresh.prefix, afresh._newest = dict(request.prefix), layer
            assert (afresh.match(collection) == found).all()


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_what_another_request_leaves_meanwhile_is_matched_as_well(variant: str) -> None:
    rng = np.random.default_rng(9)
    collection = Collection(2, LAYERS, EXPERTS, variant)
    request = Request(LAYERS, EXPERTS)
    collection.insert(matrices(rng, 1)[0])
    for layer, counts in enumerate(matrices(rng, 1)[0]):
        request.observe(layer, counts, variant)
        afresh = Request(LAYERS, EXPERTS)
        afresh.prefix, afresh._newest = dict(request.prefix), layer
        assert (request.match(collection) == afresh.match(collection)).all()
        # The second fills the collection, later ones replace.
        collection.insert(matrices(rng, 1)[0])


def test_the_shares_of_a_row() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 1 << 30, (40, EXPERTS))
    counts[::7] = 0
    made = shares(counts.astype(np.float64))
    assert np.abs(made - Equations.normalised(counts) * PROBABILITY_ONE).max() <= 0.5
    assert (made[::7] == 0).all()


def test_the_nearest_and_all_that_tie_are_summed() -> None:
    assert best(np.array([3, 1, 3, 2]), 1).tolist() == [True, False, True, False]
    assert best(np.array([3, 1, 3, 2]), 3).tolist() == [True, False, True, True]
    assert best(np.zeros(4), 1).all() and best(np.zeros(1), 3).all()


def test_proximity() -> None:
    for distance in range(1, 9):
        exact = 0.75 * (1 - distance / 8)
        got = proximity(np.array([PROBABILITY_ONE * 3 // 4, 0]), distance, 8)
        assert got.tolist() == [int(exact * PROBABILITY_ONE * (1 << PRIORITY_SHIFT)), 0]
    assert proximity(np.array([PROBABILITY_ONE]), 9, 8) == 0


# ---- a whole policy, told by hand ----------------------------------------------------------------


class Cache:
    """Nothing is resident."""

    states = np.zeros(LAYERS * EXPERTS, np.uint8)
    jobs_waiting = 0


def world(**more: Any) -> World:
    made = World(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=2,
        expert_bytes=np.ones((1, LAYERS), np.int64),
        capacity_bytes=(99,),
        scope="global",
    )
    return replace(made, **more)


def gate(event: int, layer: int, chosen: Any, slots: tuple[Slot, ...]) -> Gate:
    token_experts = np.array(chosen, np.uint16)
    source = LayerEvent(event, 0, layer, slots, token_experts)
    empty = np.zeros(0, np.int64)
    return Gate(source, empty, empty, empty, empty)


def served(seat: ActivationMatrix, request: int, passes: AnyArray, first: int) -> list[Plan]:
    """Tell a request: passes [n, L, T, k]. The plans of all its facts."""
    cache: Any = Cache()
    plans = [seat.plan(RequestBegin(request, 1), cache)]
    event = first
    for number, layers in enumerate(passes):
        begin = IterationBegin(request, number + 1, Phase.DECODE, 1)
        plans.append(seat.plan(begin, cache))
        for layer, tokens in enumerate(layers):
            slot = Slot(request, number + 1, Phase.DECODE, 0, len(tokens))
            plans.append(seat.plan(gate(event, layer, tokens, (slot,)), cache))
            event += 1
    return [*plans, seat.plan(RequestEnd(request), cache)]


def counted(passes: AnyArray) -> AnyArray:
    """The matrix of passes [n, L, T, k]."""
    made = np.zeros((LAYERS, EXPERTS), np.int64)
    for layers in passes:
        for layer, tokens in enumerate(layers):
            np.add.at(made[layer], tokens[tokens < EXPERTS].astype(np.int64), 1)
    return made


def passes_of(rng: np.random.Generator, count: int = 3) -> AnyArray:
    made = rng.permuted(
        np.broadcast_to(np.arange(EXPERTS, dtype=np.uint16), (count, LAYERS, 2, EXPERTS)), axis=3
    )
    return made[..., :2]


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_wishes_are_the_weights_of_the_equations(variant: str) -> None:
    """After every gate: which experts, and their priorities, for every later layer."""
    rng = np.random.default_rng(3)
    seat = ActivationMatrix(variant=variant)
    seat.begin(world())
    past = [passes_of(rng) for _ in range(6)]
    for number, passes in enumerate(past):
        served(seat, number, passes, 100 * number)
    entries = [counted(passes) for passes in past]
    now = passes_of(rng)
    plans = served(seat, 77, now, 10_000)
    span = LAYERS if variant == "paper" else LAYERS + 1
    at = 1
    for number in range(len(now)):
        assert plan_weights(plans[at], -1) == weighed(np.stack(entries), -1, span)
        for layer in range(LAYERS):
            iteration, whole = counted(now[number : number + 1]), counted(now[:number])
            whole[: layer + 1] += iteration[: layer + 1]
            rule, seen = (
                (Equations.paper, iteration) if variant == "paper" else (Equations.code, whole)
            )
            similar = np.array([rule(seen, e, layer) for e in entries])
            nearest = np.stack(
                [e for e, s in zip(entries, similar, strict=True) if s > similar.max() - 1e-9]
            )
            assert plan_weights(plans[at + 1 + layer], layer) == weighed(nearest, layer, span)
        at += 1 + LAYERS


def plan_weights(plan: Plan, layer: int) -> dict[int, float]:
    """Expert -> its priority as a weight, rounded; the event must be its layer's."""
    first = min((p.expires - p.expert // EXPERTS for p in plan.prefetches), default=0)
    assert all(p.expires - p.expert // EXPERTS == first for p in plan.prefetches)
    scale = PROBABILITY_ONE << PRIORITY_SHIFT
    return {p.expert: round(p.priority / scale, 3) for p in plan.prefetches}


def weighed(matched: AnyArray, layer: int, span: int) -> dict[int, float]:
    weights = Equations.weights(matched, layer, span)
    used = matched.sum(axis=0) > 0
    return {
        i * EXPERTS + e: pytest.approx(weights[i, e], abs=1.1e-3)
        for i in range(layer + 1, LAYERS)
        for e in np.flatnonzero(used[i]).tolist()
    }


def test_the_work_of_a_prediction_is_charged_to_the_layer() -> None:
    rng = np.random.default_rng(4)
    seat = ActivationMatrix()
    seat.begin(world())
    assert all(p.foreground_ops == 0 for p in served(seat, 0, passes_of(rng), 0))
    served(seat, 1, passes_of(rng), 100)
    plans = served(seat, 2, passes_of(rng, 1), 200)
    summing = LAYERS * EXPERTS
    ops = [summing + (la + 1) * 2 * EXPERTS for la in range(LAYERS)]
    ops[0] += summing  # what was summed when the pass began
    assert [p.foreground_ops for p in plans[2:-1]] == ops
    assert all(not p.jobs for p in plans)


def test_in_the_background_it_commissions_jobs() -> None:
    rng = np.random.default_rng(4)
    seat = ActivationMatrix(background=True)
    seat.begin(world())
    served(seat, 0, passes_of(rng), 0)
    plans = served(seat, 1, passes_of(rng, 1), 100)
    assert sum(len(p.jobs) for p in plans) == 1 + LAYERS
    assert not any(p.prefetches or p.foreground_ops for p in plans)


def test_a_batch_takes_the_largest_of_its_requests() -> None:
    seat = ActivationMatrix()
    seat.begin(world())
    cache: Any = Cache()
    same = np.arange(LAYERS)[None, :, None, None].astype(np.uint16)
    served(seat, 0, same % 2, 0)  # 0, 1, 0, 1, 0
    served(seat, 1, same % 2 + 2, 100)  # 2, 3, 2, 3, 2
    for request in (5, 6):
        seat.plan(RequestBegin(request, 1), cache)
    # Told from all matrices once, not for each of the batch.
    begun = [seat.plan(IterationBegin(r, 1, Phase.DECODE, 1), cache) for r in (5, 6)]
    assert [bool(p.prefetches) for p in begun] == [True, False]
    slots = (Slot(5, 1, Phase.DECODE, 0, 1), Slot(6, 1, Phase.DECODE, 1, 1))
    plan = seat.plan(gate(200, 0, [[0], [2]], slots), cache)
    nearest = [w for w in plan.prefetches if w.expert // EXPERTS == 1]
    assert [(w.expert % EXPERTS, w.priority) for w in nearest] == [
        (1, int(proximity(np.array(PROBABILITY_ONE), 1, LAYERS))),
        (3, int(proximity(np.array(PROBABILITY_ONE), 1, LAYERS))),
    ]


def test_dropped_slots_and_other_requests_count_nothing() -> None:
    token_experts = np.array([[0, 1], [DROPPED, 2], [2, 3]], np.uint16)
    slot = Slot(0, 1, Phase.DECODE, 0, 2)
    assert tokens_of(slot, token_experts, EXPERTS).tolist() == [1, 1, 1, 0, 0, 0]


def test_a_chunked_prefill_is_matched_by_the_chunk_and_counted_whole() -> None:
    collection = Collection(2, LAYERS, EXPERTS, "paper")
    collection.insert(counted(passes_of(np.random.default_rng(0))))
    request = Request(LAYERS, EXPERTS)
    one = np.eye(EXPERTS, dtype=np.int64)
    for chunk in range(2):
        for layer in range(LAYERS):
            request.observe(layer, one[chunk], "paper")
            request.match(collection)
            assert sorted(request.prefix) == list(range(layer + 1))
    assert (request.whole == one[0] + one[1]).all()


# ---- the collection ------------------------------------------------------------------------------


def test_the_paper_replaces_what_is_most_like_the_new_one() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        collection = Collection(4, LAYERS, EXPERTS, "paper")
        entries = list(matrices(rng, 4))
        for entry in entries:
            collection.insert(entry)
        new = matrices(rng, 1)[0]
        like = [Equations.paper(new, e, LAYERS - 1) for e in entries]
        collection.insert(new)
        entries[int(np.argmax(like))] = new
        assert (collection.counts == np.stack(entries)).all()


def test_the_code_replaces_what_was_matched_least() -> None:
    collection = Collection(3, LAYERS, EXPERTS, "code")
    entries = matrices(np.random.default_rng(6), 5)
    for entry in entries[:3]:
        collection.insert(entry)
    collection.accessed[:3] = [2, 1, 1]
    collection.insert(entries[3])  # the older of the two
    collection.insert(entries[4])
    assert (collection.counts == entries[[0, 3, 4]]).all()
    assert collection.accessed.tolist() == [2, 1, 1]


def test_the_past_fills_the_collection_as_serving_does() -> None:
    case = mixed_case(np.random.default_rng(7))
    made = run(replace(case, batch=1), "moe-infinity")
    assert made.tally.prefetch.planned
    without = run(replace(case, batch=1), "lru", "prefetch=activation-matrix")
    assert without.tally.named == made.tally.named


# ---- eviction ------------------------------------------------------------------------------------


def test_the_keep_seat_is_the_equation() -> None:
    rng = np.random.default_rng(8)
    keep = ActivationMatrixKeep()
    keep.begin(world())
    expected = matrices(rng, 1)[0]
    normal = shares(expected)
    for layer, row in enumerate(normal):
        keep.expected(Forecast(layer, row, row[:0]))
    layers = np.repeat(np.arange(LAYERS), EXPERTS)
    exact = (normal.ravel() / PROBABILITY_ONE + 1 / PROBABILITY_ONE) * (1 - layers / LAYERS)
    got = keep.scores(np.arange(LAYERS * EXPERTS), 0)
    assert np.allclose(got / (PROBABILITY_ONE * LAYERS), exact)
    assert worth(np.array([0]), np.array([0]), LAYERS) == LAYERS


@pytest.mark.parametrize(
    "bad",
    [{"variant": "both"}, {"size": -1}, {"nearest": 0}, {"width": -1}, {"distance": 0},
     {"refresh": True}, {"queue": 0}],
)  # fmt: skip
def test_parameters_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"prefetch.{next(iter(bad))}="):
        ActivationMatrix(**bad)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_it_conforms_in_the_background_as_well(variant: str) -> None:
    check_policy(lambda: ActivationMatrix(variant=variant, background=True, size=1))
