"""What predictors that were fitted beforehand share: integer networks, their file, their honesty.

A prediction is two integer matrix products, exact on every host (float64 below 2**53), a floor
division and a comparison. A file is a NumPy archive of whole numbers. A request that a predictor
was fitted on is known again by a fingerprint of its first pass, and refused.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from moesim.errors import NotRunError, UsageError
from moesim.hashing import hash64
from moesim.policies.forecast import ForecastSeat
from moesim.protocol import World
from moesim.types import (
    PROBABILITY_ONE,
    AnyArray,
    Fact,
    Forecast,
    Gate,
    IntArray,
    IterationEnd,
    LayerEvent,
    Needs,
    RequestBegin,
    RequestEnd,
)

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


# ---- the networks --------------------------------------------------------------------------------


class Networks(Protocol):
    """P networks of F inputs, H hidden units and E outputs, and what they were fitted on.

    trace, split : digest of the trace, and how it was cut ("" if not).
    requests, prints : int64 [n] the requests they were fitted on, uint64 [n] their fingerprints.
    w1, b1 : int64 [P, F, H], [P, H]. w2, b2 : int64 [P, H, E], [P, E].
    scale, unit : int64 [P], divisor of the hidden layer, and the output that stands for 1.
    samples : int64 [P], tokens that each was fitted on; without any it predicts nothing.
    """

    @property
    def layers(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def split(self) -> str: ...
    @property
    def requests(self) -> AnyArray: ...
    @property
    def prints(self) -> AnyArray: ...
    @property
    def w1(self) -> AnyArray: ...
    @property
    def b1(self) -> AnyArray: ...
    @property
    def scale(self) -> AnyArray: ...
    @property
    def w2(self) -> AnyArray: ...
    @property
    def b2(self) -> AnyArray: ...
    @property
    def unit(self) -> AnyArray: ...
    @property
    def samples(self) -> AnyArray: ...


class Net:
    """One network, as the kernel takes it."""

    def __init__(self, fitted: Networks, number: int) -> None:
        parts = (fitted.w1, fitted.b1, fitted.w2, fitted.b2)
        self._w1, self._b1, self._w2, self._b2 = (p[number].astype(np.float64) for p in parts)
        self._scale = int(fitted.scale[number])

    def __call__(self, inputs: AnyArray) -> IntArray:
        return outputs(inputs, self._w1, self._b1, self._scale, self._w2, self._b2)


def nets_of(fitted: Networks) -> dict[int, Net]:
    """Those that were fitted on something, by number."""
    return {number: Net(fitted, number) for number in np.flatnonzero(fitted.samples).tolist()}


def wrong_networks(made: Networks, count: int, wide: int) -> str:
    """What is wrong with ``count`` networks of ``wide`` inputs; empty if nothing."""
    experts = made.experts
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
    # The second product is scaled by up to 2**13 before it is divided.
    inner = _reach(made.w1, made.b1, MOST_INPUT) >= 1 << 53
    outer = _reach(made.w2, made.b2, MOST_HIDDEN) >= 1 << 49
    return "its numbers are too large to be exact" if inner or outer else ""


def _reach(weights: AnyArray, biases: AnyArray, most: int) -> float:
    """How large a sum may become. In float64, which does not wrap."""
    sums = np.abs(weights.astype(np.float64)).sum(axis=1)
    return float(sums.max() * most + np.abs(biases.astype(np.float64)).max())


# ---- the file ------------------------------------------------------------------------------------


class Stored(Networks, Protocol):
    """A frozen dataclass of numbers, texts and arrays that can tell what is wrong with it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def problem(self) -> str:
        """Empty if it is sound."""


Kept = TypeVar("Kept", bound=Stored)


def mend(fit: str, file: str) -> str:
    """What to do without a file, or with a wrong one; ``fit`` is the command that makes one."""
    return f"fit one with `{fit}`, then give --split 7:3 --set prefetch.weights={file}"


def packed(made: Stored, form: str) -> bytes:
    """A NumPy ``.npz`` without pickles. Equal predictors give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, format=form, **asdict(made))
    return buffer.getvalue()


def read(path: Path, cls: type[Kept], form: str, mend: str) -> tuple[Kept, str]:
    """A predictor from its file, and the SHA-256 (hex) of that.

    Raises
    ------
    UsageError
        If the file is missing, damaged, or none of ``moesim fit``'s for this policy.
    """
    where = f"prefetch.weights={path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}; {mend}") from None
    found = _parsed(data, form, where, mend)
    if sorted(found) != sorted(f.name for f in fields(cls)):
        raise UsageError(f"{where}: lacks or holds too many parts; {mend}")
    made = cls(**{n: a.item() if a.ndim == 0 else a for n, a in found.items()})
    problem = made.problem()
    if problem:
        raise UsageError(f"{where}: {problem}; {mend}")
    return made, hashlib.sha256(data).hexdigest()


def _parsed(data: bytes, form: str, where: str, mend: str) -> Mapping[str, AnyArray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except DAMAGED as error:
        told = str(error) or type(error).__name__
        raise UsageError(f"{where}: cannot be read ({told}); {mend}") from None
    if str(found.pop("format", "")) != form:
        raise UsageError(f"{where}: was not written by this `moesim fit` for it; {mend}")
    return found


# ---- honesty -------------------------------------------------------------------------------------


class Known:
    """Refuses to serve the requests that a predictor was fitted on."""

    def __init__(self, fitted: Networks, name: str, fit: str) -> None:
        """``name`` of the file; ``fit``: the command that makes another."""
        self._prints = set(fitted.prints.tolist())
        self._split = fitted.split.removesuffix("@0")
        self._name, self._fit = name, fit
        self._experts = fitted.experts
        self._under_way: dict[int, int] = {}
        """Requests in their first pass -> fingerprint so far."""

    def hear(self, fact: Fact) -> None:
        """Raises NotRunError at the end of a known request's first pass."""
        if isinstance(fact, RequestBegin):
            self._under_way[fact.request] = 0
        elif isinstance(fact, IterationEnd | RequestEnd):
            self._refuse(fact.request)
        elif isinstance(fact, Gate):
            self._add(fact.source)

    def _add(self, source: LayerEvent) -> None:
        for slot in source.slots:
            if slot.request in self._under_way:
                named = source.token_experts[slot.first : slot.first + slot.tokens].reshape(-1)
                counts = np.bincount(named[named < self._experts])
                share = fingerprint(slot.request, source.layer, counts)
                so_far = self._under_way[slot.request]
                self._under_way[slot.request] = (so_far + share) % (1 << 64)

    def _refuse(self, request: int) -> None:
        if self._under_way.pop(request, -1) not in self._prints:
            return
        split = self._split
        mend = f"serve the others alone with --split {split}"
        raise NotRunError(
            f"not run: {self._name} was fitted on request {request}, which this run serves; "
            f"{mend if split else f'fit on a part of the trace, with `{self._fit}`'}"
        )


# ---- the seat ------------------------------------------------------------------------------------


@dataclass
class FittedSeat(ForecastSeat, Generic[Kept]):
    """Prefetches what networks expect that were fitted beforehand.

    weights : the file that ``moesim fit`` wrote.
    digest : SHA-256 of that file; filled in, and compared where it is given.
    width : experts taken of each token; 0 takes the model's top k.
    """

    policy: ClassVar[str]
    """For which ``moesim fit`` makes the file."""
    fit: ClassVar[str]
    mend: ClassVar[str]
    weights: str = ""
    digest: str = ""
    width: int = 0
    predictor: Kept | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Read the file; what it takes in is what the policy needs."""
        super().__post_init__()
        if self.width < 0:
            raise UsageError(f"prefetch.width={self.width}: must be 0 (top k) or more")
        if self.weights:
            self.predictor = self._load(Path(self.weights))
            self.needs = self.reads(self.predictor)  # type: ignore[misc]

    def _load(self, path: Path) -> Kept:
        predictor, digest = self.stored(path)
        if self.digest not in ("", digest):
            raise UsageError(
                f"prefetch.weights={path}: is not the file of digest {self.digest[:12]}; name that "
                "one, or leave out prefetch.digest"
            )
        self.digest = digest
        return predictor

    def stored(self, path: Path) -> tuple[Kept, str]:
        """The predictor in a file, and the SHA-256 (hex) of that."""
        raise NotImplementedError

    def reads(self, predictor: Kept) -> Needs:
        """What it takes in."""
        raise NotImplementedError

    def begin(self, world: World) -> None:
        """Refuse to run without a predictor, or with another model's."""
        fitted = self.predictor
        if fitted is None:
            raise NotRunError(f"not run: {self.policy} needs a fitted predictor; {self.mend}")
        if (fitted.layers, fitted.experts) != (world.layers, world.experts):
            raise UsageError(
                f"prefetch.weights={self.weights}: was fitted for {fitted.layers} layers of "
                f"{fitted.experts} experts, the trace has {world.layers} of {world.experts}; fit "
                "one on a trace of the same model"
            )
        self.fitted = fitted
        self.nets = nets_of(fitted)
        self.known = Known(fitted, self.weights, self.fit)
        super().begin(world)

    def expected(self, inputs: AnyArray, number: int, layer: int) -> Forecast:
        """What network ``number`` expects of a layer, over tokens: float64 [T, F] its inputs."""
        found = self.nets[number](inputs)
        likely = probabilities(found, int(self.fitted.unit[number])).max(axis=0)
        return Forecast(layer, likely, chosen(found, self.width or self.world.top_k))
