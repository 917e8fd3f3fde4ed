"""What a run's world is made of: a model in the trace's shape, and what fits a capacity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from moesim.errors import UsageError
from moesim.ledger import Ledger
from moesim.profile import ModelProfile
from moesim.protocol import World
from moesim.traces.expert_parts import model_in_parts
from moesim.traces.schema import TraceMeta
from moesim.types import PROBABILITY_ONE, ExpertId, IntArray


def shaped(model: ModelProfile, meta: TraceMeta) -> ModelProfile:
    """A model profile with the trace's shape: per-layer numbers are stretched over its layers.

    So the routing of one model can be replayed with the bytes and times of another (``--costs``).
    Where the trace has experts in parts, so has the other model.
    """
    if model is not meta.model and meta.expert_parts > 1:
        model = model_in_parts(model, meta.expert_parts)
    if model.layers == meta.layers:
        return replace(model, experts=meta.experts, top_k=meta.top_k, stacks=meta.model.stacks)

    def stretched(value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(value, int):
            return value
        return tuple(value[layer * len(value) // meta.layers] for layer in range(meta.layers))

    return replace(
        model,
        layers=meta.layers,
        experts=meta.experts,
        top_k=meta.top_k,
        stacks=meta.model.stacks,
        expert_bytes=tuple(stretched(b) for b in model.expert_bytes),
        dense_bytes=stretched(model.dense_bytes),
        dense_flops_per_token=stretched(model.dense_flops_per_token),
        kv_bytes_per_token_per_layer=stretched(model.kv_bytes_per_token_per_layer),
        kv_window_tokens=stretched(model.kv_window_tokens),
    )


def all_precisions(model: ModelProfile) -> IntArray:
    """int64 [precisions, layers], bytes of one expert."""
    return np.stack([model.expert_bytes_table(p) for p in range(len(model.precisions))])


def expert_norms(meta: TraceMeta) -> IntArray:
    """int64 [layers * experts] in 1/16384: norms of the experts' weights, 1 where unknown."""
    if meta.expert_norms is None:
        return np.full(meta.layers * meta.experts, PROBABILITY_ONE, np.int64)
    norms = np.asarray(meta.expert_norms).reshape(-1)
    scaled: IntArray = np.rint(norms * PROBABILITY_ONE).astype(np.int64)
    return scaled


def decode_from(meta: TraceMeta) -> int:
    """First layer of the last stack: an encoder runs in the prefill alone."""
    return meta.stack_ranges()[-1][1]


def fitting(experts: Iterable[ExpertId], world: World, allocator: str) -> list[ExpertId]:
    """As many as fit, in order."""
    caches = world.caches
    ledger = Ledger(
        world.expert_bytes,
        world.experts,
        world.capacity_bytes,
        allocator=allocator,
        caches=caches,
    )
    left = list(world.capacity_bytes)
    chosen = []
    for expert in experts:
        if not 0 <= expert < world.size:
            raise UsageError(
                f"--initial: expert {expert} is out of range; ids end at {world.size - 1}"
            )
        cache = int(caches[expert])
        nbytes = ledger.bytes_of[expert]
        if nbytes <= left[cache]:
            left[cache] -= nbytes
            chosen.append(expert)
    return chosen


def shelved(keys: Iterable[int], sizes: Sequence[int], nbytes: int) -> list[int]:
    """As many copies as fit in so many bytes, in order. sizes : bytes of a copy, by key."""
    chosen = []
    for key in keys:
        if sizes[key] <= nbytes:
            nbytes -= sizes[key]
            chosen.append(key)
    return chosen
