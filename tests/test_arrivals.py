"""When requests arrive, and which recorded ones serve those of a log."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import NotRunError, UsageError
from moesim.serve.arrivals import Arrivals, at_rate, parse_arrivals, poisson_ns, rate_of
from moesim.serve.logs import Log, read_log
from moesim.serve.match import FAR, FEW, NEAR, matched, mismatch
from moesim.serve.options import (
    Serving,
    Turns,
    parse_shift,
    parse_slo,
    parse_turns,
)
from moesim.serve.quantities import parse_duration_ns, parse_rate
from moesim.serve.stream import Recorded, plan_of
from moesim.traces.reader import Columns, TraceReader
from moesim.traces.unions import unions
from moesim.workload import Shape

DEMO = Path(__file__).parent.parent / "traces" / "samples" / "demo.parquet"

AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST_HEAD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def written(folder: Path, text: str | bytes, name: str = "log") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---- logs ----------------------------------------------------------------------------------------

LOGS = {
    "azure": AZURE_HEAD
    + "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n",
    "burstgpt": BURST_HEAD + "5,ChatGPT,374,44,418,Conversation log\n"
    "6.5,ChatGPT,50,0,50,Conversation log\n9.314579,GPT-4,396,109,505,API log\n",
    "mooncake": '{"timestamp": 100, "input_length": 374, "output_length": 44, "hash_ids": [7]}\n'
    '{"timestamp": 4414.579, "input_length": 396, "output_length": 109, "hash_ids": [7]}\n',
}


@pytest.mark.parametrize("kind", LOGS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_log_is_recognised_and_read(kind: str, packed: bool, tmp_path: Path) -> None:
    text = LOGS[kind].encode()
    log = read_log(written(tmp_path, gzip.compress(text) if packed else text))
    assert log.kind == kind
    assert log.arrival_ns.tolist() == [0, 4_314_579_000]
    assert log.prompt_tokens.tolist() == [374, 396]
    assert log.output_tokens.tolist() == [44, 109]
    assert log.skipped == (kind == "burstgpt")


BAD = {
    "no header": ("1,2,3\n", "first line must be"),
    "empty": ("", "first line must be"),
    "no such time": (AZURE_HEAD + "2023-11-16 18:15:46.1,3,4\n2023-13-16 18:15:46,3,4\n", "row 3"),
    "no number": (AZURE_HEAD + "2023-11-16 18:15:46.1,three,4\n", "row 2.*'three'"),
    "negative": (AZURE_HEAD + "2023-11-16 18:15:46.1,-3,4\n", "row 2.*'-3'"),
    "cells": (AZURE_HEAD + "2023-11-16 18:15:46.1,3\n", "row 2.*2 cells"),
    "nobody": (AZURE_HEAD + "2023-11-16 18:15:46.1,3,0\n", "no request"),
    "no seconds": (BURST_HEAD + "soon,GPT-4,3,4,7,API log\n", "row 2.*'soon'"),
    "no JSON": (LOGS["mooncake"] + "{\n", "row 3: not JSON"),
    "no object": (LOGS["mooncake"] + "[]\n", "row 3"),
    "no length": ('{"timestamp": 1, "input_length": 3}\n', "row 1.*output_length"),
    "no milliseconds": ('{"timestamp": "1"}\n', "row 1.*timestamp"),
    "infinity": ('{"timestamp": Infinity, "input_length": 3, "output_length": 3}', "row 1"),
    "hashes": (
        '{"timestamp": 1, "input_length": 3, "output_length": 3, "hash_ids": [1.5]}',
        "row 1.*hash_ids",
    ),
    "no text": (b"\xff\xfe\x00\x01", "damaged"),
    "cut gzip": (gzip.compress(LOGS["azure"].encode())[:-9], "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_log_is_one_clear_line(case: str, tmp_path: Path) -> None:
    text, told = BAD[case]
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=told) as error:
        read_log(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_published_logs(shared: Path) -> None:
    """Counts and means as their owners state them."""
    folder = shared / "data" / "arrivals"
    known = {
        "AzureLLMInferenceTrace_conv.csv": (19_366, 1_155, 211),
        "AzureLLMInferenceTrace_code.csv": (8_819, 2_048, 28),
        "mooncake_conversation_trace.jsonl.gz": (12_031, 12_035, 343),
    }
    for name, (requests, prompt, output) in known.items():
        log = read_log(folder / name)
        assert len(log.arrival_ns) + log.skipped == requests
        assert round(log.prompt_tokens.mean()) == pytest.approx(prompt, abs=1)
        assert round(log.output_tokens.mean()) == pytest.approx(output, abs=1)
        assert (np.diff(log.arrival_ns) >= 0).all()


# ---- arrivals ------------------------------------------------------------------------------------


def test_what_is_typed(tmp_path: Path) -> None:
    log = written(tmp_path, LOGS["azure"])
    typed = {
        "back-to-back": Arrivals(),
        "recorded": Arrivals("recorded"),
        "poisson:2.91": Arrivals("poisson", Fraction("2.91")),
        "poisson": Arrivals("poisson"),
        "closed:8": Arrivals("closed", users=8),
        "closed:8:2s": Arrivals("closed", users=8, think_ns=2 * 10**9),
        f"azure:{log}": Arrivals("log", path=log, log_kind="azure"),
        str(log): Arrivals("log", path=log),
    }
    assert {text: parse_arrivals(text) for text in typed} == typed


@pytest.mark.parametrize("text", ["sometimes", "poisson:0", "poisson:-1", "closed:0", "closed:x",
                                  "closed:8:2", "closed:8:2weeks", "azure:", ""])  # fmt: skip
def test_what_cannot_be_typed(text: str) -> None:
    with pytest.raises(UsageError, match="--arrivals"):
        parse_arrivals(text)


def test_times_and_limits_that_are_typed() -> None:
    assert parse_duration_ns("50ms", "x") == 50_000_000
    assert parse_duration_ns("1.5min", "x") == 90 * 10**9
    assert parse_rate("0.1", "x") == Fraction(1, 10)
    slo = parse_slo("ttft=2s,tpot=50ms")
    assert (slo.ttft_ns, slo.tpot_ns, slo.end_to_end_ns) == (2 * 10**9, 50 * 10**6, None)
    assert parse_turns("log") == Turns(0, 0) and parse_turns("4:1s") == Turns(4, 10**9)
    assert (parse_shift("shuffle"), parse_shift("topic:32")) == (-1, 32)
    bad: list[tuple[Any, str]] = [
        (parse_slo, "ttft=2"), (parse_slo, "speed=2s"), (parse_slo, "ttft=1s,ttft=2s"),
        (parse_turns, "1"), (parse_turns, "log:"[:-1] + "x"), (parse_shift, "topic:0"),
    ]  # fmt: skip
    for parse, text in bad:
        with pytest.raises(UsageError):
            parse(text)


def test_poisson_gaps_are_exponential_and_depend_on_the_seed_alone() -> None:
    times = poisson_ns(Fraction(4), 200_000, 3)
    gaps = np.diff(times, prepend=0) / 1e9
    # Mean and deviation of an exponential are equal; five standard errors.
    assert abs(gaps.mean() * 4 - 1) < 5 / np.sqrt(200_000)
    assert abs(gaps.std() * 4 - 1) < 5 * np.sqrt(2) / np.sqrt(200_000)
    assert (times[:9] == poisson_ns(Fraction(4), 9, 3)).all()
    assert (times[:9] != poisson_ns(Fraction(4), 9, 4)).any()


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=30), st.integers(1, 1000))
def test_arrivals_brought_to_a_rate_have_it(when: list[int], rate: int) -> None:
    times = np.sort(np.array(when, np.int64))
    if times[0] == times[-1]:
        with pytest.raises(UsageError, match="one moment"):
            at_rate(times, Fraction(rate))
        return
    scaled = at_rate(times, Fraction(rate))
    assert scaled[-1] == round(Fraction((len(when) - 1) * 10**9, rate))
    found = rate_of(scaled)
    assert found is not None and abs(found / rate - 1) < 1e-6
    # A stretch keeps the shape, to the nanosecond.
    span = int(times[-1] - times[0])
    for before, after in zip((times - times[0]).tolist(), scaled.tolist(), strict=True):
        assert abs(after * span - before * int(scaled[-1])) <= span


# ---- matching ------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=12),
    st.integers(0, 3),
)
def test_a_request_is_served_by_one_of_the_nearest(
    wanted: list[tuple[int, int]], known: list[tuple[int, int]], seed: int
) -> None:
    prompt, output = np.array(wanted).T
    recorded = np.array([k[0] for k in known]), np.array([k[1] for k in known])
    chosen = matched(prompt, output, recorded, seed)
    for (p, o), place in zip(wanted, chosen.tolist(), strict=True):
        far = [
            (max(p, q) / min(p, q) if q else 1.0) * (max(o, a) / min(o, a)) for q, a in known
        ]  # fmt: skip
        least = min(far)
        few = sorted(far)[min(FEW, len(far)) - 1]
        assert far[place] <= max(NEAR * least, min(few, FAR * least)) * (1 + 1e-12)
    assert (chosen == matched(prompt, output, recorded, seed)).all()


def test_what_does_not_fit_is_told() -> None:
    told = mismatch(*(np.array(c) for c in ([10, 10], [4, 2], [5, 0], [2, 3])))
    assert told["prompt_error"]["mean"] == 0.5
    assert told["output_error"]["mean"] == 0.5
    assert told["prompt_tokens_tiled"] == 0.5
    assert told["passes_tiled"] == 2 / 6
    assert told["cut"] == 0.5


# ---- streams -------------------------------------------------------------------------------------


def recorded(count: int, topics: str = "", prompt: int = 4, passes: int = 3) -> list[Recorded]:
    return [
        Recorded(i, 10 + i, prompt, passes, topics[i] if topics else None, 5 * i)
        for i in range(count)
    ]


def test_requests_come_again_where_more_arrive_than_were_recorded() -> None:
    plan = plan_of(Arrivals("closed", users=2), Serving(requests=5), recorded(2), 0)
    assert [served.recorded for served in plan.requests] == [0, 1, 0, 1, 0]
    assert len({served.request for served in plan.requests}) == 5


def test_topics_come_in_blocks_or_shuffled() -> None:
    topics = "abababacbc" * 3
    count = len(topics)
    blocks = plan_of(Arrivals(), Serving(shift=3), recorded(count, topics), 1)
    order = [topics[served.recorded] for served in blocks.requests]
    assert sorted(order) == sorted(topics)
    assert order[:9] == list("aaabbbccc")
    shuffled = plan_of(Arrivals(), Serving(shift=-1), recorded(count, topics), 1)
    places = [served.recorded for served in shuffled.requests]
    assert sorted(places) == list(range(count)) != places
    other = plan_of(Arrivals(), Serving(shift=-1), recorded(count, topics), 2)
    assert places != [served.recorded for served in other.requests]
    with pytest.raises(UsageError, match="no topic"):
        plan_of(Arrivals(), Serving(shift=3), recorded(4), 1)


def test_conversations_are_requests_of_one_topic_in_order() -> None:
    serving = Serving(turns=Turns(2, 7), rate=Fraction(1))
    plan = plan_of(Arrivals("poisson"), serving, recorded(5, "aabab"), 0)
    assert [served.follows for served in plan.requests] == [-1, 0, -1, -1, 2]
    assert [served.followed for served in plan.requests] == [True, False, True, False, False]
    # The first leaves its prompt and two of its three tokens: the third was never computed.
    assert plan.requests[1].shape == Shape(4, 3, 6)
    assert [served.arrival_ns is None for served in plan.requests] == [0, 1, 0, 0, 1]


def mooncake(rows: list[tuple[int, int, int, list[int]]]) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


def test_a_log_says_who_follows_whom(tmp_path: Path) -> None:
    rows = [
        (0, 1100, 20, [1, 2, 3]),  # two whole blocks
        (10, 600, 5, [9, 8]),
        (20, 1700, 9, [1, 2, 5, 6]),  # begins with the first's
        (30, 1700, 9, [1, 2, 7, 6]),  # so does this one, but the first has a follower already
    ]
    path = written(tmp_path, mooncake(rows))
    serving = Serving(turns=Turns(0, 50))
    plan = plan_of(Arrivals("log", path=path), serving, recorded(3), 0)
    assert [served.follows for served in plan.requests] == [-1, -1, 0, -1]
    follower = plan.requests[2].shape
    assert follower == Shape(1700 - 1119, 9, 1119)
    assert all(s.shape and s.shape.before == 0 for i, s in enumerate(plan.requests) if i != 2)


REFUSED = {
    "two rates": (Arrivals("poisson", Fraction(1)), Serving(rate=Fraction(2)), "one of the two"),
    "no rate": (Arrivals("poisson"), Serving(), "which rate"),
    "a rate of nothing": (Arrivals(), Serving(rate=Fraction(1)), "have none"),
    "too many": (Arrivals("recorded"), Serving(requests=9), "has 3"),
    "no log": (Arrivals("poisson", Fraction(1)), Serving(turns=Turns(0)), "only a log"),
    "a closed loop": (Arrivals("closed", users=1), Serving(turns=Turns(2)), "think already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_one_clear_line(case: str) -> None:
    arrivals, serving, told = REFUSED[case]
    with pytest.raises(UsageError, match=told):
        plan_of(arrivals, serving, recorded(3), 0)


def test_a_prompt_without_a_recorded_prefill_is_refused_by_name(tmp_path: Path) -> None:
    arrivals = Arrivals("log", path=written(tmp_path, LOGS["azure"]))
    with pytest.raises(NotRunError, match="--allow prefill=decode"):
        plan_of(arrivals, Serving(), recorded(3, prompt=0), 0)
    plan = plan_of(arrivals, Serving(), recorded(3, prompt=0), 0, prefill_from_decode=True)
    assert [s.shape for s in plan.requests] == [Shape(374, 44), Shape(396, 109)]
    assert plan.matching is not None and plan.matching["recorded_requests_used"] >= 1


def test_a_recording_of_a_prefill_alone_cannot_repeat_a_pass(tmp_path: Path) -> None:
    arrivals = Arrivals("log", path=written(tmp_path, LOGS["azure"]))
    plan = plan_of(arrivals, Serving(), recorded(1, passes=1), 0)
    assert [s.shape for s in plan.requests] == [Shape(374, 1), Shape(396, 1)]


def test_the_first_requests_of_a_log_keep_their_times() -> None:
    log = Log("azure", *(np.arange(5) for _ in range(3)))
    assert log.head(2).arrival_ns.tolist() == [0, 1] and log.head(0) is not log
    assert all(a < b for a, b in pairwise(log.head(0).arrival_ns.tolist()))


# ---- unions --------------------------------------------------------------------------------------


def test_the_union_of_a_batch_is_a_direct_count() -> None:
    with TraceReader(DEMO, Columns.experts_only()) as reader:
        requests = list(reader.requests())
        layers = reader.meta.layers
    found = unions(DEMO, [1, 2, 4, 8, 16, 32])
    for union in found:
        sizes = []
        for first in range(0, len(requests) - union.batch + 1, union.batch):
            group = requests[first : first + union.batch]
            passes = [sorted(set(rows.iteration[rows.iteration > 0].tolist())) for rows in group]
            for number in range(min(map(len, passes))):
                for layer in range(layers):
                    asked: set[int] = set()
                    for rows, own in zip(group, passes, strict=True):
                        at = (rows.iteration == own[number]) & (rows.layer == layer)
                        asked |= set(rows.experts[at].reshape(-1).tolist())
                    sizes.append(len(asked))
        assert union.events == len(sizes)
        assert union.experts == (sum(sizes) / len(sizes) if sizes else None)
    means = [union.experts or 0 for union in found]
    assert means == sorted(means) and means[0] < means[-1]
