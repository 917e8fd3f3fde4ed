"""ProMoE (arXiv 2410.22134): a learned predictor for each layer, ``stride`` layers ahead.

A small network for each layer maps what the layer's gate sees to the experts of layer ``l + 2``
(section 4.1; stride 2, so that the predictor's own time is hidden). It is fitted beforehand by
``moesim fit --policy promoe`` and stored in an ``.npz`` file; ``moesim.fit`` says how.

ProMoE's input is the hidden state. A trace holds none, so the input here is what the trace has of
the gate: the probabilities of all experts, else the weights of the chosen ones, else the chosen
ones alone; of this layer, and of the ``history - 1`` before it in the same pass.

After the fit everything is rounded to integers: a prediction is two integer matrix products, exact
on every host (float64 below 2**53), a floor division and a comparison. Torch takes no part.

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

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import NotRunError, UsageError
from moesim.hashing import hash64
from moesim.policies.forecast import ForecastSeat, Foresight
from moesim.protocol import CacheView, World
from moesim.types import (
    PROBABILITY_ONE,
    AnyArray,
    ExpertId,
    Fact,
    Forecast,
    Gate,
    IntArray,
    IterationEnd,
    LayerEvent,
    Needs,
    Plan,
    RequestBegin,
    RequestEnd,
    State,
)

FORMAT = "moesim stride predictor 1"
NEEDS = {"gate": Needs.GATE, "weights": Needs.WEIGHTS, "experts": Needs.NONE}
"""Kinds of input, the most telling first."""

MOST_INPUT = 1 << 16
MOST_HIDDEN = 1 << 22
"""Where inputs (4 in 1/16384) and hidden values saturate, so that no sum reaches 2**53."""

DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    OverflowError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy and zipfile raise over bytes that are not what they should be."""

FIT = "moesim fit --policy promoe --trace TRACE --split 7:3 --out promoe.npz"
MEND = f"fit one with `{FIT}`, then give --split 7:3 --set prefetch.weights=promoe.npz"


# ---- kernels -------------------------------------------------------------------------------------


def outputs(
    inputs: AnyArray, w1: AnyArray, b1: AnyArray, scale: int, w2: AnyArray, b2: AnyArray
) -> IntArray:
    """Kernel: the network on integers, int64 [T, E].

    ``relu(inputs @ w1 + b1) // scale`` is the hidden layer, which ``w2`` and ``b2`` take further.
    All arguments are float64 arrays of whole numbers.
    """
    hidden = np.floor_divide(np.maximum(inputs @ w1 + b1, 0.0), float(scale))
    found: IntArray = (np.minimum(hidden, MOST_HIDDEN) @ w2 + b2).astype(np.int64)
    return found


def probabilities(found: IntArray, unit: int) -> IntArray:
    """Kernel: outputs as probabilities in 1/16384, rising with them; ``unit`` is the output 1."""
    half = PROBABILITY_ONE // 2
    shares: IntArray = half + half * found // (unit + np.abs(found))
    return shares


def chosen(found: IntArray, width: int) -> IntArray:
    """Kernel: experts among the best ``width`` of any token, best first; ties by lowest id."""
    best = np.argsort(-found, axis=1, kind="stable")[:, :width]
    named = np.unique(best)
    order: IntArray = named[np.argsort(-found.max(axis=0)[named], kind="stable")]
    return order


def fingerprint(request: int, layer: int, counts: IntArray) -> int:
    """Kernel: a request's share of a layer event in its fingerprint; shares are added mod 2**64.

    ``counts`` : tokens that chose each expert. The sum does not depend on how a pass was chunked.
    """
    named = np.flatnonzero(counts)
    words = hash64(request, layer, named) * counts[named].astype(np.uint64)
    return int(words.sum(dtype=np.uint64))


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
        """The file: a NumPy ``.npz`` without pickles. Equal predictors give equal bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, format=FORMAT, **asdict(self))
        return buffer.getvalue()


def load(path: Path) -> tuple[Predictor, str]:
    """Read a predictor, and the SHA-256 (hex) of its file.

    Raises
    ------
    UsageError
        If the file is missing, damaged, or none of ``moesim fit``'s.
    """
    where = f"prefetch.weights={path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}; {MEND}") from None
    return _parsed(data, where), hashlib.sha256(data).hexdigest()


def _parsed(data: bytes, where: str) -> Predictor:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except DAMAGED as error:
        told = str(error) or type(error).__name__
        raise UsageError(f"{where}: cannot be read ({told}); {MEND}") from None
    if str(found.pop("format", "")) != FORMAT:
        raise UsageError(f"{where}: was not written by this `moesim fit`; {MEND}")
    return _checked(found, where)


def _checked(found: Mapping[str, AnyArray], where: str) -> Predictor:
    names = [f.name for f in fields(Predictor)]
    if sorted(found) != sorted(names):
        raise UsageError(f"{where}: lacks or holds too many parts; {MEND}")
    plain: dict[str, Any] = {n: a.item() if a.ndim == 0 else a for n, a in found.items()}
    made = Predictor(**plain)
    problem = _problem(made)
    if problem:
        raise UsageError(f"{where}: {problem}; {MEND}")
    return made


def _problem(made: Predictor) -> str:
    """What is wrong with a predictor's parts; empty if nothing."""
    sizes = (made.layers, made.experts, made.stride, made.history)
    if not all(type(n) is int and n > 0 for n in sizes) or made.kind not in NEEDS:
        return "its sizes or its kind of input are no such"
    count, wide, experts = made.layers - made.stride, made.history * made.experts, made.experts
    hidden = np.shape(made.b1)[-1] if np.ndim(made.b1) == 2 else 0
    shapes = {
        "w1": (count, wide, hidden),
        "b1": (count, hidden),
        "scale": (count,),
        "w2": (count, hidden, experts),
        "b2": (count, experts),
        "unit": (count,),
        "samples": (count,),
    }
    for name, shape in shapes.items():
        array = getattr(made, name)
        if np.shape(array) != shape or array.dtype != np.int64:
            return f"{name} must be int64 {list(shape)}"
    if hidden < 1 or made.scale.min() < 1 or made.unit.min() < 1:
        return "scale and unit must be 1 or more"
    if made.requests.shape != made.prints.shape or made.prints.dtype != np.uint64:
        return "each of its requests must have a fingerprint"
    first = np.abs(made.w1).sum(axis=1).max() * MOST_INPUT + np.abs(made.b1).max()
    second = np.abs(made.w2).sum(axis=1).max() * MOST_HIDDEN + np.abs(made.b2).max()
    return "its numbers are too large to be exact" if max(first, second) >= 1 << 53 else ""


# ---- the seat ------------------------------------------------------------------------------------


@dataclass
class Stride(ForecastSeat):
    """Prefetches what a fitted predictor expects ``stride`` layers ahead.

    weights : the file that ``moesim fit`` wrote.
    digest : SHA-256 of that file; filled in, and compared where it is given.
    width : experts taken of each token; 0 takes the model's top k.
    cancel : whether a prefetch that its gate did not confirm is taken back while it moves.
    ops : multiply-adds charged for one layer's prediction.
    """

    name = "stride"
    weights: str = ""
    digest: str = ""
    width: int = 0
    cancel: bool = True
    ops: int = 200_000
    predictor: Predictor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Read the file; what it takes in is what the policy needs."""
        super().__post_init__()
        if self.width < 0:
            raise UsageError(f"prefetch.width={self.width}: must be 0 (top k) or more")
        if self.ops < 0:
            raise UsageError(f"prefetch.ops={self.ops}: must be 0 or more")
        if self.weights:
            self._load(Path(self.weights))

    def _load(self, path: Path) -> None:
        self.predictor, digest = load(path)
        if self.digest not in ("", digest):
            raise UsageError(
                f"prefetch.weights={path}: is not the file of digest {self.digest[:12]}; name that "
                "one, or leave out prefetch.digest"
            )
        self.digest = digest
        self.needs = NEEDS[self.predictor.kind]  # type: ignore[misc]

    def begin(self, world: World) -> None:
        """Refuse to run without a predictor, or with another model's."""
        fitted = self.predictor
        if fitted is None:
            raise NotRunError(f"not run: promoe needs a fitted predictor; {MEND}")
        if (fitted.layers, fitted.experts) != (world.layers, world.experts):
            raise UsageError(
                f"prefetch.weights={self.weights}: was fitted for {fitted.layers} layers of "
                f"{fitted.experts} experts, the trace has {world.layers} of {world.experts}; fit "
                "one on a trace of the same model"
            )
        self.fitted = fitted
        self.nets = _nets(fitted)
        self.known = set(fitted.prints.tolist())
        self.prints: dict[int, int] = {}
        """Requests in their first pass -> fingerprint so far."""
        self.recent = Recent(fitted.history, world.experts, fitted.kind)
        super().begin(world)

    # ---- prediction ------------------------------------------------------------------------------

    def foresee(self, fact: Fact) -> Foresight | None:
        """After each gate, of the layer ``stride`` on."""
        if isinstance(fact, RequestBegin):
            self.prints[fact.request] = 0
        elif isinstance(fact, IterationEnd | RequestEnd):
            self._refuse_known(fact.request)
        if not isinstance(fact, Gate):
            return None
        self._identify(fact.source)
        inputs = self.recent.inputs(fact.source)
        net = self.nets.get(fact.layer)
        return None if net is None else self._foresight(net(inputs), fact.layer)

    def _foresight(self, found: IntArray, layer: int) -> Foresight:
        width = self.width or self.world.top_k
        shares = probabilities(found, int(self.fitted.unit[layer])).max(axis=0)
        forecast = Forecast(layer + self.fitted.stride, shares, chosen(found, width))
        return Foresight([forecast], self.ops, 0)

    # ---- honesty ---------------------------------------------------------------------------------

    def _identify(self, source: LayerEvent) -> None:
        for slot in source.slots:
            if slot.request in self.prints:
                named = source.token_experts[slot.first : slot.first + slot.tokens].reshape(-1)
                counts = np.bincount(named[named < self.world.experts])
                share = fingerprint(slot.request, source.layer, counts)
                self.prints[slot.request] = (self.prints[slot.request] + share) % (1 << 64)

    def _refuse_known(self, request: int) -> None:
        if self.prints.pop(request, -1) not in self.known:
            return
        split = self.fitted.split.removesuffix("@0")
        mend = f"serve the others alone with --split {split}"
        raise NotRunError(
            f"not run: {self.weights} was fitted on request {request}, which this run serves; "
            f"{mend if split else f'fit on a part of the trace, with `{FIT}`'}"
        )

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


class _Net:
    """One layer's network, as the kernel takes it."""

    def __init__(self, fitted: Predictor, layer: int) -> None:
        parts = (fitted.w1, fitted.b1, fitted.w2, fitted.b2)
        self._w1, self._b1, self._w2, self._b2 = (p[layer].astype(np.float64) for p in parts)
        self._scale = int(fitted.scale[layer])

    def __call__(self, inputs: AnyArray) -> IntArray:
        return outputs(inputs, self._w1, self._b1, self._scale, self._w2, self._b2)


def _nets(fitted: Predictor) -> dict[int, _Net]:
    return {layer: _Net(fitted, layer) for layer in np.flatnonzero(fitted.samples).tolist()}
