"""The words that every part of moesim shares: ids, facts, plans and their enumerations.

An *expert id* is ``layer * experts + expert``. A *key* names one copy of an expert in one
precision, ``precision * layers * experts + expert id``, so that a key below ``layers * experts`` is
a full-precision copy. All times are ``int64`` nanoseconds.

Facts are what a host tells a policy. They carry no clock, no tensor and no object of any host, so a
policy is a pure function of the ordered facts it received.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from enum import Flag, IntEnum, auto
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

ExpertId: TypeAlias = int
IntArray: TypeAlias = NDArray[np.int64]
AnyArray: TypeAlias = NDArray[Any]

DROPPED = 65535
"""An expert slot of a token that the model dropped (capacity-limited routing)."""

PROBABILITY_ONE = 1 << 14
"""Decision inputs are integers; this is the probability 1 (design: 1/16384 steps)."""

NEVER = 1 << 62
"""An event number later than any other: "not used again", "does not expire"."""


class Phase(IntEnum):
    """What a forward pass does for a request."""

    PREFILL = 0
    DECODE = 1


class Status(IntEnum):
    """Where a demanded expert was at the gate."""

    HIT = 0
    """Resident and arrived."""
    LATE = 1
    """In flight: bytes were reserved and moving."""
    MISS = 2
    """Neither, even if a prefetch of it waited in the queue."""


class State(IntEnum):
    """Where a copy of an expert is, as a policy may see it."""

    ABSENT = 0
    QUEUED = 1
    """A prefetch waits for the link; no bytes are held."""
    IN_FLIGHT = 2
    """Bytes are reserved, the copy has not wholly arrived."""
    RESIDENT = 3


class Serve(IntEnum):
    """How a missing expert is served."""

    FETCH = 0
    CPU = 1
    SKIP = 2
    """Not executed at all: lossy."""


class Needs(Flag):
    """What a policy must be given. A trace that lacks it means a named refusal, not a guess."""

    NONE = 0
    WEIGHTS = auto()
    """Gate weights of the chosen experts."""
    GATE = auto()
    """Gate probabilities of all experts."""
    AHEAD = auto()
    """Experts predicted for later layers."""
    EMBEDDING = auto()
    """A prompt or iteration embedding."""
    NORMS = auto()
    """Norms of the layer inputs and of the experts."""
    COSTS = auto()
    """The cost table: a table is not a clock."""
    CALIBRATION = auto()
    """How often each expert was used on a calibration trace."""
    FUTURE = auto()
    """The rest of the trace. The result is a bound, never ranked as a policy."""
    PAST = auto()
    """Requests of the past to learn from, where there are any (``--split``, ``--calibration``)."""
    PARTS = auto()
    """A trace whose experts are in parts (``moesim trace parts``)."""


# ---- facts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestBegin:
    """A request is admitted. ``embedding``: int32 [d], scaled by 2**14, or None."""

    request: int
    prompt_tokens: int
    embedding: AnyArray | None = None


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """A request has produced its last token."""

    request: int


@dataclass(frozen=True, slots=True)
class IterationBegin:
    """One forward pass of one request begins (with its first chunk, if the prefill is chunked)."""

    request: int
    iteration: int
    phase: Phase
    tokens: int
    embedding: AnyArray | None = None


@dataclass(frozen=True, slots=True)
class IterationEnd:
    """One forward pass of one request has ended."""

    request: int
    iteration: int


class Slot(NamedTuple):
    """One request's share of a step: ``tokens`` rows from ``first`` on, in a layer event."""

    request: int
    iteration: int
    phase: Phase
    first: int
    tokens: int


@dataclass(frozen=True, slots=True)
class LayerEvent:
    """One MoE layer of one step, before anything is pinned.

    T tokens (slot after slot), k experts a token, E experts a layer.

    event : sequence number of the layer event in the run, from 0.
    token_experts : uint16 [T, k], ids within the layer, by gate rank; ``DROPPED`` for none.
    weights : int32 [T, k] in 1/16384, or None.
    gate : int32 [T, E] probabilities in 1/16384, or None.
    ahead : distance -> uint16 [T, M], experts predicted for ``layer + distance``.
    norms : int32 [T] in 1/16384 of the layer input's norm, or None.
    """

    event: int
    step: int
    layer: int
    slots: tuple[Slot, ...]
    token_experts: AnyArray
    weights: AnyArray | None = None
    gate: AnyArray | None = None
    ahead: Mapping[int, AnyArray] = field(default_factory=dict)
    norms: AnyArray | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """The demand of a layer event, judged and pinned. Delivered once, before misses are served.

    experts : int64 [n] expert ids, the union over the batch in demand order: first token, then
        gate rank.
    tokens : int64 [n] tokens that chose each expert.
    status : uint8 [n] of ``Status``, as judged at this moment.
    phases : uint8 [n], the phase of the first token that chose the expert.
    precisions : uint8 [n], the precision of the copy that serves each; None: all in full.
    """

    source: LayerEvent
    experts: IntArray
    tokens: IntArray
    status: AnyArray
    phases: AnyArray
    precisions: AnyArray | None = None

    @property
    def event(self) -> int:
        """Sequence number of the layer event."""
        return self.source.event

    @property
    def layer(self) -> int:
        """MoE layer index."""
        return self.source.layer


@dataclass(frozen=True, slots=True)
class JobDone:
    """A background job's result arrives; ``event`` is the newest layer event by then."""

    job: Job
    event: int


Frozen = TypeVar("Frozen")


def quick_maker(kind: type[Frozen]) -> Callable[..., Frozen]:
    """Makes a frozen dataclass with slots from the values of all its fields, in order.

    Its own constructor sets each field by a call, which is what a layer event in plain Python would
    mostly cost; a twin that is not frozen yet needs none.
    """
    names = [part.name for part in fields(kind)]  # type: ignore[arg-type]
    twin: Any = make_dataclass(kind.__name__, names, slots=True)

    def make(*values: Any) -> Frozen:
        made: Frozen = twin(*values)
        made.__class__ = kind
        return made

    return make


Fact: TypeAlias = RequestBegin | RequestEnd | IterationBegin | IterationEnd | Gate | JobDone


@dataclass(frozen=True, slots=True)
class Landed:
    """A copy has wholly arrived.

    event, order : the layer event whose plan or demand asked for it, and its place there; demand
        comes first, prefetches after all demand.
    """

    expert: ExpertId
    precision: int
    event: int
    order: int
    demand: bool


@dataclass(frozen=True, slots=True)
class Evicted:
    """A resident copy was given up; ``event`` is the layer event during which it went."""

    expert: ExpertId
    precision: int
    event: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A planned prefetch will not arrive: it expired in the queue or was cancelled."""

    expert: ExpertId
    precision: int
    event: int


Note: TypeAlias = Landed | Evicted | Dropped


# ---- answers -------------------------------------------------------------------------------------


class Routed(NamedTuple):
    """What a lossy policy has executed in the place of what was recorded.

    experts : uint16 [T, k], ``DROPPED`` for none; None: as recorded.
    precisions : uint8 [T, k], the lowest precision (the largest number) that will do; None: full.
        The best copy that is there serves, and of several tokens the one that asks for most.
    """

    experts: AnyArray | None = None
    precisions: AnyArray | None = None


class Prefetch(NamedTuple):
    """One wish of a plan, in the order wished.

    priority : larger goes first; equal priorities in the order planned.
    expires : the layer event at whose gate it becomes useless: not demanded there, it leaves the
        queue. ``NEVER`` keeps it.
    replaces : the expert that it takes the place of (a swap), or -1 for the policy's usual victim.
    """

    expert: ExpertId
    expires: int = NEVER
    priority: int = 0
    precision: int = 0
    replaces: ExpertId = -1


class Forecast(NamedTuple):
    """What a prefetch seat expects of a layer.

    probabilities : int64 [E] in 1/16384; of a batch, the largest of its requests.
    chosen : int64 [n] local ids that it would prefetch, best first.
    """

    layer: int
    probabilities: AnyArray
    chosen: AnyArray


class Swap(NamedTuple):
    """One expert takes another's place in routing: once ``comes`` is resident, ``goes`` may be used
    no more, though it may stay in memory for a while.

    goes : ``comes`` itself is given up as soon as it is there; -1: nobody goes.
    """

    comes: ExpertId
    goes: ExpertId


@dataclass(frozen=True, slots=True)
class Job:
    """Background work: its declared size is charged, its result comes back as ``JobDone``."""

    ops: int
    nbytes: int
    result: Any = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy answers to a fact.

    serve : missing expert -> how; absent ones are fetched.
    foreground_ops : operations charged on the critical path of this layer event.
    forecasts, swaps : for the other seats of the policy alone; a host does not look at them.
    """

    prefetches: Sequence[Prefetch] = ()
    cancel: Sequence[ExpertId] = ()
    reprioritise: Sequence[tuple[ExpertId, int]] = ()
    serve: Mapping[ExpertId, Serve] = field(default_factory=dict)
    jobs: Sequence[Job] = ()
    foreground_ops: int = 0
    forecasts: Sequence[Forecast] = ()
    swaps: Sequence[Swap] = ()


NO_PLAN = Plan()
