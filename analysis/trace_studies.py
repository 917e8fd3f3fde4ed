"""What a trace alone shows of FineMoE's ideas: entropy of maps, scores of searches, what they meet.

A *map* is an iteration's gate distribution over all experts, [layers, experts], mean over its
tokens; of a trace without gates the chosen experts' weights, shared out to 1 (a stand-in, marked).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesim.traces.reader import Columns, RequestRows, TraceReader, gate_probabilities
from moesim.traces.schema import TraceMeta
from moesim.types import DROPPED

Floats = npt.NDArray[np.float64]
MOST_REQUESTS = 128
PAIRS = 20_000
"""Pairs of iterations that are compared, drawn with a fixed seed."""


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """Iterations of a trace's first requests, in order.

    request, iteration : int64 [n]. shares : float64 [n, layers, experts].
    used : bool of the same shape, what was activated. embedding : float64 [n, hidden], or None.
    train : bool [n], of a request that fills the store. whole : the trace holds gates.
    """

    request: npt.NDArray[np.int64]
    iteration: npt.NDArray[np.int64]
    shares: Floats
    used: npt.NDArray[np.bool_]
    embedding: Floats | None
    train: npt.NDArray[np.bool_]
    whole: bool


@lru_cache(maxsize=4)
def maps(path: Path) -> Maps:
    """Read the first requests of a trace; several figures ask for the same."""
    columns = Columns(True, True, False, False, False, True, True, False)
    numbers, shares, used, vectors, train = [], [], [], [], []
    whole = True
    with TraceReader(path, columns) as reader:
        for count, rows in enumerate(reader.requests()):
            if count == MOST_REQUESTS:
                break
            whole = whole and rows.gate is not None
            made, met = _of_request(rows, reader.meta)
            for i, first in enumerate(rows.starts[:-1]):
                number = int(rows.iteration[first])
                numbers.append((rows.request, number))
                shares.append(made[i])
                used.append(met[i])
                vectors.append(rows.embedding.get(number))
                train.append(rows.facts.split == "train")
    pairs = np.array(numbers, np.int64).reshape(-1, 2)
    return Maps(
        pairs[:, 0], pairs[:, 1], np.array(shares), np.array(used), _stacked(vectors),
        np.array(train, bool), whole,
    )  # fmt: skip


def _of_request(rows: RequestRows, meta: TraceMeta) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Shares and uses [iterations, layers, experts]."""
    count = len(rows.starts) - 1
    turn = np.repeat(np.arange(count), np.diff(rows.starts))
    total = np.zeros((count, meta.layers, meta.experts))
    where = (turn, rows.layer)
    kept = rows.experts != DROPPED
    chosen = np.where(kept, rows.experts, 0).astype(np.int64)
    if rows.gate is not None:
        np.add.at(total, where, gate_probabilities(rows.gate, meta).astype(np.float64))
    else:
        weights = kept * (1.0 if rows.weights is None else rows.weights.astype(np.float64))
        np.add.at(total, (turn[:, None], rows.layer[:, None], chosen), weights)
    used = np.zeros(total.shape, bool)
    token, slot = np.nonzero(kept)
    used[turn[token], rows.layer[token], chosen[token, slot]] = True
    sums = total.sum(axis=2, keepdims=True)
    return np.divide(total, sums, out=np.zeros_like(total), where=sums > 0), used


def _stacked(vectors: list[npt.NDArray[np.float16] | None]) -> Floats | None:
    there = [v for v in vectors if v is not None]
    if len(there) < len(vectors) or not there:
        return None
    return np.array(there, np.float64)


def entropy(shares: Floats) -> Floats:
    """Shannon entropy over the last axis, in nats, as the paper's code has it."""
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    result: Floats = -(shares * logs).sum(axis=-1)
    return result


def entropy_by_grain(found: Maps) -> tuple[float, float]:
    """Mean entropy of a layer (nats) of whole requests' mean maps, and of single iterations'."""
    fine = found.iteration > 0
    coarse = [found.shares[(found.request == r) & fine].mean(axis=0) for r in _decoded(found)]
    return float(entropy(np.array(coarse)).mean()), float(entropy(found.shares[fine]).mean())


def entropy_by_count(found: Maps, most: int = 50) -> list[tuple[int, float]]:
    """(iterations whose maps are added up, mean entropy of a layer in nats)."""
    rows = []
    sums = [np.cumsum(found.shares[(found.request == r) & (found.iteration > 0)], axis=0)
            for r in _decoded(found)]  # fmt: skip
    for count in range(1, most + 1):
        some = [total[count - 1] / count for total in sums if len(total) >= count]
        # A mean over one request would be that request's.
        if len(some) < 3:
            break
        rows.append((count, float(entropy(np.array(some)).mean())))
    return rows


def _decoded(found: Maps) -> npt.NDArray[np.int64]:
    return np.unique(found.request[found.iteration > 0])


def pairs(found: Maps, seed: int = 0) -> dict[str, Floats]:
    """Scores and what they would have met, of pairs of decode iterations of different requests.

    ``semantic`` (where the trace has embeddings) and ``trajectory`` are cosines (equations 4 and
    5, over all layers); ``hit`` is the share of one's experts that the other used too.
    """
    draw = np.random.default_rng(seed)
    decode = np.flatnonzero(found.iteration > 0)
    if len(decode) < 2:
        return {}
    left, right = draw.choice(decode, PAIRS), draw.choice(decode, PAIRS)
    apart = found.request[left] != found.request[right]
    left, right = left[apart], right[apart]
    flat = _unit(found.shares.reshape(len(found.shares), -1))
    used = found.used.reshape(len(found.used), -1)
    both = (used[left] & used[right]).sum(axis=1)
    scores = {"trajectory": (flat[left] * flat[right]).sum(axis=1),
              "hit": both / np.maximum(1, used[left].sum(axis=1))}  # fmt: skip
    if found.embedding is not None:
        unit = _unit(found.embedding)
        scores["semantic"] = (unit[left] * unit[right]).sum(axis=1)
    return scores


def best_scores(found: Maps, sizes: list[int]) -> list[tuple[int, float | None, float]]:
    """(maps in the store, mean best semantic score, mean best trajectory score) of what is served.

    The store holds evenly spaced iterations of the train requests: an upper sketch of what the
    paper's replacement keeps.
    """
    stored, asked = np.flatnonzero(found.train), np.flatnonzero(~found.train)
    if not len(stored) or not len(asked):
        return []
    flat = _unit(found.shares.reshape(len(found.shares), -1))
    unit = None if found.embedding is None else _unit(found.embedding)
    rows = []
    for size in (s for s in sizes if s <= len(stored)):
        some = stored[np.linspace(0, len(stored) - 1, size).astype(int)]
        means = [None if v is None else float((v[asked] @ v[some].T).max(axis=1).mean())
                 for v in (unit, flat)]  # fmt: skip
        assert means[1] is not None
        rows.append((size, means[0], means[1]))
    return rows


def _unit(values: Floats) -> Floats:
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    unit: Floats = np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)
    return unit
