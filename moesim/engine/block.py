"""A block of steps as arrays: what the compiled core reads of the workload."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np

from moesim.compiled import entry
from moesim.costs import Costs
from moesim.engine.exchange import Exchange
from moesim.engine.fields import D, E, T
from moesim.engine.foresight import Foreseer
from moesim.engine.gather import Gatherer
from moesim.errors import UsageError
from moesim.types import DROPPED, AnyArray, IntArray, LayerEvent, Phase, Slot, quick_maker
from moesim.workload import (
    KnownFuture,
    Part,
    Passes,
    Step,
    Work,
    layer_spans,
    slots_of,
)

make_event = quick_maker(LayerEvent)

LAYER_BITS, CONTEXT_BITS, TOKEN_BITS = 12, 32, 19
"""What a look-up of costs packs into one number: layers that differ, context, tokens."""

NONE_SAID, NOTHING_SEEN = np.zeros(1, np.int64), np.zeros(1, np.int64)

Piece = tuple[Work, slice | IntArray]
"""Rows of a request's recording."""


@dataclass(slots=True)
class Block:
    """``events`` [n, E], ``demand`` [D.STATUS, accesses], ``table`` [m, T] of the ``steps``."""

    items: Sequence[Passes | Step]
    events: IntArray
    demand: IntArray
    ids: AnyArray
    """Its experts once more, uint32."""
    table: IntArray
    said: IntArray
    """Predictions, local ids; ``events`` says which are whose."""
    fore: IntArray
    """What its facts foresee, record after record; last, the length of the longest."""
    sources: Sources | None = None
    """For a policy in plain Python."""

    @property
    def longest(self) -> int:
        """Length of the longest record, in words."""
        return int(self.fore[-1])

    def step(self, number: int) -> Step:
        """One of its steps."""
        for item in self.items:
            if isinstance(item, Step):
                if number == 0:
                    return item
                number -= 1
            elif number < item.steps:
                return item.step(number)
            else:
                number -= item.steps
        raise IndexError(number)


class BlockMaker:
    """Turns steps into blocks; remembers costs that it has looked up."""

    def __init__(
        self,
        costs: Costs,
        experts: int,
        *,
        flat: bool,
        distance: int,
        width: int,
        cpu: bool,
        future: KnownFuture | None = None,
        asked: bool = False,
        foreseer: Foreseer | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._costs = costs
        self._experts = experts
        self._flat = flat
        self._distance = distance
        self._width = width
        self._cpu = cpu
        self._future = future
        self._asked = asked
        self._foreseer = foreseer
        simple = not (flat or asked or distance or future or foreseer or exchange)
        self._gatherer = Gatherer(costs, experts, cpu=cpu) if simple else None
        self._exchange = exchange
        self._dense: dict[int, int] = {}
        self._alike = _classes(costs.alike)
        self._experts_alike = _classes(costs.experts_alike)
        self._accesses = 0

    def make(self, items: Sequence[Passes | Step]) -> Block:
        """The block of these steps."""
        g, only = self._gatherer, items[0]
        if g is not None and len(items) == 1 and isinstance(only, Step) and g.gather(only):
            return Block(items, g.events, g.demand, g.ids, g.table, NONE_SAID, NOTHING_SEEN)
        rows = _Rows(items, asked=self._asked)
        experts = _gather([w.rows.experts[at] for w, at in rows.pieces])
        phases = rows.phases()
        starts = np.append(rows.starts, len(experts))
        ids, tokens, phase, ends = _unite(experts, starts, phases, self._experts)
        layers = rows.layers
        events = np.zeros((len(layers), len(E)), np.int64)
        events[:, E.LAYER] = layers
        events[:, E.STEP] = rows.numbers
        events[:, E.PHASE] = phases[starts[:-1]]
        events[:, E.DENSE_NS] = self._dense_ns(rows)
        events[:, E.FIRST] = ends[:-1]
        events[:, E.COUNT] = np.diff(ends)
        of_event = np.repeat(np.arange(len(layers)), events[:, E.COUNT])
        demand = np.zeros((D.STATUS, len(ids)), np.int64)
        demand[D.EXPERT] = ids + layers[of_event] * self._experts
        demand[D.TOKENS] = tokens
        demand[D.PHASE] = phase
        counts = rows.counts
        # In flat mode an access knows the predictions of its own token alone.
        bounds = np.arange(len(experts) + 1) if self._flat else starts
        said, of_row = self._predictions(rows, bounds)
        row: IntArray | None = None
        if self._flat:
            events, demand, counts, row = _flatten(
                events, experts, phases, starts, counts, of_row, self._experts
            )
        else:
            events[:, E.PLAN], events[:, E.PLANS] = of_row[:-1], np.diff(of_row)
        events[:, E.MIXED] = _mixed(events, demand[D.PHASE])
        if self._exchange is not None:
            chosen = experts if row is None else experts.reshape(-1)[row][:, None]
            begins = starts if row is None else np.arange(len(events) + 1)
            where = events[:, E.LAYER], events[:, E.STEP]
            events[:, E.EXCHANGE_NS] = self._exchange.of_block(*where, begins, chosen)
        self._add_costs(demand)
        if self._future is not None:
            _, _, following = self._future.table
            last = self._accesses + demand.shape[1]
            demand[D.NEXT_USE] = following[self._accesses : last]
        self._accesses += demand.shape[1]
        sources = _sources(rows, experts, starts, row, events, demand) if self._asked else None
        ids = demand[D.EXPERT].astype(np.uint32)
        table = self._steps(items, counts)
        events[:, E.SIGHT] = -1
        fore = np.zeros(1, np.int64)
        if self._foreseer is not None:
            fore = self._foreseer.look(items, events, table)
        return Block(items, events, demand, ids, table, said, fore, sources)

    def demand(self, items: Sequence[Passes | Step]) -> tuple[AnyArray, IntArray]:
        """Expert ids, int32 [accesses], of these steps, and how many each layer event demands."""
        rows = _Rows(items, asked=False)
        experts = _gather([w.rows.experts[at] for w, at in rows.pieces])
        phases = rows.phases()
        starts = np.append(rows.starts, len(experts))
        if self._flat:
            kept = experts.reshape(-1) != DROPPED
            layer = np.repeat(rows.layers, np.diff(starts) * experts.shape[1])
            ids = (experts.reshape(-1) + layer * self._experts)[kept]
            return ids.astype(np.int32), np.ones(len(ids), np.int64)
        ids, _, _, ends = _unite(experts, starts, phases, self._experts)
        lengths = np.diff(ends)
        whole = ids + np.repeat(rows.layers, lengths) * self._experts
        return whole.astype(np.int32), lengths

    def _dense_ns(self, rows: _Rows) -> IntArray:
        _refuse_too_many("tokens", rows.tokens, TOKEN_BITS)
        _refuse_too_many("cached positions", rows.contexts, CONTEXT_BITS)
        _refuse_too_many("layers", rows.layers, LAYER_BITS)
        alike, layers = self._alike
        packed = (rows.tokens << CONTEXT_BITS | rows.contexts) * len(layers) + alike[rows.layers]
        kinds, which = _kinds(packed)
        known = self._dense
        for kind in kinds:
            if kind not in known:
                rest, first = divmod(kind, len(layers))
                tokens, context = divmod(rest, 1 << CONTEXT_BITS)
                known[kind] = self._costs.dense_ns(tokens, context, layers[first])
        found: IntArray = np.array([known[kind] for kind in kinds], np.int64)[which]
        return found

    def _add_costs(self, demand: IntArray) -> None:
        alike, layers = self._experts_alike
        packed = demand[D.TOKENS] * len(layers)
        if len(layers) > 1:
            packed += alike[demand[D.EXPERT] // self._experts]
        kinds, which = _kinds(packed)
        pairs = [(kind // len(layers), layers[kind % len(layers)]) for kind in kinds]
        ns = np.array([self._costs.expert_ns(*pair) for pair in pairs], np.int64)
        demand[D.NS] = ns[which]
        if self._cpu:
            ns = np.array([self._costs.cpu_expert_ns(*pair) for pair in pairs], np.int64)
            demand[D.CPU_NS] = ns[which]

    def _predictions(self, rows: _Rows, starts: IntArray) -> tuple[IntArray, IntArray]:
        """The predictions of rows ``starts[i]`` to ``starts[i + 1]``, once each, in order of first
        mention; and where each begins, and the end."""
        if not self._distance:
            return np.zeros(1, np.int64), np.zeros(len(starts), np.int64)
        ahead = _gather([w.ahead[self._distance][at] for w, at in rows.pieces])
        ahead = ahead[:, : self._width] if self._width else ahead
        none = np.zeros(len(ahead), np.uint8)
        ids, _, _, ends = _unite(np.ascontiguousarray(ahead), starts, none, self._experts)
        return np.append(ids, 0), ends

    def _steps(self, items: Sequence[Passes | Step], counts: IntArray) -> IntArray:
        table = np.zeros((len(counts), len(T)), np.int64)
        table[:, T.LAST] = np.cumsum(counts)
        table[:, T.FIRST] = table[:, T.LAST] - counts
        table[:, T.VISIT] = self._asked
        row = 0
        for item in items:
            steps = item.steps if isinstance(item, Passes) else 1
            parts = () if isinstance(item, Passes) else item.parts
            table[row : row + steps, T.BEGINS] = not parts or any(part.begins for part in parts)
            ends = sum(part.ends for part in parts) if parts else 1
            table[row : row + steps, T.HEAD_NS] = self._costs.head_ns(ends)
            row += steps
        return table


class _Rows:
    """The rows of a block, event by event, as pieces of requests.

    starts : row of the block where each event begins. tokens, contexts : what its dense part costs.
    numbers : number of its step. counts : events of each step.
    """

    def __init__(self, items: Sequence[Passes | Step], *, asked: bool) -> None:
        self.pieces: list[Piece] = []
        self.slots: list[tuple[Slot, ...]] = []
        self._asked = asked
        self._stated: dict[int, Phase] = {}
        """The phase of a piece whose rows were recorded in another."""
        self._length = 0
        self._events: list[tuple[AnyArray, ...]] = []
        self.counts = np.concatenate([self._cut(item) for item in items])
        columns = [np.concatenate(column) for column in zip(*self._events, strict=True)]
        self.starts, self.layers, self.tokens, self.contexts, self.numbers = columns

    def _cut(self, item: Passes | Step) -> IntArray:
        """Append the layer events of some steps; how many each has."""
        return self._whole(item) if isinstance(item, Passes) else self._gathered(item)

    def _whole(self, passes: Passes) -> IntArray:
        """Forward passes of one request: already in event order."""
        work = passes.work
        first = work.recorded(passes.first)
        bounds = np.array(work.passes[first : first + passes.steps + 1])
        blocks = work.bounds[bounds[0] : bounds[-1] + 1]
        counts = np.diff(bounds)
        numbers = np.arange(passes.number, passes.number + passes.steps)
        self._events.append(
            (
                blocks[:-1] - blocks[0] + self._length,
                work.layers[bounds[0] : bounds[-1]],
                np.diff(blocks) + passes.padding,
                _contexts(passes, blocks[1:] - 1, counts),
                np.repeat(numbers, counts),
            )
        )
        self._add(work, slice(int(blocks[0]), int(blocks[-1])), blocks[-1] - blocks[0])
        if self._asked:
            self._add_slots(passes, counts.tolist())
        return counts

    def _add_slots(self, passes: Passes, counts: Sequence[int]) -> None:
        """Whose tokens each layer event has: those of the one request."""
        work = passes.work
        block = work.passes[work.recorded(passes.first)]
        for number, count in enumerate(counts, passes.first):
            iteration, phase = work.iteration(number), work.phase(number)
            made: dict[int, tuple[Slot, ...]] = {}
            for first in range(block, block + count):
                tokens = work.blocks[first + 1] - work.blocks[first]
                if tokens not in made:
                    made[tokens] = (Slot(work.rows.request, iteration, phase, 0, tokens),)
                self.slots.append(made[tokens])
            block += count

    def _gathered(self, step: Step) -> IntArray:
        """A step of several requests, or of a chunk: layer by layer."""
        rows = []
        for layer, spans in layer_spans(step):
            tokens = sum(span.tokens for span in spans) + step.padding
            context = sum(span.context for span in spans)
            rows.append((self._length, layer, tokens, context, step.number))
            for span in spans:
                self._add(span.part.work, span.rows, span.tokens, span.part)
            if self._asked:
                self.slots.append(slots_of(spans))
        self._events.append(tuple(np.array(rows, np.int64).reshape(-1, 5).T))
        return np.array([len(rows)])

    def _add(
        self, work: Work, rows: slice | IntArray, count: int, part: Part | None = None
    ) -> None:
        self._length += int(count)
        if part is not None and part.number == 0 and work.is_prompted:
            # Decoded rows may stand in for it.
            self._stated[len(self.pieces)] = Phase.PREFILL
        self.pieces.append((work, rows))

    def phases(self) -> AnyArray:
        """Of each row, uint8."""
        return _gather(
            [
                np.full_like(w.rows.phase[at], self._stated[piece])
                if piece in self._stated
                else w.rows.phase[at]
                for piece, (w, at) in enumerate(self.pieces)
            ]
        )


def _contexts(passes: Passes, last_rows: IntArray, counts: IntArray) -> IntArray:
    """``Work.context`` of the last row of each layer event."""
    work = passes.work
    own = work.rows.position[last_rows].astype(np.int64) + 1
    if work.shape is None:
        return own
    shifts = [
        work.context(number, row) - int(work.rows.position[row]) - 1
        for number, row in enumerate(last_rows[np.cumsum(counts) - 1].tolist(), passes.first)
    ]
    longer: IntArray = own + np.repeat(shifts, counts)
    return longer


def _refuse_too_many(what: str, values: IntArray, bits: int) -> None:
    if len(values) and int(values.max()) >= 1 << bits:
        raise UsageError(
            f"--engine fast: a layer event has {int(values.max())} {what}, and it takes fewer than "
            f"{1 << bits}; use --engine reference or --chunk-tokens"
        )


def _gather(pieces: list[AnyArray]) -> AnyArray:
    # Always a copy: what a reader gives may not be written, which is another type to numba.
    return np.concatenate(pieces)


def _unite_rows(experts: Any, starts: Any, phases: Any, size: int) -> Any:
    """``workload.union`` of each event: local ids, tokens, phases, and where each event begins."""
    rows, k = experts.shape
    ids = np.empty(rows * k, np.int64)
    tokens = np.empty(rows * k, np.int64)
    phase = np.empty(rows * k, np.int64)
    ends = np.zeros(len(starts), np.int64)
    where = np.full(size, -1, np.int64)
    n = 0
    for event in range(len(starts) - 1):
        first = n
        for row in range(starts[event], starts[event + 1]):
            for rank in range(k):
                expert = np.int64(experts[row, rank])
                if expert == DROPPED:
                    continue
                if where[expert] >= first:
                    tokens[where[expert]] += 1
                    continue
                where[expert] = n
                ids[n] = expert
                tokens[n] = 1
                phase[n] = phases[row]
                n += 1
        ends[event + 1] = n
    return ids[:n], tokens[:n], phase[:n], ends


_unite = entry(_unite_rows, allocates=True)


def load_block_functions() -> list[tuple[Any, Any]]:
    """What Python calls here, and the types that it calls it with."""
    experts, starts = numba.uint16[:, ::1], numba.int64[::1]
    return [(_unite, (experts, starts, numba.uint8[::1], numba.int64))]


def _flatten(
    events: IntArray,
    experts: AnyArray,
    phases: AnyArray,
    starts: IntArray,
    counts: IntArray,
    said: IntArray,
    size: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """``workload.flat_events``: every access an event of its own, and the row that it is of."""
    kept = np.flatnonzero(experts.reshape(-1) != DROPPED)
    row = kept // experts.shape[1]
    of_event = np.searchsorted(starts, row, side="right") - 1
    flat = events[of_event]
    first = np.concatenate(([True], of_event[1:] != of_event[:-1])) if len(kept) else kept > 0
    flat[~first, E.DENSE_NS] = -1
    flat[:, E.PHASE] = phases[row]
    flat[:, E.FIRST] = np.arange(len(kept))
    flat[:, E.COUNT] = 1
    flat[:, E.PLAN], flat[:, E.PLANS] = said[row], said[row + 1] - said[row]
    demand = np.zeros((D.STATUS, len(kept)), np.int64)
    demand[D.EXPERT] = experts.reshape(-1)[kept] + flat[:, E.LAYER] * size
    demand[D.TOKENS] = 1
    demand[D.PHASE] = phases[row]
    steps = np.repeat(np.arange(len(counts)), counts)
    return flat, demand, np.bincount(steps[of_event], minlength=len(counts)), kept


def _classes(alike: IntArray) -> tuple[IntArray, list[int]]:
    """The class of each layer, and a layer of each class."""
    layers, which = np.unique(alike, return_inverse=True)
    return which.astype(np.int64), layers.tolist()


def _mixed(events: IntArray, phases: IntArray) -> AnyArray:
    """Whether an event's accesses are of both phases."""
    if not len(phases) or phases.min() == phases.max():
        return np.zeros(len(events), bool)
    decoding = np.concatenate(([0], np.cumsum(phases)))
    first, count = events[:, E.FIRST], events[:, E.COUNT]
    inside = decoding[first + count] - decoding[first]
    mixed: AnyArray = (inside > 0) & (inside < count)
    return mixed


def _kinds(codes: IntArray) -> tuple[list[int], IntArray]:
    """The different values, and which of them each is."""
    if not len(codes):
        return [], codes
    low = int(codes.min())
    span = int(codes.max()) - low + 1
    if span > 4 * len(codes):
        kinds, which = np.unique(codes, return_inverse=True)
        return kinds.tolist(), which
    # Most blocks hold few kinds close together: no need to sort.
    present = np.zeros(span, bool)
    present[codes - low] = True
    rank = np.cumsum(present) - 1
    return (np.flatnonzero(present) + low).tolist(), rank[codes - low]


# ---- for a policy in plain Python ----------------------------------------------------------------


@dataclass(slots=True)
class Sources:
    """What a block's facts are made of.

    starts : row of the block where each whole layer event begins, and the end. slots : of each
    whole layer event. access : in flat mode, the access ``row * k + rank`` that each event is.
    bounds : of each event in the demand, whose columns (ids, tokens, phases) are no part of the
    block: no event looks at those of another, whatever a policy does with its own.
    """

    experts: AnyArray
    weights: AnyArray | None
    gate: AnyArray | None
    ahead: dict[int, AnyArray]
    norms: AnyArray | None
    starts: list[int]
    slots: list[tuple[Slot, ...]]
    access: list[int] | None
    bounds: list[int]
    demand: tuple[IntArray, IntArray, AnyArray]

    def demanded(self, row: int) -> tuple[IntArray, IntArray, AnyArray]:
        """Expert ids, tokens and phases of a block's event."""
        bounds = self.bounds
        first, last = bounds[row], bounds[row + 1]
        experts, tokens, phases = self.demand
        return experts[first:last], tokens[first:last], phases[first:last]

    def layer_event(self, row: int, event: int, step: int, layer: int) -> LayerEvent:
        """A block's event, as ``workload.layer_events`` or ``flat_events`` would give it."""
        if self.access is not None:
            return self._flat(self.access[row], event, step, layer)
        first, last = self.starts[row], self.starts[row + 1]
        return self._cut(self.experts[first:last], self.slots[row], first, last, event, step, layer)

    def _flat(self, access: int, event: int, step: int, layer: int) -> LayerEvent:
        row, rank = divmod(access, self.experts.shape[1])
        whole = bisect_right(self.starts, row) - 1
        token = row - self.starts[whole]
        slot = next(s for s in reversed(self.slots[whole]) if s.first <= token)
        slots = (slot._replace(first=0, tokens=1),)
        chosen = self.experts[row : row + 1, rank : rank + 1]
        whole_row = self._cut(chosen, slots, row, row + 1, event, step, layer)
        if self.weights is None:
            return whole_row
        return replace(whole_row, weights=self.weights[row : row + 1, rank : rank + 1])

    def _cut(
        self,
        experts: AnyArray,
        slots: tuple[Slot, ...],
        first: int,
        last: int,
        event: int,
        step: int,
        layer: int,
    ) -> LayerEvent:
        return make_event(
            event,
            step,
            layer,
            slots,
            experts,
            None if self.weights is None else self.weights[first:last],
            None if self.gate is None else self.gate[first:last],
            {d: rows[first:last] for d, rows in self.ahead.items()} if self.ahead else {},
            None if self.norms is None else self.norms[first:last],
        )


def _sources(
    rows: _Rows,
    experts: AnyArray,
    starts: IntArray,
    access: IntArray | None,
    events: IntArray,
    demand: IntArray,
) -> Sources:
    works = [piece[0] for piece in rows.pieces]

    def gathered(column: Sequence[AnyArray | None]) -> AnyArray | None:
        cut = [
            None if values is None else values[at]
            for values, (_, at) in zip(column, rows.pieces, strict=True)
        ]
        present = [values for values in cut if values is not None]
        return _gather(present) if present else None

    ahead = {d: gathered([w.ahead[d] for w in works]) for d in (works[0].ahead if works else ())}
    return Sources(
        experts,
        gathered([w.weights for w in works]),
        gathered([w.gate for w in works]),
        {d: rows for d, rows in ahead.items() if rows is not None},
        gathered([w.norms for w in works]),
        starts.tolist(),
        rows.slots,
        None if access is None else access.tolist(),
        [*events[:, E.FIRST].tolist(), demand.shape[1]],
        (
            demand[D.EXPERT].copy(),
            demand[D.TOKENS].copy(),
            demand[D.PHASE].astype(np.uint8),
        ),
    )
