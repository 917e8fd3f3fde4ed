"""Laws I8 and (b): a policy in plain Python is told and asked the same by both engines.

``Whim`` answers at random, but by a hash of where it is asked, so that two hosts that ask the same
get the same; it writes down every call with its arguments and all that it can see of the cache.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import PolicyError, UsageError
from moesim.hashing import hash64
from moesim.policy import CacheView, PlainPolicy, World
from moesim.types import (
    DROPPED,
    NEVER,
    NO_PLAN,
    AnyArray,
    Fact,
    Gate,
    IntArray,
    Job,
    LayerEvent,
    Needs,
    Note,
    Plan,
    Prefetch,
    Serve,
    State,
    Status,
    quick_maker,
)
from tests.harness import drive, inputs_of, setup_of, spec_of, works_of
from tests.strategies import LOSSLESS, Case, cases, specs
from tests.test_laws import mixed_case


def written(value: object) -> object:
    """A fact as plain values."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, LayerEvent | Gate):
        return [written(getattr(value, name)) for name in type(value).__slots__]
    if isinstance(value, dict):
        return [(key, written(item)) for key, item in value.items()]
    return repr(value)


@dataclass
class Whim(PlainPolicy):
    """Random plans, victims, routes and scores."""

    seed: int
    scored: bool = True  # type: ignore[misc]
    bypass: bool = False  # type: ignore[misc]
    lossy: bool = False  # type: ignore[misc]
    swaps: bool = True
    log: list[object] = field(default_factory=list)

    needs = Needs.WEIGHTS | Needs.NORMS

    def begin(self, world: World) -> None:
        self.world = world
        self.calls = 0

    def draw(self, below: int, *more: int) -> int:
        self.calls += 1
        return int(hash64(self.seed, self.calls, *more)) % below

    def wrote(self, what: str, value: object, cache: CacheView | None = None) -> None:
        seen: object = None
        if cache is not None:
            free = [cache.free_bytes(layer) for layer in range(self.world.layers)]
            seen = (cache.states.tobytes(), cache.queued, cache.jobs_waiting, free)
        self.log.append((what, written(value), seen))

    def route(self, event: LayerEvent, cache: CacheView) -> AnyArray | None:
        self.wrote("route", event, cache)
        if self.draw(2):
            return None
        chosen = event.token_experts.copy()
        for row in chosen:
            for rank in range(len(row)):
                other = self.draw(self.world.experts)
                if not self.draw(3) and row[rank] != DROPPED and other not in row:
                    row[rank] = other
        return chosen

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        self.wrote("on", fact, cache)
        if self.draw(3) == 0:
            return Plan()
        now = getattr(fact, "event", -1)
        serve = {}
        if isinstance(fact, Gate):
            ways = [Serve.FETCH, Serve.CPU, *([Serve.SKIP] if self.lossy else [])]
            missing = fact.experts[fact.status == Status.MISS].tolist()
            serve = {e: ways[self.draw(len(ways))] for e in missing if self.draw(2)}
        return Plan(
            prefetches=[self.wish(now) for _ in range(self.draw(4))],
            cancel=[self.draw(self.world.size) for _ in range(self.draw(3))],
            reprioritise=[(self.draw(self.world.size), self.draw(3)) for _ in range(self.draw(3))],
            serve=serve,
            jobs=[Job(self.draw(40), 0, self.calls) for _ in range(max(0, self.draw(4) - 2))],
            foreground_ops=self.draw(4),
        )

    def wish(self, now: int) -> Prefetch:
        expert = self.draw(self.world.size)
        expires = NEVER if not self.draw(5) else now + self.draw(5)
        replaces = -1
        if self.swaps and not self.draw(3):
            layer = expert // self.world.experts
            first = layer * self.world.experts if self.world.scope == "layer" else 0
            span = self.world.experts if self.world.scope == "layer" else self.world.size
            replaces = first + self.draw(span)
        return Prefetch(expert, expires, self.draw(3) - 1, replaces=replaces)

    def scores(self, experts: IntArray, event: int) -> IntArray:
        self.wrote("scores", (experts, event))
        mixed = hash64(self.seed, event, experts) >> np.uint64(60)
        return mixed.astype(np.int64)

    def victims(self, nbytes: int, cache: CacheView) -> Sequence[int]:
        self.wrote("victims", (nbytes, cache.candidates), cache)
        named: list[int] = []
        left = list(cache.candidates)
        sizes = self.world.expert_bytes[0]
        while left and nbytes > 0:
            named.append(left.pop(self.draw(len(left))))
            nbytes -= int(sizes[named[-1] // self.world.experts])
        return [*named, *left[: self.draw(2)]]

    def note(self, fact: Note) -> None:
        self.wrote("note", fact)


def outcome(engine: Any, case: Case, policy: Any, initial: str = "cold") -> dict[str, Any]:
    """Everything that an engine counted, and what its policy was told."""
    made = engine(setup_of(case, policy, initial))
    try:
        tally = drive(made, works_of(case, inputs_of(policy), Needs.FUTURE not in policy.needs))
    except UsageError as error:
        return {"refused": str(error)}
    told = policy.log if isinstance(policy, Whim) else None
    return {**asdict(tally), "lanes": sorted(made.spans or []), "told": told}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Name what differs."""
    if one.get("told") and other.get("told"):
        for number, (a, b) in enumerate(zip(one["told"], other["told"], strict=False)):
            assert a == b, f"call {number}"
    assert {k: v for k, v in one.items() if v != other.get(k)} == {}


def assert_told_alike(case: Case, **traits: Any) -> None:
    """Both engines, with a fresh whim each."""
    assert_equal(
        outcome(ReferenceEngine, case, Whim(**traits)), outcome(FastEngine, case, Whim(**traits))
    )


traits = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 30),
        "scored": st.booleans(),
        "bypass": st.booleans(),
        "lossy": st.booleans(),
        "swaps": st.booleans(),
    }
).map(lambda t: {**t, "scored": t["scored"] or t["bypass"]})


@settings(max_examples=150)
@given(cases(), traits, st.booleans(), st.booleans())
def test_i8_a_whim_is_told_and_asked_alike(
    case: Case, drawn: dict[str, Any], share_kv: bool, flat: bool
) -> None:
    options = replace(case.options, share_kv=share_kv, flat=flat)
    assert_told_alike(replace(case, options=options), **drawn)


@pytest.mark.parametrize("number", range(40))
def test_i8_a_whim_among_mixed_requests(number: int) -> None:
    """Larger cases: batches, chunks, arrivals, two stacks, unequal sizes."""
    rng = np.random.default_rng(1000 + number)
    bits = [bool(number >> bit & 1) for bit in range(4)]
    drawn = {"bypass": bits[0], "scored": bits[0] or bits[1], "lossy": bits[2], "swaps": bits[3]}
    assert_told_alike(mixed_case(rng), seed=number, **drawn)


def asked(setup: Any) -> FastEngine:
    """The compiled engine, asking even built-in seats as if they were plain Python."""
    return FastEngine(setup, asked=True)


def assert_same_asked_or_compiled(case: Case, name: str, *sets: str) -> None:
    """Kernels in the core and the same seats asked from there."""
    spec = spec_of(name, *sets)
    assert_equal(
        outcome(FastEngine, case, spec.build(), spec.initial),
        outcome(asked, case, spec.build(), spec.initial),
    )


@given(cases(), specs())
def test_b_plain_python_and_kernels_give_one_log(
    case: Case, spec: tuple[str, tuple[str, ...]]
) -> None:
    assert_same_asked_or_compiled(case, spec[0], *spec[1])


@pytest.mark.parametrize("name", LOSSLESS)
def test_b_each_preset_as_plain_python(name: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(3):
        assert_same_asked_or_compiled(mixed_case(rng), name)


@given(cases(), specs(), st.sampled_from([0, 1, 2]), st.booleans())
def test_no_result_depends_on_how_the_core_works(
    case: Case, spec: tuple[str, tuple[str, ...]], residents: int, quick: bool
) -> None:
    """Closed forms or events; residents searched, or in a heap, or (LRU, FIFO) in a list."""
    settled = spec_of(spec[0], *spec[1], *(["keep=lru"] if residents == 1 else []))
    policy = settled.build()
    if residents == 2 and policy.keep.name in ("lru", "fifo", "random"):  # type: ignore[attr-defined]
        settled = spec_of(spec[0], *spec[1], "keep=lfru")
    timeless = replace(case.options, timeline=False)
    plain = replace(timeless, quick=False, residents=0)
    bent = replace(timeless, quick=quick, residents=residents)
    assert_equal(
        outcome(FastEngine, replace(case, options=plain), settled.build(), settled.initial),
        outcome(FastEngine, replace(case, options=bent), settled.build(), settled.initial),
    )


# ---- policies that break the protocol ------------------------------------------------------------


class Wrong(PlainPolicy):
    """Does one thing wrong, at the fourth layer event or later."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.scored = how != "victims"  # type: ignore[misc]
        self.lossy = how == "route"  # type: ignore[misc]

    def on(self, fact: Fact, cache: CacheView) -> Any:
        if not isinstance(fact, Gate) or fact.event < 4:
            return Plan()
        answers: dict[str, Any] = {
            "raises": lambda: 1 // 0,
            "type": lambda: 7,
            "range": lambda: Plan([Prefetch(10**6, fact.event + 2)]),
            "precision": lambda: Plan([Prefetch(0, fact.event + 2, precision=3)]),
            "cancel": lambda: Plan(cancel=[-5]),
            "skip": lambda: Plan(serve=dict.fromkeys(fact.experts.tolist(), Serve.SKIP)),
        }
        return answers.get(self.how, Plan)()

    def route(self, event: LayerEvent, cache: CacheView) -> AnyArray:
        return event.token_experts + np.uint16(1000)

    def scores(self, experts: IntArray, event: int) -> IntArray:
        if self.how == "nan":
            return np.full(len(experts), np.nan)  # type: ignore[return-value]
        if self.how == "shape":
            return np.zeros(len(experts) + 1, np.int64)
        return np.zeros(len(experts), np.int64)

    def victims(self, nbytes: int, cache: CacheView) -> Sequence[int]:
        return [10**6]

    def note(self, fact: Note) -> None:
        if self.how == "note":
            raise ZeroDivisionError


HOWS = [
    "raises",
    "type",
    "range",
    "precision",
    "cancel",
    "skip",
    "route",
    "nan",
    "shape",
    "victims",
    "note",
]


@pytest.mark.parametrize("how", HOWS)
def test_both_engines_refuse_a_wrong_answer_alike(how: str) -> None:
    rng = np.random.default_rng(3)
    case = mixed_case(rng)
    tight = replace(case, capacity_bytes=(max(case.booked()) * 2,))
    said = []
    for engine in (ReferenceEngine, FastEngine):
        with pytest.raises((PolicyError, ZeroDivisionError)) as caught:
            drive(engine(setup_of(tight, Wrong(how))), works_of(tight))  # type: ignore[arg-type]
        said.append((type(caught.value.__cause__ or caught.value), str(caught.value)))
    assert said[0][1] == said[1][1]


def test_what_a_policy_sees_is_always_current() -> None:
    """The array of states may be kept: it is a window, not a copy, and it cannot be written."""
    seen: list[bool] = []

    class Keeper(PlainPolicy):
        def on(self, fact: Fact, cache: CacheView) -> Plan:
            self.states = getattr(self, "states", cache.states)
            seen.append(bool((self.states == cache.states).all()))
            assert not cache.states.flags.writeable
            return Plan()

        def note(self, fact: Note) -> None:
            seen.append(self.states[fact.expert] in (State.RESIDENT, State.ABSENT))

    case = mixed_case(np.random.default_rng(2))
    drive(FastEngine(setup_of(case, Keeper())), works_of(case))  # type: ignore[arg-type]
    assert seen and all(seen)


class Keeper(PlainPolicy):
    """Keeps every gate, what it said when it came, and the experts whose scores it was asked."""

    def __init__(self) -> None:
        self.kept: list[tuple[object, object]] = []

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        if isinstance(fact, Gate):
            self.kept.append((fact, written(fact)))
        return NO_PLAN

    def scores(self, experts: IntArray, event: int) -> IntArray:
        self.kept.append((experts, written(experts)))
        return -experts


@pytest.mark.parametrize("engine", [FastEngine, ReferenceEngine])
@pytest.mark.parametrize("flat", [False, True])
def test_facts_may_be_kept(engine: Any, flat: bool) -> None:
    """They stay as they were told, also when the next ones are under way."""
    case = mixed_case(np.random.default_rng(3))
    options = replace(case.options, flat=flat)
    tight = replace(case, capacity_bytes=(max(case.booked()) * 2,), options=options)
    keeper = Keeper()
    drive(engine(setup_of(tight, keeper)), works_of(tight))  # type: ignore[arg-type]
    assert {type(what) for what, _ in keeper.kept} == {Gate, np.ndarray}
    for what, said in keeper.kept:
        assert written(what) == said


def test_a_quickly_made_fact_is_one_like_any_other() -> None:
    values = (3, 1, 0, (), np.zeros((1, 2), np.uint16), None, None, {}, None)
    event, quick = LayerEvent(*values), quick_maker(LayerEvent)(*values)
    assert type(quick) is LayerEvent and written(quick) == written(event)
    assert written(replace(quick, layer=5)) == written(replace(event, layer=5))
    assert written(pickle.loads(pickle.dumps(quick))) == written(event)
    with pytest.raises(FrozenInstanceError):
        quick.layer = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        quick_maker(LayerEvent)(*values[1:])
