"""Policies and seats that break the protocol, one law each (used by test_cli.py)."""

from __future__ import annotations

import numpy as np

from moesim.policy import KeepSeat, MissSeat, PlainPolicy, PrefetchSeat
from moesim.types import Gate, Needs, Plan, Prefetch, Serve, Status


class Naming(PlainPolicy):
    """Names its own victims; subclasses name wrong ones."""

    scored = False

    def on(self, fact, cache):
        if isinstance(fact, Gate):
            self.demand = [int(e) for e in fact.experts]
            self.states = cache.states
        return Plan()


class NamesPinned(Naming):
    def victims(self, nbytes, cache):
        return self.demand


class NamesAbsent(Naming):
    def victims(self, nbytes, cache):
        return [int(e) for e in np.flatnonzero(self.states == 0)][:1]


class NamesNobody(Naming):
    def victims(self, nbytes, cache):
        return []


class NamesTwice(Naming):
    def victims(self, nbytes, cache):
        return [cache.candidates[0], cache.candidates[0]]


class NamesNoId(Naming):
    def victims(self, nbytes, cache):
        return ["expert"]


class NamesBeyond(Naming):
    def victims(self, nbytes, cache):
        return [10**9]


class NamesNone(Naming):
    def victims(self, nbytes, cache):
        return None


class AnswersNothing(PlainPolicy):
    def on(self, fact, cache):
        return None


class AnswersList(PlainPolicy):
    def on(self, fact, cache):
        return [1, 2]


class ScoresFloats(PlainPolicy):
    def scores(self, experts, event):
        return np.zeros(len(experts))


class ScoresTooFew(PlainPolicy):
    def scores(self, experts, event):
        return np.zeros(max(0, len(experts) - 1), np.int64)


class ScoresText(PlainPolicy):
    def scores(self, experts, event):
        return "all equal"


class PrefetchesBeyond(PlainPolicy):
    def on(self, fact, cache):
        return Plan(prefetches=[Prefetch(10**9)])


class PrefetchesNegative(PlainPolicy):
    def on(self, fact, cache):
        return Plan(prefetches=[Prefetch(-1)])


class PrefetchesText(PlainPolicy):
    def on(self, fact, cache):
        return Plan(prefetches=[Prefetch("expert")])


class PrefetchesPrecision(PlainPolicy):
    def on(self, fact, cache):
        return Plan(prefetches=[Prefetch(0, precision=9)])


class PrefetchesBareIds(PlainPolicy):
    def on(self, fact, cache):
        return Plan(prefetches=[3])


class CancelsBeyond(PlainPolicy):
    def on(self, fact, cache):
        return Plan(cancel=[10**9])


class SkipsUndeclared(PlainPolicy):
    def on(self, fact, cache):
        if not isinstance(fact, Gate):
            return Plan()
        missing = fact.experts[fact.status == Status.MISS]
        return Plan(serve={int(e): Serve.SKIP for e in missing})


class ServesNonsense(PlainPolicy):
    def on(self, fact, cache):
        if not isinstance(fact, Gate):
            return Plan()
        return Plan(serve=dict.fromkeys(fact.experts.tolist(), "by post"))


class ServesHits(PlainPolicy):
    """Wants experts that are there to run on the host."""

    def on(self, fact, cache):
        if not isinstance(fact, Gate):
            return Plan()
        hits = fact.experts[fact.status == Status.HIT]
        return Plan(serve={int(e): Serve.CPU for e in hits})


class WritesStates(PlainPolicy):
    """Reaches for the host's books."""

    def on(self, fact, cache):
        cache.states[:] = 3
        return Plan()


class NeedsArguments(PlainPolicy):
    def __init__(self, size):
        self.size = size


class NoPolicy:
    """Has nothing of a policy."""


class NeedsWeights(PlainPolicy):
    """Legal: reads the gate weights."""

    needs = Needs.WEIGHTS


class KeepNothing(KeepSeat):
    """A keep seat that scores nothing."""

    def scores(self, experts, event):
        return None


class PlansNothing(PrefetchSeat):
    def plan(self, fact, cache):
        return None


class ServesNothing(MissSeat):
    def serve(self, gate, cache):
        return None
