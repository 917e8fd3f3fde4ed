"""What leaves the device is copied back to the host: two-way swaps, by hand and by law."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import Run, run, spec_of, without_arrivals
from tests.strategies import Case, cases, decode_case, full_meta, machine, small_model, specs
from tests.test_engines import equal
from tests.test_laws import TIMELESS

KINDS = ("", "duplex", "serial")
UNSTAGED = [name for name in TIMELESS if not spec_of(name).build().bypass]
THERE_AND_BACK = [[[0]], [[1]], [[0]]]
"""Three tokens, one layer: the second and the third load evict."""


def written(case: Case, kind: str, name: str = "lru", *more: str) -> Run:
    """The run with what leaves copied back so."""
    return run(replace(case, options=replace(case.options, write_back=kind)), name, *more)


@pytest.mark.parametrize(
    ("kind", "lands"), [("", [10, 22, 34]), ("duplex", [10, 22, 34]), ("serial", [10, 32, 54])]
)
def test_a_swap_by_hand(kind: str, lands: list[int]) -> None:
    """One slot, a copy takes 10, an expert 2. Beside each other both directions take 10; one after
    the other 20."""
    case = decode_case(THERE_AND_BACK, 2, 1, machine(expert_ns=2), nbytes=10)
    ran = written(case, kind)
    assert [r[1] for r in ran.of("land")] == lands
    assert ran.tally.written_bytes == (20 if kind else 0)
    assert ran.tally.link_busy_ns == (50 if kind == "serial" else 30)


def test_the_slower_direction_ends_a_load() -> None:
    """Layers of 3 and 12 bytes in one cache of 14: each load drives out the other layer's copy."""
    case = decode_case([[[0], [0]], [[1], [1]]], 2, 1, machine(), scope="global")
    meta = full_meta(small_model(2, 2, 1, (3, 12)))
    case = replace(case, meta=meta, capacity_bytes=(14,))
    ends = {kind: [r[1] for r in written(case, kind).of("land")] for kind in KINDS}
    assert ends == {"": [3, 15, 18, 30], "duplex": [3, 15, 27, 39], "serial": [3, 18, 33, 48]}


@given(cases(), specs(), st.sampled_from(KINDS[1:]), st.booleans())
def test_i8_with_write_back(
    case: Case, spec: tuple[str, tuple[str, ...]], kind: str, share_kv: bool
) -> None:
    options = replace(case.options, write_back=kind, share_kv=share_kv)
    equal(replace(case, options=options), spec[0], *spec[1])


@given(cases(), specs(), st.sampled_from(KINDS[1:]))
def test_the_books_hold_and_all_that_leaves_is_written(
    case: Case, spec: tuple[str, tuple[str, ...]], kind: str
) -> None:
    tally = written(case, kind, spec[0], *spec[1]).tally
    assert tally.written_bytes == tally.evicted_bytes


@settings(max_examples=60)
@given(cases(), st.sampled_from(TIMELESS))
def test_each_way_costs_no_less_than_the_one_before(case: Case, name: str) -> None:
    """Without prefetch nothing but time changes: none, beside each other, one after the other."""
    runs = [written(without_arrivals(case), kind, name).tally for kind in KINDS]
    times = [tally.times.total() for tally in runs]
    assert times == sorted(times)
    assert len({tally.decision_digest for tally in runs}) == 1
    assert [asdict(tally.counts()) for tally in runs[1:]] == [asdict(runs[0].counts())] * 2


@settings(max_examples=60)
@given(cases(equal=True), st.sampled_from(UNSTAGED))
def test_equal_sizes_cross_for_nothing(case: Case, name: str) -> None:
    """A full-duplex link hides copies of one size, where nothing is pre-empted or staged."""
    digests = {written(case, kind, name).tally.log_digest for kind in KINDS[:2]}
    assert len(digests) == 1
