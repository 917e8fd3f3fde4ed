"""Forecasts: the compiled core delivers, refreshes and takes them back as the seat itself does."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.engine.fast import FastEngine, compiled
from moesim.engine.reference import ReferenceEngine
from moesim.errors import UsageError
from moesim.hashing import hash64
from moesim.policies.forecast import ForecastSeat, Foresight, priority
from moesim.types import (
    PROBABILITY_ONE,
    Fact,
    Forecast,
    Gate,
    IterationBegin,
    IterationEnd,
    JobDone,
    Plan,
    RequestBegin,
)
from tests.harness import drive, inputs_of, setup_of, spec_of, works_of
from tests.strategies import Case, cases, decode_case, machine
from tests.test_laws import mixed_case

KEEPS = ("lru", "fifo", "lfu", "lfu-decay", "lfru", "least-stale", "slru", "random", "min")
KEEPS += ("map-frequency",)


@dataclass
class Hunch(ForecastSeat):
    """Expects at random, but by a hash of the fact, so that two hosts hear the same."""

    salt: int = 0

    def foresee(self, fact: Fact) -> Foresight | None:
        """Some later layers, or some work without any."""
        assert not isinstance(fact, JobDone)
        if isinstance(fact, Gate):
            return self._guess(fact.layer + 1, 1, fact.event, int(fact.experts.sum()))
        if isinstance(fact, IterationBegin):
            first = self.world.decode_from if fact.phase else 0
            return self._guess(first, 2, fact.request, fact.iteration)
        if isinstance(fact, IterationEnd) and self._draw(3, fact.request, fact.iteration) % 2:
            return Foresight((), self._draw(4, fact.iteration) % 30, 0)
        assert isinstance(fact, RequestBegin | IterationEnd) or fact.request >= 0
        return None

    def _draw(self, *of: int) -> int:
        return int(hash64(self.salt, *of) >> np.uint64(8))

    def _guess(self, first: int, *of: int) -> Foresight | None:
        experts, layers = self.world.experts, self.world.layers
        if first >= layers or self._draw(5, *of) % 4 == 0:
            return None
        forecasts = []
        for layer in range(first, layers):
            if self._draw(6, layer, *of) % 3:
                shares = hash64(self.salt, 7, layer, *of, np.arange(experts)) % np.uint64(
                    PROBABILITY_ONE
                )
                chosen = np.argsort(-shares.astype(np.int64), kind="stable")
                some = chosen[: self._draw(8, layer, *of) % (experts + 1)]
                forecasts.append(Forecast(layer, shares.astype(np.int64), some.astype(np.int64)))
        return Foresight(forecasts, self._draw(9, *of) % 40, self._draw(10, *of) % 40)


def outcome(engine_of: Any, case: Case, *settings: str) -> dict[str, Any]:
    """All that an engine counted."""
    policy = spec_of("lru", *settings).build()
    engine = engine_of(setup_of(case, policy))
    assert engine_of is not FastEngine or case.options.flat or compiled(policy)
    try:
        tally = drive(engine, works_of(case, inputs_of(policy), "keep=min" not in settings))
    except UsageError as error:
        return {"refused": str(error)}
    return {**asdict(tally), "lanes": sorted(engine.spans or [])}


def equal(case: Case, *settings: str) -> dict[str, Any]:
    """Assert that nothing differs; what was counted."""
    reference, fast = (outcome(made, case, *settings) for made in (ReferenceEngine, FastEngine))
    differ = {k: (v, fast.get(k)) for k, v in reference.items() if v != fast.get(k)}
    assert not differ, [(k, str(v[0])[:300], str(v[1])[:300]) for k, v in differ.items()]
    return reference


@st.composite
def ways(draw: st.DrawFn) -> tuple[str, ...]:
    """How a seat is set."""
    flags = {
        n: draw(st.sampled_from(["true", "false"])) for n in ("background", "refresh", "renew")
    }
    flags |= {
        "queue": str(draw(st.sampled_from([1, 2, 32]))),
        "salt": str(draw(st.integers(0, 99))),
    }
    flags = {f"prefetch.{name}": value for name, value in flags.items()}
    seats = {"prefetch": f"{__name__}:Hunch", "keep": draw(st.sampled_from(KEEPS))}
    if seats["keep"] == "map-frequency":
        flags["keep.unsearched"] = draw(st.sampled_from(["last", "uniform", "zero"]))
        flags["keep.freq"] = draw(st.sampled_from(["residency", "global"]))
    return tuple(f"{name}={value}" for name, value in {**seats, **flags}.items())


def slowed(case: Case, ops_per_s: float, workers: int) -> Case:
    """On a host whose jobs take a while."""
    host = replace(
        case.hardware.host,
        policy_ops_per_s=ops_per_s,
        policy_bytes_per_s=ops_per_s,
        workers=workers,
    )
    return replace(case, hardware=replace(case.hardware, host=host))


@given(cases(), ways(), st.sampled_from([1e9, 0.5e9, 3e9]), st.integers(1, 3), st.booleans())
def test_i8_on_whatever_is_expected(
    case: Case, way: tuple[str, ...], rate: float, workers: int, share_kv: bool
) -> None:
    case = replace(case, options=replace(case.options, share_kv=share_kv))
    equal(slowed(case, rate, workers), *way)


@given(cases(), ways())
def test_i8_in_flat_mode(case: Case, way: tuple[str, ...]) -> None:
    equal(replace(case, options=replace(case.options, flat=True)), *way)


@pytest.mark.parametrize("keep", KEEPS)
def test_forecasts_meet_every_fate(keep: str) -> None:
    """Used, late, wasted, taken back: cases like those above reach all of it, in both engines."""
    total = dict.fromkeys(("used", "late", "wasted", "cancelled"), 0)
    rng = np.random.default_rng(3)
    for salt in range(8):
        events = [[rng.permutation(5)[:2].tolist() for _ in range(3)] for _ in range(12)]
        case = decode_case(
            events, 5, 3, machine(bytes_per_s=0.25e9, expert_ns=3, chunk_bytes=1), nbytes=2
        )
        way = (f"prefetch={__name__}:Hunch", f"keep={keep}", f"prefetch.salt={salt}")
        found = equal(slowed(case, 1e10, 2), *way, "prefetch.renew=true")
        for fate in total:
            total[fate] += found["prefetch"]["count"][fate]
    assert all(total.values()), total


@dataclass
class Sure(ForecastSeat):
    """At every gate: expert 0 of the next layer, then of the one behind it."""

    def foresee(self, fact: Fact) -> Foresight | None:
        """Two layers, as likely as each other."""
        if not isinstance(fact, Gate):
            return None
        ahead = range(fact.layer + 1, min(fact.layer + 3, self.world.layers))
        shares = np.full(self.world.experts, 1000)
        return Foresight([Forecast(la, shares, np.zeros(1, np.int64)) for la in ahead], 7, 0)


def test_what_is_nearer_goes_first_and_a_distance_halves_the_priority() -> None:
    assert priority(1000, 1) == 1000 << 20
    assert priority(1000, 2) == 500 << 20
    case = decode_case([[[1], [1], [0]]], 2, 2, machine(expert_ns=9))
    seat, plans = Sure(), []

    class Told(Sure):
        def plan(self, fact: Fact, cache: Any) -> Plan:
            plans.append((type(fact).__name__, seat_plan := super().plan(fact, cache)))
            return seat_plan

    policy = replace(spec_of("lru").build(), prefetch=Told())  # type: ignore[type-var]
    drive(ReferenceEngine(setup_of(case, policy)), works_of(case))
    assert seat.background
    done = [plan for name, plan in plans if name == "JobDone"]
    first = [(w.expert, w.expires, w.priority >> 20) for w in done[0].prefetches]
    assert first == [(2, 1, 1000), (4, 2, 500)]


def test_a_full_queue_drops_what_is_new() -> None:
    case = slowed(decode_case([[[1], [1], [0]]] * 3, 2, 2, machine(expert_ns=1)), 1e6, 1)
    found = equal(case, f"prefetch={__name__}:Sure", "prefetch.queue=1")
    assert found["jobs"] == 1


def test_the_work_is_charged_where_it_is_done() -> None:
    case = slowed(decode_case([[[1], [1], [0]]] * 2, 2, 2, machine(expert_ns=1)), 1e9, 1)
    seat = f"prefetch={__name__}:Sure"
    apart, inside = equal(case, seat), equal(case, seat, "prefetch.background=false")
    assert apart["times"]["plan"] == 0 and apart["jobs"] == 6
    # Every gate foresees, the last of a pass nothing: its work is charged all the same.
    assert inside["times"]["plan"] == 6 * 7 and inside["jobs"] == 0


@pytest.mark.parametrize("seat", ["map-search", "map-trajectory", "hit-count"])
def test_i8_of_map_search(seat: str) -> None:
    """Small stores that fill up, any way of merging, whatever the batch."""
    rng = np.random.default_rng(9)
    for number in range(12):
        case = replace(mixed_case(rng), batch=1 + number % 3, chunk_tokens=(0, 0, 2)[number % 3])
        way = [f"prefetch={seat}", "keep=map-frequency", "prefetch.distance=1"]
        way += [f"prefetch.capacity={1 + number}", f"prefetch.renew={str(number % 2 == 0).lower()}"]
        way += [f"prefetch.queue={(1, 32)[number % 2]}", f"prefetch.warm={str(number > 5).lower()}"]
        if seat != "hit-count":
            way.append(f"prefetch.prefill={('mean', 'last', 'every')[number // 2 % 3]}")
        equal(slowed(case, (1e9, 1e11)[number % 2], 1 + number % 2), *way)
