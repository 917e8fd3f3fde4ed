"""From recorded rows to layer events: what a host serves, step by step, whatever its clock.

A *scheduler* turns requests into steps; a step turns into layer events. Nothing here knows a
policy's choices, so the same workload feeds every engine, and a pass without a clock yields the
future that oracles may see.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, Protocol

import numpy as np

from moesim.degrade import Allowed, recalled
from moesim.errors import NotRunError
from moesim.traces.reader import Columns, RequestRows, gate_probabilities
from moesim.traces.schema import TraceMeta
from moesim.types import (
    DROPPED,
    NEVER,
    PROBABILITY_ONE,
    AnyArray,
    IntArray,
    IterationBegin,
    IterationEnd,
    LayerEvent,
    Needs,
    Phase,
    RequestBegin,
    RequestEnd,
    Slot,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Which decision inputs a run reads, and the degradations that it accepts."""

    needs: Needs = Needs.NONE
    distances: tuple[int, ...] = ()
    allowed: Allowed = field(default_factory=Allowed)

    def columns(self) -> Columns:
        """The trace columns to decode."""
        return Columns(
            weights=bool(self.needs & (Needs.WEIGHTS | Needs.GATE)),
            gate=Needs.GATE in self.needs,
            ahead=Needs.AHEAD in self.needs and self.allowed.recall is None,
            norms=Needs.NORMS in self.needs,
            tokens=False,
            embedding=Needs.EMBEDDING in self.needs,
            facts=True,
            long_facts=Needs.EMBEDDING in self.needs,
        )


# ---- one request ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """How long a request is served, whatever the length of the recording that it replays.

    A prompt longer than the recorded one repeats its rows from the first, a shorter one is its
    head; so are decoded passes. Positions go on.

    prompt_tokens : of its prefill; 0: it has none.
    passes : forward passes, the prefill among them.
    before : tokens that its KV cache holds already.
    """

    prompt_tokens: int
    passes: int
    before: int = 0


@dataclass(eq=False, slots=True)
class Work:
    """A request prepared for service: rows cut into (iteration, layer) blocks, inputs quantised.

    index : place of the request in the trace (or in the log of arrivals), from 0.
    blocks : row where each block begins, then the number of rows; ``bounds``: as int64.
    block_layers : layer of each block; ``layers``: as int64.
    passes : first block of each iteration, then the number of blocks.
    pass_tokens : most tokens that a layer of each iteration sees.
    lead : 1 if the recording begins with a prefill, else 0.
    shape : how long it is served; None: as recorded.
    bank, base : the experts of all recordings of the run, uint16 [rows, k], and the first row of
    this one; None where its passes are not all alike.
    follows, followed : the request (by ``index``) whose end it waits for, or -1; whether another
    waits for its own.
    """

    index: int
    rows: RequestRows
    arrival_ns: int | None
    blocks: list[int]
    block_layers: list[int]
    passes: list[int]
    pass_tokens: list[int]
    bounds: IntArray
    layers: IntArray
    weights: AnyArray | None = None
    gate: AnyArray | None = None
    ahead: Mapping[int, AnyArray] = field(default_factory=dict)
    norms: AnyArray | None = None
    embedded: bool = False
    lead: int = 0
    shape: Shape | None = None
    bank: AnyArray | None = None
    base: int = 0
    follows: int = -1
    followed: bool = False
    next_pass: int = 0
    next_token: int = 0

    @property
    def iterations(self) -> int:
        """How many forward passes the request has."""
        return len(self.passes) - 1 if self.shape is None else self.shape.passes

    @property
    def finished(self) -> bool:
        """Whether all of its forward passes were scheduled."""
        return self.next_pass == self.iterations

    def recorded(self, number: int) -> int:
        """The forward pass of the recording that this one replays."""
        if self.shape is None:
            return number
        if not self.shape.prompt_tokens:
            return number % (len(self.passes) - 1)
        if not number:
            return 0
        return self.lead + (number - 1) % (len(self.passes) - 1 - self.lead)

    @property
    def is_prompted(self) -> bool:
        """Whether its first pass is a prefill of another length than the recording has."""
        shape = self.shape
        if shape is None or not shape.prompt_tokens:
            return False
        return not self.lead or shape.prompt_tokens != self.pass_tokens[0]

    def iteration(self, number: int) -> int:
        """Number of a forward pass, as in the recording; beyond it they go on."""
        if self.shape is not None and self.shape.prompt_tokens and not self.lead:
            return number
        recorded = self.recorded(number)
        return self._iteration(recorded) + number - recorded

    def _iteration(self, recorded: int) -> int:
        return int(self.rows.iteration[self.blocks[self.passes[recorded]]])

    def phase(self, number: int) -> Phase:
        """Phase of a forward pass."""
        if self.shape is not None and self.shape.prompt_tokens:
            return Phase.DECODE if number else Phase.PREFILL
        return Phase(int(self.rows.phase[self.blocks[self.passes[self.recorded(number)]]]))

    def tokens(self, number: int) -> int:
        """Most tokens that a layer of this forward pass sees."""
        if self.shape is None:
            return self.pass_tokens[number]
        if not number and self.shape.prompt_tokens:
            return self.shape.prompt_tokens
        return self.pass_tokens[self.recorded(number)]

    def context(self, number: int, row: int) -> int:
        """Tokens in the KV cache when a row (of the recorded pass) has been computed in a forward
        pass: its own position and all before."""
        own = int(self.rows.position[row]) + 1
        shape = self.shape
        if shape is None:
            return own
        if number and shape.prompt_tokens and not self._restarts:
            return shape.before + shape.prompt_tokens + number
        return shape.before + own + number - self.recorded(number)

    @property
    def _restarts(self) -> bool:
        """Whether decoded positions do not go on from the prompt's: a decoder of its own."""
        if not self.lead or len(self.passes) < 3:
            return False
        return int(self.rows.position[self.blocks[self.passes[1]]]) < self.pass_tokens[0]

    @property
    def longest(self) -> int:
        """Most tokens that its KV cache comes to hold."""
        last = self.iterations - 1
        if last:
            return self.context(last, self.blocks[self.passes[self.recorded(last) + 1]] - 1)
        return self.context_after(0)

    def prompt_context(self, tokens: int) -> int:
        """Tokens in the KV cache when so many of its prompt have been computed."""
        before = 0 if self.shape is None else self.shape.before
        return before + tokens + (0 if self.is_prompted else int(self.rows.position[0]))

    def context_after(self, number: int) -> int:
        """Tokens in the KV cache when a forward pass has ended."""
        if not number and self.is_prompted:
            return self.prompt_context(self.tokens(0))
        return self.context(number, self.blocks[self.passes[self.recorded(number) + 1]] - 1)

    def prompt_embedding(self) -> AnyArray | None:
        """int32 [d], quantised, or None."""
        return _quantised(self.rows.facts.prompt_embedding) if self.embedded else None

    def embedding(self, number: int) -> AnyArray | None:
        """int32 [d] of one forward pass, quantised, or None."""
        if not self.embedded:
            return None
        return _quantised(self.rows.embedding.get(self._iteration(self.recorded(number))))


def prepare(index: int, rows: RequestRows, meta: TraceMeta, inputs: Inputs) -> Work:
    """Cut and quantise one request. Cost: vectorised over its rows."""
    changed = (rows.layer[1:] != rows.layer[:-1]) | (rows.iteration[1:] != rows.iteration[:-1])
    starts = np.concatenate(([0], np.flatnonzero(changed) + 1))
    passes = np.searchsorted(starts, rows.starts)
    tokens = np.maximum.reduceat(np.diff(starts, append=rows.rows), passes[:-1])
    bounds = np.append(starts, rows.rows)
    layers = rows.layer[starts].astype(np.int64)
    work = Work(
        index=index,
        rows=rows,
        arrival_ns=rows.facts.arrival_ns,
        blocks=bounds.tolist(),
        block_layers=layers.tolist(),
        passes=passes.tolist(),
        pass_tokens=tokens.tolist(),
        bounds=bounds,
        layers=layers,
        lead=int(rows.phase[0] == Phase.PREFILL),
    )
    _add_inputs(work, meta, inputs)
    return work


def _add_inputs(work: Work, meta: TraceMeta, inputs: Inputs) -> None:
    rows, needs = work.rows, inputs.needs
    # The column may have been decoded for another policy of the same pass.
    work.embedded = Needs.EMBEDDING in needs
    if Needs.WEIGHTS in needs and rows.weights is not None:
        work.weights = _probabilities(rows.weights)
    if Needs.GATE in needs:
        if rows.gate is not None:
            work.gate = _probabilities(gate_probabilities(rows.gate, meta))
        elif inputs.allowed.gate_from_topk and rows.weights is not None:
            work.gate = spread_topk(rows.experts, rows.weights, meta.experts)
    if Needs.AHEAD in needs:
        work.ahead = _ahead(work, meta, inputs)
    if Needs.NORMS in needs:
        norms = rows.input_norm
        work.norms = (
            np.full(rows.rows, PROBABILITY_ONE, np.int32) if norms is None else fixed_point(norms)
        )


def _ahead(work: Work, meta: TraceMeta, inputs: Inputs) -> dict[int, AnyArray]:
    recall = inputs.allowed.recall
    if recall is None:
        return {d: work.rows.ahead[d] for d in inputs.distances}
    return {
        d: recalled(work.rows, work.blocks, work.block_layers, d, meta.experts, recall)
        for d in inputs.distances
    }


def spread_topk(experts: AnyArray, weights: AnyArray, size: int) -> AnyArray:
    """Gate probabilities from top-k weights alone: int32 [rows, E], renormalised, else zero."""
    chosen = np.where(experts == DROPPED, 0, weights).astype(np.float64)
    total = chosen.sum(axis=1, keepdims=True)
    shares = np.rint(chosen / np.where(total > 0, total, 1) * PROBABILITY_ONE).astype(np.int32)
    gate = np.zeros((len(experts), size + 1), np.int32)
    np.put_along_axis(gate, np.minimum(experts, size).astype(np.int64), shares, axis=1)
    return gate[:, :size]


def _probabilities(values: AnyArray) -> AnyArray:
    return np.rint(values.astype(np.float64) * PROBABILITY_ONE).astype(np.int32)


def fixed_point(values: AnyArray) -> AnyArray:
    """int64 in steps of 1/16384, as every decision input is kept."""
    return np.rint(values.astype(np.float64) * PROBABILITY_ONE).astype(np.int64)


def _quantised(values: AnyArray | None) -> AnyArray | None:
    return None if values is None else fixed_point(values).astype(np.int32)


# ---- steps ---------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One request's share of a step: pass ``number``, tokens ``first`` to ``last`` (excluded)."""

    work: Work
    number: int
    first: int
    last: int
    begins: bool
    """The first chunk of its forward pass."""
    ends: bool
    """The last chunk of its forward pass."""


class Step(NamedTuple):
    """One forward pass of the served batch. ``padding`` rows belong to finished requests;
    ``held`` tokens lie in the KV cache of requests that were admitted and take no part."""

    number: int
    parts: tuple[Part, ...]
    padding: int = 0
    held: int = 0


class Passes(NamedTuple):
    """Steps ``number`` and following: the whole forward passes ``first`` to ``last`` (excluded) of
    one request alone, as they were recorded and in the same order."""

    number: int
    work: Work
    first: int
    last: int
    padding: int = 0

    @property
    def steps(self) -> int:
        """How many steps they are."""
        return self.last - self.first

    def step(self, i: int) -> Step:
        """The step of pass ``first + i``."""
        number = self.first + i
        part = Part(self.work, number, 0, self.work.tokens(number), True, True)
        return Step(self.number + i, (part,), self.padding)


class Idle(NamedTuple):
    """Nothing to serve before ``until_ns``."""

    until_ns: int


STARVED: Final = "starved"
"""The scheduler must see the next request before it can decide."""

DONE: Final = "done"


class Scheduler(Protocol):
    """Which requests form the next step. It is offered the requests in order of arrival.

    Between two calls of ``next_step`` the step that the first one gave was served; it ended at the
    ``now_ns`` of the second.
    """

    @property
    def waiting(self) -> list[Work]:
        """Requests that have arrived, and of which nothing has been served."""

    @property
    def settled(self) -> bool:
        """Whether the next step is the same whenever it begins."""

    def offer(self, work: Work) -> None:
        """The next request of the trace."""

    def close(self) -> None:
        """No request will follow."""

    def next_step(self, now_ns: int) -> Step | Idle | str:
        """A step; or ``Idle``, ``STARVED``, ``DONE``."""

    def next_steps(self, now_ns: int, most: int) -> Passes | Step | Idle | str:
        """The same; up to ``most`` steps at once where they are passes of one request alone."""


class Queue:
    """Requests that have arrived and wait, in order of arrival, and those that have not arrived.

    A request arrives at its ``arrival_ns``; one without arrives when it is taken. One that follows
    another arrives ``think_ns`` after that one's end. With ``users`` the others do so as well: a
    closed loop, in which each user asks again when the last answer has been read.
    """

    def __init__(self, users: int = 0, think_ns: int = 0) -> None:
        self.users = users
        self.think_ns = think_ns
        self.waiting: deque[Work] = deque()
        self.arrived = 0
        self.closed = False
        self.timed = users > 0
        """Whether any request has an arrival time."""
        self.reacts = users > 0
        """Whether arrivals depend on when requests end."""
        self._coming: list[tuple[int, int, Work]] = []
        self._latest_ns = -1
        self._pool: deque[Work] = deque()
        self._free = [0] * users
        self._owed: dict[int, int] = {}
        self._following: dict[int, Work] = {}

    def offer(self, work: Work) -> None:
        """The next request."""
        if work.followed:
            self.timed = self.reacts = True
        if work.follows >= 0:
            self.timed = self.reacts = True
            if work.follows in self._owed:
                self._comes(work, self._owed.pop(work.follows))
            else:
                self._following[work.follows] = work
        elif self.users:
            self._pool.append(work)
            self._ask()
        elif work.arrival_ns is None:
            self.waiting.append(work)
            self.arrived += 1
        else:
            self.timed = True
            self._latest_ns = max(self._latest_ns, work.arrival_ns)
            self._comes(work, work.arrival_ns)

    def end(self, work: Work, now_ns: int) -> None:
        """A request has been served to its end."""
        if work.followed:
            follower = self._following.pop(work.index, None)
            if follower is None:
                self._owed[work.index] = now_ns + self.think_ns
            else:
                self._comes(follower, now_ns + self.think_ns)
        elif self.users:
            heapq.heappush(self._free, now_ns + self.think_ns)
            self._ask()

    def is_ready(self, now_ns: int, wanted: int) -> bool:
        """Let those wait that have arrived; False if more must be offered before it is known who
        the first ``wanted`` are."""
        # Where arrivals depend on ends, they are not offered in order of arrival.
        if self.reacts and not self.is_known(now_ns):
            return False
        self.arrive(now_ns)
        return len(self.waiting) >= wanted or self.is_known(now_ns)

    def arrive(self, now_ns: int) -> None:
        """Let those wait that have arrived."""
        while self._coming and self._coming[0][0] <= now_ns:
            self.waiting.append(heapq.heappop(self._coming)[2])
            self.arrived += 1

    def is_known(self, now_ns: int) -> bool:
        """Whether every arrival up to ``now_ns``, and the next one after it, has been offered."""
        if self.closed:
            return True
        if self._owed or (self.users and self._free):
            return False
        return self.users > 0 or self._latest_ns > now_ns

    @property
    def next_ns(self) -> int | None:
        """When the next request arrives; None: nobody is known to come."""
        return self._coming[0][0] if self._coming else None

    def _ask(self) -> None:
        while self._free and self._pool:
            self._comes(self._pool.popleft(), heapq.heappop(self._free))

    def _comes(self, work: Work, arrival_ns: int) -> None:
        work.arrival_ns = arrival_ns
        heapq.heappush(self._coming, (arrival_ns, work.index, work))


class StaticBatch:
    """Batches of up to ``batch`` requests, each served until its last member has finished.

    With ``batch = 1`` this is FIFO. A batch takes those that have arrived, in order, and never
    waits for more. A prefill longer than ``chunk_tokens`` is served in chunks, a step each.

    until_ns : no step begins from then on; 0: until every request has ended.
    """

    def __init__(
        self, batch: int = 1, chunk_tokens: int = 0, queue: Queue | None = None, until_ns: int = 0
    ) -> None:
        self.batch = batch
        self.chunk_tokens = chunk_tokens
        self.queue = queue or Queue()
        self.until_ns = until_ns
        self._running: list[Work] = []
        self._size = 0
        self._steps = 0

    @property
    def waiting(self) -> list[Work]:
        """Requests that have arrived, and of which nothing has been served."""
        return list(self.queue.waiting)

    @property
    def settled(self) -> bool:
        """Whether the next step is the same whenever it begins: an admitted batch is served to
        its end, but for those who wait for one of its members to end."""
        if not self.queue.timed:
            return not self.until_ns
        waits = self.queue.reacts and len(self._running) > 1
        return not (self.until_ns or waits) and any(not w.finished for w in self._running)

    def offer(self, work: Work) -> None:
        """The next request of the trace."""
        self.queue.offer(work)

    def close(self) -> None:
        """No request will follow."""
        self.queue.closed = True

    def next_step(self, now_ns: int) -> Step | Idle | str:
        """The next step of the running batch, or the first of a new one."""
        verdict = self._run_on(now_ns)
        return self._step() if verdict is None else verdict

    def next_steps(self, now_ns: int, most: int) -> Passes | Step | Idle | str:
        """The same; up to ``most`` steps at once where they are passes of one request alone."""
        verdict = self._run_on(now_ns)
        if verdict is not None:
            return verdict
        work = self._running[0]
        first = last = work.next_pass
        if len(self._running) == 1 and not work.next_token:
            last = self._last_alike(work, first, min(work.iterations, first + most))
        if self.until_ns or last == first:
            return self._step()
        work.next_pass = last
        self._steps += last - first
        return Passes(self._steps - (last - first), work, first, last, self._size - 1)

    def _last_alike(self, work: Work, first: int, last: int) -> int:
        """The end of the passes from ``first`` on that are served whole, as they were recorded."""
        if first == 0 and work.is_prompted:
            return first
        if work.shape is not None:
            last = min(last, first + len(work.passes) - 1 - work.recorded(first))
        if self.chunk_tokens:
            chunked = (n for n in range(first, last) if self._is_chunked(work, n))
            last = next(chunked, last)
        return last

    def _is_chunked(self, work: Work, number: int) -> bool:
        return work.phase(number) == Phase.PREFILL and work.tokens(number) > self.chunk_tokens

    def _run_on(self, now_ns: int) -> Idle | str | None:
        """Admit a new batch if the last has finished; why that cannot be."""
        for work in self._running:
            if work.finished:
                self.queue.end(work, now_ns)
        self._running = [w for w in self._running if not w.finished]
        if self.until_ns and now_ns >= self.until_ns:
            return stop(self.queue, now_ns)
        return None if self._running else self._admit(now_ns)

    def _step(self) -> Step:
        parts = tuple(self._part(work) for work in self._running)
        step = Step(self._steps, parts, self._size - len(parts))
        self._steps += 1
        return step

    def _admit(self, now_ns: int) -> Idle | str | None:
        queue = self.queue
        if not queue.is_ready(now_ns, self.batch):
            return STARVED
        if not queue.waiting:
            return rest(queue, self.until_ns)
        taken = min(self.batch, len(queue.waiting))
        self._running = [queue.waiting.popleft() for _ in range(taken)]
        self._size = taken
        return None

    def _part(self, work: Work) -> Part:
        return take(work, self.chunk_tokens)


def rest(queue: Queue, until_ns: int) -> Idle | str:
    """What a scheduler with nothing to serve answers: until when it rests, or that it is done."""
    if queue.next_ns is None:
        return DONE
    return Idle(min(queue.next_ns, until_ns) if until_ns else queue.next_ns)


def stop(queue: Queue, now_ns: int) -> str:
    """What a scheduler answers when no step may begin any more: it is done, once it is known who
    has arrived."""
    queue.arrive(now_ns)
    return DONE if queue.is_known(now_ns) else STARVED


def take(work: Work, most: int) -> Part:
    """The next part of a request: a forward pass, or of a prefill ``most`` tokens (0: all)."""
    number, first = work.next_pass, work.next_token
    whole = last = work.tokens(number)
    if most and last - first > most and work.phase(number) == Phase.PREFILL:
        last = first + most
    work.next_pass, work.next_token = (number + 1, 0) if last == whole else (number, last)
    return Part(work, number, first, last, first == 0, last == whole)


def begin_facts(step: Step) -> list[tuple[RequestBegin | IterationBegin, Phase]]:
    """What a policy is told when a step begins, and the phase of what it then asks for."""
    facts: list[tuple[RequestBegin | IterationBegin, Phase]] = []
    for part in step.parts:
        if not part.begins:
            continue
        work, number = part.work, part.number
        request, phase = work.rows.request, work.phase(number)
        if number == 0:
            prompt = work.rows.facts.prompt_tokens or 0
            begin = RequestBegin(request, prompt, work.prompt_embedding())
            facts.append((begin, Phase.DECODE))
        embedding = work.embedding(number)
        tokens = work.tokens(number)
        facts.append(
            (IterationBegin(request, work.iteration(number), phase, tokens, embedding), phase)
        )
    return facts


def end_facts(step: Step) -> list[IterationEnd | RequestEnd]:
    """What a policy is told when a step has ended."""
    facts: list[IterationEnd | RequestEnd] = []
    for part in step.parts:
        if part.ends:
            facts.append(IterationEnd(part.work.rows.request, part.work.iteration(part.number)))
            if part.number == part.work.iterations - 1:
                facts.append(RequestEnd(part.work.rows.request))
    return facts


# ---- layer events --------------------------------------------------------------------------------


class Demand(NamedTuple):
    """A layer event's demand: each expert once, by first token, then gate rank."""

    experts: IntArray
    tokens: IntArray
    phases: AnyArray


class Span(NamedTuple):
    """A part's tokens in a layer: which rows of its recording, how many, and the context when the
    last of them has been computed."""

    part: Part
    rows: slice | IntArray
    tokens: int
    context: int


class Row(NamedTuple):
    """A request's tokens in a layer event, the last ones of its ``context`` positions."""

    request: int
    tokens: int
    context: int


class Item(NamedTuple):
    """A layer event with its costs' arguments: tokens of the dense part and context they attend.

    rows : whose tokens they are; ``context`` is the sum of theirs.
    """

    event: LayerEvent
    demand: Demand
    dense_tokens: int
    context: int
    rows: tuple[Row, ...] = ()


def layer_events(step: Step, first_event: int, experts: int) -> Iterator[Item]:
    """The layer events of a step, in layer order; ``first_event`` numbers them."""
    for event, (layer, spans) in enumerate(layer_spans(step), first_event):
        yield _item(step, layer, spans, event, experts)


def layer_spans(step: Step) -> Iterator[tuple[int, list[Span]]]:
    """Each layer that a step runs, with the rows of every part that has tokens there."""
    for layer in sorted({la for part in step.parts for la in _layers(part)}):
        spans = [span for part in step.parts if (span := _span(part, layer)) is not None]
        if spans:
            yield layer, spans


def flat_events(step: Step, first_event: int, experts: int) -> Iterator[Item]:
    """The same, every access an event of its own (token by token, rank by rank).

    The dense part is charged to a layer's first access. Only for comparison with generic cache
    simulators: real layers need their experts together.
    """
    event = first_event
    for whole in layer_events(step, first_event, experts):
        source = whole.event
        dense = whole.dense_tokens
        for slot in source.slots:
            for token in range(slot.first, slot.first + slot.tokens):
                for rank, expert in enumerate(source.token_experts[token].tolist()):
                    if expert == DROPPED:
                        continue
                    yield _single(whole, slot, token, rank, event, dense, experts)
                    event += 1
                    dense = 0


def _single(
    whole: Item, slot: Slot, token: int, rank: int, event: int, dense: int, experts: int
) -> Item:
    source = whole.event
    only, chosen = slice(token, token + 1), slice(rank, rank + 1)
    single = replace(
        source,
        event=event,
        slots=(slot._replace(first=0, tokens=1),),
        token_experts=source.token_experts[only, chosen],
        weights=None if source.weights is None else source.weights[only, chosen],
        gate=None if source.gate is None else source.gate[only],
        ahead={distance: rows[only] for distance, rows in source.ahead.items()},
        norms=None if source.norms is None else source.norms[only],
    )
    return Item(single, union(single, experts), dense, whole.context)


def _layers(part: Part) -> list[int]:
    work = part.work
    recorded = work.recorded(part.number)
    return work.block_layers[work.passes[recorded] : work.passes[recorded + 1]]


def _item(step: Step, layer: int, spans: Sequence[Span], event: int, experts: int) -> Item:
    """The layer's rows of every part, gathered."""
    slots = slots_of(spans)
    rows = tuple(Row(span.part.work.index, span.tokens, span.context) for span in spans)
    context = sum(row.context for row in rows)
    pieces = [(span.part.work, span.rows) for span in spans]
    source = LayerEvent(
        event=event,
        step=step.number,
        layer=layer,
        slots=slots,
        token_experts=_gather([w.rows.experts[rows] for w, rows in pieces]),
        weights=_gather_optional([_cut(w.weights, rows) for w, rows in pieces]),
        gate=_gather_optional([_cut(w.gate, rows) for w, rows in pieces]),
        ahead={d: _gather([w.ahead[d][rows] for w, rows in pieces]) for d in pieces[0][0].ahead},
        norms=_gather_optional([_cut(w.norms, rows) for w, rows in pieces]),
    )
    tokens = sum(slot.tokens for slot in slots)
    return Item(source, union(source, experts), tokens + step.padding, context, rows)


def slots_of(spans: Iterable[Span]) -> tuple[Slot, ...]:
    """Whose tokens a layer event's rows are."""
    slots: list[Slot] = []
    total = 0
    for span in spans:
        work, number = span.part.work, span.part.number
        phase = work.phase(number)
        slots.append(Slot(work.rows.request, work.iteration(number), phase, total, span.tokens))
        total += span.tokens
    return tuple(slots)


def _span(part: Part, layer: int) -> Span | None:
    """Rows of a part in a layer. Chunks cut the longest stack; shorter ones run with the last."""
    work = part.work
    recorded = work.recorded(part.number)
    first, last = work.passes[recorded], work.passes[recorded + 1]
    block = first + layer - work.block_layers[first]
    if not first <= block < last or work.block_layers[block] != layer:
        if layer not in work.block_layers[first:last]:
            return None
        block = work.block_layers.index(layer, first, last)
    low, high = work.blocks[block], work.blocks[block + 1]
    if high - low < work.pass_tokens[recorded]:
        return _contiguous(part, low, high) if part.ends else None
    if part.number == 0 and work.is_prompted:
        return _prompted(part, layer, low)
    if part.begins and part.ends:
        return _contiguous(part, low, high)
    return _contiguous(part, low + part.first, low + part.last)


def _contiguous(part: Part, low: int, high: int) -> Span:
    return Span(part, slice(low, high), high - low, part.work.context(part.number, high - 1))


def _prompted(part: Part, layer: int, low: int) -> Span:
    """Tokens of a prompt whose length was not recorded: the recorded rows, again from the first."""
    work = part.work
    tokens = np.arange(part.first, part.last)
    if work.lead:
        rows = low + tokens % work.pass_tokens[0]
    else:
        decoded = np.flatnonzero(work.rows.layer == layer)
        rows = decoded[tokens % len(decoded)]
    return Span(part, rows, len(rows), work.prompt_context(part.last))


def context_tokens(step: Step) -> int:
    """Tokens in the KV cache during a step."""
    return step.held + sum(part.work.context_after(part.number) for part in step.parts)


def _cut(values: AnyArray | None, rows: slice | IntArray) -> AnyArray | None:
    return None if values is None else values[rows]


def _gather(pieces: list[AnyArray]) -> AnyArray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _gather_optional(pieces: list[AnyArray | None]) -> AnyArray | None:
    present = [piece for piece in pieces if piece is not None]
    return _gather(present) if present else None


def union(event: LayerEvent, experts: int, token_experts: AnyArray | None = None) -> Demand:
    """The demand of an event's choices (or of ``token_experts``, uint16 [T, k], in their place)."""
    chosen = event.token_experts if token_experts is None else token_experts
    base = event.layer * experts
    flat = chosen.reshape(-1)
    if len(flat) == chosen.shape[1]:
        return _single_token(flat, base, event.slots[0].phase)
    kept = np.flatnonzero(flat != DROPPED)
    ids, first, counts = np.unique(flat[kept], return_index=True, return_counts=True)
    order = np.argsort(first, kind="stable")
    token = kept[first[order]] // chosen.shape[1]
    phases = np.concatenate([np.full(s.tokens, s.phase, np.uint8) for s in event.slots])
    return Demand(ids[order].astype(np.int64) + base, counts[order].astype(np.int64), phases[token])


def _single_token(flat: AnyArray, base: int, phase: Phase) -> Demand:
    chosen = flat[flat != DROPPED].astype(np.int64) + base
    count = len(chosen)
    return Demand(chosen, np.ones(count, np.int64), np.full(count, phase, np.uint8))


# ---- a pass without a clock ----------------------------------------------------------------------


def timeless_steps(works: Iterable[Work], scheduler: Scheduler) -> Iterator[Step]:
    """The steps of a workload whose schedule does not depend on time (no arrivals).

    Raises
    ------
    NotRunError
        If a request has an arrival time: then steps depend on the clock, and no oracle can know
        them before the run.
    """
    pending = iter(works)
    while True:
        step = scheduler.next_step(0)
        if isinstance(step, Step):
            yield step
        elif step == STARVED:
            work = next(pending, None)
            if work is None:
                scheduler.close()
            else:
                scheduler.offer(work)
        elif step == DONE:
            return
        else:
            raise NotRunError(
                "a policy that sees the future needs a schedule that does not depend on time; "
                "leave out --arrivals"
            )


class KnownFuture:
    """The demand of a whole run, as oracles may see it."""

    def __init__(self, demands: Iterable[IntArray], size: int) -> None:
        pieces = [d.astype(np.int32) for d in demands]
        counts = np.fromiter((len(p) for p in pieces), np.int64, len(pieces))
        self._offsets = np.concatenate(([0], np.cumsum(counts)))
        self._ids = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        event = np.repeat(np.arange(len(pieces), dtype=np.int64), counts)
        order = np.argsort(self._ids, kind="stable")
        ids, when = self._ids[order], event[order]
        same = ids[1:] == ids[:-1]
        following = np.full(len(ids), NEVER, np.int64)
        following[:-1][same] = when[1:][same]
        self._next = np.empty_like(following)
        self._next[order] = following
        self._first = np.full(size, NEVER, np.int64)
        heads = np.concatenate(([True], ~same)) if len(ids) else np.empty(0, bool)
        self._first[ids[heads]] = when[heads]
        self._counts = np.bincount(self._ids, minlength=size).astype(np.int64)

    @classmethod
    def of_table(
        cls,
        offsets: IntArray,
        ids: AnyArray,
        following: IntArray,
        first_use: IntArray,
        counts: IntArray,
    ) -> KnownFuture:
        """The same from what ``table`` gives, first uses and counts, which may lie in files."""
        made = cls.__new__(cls)
        made._offsets, made._ids, made._next = offsets, ids, following
        made._first, made._counts = first_use, counts
        return made

    @property
    def first_use(self) -> IntArray:
        """int64 [layers * experts]: first layer event that demands each expert, or NEVER."""
        return self._first

    @property
    def counts(self) -> IntArray:
        """int64 [layers * experts]: how many layer events demand each expert."""
        return self._counts

    @property
    def events(self) -> int:
        """How many layer events the run has."""
        return len(self._offsets) - 1

    def demand(self, event: int) -> IntArray:
        """Expert ids that a layer event demands, in demand order."""
        return self._ids[self._offsets[event] : self._offsets[event + 1]].astype(np.int64)

    @property
    def table(self) -> tuple[IntArray, AnyArray, IntArray]:
        """All of it at once: where each event's demand begins (and the end), ids, next uses."""
        return self._offsets, self._ids, self._next

    def next_use(self, event: int) -> IntArray:
        """For each expert of ``demand(event)``: the next layer event that demands it, or NEVER."""
        following: IntArray = self._next[self._offsets[event] : self._offsets[event + 1]]
        return following
