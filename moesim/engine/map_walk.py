"""Map search over a whole forward pass at once: what ``MapSearch`` does gate by gate, compiled."""

from __future__ import annotations

from typing import Any, TypeGuard

import numba
import numpy as np

from moesim.compiled import entry, load
from moesim.engine.fields import G, H
from moesim.policies.map_search import HitCount, MapSearch
from moesim.policies.map_store import (
    BYTES,
    ENTRIES,
    OPS,
    Choice,
    Store,
    Trails,
    add,
    find,
    load_all,
    observe_one,
    predict,
)
from moesim.types import PROBABILITY_ONE, AnyArray, IntArray

RECORD, TITLE = len(G), len(H)


def _walk(
    store: Store,
    trails: Trails,
    choice: Choice,
    which: IntArray,
    values: AnyArray,
    starts: IntArray,
    layers: IntArray,
    how: IntArray,
    out: IntArray,
    places: IntArray,
) -> int:
    """The gates of one pass of one request: writes a record for each that foresees anything.

    Parameters
    ----------
    which : int64 [1], the request's trail. values : int32 [rows, E], gates of the pass.
    starts : int64 [events + 1], rows of each gate. layers : int64 [events].
    how : int64 [7]: step, distance, K, whether delta is dynamic, whether later layers are meant
        too, whether only the last token counts, whether maps are kept.
    out : receives records. places : int64 [events], receives where each begins, or -1.

    Returns
    -------
    Length of the records.
    """
    step, distance, least, dynamic, later, last_only, keeps = how
    depth, experts, capacity = store.maps.shape
    trail = which[0]
    length = 0
    for i in range(len(layers)):
        layer = layers[i]
        first = starts[i]
        if last_only:
            first = starts[i + 1] - 1
            trails.totals[trail, layer] = 0
        add(trails, trail, layer, values, first, starts[i + 1], PROBABILITY_ONE)
        entries = store.size[ENTRIES]
        target = layer + distance
        searched = entries > 0 and target < depth
        if searched or (keeps and entries == capacity):
            observe_one(store, trails, trail, layer, step)
        kept_ops, kept_nbytes = store.work[OPS], store.work[BYTES]
        at = length + RECORD
        count = 0
        if searched:
            find(store, trails, trail, layer)
            for meant in range(target, depth if later else target + 1):
                n = predict(store, trails, which, 1, meant, least, dynamic, choice)
                if n:
                    out[at + H.EVENTS] = meant - layer
                    out[at + H.LAYER] = meant
                    out[at + H.CHOSEN] = n
                    at += TITLE
                    for j in range(n):
                        out[at + j] = choice.chosen[j]
                    at += n
                    for j in range(experts):
                        out[at + j] = choice.probabilities[j]
                    at += experts
                    count += 1
        places[i] = -1
        if count or store.work[OPS]:
            places[i] = length
            out[length + G.LENGTH] = at - length
            out[length + G.PHASE] = 1
            out[length + G.COUNT] = count
            out[length + G.OPS] = store.work[OPS]
            out[length + G.BYTES] = store.work[BYTES]
            out[length + G.KEPT_OPS] = kept_ops
            out[length + G.KEPT_BYTES] = kept_nbytes
            length = at
        store.work[OPS] = 0
        store.work[BYTES] = 0
    return length


walk = entry(_walk)


class MapWalk:
    """Walks the passes of one seat."""

    def __init__(self, seat: MapSearch) -> None:
        self._seat = seat
        self._out = np.zeros(1, np.int64)
        store, trails, choice = seat.parts
        numbers, values = numba.int64[::1], numba.int32[:, ::1]
        typeof: Any = numba.typeof
        kinds = typeof(store), typeof(trails), typeof(choice), numbers, values, *[numbers] * 5
        load_all(store, trails, choice)
        load((walk, kinds))

    @staticmethod
    def suits(seat: object) -> TypeGuard[MapSearch]:
        """Whether a pass of one request can be walked."""
        return (
            isinstance(seat, MapSearch)
            and not isinstance(seat, HitCount)
            and type(seat).foresee is MapSearch.foresee
            and seat.prefill != "every"
        )

    def walk(
        self, request: int, step: int, values: AnyArray, starts: IntArray, layers: IntArray
    ) -> tuple[IntArray, IntArray]:
        """The records of a pass's gates, and where each gate's begins in them, or -1.

        values : int32 [rows, E], contiguous.
        """
        seat = self._seat
        which = np.array([seat.trail_of(request)])
        store, trails, choice = seat.parts
        longest = RECORD + (TITLE + 2 * store.maps.shape[1]) * (
            store.maps.shape[0] if seat.targets == "later" else 1
        )
        if len(self._out) < longest * len(layers):
            self._out = np.zeros(longest * len(layers), np.int64)
        places = np.zeros(len(layers), np.int64)
        how = np.array(
            [
                step,
                seat.distance,
                seat.world.top_k,
                seat.delta,
                seat.targets == "later",
                seat.prefill == "last",
                not seat.frozen,
            ],
            np.int64,
        )
        length = walk(store, trails, choice, which, values, starts, layers, how, self._out, places)
        return self._out[:length].copy(), places
