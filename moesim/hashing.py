"""Counter-based random numbers: a hash of integers, equal on every host and in any order."""

from __future__ import annotations

import numpy as np

from moesim.types import AnyArray

_STEP = np.uint64(0x9E3779B97F4A7C15)


def finalise(words: AnyArray) -> AnyArray:
    """Kernel: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), uint64 in and out."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: AnyArray = words ^ (words >> np.uint64(31))
    return mixed


def hash64(*parts: AnyArray | int) -> AnyArray:
    """A hash of integers, broadcast together: uint64."""
    state: AnyArray = np.asarray(_STEP)
    with np.errstate(over="ignore"):
        for part in parts:
            word = np.asarray(part).astype(np.int64).view(np.uint64)
            state = finalise((state ^ word) + _STEP)
    return state
