"""LRU by layer, as in Mixtral-Offloading (arXiv 2312.17238, section 3.1: k experts a layer).

With ``--scope layer`` every layer has a cache of its own, and this is plain LRU. In one cache for
all layers it keeps them even: the layer that holds the most cached experts loses its least recently
used one. So with room for ``L * k`` experts and for the staging buffers, each layer comes to hold
k. Where the layers cannot hold equally many, the source is silent; here the least recently used
expert of any of the fullest layers goes.

What a prefetch brought and nothing has demanded yet is *staged*, not cached: it is in no layer's
count and goes after every cached expert (``moesim.policies.staged_gate`` says what replaces it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.policies.lru import LRU
from moesim.protocol import World
from moesim.types import AnyArray, Evicted, Gate, IntArray, Landed, Note, Status

STAMP_BITS = 40


def worth(stamps: IntArray, cached: AnyArray, held: IntArray) -> IntArray:
    """Kernel: the stamp of the last touch, below it by how many its layer holds if it is cached.

    ``held`` : experts that the layer of each one holds.
    """
    return stamps - (cached.astype(np.int64) * (held + 1) << STAMP_BITS)


@dataclass
class LayerLRU(LRU):
    """Evicts the least recently used expert of the layer that holds the most."""

    name = "layer-lru"
    source = "arXiv 2312.17238, section 3.1"
    cost = "O(n); O(R) an eviction"

    def begin(self, world: World) -> None:
        """Nothing is cached."""
        super().begin(world)
        self.experts = world.experts
        self.cached = np.zeros(world.size, np.bool_)
        self.held = np.zeros(world.layers, np.int64)
        self.coming: set[int] = set()
        self.layer = 0

    def gate(self, gate: Gate) -> None:
        """What is demanded is cached: the missing ones count before they land."""
        super().gate(gate)
        self.layer = gate.layer
        there = gate.experts[gate.status == Status.HIT]
        self.coming = set(gate.experts[gate.status != Status.HIT].tolist())
        self._cache(there[~self.cached[there]])

    def note(self, fact: Note) -> None:
        """Keep count."""
        if isinstance(fact, Landed):
            if fact.expert in self.coming or fact.event < 0:
                self.coming.discard(fact.expert)
                self._cache(np.array([fact.expert]))
        elif isinstance(fact, Evicted) and self.cached[fact.expert]:
            self.cached[fact.expert] = False
            self.held[fact.expert // self.experts] -= 1

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """Cached ones of the fullest layer lowest, staged ones highest."""
        held = self.held.copy()
        held[self.layer] += len(self.coming)
        return worth(self.score[experts], self.cached[experts], held[experts // self.experts])

    def _cache(self, experts: IntArray) -> None:
        self.cached[experts] = True
        np.add.at(self.held, experts // self.experts, 1)
