"""The digest that names a trace: over its column data, whatever the compression or the cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moesim.traces.reader import RequestRows, fact_items
from moesim.traces.schema import FACT_COLUMNS, TraceMeta, arrow_schema


class TraceDigest:
    """SHA-256 over the columns of a trace.

    Each column has its own stream. A dense column's stream is its raw little-endian values, `phase`
    as one byte a row, a null `token` as -1. The stream of a column that is mostly null (the facts
    of requests, `embedding`) is, for each value that is there: its row number (int64), its length
    in bytes (int64), its bytes; so the nulls between are told too. The digest is the SHA-256 over
    name, type and stream digest of each column, in the order of the schema.
    """

    def __init__(self, meta: TraceMeta) -> None:
        schema = arrow_schema(meta)
        self._types = {column.name: _type_word(column.type) for column in schema}
        self._streams = {name: hashlib.sha256() for name in schema.names}
        self._rows = 0

    def update(self, rows: RequestRows) -> None:
        """Take the next request, with all of the columns that the metadata names."""
        for name, stream in self._streams.items():
            if name not in FACT_COLUMNS and name != "embedding":
                stream.update(_raw(dense_column(rows, name)))
        for name, row, value in sparse_items(rows):
            if name in self._streams:
                raw = _value_bytes(value)
                head = np.array([self._rows + row, len(raw)], dtype="<i8").tobytes()
                self._streams[name].update(head + raw)
        self._rows += rows.rows

    def hexdigest(self) -> str:
        total = hashlib.sha256()
        for name, stream in self._streams.items():
            total.update(f"{name} {self._types[name]}\n".encode() + stream.digest())
        return total.hexdigest()


def dense_column(rows: RequestRows, name: str) -> npt.NDArray[Any]:
    """Return the column that has a value on every row: [rows] or [rows, width]."""
    if name.startswith("ahead"):
        return rows.ahead[int(name.removeprefix("ahead"))]
    if name == "request":
        return np.full(rows.rows, rows.request, dtype=np.int32)
    column: npt.NDArray[Any] = getattr(rows, name)
    return column


def sparse_items(rows: RequestRows) -> Iterable[tuple[str, int, Any]]:
    """Yield (column, row within the request, value) for the columns that are mostly null."""
    for name, value in fact_items(rows.facts):
        yield name, 0, value
    if rows.embedding:
        firsts = rows.starts[:-1]
        for iteration, row in zip(rows.iteration[firsts].tolist(), firsts.tolist(), strict=True):
            if iteration in rows.embedding:
                yield "embedding", row, rows.embedding[iteration]


def _type_word(kind: pa.DataType) -> str:
    """Name a type in words of our own, so that no library's spelling is part of the digest."""
    if pa.types.is_dictionary(kind):
        return "phase"
    if pa.types.is_string(kind):
        return "text"
    if pa.types.is_fixed_size_list(kind):
        return f"{_type_word(kind.value_type)}[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"{_type_word(kind.value_type)}[]"
    return str(np.dtype(kind.to_pandas_dtype()))


def _raw(column: npt.NDArray[Any]) -> memoryview:
    little = np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def _value_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int):
        return value.to_bytes(8, "little", signed=True)
    return _raw(value).tobytes()
