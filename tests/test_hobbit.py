"""HOBBIT: two precisions of an expert, what serves, and what goes first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.answers import Answers
from moesim.cli import main
from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import PolicyError, UsageError
from moesim.policies.hobbit import Hobbit, unimportance, worth
from moesim.policy import PlainPolicy
from moesim.precision import enough, serving
from moesim.protocol import CacheView, RouteSeat
from moesim.registry import resolve
from moesim.types import DROPPED, PROBABILITY_ONE, AnyArray, LayerEvent, Routed, State
from moesim.view import Window
from tests.harness import drive, inputs_of, run, setup_of, works_of
from tests.strategies import Case, cases, decode_case, machine
from tests.test_engines import equal

ONE = PROBABILITY_ONE


def two_precisions(case: Case) -> Case:
    """The same case, its experts twice as large; in low precision as large as they were."""
    sizes = case.model.expert_bytes_table()
    low, full = tuple(sizes.tolist()), tuple((2 * sizes).tolist())
    model = replace(case.model, precisions=("full", "low"), expert_bytes=(full, low))
    return replace(
        case,
        meta=replace(case.meta, model=model),
        capacity_bytes=tuple(2 * c for c in case.capacity_bytes),
    )


def weighted(
    tokens: list[list[float]], steps: list[list[int]], slots: int, **machine_: int
) -> Case:
    """One layer; ``steps``: the experts of each token, by rank; ``tokens``: their weights."""
    case = decode_case([[s] for s in steps], 4, slots, machine(**machine_), scope="global")
    rows = replace(case.requests[0], weights=np.array(tokens, np.float16))
    return two_precisions(replace(case, requests=(rows,)))


# ---- the equation --------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, ONE), min_size=3, max_size=3), min_size=1, max_size=4))
def test_unimportance_is_the_mass_of_the_heavier(weights: list[list[int]]) -> None:
    """In whatever order they stand; of equal ones the first is heavier."""
    before, whole = unimportance(
        np.array(weights, np.int32), np.zeros((len(weights), 3), np.uint16)
    )
    for t, row in enumerate(weights):
        assert whole[t, 0] == sum(row)
        heavier = [[w for j, w in enumerate(row) if (-w, j) < (-row[i], i)] for i in range(3)]
        assert before[t].tolist() == list(map(sum, heavier))


def test_a_dropped_slot_weighs_nothing() -> None:
    before, whole = unimportance(np.array([[9, 5, 2]]), np.array([[0, DROPPED, 3]], np.uint16))
    assert (before.tolist(), whole.tolist()) == ([[0, 11, 9]], [[11]])


def test_the_four_terms_by_hand() -> None:
    """Two layers, four events: two passes. Used now, in the first event, and never."""
    age, uses, full = np.array([0, 3, 4]), np.array([2, 1, 0]), np.array([1, 1, 0])
    terms = worth(age, uses, full, 4, np.array([0, 1, 1]), 2)
    assert [t.tolist() for t in terms] == [
        [ONE, ONE // 4, 0],
        [ONE, ONE // 2, 0],
        [ONE // 2, ONE // 2, 0],
        [ONE, ONE // 2, ONE // 2],
    ]


def test_a_new_sequence_has_no_past() -> None:
    case = decode_case([[[0]], [[0]], [[1]]], 4, 2)
    twice = replace(case, requests=(case.requests[0], replace(case.requests[0], request=1)))
    policy = resolve(["lru"], ["keep=hobbit"])[0].build()
    run(twice, policy=policy)
    keep = policy.keep  # type: ignore[attr-defined]
    assert isinstance(keep, Hobbit)
    assert keep.uses.tolist() == [2, 1, 0, 0]


# ---- what serves ---------------------------------------------------------------------------------


def test_the_token_that_asks_for_most_decides() -> None:
    chosen = np.array([[1, 0], [2, 1]], np.uint16)
    asked = np.array([[0, 1], [0, 1]], np.uint8)
    assert enough(np.array([5, 4, 6]), chosen, asked, 4).tolist() == [0, 1, 0]


@given(st.lists(st.lists(st.sampled_from(list(State)), min_size=3, max_size=3), min_size=1))
def test_the_best_copy_that_is_there_serves(columns: list[list[State]]) -> None:
    states = np.array(columns, np.uint8).T
    for allowed in range(3):
        found = serving(
            np.arange(len(columns)), np.full(len(columns), allowed, np.uint8), states
        ).tolist()
        for column, got in zip(columns, found, strict=True):
            usable = column[: allowed + 1]
            for state in (State.RESIDENT, State.IN_FLIGHT):
                if state in usable:
                    assert got == usable.index(state)
                    break
            else:
                assert got == allowed


# ---- logs written out ----------------------------------------------------------------------------


def test_what_weighs_little_comes_small() -> None:
    """Two slots, four bytes; a full copy has 2, a low one 1, and its key is 4 more. Status 0 is a
    hit and 2 a miss; a key's word in a gate is four times the key plus the status."""
    heavy, light, sharp = [0.75, 0.25], [0.5, 0.5], [0.9, 0.1]
    case = weighted([heavy, light, heavy, sharp], [[0, 1], [1, 2], [2, 0], [0, 3]], 2)
    done = run(case, "hobbit", "prefetch=none", "route.t2=0.8")
    assert done.records == [
        ("gate", 0, 0, 0, 2, 2, 4 * 0 + 2, 4 * 5 + 2),
        ("issue", 0, 0, 0),
        ("land", 2, 0),
        ("issue", 2, 5, 0),  # u = 0.75: low precision will do
        ("land", 3, 5),
        ("end", 3, 0),
        ("gate", 3, 1, 0, 2, 2, 4 * 1 + 2, 4 * 2 + 2),  # a low copy of 1 will not do
        ("evict", 3, 0),
        ("issue", 3, 1, 0),
        ("land", 5, 1),
        ("evict", 5, 5),  # beside a full copy it is worth nothing
        ("issue", 5, 2, 0),
        ("land", 7, 2),
        ("end", 7, 1),
        ("gate", 7, 2, 0, 2, 2, 4 * 2 + 0, 4 * 4 + 2),
        ("evict", 7, 1),
        ("issue", 7, 4, 0),
        ("land", 8, 4),
        ("end", 8, 2),
        ("gate", 8, 3, 0, 1, 2, 4 * 0 + 2),  # 3 has u = 0.9: it is not executed
        ("evict", 8, 2),
        ("issue", 8, 0, 0),
        ("land", 10, 0),
        ("end", 10, 3),
    ]
    quality = done.tally.quality
    assert quality is not None
    assert (quality.chosen, quality.agreed) == (8, 7)
    assert quality.mass - quality.mass_kept == 1638  # a tenth
    assert quality.mass_low == 2 * 4096  # two quarters


@given(
    cases(),
    st.sampled_from(["none", "next-gate", "previous-token"]),
    st.sampled_from(["hobbit", "lru"]),
)
def test_i8_on_whatever_can_be_made(case: Case, prefetch: str, keep: str) -> None:
    settings = (f"prefetch={prefetch}", f"keep={keep}")
    equal(two_precisions(case), "hobbit", *settings, "route.t1=0.3", "route.t2=0.7")


@given(cases(), st.sampled_from(["lru", "next-gate", "lfu"]))
def test_with_both_thresholds_at_one_it_fetches(case: Case, name: str) -> None:
    """T1 = T2 = 1: everything is executed in full, and the decisions are those of a fetch."""
    wide = two_precisions(case)
    plain = run(wide, name)
    bent = run(wide, name, "route=mixed-precision", "route.t1=1", "route.t2=1")
    assert bent.records == plain.records
    assert bent.tally.quality is not None
    assert bent.tally.quality.mass_kept == bent.tally.quality.mass
    assert bent.tally.quality.mass_low == 0


class Asks(RouteSeat):
    """A route seat that asks for something strange."""

    name = "asks"
    lossy = True
    mixed = True

    def __init__(self, precisions: AnyArray) -> None:
        self.precisions = precisions

    def route(self, event: LayerEvent, cache: CacheView) -> Routed:
        """As recorded, in some precision."""
        return Routed(None, self.precisions)


@pytest.mark.parametrize(
    ("precisions", "line"),
    [
        (np.zeros((1, 2), np.int64), r"precisions of a route must be uint8 \[1, 2\], got int64"),
        (np.zeros((2, 2), np.uint8), r"precisions of a route must be uint8 \[1, 2\], got uint8"),
        (np.full((1, 2), 2, np.uint8), "route asks for precision 2 of 2"),
    ],
)
@pytest.mark.parametrize("engine", [ReferenceEngine, FastEngine])
def test_strange_precisions_are_refused(engine: Any, precisions: AnyArray, line: str) -> None:
    case = weighted([[0.5, 0.5]], [[0, 1]], 2)
    policy = resolve(["lru"])[0].build()
    policy.routing = Asks(precisions)  # type: ignore[attr-defined]
    with pytest.raises(PolicyError, match=line):
        drive(engine(setup_of(case, policy)), works_of(case, inputs_of(policy)))


def test_a_model_in_one_precision_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--trace", "demo", "--policy", "hobbit", "--limit", "1"]) == 2
    assert "executes experts in low precision, and demo" in capsys.readouterr().err


def test_of_two_copies_the_low_one_goes_first_and_both_may_go() -> None:
    """A policy names experts; both copies of one may be meant."""

    class Names(PlainPolicy):
        scored = False

        def victims(self, nbytes: int, cache: CacheView) -> list[int]:
            return list(cache.candidates)

    world = setup_of(two_precisions(decode_case([[[0]]], 4, 2)), Names()).world
    view = Window(np.full(4, State.RESIDENT, np.uint8), lambda: 0, lambda: 0, lambda layer: 0)
    answers = Answers(Names(), world, view, [2, 2, 2, 2, 1, 1, 1, 1])
    assert answers.in_order([1, 2, 5], 4, lambda expert: "absent") == [5, 1, 2]


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("route.t1=0.95", "must rise from 0 to 1, t1 first"),
        ("route.t2=1.5", "must rise from 0 to 1, t1 first"),
        ("keep.lru=-1", "keep.lru=-1: must lie between 0 and 1024"),
    ],
)
def test_parameters_are_checked(setting: str, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        resolve(["hobbit"], [setting])[0].build()
