"""Evicts by 1 / (p * freq): what is expected least and was used least.

FineMoE (EuroSys'26, arXiv 2502.05370): p is the probability that the
prefetch seat's latest forecast gives an expert, freq counts its visits. Recency is left out on
purpose: layers follow one another, so what was used last is needed again last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.protocol import KeepSeat, World
from moesim.types import (
    PROBABILITY_ONE,
    Evicted,
    Fact,
    Forecast,
    Gate,
    IntArray,
    IterationBegin,
    Landed,
    Note,
)

UNSEARCHED = ("last", "uniform", "zero")
FREQUENCIES = ("residency", "global")


def worth(share: IntArray, visits: IntArray) -> IntArray:
    """Kernel: p * freq, p in 1/16384; of one expert or of many."""
    return share * visits


@dataclass
class MapFrequency(KeepSeat):
    """Evicts the smallest p * freq. It hears p from a prefetch seat that forecasts.

    unsearched : p of experts whose layer was not forecast in this pass: what the ``last`` forecast
        said (so does the released code's later version), ``uniform`` (1 over the experts, which
        that version assumes when a prompt begins), or ``zero`` (its earlier versions). Before any
        forecast it is uniform, but for ``zero``.
    freq : visits are counted per ``residency`` (forgotten with an eviction: the paper's count is of
        an expert "in cache") or ``global``.

    A visit is a layer event that demands the expert, or the arrival of a prefetch of it. A softmax
    is never 0: a forecast's probability counts as 1/16384 at least, so that visits decide between
    experts that are all but excluded.
    """

    name = "map-frequency"
    source = "arXiv 2502.05370"
    cost = "O(E) a forecast; O(R) an eviction"
    unsearched: str = "last"
    freq: str = "residency"

    def __post_init__(self) -> None:
        """Known words."""
        if self.unsearched not in UNSEARCHED:
            raise UsageError(
                f"keep.unsearched={self.unsearched}: must be {' or '.join(UNSEARCHED)}"
            )
        if self.freq not in FREQUENCIES:
            raise UsageError(f"keep.freq={self.freq}: must be {' or '.join(FREQUENCIES)}")

    def begin(self, world: World) -> None:
        """Nothing was visited, nothing is expected."""
        super().begin(world)
        self.experts = world.experts
        self.unknown = 0 if self.unsearched == "zero" else PROBABILITY_ONE // world.experts
        self.share = np.full(world.size, self.unknown, np.int64)
        self.visits = np.zeros(world.size, np.int64)
        self._begins = False

    def on(self, fact: Fact) -> None:
        """A pass begins with its first iteration's begin; each of a batch has one."""
        if isinstance(fact, IterationBegin):
            if self.unsearched != "last" and not self._begins:
                self.share[:] = self.unknown
                self.score[:] = worth(self.share, self.visits)
            self._begins = True
        elif isinstance(fact, Gate):
            self._begins = False
            asked = fact.experts
            self.visits[asked] += 1
            self.score[asked] = worth(self.share[asked], self.visits[asked])

    def expected(self, forecast: Forecast) -> None:
        """The newest forecast of a layer counts, however late it comes."""
        layer = slice(forecast.layer * self.experts, (forecast.layer + 1) * self.experts)
        self.share[layer] = np.maximum(forecast.probabilities, 1)
        self.score[layer] = worth(self.share[layer], self.visits[layer])

    def note(self, fact: Note) -> None:
        """An arrival is a visit, unless a layer event has counted it; an eviction may forget."""
        if isinstance(fact, Landed) and not fact.demand:
            self.visits[fact.expert] += 1
        elif isinstance(fact, Evicted) and self.freq == "residency":
            self.visits[fact.expert] = 0
        else:
            return
        self.score[fact.expert] = worth(self.share[fact.expert], self.visits[fact.expert])
