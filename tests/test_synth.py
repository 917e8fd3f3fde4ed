"""Synthetic traces: every knob does what it says, and nothing else moves."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli.trace_make import add_convert, add_synth
from moesim.errors import UsageError
from moesim.profile import ModelProfile, load_model
from moesim.traces import synth
from moesim.traces.check import check_file
from moesim.traces.reader import RequestRows, TraceReader, gate_probabilities
from moesim.traces.schema import DROPPED
from moesim.traces.synth import Synth, synth_model, synth_requests, synthesise

LAYERS, EXPERTS, K = 3, 16, 2
PLAIN = Synth(
    model=synth_model(None, LAYERS, EXPERTS, K),
    requests=24,
    prompt_tokens=0,
    output_tokens=120,
    skew=0,
    overlap=0,
    topics=1,
    topic_strength=0,
    cross_layer=0,
)
"""No structure at all: every choice is uniform and independent."""


def cells(rows: RequestRows) -> Any:
    """Experts [tokens, layers, k] of a request that only decodes."""
    return rows.experts.reshape(-1, LAYERS, K)


def overlap(options: Synth) -> float:
    """Mean share of a token's experts that the token before it had, in the same layer."""
    shares = []
    for rows in synth_requests(options):
        now, before = cells(rows)[1:], cells(rows)[:-1]
        shares.append((now[..., :, None] == before[..., None, :]).any(-1).mean())
    return float(np.mean(shares))


def loads(options: Synth) -> Any:
    """Share of each expert in all choices, [layers, experts]."""
    counts = np.zeros((LAYERS, EXPERTS))
    for rows in synth_requests(options):
        for layer in range(LAYERS):
            counts[layer] += np.bincount(cells(rows)[:, layer].ravel(), minlength=EXPERTS)
    return counts / counts.sum(axis=1, keepdims=True)


def adjacent_information(options: Synth) -> float:
    """Mutual information, in bits, between the first choices of layers 0 and 1."""
    joint = np.zeros((EXPERTS, EXPERTS))
    for rows in synth_requests(options):
        np.add.at(joint, (cells(rows)[:, 0, 0], cells(rows)[:, 1, 0]), 1)
    joint /= joint.sum()
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / outer[there])).sum())


def topic_distance(options: Synth) -> float:
    """Mean Jensen-Shannon distance, in bits, between the loads of two topics."""
    counts: dict[str | None, Any] = {}
    for rows in synth_requests(options):
        mine = counts.setdefault(rows.facts.topic, np.ones(EXPERTS))
        mine += np.bincount(cells(rows)[:, 0].ravel(), minlength=EXPERTS)
    shares = [count / count.sum() for count in counts.values()]
    assert len(shares) == 2

    def entropy(p: Any) -> float:
        return float(-(p * np.log2(p)).sum())

    one, other = shares
    return entropy((one + other) / 2) - (entropy(one) + entropy(other)) / 2


def rises(values: list[float], least: float) -> bool:
    return all(after > before + least for before, after in pairwise(values))


# ---- the knobs -----------------------------------------------------------------------------------


def test_overlap_rises_from_chance_to_one() -> None:
    found = [overlap(replace(PLAIN, overlap=p)) for p in (0, 0.5, 0.9, 0.99, 1)]
    assert rises(found, 0.05)
    assert found[0] == pytest.approx(K / EXPERTS, abs=0.01)
    assert found[-1] == 1


def test_skew_concentrates_popularity() -> None:
    def concentration(options: Synth) -> float:
        return float((loads(options) ** 2).sum(axis=1).mean() * EXPERTS)

    found = [concentration(replace(PLAIN, skew=s)) for s in (0, 0.5, 1, 2)]
    assert rises(found, 0.05)
    assert found[0] == pytest.approx(1, abs=0.02)


def test_first_choices_follow_zipf() -> None:
    model = synth_model(None, LAYERS, EXPERTS, 1)
    options = replace(PLAIN, model=model, skew=1.0, requests=60, output_tokens=200)
    counts = np.zeros((LAYERS, EXPERTS))
    for rows in synth_requests(options):
        np.add.at(counts, (rows.layer, rows.experts[:, 0]), 1)
    want = 1 / np.arange(1, EXPERTS + 1)
    want *= counts[0].sum() / want.sum()
    ranked = -np.sort(-counts, axis=1)
    chi2 = ((ranked - want) ** 2 / want).sum(axis=1)
    assert (chi2 < 40).all()  # 15 degrees of freedom: 40 is p = 0.0005


def test_layers_share_what_cross_layer_says() -> None:
    found = [adjacent_information(replace(PLAIN, cross_layer=c)) for c in (0, 0.4, 0.8, 1)]
    assert rises(found, 0.05)
    assert found[0] < 0.1
    assert found[-1] > np.log2(EXPERTS) - 0.05  # layer 0 tells layer 1 wholly


def test_topics_differ_as_strength_says() -> None:
    base = replace(PLAIN, topics=2)
    found = [topic_distance(replace(base, topic_strength=s)) for s in (0, 0.5, 1, 2)]
    assert rises(found, 0.02)
    assert found[0] < 0.01


@pytest.mark.parametrize("recall", [0.0, 0.3, 0.8, 1.0])
def test_predictions_have_the_stated_recall(recall: float) -> None:
    options = replace(PLAIN, ahead=(1, 2), recall=recall, prompt_tokens=20, output_tokens=50)
    hits: list[float] = []
    for rows in synth_requests(options):
        truth = {
            (i, layer, p): set(e)
            for i, layer, p, e in zip(
                rows.iteration.tolist(),
                rows.layer.tolist(),
                rows.position.tolist(),
                rows.experts.tolist(),
                strict=True,
            )
        }
        for distance, predicted in rows.ahead.items():
            for key, chosen in zip(truth, predicted.tolist(), strict=True):
                i, layer, p = key
                if layer + distance >= LAYERS:
                    assert chosen == [DROPPED] * K
                    continue
                assert len(set(chosen)) == K
                hits.append(len(set(chosen) & truth[i, layer + distance, p]) / K)
    assert float(np.mean(hits)) == pytest.approx(recall, abs=0.0 if recall in (0, 1) else 0.02)


def test_embeddings_tell_the_topic() -> None:
    options = replace(PLAIN, topics=4, embedding=64, requests=40, output_tokens=3)
    vectors, topics = [], []
    for rows in synth_requests(options):
        assert sorted(rows.embedding) == [1, 2, 3]
        vectors += [
            v.astype(float) / np.linalg.norm(v.astype(float)) for v in rows.embedding.values()
        ]
        topics += [rows.facts.topic] * 3
    likeness = np.array(vectors) @ np.array(vectors).T
    request = np.arange(len(topics)) // 3
    same = np.array(topics)[:, None] == np.array(topics)[None, :]
    other_request = request[:, None] != request[None, :]
    assert likeness[same & other_request].mean() > likeness[~same].mean() + 0.3
    nearest = np.where(other_request, likeness, -2).argmax(axis=1)
    assert (np.array(topics)[nearest] == np.array(topics)).mean() > 0.95


# ---- gates and weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("score", synth.SCORES)
def test_gate_experts_and_weights_agree(score: str, tmp_path: Path) -> None:
    model = replace(PLAIN.model, score=score)
    options = replace(
        PLAIN, model=model, gate=True, skew=0.7, overlap=0.6, requests=4, prompt_tokens=9
    )
    meta = synthesise(tmp_path / "t.parquet", options)
    assert meta.score == score
    with TraceReader(tmp_path / "t.parquet") as reader:
        for rows in reader.requests():
            assert rows.gate is not None
            assert rows.weights is not None
            logits = rows.gate.astype(np.float64)
            order = np.argsort(-logits, axis=1, kind="stable")[:, :K]
            assert order.tolist() == rows.experts.tolist()
            chosen = np.take_along_axis(logits, order, 1)
            odds, all_odds = np.exp(chosen), np.exp(logits)
            gates = 1 / (1 + np.exp(-chosen))
            want = {
                "softmax": odds / all_odds.sum(1, keepdims=True),
                "sigmoid-bias-scale": gates / gates.sum(1, keepdims=True),
            }.get(score, odds / odds.sum(1, keepdims=True))
            assert np.abs(rows.weights.astype(float) - want).max() < 1e-3
            if score == "softmax":
                probable = np.take_along_axis(gate_probabilities(rows.gate, meta), order, 1)
                assert np.abs(rows.weights.astype(float) - probable).max() < 1e-3


def test_gate_column_changes_no_choice() -> None:
    with_gate = synth_requests(replace(PLAIN, gate=True, requests=2))
    for one, other in zip(with_gate, synth_requests(replace(PLAIN, requests=2)), strict=True):
        assert one.experts.tolist() == other.experts.tolist()
        assert one.weights.tolist() == other.weights.tolist()  # type: ignore[union-attr]


# ---- streams -------------------------------------------------------------------------------------

RICH = replace(
    PLAIN,
    skew=0.5,
    overlap=0.7,
    topics=3,
    topic_strength=1,
    cross_layer=0.3,
    gate=True,
    ahead=(1,),
    recall=0.7,
    embedding=8,
    prompt_tokens=11,
    output_tokens=6,
    requests=5,
)


def same_rows(one: RequestRows, other: RequestRows) -> bool:
    names = ("iteration", "position", "layer", "phase", "experts", "weights", "gate", "starts")
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
        and all(np.array_equal(one.ahead[d], other.ahead[d]) for d in one.ahead)
        and all(np.array_equal(one.embedding[i], other.embedding[i]) for i in one.embedding)
        and one.facts == other.facts
    )


def test_head_of_a_longer_trace_is_the_shorter_trace() -> None:
    longer = list(synth_requests(replace(RICH, requests=9)))
    for short, long in zip(synth_requests(RICH), longer[: RICH.requests], strict=True):
        assert same_rows(short, replace(long, facts=short.facts))


def test_more_output_only_adds_rows() -> None:
    plain = replace(RICH, ahead=(), embedding=0)
    longer = synth_requests(replace(plain, output_tokens=30))
    for short, long in zip(synth_requests(plain), longer, strict=True):
        assert short.experts.tolist() == long.experts[: short.rows].tolist()
        assert short.iteration.tolist() == long.iteration[: short.rows].tolist()


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(synth_requests(RICH))
    monkeypatch.setattr(synth, "_CHUNK_VALUES", 1)
    for one, other in zip(synth_requests(RICH), whole, strict=True):
        assert same_rows(one, replace(other, facts=one.facts))


def test_compiled_kernels_equal_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(RICH, requests=2)
    compiled = list(synth_requests(small))
    for name in ("logits", "largest", "mistake"):
        monkeypatch.setattr(synth, f"_{name.upper()}", getattr(synth, f"_{name}"))
    for one, other in zip(synth_requests(small), compiled, strict=True):
        assert same_rows(one, replace(other, facts=one.facts))


def test_file_holds_every_law_and_repeats(tmp_path: Path) -> None:
    meta = synthesise(tmp_path / "a.parquet", RICH)
    assert check_file(tmp_path / "a.parquet").meta == meta
    assert meta.phases == ("prefill", "decode")
    assert meta.requests == RICH.requests
    assert meta.tokens == RICH.requests * RICH.tokens == RICH.requests * (11 + 5)
    assert synthesise(tmp_path / "b.parquet", RICH).digest == meta.digest
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert synthesise(tmp_path / "b.parquet", replace(RICH, seed=1)).digest != meta.digest


def test_overlap_law_of_check_holds(tmp_path: Path) -> None:
    synthesise(tmp_path / "a.parquet", replace(PLAIN, overlap=0.8))
    assert check_file(tmp_path / "a.parquet").warnings == ()


def test_encoder_decoder_model(tmp_path: Path) -> None:
    model = load_model("switch-base-8")
    encoder = model.stacks[0].layers
    options = replace(RICH, model=model, ahead=(1, 2))
    meta = synthesise(tmp_path / "a.parquet", options)
    assert check_file(tmp_path / "a.parquet").meta == meta
    rows = next(synth_requests(options))
    prefill = rows.iteration == 0
    assert (rows.layer[~prefill] >= encoder).all()
    assert (prefill & (rows.layer == 0)).sum() == options.prompt_tokens
    assert (prefill & (rows.layer == encoder)).sum() == 1
    assert rows.starts.tolist()[1] == options.prompt_tokens * encoder + model.layers - encoder
    assert len(rows.starts) - 1 == options.output_tokens


def test_model_gives_shape_and_score(tmp_path: Path) -> None:
    mixtral = load_model("mixtral-8x7b")
    meta = synthesise(
        tmp_path / "a.parquet",
        Synth(synth_model(mixtral, None, 8, None), requests=1, prompt_tokens=2, output_tokens=1),
    )
    assert meta.model == mixtral
    assert meta.phases == ("prefill",)
    assert meta.rows == 2 * mixtral.layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": 0}, "--requests 0"),
        ({"overlap": 1.5}, "--overlap 1.5"),
        ({"overlap": float("nan")}, "--overlap nan"),
        ({"skew": -1}, "--skew -1"),
        ({"cross_layer": 2}, "--cross-layer 2"),
        ({"topics": 0}, "--topics 0"),
        ({"topic_strength": float("inf")}, "--topic-strength inf"),
        ({"recall": -0.1, "ahead": (1,)}, "--recall -0.1"),
        ({"ahead": (0,)}, "--ahead 0"),
        ({"embedding": -1}, "--embeddings -1"),
        ({"seed": -1}, "--seed -1"),
        ({"output_tokens": 0}, "leave no token"),
        ({"ahead": (1,), "model": ModelProfile.generic(2, 3, 2)}, "twice as many experts"),
        ({"model": load_model("switch-base-8")}, "needs a prompt"),
    ],
)
def test_impossible_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(PLAIN, **change)


def test_impossible_shapes() -> None:
    with pytest.raises(UsageError, match="give --experts, --top-k, or a --model"):
        synth_model(None, 3, None, None)
    with pytest.raises(UsageError, match="--layers"):
        synth_model(None, 3, 2, 4)
    with pytest.raises(UsageError, match="--experts 9: model mixtral-8x7b has 8"):
        synth_model(load_model("mixtral-8x7b"), None, 9, None)


# ---- the command line ----------------------------------------------------------------------------


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    add_convert(commands)
    add_synth(commands)
    args = parser.parse_args(words)
    code: int = args.func(args)
    return code


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "a.parquet")
    sizes = ["--requests=2", "--prompt-tokens=3", "--output-tokens=2", "--model=mixtral-8x7b"]
    knobs = ["--gate=full", "--ahead=1,2", "--recall=0.9", "--embeddings", "--skew=1", "--seed=3"]
    assert run("synth", target, *sizes, *knobs, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["requests"], told["tokens"]) == (2, 8)
    with TraceReader(target) as reader:
        meta = reader.meta
    assert (meta.digest, meta.has_gate, dict(meta.ahead)) == (told["digest"], True, {1: 2, 2: 2})
    assert meta.embedding == "iteration"

    source = tmp_path / "a.npz"
    np.savez(source, experts=np.arange(12).reshape(3, 2, 2) % 7)
    assert run("convert", str(source), target, "--phase=decode", "--experts=9") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{target}: 1 requests, 3 tokens, 6 rows (decode), digest ")
    with pytest.raises(UsageError, match="--ahead x"):
        run("synth", target, *sizes, "--ahead=x")


def test_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, moesim.cli.trace_make; "
        "print([m for m in ('numba', 'pyarrow', 'torch', 'pandas', 'rich') if m in sys.modules])"
    )
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
