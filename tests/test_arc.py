"""ARC against the published algorithm, written a second time from the paper's figure 4."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sized
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Options
from moesim.policies.arc import AGAIN, ARC, LATER, ONCE, ONE, Lists, step, takes_once, worth
from moesim.policy import World, check_policy
from moesim.types import Evicted, Gate, Landed, LayerEvent, Note, Phase, Slot, Status
from tests.harness import Run, run, spec_of
from tests.strategies import decode_case, machine
from tests.test_engines import outcome
from tests.test_laws import mixed_case
from tests.toys import told, toy


class Textbook:
    """Figure 4 of Megiddo and Modha on a stream of single accesses, with exact fractions.

    Only the ratio by which p moves is cut to 1/16384, as the seat cuts it.
    """

    def __init__(self, slots: int) -> None:
        self.c = slots
        self.p = Fraction(0)
        self.moves = 0
        self.t1: OrderedDict[int, None] = OrderedDict()
        self.t2: OrderedDict[int, None] = OrderedDict()
        self.b1: OrderedDict[int, None] = OrderedDict()
        self.b2: OrderedDict[int, None] = OrderedDict()
        self.victims: list[int] = []

    def access(self, x: int) -> bool:
        """Case I is a hit; II and III are ghosts; IV is new."""
        for held in (self.t1, self.t2):
            if x in held:
                del held[x]
                self.t2[x] = None
                return True
        if x in self.b1:
            self.p = min(Fraction(self.c), self.p + self._delta(self.b2, self.b1))
            self._replace(x)
            del self.b1[x]
            self.t2[x] = None
        elif x in self.b2:
            self.p = max(Fraction(0), self.p - self._delta(self.b1, self.b2))
            self._replace(x)
            del self.b2[x]
            self.t2[x] = None
        else:
            self._new(x)
        return False

    def _new(self, x: int) -> None:
        recent = len(self.t1) + len(self.b1)
        total = recent + len(self.t2) + len(self.b2)
        if recent == self.c:
            if len(self.t1) < self.c:
                self.b1.popitem(last=False)
                self._replace(x)
            else:
                self.victims.append(self.t1.popitem(last=False)[0])
        elif total >= self.c:
            if total == 2 * self.c:
                self.b2.popitem(last=False)
            self._replace(x)
        self.t1[x] = None

    def _replace(self, x: int) -> None:
        held = len(self.t1)
        if held and ((x in self.b2 and held == self.p) or held > self.p):
            gone, _ = self.t1.popitem(last=False)
            self.b1[gone] = None
        else:
            gone, _ = self.t2.popitem(last=False)
            self.b2[gone] = None
        self.victims.append(gone)

    def _delta(self, other: Sized, own: Sized) -> Fraction:
        self.moves += len(other) % len(own) > 0
        return Fraction(max(ONE, len(other) * ONE // len(own)), ONE)


def stream_of(kind: str, rng: np.random.Generator, length: int, names: int) -> list[int]:
    """Streams on which recency, frequency and neither of them pay."""
    if kind == "uniform":
        return rng.integers(0, names, length).tolist()
    if kind == "skewed":
        return (names * rng.random(length) ** 3).astype(int).tolist()
    if kind == "scans":
        hot = rng.integers(0, 4, length)
        return np.where(np.arange(length) // 20 % 2 == 0, hot, np.arange(length) % names).tolist()
    # Popularity moves on.
    era = np.arange(length) // 50 * 5
    return ((era + 6 * rng.random(length) ** 2).astype(int) % names).tolist()


def watched(flat: bool) -> Options:
    """Under all laws."""
    return Options(check=True, timeline=True, flat=flat)


def hits_of(made: Run) -> int:
    """Of prefill and decode together."""
    return sum(counts.hits for counts in made.tally.phases)


STREAMS = ("uniform", "skewed", "scans", "moving")


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", STREAMS)
def test_it_is_the_textbook_on_single_accesses(kind: str, flat: bool) -> None:
    """Hits and victims, in both ways in which an event is one access."""
    rng = np.random.default_rng(STREAMS.index(kind))
    moved = 0
    for slots in (1, 2, 3, 5, 8, 13):
        stream = stream_of(kind, rng, 300, 16)
        book = Textbook(slots)
        hits = sum(book.access(x) for x in stream)
        case = decode_case([[[x]] for x in stream], 16, 1, machine())
        case = replace(case, capacity_bytes=(slots,), options=watched(flat))
        made = run(case, "arc")
        assert [r[2] for r in made.of("evict")] == book.victims
        assert hits_of(made) == hits
        moved += book.moves
    assert moved, "p never moved by a fraction of a slot"


def test_flat_mode_takes_the_experts_of_an_event_one_by_one() -> None:
    rng = np.random.default_rng(7)
    tokens = [[rng.permutation(12)[:3].tolist()] for _ in range(120)]
    stream = [e for (chosen,) in tokens for e in chosen]
    for slots in (3, 5, 9):
        book = Textbook(slots)
        hits = sum(book.access(x) for x in stream)
        case = decode_case(tokens, 12, 3, machine())
        case = replace(case, capacity_bytes=(slots,), options=watched(True))
        made = run(case, "arc")
        assert hits_of(made) == hits
        assert [r[2] for r in made.of("evict")] == book.victims


def test_layers_apart_are_caches_apart() -> None:
    """Each layer of its own is the textbook on that layer's stream."""
    rng = np.random.default_rng(3)
    tokens = [[[int(x)] for x in rng.integers(0, 8, 2)] for _ in range(150)]
    case = replace(decode_case(tokens, 8, 1, machine()), capacity_bytes=(3, 5))
    evicted = [r[2] for r in run(case, "arc").of("evict")]
    for layer, slots in enumerate((3, 5)):
        book = Textbook(slots)
        for token in tokens:
            book.access(token[layer][0])
        assert [e % 8 for e in evicted if e // 8 == layer] == book.victims


# ---- kernels -------------------------------------------------------------------------------------


def test_the_kernels() -> None:
    assert (step(4, 2), step(2, 4), step(3, 4)) == (ONE, 2 * ONE, 4 * ONE // 3)
    assert [takes_once(2, aim, back) for aim, back in ((ONE, 0), (2 * ONE, 0), (2 * ONE, 1))] == [
        True,
        False,
        True,
    ]
    assert not takes_once(0, 0, True)
    stamps = np.array([5, 1, 3])
    segments = np.array([ONCE, AGAIN, ONCE], np.int8)
    got = worth(stamps, segments, np.full(3, ONCE, np.int8))
    assert got.tolist() == [5, 1 + LATER, 3]


def test_the_ghosts_are_bounded() -> None:
    lists = Lists(
        3, held={ONCE: 2, AGAIN: 1}, once=dict.fromkeys("abc"), again=dict.fromkeys("xyz")
    )
    lists.bound()
    assert (list(lists.once), list(lists.again)) == (["c"], ["y", "z"])


# ---- groups, prefetches, hosts -------------------------------------------------------------------


def test_what_was_demanded_twice_outlives_a_scan() -> None:
    """Three slots. LRU would give a0 up to the scan; with a0 in T2 the scan eats itself."""
    case = toy([[(0,), (0,), (1,), (2,), (3,), (4,), (0,)]], 5, 3)
    assert told(run(case, "arc"), 5) == [
        "start",
        "a0m: +a0",
        "a0h:",
        "a1m: +a1",
        "a2m: +a2",
        "a3m: -a1 +a3",
        "a4m: -a2 +a4",
        "a0h:",
    ]
    assert hits_of(run(case, "arc")) > hits_of(run(case, "lru"))


def test_a_ghost_of_t1_makes_t1_larger() -> None:
    """a1 is asked for again just after T1 gave it up: then T2's a0 goes before T1's newest."""
    case = toy([[(0,), (0,), (1,), (2,), (1,), (3,)]], 4, 2)
    assert told(run(case, "arc"), 4) == [
        "start",
        "a0m: +a0",
        "a0h:",
        "a1m: +a1",
        "a2m: -a1 +a2",
        "a1m: -a0 +a1",  # p is 1: T1 may hold one, so T2 gives
        "a3m: -a1 +a3",
    ]


def test_a_prefetch_is_no_use_and_leaves_no_ghost() -> None:
    """Landed unasked, hit, hit again; then another lands unasked and goes unused."""
    seat = ARC()
    sizes = np.ones((1, 1), np.int64)
    seat.begin(World(1, 6, 1, sizes, (2,), "global"))
    (lists,) = seat.lists
    seat.note(Landed(3, 0, 0, 0, False))
    assert (lists.held, seat.unused) == ({ONCE: 1, AGAIN: 0}, {3})
    seat.gate(gate_of(0, 3, Status.HIT))
    assert (lists.held, seat.unused) == ({ONCE: 1, AGAIN: 0}, set())
    seat.gate(gate_of(1, 3, Status.HIT))
    assert lists.held == {ONCE: 0, AGAIN: 1}
    seat.note(Landed(4, 0, 1, 1, False))
    seat.note(Evicted(4, 0, 1))
    assert not lists.once and not lists.again
    seat.note(Evicted(3, 0, 1))
    assert list(lists.again) == [3]
    # A ghost that is prefetched stays one until it is demanded: then p moves, and it enters T2.
    lists.aim = ONE
    seat.note(Landed(3, 0, 2, 1, False))
    assert (list(lists.again), lists.held) == ([3], {ONCE: 1, AGAIN: 0})
    seat.gate(gate_of(3, 3, Status.HIT))
    assert (list(lists.again), lists.held, lists.aim) == ([], {ONCE: 0, AGAIN: 1}, 0)


def gate_of(event: int, expert: int, status: Status) -> Gate:
    """One expert of one layer."""
    chosen = np.array([[expert]], np.uint16)
    source = LayerEvent(event, event, 0, (Slot(0, 1, Phase.DECODE, 0, 1),), chosen)
    one = np.ones(1, np.int64)
    return Gate(source, one * expert, one, np.array([status], np.uint8), one)


def test_it_conforms() -> None:
    check_policy(ARC)


@pytest.mark.parametrize("prefetch", ["none", "next-gate", "whole-layer"])
def test_both_engines_agree(prefetch: str) -> None:
    rng = np.random.default_rng(31)
    for _ in range(12):
        case = mixed_case(rng)
        sets = ("keep=arc", f"prefetch={prefetch}")
        assert outcome(FastEngine, case, "lru", *sets) == outcome(
            ReferenceEngine, case, "lru", *sets
        )


def test_the_lists_say_what_is_resident() -> None:
    """Whatever happens: T1 and T2 are the residents, a ghost is none, and bounds hold."""
    rng = np.random.default_rng(5)
    for number in range(10):
        case = mixed_case(rng)
        checked = Checked()
        policy = spec_of("lru", "prefetch=next-gate").build()
        policy.keep = checked  # type: ignore[attr-defined]
        run(case, policy=policy)
        assert checked.looked, number


class Checked(ARC):
    """ARC that looks at itself whenever something lands or goes."""

    looked = 0

    def note(self, fact: Note) -> None:
        super().note(fact)
        self.looked += 1
        for group, lists in enumerate(self.lists):
            own = self.group == group
            held = {s: int((self.segment[own] == s).sum()) for s in (ONCE, AGAIN)}
            assert held == lists.held
            assert not {*lists.once} & {*lists.again}
            there = set(np.flatnonzero(self.segment).tolist()) - self.unused
            assert not there & {*lists.once, *lists.again}
            assert lists.held[ONCE] + len(lists.once) <= max(lists.slots, lists.held[ONCE])
            assert 0 <= lists.aim <= lists.slots * ONE
