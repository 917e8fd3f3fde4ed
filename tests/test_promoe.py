"""ProMoE: fitted on a part of a trace, rounded to integers, honest about what it has seen."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import fitting
from moesim.cli import main
from moesim.errors import MoesimError, NotRunError, UsageError
from moesim.past import Share, parse_split, requests_of
from moesim.policies.fitted import (
    MOST_HIDDEN,
    MOST_INPUT,
    chosen,
    fingerprint,
    outputs,
    probabilities,
)
from moesim.policies.stride import Predictor, Recent, Stride, inputs_of, load
from moesim.policy import World, check_policy
from moesim.traces.reader import TraceReader
from moesim.traces.synth import Synth, synth_model, synthesise
from moesim.types import (
    DROPPED,
    PROBABILITY_ONE,
    Gate,
    JobDone,
    LayerEvent,
    Needs,
    Phase,
    Slot,
    State,
)

LAYERS, EXPERTS = 5, 8


def echo(
    layers: int, experts: int, stride: int = 2, shift: int = 0, kind: str = "experts"
) -> Predictor:
    """By hand: a token will choose, ``shift`` further on, what it chose ``stride`` layers ago."""
    count = layers - stride
    same = np.eye(experts, dtype=np.int64)
    return Predictor(
        layers=layers,
        experts=experts,
        stride=stride,
        history=1,
        kind=kind,
        trace="",
        split="",
        requests=np.zeros(0, np.int64),
        prints=np.zeros(0, np.uint64),
        w1=np.stack([same] * count),
        b1=np.zeros((count, experts), np.int64),
        scale=np.ones(count, np.int64),
        w2=np.stack([np.roll(same, shift, axis=1)] * count),
        b2=np.zeros((count, experts), np.int64),
        unit=np.full(count, PROBABILITY_ONE, np.int64),
        samples=np.ones(count, np.int64),
    )


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic trace whose layers have something in common."""
    path = tmp_path_factory.mktemp("promoe") / "made.parquet"
    options = Synth(
        model=synth_model(None, LAYERS, EXPERTS, 2),
        requests=20,
        prompt_tokens=8,
        output_tokens=10,
        cross_layer=0.9,
        gate=True,
        seed=3,
    )
    synthesise(path, options)
    return path


@pytest.fixture(scope="module")
def fitted(trace: Path) -> tuple[Predictor, dict[str, Any]]:
    return fitting.fit(request_for(trace))


def request_for(trace: Path, **more: Any) -> fitting.Request:
    base = fitting.Request(trace, parse_split("7:3"), hidden=24, epochs=6)
    return replace(base, **more)


# ---- kernels -------------------------------------------------------------------------------------


def some_net(rng: np.random.Generator, wide: int, hidden: int, experts: int) -> fitting._Net:
    shapes = ((wide, hidden), (hidden,), (hidden, experts), (experts,))
    return fitting._Net(*(rng.standard_normal(s).astype(np.float32) for s in shapes))


def test_the_integer_network_is_the_network() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        net = some_net(rng, 16, 12, 6)
        inputs = rng.dirichlet(np.ones(8), (30, 2)).reshape(30, 16)
        whole = np.rint(inputs * PROBABILITY_ONE)
        made = fitting.rounded(net)
        parts = {
            k: np.asarray(v, np.float64) for k, v in made.items() if k in ("w1", "b1", "w2", "b2")
        }
        found = outputs(whole, scale=made["scale"], **parts)
        exact = np.maximum(inputs @ net.w1 + net.b1, 0) @ net.w2 + net.b2
        assert np.abs(found / made["unit"] - exact).max() < 0.02
        # The same in Python's integers, which have no size.
        row = [int(v) for v in whole[0]]
        hidden = [
            min(max(sum(x * int(w) for x, w in zip(row, col, strict=True)) + int(b), 0)
                // made["scale"], MOST_HIDDEN)
            for col, b in zip(made["w1"].T, made["b1"], strict=True)
        ]  # fmt: skip
        last = [
            sum(h * int(w) for h, w in zip(hidden, col, strict=True)) + int(b)
            for col, b in zip(made["w2"].T, made["b2"], strict=True)
        ]
        assert found[0].tolist() == last


def test_the_slopes_are_the_slopes() -> None:
    """Against finite differences of the loss, in float64."""
    rng = np.random.default_rng(2)
    net = fitting._Net(*(p.astype(np.float64) for p in some_net(rng, 6, 5, 4).all()))
    inputs, truth = rng.random((7, 6)), rng.integers(0, 2, (7, 4))

    def loss() -> float:
        logits = np.maximum(inputs @ net.w1 + net.b1, 0) @ net.w2 + net.b2
        each = np.logaddexp(0, logits) - truth * logits
        return float(each.sum() / len(inputs))

    for parameter, slope in zip(net.all(), fitting.gradients(net, inputs, truth), strict=True):
        for at in np.ndindex(*parameter.shape):
            here, step = parameter[at], 1e-6
            parameter[at] = here + step
            above = loss()
            parameter[at] = here - step
            below = loss()
            parameter[at] = here
            assert slope[at] == pytest.approx((above - below) / (2 * step), abs=1e-6)


def test_probabilities_rise_with_the_outputs() -> None:
    found = np.sort(np.random.default_rng(3).integers(-(1 << 40), 1 << 40, 200))
    shares = probabilities(found, 1 << 20)
    assert (np.diff(shares) >= 0).all() and shares.min() >= 0 and shares.max() <= PROBABILITY_ONE
    assert probabilities(np.array([0]), 5).tolist() == [PROBABILITY_ONE // 2]


def test_chosen_are_the_best_of_any_token_best_first() -> None:
    rng = np.random.default_rng(4)
    for _ in range(30):
        found = rng.integers(0, 9, (4, 6))
        named: set[int] = set()
        for row in found:
            named |= set(sorted(range(6), key=lambda e: (-row[e], e))[:2])
        wanted = sorted(named, key=lambda e: (-found[:, e].max(), e))
        assert chosen(found, 2).tolist() == wanted


def event_of(layer: int, experts: Any, step: int = 0, **more: Any) -> LayerEvent:
    named = np.array(experts, np.uint16)
    slots = (Slot(0, 1, Phase.DECODE, 0, len(named)),)
    return LayerEvent(layer, step, layer, slots, named, **more)


def test_what_a_layer_sees() -> None:
    weights = np.array([[12_000, 4384], [16_384, 0]], np.int32)
    gate = np.arange(8, dtype=np.int32).reshape(2, 4)
    event = event_of(0, [[2, 0], [3, DROPPED]], weights=weights, gate=gate)
    assert inputs_of(event, 4, "gate").tolist() == gate.tolist()
    assert inputs_of(event, 4, "weights").tolist() == [[4384, 0, 12_000, 0], [0, 0, 0, 16_384]]
    assert inputs_of(event, 4, "experts").tolist() == [[8192, 0, 8192, 0], [0, 0, 0, 8192]]
    large = replace(event, weights=weights * 100)
    assert inputs_of(large, 4, "weights").max() == MOST_INPUT


def test_earlier_layers_of_the_same_pass_alone() -> None:
    recent = Recent(2, 2, "experts")
    assert recent.inputs(event_of(0, [[0]])).tolist() == [[16_384, 0, 0, 0]]
    assert recent.inputs(event_of(1, [[1]])).tolist() == [[0, 16_384, 16_384, 0]]
    assert recent.inputs(event_of(2, [[1], [1]])).tolist() == [[0, 16_384, 0, 0]] * 2
    assert recent.inputs(event_of(3, [[0]], step=1)).tolist() == [[16_384, 0, 0, 0]]


def test_a_fingerprint_does_not_depend_on_chunks() -> None:
    rng = np.random.default_rng(5)
    one, other = rng.integers(0, 5, (2, 7))
    whole = fingerprint(3, 1, one + other)
    assert whole == (fingerprint(3, 1, one) + fingerprint(3, 1, other)) % (1 << 64)
    assert len({whole, fingerprint(4, 1, one + other), fingerprint(3, 2, one + other)}) == 3


# ---- the seat ------------------------------------------------------------------------------------


def written(predictor: Predictor, folder: Path) -> str:
    path = folder / "promoe.npz"
    path.write_bytes(predictor.to_bytes())
    return str(path)


class Cache:
    """All that was wished for is under way."""

    states = np.full(LAYERS * EXPERTS, State.IN_FLIGHT, np.uint8)
    jobs_waiting = 0


def world() -> World:
    sizes = np.ones((1, LAYERS), np.int64)
    return World(LAYERS, EXPERTS, 2, sizes, (99,), "global")


def told(seat: Stride, event: int, layer: int, experts: Any) -> Any:
    source = replace(event_of(layer, experts), event=event)
    demand = layer * EXPERTS + np.unique(source.token_experts).astype(np.int64)
    cache: Any = Cache()
    return seat.plan(Gate(source, demand, demand, demand, demand), cache)


def test_it_commissions_a_job_and_takes_back_what_the_gate_refutes(tmp_path: Path) -> None:
    cache: Any = Cache()
    for cancel in (True, False):
        seat = Stride(weights=written(echo(LAYERS, EXPERTS), tmp_path), cancel=cancel)
        seat.begin(world())
        plan = told(seat, 0, 0, [[3, 5]])
        (job,) = plan.jobs
        assert (job.ops, plan.prefetches, plan.foreground_ops) == (200_000, (), 0)
        done = seat.plan(JobDone(job, 0), cache)
        assert [(w.expert, w.expires) for w in done.prefetches] == [
            (2 * EXPERTS + 3, 2),
            (2 * EXPERTS + 5, 2),
        ]
        told(seat, 1, 1, [[0, 1]])
        plan = told(seat, 2, 2, [[3, 4]])
        assert list(plan.cancel) == ([2 * EXPERTS + 5] if cancel else [])


def test_the_last_layers_predict_nothing(tmp_path: Path) -> None:
    unfit = replace(echo(LAYERS, EXPERTS), samples=np.array([1, 0, 1]))
    seat = Stride(weights=written(unfit, tmp_path))
    seat.begin(world())
    jobs = [len(told(seat, la, la, [[0, 1]]).jobs) for la in range(LAYERS)]
    assert jobs == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("kind", ["gate", "weights", "experts"])
def test_it_conforms_and_needs_what_it_was_fitted_on(kind: str, tmp_path: Path) -> None:
    weights = written(echo(3, 8, stride=1, kind=kind), tmp_path)
    check_policy(lambda: Stride(weights=weights, ops=0))
    wanted = {"gate": Needs.GATE, "weights": Needs.WEIGHTS, "experts": Needs.NONE}[kind]
    assert Stride(weights=weights).needs == wanted


def test_without_weights_it_is_refused_with_the_command_to_run() -> None:
    with pytest.raises(NotRunError, match="moesim fit --policy promoe"):
        check_policy(Stride)


@pytest.mark.parametrize("bad", [{"width": -1}, {"ops": -1}, {"queue": 0}])
def test_parameters_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"prefetch.{next(iter(bad))}="):
        Stride(**bad)  # type: ignore[arg-type]


# ---- the file ------------------------------------------------------------------------------------


def zipped(**changes: Any) -> Callable[[Predictor], bytes]:
    return lambda predictor: replace(predictor, **changes).to_bytes()


def renamed(predictor: Predictor, **changes: Any) -> bytes:
    """The file with other parts beside its own."""
    with np.load(io.BytesIO(predictor.to_bytes())) as stored:
        buffer = io.BytesIO()
        np.savez(buffer, **{**stored, **changes})
    return buffer.getvalue()


BAD: dict[str, tuple[Callable[[Predictor], bytes], str]] = {
    "empty": (lambda p: b"", "cannot be read"),
    "text": (lambda p: b"not an archive at all", "cannot be read"),
    "cut short": (lambda p: p.to_bytes()[:900], "cannot be read"),
    "another format": (lambda p: renamed(p, format="moesim stride 9"), "was not written by this"),
    "a part more": (lambda p: renamed(p, more=1), "lacks or holds too many parts"),
    "shape": (zipped(b1=np.zeros((3, 5), np.int64)), "w1 must be int64"),
    "floats": (zipped(w2=np.zeros((3, 8, 8))), "w2 must be int64"),
    "stride": (zipped(stride=0), "its sizes"),
    "kind": (zipped(kind="hidden"), "kind of input"),
    "scale": (zipped(scale=np.zeros(3, np.int64)), "scale and unit"),
    "large": (zipped(w1=np.full((3, 8, 8), 1 << 40)), "too large"),
    "prints": (zipped(requests=np.arange(3)), "fingerprint"),
    "pickle": (zipped(trace=np.array([{}], object)), "cannot be read"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_clear_line(what: str, tmp_path: Path) -> None:
    make, problem = BAD[what]
    path = tmp_path / "bad.npz"
    path.write_bytes(make(echo(LAYERS, EXPERTS)))
    with pytest.raises(UsageError, match=problem) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) and "moesim fit" in str(caught.value)


def test_a_damaged_file_is_refused_or_the_same(tmp_path: Path) -> None:
    """A bit anywhere: what the archive does not use may differ, nothing else."""
    path = tmp_path / "p.npz"
    whole = echo(LAYERS, EXPERTS).to_bytes()
    rng = np.random.default_rng(0)
    for at in rng.choice(len(whole), 300, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        try:
            path.write_bytes(bytes(damaged))
            assert load(path)[0].to_bytes() == whole
        except UsageError as error:
            assert str(error).startswith(f"prefetch.weights={path}: ")


def test_a_missing_file_and_another_archive(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.npz")
    with pytest.raises(UsageError, match="Is a directory"):
        load(tmp_path)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UsageError, match="was not written by this"):
        load(tmp_path / "other.npz")


def test_a_file_comes_back_as_it_was(fitted: tuple[Predictor, Any], tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    fitting.save(fitted[0], path)
    again, digest = load(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert again.to_bytes() == fitted[0].to_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_half_written_is_left(
    fitted: tuple[Predictor, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitting.save(fitted[0], tmp_path / "p.npz")
    assert list(tmp_path.iterdir()) == []


def test_the_digest_of_the_file_is_a_parameter(tmp_path: Path) -> None:
    """So that a run folder tells one fit from another under the same name."""
    one = Stride(weights=written(echo(LAYERS, EXPERTS), tmp_path)).digest
    other = Stride(weights=written(echo(LAYERS, EXPERTS, shift=1), tmp_path)).digest
    assert len({one, other}) == 2
    with pytest.raises(UsageError, match="is not the file of digest"):
        Stride(weights=str(tmp_path / "promoe.npz"), digest=one)


# ---- fitting -------------------------------------------------------------------------------------


def test_it_learns_what_there_is_to_learn(trace: Path) -> None:
    """A layer whose experts follow from those of two layers before, one apart from chance."""
    rng = np.random.default_rng(6)
    request = request_for(trace, history=1, epochs=40)
    parts = []
    for _ in range(2):
        seen = rng.permuted(np.tile(np.arange(EXPERTS), (1500, 1)), axis=1)[:, :2]
        made = fitting.Samples(prints={0: 0})
        hot = fitting._hot(seen, EXPERTS).astype(np.uint16) * (PROBABILITY_ONE // 2)
        made.inputs[1], made.chosen[1] = [hot], [(seen * 3 + 1) % EXPERTS]
        parts.append(made)
    meta = fitting._meta(request)
    nets = fitting._train(request, meta, parts[0], None)
    predictor = fitting._joined(request, meta, "experts", parts[0], nets)
    assert predictor.samples.tolist() == [0, 1500, 0]
    for made in parts:
        found = fitting.recall(predictor, made, 2, popular_of=parts[0])
        assert found["predictor"] > 0.99 and found["popular"] < 0.4


def test_a_fit_tells_what_it_is_worth(
    fitted: tuple[Predictor, dict[str, Any]], trace: Path
) -> None:
    predictor, told = fitted
    assert (predictor.kind, predictor.split) == ("gate", "7:3@0")
    assert set(told["recall"]) == {"train", "test"}
    assert told["recall"]["train"]["predictor"] > told["recall"]["train"]["popular"]
    assert 0 < told["requests"] == len(predictor.requests) < 20
    with TraceReader(trace) as reader:
        assert predictor.trace == reader.meta.digest
        share = Share(parse_split("7:3"), "train")
        assert [r.request for r in requests_of(reader, share)] == predictor.requests.tolist()


def test_the_same_seed_gives_the_same_file(trace: Path) -> None:
    files = [fitting.fit(request_for(trace, seed=s, epochs=1))[0].to_bytes() for s in (1, 1, 2)]
    assert files[0] == files[1] != files[2]


def test_recall_counts_what_was_named(trace: Path) -> None:
    """An echo's recall is the share of experts that the token chose two layers ago as well."""
    request = request_for(trace, split=None)
    meta = fitting._meta(request)
    made = fitting._samples(replace(request, history=1), meta, "experts", "train", None)
    wanted = [
        np.isin(row, np.flatnonzero(seen)).mean()
        for layer in made.inputs
        for seen, row in zip(*made.of(layer), strict=True)
    ]
    got = fitting.recall(echo(LAYERS, EXPERTS), made, 2, popular_of=made)
    assert got["predictor"] == pytest.approx(np.mean(wanted))


def code_of(*words: object) -> int:
    return main([str(w) for w in words])


def test_fit_then_replay(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.npz"
    fit = ("fit", "--policy", "promoe", "--trace", trace, "--out", out, "--epochs", 2)
    assert code_of(*fit, "--split", "7:3") == 0
    assert "next: moesim replay" in capsys.readouterr().out
    run = ("replay", "--trace", trace, "--policy", "promoe", "--set", f"prefetch.weights={out}")
    assert code_of(*run, "--split", "7:3", "--costs", "olmoe-1b-7b", "--json") == 0
    assert '"policy": "promoe"' in capsys.readouterr().out
    for engine in ("fast", "reference"):
        for split in ((), ("--split", "7:3@1")):
            assert code_of(*run, *split, "--engine", engine) == 2
            error = capsys.readouterr().err
            assert "was fitted on request" in error and "--split 7:3" in error
            assert error.count("\n") == 1


def test_a_fit_on_all_serves_another_trace_alone(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "p.npz", tmp_path / "other.parquet"
    assert code_of("fit", "--trace", trace, "--out", out, "--epochs", 1, "--json") == 0
    assert '"recall"' in capsys.readouterr().out
    run = ("replay", "--policy", "promoe", "--set", f"prefetch.weights={out}")
    assert code_of(*run, "--trace", trace) == 2
    assert "fit on a part of the trace" in capsys.readouterr().err
    shape = ("--layers", LAYERS, "--experts", EXPERTS, "--top-k", 2, "--gate", "full")
    sizes = ("--requests", 3, "--prompt-tokens", 4, "--output-tokens", 4, "--seed", 9)
    assert code_of("trace", "synth", other, *shape, *sizes) == 0
    assert code_of(*run, "--trace", other) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--out", "p.txt"), "must end in .npz"),
        (("--out", "none/p.npz"), "no folder none"),
        (("--stride", "5"), "the trace has 5 layers"),
        (("--hidden", "99999999"), "--hidden 99999999"),
        (("--split", "half"), "--split half"),
        (("--split", "marked"), "marked neither train nor test"),
        (("--trace", "none.parquet"), "no such file"),
        (("--limit", "0"), "whole number"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, str],
    told: str,
    trace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"--trace": str(trace), "--out": "p.npz", words[0]: words[1]}
    try:
        code = code_of("fit", *(w for pair in given.items() for w in pair))
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2 and not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_another_model_and_no_weights(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(echo(LAYERS + 1, EXPERTS), tmp_path)
    run = ("replay", "--trace", trace, "--policy", "promoe")
    for words, told in (
        (("--set", f"prefetch.weights={path}"), "was fitted for 6 layers of 8 experts"),
        ((), "moesim fit --policy promoe"),
        (("--set", "prefetch.weights=none.npz"), "No such file"),
    ):
        assert code_of(*run, *words) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


def test_input_that_the_trace_lacks(tmp_path: Path) -> None:
    path = tmp_path / "plain.parquet"
    synthesise(
        path,
        Synth(model=synth_model(None, 4, 6, 2), requests=2, prompt_tokens=2, output_tokens=2),
    )
    with pytest.raises(NotRunError, match="needs GATE"):
        fitting.fit(fitting.Request(path, kind="gate"))
    assert fitting.fit(fitting.Request(path, epochs=1))[0].kind == "weights"
    assert isinstance(fitting.fit(fitting.Request(path, epochs=1, kind="experts"))[0], Predictor)


def test_an_empty_part_is_told(trace: Path) -> None:
    with pytest.raises(MoesimError, match="leaves no request"):
        fitting.fit(request_for(trace, split=parse_split("1:9999")))
