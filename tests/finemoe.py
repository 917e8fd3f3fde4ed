"""FineMoE for tests: traces with gates and embeddings, and the paper's method in plain NumPy.

``Paper`` keeps whole maps in a list and compares whole prefixes; it shares no code with the seats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moesim.engine.setup import Options
from moesim.policies.forecast import Foresight
from moesim.policies.map_search import HitCount, MapSearch
from moesim.policy import World
from moesim.traces.schema import TraceMeta
from moesim.traces.synth import Synth, synth_requests
from moesim.types import (
    AnyArray,
    Fact,
    Forecast,
    Gate,
    IterationBegin,
    IterationEnd,
    RequestBegin,
    RequestEnd,
    Status,
)
from moesim.workload import (
    Inputs,
    StaticBatch,
    begin_facts,
    end_facts,
    layer_events,
    prepare,
    timeless_steps,
)
from tests.strategies import WATCHED, Case, machine, small_model


def gated_case(
    layers: int = 5,
    experts: int = 8,
    top_k: int = 2,
    *,
    requests: int = 6,
    prompt: int = 5,
    output: int = 5,
    slots: int = 3,
    skew: float = 0.5,
    batch: int = 1,
    chunk_tokens: int = 0,
    embedding: int = 6,
    seed: int = 0,
    options: Options = WATCHED,
    **knobs: Any,
) -> Case:
    """A synthetic trace with the probabilities of all experts."""
    model = small_model(layers, experts, top_k, [4] * layers)
    made = Synth(
        model=model,
        requests=requests,
        prompt_tokens=prompt,
        output_tokens=output,
        skew=skew,
        overlap=0.7,
        topics=2,
        topic_strength=1.5,
        cross_layer=0.5,
        gate=True,
        embedding=embedding,
        seed=seed,
    )
    meta = TraceMeta(
        model=model,
        score=made.score,
        has_weights=True,
        has_gate=True,
        embedding="iteration" if embedding else "none",
    )
    hardware = machine(
        **{"dense_ns": 400, "expert_ns": 30, "bytes_per_s": 0.1e9, "workers": 1, **knobs}
    )
    return Case(
        meta,
        tuple(synth_requests(made)),
        hardware,
        (slots * layers * 4,),
        options,
        batch=batch,
        chunk_tokens=chunk_tokens,
    )


def world_of(case: Case, **more: Any) -> World:
    """What a seat is told of a case."""
    return World(
        layers=case.meta.layers,
        experts=case.meta.experts,
        top_k=case.meta.top_k,
        expert_bytes=case.model.expert_bytes_table()[None, :],
        capacity_bytes=case.capacity_bytes,
        scope="global",
        **more,
    )


def facts_of(case: Case, inputs: Inputs) -> Iterator[Fact]:
    """What a policy hears, with every expert resident."""
    works = (prepare(i, rows, case.meta, inputs) for i, rows in enumerate(case.requests))
    event = 0
    for step in timeless_steps(works, StaticBatch(case.batch, case.chunk_tokens)):
        yield from (fact for fact, _ in begin_facts(step))
        for item in layer_events(step, event, case.meta.experts):
            demand = item.demand
            status = np.full(len(demand.experts), Status.HIT, np.uint8)
            yield Gate(item.event, demand.experts, demand.tokens, status, demand.phases)
            event += 1
        yield from end_facts(step)


# ---- the paper, restated -------------------------------------------------------------------------


def cosines(query: AnyArray, entries: Sequence[AnyArray]) -> AnyArray:
    """Equations 4 and 5 over flattened rows; 0 where a norm is."""
    flat = np.array([entry.reshape(-1) for entry in entries], np.int64)
    asked = query.reshape(-1).astype(np.int64)
    dots, squares = flat @ asked, (flat**2).sum(1)
    inverse = np.where(squares > 0, 1 / np.sqrt(np.maximum(squares, 1)), 0)
    return dots * inverse / np.sqrt(max(int((asked**2).sum()), 1))


def selected(row: AnyArray, score: float, least: int, *, dynamic: bool = True) -> list[int]:
    """Equations 6 to 8."""
    if not row.sum():
        return []
    delta = min(max(1 - score, 0), 1) if dynamic else 0
    order = np.argsort(-row, kind="stable")
    reached = np.flatnonzero(np.cumsum(row[order]) >= delta * row.sum())[0] + 1
    return [int(e) for e in order[: max(reached, least)]]


def redundancy(semantic: AnyArray, trajectory: AnyArray, distance: int, layers: int) -> AnyArray:
    """RDY = (d/L) sem + ((L-d)/L) traj."""
    share = min(distance, layers) / layers
    return share * semantic + (1 - share) * trajectory


def mean(rows: Sequence[AnyArray]) -> AnyArray:
    """Rounded to the nearest integer, halves up."""
    total, n = np.sum(rows, axis=0, dtype=np.int64), len(rows)
    return (2 * total + n) // (2 * n)


class _Request:
    def __init__(self, prompt: AnyArray | None, layers: int) -> None:
        self.prompt = prompt
        self.embedding: AnyArray | None = None
        self.rows: list[list[AnyArray]] = [[] for _ in range(layers)]
        self.tokens = 0


class Paper:
    """The same forecasts as a map-search seat with the same parameters."""

    def __init__(self, seat: MapSearch, world: World) -> None:
        self.seat, self.world = seat, world
        self.counts = isinstance(seat, HitCount)
        self.ends = RequestEnd if self.counts else IterationEnd
        self.maps: list[AnyArray] = []
        self.embeddings: list[AnyArray | None] = []
        self.open: dict[int, _Request] = {}
        self.begun: list[_Request] = []

    def foresee(self, fact: Fact) -> list[Forecast]:
        if isinstance(fact, RequestBegin):
            self.open[fact.request] = _Request(fact.embedding, self.world.layers)
        elif isinstance(fact, IterationBegin):
            return self._begin(fact)
        elif isinstance(fact, Gate):
            return self._gate(fact)
        elif not self.seat.frozen and isinstance(fact, self.ends):
            self._keep(self.open[fact.request])
        return []

    def _begin(self, fact: IterationBegin) -> list[Forecast]:
        request = self.open[fact.request]
        if not self.counts:
            request.rows = [[] for _ in range(self.world.layers)]
        request.tokens = fact.tokens
        asked = request.prompt if fact.embedding is None else fact.embedding
        request.embedding = asked if self.seat.semantic else None
        if request.embedding is None or not self.maps:
            return []
        self.begun.append(request)
        layers = range(min(self.seat.distance, self.world.layers))
        return [f for la in layers for f in self._semantic(self.begun, la)]

    def _semantic(self, asking: Sequence[_Request], layer: int) -> list[Forecast]:
        found = []
        for request in asking:
            assert request.embedding is not None
            known = [np.zeros_like(request.embedding) if e is None else e for e in self.embeddings]
            found.append(cosines(request.embedding, known))
        return self._merged(found, layer)

    def _gate(self, gate: Gate) -> list[Forecast]:
        self.begun = []
        m, source = gate.layer, gate.source
        queries: list[AnyArray] = []
        for slot in source.slots:
            request, last = self.open[slot.request], slot.first + slot.tokens
            if self.counts:
                picked = source.token_experts[slot.first : last].reshape(-1)
                request.rows[m].append(np.bincount(picked, minlength=self.world.experts))
            else:
                assert source.gate is not None
                request.rows[m] += list(source.gate[slot.first : last])
            maps = self._maps(request, m + 1)
            queries += maps[-slot.tokens :] if self.seat.prefill == "every" else maps
        target = m + self.seat.distance
        if not self.maps:
            return []
        if target >= self.world.layers:
            asking = [self.open[slot.request] for slot in source.slots]
            asking = [r for r in asking if r.embedding is not None and len(r.rows[m]) < r.tokens]
            again = bool(asking) and target < 2 * self.world.layers
            return self._semantic(asking, target - self.world.layers) if again else []
        found = [cosines(query, [entry[: m + 1] for entry in self.maps]) for query in queries]
        last_target = target + 1 if self.seat.targets == "one" else self.world.layers
        return [f for la in range(target, last_target) for f in self._merged(found, la)]

    def _maps(self, request: _Request, layers: int) -> list[AnyArray]:
        """The maps of an iteration, up to a layer."""
        rows = request.rows[:layers]
        if self.counts:
            sums = [np.sum(layer, axis=0) for layer in rows]
            shares = [(2 * 16384 * s + s.sum()) // (2 * s.sum()) for s in sums]
            return [np.array(shares)]
        if self.seat.prefill == "mean":
            return [np.array([mean(layer) for layer in rows])]
        if self.seat.prefill == "last":
            return [np.array([layer[-1] for layer in rows])]
        return [
            np.array(token) for token in zip(*(la[: len(rows[-1])] for la in rows), strict=True)
        ]

    def _merged(self, found: Sequence[AnyArray], layer: int) -> list[Forecast]:
        if self.seat.merge == "last":
            found = found[-1:]
        probabilities = np.zeros(self.world.experts, np.int64)
        chosen: set[int] = set()
        for near in found:
            row = self.maps[int(np.argmax(near))][layer]
            probabilities = np.maximum(probabilities, row)
            score = float(near.max())
            chosen |= set(selected(row, score, self.world.top_k, dynamic=self.seat.delta))
        order = sorted(chosen, key=lambda e: (-probabilities[e], e))
        return [Forecast(layer, probabilities, np.array(order))] if order else []

    def _keep(self, request: _Request) -> None:
        for made in self._maps(request, self.world.layers):
            if len(self.maps) < self.seat.capacity:
                self.maps.append(made)
                self.embeddings.append(request.embedding)
                continue
            semantic = np.zeros(len(self.maps))
            if request.embedding is not None:
                known = [e if e is not None else 0 * request.embedding for e in self.embeddings]
                semantic = cosines(request.embedding, known)
            trajectory = cosines(made, self.maps)
            distance, layers = self.seat.distance, self.world.layers
            out = int(np.argmax(redundancy(semantic, trajectory, distance, layers)))
            self.maps[out], self.embeddings[out] = made, request.embedding


def told(foresight: Foresight | None) -> list[tuple[int, list[int], list[int]]]:
    """Forecasts in plain numbers."""
    return plain(foresight.forecasts if foresight is not None else [])


def plain(forecasts: Sequence[Forecast]) -> list[tuple[int, list[int], list[int]]]:
    """Layer, probabilities and chosen of each."""
    return [(f.layer, f.probabilities.tolist(), f.chosen.tolist()) for f in forecasts]
