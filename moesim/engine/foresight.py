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

NONE = np.zeros(0, np.int64)


@dataclass(slots=True)
class Sights:
    """Records, one behind the other, and where they are.

    places : where each record begins. events : by layer event, where its record begins, or -1.
    owed_ops : by layer event, the work on its critical path. begins, ends : by step, where the
    first record begins, and how many there are.
    """

    records: list[IntArray] = field(default_factory=list)
    length: int = 0
    places: list[IntArray] = field(default_factory=list)
    events: list[IntArray] = field(default_factory=list)
    owed_ops: list[IntArray] = field(default_factory=list)
    begins: list[tuple[int, int]] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)

    def put(self, records: IntArray, places: IntArray) -> IntArray:
        """Append records that begin at some places of them, -1 for none; where they begin now."""
        here = np.where(places < 0, -1, places + self.length)
        self.records.append(records)
        self.places.append(here[places >= 0])
        self.length += len(records)
        return here


class Foreseer:
    """Looks at block after block with one seat, which must have begun its run."""

    def __init__(self, seat: ForecastSeat, costs: Costs) -> None:
        self._seat = seat
        self._costs = costs
        self._event = -1
        self._owed_ops = 0
        self._walk = MapWalk(seat) if MapWalk.suits(seat) else None
        self._prices: dict[tuple[int, int], int] = {(0, 0): 0}

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
        fore = np.concatenate([*sights.records, NONE])
        places = np.concatenate([*sights.places, NONE])
        fore[places + G.NS] = self._priced(fore[places + G.OPS], fore[places + G.BYTES])
        longest = int(fore[places + G.LENGTH].max(initial=0))
        return np.append(fore, longest)

    def _priced(self, ops: IntArray, nbytes: IntArray) -> IntArray:
        """What so much work takes on a host worker, in ns."""
        known = self._prices
        pairs = list(zip(ops.tolist(), nbytes.tolist(), strict=True))
        for pair in set(pairs) - known.keys():
            known[pair] = self._costs.job_ns(*pair)
        return np.array([known[pair] for pair in pairs], np.int64)

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
            sights.events.append(self._add(seat.foresee(gate), Phase.DECODE, sights))
            sights.owed_ops.append(np.array([self._owed_ops]))
            self._owed_ops = 0
        self._end(step, sights)

    def _begin(self, step: Step, sights: Sights) -> None:
        at, count = sights.length, 0
        for begin, phase in begin_facts(step):
            self._seat.hear(begin)
            count += int((self._add(self._seat.foresee(begin), phase, sights) >= 0).sum())
        sights.begins.append((at, count))

    def _end(self, step: Step, sights: Sights) -> None:
        at, count = sights.length, 0
        for end in end_facts(step):
            self._seat.hear(end)
            count += int((self._add(self._seat.foresee(end), Phase.DECODE, sights) >= 0).sum())
        sights.ends.append((at, count))

    def _add(self, foresight: Foresight | None, phase: Phase, sights: Sights) -> IntArray:
        """Where the record of what a fact foresees begins, int64 [1]; -1 if it foresees nothing."""
        if foresight is None:
            return np.array([-1])
        if not self._seat.background:
            self._owed_ops += foresight.ops
        return sights.put(self._record(foresight, phase), np.zeros(1, np.int64))

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
        blocks = np.array(work.blocks, np.int64)
        layers = np.array(work.block_layers, np.int64)
        for i in range(passes.steps):
            step = passes.step(i)
            self._begin(step, sights)
            low, high = work.passes[passes.first + i], work.passes[passes.first + i + 1]
            rows = blocks[low : high + 1]
            values = np.ascontiguousarray(work.gate[rows[0] : rows[-1]], np.int32)
            records, places = self._walk.walk(
                work.rows.request, step.number, values, rows - rows[0], layers[low:high]
            )
            sights.events.append(sights.put(records, places))
            sights.owed_ops.append(self._owes(records, places))
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
    low, high = work.passes[passes.first], work.passes[passes.last]
    tokens = np.diff(work.blocks[low : high + 1])
    of_pass = np.diff(work.passes[passes.first : passes.last + 1])
    return bool((tokens == np.repeat(work.pass_tokens[passes.first : passes.last], of_pass)).all())
