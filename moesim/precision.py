"""Which copy of an expert serves a layer event, where low precision will do for some tokens.

Two precisions of an expert are two copies (``moesim.ledger``), each with its own key and bytes.
"""

from __future__ import annotations

import numpy as np

from moesim.types import DROPPED, AnyArray, IntArray, State

RESIDENT, IN_FLIGHT = int(State.RESIDENT), int(State.IN_FLIGHT)


def enough(experts: IntArray, chosen: AnyArray, precisions: AnyArray, per_layer: int) -> AnyArray:
    """The lowest precision that will do for all tokens of each demanded expert, uint8 [n].

    Parameters
    ----------
    experts : int64 [n] expert ids of one layer, the demand.
    chosen : uint16 [T, k] what is executed.
    precisions : uint8 [T, k] what each token asks for at least.
    per_layer : experts of a layer.
    """
    asked = np.full(per_layer, np.iinfo(np.uint8).max, np.uint8)
    kept = chosen != DROPPED
    np.minimum.at(asked, chosen[kept], precisions[kept])
    return asked[experts % per_layer]


def serving(experts: IntArray, allowed: AnyArray, states: AnyArray) -> AnyArray:
    """The precision of the copy that serves each demanded expert, uint8 [n].

    The best that is there, else the best that is on its way, else what was asked for.

    Parameters
    ----------
    experts : int64 [n] expert ids. allowed : uint8 [n], the lowest precision that will do.
    states : uint8 [precisions, layers * experts] of ``State``.
    """
    found = states[:, experts]
    usable = np.arange(len(found))[:, None] <= allowed
    there, coming = usable & (found == RESIDENT), usable & (found == IN_FLIGHT)
    elsewhere = np.where(coming.any(axis=0), coming.argmax(axis=0), allowed)
    return np.where(there.any(axis=0), there.argmax(axis=0), elsewhere).astype(np.uint8)
