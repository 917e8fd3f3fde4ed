"""The past: which requests it has, and that it is told as a policy serving them would hear it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from moesim.cli import main
from moesim.errors import NotRunError, TraceError, UsageError
from moesim.past import Share, Split, parse_split, past_facts, requests_of
from moesim.policy import PlainPolicy
from moesim.profile import load_hardware
from moesim.replays import Request, replay
from moesim.traces.reader import TraceReader
from moesim.traces.samples import trace_path
from moesim.types import NO_PLAN, Fact, Gate, JobDone, Needs, Plan, RequestBegin
from moesim.workload import Inputs
from tests.harness import run, without_arrivals, works_of
from tests.strategies import Case, cases

EVERYTHING = Needs.WEIGHTS | Needs.GATE | Needs.AHEAD | Needs.EMBEDDING | Needs.NORMS


class Listener(PlainPolicy):
    """Remembers what it hears."""

    needs = EVERYTHING

    def __init__(self) -> None:
        self.heard: list[Fact] = []

    def on(self, fact: Fact, cache: Any) -> Plan:
        self.heard.append(fact)
        return NO_PLAN


def told(fact: Fact) -> Any:
    """A fact as plain values, but for where experts were."""
    assert not isinstance(fact, JobDone)
    if not isinstance(fact, Gate):
        embedding = getattr(fact, "embedding", None)
        plain = [getattr(fact, n) for n in fact.__slots__ if n != "embedding"]
        return type(fact).__name__, plain, None if embedding is None else embedding.tolist()
    source = fact.source
    arrays = [
        source.token_experts,
        source.weights,
        source.gate,
        source.norms,
        *source.ahead.values(),
    ]
    values = [fact.experts, fact.tokens, fact.phases, *(a for a in arrays if a is not None)]
    where = source.event, source.step, source.layer, source.slots
    return "Gate", where, [v.tolist() for v in values]


@settings(max_examples=40)
@given(cases())
def test_the_past_is_told_as_it_is_heard(case: Case) -> None:
    alone = replace(without_arrivals(case), batch=1, chunk_tokens=0)
    listener = Listener()
    run(alone, policy=listener)
    past = past_facts(works_of(alone, Inputs(EVERYTHING, (1,))), case.meta.experts)
    assert [told(f) for f in past] == [told(f) for f in listener.heard]


def test_each_request_is_of_one_part() -> None:
    split = Split((7, 3), seed=5)
    with TraceReader(trace_path("demo")) as reader:
        parts = {
            part: [r.request for r in requests_of(reader, Share(split, part))]
            for part in ("train", "test")
        }
        everything = [r.request for r in requests_of(reader, None)]
    assert sorted(parts["train"] + parts["test"]) == everything
    assert len(parts["train"]) > len(parts["test"]) > 0


def test_shares_hold_in_the_long_run() -> None:
    class Rows:
        def __init__(self, request: int) -> None:
            self.request = request

    split = Split((7, 3))
    parts = [split.part(Rows(i)) for i in range(4000)]  # type: ignore[arg-type]
    assert abs(parts.count("train") / 4000 - 0.7) < 0.03


@pytest.mark.parametrize("text", ["", "7", "7:0", "0:3", "a:b", "7:3@x", "7:3:1", "-7:3"])
def test_a_split_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        parse_split(text)


def test_a_split_is_written_as_it_is_read() -> None:
    for text in ("marked", "7:3@0", "1:9@12"):
        assert parse_split(text).text == text


def test_what_is_served_is_the_test_part_and_calibration_is_not_hindsight() -> None:
    share = Share(parse_split("7:3@5"))
    hardware = load_hardware("rtx4090")
    made = Request(trace=trace_path("demo"), hardware=hardware, policies=("static",), share=share)
    served = replay(made)["runs"][0]
    with TraceReader(made.trace) as reader:
        ids = [r.request for r in requests_of(reader, share)]
    assert served["requests"] == len(ids)
    assert not served["oracle"]
    assert replay(Request(made.trace, hardware, ("static",)))["runs"][0]["oracle"]


def test_a_trace_without_marks_names_the_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "unmarked.parquet"
    size = ("--requests", "2", "--prompt-tokens", "0", "--output-tokens", "2", "--layers", "2")
    assert main(["trace", "synth", str(trace), *size, "--experts", "4", "--top-k", "2"]) == 0
    capsys.readouterr()
    assert main(["replay", "--trace", str(trace), "--split", "marked"]) == 2
    assert "--split 7:3" in capsys.readouterr().err


def test_a_part_without_requests_is_refused() -> None:
    with TraceReader(trace_path("demo")) as reader, pytest.raises(TraceError, match="no request"):
        list(requests_of(reader, Share(Split((1, 9999)), "train")))


class Quitter(PlainPolicy):
    """Gives up at the second request."""

    def on(self, fact: Fact, cache: Any) -> Plan:
        if isinstance(fact, RequestBegin) and fact.request:
            raise NotRunError("knows that request")
        return NO_PLAN


def test_a_policy_that_gives_up_ends_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{__name__}:Quitter"
    words = ["replay", "--trace", "demo", "--limit", "3", "--policy"]
    assert main([*words, f"lru,{name}"]) == 0
    out = capsys.readouterr().out
    assert f"{name} at 25%: not run: knows that request" in out and "lru" in out
    assert main([*words, name]) == 2
    assert "knows that request" in capsys.readouterr().err
