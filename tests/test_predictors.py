"""Policies that look ahead by other gates or a draft: each decides as its source says, unlike its
neighbours, and alike in both engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Options
from moesim.errors import NotRunError, UsageError
from moesim.policies.draft import Draft, drafted
from moesim.policies.fate import CrossGate, ShallowARC, popular, shares
from moesim.policies.pre_gate import early
from moesim.policies.presets import PRESETS
from moesim.policy import check_policy
from moesim.protocol import Seat
from moesim.registry import resolve
from moesim.types import DROPPED, Needs
from tests.harness import run
from tests.strategies import Case, decode_case, machine
from tests.test_engines import outcome
from tests.test_laws import mixed_case
from tests.test_rivals import settings_of, signature
from tests.test_token_net import echoing
from tests.toys import told, toy

D = DROPPED
ENGINES = (ReferenceEngine, FastEngine)


def misled() -> Case:
    """Three layers, four slots, slow loads; most guesses at the next layer are wrong."""
    guesses = [[[[2], [2], [D]], [[2], [0], [D]]], [[[2], [1], [D]]]]
    return toy([[(0, 1, 2), (0, 2, 3)], [(3, 2, 1)]], 4, 4, load_ns=3, ahead=guesses)


def crowded() -> Case:
    """Four tokens, two guesses each, room for five: Fate's share of layer a is three."""
    far = [[[1, 2], [3, 0], [D, D]]] * 2 + [[[2, 1], [3, 2], [D, D]], [[1, 2], [0, 1], [D, D]]]
    return toy([[(0, 1, 2), (1, 2, 3), (3, 2, 1), (0, 1, 0)]], 4, 5, load_ns=2, ahead=[far])


def known() -> Case:
    """Three tokens, loads that take longer than a layer."""
    return toy([[(0, 1, 2), (0, 2, 3), (3, 1, 2)]], 4, 4, load_ns=3)


EXPECTED: dict[str, tuple[Callable[[], Case], list[str]]] = {
    "pregated": (
        misled,
        [
            "start",
            "a0m: +a0 *b1",  # whatever the guesses say
            "b1l: *c2",
            "c2l:",  # the last layer's gate chooses for nobody
            "a0h: *b2",
            "b2l: -b1 *c3",
            "c3l:",
            "a3m: -c2 +a3",  # look-ahead would have had it under way
            "b2h: -a0 *c1",
            "c1l:",
        ],
    ),
    "speculating-experts": (
        misled,
        [
            "start",
            "a0m: +a0 *b2",  # b2 is guessed,
            "b2l: *c2",  # and b2 is what runs, not b1
            "c2l:",
            "a0h:",
            "b2h: *c0",
            "c0l:",
            "a3m: -c2 +a3",
            "b2h: -a0 *c1",
            "c1l:",
        ],
    ),
    "fate": (
        crowded,
        [
            "start",
            "a0m: +a0 *b1",
            "b1h: !b2 *c3",
            "c2m: !c0 +c2",
            "a1m: +a1 -c3 *b2",  # layer c is above its share of 0; LRU would give a0
            "b2h: -b1 *c3",
            "c3h: !c0",
            "a3m: -c2 +a3 -c3 *b1",
            "b2h: -b1 *c3",
            "c1m: !c2 -b2 +c1",
            "a0h: -c3 *b1",  # layer a's three stayed
            "b1h: !b2 -b1 *c0",
            "c0h:",
        ],
    ),
    "draft": (
        known,
        [
            "start",
            "a0m: +a0 *b2",  # one draw of ten: it says b2 where b1 comes
            "b1m: +b1 *c0",  # and c0 where c2 comes
            "c2m: -a0 +c2 -c0 *c3",
            "a0m: -b2 +a0 -b1 *a3",
            "b2m: -c3 +b2 -c2 *b1",
            "c3m: -a0 +c3 -b2 *c2",
            "a3h:",  # right from here on
            "b1h:",
            "c2h:",
        ],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_it_decides_as_worked_out_by_hand(name: str) -> None:
    make, lines = EXPECTED[name]
    assert told(run(make(), name), 4) == lines


@pytest.mark.parametrize("name", [*EXPECTED, "moe-beyond"])
def test_it_decides_like_no_other_policy(name: str, tmp_path: Path) -> None:
    case = EXPECTED[name][0]() if name in EXPECTED else echoing()
    own = signature(run(case, name, *settings_of(name, case, tmp_path)))
    compared = 0
    for other in PRESETS:
        try:
            seen = signature(run(case, other, *settings_of(other, case, tmp_path)))
        except NotRunError:
            continue  # a model with experts of one precision
        assert (own == seen) == (name == other), other
        compared += 1
    assert compared > len(PRESETS) - 5


@pytest.mark.parametrize("name", ["arc", "cache-prior"])
def test_on_mixed_requests_it_decides_like_no_other_policy(name: str, tmp_path: Path) -> None:
    """Their toys, written out in their own tests, are too small to tell all others from them."""
    rng = np.random.default_rng(40)
    compared = [0] * len(PRESETS)
    left = {other for other in PRESETS if other != name}
    for number in range(6):
        case = mixed_case(rng)
        own = signature(run(case, name, *settings_of(name, case, tmp_path)))
        for other in sorted(left):
            try:
                seen = signature(run(case, other, *settings_of(other, case, tmp_path)))
            except NotRunError:
                left.discard(other)
                continue
            compared[number] += 1
            left -= {other} if seen != own else set()
    assert compared[0] > len(PRESETS) - 5 and not left


@pytest.mark.parametrize("name", EXPECTED)
def test_i8_both_engines_agree_on_mixed_requests(name: str) -> None:
    rng = np.random.default_rng(21)
    for number in range(12):
        case = mixed_case(rng)
        flat = number % 3 == 2 and PRESETS[name].route == "exact"
        case = replace(case, options=replace(case.options, flat=flat))
        reference, fast = (outcome(engine, case, name) for engine in ENGINES)
        assert reference == fast


@pytest.mark.parametrize("name", EXPECTED)
def test_it_conforms(name: str) -> None:
    check_policy(resolve([name])[0].build)


def test_what_knows_the_trace_is_a_bound() -> None:
    """Never ranked; what it rests on is in its parameters."""
    bounds = {n for n in EXPECTED if Needs.FUTURE in resolve([n])[0].build().needs}
    assert bounds == {"pregated", "draft"}
    assert all("(bound)" in PRESETS[name].summary for name in bounds)
    told_of = resolve(["draft"], ["prefetch.recall=0.7"])[0].manifest()
    assert told_of["prefetch"]["parameters"] == {"tokens": 1, "recall": 0.7, "seed": 0}


# ---- Pre-gated MoE -------------------------------------------------------------------------------


def test_a_pre_gate_names_the_next_layer_of_the_pass_and_no_more() -> None:
    """Whatever is prefetched is demanded at the very next event; none for a pass's first layer."""
    rng = np.random.default_rng(4)
    for _ in range(8):
        case = mixed_case(rng)
        made = run(case, "pregated")
        fates = made.tally.prefetch
        assert fates.issued == fates.count["used"] + fates.count["late"]
        prefetched = [r for r in made.of("issue") if r[-1] == 1]
        assert all(r[2] >= case.meta.experts for r in prefetched)


def test_in_flat_mode_it_names_the_next_layer_at_every_access() -> None:
    tokens = [[[0, 1], [2, 3], [1, 2]]] * 2
    case = decode_case(tokens, 4, 2, machine(dense_ns=5))
    case = replace(
        case, capacity_bytes=(12,), options=Options(check=True, timeline=True, flat=True)
    )
    made = run(case, "pregated")
    prefetched = [r[2] for r in made.of("issue") if r[-1] == 1]
    assert prefetched == [4 + 2, 4 + 3, 8 + 1, 8 + 2]


def test_executing_a_guess() -> None:
    guessed = np.array([[3, 1], [5, D], [D, D], [2, 0]], np.uint16)
    chosen = np.array([[1, 0], [5, 4], [6, D], [0, D]], np.uint16)
    assert early(guessed, chosen).tolist() == [[3, 1], [5, 4], [6, D], [2, D]]


def test_a_guess_that_is_right_bends_nothing() -> None:
    """With true predictions the executed path is the recorded one, but for a pass's first layer."""
    case = known()
    plain = run(case, "next-gate")
    bent = run(case, "speculating-experts")
    assert signature(bent) == signature(plain)
    quality = bent.tally.quality
    assert quality is not None and quality.agreed == quality.chosen


def test_executing_needs_predictions() -> None:
    with pytest.raises(UsageError, match="prefetch=next-gate"):
        run(known(), "lru", "route=pre-gate", "prefetch=next-gate", "prefetch.distance=2")


# ---- Fate ----------------------------------------------------------------------------------------


def test_shares_of_the_layers() -> None:
    """The first four whole and the rest evenly, or the first ones as far as it reaches."""
    assert shares(256, 8, 32, 4) == [32] * 8
    assert shares(200, 8, 32, 4) == [32] * 4 + [18] * 4
    assert shares(128, 8, 32, 4) == [32] * 4 + [0] * 4
    assert shares(127, 8, 32, 4) == [32, 32, 32, 31, 0, 0, 0, 0]
    assert shares(40, 8, 32, 4) == [32, 8] + [0] * 6
    assert shares(40, 8, 32, 0) == [5] * 8
    assert shares(9, 2, 8, 4) == [8, 1]
    rng = np.random.default_rng(0)
    for _ in range(200):
        layers, experts, shallow = (int(n) for n in rng.integers(1, 9, 3))
        slots = int(rng.integers(0, layers * experts + 5))
        made = shares(slots, layers, experts, shallow - 1)
        assert sum(made) <= slots and max(made) <= experts and len(made) == layers
        assert made == sorted(made, reverse=True)


def test_the_most_popular_come_first() -> None:
    rows = np.array([[3, 1, D], [1, 2, 0], [2, 1, D]], np.uint16)
    assert popular(rows, 10) == [11, 12, 13, 10]


def test_a_layer_within_its_share_keeps_what_it_has() -> None:
    """While some layer holds more than its share, no other one gives."""
    rng = np.random.default_rng(9)
    passes = [tuple(rng.integers(0, 6, 3).tolist()) for _ in range(40)]
    case = toy([passes], 6, 10)
    share = shares(10 - 2, 3, 6, 4)
    resident: set[int] = set()
    checked = 0
    for what, _, key, *_ in run(case, "lru", "keep=shallow-arc").records:
        held = [sum(e // 6 == layer for e in resident) for layer in range(3)]
        if what == "land":
            resident.add(key)
        elif what == "evict":
            others = [la for la in range(3) if held[la] > share[la]]
            assert not others or key // 6 in others or held[key // 6] == share[key // 6]
            checked += 1
            resident.remove(key)
    assert checked > 20


def test_with_a_cache_for_each_layer_it_is_arc() -> None:
    rng = np.random.default_rng(2)
    for _ in range(8):
        case = replace(mixed_case(rng), capacity_bytes=(int(rng.integers(1, 5)),) * 2)
        assert run(case, "arc").tally == run(case, "lru", "keep=shallow-arc").tally


def test_a_decoded_token_names_no_more_than_its_width() -> None:
    case = crowded()
    narrow = run(case, "fate", "prefetch.width=1").tally.prefetch.planned
    assert 0 < narrow < run(case, "fate").tally.prefetch.planned


# ---- drafts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recall", [0.0, 0.3, 0.8, 1.0])
def test_a_draft_is_as_good_as_stated(recall: float) -> None:
    share = int(recall * (1 << 53))
    rng = np.random.default_rng(3)
    right = wanted = 0
    for event in range(600):
        truth = 32 + rng.permutation(16)[:4].astype(np.int64)
        named = drafted(truth, 16, share, 5, event)
        assert named == drafted(truth, 16, share, 5, event)
        assert len(set(named)) == 4 and all(32 <= e < 48 for e in named)
        right += len({*named} & {*truth.tolist()})
        wanted += 4
    assert abs(right / wanted - recall) < 0.03 * (0 < recall < 1) + 1e-9


def test_where_nobody_else_is_left_a_draft_is_right() -> None:
    truth = np.arange(8, 12)
    assert sorted(drafted(truth, 4, 0, 0, 0)) == truth.tolist()


def test_a_draft_of_recall_one_is_look_ahead_where_layers_are_one() -> None:
    """In a model of one layer the next n passes are the next n layer events."""
    rng = np.random.default_rng(8)
    for tokens in (1, 2, 3):
        stream = [[rng.permutation(9)[:2].tolist()] for _ in range(40)]
        case = decode_case(stream, 9, 2, machine(dense_ns=2))
        case = replace(case, capacity_bytes=(9,), options=Options(check=True, timeline=True))
        one = run(case, "draft", "prefetch.recall=1", f"prefetch.tokens={tokens}")
        other = run(case, "look-ahead", f"prefetch.distance={tokens}")
        assert one.records == other.records


def test_a_draft_names_no_more_than_the_cache_holds() -> None:
    """So with room for one token's experts, only needs of this pass are named."""
    case = toy([[(0, 1, 2), (3, 2, 3), (1, 0, 1)]], 4, 2)
    made = run(case, "draft", "prefetch.recall=1", "prefetch.tokens=8")
    assert [line.count("*") <= 1 for line in told(made, 4)] == [True] * 10


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (CrossGate, {"width": -1}),
        (ShallowARC, {"shallow": -1}),
        (Draft, {"tokens": -1}),
        (Draft, {"tokens": 65}),
        (Draft, {"recall": 1.5}),
        (Draft, {"recall": float("nan")}),
        (Draft, {"seed": -1}),
    ],
)
def test_parameters_out_of_range(cls: type[Seat], bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(UsageError, match=rf"^{cls.kind}\.{name}={value}: must"):
        cls(**bad)
