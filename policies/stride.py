"""ProMoE (arXiv 2410.22134): a learned predictor for each layer, ``stride`` layers ahead.

A small network for each layer maps what the layer's gate sees to the experts of layer ``l + 2``
(section 4.1; stride 2, so that the predictor's own time is hidden). It is fitted beforehand by
``moesim fit --policy promoe`` and stored in an ``.npz`` file; ``moesim.fitting`` says how.

ProMoE's input is the hidden state. A trace holds none, so the input here is what the trace has of
the gate: the probabilities of all experts, else the weights of the chosen ones, else the chosen
ones alone; of this layer, and of the ``history - 1`` before it in the same pass.

After the fit everything is rounded to integers (``moesim.policies.fitted``): a prediction is exact
on every host. Torch takes no part.

What else ProMoE is made of, and where it is found:

- prefetching off the critical path (section 4.1): a background job of ``ops`` multiply-adds, by
  default 200 000, the paper's 200 us at the shipped profiles' 10**9 a second;
- chunked transfers: ``chunk_bytes`` of the hardware profile (the paper: a third of an expert);
- early pre-emption (section 4.2): demand overtakes prefetches at the end of a chunk in every run;
  ``cancel`` takes back, at a gate, what it did not confirm and is still under way;
- reordered execution (section 4.3): ``--order ready``, the default;
- its cache: LRU.

Choices where the source is silent: of each token the best ``width`` experts are taken (the model's
top k), and of several tokens or requests an expert's largest probability counts. A layer's first
``stride`` layers have no predictor and are not prefetched. Probabilities are 1/2 + z / (2 + 2|z|)
of the network's output z, which ranks as its sigmoid does and is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moesim.errors import UsageError
from moesim.policies.fitted import MOST_INPUT, FittedSeat, mend, packed, read, wrong_networks
from moesim.policies.forecast import Foresight
from moesim.protocol import CacheView, World
from moesim.types import (
    PROBABILITY_ONE,
    AnyArray,
    ExpertId,
    Fact,
    Gate,
    LayerEvent,
    Needs,
    Plan,
    State,
)

FORMAT = "moesim stride predictor 1"
NEEDS = {"gate": Needs.GATE, "weights": Needs.WEIGHTS, "experts": Needs.NONE}
"""Kinds of input, the most telling first."""

FIT = "moesim fit --policy promoe --trace TRACE --split 7:3 --out promoe.npz"
MEND = mend(FIT, "promoe.npz")


# ---- what a layer sees ---------------------------------------------------------------------------


def inputs_of(event: LayerEvent, experts: int, kind: str) -> AnyArray:
    """What a layer's gate saw and said: float64 [T, E] whole numbers in 1/16384."""
    if kind == "gate":
        assert event.gate is not None
        return np.minimum(event.gate, MOST_INPUT).astype(np.float64)
    named = event.token_experts
    made = np.zeros((len(named), experts + 1))
    values: AnyArray = np.full(named.shape, PROBABILITY_ONE // max(1, named.shape[1]))
    if kind == "weights":
        assert event.weights is not None
        values = np.clip(event.weights, 0, MOST_INPUT)
    np.put_along_axis(made, np.minimum(named, experts).astype(np.int64), values, axis=1)
    return made[:, :experts]


# ---- the file ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Predictor:
    """Fitted networks, one for each layer that has a layer ``stride`` on.

    P networks; F = history * experts inputs, H hidden units, E experts.

    trace, split : digest of the trace that they were fitted on, and how it was cut ("" if not).
    requests, prints : int64 [n] the requests they were fitted on, uint64 [n] their fingerprints.
    w1, b1 : int64 [P, F, H], [P, H]. w2, b2 : int64 [P, H, E], [P, E].
    scale, unit : int64 [P], divisor of the hidden layer, and the output that stands for 1.
    samples : int64 [P], tokens that each was fitted on; without any it predicts nothing.
    """

    layers: int
    experts: int
    stride: int
    history: int
    kind: str
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
        sizes = (self.layers, self.experts, self.stride, self.history)
        if not all(type(n) is int and n > 0 for n in sizes) or self.kind not in NEEDS:
            return "its sizes or its kind of input are no such"
        return wrong_networks(self, self.layers - self.stride, self.history * self.experts)


def load(path: Path) -> tuple[Predictor, str]:
    """Read a predictor, and the SHA-256 (hex) of its file.

    Raises
    ------
    UsageError
        If the file is missing, damaged, or none of ``moesim fit``'s.
    """
    return read(path, Predictor, FORMAT, MEND)


# ---- the seat ------------------------------------------------------------------------------------


@dataclass
class Stride(FittedSeat[Predictor]):
    """Prefetches what a fitted predictor expects ``stride`` layers ahead.

    weights : the file that ``moesim fit`` wrote.
    digest : SHA-256 of that file; filled in, and compared where it is given.
    width : experts taken of each token; 0 takes the model's top k.
    cancel : whether a prefetch that its gate did not confirm is taken back while it moves.
    ops : multiply-adds charged for one layer's prediction.
    """

    name = "stride"
    source = "arXiv 2410.22134, section 4"
    cost = "O(T F H) for F = history E"
    policy, fit, mend = "promoe", FIT, MEND
    cancel: bool = True
    ops: int = 200_000

    def __post_init__(self) -> None:
        """Read the file."""
        super().__post_init__()
        if self.ops < 0:
            raise UsageError(f"prefetch.ops={self.ops}: must be 0 or more")

    def stored(self, path: Path) -> tuple[Predictor, str]:
        """Read a file."""
        return load(path)

    def reads(self, predictor: Predictor) -> Needs:
        """The kind of its input."""
        return NEEDS[predictor.kind]

    def begin(self, world: World) -> None:
        """Refuse to run without a predictor, or with another model's."""
        super().begin(world)
        self.recent = Recent(self.fitted.history, world.experts, self.fitted.kind)

    # ---- prediction ------------------------------------------------------------------------------

    def foresee(self, fact: Fact) -> Foresight | None:
        """After each gate, of the layer ``stride`` on."""
        self.known.hear(fact)
        if not isinstance(fact, Gate):
            return None
        inputs = self.recent.inputs(fact.source)
        if fact.layer not in self.nets:
            return None
        forecast = self.expected(inputs, fact.layer, fact.layer + self.fitted.stride)
        return Foresight([forecast], self.ops, 0)

    # ---- early pre-emption -----------------------------------------------------------------------

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """Take back what a gate refutes, then plan as every forecast does."""
        refuted = self._refuted(fact, cache) if self.cancel and isinstance(fact, Gate) else []
        plan = super().plan(fact, cache)
        return replace(plan, cancel=[*refuted, *plan.cancel]) if refuted else plan

    def _refuted(self, gate: Gate, cache: CacheView) -> list[ExpertId]:
        demanded = set(gate.experts.tolist())
        due = [e for e, (_, event) in self._wished.items() if event <= gate.event]
        return [e for e in due if e not in demanded and cache.states[e] == State.IN_FLIGHT]


class Recent:
    """The inputs of the newest layers of the step under way."""

    def __init__(self, history: int, experts: int, kind: str) -> None:
        self._history = history
        self._experts = experts
        self._kind = kind
        self._step = -1
        self._seen: dict[int, AnyArray] = {}

    def inputs(self, event: LayerEvent) -> AnyArray:
        """float64 [T, history * E]: this layer's, then those of the layers before.

        Zeros stand for a layer that this pass did not run, or not with the same tokens.
        """
        if event.step != self._step:
            self._step, self._seen = event.step, {}
        now = self._seen[event.layer] = inputs_of(event, self._experts, self._kind)
        parts = [now]
        for back in range(1, self._history):
            before = self._seen.get(event.layer - back)
            alike = before is not None and len(before) == len(now)
            parts.append(before if alike and before is not None else np.zeros_like(now))
        return np.concatenate(parts, axis=1)
