"""Expert-level profiling, and the latency model made from it (appendix A.1).

E_latency(slots) = T_fixed + sum of compute of each layer + a x overrun + b x demanded, where

- compute of a layer: its dense part and as many experts as a pass touches (of n slots, T tokens
  choosing m = min(k, n) each evenly: n (1 - (1 - m/n)^T)), by the machine's cost tables;
- overrun: what one update's swaps take on the link beyond the time until the next update, over the
  passes between two updates; swaps of a layer grow as n (1 - n/E), by a factor fitted on runs;
- demanded: time to load what a fixed set of the n most used experts misses in a pass;
- T_fixed, a and b are fitted on runs by least squares, a and b at or above 0. A policy that never
  waits for experts (masked gating, swaps in the background) gets a = b = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.costs import Costs
from moesim.planning.space import FloatArray, Space
from moesim.planning.survey import Survey
from moesim.types import IntArray

METRICS = ("tpot", "ttft", "request")


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward passes alike: tokens computed, cached positions read, how many make up the metric."""

    tokens: int
    context: int
    times: float


@dataclass(frozen=True, slots=True)
class ExpertProfile:
    """One expert of a layer: all experts of a layer are alike."""

    layer: int
    expert_bytes: int
    activation_bytes_per_token: int
    compute_ns: int
    """For one token, on the device."""
    load_ns: int


def profile_experts(costs: Costs) -> list[ExpertProfile]:
    """What an expert of each layer weighs and takes, from the profiles of model and machine."""
    model = costs.model
    wide = 2 * (model.hidden + 2 * model.intermediate)
    return [
        ExpertProfile(layer, nbytes, wide, costs.expert_ns(1, layer), costs.load_ns(nbytes))
        for layer, nbytes in enumerate(model.expert_bytes_table().tolist())
    ]


def passes_of(metric: str, survey: Survey) -> tuple[Pass, ...]:
    """The forward passes that make up a latency metric."""
    decode = Pass(1, round(survey.mean_context), 1.0)
    prefill = Pass(max(1, round(survey.mean_prompt)), 0, 1.0)
    if metric == "tpot":
        return (decode,)
    if metric == "ttft":
        return (prefill,)
    return (prefill, Pass(1, decode.context, survey.mean_decodes))


@dataclass(frozen=True, slots=True)
class Terms:
    """The parts of the latency model before any run.

    compute : float64 [layers, experts + 1] ns by slots. demanded : the same, of missing experts.
    swapped : float64 [layers, experts + 1] bytes of an update at factor 1.
    head_ns : outside the layers.
    """

    compute: FloatArray
    demanded: FloatArray
    swapped: FloatArray
    head_ns: float
    passes_per_update: float
    passes: float
    ns_per_byte: float

    def columns(self, slots: IntArray, turnover: float) -> FloatArray:
        """float64 [P, 3] ns: compute, overrun and demanded of each allocation."""
        layers = np.arange(slots.shape[1])
        compute = self.compute[layers, slots].sum(axis=1) + self.head_ns
        demanded = self.demanded[layers, slots].sum(axis=1)
        load_ns = turnover * self.swapped[layers, slots].sum(axis=1) * self.ns_per_byte
        between = self.passes_per_update * compute / self.passes
        overrun = np.maximum(load_ns - between, 0) / max(self.passes_per_update, 1e-9)
        return np.column_stack((compute, overrun * self.passes, demanded))


def make_terms(
    costs: Costs, space: Space, survey: Survey, metric: str, passes_per_update: float
) -> Terms:
    """The parts of the model, from cost tables and what the trace's passes are like."""
    passes = passes_of(metric, survey)
    shape = (space.layers, space.experts + 1)
    compute, demanded, swapped = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    missed = survey.missed_shares()
    for layer, nbytes in enumerate(space.expert_bytes):
        for n in range(1, space.experts + 1):
            swapped[layer, n] = n * (1 - n / space.experts) * nbytes
            for part in passes:
                touched = _touched(part.tokens, min(survey.top_k, n), n)
                compute[layer, n] += part.times * _layer_ns(costs, layer, part, touched)
                absent = _touched(part.tokens, survey.top_k, space.experts) * missed[layer, n]
                demanded[layer, n] += part.times * absent * costs.load_ns(nbytes)
    head = sum(part.times * costs.head_ns(part.tokens) for part in passes)
    whole = sum(space.expert_bytes)
    ns_per_byte = sum(map(costs.load_ns, space.expert_bytes)) / whole
    times = sum(part.times for part in passes)
    return Terms(compute, demanded, swapped, head, passes_per_update, times, ns_per_byte)


def _touched(tokens: int, chosen: int, slots: int) -> float:
    """Experts that so many tokens touch, each choosing evenly among the slots."""
    return slots * (1 - (1 - chosen / slots) ** tokens) if tokens > 1 else float(chosen)


def _layer_ns(costs: Costs, layer: int, part: Pass, touched: float) -> float:
    each = max(1, round(part.tokens * min(costs.model.top_k, touched) / max(touched, 1)))
    dense = costs.dense_ns(part.tokens, part.context, layer) + costs.sync_ns + costs.plan_ns
    return dense + touched * costs.expert_ns(each, layer)


@dataclass(frozen=True, slots=True)
class Latency:
    """The fitted latency model; ns."""

    terms: Terms
    turnover: float
    """Share of what could be swapped that an update swaps."""
    fixed_ns: float
    overrun: float
    demanded: float

    def __call__(self, slots: IntArray) -> FloatArray:
        """Latency of each allocation, int64 [P, layers] -> float64 [P]."""
        columns = self.terms.columns(slots, self.turnover)
        factors = np.array([1.0, self.overrun, self.demanded])
        latency: FloatArray = np.maximum(columns @ factors + self.fixed_ns, 0)
        return latency


def fit_latency(
    terms: Terms, slots: IntArray, seen_ns: FloatArray, swapped_bytes: FloatArray
) -> Latency:
    """Fit on runs: allocations int64 [P, layers], their latency, and bytes swapped an update."""
    layers = np.arange(slots.shape[1])
    at_most = terms.swapped[layers, slots].sum(axis=1)
    square = float(at_most @ at_most)
    turnover = float(at_most @ swapped_bytes) / square if square else 0.0
    columns = terms.columns(slots, turnover)
    fixed, overrun, demanded = _not_negative(columns[:, 1:], seen_ns - columns[:, 0])
    return Latency(terms, turnover, fixed, overrun, demanded)


def _not_negative(columns: FloatArray, wanted: FloatArray) -> tuple[float, float, float]:
    """Least squares with a free constant and two factors at or above 0: the best of the four
    choices of which of the two are 0."""
    best: tuple[float, tuple[float, float, float]] | None = None
    for chosen in ((), (0,), (1,), (0, 1)):
        answer = _least_squares(columns, chosen, wanted)
        error = float(np.square(columns @ np.array(answer[1:]) + answer[0] - wanted).sum())
        if min(answer[1:]) >= 0 and (best is None or error < best[0] * (1 - 1e-9)):
            best = (error, answer)
    assert best is not None, "the constant alone always does"
    return best[1]


def _least_squares(
    columns: FloatArray, chosen: Sequence[int], wanted: FloatArray
) -> tuple[float, float, float]:
    design = np.column_stack((np.ones(len(wanted)), columns[:, list(chosen)]))
    answer = np.linalg.lstsq(design, wanted, rcond=None)[0].tolist()
    factors = dict(zip(chosen, answer[1:], strict=True))
    return answer[0], factors.get(0, 0.0), factors.get(1, 0.0)
