"""Cut a trace short: its first tokens or requests, with everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import UsageError
from moesim.traces.check import check_request
from moesim.traces.reader import RequestRows, TraceReader
from moesim.traces.schema import PREFILL, TraceMeta
from moesim.traces.writer import TraceWriter


def head(
    source: str | Path,
    target: str | Path,
    *,
    tokens: int | None = None,
    requests: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> TraceMeta:
    """Write the first `tokens` tokens (as `TraceMeta.tokens` counts) or `requests` requests.

    The last request ends where the tokens end: between iterations, or within one between tokens
    (in all of its layers alike). An iteration that runs through several stacks is not split. A
    request that was cut loses the facts that no longer hold: `output_tokens`, and if its prefill
    was cut `prompt_tokens`. `progress` is called with the tokens (or requests) of each request
    written. Returns the new metadata; raises `TraceError` or `UsageError`.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise UsageError(f"{target}: is the trace that is read; write to another file")
    if (tokens is None) == (requests is None):
        raise UsageError("give either a number of tokens or a number of requests")
    if (tokens or requests or 0) < 1:
        raise UsageError("the head must have at least 1 token or request")
    with TraceReader(source) as reader:
        first = f"the first {tokens} tokens" if tokens else f"the first {requests} requests"
        meta = replace(reader.meta, notes=(*reader.meta.notes, first))
        # What is wrong is wrong in the source, so it is checked there, by its name.
        with TraceWriter(target, meta, check=False) as writer:
            left, wanted = tokens or 0, requests
            for index, rows in enumerate(reader.requests()):
                if index == wanted:
                    break
                check_request(rows, meta, source)
                if tokens is not None:
                    cut = first_tokens(rows, meta, left)
                    if cut is None:
                        break
                    rows, left = cut
                before = writer.tokens
                writer.write_request(rows)
                if progress is not None:
                    progress(1 if tokens is None else writer.tokens - before)
                if tokens is not None and not left:
                    break
            if not writer.rows:
                raise UsageError(f"{source}: {tokens} tokens are less than its first iteration")
    return writer.meta


def first_tokens(rows: RequestRows, meta: TraceMeta, tokens: int) -> tuple[RequestRows, int] | None:
    """Return the request's first tokens and how many of `tokens` are left; None if none fit."""
    firsts = [first for _, first, _ in meta.stack_ranges()]
    counted = np.isin(rows.layer, firsts)
    per_iteration = np.add.reduceat(counted.astype(np.int64), rows.starts[:-1])
    total = np.cumsum(per_iteration)
    if total[-1] <= tokens:
        return rows, tokens - int(total[-1])
    whole = int(np.searchsorted(total, tokens, side="right"))
    kept = int(total[whole - 1]) if whole else 0
    keep = np.arange(int(rows.starts[whole]))
    if kept < tokens:
        start, end = int(rows.starts[whole]), int(rows.starts[whole + 1])
        layers = rows.layer[start:end]
        if np.isin(firsts, layers).sum() == 1:
            each = int(per_iteration[whole])
            inside = np.arange(end - start) % each < tokens - kept
            keep = np.concatenate((keep, start + np.flatnonzero(inside)))
    return (_rows_kept(rows, keep), 0) if len(keep) else None


def _rows_kept(rows: RequestRows, keep: npt.NDArray[np.int64]) -> RequestRows:
    def taken(column: npt.NDArray[Any] | None) -> Any:
        return None if column is None else column[keep]

    iteration = rows.iteration[keep]
    starts = np.searchsorted(keep, rows.starts)
    starts = np.unique(starts)
    prompt_cut = int((rows.phase[keep] == PREFILL).sum()) < int((rows.phase == PREFILL).sum())
    facts = replace(
        rows.facts,
        output_tokens=None,
        prompt_tokens=None if prompt_cut else rows.facts.prompt_tokens,
    )
    held = set(iteration.tolist())
    return RequestRows(
        request=rows.request,
        starts=starts.astype(np.int64),
        iteration=iteration,
        position=taken(rows.position),
        layer=taken(rows.layer),
        phase=taken(rows.phase),
        experts=taken(rows.experts),
        weights=taken(rows.weights),
        gate=taken(rows.gate),
        ahead={distance: taken(experts) for distance, experts in rows.ahead.items()},
        input_norm=taken(rows.input_norm),
        token=taken(rows.token),
        embedding={i: vector for i, vector in rows.embedding.items() if i in held},
        facts=facts,
    )
