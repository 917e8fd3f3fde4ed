"""Run allocations by replay, many in one pass, and read what they gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.capacity import Capacity
from moesim.errors import UsageError
from moesim.planning.space import FloatArray, Slots, Space, capacity_of
from moesim.replays import Progress, Request, replay
from moesim.types import ExpertId, IntArray

QUALITIES = {
    "mass": "share of the gate mass that is kept (a proxy)",
    "agreement": "share of the chosen experts that are executed (a proxy)",
    "loss": "minus the model's own loss on text, nats a token (measured)",
    "hits": "share of accesses that hit (the result is exact, quality is speed)",
}
_AT_ONCE = 50
"""Configurations of one pass: each holds an engine."""

Watch = Callable[[str], AbstractContextManager[Progress | None]]
"""Shows the progress of a named piece of work."""


@contextmanager
def unwatched(_: str) -> Iterator[None]:
    """Shows nothing."""
    yield None


@dataclass(frozen=True, slots=True)
class Trial:
    """What an allocation gave."""

    slots: Slots
    quality: float
    latency_ns: float
    bytes_loaded: int
    """Moved over the link while serving."""
    peak_bytes: int
    """Most expert bytes held at once."""


Evaluate = Callable[[IntArray, int], list[Trial]]
"""Run P allocations, int64 [P, layers], with an update period."""


def columns(trials: Sequence[Trial]) -> tuple[IntArray, FloatArray, FloatArray]:
    """(slots int64 [P, layers], quality float64 [P], latency float64 [P] in ns)."""
    return (
        np.array([t.slots for t in trials], np.int64),
        np.array([t.quality for t in trials], np.float64),
        np.array([t.latency_ns for t in trials], np.float64),
    )


def initial_experts(uses: IntArray, slots: Sequence[int]) -> tuple[ExpertId, ...]:
    """The most used experts of each layer, so many as it has slots; ids, layer after layer.

    uses : int64 [layers, experts].
    """
    ranked = np.argsort(-uses, axis=1, kind="stable")
    return tuple(
        layer * uses.shape[1] + int(expert)
        for layer, count in enumerate(slots)
        for expert in ranked[layer, :count]
    )


@dataclass(frozen=True, slots=True)
class Replays:
    """Runs allocations of ``space`` as ``request`` says, each from its most used experts.

    period_key : the seat parameter that an update period goes to; "" where there is none.
    """

    request: Request
    space: Space
    uses: IntArray
    quality: str
    metric: str
    period_key: str = ""
    watch: Watch = unwatched

    def __call__(self, slots: IntArray, period: int) -> list[Trial]:
        """Run P allocations."""
        settings = list(self.request.settings)
        if self.period_key:
            settings.append(f"{self.period_key}={period}")
        trials: list[Trial] = []
        for first in range(0, len(slots), _AT_ONCE):
            part = slots[first : first + _AT_ONCE]
            with self.watch(f"allocations {first + 1}-{first + len(part)}") as progress:
                capacities = [self._capacity(row) for row in part]
                request = replace(self.request, settings=settings, capacities=capacities)
                answer = replay(request, progress)
            trials += [
                Trial(
                    slots=tuple(allocation.tolist()),
                    quality=_quality(run, self.quality),
                    latency_ns=_latency(run, self.metric),
                    bytes_loaded=run["bytes_loaded"],
                    peak_bytes=run["peak_bytes"],
                )
                for allocation, run in zip(part, answer["runs"], strict=True)
            ]
        return trials

    def _capacity(self, slots: IntArray) -> Capacity:
        """An allocation, and its own initial set."""
        starts = tuple(initial_experts(self.uses, slots.tolist()))
        return replace(capacity_of(self.space, slots), starts=starts)


def _quality(run: dict[str, Any], kind: str) -> float:
    if kind == "hits":
        return float(run["hits"] / max(1, run["accesses"]))
    proxies = run["quality"] or {"gate_mass_kept": 1.0, "agreement": 1.0}
    quality = proxies["gate_mass_kept" if kind == "mass" else "agreement"]
    if quality is None:
        raise UsageError(
            "--quality mass: the trace has neither gates nor weights; use --quality agreement"
        )
    return float(quality)


def _latency(run: dict[str, Any], metric: str) -> float:
    if metric == "request":
        return float((run["time_ns"] - run["times_ns"]["initial"]) / max(1, run["requests"]))
    mean = run[f"{metric}_ns"]["mean"]
    if mean is None:
        raise UsageError(
            f"--latency-of {metric}: no request of the trace has one; use --latency-of "
            f"{'ttft' if metric == 'tpot' else 'tpot'}"
        )
    return float(mean)
