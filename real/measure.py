"""What a calibration measures, and the spread of its repeats. No torch: a bench does the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, NamedTuple, Protocol

from moesim.profile import Memory, ModelProfile
from moesim.workload import Row

LINK, DENSE, EXPERT, HOST_EXPERT, HEAD = "link", "dense", "expert", "host_expert", "head"
SYNC, PLAN, HANDOVER, STEP = "sync", "plan", "handover", "step"
OPS, BYTES = "policy_ops_per_s", "policy_bytes_per_s"
OVERHEADS = (SYNC, PLAN, HANDOVER, STEP)
RATES = (OPS, BYTES)
ALONE, COMPUTING, HOSTING, COPYING = "alone", "computing", "hosting", "copying"

CHUNK_BYTES = 4 << 20
"""Bytes of a chunk, after which a copy may be interrupted: as in the profiles that ship."""

SMALLEST_BYTES = 1 << 16
"""The shortest transfer that is measured, unless the experts are smaller."""
CONTEXTS = (0, 512, 2048, 8192)
"""Cached positions to measure the dense part with, where it reads them."""

Progress = Callable[[int, int], None]
"""Called with (repeats done, repeats in all)."""


class Point(NamedTuple):
    """One thing to measure.

    what : LINK, DENSE, EXPERT, HOST_EXPERT or HEAD.
    how : what goes on beside it, and of a link the memory that is read.
    kind : which of the model's kinds of layer (``kinds_of``).
    size : bytes of a transfer, tokens of anything else.
    context : cached positions that the tokens read, in all.
    """

    what: str
    how: str
    kind: int
    size: int
    context: int = 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one measurement: median and quartiles, ns (rates: a second's)."""

    median: float
    q1: float
    q3: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, median, q3 = quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))

    @property
    def relative(self) -> float:
        """Interquartile range over median; 0 where nothing was spent."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Where to measure.

    sizes : bytes of transfers, rising. tokens, contexts : rising.
    """

    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    contexts: tuple[int, ...]


class Bench(Protocol):
    """A machine that measures itself, one thing at a time."""

    @property
    def hows(self) -> Mapping[str, tuple[str, ...]]:
        """What is measured, and how; of each the first is what a profile says."""

    @property
    def reads_context(self) -> bool:
        """Whether the dense part reads a cache."""

    def measure(self, point: Point) -> float:
        """One run of it, in ns."""

    def overheads(self) -> Mapping[str, float]:
        """``OVERHEADS``, ns: what the deciding thread and the hand-overs cost.

        SYNC and PLAN by layer event, HANDOVER by transfer, STEP by forward pass.
        """

    def rates(self) -> Mapping[str, float]:
        """``RATES`` of one host worker."""

    def memory(self) -> Memory:
        """What the device has, and what of it experts can never take."""

    def workers(self) -> int:
        """Host workers that run beside the other threads."""

    def facts(self) -> dict[str, Any]:
        """Versions, threads, processor."""

    def manifest(self) -> dict[str, Any]:
        """What was computed with."""

    def close(self) -> None:
        """Give everything back."""


Measured = Mapping[Point, Spread]


@dataclass(frozen=True, slots=True)
class Readings:
    """All that was measured. ``named``: overheads and rates, by name."""

    points: Measured
    named: Mapping[str, Spread]


def kinds_of(model: ModelProfile) -> list[tuple[int, int]]:
    """(first layer, how many there are) of each kind of layer: equal bytes, work and cache."""
    tables = (
        model.dense_bytes_table(),
        model.dense_flops_table(),
        model.kv_bytes_table(),
        model.kv_window_table(),
        model.expert_bytes_table(),
    )
    found: dict[tuple[int, ...], list[int]] = {}
    for layer, facts in enumerate(zip(*(table.tolist() for table in tables), strict=True)):
        found.setdefault(facts, []).append(layer)
    return [(layers[0], len(layers)) for layers in found.values()]


def rows_of(point: Point) -> tuple[Row, ...]:
    """Who attends: one request, whose newest tokens these are. They see themselves at least."""
    tokens = min(point.size, CONTEXTS[-1])
    return (Row(0, tokens, max(tokens, point.context)),)


def grid_of(model: ModelProfile, most_tokens: int) -> Grid:
    """Powers of two up to what is asked for, and the experts' own sizes."""
    experts = sorted(set(model.expert_bytes_table().tolist()))
    sizes = set(_doubling(SMALLEST_BYTES, experts[-1], 4)) | set(experts)
    return Grid(tuple(sorted(sizes)), tuple(_doubling(1, most_tokens, 2)), CONTEXTS)


def points_of(bench: Bench, grid: Grid, kinds: int, *, head: bool) -> list[Point]:
    """Everything to measure on a grid."""
    made: list[Point] = []
    for how in bench.hows[LINK]:
        made += [Point(LINK, how, 0, size) for size in grid.sizes]
    for what in (DENSE, EXPERT, HOST_EXPERT):
        contexts = grid.contexts if what == DENSE and bench.reads_context else (0,)
        for how in bench.hows[what]:
            tokens = grid.tokens if how == bench.hows[what][0] else grid.tokens[:1]
            made += [
                Point(what, how, kind, count, context)
                for kind in range(kinds)
                for count in tokens
                for context in contexts
            ]
    if head:
        # One row a request that ends a pass: batches, never prompts.
        made += [Point(HEAD, ALONE, 0, count) for count in grid.tokens[:6]]
    return made


def take(
    bench: Bench,
    points: Sequence[Point],
    repeats: int,
    progress: Progress = lambda done, total: None,
) -> Readings:
    """Measure all points once and again: repeats are interleaved, so that a slow spell of the
    machine touches every point alike. A first round is thrown away."""
    values: dict[Point, list[float]] = {point: [] for point in points}
    named: dict[str, list[float]] = {name: [] for name in (*OVERHEADS, *RATES)}
    for repeat in range(repeats + 1):
        for point in points:
            values[point].append(bench.measure(point))
        for name, value in {**bench.overheads(), **bench.rates()}.items():
            named[name].append(value)
        progress(repeat + 1, repeats + 1)
    return Readings(
        {point: Spread.of(found[1:]) for point, found in values.items()},
        {name: Spread.of(found[1:]) for name, found in named.items()},
    )


def _doubling(first: int, last: int, factor: int) -> list[int]:
    made = [first] if first <= last else []
    while made and made[-1] * factor <= last:
        made.append(made[-1] * factor)
    return made
