"""Seats that divide work between host, link and cache: each against an oracle of its own, by
exhaustive search where that can be had. Their presets are in ``test_hybrid_presets.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import UsageError
from moesim.policies.fiddler import Fiddler
from moesim.policies.first_absent import FirstAbsent
from moesim.policies.hybrid_schedule import ending, greedy
from moesim.policies.impact import Impact
from moesim.policies.layer_frequency import worth as frequency_worth
from moesim.policies.layer_quota import Curve, LayerQuota, allocate, costs_of, even
from moesim.policies.layer_statistics import LayerStatistics, likely, paired
from moesim.policies.link_split import quota
from moesim.policies.pinned_lru import PinnedLRU, popular
from moesim.policies.placement import Placement, exchanges, order
from moesim.policies.prices import Layer
from moesim.policies.recent_score import RecentScore, renewed, top
from moesim.policies.reuse_break_even import ReuseBreakEven
from moesim.policy import PrefetchSeat, World
from moesim.registry import resolve
from moesim.types import DROPPED, Gate
from tests.harness import future_of, run, setup_of
from tests.strategies import Case, machine
from tests.test_hybrid_presets import two_paces, wide
from tests.test_laws import mixed_case
from tests.test_oracles import Table, gate, routed

# ---- the schedule against every other one --------------------------------------------------------


def best_end(layer: Layer) -> int:
    """The earliest end over every set of copied experts, in every order of copying."""
    places = range(len(layer.on_host))
    ways = chain.from_iterable(permutations(places, n) for n in range(len(places) + 1))
    return min(layer.end(copied) for copied in ways)


@st.composite
def layers(draw: st.DrawFn, per_token: int = 3) -> Layer:
    """A layer event; a token more takes up to ``per_token`` more on the device."""
    tokens = sorted(draw(st.lists(st.integers(1, 6), max_size=4)), reverse=True)
    device, per, host = draw(st.integers(0, 6)), draw(st.integers(0, per_token)), draw(_times)
    return Layer(
        device=2 * draw(st.integers(0, 40)),
        late=tuple(2 * t for t in draw(st.lists(st.integers(0, 9), max_size=2))),
        copy=2 * draw(st.integers(0, 30)),
        on_device=tuple(2 * (device + per * t) for t in tokens),
        on_host=tuple(2 * host * t for t in tokens),
    )


_times = st.integers(1, 12)


@settings(max_examples=300)
@given(layer=layers())
def test_the_rule_finds_the_best_cut_of_its_line(layer: Layer) -> None:
    cuts = [layer.end(range(count)) for count in range(len(layer.on_host) + 1)]
    assert ending(layer) == min(cuts)
    assert ending(layer) >= best_end(layer)


@settings(max_examples=300)
@given(layer=layers(per_token=0))
def test_where_a_token_more_costs_the_device_nothing_the_rule_is_optimal(layer: Layer) -> None:
    assert ending(layer) == best_end(layer)


def test_how_far_from_the_optimum_the_rule_can_be() -> None:
    """A thousand layers of four missing experts whose device time grows with their tokens: about
    half are divided best, the others end 8 % later on the mean and a third at worst."""
    rng = np.random.default_rng(0)
    over = []
    for _ in range(1000):
        tokens = sorted(rng.integers(1, 9, 4).tolist(), reverse=True)
        per = int(rng.integers(1, 5))
        host = per * int(rng.integers(1, 6)) + int(rng.integers(0, 3))
        layer = Layer(
            device=2 * int(rng.integers(0, 30)),
            late=(),
            copy=2 * int(rng.integers(1, 40)),
            on_device=tuple(2 * per * t for t in tokens),
            on_host=tuple(2 * host * t for t in tokens),
        )
        over.append(ending(layer) / best_end(layer) - 1)
    later = [o for o in over if o > 0]
    assert 400 < len(later) < 500
    assert 0.07 < np.mean(later) < 0.09
    assert 0.3 < max(later) < 0.34


def test_the_rule_by_hand() -> None:
    """Copies take 4, the device 1, the host 5. The first copy would be done at 5 as well, and the
    device has it; the second one would be done at 9, the host with it at 5."""
    assert greedy(Layer(device=0, late=(), copy=8, on_device=(2, 2), on_host=(10, 10))) == 1
    # What is under way has 2 to come, so the first copy would be computed at 7: later than the host
    # has done both, and not later than it would have done the second of slower ones.
    assert greedy(Layer(device=0, late=(2,), copy=8, on_device=(2, 2), on_host=(6, 6))) == 0
    assert greedy(Layer(device=0, late=(2,), copy=8, on_device=(2, 2), on_host=(10, 10))) == 1
    # Four tokens take the host 20: the most loaded is copied, the least loaded is not.
    assert greedy(Layer(device=0, late=(), copy=8, on_device=(2, 2), on_host=(40, 10))) == 1
    assert greedy(Layer(device=0, late=(), copy=8, on_device=(), on_host=())) == 0


@settings(max_examples=60)
@given(case=routed(), data=st.data())
def test_the_engines_clock_says_what_the_schedule_said(case: Case, data: st.DataObject) -> None:
    """Residents, copies and the host as planned, to the nanosecond, one token an event."""
    load, device, host = (data.draw(st.integers(n, 9)) for n in (1, 0, 0))
    hardware = machine(latency_ns=load - 1, dense_ns=1, expert_ns=device, cpu_ns=host)
    roomy = (case.meta.experts * case.meta.layers,)
    options = replace(case.options, order="ready")
    case = replace(case, hardware=hardware, capacity_bytes=roomy, options=options)
    done = run(case, "lru", "miss=hybrid-schedule")
    ends = {event: when for _, when, event in done.of("end")}
    for _, when, event, _, _, _, *words in done.of("gate"):
        found = [word % 4 for word in words]
        missing = found.count(2)
        layer = Layer(
            2 * device * found.count(0),
            (),
            2 * load,
            (2 * device,) * missing,
            (2 * host,) * missing,
        )
        assert ends[event] - when == ending(layer) / 2


# ---- the other divisions -------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    tokens=st.lists(st.integers(1, 6), max_size=6),
    host=st.integers(0, 12),
    copy=st.integers(0, 30),
    link=st.integers(0, 20),
)
def test_the_quota_ends_first_and_moves_least(
    tokens: list[int], host: int, copy: int, link: int
) -> None:
    """Against every subset of experts that might go to the host."""
    times = [host * t for t in sorted(tokens, reverse=True)]

    def end(chosen: Sequence[int]) -> int:
        copies = len(times) - len(chosen)
        return max(sum(times[i] for i in chosen), link + copies * copy if copies else 0)

    places = range(len(times))
    ways = [c for n in range(len(times) + 1) for c in combinations(places, n)]
    least = min(end(c) for c in ways)
    q = quota(times, copy, link)
    assert end(range(len(times) - q, len(times))) == least
    assert all(end(c) > least for c in ways if len(c) > q)


def test_host_and_link_finish_together() -> None:
    """The host reads a third of what the link does: of eight equal experts two are its, six
    copied, and both take 6."""
    assert quota([3] * 8, 1) == 2


@settings(max_examples=40)
@given(case=routed(slots_from_k=False), data=st.data())
def test_without_later_uses_break_even_is_fiddlers_rule(case: Case, data: st.DataObject) -> None:
    load, device, host = (data.draw(st.integers(n, 9)) for n in (1, 0, 0))
    hardware = machine(latency_ns=load - 1, dense_ns=1, expert_ns=device, cpu_ns=host)
    case = replace(case, hardware=hardware)
    fiddler = run(case, "lru", "miss=fiddler").tally
    assert run(case, "lru", "miss=reuse-break-even", "miss.stay=0").tally == fiddler


@settings(max_examples=30)
@given(case=routed(slots_from_k=False))
def test_what_stays_for_ever_is_worth_any_copy_once_it_was_used(case: Case) -> None:
    hardware = machine(dense_ns=1, expert_ns=1, cpu_ns=2, latency_ns=7)
    case = replace(case, hardware=hardware)
    ever = run(case, "lru", "miss=reuse-break-even", f"miss.stay={1 << 30}").tally
    assert ever.served["cpu"] == np.count_nonzero(future_of(case).counts)


def test_fiddlers_own_constants_are_a_cost_table() -> None:
    """Its code has 7 a token on the host and 70 for a copy and the device: ten tokens are the last
    that run on the host."""
    seat, world = Fiddler(), replace(WORLD, costs=Table(load=6, device=10, host=7))
    seat.begin(world)
    asked = gate_of(0, [0, 1, 2, 3], tokens=[9, 10, 11, 60])
    assert set(seat.serve(asked, None)) == {0, 1}  # type: ignore[arg-type]


# ---- minus recent score --------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """Of four experts the two best of each token count; alpha is a half, then a quarter."""
    one = 1 << 24
    gate = np.array([[8192, 4096, 3072, 1024]], np.int32)
    assert top(gate, 2).tolist() == [one // 2, one // 4, 0, 0]
    first = renewed(np.zeros(4, np.int64), top(gate, 2), 8192)
    assert first.tolist() == [one // 4, one // 8, 0, 0]
    second = renewed(first, top(gate[:, ::-1], 2), 8192)
    assert second.tolist() == [one // 8, one // 16, one // 8, one // 4]
    assert renewed(first, top(gate, 2), 4096).tolist() == [5 * one // 16, 5 * one // 32, 0, 0]


def test_of_several_tokens_the_mean_counts_and_ties_go_to_the_lower_id() -> None:
    gate = np.array([[8192, 4096, 4096, 0], [0, 0, 16384, 0]], np.int32)
    one = 1 << 24
    # Of expert 1 and 2 the first token's second place goes to 1; the second token's to 0, with 0.
    assert top(gate, 2).tolist() == [one // 4, one // 8, one // 2, 0]
    assert top(gate, 9).tolist() == [one // 4, one // 8, one // 8 + one // 2, 0]


def test_the_least_liked_goes_and_of_equals_the_least_recent() -> None:
    seat = RecentScore(top=1)
    seat.begin(replace(WORLD, layers=1, expert_bytes=np.ones((1, 1), np.int64)))
    for event, said in enumerate(([9000, 3000, 0, 0], [2000, 9000, 0, 0], [0, 0, 9000, 1000])):
        asked = gate_of(event, [int(np.argmax(said))])
        seat.gate(replace(asked, source=replace(asked.source, gate=np.array([said], np.int32))))
    seat.planned([3])
    # S is an eighth of 9000, a quarter of it, half of it, and nothing: 3 was not among the best.
    assert np.argsort(seat.scores(np.arange(4), 2)).tolist() == [3, 0, 1, 2]
    assert (seat.priority >> 10).tolist() == [9000 // 8, 9000 // 4, 9000 // 2, 0]


# ---- slots by layer ------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    costs=st.integers(1, 3).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=n, max_size=n
        )
    ),
    slots=st.integers(0, 14),
)
def test_the_allocation_is_the_least_of_all(costs: list[list[int]], slots: int) -> None:
    total = min(slots, 3 * len(costs))
    few = range(int(slots >= len(costs)), 4)
    ways = [w for w in product(few, repeat=len(costs)) if sum(w) == total]
    least = min(sum(c[n] for c, n in zip(costs, way, strict=True)) for way in ways)
    dealt = allocate(np.array(costs, np.int64), slots)
    assert sum(dealt) == total
    assert sum(c[n] for c, n in zip(costs, dealt, strict=True)) == least


@settings(max_examples=60)
@given(case=routed(shortest=8))
def test_a_curve_is_what_lru_misses_at_every_number_of_slots(case: Case) -> None:
    """Each layer in a cache of its own, from the event's own demand to all experts."""
    count, experts = case.meta.layers, case.meta.experts
    curves = [Curve(experts) for _ in range(count)]
    rows = case.requests[0]
    for layer, asked in zip(rows.layer.tolist(), rows.experts.tolist(), strict=True):
        curves[layer].add(asked)
    for slots in range(case.meta.top_k, experts + 1):
        done = run(replace(case, capacity_bytes=(slots,) * count), "lru")
        found = [0] * count
        missing = [0] * count
        for _, _, _, layer, _, _, *words in done.of("gate"):
            misses = sum(word % 4 == 2 for word in words)
            found[layer] += misses
            missing[layer] += misses > 0
        assert [int(c.misses[slots]) for c in curves] == found
        assert [int(c.missing[slots]) for c in curves] == missing


def test_a_right_prefetch_makes_one_miss_of_an_event_free() -> None:
    curve = Curve(3)
    for asked in ([0, 1], [0, 1], [2, 0]):
        curve.add(asked)
    # With one slot: all six miss, but for none (the last of [0, 1] is 1, then 1 again is asked).
    assert curve.misses.tolist() == [6, 5, 3, 3]
    assert curve.missing.tolist() == [3, 3, 2, 2]
    one = 1 << 14
    assert costs_of([curve], np.array([one])).tolist() == [[3 * one, 2 * one, one, one]]
    assert costs_of([curve], np.array([one // 2])).tolist() == [
        [6 * one - 3 * one // 2, 5 * one - 3 * one // 2, 2 * one, 2 * one]
    ]


def test_a_layer_that_is_predicted_needs_no_slots() -> None:
    """The past asks layer a for one expert, b for three in turn, and b is foretold."""
    world = world_of(two_paces())
    for seat, quotas in ((LayerQuota(), [3, 1]), (LayerQuota(accuracy=0), [1, 3])):
        seat.begin(world)
        assert seat.quota.tolist() == quotas
    alone = LayerQuota()
    alone.begin(replace(world, past=None))
    assert alone.quota.tolist() == even(4, 2, 4) == [2, 2]


def test_quotas_are_kept_once_every_layer_could_fill_its_own() -> None:
    """Eight slots: the layer that asks for four in turn gets four of them, and so on."""
    passes = [[(i % 4,), (i // 4 % 2,), (i % 3,)] for i in range(48)]
    case = wide(passes, 4, 8)
    seat = LayerQuota(accuracy=0)
    seat.begin(world_of(case))
    assert seat.quota.tolist() == [4, 1, 3]
    resident: set[int] = set()
    for what, _, key, *_ in run(case, "lru", "keep=layer-quota").records:
        if what == "land":
            resident.add(key)
        elif what == "evict":
            resident.remove(key)
        elif what == "end" and key > 20:
            assert [sum(e // 4 == la for e in resident) for la in range(3)] == [4, 1, 3]


def test_with_a_cache_for_each_layer_quotas_are_lru() -> None:
    rng = np.random.default_rng(2)
    for _ in range(8):
        case = replace(mixed_case(rng), capacity_bytes=(int(rng.integers(1, 5)),) * 2)
        assert run(case, "lru").tally == run(case, "lru", "keep=layer-quota").tally


# ---- popularity, placement, statistics -----------------------------------------------------------


def test_the_popular_are_pinned_while_they_fit() -> None:
    uses = np.array([3, 0, 5, 5, 1], np.int64)
    assert popular(uses, np.full(5, 2), 5) == [2, 3]
    assert popular(uses, np.full(5, 2), 100) == [2, 3, 0, 4]
    assert popular(uses, np.array([2, 2, 9, 2, 2]), 8) == []


@settings(max_examples=30)
@given(case=routed(slots_from_k=False))
def test_nothing_pinned_is_lru(case: Case) -> None:
    assert run(case, "lru").tally == run(case, "lru", "keep=pinned-lru", "keep.share=0").tally


@settings(max_examples=40)
@given(case=routed(shortest=8))
def test_a_pinned_expert_goes_only_where_no_other_may(case: Case) -> None:
    case = replace(case, initial="cold")
    seat = PinnedLRU()
    seat.begin(replace(world_of(case), calibration=future_of(case).counts))
    shared, size = len(case.capacity_bytes) == 1, case.meta.experts
    held: set[int] = set()
    asked: set[int] = set()
    for what, _, key, *rest in run(case, "lru", "keep=pinned-lru").records:
        if what == "gate":
            asked = {word // 4 for word in rest[3:]}
        elif what == "land":
            held.add(key)
        elif what == "evict":
            held.remove(key)
            others = {e for e in held if shared or e // size == key // size} - asked
            assert not seat.pinned[key] or all(seat.pinned[e] for e in others)


def test_placements_by_hand() -> None:
    uses = np.array([0, 4, 1, 0, 4, 0, 0, 9, 2, 0, 0, 3], np.int64)
    world = replace(WORLD, calibration=uses)
    assert order("uniform", world) == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert order("front-loading", world) == list(range(12))
    assert order("frequency", world) == [7, 1, 4, 11, 8, 2]
    chance = order("random", world)
    assert sorted(chance) == list(range(12)) and chance != order("random", replace(world, seed=1))


def test_exchanges_by_hand() -> None:
    """Best newcomer for worst resident, while it is worth more by the gain."""
    worth = np.array([9, 1, 5, 2, 3], np.int64)
    inside = np.array([False, True, False, True, True])
    assert exchanges(worth, ~inside, inside, 0) == [(0, 1), (2, 3)]
    assert exchanges(worth, ~inside, inside, 2 << 14) == [(0, 1)]
    assert exchanges(worth, np.zeros(5, bool), inside, 0) == []


def test_what_follows_by_hand() -> None:
    """After 0 came 1 twice and 2 once; after 3 came 1."""
    counts = np.zeros((5, 5), np.int64)
    before = np.array([[0], [0], [0], [3], [DROPPED]], np.uint16)
    after = np.array([[1], [1], [2], [1], [2]], np.uint16)
    paired(counts, before, after)
    uses = np.array([3, 0, 0, 1, 1], np.int64)
    one = 1 << 14
    expected = likely(counts, uses, np.array([[0, 3], [2, DROPPED]], np.uint16))
    assert expected.tolist() == [[0, 2 * one // 3 + one, one // 3, 0], [0, 0, 0, 0]]


def test_statistics_name_what_followed_of_the_last_two_layers() -> None:
    """0 in a and 1 in b were followed by 2 in c once; 1 in b, after 3, by 0 twice."""
    seat = LayerStatistics()
    past = wide([[(0,), (1,), (2,)], [(3,), (1,), (0,)], [(3,), (1,), (0,)]], 4, 9)
    seat.begin(world_of(replace(past, past=past.requests)))
    # After b1: c0 in 2 of 3, c2 in 1 of 3; and after a0 two layers before: c2 always.
    assert named_by(seat, [(0,), (1,)], 4) == [[4 + 1], [8 + 2]]
    # After a3, two layers before: c0 always. Where nothing was seen nobody is named.
    assert named_by(seat, [(3,), (1,)], 4) == [[4 + 1], [8 + 0]]
    assert named_by(seat, [(2,), (3,)], 4) == [[], []]


def named_by(seat: PrefetchSeat, pass_: Sequence[Sequence[int]], experts: int) -> list[list[int]]:
    """What a seat wishes at each gate of a pass, with nothing resident."""
    seen = []
    for layer, chosen in enumerate(pass_):
        asked = gate(layer, layer, chosen)
        view = View(np.zeros(99, np.uint8))
        plan = seat.plan(asked, view)  # type: ignore[arg-type]
        seen.append([p.expert for p in plan.prefetches])
    return seen


@dataclass
class View:
    """Where every expert is."""

    states: np.ndarray


def seen_ahead(said: dict[int, list[list[int]]]) -> Gate:
    """A gate of the first layer that tells of later ones, by distance and token."""
    asked = gate_of(0, [0])
    ahead = {d: np.array(rows, np.uint16) for d, rows in said.items()}
    return replace(asked, source=replace(asked.source, ahead=ahead))


@pytest.mark.parametrize(
    ("resident", "wished"),
    [
        ([], [(4 + 1, 1)]),
        ([5], [(4 + 0, 1)]),
        ([5, 4], [(8 + 3, 2)]),
        ([5, 4, 11], [(8 + 2, 2)]),
        ([5, 4, 11, 10], []),
    ],
)
def test_the_first_absent_expert_is_looked_for_along_the_layers(
    resident: list[int], wished: list[tuple[int, int]]
) -> None:
    seat = FirstAbsent()
    seat.begin(WORLD)
    states = np.zeros(12, np.uint8)
    # On its way, or only in the queue: it counts as there.
    states[resident] = [(1, 2, 3, 3)[i] for i in range(len(resident))]
    plan = seat.plan(seen_ahead({1: [[1, 0]], 2: [[3, 2]]}), View(states))  # type: ignore[arg-type]
    assert [(p.expert, p.expires) for p in plan.prefetches] == wished


@settings(max_examples=100)
@given(
    said=st.lists(st.lists(st.permutations(range(4)), min_size=2, max_size=2), max_size=4),
    resident=st.lists(st.booleans(), min_size=12, max_size=12),
    load=st.integers(0, 6),
    host=st.integers(1, 9),
)
def test_what_is_prefetched_shortens_a_layer_most(
    said: list[list[list[int]]], resident: list[bool], load: int, host: int
) -> None:
    """Against every absent expert made resident in turn; what else is fetched gains no more."""
    seat = Impact(distance=2, width=12)
    seat.begin(replace(WORLD, costs=Table(load=load, device=5, host=host)))
    rows = {d: [token[d - 1][:2] for token in said] for d in (1, 2)} if said else {}
    states = np.where(resident, 3, 0).astype(np.uint8)
    wishes = seat.plan(seen_ahead(rows), View(states)).prefetches  # type: ignore[arg-type]
    gains: dict[int, int] = {}
    for distance, tokens in rows.items():
        named = Counter(4 * distance + e for token in tokens for e in token)
        absent = [e for e in named if not resident[e]]
        whole = predicted_end(named, absent, load, host)
        gains |= {
            e: whole - predicted_end(named, [a for a in absent if a != e], load, host)
            for e in absent
        }
    most = max(gains.values(), default=0)
    assert bool(wishes) == (most > 0)
    if wishes:
        assert gains[wishes[0].expert] == wishes[0].priority == most
        assert all(w.expert in gains and 0 < w.priority <= most for w in wishes)
        assert all(w.expires == w.expert // 4 for w in wishes)


def predicted_end(named: Counter[int], absent: Sequence[int], load: int, host: int) -> int:
    """When a layer ends whose experts take the device 5 and the host ``host`` a token."""
    missing = sorted((named[e] for e in absent), reverse=True)
    layer = Layer(
        device=10 * (len(named) - len(missing)),
        late=(),
        copy=20 * load,
        on_device=(10,) * len(missing),
        on_host=tuple(2 * host * tokens for tokens in missing),
    )
    return best_end(layer) // 2


def test_edgemoe_weighs_uses_by_the_order_of_layers() -> None:
    """Three layers, the second is served: the third comes next, then the first, then it again."""
    until = World(3, 1, 1, np.ones((1, 3), np.int64), (3,), "global").until(np.arange(3), 1)
    assert frequency_worth(np.array([1, 1, 1]), until, 3).tolist() == [2, 1, 3]
    assert frequency_worth(np.array([2, 5, 1]), until, 3).tolist() == [4, 5, 3]


@pytest.mark.parametrize(("layers", "decode_from"), [(1, 0), (4, 0), (4, 1), (5, 3), (2, 1)])
def test_layers_come_again_as_passes_run(layers: int, decode_from: int) -> None:
    """A layer of the decoder at the first event that serves it; an encoder's in a new request."""
    sizes = np.ones((1, layers), np.int64)
    world = World(layers, 1, 1, sizes, (layers,), "global", decode_from=decode_from)
    for now in range(layers):
        for layer, until in enumerate(world.until(np.arange(layers), now).tolist()):
            served = (d for d in range(1, layers + 1) if world.ahead(now, d) == layer)
            assert until == next(served, layers - now + layer)


@pytest.mark.parametrize(
    ("seat", "bad", "told_of"),
    [
        (RecentScore, {"alpha": 0.0}, "keep.alpha"),
        (RecentScore, {"top": -1}, "keep.top"),
        (PinnedLRU, {"share": 1.5}, "keep.share"),
        (LayerQuota, {"accuracy": 2.0}, "keep.accuracy"),
        (Impact, {"distance": 0}, "prefetch.distance"),
        (Impact, {"width": -1}, "prefetch.width"),
        (FirstAbsent, {"distance": 0}, "prefetch.distance"),
        (FirstAbsent, {"width": -1}, "prefetch.width"),
        (LayerStatistics, {"history": 0}, "prefetch.history"),
        (LayerStatistics, {"width": -1}, "prefetch.width"),
        (Placement, {"strategy": "best"}, "prefetch.strategy"),
        (Placement, {"dynamic": "yes"}, "prefetch.dynamic"),
        (Placement, {"threshold": 0}, "prefetch.threshold"),
        (Placement, {"gain": -1.0}, "prefetch.gain"),
        (Placement, {"gamma": 1.0}, "prefetch.gamma"),
        (ReuseBreakEven, {"gamma": 0.0}, "miss.gamma"),
        (ReuseBreakEven, {"stay": -2}, "miss.stay"),
    ],
)
def test_parameters_out_of_range(
    seat: Callable[..., object], bad: dict[str, object], told_of: str
) -> None:
    with pytest.raises(UsageError, match=f"^{told_of}={next(iter(bad.values()))}: "):
        seat(**bad)


# ---- worlds --------------------------------------------------------------------------------------


def world_of(case: Case) -> World:
    """The world of a case, with its past."""
    return setup_of(case, resolve(["adapmoe"])[0].build()).world


WORLD = World(
    layers=3,
    experts=4,
    top_k=2,
    expert_bytes=np.full((1, 3), 10),
    capacity_bytes=(120,),
    scope="global",
)


def gate_of(event: int, experts: Sequence[int], tokens: Sequence[int] = ()) -> Gate:
    """A gate of the first layer whose experts all missed."""
    asked = gate(event, 0, experts)
    return replace(asked, tokens=np.array(tokens)) if tokens else asked
