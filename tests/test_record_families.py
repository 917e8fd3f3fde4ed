"""What is recorded of each family, against its gates written out by hand (`tiny_moe.oracle`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from moesim.errors import UsageError
from moesim.traces.batches import BatchRecorder, Encoded, Generation
from moesim.traces.gate_taps import GateTaps, Wanted
from moesim.traces.gates import Gates, find_gates
from moesim.traces.reader import RequestFacts, RequestRows
from moesim.traces.record_rows import by_weight
from moesim.traces.schema import DROPPED, PREFILL
from moesim.traces.scores import TOLERANCES, Score, explain
from tests import tiny_moe
from tests.tiny_moe import ASKED, Routed, oracle

LENGTHS = (11, 7, 4)
NEW = 6
OTHERS = ("dbrx", "llama4", "minimax_m2")
SCORES = {
    "mixtral": "softmax-renorm",
    "qwen2_moe": "softmax",
    "qwen3_moe": "softmax-renorm",
    "olmoe": "softmax",
    "phimoe": "sparsemixer",
    "deepseek_v2": "softmax",
    "deepseek_v2_groups": "softmax",
    "deepseek_v3": "sigmoid-bias-scale",
    "gpt_oss": "softmax-renorm",
    "granitemoe": "softmax-renorm",
    "glm4_moe": "sigmoid-bias-scale",
    "switch": "softmax",
    "dbrx": "softmax-renorm",
    "llama4": "sigmoid-bias-scale",
    "minimax_m2": "sigmoid-bias-scale",
}


def prompts(seed: int = 5) -> list[Encoded]:
    draw = np.random.default_rng(seed)
    return [
        Encoded(number, draw.integers(3, tiny_moe.VOCABULARY, n).astype(np.int32), RequestFacts())
        for number, n in enumerate(LENGTHS)
    ]


def recorded(model: Any, wanted: Wanted, batch: list[Encoded], **more: Any) -> list[RequestRows]:
    loaded = tiny_moe.Loaded("tiny", "", model, tiny_moe.tokenizer())
    gates = find_gates(model, batch[0].tokens.tolist())
    generation = Generation(max_new_tokens=NEW, min_new_tokens=NEW)
    with BatchRecorder(loaded, gates, wanted, generation, **more) as recorder:
        return recorder.record(batch)


# ---- every recorded value ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=(*ASKED, *OTHERS))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    return tiny_moe.build(family)


@pytest.fixture(scope="module")
def gates(model: Any) -> Gates:
    return find_gates(model, prompts()[0].tokens.tolist())


@pytest.fixture(scope="module")
def rows(model: Any) -> list[RequestRows]:
    wanted = Wanted(logits=True, ahead=(1, 2, 3), norms=True)
    return recorded(model, wanted, prompts(), embeddings="iteration")


@contextmanager
def inputs_of(blocks: list[Any]) -> Iterator[list[Any]]:
    """Collect what goes into the blocks, [tokens, hidden] each, in the order in which they run."""
    seen: list[Any] = []

    def hook(module: Any, args: Any) -> None:
        seen.append((module, args[0].detach().reshape(-1, args[0].shape[-1]).double().numpy()))

    handles = [block.register_forward_pre_hook(hook) for block in blocks]
    yield seen
    for handle in handles:
        handle.remove()


def alone(model: Any, gates: Gates, prompt: Encoded, fed: list[int]) -> list[tuple[Any, Any]]:
    """Run one sequence by itself in one pass, without padding or cache; the blocks' inputs."""
    ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
    with inputs_of([layer.block for layer in gates.layers]) as seen, torch.no_grad():
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id, *fed]
            model(input_ids=ids, decoder_input_ids=torch.tensor([start]))
        else:
            model(input_ids=torch.cat([ids, torch.tensor([fed])], dim=1).long())
    return seen


def layer_rows(rows: RequestRows, layer: int) -> Any:
    """Rows of one layer; they are in order of position."""
    return np.flatnonzero(rows.layer == layer)


def fed_tokens(rows: RequestRows, gates: Gates) -> list[int]:
    """The generated tokens that were run, from the trace."""
    last = max(i for i, layer in enumerate(gates.layers))
    first = next(i for i, la in enumerate(gates.layers) if la.stack == gates.layers[last].stack)
    at = (rows.layer == first) & (rows.iteration > 0)
    assert rows.token is not None
    tokens: list[int] = rows.token[at].tolist()
    return tokens


def same_choice(found: Any, expected: Routed, clear: Any) -> None:
    ids = np.where(expected.ids < 0, DROPPED, expected.ids)
    np.testing.assert_array_equal(found[clear], ids[clear])
    assert clear.mean() > 0.7


def test_every_value(family: str, model: Any, gates: Gates, rows: list[RequestRows]) -> None:
    for prompt, one in zip(prompts(), rows, strict=True):
        fed = fed_tokens(one, gates)
        assert len(fed) == NEW - 1
        for layer, (block, x) in enumerate(alone(model, gates, prompt, fed)):
            at = layer_rows(one, layer)
            expected = oracle(family, block, x)
            clear = expected.margin > 1e-4
            same_choice(one.experts[at], expected, clear)
            assert one.weights is not None and one.gate is not None
            assert one.input_norm is not None
            close(one.weights[at][clear], expected.weights[clear])
            close(one.gate[at], expected.logits)
            close(one.input_norm[at], np.linalg.norm(x, axis=1))


def close(found: Any, expected: Any) -> None:
    """Equal to float16, and to what the order of a sum may change in float32."""
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=2e-3, atol=2e-4)


def test_ahead(family: str, model: Any, gates: Gates, rows: list[RequestRows]) -> None:
    for prompt, one in zip(prompts(), rows, strict=True):
        inputs = alone(model, gates, prompt, fed_tokens(one, gates))
        for distance, predicted in one.ahead.items():
            for layer, (_, x) in enumerate(inputs):
                at = layer_rows(one, layer)
                target = layer + distance
                inside = target < len(gates.layers)
                if not inside or gates.layers[target].stack != gates.layers[layer].stack:
                    assert (predicted[at] == DROPPED).all()
                    continue
                expected = oracle(family, gates.layers[target].block, x)
                same_choice(predicted[at], expected, expected.margin > 1e-4)


def test_order_tokens_and_positions(gates: Gates, rows: list[RequestRows]) -> None:
    stacks = {name: len(layers) for name, layers in gates.stacks.items()}
    for prompt, one in zip(prompts(), rows, strict=True):
        assert one.token is not None
        expected: list[tuple[int, int, int, int]] = []
        tokens = prompt.tokens.tolist()
        encoder = stacks.get("encoder", 0)
        end = encoder + stacks["decoder"]
        prefill = range(encoder) if encoder else range(end)
        for layer in prefill:
            for i, t in enumerate(tokens):
                expected.append((0, layer, i, t if layer == 0 else -1))
        if encoder:
            expected += [
                (0, la, 0, tiny_moe.PAD if la == encoder else -1) for la in range(encoder, end)
            ]
        begin = 1 if encoder else len(tokens)
        for i, t in enumerate(fed_tokens(one, gates)):
            for layer in range(encoder, end):
                expected.append((i + 1, layer, begin + i, t if layer == encoder else -1))
        columns = (one.iteration, one.layer, one.position, one.token)
        assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected
        assert ((one.phase == PREFILL) == (one.iteration == 0)).all()
        assert one.facts.prompt_tokens == len(tokens) and one.facts.output_tokens == NEW


def test_embeddings(model: Any, gates: Gates, rows: list[RequestRows]) -> None:
    table = model.get_input_embeddings().weight.detach().double().numpy()
    for prompt, one in zip(prompts(), rows, strict=True):
        fed = fed_tokens(one, gates)
        assert sorted(one.embedding) == list(range(len(fed) + 1))
        close(one.embedding[0], table[prompt.tokens].mean(axis=0))
        for iteration, token in enumerate(fed, start=1):
            close(one.embedding[iteration], table[token])


def test_generates_what_transformers_does(
    family: str, model: Any, gates: Gates, rows: list[RequestRows]
) -> None:
    for prompt, one in zip(prompts(), rows, strict=True):
        ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=tiny_moe.PAD,
            eos_token_id=tiny_moe.EOS,
        )
        begin = 1 if model.config.is_encoder_decoder else len(prompt.tokens)
        assert out[0, begin:].tolist()[: NEW - 1] == fed_tokens(one, gates)


def test_score(family: str, gates: Gates) -> None:
    assert gates.score.kind == SCORES[family]


def test_scale_and_normalisation_are_told() -> None:
    for name, words in {
        "deepseek_v3": ("sigmoid", "renormalised over the chosen", "times 2.5", "bias"),
        "deepseek_v2_groups": ("softmax", "not renormalised", "times 16"),
        "glm4_moe": ("sigmoid", "renormalised over the chosen", "times 1.5", "bias"),
        "olmoe": ("softmax", "not renormalised"),
    }.items():
        told = find_gates(tiny_moe.build(name), [5, 6, 7]).score.in_words()
        assert all(word in told for word in words), told


# ---- the probe's control -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_distance_0_the_prediction_is_the_truth(family: str, dtype: torch.dtype) -> None:
    """No tolerance: the gate applied to its own input chooses what it chose, ties included."""
    passes = control(tiny_moe.build(family, dtype=dtype))
    assert passes == NEW + ("switch" in family)


def test_at_distance_0_drops_are_the_true_ones() -> None:
    assert control(tiny_moe.build("switch_tight")) == NEW + 1


def control(model: Any) -> int:
    """Compare ahead 0 with the truth over a whole batch; the number of passes compared."""
    batch = prompts()
    gates = find_gates(model, batch[0].tokens.tolist())
    loaded = tiny_moe.Loaded("tiny", "", model, tiny_moe.tokenizer())
    with GateTaps(gates, Wanted(ahead=(0, 1))) as taps:
        generation = Generation(max_new_tokens=NEW, min_new_tokens=NEW)
        BatchRecorder(loaded, gates, Wanted(), generation).generate(batch)
        passes = taps.take()
    for one in passes:
        ids, weights = one.ahead[0]
        k = gates.top_k
        true = by_weight(one.ids.reshape(-1, k), one.weights.reshape(-1, k))[0]
        found = by_weight(ids.reshape(-1, k), weights.reshape(-1, k))[0]
        np.testing.assert_array_equal(found, true)
    return sum(one.ids.shape[0] for one in passes)


# ---- capacity ------------------------------------------------------------------------------------


def test_tokens_beyond_an_experts_capacity_are_dropped() -> None:
    model = tiny_moe.build("switch_tight")
    batch = prompts()
    gates = find_gates(model, batch[0].tokens.tolist())
    rows = recorded(model, Wanted(logits=True, ahead=(1,)), batch)
    if not _drops(model):
        pytest.skip("this release of transformers never drops")
    assert sum(int((one.experts == DROPPED).sum()) for one in rows) > 0
    for prompt, one in zip(batch, rows, strict=True):
        assert one.weights is not None
        assert (one.weights[one.experts == DROPPED] == 0).all()
        ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
        with inputs_of([layer.block for layer in gates.layers]) as seen, torch.no_grad():
            model.get_encoder()(input_ids=ids)
        for layer, (block, x) in enumerate(seen):
            expected = oracle("switch", block, x)
            at = layer_rows(one, layer)
            same_choice(one.experts[at], expected, expected.margin > 1e-4)


def _drops(model: Any) -> bool:
    """Whether this release of transformers counts capacity over a sequence (5.17 does not)."""
    layer = next(m for m in model.modules() if type(m).__name__.endswith("Top1Router"))
    out = layer(torch.ones(1, 9, 32))
    mask = next(o for o in out if not o.is_floating_point())
    return int(mask.sum()) < 9


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama", ("LlamaForCausalLM", "not a Mixture-of-Experts model")),
        ("jetmoe", ("JetMoeForCausalLM", "JetMoeTopKGating", "not understood")),
        ("nllb_moe", ("NllbMoeForConditionalGeneration", "NllbMoeTop2Router", "not understood")),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        find_gates(tiny_moe.build(name), [5, 6, 7])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_hooks_leave_nothing_behind(model: Any, gates: Gates) -> None:
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with GateTaps(gates, Wanted(logits=True, ahead=(1,), norms=True)):
        pass
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert before == after


# ---- explaining weights --------------------------------------------------------------------------


def test_a_router_without_spread_is_still_explained() -> None:
    """Fresh weights give nearly equal scores, which two functions explain: the plainer is taken."""
    model = tiny_moe.build("olmoe")
    for layer in find_gates(model, [5, 6, 7]).layers:
        layer.router.weight.data *= 0
    score = find_gates(model, [5, 6, 7]).score
    assert (score.kind, score.renormalised, score.scale) == ("softmax", False, 1.0)


def test_what_explains_every_layer_is_taken() -> None:
    """One layer alone may allow more than one explanation."""
    model = tiny_moe.build("deepseek_v3")
    find_gates(model, [5, 6, 7]).layers[0].router.weight.data *= 0
    gates = find_gates(model, [5, 6, 7])
    assert len(gates.layers[0].scores) > 1
    assert (gates.score.kind, gates.score.scale) == ("sigmoid-bias-scale", 2.5)


def test_weights_that_nothing_explains_are_recorded_all_the_same() -> None:
    draw = np.random.default_rng(0)
    logits, ids = draw.normal(size=(9, 8)), np.argsort(draw.normal(size=(9, 8)))[:, :2]
    assert explain(logits, ids, draw.random((9, 2))) == ()
    assert "no known score function" in Score("unknown").in_words()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scale_is_the_routers_own(dtype: str) -> None:
    """Rounding moves what is measured; near what the router says, its word counts."""
    draw = np.random.default_rng(1)
    logits, ids = draw.normal(size=(13, 8)), np.tile(np.arange(2), (13, 1))
    scores = 1 / (1 + np.exp(-logits[:, :2]))
    weights = scores / scores.sum(1, keepdims=True) * 2.5
    noise = TOLERANCES[dtype] / 2
    weights *= 1 + draw.uniform(-noise, noise, weights.shape)
    (found,) = explain(logits, ids, weights, tolerance=2 * noise, biased=True, factor=2.5)
    assert (found.scale, found.renormalised) == (2.5, True)
