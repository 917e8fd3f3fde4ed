"""Which recorded request serves one of a log, by the lengths of prompt and answer.

The recorded requests whose lengths are nearest, as a factor (``max/min`` of the prompts times
``max/min`` of the answers), serve: those within ``NEAR`` of the nearest, or the ``FEW`` nearest
that are within ``FAR`` of it, if these are more. A hash of the seed chooses among them, so that
not one recording serves all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.hashing import hash64
from moesim.result import percentiles
from moesim.types import AnyArray, IntArray

NEAR, FAR = 1.1, 2.0
FEW = 8
_MATCH = 0x6D617463
_ROWS = 256


def matched(
    prompt: IntArray, output: IntArray, recorded: tuple[IntArray, IntArray], seed: int
) -> IntArray:
    """For each request of a log the place of the recorded one that serves it, int64 [n].

    recorded : prompt and output tokens of each recorded request; a prompt of 0 was not recorded,
    and fits any.
    """
    chosen = [
        _nearest(prompt[at : at + _ROWS], output[at : at + _ROWS], recorded, seed, at)
        for at in range(0, len(prompt), _ROWS)
    ]
    return np.concatenate(chosen)


def _nearest(
    prompt: IntArray, output: IntArray, recorded: tuple[IntArray, IntArray], seed: int, at: int
) -> IntArray:
    known, answers = recorded
    far = _factor(prompt, known) * _factor(output, answers)
    least = far.min(axis=1, keepdims=True)
    few = min(FEW, len(known)) - 1
    several_th = np.partition(far, few, axis=1)[:, few : few + 1]
    near = far <= np.maximum(NEAR * least, np.minimum(several_th, FAR * least))
    # The k-th of the near ones, k by a hash.
    several = near.sum(axis=1).astype(np.uint64)
    draw = (hash64(_MATCH, seed, np.arange(at, at + len(prompt))) % several).astype(np.int64)
    chosen: IntArray = np.argmax(np.cumsum(near, axis=1) > draw[:, None], axis=1)
    return chosen


def _factor(wanted: IntArray, known: IntArray) -> AnyArray:
    """How many times longer the longer is, [wanted, known]; 1 where nothing is known."""
    mine, theirs = wanted[:, None].astype(np.float64), known[None, :].astype(np.float64)
    larger, smaller = np.maximum(mine, theirs), np.minimum(mine, theirs)
    return np.where(theirs > 0, larger / np.maximum(smaller, 1), 1.0)


def mismatch(
    prompt: IntArray, output: IntArray, known_prompt: IntArray, known_output: IntArray
) -> dict[str, Any]:
    """How far the recorded requests that serve a log are from its lengths.

    ``prompt_error``, ``output_error``: |recorded - wanted| / wanted, mean and percentiles over the
    requests (prompts only where one was recorded). ``prompt_tokens_tiled``, ``passes_tiled``: the
    share of the served tokens and passes that repeat rows already used by the same request.
    ``cut``: the share of the requests that are shorter than what was recorded.
    """
    has = known_prompt > 0
    return {
        "prompt_error": percentiles((np.abs(known_prompt - prompt) / prompt)[has].tolist()),
        "output_error": percentiles((np.abs(known_output - output) / output).tolist()),
        "prompt_tokens_tiled": _tiled(prompt[has], known_prompt[has]),
        "passes_tiled": _tiled(output, known_output),
        "cut": float(np.mean((known_output > output) | (known_prompt > prompt))),
    }


def _tiled(wanted: IntArray, known: IntArray) -> float | None:
    total = int(wanted.sum())
    return int(np.maximum(wanted - known, 0).sum()) / total if total else None
