"""Which allocations there are, what they weigh, and which of two is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesim.capacity import Capacity
from moesim.types import IntArray

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Slots = tuple[int, ...]
"""Experts held, one number for each layer."""

SPARES = ("layer", "none")
"""Beside its slots each layer has room for one expert on its way in, or not."""


@dataclass(frozen=True, slots=True)
class Space:
    """All allocations, and the memory model: fixed part + slots x bytes + spare slots.

    expert_bytes : bytes of one expert, for each layer.
    experts : experts of a layer; all of them held, nothing is swapped and no spare is needed.
    least : fewest slots of a layer.
    fixed_bytes : what is held whatever the allocation.
    """

    expert_bytes: tuple[int, ...]
    experts: int
    least: int = 1
    fixed_bytes: int = 0
    spare: str = "layer"
    table: IntArray = field(init=False, repr=False, compare=False)
    """int64 [layers, experts + 1]: bytes of a layer with so many slots."""

    def __post_init__(self) -> None:
        held = np.arange(self.experts + 1) + (self.spare == "layer")
        sizes = np.array(self.expert_bytes, np.int64)
        table = sizes[:, None] * np.minimum(held, self.experts)[None, :]
        object.__setattr__(self, "table", table)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.expert_bytes)

    def capacity_bytes(self, slots: IntArray) -> IntArray:
        """int64 [..., layers]: room that each layer's cache needs, spare slots among it."""
        room: IntArray = self.table[np.arange(self.layers), slots]
        return room

    def memory_bytes(self, slots: IntArray) -> IntArray:
        """int64 [...]: all memory of each allocation [..., layers]."""
        total: IntArray = self.capacity_bytes(slots).sum(axis=-1) + self.fixed_bytes
        return total

    def lowest(self) -> IntArray:
        """int64 [layers]: the smallest allocation."""
        return np.full(self.layers, self.least, np.int64)

    def growth(self, slots: IntArray) -> IntArray:
        """int64 [..., layers]: bytes that one more slot of a layer takes; 0 where it is full."""
        return self.capacity_bytes(np.minimum(slots + 1, self.experts)) - self.capacity_bytes(slots)


def capacity_of(space: Space, slots: IntArray) -> Capacity:
    """One allocation, int64 [layers], as room for each layer; written ``8:13:9/layer``."""
    room = space.capacity_bytes(slots).tolist()
    experts = (str(nbytes // size) for nbytes, size in zip(room, space.expert_bytes, strict=True))
    return Capacity(f"{':'.join(experts)}/layer", "layer", tuple(room))


Model = Callable[[IntArray], FloatArray]
"""A number for each of P allocations, int64 [P, layers] -> float64 [P]."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a search is given: maximise quality under a memory and a latency limit.

    latency_weight : quality given up for one second of latency (the paper does not say how it
        weighs its two objectives); at 0 latency only decides between equal qualities.
    """

    space: Space
    budget_bytes: int
    quality: Model
    latency_ns: Model
    latency_limit_ns: float = math.inf
    latency_weight: float = 0.0

    def judge(self, slots: IntArray) -> Judged:
        """Judge P allocations, int64 [P, layers]."""
        latency = self.latency_ns(slots)
        memory = self.space.memory_bytes(slots)
        over = np.maximum(memory / self.budget_bytes - 1, 0)
        late = np.maximum(latency / self.latency_limit_ns - 1, 0)
        score = self.quality(slots) - self.latency_weight * latency / 1e9
        return Judged(slots, score, over + late, latency, memory)


@dataclass(frozen=True, slots=True)
class Judged:
    """P allocations with what decides between them."""

    slots: IntArray
    score: FloatArray
    violation: FloatArray
    """0: within both limits; else by what share they are exceeded, in sum."""
    latency_ns: FloatArray
    memory_bytes: IntArray

    def order(self) -> IntArray:
        """Places, best first: least violation, then score, latency, memory, fewest early slots."""
        keys = (*self.slots.T[::-1], self.memory_bytes, self.latency_ns, -self.score)
        order: IntArray = np.lexsort((*keys, self.violation))
        return order

    def best(self) -> Found:
        """The best of them."""
        i = int(self.order()[0])
        return Found(
            tuple(self.slots[i].tolist()), float(self.score[i]), bool(self.violation[i] == 0)
        )


@dataclass(frozen=True, slots=True)
class Found:
    """What a search answers."""

    slots: Slots
    score: float
    feasible: bool


def one(slots: Slots) -> IntArray:
    """A population of one."""
    return np.array([slots], np.int64)
