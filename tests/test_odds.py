"""Chances of use: counted as NumPy counts them, and what the two seats make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from moesim.errors import UsageError
from moesim.policies.odds import BINS, CALM, IMAGINED, LEAST_BITS, PASSED, WEIGHTS, Listener
from moesim.policies.pair_odds import PairOdds
from moesim.policies.reuse_odds import ReuseOdds, rest_of, worth
from moesim.policy import World, check_policy
from moesim.types import (
    DROPPED,
    PROBABILITY_ONE,
    AnyArray,
    Fact,
    Forecast,
    Gate,
    LayerEvent,
    Phase,
    Slot,
    State,
)
from moesim.view import Window
from tests.harness import run
from tests.strategies import Case
from tests.test_engines import equal
from tests.test_laws import mixed_case
from tests.toys import told, toy

ONE = PROBABILITY_ONE
LAYERS, EXPERTS, TOP_K = 3, 6, 2


def gate(event: int, rows: Sequence[Sequence[int]], slots: Sequence[tuple[int, int]]) -> Gate:
    """Layer events follow each other; ``slots``: (request, tokens) of the rows."""
    layer, first, cut = event % LAYERS, 0, []
    for request, tokens in slots:
        cut.append(Slot(request, 1, Phase.DECODE, first, tokens))
        first += tokens
    chosen = np.array(rows, np.uint16)
    asked = list(dict.fromkeys(int(e) for e in chosen.reshape(-1) if e != DROPPED))
    experts = np.array(asked, np.int64) + layer * EXPERTS
    source = LayerEvent(event, event // LAYERS, layer, tuple(cut), chosen)
    none = np.zeros(len(experts), np.uint8)
    return Gate(source, experts, np.ones(len(experts), np.int64), none, none)


def served(number: int, events: int = 120) -> list[Gate]:
    """Passes of one to three requests, some with several tokens, some with dropped experts."""
    rng = np.random.default_rng(number)
    gates: list[Gate] = []
    likes = rng.dirichlet(np.ones(EXPERTS), LAYERS) + 0.02
    likes /= likes.sum(axis=1, keepdims=True)
    slots = [(0, 3)]
    for event in range(events):
        if event % LAYERS == 0 and event:
            first = int(rng.integers(0, 4))
            slots = [(first + i, int(rng.integers(1, 4))) for i in range(int(rng.integers(1, 4)))]
            slots = slots if rng.random() < 0.3 else [(event // 30, 1)]
        p = likes[event % LAYERS]
        rows = [
            rng.choice(EXPERTS, TOP_K, replace=False, p=p).tolist()
            for _ in range(sum(t for _, t in slots))
        ]
        rows = [[*row[:-1], DROPPED] if rng.random() < 0.1 else row for row in rows]
        gates.append(gate(event, rows, slots))
    return gates


def world(past: Sequence[Fact] | None = None, capacity: int = 5) -> World:
    sizes = np.ones((1, LAYERS), np.int64)
    told_before = None if past is None else (lambda: past)
    return World(LAYERS, EXPERTS, TOP_K, sizes, (capacity,), "global", past=told_before)


# ---- the counts, said again in NumPy -------------------------------------------------------------


def log2(numbers: AnyArray) -> AnyArray:
    """By the eleven leading bits, in 1/1024."""
    mantissas, exponents = np.frexp(np.asarray(numbers).astype(np.float64))
    leading = np.floor(mantissas * 2048) / 2048
    return (exponents * 1024 + np.rint(np.log2(leading) * 1024)).astype(np.int64)


class Restated:
    """Every count recomputed from the gates so far; nothing is kept but what bins have seen."""

    def __init__(self, reach: int, window: int) -> None:
        self.reach, self.window = reach, window
        middles = np.arange(BINS) / 4 + LEAST_BITS
        imagined = np.rint(ONE / (1 + np.exp2(-middles))).astype(np.int64) * IMAGINED
        self.trials = np.full((2 + reach, LAYERS, BINS), IMAGINED, np.int64)
        self.used = np.broadcast_to(imagined, self.trials.shape).copy()
        self.z: dict[tuple[int, int], AnyArray] = {}
        self.gates: list[Gate] = []

    def hear(self, now: Gate) -> None:
        layer = now.layer
        used = np.isin(np.arange(EXPERTS) + layer * EXPERTS, now.experts)
        for kind in range(2 + self.reach):
            z = self.z.pop((kind, layer), None)
            if z is not None:
                place = ((z - LEAST_BITS * 1024 + 128) >> 8).clip(0, BINS - 1)
                np.add.at(self.trials[kind, layer], place, 1)
                np.add.at(self.used[kind, layer], place, used * ONE)
        self.gates.append(now)
        logs = self.logs(layer)
        self.z[0, layer] = (np.array(WEIGHTS[0]) @ logs) >> 4
        self.z[1, layer] = (np.array(WEIGHTS[1]) @ logs) >> 4

    def probabilities(self, kind: int, layer: int, z: AnyArray) -> AnyArray:
        place = (z - LEAST_BITS * 1024).clip(0, (BINS - 1) * 256 - 1)
        shares = self.used[kind, layer] // self.trials[kind, layer]
        return (
            shares[place >> 8] * (256 - (place & 255)) + shares[(place >> 8) + 1] * (place & 255)
        ) >> 8

    def soon_and_later(self, layer: int) -> tuple[AnyArray, AnyArray]:
        later, soon = (self.probabilities(i, layer, self.z[i, layer]) for i in (0, 1))
        return soon, later

    def foresee(self) -> list[AnyArray]:
        layer = self.gates[-1].layer
        trail = self.trail(len(self.gates) - 1)[: self.window]
        found = []
        for d in range(1, self.reach + 1):
            target = (layer + d) % LAYERS
            base = (np.array(WEIGHTS[2]) @ self.logs(target)) >> 4 if self.seen(target) else 0
            total = sum(self.evidence(d + w, target, ends(one)) for w, one in enumerate(trail))
            z = base + total * PASSED // (16 * self.window)
            self.z[1 + d, target] = z
            found.append(self.probabilities(1 + d, target, z))
        return found

    def seen(self, layer: int) -> list[Gate]:
        return [g for g in self.gates if g.layer == layer]

    def logs(self, layer: int) -> AnyArray:
        """[5, E]: three faded counts, the frequency, and what the last pass names."""
        faded = np.zeros((3, EXPERTS), np.int64)
        uses = np.ones(EXPERTS, np.int64)
        for one in self.seen(layer):
            faded = faded * np.array([[8192], [14746], [16056]]) >> 14
            faded[:, one.experts - layer * EXPERTS] += ONE
            uses[one.experts - layer * EXPERTS] += 1
        frequency = log2(uses) - log2(np.array([EXPERTS + len(self.seen(layer))]))
        last = self.evidence(0, layer, ends(self.seen(layer)[-1]))
        return np.concatenate((log2(faded + ONE // 4) - 14 * 1024, [frequency], [last]))

    def evidence(self, lag: int, layer: int, earlier: list[list[int]]) -> AnyArray:
        pairs = self.pairs(lag, layer)
        uses = np.ones(EXPERTS, np.int64)
        for one in self.seen(layer):
            uses[one.experts - layer * EXPERTS] += 1
        events = EXPERTS + len(self.seen(layer))
        said = []
        for row in earlier:
            total = np.zeros(EXPERTS, np.int64)
            for source in row:
                given = sum(then.count(source) for then, _ in pairs) + CALM
                both = [
                    sum(then.count(source) * now.count(e) for then, now in pairs)
                    for e in range(EXPERTS)
                ]
                ratio = ((np.array(both) * events + CALM * uses) << 10) // (given * uses)
                total += log2(ratio + 1) - 10 * 1024
            said.append(total)
        return np.max(said, axis=0)

    def trail(self, index: int) -> list[Gate]:
        """The gate and those before it of the same requests, newest first."""
        found = []
        for one in reversed(self.gates[: index + 1]):
            if requests(one) != requests(self.gates[index]):
                break
            found.append(one)
        return found

    def pairs(self, lag: int, layer: int) -> list[tuple[list[int], list[int]]]:
        """(earlier row, row) of every two tokens that the counts are about."""
        found = []
        before: dict[int, list[int]] = {}
        for index, one in enumerate(self.gates):
            if one.layer != layer:
                continue
            mine = rows(one)
            if lag == 0:
                after: dict[int, list[int]] = {}
                for slot in one.source.slots:
                    own = mine[slot.first : slot.first + slot.tokens]
                    line = [before[slot.request], *own] if slot.request in before else own
                    found += list(pairwise(line))
                    after[slot.request] = own[-1]
                before = after
                continue
            trail = self.trail(index)
            if lag < len(trail) and lag <= self.reach + self.window - 1:
                then = trail[lag]
                alike = then.source.step == one.source.step
                found += list(
                    zip(*((rows(then), mine) if alike else (ends(then), ends(one))), strict=True)
                )
        return found


def rows(one: Gate) -> list[list[int]]:
    return np.minimum(one.source.token_experts, EXPERTS).tolist()


def ends(one: Gate) -> list[list[int]]:
    """Of each request its last token's."""
    return [rows(one)[s.first + s.tokens - 1] for s in one.source.slots]


def requests(one: Gate) -> list[int]:
    return [s.request for s in one.source.slots]


@pytest.mark.parametrize("number", range(3))
def test_the_counts_are_those_of_numpy(number: int) -> None:
    listener, restated = Listener(LAYERS, EXPERTS, 2, 2), Restated(2, 2)
    for one in served(number):
        listener.hear(one)
        restated.hear(one)
        soon, later = restated.soon_and_later(one.layer)
        assert listener.odds.shares[0].tolist() == later.tolist()
        assert listener.odds.shares[1].tolist() == soon.tolist()
        made = listener.foresee(one.layer)
        assert made.tolist() == [shares.tolist() for shares in restated.foresee()]


@pytest.mark.parametrize("horizon", [0.5, 2.0])
def test_the_score_is_the_formula(horizon: float) -> None:
    """With Fractions, to what rounding four numbers to 1/16384 can do."""
    seat = ReuseOdds(horizon)
    seat.begin(world())
    theta = 0.5 ** (1 / (horizon * LAYERS))
    again = theta**LAYERS
    known: dict[int, tuple[AnyArray, AnyArray]] = {}
    for one in served(5, 60):
        seat.on(one)
        later, soon = seat.listener.odds.shares[:2].copy()
        known[one.layer] = soon / ONE, later / ONE
        for layer, (p, q) in known.items():
            wait = (layer - one.layer - 1) % LAYERS + 1
            worths = p + (1 - p) * q * again / (1 - (1 - q) * again)
            ids = np.arange(EXPERTS) + layer * EXPERTS
            made = seat.scores(ids, one.event) / 2.0**42
            assert np.abs(made - theta**wait * worths).max() < 8 / ONE


def test_what_is_left_after_a_chance_has_passed() -> None:
    """The series q a + (1-q) q a^2 + ..., summed."""
    for q in (0, 1, 700, 9000, ONE):
        for again in (100, 8192, 16000):
            a, share = Fraction(again, ONE), Fraction(q, ONE)
            exact = share * a / (1 - (1 - share) * a)
            made = Fraction(int(rest_of(np.array([q]), again)[0]), ONE)
            assert abs(made - exact) < Fraction(64, ONE), (q, again)
    assert worth(np.array([ONE, 0]), np.array([5, 5])).tolist() == [ONE * ONE, 5 * ONE]


# ---- what they learn -----------------------------------------------------------------------------


def test_the_past_is_served_before() -> None:
    """Whoever was told the past scores as whoever served it."""
    facts = served(7)
    for past in (0, 60, 120):
        told_before, served_all = ReuseOdds(), ReuseOdds()
        told_before.begin(world(facts[:past]))
        served_all.begin(world([]))
        for one in facts[past:]:
            told_before.on(one)
        for one in facts:
            served_all.on(one)
        ids = np.arange(LAYERS * EXPERTS)
        assert told_before.scores(ids, 0).tolist() == served_all.scores(ids, 0).tolist()


class Hosted:
    """A prefetch seat and the cache that it sees."""

    def __init__(self, past: Sequence[Fact] = (), **parameters: object) -> None:
        self.seat = PairOdds(**parameters)  # type: ignore[arg-type]
        self.states = np.zeros(LAYERS * EXPERTS, np.uint8)
        self.queued = 0
        self.view = Window(self.states, lambda: 0, lambda: self.queued, lambda layer: 0)
        self.seat.begin(world(past))


def turning(events: int, first: int = 0) -> list[Gate]:
    """Token t chooses 2t and 2t + 1 (of 6) in every layer."""
    made = []
    for event in range(first, first + events):
        pair = [2 * (event // LAYERS) % EXPERTS, (2 * (event // LAYERS) + 1) % EXPERTS]
        made.append(gate(event, [pair], [(0, 1)]))
    return made


def test_it_names_what_follows() -> None:
    """Also in the next pass, and only what is likely and absent; the queue is kept short."""
    hosted = Hosted(turning(300), distance=2, width=4, floor=0.5)
    layer_0, layer_1, layer_2 = turning(3, 300)
    plan = hosted.seat.plan(layer_0, hosted.view)
    # 300 is the first layer of a pass that chooses 2 and 3.
    wanted = {6 + 2, 6 + 3, 12 + 2, 12 + 3}
    assert {w.expert for w in plan.prefetches} == wanted
    assert {w.expert: w.expires for w in plan.prefetches} == {8: 301, 9: 301, 14: 302, 15: 302}
    assert plan.foreground_ops == 2 * 3 * TOP_K * EXPERTS
    hosted.seat.plan(layer_1, hosted.view)
    hosted.states[4] = State.RESIDENT
    plan = hosted.seat.plan(layer_2, hosted.view)
    assert {w.expert for w in plan.prefetches} == {5, 6 + 4, 6 + 5}, "the next pass chooses 4 and 5"
    shares = {f.layer: f.probabilities for f in plan.forecasts}
    for wish in plan.prefetches:
        assert wish.priority == shares[wish.expert // EXPERTS][wish.expert % EXPERTS] > ONE // 2


def test_a_decoder_behind_an_encoder_comes_to_itself_again() -> None:
    """Layer 0 is an encoder's: passes after the prompt's serve layers 1 and 2 alone."""
    passes = [event for event in range(300) if event % LAYERS or event % 30 == 0]
    gates = [turning(300)[event] for event in passes]
    seat = PairOdds(distance=2, width=4, floor=0.5)
    seat.begin(replace(world(gates), decode_from=1))
    for one in turning(3, 300):
        plan = seat.plan(one, Hosted().view)
    assert [forecast.layer for forecast in plan.forecasts] == [1]
    assert {w.expert for w in plan.prefetches} == {6 + 4, 6 + 5}, "the next pass chooses 4 and 5"
    keep = ReuseOdds()
    keep.begin(replace(world(gates), decode_from=1))
    keep.on(turning(3, 300)[2])
    worths = keep.worth.reshape(-1) * keep.discount[np.repeat([3 - 2, 1, 2], EXPERTS)]
    assert keep.scores(np.arange(LAYERS * EXPERTS), 0).tolist() == worths.tolist()


@pytest.mark.parametrize("queued, wishes", [(0, 3), (1, 2), (3, 0), (7, 0)])
def test_the_queue_prices_its_breadth(queued: int, wishes: int) -> None:
    hosted = Hosted(turning(300), distance=2, width=3, floor=0.5)
    hosted.queued = queued
    assert len(hosted.seat.plan(turning(1, 300)[0], hosted.view).prefetches) == wishes


def test_what_cannot_be_known_is_not_wished() -> None:
    rng = np.random.default_rng(3)
    past = [gate(n, [rng.permutation(EXPERTS)[:TOP_K].tolist()], [(0, 1)]) for n in range(900)]
    hosted = Hosted(past, floor=0.7)
    shares = []
    for one in past[:90]:
        plan = hosted.seat.plan(
            replace(one, source=replace(one.source, event=one.event + 900)), hosted.view
        )
        assert not plan.prefetches
        shares += [f.probabilities.mean() / ONE for f in plan.forecasts]
    assert abs(np.mean(shares) - TOP_K / EXPERTS) < 0.03, "probabilities are shares of use"


def test_a_forecast_raises_what_it_names() -> None:
    seat = ReuseOdds()
    seat.begin(world(served(9)))
    ids = np.arange(EXPERTS, 2 * EXPERTS)
    shares = np.array([ONE, 0, 0, 0, 0, 0])
    seat.expected(Forecast(1, shares, np.array([0])))
    scores = seat.scores(ids, 120)
    assert (
        scores.argmax() == 0
        and scores[0] == ONE * ONE * seat.discount[(1 - seat.now - 1) % LAYERS + 1]
    )


@pytest.mark.parametrize(
    "made",
    [
        lambda: ReuseOdds(horizon=0.05),
        lambda: ReuseOdds(horizon=math.inf),
        lambda: PairOdds(distance=0),
        lambda: PairOdds(window=17),
        lambda: PairOdds(width=0),
        lambda: PairOdds(floor=1.5),
    ],
)
def test_parameters_have_their_range(made: object) -> None:
    with pytest.raises(UsageError, match="must lie between"):
        made()  # type: ignore[operator]


# ---- in the engines ------------------------------------------------------------------------------


def follower() -> Case:
    """In the past a0, b2 and a1, b3 took turns. What comes is the same, and a pass too much for
    three slots: every pass needs what the last one did not."""
    turns = [(0, 2), (1, 3)] * 12
    case = toy([[(0, 2), (1, 3), (0, 2), (1, 3), (0, 2)]], 4, 3, load_ns=2, dense_ns=4)
    return replace(case, past=toy([turns], 4, 3).requests)


LOGS: dict[tuple[str, ...], list[str]] = {
    # All counts fade alike, so the oldest goes, which is what comes next.
    ("lfu-decay",): [
        "start",
        "a0m: +a0",
        "b2m: +b2",
        "a1m: +a1",
        "b3m: -a0 +b3",
        "a0m: -b2 +a0",
        "b2m: -a1 +b2",
        "a1m: -b3 +a1",
        "b3m: -a0 +b3",
        "a0m: -b2 +a0",
        "b2m: -a1 +b2",
    ],
    # It knows b from a, and not the next a from b; its wishes wait behind the same eviction.
    ("next-gate",): [
        "start",
        "a0m: +a0 *b2",
        "b2h:",
        "a1m: +a1 -a0 *b3",
        "b3h:",
        "a0m: -b2 +a0",
        "b2m: -a1 +b2",
        "a1m: -b3 +a1",
        "b3m: -a0 +b3",
        "a0m: -b2 +a0",
        "b2m: -a1 +b2",
    ],
    # At first nothing has passed, and either expert of b may come. Then: after b2 comes a1, after
    # that b3, across the end of a pass too. What has just been used goes: its next chance is the
    # furthest, and in the past it was not used twice in a row.
    ("odds", "miss=fetch"): [
        "start",
        "a0m: +a0 *b2 *b3",
        "b2h: -b2 *a1",
        "a1h:",
        "b3h:",
        "a0h: -a0 *b2",
        "b2h:",
        "a1h:",
        "b3h: -b3 *a0",
        "a0h:",
        "b2h:",
    ],
}


@pytest.mark.parametrize("policy", LOGS)
def test_what_follows_is_fetched_and_what_just_passed_goes(policy: tuple[str, ...]) -> None:
    assert told(run(follower(), *policy), 4) == LOGS[policy]


@pytest.mark.parametrize("number", range(6))
def test_both_engines_agree(number: int) -> None:
    rng = np.random.default_rng(900 + number)
    sets = [(), ("miss=fetch",), ("prefetch=none",), ("keep=lru", "prefetch.distance=1")][
        number % 4
    ]
    equal(mixed_case(rng), "odds", *sets)


def test_they_keep_the_laws_of_a_policy() -> None:
    check_policy(ReuseOdds)
    check_policy(PairOdds)
