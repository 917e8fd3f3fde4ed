"""MoE-Beyond's stand-in: what it sees, how it is fitted, and whom it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import fitting
from moesim.cli import main
from moesim.engine.fast import FastEngine
from moesim.engine.reference import ReferenceEngine
from moesim.errors import MoesimError, NotRunError, TraceError, UsageError
from moesim.past import Share, parse_split
from moesim.policies.fitted import MOST_INPUT
from moesim.policies.token_net import (
    FADE_SHIFT,
    Sight,
    TokenNet,
    TokenNets,
    counted,
    faded,
    levelled,
    load,
    shares,
)
from moesim.policy import check_policy
from moesim.profile import load_hardware, load_model
from moesim.replays import Request, replay
from moesim.traces.samples import trace_path
from moesim.traces.synth import Synth, synth_model, synthesise
from moesim.types import DROPPED, PROBABILITY_ONE, Needs
from tests.harness import run
from tests.strategies import Case, rows_of
from tests.test_engines import outcome
from tests.test_laws import mixed_case
from tests.test_promoe import echo
from tests.toys import told, toy

ONE = PROBABILITY_ONE
LAYERS, EXPERTS = 5, 8


def echo_tokens(layers: int, experts: int, distance: int = 1) -> TokenNets:
    """By hand: a layer will choose what the layer ``distance`` before it chose for this token."""
    same = np.eye(experts, dtype=np.int64)
    w1 = np.zeros((layers, 3 * experts, experts), np.int64)
    w1[:, 2 * experts :] = same
    return TokenNets(
        layers=layers,
        experts=experts,
        distance=distance,
        embedding=0,
        trace="",
        split="",
        requests=np.zeros(0, np.int64),
        prints=np.zeros(0, np.uint64),
        w1=w1,
        b1=np.zeros((layers, experts), np.int64),
        scale=np.ones(layers, np.int64),
        w2=np.stack([same] * layers),
        b2=np.zeros((layers, experts), np.int64),
        unit=np.full(layers, ONE, np.int64),
        samples=np.ones(layers, np.int64),
    )


def written(made: TokenNets, folder: Path) -> str:
    path = folder / "moe-beyond.npz"
    path.write_bytes(made.to_bytes())
    return str(path)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic trace whose layers have something in common."""
    path = tmp_path_factory.mktemp("beyond") / "made.parquet"
    model = synth_model(None, LAYERS, EXPERTS, 2)
    options = Synth(
        model=model, requests=20, prompt_tokens=8, output_tokens=40, cross_layer=0.9, seed=3
    )
    synthesise(path, options)
    return path


def request_for(trace: Path, **more: Any) -> fitting.Request:
    base = fitting.Request(trace, parse_split("7:3"), hidden=24, epochs=6, policy="moe-beyond")
    return replace(base, **more)


# ---- decisions -----------------------------------------------------------------------------------


def echoing() -> Case:
    """Three layers that often choose alike; loads and predictions that take part of a layer."""
    return toy([[(0, 0, 1), (2, 2, 3), (1, 1, 1)]], 4, 4, load_ns=40, dense_ns=100)


def test_it_decides_as_worked_out_by_hand(tmp_path: Path) -> None:
    """Layer l+1 is expected to choose what layer l chose; the job takes 64 of 100 ns."""
    case = echoing()
    made = run(case, "moe-beyond", f"prefetch.weights={written(echo_tokens(3, 4), tmp_path)}")
    assert told(made, 4) == [
        "start *a0",  # a pass begins: nothing is known of layer a, and ties go to the lowest id
        "a0l: *b0",
        "b0h: *c0",
        "c1m: +c1",
        "a2m: -a0 +a2 -b0 *b2",  # a0 was expected, and found resident
        "b2h: -c0 *c2",
        "c3m: -c1 +c3 -a2 *a0",
        "a1m: -b2 +a1 -c2 *b1",
        "b1h: -c3 *c1",
        "c1l:",
    ]


def test_both_engines_agree_on_mixed_requests(tmp_path: Path) -> None:
    rng = np.random.default_rng(22)
    sets = (f"prefetch.weights={written(echo_tokens(2, 5), tmp_path)}",)
    for number in range(12):
        case = mixed_case(rng)
        case = replace(case, options=replace(case.options, flat=number % 3 == 2))
        reference = outcome(ReferenceEngine, case, "moe-beyond", *sets)
        assert outcome(FastEngine, case, "moe-beyond", *sets) == reference


@pytest.mark.parametrize("batch", [1, 3])
def test_b_logs_are_equal_in_both_engines(batch: int, tmp_path: Path) -> None:
    first = Request(
        trace=trace_path("demo"),
        hardware=load_hardware("rtx4090"),
        costs=load_model("olmoe-1b-7b"),
        policies=("moe-beyond",),
        settings=(f"prefetch.weights={written(echo_tokens(8, 32, 2), tmp_path)}",),
        limit=batch,
        share=Share(parse_split("1:9")),
        batch=batch,
    )
    runs = [replay(replace(first, engine=engine))["runs"][0] for engine in ("reference", "fast")]
    assert runs[0]["log_digest"] == runs[1]["log_digest"]
    assert runs[0]["decision_digest"] == runs[1]["decision_digest"]
    assert runs[0]["prefetch"]["issued"]


def test_it_conforms(tmp_path: Path) -> None:
    weights = written(echo_tokens(3, 8), tmp_path)
    check_policy(lambda: TokenNet(weights=weights))
    assert TokenNet(weights=weights).needs == Needs.NONE


@pytest.mark.parametrize("distance", [1, 2])
def test_decoding_passes_alone_are_predicted(distance: int, tmp_path: Path) -> None:
    """A job where a pass begins, and one at each layer but the last ``distance``."""
    sets = (f"prefetch.weights={written(echo_tokens(3, 4, distance), tmp_path)}",)
    passes = [(0, 0, 1), (2, 2, 3), (1, 1, 1)]
    case = toy([passes], 4, 4)
    assert run(case, "moe-beyond", *sets).tally.jobs == 3 * (1 + 3 - distance)
    blocks = [[(la, [[e]]) for la, e in enumerate(one)] for one in passes]
    rows = replace(rows_of(0, blocks, prefill=True, wide=4), ahead=case.requests[0].ahead)
    prompt = replace(case, requests=(rows,))
    assert run(prompt, "moe-beyond", *sets).tally.jobs == 2 * (1 + 3 - distance)


# ---- what it sees --------------------------------------------------------------------------------


def test_an_embedding_at_length_one() -> None:
    rng = np.random.default_rng(0)
    for scale in (1, 300, 1 << 20):
        vector = (rng.standard_normal(64) * scale * 100).astype(np.int64)
        made = levelled(vector, 64)
        assert abs(float(np.square(made / ONE).mean()) - 1) < 0.05
        assert (np.sign(made) * np.sign(vector) >= 0).all()
    assert levelled(None, 3).tolist() == levelled(np.zeros(3), 3).tolist() == [0, 0, 0]
    assert levelled(np.array([1, 2]), 0).tolist() == []
    spike = np.array([1 << 30] + [0] * 99)
    assert levelled(spike, 100).max() == MOST_INPUT


def test_shares_and_fading() -> None:
    rows = np.array([[0, 2], [2, DROPPED]], np.uint16)
    assert shares(counted(rows, 4), len(rows)).tolist() == [ONE // 2, 0, ONE, 0]
    before, now = np.array([ONE, 0]), np.array([0, ONE])
    assert faded(before, now).tolist() == [ONE - (ONE >> FADE_SHIFT), ONE >> FADE_SHIFT]


def test_a_request_is_seen_layer_by_layer() -> None:
    sight = Sight(2, 3, 1, 2)
    sight.begin(np.array([3, -3]))
    sight.see(0, np.array([[1]]))
    hot = [0, ONE, 0]
    nothing = [0, 0, 0]
    assert sight.inputs(1).tolist() == [ONE, -ONE, *nothing, *nothing, *hot]
    assert sight.inputs(0).tolist() == [ONE, -ONE, *hot, *hot, *nothing]
    sight.begin(None)
    assert sight.inputs(1).tolist() == [0, 0, *nothing, *nothing, *nothing]
    sight.see(0, np.array([[2]]))
    part = ONE >> FADE_SHIFT
    assert sight.inputs(0).tolist() == [0, 0, 0, 0, ONE, 0, ONE - part, part, *nothing]


@pytest.mark.parametrize("cuts", [[7], [1, 6], [2, 2, 3], [1] * 7])
def test_chunks_of_a_prompt_are_one_prompt(cuts: list[int]) -> None:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 5, (7, 2)).astype(np.uint16) for _ in range(3)]
    whole, chunked = Sight(1, 5, 1, 0), Sight(1, 5, 1, 0)
    for prompt in prompts:
        whole.begin(None)
        chunked.begin(None)
        whole.see(0, prompt)
        for chunk in np.split(prompt, np.cumsum(cuts)[:-1]):
            chunked.see(0, chunk)
        assert chunked.inputs(0).tolist() == whole.inputs(0).tolist()


# ---- fitting -------------------------------------------------------------------------------------


def test_it_learns_what_there_is_to_learn(trace: Path) -> None:
    """Layers have something in common, so it names more than what is chosen most."""
    predictor, told_of = fitting.fit(request_for(trace, stride=1, epochs=10))
    assert told_of["input"] == "experts" and isinstance(predictor, TokenNets)
    assert predictor.embedding == 0 and predictor.w1.shape == (LAYERS, 3 * EXPERTS, 24)
    found = told_of["recall"]["test"]
    assert found["predictor"] > found["popular"] + 0.05


def test_fitting_sees_what_serving_sees(trace: Path, tmp_path: Path) -> None:
    """The recall that the fit tells is what a replay finds: of decoded tokens, one request at a
    time, every prediction in time."""
    predictor, told_of = fitting.fit(request_for(trace, stride=1, limit=4))
    weights = written(predictor, tmp_path)  # type: ignore[arg-type]
    request = Request(
        trace=trace,
        hardware=load_hardware("rtx4090"),
        costs=load_model("olmoe-1b-7b"),
        policies=("moe-beyond",),
        settings=(f"prefetch.weights={weights}",),
        limit=4,
        share=Share(parse_split("7:3")),
        capacities=("100%",),
    )
    (made,) = replay(request)["runs"]
    named = made["prefetch"]["named_and_demanded"] / made["decode"]["accesses"]
    assert named == told_of["recall"]["test"]["predictor"] > 0.25


def test_the_same_fit_gives_the_same_file(trace: Path) -> None:
    one, other = (fitting.fit(request_for(trace, epochs=2))[0] for _ in range(2))
    assert one.to_bytes() == other.to_bytes()
    assert fitting.fit(request_for(trace, epochs=2, seed=1))[0].to_bytes() != one.to_bytes()


def test_it_takes_embeddings_where_there_are_some() -> None:
    request = fitting.Request(
        trace_path("demo"), parse_split("1:9"), limit=2, epochs=1, hidden=4, policy="moe-beyond"
    )
    predictor, told_of = fitting.fit(request)
    assert told_of["input"] == "embedding" and isinstance(predictor, TokenNets)
    assert predictor.embedding == predictor.w1.shape[1] - 3 * 32 > 0
    plain, told_of = fitting.fit(replace(request, kind="experts"))
    assert told_of["input"] == "experts" and plain.w1.shape[1] == 3 * 32


def test_a_request_that_it_was_fitted_on_is_refused(trace: Path, tmp_path: Path) -> None:
    predictor, _ = fitting.fit(request_for(trace, epochs=1))
    weights = written(predictor, tmp_path)  # type: ignore[arg-type]
    request = Request(
        trace=trace,
        hardware=load_hardware("rtx4090"),
        policies=("moe-beyond",),
        settings=(f"prefetch.weights={weights}",),
    )
    with pytest.raises(NotRunError, match=r"was fitted on request \d+, .* --split 7:3"):
        replay(request)
    (made,) = replay(replace(request, share=Share(parse_split("7:3"))))["runs"]
    assert "not_run" not in made


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"kind": "gate"}, UsageError, "--input gate: is nothing that moe-beyond sees"),
        ({"kind": "embedding"}, NotRunError, "--input embedding needs EMBEDDING"),
        ({"policy": "lru"}, UsageError, "--policy lru: learns nothing; fit promoe or moe-beyond"),
        ({"stride": 5}, UsageError, "--stride 5"),
    ],
)
def test_a_wrong_request_is_one_clear_line(
    trace: Path, change: dict[str, Any], error: type[MoesimError], problem: str
) -> None:
    with pytest.raises(error, match=problem) as caught:
        fitting.fit(request_for(trace, **change))
    assert "\n" not in str(caught.value)


def test_a_trace_that_decodes_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    model = synth_model(None, 3, 4, 1)
    synthesise(path, Synth(model=model, requests=3, prompt_tokens=4, output_tokens=1))
    with pytest.raises(TraceError, match="has nothing to fit moe-beyond on"):
        fitting.fit(fitting.Request(path, policy="moe-beyond"))


def test_the_commands_of_the_help_work(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.npz"
    words = ("--trace", str(trace), "--split", "7:3")
    few = ("--epochs", "1", "--hidden", "8")
    assert main(["fit", "--policy", "moe-beyond", *words, "--out", str(out), *few]) == 0
    text = capsys.readouterr().out
    assert "recall on the test requests" in text and "--policy moe-beyond --set" in text
    assert main(["fit", "--policy", "moe-beyond", *words, "--out", str(out), *few, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recall"]["test"]["predictor"] > 0


def test_the_command_offers_what_can_be_fitted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "{" + ",".join(fitting.POLICIES) + "}" in capsys.readouterr().out


# ---- the file ------------------------------------------------------------------------------------


def test_without_weights_it_is_refused_with_the_command_to_run() -> None:
    with pytest.raises(NotRunError, match="moesim fit --policy moe-beyond"):
        check_policy(TokenNet)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"distance": 0}, "its sizes"),
        ({"embedding": -1}, "its sizes"),
        ({"embedding": 4}, "w1 must be int64"),
        ({"b2": np.zeros((3, 8))}, "b2 must be int64"),
        ({"unit": np.zeros(3, np.int64)}, "scale and unit"),
        ({"w2": np.full((3, 8, 8), 1 << 40)}, "too large"),
        ({"requests": np.arange(2)}, "fingerprint"),
    ],
)
def test_a_bad_file_is_one_clear_line(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = written(replace(echo_tokens(3, 8), **change), tmp_path)
    with pytest.raises(UsageError, match=problem) as caught:
        load(Path(path))
    assert "\n" not in str(caught.value) and "moesim fit --policy moe-beyond" in str(caught.value)


def test_another_policys_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "promoe.npz"
    path.write_bytes(echo(LAYERS, EXPERTS).to_bytes())
    with pytest.raises(UsageError, match="was not written by this"):
        TokenNet(weights=str(path))


@pytest.mark.parametrize("bad", [{"width": -1}, {"queue": 0}])
def test_parameters_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"prefetch.{next(iter(bad))}="):
        TokenNet(**bad)  # type: ignore[arg-type]


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    weights = written(echo_tokens(3, 6), tmp_path)
    with pytest.raises(UsageError, match="was fitted for 3 layers of 6 experts"):
        check_policy(lambda: TokenNet(weights=weights))
