"""Which policies are the quickest, and which cannot be told from them.

Where the difference of two means lies within chance, a ranking would say more than is known. Chance
is measured by the bootstrap over requests (Efron, 1979): the same requests, drawn again and again
with replacement, under both policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from moesim.types import AnyArray

DRAWS = 2000
LEVEL = 0.95
MOST_BLOCKS = 1000
"""More requests than this are drawn in blocks of neighbours, which chance moves together anyway."""

Summary = dict[str, Any]


def mark(runs: Sequence[Summary], times: Sequence[AnyArray], seed: int = 0) -> None:
    """Attach to each run of a capacity how its TPOT differs from the quickest one's.

    Only policies that could be used are ranked: no bounds, nothing lossy.

    Parameters
    ----------
    times : for each run float64 [requests], the TPOT of each request in ns, NaN without one.
    """
    for capacity in dict.fromkeys(run["capacity"] for run in runs):
        some = [
            (run, values)
            for run, values in zip(runs, times, strict=True)
            if run["capacity"] == capacity and _is_ranked(run, values)
        ]
        if len(some) > 1:
            _compare(some, seed)


def _is_ranked(run: Summary, values: AnyArray) -> bool:
    usable = not run["oracle"] and not run["lossy"]
    return usable and run["tpot_ns"]["mean"] is not None and bool((~np.isnan(values)).any())


def _compare(some: Sequence[tuple[Summary, AnyArray]], seed: int) -> None:
    best, quickest = min(some, key=lambda pair: float(pair[0]["tpot_ns"]["mean"]))
    for run, values in some:
        low, high = interval(values - quickest, seed)
        mean = best["tpot_ns"]["mean"]
        run["against_best"] = {
            "best": best["policy"],
            "slower": run["tpot_ns"]["mean"] / mean - 1 if mean else 0.0,
            "interval": [low / mean, high / mean] if mean else [0.0, 0.0],
            "tie": run is not best and low <= 0.0,
        }


def interval(differences: AnyArray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of paired differences, float64 [requests]."""
    known = differences[~np.isnan(differences)]
    drawn, counts = _draws(seed, len(known))
    sums = known
    if len(known) > MOST_BLOCKS:
        sums = np.array([block.sum() for block in np.array_split(known, MOST_BLOCKS)])
    means = sums[drawn].sum(axis=1) / counts
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(maxsize=4)
def _draws(seed: int, requests: int) -> tuple[AnyArray, AnyArray]:
    """Blocks drawn, int64 [draws, blocks], and the requests in them, int64 [draws].

    The same for every run of so many requests, which a sweep has thousands of.
    """
    blocks = min(requests, MOST_BLOCKS)
    drawn = np.random.default_rng(seed).integers(0, blocks, (DRAWS, blocks))
    sizes = np.full(blocks, requests // blocks) + (np.arange(blocks) < requests % blocks)
    return drawn, sizes[drawn].sum(axis=1)
