"""Tiny random models of many MoE families, a byte tokenizer, and the gates written out by hand.

The gates here are the oracle of the recorder: NumPy in float64, from a layer's input and the
router's own weights, by each family's published rule and none of its code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moesim.traces.record_model import Loaded

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

VOCABULARY = 259
PAD, BOS, EOS = 0, 1, 2
CONTEXT = 256

torch.set_num_threads(1)
hf.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()


def _common(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **more,
    }


def _latent(**more: Any) -> dict[str, Any]:
    return _common(
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=16,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        **more,
    )


def _switch(**more: Any) -> Any:
    return hf.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_decoder_layers=4,
        num_sparse_decoder_layers=2,
        num_heads=4,
        num_experts=8,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
        initializer_factor=1.0,
        **{"expert_capacity": 64, **more},
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralConfig(
        **_common(intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **_common(
            intermediate_size=48,
            moe_intermediate_size=16,
            num_experts=12,
            num_experts_per_tok=4,
            shared_expert_intermediate_size=32,
            norm_topk_prob=False,
        )
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **_common(
            intermediate_size=48,
            moe_intermediate_size=16,
            num_experts=16,
            num_experts_per_tok=4,
            head_dim=8,
            norm_topk_prob=True,
        )
    ),
    "olmoe": lambda: hf.OlmoeConfig(
        **_common(intermediate_size=16, num_experts=16, num_experts_per_tok=4)
    ),
    "phimoe": lambda: hf.PhimoeConfig(
        **_common(intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    ),
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **_latent(n_shared_experts=2, n_group=1, topk_group=1, q_lora_rank=None)
    ),
    "deepseek_v2_groups": lambda: hf.DeepseekV2Config(
        **_latent(
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            q_lora_rank=16,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
        )
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **_latent(
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            q_lora_rank=16,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **_common(
            intermediate_size=16,
            num_local_experts=16,
            num_experts_per_tok=4,
            head_dim=8,
            sliding_window=8,
        )
    ),
    "granitemoe": lambda: hf.GraniteMoeConfig(
        **_common(intermediate_size=16, num_local_experts=16, num_experts_per_tok=4)
    ),
    "glm4_moe": lambda: hf.Glm4MoeConfig(
        **_common(
            intermediate_size=48,
            moe_intermediate_size=16,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            head_dim=8,
            norm_topk_prob=True,
            routed_scaling_factor=1.5,
        )
    ),
    "switch": _switch,
    "switch_tight": lambda: _switch(expert_capacity=2),
    # Beyond the list: other places for ids, logits and weights.
    "dbrx": lambda: hf.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=3,
        max_seq_len=CONTEXT,
        vocab_size=VOCABULARY,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={
            "ffn_hidden_size": 16,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
            "hidden_size": 32,
        },
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **_common(
            intermediate_size=16,
            intermediate_size_mlp=32,
            num_local_experts=8,
            num_experts_per_tok=1,
            head_dim=8,
            interleave_moe_layer_step=1,
        )
    ),
    "minimax_m2": lambda: hf.MiniMaxM2Config(
        **_common(
            intermediate_size=16,
            num_local_experts=8,
            num_experts_per_tok=2,
            head_dim=8,
            rotary_dim=8,
        )
    ),
    "jetmoe": lambda: hf.JetMoeConfig(
        **_common(
            intermediate_size=16,
            num_local_experts=8,
            num_experts_per_tok=2,
            kv_channels=8,
            num_key_value_heads=4,
        )
    ),
    "nllb_moe": lambda: hf.NllbMoeConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_experts=4,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    ),
    "llama": lambda: hf.LlamaConfig(**_common(intermediate_size=48)),
}

ASKED = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v2"),
    *("deepseek_v2_groups", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe", "switch"),
)


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a model of the family with random weights, its gates spread out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = CONFIGS[name]()
        seq2seq = config.is_encoder_decoder
        auto = hf.AutoModelForSeq2SeqLM if seq2seq else hf.AutoModelForCausalLM
        model = auto.from_config(config).eval()
    draw = torch.Generator().manual_seed(seed + 1)
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        scale = _scale(key)
        if scale:
            value.data = torch.randn(value.shape, generator=draw) * scale
    return model.to(dtype)


def _scale(key: str) -> float:
    if key.endswith(("gate.weight", "router.weight", "classifier.weight", "router.layer.weight")):
        return 0.4
    return 0.1 if key.endswith(("router.bias", "correction_bias")) else 0.0


@cache
def tokenizer() -> Any:
    """Return a tokenizer of bytes; what is no byte is one of three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    vocabulary |= {letter: number + 3 for number, letter in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def loaded(name: str, **more: Any) -> Loaded:
    """Return a family's tiny model as the recorder takes it."""
    return Loaded(name, "", build(name, **more), tokenizer())


def save(name: str, folder: Path) -> Path:
    """Write a family's tiny model and the tokenizer to a folder."""
    build(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# ---- the gates, by hand --------------------------------------------------------------------------


@dataclass(frozen=True)
class Routed:
    """What one gate does with [tokens, hidden]."""

    logits: Floats
    ids: Ints
    """By descending weight; -1 = dropped."""
    weights: Floats
    margin: Floats
    """How far each token's choice is from another one; small ones may differ by rounding."""


def oracle(name: str, block: Any, x: Floats) -> Routed:
    """Return what the family's gate must do with the input of a block."""
    router = getattr(block, "gate", None) or block.router
    holder = getattr(router, "classifier", getattr(router, "layer", router))
    logits = x @ _array(holder.weight).T
    if getattr(holder, "bias", None) is not None:
        logits = logits + _array(holder.bias)
    if name == "phimoe":
        return _sparsemixer(logits, router.router_jitter_noise)
    if name.startswith("switch"):
        return _switch_gate(logits, router.expert_capacity)
    rule = RULES[name]
    return rule(logits, router, block)


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    result: Floats = e / e.sum(axis=-1, keepdims=True)
    return result


def _chosen(logits: Floats, choice: Floats, scores: Floats, k: int) -> Routed:
    """Return the k largest of `choice`, with their `scores`, ordered by these."""
    order = np.argsort(-choice, axis=1, kind="stable")
    ranked = np.take_along_axis(choice, order, 1)
    ids = order[:, :k]
    weights = np.take_along_axis(scores, ids, 1)
    by_weight = np.argsort(-weights, axis=1, kind="stable")
    ids, weights = np.take_along_axis(ids, by_weight, 1), np.take_along_axis(weights, by_weight, 1)
    gaps = np.abs(np.diff(weights, axis=1)).min(axis=1, initial=np.inf)
    return Routed(logits, ids, weights, np.minimum(ranked[:, k - 1] - ranked[:, k], gaps))


def _shared(routed: Routed, scale: float = 1.0) -> Routed:
    weights = routed.weights / routed.weights.sum(axis=1, keepdims=True) * scale
    return Routed(routed.logits, routed.ids, weights, routed.margin)


def _plain(logits: Floats, router: Any, block: Any) -> Routed:
    shares = _softmax(logits)
    return _chosen(logits, shares, shares, getattr(router, "top_k", None) or block.top_k)


def _renormalised(logits: Floats, router: Any, block: Any) -> Routed:
    return _shared(_plain(logits, router, block))


def _best_groups(choice: Floats, groups: int, kept: int, best: int) -> npt.NDArray[np.bool_]:
    """Return which experts are in the groups with the largest sums of their best."""
    cut = choice.reshape(len(choice), groups, -1)
    totals = np.sort(cut, axis=2)[:, :, -best:].sum(axis=2)
    allowed = np.zeros(totals.shape, dtype=bool)
    np.put_along_axis(allowed, np.argsort(-totals, axis=1)[:, :kept], True, axis=1)
    return np.repeat(allowed, cut.shape[2], axis=1)


def _deepseek_v2_groups(logits: Floats, router: Any, block: Any) -> Routed:
    shares = _softmax(logits)
    allowed = _best_groups(shares, router.num_group, router.topk_group, 1)
    routed = _chosen(logits, np.where(allowed, shares, 0), shares, router.top_k)
    weights = routed.weights * router.routed_scaling_factor
    return Routed(logits, routed.ids, weights, routed.margin)


def _sigmoid_groups(logits: Floats, router: Any, block: Any) -> Routed:
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + _array(router.e_score_correction_bias)
    allowed = _best_groups(choice, router.num_group, router.topk_group, 2)
    routed = _chosen(logits, np.where(allowed, choice, -np.inf), scores, router.top_k)
    return _shared(routed, router.routed_scaling_factor)


def _sigmoid_bias(logits: Floats, router: Any, block: Any) -> Routed:
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + _array(block.e_score_correction_bias)
    return _shared(_chosen(logits, choice, scores, router.top_k))


def _llama4(logits: Floats, router: Any, block: Any) -> Routed:
    scores = 1 / (1 + np.exp(-logits))
    return _chosen(logits, scores, scores, router.top_k)


def _sparsemixer(logits: Floats, noise: float) -> Routed:
    tokens = np.arange(len(logits))
    left, ids, weights = logits.copy(), [], []
    for _ in range(2):
        best = left.max(axis=1)
        scale = np.maximum(np.abs(logits), best[:, None])
        far = (best[:, None] - logits) / scale > 2 * noise
        chosen = left.argmax(axis=1)
        weights.append(_softmax(np.where(far, -np.inf, left))[tokens, chosen])
        ids.append(chosen)
        left[tokens, chosen] = -np.inf
    made_ids, made = np.stack(ids, 1), np.stack(weights, 1)
    order = np.argsort(-made, axis=1, kind="stable")
    gap = np.abs(made[:, 0] - made[:, 1])
    third = np.take_along_axis(logits, made_ids[:, 1:], 1)[:, 0] - left.max(axis=1)
    # Equal weights (both 1) keep the model's order: no gap is needed there.
    margin = np.minimum(np.where(gap == 0, np.inf, gap), third)
    return Routed(
        logits, np.take_along_axis(made_ids, order, 1), np.take_along_axis(made, order, 1), margin
    )


def _switch_gate(logits: Floats, capacity: int) -> Routed:
    """One sequence: beyond an expert's capacity tokens are dropped, in order of position."""
    routed = _chosen(logits, _softmax(logits), _softmax(logits), 1)
    counts: dict[int, int] = {}
    ids = routed.ids.copy()
    for token, expert in enumerate(routed.ids[:, 0].tolist()):
        counts[expert] = counts.get(expert, 0) + 1
        if counts[expert] > capacity:
            ids[token, 0] = -1
    return Routed(logits, ids, np.where(ids < 0, 0, routed.weights), routed.margin)


def _array(tensor: Any) -> Floats:
    values: Floats = tensor.detach().double().numpy()
    return values


RULES: dict[str, Callable[[Floats, Any, Any], Routed]] = {
    "mixtral": _renormalised,
    "qwen2_moe": _plain,
    "qwen3_moe": _renormalised,
    "olmoe": _plain,
    "deepseek_v2": _plain,
    "deepseek_v2_groups": _deepseek_v2_groups,
    "deepseek_v3": _sigmoid_groups,
    "glm4_moe": _sigmoid_groups,
    "gpt_oss": _renormalised,
    "granitemoe": _renormalised,
    "dbrx": _renormalised,
    "llama4": _llama4,
    "minimax_m2": _sigmoid_bias,
}
