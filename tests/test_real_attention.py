"""Attention over the cache: what a plain softmax over whole sequences gives, whatever the cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
import torch

from moesim.profile import ModelProfile, list_models, load_model
from moesim.real.attention import Cache, Heads, _attend, heads_of
from moesim.real.kernels import DenseParts, Inputs, said_of
from moesim.real.memory import Fit, Needs
from moesim.workload import Row

CPU = torch.device("cpu")


def plainly(one: Heads, asked: torch.Tensor) -> torch.Tensor:
    """A whole sequence at once in float64: [queries, tokens, size]."""
    split = asked.double().unflatten(1, (-1, one.size)).transpose(0, 1)
    queries = split[: one.queries]
    keys, values = split[one.queries :].unflatten(0, (2, -1))
    groups = one.queries // one.kept
    keys, values = (part.repeat_interleave(groups, dim=0) for part in (keys, values))
    scores = queries @ keys.transpose(1, 2) * one.size**-0.5
    behind = torch.arange(len(asked))[:, None] - torch.arange(len(asked))
    hidden = (behind < 0) | ((behind >= one.window) if one.window else False)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values


@given(
    kept=st.integers(1, 3), groups=st.integers(1, 3), size=st.integers(1, 5),
    window=st.integers(0, 6), cuts=st.lists(st.integers(1, 7), min_size=1, max_size=5),
)  # fmt: skip
def test_any_cut_of_a_sequence_attends_alike(
    kept: int, groups: int, size: int, window: int, cuts: list[int]
) -> None:
    """Prefill, chunks and single tokens over the cache: the same as all at once."""
    one = Heads(kept * groups, kept, size, window, False)
    total = sum(cuts)
    asked = torch.randn(total, one.asked, generator=torch.Generator().manual_seed(total))
    held = torch.zeros(2, kept, total + 2, size)
    ends = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    made = [_attend(one, held, asked[a:b], b) for a, b in pairwise(ends)]
    torch.testing.assert_close(
        torch.cat(made, dim=1).double(), plainly(one, asked), atol=1e-5, rtol=1e-4
    )


def test_every_request_has_a_place_of_its_own() -> None:
    """Requests that come and go never write into another's keys."""
    one = Heads(2, 1, 3, 0, False)
    cache = Cache([one], 2, 4, torch.float32, CPU)
    asked = torch.randn(2, one.asked)
    cache.attend(0, asked, [Row(5, 1, 1), Row(7, 1, 1)])
    first = cache._layers[0]
    assert first is not None
    before = first.clone()
    cache.attend(0, torch.randn(1, one.asked), [Row(7, 1, 2)])
    place = cache._places[7]
    assert torch.equal(first[1 - place], before[1 - place])
    assert torch.equal(first[place, :, :, 0], before[place, :, :, 0])
    cache.attend(0, torch.randn(2, one.asked), [Row(9, 1, 1), Row(7, 1, 3)])
    assert cache._places == {7: place, 9: 1 - place}


@pytest.mark.parametrize("name", list_models())
def test_a_cache_takes_the_bytes_of_the_profile(name: str) -> None:
    """In its own type and in another; the configuration's heads where it names them."""
    model = load_model(name)
    config = dict(model.config)
    for itemsize in (2, 4):
        heads = [heads_of(model, layer, itemsize) for layer in range(model.layers)]
        for one, nbytes in zip(heads, model.kv_bytes_table().tolist(), strict=True):
            assert (one is None) == (nbytes == 0)
            if one is not None:
                assert 2 * one.kept * one.size * itemsize == nbytes
                assert one.queries % one.kept == 0
    own = heads_of(model, model.layers - 1, 4 if model.dtype == "fp32" else 2)
    assert own is not None
    if "num_key_value_heads" in config:
        assert not own.derived
        assert (own.queries, own.kept, own.size) == (
            config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        )  # fmt: skip
    assert own.derived == ("kv_lora_rank" in config)


def test_what_no_configuration_says_follows_from_the_bytes() -> None:
    model = replace(ModelProfile.generic(1, 4, 2), config=(), hidden=512)
    model = replace(model, kv_bytes_per_token_per_layer=2 * 256 * 2)
    assert heads_of(model, 0, 2) == Heads(4, 2, 128, 0, True)
    assert heads_of(replace(model, kv_bytes_per_token_per_layer=1), 0, 2) is None
    small = heads_of(replace(model, kv_bytes_per_token_per_layer=12, hidden=2), 0, 2)
    assert small == Heads(1, 1, 3, 0, True)


@pytest.mark.parametrize("dense_bytes", [64, 100_000])
def test_a_dense_part_fills_its_cache(dense_bytes: int) -> None:
    """With weights enough for queries, keys and values, and with too few."""
    model = replace(ModelProfile.generic(2, 4, 2), config=(), hidden=16, head_bytes=64)
    model = replace(model, dense_bytes=dense_bytes, kv_bytes_per_token_per_layer=128)
    needs = Needs.of(model, {64: 1}, sequences=2, positions=8)
    parts = DenseParts.random(model, needs, Fit(1, 1), Inputs(16, torch.float32, CPU), 0)
    assert parts.cache.nbytes == needs.cache_bytes
    assert "derived" in said_of(parts.cache)
    parts.dense(1, 5, [Row(0, 3, 3), Row(1, 1, 8)])
    parts.head(2)
    there = parts.cache._layers[1]
    assert there is not None and parts.cache._layers[0] is not None
    written = there.abs().sum(dim=(1, 2, 4)) > 0
    assert written.tolist() == [[True] * 3 + [False] * 5, [False] * 7 + [True]]
    assert not parts.cache._layers[0].any()
