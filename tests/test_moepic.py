"""Experts in parts, and MoEpic's halves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from moesim.cli import main
from moesim.errors import UsageError
from moesim.policies.moepic import worth
from moesim.registry import resolve
from moesim.traces.check import check_file
from moesim.traces.expert_parts import in_parts, meta_in_parts, model_in_parts, rows_in_parts
from moesim.traces.reader import TraceReader
from moesim.traces.samples import trace_path
from moesim.types import DROPPED
from tests.harness import run
from tests.strategies import Case, cases, decode_case
from tests.test_engines import equal


def halved(case: Case) -> Case:
    """The same case with every expert in two halves, of as many bytes as the whole had."""
    meta = meta_in_parts(case.meta, 2)
    model = replace(meta.model, expert_bytes=case.model.expert_bytes)
    return replace(
        case,
        meta=replace(meta, model=model),
        requests=tuple(rows_in_parts(rows, 2) for rows in case.requests),
    )


# ---- the trace -----------------------------------------------------------------------------------


@given(cases())
def test_the_parts_of_an_expert_stand_side_by_side(case: Case) -> None:
    for rows in case.requests:
        cut = rows_in_parts(rows, 3)
        for part in range(3):
            of_part = cut.experts[:, part::3].astype(np.int64)
            whole = np.where(of_part == DROPPED, DROPPED, of_part // 3)
            assert (whole == rows.experts).all()
            assert (of_part[of_part != DROPPED] % 3 == part).all()
        assert cut.gate is not None and rows.gate is not None
        assert (cut.gate == np.repeat(rows.gate, 3, axis=1)).all()


def test_a_trace_in_parts_keeps_every_law_and_every_mass(tmp_path: Path) -> None:
    whole, cut = trace_path("demo"), tmp_path / "halves.parquet"
    meta = in_parts(whole, cut, 2)
    assert check_file(cut).meta.expert_parts == meta.expert_parts == 2
    with TraceReader(whole) as one, TraceReader(cut) as two:
        assert two.meta.model.all_expert_bytes() == one.meta.model.all_expert_bytes()
        before, after = next(one.requests()), next(two.requests())
    assert before.weights is not None and after.weights is not None
    assert np.allclose(before.weights.sum(axis=1), after.weights.sum(axis=1), atol=2e-3)


def test_another_model_has_parts_where_the_trace_has(tmp_path: Path) -> None:
    """All experts of Mixtral weigh the same, whole or cut; so does what a demand moves."""
    cut = tmp_path / "halves.parquet"
    in_parts(trace_path("demo"), cut, 2)
    moved = []
    for trace in ("demo", str(cut)):
        out = tmp_path / "answer.json"
        command = ["replay", "--trace", trace, "--policy", "lru", "--capacity", "100%"]
        with out.open("w") as stream, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", stream)
            assert main([*command, "--costs", "mixtral-8x7b", "--limit", "2", "--json"]) == 0
        (answer,) = json.loads(out.read_text())["runs"]
        moved.append(answer["bytes_loaded"])
    assert moved[0] == moved[1] > 0


def test_bytes_round_up() -> None:
    model = replace(decode_case([[[0]]], 2, 1).model, expert_bytes=(5,), expert_flops_per_token=3)
    assert model_in_parts(model, 2).expert_bytes == (3,)
    assert model_in_parts(replace(model, expert_bytes=((5, 4),)), 2).expert_bytes == ((3, 2),)
    assert model_in_parts(model, 2).expert_flops_per_token == 2


@pytest.mark.parametrize(
    ("parts", "line"), [(1, "--parts 1: must be 2 or more"), (9000, "a trace can hold 65535")]
)
def test_parts_that_cannot_be_are_refused(tmp_path: Path, parts: int, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        in_parts(trace_path("demo"), tmp_path / "x.parquet", parts)
    assert not list(tmp_path.iterdir())


def test_a_trace_is_not_written_over_itself(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the trace that is read"):
        in_parts(tmp_path / "x.parquet", tmp_path / "x.parquet", 2)


# ---- the policy ----------------------------------------------------------------------------------


def test_whole_experts_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--trace", "demo", "--policy", "moepic", "--limit", "1"]) == 2
    said = capsys.readouterr().err
    assert "moepic needs PARTS, which this trace lacks; `moesim trace parts`" in said


def test_bottom_halves_fall_below_all_others_while_crowded() -> None:
    stamps, is_top = np.array([5, 6, 7]), np.array([1, 0, 1])
    assert worth(stamps, is_top, False).tolist() == [5, 6, 7]
    crowded = worth(stamps, is_top, True)
    assert crowded.argmin() == 1 and crowded[[0, 2]].tolist() == [5, 7]


def test_the_tops_of_all_rather_than_two_whole() -> None:
    """Three experts in turn in four slots of halves: LRU misses everything. MoEpic comes to keep
    all tops (even keys), one bottom at a time passes. Status 0 is a hit, 2 a miss."""
    case = halved(decode_case([[[e]] for e in (0, 1, 2, 0, 1, 2)], 3, 4, scope="global"))
    kept = run(case, "moepic", "prefetch=none", "keep.whole=0.2")
    gates = [[(w // 4, w % 4) for w in r[6:]] for r in kept.of("gate")]
    assert gates == [
        [(0, 2), (1, 2)],
        [(2, 2), (3, 2)],
        [(4, 2), (5, 2)],
        [(0, 0), (1, 2)],
        [(2, 0), (3, 2)],
        [(4, 0), (5, 2)],
    ]
    assert [r[2] for r in kept.of("evict")] == [1, 3, 5, 1, 3]
    assert run(case, "lru").tally.counts().misses == 12


@given(cases())
def test_i8_engines_agree_on_halves(case: Case) -> None:
    equal(halved(case), "moepic")


@given(cases())
def test_where_experts_are_whole_it_is_next_gate(case: Case) -> None:
    assert run(case, "moepic").records == run(case, "next-gate").records


def test_the_share_is_checked() -> None:
    with pytest.raises(UsageError, match=r"keep\.whole=2.0: must lie between 0 and 1"):
        resolve(["moepic"], ["keep.whole=2"])[0].build()
