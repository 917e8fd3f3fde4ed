"""Steps of a run on the clock, and hits by layer, read from its ``timeline.json``.

A timeline tells when each load had the link and when each expert computed. What follows from it:
an expert was *needed* at its layer's gate (the end of the dense part and the time that the routing
takes to the host), and was a *hit* if it was not computed on the host and no load of it ended
between that gate and its own computing. In simulated runs these hits are, to the last one, those of
``summary.json``.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesim.errors import UsageError
from moesim.result import TIMELINE
from moesim.timeline import LANES
from moesim.types import IntArray

MOST_BINS = 48
"""Columns of a heat map over the steps of a run."""

_LOADS = ("demand", "prefetch")
_COMPUTED = ("expert", "cpu")


class Span(NamedTuple):
    """Times in ns. layer, expert : -1 where none is meant."""

    start: int
    end: int
    lane: str
    layer: int
    expert: int


@dataclass(slots=True)
class Timeline:
    """A run on the clock.

    passes : index into ``events`` where each forward pass begins, then their number.
    gates : for each layer event, when its routing was known.
    """

    spans: list[Span]
    events: list[Span]
    layers: list[int]
    gates: list[int]
    passes: list[int]
    _by_key: dict[tuple[int, int], list[Span]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Forward passes."""
        return len(self.passes) - 1

    def window(self, step: int) -> tuple[int, int]:
        """Start of a forward pass and of what follows it, ns."""
        first, last = self.passes[step], self.passes[step + 1]
        end = self.events[last].start if last < len(self.events) else self.spans[-1].end
        return self.events[first].start, max(end, self.events[first].end)

    def inside(self, step: int) -> list[Span]:
        """The spans that a forward pass touches."""
        start, end = self.window(step)
        return [span for span in self.spans if span.start < end and span.end > start]

    def need(self, load: Span) -> int | None:
        """When what was loaded is needed: the gate of the event that next computes it."""
        uses = self._by_key.get((load.layer, load.expert), [])
        following = bisect_left(uses, load.end, key=lambda use: use.start)
        if following == len(uses):
            return None
        event = bisect_right(self.events, uses[following].start, key=lambda e: e.start) - 1
        return self.gates[event]

    def hits(self, layers: int) -> tuple[IntArray, IntArray]:
        """Hits and accesses, int64 [layers, steps]."""
        loads: dict[tuple[int, int], list[int]] = defaultdict(list)
        for span in sorted(self.spans, key=lambda span: span.end):
            if span.lane in _LOADS:
                loads[span.layer, span.expert].append(span.end)
        hits = np.zeros((layers, self.steps), np.int64)
        accesses = np.zeros_like(hits)
        starts = [event.start for event in self.events]
        for span in self.spans:
            if span.lane in _COMPUTED:
                event = bisect_right(starts, span.start) - 1
                step = bisect_right(self.passes, event) - 1
                ends = loads[span.layer, span.expert]
                last = bisect_right(ends, span.start) - 1
                came = last >= 0 and ends[last] > self.gates[event]
                accesses[span.layer, step] += 1
                hits[span.layer, step] += span.lane == "expert" and not came
        return hits, accesses


def read(folder: Path, sync_ns: int, layers: int) -> Timeline | None:
    """A run's timeline; None where it kept none.

    sync_ns : what the routing takes to the host, after the dense part.

    Raises
    ------
    UsageError
        Naming the file, if it is not as moesim writes it.
    """
    path = folder / TIMELINE
    if not path.is_file():
        return None
    try:
        events = json.loads(path.read_text())["traceEvents"]
        spans = sorted(_span(event) for event in events if event["ph"] == "X")
        if any(not -1 <= span.layer < layers for span in spans):
            raise ValueError("a layer that the model has not")
        return _timeline(spans, sync_ns)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: is not as moesim writes it ({type(error).__name__}); make the run again"
        ) from None


def binned(part: IntArray, whole: IntArray) -> tuple[list[list[float | None]], int]:
    """Shares [layers][bins] over neighbouring steps, None where nothing was asked; steps a bin."""
    steps = part.shape[1]
    each = max(1, -(-steps // MOST_BINS))
    starts = np.arange(0, steps, each)
    top = np.add.reduceat(part, starts, axis=1).tolist()
    bottom = np.add.reduceat(whole, starts, axis=1).tolist()
    rows = [
        [round(a / b, 4) if b else None for a, b in zip(left, right, strict=True)]
        for left, right in zip(top, bottom, strict=True)
    ]
    return rows, each


def _span(event: dict[str, Any]) -> Span:
    about = event.get("args", {})
    start, lane = round(event["ts"] * 1000), event["cat"]
    if lane not in LANES:
        raise ValueError("an unknown lane")
    end = start + round(event["dur"] * 1000)
    return Span(start, end, lane, int(about.get("layer", -1)), int(about.get("expert", -1)))


def _timeline(spans: list[Span], sync_ns: int) -> Timeline | None:
    dense = [span for span in spans if span.lane == "dense"]
    if not dense:
        return None
    layers = _layers(dense, [span for span in spans if span.lane in _COMPUTED])
    # The output head is a dense part too, of no layer; it ends a forward pass.
    events = [(span, layer) for span, layer in zip(dense, layers, strict=True) if layer >= 0]
    if not events:
        return None
    told = [layer for _, layer in events]
    passes = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(told)) if b <= a), len(told)]
    gates = [span.end + sync_ns for span, _ in events]
    made = Timeline(spans, [span for span, _ in events], told, gates, passes)
    by_key: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in spans:
        if span.lane in _COMPUTED:
            by_key[span.layer, span.expert].append(span)
    made._by_key = dict(by_key)
    return made


def _layers(dense: Sequence[Span], computed: Sequence[Span]) -> list[int]:
    """The layer of each dense part: that of the first expert computed after it, -1 without one."""
    layers, at = [], 0
    for number, span in enumerate(dense):
        following = dense[number + 1].start if number + 1 < len(dense) else None
        while at < len(computed) and computed[at].start < span.start:
            at += 1
        here = at < len(computed) and (following is None or computed[at].start < following)
        layers.append(computed[at].layer if here else -1)
    return layers
