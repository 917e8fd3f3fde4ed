"""SwapMoE: its arithmetic against restatements, its swaps by hand, its laws in both engines."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Setup
from moesim.errors import NotRunError, UsageError
from moesim.policies.importance import MEASURES, ONE, Sums, faded, relative
from moesim.policies.masked_gate import (
    VARIANTS,
    MaskedGate,
    Retired,
    gate_values,
    masked,
    mass_kept,
    slots_of,
)
from moesim.policies.presets import PRESETS
from moesim.policies.virtual_experts import FIRST, ROUTERS, UNITS, WINDOWS, VirtualExperts, target
from moesim.policy import World, check_policy
from moesim.profile import load_hardware
from moesim.protocol import SeatPolicy
from moesim.registry import resolve
from moesim.replays import Request, replay
from moesim.traces.samples import trace_path
from moesim.types import (
    DROPPED,
    AnyArray,
    Evicted,
    Gate,
    IterationEnd,
    Landed,
    LayerEvent,
    Phase,
    RequestBegin,
    Slot,
    State,
    Status,
    Swap,
)
from tests.harness import Watch, drive, inputs_of, run, setup_of, spec_of, works_of
from tests.strategies import Case, cases, decode_case, machine
from tests.test_laws import mixed_case
from tests.test_plain_policies import assert_equal, outcome

STATIC = [name for name in PRESETS if name.startswith("prune-")]


def world_of(layers: int = 1, experts: int = 4, slots: int = 3, **more: Any) -> World:
    """Experts of one byte, with a cache for each layer."""
    return World(
        layers=layers,
        experts=experts,
        top_k=more.pop("top_k", 1),
        expert_bytes=np.ones((1, layers), np.int64),
        capacity_bytes=(slots,) * layers,
        scope="layer",
        **more,
    )


def event_of(chosen: Any, **more: Any) -> LayerEvent:
    """A layer event of one request."""
    experts = np.array(chosen, np.uint16)
    slot = Slot(0, 0, Phase.DECODE, 0, len(experts))
    return LayerEvent(0, more.pop("step", 0), more.pop("layer", 0), (slot,), experts, **more)


# ---- importance ----------------------------------------------------------------------------------


@given(st.integers(0, 1 << 30), st.sampled_from(MEASURES))
def test_importance_is_equation_1(seed: int, measure: str) -> None:
    """Token by token, in whole numbers of any size."""
    rng = np.random.default_rng(seed)
    layers, experts, top_k, tokens = 2, 6, 3, int(rng.integers(1, 9))
    sizes = rng.integers(0, 1 << 22, layers * experts)
    total = Sums(world_of(layers, experts, expert_norms=sizes), measure)
    expected = [0] * (layers * experts)
    for layer in (0, 1, 1):
        chosen = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)], np.uint16)
        chosen[rng.random(chosen.shape) < 0.1] = DROPPED
        gates, norms = rng.integers(0, ONE, chosen.shape), rng.integers(0, 1 << 24, tokens)
        total.add(event_of(chosen, layer=layer, weights=gates.astype(np.int32), norms=norms))
        for t, k in np.argwhere(chosen != DROPPED).tolist():
            one = int(norms[t]) * int(gates[t, k]) // ONE if measure != "tokens" else ONE
            expected[layer * experts + int(chosen[t, k])] += one
    norm = [ONE] * len(sizes)
    if measure == "full" and sizes.max() > 0:
        norm = [round(int(s) * ONE / int(sizes.max()) + 1e-12) for s in sizes]
    assert total.worth().tolist() == [s * n for s, n in zip(expected, norm, strict=True)]


def test_norms_are_relative_to_the_largest() -> None:
    assert relative(np.array([0, 1, 2, 4])).tolist() == [0, 4096, 8192, 16384]
    assert relative(np.zeros(3, np.int64)).tolist() == [ONE] * 3


@given(st.lists(st.integers(0, 1 << 60), min_size=1), st.integers(0, ONE))
def test_sums_fade_exactly(sums: list[int], factor: int) -> None:
    assert faded(np.array(sums), factor).tolist() == [s * factor // ONE for s in sums]


# ---- masked gating -------------------------------------------------------------------------------


def test_gate_values_of_the_variants_by_hand() -> None:
    """The top-1 example of equation y = G(x)_i E_i(x): expert 0 is away, 1 and 3 are there."""
    p = np.array([[0.5, 0.2, 0.2, 0.1]])
    here = np.array([False, True, False, True])
    chosen = np.array([[0]], np.uint16)
    executed = masked(chosen, p, here)
    assert executed.tolist() == [[1]]

    def values(variant: str, normalised: bool = False) -> list[float]:
        return [*gate_values(p, chosen, executed, here, variant, normalised=normalised)[0].tolist()]

    assert values("A") == [pytest.approx(0.2 / 0.3, abs=0, rel=1e-15)]
    assert values("B") == [0.2]
    assert values("C") == [0.5]
    assert [values(v, normalised=True) for v in VARIANTS] == [[1.0]] * 3
    assert mass_kept(p, chosen, executed).tolist() == [0.4]


def test_gate_values_of_a_top_2_by_hand() -> None:
    """Section 7.4 of what was derived for top k: 1 stays, 3 stands in for 0."""
    p = np.array([[0.5, 0.25, 0.125, 0.125]])
    here = np.array([False, True, False, True])
    chosen = np.array([[0, 1]], np.uint16)
    executed = masked(chosen, p, here)
    assert executed.tolist() == [[1, 3]]
    told = {v: gate_values(p, chosen, executed, here, v, normalised=False)[0] for v in VARIANTS}
    assert told["A"].tolist() == [0.25 / 0.375, 0.125 / 0.375]
    assert told["B"].tolist() == [0.25, 0.125]
    assert told["C"].tolist() == [0.5, 0.25]
    assert mass_kept(p, chosen, executed).tolist() == [0.5]
    for variant in VARIANTS:
        given_ = gate_values(p, chosen, executed, here, variant, normalised=True)
        assert given_[0].tolist() == [0.25 / 0.375, 0.125 / 0.375]


drawn_gates = st.tuples(st.integers(0, 1 << 30), st.integers(1, 3), st.integers(3, 7))


def tokens_of(seed: int, top_k: int, experts: int) -> tuple[AnyArray, AnyArray, AnyArray, AnyArray]:
    """Logits, probabilities, the top k and a set of residents, at least one."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, experts))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = np.argsort(-p, axis=1, kind="stable")[:, :top_k].astype(np.uint16)
    here = rng.random(experts) < 0.5
    here[rng.integers(experts)] = True
    return logits, p, chosen, here


@given(drawn_gates)
def test_masked_gating_is_the_top_k_of_masked_logits(drawn: tuple[int, int, int]) -> None:
    """And A to C are what their names say: a mask before the softmax, after it, mass kept."""
    logits, p, chosen, here = tokens_of(*drawn)
    executed = masked(chosen, p, here)
    minus = np.where(here, logits, -np.inf)
    top = np.argsort(-minus, axis=1, kind="stable")[:, : chosen.shape[1]]
    top = np.where(np.take_along_axis(minus, top, axis=1) > -np.inf, top, DROPPED)
    assert executed.tolist() == top.tolist()
    told = {v: gate_values(p, chosen, executed, here, v, normalised=False) for v in VARIANTS}
    at, real = np.where(top == DROPPED, 0, top), top != DROPPED
    softmax = np.exp(minus) / np.exp(minus).sum(axis=1, keepdims=True)
    assert np.allclose(told["A"], np.where(real, np.take_along_axis(softmax, at, axis=1), 0))
    own = np.where(real, np.take_along_axis(p, at, axis=1), 0)
    assert (told["B"] == own).all()
    before = np.take_along_axis(p, chosen.astype(np.int64), axis=1).sum(axis=1)
    assert np.allclose(told["C"].sum(axis=1), before)
    assert np.allclose(mass_kept(p, chosen, executed), own.sum(axis=1) / before)


@given(drawn_gates, st.sampled_from(VARIANTS), st.booleans())
def test_all_resident_changes_nothing(
    drawn: tuple[int, int, int], variant: str, normalised: bool
) -> None:
    _, p, chosen, here = tokens_of(*drawn)
    here[:] = True
    assert (masked(chosen, p, here) == chosen).all()
    own = np.take_along_axis(p, chosen.astype(np.int64), axis=1)
    original = own / own.sum(axis=1, keepdims=True) if normalised else own
    values = gate_values(p, chosen, chosen, here, variant, normalised=normalised)
    assert np.allclose(values, original, rtol=1e-14)


def test_too_few_residents_drop_or_fetch() -> None:
    chosen = np.array([[4, 2, 0], [1, 4, 3], [3, DROPPED, DROPPED]], np.uint16)
    gate = np.array([[3, 1, 4, 0, 5], [0, 5, 1, 3, 4], [0, 1, 2, 9, 0]])
    here = np.array([False, True, False, True, False])
    d = DROPPED
    assert masked(chosen, gate, here).tolist() == [[1, 3, d], [1, 3, d], [3, d, d]]
    fetched = masked(chosen, gate, here, fetch=True)
    assert fetched.tolist() == [[1, 3, 4], [1, 3, 4], [3, d, d]]
    nobody = np.zeros(5, bool)
    assert masked(chosen, gate, nobody).tolist() == [[d] * 3] * 3
    assert masked(chosen, gate, nobody, fetch=True).tolist() == chosen.tolist()


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.data())
def test_a_token_alone_is_served_as_among_others(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    experts, top_k = shape
    ids = data.draw(st.permutations(range(experts)))[:top_k]
    chosen = np.array([[data.draw(st.sampled_from([e, e, DROPPED])) for e in ids]], np.uint16)
    gate = np.array([data.draw(st.lists(st.integers(0, 3), min_size=experts, max_size=experts))])
    here = np.array(data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
    for likely, fetch in product((gate, None), (False, True)):
        alone = masked(chosen, likely, here, fetch=fetch)
        both = None if likely is None else np.repeat(likely, 2, axis=0)
        assert masked(np.repeat(chosen, 2, axis=0), both, here, fetch=fetch).tolist() == [
            *alone.tolist(), *alone.tolist()
        ]  # fmt: skip


def test_equal_probabilities_go_to_the_lowest_id() -> None:
    gate = np.array([[7, 0, 3, 3, 0]])
    here = np.array([False, True, True, True, True])
    assert masked(np.array([[0, 2]], np.uint16), gate, here).tolist() == [[2, 3]]
    assert masked(np.array([[0, 2]], np.uint16), None, here).tolist() == [[2, 1]]


# ---- targets -------------------------------------------------------------------------------------

layer_states = st.integers(2, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 5), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.integers(1, n),
    )
)


@given(layer_states)
def test_a_target_is_the_most_important_with_the_fewest_loads(
    drawn: tuple[list[int], list[bool], int],
) -> None:
    worth, inside, slots = np.array(drawn[0]), np.array(drawn[1]), drawn[2]
    wanted = target(worth, np.zeros(len(worth), np.int64), inside, slots)
    assert wanted.sum() == slots
    best = np.sort(worth)[::-1][:slots]
    assert worth[wanted].sum() == best.sum()
    above = worth > best[-1]
    level = worth == best[-1]
    left = slots - int(above.sum())
    loads = int((above & ~inside).sum()) + max(0, left - int((level & inside).sum()))
    assert (wanted & ~inside).sum() == loads


def test_a_gain_holds_back_swaps_that_bring_little() -> None:
    worth, prior = np.array([100, 90, 124, 200]), np.zeros(4, np.int64)
    inside = np.array([True, True, False, False])
    assert target(worth, prior, inside, 2).tolist() == [False, False, True, True]
    # 200 for 90 pays; 124 is not a quarter more than 100.
    assert target(worth, prior, inside, 2, ONE // 4).tolist() == [True, False, False, True]
    assert target(worth, prior, inside, 3, ONE * 9).tolist() == [True, True, False, True]


# ---- swaps, by hand ------------------------------------------------------------------------------


def toy(tokens: list[int], slots: int) -> Case:
    """One layer of four experts, top 1; a pass takes 2 ns, its gate is in the middle, a load 10."""
    hardware = machine(dense_ns=1, expert_ns=1)
    case = decode_case([[[e]] for e in tokens], 4, slots, hardware, nbytes=10)
    (rows,) = case.requests
    return replace(case, requests=(replace(rows, gate=None, weights=None, input_norm=None),))


def toy_setup(case: Case, *sets: str) -> Setup:
    """Experts 0 and 1 are there, nothing is known of the past, all norms are 1."""
    setup = setup_of(case, spec_of("swapmoe", "prefetch.every=pass", *sets).build())
    world = replace(setup.world, past=None, expert_norms=None)
    return replace(setup, world=world, initial=[0, 1], initial_charged=False)


def log_of(case: Case, *sets: str) -> list[tuple[Any, ...]]:
    """Demands (when, key) and what became of loads; both engines agree on all of it."""
    engine = ReferenceEngine(toy_setup(case, *sets))
    watch = Watch(engine, case)
    tally = drive(engine, works_of(case, inputs_of(engine.policy)))
    fast = FastEngine(toy_setup(case, *sets))
    works = works_of(case, inputs_of(fast.policy))
    assert drive(fast, works).log_digest == tally.log_digest  # type: ignore[arg-type]
    records = watch.finished(tally).records
    assert not tally.phases[0].misses + tally.phases[1].misses
    kept = [r for r in records if r[0] != "end"]
    return [(r[0], r[1], *divmod(r[-1], 4)) if r[0] == "gate" else r[:3] for r in kept]


HIT = int(Status.HIT)


def gates(first: int, last: int, key: int) -> list[tuple[Any, ...]]:
    """Passes ``first`` to ``last``, counted from 1, that execute one resident expert."""
    return [("gate", 2 * p - 1, key, HIT) for p in range(first, last + 1)]


def test_a_swap_keeps_the_old_expert_until_the_new_one_is_there() -> None:
    """Two slots and a spare one, f = 8 passes. Expert 2 is wanted; 0, the lowest id, stands in.

    The plan after pass 8 wants 2 in the place of 1. It loads into the spare slot from the gate of
    pass 9 (17 ns) to 27 ns, which is before the gate of pass 14. Expert 1 serves in pass 10. In
    pass 15 it is in memory yet, but has retired: 0 stands in.
    """
    case = toy([2] * 8 + [2, 1, 2, 2, 2, 2, 1], 3)
    assert log_of(case, "prefetch.period=8") == [
        *gates(1, 9, 0),
        ("issue", 17, 2),
        *gates(10, 10, 1),
        *gates(11, 13, 0),
        ("land", 27, 2),
        *gates(14, 14, 2),
        *gates(15, 15, 0),
    ]


def test_a_new_plan_while_a_swap_is_in_flight() -> None:
    """The plan after pass 2 wants 2 for 1; 2 loads from 5 to 15 ns. The plan after pass 4 (8 ns)
    wants 3 and no more 2: what moves is finished, but 2 retires as it lands, never used, and at the
    gate of pass 8 (15 ns) 3 takes its bytes. It lands at 25 ns, before the gate of pass 13, and 1
    retires: in pass 14, 0 stands in for it.
    """
    case = toy(IN_FLIGHT, 3)
    assert log_of(case, "prefetch.period=2") == [
        *gates(1, 3, 0),
        ("issue", 5, 2),
        *gates(4, 7, 0),
        ("land", 15, 2),
        *gates(8, 8, 0),
        ("evict", 15, 2),
        ("issue", 15, 3),
        *gates(9, 12, 0),
        ("land", 25, 3),
        *gates(13, 13, 3),
        *gates(14, 14, 0),
    ]


IN_FLIGHT = [2, 2, *[3] * 11, 1]
"""What the passes of a toy ask for."""


def test_a_new_plan_takes_back_what_waits() -> None:
    """The plan after pass 2 wants 2 and 3 (as often): 2 loads from 5 ns, 3 waits for the bytes of
    1, which retires when 2 lands. The plan after pass 4 wants 2 and 0: 3 is dropped at 8 ns.
    """
    case = toy([2, 3, 2, 0, 2, 0, 0, 2], 3)
    assert log_of(case, "prefetch.period=2") == [
        *gates(1, 3, 0),
        ("issue", 5, 2),
        *gates(4, 4, 0),
        ("drop", 8, 3),
        *gates(5, 7, 0),
        ("land", 15, 2),
        *gates(8, 8, 2),
    ]


def test_without_a_spare_slot_the_old_expert_goes_first() -> None:
    """Two slots in all. Pass 3 computes 1 until 6 ns; then it is evicted, 2 is issued, and 0 alone
    serves until 2 has landed at 16 ns."""
    case = toy([2, 2, 1, 2, 2, 2, 2, 2, 1], 2)
    assert log_of(case, "prefetch.period=2", "prefetch.spare=0") == [
        *gates(1, 2, 0),
        *gates(3, 3, 1),
        ("evict", 6, 1),
        ("issue", 6, 2),
        *gates(4, 8, 0),
        ("land", 16, 2),
        *gates(9, 9, 0),
    ]


def test_a_retired_expert_comes_back_without_a_load() -> None:
    """After the swap of 2 for 1 (landed at 15 ns), 1 is wanted again and still has its bytes."""
    case = toy([2] * 8 + [1] * 6, 3)
    told = log_of(case, "prefetch.period=2", "prefetch.window=last")
    assert [r for r in told if r[0] != "gate"] == [("issue", 5, 2), ("land", 15, 2)]
    # The last input, a pass, asked for 1: planned after pass 10 (20 ns), done at the next gate.
    assert [r[2] for r in told if r[0] == "gate"][7:] == [2, 0, 0, 0, 1, 1, 1]


def test_its_log_is_no_other_preset_s() -> None:
    """The toy of the swap in flight: everybody else loads on demand, or never swaps."""
    case = toy(IN_FLIGHT, 3)
    (bare,) = case.requests
    (full,) = decode_case([[[e]] for e in IN_FLIGHT], 4, 3).requests
    whole = replace(case, requests=(replace(full, ahead=dict.fromkeys(range(1, 9), bare.experts)),))
    digests: dict[str, str] = {}
    for name in PRESETS:
        setup = setup_of(whole, spec_of(name).build())
        if name == "swapmoe":
            setup = toy_setup(case, "prefetch.period=2")
        try:
            engine = ReferenceEngine(replace(setup, initial=[0, 1], initial_charged=False))
        except NotRunError:
            continue
        works = works_of(case if name == "swapmoe" else whole, inputs_of(engine.policy))
        digests[name] = drive(engine, works).log_digest
    mine = digests.pop("swapmoe")
    assert mine not in digests.values()
    assert len(digests) > 20


# ---- what counts as an input, and how much a step may do -----------------------------------------


def plans_of(case: Case, *sets: str) -> int:
    """How many plans a run made."""
    spec = spec_of("swapmoe", *sets)
    policy = spec.build()
    assert isinstance(policy, SeatPolicy) and isinstance(policy.prefetch, VirtualExperts)
    drive(ReferenceEngine(setup_of(case, policy, spec.initial)), works_of(case, inputs_of(policy)))
    return policy.prefetch.plans


@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_are_requests_passes_or_tokens(batch: int) -> None:
    """Three requests of a prefill of four tokens and three decoding passes."""
    base = mixed_case(np.random.default_rng(1))
    case = replace(base, capacity_bytes=(8,), batch=batch, chunk_tokens=0)
    for every, period, plans in [
        ("request", 1, 3),
        ("request", 2, 1),
        ("pass", 1, 12),
        ("pass", 5, 2),
        ("token", 1, 12),
        ("token", 4, 3 if batch == 1 else 5),
        ("token", 100, 0),
        ("request", 0, 0),
    ]:
        sets = (f"prefetch.every={every}", f"prefetch.period={period}")
        assert plans_of(case, *sets) == plans, (every, period)


def many_layers(passes: int) -> Case:
    """Three layers of eight experts whose favourites change at every pass."""
    rng = np.random.default_rng(5)
    events = [[rng.permutation(8)[:2].tolist() for _ in range(3)] for _ in range(passes)]
    return decode_case(events, 8, 5, machine(dense_ns=50, expert_ns=1), nbytes=4)


@pytest.mark.parametrize(("layers", "swaps"), [(1, 0), (1, 1), (2, 3), (0, 2), (0, 0)])
def test_a_step_swaps_no_more_than_it_may(layers: int, swaps: int) -> None:
    """One layer a step in turn unless told otherwise; a step is 3 layer events, 159 ns."""
    sets = ("prefetch.every=pass", "prefetch.period=4")
    more = (f"prefetch.layers={layers}", f"prefetch.swaps={swaps}")
    done = run(replace(many_layers(40), initial="static"), "swapmoe", *sets, *more)
    assert len(done.of("issue")) > 20
    step = 0
    steps = []
    for record in done.records:
        step = record[2] // 3 if record[0] == "gate" else step
        if record[0] == "issue":
            steps.append((step, record[2] // 8))
    served = []
    for _, loads in groupby(steps, key=lambda pair: pair[0]):
        in_layers = [layer for _, layer in loads]
        served.append((len(set(in_layers)), len(in_layers)))
    assert max(n for n, _ in served) == (layers or 3) if not swaps else True
    assert max(n for n, _ in served) <= (layers or 3)
    assert max(n for _, n in served) <= (swaps or 99)


# ---- windows, routers, first sets ----------------------------------------------------------------


class Nothing:
    """A cache that holds nothing and has room for nothing."""

    states = np.zeros(4, np.uint8)

    def free_bytes(self, layer: int) -> int:
        return 0


@pytest.mark.parametrize(
    ("window", "told"),
    [
        ("sum", [[2, 0, 0, 0], [0, 2, 1, 0]]),
        ("last", [[1, 0, 0, 0], [0, 0, 1, 0]]),
        ("decay", [[2, 0, 0, 0], [1, 2, 1, 0]]),
    ],
)
def test_windows(window: str, told: list[list[int]]) -> None:
    """Passes choose 0, and 0 (a plan); then 1 twice, and 2 (another)."""
    seat, cache = VirtualExperts(every="pass", window=window, period=2), Nothing()
    seat.begin(world_of(slots=2))
    seat.plan(RequestBegin(0, 1), cache)  # type: ignore[arg-type]
    none = np.zeros(0, np.int64)
    seen: list[list[int]] = []
    for step, chosen in enumerate(([[0]], [[0]], [[1], [1]], [[2]])):
        source = event_of(chosen, step=step)
        for fact in (Gate(source, none, none, none, none), IterationEnd(0, step)):
            seat.plan(fact, cache)  # type: ignore[arg-type]
        if step % 2:
            seen.append((seat.worth // ONE // ONE).tolist())
    assert seen == told


def starved(router: str) -> set[int]:
    """What was ever loaded where half of the tokens ask for an expert that is away."""
    case = toy([3, 0, 3, 1, 3, 0, 3, 3, 3, 1] * 4, 3)
    told = log_of(case, f"prefetch.router={router}", "prefetch.period=2")
    return {r[2] for r in told if r[0] == "land"}


def test_scores_of_the_masked_gate_starve_newcomers() -> None:
    """Why importance reads the unmasked gate: under the masked one, what is away stays away."""
    assert 3 in starved("unmasked")
    assert starved("masked") == set()


def test_first_sets() -> None:
    world = world_of(2, 4, 3, seed=5, expert_norms=np.array([1, 9, 8, 7, 4, 3, 6, 5]))
    made = {how: VirtualExperts(initial=how).initially(world) for how in FIRST}
    assert made["magnitude"] == made["past"] == [1, 2, 6, 7]
    assert made["random"] != made["magnitude"]
    assert [sum(e // 4 == la for e in made["random"]) for la in (0, 1)] == [2, 2]
    other = VirtualExperts(initial="random").initially(replace(world, seed=6))
    assert other != made["random"]

    def past() -> list[Gate]:
        none = np.zeros(0, np.int64)
        sources = [event_of([[3], [3], [1]]), event_of([[2], [0], [0], [0]], layer=1)]
        return [Gate(s, none, none, none, none) for s in sources]

    flat = replace(world, past=past, expert_norms=None)
    assert VirtualExperts().initially(flat) == [3, 1, 4, 6]
    # With ||E||: 2 * 7 and 1 * 15; 3 * 4 and 1 * 6.
    norms = np.array([1, 15, 8, 7, 4, 3, 6, 5])
    assert VirtualExperts().initially(replace(flat, expert_norms=norms)) == [1, 3, 4, 6]
    assert VirtualExperts(spare=0).initially(flat) == [3, 1, 0, 4, 6, 5]


def test_slots_of_each_layer() -> None:
    def held(world: World, **more: Any) -> list[int]:
        seat = VirtualExperts(**more)
        seat.begin(world)
        return seat.held

    assert held(world_of(2, 8, 5)) == [4, 4]
    assert held(world_of(2, 8, 5), spare=0) == [5, 5]
    assert held(world_of(2, 8, 8)) == [8, 8]
    assert held(world_of(2, 8, 2, top_k=2)) == [2, 2]
    assert held(world_of(2, 8, 5), slots="3,5") == [3, 5]
    shared = replace(world_of(2, 8), scope="global", capacity_bytes=(11,))
    assert slots_of(shared) == [5, 5] and held(shared) == [4, 4]
    assert held(shared, slots="2,8") == [2, 8]
    unequal = replace(shared, expert_bytes=np.array([[1, 3]]), capacity_bytes=(11,))
    assert slots_of(unequal) == [2, 2]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("prefetch.period=-1", "prefetch.period=-1: must be 0 or more"),
        ("prefetch.every=day", "prefetch.every=day: must be request, pass or token"),
        ("prefetch.measure=x", "prefetch.measure=x: must be full, inputs or tokens"),
        ("prefetch.decay=1.5", "prefetch.decay=1.5: must lie between 0 and 1"),
        ("prefetch.gain=-1", "prefetch.gain=-1.0: must lie between"),
        ("prefetch.slots=1,2,3", "prefetch.slots=1,2,3: write 2 whole numbers"),
        ("prefetch.slots=1,2", "prefetch.slots=1,2: each must lie between 2"),
        ("prefetch.slots=5,5", "prefetch.slots=5,5: more than --capacity holds"),
        ("keep.gamma=0", "keep.gamma=0.0: must lie above 0"),
        ("route.few=some", "route.few=some: must be drop or fetch"),
        ("route.variant=D", "route.variant=D: must be A, B or C"),
    ],
)
def test_wrong_parameters_are_named(setting: str, told: str) -> None:
    case = replace(mixed_case(np.random.default_rng(0)), capacity_bytes=(9,))
    with pytest.raises(UsageError) as caught:
        setup_engine(case, setting)
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def setup_engine(case: Case, *sets: str) -> ReferenceEngine:
    """An engine, made but not run."""
    return ReferenceEngine(setup_of(case, resolve(["swapmoe"], sets)[0].build()))


def test_less_room_than_a_token_needs_is_refused() -> None:
    case = replace(mixed_case(np.random.default_rng(0)), capacity_bytes=(3,))
    with pytest.raises(
        NotRunError, match="a token of masked routing takes 2; give at least 2/layer"
    ):
        setup_engine(case)


# ---- laws ----------------------------------------------------------------------------------------


@st.composite
def settled(draw: st.DrawFn, equal: bool = False) -> Case:
    """A case that masked gating accepts: room for the experts of a token in every layer."""
    case = draw(cases(equal=equal))
    model = case.model
    sizes = model.expert_bytes_table().tolist()
    slots = draw(st.integers(model.top_k, model.experts))
    booked = [max(sizes)] * len(sizes) if case.options.allocator == "slots" else sizes
    capacity = tuple(slots * size for size in booked)
    if model.layers == 1 or draw(st.booleans()):
        capacity = (sum(capacity),)
    return replace(case, capacity_bytes=capacity)


@st.composite
def parameters(draw: st.DrawFn) -> tuple[str, ...]:
    """Settings of SwapMoE's seats."""
    choices: dict[str, Any] = {
        "prefetch.every": UNITS,
        "prefetch.period": (1, 1, 2, 0),
        "prefetch.layers": (1, 0, 2),
        "prefetch.swaps": (0, 1, 2),
        "prefetch.spare": (1, 0, 2),
        "prefetch.gain": (0.0, 0.5),
        "prefetch.measure": MEASURES,
        "prefetch.router": ROUTERS,
        "prefetch.window": WINDOWS,
        "prefetch.initial": FIRST,
        "route.few": ("drop", "fetch"),
        "keep.gamma": (1.0, 0.9),
    }
    return tuple(f"{key}={draw(st.sampled_from(values))}" for key, values in choices.items())


@settings(max_examples=60)
@given(settled(), parameters(), st.booleans(), st.booleans())
def test_b_the_engines_agree(case: Case, sets: tuple[str, ...], share_kv: bool, flat: bool) -> None:
    """Whatever the parameters, the capacities, the batches, the chunks and the stacks."""
    options = replace(case.options, share_kv=share_kv, flat=flat)
    bent = replace(case, options=options)
    spec = spec_of("swapmoe", *sets)
    assert_equal(
        outcome(ReferenceEngine, bent, spec.build(), spec.initial),
        outcome(FastEngine, bent, spec.build(), spec.initial),
    )


@settings(max_examples=60)
@given(settled(), parameters())
def test_only_swaps_load_and_only_residents_serve(case: Case, sets: tuple[str, ...]) -> None:
    """Under watch: no miss, no late hit, no demand load; what retired serves nobody; and a layer
    routes among n_l experts, never more."""
    sets = (*sets, "route.few=drop", "miss=cpu")
    spec = spec_of("swapmoe", *sets)
    policy = spec.build()
    assert isinstance(policy, SeatPolicy)
    seat, route = policy.prefetch, policy.routing
    assert isinstance(seat, VirtualExperts) and isinstance(route, MaskedGate)
    setup = setup_of(case, policy, spec.initial)
    engine = ReferenceEngine(setup)
    watch = Watch(engine, case)
    trimmed = False
    inner = route.route

    def routed(event: LayerEvent, cache: Any) -> AnyArray | None:
        nonlocal trimmed
        here = route.routable(event.layer, cache)
        assert here.sum() <= seat.held[event.layer]
        assert (route.retired.mask == seat.retired.mask).all()
        assert route.retired.leaving == seat.retired.leaving
        bent = inner(event, cache)
        executed = event.token_experts if bent is None else bent
        assert here[executed[executed != DROPPED]].all()
        trimmed = True
        return bent

    route.route = routed  # type: ignore[method-assign]
    tally = drive(engine, works_of(case, inputs_of(policy)))
    watch.finished(tally)
    assert trimmed
    assert not any(p.misses or p.late_hits for p in tally.phases)
    assert not any(tally.served.values())


@settings(max_examples=25)
@given(settled(), parameters())
def test_room_for_all_experts_is_the_model_itself(case: Case, sets: tuple[str, ...]) -> None:
    """n_l = E: the experts that the trace names, no load, and the log of any policy."""
    size = int(case.model.expert_bytes_table().max())
    whole = (size * case.model.layers * case.model.experts,)
    full = replace(case, capacity_bytes=whole, initial="all")
    tally = run(full, "swapmoe", *sets).tally
    assert tally.log_digest == run(full, "lru").tally.log_digest
    assert not sum(p.loads for p in tally.phases)
    quality = tally.quality
    assert quality is not None
    assert (quality.agreed, quality.mass_kept) == (quality.chosen, quality.mass)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("initial", ["cold", "static", "some"])
@pytest.mark.parametrize("spare", [0, 1, 2])
def test_every_target_is_reached(scope: str, initial: str, spare: int) -> None:
    """Whatever a run starts with, in time each layer routes among the n_l that are wanted."""
    case = many_layers(60)
    if scope == "global":
        case = replace(case, capacity_bytes=(sum(case.capacity_bytes),))
    for seed, limits in enumerate([(), ("prefetch.swaps=1",), ("prefetch.layers=0",)]):
        sets = ("prefetch.period=0", "prefetch.initial=random", f"prefetch.spare={spare}")
        policy = spec_of("swapmoe", *sets, *limits).build()
        assert isinstance(policy, SeatPolicy)
        seat, route = policy.prefetch, policy.routing
        assert isinstance(seat, VirtualExperts) and isinstance(route, MaskedGate)
        setup = setup_of(replace(case, initial=initial, seed=seed), policy)
        engine = ReferenceEngine(setup)
        drive(engine, works_of(case, inputs_of(policy)))
        for layer in range(3):
            assert (route.routable(layer, engine.view) == seat.wanted[layer]).all()
            assert seat.wanted[layer].sum() == seat.held[layer] == 5 - spare
        assert not engine.link.waiting


@settings(max_examples=40)
@given(settled(equal=True), st.sampled_from(STATIC))
def test_static_baselines_settle_on_their_first_set(case: Case, name: str) -> None:
    """Loads, if any, complete the first set; then nothing moves again."""
    spec = spec_of(name)
    policy = spec.build()
    assert isinstance(policy, SeatPolicy)
    setup = setup_of(case, policy, "cold")
    first = policy.initially(setup.world)
    assert first is not None and len(first) == sum(slots_of(setup.world))
    engine = ReferenceEngine(replace(setup, initial=first))
    tally = drive(engine, works_of(case, inputs_of(policy)))
    assert not sum(p.loads for p in tally.phases)
    assert not tally.evictions


def test_quality_is_the_gate_mass_kept() -> None:
    """What the host counts is ``mass_kept`` over all tokens, weighted by their own mass."""
    case = replace(many_layers(12), initial="static")
    policy = spec_of("swapmoe").build()
    seen: list[tuple[AnyArray, AnyArray, AnyArray]] = []
    assert isinstance(policy, SeatPolicy)
    inner = policy.routing.route

    def routed(event: LayerEvent, cache: Any) -> AnyArray | None:
        bent = inner(event, cache)
        assert event.gate is not None
        executed = event.token_experts if bent is None else bent
        seen.append((event.gate, event.token_experts, executed))
        return bent

    policy.routing.route = routed  # type: ignore[method-assign]
    quality = run(case, policy=policy).tally.quality
    assert quality is not None and 0 < quality.mass_kept < quality.mass
    masses = [float(mass_kept(p, c, c_)[0]) * _mass(p, c) for p, c, c_ in seen]
    assert sum(masses) == pytest.approx(quality.mass_kept)


def _mass(gate: AnyArray, chosen: AnyArray) -> int:
    return int(np.take_along_axis(gate, chosen.astype(np.int64), axis=1).sum())


def test_a_cold_start_drops_or_fetches() -> None:
    """Nothing is resident: dropped tokens cost quality, fetched experts cost misses."""
    case = replace(many_layers(6), initial="cold")
    dropped, fetched = (run(case, "swapmoe", f"route.few={few}").tally for few in ("drop", "fetch"))
    assert not sum(p.misses for p in dropped.phases)
    assert sum(p.misses for p in fetched.phases)
    assert dropped.quality is not None and fetched.quality is not None
    assert dropped.quality.mass_kept < fetched.quality.mass_kept


def test_who_goes_before_its_successor_lands_is_not_retired() -> None:
    """Its bytes were taken by that very successor; later it must be loaded like any other."""
    retired, states = Retired(4), np.array([State.RESIDENT] * 3 + [State.ABSENT], np.uint8)
    retired.swapped([Swap(3, 2)], states)
    retired.note(Evicted(2, 0, 5))
    retired.note(Landed(3, 0, 5, 0, demand=False))
    assert not retired.mask.any() and not retired.leaving


def test_retired_experts() -> None:
    """At once where the newcomer is there, else when it lands; a drop calls it off."""
    retired, states = Retired(4), np.array([State.RESIDENT] * 3 + [State.ABSENT], np.uint8)
    retired.swapped([Swap(0, 0), Swap(3, 1)], states)
    assert retired.mask.tolist() == [True, False, False, False]
    retired.swapped([Swap(0, 2)], states)
    assert retired.mask.tolist() == [False, False, True, False]
    retired.note(Landed(3, 0, 5, 0, demand=False))
    assert retired.mask.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    "sets",
    [
        ("prefetch.every=pass", "prefetch.layers=0"),
        ("prefetch.every=token", "prefetch.period=3", "prefetch.spare=0", "route.few=fetch"),
        ("prefetch.every=pass", "prefetch.router=masked", "prefetch.window=last"),
        ("prefetch.every=pass", "route=exact", "prefetch.window=decay", "prefetch.swaps=1"),
    ],
)
def test_it_conforms_whatever_the_parameters(sets: tuple[str, ...]) -> None:
    check_policy(resolve(["swapmoe"], sets)[0].build)


# ---- through the front door ----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_b_the_engines_agree_on_the_sample(batch: int) -> None:
    request = Request(
        trace=trace_path("demo"),
        hardware=load_hardware("rtx4090"),
        policies=("swapmoe", "prune-random"),
        settings=("prefetch.every=token", "prefetch.period=16"),
        capacities=("25%", "60%"),
        batch=batch,
        limit=batch,
    )
    told = [replay(replace(request, engine=name))["runs"] for name in ("fast", "reference")]
    for fast, reference in zip(*told, strict=True):
        assert (fast.pop("engine"), reference.pop("engine")) == ("fast", "reference")
        assert fast == reference
        assert fast["lossy"] and 0 < fast["quality"]["gate_mass_kept"] < 1
        assert not fast["misses"] and not fast["late_hits"]
        assert bool(fast["loads"]) or fast["policy"] != "swapmoe"
