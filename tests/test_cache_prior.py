"""Cache-conditional routing: residents lead by a share of the gate's range, and by nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import NotRunError, UsageError
from moesim.policies.cache_prior import (
    FRACTION_BITS,
    MOST,
    CachePrior,
    favoured,
    logarithms,
    logits,
)
from moesim.policy import World, check_policy
from moesim.profile import load_hardware, load_model
from moesim.replays import Request, replay
from moesim.traces.samples import trace_path
from moesim.traces.synth import Synth, synth_model, synthesise
from moesim.types import DROPPED, PROBABILITY_ONE, LayerEvent, Phase, Slot, State
from tests.harness import run
from tests.strategies import Case, decode_case, machine
from tests.test_engines import outcome
from tests.test_laws import mixed_case
from tests.test_rivals import signature
from tests.toys import told, toy

ONE = 1 << FRACTION_BITS


def summary(policy: str, *settings: str, capacity: str = "25%") -> dict[str, Any]:
    """Three requests of the demo."""
    request = Request(
        trace=trace_path("demo"),
        hardware=load_hardware("rtx4090"),
        costs=load_model("qwen1.5-moe-a2.7b"),
        policies=(policy,),
        settings=settings,
        capacities=(capacity,),
        limit=3,
    )
    return dict(replay(request)["runs"][0])


# ---- kernels -------------------------------------------------------------------------------------


def test_the_logarithms() -> None:
    """Rounded down to 1/4096, exact at powers of two, and rising."""
    table = logarithms()
    exact = np.array([math.log2(p) for p in range(1, MOST + 1)]) * ONE
    assert len(table) == MOST + 1 and table[0] == -ONE
    assert (table[1:] <= exact + 1e-6).all() and (exact - table[1:] < 1.01).all()
    assert [int(table[1 << n]) for n in range(15)] == [n * ONE for n in range(15)]
    assert (np.diff(table) >= 0).all()
    assert logits(np.array([[0, 1, MOST, MOST + 5]])).tolist() == [[-ONE, 0, 14 * ONE, 14 * ONE]]


def by_hand(chosen: list[int], z: list[int], here: list[bool], extra: int, top: int) -> list[int]:
    """One token, as the paper says it."""
    real = [e for e in chosen if e != DROPPED]
    raised = {e: z[e] + extra * here[e] for e in range(len(z))}
    sure = real[:top]
    rest = [e for e in range(len(z)) if e not in sure]
    rest.sort(key=lambda e: (-raised[e], real.index(e) if e in real else 99, e))
    taken = sure + rest[: len(real) - len(sure)]
    taken.sort(key=lambda e: (-z[e], real.index(e) if e in real else 99, e))
    return taken + [DROPPED] * (len(chosen) - len(real))


def test_the_kernel_is_the_paper_token_by_token() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        experts, top_k = int(rng.integers(4, 9)), int(rng.integers(1, 5))
        z = rng.integers(0, 12, (5, experts))
        chosen = np.argsort(-z, axis=1, kind="stable")[:, :top_k].astype(np.uint16)
        chosen[rng.random(5) < 0.3, -1] = DROPPED
        here = rng.random(experts) < 0.5
        extra, top = int(rng.integers(0, 9)), int(rng.integers(0, 3))
        made = favoured(chosen, z, here, extra, top)
        for row in range(5):
            wanted = by_hand(chosen[row].tolist(), z[row].tolist(), here.tolist(), extra, top)
            assert made[row].tolist() == wanted


def test_the_likeliest_stay_and_only_residents_come() -> None:
    rng = np.random.default_rng(2)
    for top in (1, 2, 3):
        z = rng.integers(0, 1000, (40, 16))
        chosen = np.argsort(-z, axis=1, kind="stable")[:, :4].astype(np.uint16)
        here = rng.random(16) < 0.4
        made = favoured(chosen, z, here, 10_000, top)
        for before, after in zip(chosen.tolist(), made.tolist(), strict=True):
            assert {*before[:top]} <= {*after} and len({*after}) == 4
            assert all(here[e] for e in {*after} - {*before})
            # Nobody leaves who is resident, while somebody who is not stays beyond the sure ones.
            gone, stays = {*before} - {*after}, {*after} & {*before[top:]}
            assert not any(here[e] for e in gone) or all(here[e] for e in stays)


# ---- the seat ------------------------------------------------------------------------------------


class Cache:
    """Some residents of one layer."""

    def __init__(self, resident: list[int], size: int) -> None:
        self.states = np.full(size, State.ABSENT, np.uint8)
        self.states[resident] = State.RESIDENT


def event_of(gate: list[list[int]], chosen: list[list[int]]) -> LayerEvent:
    tokens = len(chosen)
    slots = (Slot(0, 1, Phase.DECODE, 0, tokens),)
    return LayerEvent(0, 0, 0, slots, np.array(chosen, np.uint16), gate=np.array(gate, np.int32))


def seat_of(**parameters: Any) -> CachePrior:
    seat = CachePrior(**parameters)
    seat.begin(World(1, 4, 2, np.ones((1, 1), np.int64), (4,), "global"))
    return seat


def test_a_bonus_is_a_share_of_the_mean_range() -> None:
    """Logits 13, 12, 11, 9 (powers of two): a range of 4. Expert 2 leads 1 by 1/4 of it or more."""
    gate = [[8192, 4096, 2048, 512]]
    cache: Any = Cache([2], 4)
    for bonus, wanted in ((0.2, None), (0.25, None), (0.26, [[0, 2]])):
        made = seat_of(bonus=bonus).route(event_of(gate, [[0, 1]]), cache)
        assert (None if made is None else made.tolist()) == wanted
    # A token before it with a range of 12 doubles the mean: then an eighth is enough.
    seat = seat_of(bonus=0.13)
    assert seat.route(event_of([[8192, 4096, 2048, 2]], [[0, 1]]), cache) is not None
    assert seat.route(event_of(gate, [[0, 1]]), cache).tolist() == [[0, 2]]  # type: ignore[union-attr]
    assert seat_of(bonus=0.13).route(event_of(gate, [[0, 1]]), cache) is None


def test_what_is_on_its_way_is_not_resident() -> None:
    cache: Any = Cache([], 4)
    cache.states[2] = State.IN_FLIGHT
    assert seat_of(bonus=1).route(event_of([[8192, 4096, 2048, 512]], [[0, 1]]), cache) is None


def leaning() -> Case:
    """One layer of four, room for two. Gates of the toys: 4 for the chosen, near 0 for others."""
    return toy([[(0,), (1,), (2,), (0,), (3,)]], 4, 2)


def test_the_likeliest_alone_is_never_bent() -> None:
    """A token of one expert takes it, whatever is resident: top 0 means 1 here."""
    case = leaning()
    assert signature(run(case, "cache-prior", "route.bonus=1")) == signature(run(case, "lru"))


def test_it_decides_as_worked_out_by_hand() -> None:
    """Two experts a token. The second choice gives way to a resident one, the first does not."""
    case = two_of_five()
    assert told(run(case, "cache-prior", "route.top=1", "route.bonus=1"), 5) == [
        "start",
        "a0m a1m: +a0 +a1",
        "a2m a0h: +a2",  # chosen 2, 3: 3 gives way to a resident, which is 0 (p 0.04) or 1 (0.03)
        "a4m a0h: -a1 +a4",  # chosen 4, 3: of 0, 1 and 2 the likeliest again
        "a0h a1m: -a2 +a1",  # chosen 0, 1: 1 is the likelier by more than the bonus
    ]


def two_of_five() -> Case:
    """One layer of five, room for three, two experts a token, gates written out."""
    chosen = [[0, 1], [2, 3], [4, 3], [0, 1]]
    shares = [
        [0.6, 0.3, 0.05, 0.03, 0.02],
        [0.04, 0.03, 0.7, 0.2, 0.03],
        [0.1, 0.02, 0.08, 0.3, 0.5],
        [0.5, 0.49, 0.004, 0.003, 0.003],
    ]
    case = decode_case([[pair] for pair in chosen], 5, 2, machine())
    rows = replace(case.requests[0], gate=np.log(np.array(shares)).astype(np.float16))
    meta = replace(case.meta, has_gate=True, score="softmax")
    return replace(case, meta=meta, requests=(rows,), capacity_bytes=(3,))


@pytest.mark.parametrize("capacity", ["10%", "50%"])
def test_without_a_bonus_it_is_lru_exactly(capacity: str) -> None:
    plain = summary("lru", capacity=capacity)
    none = summary("cache-prior", "route.bonus=0", capacity=capacity)
    assert none["log_digest"] == plain["log_digest"]
    assert none["decision_digest"] == plain["decision_digest"]
    assert share_kept(none) == 1.0


def test_without_a_bonus_it_is_lru_on_mixed_requests() -> None:
    rng = np.random.default_rng(6)
    for _ in range(10):
        case = mixed_case(rng)
        bent = run(case, "cache-prior", "route.bonus=0")
        assert bent.records == run(case, "lru").records


def test_a_larger_bonus_moves_less_and_keeps_less() -> None:
    """The trade that the paper draws (its figures of misses against quality)."""
    made = [summary("cache-prior", f"route.bonus={bonus}") for bonus in (0, 0.1, 0.2, 0.3, 0.6)]
    moved = [run["bytes_loaded"] for run in made]
    kept = [share_kept(run) for run in made]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.7 * moved[0]
    assert kept == sorted(kept, reverse=True) and kept[0] == 1.0 and kept[-1] < 0.99


def test_keeping_more_of_a_tokens_choice_moves_more() -> None:
    made = [summary("cache-prior", f"route.top={top}") for top in (1, 2, 3, 4)]
    moved = [run["bytes_loaded"] for run in made]
    assert moved == sorted(moved) and moved[-1] == summary("lru")["bytes_loaded"]
    assert share_kept(made[-1]) == 1.0


def share_kept(run: dict[str, Any]) -> float:
    return float(run["quality"]["mass_kept"] / run["quality"]["mass"])


# ---- hosts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sets", [(), ("route.bonus=1", "route.top=1"), ("prefetch=next-gate",)])
def test_i8_both_engines_agree_on_mixed_requests(sets: tuple[str, ...]) -> None:
    rng = np.random.default_rng(23)
    for _ in range(10):
        case = mixed_case(rng)
        reference = outcome(ReferenceEngine, case, "cache-prior", *sets)
        assert outcome(FastEngine, case, "cache-prior", *sets) == reference


def test_it_conforms() -> None:
    check_policy(CachePrior)
    check_policy(lambda: CachePrior(bonus=1, top=1))


def test_it_needs_gates(tmp_path: Any) -> None:
    path = tmp_path / "made.parquet"
    model = synth_model(None, 3, 4, 1)
    synthesise(path, Synth(model=model, requests=2, prompt_tokens=4, output_tokens=2))
    request = Request(trace=path, hardware=load_hardware("rtx4090"), policies=("cache-prior",))
    with pytest.raises(NotRunError, match="cache-prior needs GATE"):
        replay(request)


@pytest.mark.parametrize("bad", [{"bonus": -0.1}, {"bonus": 1.1}, {"top": -1}])
def test_parameters_out_of_range(bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(UsageError, match=rf"^route\.{name}={value}: must"):
        CachePrior(**bad)


def test_the_share_of_the_range_is_exact() -> None:
    """Integers throughout: sums of ranges, one division."""
    seat = seat_of(bonus=0.5)
    z = logits(np.array([[8192, 4096, 2048, 512], [8192, 1, 1, 1]]))
    assert (
        seat._extra(0, z) == (4 * ONE + 13 * ONE) // 2 * (PROBABILITY_ONE // 2) // PROBABILITY_ONE
    )
