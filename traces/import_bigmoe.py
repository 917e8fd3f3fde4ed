"""Import BigMoeOnEdge `route_trace v1`: CSV with a preamble that states the model's shape and the
bytes of each layer, and one row for each routed expert.

A turn becomes a request; `step` is the absolute position. Layers whose expert_bytes are 0 have no
experts: their dense bytes are added to those of the next layer that has. In the prefill the engine
computes the last layer for the last token only: the others ask for no expert there (`DROPPED`).
`dropped` marks routings which the recording engine's own cache skipped: they were chosen by the
gate, so they stay, and the notes count them.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from moesim.errors import ProfileError, TraceError
from moesim.profile import ModelProfile
from moesim.traces.import_common import (
    MAX_LAYERS,
    MAX_NUMBER,
    AnyArray,
    Source,
    SourceSequence,
    read_text,
)
from moesim.traces.schema import DROPPED

FIRST_LINE = "# route_trace v"
_MODEL = re.compile(
    r"# model=(?P<model>.*) arch=(?P<arch>\S*) n_layer=(?P<layers>\d{1,9})"
    r" n_expert=(?P<experts>\d{1,9}) n_expert_used=(?P<top_k>\d{1,9})\s*"
)
_LAYER = re.compile(r"# layer=(\d{1,9}) expert_bytes=(\d{1,18}) dense_bytes=(\d{1,18})\s*")
_KEYS = ("turn", "phase", "step", "layer", "slot", "expert")


@dataclass(slots=True)
class _Preamble:
    model: str
    experts: int
    top_k: int
    layers: int
    expert_bytes: dict[int, int] = field(default_factory=dict)
    dense_bytes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """One entry for each (turn, phase, step, layer), sorted so."""

    turn: AnyArray
    phase: AnyArray
    step: AnyArray
    layer: AnyArray
    experts: AnyArray
    weights: AnyArray | None


def open_bigmoe(path: Path) -> Source:
    """Open a route trace. Raises `TraceError`."""
    preamble, names, body = _split(read_text(path), path)
    columns = _columns(body, names, path)
    layers = _moe_layers(preamble, columns["layer"], path)
    cells = _cells(columns, preamble.top_k, path)

    def sequences() -> Iterator[SourceSequence]:
        turns, starts = np.unique(cells.turn, return_index=True)
        for turn, start, stop in zip(
            turns.tolist(), starts.tolist(), [*starts[1:].tolist(), len(cells.turn)], strict=True
        ):
            yield _sequence(cells, slice(start, stop), f"turn {turn}", layers)

    return Source(
        format="bigmoe",
        path=path,
        layers=len(layers),
        top_k=preamble.top_k,
        has_weights=cells.weights is not None,
        sequences=sequences,
        experts=preamble.experts,
        ranked=True,
        model=_profile(preamble, layers, path),
        name=_model_name(preamble.model),
        notes=tuple(_notes(preamble, layers, columns)),
    )


def _split(text: str, path: Path) -> tuple[_Preamble, list[str], str]:
    """Return the preamble, the column names and the rows' text."""
    if not text.startswith(FIRST_LINE):
        raise TraceError(f"{path}: the first line must be `{FIRST_LINE}1`")
    found: _Preamble | None = None
    rest = text
    while True:
        line, _, rest = rest.partition("\n")
        if line.startswith(FIRST_LINE):
            if line.strip() != f"{FIRST_LINE}1":
                raise TraceError(f"{path}: {line[2:40].strip()} is not known; only v1 is read")
        elif match := _MODEL.fullmatch(line):
            found = _Preamble(
                match["model"], int(match["experts"]), int(match["top_k"]), int(match["layers"])
            )
        elif match := _LAYER.fullmatch(line):
            if found is None or int(match[1]) in found.expert_bytes:
                raise TraceError(f"{path}: layer {match[1]} comes twice, or before the model line")
            found.expert_bytes[int(match[1])] = int(match[2])
            found.dense_bytes[int(match[1])] = int(match[3])
        elif not line.startswith("#") and (line.strip() or not rest):
            break
    if found is None:
        raise TraceError(
            f"{path}: no line `# model=... arch=... n_layer=... n_expert=... n_expert_used=...`"
        )
    for name, value, most in (
        ("n_layer", found.layers, MAX_LAYERS),
        ("n_expert", found.experts, 65534),
        ("n_expert_used", found.top_k, found.experts),
    ):
        if not 1 <= value <= most:
            raise TraceError(f"{path}: {name}={value} is not in 1..{most}")
    return found, [name.strip() for name in line.split(",")], rest


def _columns(body: str, names: list[str], path: Path) -> dict[str, AnyArray]:
    missing = [name for name in _KEYS if name not in names]
    if missing:
        raise TraceError(f"{path}: column {missing[0]} is missing; found {', '.join(names)[:80]}")
    wanted = [name for name in (*_KEYS, "weight", "dropped") if name in names]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = np.loadtxt(
                io.StringIO(body),
                delimiter=",",
                ndmin=2,
                usecols=[names.index(name) for name in wanted],
            )
    except (ValueError, OverflowError, IndexError) as error:
        raise TraceError(f"{path}: rows: {str(error).splitlines()[0]:.200}") from None
    if table.size == 0:
        raise TraceError(f"{path}: holds no rows")
    columns = dict(zip(wanted, table.T, strict=True))
    for name in _KEYS:
        values = columns[name]
        if not ((values >= 0) & (values <= MAX_NUMBER) & (values == np.floor(values))).all():
            raise TraceError(f"{path}: column {name} must hold integers in 0..{MAX_NUMBER}")
        columns[name] = values.astype(np.int64)
    if columns["phase"].max() > 1:
        raise TraceError(f"{path}: phase must be 0 (prefill) or 1 (decode)")
    return columns


def _moe_layers(preamble: _Preamble, used: AnyArray, path: Path) -> list[int]:
    """Return the source's numbers of the layers that have experts."""
    occur: list[int] = np.unique(used).tolist()
    if max(occur) >= preamble.layers:
        raise TraceError(f"{path}: layer {max(occur)} occurs, but n_layer={preamble.layers}")
    if not preamble.expert_bytes:
        return occur
    layers = sorted(layer for layer, size in preamble.expert_bytes.items() if size)
    for layer in occur:
        if layer not in layers:
            raise TraceError(f"{path}: layer {layer} has rows, but no expert_bytes above 0")
    for layer in layers:
        if layer not in occur:
            raise TraceError(f"{path}: layer {layer} has expert_bytes, but no rows")
    return layers


def _cells(columns: Mapping[str, AnyArray], top_k: int, path: Path) -> _Cells:
    keys = [columns[name] for name in ("turn", "phase", "step", "layer", "slot")]
    order = np.lexsort(keys[::-1])
    rows = np.stack([key[order] for key in keys], axis=1)
    if len(rows) % top_k:
        raise TraceError(f"{path}: {len(rows)} rows are no multiple of n_expert_used={top_k}")
    grid = rows.reshape(-1, top_k, 5)
    whole = (grid[:, :, 4] == np.arange(top_k)).all(axis=1) & (
        grid[:, :, :4] == grid[:, :1, :4]
    ).all(axis=(1, 2))
    unique = np.append(True, (grid[1:, 0, :4] != grid[:-1, 0, :4]).any(axis=1))
    if not (whole & unique).all():
        turn, phase, step, layer, _ = grid[int(np.flatnonzero(~(whole & unique))[0]), 0]
        raise TraceError(
            f"{path}: turn {turn}, phase {phase}, step {step}, layer {layer}: must have each slot"
            f" 0..{top_k - 1} once"
        )
    weights = _weights(columns.get("weight"), path)
    keyed = grid[:, 0]
    return _Cells(
        turn=keyed[:, 0],
        phase=keyed[:, 1],
        step=keyed[:, 2],
        layer=keyed[:, 3],
        experts=columns["expert"][order].reshape(-1, top_k),
        weights=None if weights is None else weights[order].reshape(-1, top_k),
    )


def _weights(weights: AnyArray | None, path: Path) -> AnyArray | None:
    """Return the weights, or None where the engine saw none (it writes nan in every row)."""
    if weights is None or np.isnan(weights).all():
        return None
    if not np.isfinite(weights).all():
        row = int(np.flatnonzero(~np.isfinite(weights))[0])
        raise TraceError(f"{path}: row {row + 1} after the header: weight is not a number")
    return weights


def _sequence(cells: _Cells, part: slice, where: str, layers: list[int]) -> SourceSequence:
    phase, step = cells.phase[part], cells.step[part]
    tokens, token = np.unique(np.stack([phase, step], axis=1), axis=0, return_inverse=True)
    token = token.reshape(-1)
    layer = np.searchsorted(np.array(layers), cells.layer[part])
    shape = (len(tokens), len(layers), cells.experts.shape[1])
    experts = np.full(shape, DROPPED)
    experts[token, layer] = cells.experts[part]
    weights = None
    if cells.weights is not None:
        weights = np.zeros(shape)
        weights[token, layer] = cells.weights[part]
    return SourceSequence(
        where=where,
        experts=experts,
        prefill_tokens=int((tokens[:, 0] == 0).sum()),
        weights=weights,
        positions=tokens[:, 1],
    )


def _profile(preamble: _Preamble, layers: list[int], path: Path) -> ModelProfile | None:
    if not preamble.expert_bytes:
        return None
    dense, carried = [], 0
    for layer in range(max(layers) + 1):
        carried += preamble.dense_bytes.get(layer, 0)
        if layer in layers:
            dense.append(max(carried, 1))
            carried = 0
    tail = sum(size for layer, size in preamble.dense_bytes.items() if layer > max(layers))
    try:
        generic = ModelProfile.generic(
            len(layers), preamble.experts, preamble.top_k, _model_name(preamble.model)
        )
    except ProfileError as error:
        raise TraceError(f"{path}: {error}") from None
    return replace(
        generic,
        provenance=(
            "bytes of experts and dense parts: the route trace's own; operations, KV cache and"
            f" widths: {generic.provenance}"
        ),
        precisions=("as-recorded",),
        expert_bytes=(tuple(preamble.expert_bytes[layer] for layer in layers),),
        dense_bytes=tuple(dense),
        head_bytes=tail,
    )


def _model_name(model: str) -> str:
    """Return the file's name without folder and ending; the path may be of any system."""
    name = PureWindowsPath(PurePosixPath(model.strip()).name).name
    return name.removesuffix(".gguf") or "unknown"


def _notes(
    preamble: _Preamble, layers: list[int], columns: Mapping[str, AnyArray]
) -> Iterator[str]:
    if not preamble.expert_bytes:
        yield "the preamble has no expert_bytes: sizes are assumed"
    if layers != list(range(len(layers))):
        yield f"layers were numbered {', '.join(map(str, layers))} in the source"
    dropped = columns.get("dropped")
    if dropped is not None and (dropped != 0).any():
        yield (
            f"{int((dropped != 0).sum())} routings were skipped by the recording engine (dropped);"
            " they are kept, as the gate chose them"
        )
