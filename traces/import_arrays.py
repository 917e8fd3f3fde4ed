"""Import arrays: `.npz` or `.npy` with expert ids `[tokens, layers, k]`.

Keys of an `.npz`: `experts`; optional `seq_offsets` [sequences + 1] (absent: one sequence);
optional weights, `weights` or with their scale in the name: `weights_u8` (times 255),
`weights_1e4`, `weights_1e6` (times ten to that power), `weights_f16`; optional `first_position`
[sequences], the absolute position of each sequence's first row, which says that the rows are decode
steps.

A file `sequences.jsonl` or `sequences.jsonl.gz` beside it may name each sequence's `category` (its
topic), `dataset` and `prompt_tokens`; its line for sequence s must agree on `decode_steps`, and the
rows are decode steps then.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import TraceError
from moesim.traces.import_common import (
    NO_FACTS,
    AnyArray,
    Source,
    SourceSequence,
    read_text,
)
from moesim.traces.reader import RequestFacts

WEIGHT_SCALES = {
    "weights": 1.0,
    "weights_f16": 1.0,
    "weights_1e6": 1e6,
    "weights_1e4": 1e4,
    "weights_u8": 255.0,
}
"""The first one present is used."""
SIDECARS = ("sequences.jsonl", "sequences.jsonl.gz")
MAX_FIRST = 1 << 30


def open_arrays(path: Path) -> Source:
    """Open an `.npz` or `.npy` file. Raises `TraceError`."""
    arrays = _load(path)
    experts = _ids(arrays, path)
    tokens, layers, top_k = experts.shape
    weight_key = next((key for key in WEIGHT_SCALES if key in arrays), None)
    weights = None if weight_key is None else _weights(arrays[weight_key], weight_key, path)
    if weights is not None and weights.shape != experts.shape:
        raise TraceError(
            f"{path}: {weight_key} has shape {weights.shape}, experts {experts.shape}; they must"
            " be equal"
        )
    offsets = _offsets(arrays.get("seq_offsets"), tokens, path)
    first = _first_positions(arrays.get("first_position"), len(offsets) - 1, path)
    beside = _sidecar(path, arrays, np.diff(offsets))
    if first is None:
        first = beside.first

    def sequences() -> Iterator[SourceSequence]:
        for index, (start, stop) in enumerate(pairwise(offsets.tolist())):
            if start == stop:
                continue
            positions = None if first is None else first[index] + np.arange(stop - start)
            yield SourceSequence(
                where=f"sequence {index}",
                experts=experts[start:stop],
                prefill_tokens=stop - start if first is None else 0,
                weights=None if weights is None else weights[start:stop],
                positions=positions,
                facts=beside.facts[index] if beside.facts else NO_FACTS,
            )

    return Source(
        format="arrays",
        path=path,
        layers=layers,
        top_k=top_k,
        has_weights=weights is not None,
        sequences=sequences,
        weight_scale=WEIGHT_SCALES.get(weight_key or "", 1.0),
        dataset=beside.dataset,
        notes=tuple(filter(None, (_layer_note(arrays), beside.note))),
    )


def _load(path: Path) -> dict[str, AnyArray]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with path.open("rb") as stream:
                loaded = np.load(stream, allow_pickle=False)
                if isinstance(loaded, np.ndarray):
                    return {"experts": loaded}
                return {key: loaded[key] for key in loaded.files}
    # Foreign bytes reach the zip, deflate and header parsers, which raise a dozen kinds of errors.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(f"{path}: cannot read the arrays: {reason:.200}") from None


def _ids(arrays: Mapping[str, AnyArray], path: Path) -> AnyArray:
    experts = arrays.get("experts")
    if experts is None:
        found = ", ".join(sorted(arrays)[:8]) or "nothing"
        raise TraceError(f"{path}: no array `experts` [tokens, layers, k]; found {found}")
    if experts.ndim != 3 or experts.dtype.kind not in "iu" or 0 in experts.shape:
        raise TraceError(
            f"{path}: experts is {experts.dtype} {experts.shape}; it must hold integers"
            " [tokens, layers, k], none of them 0"
        )
    return experts


def _weights(weights: AnyArray, key: str, path: Path) -> AnyArray:
    if weights.dtype.kind not in "iuf":
        raise TraceError(f"{path}: {key} is {weights.dtype}; it must hold numbers")
    return weights


def _offsets(offsets: AnyArray | None, tokens: int, path: Path) -> AnyArray:
    if offsets is None:
        return np.array([0, tokens])
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise TraceError(f"{path}: seq_offsets must hold integers [sequences + 1]")
    if offsets.max() > tokens or offsets.min() < 0:
        raise TraceError(f"{path}: seq_offsets leave 0..{tokens}, the tokens of experts")
    wide = offsets.astype(np.int64)
    if wide[0] != 0 or wide[-1] != tokens or (np.diff(wide) < 0).any():
        raise TraceError(
            f"{path}: seq_offsets must ascend from 0 to {tokens} (the tokens of experts); they go"
            f" from {wide[0]} to {wide[-1]}"
        )
    return wide


def _first_positions(first: AnyArray | None, sequences: int, path: Path) -> AnyArray | None:
    if first is None:
        return None
    if first.shape != (sequences,) or first.dtype.kind not in "iu":
        raise TraceError(f"{path}: first_position must hold one integer for each sequence")
    if first.min() < 0 or first.max() > MAX_FIRST:
        raise TraceError(f"{path}: first_position is outside 0..{MAX_FIRST}")
    return first.astype(np.int64)


def _layer_note(arrays: Mapping[str, AnyArray]) -> str:
    for key in ("moe_layer_index", "layer_index"):
        index = arrays.get(key)
        if index is not None and index.ndim == 1 and index.size:
            return f"layers were numbered {index[0]}..{index[-1]} in the source ({key})"
    return ""


@dataclass(frozen=True, slots=True, eq=False)
class _Beside:
    """What the file beside the arrays tells; all empty without one."""

    facts: tuple[RequestFacts, ...] = ()
    first: AnyArray | None = None
    dataset: str = ""
    note: str = ""


def _sidecar(path: Path, arrays: Mapping[str, AnyArray], lengths: AnyArray) -> _Beside:
    beside = next(filter(Path.is_file, map(path.with_name, SIDECARS)), None)
    if beside is None:
        return _Beside()
    by_number = _sidecar_lines(beside)
    index = arrays.get("seq_index")
    numbers = range(len(lengths)) if index is None else index.ravel().tolist()
    lines = [by_number.get(number, {}) for number in numbers]
    if [line.get("decode_steps") for line in lines] != lengths.tolist():
        return _Beside(note=f"{beside.name} describes other sequences and was not used")
    prompts = [line.get("prompt_tokens") for line in lines]
    known = all(isinstance(count, int) and 0 <= count <= MAX_FIRST for count in prompts)
    return _Beside(
        facts=tuple(map(_line_facts, lines)),
        first=np.array(prompts) if known else None,
        dataset=", ".join(sorted({str(line["dataset"]) for line in lines if "dataset" in line})),
        note=f"topics are from {beside.name}",
    )


def _sidecar_lines(path: Path) -> dict[Any, dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
        return {line["seq"]: line for line in lines}
    except (TraceError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _line_facts(line: Mapping[str, Any]) -> RequestFacts:
    topic, prompt = line.get("category"), line.get("prompt")
    return RequestFacts(
        topic=topic if isinstance(topic, str) else None,
        prompt_digest=prompt_digest(prompt) if isinstance(prompt, str) else None,
    )


def prompt_digest(prompt: str) -> str:
    """Return the SHA-256 of a prompt's text: shows which prompts are equal without keeping them."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
