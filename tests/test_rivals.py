"""The systems that FineMoE was measured against: each decides as its authors wrote, and no two of
them, nor any other policy, decide alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import UsageError
from moesim.past import Share, parse_split
from moesim.policies.layer_lru import worth
from moesim.policies.presets import PRESETS
from moesim.policies.staged_gate import StagedGate
from moesim.policy import check_policy
from moesim.profile import load_hardware, load_model
from moesim.registry import resolve
from moesim.replays import Request, replay
from moesim.traces.samples import trace_path
from moesim.traces.synth import Synth, synth_model, synthesise
from moesim.types import DROPPED
from tests.harness import Run, run
from tests.strategies import Case
from tests.test_engines import outcome
from tests.test_laws import mixed_case
from tests.test_promoe import echo
from tests.test_token_net import echo_tokens
from tests.toys import told, toy

NOBODY = (DROPPED, DROPPED)

ALIKE = {"deepspeed": "streaming", "deepspeed-cache": "lru"}
"""The same decisions under the name that FineMoE's authors compare with."""


def speculating() -> Case:
    """Two layers of eight experts, six slots: one cached expert a layer and four buffers."""
    ahead = [[1, 2], [3, 4], [5, 6], [2, 0], [1, 2]]
    passes = [(0, 0), (0, 3), (1, 7), (0, 2), (3, 1)]
    return toy([passes], 8, 6, ahead=[[[named, NOBODY] for named in ahead]])


def remembering() -> Case:
    """Three requests of one pass through two layers; the first is the past as well."""
    return toy([[(0, 1)], [(3, 2)], [(3, 0)]], 4, 3)


def striding() -> Case:
    """Three layers, four slots, and loads that take longer than a layer."""
    return toy([[(0, 1, 2), (0, 2, 3)], [(3, 2, 1)]], 4, 4, load_ns=3)


def predicting() -> Case:
    """The same, where the third layer often asks for what the first did."""
    return toy([[(0, 1, 0), (2, 1, 3)], [(3, 3, 3)]], 4, 4, load_ns=5)


EXPECTED: dict[str, tuple[Callable[[], Case], int, list[str]]] = {
    "deepspeed": (
        lambda: toy([[(0, 1, 2), (0, 2, 3)]], 4, 8),
        4,
        [
            "start",
            "a0m: +a0 *b0 *b1",  # the link has time for two of the next layer's four
            "b1h: !b2 !b3 *c0 *c1",
            "c2m: !c3 +c2 *a1 *a2",  # a0 is there; after the last layer the first of the next pass
            "a0h: !a3 -a0 *b2 -c0 *b3",  # first in, first out, but b0 and b1 are wanted as well
            "b2h: -b0 *c0 -b1 *c3",
            "c3h:",
        ],
    ),
    "mixtral-offloading": (
        speculating,
        8,
        [
            "start",
            "a0m: +a0 *b1 *b2",
            "b0m: +b0",
            "a0h: -b1 *b3 -b2 *b4",  # stale buffers go, although two slots are free
            "b3h:",  # a staged expert is used: layer b now caches b0 and b3
            "a1m: +a1 -b4 *b5 *b6",
            "b7m: -b0 +b7",  # layer b holds the most; not a staged expert, nor layer a's older a0
            "a0h: -b5 *b2 -b6 *b0",
            "b2h:",
            "a3m: -b3 +a3 -b0 *b1",  # three each: the least recent of both; b2 is cached already
            "b1h:",
        ],
    ),
    "moe-infinity": (
        remembering,
        4,
        [
            "start *a0 *b1",  # the whole collection, which is the first request
            "a0h:",
            "b1h:",
            "a3m: +a3",  # like no past request: all are summed, and b1 is there
            # b2 is worth nothing yet, but asked for; then a3, which nothing in the past used, goes.
            # The third request begins: of three matrices summed, a0 2/3 and there, a3 1/3, b1 2/3,
            # b2 1/3 and so the least worth.
            "b2m: -a3 +b2 -b2 *a3",
            "a3h: -b1 *b2",  # like the second request: b2 is expected, a0 and b1 no more
            "b0m: -a0 +b0",  # (0 + epsilon) * 2 is less than a3's and b2's
        ],
    ),
    "moe-infinity-code": (
        remembering,
        4,
        [
            "start *a0 *b1",
            "a0h:",
            "b1h:",
            "a3m: +a3",
            "b2m: -a0 +b2 -b1 *a0",  # one use each: the least recent goes; then a0 is expected
            "a3h:",
            "b0m: -a0 +b0",  # no use yet since it came back
        ],
    ),
    "promoe-speculative": (
        striding,
        4,
        [
            "start",
            "a0m: +a0 *c2",
            "b1m: +b1",
            "c2h:",
            "a0h: *c3",
            "b2m: -b1 +b2",
            "c3h:",
            "a3m: -c2 +a3 -a0 *c1",
            "b2h:",
            "c1h:",
        ],
    ),
    "promoe": (
        predicting,
        4,
        [
            "start",
            "a0m: +a0 *c0",  # the predictor by hand: layer c will choose what layer a chose
            "b1m: +b1",
            "c0h:",
            "a2m: +a2 -a0 *c2",
            "b1h:",
            "c3m: -c0 +c3",
            "a3m: -a2 +a3",
            "b3m: -c2 +b3",
            "c3h:",
        ],
    ),
}


def settings_of(name: str, case: Case, folder: Path) -> tuple[str, ...]:
    """What a policy must be given to run."""
    path, layers = folder / "echo.npz", case.model.layers
    if PRESETS[name].prefetch == "token-net":
        path.write_bytes(echo_tokens(layers, case.model.experts).to_bytes())
        return (f"prefetch.weights={path}",)
    if PRESETS[name].prefetch != "stride":
        return ()
    path.write_bytes(echo(layers, case.model.experts, min(2, layers - 1)).to_bytes())
    return (f"prefetch.weights={path}", "prefetch.ops=2")


@pytest.mark.parametrize("name", EXPECTED)
def test_it_decides_as_worked_out_by_hand(name: str, tmp_path: Path) -> None:
    make, experts, lines = EXPECTED[name]
    case = make()
    assert told(run(case, name, *settings_of(name, case, tmp_path)), experts) == lines


def signature(made: Run) -> list[tuple[object, ...]]:
    """What was sent and given up, at which layer event."""
    event, seen = -1, []
    for what, _, key, *rest in made.records:
        event = key if what == "gate" else event
        if what in ("issue", "evict", "cancel", "served"):
            seen.append((event, what, key, *rest))
    return seen


@pytest.mark.parametrize("name", EXPECTED)
def test_it_decides_like_no_other_policy(name: str, tmp_path: Path) -> None:
    case = EXPECTED[name][0]()
    own = signature(run(case, name, *settings_of(name, case, tmp_path)))
    others = [n for n in PRESETS if n != name and ALIKE.get(name) != n and ALIKE.get(n) != name]
    for other in others:
        if PRESETS[other].route == "mixed-precision":
            continue  # these experts have one precision
        assert own != signature(run(case, other, *settings_of(other, case, tmp_path))), other


@pytest.mark.parametrize("name", ALIKE)
def test_the_other_name_of_a_policy_decides_the_same(name: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        case = mixed_case(rng)
        assert run(case, name).tally == run(case, ALIKE[name]).tally


# ---- both engines --------------------------------------------------------------------------------

RIVALS = [name for name in EXPECTED if name not in ALIKE]


@pytest.mark.parametrize("name", RIVALS)
def test_i8_both_engines_agree_on_mixed_requests(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(20)
    sets: tuple[str, ...] = ()
    if name == "promoe":
        path = tmp_path / "echo.npz"
        path.write_bytes(echo(2, 5, stride=1, shift=1).to_bytes())
        sets = (f"prefetch.weights={path}", "prefetch.ops=3")
    for _ in range(12):
        case = mixed_case(rng)
        reference = outcome(ReferenceEngine, case, name, *sets)
        assert outcome(FastEngine, case, name, *sets) == reference


@cache
def made_trace(folder: Path) -> Path:
    """A synthetic trace with gates and predictions, of ten requests."""
    path = folder / "made.parquet"
    options = Synth(
        model=synth_model(None, 5, 8, 2),
        requests=10,
        prompt_tokens=6,
        output_tokens=7,
        gate=True,
        ahead=(1, 2),
        seed=3,
    )
    synthesise(path, options)
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic trace."""
    return made_trace(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("trace", ["demo", "made"])
def test_b_logs_are_equal_in_both_engines(
    trace: str, name: str, batch: int, made: Path, tmp_path: Path
) -> None:
    path = made if trace == "made" else trace_path("demo")
    first = Request(
        trace=path,
        hardware=load_hardware("rtx4090"),
        costs=load_model("olmoe-1b-7b"),
        policies=(name,),
        limit=batch,
        share=Share(parse_split("1:9" if trace == "demo" else "1:1")),
        batch=batch,
    )
    if name == "promoe":
        layers, experts = (5, 8) if trace == "made" else (8, 32)
        (tmp_path / "echo.npz").write_bytes(echo(layers, experts).to_bytes())
        first = replace(first, settings=(f"prefetch.weights={tmp_path / 'echo.npz'}",))
    runs = [replay(replace(first, engine=engine))["runs"][0] for engine in ("reference", "fast")]
    assert runs[0]["log_digest"] == runs[1]["log_digest"]
    assert runs[0]["decision_digest"] == runs[1]["decision_digest"]
    assert runs[0]["prefetch"]["issued"]


@pytest.mark.parametrize("name", [n for n in [*RIVALS, *ALIKE] if n != "promoe"])
def test_it_conforms(name: str) -> None:
    check_policy(resolve([name])[0].build)


# ---- Mixtral-Offloading --------------------------------------------------------------------------


def test_the_kernel_of_layer_lru() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        stamps = rng.permutation(1000)[:20].astype(np.int64)
        cached = rng.random(20) < 0.7
        held = rng.integers(0, 9, 20)
        got = np.argsort(worth(stamps, cached, held), kind="stable").tolist()
        # Cached ones first, fullest layer first, least recent first; then staged ones by recency.
        wanted = sorted(range(20), key=lambda i: (not cached[i], -held[i] * cached[i], stamps[i]))
        assert got == wanted


def test_with_a_cache_for_each_layer_it_is_lru() -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        case = replace(mixed_case(rng), capacity_bytes=(int(rng.integers(1, 5)),) * 2)
        assert run(case, "lru").tally == run(case, "lru", "keep=layer-lru").tally


def test_layers_come_to_hold_equally_many() -> None:
    """Room for two a layer: each layer then keeps its own two most recent, whatever the others."""
    passes = [(i % 4, i // 2 % 3, i % 3) for i in range(40)]
    case = toy([passes], 4, 6)
    records = run(case, "lru", "keep=layer-lru").records
    resident: set[int] = set()
    for what, _, key, *_ in records:
        if what == "land":
            resident.add(key)
        elif what == "evict":
            resident.remove(key)
        elif what == "end" and key > 30:
            layers = [e // 4 for e in resident]
            assert [layers.count(la) for la in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("buffers", [1, 2, 4])
def test_never_more_copies_are_staged_than_there_are_buffers(buffers: int) -> None:
    rng = np.random.default_rng(buffers)
    for number in range(16):
        case = mixed_case(rng)
        if number % 2:
            case = replace(case, capacity_bytes=(int(rng.integers(1, 5)),) * 2)
        made = run(case, "mixtral-offloading", f"prefetch.buffers={buffers}")
        staged: set[int] = set()
        for what, _, key, *rest in made.records:
            if what == "gate":
                staged -= {word // 4 for word in rest[3:]}
            elif what == "issue" and rest[-1] == 1:
                staged.add(key)
                assert len(staged) <= buffers
            elif what in ("evict", "cancel"):
                staged.discard(key)


def test_a_speculated_expert_replaces_a_stale_one_not_a_cached_one() -> None:
    """Until a staged expert was used, which takes a cached one's place, none of those goes."""
    ahead = [[[1, 2], NOBODY]] * 9
    case = toy([[(0, 0)] * 9], 8, 4, ahead=[ahead])
    wrong = run(case, "mixtral-offloading", "prefetch.buffers=2")
    assert [r for r in wrong.records if r[0] == "evict"] == []
    assert wrong.tally.prefetch.issued == 2


@pytest.mark.parametrize("bad", [{"distance": 0}, {"width": -1}, {"buffers": 0}])
def test_parameters_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"prefetch.{next(iter(bad))}"):
        StagedGate(**bad)
