"""What a planner learns from runs: models of quality and latency, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.costs import Costs
from moesim.planning.fit import Held, fit_linear, fit_net, held_out, holding_out, lacking_slots
from moesim.planning.latency import Latency, fit_latency, make_terms
from moesim.planning.request import Request
from moesim.planning.space import BoolArray, FloatArray, Model, Space
from moesim.planning.survey import Survey
from moesim.planning.trials import Trial, columns
from moesim.types import IntArray


@dataclass(frozen=True, slots=True)
class Samples:
    """Random allocations with their quality, and the replays among them.

    slots : int64 [P, layers]. quality : float64 [P]. near : bool [P], which fill the budget.
    """

    slots: IntArray
    quality: FloatArray
    near: BoolArray
    replayed: tuple[Trial, ...]


@dataclass(frozen=True, slots=True)
class Models:
    """What was learned from runs, for one policy with one period: shared by all budgets."""

    samples: Samples
    quality: Model
    latency: Latency
    tables: FloatArray
    """float64 [layers, experts + 1], each layer's part where quality is taken as a sum."""
    report: Mapping[str, Any]
    """How good the models are on what they were not fitted on."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What is known before any run."""

    request: Request
    space: Space
    survey: Survey
    costs: Costs
    period: int


def fitted(ground: Ground, samples: Samples, tables: FloatArray, runs: str) -> Models:
    """Fit the models.

    tables : float64 [layers, experts + 1], each layer's part of a quality that is a sum.
    runs : what gave the samples' quality, "rehearsal" or "replay".
    """
    request, space = ground.request, ground.space
    slots, quality, near = samples.slots, samples.quality, samples.near
    fitted_on, held = holding_out(len(slots), request.held_out, request.seed)
    share = lacking_slots(space.layers, space.experts)
    lacks = ground.survey.missed_shares() if request.encoding == "uses" else share
    net = fit_net(slots[fitted_on], quality[fitted_on], lacks, request.fitting, request.seed)
    linear = fit_linear(slots[fitted_on], quality[fitted_on], share)
    latency, left_out = _latency_model(ground, samples.replayed)
    close = held[samples.near[held]]
    memory = space.memory_bytes(slots).astype(np.float64)
    ran, seen, latency_ns = columns(samples.replayed)
    # What was replayed may be what the net was fitted on.
    apart = held if runs == "replay" else np.arange(len(ran))
    layers = np.arange(space.layers)
    summed = tables[layers, ran].sum(axis=1)
    report = {
        "runs": runs,
        "configurations": len(slots),
        "replayed": len(ran),
        "held_out": len(held),
        "net": _held(held_out(net(slots[held]), quality[held])),
        "linear": _held(held_out(linear(slots[held]), quality[held])),
        "net_at_budget": _held(held_out(net(slots[close]), quality[close])),
        "linear_at_budget": _held(held_out(linear(slots[close]), quality[close])),
        "memory_alone": held_out(memory[held], quality[held]).spearman,
        "net_against_replay": _held(held_out(net(ran[apart]), seen[apart])),
        "sum_against_replay": _summed(held_out(summed[apart], seen[apart]), runs),
        "proxy": held_out(tables[layers, slots].sum(axis=1), quality).spearman,
        "proxy_at_budget": held_out(
            tables[layers, slots[near]].sum(axis=1), quality[near]
        ).spearman,
        "latency": _held_latency(left_out, latency_ns),
        "memory": _memory_error(space, samples.replayed),
    }
    return Models(samples, net, latency, tables, report)


def _latency_model(ground: Ground, trials: Sequence[Trial]) -> tuple[Latency, FloatArray]:
    """The model, and what it says of each run when fitted on the others."""
    seen, period = ground.survey, ground.period
    slots, _, latency_ns = columns(trials)
    updates = max(1.0, seen.requests / period) if period else 1.0
    swapped = np.array([t.bytes_loaded for t in trials], np.float64) / updates
    passes_per_update = period * (1 + seen.mean_decodes)
    metric = ground.request.latency_of
    terms = make_terms(ground.costs, ground.space, seen, metric, passes_per_update)
    every = np.arange(len(trials))
    left_out = [
        fit_latency(terms, slots[rest], latency_ns[rest], swapped[rest])(slots[i : i + 1])[0]
        for i in every
        if len(rest := every[every != i])
    ]
    return fit_latency(terms, slots, latency_ns, swapped), np.array(left_out)


def _memory_error(space: Space, trials: Sequence[Trial]) -> dict[str, int]:
    """How far the experts' part of the memory model lies above what runs held at most."""
    model = space.memory_bytes(columns(trials)[0]) - space.fixed_bytes
    over = model - np.array([t.peak_bytes for t in trials], np.int64)
    return {"most_over_bytes": int(over.max()), "most_under_bytes": int(-over.min())}


def _held(held: Held) -> dict[str, float | None]:
    return {"spearman": held.spearman, "mean_error": held.mean_error}


def _summed(held: Held, runs: str) -> dict[str, float | None]:
    """A proxy has no error against a loss, only an order."""
    return {**_held(held), **({"mean_error": None} if runs == "real" else {})}


def _held_latency(predicted: FloatArray, seen: FloatArray) -> dict[str, float | None]:
    held, mean = held_out(predicted, seen), float(seen.mean())
    share = held.mean_error / mean if held.mean_error is not None and mean else None
    return {"spearman": held.spearman, "mean_error_share": share}
