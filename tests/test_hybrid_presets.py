"""Presets that divide work between host, link and cache: each decides as its source has it, by a
log worked out by hand, and like no other policy; both engines agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import NotRunError, UsageError
from moesim.past import Share, parse_split
from moesim.policies.presets import PRESETS
from moesim.policy import check_policy
from moesim.profile import load_hardware, load_model
from moesim.registry import resolve
from moesim.replays import Request, replay
from moesim.traces.samples import trace_path
from moesim.types import DROPPED
from tests.harness import Run, run
from tests.strategies import FITTED, Case, full_meta, machine, rows_of, small_model
from tests.test_engines import outcome
from tests.test_laws import mixed_case
from tests.test_rivals import signature
from tests.toys import told

# ---- each preset by hand -------------------------------------------------------------------------


def wide(
    passes: Sequence[Sequence[Sequence[int]]],
    experts: int,
    slots: int,
    *,
    prompt: Sequence[Sequence[Sequence[int]]] = (),
    load_ns: int = 4,
    cpu_ns: int = 0,
) -> Case:
    """One request, decoding a token a pass; what each layer's gate will say is known three ahead.

    passes : the experts that each layer chooses. prompt : for each layer, those of each token.
    """
    count, top_k = len(passes[0]), len(passes[0][0])
    blocks = [[(la, [list(chosen)]) for la, chosen in enumerate(one)] for one in passes]
    if prompt:
        blocks.insert(0, [(la, [list(t) for t in tokens]) for la, tokens in enumerate(prompt)])

    def later(block: list[tuple[int, list[list[int]]]], layer: int, token: int) -> list[int]:
        return block[layer][1][token] if layer < count else [DROPPED] * top_k

    places = [(b, la, t) for b in blocks for la, chosen in b for t in range(len(chosen))]
    ahead = {
        d: np.array([later(b, la + d, t) for b, la, t in places], np.uint16) for d in (1, 2, 3)
    }
    rows = rows_of(0, blocks, prefill=bool(prompt), wide=experts)
    facts = replace(rows.facts, prompt_tokens=len(prompt[0]) if prompt else 0)
    rows = replace(rows, ahead=ahead, facts=facts)
    hardware = machine(bytes_per_s=1e9 / load_ns, dense_ns=2, expert_ns=1, cpu_ns=cpu_ns)
    meta = full_meta(small_model(count, experts, top_k, [1] * count))
    return Case(meta, (rows,), hardware, (slots,), past=(rows,))


def alone(*experts: int) -> list[list[tuple[int]]]:
    """Passes through one layer, one expert each."""
    return [[(e,)] for e in experts]


def dividing() -> Case:
    """Two of four experts in each of three layers; the host takes as long as copy and device."""
    passes = [
        [(0, 1), (0, 1), (2, 3)],
        [(0, 2), (1, 3), (2, 0)],
        [(3, 1), (1, 2), (0, 1)],
    ]
    return wide(passes, 4, 5, cpu_ns=5)


def returning() -> Case:
    """A copy costs 5, each use of it gains 3: it must be used twice, or nearly."""
    return wide(alone(0, 0, 0, 0, 1, 1, 1, 2, 0), 4, 2, load_ns=5, cpu_ns=4)


def prompted() -> Case:
    """Expert 0 is the most used of all; the prompt asks for 2 twice and 3 once."""
    return wide(alone(0, 0, 0), 4, 2, prompt=[[[2], [2], [3]]], load_ns=2, cpu_ns=3)


def scanning() -> Case:
    """Two experts that come again, three that pass by."""
    return wide(alone(0, 1, 0, 1, 2, 3, 2, 4, 3, 0, 1, 2), 5, 3)


def two_paces() -> Case:
    """In the past the first layer wanted one expert, the second three in turn."""
    case = wide([[(0,), (0,)], [(1,), (1,)], [(2,), (2,)], [(0,), (0,)]], 4, 4)
    return replace(case, past=wide([[(0,), (i % 3,)] for i in range(6)], 4, 4).requests)


def following() -> Case:
    """In the past 1 followed 0, 2 or 3 followed 1; the last layer wanted 0."""
    past = [[(0,), (1,), (0,)], [(1,), (2,), (0,)], [(1,), (3,), (0,)]]
    passes = [[(0,), (1,), (0,)], [(1,), (2,), (0,)], [(0,), (1,), (3,)], [(1,), (2,), (0,)]]
    return replace(wide(passes, 4, 3), past=wide(past, 4, 3).requests)


EXPECTED: dict[str, tuple[Callable[[], Case], int, tuple[str, ...], list[str]]] = {
    "hybrimoe": (
        dividing,
        4,
        (),
        [
            "start",
            # Copied and computed, the first is there at 5, as from the host; the second would be at
            # 9. Of the next layers the same is said, so no prefetch would gain anything.
            "a0m a1m: +a0 (a1)",
            "b0m b1m: +b0 (b1)",
            "c2m c3m: +c2 (c3)",
            # Layer b wants 1 and 3, both absent: 5 with or without one of them. Layer c has 2 and
            # lacks 0 alone: with it, it ends at 2.
            "a0h a2m: +a2 *c0",
            "b1m b3m: -c0 +b1 (b3)",  # c0 has no score yet
            "c2h c0m: -b0 +c0",
            "a3m a1m: -a2 +a3 -c0 *b2 (a1)",  # b has 1, and lacks 2 alone
            "b1h b2l: -a0 *c1",
            "c0m c1l: (c0)",  # half a copy and a whole one would be done at 7
        ],
    ),
    "q-split": (
        dividing,
        4,
        (),
        [
            "start",
            # One to the host, 5, and one copied, 4; both to the host is 10, both copied 8.
            "a0m a1m: +a0 (a1)",
            "b0m b1m: +b0 (b1)",
            "c2m c3m: +c2 (c3)",
            "a0h a2m: +a2",  # alone, a copy takes 4 and the host 5
            "b1m b3m: +b1 (b3)",
            "c2h c0m: -b0 +c0",
            "a3m a1m: -a0 +a3 (a1)",
            "b1h b2m: -a2 +b2",
            "c0h c1m: -c2 +c1",
        ],
    ),
    "reuse-break-even": (
        returning,
        4,
        (),
        [
            "start",
            # A copy is 2 dearer than the host now, each later use gains 3: R above 2/3 is wanted.
            "a0m: (a0)",  # a rate of 0 for 2 passes, as nothing was copied yet
            "a0m: (a0)",  # 0.0475 for 4 is 0.19
            "a0m: (a0)",  # 0.0926 for 6 is 0.56
            "a0m: +a0",  # 0.1355 for 8
            "a1m: (a1)",
            "a1m: (a1)",  # one copy in 6 passes, two slots: it would stay 12; R is 0.57
            "a1m: +a1",  # 0.0926 for 14
            "a2m: (a2)",
            "a0h:",
        ],
    ),
    "ktransformers": (
        prompted,
        4,
        ("prefetch.threshold=3",),
        [
            "start",  # the most used: a0, then a2
            "a2h a3m: -a0 *a3 (a3)",  # the prompt wants a3, and a0 not at all
            "a0m: (a0)",
            "a0m: (a0)",
            "a0m: (a0)",
        ],
    ),
    "static-lru": (
        scanning,
        5,
        (),
        [
            "start",  # a0, a1 and a2 are used most, and a0 is pinned (half of three slots)
            "a0h:",
            "a1h:",
            "a0h:",
            "a1h:",
            "a2h:",
            "a3m: -a1 +a3",  # LRU would give up a0
            "a2h:",
            "a4m: -a3 +a4",
            "a3m: -a2 +a3",
            "a0h:",
            "a1m: -a4 +a1",
            "a2m: -a3 +a2",
        ],
    ),
    "adapmoe": (
        two_paces,
        4,
        ("keep.accuracy=0",),
        [
            "start",  # one slot for layer a, three for b
            "a0m: +a0 *b0",
            "b0l:",
            "a1m: +a1 *b1",  # room for four: a may hold two as long as b does not fill its three
            "b1l:",
            "a2m: -a0 +a2 -a1 *b2",  # a is above its one: not b0, though older than a1
            "b2l:",
            "a0m: -a2 +a0",  # its only slot; b0 is there already
            "b0h:",
        ],
    ),
    "edgemoe": (
        following,
        4,
        (),
        [
            "start",
            "a0m: +a0 *b1",
            "b1l: *c0",
            "c0l:",
            # One use each. From layer a on b comes next, then c, then a: a0 goes, the least soon.
            # b2 or b3 may follow: b2, the lower id, and for it c0, which is needed after b1.
            "a1m: -a0 +a1 -c0 *b2",
            "b2l: -b1 *c0",
            "c0l:",
            "a0m: -a1 +a0 -b2 *b1",
            "b1l:",
            "c3m: -c0 +c3",
            "a1m: -a0 +a1 -c3 *b2",
            "b2l: -b1 *c0",
            "c0l:",
        ],
    ),
}


def told_all(made: Run, experts: int) -> list[str]:
    """The log in words, and in brackets what ran on the host."""
    lines = told(made, experts)
    line = 0
    for what, _, key, *_ in made.records:
        if what == "gate":
            line += 1
        elif what == "served":
            lines[line] += f" ({'abc'[key // experts]}{key % experts})"
    return lines


@pytest.mark.parametrize("name", EXPECTED)
def test_it_decides_as_worked_out_by_hand(name: str) -> None:
    make, experts, sets, lines = EXPECTED[name]
    assert told_all(run(make(), name, *sets), experts) == lines


@pytest.mark.parametrize("name", EXPECTED)
def test_it_decides_like_no_other_policy(name: str) -> None:
    make, _, sets, _ = EXPECTED[name]
    case = make()
    own = signature(run(case, name, *sets))
    for other, preset in PRESETS.items():
        if other != name and preset.prefetch not in FITTED:
            # One of several precisions has nothing to do here, masked routing too little room.
            with suppress(NotRunError, UsageError):
                assert own != signature(run(case, other)), other


def test_without_long_prompts_ktransformers_is_a_fixed_set() -> None:
    """Its own threshold is 512 tokens: the toy's prompt changes nothing."""
    assert signature(run(prompted(), "ktransformers")) == signature(run(prompted(), "cpu"))


def test_recent_use_moves_one_expert_at_a_gate() -> None:
    """Two slots with 0 and 1, none of which is asked for again: 2 and 3 come in their places, each
    at its first use, and 4 only once it was used more than they."""
    case = replace(wide(alone(2, 3, 4, 4, 4), 5, 2, cpu_ns=3, load_ns=1), initial="some")
    sets = ("prefetch.dynamic=recent", "prefetch.gain=1.0")
    assert told_all(run(case, "ktransformers", *sets), 5) == [
        "start",
        "a2h:",  # the case starts with 0 and 2
        "a3m: -a0 *a3 (a3)",
        "a4m: (a4)",  # 1 use against 0.9 and 0.95
        "a4m: -a2 *a4 (a4)",  # 1.95 against 0.86
        "a4h:",
    ]


# ---- both engines, and the conformance suite -----------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
def test_i8_both_engines_agree_on_mixed_requests(name: str) -> None:
    rng = np.random.default_rng(30)
    sets = ("prefetch.threshold=2",) if name == "ktransformers" else ()
    for _ in range(12):
        case = mixed_case(rng)
        reference = outcome(ReferenceEngine, case, name, *sets)
        assert outcome(FastEngine, case, name, *sets) == reference


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", EXPECTED)
def test_b_logs_are_equal_in_both_engines_on_the_demo(name: str, batch: int) -> None:
    request = Request(
        trace=trace_path("demo"),
        hardware=load_hardware("rtx4090"),
        costs=load_model("olmoe-1b-7b"),
        policies=(name,),
        settings=("prefetch.threshold=1",) if name == "ktransformers" else (),
        limit=batch,
        share=Share(parse_split("1:9")),
        batch=batch,
    )
    runs = [replay(replace(request, engine=e))["runs"][0] for e in ("reference", "fast")]
    assert runs[0]["log_digest"] == runs[1]["log_digest"]
    assert runs[0]["decision_digest"] == runs[1]["decision_digest"]
    moves = name in ("ktransformers", "hybrimoe", "adapmoe", "edgemoe")
    assert bool(runs[0]["prefetch"]["issued"]) == moves


@pytest.mark.parametrize("name", EXPECTED)
def test_it_conforms(name: str) -> None:
    check_policy(resolve([name])[0].build)
