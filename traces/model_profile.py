"""The model profile of a loaded HuggingFace model: bytes and operations, from its real tensors.

Every decoder (or encoder) layer is an item of a list of modules. A layer without experts is part of
the dense share of the MoE layer that follows it, one behind the last MoE layer of that one. What
lies outside the lists is the head (read in each pass: output head, final norms) or held (token
embedding). Key-value bytes are those of the cache that the model filled over a few tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from moesim.profile import ModelProfile, Stack
from moesim.traces.gates import GateLayer, Gates
from moesim.traces.record_model import Loaded, short_dtype

Module = Any
Tensor = Any

CROSS_KV: Final = re.compile(r"(EncDecAttention\.(k|v)|(encoder_attn|cross_attn)\.(k|v)_proj)\.")
"""Projections of the encoder's output: used once for each request."""
SHARED: Final = re.compile(r"shared_experts?$")
SHARED_COUNTS: Final = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
CONFIG_KEYS: Final = re.compile(
    r"(hidden|intermediate|ffn|d_model|d_ff|d_kv|head|layers|experts|expert|top_?k|group|vocab|rank"
    r"|sliding_window|position|norm_topk|tie_word|sparse|moe_k|scal)"
)


def model_profile(loaded: Loaded, gates: Gates) -> ModelProfile:
    """Return the profile of the model whose gates were found.

    Sizes are exact; operations are 2 for each weight of a matrix that a token passes, without
    attention over the context.
    """
    model = loaded.model
    layers = list(_moe_layers(model, gates))
    experts = {id(p) for layer in gates.layers for p in layer.experts.parameters()}
    lists = _split(model, layers, experts)
    config = model.config.get_text_config()
    sizes = _expert_sizes(gates.layers[0])
    made = ModelProfile(
        name=loaded.name,
        source="computed",
        provenance=f"computed from the tensors of {type(model).__name__} as loaded",
        hf_id=loaded.hf_id,
        layers=len(gates.layers),
        experts=gates.experts,
        top_k=gates.top_k,
        shared_experts=_shared_experts(gates.layers[0], config),
        stacks=tuple(Stack(name, len(found)) for name, found in gates.stacks.items()),
        score=gates.score.kind,
        dtype=_most_common_dtype(model, experts),
        precisions=(sizes.dtype,),
        expert_bytes=(tuple(_expert_sizes(layer).bytes for layer in gates.layers),),
        dense_bytes=tuple(max(1, share.bytes) for share in lists.shares),
        expert_flops_per_token=max(1, 2 * sizes.matrix_weights),
        dense_flops_per_token=tuple(max(1, share.flops) for share in lists.shares),
        kv_bytes_per_token_per_layer=_kv_bytes(gates, layers),
        hidden=int(config.hidden_size),
        intermediate=max(1, sizes.smallest_weights // int(config.hidden_size)),
        kv_window_tokens=_kv_windows(gates, layers),
        head_bytes=lists.head.bytes,
        head_flops_per_token=lists.head.flops,
        held_bytes=lists.held.bytes,
        config=_config(config),
    )
    return ModelProfile.from_dict(made.to_dict(), f"model {loaded.name!r}")


def expert_norms(gates: Gates) -> tuple[tuple[float, ...], ...] | None:
    """Return the Frobenius norm of all matrices of each expert, [layers][experts].

    None if some weights are not in memory (on the meta device) or no numbers (quantised).
    """
    norms = []
    for layer in gates.layers:
        squares = torch.zeros(layer.count, dtype=torch.float64)
        for expert, weight in _weights_by_expert(layer):
            if weight.device.type == "meta" or not weight.is_floating_point():
                return None
            # One expert at a time: the whole bank in fp32 would not fit beside the model.
            norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)
            squares[expert] += float(norm) ** 2
        norms.append(tuple(squares.sqrt().tolist()))
    return tuple(norms)


# ---- experts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _ExpertSizes:
    """One routed expert of a layer."""

    bytes: int
    matrix_weights: int
    smallest_weights: int
    """Weights of its smallest matrix: hidden x intermediate."""
    dtype: str


def _expert_sizes(layer: GateLayer) -> _ExpertSizes:
    tensors = [*layer.experts.parameters(), *layer.experts.buffers()]
    matrices = []
    for name, tensor in layer.experts.named_parameters():
        own = tensor.dim() - (1 if tensor.shape[0] == layer.count and _fused(layer) else 0)
        if own >= 2 and "bias" not in name:
            copies = 1 if _fused(layer) else layer.count
            matrices.append(tensor.numel() * copies // layer.count)
    if not _fused(layer):
        # Each expert has tensors of its own: as many matrices as one of them has.
        matrices = matrices[: max(1, len(matrices) // layer.count)]
    return _ExpertSizes(
        bytes=max(1, sum(t.numel() * t.element_size() for t in tensors) // layer.count),
        matrix_weights=sum(matrices),
        smallest_weights=min(matrices, default=1),
        dtype=short_dtype(max(tensors, key=lambda t: t.numel()).dtype),
    )


def _fused(layer: GateLayer) -> bool:
    """Whether tensors hold all experts of the layer."""
    return not isinstance(layer.experts, (torch.nn.ModuleDict, torch.nn.ModuleList))


def _weights_by_expert(layer: GateLayer) -> Iterator[tuple[int, Tensor]]:
    if not _fused(layer):
        for expert, module in enumerate(layer.experts.children()):
            for weight in module.parameters():
                if weight.dim() >= 2:
                    yield expert, weight
        return
    for name, weight in layer.experts.named_parameters():
        if "bias" not in name:
            # Some families stack the experts' rows in one matrix.
            yield from enumerate(weight.reshape(layer.count, -1))


def _shared_experts(layer: GateLayer, config: Any) -> int:
    has = any(SHARED.search(name) for name, _ in layer.block.named_children())
    if not has:
        return 0
    counts = (getattr(config, name, None) for name in SHARED_COUNTS)
    return next((int(n) for n in counts if isinstance(n, int) and n > 0), 1)


# ---- all else ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Share:
    """Bytes of some tensors, and operations a token on their matrices."""

    bytes: int = 0
    flops: int = 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor."""
        self.bytes += tensor.numel() * tensor.element_size()
        if tensor.dim() >= 2:
            self.flops += 2 * tensor.numel()


@dataclass(frozen=True, slots=True)
class _Lists:
    """Where the weights outside the experts belong."""

    shares: list[_Share]
    head: _Share
    held: _Share


def _moe_layers(model: Module, gates: Gates) -> Iterator[tuple[str, int]]:
    """Yield, for each MoE layer, the list of layers that it is in and its place there."""
    for layer in gates.layers:
        parts = layer.name.split(".")
        at = next(i for i in range(len(parts)) if parts[i].isdigit())
        yield ".".join(parts[:at]), int(parts[at])


def _split(model: Module, layers: list[tuple[str, int]], experts: set[int]) -> _Lists:
    lists = _Lists([_Share() for _ in layers], _Share(), _Share())
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    seen = set(experts)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *_persistent(model)):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        share = _owner(name, layers, lists)
        crossing = share is not None and CROSS_KV.search(name)
        if crossing or (tensor is embedding.weight and not tied):
            lists.held.add(tensor)
        elif share is None and output is not None and tensor is output.weight:
            lists.head.add(tensor)
        elif id(tensor) in tables or share is None:
            (lists.head if _is_small(tensor, embedding) else lists.held).bytes += _bytes(tensor)
        else:
            share.add(tensor)
    return lists


def _persistent(model: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that are saved with the model: selection biases and the like."""
    saved = set(model.state_dict(keep_vars=True))
    for name, tensor in model.named_buffers():
        if name in saved:
            yield name, tensor


def _owner(name: str, layers: list[tuple[str, int]], lists: _Lists) -> _Share | None:
    """Return the share of the MoE layer at or behind the layer that a tensor is in."""
    last = None
    for share, (prefix, place) in zip(lists.shares, layers, strict=True):
        head, _, rest = name.partition(f"{prefix}.")
        if head or not rest or not rest.partition(".")[0].isdigit():
            continue
        last = share
        if int(rest.partition(".")[0]) <= place:
            break
    return last


def _is_small(tensor: Tensor, embedding: Module) -> bool:
    """Whether a tensor outside the layers is a norm or a bias table, not a tower of its own."""
    return bool(tensor.dim() < 2 or tensor.numel() * 16 < embedding.weight.numel())


def _bytes(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _most_common_dtype(model: Module, experts: set[int]) -> str:
    sizes: dict[str, int] = {}
    for tensor in model.parameters():
        if id(tensor) not in experts:
            name = short_dtype(tensor.dtype)
            sizes[name] = sizes.get(name, 0) + tensor.numel()
    return max(sizes, key=lambda name: sizes[name])


# ---- the key-value cache -------------------------------------------------------------------------


def _kv_bytes(gates: Gates, layers: list[tuple[str, int]]) -> tuple[int, ...]:
    """Return the bytes that a token adds to the cache, by MoE layer."""
    per_layer = []
    for layer in _cache_layers(gates):
        tensors = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held = [t for t in tensors if torch.is_tensor(t) and t.dim() >= 3]
        per_layer.append(sum(_bytes(t) // max(1, t.shape[-2]) for t in held))
    return _by_moe_layer(gates, layers, per_layer, sum)


def _kv_windows(gates: Gates, layers: list[tuple[str, int]]) -> tuple[int, ...]:
    """Return how many positions attention keeps, 0 where some layer keeps all."""
    per_layer = [
        int(getattr(layer, "sliding_window", 0) or 0) if getattr(layer, "is_sliding", False) else 0
        for layer in _cache_layers(gates)
    ]
    return _by_moe_layer(
        gates, layers, per_layer, lambda found: max(found, default=0) if all(found) else 0
    )


def _cache_layers(gates: Gates) -> list[Any]:
    cache = getattr(gates.cache, "self_attention_cache", gates.cache)
    return list(getattr(cache, "layers", ()))


def _by_moe_layer(
    gates: Gates, layers: list[tuple[str, int]], values: list[int], join: Any
) -> tuple[int, ...]:
    """Join the values of decoder layers to those of the MoE layers they belong to."""
    made, begin = [], 0
    decoder = [i for i, layer in enumerate(gates.layers) if layer.stack == "decoder"]
    for i, (_, place) in enumerate(layers):
        if i not in decoder:
            made.append(0)
            continue
        end = len(values) if i == decoder[-1] else place + 1
        made.append(int(join(values[begin:end])))
        begin = end
    return tuple(made)


def _config(config: Any) -> tuple[tuple[str, int | bool], ...]:
    """Return the whole numbers and flags of the config that the sizes come from."""
    kept = {}
    for key, value in config.to_dict().items():
        whole = isinstance(value, bool) or (isinstance(value, int) and value >= 0)
        if whole and CONFIG_KEYS.search(key) and not key.startswith("_"):
            kept[key] = value
    return tuple(sorted(kept.items()))
