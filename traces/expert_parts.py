"""See each expert of a trace as several parts of its bytes, each loaded and kept by itself.

An expert of a gated MLP is a sum over its intermediate rows, so it may be cut across them: a token
that needs the expert needs every part, and they may compute one after the other as they arrive.
Part p of expert e becomes expert ``parts * e + p`` of the layer. Nothing of the routing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import UsageError
from moesim.profile import ModelProfile
from moesim.traces.check import check_request
from moesim.traces.reader import RequestRows, TraceReader
from moesim.traces.schema import DROPPED, MAX_EXPERTS, TraceMeta
from moesim.traces.writer import TraceWriter


def in_parts(
    source: str | Path,
    target: str | Path,
    parts: int,
    *,
    progress: Callable[[int], object] | None = None,
) -> TraceMeta:
    """Write the trace with every expert in ``parts`` parts; returns the new metadata.

    Weights and probabilities are shared out equally, so that masses stay what they were (exactly
    for 2, 4, 8 parts; else but for the rounding of float16).
    ``progress`` is called with the requests written. Raises `TraceError` or `UsageError`.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise UsageError(f"{target}: is the trace that is read; write to another file")
    if parts < 2:
        raise UsageError(f"--parts {parts}: must be 2 or more")
    with TraceReader(source) as reader:
        whole = reader.meta
        if whole.experts * parts > MAX_EXPERTS:
            raise UsageError(
                f"--parts {parts}: makes {whole.experts * parts} experts a layer; a trace can hold "
                f"{MAX_EXPERTS}"
            )
        with TraceWriter(target, meta_in_parts(whole, parts), check=False) as writer:
            for rows in reader.requests():
                check_request(rows, whole, source)
                writer.write_request(rows_in_parts(rows, parts))
                if progress is not None:
                    progress(1)
    return writer.meta


def meta_in_parts(meta: TraceMeta, parts: int) -> TraceMeta:
    """The metadata of a trace whose experts are in parts."""
    norms = meta.expert_norms
    return replace(
        meta,
        model=replace(
            model_in_parts(meta.model, parts),
            experts=meta.experts * parts,
            top_k=meta.top_k * parts,
        ),
        ahead={distance: width * parts for distance, width in meta.ahead.items()},
        # The norm of a whole is the root of the sum of the squares of its parts.
        expert_norms=None
        if norms is None
        else tuple(tuple(n / parts**0.5 for n in row for _ in range(parts)) for row in norms),
        expert_parts=meta.expert_parts * parts,
        notes=(*meta.notes, f"each expert in {parts} parts"),
    )


def model_in_parts(model: ModelProfile, parts: int) -> ModelProfile:
    """The sizes of one part in the place of an expert's; bytes are rounded up."""

    def divided(nbytes: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(nbytes, int):
            return -(-nbytes // parts)
        return tuple(-(-n // parts) for n in nbytes)

    return replace(
        model,
        expert_bytes=tuple(map(divided, model.expert_bytes)),
        expert_flops_per_token=-(-model.expert_flops_per_token // parts),
    )


def rows_in_parts(rows: RequestRows, parts: int) -> RequestRows:
    """A request whose experts are in parts; the parts of one stand side by side."""

    def repeated(column: npt.NDArray[Any] | None, divisor: int = 1) -> Any:
        if column is None:
            return None
        return np.repeat(column / column.dtype.type(divisor), parts, axis=1)

    return replace(
        rows,
        experts=_numbered(rows.experts, parts),
        weights=repeated(rows.weights, parts),
        # The softmax of logits that are all there ``parts`` times shares out by itself.
        gate=repeated(rows.gate),
        ahead={distance: _numbered(ids, parts) for distance, ids in rows.ahead.items()},
    )


def _numbered(ids: npt.NDArray[np.uint16], parts: int) -> npt.NDArray[np.uint16]:
    wide = np.repeat(ids, parts, axis=1)
    part = np.tile(np.arange(parts, dtype=np.uint16), ids.shape[1])
    return np.where(wide == DROPPED, wide, wide * np.uint16(parts) + part)
