"""A predictor over tokens, in the manner of MoE-Beyond (Gavhane et al., arXiv 2508.17137).

MoE-Beyond fits a small transformer on recorded activations: from a token's embedding and a layer's
number it predicts, as a multi-label problem, which experts the token will activate there. It is
simulated only, at batch 1; neither how its predictions reach a cache, nor what they cost, is said.

Here a small network for each layer (one hidden layer, as ProMoE's) stands for the transformer, and
sees what a trace holds of the same facts:

- the embedding of the token, scaled to a root mean square of 1 and cut at 4; left out where the
  trace has none;
- which experts the layer chose for the request's last token, and how often for those before it
  (halved every four tokens or so): the sequence that the transformer attends to;
- which experts the layer ``distance`` before it chose for this token; none for the first layers,
  which are predicted when the pass begins.

``moesim fit --policy moe-beyond`` trains it, rounds it to integers and stores it; the requests that
it was fitted on are refused (``moesim.policies.fitted`` has both). A forecast is made for decoding
passes alone, as there; it is delivered by a background job of as many operations as the networks
have weights. Under it lies LRU, evicting whatever is predicted or not, as in the paper's baseline.

Choices where the source is silent: a token names its best ``width`` experts (0: the model's top k);
a prompt counts as one token that chose each expert as often as its tokens did on average, however
it was cut into chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.errors import UsageError
from moesim.policies.fitted import MOST_INPUT, FittedSeat, mend, packed, read, wrong_networks
from moesim.policies.forecast import Foresight
from moesim.protocol import World
from moesim.types import (
    PROBABILITY_ONE,
    AnyArray,
    Fact,
    Forecast,
    Gate,
    IntArray,
    IterationBegin,
    LayerEvent,
    Needs,
    Phase,
    RequestEnd,
    Slot,
)

FORMAT = "moesim token predictor 1"
ONE = PROBABILITY_ONE
FADE_SHIFT = 3
"""A layer's counts lose one eighth at each token."""

FIT = "moesim fit --policy moe-beyond --trace TRACE --split 7:3 --out moe-beyond.npz"
MEND = mend(FIT, "moe-beyond.npz")


# ---- what it sees --------------------------------------------------------------------------------


def levelled(vector: AnyArray | None, wide: int) -> IntArray:
    """Kernel: an embedding at a root mean square of 1, in 1/16384, cut at 4; zeros for None."""
    if vector is None or not wide:
        return np.zeros(wide, np.int64)
    values = vector.astype(np.int64)
    size = max(1, math.isqrt(sum(int(v) * int(v) for v in values.tolist()) // len(values)))
    return np.clip(values * ONE // size, -MOST_INPUT, MOST_INPUT)


def counted(rows: AnyArray, experts: int) -> IntArray:
    """Kernel: int64 [E], how many of the tokens [T, k] chose each expert."""
    named = rows.reshape(-1)
    return np.bincount(named[named < experts], minlength=experts).astype(np.int64)


def shares(counts: IntArray, tokens: int) -> IntArray:
    """Kernel: int64 [E] in 1/16384, the share of tokens that chose each expert."""
    return counts * ONE // max(1, tokens)


def faded(before: IntArray, now: IntArray) -> IntArray:
    """Kernel: a running mean, in 1/16384."""
    return before + ((now - before) >> FADE_SHIFT)


class Sight:
    """What the networks see of one request: of every layer, the last token and those before it."""

    def __init__(self, layers: int, experts: int, distance: int, wide: int) -> None:
        self._distance, self._wide = distance, wide
        self.embedding = np.zeros(wide, np.int64)
        self.last = np.zeros((layers, experts), np.int64)
        self.often = np.zeros((layers, experts), np.int64)
        self.here = np.zeros((layers, experts), np.int64)
        """Of this pass alone."""
        self._counts = np.zeros((layers, experts), np.int64)
        self._tokens = [0] * layers
        """Of this pass so far: a prompt may come in chunks."""
        self._before = np.zeros((layers, experts), np.int64)
        """``often``, when a layer was first seen in this pass."""

    def begin(self, embedding: AnyArray | None) -> None:
        """A forward pass."""
        self.embedding = levelled(embedding, self._wide)
        self.here[:] = self._counts[:] = 0
        self._tokens = [0] * len(self._tokens)

    def inputs(self, layer: int) -> IntArray:
        """int64 [F] in 1/16384: what the network of a layer sees now."""
        before = layer - self._distance
        near = self.here[before] if before >= 0 else np.zeros_like(self.last[layer])
        return np.concatenate((self.embedding, self.last[layer], self.often[layer], near))

    def see(self, layer: int, rows: AnyArray) -> None:
        """What a layer has chosen for tokens of this pass, [T, k]."""
        if not self._tokens[layer]:
            self._before[layer] = self.often[layer]
        self._counts[layer] += counted(rows, self.last.shape[1])
        self._tokens[layer] += len(rows)
        now = shares(self._counts[layer], self._tokens[layer])
        self.last[layer] = self.here[layer] = now
        before = self._before[layer]
        self.often[layer] = faded(before, now) if before.any() else now


def wide_of(experts: int, embedding: int) -> int:
    """Inputs of a network."""
    return embedding + 3 * experts


# ---- the file ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenNets:
    """A fitted network for each layer (``moesim.policies.fitted.Networks`` has the rest).

    embedding : components of an embedding, 0 for none. distance : layers before, see the module.
    """

    layers: int
    experts: int
    distance: int
    embedding: int
    trace: str
    split: str
    requests: AnyArray
    prints: AnyArray
    w1: AnyArray
    b1: AnyArray
    scale: AnyArray
    w2: AnyArray
    b2: AnyArray
    unit: AnyArray
    samples: AnyArray

    def to_bytes(self) -> bytes:
        """The file. Equal predictors give equal bytes."""
        return packed(self, FORMAT)

    def problem(self) -> str:
        """What is wrong with its parts; empty if nothing."""
        sizes = (self.layers, self.experts, self.distance, self.embedding + 1)
        if not all(type(n) is int and n > 0 for n in sizes):
            return "its sizes are no such"
        return wrong_networks(self, self.layers, wide_of(self.experts, self.embedding))


def load(path: Path) -> tuple[TokenNets, str]:
    """Read a predictor, and the SHA-256 (hex) of its file.

    Raises
    ------
    UsageError
        If the file is missing, damaged, or none of ``moesim fit``'s.
    """
    return read(path, TokenNets, FORMAT, MEND)


# ---- the seat ------------------------------------------------------------------------------------


@dataclass
class TokenNet(FittedSeat[TokenNets]):
    """Prefetches what fitted networks expect of a token, from its embedding and its request.

    weights : the file that ``moesim fit --policy moe-beyond`` wrote.
    digest : SHA-256 of that file; filled in, and compared where it is given.
    width : experts taken of each token; 0 takes the model's top k.
    """

    name = "token-net"
    source = "arXiv 2508.17137"
    cost = "O(T F H) for F = d + 3 E"
    version = 2
    policy, fit, mend = "moe-beyond", FIT, MEND

    def stored(self, path: Path) -> tuple[TokenNets, str]:
        """Read a file."""
        return load(path)

    def reads(self, predictor: TokenNets) -> Needs:
        """Embeddings, where it was fitted on them."""
        return Needs.EMBEDDING if predictor.embedding else Needs.NONE

    def begin(self, world: World) -> None:
        """Refuse to run without a predictor, or with another model's."""
        super().begin(world)
        self.sights: dict[int, Sight] = {}

    def foresee(self, fact: Fact) -> Foresight | None:
        """The first layers when a pass begins, after each gate the layer ``distance`` on."""
        self.known.hear(fact)
        if isinstance(fact, IterationBegin):
            return self._at_begin(fact)
        if isinstance(fact, RequestEnd):
            self.sights.pop(fact.request, None)
        return self._at_gate(fact.source) if isinstance(fact, Gate) else None

    def _at_begin(self, fact: IterationBegin) -> Foresight | None:
        sight = self._sight_of(fact.request)
        sight.begin(self._fitting(fact.embedding))
        if fact.phase == Phase.PREFILL:
            return None
        first = self.world.decode_from
        targets = range(first, min(first + self.fitted.distance, self.world.layers))
        forecasts = [self._forecast(la, [sight]) for la in targets if la in self.nets]
        return self._costed(forecasts, 1) if forecasts else None

    def _at_gate(self, source: LayerEvent) -> Foresight | None:
        decoding: list[Sight] = []
        for slot in source.slots:
            sight = self._seen(slot, source)
            if slot.phase == Phase.DECODE:
                decoding.append(sight)
        target = source.layer + self.fitted.distance
        if not decoding or target not in self.nets:
            return None
        return self._costed([self._forecast(target, decoding)], len(decoding))

    def _seen(self, slot: Slot, source: LayerEvent) -> Sight:
        sight = self._sight_of(slot.request)
        sight.see(source.layer, source.token_experts[slot.first : slot.first + slot.tokens])
        return sight

    def _sight_of(self, request: int) -> Sight:
        fitted = self.fitted
        if request not in self.sights:
            shape = (fitted.layers, fitted.experts, fitted.distance, fitted.embedding)
            self.sights[request] = Sight(*shape)
        return self.sights[request]

    def _fitting(self, embedding: AnyArray | None) -> AnyArray | None:
        wide = self.fitted.embedding
        if embedding is not None and wide and len(embedding) != wide:
            raise UsageError(
                f"prefetch.weights={self.weights}: was fitted on embeddings of {wide} components, "
                f"the trace's have {len(embedding)}; fit one on a trace of the same model"
            )
        return embedding

    def _forecast(self, layer: int, sights: list[Sight]) -> Forecast:
        inputs = np.stack([sight.inputs(layer) for sight in sights]).astype(np.float64)
        return self.expected(inputs, layer, layer)

    def _costed(self, forecasts: list[Forecast], tokens: int) -> Foresight:
        weights = self.fitted.w1[0].size + self.fitted.w2[0].size
        return Foresight(forecasts, len(forecasts) * tokens * weights, 0)
