"""Prefetching by forecast: what every policy that predicts later layers has in common.

A seat derived from ``ForecastSeat`` says what it expects of which layer, and what saying so costs.
Delivery is done here: as a background job, whose forecasts are as late as its work makes them, or
in the foreground, where the work is charged on the critical path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moesim.errors import UsageError
from moesim.protocol import CacheView, PrefetchSeat, World
from moesim.types import (
    NO_PLAN,
    ExpertId,
    Fact,
    Forecast,
    Gate,
    IterationBegin,
    Job,
    JobDone,
    Plan,
    Prefetch,
    State,
)

# Plain numbers: an enumeration's members are slow to look up where every layer event does it.
ABSENT, MOVING = int(State.ABSENT), (int(State.QUEUED), int(State.IN_FLIGHT))

PRIORITY_SHIFT = 20
"""Priorities are probabilities over distances, in 2**-20 of 1/16384."""


class Foresight(NamedTuple):
    """What a seat makes of a fact.

    forecasts : of layers ahead in this pass; a layer that is not ahead is the next pass's.
    ops, nbytes : the work of it.
    kept_ops, kept_nbytes : that part of it which later forecasts build upon.
    """

    forecasts: Sequence[Forecast]
    ops: int
    nbytes: int
    kept_ops: int = 0
    kept_nbytes: int = 0


class _Due(NamedTuple):
    """A forecast on its way: ``event`` is the layer event that it is about."""

    forecast: Forecast
    event: int


def priority(probability: int, distance: int) -> int:
    """FineMoE's PRI = p / (l - l_now) (EuroSys'26, arXiv 2502.05370), rounded down."""
    return (probability << PRIORITY_SHIFT) // distance


@dataclass
class ForecastSeat(PrefetchSeat):
    """Prefetches what ``foresee`` expects, nearer and likelier experts first.

    background : forecasts come from a job on a host worker; else their work is charged on the
        critical path of the next layer event.
    queue : jobs that may wait; where as many do, a new forecast is dropped. What later forecasts
        build upon is not dropped with it: its work is added to the next job's.
    refresh : whether priorities rise as inference comes nearer.
    renew : whether a newer forecast of a layer takes back what an older one has in the queue.
    """

    background: bool = True
    queue: int = 32
    refresh: bool = True
    renew: bool = False
    dropped: int = field(default=0, init=False, repr=False)
    """Forecasts that found the queue full."""

    def __post_init__(self) -> None:
        """A queue has room for one job at least."""
        if self.queue < 1:
            raise UsageError(f"prefetch.queue={self.queue}: must be 1 or more")

    def begin(self, world: World) -> None:
        """Nothing is known but what the past teaches."""
        self.world = world
        self.dropped = 0
        self._event = self._here = -1
        self._first = 0
        self._owed_ops = self._owed_nbytes = 0
        self._wished: dict[ExpertId, tuple[int, int]] = {}
        for fact in world.past() if world.past is not None else ():
            self.learn(fact)

    # ---- what a seat defines ---------------------------------------------------------------------

    def learn(self, fact: Fact) -> None:
        """A fact of a past request."""

    def foresee(self, fact: Fact) -> Foresight | None:
        """What a fact makes it expect: a function of the facts so far, never of the cache."""
        raise NotImplementedError

    # ---- delivery --------------------------------------------------------------------------------

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """Commission the work of new forecasts, deliver those that are done, refresh the rest."""
        if isinstance(fact, JobDone):
            return self._deliver(fact.job.result, cache) if fact.job.result else NO_PLAN
        self.hear(fact)
        foresight = self.foresee(fact)
        plan = self._refreshed(cache) if isinstance(fact, Gate) else NO_PLAN
        if foresight is not None:
            plan = self._commission(foresight, plan, cache)
        if not self.background and isinstance(fact, Gate) and self._owed_ops:
            plan = replace(plan, foreground_ops=self._owed_ops)
            self._owed_ops = 0
        return plan

    def hear(self, fact: Fact) -> None:
        """Where in a pass the facts to come lie."""
        if isinstance(fact, Gate):
            self._event, self._here = fact.event, fact.layer
        elif isinstance(fact, IterationBegin):
            self._first = self.world.decode_from if fact.phase else 0
            self._here = self._first - 1

    def _commission(self, foresight: Foresight, plan: Plan, cache: CacheView) -> Plan:
        due = [_Due(f, self._event + self.events_to(f.layer)) for f in foresight.forecasts]
        if not self.background:
            # What is foreseen between layer events is charged at the next of them.
            self._owed_ops += foresight.ops
            return replace(self._deliver(due, cache), reprioritise=plan.reprioritise)
        if cache.jobs_waiting >= self.queue:
            self.dropped += bool(due)
            self._owed_ops += foresight.kept_ops
            self._owed_nbytes += foresight.kept_nbytes
            return plan
        ops, nbytes = foresight.ops + self._owed_ops, foresight.nbytes + self._owed_nbytes
        self._owed_ops = self._owed_nbytes = 0
        return replace(plan, jobs=[Job(ops, nbytes, due)])

    def events_to(self, layer: int) -> int:
        """Layer events from here to a layer of this pass, or else of the next."""
        ahead = layer - self._here
        return ahead if ahead > 0 else ahead + self.world.layers - self._first

    def _deliver(self, due: Sequence[_Due], cache: CacheView) -> Plan:
        """Forecasts as wishes; what inference has overtaken informs the keep seat alone."""
        wishes: list[Prefetch] = []
        cancel: list[ExpertId] = []
        for forecast, event in due:
            if event <= self._event:
                continue
            named = self._named(forecast, event)
            if self.renew:
                cancel += self._outdated(event, {wish.expert for wish in named}, cache)
            wishes += named
        return Plan(prefetches=wishes, cancel=cancel, forecasts=[d.forecast for d in due])

    def _named(self, forecast: Forecast, event: int) -> list[Prefetch]:
        base = forecast.layer * self.world.experts
        named = []
        for local in forecast.chosen.tolist():
            share = int(forecast.probabilities[local])
            self._wished[base + local] = share, event
            named.append(Prefetch(base + local, event, priority(share, event - self._event)))
        return named

    def _outdated(self, event: int, named: set[ExpertId], cache: CacheView) -> list[ExpertId]:
        """What an older forecast named for the event and this one does not; nobody's wish now."""
        old = [e for e, (_, when) in self._wished.items() if when == event and e not in named]
        for expert in old:
            del self._wished[expert]
        return [e for e in old if cache.states[e] in MOVING]

    def _refreshed(self, cache: CacheView) -> Plan:
        """Priorities as seen from this layer event; what is past is forgotten."""
        past = [e for e, (_, event) in self._wished.items() if event <= self._event]
        for expert in past:
            del self._wished[expert]
        if not self.refresh or not self._wished:
            return NO_PLAN
        states = cache.states
        return Plan(
            reprioritise=[
                (expert, priority(share, event - self._event))
                for expert, (share, event) in self._wished.items()
                if states[expert] != ABSENT
            ]
        )
