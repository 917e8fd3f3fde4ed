"""Import ESFT text: `expert_weights_<layer>.txt`, one file a layer, one line a sequence.

A line holds the chosen ids of all tokens, a blank column, then their weights, separated by tabs.
The text does not say k: without a model it is 6 where that fits, else the largest group size that
divides every line into groups of distinct ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TextIO

import numpy as np

from moesim.errors import TraceError
from moesim.traces.import_common import MAX_NUMBER, AnyArray, Source, SourceSequence
from moesim.traces.reader import RequestFacts

USUAL_TOP_K = 6
_NAME = re.compile(r"(\d+)\D*$")


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
    ids: AnyArray
    weights: AnyArray


def open_esft(files: Sequence[Path], top_k: int | None) -> Source:
    """Open the layers' files (any order; numbered without gaps). Raises `TraceError`."""
    numbered = _numbered(files)
    paths = [path for _, path in numbered]
    folder = paths[0].parent
    many = len(paths) > 1
    k, note = (top_k, "") if top_k is not None else _guess_top_k(paths[0])
    numbers = [number for number, _ in numbered]
    layer_note = f"layers were numbered {numbers[0]}..{numbers[-1]} in the source" if many else ""

    def sequences() -> Iterator[SourceSequence]:
        topic = folder.name if many else None
        for index, lines in enumerate(_lockstep(paths)):
            experts = [_tokens(line.ids, k, path, index) for path, line in lines]
            weights = [_tokens(line.weights, k, path, index) for path, line in lines]
            tokens = {len(block) for block in experts}
            if len(tokens) > 1:
                raise TraceError(
                    f"{folder}: line {index + 1} has {min(tokens)} tokens in one layer and"
                    f" {max(tokens)} in another; the files belong to different runs"
                )
            yield SourceSequence(
                where=f"line {index + 1}",
                experts=np.stack(experts, axis=1),
                prefill_tokens=tokens.pop(),
                weights=np.stack(weights, axis=1),
                facts=RequestFacts(topic=topic),
            )

    return Source(
        format="esft",
        path=folder if many else paths[0],
        layers=len(paths),
        top_k=k,
        has_weights=True,
        sequences=sequences,
        dataset=folder.name if many else "",
        notes=tuple(filter(None, (note, layer_note))),
    )


def _numbered(files: Sequence[Path]) -> list[tuple[int, Path]]:
    if len(files) == 1:
        return [(0, files[0])]
    numbered = []
    for path in files:
        found = _NAME.search(path.stem)
        if found is None or len(found[1]) > 9:
            raise TraceError(f"{path}: its name must end in its layer, as expert_weights_7.txt")
        numbered.append((int(found[1]), path))
    numbered.sort()
    for (before, _), (after, path) in pairwise(numbered):
        if after != before + 1:
            raise TraceError(f"{path}: layer {after} comes after {before}; the files need one each")
    return numbered


def _lockstep(paths: Sequence[Path]) -> Iterator[list[tuple[Path, _Line]]]:
    """Yield, line by line, the same line of every file."""
    with ExitStack() as stack:
        streams = [_lines(path, stack.enter_context(_open(path))) for path in paths]
        for lines in zip_longest(*streams):
            for path, line in zip(paths, lines, strict=True):
                if line is None:
                    raise TraceError(f"{path}: fewer lines than the other layers' files")
            yield list(zip(paths, lines, strict=True))


def _open(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8-sig")
    except OSError as error:
        raise TraceError(f"{path}: cannot read it: {error.strerror}") from None


def _lines(path: Path, stream: TextIO) -> Iterator[_Line]:
    number = 0
    try:
        for text in stream:
            number += 1
            if text.strip():
                yield _parse(text, f"{path}: line {number}")
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not UTF-8 text after line {number}") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot read it: {error.strerror}") from None


def _parse(text: str, where: str) -> _Line:
    fields = text.strip("\r\n").split("\t")
    while fields and not fields[-1].strip():
        fields.pop()
    half = len(fields) // 2
    if len(fields) % 2 == 0 or half == 0 or fields[half].strip():
        raise TraceError(
            f"{where}: expected ids, one blank column, as many weights, separated by tabs"
        )
    try:
        ids = np.array([int(field) for field in fields[:half]], dtype=np.int64)
        weights = np.array([float(field) for field in fields[half + 1 :]])
    except (ValueError, OverflowError):
        raise TraceError(f"{where}: an id is not an integer or a weight not a number") from None
    if ids.min() < 0 or ids.max() > MAX_NUMBER:
        raise TraceError(f"{where}: an id is outside 0..{MAX_NUMBER}")
    return _Line(ids, weights)


def _tokens(values: AnyArray, top_k: int, path: Path, index: int) -> AnyArray:
    if len(values) % top_k:
        raise TraceError(
            f"{path}: line {index + 1} has {len(values)} ids, which is no multiple of k = {top_k};"
            " give the right model with --model"
        )
    return values.reshape(-1, top_k)


def _guess_top_k(path: Path) -> tuple[int, str]:
    with _open(path) as stream:
        lines = [line.ids for line in _lines(path, stream)]
    if not lines:
        raise TraceError(f"{path}: holds no sequence")
    common = math.gcd(*map(len, lines))
    sizes = [size for size in range(min(common, 64), 0, -1) if common % size == 0]
    if USUAL_TOP_K in sizes:
        sizes = [USUAL_TOP_K, *sizes]
    k = next(size for size in sizes if all(_distinct(ids.reshape(-1, size)) for ids in lines))
    return k, f"k = {k} was found from the ids; give --model to be sure"


def _distinct(groups: AnyArray) -> bool:
    ordered = np.sort(groups, axis=1)
    return not bool((ordered[:, 1:] == ordered[:, :-1]).any())
