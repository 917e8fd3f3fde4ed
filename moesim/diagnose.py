"""Diagnostics that come before any ranking: is this budget in a regime where policies matter?"""

from __future__ import annotations

from typing import Any, Protocol

from moesim.capacity import Capacity
from moesim.costs import Costs
from moesim.profile import ModelProfile


class Routed(Protocol):
    """The shape of what is replayed: a trace's metadata has it."""

    @property
    def layers(self) -> int:
        """MoE layers in all."""

    @property
    def experts(self) -> int:
        """Of a layer."""

    @property
    def top_k(self) -> int:
        """Experts that a token uses in a layer."""

    def stack_ranges(self) -> tuple[tuple[str, int, int], ...]:
        """(name, first layer, one past its last layer) of each stack, in order."""


def diagnostics(
    meta: Routed, model: ModelProfile, costs: Costs, capacity: Capacity, batch: int
) -> dict[str, Any]:
    """What can be said of a capacity before the run.

    token_bytes : experts that one token touches in one pass over the decoding layers.
    break_even_bytes_per_s : the bandwidth at which loading all of them takes as long as computing
        a token with everything resident; below it, every miss is stall.
    """
    sizes = model.expert_bytes_table()
    first = meta.stack_ranges()[-1][1]
    layers = range(first, meta.layers)
    token_bytes = sum(int(sizes[la]) * meta.top_k for la in layers)
    compute_ns = sum(
        costs.dense_ns(1, 1, la) + costs.sync_ns + meta.top_k * costs.expert_ns(1, la)
        for la in layers
    )
    total = sum(capacity.capacity_bytes)
    return {
        "capacity": capacity.text,
        "scope": capacity.scope,
        "capacity_bytes": total,
        "all_expert_bytes": int(sizes.sum()) * meta.experts,
        "token_bytes": token_bytes,
        "token_compute_ns": compute_ns,
        "load_ns": costs.load_ns(int(sizes.max())),
        "break_even_bytes_per_s": token_bytes * 10**9 / compute_ns if compute_ns else None,
        "warnings": list(_warnings(meta, capacity, sizes.tolist(), token_bytes, total, batch)),
    }


def _warnings(
    meta: Routed,
    capacity: Capacity,
    sizes: list[int],
    token_bytes: int,
    total: int,
    batch: int,
) -> list[str]:
    found = []
    if capacity.scope == "global" and total < token_bytes:
        # At a gate the oldest touches of a token are its own layer's, so only what is left beside
        # one layer's demand can survive from the token before.
        surely = total <= token_bytes - max(sizes) * meta.top_k
        found.append(
            f"flood cliff: {capacity.text} holds {total / 1e9:.3f} GB and one token touches "
            f"{token_bytes / 1e9:.3f} GB; a global LRU then hits "
            f"{'' if surely else 'almost '}nothing in decode"
        )
    if capacity.scope == "layer":
        short = [
            layer
            for layer, held in enumerate(capacity.capacity_bytes)
            if held < sizes[layer] * meta.top_k
        ]
        if short:
            held = capacity.capacity_bytes[short[0]]
            found.append(
                f"slice too small: layer {short[0]} holds {held} bytes and one token needs "
                f"{sizes[short[0]] * meta.top_k}; its layer events go in waves"
            )
    if batch > 1 and capacity.scope == "layer":
        union = min(meta.experts, batch * meta.top_k) * max(sizes)
        if union > min(capacity.capacity_bytes):
            found.append(
                f"a batch of {batch} may demand up to {union} bytes of one layer, more than its "
                "slice; such layer events go in waves"
            )
    return found
