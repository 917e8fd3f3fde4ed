"""Read a trace request by request, as NumPy views, in bounded memory.

Columns are decoded a batch at a time without a copy; requests are cut out of the batches as slices.
Only a request that runs over the end of a batch is copied together. All arrays are read-only.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moesim.errors import TraceError
from moesim.traces.schema import (
    FACT_COLUMNS,
    METADATA_KEY,
    PHASES,
    TraceMeta,
    arrow_schema,
)

SEAL_WORD: Final = b"moesim01"
SEAL_BYTES: Final = len(SEAL_WORD) + 4

READ_BYTES: Final = 1 << 16
"""Read so much of a column at a time; Arrow's default is to hold a row group's whole column."""

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Int16s = npt.NDArray[np.int16]
Uint16s = npt.NDArray[np.uint16]
Uint8s = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class RequestFacts:
    """What is known of a request as a whole; None where it was not recorded."""

    arrival_ns: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    topic: str | None = None
    split: str | None = None
    prompt_digest: str | None = None
    prompt_embedding: Halves | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RequestRows:
    """All rows of one request, in file order: by (iteration, layer, position).

    Iteration 0 is the prefill, later ones decode; a request without prefill starts at iteration 1.
    `request` and the iterations ascend; gaps are allowed.
    """

    request: int
    starts: Int64s
    """[iterations + 1]: the row where each iteration begins, then the number of rows."""
    iteration: Int32s
    position: Int32s
    layer: Int16s
    phase: Uint8s
    """`PREFILL` or `DECODE`, per row."""
    experts: Uint16s
    """[rows, K]."""
    weights: Halves | None = None
    """[rows, K]."""
    gate: Halves | None = None
    """[rows, E], raw logits."""
    ahead: Mapping[int, Uint16s] = field(default_factory=dict)
    """distance -> [rows, M]."""
    input_norm: Halves | None = None
    token: Int32s | None = None
    """[rows], -1 where null."""
    embedding: Mapping[int, Halves] = field(default_factory=dict)
    """iteration number -> vector."""
    facts: RequestFacts = RequestFacts()

    @property
    def rows(self) -> int:
        """Number of rows: tokens times layers, over all iterations and stacks."""
        return len(self.layer)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which optional columns to decode, if the trace has them. The key columns and the experts are
    always read. `facts` without `long_facts` leaves out prompt embedding and text."""

    weights: bool = True
    gate: bool = True
    ahead: bool = True
    norms: bool = True
    tokens: bool = True
    embedding: bool = True
    facts: bool = True
    long_facts: bool = True

    @classmethod
    def experts_only(cls) -> Columns:
        """Return the smallest choice: what demand-only policies need."""
        return cls(False, False, False, False, False, False, False, False)


_EVERY_COLUMN = Columns()


def iteration_starts(iteration: Int32s) -> Int64s:
    """Return the offset of each run of equal values, then the length."""
    changes = np.flatnonzero(iteration[1:] != iteration[:-1]) + 1
    return np.concatenate(([0], changes, [len(iteration)])).astype(np.int64)


def fact_items(facts: RequestFacts) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for each fact that is known."""
    for name in FACT_COLUMNS:
        value = getattr(facts, name)
        if value is not None:
            yield name, value


class TraceReader:
    """A trace file, opened and its schema verified.

    Raises `TraceError` if the file is missing, damaged or no trace. The results do not depend on
    `batch_rows` nor on how the file is cut into row groups. What the rows say is not verified here
    (see `check_request`), other than that requests ascend and facts lie on first rows.
    """

    meta: TraceMeta
    path: Path

    def __init__(
        self, path: str | Path, columns: Columns = _EVERY_COLUMN, batch_rows: int = 65536
    ) -> None:
        if batch_rows < 1:
            raise ValueError("batch_rows must be at least 1")
        self.path = Path(path)
        self._batch_rows = batch_rows
        self._file = _open(self.path)
        try:
            with _one_line(self.path):
                self.meta = _metadata(self._file)
                _same_columns(self._file.schema_arrow, arrow_schema(self.meta))
                _same_rows(self._file.metadata, self.meta.rows)
        except BaseException:
            self._file.close()
            raise
        self._names = _chosen(self.meta, columns)

    def requests(self) -> Iterator[RequestRows]:
        """Yield the requests in file order; memory holds one request and one batch.

        Raises `TraceError` at a damaged page, and where requests do not ascend.
        """
        held = _Held(self.meta, -1)
        rows = 0
        for batch in self._batches():
            with _one_line(self.path):
                part = _Part(batch)
            rows += part.rows
            for first, end in part.request_cuts():
                request = int(part.request[first])
                if request != held.request:
                    if held.rows:
                        yield self._finished(held)
                    if request < held.request or request < 0:
                        raise TraceError(
                            f"{self.path}: request {request} after {max(held.request, 0)}; rows "
                            "must be sorted by request, iteration, layer, position"
                        )
                    held = _Held(self.meta, request)
                held.add(part, first, end)
        if rows != self.meta.rows:
            raise TraceError(f"{self.path}: {rows} rows where the metadata says {self.meta.rows}")
        if held.rows:
            yield self._finished(held)

    def close(self) -> None:
        """Close the file; requests already read stay valid."""
        self._file.close(force=True)

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finished(self, held: _Held) -> RequestRows:
        with _one_line(self.path):
            return held.finish()

    def _batches(self) -> Iterator[pa.RecordBatch]:
        # Group by group: over several groups at once Arrow holds on to what it has read.
        for group in range(self._file.num_row_groups):
            with _one_line(self.path):
                batches = self._file.iter_batches(
                    self._batch_rows, row_groups=[group], columns=self._names, use_threads=False
                )
            while True:
                with _one_line(self.path):
                    batch = next(batches, None)
                if batch is None:
                    break
                if batch.num_rows:
                    yield batch


def gate_probabilities(gate: Halves, meta: TraceMeta) -> npt.NDArray[np.float32]:
    """Turn logits [rows, E] into probabilities over all experts [rows, E]; each row sums to 1.

    For every softmax kind this is the softmax over all experts, which also orders the experts as
    the model did. For sigmoid kinds (DeepSeek-V3) it is the sigmoid divided by the row's sum; the
    selection bias is not part of it. Raises `TraceError` for a score kind that has no rule.
    """
    logits = gate.astype(np.float32)
    if meta.score.startswith("softmax"):
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    elif meta.score.startswith("sigmoid"):
        # tanh does not overflow, whatever the logit; the floor keeps the sum above zero.
        scores = np.maximum(0.5 + 0.5 * np.tanh(0.5 * logits), np.float32(1e-30))
    else:
        raise TraceError(f"no rule turns logits of score kind {meta.score!r} into probabilities")
    total: npt.NDArray[np.float32] = scores / scores.sum(axis=1, keepdims=True)
    return total


class _Part:
    """One batch, decoded: dense columns as arrays, sparse ones as (row, name, value)."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.dense: dict[str, npt.NDArray[Any]] = {}
        self.sparse: list[tuple[int, str, Any]] = []
        self._next = 0
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name in FACT_COLUMNS or name == "embedding":
                self.sparse += [(row, name, value) for row, value in _present(column)]
            else:
                self.dense[name] = _dense(name, column)
        self.sparse.sort(key=lambda item: item[0])
        self.rows = batch.num_rows
        self.request: Int32s = self.dense.pop("request")

    def request_cuts(self) -> Iterator[tuple[int, int]]:
        """Yield (first row, end row) of each request's rows in this batch."""
        cuts = iteration_starts(self.request).tolist()
        return pairwise(cuts)

    def take_sparse(self, end: int) -> list[tuple[int, str, Any]]:
        """Return the sparse values before `end` that were not yet taken."""
        first = self._next
        while self._next < len(self.sparse) and self.sparse[self._next][0] < end:
            self._next += 1
        return self.sparse[first : self._next]


class _Held:
    """The rows read so far of the request that is being put together."""

    def __init__(self, meta: TraceMeta, request: int) -> None:
        self.request = request
        self.rows = 0
        self._meta = meta
        self._pieces: dict[str, list[npt.NDArray[Any]]] = {}
        self._sparse: list[tuple[int, str, Any]] = []

    def add(self, part: _Part, first: int, end: int) -> None:
        for name, column in part.dense.items():
            self._pieces.setdefault(name, []).append(column[first:end])
        shift = self.rows - first
        self._sparse += [(row + shift, name, value) for row, name, value in part.take_sparse(end)]
        self.rows += end - first

    def finish(self) -> RequestRows:
        dense = {name: _joined(pieces) for name, pieces in self._pieces.items()}
        starts = iteration_starts(dense["iteration"])
        ahead = {d: dense.pop(f"ahead{d}") for d in self._meta.ahead if f"ahead{d}" in dense}
        facts, embedding = self._spread(dense["iteration"], starts)
        return RequestRows(
            request=self.request,
            starts=starts,
            ahead=ahead,
            embedding=embedding,
            facts=RequestFacts(**facts),
            **dense,
        )

    def _spread(
        self, iteration: Int32s, starts: Int64s
    ) -> tuple[dict[str, Any], dict[int, Halves]]:
        facts: dict[str, Any] = {}
        embedding: dict[int, Halves] = {}
        first_rows = set(starts[:-1].tolist()) if self._sparse else set()
        for row, name, value in self._sparse:
            if row not in first_rows or (name != "embedding" and row != 0):
                unit = "iteration" if name == "embedding" else "request"
                raise TraceError(
                    f"request {self.request}: {name!r} stands on row {row}; it belongs on the "
                    f"first row of its {unit}"
                )
            if name == "embedding":
                embedding[int(iteration[row])] = value
            else:
                facts[name] = value
        return facts, embedding


def _joined(pieces: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    if len(pieces) == 1:
        return pieces[0]
    joined = np.concatenate(pieces)
    # Views of Arrow memory are read-only; compiled code would see two types if this were not.
    joined.flags.writeable = False
    return joined


def _dense(name: str, column: pa.Array) -> npt.NDArray[Any]:
    if name == "token":
        return _tokens(column)
    if column.null_count:
        raise TraceError(f"column {name!r} has nulls; it must have a value on every row")
    if name == "phase":
        return _phases(column)
    if pa.types.is_fixed_size_list(column.type):
        return _matrix(name, column)
    return _numbers(column)


def _numbers(array: pa.Array) -> npt.NDArray[Any]:
    """The values of an array without nulls, where they are. ``to_numpy`` would import pandas,
    which takes longer than many a replay, and a Ctrl-C would be lost in it."""
    kind = np.dtype(array.type.to_pandas_dtype())
    buffer = array.buffers()[1]
    if buffer is None:
        return np.zeros(0, kind)
    first = array.offset
    return np.frombuffer(buffer, kind, len(array) + first)[first:]


def _matrix(name: str, column: pa.Array) -> npt.NDArray[Any]:
    values = column.flatten()  # honours the slice's offset, which `.values` does not
    if values.null_count or len(values) != len(column) * column.type.list_size:
        raise TraceError(f"column {name!r} has nulls; it must have a value on every row")
    return _numbers(values).reshape(len(column), column.type.list_size)


def _phases(column: pa.Array) -> Uint8s:
    words = column.dictionary.to_pylist()
    unknown = [word for word in words if word not in PHASES]
    if unknown:
        raise TraceError(f"phase {unknown[0]!r} is not one of {', '.join(PHASES)}")
    codes: Uint8s = np.array([PHASES.index(word) for word in words], dtype=np.uint8)
    phases: Uint8s = codes[_numbers(column.indices)]
    phases.flags.writeable = False
    return phases


def _tokens(column: pa.Array) -> Int32s:
    if column.null_count == 0:
        tokens: Int32s = _numbers(column)
    else:
        tokens = _numbers(column.fill_null(-1))
    return tokens


def _present(column: pa.Array) -> Iterator[tuple[int, Any]]:
    """Yield (row, value) where the column is not null."""
    if column.null_count == len(column):
        return
    rows = np.flatnonzero(_numbers(column.is_valid().cast(pa.uint8()))).tolist()
    values = column.drop_null()
    if not pa.types.is_list(column.type):
        yield from zip(rows, values.to_pylist(), strict=True)
        return
    inner = values.flatten()
    if inner.null_count:
        raise TraceError("an embedding has a null inside")
    flat = _numbers(inner)
    ends = np.cumsum(_numbers(values.value_lengths()))
    yield from zip(rows, np.split(flat, ends[:-1]), strict=True)


def _chosen(meta: TraceMeta, columns: Columns) -> list[str]:
    """Return the names of the columns to decode, in file order."""
    wanted = {
        "weights": columns.weights,
        "gate": columns.gate,
        "input_norm": columns.norms,
        "token": columns.tokens,
        "embedding": columns.embedding,
        **{f"ahead{distance}": columns.ahead for distance in meta.ahead},
        **dict.fromkeys(FACT_COLUMNS, columns.facts),
    }
    wanted["prompt_embedding"] = wanted["text"] = columns.facts and columns.long_facts
    return [name for name in arrow_schema(meta).names if wanted.get(name, True)]


def _open(path: Path) -> pq.ParquetFile:
    """Open the file; say plainly what it is if it is not Parquet."""
    with _one_line(path):
        if path.is_dir():
            raise TraceError("is a folder, not a trace file")
        with path.open("rb") as file:
            _check_frame(file)
        return pq.ParquetFile(
            pa.OSFile(str(path), "rb"),
            pre_buffer=False,
            buffer_size=READ_BYTES,
            page_checksum_verification=True,
        )


def _check_frame(file: BinaryIO) -> None:
    """Refuse what is not Parquet, not whole, or has a footer that does not match its seal."""
    head = file.read(4)
    if not head:
        raise TraceError("is empty; record or convert the trace again")
    if head != b"PAR1":
        raise TraceError("is not a Parquet file; `moesim trace convert` imports other formats")
    size = file.seek(0, 2)
    file.seek(max(4, size - 8))
    tail = file.read()
    if len(tail) < 8 or tail[4:] != b"PAR1":
        raise TraceError("is cut short; copy, record or convert it again")
    start = size - 8 - int.from_bytes(tail[:4], "little")
    if start < 4:
        raise TraceError("is damaged (footer longer than the file); copy or make it again")
    file.seek(max(4, start - SEAL_BYTES))
    seal = file.read(start - file.tell())
    footer = file.read(size - 8 - start)
    if seal[:-4] == SEAL_WORD and seal != footer_seal(footer):
        raise TraceError("is damaged (the footer was changed); copy, record or convert it again")


def footer_seal(footer: bytes) -> bytes:
    """Return what the writer puts just before the footer: a word, and the CRC-32 of the footer.

    Parquet has checksums for pages only, and a damaged footer makes Arrow misread, or abort. Other
    readers skip these bytes, for nothing points to them; a file without them is read all the same.
    """
    return SEAL_WORD + zlib.crc32(footer).to_bytes(4, "little")


def _metadata(file: pq.ParquetFile) -> TraceMeta:
    plain = file.metadata.metadata or {}
    if METADATA_KEY not in plain:
        raise TraceError(
            "is Parquet but not a trace (no 'moesim' metadata); `moesim trace convert` makes one"
        )
    return TraceMeta.from_json(plain[METADATA_KEY])


def _same_columns(found: pa.Schema, wanted: pa.Schema) -> None:
    """Refuse a missing or wrongly typed column. Further columns do no harm and are not read."""
    for column in wanted:
        count = found.names.count(column.name)
        if count != 1:
            state = "is missing" if count == 0 else "occurs twice"
            raise TraceError(f"column {column.name!r} {state}; record or convert the trace again")
        kind = found.field(column.name).type
        if not _same_type(kind, column.type):
            raise TraceError(
                f"column {column.name!r} is {kind}, not {column.type}; write it again with that "
                "type"
            )


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Compare types, whether or not they allow nulls (no null is accepted where none belongs)."""
    if found.id != wanted.id:
        return False
    if pa.types.is_fixed_size_list(wanted) and found.list_size != wanted.list_size:
        return False
    if pa.types.is_nested(wanted) or pa.types.is_dictionary(wanted):
        return bool(found.value_type == wanted.value_type)
    return bool(found == wanted)


def _same_rows(footer: pq.FileMetaData, rows: int) -> None:
    """Refuse a footer whose row counts disagree with each other or with the metadata.

    Nothing more is asked of it: Arrow's accessor of a column's footer aborts the process where the
    footer is damaged.
    """
    groups = sum(footer.row_group(index).num_rows for index in range(footer.num_row_groups))
    if footer.num_rows != rows or groups != rows:
        raise TraceError(f"{footer.num_rows} rows where the metadata says {rows}")


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes the decoders raise into one line that names the file."""
    try:
        yield
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file") from None
    except PermissionError:
        raise TraceError(f"{path}: may not be read (permission denied)") from None
    except (
        *(pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError),
        *(OverflowError, MemoryError, EOFError, AttributeError),
    ) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TraceError(f"{path}: is damaged ({text}); copy, record or convert it again") from None
