"""Odds of use: what the routing seen so far says of each expert's next chances, in integers.

Three things speak for an expert of a layer:

- *Memory*: its uses, faded with three time constants, and its plain frequency.
- *The last pass*: what the layer's experts of one token name among those of the next. Counts of
  pairs give P(expert | earlier expert) / P(expert), whose logarithms are added: naive Bayes (M. E.
  Maron, 1961).
- *The layers just passed*, by counts of pairs in the same way, 1 to ``reach`` layer events ahead.

``z`` is a weighted sum of their binary logarithms. No scale of it is believed: how often an expert
with such a ``z`` was used is counted for each layer, and that share is the probability.

Logarithms are in 1/1024 of a bit, probabilities in 1/16384, and all sums are exact, so that no host
decides otherwise. The weights below were chosen on train requests (``policies/README.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numba
import numpy as np

from moesim.compiled import entry, kernel, load
from moesim.types import PROBABILITY_ONE, AnyArray, Gate, IntArray, LayerEvent

A = Any
"""An array; numba infers the rest."""

ONE = PROBABILITY_ONE

FADES = (8192, 14746, 16056)
"""What remains of a count at the next event of its layer, in 1/16384: 0.5, 0.9, 0.98."""

WEIGHTS = ((8, 4, 6, 7, 0), (2, 5, 3, 13, 8), (3, 4, 3, 15, 4))
"""In sixteenths, of the three faded counts, the frequency and the last pass: where memory alone
counts, with the last pass, and under the layers just passed."""

PASSED = 14
"""Weight of the layers just passed, in sixteenths, over their number."""

CALM = 4
"""So many imagined pairs say that an expert tells nothing of another."""

BIT = 1024
LEAST_BITS, BINS = -8, 64
"""``z`` is binned by quarters of a bit."""

IMAGINED, FULL = 32, 1 << 14
"""A bin begins with so many imagined trials, and halves its counts when it has so many."""

LATER, SOON = 0, 1
"""Rows of ``Odds.z``: any later event of the layer; its next event; then, d layer events ahead."""


class Odds(NamedTuple):
    """Everything that was counted, of L layers of E experts.

    An expert number E stands for what the model dropped.
    """

    faded: A
    """int64 [L, 3, E] in 1/16384."""
    uses: A
    """int64 [L, E], one imagined."""
    events: A
    """int64 [L]."""
    both: A
    """int32 [1 + lags, L, E + 1, E + 1]: pairs (earlier expert, expert); lag 0: the last pass."""
    given: A
    """int64 [1 + lags, L, E + 1]: of the earlier expert alone."""
    trials: A
    """int64 [2 + reach, L, BINS]."""
    used: A
    """int64 [2 + reach, L, BINS] in 1/16384 of a use."""
    z: A
    """int64 [2 + reach, L, E]: what was last said of the layer."""
    said: A
    """uint8 [2 + reach, L]: whether that waits to be judged."""
    base: A
    """int64 [L, E]: ``z`` before the layers just passed are heard."""
    shares: A
    """int64 [2 + reach, E] in 1/16384: probabilities by the last ``judge`` or ``foresee``."""
    table: A
    """int64 [1024]: log2(1 + i/1024)."""
    weights: A
    """int64 [3, 5]."""
    part: A
    """int64 [4, E]: room to work in; the last is whether an expert was used."""


def make_odds(layers: int, experts: int, reach: int, lags: int) -> Odds:
    """Nothing counted. ``lags``: how far back pairs go, in layer events."""
    middles = np.arange(BINS) / 4 + LEAST_BITS
    imagined = np.rint(ONE / (1 + np.exp2(-middles))).astype(np.int64) * IMAGINED
    bins = (2 + reach, layers, BINS)
    mantissas = np.arange(1024, 2048) / 1024
    return Odds(
        faded=np.zeros((layers, len(FADES), experts), np.int64),
        uses=np.ones((layers, experts), np.int64),
        events=np.full(layers, experts, np.int64),
        both=np.zeros((1 + lags, layers, experts + 1, experts + 1), np.int32),
        given=np.zeros((1 + lags, layers, experts + 1), np.int64),
        trials=np.full(bins, IMAGINED, np.int64),
        used=np.broadcast_to(imagined, bins).copy(),
        z=np.zeros((2 + reach, layers, experts), np.int64),
        said=np.zeros((2 + reach, layers), np.uint8),
        base=np.zeros((layers, experts), np.int64),
        shares=np.zeros((2 + reach, experts), np.int64),
        table=np.rint(np.log2(mantissas) * BIT).astype(np.int64),
        weights=np.array(WEIGHTS, np.int64),
        part=np.zeros((4, experts), np.int64),
    )


# ---- kernels -------------------------------------------------------------------------------------


@kernel
def _log2(o: Odds, number: int) -> int:
    """Of a positive integer, in 1/1024: its eleven leading bits count."""
    exponent = 10
    while number >= 2048:
        number >>= 1
        exponent += 1
    while number < 1024:
        number <<= 1
        exponent -= 1
    found: int = exponent * BIT + o.table[number - 1024]
    return found


@kernel
def _probability(o: Odds, row: int, layer: int, z: int) -> int:
    """By straight lines between the middles of bins."""
    place = min(max(z - LEAST_BITS * BIT, 0), (BINS - 1) * 256 - 1)
    low, part = place >> 8, place & 255
    trials, used = o.trials[row, layer], o.used[row, layer]
    below, above = used[low] // trials[low], used[low + 1] // trials[low + 1]
    found: int = (below * (256 - part) + above * part) >> 8
    return found


@kernel
def _judge_bins(o: Odds, row: int, layer: int) -> None:
    """Count what became of what was said."""
    trials, used = o.trials[row, layer], o.used[row, layer]
    for e in range(o.uses.shape[1]):
        place = min(max((o.z[row, layer, e] - LEAST_BITS * BIT + 128) >> 8, 0), BINS - 1)
        trials[place] += 1
        used[place] += o.part[3, e] * ONE
        if trials[place] >= FULL:
            trials[place] >>= 1
            used[place] >>= 1


def _settle(o: Odds, layer: int, local: A) -> None:
    """A layer's demand is known: what was said of it is judged, and memory learns.

    ``local`` : int64 [n], ids within the layer.
    """
    o.part[3, :] = 0
    for e in local:
        o.part[3, e] = 1
        o.uses[layer, e] += 1
    o.events[layer] += 1
    for row in range(o.said.shape[0]):
        if o.said[row, layer]:
            _judge_bins(o, row, layer)
            o.said[row, layer] = 0
    for i in range(3):
        for e in range(o.uses.shape[1]):
            o.faded[layer, i, e] = (o.faded[layer, i, e] * FADES[i] >> 14) + o.part[3, e] * ONE


def _pair(o: Odds, lag: int, layer: int, then: A, now: A) -> None:
    """Rows int64 [n, k] that follow each other: every expert with every earlier one."""
    for t in range(len(now)):
        for source in then[t]:
            o.given[lag, layer, source] += 1
            for e in now[t]:
                o.both[lag, layer, source, e] += 1


@kernel
def _hear_row(o: Odds, lag: int, layer: int, row: A, sums: A) -> None:
    """``sums`` += log2 of P(expert | earlier) / P(expert), over the earlier experts ``row``."""
    for source in row:
        given = o.given[lag, layer, source] + CALM
        for e in range(o.uses.shape[1]):
            uses = o.uses[layer, e]
            both = o.both[lag, layer, source, e] * o.events[layer] + CALM * uses
            sums[e] += _log2(o, (both << 10) // (given * uses) + 1) - 10 * BIT


@kernel
def _raise(most: A, sums: A, first: bool) -> None:
    """The most that any request's experts say."""
    for e in range(len(sums)):
        most[e] = sums[e] if first else max(most[e], sums[e])


def _judge(o: Odds, layer: int, rows: A) -> None:
    """What memory and the last pass say of a layer's next event; ``rows``: its newest."""
    most, sums = o.part[0], o.part[1]
    for s in range(len(rows)):
        sums[:] = 0
        _hear_row(o, 0, layer, rows[s], sums)
        _raise(most, sums, s == 0)
    share = _log2(o, o.events[layer])
    for e in range(o.uses.shape[1]):
        frequency = _log2(o, o.uses[layer, e]) - share
        for i in range(3):
            z = o.weights[i, 3] * frequency + o.weights[i, 4] * most[e]
            for j in range(3):
                z += o.weights[i, j] * (_log2(o, o.faded[layer, j, e] + ONE // 4) - 14 * BIT)
            if i == 2:
                o.base[layer, e] = z >> 4
            else:
                o.z[i, layer, e] = z >> 4
                o.shares[i, e] = _probability(o, i, layer, z >> 4)
    o.said[:2, layer] = 1


def _foresee(o: Odds, layer: int, trail: A, window: int, decode_from: int) -> None:
    """What the layers just passed say of those to come.

    ``trail`` : int64 [W, S, k], rows of the layer events just passed, newest first.
    """
    most, sums, total = o.part[0], o.part[1], o.part[2]
    for d in range(1, o.z.shape[0] - 1):
        target = layer + d
        if target >= len(o.events):
            target -= len(o.events) - decode_from
        total[:] = 0
        for w in range(trail.shape[0]):
            for s in range(trail.shape[1]):
                sums[:] = 0
                _hear_row(o, d + w, target, trail[w, s], sums)
                _raise(most, sums, s == 0)
            for e in range(len(total)):
                total[e] += most[e]
        for e in range(len(total)):
            z = o.base[target, e] + total[e] * PASSED // (16 * window)
            o.z[SOON + d, target, e] = z
            o.shares[SOON + d, e] = _probability(o, SOON + d, target, z)
        o.said[SOON + d, target] = 1


settle, pair = entry(_settle), entry(_pair)
judge, foresee = entry(_judge), entry(_foresee)


def load_all(o: Odds) -> None:
    """Compile what Python calls, or load it."""
    i, typeof = numba.int64, cast(Any, numba.typeof)
    kind, local, rows, trail = typeof(o), i[::1], i[:, ::1], i[:, :, ::1]
    load(
        (settle, (kind, i, local)),
        (pair, (kind, i, i, rows, rows)),
        (judge, (kind, i, rows)),
        (foresee, (kind, i, trail, i, i)),
    )


# ---- listening -----------------------------------------------------------------------------------


def rows_of(source: LayerEvent, experts: int) -> AnyArray:
    """int64 [T, k]: the tokens' experts; what was dropped is number ``experts``."""
    return np.minimum(source.token_experts, experts).astype(np.int64)


def newest(source: LayerEvent, rows: AnyArray) -> AnyArray:
    """int64 [S, k]: of each request its last token's."""
    if len(rows) == len(source.slots):
        return rows
    return np.ascontiguousarray(rows[[s.first + s.tokens - 1 for s in source.slots]])


class Listener:
    """Feeds gates to the counts.

    reach, window : layer events ahead of which ``foresee`` speaks, and by how many just passed.
    decode_from : first layer of a decoding pass.

    Pairs are counted by token and frequencies by layer event, which agree where one request
    decodes; in large batches the evidence of pairs falls below what bins can tell. A decoder's
    first layer follows an encoder in a prompt and the decoder's last one otherwise; both are
    counted together.
    """

    def __init__(
        self, layers: int, experts: int, reach: int = 0, window: int = 0, decode_from: int = 0
    ) -> None:
        self.reach, self.window = min(reach, layers - decode_from - 1), window
        self.decode_from = decode_from
        self.lags = self.reach + window - 1 if reach else 0
        self.experts = experts
        self.odds = make_odds(layers, experts, self.reach, self.lags)
        load_all(self.odds)
        self.last: list[dict[int, AnyArray]] = [{} for _ in range(layers)]
        """For each layer: request -> its newest token's experts there, int64 [1, k]."""
        self.trail: list[tuple[LayerEvent, AnyArray]] = []
        """The layer events of the requests now served, newest first, with their rows."""

    def hear(self, gate: Gate) -> None:
        """Learn what came and what it came after; say what may come of this layer."""
        source, layer = gate.source, gate.layer
        settle(self.odds, layer, gate.experts - layer * self.experts)
        rows = rows_of(source, self.experts)
        self._follow_last(source, rows)
        if self.reach:
            self._follow_trail(source, rows)
        judge(self.odds, layer, newest(source, rows))

    def foresee(self, layer: int) -> IntArray:
        """int64 [reach, E] in 1/16384: chances 1, 2, ... layer events ahead; read it at once."""
        passed = [newest(source, rows) for source, rows in self.trail[: self.window]]
        foresee(self.odds, layer, np.array(passed), self.window, self.decode_from)
        found: IntArray = self.odds.shares[SOON + 1 :]
        return found

    def forget_requests(self) -> None:
        """What comes next follows nothing: requests of the past have ended."""
        self.trail.clear()
        self.last = [{} for _ in self.last]

    def _follow_last(self, source: LayerEvent, rows: AnyArray) -> None:
        """Within a request tokens follow each other, the first its last of the pass before."""
        before, layer = self.last[source.layer], source.layer
        now: dict[int, AnyArray] = {}
        for slot in source.slots:
            mine = rows[slot.first : slot.first + slot.tokens]
            if slot.request in before:
                pair(self.odds, 0, layer, before[slot.request], mine[:1])
            if len(mine) > 1:
                pair(self.odds, 0, layer, mine[:-1], mine[1:])
            now[slot.request] = mine[-1:]
        self.last[layer] = now

    def _follow_trail(self, source: LayerEvent, rows: AnyArray) -> None:
        """Within a pass every token is its own witness; from one to the next, the newest is."""
        if self.trail and _requests(self.trail[0][0]) != _requests(source):
            self.trail.clear()
        for lag, (earlier, then) in enumerate(self.trail, 1):
            if earlier.step == source.step and len(then) == len(rows):
                pair(self.odds, lag, source.layer, then, rows)
            else:
                ends = newest(earlier, then), newest(source, rows)
                pair(self.odds, lag, source.layer, *ends)
        self.trail.insert(0, (source, rows))
        del self.trail[self.lags :]


def _requests(source: LayerEvent) -> Sequence[int]:
    return [slot.request for slot in source.slots]
