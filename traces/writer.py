"""Write a trace: streaming, row groups cut at request boundaries, the file appears whole or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moesim.errors import TraceError, UsageError
from moesim.traces.check import Tally, check_request
from moesim.traces.digest import TraceDigest, dense_column, sparse_items
from moesim.traces.reader import RequestRows, footer_seal
from moesim.traces.schema import (
    FACT_COLUMNS,
    METADATA_KEY,
    PHASES,
    TraceMeta,
    arrow_schema,
    check_meta,
)

GROUP_BYTES = 256 << 20
"""A row group is also cut here, so that wide rows (full gates) do not fill the memory."""


class TraceWriter:
    """Write requests, in ascending order, to one trace file. Use as a context manager.

    Rows are checked as they come (`check=False` leaves that out) against `meta`, whose counts,
    phases and digest are filled in at the end. The arrays are copied; the caller may reuse them.
    The file gets its name only when all is written; after any failure, Ctrl-C included, nothing is
    left behind. Raises `TraceError` for rows that break the format, `UsageError` if the file cannot
    be written.
    """

    meta: TraceMeta
    """After `close`: complete with counts, phases and digest."""

    def __init__(
        self,
        path: str | Path,
        meta: TraceMeta,
        *,
        row_group_rows: int = 1 << 20,
        check: bool = True,
    ) -> None:
        check_meta(meta)
        self.path = Path(path)
        self.meta = meta
        self._check = check
        self._schema = arrow_schema(meta)
        self._tally = Tally(meta)
        self._digest = TraceDigest(meta)
        self._group_rows = row_group_rows
        self._waiting = _Waiting(self._schema)
        self._last = -1
        self._temporary = self.path.with_name(f".{self.path.name}.tmp-{os.getpid()}")
        self._sink: pa.OSFile | None = None
        self._file: pq.ParquetWriter | None = None
        try:
            with _named(self.path):
                self._open()
        except BaseException:
            self.abort()
            raise

    def _open(self) -> None:
        if self.path.is_dir():
            raise UsageError(f"{self.path}: is a folder; name a file to write")
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._file = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression="zstd",
            use_dictionary=_dictionary_columns(self._schema),
            sorting_columns=_sorting(self._schema),
            write_page_checksum=True,
        )

    def write_request(self, rows: RequestRows) -> None:
        """Add the next request; it may be split from earlier ones into another row group."""
        if rows.request <= self._last:
            raise TraceError(
                f"{self.path}: request {rows.request} after {self._last}; requests must ascend"
            )
        check_shapes(rows, self.meta, self.path)
        if self._check:
            check_request(rows, self.meta, self.path)
            self._tally.add(rows, self.path)
        else:
            self._tally.count(rows)
        self._digest.update(rows)
        self._last = rows.request
        self._waiting.add(rows)
        if self._waiting.rows >= self._group_rows or self._waiting.bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> TraceMeta:
        """Finish the file, give it its name and return the complete metadata."""
        if self._file is None:
            return self.meta
        try:
            if not self._tally.rows:
                raise TraceError(f"{self.path}: there are no rows to write")
            self._flush()
            meta = self.meta.with_counts(
                phases=self._tally.phases,
                requests=self._tally.requests,
                tokens=self._tally.tokens,
                rows=self._tally.rows,
                digest=self._digest.hexdigest(),
            )
            with _named(self.path):
                self._finish(meta)
        except BaseException:
            self.abort()
            raise
        self.meta = meta
        return meta

    def _finish(self, meta: TraceMeta) -> None:
        assert self._file is not None and self._sink is not None
        self._file.add_key_value_metadata({METADATA_KEY.decode(): meta.to_json()})
        self._file.close()
        self._sink.close()
        _seal(self._temporary)
        self._temporary.replace(self.path)
        self._file = self._sink = None

    def abort(self) -> None:
        """Leave nothing behind."""
        if self._file is not None:
            self._file.is_open = False  # else its finaliser would write a footer to a closed file
            self._file = None
        if self._sink is not None:
            with suppress(OSError):
                self._sink.close()
            self._sink = None
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def rows(self) -> int:
        """Rows taken so far."""
        return self._tally.rows

    @property
    def tokens(self) -> int:
        """Tokens taken so far, as `TraceMeta.tokens` counts them."""
        return self._tally.tokens

    def _flush(self) -> None:
        if self._file is None or not self._waiting.rows:
            return
        table = self._waiting.table()
        self._waiting = _Waiting(self._schema)
        with _named(self.path):
            self._file.write_table(table, row_group_size=max(1, table.num_rows))


class _Waiting:
    """Requests that wait for their row group to be full."""

    def __init__(self, schema: pa.Schema) -> None:
        self.rows = 0
        self.bytes = 0
        self._schema = schema
        self._dense: dict[str, list[npt.NDArray[Any]]] = {
            name: [] for name in schema.names if not _is_sparse(name)
        }
        self._sparse: dict[str, tuple[list[int], list[Any]]] = {
            name: ([], []) for name in schema.names if _is_sparse(name)
        }

    def add(self, rows: RequestRows) -> None:
        for name, pieces in self._dense.items():
            column = np.array(dense_column(rows, name), order="C")
            pieces.append(column)
            self.bytes += column.nbytes
        for name, row, value in sparse_items(rows):
            if name in self._sparse:
                at, values = self._sparse[name]
                at.append(self.rows + row)
                values.append(value)
                self.bytes += len(value) * 2 if not isinstance(value, int) else 8
        self.rows += rows.rows

    def table(self) -> pa.Table:
        columns = [self._column(field) for field in self._schema]
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _column(self, field: pa.Field) -> pa.Array:
        if field.name in self._sparse:
            return _mostly_null(field.type, self.rows, *self._sparse[field.name])
        pieces = self._dense.pop(field.name)
        return _dense_array(field, np.concatenate(pieces))


def _dense_array(field: pa.Field, column: npt.NDArray[Any]) -> pa.Array:
    if field.name == "phase":
        codes = pa.array(column.view(np.int8))
        return pa.DictionaryArray.from_arrays(codes, pa.array(PHASES))
    if field.name == "token":
        return pa.array(column, mask=column == -1)
    if column.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), type=field.type)
    return pa.array(column)


def _mostly_null(kind: pa.DataType, rows: int, at: list[int], values: list[Any]) -> pa.Array:
    """Return an array of `rows` nulls, with the values at the given rows."""
    if not values:
        return pa.nulls(rows, kind)
    if pa.types.is_list(kind):
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        flat = np.concatenate(values).astype(np.float16, copy=False)
        there = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=kind)
    else:
        there = pa.array(values, kind)
    indices = np.zeros(rows, dtype=np.int64)
    null = np.ones(rows, dtype=np.bool_)
    indices[at] = np.arange(len(at))
    null[at] = False
    return there.take(pa.array(indices, mask=null))


def check_shapes(rows: RequestRows, meta: TraceMeta, path: str | Path) -> None:
    """Refuse arrays whose type or shape is not the one that the metadata promises."""
    where = f"{path}: request {rows.request}"
    if not rows.rows or not 0 <= rows.request < 1 << 31:
        raise TraceError(f"{where}: a request needs rows and an id from 0 to 2147483647")
    for field in arrow_schema(meta):
        if _is_sparse(field.name):
            continue
        kind, shape = _numpy_form(field, rows.rows)
        try:
            column = dense_column(rows, field.name)
        except KeyError:
            column = None
        if column is None:
            raise TraceError(f"{where}: {field.name!r} is missing; the metadata promises it")
        if column.dtype != kind or column.shape != shape:
            raise TraceError(
                f"{where}: {field.name!r} is {column.dtype} of shape {list(column.shape)}, "
                f"not {kind} of {list(shape)}"
            )


def _numpy_form(field: pa.Field, rows: int) -> tuple[np.dtype[Any], tuple[int, ...]]:
    if field.name == "phase":
        return np.dtype(np.uint8), (rows,)
    if pa.types.is_fixed_size_list(field.type):
        element = np.dtype(field.type.value_type.to_pandas_dtype())
        return element, (rows, field.type.list_size)
    return np.dtype(field.type.to_pandas_dtype()), (rows,)


def _is_sparse(name: str) -> bool:
    return name in FACT_COLUMNS or name == "embedding"


def _dictionary_columns(schema: pa.Schema) -> list[str]:
    """Name the columns with few distinct values; a dictionary makes them smaller and faster."""
    names = []
    for field in schema:
        if field.name == "experts" or field.name.startswith("ahead"):
            names.append(f"{field.name}.list.element")
        elif not _is_sparse(field.name):
            names.append(field.name)
    return names


def _sorting(schema: pa.Schema) -> list[pq.SortingColumn]:
    keys = ("request", "iteration", "layer", "position")
    return [pq.SortingColumn(schema.names.index(name)) for name in keys]


def _seal(path: Path) -> None:
    """Put the seal of the footer before the footer."""
    with path.open("r+b") as file:
        size = file.seek(-8, 2)
        tail = file.read()
        footer_start = size - int.from_bytes(tail[:4], "little")
        file.seek(footer_start)
        footer = file.read(size - footer_start)
        file.seek(footer_start)
        file.write(footer_seal(footer) + footer + tail)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one line with the path and the reason."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path}: cannot be written ({reason}); nothing was left there") from None
