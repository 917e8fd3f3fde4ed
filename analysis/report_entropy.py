"""How sharply a trace's gates choose, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesim.errors import UsageError
from moesim.traces.reader import Columns, RequestRows, TraceReader, gate_probabilities
from moesim.traces.schema import TraceMeta

MOST_ITERATIONS = 32
MOST_REQUESTS = 64
"""The first ones are read: a mean over thousands of gates moves no more."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Entropy:
    """Mean entropy of the gates in bits, NaN where nothing was recorded.

    bits : float64 [layers, iterations]; iteration 0 is the prefill.
    of : "all experts" (from the gates), or "the chosen experts" (from the weights alone).
    most : bits of an even choice.
    """

    bits: Floats
    of: str
    most: float
    requests: int
    digest: str


def entropy(path: Path, traces: Sequence[str]) -> Entropy:
    """Read a trace.

    traces : digests of the traces that were replayed.

    Raises
    ------
    UsageError
        If it is another trace, or has neither gates nor weights.
    """
    with TraceReader(path, Columns(True, True, False, False, False, False, False, False)) as reader:
        meta = reader.meta
        if meta.digest not in traces:
            known = ", ".join(sorted({digest[:12] for digest in traces}))
            raise UsageError(
                f"--trace {path}: its digest is {meta.digest[:12]}, the runs replayed {known}; "
                "name the trace that was replayed"
            )
        total = np.zeros((meta.layers, MOST_ITERATIONS))
        count = np.zeros_like(total)
        of, read = "", 0
        for rows in reader.requests():
            of = _add(rows, meta, total, count) or of
            read += 1
            if read == MOST_REQUESTS:
                break
    if not of:
        raise UsageError(f"--trace {path}: has neither gates nor weights; leave out --trace")
    used = np.flatnonzero(count.any(axis=0))
    bits = np.full(total.shape, np.nan)
    np.divide(total, count, out=bits, where=count > 0)
    most = float(np.log2(meta.experts if of == "all experts" else meta.top_k))
    return Entropy(bits[:, : used[-1] + 1], of, most, read, meta.digest)


def _add(rows: RequestRows, meta: TraceMeta, total: Floats, count: Floats) -> str:
    if rows.gate is not None:
        shares, of = gate_probabilities(rows.gate, meta).astype(np.float64), "all experts"
    elif rows.weights is not None:
        weights = np.maximum(rows.weights.astype(np.float64), 0.0)
        sums = weights.sum(axis=1, keepdims=True)
        shares = np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)
        of = "the chosen experts"
    else:
        return ""
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    bits = -(shares * logs).sum(axis=1)
    early = rows.iteration < MOST_ITERATIONS
    where = (rows.layer[early], rows.iteration[early])
    np.add.at(total, where, bits[early])
    np.add.at(count, where, 1.0)
    return of
