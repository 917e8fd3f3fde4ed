"""Training on tiny shapes: it depends on the seed alone, and goes on after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from moesim.errors import UsageError  # noqa: E402
from moesim.traces import demo_measure, demo_pairs, demo_report, demo_shapes, demo_tokens  # noqa: E402
from moesim.traces.demo_shapes import Shape, build  # noqa: E402
from moesim.traces.demo_text import Documents  # noqa: E402
from moesim.traces.demo_train import Plan, _router_losses, rate_at, router_logits, train  # noqa: E402

TINY = {
    "olmoe": Shape("tiny", "olmoe", 16, 2, 6, 2, 8, heads=2),
    "mixtral": Shape("tiny", "mixtral", 16, 2, 4, 2, 8, heads=2),
    "qwen2_moe": Shape("tiny", "qwen2_moe", 16, 2, 6, 2, 8, shared_d_ff=16, heads=2),
    "switch": Shape("tiny", "switch", 16, 2, 4, 1, 8, heads=2),
}
PLAN = Plan(steps=6, step_tokens=64, warmup_steps=2, save_every_steps=3)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def windows(step: int) -> dict[str, Any]:
    rng = np.random.default_rng((1, step))
    ids = torch.from_numpy(rng.integers(3, 200, (4, 16)))
    return {"input_ids": ids, "labels": ids}


def pairs(step: int) -> dict[str, Any]:
    rng = np.random.default_rng((2, step))
    texts = np.zeros((4, 12), np.uint16)
    summaries = np.zeros((4, 5), np.uint16)
    texts[:, :9] = rng.integers(3, 200, (4, 9))
    summaries[:, :3] = rng.integers(3, 200, (4, 3))
    return demo_pairs.arguments(demo_pairs.Pairs(texts, summaries))


def weights(run: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("family", TINY)
def test_a_stopped_run_ends_as_an_unbroken_one(family: str, tmp_path: Path) -> None:
    shape, batches = TINY[family], pairs if family == "switch" else windows
    # The rate does not depend on the total until it decays: here, never.
    plan = replace(PLAN, decay_share=1e-9)
    one = weights(train(shape, plan, batches, tmp_path / "a", "corpus", "cpu"))
    train(shape, replace(plan, steps=3), batches, tmp_path / "b", "corpus", "cpu")
    two = weights(train(shape, plan, batches, tmp_path / "b", "corpus", "cpu"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", TINY)
def test_training_teaches_every_router(family: str, tmp_path: Path) -> None:
    shape, batches = TINY[family], pairs if family == "switch" else windows
    run = train(shape, PLAN, batches, tmp_path, "corpus", "cpu")
    before = build(shape, PLAN.seed).state_dict()
    for name, after in run.model.state_dict().items():
        if "gate." in name or "router" in name:
            assert not torch.equal(before[name], after), name


def test_another_corpus_does_not_go_on(tmp_path: Path) -> None:
    train(TINY["olmoe"], replace(PLAN, steps=1), windows, tmp_path, "corpus", "cpu")
    with pytest.raises(UsageError, match="another shape, plan or corpus; name another --work"):
        train(TINY["olmoe"], PLAN, windows, tmp_path, "other", "cpu")


def test_another_total_changes_nothing_before_the_decay() -> None:
    short, long = Plan(steps=100, step_tokens=1), Plan(steps=200, step_tokens=1)
    assert all(rate_at(short, step) == rate_at(long, step) for step in range(70))
    assert rate_at(short, 99) == pytest.approx(short.rate * (1 - 0.95 * 29 / 30))
    assert rate_at(long, 0) == long.rate / long.warmup_steps


@pytest.mark.parametrize("family", TINY)
def test_the_routers_are_all_seen_in_order(family: str) -> None:
    shape = TINY[family]
    model = build(shape, 0)
    batch = (pairs if family == "switch" else windows)(0)
    with router_logits(model) as seen, torch.no_grad():
        model(**batch)
    assert len(seen) == shape.layers
    assert all(logits.shape[-1] == shape.experts for logits in seen)
    assert not any(m._forward_hooks for m in model.modules())


def test_one_head_of_each_encoder_layer_starts_at_the_token_before() -> None:
    model = build(TINY["switch"], 0)
    ids = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model.get_encoder()(input_ids=ids, output_attentions=True).attentions
    for attention in layers:
        before = attention.diagonal(offset=-1, dim1=-2, dim2=-1).mean((0, 2))
        assert before[0] > 0.8
        assert (before[1:] < 0.2).all()


def test_the_balance_is_one_where_the_load_is_even() -> None:
    shape = TINY["mixtral"]
    # Each of the four tokens prefers another pair; all pairs together load evenly.
    logits = torch.tensor([[9.0, 8, 0, 0], [0, 9, 8, 0], [0, 0, 9, 8], [8, 0, 0, 9]])
    even, _ = _router_losses([logits], shape, {})
    lopsided, _ = _router_losses([logits[:1].repeat(4, 1)], shape, {})
    assert float(even) == pytest.approx(1.0)
    assert float(lopsided) == pytest.approx(2.0, rel=1e-2)


def test_padding_does_not_count_in_the_balance() -> None:
    shape, batch = TINY["switch"], pairs(0)
    gate = torch.randn(4, 12, 4, generator=torch.Generator().manual_seed(0))
    spoilt = gate.clone()
    spoilt[:, 9:] = 50.0
    for one, two in zip(
        _router_losses([gate], shape, batch), _router_losses([spoilt], shape, batch), strict=True
    ):
        assert float(one) == float(two)


def test_measures_against_their_definitions() -> None:
    shape = TINY["olmoe"]
    model = build(shape, 3)
    held = {"a": windows(0), "b": windows(1)}
    measured = demo_measure.measure(model, shape, held)
    with torch.no_grad(), router_logits(model) as seen:
        losses = [float(model(**batch).loss) for batch in held.values()]
    assert list(measured.loss.values()) == pytest.approx(losses)
    first = torch.stack([seen[0], seen[shape.layers]])
    probabilities = first.softmax(-1).double()
    chosen = np.zeros((2, 64, shape.experts))
    np.put_along_axis(chosen, probabilities.topk(2, -1).indices.numpy(), 1.0, -1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean() / np.log(shape.experts)
    layer = measured.layers[0]
    assert layer.gate_entropy == pytest.approx(float(entropy), rel=1e-5)
    rows = chosen.reshape(2, 4, 16, -1)
    assert layer.overlap == pytest.approx((rows[:, :, 1:] * rows[:, :, :-1]).sum(-1).mean() / 2)
    load = chosen.mean((0, 1))
    assert layer.largest_load == pytest.approx(load.max() / load.mean())
    joint = chosen.sum(1) / chosen.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    bits = np.where(joint > 0, joint * np.log2(np.where(joint > 0, joint, 1) / apart), 0).sum()
    assert layer.topic_bits == pytest.approx(bits)
    assert layer.between_topics_bits == pytest.approx(bits)


def test_divergence_bounds() -> None:
    apart = np.eye(4)
    assert demo_measure.divergence_bits(apart) == pytest.approx(2.0)
    alike = demo_measure.divergence_bits(np.full((3, 5), 0.2))
    assert alike == pytest.approx(0.0, abs=1e-12)


def test_windows_depend_on_the_key_alone() -> None:
    streams = {"a": np.arange(100, dtype=np.uint16), "b": np.arange(500, 700, dtype=np.uint16)}
    one = demo_tokens.windows(streams, 8, 10, (0, 3))
    assert (one == demo_tokens.windows(streams, 8, 10, (0, 3))).all()
    assert (one != demo_tokens.windows(streams, 8, 10, (0, 4))).any()
    assert (np.diff(one, axis=1) == 1).all()
    assert {bool(first >= 500) for first in one[:, 0]} == {False, True}


def test_tokens_come_back_from_the_file(tmp_path: Path) -> None:
    documents = {"a": Documents(["hello world " * 30, "über Größe " * 20], ["hello there " * 9])}
    tokenizer = demo_tokens.make_tokenizer(documents, vocabulary=300)
    tokens = demo_tokens.tokenize(tokenizer, documents)
    demo_tokens.save(tokens, tmp_path / "tokens.safetensors")
    again = demo_tokens.load(tmp_path / "tokens.safetensors")
    assert (again.train["a"] == tokens.train["a"]).all()
    assert tokens.train["a"][0] == demo_shapes.BOS
    assert tokens.train["a"][-1] == demo_shapes.EOS
    assert (tokens.train["a"] == demo_shapes.EOS).sum() == 2
    text = tokenizer.decode(tokens.held["a"], skip_special_tokens=True)
    assert text == documents["a"].held[0]


def test_missing_tokens_and_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokens yet; run .* prepare"):
        demo_tokens.load(tmp_path / "tokens.safetensors")
    with pytest.raises(UsageError, match=r"no weights there; run .* train demo"):
        demo_report.load_model(tmp_path, demo_shapes.shape_of("demo"))
    with pytest.raises(UsageError, match="no such demo model; there are demo,"):
        demo_shapes.shape_of("other")


def test_laws_say_what_was_found() -> None:
    routing = {
        "topic_bits": 0.3,
        "gate_entropy": 0.9,
        "between_topics_bits": 0.2,
        "within_topic_bits": 0.01,
        "worst_load": 7.0,
        "dead_experts": 0,
    }
    untrained = {**routing, "topic_bits": 0.1, "gate_entropy": 0.99}
    report = {
        "routing": {"trained": routing, "untrained": untrained},
        "dense_loss": {"a": 2.0},
        "mean_loss": 1.9,
    }
    laws = demo_report.laws(report)
    assert {name for name, law in laws.items() if not law["holds"]} == {"largest load, times mean"}
    assert json.dumps(laws)
