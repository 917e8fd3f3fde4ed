"""Every missing expert runs on the host (llama.cpp ``--cpu-moe``, KTransformers).

Nothing is ever loaded on demand, so the resident set is what the run started with and what is
prefetched: start it with ``--initial static``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesim.protocol import CacheView, MissSeat
from moesim.types import ExpertId, Gate, Serve, Status


@dataclass
class CPU(MissSeat):
    """Computes where the weights are."""

    name = "cpu"
    source = "llama.cpp; KTransformers"
    cost = "O(n)"

    def serve(self, gate: Gate, cache: CacheView) -> Mapping[ExpertId, Serve]:
        """All of them."""
        missing = gate.experts[gate.status == Status.MISS].tolist()
        return dict.fromkeys(missing, Serve.CPU)
