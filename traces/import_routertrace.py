"""Import stratamoe RouterTrace v2: JSON with `selections[token][layer][k]`, no weights.

A `capture-metadata.json` beside it cuts the tokens into prompts (`prompt_spans`); without it all
tokens are one sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import TraceError
from moesim.traces.import_common import (
    Source,
    SourceSequence,
    as_count,
    as_list,
    as_object,
    as_text,
    int_array,
    parse_json,
    read_text,
)
from moesim.traces.reader import RequestFacts

SIDECAR = "capture-metadata.json"
_NUMBERED = re.compile(r"[-_ ]\d+$")


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    stop: int
    name: str
    digest: str | None


def open_routertrace(path: Path) -> Source:
    """Open a RouterTrace v2 file. Raises `TraceError`."""
    where = str(path)
    trace = as_object(parse_json(read_text(path), where), where)
    if trace.get("version") != 2:
        raise TraceError(
            f"{path}: RouterTrace version {trace.get('version')!r:.20}; only 2 is read"
        )
    shape = tuple(
        as_count(trace.get(key), f"{where}: {key}", 1) for key in ("tokens", "layers", "topK")
    )
    experts = int_array(trace.get("selections"), shape, f"{where}: selections")
    spans = _spans(path, shape[0])

    def sequences() -> Iterator[SourceSequence]:
        for span in spans:
            yield SourceSequence(
                where=span.name,
                experts=experts[span.start : span.stop],
                prefill_tokens=span.stop - span.start,
                facts=RequestFacts(
                    topic=_NUMBERED.sub("", span.name) if span.digest is not None else None,
                    prompt_digest=span.digest,
                ),
            )

    source = _dig(trace, "source")
    capture = _dig(source, "capture")
    seed = capture.get("seed")
    return Source(
        format="router-trace",
        path=path,
        layers=shape[1],
        top_k=shape[2],
        has_weights=False,
        sequences=sequences,
        experts=as_count(trace.get("expertsPerLayer"), f"{where}: expertsPerLayer", 1, 65534),
        name=as_text(_dig(source, "model").get("id")) or "unknown",
        dataset=as_text(trace.get("scenario")),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        dtype=as_text(capture.get("dtype")).removeprefix("torch."),
        device=as_text(capture.get("device")),
        versions=_versions(_dig(source, "software")),
        notes=() if len(spans) > 1 else (f"no {SIDECAR} beside it: all tokens are one sequence",),
    )


def _dig(value: dict[str, Any], key: str) -> dict[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _versions(software: dict[str, Any]) -> dict[str, str]:
    return {
        key.removesuffix("Version"): value
        for key, value in software.items()
        if isinstance(value, str)
    }


def _spans(path: Path, tokens: int) -> list[_Span]:
    beside = path.with_name(SIDECAR)
    if not beside.is_file():
        return [_Span(0, tokens, "sequence 0", None)]
    where = str(beside)
    metadata = as_object(parse_json(read_text(beside), where), where)
    spans, end = [], 0
    for number, item in enumerate(as_list(metadata.get("prompt_spans"), f"{where}: prompt_spans")):
        place = f"{where}: prompt_spans[{number}]"
        span = as_object(item, place)
        start = as_count(span.get("token_start"), f"{place}: token_start")
        stop = as_count(span.get("token_end_exclusive"), f"{place}: token_end_exclusive", start + 1)
        if start != end:
            raise TraceError(f"{place}: starts at token {start}; the one before ends at {end}")
        name = as_text(span.get("id")) or f"prompt {number}"
        spans.append(_Span(start, stop, name, as_text(span.get("input_ids_sha256"))))
        end = stop
    if end != tokens:
        raise TraceError(f"{where}: prompt_spans end at token {end}, the trace has {tokens}")
    return spans
