"""Map search: which past iteration was most like this one, and what did its gates say next?

FineMoE (H. Yu et al., "Taming Latency-Memory Trade-Off in MoE-Based LLM Serving via Fine-Grained
Expert Offloading", EuroSys'26, arXiv 2502.05370). At the begin of an iteration its embedding finds
a map that guides the first ``distance`` layers (semantic search, equation 4); at each gate m the
layers so far find one that guides layer m + distance (trajectory search, equation 5). Of a layer,
the likeliest experts are prefetched until their mass reaches 1 - score (equations 6 to 8).

The ablations of the paper's figure 14 are seats and parameters: Map(T+S+delta) is ``map-search``,
Map(T+S) the same with ``delta=false`` (preset ``finemoe-ts``), Map(T) ``map-trajectory`` with
``delta=false`` (``finemoe-t``), Hit count ``hit-count`` with ``delta=false`` (``finemoe-hits``),
Speculate ``next-gate`` with ``distance=3``. Figure 14's caches are ``--set keep=lru``, ``keep=lfu``
and ``keep=map-frequency``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moesim.errors import TraceError, UsageError
from moesim.policies.forecast import ForecastSeat, Foresight
from moesim.protocol import World, check_distance
from moesim.types import (
    DROPPED,
    PROBABILITY_ONE,
    AnyArray,
    Fact,
    Forecast,
    Gate,
    IntArray,
    IterationBegin,
    IterationEnd,
    LayerEvent,
    Needs,
    RequestBegin,
    RequestEnd,
    Slot,
)

if TYPE_CHECKING:
    from moesim.policies.map_store import Bank, Choice, Store, Trails

CHOICES = {
    "prefill": ("mean", "last", "every"),
    "merge": ("union", "last"),
    "targets": ("one", "later"),
}
MOST_ENTRIES = 1 << 20


@dataclass(slots=True)
class _Open:
    """A request under way.

    trails : its maps under way; one, or with ``prefill=every`` one a token.
    sense : the trail of its embedding, or -1.
    first : first layer of its iteration. tokens : how many the iteration has.
    seen : tokens of the iteration by layer, so far.
    """

    prompt: AnyArray | None
    seen: list[int]
    trails: list[int] = field(default_factory=list)
    sense: int = -1
    first: int = 0
    tokens: int = 0


@dataclass
class MapSearch(ForecastSeat):
    """Prefetches what the nearest stored maps expect.

    distance : the paper's d, layers between a prefetch and its need. 3: its section 6.1, for all
        models; its section 6.7 finds 3, 6 and 4 for Mixtral, Qwen1.5-MoE and Phi-3.5-MoE.
    capacity : maps in the store (1000 in the paper).
    delta : whether the mass to reach is 1 - score; else the likeliest K are taken.
    prefill : what of a prompt is the iteration's map. ``mean`` of its tokens so far, since the
        paper counts one data point a prompt and does not say which; ``last`` token; ``every``
        token, a map each (the released code).
    merge : of a batch (or of ``every`` token), the ``union`` of the chosen with the largest
        probabilities, since every member's prediction is worth something; or that of the ``last``
        alone (what the released code amounts to).
    targets : the ``one`` layer at ``distance``, as the paper has it, or all ``later`` ones too.
    warm : whether the store starts with the maps of the past, where there is one (``--split``).
    frozen : whether maps of served iterations are not kept. False: the paper's step 5 is part of
        serving; the released code's offline mode leaves it out.
    """

    name = "map-search"
    source = "arXiv 2502.05370"
    cost = "O(S E) a layer; O(S d) a pass"
    needs = Needs.GATE | Needs.EMBEDDING | Needs.PAST
    semantic: ClassVar[bool] = True
    whole_requests: ClassVar[bool] = False
    """Whether a map is of a request and not of an iteration."""

    distance: int = 3
    capacity: int = 1000
    delta: bool = True
    prefill: str = "mean"
    merge: str = "union"
    targets: str = "one"
    warm: bool = True
    frozen: bool = False

    def __post_init__(self) -> None:
        """Everything in range."""
        super().__post_init__()
        check_distance(self.distance)
        if not 1 <= self.capacity <= MOST_ENTRIES:
            raise UsageError(
                f"prefetch.capacity={self.capacity}: must lie between 1 and {MOST_ENTRIES}"
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(
                    f"prefetch.{name}={getattr(self, name)}: must be {' or '.join(known)}"
                )

    def begin(self, world: World) -> None:
        """An empty store, then the past."""
        # Only who searches waits for the compiler: names and parameters are known without it.
        from moesim.policies import map_store

        self._maps: Any = map_store
        store = map_store.make_store(world.layers, world.experts, self.capacity)
        self._bank: Bank = map_store.Bank(store)
        senses = map_store.make_store(1, 1, self.capacity, store)
        self._senses: Bank = map_store.Bank(senses)
        self._choice = map_store.make_choice(world.experts)
        map_store.load_all(self._bank.store, self._bank.trails, self._choice)
        self._open: dict[int, _Open] = {}
        self._begun: list[_Open] = []
        self._values = np.zeros((1, world.experts), np.int32)
        super().begin(world)
        self._bank.store.work[:] = 0

    @property
    def entries(self) -> int:
        """Maps in the store."""
        return int(self._bank.store.size[self._maps.ENTRIES])

    @property
    def parts(self) -> tuple[Store, Trails, Choice]:
        """The arrays that its kernels work on."""
        return self._bank.store, self._bank.trails, self._choice

    def trail_of(self, request: int) -> int:
        """The trail of a request whose gates come now."""
        self._begun = []
        return self._trail(self._of(request), 0)

    # ---- facts -----------------------------------------------------------------------------------

    def learn(self, fact: Fact) -> None:
        """Keep the maps of the past."""
        if self.warm:
            self._hear(fact, serving=False)

    def foresee(self, fact: Fact) -> Foresight | None:
        """Search at the begin of iterations and at gates; keep maps at their ends."""
        return self._hear(fact, serving=True)

    def _hear(self, fact: Fact, *, serving: bool) -> Foresight | None:
        if isinstance(fact, Gate):
            return self._gate(fact.source, serving)
        if isinstance(fact, IterationBegin):
            return self._iteration(fact, serving)
        if isinstance(fact, IterationEnd):
            return None if self.whole_requests else self._end(fact.request, serving)
        if isinstance(fact, RequestBegin):
            self._forget(fact.request)
            self._open[fact.request] = _Open(fact.embedding, [0] * self.world.layers)
        elif isinstance(fact, RequestEnd):
            kept = self._end(fact.request, serving) if self.whole_requests else None
            self._forget(fact.request)
            return kept
        return None

    # ---- an iteration begins ---------------------------------------------------------------------

    def _iteration(self, fact: IterationBegin, serving: bool) -> Foresight | None:
        begun = self._of(fact.request)
        begun.first = self.world.decode_from if fact.phase else 0
        begun.tokens = fact.tokens
        begun.seen = [0] * self.world.layers
        if not self.whole_requests:
            self._close(begun)
        embedding = begun.prompt if fact.embedding is None else fact.embedding
        if not self.semantic or embedding is None:
            return None
        self._embed(begun, embedding)
        if not serving or not self.entries:
            return None
        self._begun.append(begun)
        alike = [b for b in self._begun if b.first == begun.first]
        last = min(begun.first + self.distance, self.world.layers)
        return self._told(self._recalled(alike, [begun], range(begun.first, last)))

    def _embed(self, begun: _Open, embedding: AnyArray) -> None:
        """The embedding becomes a trail of one layer."""
        numbers = self._senses.store.maps.shape[1]
        if numbers != len(embedding):
            if self._senses.store.inverse.any():
                raise TraceError(
                    f"an embedding of {len(embedding)} numbers follows one of {numbers}; "
                    "map-search compares embeddings of one length"
                )
            self._resize(len(embedding))
        begun.sense = self._senses.take()
        self._senses.trails.rows[begun.sense, 0] = self._maps.fitted(embedding)

    def _resize(self, numbers: int) -> None:
        """The first embedding tells how long they are."""
        store = self._maps.make_store(1, numbers, self.capacity, self._bank.store)
        self._senses = self._maps.Bank(store)
        for other in self._open.values():
            other.sense = -1
        self._begun = []

    def _recalled(
        self, guided: Sequence[_Open], asked: Sequence[_Open], layers: Sequence[int]
    ) -> list[Forecast]:
        """Semantic search for ``asked``, and what was found for all of ``guided``."""
        senses, trails = self._senses.store, self._senses.trails
        for begun in asked:
            self._maps.recall(senses, trails, begun.sense)
        ids = [begun.sense for begun in guided]
        return [f for la in layers if (f := self._forecast(self._senses, ids, la)) is not None]

    # ---- a gate ----------------------------------------------------------------------------------

    def _gate(self, source: LayerEvent, serving: bool) -> Foresight | None:
        self._begun = []
        if not self._readable(source):
            return None
        ids = [trail for slot in source.slots for trail in self._rows(slot, source)]
        target = source.layer + self.distance
        searched = serving and self.entries > 0 and target < self.world.layers
        if searched or self._is_full(serving):
            self._observe(ids, source)
        kept = self._work()
        forecasts: list[Forecast] = []
        if searched:
            forecasts = self._searched(ids, source.layer, target)
        elif serving and self.entries and target >= self.world.layers:
            forecasts = self._again(source, target - self.world.layers)
        return self._told(forecasts, kept)

    def _readable(self, source: LayerEvent) -> bool:
        return source.gate is not None

    def _is_full(self, serving: bool) -> bool:
        """Whether an insert must know what it is most like."""
        return self.entries == self.capacity and not (serving and self.frozen)

    def _rows(self, slot: Slot, source: LayerEvent) -> list[int]:
        """A request's tokens become rows of its trails; which trails."""
        begun = self._of(slot.request)
        seen = begun.seen[source.layer]
        begun.seen[source.layer] = seen + slot.tokens
        if self.prefill != "every":
            first = slot.first + slot.tokens - 1 if self.prefill == "last" else slot.first
            trail = self._trail(begun, 0)
            self._add(trail, source, first, slot.first + slot.tokens)
            return [trail]
        trails = [self._trail(begun, seen + i) for i in range(slot.tokens)]
        for i, trail in enumerate(trails, slot.first):
            self._add(trail, source, i, i + 1)
        return trails

    def _trail(self, begun: _Open, number: int) -> int:
        while len(begun.trails) <= number:
            begun.trails.append(self._bank.take())
        return begun.trails[number]

    def _add(self, trail: int, source: LayerEvent, first: int, last: int) -> None:
        assert source.gate is not None
        trails = self._bank.trails
        if self.prefill != "mean":
            trails.totals[trail, source.layer] = 0
        self._put(trail, source.layer, source.gate[first:last], PROBABILITY_ONE)

    def _put(self, trail: int, layer: int, values: AnyArray, whole: int) -> None:
        """Rows, int32 [T, E], of which ``whole`` makes one. They are copied, so that compiled code
        meets one kind of array only."""
        count = len(values)
        if count > len(self._values):
            self._values = np.zeros((2 * count, self.world.experts), np.int32)
        self._values[:count] = values
        self._maps.add(self._bank.trails, trail, layer, self._values, 0, count, whole)

    def _observe(self, ids: list[int], source: LayerEvent) -> None:
        store, trails = self._bank.store, self._bank.trails
        self._maps.observe(
            store, trails, np.array(ids, np.int64), len(ids), source.layer, source.step
        )

    def _searched(self, ids: list[int], layer: int, target: int) -> list[Forecast]:
        which = np.array(ids, np.int64)
        self._maps.search(self._bank.store, self._bank.trails, which, len(ids), layer)
        last = target + 1 if self.targets == "one" else self.world.layers
        forecasts = (self._forecast(self._bank, ids, la) for la in range(target, last))
        return [forecast for forecast in forecasts if forecast is not None]

    def _again(self, source: LayerEvent, layer: int) -> list[Forecast]:
        """The next chunk of a prompt begins without a word: its first layers are guided again."""
        unfinished = [
            begun
            for slot in source.slots
            if (begun := self._of(slot.request)).sense >= 0
            and begun.seen[source.layer] < begun.tokens
        ]
        if not unfinished or layer >= self.world.layers:
            return []
        return self._recalled(unfinished, unfinished, [layer])

    def _forecast(self, found: Bank, ids: list[int], layer: int) -> Forecast | None:
        """What the maps that were found expect of a layer; None if their passes did not run it."""
        which = np.array(ids if self.merge == "union" else ids[-1:], np.int64)
        choice = self._choice
        count = self._maps.predict(
            self._bank.store,
            found.trails,
            which,
            len(which),
            layer,
            self.world.top_k,
            int(self.delta),
            choice,
        )
        if not count:
            return None
        return Forecast(layer, choice.probabilities.copy(), choice.chosen[:count].copy())

    # ---- an iteration ends -----------------------------------------------------------------------

    def _end(self, request: int, serving: bool) -> Foresight | None:
        """Its maps become entries, visible from here on."""
        ended = self._of(request)
        if not (serving and self.frozen):
            senses = self._senses
            for trail in ended.trails:
                self._maps.insert(
                    self._bank.store,
                    self._bank.trails,
                    trail,
                    senses.store,
                    senses.trails,
                    ended.sense,
                    self.distance,
                )
        self._close(ended)
        return self._told([], self._work())

    # ---- books -----------------------------------------------------------------------------------

    def _of(self, request: int) -> _Open:
        if request not in self._open:
            self._open[request] = _Open(None, [0] * self.world.layers)
        return self._open[request]

    def _close(self, begun: _Open) -> None:
        for trail in begun.trails:
            self._bank.give(trail)
        begun.trails = []
        if begun.sense >= 0:
            self._senses.give(begun.sense)
            begun.sense = -1

    def _forget(self, request: int) -> None:
        if request in self._open:
            self._close(self._open.pop(request))

    def _work(self) -> tuple[int, int]:
        """Operations and bytes so far."""
        work: IntArray = self._bank.store.work
        return int(work[self._maps.OPS]), int(work[self._maps.BYTES])

    def _told(self, forecasts: list[Forecast], kept: tuple[int, int] = (0, 0)) -> Foresight | None:
        """With all the work that was done. ``kept``: that which later searches build upon."""
        ops, nbytes = self._work()
        self._bank.store.work[:] = 0
        if not forecasts and not ops:
            return None
        return Foresight(forecasts, ops, nbytes, *kept)


@dataclass
class MapTrajectory(MapSearch):
    """The same without embeddings: the first ``distance`` layers are demand-only."""

    name = "map-trajectory"
    source = "arXiv 2502.05370"
    cost = "O(S E)"
    needs = Needs.GATE | Needs.PAST
    semantic: ClassVar[bool] = False


@dataclass
class HitCount(MapSearch):
    """The same on what a request's gates chose in all: the coarse tracking that the paper compares.

    A map is of a whole request, and holds how often each expert was chosen (each layer's counts
    over their sum); the request so far is compared with it.
    """

    name = "hit-count"
    source = "arXiv 2502.05370"
    cost = "O(S E)"
    needs = Needs.PAST
    semantic: ClassVar[bool] = False
    whole_requests: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """A request has one map."""
        super().__post_init__()
        if self.prefill != "mean":
            raise UsageError(
                f"prefetch.prefill={self.prefill}: hit-count sums over tokens; leave it out"
            )

    def _readable(self, source: LayerEvent) -> bool:
        return True

    def _add(self, trail: int, source: LayerEvent, first: int, last: int) -> None:
        chosen = source.token_experts[first:last].reshape(-1)
        chosen = chosen[chosen != DROPPED]
        counts = np.bincount(chosen, minlength=self.world.experts)
        self._put(trail, source.layer, counts[None, :], len(chosen))
