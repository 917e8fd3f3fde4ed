"""What every importer hands over, and how it becomes rows of a trace.

An importer turns one foreign format into a `Source`: shapes, notes and a stream of sequences, each
a token-major block `[tokens, layers, k]`. All else (rank order, phases, row order, checks) is done
here, once.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.reader import RequestFacts, RequestRows, iteration_starts
from moesim.traces.schema import DECODE, DROPPED, PREFILL

if TYPE_CHECKING:
    from moesim.profile import ModelProfile

AnyArray = npt.NDArray[Any]
PHASE_CHOICES: Final = ("as-is", "decode", "prefill")
MAX_LAYERS: Final = 32767
MAX_NUMBER: Final = 2**31 - 1
NO_FACTS: Final = RequestFacts()
GZIP_MAGIC: Final = b"\x1f\x8b"


@dataclass(frozen=True, slots=True, eq=False)
class SourceSequence:
    """One sequence as its source has it, tokens in order of position.

    Tokens before `prefill_tokens` belong to the prefill, the others are decoded one by one.
    """

    where: str
    """Names the sequence in messages, e.g. "sequence 3"."""
    experts: AnyArray
    """Integers [tokens, layers, k]; `DROPPED` for none, as where a layer skipped the token."""
    prefill_tokens: int
    weights: AnyArray | None = None
    """As written in the source, [tokens, layers, k]; to be divided by `Source.weight_scale`."""
    positions: AnyArray | None = None
    """Integers [tokens], ascending; None: from 0 on."""
    facts: RequestFacts = NO_FACTS


@dataclass(frozen=True, slots=True)
class Source:
    """A foreign trace, opened.

    `sequences()` may be called more than once; each call streams the file anew.
    """

    format: str
    path: Path
    layers: int
    top_k: int
    has_weights: bool
    sequences: Callable[[], Iterator[SourceSequence]]
    experts: int | None = None
    """Experts a layer, if the source declares it."""
    weight_scale: float = 1.0
    ranked: bool = False
    """The source states that its order is the router's rank order."""
    model: ModelProfile | None = None
    """If the source says enough of its model."""
    name: str = "unknown"
    dataset: str = ""
    split: str = ""
    seed: int | None = None
    dtype: str = ""
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# ---- from sequences to rows ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """How the cells [tokens, layers] of one request become rows ordered by (iteration, layer,
    position): the prefill's cells layer by layer, then each decoded token's."""

    tokens: int
    layers: int
    prefill_tokens: int

    def rows(self, cells: AnyArray) -> AnyArray:
        """Reorder cells [tokens, layers, ...] to rows [rows, ...]."""
        first = self.prefill_tokens
        tail = cells.shape[2:]
        decoded = cells[first:].reshape(-1, *tail)
        if first == 0:
            return decoded
        head = np.swapaxes(cells[:first], 0, 1).reshape(-1, *tail)
        return head if first == self.tokens else np.concatenate((head, decoded))

    def per_token(self, values: AnyArray) -> AnyArray:
        """Spread [tokens] over the rows."""
        return self.rows(np.broadcast_to(values[:, None], (self.tokens, self.layers)))

    def request(
        self,
        number: int,
        experts: AnyArray,
        positions: AnyArray | None = None,
        **columns: Any,
    ) -> RequestRows:
        """Return the request's rows; `experts` as cells, `columns` as `RequestRows` has them."""
        if positions is None:
            positions = np.arange(self.tokens)
        decoded = np.arange(self.tokens) - self.prefill_tokens + 1
        iteration = self.per_token(np.maximum(decoded, 0).astype(np.int32))
        layers = np.broadcast_to(np.arange(self.layers, dtype=np.int16), (self.tokens, self.layers))
        return RequestRows(
            request=number,
            starts=iteration_starts(iteration),
            iteration=iteration,
            position=self.per_token(positions.astype(np.int32)),
            layer=self.rows(layers),
            phase=np.where(iteration == 0, PREFILL, DECODE).astype(np.uint8),
            experts=self.rows(experts),
            **columns,
        )


def request_rows(
    sequence: SourceSequence,
    number: int,
    *,
    experts: int,
    phase: str,
    keep_order: bool,
    weight_scale: float,
    path: Path,
    shape: tuple[int, int],
) -> RequestRows:
    """Check one sequence and return it as request `number`.

    `experts`: number of experts a layer; `shape`: (layers, k) that all sequences must have.
    Raises `TraceError`.
    """
    where = f"{path}: {sequence.where}"
    if sequence.experts.shape[1:] != shape:
        found = sequence.experts.shape[1:]
        raise TraceError(
            f"{where}: {found[0]} layers, top-{found[1]}; the first sequence has {shape[0]} layers,"
            f" top-{shape[1]}"
        )
    check_ids(sequence.experts, experts, where)
    ids, weights = sequence.experts, sequence.weights
    if weights is not None:
        _check_weights(weights, where)
        if not keep_order:
            ids, weights = sorted_by_weight(ids, weights)
    tokens, layers = ids.shape[:2]
    prefill = {"as-is": sequence.prefill_tokens, "decode": 0, "prefill": tokens}[phase]
    layout = Layout(tokens, layers, prefill)
    positions = _positions(sequence, tokens, where)
    halves = None if weights is None else layout.rows(_halves(weights, ids, weight_scale, where))
    return layout.request(
        number,
        ids.astype(np.uint16),
        positions,
        weights=halves,
        facts=_facts(sequence, phase, prefill, positions),
    )


def check_ids(ids: AnyArray, experts: int, where: str) -> None:
    """Refuse ids [tokens, layers, k] out of range, and ids twice in one token."""
    wrong = ((ids < 0) | (ids >= experts)) & (ids != DROPPED)
    if wrong.any():
        token, layer, rank = (int(i[0]) for i in np.nonzero(wrong))
        raise TraceError(
            f"{where}, token {token}, layer {layer}: expert {ids[token, layer, rank]} is not in"
            f" 0..{experts - 1}; give the right number with --experts or --model"
        )
    ordered = np.sort(ids, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != DROPPED)
    if twice.any():
        token, layer, rank = (int(i[0]) for i in np.nonzero(twice))
        raise TraceError(
            f"{where}, token {token}, layer {layer}: expert {ordered[token, layer, rank]} is there"
            " twice; a token's experts are distinct"
        )


def sorted_by_weight(ids: AnyArray, weights: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Order ids and weights [..., k] by descending weight, equal weights as they were; dropped
    ones last."""
    wide = weights.astype(np.float64 if weights.dtype.kind == "f" else np.int64)
    if ids.dtype.itemsize > 1 and (ids == DROPPED).any():
        wide = np.where(ids == DROPPED, -np.inf, wide)
    if np.all(wide[..., 1:] <= wide[..., :-1]):
        return ids, weights
    order = np.argsort(-wide, axis=-1, kind="stable")
    return np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)


def _check_weights(weights: AnyArray, where: str) -> None:
    wrong = ~np.isfinite(weights) | (weights < 0)
    if wrong.any():
        token, layer, rank = (int(i[0]) for i in np.nonzero(wrong))
        raise TraceError(
            f"{where}, token {token}, layer {layer}: weight {weights[token, layer, rank]} is not a"
            " number from 0 up; remove the weights or repair the row"
        )


def _halves(weights: AnyArray, ids: AnyArray, scale: float, where: str) -> AnyArray:
    with np.errstate(over="ignore", invalid="ignore"):
        halves = (weights.astype(np.float64) / scale).astype(np.float16)
    if ids.dtype.itemsize > 1:
        halves[ids == DROPPED] = 0
    if np.isinf(halves).any():
        raise TraceError(f"{where}: a weight is too large for float16 (65504); check its scale")
    return halves


def _positions(sequence: SourceSequence, tokens: int, where: str) -> AnyArray:
    if sequence.positions is None:
        return np.arange(tokens)
    positions = sequence.positions
    if positions.min(initial=0) < 0 or positions.max(initial=0) > MAX_NUMBER:
        raise TraceError(f"{where}: a position is outside 0..{MAX_NUMBER}")
    if (np.diff(positions) <= 0).any():
        raise TraceError(f"{where}: positions do not ascend; a token is there twice")
    return positions


def _facts(sequence: SourceSequence, phase: str, prefill: int, positions: AnyArray) -> RequestFacts:
    """Add prompt and output lengths where the source knows them.

    The first output token comes from the prefill, and each decode step makes one more.
    """
    known = sequence.facts
    tokens = len(positions)
    context = int(positions[prefill]) if prefill < tokens else int(positions[-1]) + 1
    decoded = tokens - prefill
    really_decoded = decoded > 0 and sequence.prefill_tokens < tokens and phase != "prefill"
    return RequestFacts(
        arrival_ns=known.arrival_ns,
        prompt_tokens=context or None,
        output_tokens=decoded + 1 if really_decoded else None,
        topic=known.topic,
        split=known.split,
        prompt_digest=known.prompt_digest,
        prompt_embedding=known.prompt_embedding,
        text=known.text,
    )


# ---- reading foreign files -----------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, unpacked if it is gzip. Raises `TraceError`."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: cannot read it: {_reason(error)}") from None


def read_head(path: Path, size: int) -> bytes:
    """Return the first bytes of a file, unpacked if it is gzip. Raises `TraceError`."""
    try:
        with path.open("rb") as stream:
            packed = stream.read(2) == GZIP_MAGIC
            stream.seek(0)
            return gzip.GzipFile(fileobj=stream).read(size) if packed else stream.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: cannot read it: {_reason(error)}") from None


def read_text(path: Path) -> str:
    """Return a file's text (UTF-8, gzip allowed). Raises `TraceError`."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_json(text: str, where: str) -> Any:
    """Return the JSON value of `text`. Raises `TraceError` naming `where`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise TraceError(f"{where}: JSON nested too deep") from None
    except ValueError as error:
        raise TraceError(f"{where}: not JSON: {error}") from None


def as_object(value: Any, where: str) -> dict[str, Any]:
    """Return `value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise TraceError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def as_list(value: Any, where: str) -> list[Any]:
    """Return `value` if it is a JSON list."""
    if not isinstance(value, list):
        raise TraceError(f"{where}: expected a JSON list, found {type(value).__name__}")
    return value


def as_count(value: Any, where: str, low: int = 0, high: int = MAX_NUMBER) -> int:
    """Return `value` if it is an integer in low..high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise TraceError(f"{where}: expected an integer in {low}..{high}, found {value!r:.40}")
    return value


def as_text(value: Any, default: str = "") -> str:
    """Return a description that is not worth an error: `value` if it is text."""
    return value if isinstance(value, str) else default


def int_array(value: Any, shape: tuple[int | None, ...], where: str) -> AnyArray:
    """Return nested lists of integers as an int64 array; None in `shape` leaves a size free."""
    return _array(value, shape, where, "iu", "integers").astype(np.int64)


def float_array(value: Any, shape: tuple[int | None, ...], where: str) -> AnyArray:
    """Return nested lists of numbers as a float64 array; None in `shape` leaves a size free."""
    return _array(value, shape, where, "iuf", "numbers").astype(np.float64)


def _array(
    value: Any, shape: tuple[int | None, ...], where: str, kinds: str, words: str
) -> AnyArray:
    wanted = " x ".join("n" if size is None else str(size) for size in shape)
    try:
        array = np.array(value)
    except (ValueError, OverflowError, TypeError, RecursionError):
        raise TraceError(f"{where}: expected {wanted} {words}, found uneven lists") from None
    matches = array.ndim == len(shape) and all(
        want is None or want == size for want, size in zip(shape, array.shape, strict=False)
    )
    if not matches or array.dtype.kind not in kinds:
        found = " x ".join(map(str, array.shape)) or "a single value"
        raise TraceError(f"{where}: expected {wanted} {words}, found {found} of {array.dtype}")
    return array


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
