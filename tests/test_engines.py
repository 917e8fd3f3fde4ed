"""Law I8: the compiled engine equals the reference, log and nanosecond."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.engine.fast import KEEPS, SERVES, FastEngine, compiled, wish_of
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Options
from moesim.errors import UsageError
from moesim.policies import SEATS
from moesim.policies.presets import PRESETS
from moesim.policy import PlainPolicy
from moesim.protocol import SEAT_KINDS, PrefetchSeat
from moesim.registry import resolve, seat_class
from moesim.types import Needs
from tests.harness import drive, inputs_of, setup_of, spec_of, works_of
from tests.strategies import FITTED, Case, cases, decode_case, machine, specs, trios
from tests.test_laws import mixed_case


def outcome(engine_of: Any, case: Case, name: str, *settings: str) -> dict[str, Any]:
    """Everything that an engine counted, and what its lanes did."""
    spec = spec_of(name, *settings)
    policy = spec.build()
    engine = engine_of(setup_of(case, policy, spec.initial))
    arrivals = Needs.FUTURE not in policy.needs
    try:
        tally = drive(engine, works_of(case, inputs_of(policy), arrivals))
    except UsageError as error:
        return {"refused": str(error)}
    lanes = sorted(engine.spans or [])
    return {**asdict(tally), "lanes": lanes}


def equal(case: Case, name: str, *settings: str) -> None:
    """Assert that nothing differs, naming what does."""
    reference = outcome(ReferenceEngine, case, name, *settings)
    fast = outcome(FastEngine, case, name, *settings)
    differ = {k: (v, fast.get(k)) for k, v in reference.items() if v != fast.get(k)}
    assert not differ, [(k, str(v[0])[:300], str(v[1])[:300]) for k, v in differ.items()]


@given(cases(), specs(), st.booleans())
def test_i8_on_whatever_can_be_made(
    case: Case, spec: tuple[str, tuple[str, ...]], share_kv: bool
) -> None:
    name, settings = spec
    equal(replace(case, options=replace(case.options, share_kv=share_kv)), name, *settings)


KEEP, PREFETCH, MISS = (
    [
        name.partition(".")[2]
        for name in SEATS
        if name.startswith(f"{kind}.") and name.partition(".")[2] not in FITTED
    ]
    for kind in ("keep", "prefetch", "miss")
)


def seated() -> list[tuple[str, str, str]]:
    """All trios of compiled seats; of those with others a third, with every two seats together."""

    def plain(keep: str, prefetch: str, miss: str) -> bool:
        return bool(PLAIN & {f"keep.{keep}", f"prefetch.{prefetch}", f"miss.{miss}"})

    every = [trio for trio in product(KEEP, PREFETCH, MISS) if not plain(*trio)]
    return every + [trio for trio in trios(KEEP, PREFETCH, MISS) if plain(*trio)]


@pytest.mark.parametrize("number", range(4))
def test_i8_every_seat_with_every_other(number: int) -> None:
    rng = np.random.default_rng(100 + number)
    for keep, prefetch, miss in seated()[number::4]:
        equal(mixed_case(rng), "lru", f"keep={keep}", f"prefetch={prefetch}", f"miss={miss}")


@pytest.mark.parametrize("prefetch", PREFETCH)
def test_i10_bytes_that_the_kv_cache_gives_back_wake_the_link(prefetch: str) -> None:
    """In both engines alike: a waiting prefetch goes when a shorter request takes over."""
    rng = np.random.default_rng(11)
    for capacity in range(12, 24):
        case = mixed_case(rng)
        tight = replace(
            case,
            capacity_bytes=(capacity,),
            batch=1,
            options=replace(case.options, share_kv=True),
        )
        equal(tight, "lru", f"prefetch={prefetch}", "miss=cpu")


@given(cases(), specs())
def test_i8_in_flat_mode(case: Case, spec: tuple[str, tuple[str, ...]]) -> None:
    equal(replace(case, options=replace(case.options, flat=True)), spec[0], *spec[1])


@pytest.mark.parametrize("keep", KEEP)
def test_i8_in_flat_mode_an_access_knows_its_own_token_alone(keep: str) -> None:
    """Prompts whose tokens are predicted differently, in a cache that holds few."""
    rng = np.random.default_rng(7)
    for cancel in ("true", "false"):
        case = mixed_case(rng)
        tight = replace(
            case,
            capacity_bytes=(4,),
            batch=3,
            chunk_tokens=0,
            options=replace(case.options, flat=True),
        )
        equal(tight, "next-gate", f"keep={keep}", f"prefetch.cancel={cancel}")


@pytest.mark.parametrize("keep", ["lru", "lfu"])
def test_i8_a_pause_of_the_core_loses_nothing(keep: str) -> None:
    """The core pauses after many events, whatever it is doing; closed forms do not pause."""
    rng = np.random.default_rng(4)
    tokens = [[rng.permutation(16)[:6].tolist() for _ in range(2)] for _ in range(12_000)]
    hardware = machine(latency_ns=7, dense_ns=1, expert_ns=1)
    case = decode_case(tokens, 16, 6, hardware, options=Options())
    counted = []
    for quick in (True, False):
        setup = setup_of(replace(case, options=Options(quick=quick)), spec_of(keep).build())
        counted.append(asdict(drive(FastEngine(setup), works_of(case))))  # type: ignore[arg-type]
    assert counted[0] == counted[1]
    assert counted[0]["events"] == 24_000


def test_the_clock_has_an_end() -> None:
    """Where the reference refuses a run of more than 146 years, so does the compiled engine."""
    case = mixed_case(np.random.default_rng(1))
    slow = replace(case, hardware=machine(dense_ns=1 << 61, expert_ns=1))
    reference = outcome(ReferenceEngine, slow, "lru")
    assert "146 years" in reference["refused"]
    assert outcome(FastEngine, slow, "lru") == reference


PLAIN = {
    "keep.recent-score",
    "keep.pinned-lru",
    "keep.layer-quota",
    "keep.layer-frequency",
    "prefetch.impact",
    "prefetch.first-absent",
    "prefetch.layer-statistics",
    "prefetch.placement",
    "miss.hybrid-schedule",
    "miss.q-split",
    "miss.low",
    "miss.reuse-break-even",
    "keep.layer-lru",
    "keep.hobbit",
    "keep.top-halves",
    "keep.activation-matrix",
    "keep.importance",
    "prefetch.staged-gate",
    "prefetch.activation-matrix",
    "prefetch.stride",
    "prefetch.virtual-experts",
    "route.masked",
    "route.mixed-precision",
    "keep.arc",
    "keep.reuse-odds",
    "prefetch.pair-odds",
    "keep.shallow-arc",
    "prefetch.pre-gate",
    "prefetch.cross-gate",
    "prefetch.draft",
    "route.cache-prior",
    "route.pre-gate",
}
"""Built-in seats that the core asks, as it asks a policy from outside."""


def test_every_built_in_seat_is_compiled() -> None:
    known = {*KEEPS, *SERVES}
    for name in {*SEATS} - PLAIN:
        kind, _, seat = name.partition(".")
        made = seat_class(kind, seat)
        if kind == "prefetch":
            assert wish_of(cast(PrefetchSeat, made())) is not None
        else:
            assert made in known or name == "route.exact"
    for name, preset in PRESETS.items():
        plain = PLAIN & {f"{kind}.{getattr(preset, kind)}" for kind in SEAT_KINDS}
        assert compiled(resolve([name])[0].build()) != bool(plain), name


def test_a_plain_policy_is_refused_by_name() -> None:
    assert not compiled(PlainPolicy())
