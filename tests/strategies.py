"""Hypothesis strategies for small worlds: traces in memory, machines with small whole times.

Durations of zero are common, so that many things happen at one nanosecond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moesim.engine.setup import Options
from moesim.hashing import hash64
from moesim.placement import PLACEMENTS, divide, place
from moesim.policies import SEATS
from moesim.policies.presets import PRESETS
from moesim.profile import (
    Constant,
    ConstantExpert,
    Drive,
    HardwareProfile,
    Host,
    Interconnect,
    Link,
    Memory,
    ModelProfile,
    Stack,
)
from moesim.protocol import parameters
from moesim.registry import seat_class
from moesim.traces.reader import RequestFacts, RequestRows, iteration_starts
from moesim.traces.schema import TraceMeta
from moesim.types import DROPPED, AnyArray, Needs, Phase

FITTED = ("stride", "token-net")
"""Prefetch seats that run with a file which `moesim fit` wrote, and not without."""

LOSSLESS = [
    name
    for name, preset in PRESETS.items()
    if preset.route == "exact" and preset.prefetch not in FITTED
]
"""What executes the experts that the trace names, which most laws count."""

DEMAND_ONLY = [name for name, preset in PRESETS.items() if preset.prefetch == "none"]
BOUNDS = ["min", "min-bypass", "look-ahead", "hindsight", "static", "cpu", "fiddler", "hot-set"]
BOUNDS = [*BOUNDS, "pregated", "draft", "static-lru", "ktransformers"]
"""What sees the whole run, wholly or as calibration in hindsight."""

KEEPS, PREFETCHES, MISSES = (
    [n.removeprefix(f"{kind}.") for n in SEATS if n.startswith(f"{kind}.")]
    for kind in ("keep", "prefetch", "miss")
)
PREFETCHES = [name for name in PREFETCHES if name not in FITTED]
MISSES = [name for name in MISSES if not seat_class("miss", name).lossy]

PRICED = [
    name for name, preset in PRESETS.items() if Needs.COSTS in seat_class("miss", preset.miss).needs
]
"""What serves a miss by the cost table."""


def trios(
    keeps: Sequence[str], prefetches: Sequence[str], misses: Sequence[str]
) -> list[tuple[str, str, str]]:
    """A third of all (keep, prefetch, miss), with every two seats together in some of them."""
    places = product(*(range(len(known)) for known in (keeps, prefetches, misses)))
    return [(keeps[k], prefetches[p], misses[m]) for k, p, m in places if (k + p + m) % 3 == 0]


WATCHED = Options(check=True, timeline=True)

RATES = [math.inf, 1e9, 0.5e9, 0.25e9, 0.2e9, 0.1e9]
"""Bytes a second: 0, 1, 2, 4, 5 or 10 ns a byte, so that times k is exact."""


@dataclass(frozen=True, slots=True, repr=False)
class Case:
    """Everything that determines a run, but for the policy."""

    meta: TraceMeta
    requests: tuple[RequestRows, ...]
    hardware: HardwareProfile
    capacity_bytes: tuple[int, ...]
    options: Options = WATCHED
    batch: int = 1
    chunk_tokens: int = 0
    initial: str = ""
    charged: bool = True
    seed: int = 0
    past: tuple[RequestRows, ...] = ()
    """What policies may learn from; empty: some request that is none of these."""
    owners: tuple[int, ...] = ()
    """The device of each expert; empty: there is one."""
    by_layer: bool = False
    """With several devices: whether each has a cache for each layer."""
    dram_bytes: int = 0
    """Room of host memory; 0: it holds every expert."""

    @property
    def model(self) -> ModelProfile:
        """The model profile."""
        return self.meta.model

    @property
    def scope(self) -> str:
        """The scope of the capacity."""
        if self.owners:
            return "layer" if self.by_layer else "global"
        return "layer" if len(self.capacity_bytes) > 1 else "global"

    def booked(self, precision: int = 0) -> list[int]:
        """Bytes that the allocator books for an expert of each layer."""
        assert not self.owners
        full: list[int] = self.model.expert_bytes_table().tolist()
        if self.options.allocator == "slots":
            return [max(full)] * len(full) if self.scope == "global" else full
        sizes: list[int] = self.model.expert_bytes_table(precision).tolist()
        return sizes

    def __repr__(self) -> str:
        asked = [
            (r.facts.arrival_ns, *map(tuple, np.c_[r.iteration, r.layer, r.experts].tolist()))
            for r in self.requests
        ]
        model, machine = self.model, self.hardware
        return (
            f"Case(layers={model.layers}, experts={model.experts}, stacks={len(model.stacks)}, "
            f"bytes={model.expert_bytes[0]}, requests={asked}, {machine.link}, {machine.compute}, "
            f"{machine.host}, owners={self.owners}, by_layer={self.by_layer}, "
            f"{machine.interconnect}, capacity={self.capacity_bytes}, {self.options}, "
            f"batch={self.batch}, chunk_tokens={self.chunk_tokens}, initial={self.initial!r}, "
            f"{self.charged=}, {machine.ssd}, dram={self.dram_bytes})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


# ---- machines ------------------------------------------------------------------------------------


def machine(
    *,
    bytes_per_s: float = 1e9,
    latency_ns: int = 0,
    chunk_bytes: int = 0,
    dense_ns: int = 0,
    expert_ns: int = 0,
    sync_ns: int = 0,
    plan_ns: int = 0,
    cpu_ns: int = 0,
    workers: int = 1,
) -> HardwareProfile:
    """A machine of constant costs."""
    return HardwareProfile(
        name="made",
        source="assumed",
        provenance="a test",
        memory=Memory(1 << 30, 0),
        link=Link(bytes_per_s, latency_ns, chunk_bytes),
        compute=Constant(dense_ns, expert_ns),
        host=Host(sync_ns, plan_ns, 1e9, math.inf, workers, ConstantExpert(cpu_ns)),
    )


_ns = st.sampled_from([0, 0, 1, 2, 3, 7, 20])


@st.composite
def machines(draw: st.DrawFn) -> HardwareProfile:
    """Machines of small whole times, chunks of one byte up to whole transfers."""
    return machine(
        bytes_per_s=draw(st.sampled_from(RATES)),
        latency_ns=draw(_ns),
        chunk_bytes=draw(st.sampled_from([0, 1, 2, 3, 5, 100])),
        dense_ns=draw(_ns),
        expert_ns=draw(_ns),
        sync_ns=draw(st.sampled_from([0, 0, 1, 4])),
        plan_ns=draw(st.sampled_from([0, 0, 1, 4])),
        cpu_ns=draw(_ns),
        workers=draw(st.integers(1, 2)),
    )


# ---- traces --------------------------------------------------------------------------------------


def small_model(
    layers: int, experts: int, top_k: int, sizes: Sequence[int] = (), stacks: Sequence[int] = ()
) -> ModelProfile:
    """A model whose experts have a few bytes; ``sizes`` by layer."""
    model = ModelProfile.generic(layers, experts, top_k, "small")
    names = ["encoder", "decoder"] if stacks else ["decoder"]
    made = tuple(Stack(n, la) for n, la in zip(names, stacks or [layers], strict=True))
    nbytes = tuple(sizes) if sizes else 1
    return replace(model, expert_bytes=(nbytes,), stacks=made, kv_bytes_per_token_per_layer=1)


def rows_of(
    request: int,
    passes: Sequence[Sequence[tuple[int, Sequence[Sequence[int]]]]],
    *,
    prefill: bool = False,
    ahead: Sequence[Sequence[int]] | None = None,
    arrival_ns: int | None = None,
    wide: int = 0,
) -> RequestRows:
    """A request from its forward passes, each a list of (layer, experts of each token).

    wide : experts of a layer; given, the request has every input that a policy may ask for.
    """
    columns: list[tuple[int, int, int, int]] = []
    chosen: list[Sequence[int]] = []
    position = 0
    for number, blocks in enumerate(passes):
        iteration = number if prefill else number + 1
        for layer, tokens in blocks:
            for offset, experts in enumerate(tokens):
                phase = Phase.PREFILL if iteration == 0 else Phase.DECODE
                columns.append((iteration, position + offset, layer, phase))
                chosen.append(experts)
        position += max(len(tokens) for _, tokens in blocks)
    table = np.array(columns, np.int64)
    iterations = table[:, 0].astype(np.int32)
    experts = np.array(chosen, np.uint16)
    return RequestRows(
        request=request,
        starts=iteration_starts(iterations),
        iteration=iterations,
        position=table[:, 1].astype(np.int32),
        layer=table[:, 2].astype(np.int16),
        phase=table[:, 3].astype(np.uint8),
        experts=experts,
        ahead={} if ahead is None else {d: np.array(ahead, np.uint16) for d in (1, 2, 3)},
        facts=RequestFacts(arrival_ns=arrival_ns),
        **(inputs_of(request, iterations, experts, wide) if wide else {}),
    )


def inputs_of(request: int, iterations: AnyArray, experts: AnyArray, wide: int) -> dict[str, Any]:
    """Gates that chose the experts, and whatever else may be recorded beside them."""
    rows = np.arange(len(experts))
    noise = hash64(request, rows[:, None], np.arange(wide)) % np.uint64(64)
    gate = noise.astype(np.float16) / 32
    for rank in range(experts.shape[1]):
        real = np.flatnonzero(experts[:, rank] != DROPPED)
        gate[real, experts[real, rank]] = 4 - rank / 2
    at = np.minimum(experts, wide - 1).astype(np.int64)
    weights = np.exp(np.take_along_axis(gate, at, axis=1).astype(np.float32))
    weights /= weights.sum(axis=1, keepdims=True)
    embedding = {
        int(i): (hash64(request, i, np.arange(5)) % np.uint64(9)).astype(np.float16) - 4
        for i in np.unique(iterations)
    }
    norms = 1 + (hash64(request, rows) % np.uint64(8)).astype(np.float16) / 4
    return {
        "gate": gate,
        "weights": weights.astype(np.float16),
        "embedding": embedding,
        "input_norm": norms,
    }


def full_meta(model: ModelProfile) -> TraceMeta:
    """The metadata of a trace that has every input."""
    norms = 1 + np.arange(model.layers * model.experts).reshape(model.layers, -1) % 7 / 8
    return TraceMeta(
        model=replace(model, score="softmax"),
        ahead=dict.fromkeys((1, 2, 3), model.top_k),
        has_weights=True,
        has_gate=True,
        has_norms=True,
        embedding="iteration",
        expert_norms=tuple(map(tuple, norms.tolist())),
    )


def decode_case(
    events: Sequence[Sequence[Sequence[int]]],
    experts: int,
    slots: int,
    hardware: HardwareProfile | None = None,
    *,
    scope: str = "layer",
    nbytes: int = 1,
    options: Options = WATCHED,
) -> Case:
    """One request that decodes a token a step: ``events[step][layer]`` are its experts."""
    layers, top_k = len(events[0]), max(len(e) for step in events for e in step)
    padded = [
        [(la, [[*e, *[DROPPED] * (top_k - len(e))]]) for la, e in enumerate(step)]
        for step in events
    ]
    model = small_model(layers, experts, top_k, [nbytes] * layers)
    capacity = (slots * nbytes,) * layers if scope == "layer" else (slots * nbytes,)
    return Case(
        full_meta(model),
        (rows_of(0, padded, wide=experts),),
        hardware or machine(),
        capacity,
        options,
    )


@cache
def choices(experts: int, top_k: int) -> list[tuple[int, ...]]:
    """All that a token may choose."""
    return list(permutations(range(experts), top_k))


@st.composite
def requests_of(
    draw: st.DrawFn,
    model: ModelProfile,
    number: int,
    *,
    arrivals: bool,
    prefill: bool,
    max_passes: int,
    dropped: bool = True,
) -> RequestRows:
    """One request. An encoder (the first of two stacks) runs in the prefill alone."""
    pick = st.sampled_from(choices(model.experts, model.top_k))
    ends = np.cumsum([s.layers for s in model.stacks]).tolist()
    decoder = range(ends[-2] if len(ends) > 1 else 0, ends[-1])
    starts_with_prefill = prefill and draw(st.booleans())
    passes = []
    for step in range(draw(st.integers(1, max_passes))):
        first = starts_with_prefill and step == 0
        prompt = draw(st.integers(1, 5)) if first else 1
        blocks = []
        for layer in range(ends[-1]) if first else decoder:
            shorter = first and len(ends) > 1 and layer in decoder
            tokens = [list(draw(pick)) for _ in range(1 if shorter else prompt)]
            blocks.append((layer, tokens))
        passes.append(blocks)
    rows = sum(len(tokens) for blocks in passes for _, tokens in blocks)
    if dropped and draw(st.integers(0, 4)) == 0:
        _, tokens = draw(st.sampled_from(passes[0]))
        tokens[0][draw(st.integers(0, model.top_k - 1))] = DROPPED
    # Predictions need not be right, so they need not be drawn one by one.
    ways = choices(model.experts, model.top_k)
    start = draw(st.integers(0, len(ways) - 1))
    ahead = [ways[(start + 7 * row) % len(ways)] for row in range(rows)]
    arrival = draw(st.integers(0, 60)) if arrivals else None
    return rows_of(
        number,
        passes,
        prefill=starts_with_prefill,
        ahead=ahead,
        arrival_ns=arrival,
        wide=model.experts,
    )


@st.composite
def models(draw: st.DrawFn, equal: bool = False) -> ModelProfile:
    """Up to 3 layers of up to 5 experts; sizes may differ by layer."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    top_k = draw(st.integers(1, min(3, experts)))
    sizes = [draw(st.integers(1, 4))] * layers
    if not equal and draw(st.booleans()):
        sizes = draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers))
    split = layers > 1 and draw(st.integers(0, 4)) == 0
    return small_model(layers, experts, top_k, sizes, [1, layers - 1] if split else [])


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    equal: bool = False,
    single: bool = False,
    arrivals: bool | None = None,
    max_passes: int = 4,
    dropped: bool = True,
    fits: bool = False,
) -> Case:
    """A whole case.

    equal : experts of one size. single : batch 1, decoding only. arrivals : None draws.
    fits : every layer event fits its cache (with ``single``).
    """
    model = draw(models(equal=equal))
    allocator = draw(st.sampled_from(["bytes", "slots"]))
    arrive = draw(st.booleans()) if arrivals is None else arrivals
    made = [
        draw(
            requests_of(
                model,
                number,
                arrivals=arrive,
                prefill=not single,
                max_passes=max_passes,
                dropped=dropped,
            )
        )
        for number in range(draw(st.integers(1, 3)))
    ]
    made.sort(key=lambda rows: rows.facts.arrival_ns or 0)
    sizes = model.expert_bytes_table().tolist()
    least = model.top_k if fits else 1
    if draw(st.booleans()):
        slots = draw(st.integers(least, model.experts))
        spare = draw(st.integers(0, 2))
        capacity = tuple(slots * size + spare for size in sizes)
    else:
        whole = max(sizes) if allocator == "slots" else 1
        most = sum(whole if allocator == "slots" else s for s in sizes) * model.experts
        capacity = (draw(st.integers(least * max(sizes), max(most, least * max(sizes)))),)
    if model.layers == 1:
        capacity = (max(capacity),)
    return Case(
        full_meta(model),
        tuple(made),
        draw(machines()),
        capacity,
        Options(
            order=draw(st.sampled_from(["ready", "barrier"])),
            allocator=allocator,
            check=True,
            timeline=True,
        ),
        batch=1 if single else draw(st.integers(1, 4)),
        chunk_tokens=0 if single else draw(st.integers(0, 3)),
        initial=draw(st.sampled_from(["", "", "cold", "some", "all"])),
        charged=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


def spread(
    case: Case,
    devices: int,
    how: str = "round-robin",
    *,
    slots: int = 0,
    by_layer: bool = False,
    host: float = math.inf,
    between: Interconnect | None = None,
) -> Case:
    """The same on several devices.

    slots : experts that they hold together, of each layer with ``by_layer``; 0: all of them.
    host : links that the host can serve at their own rate.
    """
    meta, sizes = case.meta, case.model.expert_bytes_table()
    uses = np.zeros(meta.layers * meta.experts, np.int64)
    for rows in case.requests:
        there = rows.experts != DROPPED
        ids = rows.layer[:, None].astype(np.int64) * meta.experts + rows.experts
        np.add.at(uses, ids[there], 1)
    owners = place(how, devices, meta.layers, meta.experts, uses)
    scope = "layer" if by_layer else "global"
    each = slots or meta.experts
    if by_layer:
        given = tuple(int(size) * each for size in sizes)
    else:
        given = (slots * int(sizes.max()) or int(sizes.sum()) * meta.experts * devices,)
    machine, link = case.hardware, case.hardware.link
    several = replace(
        machine,
        devices=devices,
        interconnect=between,
        host=replace(machine.host, links_bytes_per_s=host * link.bytes_per_s),
    )
    return replace(
        case,
        owners=tuple(owners.tolist()),
        by_layer=by_layer,
        capacity_bytes=divide(given, sizes, scope, owners),
        hardware=several,
    )


@st.composite
def several(draw: st.DrawFn) -> Case:
    """A case on up to three devices."""
    case = draw(cases())
    meta = case.meta
    how = draw(st.sampled_from(PLACEMENTS))
    devices = draw(st.integers(1, min(3, meta.layers if how == "layers" else meta.experts)))
    by_layer = draw(st.booleans())
    least = devices * (1 if by_layer else 2)
    most = max(least, meta.experts if by_layer else meta.layers * meta.experts)
    return spread(
        case,
        devices,
        how,
        slots=draw(st.integers(least, most)),
        by_layer=by_layer,
        host=draw(st.sampled_from([math.inf, 1.0, 1.5, 2.0])),
        between=draw(st.sampled_from([None, Interconnect(math.inf, 0), Interconnect(0.5e9, 3)])),
    )


@st.composite
def tiered(draw: st.DrawFn, case: Case) -> Case:
    """A case whose host memory has room for one expert, for a few, or for all but one byte."""
    sizes = [int(b) for p in range(len(case.model.precisions)) for b in _sizes(case.model, p)]
    least, every = max(sizes), sum(sizes) * case.model.experts
    return replace(
        case,
        hardware=replace(
            case.hardware,
            ssd=Drive(
                bytes_per_s=draw(st.sampled_from(RATES)),
                latency_ns=draw(_ns),
                chunk_bytes=draw(st.sampled_from([0, 1, 2, 3, 100])),
            ),
        ),
        dram_bytes=max(least, draw(st.sampled_from([least, every // 3, every // 2, every - 1]))),
    )


def _sizes(model: ModelProfile, precision: int) -> list[int]:
    sizes: list[int] = model.expert_bytes_table(precision).tolist()
    return sizes


SWAPS = (("keep", KEEPS), ("miss", MISSES))


# ---- policies ------------------------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn, names: Sequence[str] = LOSSLESS) -> tuple[str, tuple[str, ...]]:
    """A preset by name, or with its seats swapped: (name, settings)."""
    name = draw(st.sampled_from(list(names)))
    if draw(st.booleans()):
        return name, ()
    settings = [f"{kind}={draw(st.sampled_from(known))}" for kind, known in SWAPS]
    prefetch = draw(st.sampled_from(PREFETCHES))
    settings.append(f"prefetch={prefetch}")
    if prefetch == "next-gate":
        settings.append(f"prefetch.cancel={draw(st.sampled_from(['true', 'false']))}")
    elif "distance" in parameters(seat_class("prefetch", prefetch)):
        # What is read from the trace was recorded for two layers.
        most = 2 if Needs.AHEAD in seat_class("prefetch", prefetch).needs else 4
        settings.append(f"prefetch.distance={draw(st.integers(1, most))}")
    return name, tuple(settings)
