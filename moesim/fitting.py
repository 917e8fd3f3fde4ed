"""What a policy learns before it serves: predictors of ProMoE and MoE-Beyond, fitted on a trace.

A network for each layer (one hidden layer of rectified units, one logit an expert) is trained in
NumPy with Adam on the binary cross-entropy of the experts that each token chose, and then rounded
to integers. Samples are made by the same code that will make the predictions: for ProMoE of the
gates ``stride`` layers before (``moesim.policies.stride``), for MoE-Beyond of the token and its
request (``moesim.policies.token_net``). The same trace, options and seed give the same file on the
same machine; another machine's float32 products may round otherwise.

ProMoE (arXiv 2410.22134, section 4.1) gives neither the width of its networks, nor their loss, nor
how they are trained. MoE-Beyond (arXiv 2508.17137) trains a transformer with the same loss; a
network of one layer does not need a GPU for it. The rest are the choices made here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from moesim.errors import NotRunError, TraceError, UsageError
from moesim.past import TEST, TRAIN, Share, Split, requests_of
from moesim.policies.fitted import fingerprint, outputs
from moesim.policies.stride import NEEDS, Predictor, Recent
from moesim.policies.token_net import Sight, TokenNets, wide_of
from moesim.traces.check import check_request
from moesim.traces.reader import Columns, TraceReader
from moesim.traces.schema import TraceMeta
from moesim.types import PROBABILITY_ONE, AnyArray, IntArray, LayerEvent, Needs, Phase
from moesim.workload import Inputs, StaticBatch, Step, Work, layer_events, prepare, timeless_steps

BATCH = 256
RATE, DECAY_1, DECAY_2, TINY = 3e-3, 0.9, 0.999, 1e-8
"""Adam (Kingma and Ba, 2015), with three times its customary rate."""

MOST_WEIGHT = (1 << 15) - 1
HIDDEN_ONE = 1 << 12
"""A hidden value of 1 becomes about this integer."""

POLICIES: dict[str, dict[str, Needs]] = {
    "promoe": NEEDS,
    "moe-beyond": {"embedding": Needs.EMBEDDING, "experts": Needs.NONE},
}
"""What can be fitted -> kinds of input and what they need, the most telling first."""

Fitted: TypeAlias = Predictor | TokenNets

Progress = Callable[[str, int, int], None]
"""Called with (what is done, how many are done, how many there are)."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to fit, and on what. Names are those of the command line.

    split : fit on its train part alone; None: on the whole trace.
    stride : how many layers ahead it predicts. history : layers that ProMoE's networks see.
    kind : of input (``POLICIES``); "" takes the first that the trace has.
    """

    trace: Path
    split: Split | None = None
    limit: int | None = None
    stride: int = 2
    history: int = 2
    hidden: int = 128
    epochs: int = 10
    kind: str = ""
    seed: int = 0
    policy: str = "promoe"


@dataclass(slots=True)
class Samples:
    """Tokens of one part of a trace: for each source layer what its gate saw, and what came.

    inputs : lists of whole numbers [T, F] by network. chosen : lists of uint16 [T, k] by network.
    """

    inputs: dict[int, list[AnyArray]] = field(default_factory=dict)
    chosen: dict[int, list[AnyArray]] = field(default_factory=dict)
    prints: dict[int, int] = field(default_factory=dict)
    """Request -> fingerprint of its first pass."""

    def of(self, layer: int) -> tuple[AnyArray, AnyArray]:
        """All tokens of a network."""
        return np.concatenate(self.inputs[layer]), np.concatenate(self.chosen[layer])


def fit(request: Request, progress: Progress | None = None) -> tuple[Fitted, dict[str, Any]]:
    """A predictor, and what it is worth: recall of the experts that tokens chose.

    Raises
    ------
    MoesimError
        For a mistake in the request or the trace.
    """
    _refuse_numbers(request)
    meta = _meta(request)
    kind = _kind(request, meta)
    train = _samples(request, meta, kind, TRAIN, progress)
    if not train.inputs:
        raise TraceError(
            f"{request.trace}: has nothing to fit {request.policy} on; record requests that decode"
        )
    nets = _train(request, meta, train, progress)
    predictor = _joined(request, meta, kind, train, nets)
    worth = {"train": recall(predictor, train, meta.top_k, popular_of=train)}
    if request.split is not None:
        test = _samples(request, meta, kind, TEST, progress)
        worth["test"] = recall(predictor, test, meta.top_k, popular_of=train)
    return predictor, {
        "input": kind,
        "requests": len(train.prints),
        "tokens": int(predictor.samples.max()),
        "recall": worth,
    }


def save(predictor: Fitted, path: Path) -> None:
    """Write the file whole, or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(predictor.to_bytes())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def recall(
    predictor: Fitted, samples: Samples, width: int, popular_of: Samples
) -> dict[str, float]:
    """Share of the chosen experts that are among ``width`` named ones: named by the predictor, and
    by how often the layer chose each in ``popular_of``."""
    hits = {"predictor": 0, "popular": 0}
    wanted = 0
    for layer in samples.inputs:
        inputs, chosen = samples.of(layer)
        truth = _hot(chosen, predictor.experts)
        found = _found(predictor, layer, inputs)
        often = _hot(popular_of.of(layer)[1], predictor.experts).sum(axis=0)
        for name, score in (("predictor", found), ("popular", often[None])):
            best = np.argsort(-score, axis=1, kind="stable")[:, :width]
            named = np.broadcast_to(best, (len(truth), best.shape[1]))
            hits[name] += int(np.take_along_axis(truth, named, axis=1).sum())
        wanted += int(truth.sum())
    return {name: count / max(1, wanted) for name, count in hits.items()}


# ---- samples -------------------------------------------------------------------------------------


def _refuse_numbers(request: Request) -> None:
    if request.policy not in POLICIES:
        raise UsageError(f"--policy {request.policy}: learns nothing; fit {' or '.join(POLICIES)}")
    for name in ("stride", "history", "hidden", "epochs"):
        most = 1024 if name in ("stride", "history") else 1 << 16
        if not 1 <= getattr(request, name) <= most:
            raise UsageError(f"--{name} {getattr(request, name)}: must lie between 1 and {most}")


def _meta(request: Request) -> TraceMeta:
    with TraceReader(request.trace, Columns.experts_only()) as reader:
        meta = reader.meta
    if not meta.requests:
        raise TraceError(f"{request.trace}: holds no requests; record or convert some")
    if request.stride >= meta.layers:
        raise UsageError(
            f"--stride {request.stride}: the trace has {meta.layers} layers; look fewer ahead"
        )
    return meta


def _kind(request: Request, meta: TraceMeta) -> str:
    kinds = POLICIES[request.policy]
    there = {
        "gate": meta.has_gate,
        "weights": meta.has_weights,
        "embedding": meta.embedding == "iteration",
        "experts": True,
    }
    if not request.kind:
        return next(kind for kind in kinds if there[kind])
    if request.kind not in kinds:
        raise UsageError(
            f"--input {request.kind}: is nothing that {request.policy} sees; choose "
            f"{' or '.join(kinds)}"
        )
    if not there[request.kind]:
        raise NotRunError(
            f"not run: --input {request.kind} needs {request.kind.upper()}, which this trace lacks;"
            " leave it out to take what there is"
        )
    return request.kind


def _samples(
    request: Request, meta: TraceMeta, kind: str, part: str, progress: Progress | None
) -> Samples:
    """The tokens of one part of the trace."""
    made = Samples()
    pupil = _pupil(request, meta, kind)
    works = _works(request, meta, kind, part, progress)
    for step in timeless_steps(works, StaticBatch()):
        pupil.begin(step)
        first = step.parts[0].number == 0
        for item in layer_events(step, 0, meta.experts):
            pupil.sample(made, item.event)
            if first:
                _identify(made, item.event, meta.experts)
    return made


def _works(
    request: Request, meta: TraceMeta, kind: str, part: str, progress: Progress | None
) -> Iterator[Work]:
    inputs = Inputs(POLICIES[request.policy][kind])
    share = None if request.split is None else Share(request.split, part)
    with TraceReader(request.trace, replace(inputs.columns(), weights=True)) as reader:
        for index, rows in enumerate(islice(requests_of(reader, share), request.limit)):
            check_request(rows, meta, request.trace)
            work = prepare(index, rows, meta, inputs)
            work.arrival_ns = None
            yield work
            if progress is not None:
                progress(f"read {part} requests", index + 1, meta.requests)


class _Pupil(Protocol):
    """Makes samples of what a policy will see."""

    def begin(self, step: Step) -> None:
        """A forward pass of one request."""

    def sample(self, made: Samples, source: LayerEvent) -> None:
        """A layer event, as what should have been foreseen and as what later ones follow from."""


def _pupil(request: Request, meta: TraceMeta, kind: str) -> _Pupil:
    if request.policy == "promoe":
        return _StridePupil(Recent(request.history, meta.experts, kind), request.stride)
    return _TokenPupil(meta, request.stride, kind == "embedding")


class _StridePupil:
    """What a layer's gate saw, and what came ``stride`` layers on."""

    def __init__(self, recent: Recent, stride: int) -> None:
        self._recent, self._stride = recent, stride
        self._before: dict[int, AnyArray] = {}

    def begin(self, step: Step) -> None:
        self._before.clear()

    def sample(self, made: Samples, source: LayerEvent) -> None:
        self._before[source.layer] = self._recent.inputs(source)
        layer = source.layer - self._stride
        inputs = self._before.get(layer)
        if inputs is not None and len(inputs) == len(source.token_experts):
            saturated = np.minimum(inputs, (1 << 16) - 1).astype(np.uint16)
            _keep(made, layer, saturated, source)


class _TokenPupil:
    """What the request had shown of a layer, and what it chose for a decoded token."""

    def __init__(self, meta: TraceMeta, distance: int, embedded: bool) -> None:
        self._shape = meta.layers, meta.experts, distance
        self._embedded = embedded
        self._sight = Sight(*self._shape, 0)

    def begin(self, step: Step) -> None:
        part = step.parts[0]
        vector = part.work.embedding(part.number)
        if part.number == 0:
            wide = len(vector) if self._embedded and vector is not None else 0
            self._sight = Sight(*self._shape, wide)
        self._sight.begin(vector)

    def sample(self, made: Samples, source: LayerEvent) -> None:
        if source.slots[0].phase == Phase.DECODE:
            inputs = self._sight.inputs(source.layer)[None].astype(np.int32)
            _keep(made, source.layer, inputs, source)
        self._sight.see(source.layer, source.token_experts)


def _keep(made: Samples, number: int, inputs: AnyArray, target: LayerEvent) -> None:
    """One layer event as what network ``number`` should have foreseen from ``inputs``."""
    made.inputs.setdefault(number, []).append(inputs)
    made.chosen.setdefault(number, []).append(np.array(target.token_experts))


def _identify(made: Samples, source: LayerEvent, experts: int) -> None:
    named = source.token_experts.reshape(-1)
    request = source.slots[0].request
    share = fingerprint(request, source.layer, np.bincount(named[named < experts]))
    made.prints[request] = (made.prints.get(request, 0) + share) % (1 << 64)


def _hot(chosen: AnyArray, experts: int) -> AnyArray:
    """uint8 [T, E]: 1 where an expert was chosen."""
    hot = np.zeros((len(chosen), experts + 1), np.uint8)
    np.put_along_axis(hot, np.minimum(chosen, experts).astype(np.int64), 1, axis=1)
    return hot[:, :experts]


# ---- training ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Net:
    """float32 parameters of one layer's network, in the order in which they are used."""

    w1: AnyArray
    b1: AnyArray
    w2: AnyArray
    b2: AnyArray

    def all(self) -> list[AnyArray]:
        return [self.w1, self.b1, self.w2, self.b2]


def _train(
    request: Request, meta: TraceMeta, samples: Samples, progress: Progress | None
) -> dict[int, _Net]:
    nets: dict[int, _Net] = {}
    for layer in sorted(samples.inputs):
        inputs, chosen = samples.of(layer)
        rng = np.random.default_rng([request.seed, layer])
        net = nets[layer] = _begun(rng, inputs.shape[1], request.hidden, chosen, meta.experts)
        if request.policy != "promoe":
            net.w1 /= _length(inputs)
        adam = _Adam(net.all())
        for epoch in range(request.epochs):
            _epoch(net, adam, inputs, chosen, rng)
            if progress is not None:
                done = (len(nets) - 1) * request.epochs + epoch + 1
                progress("fitted epochs", done, len(samples.inputs) * request.epochs)
    return nets


def _begun(
    rng: np.random.Generator, wide: int, hidden: int, chosen: AnyArray, experts: int
) -> _Net:
    """Random first layers; the output begins at how often each expert is chosen."""
    often = (_hot(chosen, experts).sum(axis=0) + 1) / (len(chosen) + 2)
    return _Net(
        w1=rng.standard_normal((wide, hidden), np.float32),
        b1=np.zeros(hidden, np.float32),
        w2=rng.standard_normal((hidden, experts), np.float32) / np.float32(np.sqrt(hidden)),
        b2=np.log(often / (1 - np.minimum(often, 0.999))).astype(np.float32),
    )


def _length(inputs: AnyArray) -> np.float32:
    """Of an input on average; ProMoE's, which are probabilities, have about 1."""
    return np.float32(max(1.0, np.sqrt(np.square(inputs / PROBABILITY_ONE).sum(axis=1).mean())))


def _epoch(
    net: _Net, adam: _Adam, inputs: AnyArray, chosen: AnyArray, rng: np.random.Generator
) -> None:
    order = rng.permutation(len(inputs))
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        batch = inputs[rows].astype(np.float32) / np.float32(PROBABILITY_ONE)
        adam.step(gradients(net, batch, _hot(chosen[rows], net.b2.shape[0])))


def gradients(net: _Net, inputs: AnyArray, truth: AnyArray) -> list[AnyArray]:
    """Of the binary cross-entropy, summed over experts and averaged over tokens."""
    hidden = np.maximum(inputs @ net.w1 + net.b1, 0)
    logits = np.clip(hidden @ net.w2 + net.b2, -30, 30)
    error = (1 / (1 + np.exp(-logits)) - truth) / np.float32(len(inputs))
    back = (error @ net.w2.T) * (hidden > 0)
    return [inputs.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]


class _Adam:
    """Adam over a list of arrays, changed in place."""

    def __init__(self, parameters: list[AnyArray]) -> None:
        self._parameters = parameters
        self._mean = [np.zeros_like(p) for p in parameters]
        self._square = [np.zeros_like(p) for p in parameters]
        self._steps = 0

    def step(self, slopes: list[AnyArray]) -> None:
        """One step down."""
        self._steps += 1
        sure_1, sure_2 = 1 - DECAY_1**self._steps, 1 - DECAY_2**self._steps
        rows = zip(self._parameters, self._mean, self._square, slopes, strict=True)
        for parameter, mean, square, slope in rows:
            mean += (1 - DECAY_1) * (slope - mean)
            square += (1 - DECAY_2) * (slope * slope - square)
            parameter -= RATE * (mean / sure_1) / (np.sqrt(square / sure_2) + TINY)


# ---- integers ------------------------------------------------------------------------------------


def _joined(
    request: Request, meta: TraceMeta, kind: str, samples: Samples, nets: dict[int, _Net]
) -> Fitted:
    """The networks of all layers, rounded."""
    ids = sorted(samples.prints)
    shared: dict[str, Any] = {
        "layers": meta.layers,
        "experts": meta.experts,
        "trace": meta.digest,
        "split": request.split.text if request.split else "",
        "requests": np.array(ids, np.int64),
        "prints": np.array([samples.prints[i] for i in ids], np.uint64),
    }
    if request.policy == "promoe":
        parts = _parts(meta.layers - request.stride, samples, nets)
        own: dict[str, Any] = {"stride": request.stride, "history": request.history, "kind": kind}
        return Predictor(**shared, **own, **parts)
    parts = _parts(meta.layers, samples, nets)
    embedding = parts["w1"].shape[1] - wide_of(meta.experts, 0)
    return TokenNets(**shared, distance=request.stride, embedding=embedding, **parts)


def _parts(count: int, samples: Samples, nets: dict[int, _Net]) -> dict[str, Any]:
    """``count`` networks in one array for each of their parts; zeros for those without samples."""
    names = ("w1", "b1", "w2", "b2")
    shapes = {n: p.shape for n, p in zip(names, next(iter(nets.values())).all(), strict=True)}
    parts = {name: np.zeros((count, *shape), np.int64) for name, shape in shapes.items()}
    parts |= {"scale": np.ones(count, np.int64), "unit": np.ones(count, np.int64)}
    parts["samples"] = np.zeros(count, np.int64)
    for number, net in nets.items():
        parts["samples"][number] = sum(map(len, samples.inputs[number]))
        for name, value in rounded(net).items():
            parts[name][number] = value
    return parts


def rounded(net: _Net) -> dict[str, Any]:
    """One network in integers: weights of 16 bits, biases and divisors to match."""
    w1, b1, w2, b2 = (p.astype(np.float64) for p in net.all())
    first = MOST_WEIGHT / max(1.0, float(np.abs(w1).max()))
    scale = max(1, round(PROBABILITY_ONE * first / HIDDEN_ONE))
    hidden_one = PROBABILITY_ONE * first / scale
    second = MOST_WEIGHT / max(1.0, float(np.abs(w2).max()))
    return {
        "w1": _whole(w1 * first),
        "b1": _whole(b1 * first * PROBABILITY_ONE),
        "scale": scale,
        "w2": _whole(w2 * second),
        "b2": _whole(b2 * second * hidden_one),
        "unit": max(1, round(second * hidden_one)),
    }


def _whole(values: AnyArray) -> IntArray:
    return np.rint(values).astype(np.int64)


def _found(predictor: Fitted, layer: int, inputs: AnyArray) -> IntArray:
    parts = (predictor.w1, predictor.b1, predictor.w2, predictor.b2)
    w1, b1, w2, b2 = (p[layer].astype(np.float64) for p in parts)
    return outputs(inputs.astype(np.float64), w1, b1, int(predictor.scale[layer]), w2, b2)
