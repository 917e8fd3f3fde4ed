"""Costs as laws: exact, additive over chunks, never falling, the same whatever the order."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moesim.costs import Costs, make_costs
from moesim.errors import ProfileError
from moesim.profile import (
    Constant,
    ConstantExpert,
    HardwareProfile,
    Host,
    Link,
    Memory,
    ModelProfile,
    Roofline,
    Table,
    list_hardware,
    list_models,
    load_hardware,
    load_model,
)

MODEL = ModelProfile.generic(4, 8, 2)
LAYERED = replace(
    MODEL,
    expert_bytes=((40, 30, 20, 10),),
    dense_bytes=(100, 200, 300, 400),
    kv_bytes_per_token_per_layer=(0, 1, 2, 3),
    kv_window_tokens=(0, 0, 16, 0),
    head_bytes=77,
    head_flops_per_token=5,
)
FREE = Roofline(math.inf, math.inf, 0)

rates = st.floats(1.0, 1e15) | st.just(math.inf) | st.integers(1, 10**14).map(float)
small_ns = st.integers(0, 10**6)
sizes = st.integers(0, 10**11)
tokens = st.integers(0, 5000)
contexts = st.integers(0, 10**6)
rooflines = st.builds(Roofline, rates, rates, small_ns)


def machine(
    link: Link | None = None,
    compute: Roofline | Constant | Table = FREE,
    cpu: Roofline | ConstantExpert = FREE,
    ops_per_s: float = math.inf,
    bytes_per_s: float = math.inf,
) -> HardwareProfile:
    return HardwareProfile(
        name="made",
        source="assumed",
        provenance="a test",
        memory=Memory(2**30, 0),
        link=link or Link(math.inf, 0, 0),
        compute=compute,
        host=Host(3, 4, ops_per_s, bytes_per_s, 1, cpu),
    )


def costs(model: ModelProfile = MODEL, **parts: object) -> Costs:
    return make_costs(model, machine(**parts))  # type: ignore[arg-type]


def exact(amount: int, per_s: float) -> int:
    """The definition, in plain fractions."""
    return 0 if math.isinf(per_s) else math.ceil(Fraction(amount) * 10**9 / Fraction(per_s))


@st.composite
def rising(draw: st.DrawFn, first: int = 1) -> tuple[tuple[int, int], ...]:
    steps = draw(
        st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 5000)), min_size=1, max_size=6)
    )
    x, y, points = first - 1, 0, []
    for dx, dy in steps:
        x, y = x + dx, y + dy
        points.append((x, y))
    return tuple(points)


@st.composite
def links(draw: st.DrawFn) -> Link:
    points = draw(st.just(()) | rising())
    latency = draw(small_ns)
    curve = tuple((x, y + latency) for x, y in points)
    return Link(draw(rates), latency, draw(st.just(0) | st.integers(1, 10**9)), 1, curve)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    dense = []
    for count in sorted(draw(st.sets(st.integers(1, 3000), min_size=1, max_size=4))):
        dense += [(count, x - 1, y) for x, y in draw(rising())]
    return Table(draw(rising()), tuple(dense))


computes = rooflines | st.builds(Constant, small_ns, small_ns) | tables()


# Transfers


@given(rate=rates, latency=small_ns, nbytes=sizes)
def test_load_is_latency_and_bytes_over_bandwidth(rate: float, latency: int, nbytes: int) -> None:
    made = costs(link=Link(rate, latency, 0))
    assert made.load_ns(nbytes) == latency + exact(nbytes, rate)


@given(link=links(), nbytes=sizes)
def test_chunks_are_cumulative_splits(link: Link, nbytes: int) -> None:
    assume(link.chunk_bytes == 0 or nbytes // link.chunk_bytes < 5000)
    made = costs(link=link)
    ends = made.chunk_ends(nbytes)
    whole = link.chunk_bytes or max(nbytes, 1)
    bounds = [min(whole * (i + 1), nbytes) for i in range(max(1, -(-nbytes // whole)))]
    assert ends == tuple(made.load_ns(bound) for bound in bounds)
    assert ends[-1] == made.load_ns(nbytes)
    assert ends[0] >= link.latency_ns
    assert all(a <= b for a, b in pairwise(ends))
    durations = [b - a for a, b in zip((0, *ends), ends, strict=False)]
    assert sum(durations) == made.load_ns(nbytes)


@given(link=links(), a=sizes, b=sizes)
def test_more_bytes_never_load_sooner(link: Link, a: int, b: int) -> None:
    made = costs(link=link)
    assert made.load_ns(min(a, b)) <= made.load_ns(max(a, b))
    assert made.load_ns(0) == link.latency_ns


@given(latency=small_ns, rate=st.integers(1, 10**6), units=st.integers(0, 10**6))
def test_load_is_linear_where_nothing_is_rounded(latency: int, rate: int, units: int) -> None:
    made = costs(link=Link(float(rate), latency, 0))
    one = made.load_ns(rate) - latency
    assert one == 10**9
    assert made.load_ns(rate * units) == latency + units * one


@given(rate=st.floats(1.0, 1e12), nbytes=sizes, factor=st.integers(0, 10))
def test_scaling_bytes_and_bandwidth_changes_nothing(rate: float, nbytes: int, factor: int) -> None:
    slow = costs(link=Link(rate, 5, 0))
    fast = make_costs(MODEL, machine(Link(rate, 5, 0)).with_bandwidth(rate * 2**factor))
    assert fast.load_ns(nbytes * 2**factor) == slow.load_ns(nbytes)


@given(rate=rates, a=sizes, b=sizes)
def test_splitting_a_transfer_costs_latency_and_at_most_one_ns(rate: float, a: int, b: int) -> None:
    made = costs(link=Link(rate, 7, 0))
    apart = made.load_ns(a) + made.load_ns(b) - 7
    assert made.load_ns(a + b) <= apart <= made.load_ns(a + b) + 1


@given(points=rising(), latency=small_ns, rate=rates)
def test_a_curve_is_met_at_its_points_and_continues(
    points: tuple[tuple[int, int], ...], latency: int, rate: float
) -> None:
    curve = tuple((x, y + latency) for x, y in points)
    made = costs(link=Link(rate, latency, 0, 1, curve))
    assert [made.load_ns(x) for x, _ in curve] == [y for _, y in curve]
    last, ns = curve[-1]
    assert made.load_ns(last + 1000) == ns + exact(1000, rate)
    for (x0, y0), (x1, y1) in zip(((0, latency), *curve), curve, strict=False):
        assert made.load_ns((x0 + x1) // 2) == math.ceil(
            y0 + Fraction((y1 - y0) * ((x0 + x1) // 2 - x0), x1 - x0)
        )


@given(nbytes=sizes, latency=small_ns)
def test_infinite_bandwidth_leaves_latency(nbytes: int, latency: int) -> None:
    made = costs(link=Link(math.inf, latency, 0))
    assert made.load_ns(nbytes) == latency
    assert made.chunk_ends(nbytes) == (latency,)


# Compute


@given(roof=rooflines, n=st.integers(1, 5000), context=contexts, layer=st.integers(0, 3))
def test_roofline_is_the_longer_of_traffic_and_work(
    roof: Roofline, n: int, context: int, layer: int
) -> None:
    made = costs(LAYERED, compute=roof, cpu=roof)

    def roofline(nbytes: int, flops: int) -> int:
        memory, work = exact(nbytes, roof.bytes_per_s), exact(flops, roof.flops_per_s)
        return max(memory, work) + roof.kernel_ns

    expert = roofline([40, 30, 20, 10][layer], n * LAYERED.expert_flops_per_token)
    assert made.expert_ns(n, layer) == made.cpu_expert_ns(n, layer) == expert
    read = min(context, 16 * n) if layer == 2 else context
    dense_bytes = [100, 200, 300, 400][layer] + layer * read
    flops = n * int(LAYERED.dense_flops_table()[layer])
    assert made.dense_ns(n, context, layer) == roofline(dense_bytes, flops)
    assert made.head_ns(n) == roofline(77, 5 * n)


@given(compute=computes, n=st.tuples(tokens, tokens), context=st.tuples(contexts, contexts))
def test_more_work_never_takes_less(
    compute: Roofline | Constant | Table, n: tuple[int, int], context: tuple[int, int]
) -> None:
    cpu = compute if isinstance(compute, Roofline) else FREE
    made = costs(LAYERED, compute=compute, cpu=cpu)
    for layer in range(4):
        assert made.expert_ns(min(n), layer) <= made.expert_ns(max(n), layer)
        assert made.cpu_expert_ns(min(n), layer) <= made.cpu_expert_ns(max(n), layer)
        small, large = made.dense_ns(min(n), min(context), layer), max(n)
        assert small <= made.dense_ns(large, min(context), layer)
        assert small <= made.dense_ns(min(n), max(context), layer)
        assert small <= made.dense_ns(large, max(context), layer)
    assert made.head_ns(min(n)) <= made.head_ns(max(n))
    assert made.expert_ns(0) == made.cpu_expert_ns(0) == made.dense_ns(0, 9) == 0


@given(roof=rooflines, n=st.integers(1, 10**5), factor=st.integers(2, 50))
def test_batching_tokens_is_never_dearer_than_apart(roof: Roofline, n: int, factor: int) -> None:
    made = costs(compute=roof)
    assert made.expert_ns(n * factor) <= factor * made.expert_ns(n)


@given(dense=small_ns, expert=small_ns, cpu=small_ns, n=st.integers(1, 9), context=contexts)
def test_constant_costs_do_not_depend_on_tokens(
    dense: int, expert: int, cpu: int, n: int, context: int
) -> None:
    made = costs(compute=Constant(dense, expert), cpu=ConstantExpert(cpu))
    assert made.dense_ns(n, context) == dense
    assert made.expert_ns(n) == expert
    assert made.cpu_expert_ns(n) == cpu
    assert made.head_ns(n) == 0
    assert (made.sync_ns, made.plan_ns) == (3, 4)


@given(table=tables())
def test_tables_are_met_at_their_points(table: Table) -> None:
    made = costs(compute=table)
    assert [made.expert_ns(x) for x, _ in table.expert] == [y for _, y in table.expert]
    first = table.dense[0][0]
    for count, context, ns in table.dense:
        # A later line may be lifted to the highest before it, never lowered.
        assert made.dense_ns(count, context) >= ns
        assert count != first or made.dense_ns(count, context) == ns


def test_tables_between_and_beyond_their_points() -> None:
    table = Table(((2, 10), (4, 21)), ((1, 0, 10), (1, 100, 20), (3, 0, 30), (3, 100, 60)))
    made = costs(compute=table)
    assert [made.expert_ns(n) for n in (1, 2, 3, 4, 8)] == [10, 10, 16, 21, 42]
    assert [made.dense_ns(1, c) for c in (0, 50, 100, 200)] == [10, 15, 20, 30]
    assert [made.dense_ns(2, c) for c in (0, 100)] == [20, 40]
    assert [made.dense_ns(6, c) for c in (0, 100, 200)] == [60, 120, 180]


def test_lines_that_cross_are_lifted() -> None:
    table = Table(((1, 1),), ((1, 0, 10), (1, 100, 50), (2, 0, 20), (2, 100, 30)))
    made = costs(compute=table)
    assert [made.dense_ns(1, c) for c in (0, 100)] == [10, 50]
    assert [made.dense_ns(2, c) for c in (0, 100)] == [20, 50]


def test_a_window_limits_the_context_of_each_row() -> None:
    made = costs(LAYERED, compute=Roofline(math.inf, 1e9, 0))
    assert [made.dense_ns(1, c, 2) for c in (10, 16, 99)] == [320, 332, 332]
    assert [made.dense_ns(3, c, 2) for c in (10, 48, 99)] == [320, 396, 396]


def test_a_table_serves_the_model_it_was_measured_for() -> None:
    table = Table(((1, 5),), ((1, 0, 5),), "mixtral-8x7b")
    make_costs(load_model("mixtral-8x7b"), machine(compute=table))
    with pytest.raises(ProfileError, match="measured for 'mixtral-8x7b', not for 'unknown'"):
        make_costs(MODEL, machine(compute=table))


@given(ops=sizes, nbytes=sizes, ops_rate=rates, bytes_rate=rates)
def test_a_job_takes_the_longer_of_work_and_traffic(
    ops: int, nbytes: int, ops_rate: float, bytes_rate: float
) -> None:
    made = costs(ops_per_s=ops_rate, bytes_per_s=bytes_rate)
    assert made.job_ns(ops, nbytes) == max(exact(ops, ops_rate), exact(nbytes, bytes_rate))


# Edges


@pytest.mark.parametrize("model", list_models())
@pytest.mark.parametrize("hardware", list_hardware())
def test_shipped_profiles_make_sane_costs(model: str, hardware: str) -> None:
    made = make_costs(load_model(model), load_hardware(hardware))
    for layer in range(made.model.layers):
        nbytes = int(made.model.expert_bytes_table()[layer])
        assert 0 < made.expert_ns(1, layer) < made.load_ns(nbytes)
        assert made.load_ns(nbytes) > made.hardware.link.latency_ns
        assert 0 < made.dense_ns(1, 0, layer) <= made.dense_ns(1, 4096, layer)
    assert made.head_ns(1) > 0
    assert made.weakest_source == "datasheet"


def test_low_precision_experts_cost_less() -> None:
    made = make_costs(load_model("mixtral-8x7b"), load_hardware("rtx4090"))
    assert made.expert_ns(1) > made.expert_ns(1, 0, 1) > made.expert_ns(1, 0, 2)
    assert made.cpu_expert_ns(1) > made.cpu_expert_ns(1, 0, 2)


@pytest.mark.parametrize(
    ("model", "hardware", "weakest"),
    [
        ("config", "measured", "measured"),
        ("config", "datasheet", "datasheet"),
        ("assumed", "measured", "assumed"),
        ("computed", "assumed", "assumed"),
        ("datasheet", "measured", "datasheet"),
    ],
)
def test_the_weakest_source_is_named(model: str, hardware: str, weakest: str) -> None:
    made = Costs(replace(MODEL, source=model), replace(machine(), source=hardware))
    assert made.weakest_source == weakest


def test_numpy_counts_do_not_overflow() -> None:
    made = costs(link=Link(1e9, 0, 0), compute=Roofline(1e9, 1e9, 0))
    assert made.load_ns(np.int64(2**40)) == 2**40  # type: ignore[arg-type]
    assert made.expert_ns(np.int32(2**30)) == made.expert_ns(2**30)  # type: ignore[arg-type]
    assert type(made.load_ns(np.int64(5))) is int  # type: ignore[arg-type]


def test_wrong_counts_are_refused() -> None:
    made = costs()
    for wrong in (
        lambda: made.load_ns(-1),
        lambda: made.chunk_ends(-1),
        lambda: made.expert_ns(-1),
        lambda: made.cpu_expert_ns(-1),
        lambda: made.dense_ns(1, -1),
        lambda: made.head_ns(-1),
        lambda: made.job_ns(0, -1),
    ):
        with pytest.raises(ValueError, match="must not be negative"):
            wrong()
    with pytest.raises(TypeError):
        made.load_ns(1.5)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        costs(compute=Roofline(1e9, 1e9, 0)).expert_ns(1, 99)


def test_times_beyond_int64_are_refused() -> None:
    with pytest.raises(ProfileError, match=r"made: one action of layer 0 of unknown takes \d+ ns"):
        costs(link=Link(1e-4, 0, 0))
