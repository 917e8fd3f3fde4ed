"""Import a vLLM route log: JSON lines, one `meta` line and one `route` line for each token of each
logged layer, with `req_id`, `token_idx`, `layer`, `topk_ids`, `topk_weights`.

Rows from the server's warm-up come first: many tokens, all with the same experts and weights. They
are dropped, and the notes say how many. Some loggers write `token_idx` as the place within a batch
and one request id for all; the requests of a batch then cannot be told apart, which the notes say
too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import TraceError
from moesim.traces.import_common import (
    MAX_LAYERS,
    AnyArray,
    Source,
    SourceSequence,
    as_count,
    as_list,
    as_object,
    as_text,
    float_array,
    int_array,
    parse_json,
    read_text,
)

WARM_UP_RUN = 4
"""So many equal rows in a row, at the beginning, are warm-up."""


@dataclass(slots=True, eq=False)
class _LayerRows:
    requests: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)


def open_vllm(path: Path) -> Source:
    """Open a route log. Raises `TraceError`."""
    meta, by_layer = _read(path)
    numbers = sorted(by_layer)
    first = by_layer[numbers[0]]
    for number in numbers:
        rows = by_layer[number]
        if rows.requests != first.requests or rows.tokens != first.tokens:
            raise TraceError(
                f"{path}: layer {number} has other tokens than layer {numbers[0]}"
                f" ({len(rows.tokens)} and {len(first.tokens)} rows); the log is not complete"
            )
    experts = _stack([by_layer[n].ids for n in numbers], path)
    weights = _stack_weights([by_layer[n].weights for n in numbers], experts.shape[2], path)
    warm = _warm_up_rows(experts, weights)
    if warm == len(experts):
        raise TraceError(f"{path}: all {warm} tokens are alike, as warm-up rows are; no trace")
    owners = _owners(first.requests[warm:])
    token_index = np.array(first.tokens[warm:])

    def sequences() -> Iterator[SourceSequence]:
        for name, rows in owners.items():
            indices = token_index[rows]
            ascending = bool((np.diff(indices) > 0).all())
            yield SourceSequence(
                where=f"request {name}",
                experts=experts[warm:][rows],
                prefill_tokens=len(rows),
                weights=None if weights is None else weights[warm:][rows],
                positions=indices if ascending else None,
            )

    seed = meta.get("seed")
    return Source(
        format="vllm",
        path=path,
        layers=len(numbers),
        top_k=experts.shape[2],
        has_weights=weights is not None,
        sequences=sequences,
        name=as_text(meta.get("model_id")) or "unknown",
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        device=as_text(meta.get("device")),
        versions={
            name: as_text(meta.get(f"{name}_version"))
            for name in ("vllm", "torch")
            if as_text(meta.get(f"{name}_version"))
        },
        notes=tuple(_notes(warm, numbers, [token_index[rows] for rows in owners.values()])),
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[int, _LayerRows]]:
    meta: dict[str, Any] = {}
    layers: dict[int, _LayerRows] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        row = as_object(parse_json(line, where), where)
        if row.get("type") == "meta":
            meta = row
        elif row.get("type") == "route":
            layer = as_count(row.get("layer"), f"{where}: layer", 0, MAX_LAYERS)
            rows = layers.setdefault(layer, _LayerRows())
            rows.requests.append(str(row.get("req_id")))
            rows.tokens.append(as_count(row.get("token_idx"), f"{where}: token_idx"))
            rows.ids.append(as_list(row.get("topk_ids"), f"{where}: topk_ids"))
            rows.weights.append(row.get("topk_weights"))
    if not layers:
        raise TraceError(f"{path}: holds no line of type route")
    return meta, layers


def _stack(layers: list[list[Any]], path: Path) -> AnyArray:
    first = len(layers[0][0])
    ids = int_array(layers, (None, None, first), f"{path}: topk_ids")
    if first == 0:
        raise TraceError(f"{path}: topk_ids is empty")
    return np.swapaxes(ids, 0, 1)


def _stack_weights(layers: list[list[Any]], top_k: int, path: Path) -> AnyArray | None:
    if all(row is None for rows in layers for row in rows):
        return None
    weights = float_array(layers, (None, None, top_k), f"{path}: topk_weights")
    return np.swapaxes(weights, 0, 1)


def _warm_up_rows(experts: AnyArray, weights: AnyArray | None) -> int:
    """Return how many leading tokens lie in runs of `WARM_UP_RUN` or more equal rows."""
    cells = [experts] if weights is None else [experts, weights]
    same = np.ones(len(experts) - 1, dtype=bool)
    for values in cells:
        same &= (values[1:] == values[:-1]).all(axis=(1, 2))
    ends = np.append(np.flatnonzero(~same) + 1, len(experts))
    warm = 0
    for end in ends.tolist():
        if end - warm < WARM_UP_RUN:
            break
        warm = end
    return warm


def _owners(requests: list[str]) -> dict[str, AnyArray]:
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(requests):
        rows.setdefault(name, []).append(index)
    return {name: np.array(indices) for name, indices in rows.items()}


def _notes(warm: int, numbers: list[int], indices: list[AnyArray]) -> Iterator[str]:
    if warm:
        yield f"{warm} warm-up tokens at the beginning were dropped (all alike)"
    if numbers != list(range(len(numbers))):
        yield f"layers were numbered {', '.join(map(str, numbers))} in the source"
    restarts = sum(int((np.diff(tokens) <= 0).sum()) for tokens in indices)
    if restarts:
        yield (
            f"token_idx restarts {restarts} times under one request id: it counts within batches,"
            " so the rows are in the log's order and neighbours need not be neighbours in a text"
        )
