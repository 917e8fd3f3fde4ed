"""check_policy: every shipped seat passes it, and it names what a bad policy breaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from moesim.errors import PolicyError
from moesim.policies import SEATS
from moesim.policies.presets import PRESETS
from moesim.policy import CacheView, KeepSeat, PlainPolicy, check_policy
from moesim.registry import resolve, seat_class
from moesim.types import Fact, Gate, IntArray, Needs, Plan, Prefetch
from tests.strategies import FITTED


@pytest.mark.parametrize("name", [n for n in SEATS if n.partition(".")[2] not in FITTED])
def test_every_seat_conforms(name: str) -> None:
    kind, _, seat = name.partition(".")
    check_policy(seat_class(kind, seat))


@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n].prefetch not in FITTED])
def test_every_preset_conforms(name: str) -> None:
    check_policy(resolve([name])[0].build)


class Legal(PlainPolicy):
    scored = False

    def victims(self, nbytes: int, cache: CacheView) -> Sequence[int]:
        return cache.candidates


class NamesPinned(Legal):
    def on(self, fact: Fact, cache: CacheView) -> Plan:
        if isinstance(fact, Gate):
            self.pinned = int(fact.experts[0])
        return Plan()

    def victims(self, nbytes: int, cache: CacheView) -> Sequence[int]:
        return [self.pinned]


class NamesAbsent(Legal):
    def victims(self, nbytes: int, cache: CacheView) -> Sequence[int]:
        return np.flatnonzero(cache.states == 0).tolist()


class NamesTooFew(Legal):
    def victims(self, nbytes: int, cache: CacheView) -> Sequence[int]:
        return []


class NamesTwice(Legal):
    def victims(self, nbytes: int, cache: CacheView) -> Sequence[int]:
        return [cache.candidates[0]] * 2


class OutOfRange(PlainPolicy):
    def on(self, fact: Fact, cache: CacheView) -> Plan:
        return Plan(prefetches=[Prefetch(10_000)])


class NoPlan(PlainPolicy):
    def on(self, fact: Fact, cache: CacheView) -> Plan:
        return None  # type: ignore[return-value]


class FloatScores(PlainPolicy):
    def scores(self, experts: IntArray, event: int) -> IntArray:
        return np.full(len(experts), np.nan)  # type: ignore[return-value]


class Raises(PlainPolicy):
    def on(self, fact: Fact, cache: CacheView) -> Plan:
        raise ZeroDivisionError("one over nothing")


class Writes(PlainPolicy):
    def on(self, fact: Fact, cache: CacheView) -> Plan:
        if isinstance(fact, Gate):
            fact.tokens[0] = 99
        return Plan()


class Remembers(PlainPolicy):
    def __init__(self) -> None:
        self.seen = 0

    def scores(self, experts: IntArray, event: int) -> IntArray:
        return (experts * (event + self.seen)) % 7

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        self.seen += 1
        return Plan()


class Rolls(PlainPolicy):
    def on(self, fact: Fact, cache: CacheView) -> Plan:
        self.draw = np.random.default_rng().integers(1 << 40, size=1000)
        return Plan()

    def scores(self, experts: IntArray, event: int) -> IntArray:
        return self.draw[experts]


@dataclass
class Writable(KeepSeat):
    """Writes where it may only look."""

    def scores(self, experts: IntArray, event: int) -> IntArray:
        self.score += 1
        return self.score[experts] * experts


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (NamesPinned, "is pinned"),
        (NamesAbsent, "is absent"),
        (NamesTooFew, "free too little"),
        (NamesTwice, "named twice"),
        (OutOfRange, "names expert 10000"),
        (NoPlan, "not a Plan"),
        (FloatScores, "scores must be int64"),
        (Raises, "one over nothing"),
        (Writes, "changed its Gate"),
        (Remembers, "does not forget"),
        (Rolls, "two equal runs differ"),
        (Writable, "when asked twice"),
    ],
)
def test_a_bad_policy_is_named(policy: type, told: str) -> None:
    with pytest.raises(PolicyError, match=told) as caught:
        check_policy(policy)
    assert "\n" not in str(caught.value)


def test_a_legal_policy_passes() -> None:
    check_policy(Legal)


def test_undeclared_inputs_are_absent() -> None:
    class Spy(PlainPolicy):
        needs = Needs.NONE

        def begin(self, world: object) -> None:
            assert world.future is None  # type: ignore[attr-defined]
            assert world.calibration is None  # type: ignore[attr-defined]
            assert world.costs is None  # type: ignore[attr-defined]

        def on(self, fact: Fact, cache: CacheView) -> Plan:
            if isinstance(fact, Gate):
                source = fact.source
                assert source.gate is None and source.weights is None
                assert source.norms is None and not source.ahead
            return Plan()

    check_policy(Spy)


def test_the_view_is_read_only() -> None:
    class Vandal(PlainPolicy):
        def on(self, fact: Fact, cache: CacheView) -> Plan:
            cache.states[0] = 3
            return Plan()

    with pytest.raises(PolicyError, match="read-only"):
        check_policy(Vandal)
