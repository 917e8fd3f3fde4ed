"""The stream of requests that is served: which recording each replays, how long, and when it comes.

The *plan* is made from lengths alone, so it is known before any row is prepared; only recordings
that it uses are then held, each once, in one bank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moesim.errors import NotRunError, TraceError, UsageError
from moesim.hashing import hash64
from moesim.serve.arrivals import (
    BACK_TO_BACK,
    CLOSED,
    LOG,
    POISSON,
    RECORDED,
    Arrivals,
    at_rate,
    poisson_ns,
    rate_of,
)
from moesim.serve.logs import BLOCK_TOKENS, Log, read_log
from moesim.serve.match import matched, mismatch
from moesim.serve.options import Serving, Turns
from moesim.traces.reader import RequestRows
from moesim.types import IntArray, Phase
from moesim.workload import Queue, Shape, Work

_SHUFFLE = 0x73687566


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the plan must know of a recorded request. ``place``: its place among those served."""

    place: int
    request: int
    prompt_tokens: int
    """Of its recorded prefill; 0: it has none."""
    passes: int
    topic: str | None
    arrival_ns: int | None

    @classmethod
    def of(cls, place: int, rows: RequestRows) -> Recorded:
        """Those of a request."""
        prompt = 0
        if int(rows.phase[0]) == Phase.PREFILL:
            first = slice(0, int(rows.starts[1]))
            prompt = int(np.bincount(rows.layer[first]).max())
        facts = rows.facts
        return cls(place, rows.request, prompt, len(rows.starts) - 1, facts.topic, facts.arrival_ns)


@dataclass(frozen=True, slots=True)
class Served:
    """A request of the stream: which recording it replays (its place), and how."""

    index: int
    recorded: int
    request: int
    arrival_ns: int | None = None
    shape: Shape | None = None
    follows: int = -1
    followed: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The stream. ``offered_rate``: requests a second that arrive, None where that is not set."""

    requests: list[Served]
    offered_rate: float | None = None
    matching: dict[str, Any] | None = None
    skipped: int = 0

    @property
    def used(self) -> set[int]:
        """Places of the recorded requests that it replays."""
        return {served.recorded for served in self.requests}


def is_plain(arrivals: Arrivals, serving: Serving) -> bool:
    """Whether the recorded requests are served once each, as they stand: then none need be held."""
    apart = serving.requests or serving.rate or serving.turns or serving.shift
    return arrivals.kind in (BACK_TO_BACK, RECORDED) and not apart


def queue_of(arrivals: Arrivals, serving: Serving) -> Queue:
    """Where the requests of a stream wait."""
    think_ns = serving.turns.think_ns if serving.turns else arrivals.think_ns
    return Queue(arrivals.users, think_ns)


def plan_of(
    arrivals: Arrivals,
    serving: Serving,
    recorded: Sequence[Recorded],
    seed: int,
    *,
    prefill_from_decode: bool = False,
) -> Plan:
    """The stream of requests.

    Raises
    ------
    UsageError, TraceError, NotRunError
        If the recorded requests cannot be served so.
    """
    _refuse(arrivals, serving)
    recorded = _ordered(recorded, serving.shift, seed)
    if arrivals.kind == LOG:
        plan = _of_log(arrivals, serving, recorded, seed, prefill_from_decode)
    else:
        plan = _of_recorded(arrivals, serving, recorded, seed)
    if serving.turns is not None and serving.turns.size:
        plan = replace(plan, requests=_conversations(plan.requests, recorded, serving.turns))
    return plan


def _refuse(arrivals: Arrivals, serving: Serving) -> None:
    """UsageError for what does not go together."""
    if arrivals.kind == POISSON and arrivals.rate is not None and serving.rate is not None:
        raise UsageError("--rate: --arrivals poisson:RATE sets it already; give one of the two")
    if serving.rate is not None and arrivals.kind in (BACK_TO_BACK, CLOSED):
        raise UsageError(f"--rate: {arrivals.kind} arrivals have none; leave it out")
    if arrivals.kind == POISSON and arrivals.rate is None and serving.rate is None:
        raise UsageError("--arrivals poisson: at which rate? write poisson:2.91, or --rate 2.91")
    if serving.turns is not None and not serving.turns.size and arrivals.kind != LOG:
        raise UsageError("--turns log: only a log of arrivals says who follows whom")
    if serving.turns is not None and serving.turns.size and arrivals.kind == CLOSED:
        raise UsageError("--turns: in a closed loop the users think already; leave out one of both")
    if serving.turns is not None and serving.turns.size and arrivals.kind == LOG:
        raise UsageError("--turns: write log for a log of arrivals, or leave it out")


# ---- the recorded requests -----------------------------------------------------------------------


def _ordered(recorded: Sequence[Recorded], shift: int, seed: int) -> list[Recorded]:
    """By ``--shift``: as they stand; shuffled; or blocks of a topic, the topics taking turns."""
    if not shift:
        return list(recorded)
    keys = hash64(_SHUFFLE, seed, np.array([r.request for r in recorded], np.int64)).tolist()
    shuffled = [r for _, _, r in sorted(zip(keys, range(len(keys)), recorded, strict=True))]
    if shift < 0:
        return shuffled
    if any(r.topic is None for r in recorded):
        raise UsageError("--shift topic: a request of this trace has no topic; use --shift shuffle")
    topics: dict[str, list[Recorded]] = {}
    for one in shuffled:
        topics.setdefault(str(one.topic), []).append(one)
    ordered: list[Recorded] = []
    while topics:
        for topic in sorted(topics):
            block, topics[topic] = topics[topic][:shift], topics[topic][shift:]
            ordered += block
        topics = {topic: left for topic, left in topics.items() if left}
    return ordered


def _of_recorded(
    arrivals: Arrivals, serving: Serving, recorded: Sequence[Recorded], seed: int
) -> Plan:
    if arrivals.kind == RECORDED:
        missing = next((r for r in recorded if r.arrival_ns is None), None)
        if missing is not None:
            raise TraceError(
                f"request {missing.request} has no arrival_ns; use --arrivals back-to-back"
            )
        if not serving.shift:
            recorded = sorted(recorded, key=lambda r: (r.arrival_ns or 0, r.place))
    count = serving.requests or len(recorded)
    if arrivals.kind == RECORDED and count > len(recorded):
        raise UsageError(f"--requests {count}: the trace has {len(recorded)} to arrive as recorded")
    when: IntArray | None = None
    if arrivals.kind == POISSON:
        rate = arrivals.rate or serving.rate
        assert rate is not None
        when = poisson_ns(rate, count, seed)
    elif arrivals.kind == RECORDED:
        when = np.sort(np.array([r.arrival_ns for r in recorded], np.int64))[:count]
        if serving.rate is not None:
            when = at_rate(when, serving.rate)
    # A request that comes again is another request.
    fresh = count <= len(recorded)
    requests = [
        Served(
            i,
            recorded[i % len(recorded)].place,
            recorded[i].request if fresh else i,
            None if when is None else int(when[i]),
        )
        for i in range(count)
    ]
    return Plan(requests, None if when is None else rate_of(when))


def _conversations(
    requests: Sequence[Served], recorded: Sequence[Recorded], turns: Turns
) -> list[Served]:
    """Requests of one topic, in order, as the turns of conversations: each begins with what the
    former have left in the KV cache, and arrives when the last has ended and been thought about."""
    known = {r.place: r for r in recorded}
    open_: dict[str | None, list[int]] = {}
    made = list(requests)
    for served in requests:
        one = known[served.recorded]
        turn = open_.setdefault(one.topic, [])
        if turn:
            before = made[turn[-1]]
            made[turn[-1]] = replace(before, followed=True)
            held = _held(before, known[before.recorded])
            shape = Shape(one.prompt_tokens, one.passes, held)
            made[served.index] = replace(served, follows=before.index, arrival_ns=None, shape=shape)
        turn.append(served.index)
        if len(turn) == turns.size:
            open_[one.topic] = []
    return made


def _held(served: Served, recorded: Recorded) -> int:
    """Tokens that a request leaves in the KV cache."""
    before = served.shape.before if served.shape else 0
    return before + recorded.prompt_tokens + recorded.passes - (recorded.prompt_tokens > 0)


# ---- a log ---------------------------------------------------------------------------------------


def _of_log(
    arrivals: Arrivals,
    serving: Serving,
    recorded: Sequence[Recorded],
    seed: int,
    prefill_from_decode: bool,
) -> Plan:
    if not prefill_from_decode and any(not r.prompt_tokens for r in recorded):
        raise NotRunError(
            f"not run: the prompts of {arrivals.path} need a prefill, which this trace lacks; with "
            "--allow prefill=decode their tokens take the decoded ones' routing"
        )
    log = _log(arrivals, serving)
    follows, before = _prefixes(log, serving)
    prompts = log.prompt_tokens - before
    known = (
        np.array([r.prompt_tokens for r in recorded], np.int64),
        np.array([r.passes for r in recorded], np.int64),
    )
    chosen = matched(prompts, log.output_tokens, known, seed)
    shapes = map(Shape, prompts.tolist(), _passes(log, recorded, chosen), before.tolist())
    leaders = set(follows)
    requests = [
        Served(
            i,
            recorded[which].place,
            i,
            when if follows[i] < 0 else None,
            shape,
            follows[i],
            i in leaders,
        )
        for i, (when, which, shape) in enumerate(
            zip(log.arrival_ns.tolist(), chosen.tolist(), shapes, strict=True)
        )
    ]
    matching = mismatch(prompts, log.output_tokens, known[0][chosen], known[1][chosen])
    matching["recorded_requests_used"] = len(set(chosen.tolist()))
    return Plan(requests, rate_of(log.arrival_ns), matching, log.skipped)


def _log(arrivals: Arrivals, serving: Serving) -> Log:
    """The requests of a log that arrive, at the rate that was asked for."""
    assert arrivals.path is not None
    log = read_log(arrivals.path, arrivals.log_kind).head(serving.requests)
    if serving.requests > len(log.arrival_ns):
        raise UsageError(
            f"--requests {serving.requests}: {arrivals.path} has {len(log.arrival_ns)} requests"
        )
    if serving.rate is not None:
        log = replace(log, arrival_ns=at_rate(log.arrival_ns, serving.rate))
    return log


def _passes(log: Log, recorded: Sequence[Recorded], chosen: IntArray) -> list[int]:
    """Forward passes of each request; a recording that has no decoded pass cannot repeat one."""
    return [
        1 if recorded[which].prompt_tokens and recorded[which].passes == 1 else output
        for output, which in zip(log.output_tokens.tolist(), chosen.tolist(), strict=True)
    ]


def _prefixes(log: Log, serving: Serving) -> tuple[list[int], IntArray]:
    """Whom each request of a log follows (-1: nobody), and the tokens of its prompt that are known
    from there: those of the blocks that both begin with, and of the former's answer."""
    count = len(log.arrival_ns)
    follows, before = [-1] * count, np.zeros(count, np.int64)
    if serving.turns is None:
        return follows, before
    if not any(log.blocks):
        raise UsageError("--turns log: this log does not say who follows whom; Mooncake's do")
    ends: dict[tuple[int, int], int] = {}
    """The request whose whole blocks end at a node of the tree of prefixes."""
    nodes: dict[tuple[int, int], int] = {}
    led: set[int] = set()
    for i, blocks in enumerate(log.blocks):
        node, leader, shared = 0, -1, 0
        for depth, block in enumerate(blocks, 1):
            node = nodes.setdefault((node, block), len(nodes) + 1)
            if (node, 0) in ends:
                leader, shared = ends[node, 0], depth
        if leader >= 0 and leader not in led:
            led.add(leader)
            held = int(log.prompt_tokens[leader] + log.output_tokens[leader]) - 1
            known = max(shared * BLOCK_TOKENS, min(held, int(log.prompt_tokens[i]) - 1))
            follows[i], before[i] = leader, min(known, int(log.prompt_tokens[i]) - 1)
        if blocks:
            ends[node, 0] = i
    return follows, before


# ---- from the plan to work -----------------------------------------------------------------------


@dataclass(slots=True)
class Bank:
    """The recorded requests that a stream replays, prepared and held once."""

    works: dict[int, Work] = field(default_factory=dict)

    def fill(self, works: Iterable[tuple[int, Work]]) -> None:
        """Take recorded requests, by their place; their experts lie in one array from then on."""
        self.works = dict(works)
        held = list(self.works.values())
        if not held:
            return
        experts = np.concatenate([work.rows.experts for work in held])
        alike = len({layers for work in held for layers in _layers_of(work)}) == 1
        base = 0
        for work in held:
            last = base + work.rows.rows
            own = experts[base:last]
            own.flags.writeable = False
            work.rows = replace(work.rows, experts=own)
            work.bank, work.base = (experts if alike and _is_even(work) else None), base
            base = last

    def serve(self, plan: Plan) -> Iterator[Work]:
        """The requests of a stream, in order."""
        for served in plan.requests:
            work = self.works[served.recorded]
            facts = replace(work.rows.facts, arrival_ns=served.arrival_ns)
            if served.shape is not None:
                shape = served.shape
                facts = replace(
                    facts, prompt_tokens=shape.prompt_tokens, output_tokens=shape.passes
                )
            yield replace(
                work,
                index=served.index,
                rows=replace(work.rows, request=served.request, facts=facts),
                arrival_ns=served.arrival_ns,
                shape=served.shape,
                follows=served.follows,
                followed=served.followed,
            )


def _layers_of(work: Work) -> set[tuple[int, ...]]:
    return {
        tuple(work.block_layers[first:last])
        for first, last in zip(work.passes[:-1], work.passes[1:], strict=True)
    }


def _is_even(work: Work) -> bool:
    """Whether each pass has as many tokens at every layer, a decoded one has one, and positions
    rise one by one."""
    sizes = np.diff(work.bounds)
    counts = np.diff(work.passes)
    even = bool((sizes == np.repeat(work.pass_tokens, counts)).all())
    if not even or any(tokens != 1 for tokens in work.pass_tokens[work.lead :]):
        return False
    position = work.rows.position
    heads = position[work.bounds[work.passes[:-1]]][work.lead :]
    tokens = work.pass_tokens[0]
    prompt = position[: tokens * work.passes[1]].reshape(-1, tokens)
    return bool((np.diff(heads) == 1).all() and (prompt - prompt[0, 0] == np.arange(tokens)).all())
