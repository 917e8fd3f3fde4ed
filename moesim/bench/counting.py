"""moesim beside libCacheSim: LRU and LFU with the full clock, and LRU without one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.bench.feed import Case, Ran, run, spec_of
from moesim.bench.figures import Beside, Figure, Promise, Samples
from moesim.bench.measure import Side, interleave
from moesim.bench.rival import Part
from moesim.bench.workshop import DisagreementError, Workshop
from moesim.engine.flat import FlatLRU
from moesim.engine.setup import Options
from moesim.types import AnyArray

OTHERS = "libCacheSim"


def lru(shop: Workshop) -> Iterator[Figure]:
    """The compiled core under LRU with its clock, with the log digest and without."""
    for place in _places(shop):
        ours = [_Ours(place, "lru", log) for log in (True, False)]
        yield from _against(place, "LRU", ours, Promise(least=2))


def lfu(shop: Workshop) -> Iterator[Figure]:
    """The same under LFU; libCacheSim's LFU forgets the count of what it evicts."""
    for place in _places(shop):
        promise = Promise(least=3) if place.layered else None
        ours = [_Ours(place, "lfu", log) for log in (True, False)]
        yield from _against(place, "LFU", ours, promise)


def flat(shop: Workshop) -> Iterator[Figure]:
    """LRU over the bare stream of accesses, compiled, without a clock."""
    for place in _places(shop):
        shop.say(f"flat: {place.name}")
        stream, hits = shop.recording.stream, _same_lru(place)
        sides: dict[str, Side] = {"flat": place.flat_ns, OTHERS: place.their_lru_ns}
        taken = interleave(shop.settings.repeats, sides)
        yield Figure(
            benchmark="flat",
            case=place.name,
            unit="accesses/s",
            measured=Samples.rates(len(stream), taken["flat"]),
            beside=_beside("LRU", len(stream), taken[OTHERS]),
            promise=Promise(least=4),
            facts={"accesses": len(stream), "hits": hits},
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """The caches that are compared: one a layer, or one for all."""

    shop: Workshop
    layered: bool

    @property
    def _slots(self) -> int:
        recording = self.shop.recording
        return recording.slots * (1 if self.layered else recording.meta.layers)

    @property
    def name(self) -> str:
        return f"{self._slots}/layer" if self.layered else f"{self._slots} global"

    @property
    def capacity(self) -> str:
        return f"{self._slots}/layer" if self.layered else str(self._slots)

    @property
    def parts(self) -> Sequence[Part]:
        return self.shop.layered if self.layered else self.shop.whole

    def flat(self, stream: AnyArray) -> tuple[int, int]:
        """(ns, hits) of LRU on a stream of accesses, without a clock."""
        meta = self.shop.recording.meta
        ids = np.arange(meta.layers * meta.experts)
        if self.layered:
            caches = FlatLRU(ids // meta.experts, [self._slots] * meta.layers)
        else:
            caches = FlatLRU(np.zeros_like(ids), [self._slots])
        started = time.perf_counter_ns()
        hits = caches.hits(stream)
        return time.perf_counter_ns() - started, hits

    def flat_ns(self) -> int:
        """That alone, over all accesses."""
        return self.flat(self.shop.recording.stream)[0]

    def their_lru_ns(self) -> int:
        """libCacheSim's."""
        return self.shop.rival.time("LRU", self.parts)[0]


def _places(shop: Workshop) -> Sequence[_Place]:
    # Without libCacheSim nothing is read at all.
    _ = shop.rival
    return [_Place(shop, layered) for layered in (True, False)]


@dataclass(slots=True)
class _Ours:
    """One of our configurations; remembers what it counted."""

    place: _Place
    policy: str
    log: bool
    ran: Ran | None = None

    @property
    def name(self) -> str:
        return "log" if self.log else "no log"

    def __call__(self) -> int:
        recording = self.place.shop.recording
        options = Options(log=self.log)
        ran = run(Case(recording, spec_of(self.policy), self.place.capacity, options))
        told = f"{self.policy}, {self.place.name}, {self.name}"
        _agree(f"{told}: accesses", ran.accesses, len(recording.stream))
        _agree(f"{told}: hits, again", ran.hits, ran.hits if self.ran is None else self.ran.hits)
        self.ran = ran
        return ran.core_ns


def _against(
    place: _Place, theirs: str, ours: Sequence[_Ours], promise: Promise | None
) -> Iterator[Figure]:
    shop, benchmark = place.shop, ours[0].policy
    shop.say(f"{benchmark}: {place.name}")
    _same_lru(place)
    reference_hits = shop.rival.time(theirs, place.parts)[1]
    for side in ours:
        side()
    sides: dict[str, Side] = {side.name: side for side in ours}
    sides[OTHERS] = lambda: shop.rival.time(theirs, place.parts)[0]
    taken = interleave(shop.settings.repeats, sides)
    accesses = len(shop.recording.stream)
    for side in ours:
        assert side.ran is not None
        yield Figure(
            benchmark=benchmark,
            case=f"{place.name}, {side.name}",
            unit="accesses/s",
            measured=Samples.rates(accesses, taken[side.name]),
            beside=_beside(theirs, accesses, taken[OTHERS]),
            promise=promise,
            facts={
                "accesses": accesses,
                "hits": side.ran.hits,
                "reference_hits": reference_hits,
                "whole_engine_accesses_per_s": accesses * 1e9 / side.ran.whole_ns,
            },
        )


def _beside(policy: str, accesses: int, taken_ns: Sequence[int]) -> Beside:
    return Beside.best_rate(f"{OTHERS} {policy}", Samples.rates(accesses, taken_ns))


def _same_lru(place: _Place) -> int:
    """Hits of LRU on the accesses, which both sides count alike: they are fed the same.

    The engine is asked too, on the first tokens and with every access an event of its own; a layer
    event judges its experts at one moment, so its hits differ from those of the bare stream.
    """
    shop, told = place.shop, f"lru, {place.name}: hits"
    hits = place.flat(shop.recording.stream)[1]
    _agree(f"{told}, {OTHERS}", hits, shop.rival.time("LRU", place.parts)[1])
    alone = run(Case(shop.short, spec_of("lru"), place.capacity, Options(flat=True)))
    _agree(f"{told}, first tokens", alone.hits, place.flat(shop.short.choices)[1])
    return hits


def _agree(what: str, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise DisagreementError(f"{what}: {ours} and {theirs}, which should be one number")
