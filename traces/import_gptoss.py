"""Import gpt-oss expert fingerprints: JSON (gzip allowed) with `router_data`, a list with one
object for each decoded token: `{"token_<position>": {"layer_<i>": {"selected_experts",
"selected_probs"}}}`. A file may hold one record or a list of them; a folder, many files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import TraceError
from moesim.traces.import_arrays import prompt_digest
from moesim.traces.import_common import (
    MAX_NUMBER,
    Source,
    SourceSequence,
    as_list,
    as_object,
    as_text,
    float_array,
    int_array,
    parse_json,
    read_text,
)
from moesim.traces.reader import RequestFacts

_TOKEN = re.compile(r"token_(\d{1,10})")


def open_gptoss(files: Sequence[Path]) -> Source:
    """Open fingerprint files, read in the order of their paths. Raises `TraceError`."""
    ordered = sorted(files)
    many = len(ordered) > 1
    first = next(_sequences(ordered[0], many), None)
    if first is None:
        raise TraceError(f"{ordered[0]}: holds no record with router_data")
    _, layers, top_k = first.experts.shape
    datasets = sorted(set() if many else {as_text(r.get("dataset")) for r in _records(ordered[0])})

    def sequences() -> Iterator[SourceSequence]:
        for path in ordered:
            yield from _sequences(path, many)

    return Source(
        format="gpt-oss",
        path=ordered[0].parent if many else ordered[0],
        layers=layers,
        top_k=top_k,
        has_weights=True,
        sequences=sequences,
        dataset=", ".join(filter(None, datasets)),
    )


def _records(path: Path) -> list[dict[str, Any]]:
    value = parse_json(read_text(path), str(path))
    records = value if isinstance(value, list) else [value]
    return [as_object(record, f"{path}: record {i}") for i, record in enumerate(records)]


def _sequences(path: Path, name_file: bool) -> Iterator[SourceSequence]:
    for index, record in enumerate(_records(path)):
        where = f"{path.name}, record {index}" if name_file else f"record {index}"
        steps = as_list(record.get("router_data"), f"{path}: {where}: router_data")
        if steps:
            yield _sequence(record, steps, where, path)


def _sequence(record: dict[str, Any], steps: list[Any], where: str, path: Path) -> SourceSequence:
    ids, weights, positions = [], [], []
    names: list[str] = []
    for number, step in enumerate(steps):
        place = f"{path}: {where}: router_data[{number}]"
        position, layers = _step(step, place)
        names = names or _layer_names(layers, place)
        cells = [as_object(layers.get(name), f"{place}: {name}") for name in names]
        if len(layers) != len(names):
            raise TraceError(f"{place}: {len(layers)} layers; the first token has {len(names)}")
        positions.append(position)
        ids.append([cell.get("selected_experts") for cell in cells])
        weights.append([cell.get("selected_probs") for cell in cells])
    if any(after <= before for before, after in pairwise(positions)):
        raise TraceError(f"{path}: {where}: token positions do not ascend")
    shape = (len(steps), len(names), None)
    experts = int_array(ids, shape, f"{path}: {where}: selected_experts")
    topic, prompt = record.get("category"), record.get("original_prompt")
    return SourceSequence(
        where=where,
        experts=experts,
        prefill_tokens=0,
        weights=float_array(weights, experts.shape, f"{path}: {where}: selected_probs"),
        positions=np.array(positions),
        facts=RequestFacts(
            topic=topic if isinstance(topic, str) else None,
            prompt_digest=prompt_digest(prompt) if isinstance(prompt, str) else None,
        ),
    )


def _step(step: Any, place: str) -> tuple[int, dict[str, Any]]:
    items = list(as_object(step, place).items())
    found = _TOKEN.fullmatch(items[0][0]) if len(items) == 1 else None
    if found is None or int(found[1]) > MAX_NUMBER:
        raise TraceError(f"{place}: expected one key token_<position>")
    return int(found[1]), as_object(items[0][1], f"{place}: {found[0]}")


def _layer_names(layers: dict[str, Any], place: str) -> list[str]:
    names = [f"layer_{i}" for i in range(len(layers))]
    missing = [name for name in names if name not in layers]
    if missing or not names:
        raise TraceError(f"{place}: {missing[0] if missing else 'layer_0'} is missing")
    return names
