"""The shapes of the demo models: HuggingFace classes in sizes that two CPU cores can train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from moesim.errors import UsageError

VOCABULARY: Final = 4096
PAD, BOS, EOS = 0, 1, 2
CONTEXT: Final = 512
ONE_BACK: Final = 1
"""The bucket of T5's relative positions that holds the token before."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One model. `d_ff` is an expert's width; `shared_d_ff` that of the shared expert, if any.

    `layers` counts decoder layers; an encoder-decoder has as many encoder layers, and every
    second layer of both is an MoE layer.
    """

    name: str
    family: str
    d_model: int
    layers: int
    experts: int
    top_k: int
    d_ff: int
    shared_d_ff: int = 0
    heads: int = 4

    @property
    def pairs(self) -> bool:
        """Whether it is trained on (text, summary) pairs instead of running text."""
        return self.family == "switch"


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("demo", "olmoe", 128, 8, 32, 4, 64),
        # One expert as wide as the four that a token of `demo` uses: the dense yardstick.
        Shape("demo-dense", "olmoe", 128, 8, 1, 1, 256),
        Shape("demo-mixtral", "mixtral", 128, 8, 8, 2, 64),
        Shape("demo-qwen", "qwen2_moe", 96, 8, 60, 4, 16, shared_d_ff=64),
        Shape("demo-switch", "switch", 128, 4, 8, 1, 192),
    )
}


def shape_of(name: str) -> Shape:
    """The shape with that name. Raises `UsageError` if there is none."""
    if name not in SHAPES:
        raise UsageError(f"{name}: no such demo model; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def build(shape: Shape, seed: int) -> Any:
    """The untrained model, float32, its weights drawn from `seed`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = _CONFIGS[shape.family](shape)
    kind = "AutoModelForSeq2SeqLM" if shape.pairs else "AutoModelForCausalLM"
    model: Any = getattr(transformers, kind).from_config(config, dtype=torch.float32)
    if shape.family == "switch":
        _calm_routers(model)
        _look_back(model)
    return model


def _calm_routers(model: Any) -> None:
    # As the class draws them, untrained Switch routers are sure of one expert for every token.
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data.mul_(0.02)


def _look_back(model: Any) -> None:
    # A head that sees the token before is what copying waits for: found by chance it takes millions
    # of tokens, and until then no summary is worth the name. All layers of the encoder share this.
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias.data[ONE_BACK, 0] = 8.0


def _olmoe(shape: Shape) -> Any:
    from transformers import OlmoeConfig

    return OlmoeConfig(
        num_experts=shape.experts,
        intermediate_size=shape.d_ff,
        norm_topk_prob=True,
        **_decoder(shape),
    )


def _mixtral(shape: Shape) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        num_local_experts=shape.experts,
        intermediate_size=shape.d_ff,
        sliding_window=None,
        **_decoder(shape),
    )


def _qwen2_moe(shape: Shape) -> Any:
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        num_experts=shape.experts,
        moe_intermediate_size=shape.d_ff,
        intermediate_size=shape.d_ff * shape.top_k,
        shared_expert_intermediate_size=shape.shared_d_ff,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        **_decoder(shape),
    )


def _switch(shape: Shape) -> Any:
    from transformers import SwitchTransformersConfig

    start: dict[str, Any] = {"decoder_start_token_id": BOS}
    return SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=shape.d_model,
        d_kv=shape.d_model // shape.heads,
        d_ff=shape.d_ff,
        num_layers=shape.layers,
        num_decoder_layers=shape.layers,
        num_sparse_encoder_layers=shape.layers // 2,
        num_sparse_decoder_layers=shape.layers // 2,
        num_heads=shape.heads,
        num_experts=shape.experts,
        expert_capacity=CONTEXT,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **start,
    )


def _decoder(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": True,
    }


_CONFIGS: Final = {
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "switch": _switch,
}
