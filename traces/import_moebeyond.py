"""Import moe-beyond CSV: one file a prompt, rows `Layer ID, Batch Number, Token, Activated Expert
IDs`, layer after layer; no weights. A batch number is a sequence of its own."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moesim.errors import TraceError
from moesim.traces.import_common import (
    MAX_NUMBER,
    AnyArray,
    Source,
    SourceSequence,
    int_array,
    parse_json,
    read_text,
)

HEADER = ("Layer ID", "Batch Number", "Token", "Activated Expert IDs")
_NUMBER = re.compile(r"\d+")


def open_moebeyond(files: Sequence[Path]) -> Source:
    """Open prompt files, read in the order of the first number in their names.

    Raises `TraceError`.
    """
    ordered = sorted(files, key=_natural)
    first = next(_sequences(ordered[0], False), None)
    if first is None:
        raise TraceError(f"{ordered[0]}: holds no rows")
    _, layers, top_k = first.experts.shape
    many = len(ordered) > 1

    def sequences() -> Iterator[SourceSequence]:
        for path in ordered:
            yield from _sequences(path, many)

    return Source(
        format="moe-beyond",
        path=ordered[0].parent if many else ordered[0],
        layers=layers,
        top_k=top_k,
        has_weights=False,
        sequences=sequences,
    )


def _natural(path: Path) -> tuple[int, str]:
    found = _NUMBER.search(path.name)
    return (int(found[0][:9]) if found else -1, path.name)


def _sequences(path: Path, name_file: bool) -> Iterator[SourceSequence]:
    prefix = f"{path.name}, " if name_file else ""
    for batch, layers in _batches(path).items():
        where = f"{prefix}batch {batch}"
        numbers = sorted(layers)
        tokens = layers[numbers[0]][0]
        for number in numbers:
            if layers[number][0] != tokens:
                raise TraceError(
                    f"{path}: {where}: layer {number} has other tokens than layer {numbers[0]}"
                )
        experts = np.stack(
            [_ids(layers[number][1], f"{path}: {where}, layer {number}") for number in numbers],
            axis=1,
        )
        yield SourceSequence(where=where, experts=experts, prefill_tokens=len(tokens))


def _batches(path: Path) -> dict[int, dict[int, tuple[list[str], list[str]]]]:
    """Return batch -> layer -> (token texts, lists of ids)."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""))
    batches: dict[int, dict[int, tuple[list[str], list[str]]]] = {}
    try:
        header = next(rows, [])
        if tuple(name.strip() for name in header) != HEADER:
            raise TraceError(f"{path}: the header must be {', '.join(HEADER)}")
        for row in rows:
            if not row:
                continue
            where = f"{path}: row {rows.line_num}"
            if len(row) != len(HEADER):
                raise TraceError(f"{where}: {len(row)} columns instead of {len(HEADER)}")
            layer, batch = _whole(row[0], where), _whole(row[1], where)
            tokens, ids = batches.setdefault(batch, {}).setdefault(layer, ([], []))
            tokens.append(row[2])
            ids.append(row[3])
    except csv.Error as error:
        raise TraceError(f"{path}: row {rows.line_num}: not CSV: {error}") from None
    return batches


def _whole(text: str, where: str) -> int:
    if text.isascii() and text.isdigit() and int(text[:10]) <= MAX_NUMBER and len(text) <= 10:
        return int(text)
    raise TraceError(f"{where}: {text!r:.40} is not a layer or batch number")


def _ids(lists: Sequence[str], where: str) -> AnyArray:
    joined = parse_json(f"[{','.join(lists)}]", where)
    return int_array(joined, (len(lists), None), where)
