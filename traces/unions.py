"""How many experts a layer event needs when several requests decode together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.traces.reader import Columns, RequestRows, TraceReader
from moesim.traces.schema import DROPPED, TraceMeta

Seen = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Union:
    """Layer events in which ``batch`` requests decode, and the different experts that they ask for
    on average; None where no so many requests decode together."""

    batch: int
    events: int
    experts: float | None


def unions(
    path: Path, batches: Sequence[int], advance: Callable[[int], object] | None = None
) -> list[Union]:
    """The union of the experts by batch size, in the order of ``batches``.

    Requests are taken in file order, ``batch`` at a time, and decode pass by pass together until
    the first of them ends; a last group that is not whole is left out. ``advance`` is called with
    the rows of each request.

    Raises
    ------
    TraceError
        If the trace is damaged.
    """
    groups = [_Group(batch) for batch in batches]
    with TraceReader(path, Columns.experts_only()) as reader:
        for rows in reader.requests():
            seen = _seen(rows, reader.meta)
            for group in groups:
                group.add(seen)
            if advance is not None:
                advance(rows.rows)
    return [group.result() for group in groups]


class _Group:
    """Requests that decode together."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._members = 0
        self._union: Seen | None = None
        self._events = 0
        self._experts = 0

    def add(self, seen: Seen) -> None:
        if self._union is None:
            self._union = seen.copy()
        else:
            common = min(len(self._union), len(seen))
            self._union = self._union[:common] | seen[:common]
        self._members += 1
        if self._members == self._batch:
            counts = self._union.sum(axis=2)
            # A layer without an expert is none that decodes: an encoder's, or all was dropped.
            self._events += int((counts > 0).sum())
            self._experts += int(counts.sum())
            self._members, self._union = 0, None

    def result(self) -> Union:
        mean = self._experts / self._events if self._events else None
        return Union(self._batch, self._events, mean)


def _seen(rows: RequestRows, meta: TraceMeta) -> Seen:
    """Which experts each decoded pass asks for at each layer: bool [passes, layers, experts]."""
    decoded = np.flatnonzero(rows.iteration > 0)
    passes: npt.NDArray[Any] = np.unique(rows.iteration[decoded], return_inverse=True)[1]
    seen = np.zeros((int(passes.max(initial=-1)) + 1, meta.layers, meta.experts + 1), np.bool_)
    chosen = rows.experts[decoded].astype(np.int64)
    chosen[chosen == DROPPED] = meta.experts
    seen[passes[:, None], rows.layer[decoded].astype(np.int64)[:, None], chosen] = True
    return seen[:, :, :-1]
