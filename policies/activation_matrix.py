"""MoE-Infinity (arXiv 2401.14361): experts predicted from whole requests of the past.

An *expert activation matrix* (EAM) counts the tokens that chose each expert, [L, E]: the iEAM those
of one forward pass, the rEAM those of a request so far. A bounded collection (EAMC) holds the rEAMs
of past requests. After each layer's gate the matrix under way is matched with the collection, those
most like it are summed and normalised by row, and the experts of all later layers are prefetched by

    weight = p[i, e] * (1 - (i - l) / L)            for layer i, seen from layer l.

The authors' released code differs from their paper; ``variant`` says which is followed:

============  ==============================================  ====================================
              ``paper``                                       ``code``
============  ==============================================  ====================================
matched       the iEAM's rows up to l, each normalised to 1,  the rEAM's rows up to l, the mean of
              as one vector: cosine                           the rows' cosines
proximity     ``1 - (i - l) / L``                             ``1 - (i - l) / (L + 1)``
collection    120 matrices                                    1000 matrices
when full     the matrix most like the new one goes           the least often matched one goes
eviction      ``keep=activation-matrix``                      ``keep=lfu-incache``
prefetching   on                                              off by default (``prefetch=none``);
                                                              FineMoE's authors ran it on
============  ==============================================  ====================================

Choices where the sources are silent: how many matches are summed (``nearest``, 1, and all that tie
with the last of them); so where nothing was observed yet, at the start of a forward pass, all tie
and the whole collection is summed. Rows without tokens (an encoder's, while decoding) take no part
in a match. Being put in the collection counts as one access; of the least accessed the oldest goes.
A request served in chunks is matched by the rows of the chunk under way. Of a batch, each request
is matched alone and an expert takes the largest of its values. epsilon is 1/16384 of a row's sum.
Every expert with a positive value is prefetched; by the preset ``moe-infinity-code`` the model's
top k of each layer (``width=0``), as FineMoE's authors did.

The prediction is synchronous (``background`` is false), as FineMoE's authors describe it: its
multiply-adds, one for each count compared, pass on the critical path of the layer. A prefetch that
the newest prediction no longer names keeps its last priority until its layer has passed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moesim.errors import UsageError
from moesim.policies.forecast import PRIORITY_SHIFT, ForecastSeat, Foresight
from moesim.protocol import MOST_DISTANT, KeepSeat, World, check_distance
from moesim.types import (
    DROPPED,
    PROBABILITY_ONE,
    AnyArray,
    Fact,
    Forecast,
    Gate,
    IntArray,
    IterationBegin,
    Needs,
    Prefetch,
    RequestBegin,
    RequestEnd,
    Slot,
)

VARIANTS = ("paper", "code")
SIZES = {"paper": 120, "code": 1000}
COSINE_BITS = 30
"""Cosines of rows are summed in 2**-30."""


# ---- kernels -------------------------------------------------------------------------------------


def shares(counts: AnyArray) -> IntArray:
    """Kernel: rows [..., E] normalised to the sum 1, in 1/16384, halves up; empty rows stay empty.

    The paper's row normalisation; ``counts`` hold whole numbers.
    """
    whole = counts.astype(np.int64)
    sums = whole.sum(axis=-1, keepdims=True)
    made: IntArray = (2 * PROBABILITY_ONE * whole + sums) // np.maximum(2 * sums, 1)
    return made


def cosines(dots: AnyArray, own: float, theirs: AnyArray) -> AnyArray:
    """Kernel: float64 [n], cosines from inner products and squared norms; 0 for an empty vector.

    The arguments are whole numbers below 2**53, so the result is one root, one product and one
    quotient away from exact on every host.
    """
    length = np.sqrt(np.float64(own)) * np.sqrt(theirs)
    made: AnyArray = np.divide(dots, length, out=np.zeros(len(dots)), where=length > 0)
    return made


def row_cosines(row: AnyArray, rows: AnyArray, squares: AnyArray) -> IntArray:
    """Kernel: int64 [n] in 2**-30, the cosine of ``row`` [E] with each of ``rows`` [n, E]."""
    found = cosines(rows @ row, float(row @ row), squares)
    scaled: IntArray = np.floor(found * (1 << COSINE_BITS)).astype(np.int64)
    return scaled


def best(similarities: AnyArray, nearest: int) -> AnyArray:
    """Kernel: bool [n], the ``nearest`` largest and all that tie with the last of them."""
    if len(similarities) <= nearest:
        return np.ones(len(similarities), np.bool_)
    least = np.partition(similarities, -nearest)[-nearest]
    chosen: AnyArray = similarities >= least
    return chosen


def proximity(shares_: IntArray, distance: int, span: int) -> IntArray:
    """Kernel: ``p * (1 - distance / span)``, rounded down, as priorities are scaled."""
    return (shares_ * max(span - distance, 0) << PRIORITY_SHIFT) // span


def worth(shares_: IntArray, layers: IntArray, count: int) -> IntArray:
    """Kernel: ``(p + epsilon) * (1 - l / L)`` in 1/16384 of 1/L; epsilon is the smallest step."""
    return (shares_ + 1) * (count - layers)


# ---- the collection ------------------------------------------------------------------------------


class Collection:
    """The EAMC: at most ``size`` matrices of past requests.

    counts : float64 [size, L, E] whole numbers. ``version`` changes with every insertion.
    """

    def __init__(self, size: int, layers: int, experts: int, variant: str) -> None:
        self.size = size
        self.variant = variant
        self.used = 0
        self.version = 0
        self.counts = np.zeros((size, layers, experts))
        self.accessed = np.zeros(size, np.int64)
        self._born = np.zeros(size, np.int64)
        # What a match reads: normalised rows (paper) or the counts themselves (code).
        self._matched = np.zeros_like(self.counts) if variant == "paper" else self.counts
        self._squares = np.zeros((size, layers))

    def rows(self, layer: int) -> tuple[AnyArray, AnyArray]:
        """(rows [n, E], squared norms [n]) of a layer, as they are matched."""
        return self._matched[: self.used, layer], self._squares[: self.used, layer]

    def insert(self, matrix: IntArray) -> None:
        """A finished request's rEAM [L, E]."""
        at = self._place(matrix)
        self.version += 1
        self.counts[at] = matrix
        if self.variant == "paper":
            self._matched[at] = shares(matrix)
        self._squares[at] = np.square(self._matched[at]).sum(axis=1)
        self.accessed[at] = 1
        self._born[at] = self.version

    def _place(self, matrix: IntArray) -> int:
        if self.used < self.size:
            self.used += 1
            return self.used - 1
        if self.variant == "code":
            return int(np.lexsort((self._born, self.accessed))[0])
        new = shares(matrix).astype(np.float64).reshape(-1)
        dots = self._matched.reshape(self.size, -1) @ new
        return int(cosines(dots, float(new @ new), self._squares.sum(axis=1)).argmax())

    def summed(self, chosen: AnyArray) -> IntArray:
        """pEAM: the chosen matrices summed and normalised by row, int64 [L, E] in 1/16384."""
        return shares(self.counts[: self.used][chosen].sum(axis=0))


# ---- requests under way --------------------------------------------------------------------------


class Request:
    """One request's matrices, and how like the collection's its newest rows are."""

    def __init__(self, layers: int, experts: int) -> None:
        self.whole = np.zeros((layers, experts), np.int64)
        """rEAM."""
        self.begin_pass()

    def begin_pass(self) -> None:
        """A forward pass begins: an empty iEAM."""
        self.now = np.zeros_like(self.whole)
        self._begin_prefix()

    def _begin_prefix(self) -> None:
        self.prefix: dict[int, AnyArray] = {}
        """Layer -> row as it is matched."""
        self._version = self._newest = -1

    def observe(self, layer: int, counts: IntArray, variant: str) -> None:
        """What a gate chose, tokens of each expert [E]."""
        self.whole[layer] += counts
        self.now[layer] += counts
        if layer < self._newest:
            # The next chunk of a prefill: layers begin anew.
            self._begin_prefix()
        if layer == self._newest:
            self._version = -1
        row = shares(self.now[layer]) if variant == "paper" else self.whole[layer]
        self.prefix[layer] = row.astype(np.float64)
        self._newest = layer

    def match(self, collection: Collection) -> AnyArray:
        """Similarities [n] with the collection; equal where nothing was observed."""
        layers = [self._newest] if self._version == collection.version else list(self.prefix)
        if self._version != collection.version:
            self._sums = np.zeros((2, collection.used))
            self._own = 0.0
            self._cosines = np.zeros(collection.used, np.int64)
            self._version = collection.version
        for layer in layers:
            self._add(layer, collection)
        if collection.variant == "code":
            return self._cosines
        return cosines(self._sums[0], self._own, self._sums[1])

    def _add(self, layer: int, collection: Collection) -> None:
        row = self.prefix[layer]
        if not row.any():
            return
        rows, squares = collection.rows(layer)
        if collection.variant == "code":
            self._cosines += row_cosines(row, rows, squares)
        else:
            self._sums += rows @ row, squares
            self._own += float(row @ row)


def tokens_of(slot: Slot, token_experts: AnyArray, experts: int) -> IntArray:
    """Tokens of a request that chose each expert of a layer, int64 [E]; dropped ones left out."""
    chosen = token_experts[slot.first : slot.first + slot.tokens].reshape(-1)
    counts: IntArray = np.bincount(chosen[chosen < experts], minlength=experts)
    return counts.astype(np.int64)


# ---- the seats -----------------------------------------------------------------------------------


@dataclass
class ActivationMatrix(ForecastSeat):
    """Prefetches what requests with matrices like this one's went on to use.

    variant : ``paper`` or ``code``, see the module.
    size : matrices in the collection; 0 takes the variant's.
    nearest : matrices that are summed, and all that tie with the last of them.
    distance : layers ahead at most.
    width : experts of a layer, best first, of those with a positive value; 0 takes the model's top
        k. The default takes all.
    """

    name = "activation-matrix"
    source = "arXiv 2401.14361"
    cost = "O(S L E)"
    needs = Needs.PAST
    background: bool = False
    refresh: bool = False
    variant: str = "paper"
    size: int = 0
    nearest: int = 1
    distance: int = MOST_DISTANT
    width: int = DROPPED
    _requests: dict[int, Request] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """A known variant, and numbers in their range."""
        super().__post_init__()
        check_distance(self.distance)
        if self.refresh:
            raise UsageError("prefetch.refresh=true: every gate ranks anew; leave it false")
        if self.variant not in VARIANTS:
            raise UsageError(f"prefetch.variant={self.variant}: must be {' or '.join(VARIANTS)}")
        if self.size < 0:
            raise UsageError(f"prefetch.size={self.size}: must be 0 (the variant's) or more")
        if self.nearest < 1:
            raise UsageError(f"prefetch.nearest={self.nearest}: must be 1 or more")
        if self.width < 0:
            raise UsageError(f"prefetch.width={self.width}: must be 0 (top k) or more")

    def begin(self, world: World) -> None:
        """An empty collection, then what the past teaches."""
        size = self.size or SIZES[self.variant]
        self.collection = Collection(size, world.layers, world.experts, self.variant)
        self.span = world.layers + (self.variant == "code")
        self._requests = {}
        self._expected_all = -1
        super().begin(world)

    def learn(self, fact: Fact) -> None:
        """The matrices of past requests."""
        if isinstance(fact, RequestBegin):
            self._requests[fact.request] = Request(self.world.layers, self.world.experts)
        elif isinstance(fact, IterationBegin):
            self._requests[fact.request].begin_pass()
        elif isinstance(fact, Gate):
            self._expected_all = -1
            for slot in fact.source.slots:
                counts = tokens_of(slot, fact.source.token_experts, self.world.experts)
                self._requests[slot.request].observe(fact.layer, counts, self.variant)
        elif isinstance(fact, RequestEnd):
            self.collection.insert(self._requests.pop(fact.request).whole)

    def foresee(self, fact: Fact) -> Foresight | None:
        """After each gate, and from the whole collection when a forward pass begins."""
        self.learn(fact)
        if not self.collection.used:
            return None
        if isinstance(fact, Gate):
            return self._from_matches(fact)
        if isinstance(fact, IterationBegin) and self._expected_all != self.collection.version:
            # Once for all that begin together: they have shown nothing to tell them apart.
            self._expected_all = self.collection.version
            everything = np.ones(self.collection.used, np.bool_)
            return self._foresight(self.collection.summed(everything), 0)
        return None

    def _from_matches(self, gate: Gate) -> Foresight:
        expected = np.zeros((self.world.layers, self.world.experts), np.int64)
        compared = 0
        for slot in gate.source.slots:
            request = self._requests[slot.request]
            chosen = best(request.match(self.collection), self.nearest)
            self.collection.accessed[: self.collection.used][chosen] += 1
            np.maximum(expected, self.collection.summed(chosen), out=expected)
            compared += len(request.prefix)
        return self._foresight(expected, compared)

    def _foresight(self, expected: IntArray, compared: int) -> Foresight:
        """Wishes for later layers; what is expected of all others is for the keep seat."""
        ranked = np.argsort(-expected, axis=1, kind="stable")
        widths = np.count_nonzero(expected, axis=1)
        layers = np.arange(len(expected)) - self._here
        widths[(layers < 1) | (layers > self.distance)] = 0
        np.minimum(widths, self.width or self.world.top_k, out=widths)
        forecasts = [
            Forecast(i, row, ranked[i, :width])
            for i, (row, width) in enumerate(zip(expected, widths.tolist(), strict=True))
        ]
        ops = (compared * self.collection.used + self.world.layers) * self.world.experts
        return Foresight(forecasts, ops, 0)

    # ---- delivery: other priorities than the base's ----------------------------------------------

    def _named(self, forecast: Forecast, event: int) -> list[Prefetch]:
        if not len(forecast.chosen):
            return []
        weights = forecast.probabilities[forecast.chosen]
        priorities = proximity(weights, event - self._event, self.span)
        experts = (forecast.layer * self.world.experts + forecast.chosen).tolist()
        self._wished |= {e: (w, event) for e, w in zip(experts, weights.tolist(), strict=True)}
        return [Prefetch(e, event, p) for e, p in zip(experts, priorities.tolist(), strict=True)]


@dataclass
class ActivationMatrixKeep(KeepSeat):
    """Evicts what the predicted matrix gives the least, early layers kept longer.

    MoE-Infinity's ``(pEAM[l, e] + epsilon) * (1 - l / L) / row sum``; early layers have the least
    time to be prefetched. Experts of which nothing was predicted yet count as never used.
    """

    name = "activation-matrix"
    source = "arXiv 2401.14361"
    cost = "O(S L E) a request; O(R) an eviction"

    def begin(self, world: World) -> None:
        """Nothing is expected."""
        super().begin(world)
        self.layers, self.experts = world.layers, world.experts
        self._expect(0, np.zeros((world.layers, world.experts), np.int64))

    def expected(self, forecast: Forecast) -> None:
        """A row of the predicted matrix."""
        self._expect(forecast.layer, forecast.probabilities[None])

    def _expect(self, first: int, rows: IntArray) -> None:
        layers = np.arange(first, first + len(rows))[:, None]
        span = slice(first * self.experts, (first + len(rows)) * self.experts)
        self.score[span] = worth(rows, layers, self.layers).reshape(-1)
