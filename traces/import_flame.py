"""Import FLAME CSV: one file a layer, rows `layer_id, token_id, expert_0, ...`, one score for each
expert, zero where it was not chosen.

A layer's number is the one in the file's name after "layer", else its `layer_id`. A token id that
does not ascend begins a new sequence.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from moesim.errors import TraceError
from moesim.traces.import_common import AnyArray, Source, SourceSequence, read_text
from moesim.traces.schema import DROPPED

_LAYER = re.compile(r"layer[_-]?(\d{1,6})", re.IGNORECASE)
_EXPERT = re.compile(r"expert_(\d+)")


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    number: int
    path: Path
    token_ids: AnyArray
    scores: AnyArray
    """[tokens, experts]."""


def open_flame(files: Sequence[Path], top_k: int | None) -> Source:
    """Open the layers' files. Raises `TraceError`."""
    layers = sorted((_load(path) for path in files), key=lambda layer: layer.number)
    _agree(layers)
    counts = np.stack([(layer.scores != 0).sum(axis=1) for layer in layers], axis=1)
    k = int(counts.max()) if top_k is None else top_k
    if k == 0:
        raise TraceError(f"{layers[0].path}: every score is zero")
    if counts.max() > k:
        raise TraceError(
            f"{layers[0].path}: a token has {counts.max()} scores above zero, the model's k is {k}"
        )
    chosen = [_choose(layer.scores, k) for layer in layers]
    experts = np.stack([ids for ids, _ in chosen], axis=1)
    weights = np.stack([scores for _, scores in chosen], axis=1)
    restarts = np.flatnonzero(np.diff(layers[0].token_ids) <= 0) + 1
    offsets = [0, *restarts.tolist(), len(experts)]

    def sequences() -> Iterator[SourceSequence]:
        for index, (start, stop) in enumerate(pairwise(offsets)):
            yield SourceSequence(
                where=f"sequence {index}",
                experts=experts[start:stop],
                prefill_tokens=stop - start,
                weights=weights[start:stop],
            )

    return Source(
        format="flame",
        path=files[0].parent if len(files) > 1 else files[0],
        layers=len(layers),
        top_k=k,
        has_weights=True,
        sequences=sequences,
        experts=layers[0].scores.shape[1],
        notes=tuple(_notes(layers, counts, k)),
    )


def _load(path: Path) -> _Layer:
    header, _, body = read_text(path).partition("\n")
    names = [name.strip() for name in header.split(",")]
    found = [_EXPERT.fullmatch(name) for name in names[2:]]
    if names[:2] != ["layer_id", "token_id"] or not found or len(found) > DROPPED - 1:
        raise TraceError(f"{path}: the header must be layer_id, token_id, expert_0, expert_1, ...")
    if [match and match[1] for match in found] != [str(i) for i in range(len(found))]:
        raise TraceError(f"{path}: the columns after token_id must be expert_0, expert_1, ...")
    table = _table(body, path)
    if table.size == 0 or table.shape[1] != len(names) or not np.isfinite(table).all():
        raise TraceError(f"{path}: every row must have {len(names)} numbers, and there must be one")
    keys = table[:, :2]
    if (keys != np.floor(keys)).any() or (np.abs(keys) > 2**31).any():
        raise TraceError(f"{path}: layer_id and token_id must be integers")
    if (table[:, 2:] < 0).any():
        raise TraceError(f"{path}: a score is negative")
    named = _LAYER.search(path.name)
    number = int(named[1]) if named else int(table[0, 0])
    return _Layer(number, path, keys[:, 1].astype(np.int64), table[:, 2:])


def _table(body: str, path: Path) -> AnyArray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.loadtxt(io.StringIO(body), delimiter=",", ndmin=2, comments=None)
    except (ValueError, OverflowError) as error:
        raise TraceError(f"{path}: {str(error).splitlines()[0]:.200}") from None


def _agree(layers: Sequence[_Layer]) -> None:
    first = layers[0]
    for before, layer in pairwise(layers):
        if layer.number == before.number:
            raise TraceError(f"{layer.path}: layer {layer.number} is also {before.path.name}")
        if not np.array_equal(layer.token_ids, first.token_ids):
            raise TraceError(f"{layer.path}: its token ids are not those of {first.path.name}")
        if layer.scores.shape != first.scores.shape:
            raise TraceError(f"{layer.path}: its shape is not that of {first.path.name}")


def _choose(scores: AnyArray, top_k: int) -> tuple[AnyArray, AnyArray]:
    """Return the ids above zero, ascending, padded with `DROPPED`, and their scores."""
    order = np.argsort(scores == 0, axis=1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(scores, order, axis=1)
    return np.where(chosen > 0, order, DROPPED), chosen


def _notes(layers: Sequence[_Layer], counts: AnyArray, top_k: int) -> Iterator[str]:
    if len(layers) > 1:
        numbers = ", ".join(str(layer.number) for layer in layers)
        yield f"layers were numbered {numbers} in the source"
    short = int((counts < top_k).sum())
    if short:
        yield f"{short} cells have fewer than {top_k} scores above zero; the rest are dropped slots"
    seen: dict[bytes, int] = {}
    for layer in layers:
        first = seen.setdefault(layer.scores.tobytes(), layer.number)
        if first != layer.number:
            yield f"layer {layer.number} is a copy of layer {first} in the source"
