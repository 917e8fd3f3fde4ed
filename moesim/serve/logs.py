"""Logs of arrivals that others published: Azure LLM 2023, Mooncake, BurstGPT.

Each becomes three columns: when a request came, how long its prompt was, how long its answer.
Requests without a prompt or an answer (calls that failed) are left out and counted.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from moesim.errors import UsageError
from moesim.types import IntArray

AZURE, MOONCAKE, BURSTGPT = KINDS = ("azure", "mooncake", "burstgpt")
BLOCK_TOKENS: Final = 512
"""Tokens that an entry of Mooncake's ``hash_ids`` stands for."""

_HEADERS: Final = {
    AZURE: ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    BURSTGPT: ("Timestamp", "Request tokens", "Response tokens"),
}
_MOST_TOKENS: Final = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """Requests in order of arrival, all int64 [n]; times count from the first.

    skipped : how many had no prompt or no answer.
    blocks : of each request, what its whole blocks of ``BLOCK_TOKENS`` tokens hash to (Mooncake).
    """

    kind: str
    arrival_ns: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    skipped: int = 0
    blocks: list[tuple[int, ...]] = field(default_factory=list)

    def head(self, requests: int) -> Log:
        """The first so many; 0: all."""
        most = requests or len(self.arrival_ns)
        return replace(
            self,
            arrival_ns=self.arrival_ns[:most],
            prompt_tokens=self.prompt_tokens[:most],
            output_tokens=self.output_tokens[:most],
            blocks=self.blocks[:most],
        )


class _Row(NamedTuple):
    when_ns: int
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


def read_log(path: Path, kind: str = "") -> Log:
    """Read a log, gzipped or not; ``kind`` is one of ``KINDS``, or recognised by the first line.

    Raises
    ------
    UsageError
        Naming the file, the row and what is wrong.
    """
    try:
        text = _text(path)
    except OSError as error:
        raise UsageError(f"--arrivals {path}: {error.strerror or 'cannot be read'}") from None
    except (EOFError, zlib.error, UnicodeDecodeError):
        raise UsageError(f"--arrivals {path}: damaged, or no text; fetch it again") from None
    kind = kind or _recognised(text, path)
    rows = list((_mooncake if kind == MOONCAKE else _table)(text, kind, path))
    served = [row for row in rows if row.prompt and row.output]
    if not served:
        raise UsageError(f"--arrivals {path}: holds no request with a prompt and an answer")
    served.sort(key=lambda row: row.when_ns)
    columns = np.array([row[:3] for row in served], np.int64).T
    blocks = [row.blocks for row in served] if kind == MOONCAKE else []
    return Log(
        kind, columns[0] - columns[0, 0], columns[1], columns[2], len(rows) - len(served), blocks
    )


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    return raw.decode("utf-8-sig")


def _recognised(text: str, path: Path) -> str:
    first = text[: text.find("\n")].strip()
    if first.startswith("{"):
        return MOONCAKE
    names = [name.strip() for name in first.split(",")]
    for kind, wanted in _HEADERS.items():
        if all(name in names for name in wanted):
            return kind
    raise UsageError(
        f"--arrivals {path}: no log of arrivals; its first line must be that of Azure's CSV "
        f"({','.join(_HEADERS[AZURE])}), of BurstGPT's ({','.join(_HEADERS[BURSTGPT])}, ...), or "
        "a JSON object (Mooncake)"
    )


def _table(text: str, kind: str, path: Path) -> Iterator[_Row]:
    """The rows of a CSV; the header is row 1."""
    lines = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip() for name in next(lines, [])]
    missing = [name for name in _HEADERS[kind] if name not in header]
    if missing:
        raise UsageError(f"--arrivals {path}: row 1 names no column {missing[0]!r}")
    when, prompt, output = (header.index(name) for name in _HEADERS[kind])
    clock = _date_ns if kind == AZURE else _seconds_ns
    for number, cells in enumerate(lines, 2):
        if not cells:
            continue
        where = f"--arrivals {path}: row {number}"
        if len(cells) != len(header):
            raise UsageError(f"{where}: has {len(cells)} cells, the header {len(header)}")
        yield _Row(
            clock(cells[when], where), _tokens(cells[prompt], where), _tokens(cells[output], where)
        )


def _mooncake(text: str, kind: str, path: Path) -> Iterator[_Row]:
    for number, line in enumerate(text.splitlines(), 1):
        where = f"--arrivals {path}: row {number}"
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError(f"{where}: not JSON") from None
        if not isinstance(row, dict):
            raise UsageError(f"{where}: no JSON object")
        when: Any = row.get("timestamp")
        if type(when) not in (int, float) or not 0 <= when < 1e15:
            raise UsageError(f"{where}: timestamp {when!r} is no time in milliseconds")
        prompt, output = (_count(row.get(n), n, where) for n in ("input_length", "output_length"))
        hashes = row.get("hash_ids", [])
        if not isinstance(hashes, list) or not all(type(h) is int for h in hashes):
            raise UsageError(f"{where}: hash_ids is no list of whole numbers")
        when_ns = round(Fraction(when) * 10**6)
        yield _Row(when_ns, prompt, output, tuple(hashes[: prompt // BLOCK_TOKENS]))


def _count(value: Any, name: str, where: str) -> int:
    if type(value) is not int or not 0 <= value < _MOST_TOKENS:
        raise UsageError(f"{where}: {name} {value!r} is no number of tokens")
    return value


def _tokens(text: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}(\.0*)?", text.strip()):
        raise UsageError(f"{where}: {text!r} is no number of tokens")
    return _count(int(float(text)), "tokens", where)


def _seconds_ns(text: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]+)?", text.strip()):
        raise UsageError(f"{where}: {text!r} is no time in seconds")
    return round(Fraction(text.strip()) * 10**9)


def _date_ns(text: str, where: str) -> int:
    """``2023-11-16 18:15:46.6805900``: datetime keeps six digits, the log has seven."""
    match = re.fullmatch(r"([0-9-]{10}[ T][0-9:]{8})(?:\.([0-9]{1,9}))?", text.strip())
    try:
        if match is None:
            raise ValueError
        whole = datetime.fromisoformat(match[1]).replace(tzinfo=UTC)
    except ValueError:
        raise UsageError(
            f"{where}: {text!r} is no time; write 2023-11-16 18:15:46.6805900"
        ) from None
    seconds = (whole - datetime(1970, 1, 1, tzinfo=UTC)) // _SECOND
    return seconds * 10**9 + int((match[2] or "0").ljust(9, "0"))


_SECOND: Final = datetime(1970, 1, 1, 0, 0, 1) - datetime(1970, 1, 1)
