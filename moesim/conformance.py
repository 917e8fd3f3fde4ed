"""The conformance suite behind ``moesim.policy.check_policy``.

It drives a policy through small runs of the reference engine and names the first law that breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.costs import make_costs
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Options, Setup
from moesim.errors import MoesimError, PolicyError
from moesim.hashing import hash64
from moesim.past import Past, past_facts
from moesim.profile import ModelProfile, load_hardware
from moesim.protocol import (
    CacheView,
    KeepSeat,
    MissSeat,
    Policy,
    PrefetchSeat,
    RouteSeat,
    Seat,
    SeatPolicy,
    World,
    lacks,
)
from moesim.shape import all_precisions
from moesim.tally import Tally
from moesim.traces.reader import RequestRows, iteration_starts
from moesim.traces.schema import TraceMeta
from moesim.types import (
    PROBABILITY_ONE,
    AnyArray,
    Fact,
    Gate,
    IntArray,
    LayerEvent,
    Needs,
    Note,
    Plan,
)
from moesim.workload import (
    Inputs,
    KnownFuture,
    StaticBatch,
    layer_events,
    prepare,
    timeless_steps,
)

LAYERS, EXPERTS, TOP_K, TOKENS, REQUESTS = 3, 8, 2, 6, 4
CASES = ((2, "layer", 1), (3, "global", 3), (3, "layer", 1), (8, "layer", 3))
"""(slots a layer, scope, batch): from one layer event's demand to everything."""


def check(factory: Callable[[], Any]) -> None:
    """Tell a policy's author what is wrong with it, in the manner of ``check_estimator``.

    ``factory`` is called without arguments and returns a fresh policy, or a seat (which is joined
    with plain ones). It is driven through small runs: legal victims, the same answers under the
    same seed, inputs unchanged, no use of what it did not declare, capacities from one layer
    event to everything.

    Raises
    ------
    PolicyError
        Naming the law that it breaks.
    """
    make = _maker(factory)
    _check_shape(make())
    for slots, scope, batch in CASES:
        _check_runs(make, slots, scope, batch)
    _check_causal(make)


# ---- the laws ------------------------------------------------------------------------------------


def _check_shape(policy: Any) -> None:
    lacking = lacks(policy)
    if lacking:
        raise PolicyError(f"a policy has {lacking}; derive from PlainPolicy for the defaults")
    if not isinstance(policy.needs, Needs):
        raise PolicyError(f"needs must be moesim.types.Needs, not {type(policy.needs).__name__}")


def _check_runs(make: Callable[[], Policy], slots: int, scope: str, batch: int) -> None:
    """Legal, repeatable, and without touching what it was given."""
    case = f"at {slots} slots a layer, scope {scope}, batch {batch}"
    first = _run(make(), slots, scope, batch, case)
    again = _run(make(), slots, scope, batch, case)
    if first.log_digest != again.log_digest:
        raise PolicyError(f"{case}: two equal runs differ; take randomness from World.seed only")
    reused = make()
    _run(reused, slots, scope, batch, case)
    if _run(reused, slots, scope, batch, case).log_digest != first.log_digest:
        raise PolicyError(f"{case}: begin() does not forget the run before")


def _check_causal(make: Callable[[], Policy]) -> None:
    """The first half of a run does not depend on the second, unless FUTURE was declared."""
    policy = make()
    if policy.needs & (Needs.FUTURE | Needs.CALIBRATION):
        return
    whole, changed = _Recorder(policy), _Recorder(make())
    _run(whole, TOP_K + 1, "layer", 1, "causality")
    _run(changed, TOP_K + 1, "layer", 1, "causality", poisoned_from=REQUESTS // 2)
    half = LAYERS * TOKENS * (REQUESTS // 2)
    before = [a for e, a in whole.answers if e < half - 1]
    after = [a for e, a in changed.answers if e < half - 1]
    if before != after:
        raise PolicyError("answers depend on the trace's future; declare Needs.FUTURE")


# ---- driving -------------------------------------------------------------------------------------


def _maker(factory: Callable[[], Any]) -> Callable[[], Policy]:
    made = factory()
    if not isinstance(made, Seat):
        return factory

    def joined() -> Policy:
        seat = factory()
        return SeatPolicy(
            seat if seat.kind == "prefetch" else _named(PrefetchSeat),
            seat if seat.kind == "keep" else _named(KeepSeat),
            seat if seat.kind == "miss" else _named(MissSeat),
            seat if seat.kind == "route" else _named(RouteSeat),
        )

    return joined


def _named(cls: type) -> Any:
    return cls()


def _run(
    policy: Policy, slots: int, scope: str, batch: int, case: str, poisoned_from: int = REQUESTS
) -> Tally:
    meta, requests = _trace(poisoned_from)
    guarded = _Guarded(policy)
    engine = ReferenceEngine(_setup(guarded, meta, requests, slots, scope, batch))
    inputs = _inputs(policy)
    try:
        for index, rows in enumerate(requests):
            engine.offer(prepare(index, rows, meta, inputs))
            engine.advance()
        engine.close()
        while not engine.advance():
            pass
    except MoesimError:
        raise
    except Exception as error:
        raise PolicyError(f"{case}: {type(error).__name__}: {error}") from error
    return engine.tally


def _inputs(policy: Policy) -> Inputs:
    distances: tuple[int, ...] = (1,)
    if isinstance(policy, SeatPolicy):
        distances = policy.prefetch.distances or distances
    return Inputs(policy.needs, distances)


def _setup(
    policy: Policy,
    meta: TraceMeta,
    requests: Sequence[RequestRows],
    slots: int,
    scope: str,
    batch: int,
) -> Setup:
    nbytes = int(meta.model.expert_bytes_table()[0])
    per_layer: tuple[int, ...] = (slots * nbytes,) * LAYERS
    costs = make_costs(meta.model, load_hardware("rtx4090"))
    needs = policy.needs
    future = _future(meta, requests, batch)
    world = World(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=TOP_K,
        expert_bytes=all_precisions(meta.model),
        capacity_bytes=per_layer if scope == "layer" else (sum(per_layer),),
        scope=scope,
        costs=costs if Needs.COSTS in needs else None,
        calibration=future.counts if Needs.CALIBRATION in needs else None,
        expert_norms=np.arange(1, LAYERS * EXPERTS + 1, dtype=np.int64) * PROBABILITY_ONE,
        past=_past(meta, _inputs(policy)) if Needs.PAST in needs else None,
        future=future if Needs.FUTURE in needs else None,
    )
    return Setup(policy, world, costs, StaticBatch(batch), Options(check=True))


def _past(meta: TraceMeta, inputs: Inputs) -> Past:
    """A request that is not among those served."""
    rows = _request(REQUESTS, 0)
    return lambda: past_facts([prepare(0, rows, meta, inputs)], EXPERTS)


def _future(meta: TraceMeta, requests: Sequence[RequestRows], batch: int) -> KnownFuture:
    works = [prepare(i, rows, meta, Inputs()) for i, rows in enumerate(requests)]
    demands: list[IntArray] = []
    for step in timeless_steps(works, StaticBatch(batch)):
        demands += [item.demand.experts for item in layer_events(step, 0, EXPERTS)]
    return KnownFuture(demands, LAYERS * EXPERTS)


def _trace(poisoned_from: int) -> tuple[TraceMeta, list[RequestRows]]:
    """A small decoding trace with every optional column; later requests differ if poisoned."""
    model = ModelProfile.generic(LAYERS, EXPERTS, TOP_K, "conformance")
    (full,) = model.expert_bytes
    assert isinstance(full, int)
    model = replace(
        model,
        score="softmax-renorm",
        precisions=("bf16", "int8"),
        expert_bytes=(full, full // 2),
    )
    meta = TraceMeta(
        model=model,
        score="softmax-renorm",
        has_weights=True,
        has_gate=True,
        has_norms=True,
        ahead=dict.fromkeys((1, 2, 3), TOP_K),
        embedding="iteration",
    )
    return meta, [_request(r, 1 if r >= poisoned_from else 0) for r in range(REQUESTS)]


def _request(request: int, salt: int) -> RequestRows:
    rows = TOKENS * LAYERS
    iteration = np.repeat(np.arange(1, TOKENS + 1, dtype=np.int32), LAYERS)
    layer = np.tile(np.arange(LAYERS, dtype=np.int16), TOKENS)
    token = iteration.astype(np.int64)
    draw = hash64(request, salt, token[:, None] // 3, layer[:, None].astype(np.int64), _ids())
    logits = (draw >> np.uint64(54)).astype(np.float16) / np.float16(256)
    order = np.argsort(-logits, axis=1, kind="stable").astype(np.uint16)
    top = np.take_along_axis(logits, order[:, :TOP_K].astype(np.int64), axis=1).astype(np.float32)
    weights = np.exp(top) / np.exp(top).sum(axis=1, keepdims=True)
    return RequestRows(
        request=request,
        starts=iteration_starts(iteration),
        iteration=iteration,
        position=iteration - 1,
        layer=layer,
        phase=np.ones(rows, np.uint8),
        experts=order[:, :TOP_K],
        weights=weights.astype(np.float16),
        gate=logits,
        ahead=dict.fromkeys((1, 2, 3), order[:, :TOP_K]),
        input_norm=np.ones(rows, np.float16),
        embedding={i: np.full(4, request + i, np.float16) for i in range(1, TOKENS + 1)},
    )


def _ids() -> AnyArray:
    return np.arange(EXPERTS)[None, :]


@dataclass
class _Wrapped:
    """Passes everything on."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Guarded(_Wrapped):
    """Notices a policy that changes its inputs, or answers differently when asked again."""

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        before = _contents(fact)
        plan: Plan = self.inner.on(fact, cache)
        if before != _contents(fact):
            raise PolicyError(f"on() changed its {type(fact).__name__}; copy before writing")
        return plan

    def scores(self, experts: IntArray, event: int) -> IntArray:
        first = self.inner.scores(experts.copy(), event)
        again: IntArray = self.inner.scores(experts.copy(), event)
        if np.asarray(again).dtype == np.int64 and not np.array_equal(first, again):
            raise PolicyError("scores() answers differently when asked twice; keep it pure")
        return again


def _contents(fact: Fact) -> bytes:
    """The bytes of every array of a fact."""
    held: list[object] = [getattr(fact, name) for name in type(fact).__slots__]
    if isinstance(fact, Gate):
        held += [getattr(fact.source, name) for name in LayerEvent.__slots__]
        held += fact.source.ahead.values()
    return b"".join(array.tobytes() for array in held if isinstance(array, np.ndarray))


class _Recorder(_Wrapped):
    """Remembers what the policy answered at each layer event."""

    def __init__(self, inner: Policy) -> None:
        super().__init__(inner)
        self.answers: list[tuple[int, str]] = []
        self._event = -1

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        self._event = getattr(fact, "event", self._event)
        plan: Plan = self.inner.on(fact, cache)
        self.answers.append((self._event, repr(plan)))
        return plan

    def route(self, event: LayerEvent, cache: CacheView) -> AnyArray | None:
        routed: AnyArray | None = self.inner.route(event, cache)
        self.answers.append((event.event, repr(routed)))
        return routed

    def note(self, fact: Note) -> None:
        self.answers.append((self._event, repr(fact)))
        self.inner.note(fact)
