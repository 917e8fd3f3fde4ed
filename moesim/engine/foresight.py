"""What a predicting prefetch seat foresees in a block of steps, as records for the compiled core.

A forecast is a function of the facts so far, whatever the cache does, so one seat looks at the
workload once for every configuration that shares it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from moesim.costs import Costs
from moesim.engine.fields import E, G, H, T
from moesim.engine.map_walk import MapWalk
from moesim.policies.forecast import ForecastSeat, Foresight
from moesim.types import AnyArray, Gate, IntArray, Phase, Status
from moesim.workload import Passes, Step, begin_facts, end_facts, layer_events

BYTES_BITS = 32
"""Of a number that holds operations above bytes."""


@dataclass(slots=True)
class Sights:
    """Records, one behind the other, and where they are.

    events : by layer event, where its record begins, or -1. owed_ops : by layer event, the work on
    its critical path. begins, ends : by step, where the first record begins, and how many there
    are.
    """

    records: list[IntArray] = field(default_factory=list)
    length: int = 0
    events: list[IntArray] = field(default_factory=list)
    owed_ops: list[IntArray] = field(default_factory=list)
    begins: list[tuple[int, int]] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)

    def put(self, records: IntArray) -> int:
        """Append records; where the first begins."""
        at = self.length
        self.records.append(records)
        self.length += len(records)
        return at


class Foreseer:
    """Looks at block after block with one seat, which must have begun its run."""

    def __init__(self, seat: ForecastSeat, costs: Costs) -> None:
        self._seat = seat
        self._costs = costs
        self._event = -1
        self._owed_ops = 0
        self._walk = MapWalk(seat) if MapWalk.suits(seat) else None
        self._prices: dict[int, int] = {}

    def look(self, items: Sequence[Passes | Step], events: IntArray, table: IntArray) -> IntArray:
        """The records of a block, and last the length of the longest; fills in where its layer
        events and steps find theirs."""
        sights = Sights()
        for item in items:
            if self._walk is not None and isinstance(item, Passes) and _is_even(item):
                self._stride(item, sights)
                continue
            for step in _steps(item):
                self._look(step, sights)
        events[:, E.SIGHT] = np.concatenate(sights.events)
        owed = np.concatenate(sights.owed_ops)
        events[:, E.OWED_NS] = self._priced(owed, np.zeros_like(owed))
        table[:, [T.SIGHT, T.SIGHTS]] = sights.begins
        table[:, [T.END_SIGHT, T.END_SIGHTS]] = sights.ends
        fore = np.concatenate([*sights.records, np.zeros(1, np.int64)])
        places = _places(sights, events[:, E.SIGHT], fore)
        fore[places + G.NS] = self._priced(fore[places + G.OPS], fore[places + G.BYTES])
        fore[-1] = fore[places + G.LENGTH].max(initial=0)
        return fore

    def _priced(self, ops: IntArray, nbytes: IntArray) -> IntArray:
        """What so much work takes on a host worker, in ns."""
        if len(ops) and (nbytes.max() >> BYTES_BITS or ops.max() >> 63 - BYTES_BITS):
            pairs = zip(ops.tolist(), nbytes.tolist(), strict=True)
            return np.array([self._costs.job_ns(*pair) for pair in pairs], np.int64)
        packed, which = np.unique(ops << BYTES_BITS | nbytes, return_inverse=True)
        known = self._prices
        for kind in packed.tolist():
            if kind not in known:
                known[kind] = self._costs.job_ns(kind >> BYTES_BITS, kind & (1 << BYTES_BITS) - 1)
        priced: IntArray = np.array([known[kind] for kind in packed.tolist()], np.int64)[which]
        return priced

    # ---- fact by fact ----------------------------------------------------------------------------

    def _look(self, step: Step, sights: Sights) -> None:
        self._begin(step, sights)
        seat = self._seat
        for item in layer_events(step, self._event + 1, seat.world.experts):
            self._event = item.event.event
            demand = item.demand
            status = np.full(len(demand.experts), Status.MISS, np.uint8)
            gate = Gate(item.event, demand.experts, demand.tokens, status, demand.phases)
            seat.hear(gate)
            sights.events.append(np.array([self._add(seat.foresee(gate), Phase.DECODE, sights)]))
            sights.owed_ops.append(np.array([self._owed_ops]))
            self._owed_ops = 0
        self._end(step, sights)

    def _begin(self, step: Step, sights: Sights) -> None:
        at, count = sights.length, 0
        for begin, phase in begin_facts(step):
            self._seat.hear(begin)
            count += self._add(self._seat.foresee(begin), phase, sights) >= 0
        sights.begins.append((at, count))

    def _end(self, step: Step, sights: Sights) -> None:
        at, count = sights.length, 0
        for end in end_facts(step):
            self._seat.hear(end)
            count += self._add(self._seat.foresee(end), Phase.DECODE, sights) >= 0
        sights.ends.append((at, count))

    def _add(self, foresight: Foresight | None, phase: Phase, sights: Sights) -> int:
        """Where the record of what a fact foresees begins; -1 if it foresees nothing."""
        if foresight is None:
            return -1
        if not self._seat.background:
            self._owed_ops += foresight.ops
        return sights.put(self._record(foresight, phase))

    def _record(self, foresight: Foresight, phase: Phase) -> IntArray:
        parts: list[AnyArray] = [np.zeros(len(G), np.int64)]
        for layer, probabilities, chosen in foresight.forecasts:
            head = np.zeros(len(H), np.int64)
            head[H.EVENTS], head[H.LAYER] = self._seat.events_to(layer), layer
            head[H.CHOSEN] = len(chosen)
            parts += [head, chosen, probabilities]
        record = np.concatenate(parts, dtype=np.int64)
        record[G.LENGTH] = len(record)
        record[G.PHASE], record[G.COUNT] = phase, len(foresight.forecasts)
        record[G.OPS], record[G.BYTES] = foresight.ops, foresight.nbytes
        record[G.KEPT_OPS], record[G.KEPT_BYTES] = foresight.kept_ops, foresight.kept_nbytes
        return record

    # ---- pass by pass ----------------------------------------------------------------------------

    def _stride(self, passes: Passes, sights: Sights) -> None:
        """Whole passes of one request: their gates at once."""
        assert self._walk is not None
        work = passes.work
        assert work.gate is not None
        blocks, layers = work.bounds, work.layers
        for i in range(passes.steps):
            step = passes.step(i)
            self._begin(step, sights)
            recorded = work.recorded(passes.first + i)
            low, high = work.passes[recorded], work.passes[recorded + 1]
            rows = blocks[low : high + 1]
            values = np.ascontiguousarray(work.gate[rows[0] : rows[-1]], np.int32)
            records, places = self._walk.walk(
                work.rows.request, step.number, values, rows - rows[0], layers[low:high]
            )
            sights.owed_ops.append(self._owes(records, places))
            places[places >= 0] += sights.put(records)
            sights.events.append(places)
            self._event += high - low
            self._end(step, sights)

    def _owes(self, records: IntArray, places: IntArray) -> IntArray:
        """What each gate is charged, with what lies before the first."""
        if self._seat.background:
            return np.zeros(len(places), np.int64)
        owed = np.zeros(len(places), np.int64)
        known = places >= 0
        owed[known] = records[places[known] + G.OPS]
        owed[0] += self._owed_ops
        self._owed_ops = 0
        return owed


def _steps(item: Passes | Step) -> Iterator[Step]:
    if isinstance(item, Step):
        yield item
    else:
        yield from (item.step(i) for i in range(item.steps))


def _is_even(passes: Passes) -> bool:
    """Whether every layer of a pass sees the same tokens, and their gates are there."""
    work = passes.work
    if work.gate is None:
        return False
    first = work.recorded(passes.first)
    last = first + passes.steps
    tokens = np.diff(work.blocks[work.passes[first] : work.passes[last] + 1])
    of_pass = np.diff(work.passes[first : last + 1])
    return bool((tokens == np.repeat(work.pass_tokens[first:last], of_pass)).all())


def _places(sights: Sights, of_events: IntArray, fore: IntArray) -> IntArray:
    """Where all records begin."""
    between: list[int] = []
    for first, count in (*sights.begins, *sights.ends):
        for _ in range(count):
            between.append(first)
            first += int(fore[first + G.LENGTH])
    return np.concatenate([of_events[of_events >= 0], np.array(between, np.int64)])
