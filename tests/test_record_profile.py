"""The profile of a loaded model: against its own tensors, and against the shipped profiles."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers as hf

from moesim.profile import ModelProfile, load_model
from moesim.traces.gates import GateLayer, Gates, Place, encoder_modules, find_blocks, find_gates
from moesim.traces.model_profile import expert_norms, model_profile
from moesim.traces.record_model import Loaded
from tests import tiny_moe

# What the published configs say and the classes' defaults do not.
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-8x7b": ("MixtralConfig", {}),
    "qwen1.5-moe-a2.7b": ("Qwen2MoeConfig", {}),
    "olmoe-1b-7b": ("OlmoeConfig", {"intermediate_size": 1024}),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {"num_hidden_layers": 48, "head_dim": 128, "num_experts": 128},
    ),
    "phi-3.5-moe": (
        "PhimoeConfig",
        {
            "num_key_value_heads": 8,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "gpt-oss-20b": ("GptOssConfig", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "first_k_dense_replace": 1,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "switch-base-8": (
        "SwitchTransformersConfig",
        {
            "d_ff": 3072,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_sparse_encoder_layers": 6,
            "num_sparse_decoder_layers": 6,
        },
    ),
}
SAME = (
    *("layers", "experts", "top_k", "shared_experts", "stacks", "dtype", "dense_bytes"),
    *("expert_flops_per_token", "dense_flops_per_token", "hidden", "intermediate"),
    *("kv_window_tokens", "head_bytes", "head_flops_per_token", "held_bytes"),
)


def at_full_size(name: str) -> ModelProfile:
    """The profile of the model on the meta device: every shape, no bytes."""
    kind, more = FULL[name]
    config = getattr(hf, kind)(**more)
    dtype = torch.float32 if config.is_encoder_decoder else torch.bfloat16
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    with torch.device("meta"), torch.no_grad():
        model = auto.from_config(config, dtype=dtype)
        cache = None
        if not config.is_encoder_decoder:  # its experts cannot run without data
            cache = model(input_ids=torch.ones(1, 13, dtype=torch.long)).past_key_values
    encoder, top_k = encoder_modules(model), load_model(name).top_k
    layers = tuple(
        GateLayer(
            name=block.name,
            stack="encoder" if id(block.module) in encoder else "decoder",
            block=block.module,
            router=block.router,
            experts=block.experts,
            count=block.count,
            top_k=top_k,
            form="ids",
            ids=Place("router", 0),
            weights=Place("router", 1),
            logits=None,
            as_logarithm=False,
            probe=None,
            keeps_input=True,
            scores=(),
        )
        for block in find_blocks(model)
    )
    return model_profile(Loaded(name, "", model, None), Gates(layers, cache))


@pytest.mark.parametrize("name", FULL)
def test_it_equals_the_shipped_profile(name: str) -> None:
    """Two derivations of the same numbers: from tensors here, from config values there."""
    found, shipped = at_full_size(name), load_model(name)
    for key in SAME:
        assert getattr(found, key) == getattr(shipped, key), key
    if name != "gpt-oss-20b":  # shipped packed in 4 bits
        precision = shipped.precisions.index(found.dtype)
        assert found.expert_bytes[0] == shipped.expert_bytes[precision]
    if not name.startswith("switch"):
        assert found.kv_bytes_per_token_per_layer == shipped.kv_bytes_per_token_per_layer


@pytest.mark.parametrize("name", [*tiny_moe.ASKED, "dbrx", "llama4", "minimax_m2"])
def test_every_byte_is_counted_once(name: str) -> None:
    loaded = tiny_moe.loaded(name)
    profile = model_profile(loaded, find_gates(loaded.model, [5, 6, 7]))
    saved = loaded.model.state_dict(keep_vars=True)
    tensors = {id(t): t for t in (*loaded.model.parameters(), *saved.values())}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert profile.fixed_bytes() + profile.all_expert_bytes() == total
    assert profile.source == "computed" and type(loaded.model).__name__ in profile.provenance
    assert ModelProfile.from_dict(profile.to_dict()) == profile


def test_bytes_follow_the_data_type() -> None:
    one = tiny_moe.loaded("olmoe", dtype=torch.bfloat16)
    other = tiny_moe.loaded("olmoe")
    half, whole = (model_profile(m, find_gates(m.model, [5, 6, 7])) for m in (one, other))
    assert (half.dtype, half.precisions) == ("bf16", ("bf16",))
    assert (whole.dtype, whole.precisions) == ("fp32", ("fp32",))
    assert 2 * half.all_expert_bytes() == whole.all_expert_bytes()
    assert 2 * half.fixed_bytes() == whole.fixed_bytes()


def test_kv_bytes_are_those_of_the_cache_of_a_long_run() -> None:
    loaded = tiny_moe.loaded("switch")
    profile = model_profile(loaded, find_gates(loaded.model, [5, 6, 7]))
    # Two decoder layers for each MoE layer, keys and values, 4 heads of 8, 4 bytes each.
    assert profile.kv_bytes_per_token_per_layer == (0, 0, 2 * 2 * 32 * 4, 2 * 2 * 32 * 4)


@pytest.mark.parametrize("name", ["gpt_oss", "switch", "dbrx"])
def test_norms_of_each_expert(name: str) -> None:
    loaded = tiny_moe.loaded(name)
    gates = find_gates(loaded.model, [5, 6, 7])
    norms = expert_norms(gates)
    assert norms is not None
    for layer, found in zip(gates.layers, norms, strict=True):
        for expert, norm in enumerate(found):
            if name == "switch":
                weights = list(layer.experts[f"expert_{expert}"].parameters())
            elif name == "dbrx":  # the experts' rows, one after the other
                weights = [p.chunk(layer.count)[expert] for p in layer.experts.parameters()]
            else:  # gpt_oss has biases too, which do not count
                weights = [layer.experts.gate_up_proj[expert], layer.experts.down_proj[expert]]
            square = sum(float(w.detach().double().pow(2).sum()) for w in weights)
            assert norm == pytest.approx(square**0.5, rel=1e-5)


def test_norms_of_weights_that_are_not_in_memory_are_not_told() -> None:
    loaded = tiny_moe.loaded("olmoe")
    gates = find_gates(loaded.model, [5, 6, 7])
    gates.layers[0].experts.to("meta")
    assert expert_norms(gates) is None
