"""FineMoE: a whole replay with its searches, and a search beside the bare products it rests on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from moesim.bench.feed import Case, run, spec_of
from moesim.bench.figures import Beside, Figure, Promise, Samples
from moesim.bench.measure import interleave
from moesim.bench.workshop import Workshop
from moesim.degrade import Allowed
from moesim.engine.setup import Options
from moesim.policies import map_store
from moesim.policies.map_store import Bank, find, observe_one
from moesim.traces.reader import Columns, TraceReader
from moesim.types import PROBABILITY_ONE, AnyArray, IntArray, Needs
from moesim.workload import Inputs

CAPACITY = 1000
"""Maps in the store: the paper's."""
LAYERS, EXPERTS, TOP_K = 24, 32, 4
PASSES = 200


def maps(shop: Workshop) -> Iterator[Figure]:
    """Layer events a second of FineMoE with 1,000 maps, and its searches over bare products."""
    yield _replayed(shop)
    yield from _searches(shop)


# ---- a replay ------------------------------------------------------------------------------------


def _replayed(shop: Workshop) -> Figure:
    with TraceReader(shop.trace, Columns.experts_only()) as reader:
        recorded = reader.meta.has_gate
    inputs = Inputs(Needs.GATE, (), Allowed(gate_from_topk=not recorded))
    recording = shop.read(shop.trace, inputs, shop.settings.limit)
    spec = spec_of("lru", "prefetch=map-trajectory", "keep=map-frequency")
    capacity = f"{recording.slots}/layer"
    case = Case(recording, spec, capacity, Options(log=False))
    shop.say(f"maps: FineMoE, {capacity}")
    ran = run(case)
    taken = interleave(shop.settings.repeats, {"whole": lambda: run(case).whole_ns})
    return Figure(
        benchmark="maps",
        case=f"trajectory search and p * freq, {capacity}, whole",
        unit="layer events/s",
        measured=Samples.rates(ran.tally.events, taken["whole"]),
        promise=Promise(least=150_000),
        facts={
            "layer_events": ran.tally.events,
            "gates": "recorded" if recorded else "from top-k weights",
            "jobs": ran.tally.jobs,
        },
    )


# ---- the search itself ---------------------------------------------------------------------------


def _multiply(maps: AnyArray, rows: AnyArray, dots: IntArray) -> int:
    """The products of a gate with every stored map, and no more: what a search rests on."""
    layers, experts, entries = maps.shape
    part = np.zeros(entries, np.int32)
    for layer in range(layers):
        for c in range(entries):
            part[c] = 0
        for e in range(0, experts, 4):
            q0, q1 = np.int32(rows[layer, e]), np.int32(rows[layer, e + 1])
            q2, q3 = np.int32(rows[layer, e + 2]), np.int32(rows[layer, e + 3])
            for c in range(entries):
                part[c] += (
                    q0 * maps[layer, e, c]
                    + q1 * maps[layer, e + 1, c]
                    + q2 * maps[layer, e + 2, c]
                    + q3 * maps[layer, e + 3, c]
                )
        for c in range(entries):
            dots[c] += part[c]
    return int(dots[0])


multiply: Any = numba.njit(_multiply)


def _searches(shop: Workshop) -> Iterator[Figure]:
    """One core, a full store, nothing inserted."""
    shop.say("maps: the search alone")
    bank, full, sparse = _filled()
    sides: dict[str, Callable[[], int]] = {
        "bare": lambda: _bare(bank, full),
        "full": lambda: _searched(bank, full),
        "sparse": lambda: _searched(bank, sparse),
    }
    for side in sides.values():
        # What is compiled here is kept nowhere.
        side()
    taken = interleave(shop.settings.repeats, sides)
    events = PASSES * LAYERS
    each = {name: Samples.each(ns, events) for name, ns in taken.items()}
    shape = f"E={EXPERTS}, C={CAPACITY}"
    yield Figure(
        benchmark="maps",
        case=f"search, full gate, {shape}",
        unit="ns/layer event",
        measured=each["full"],
        beside=Beside.middle("the bare products", each["bare"]),
        promise=Promise(most=1.5),
    )
    yield Figure(
        benchmark="maps",
        case=f"search, top {TOP_K} of a gate, {shape}",
        unit="ns/layer event",
        measured=each["sparse"],
        beside=Beside.middle("full gate", each["full"]),
        promise=Promise(most=0.5),
    )


def _filled() -> tuple[Bank, AnyArray, AnyArray]:
    """A full store, and gates of a pass: full ones, and their top k."""
    rng = np.random.default_rng(0)
    bank = Bank(map_store.make_store(LAYERS, EXPERTS, CAPACITY))
    choice = map_store.make_choice(EXPERTS)
    map_store.load_all(bank.store, bank.trails, choice)
    senses = Bank(map_store.make_store(1, 1, CAPACITY, bank.store))
    for _ in range(CAPACITY):
        trail = bank.take()
        _put(bank, trail, _gates(rng))
        map_store.insert(bank.store, bank.trails, trail, senses.store, senses.trails, -1, 3)
        bank.give(trail)
    full = _gates(rng)
    sparse = np.where(full >= np.sort(full, axis=1)[:, -TOP_K, None], full, 0)
    return bank, full, sparse.astype(np.int32)


def _gates(rng: np.random.Generator) -> AnyArray:
    """int32 [layers, E] probabilities, none of them 0."""
    shares = rng.dirichlet(np.full(EXPERTS, 0.3), LAYERS)
    return np.maximum(np.rint(shares * PROBABILITY_ONE), 1).astype(np.int32)


def _put(bank: Bank, trail: int, gates: AnyArray) -> None:
    for layer in range(LAYERS):
        row = np.ascontiguousarray(gates[layer : layer + 1])
        map_store.add(bank.trails, trail, layer, row, 0, 1, PROBABILITY_ONE)


def _bare(bank: Bank, gates: AnyArray) -> int:
    rows = gates.astype(np.int16)
    dots = np.zeros(CAPACITY, np.int64)
    began = time.perf_counter_ns()
    for _ in range(PASSES):
        multiply(bank.store.maps, rows, dots)
    return time.perf_counter_ns() - began


def _searched(bank: Bank, gates: AnyArray) -> int:
    """The kernels of the seat, called for a pass at a time."""
    trail = bank.take()
    _put(bank, trail, gates)
    which = np.array([trail])
    began = time.perf_counter_ns()
    for step in range(1, PASSES + 1):
        sweep(bank.store, bank.trails, which, step)
    taken = time.perf_counter_ns() - began
    bank.give(trail)
    return taken


def _sweep(store: Any, trails: Any, which: IntArray, step: int) -> None:
    """Every layer of a pass: products, then the nearest map."""
    for layer in range(store.maps.shape[0]):
        observe_one(store, trails, which[0], layer, step)
        find(store, trails, which[0], layer)


sweep: Any = numba.njit(_sweep)
