"""Turn routing recorded by others into a trace: find the format, open it, write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from moesim.errors import ProfileError, TraceError, UsageError
from moesim.profile import ModelProfile
from moesim.traces import import_bigmoe, import_common
from moesim.traces.import_arrays import open_arrays
from moesim.traces.import_common import PHASE_CHOICES, Source, request_rows
from moesim.traces.import_esft import open_esft
from moesim.traces.import_flame import open_flame
from moesim.traces.import_gptoss import open_gptoss
from moesim.traces.import_moebeyond import HEADER, open_moebeyond
from moesim.traces.import_routertrace import open_routertrace
from moesim.traces.import_vllm import open_vllm
from moesim.traces.schema import DROPPED, TraceMeta
from moesim.traces.writer import TraceWriter

FORMATS: Final = (
    "arrays",
    "bigmoe",
    "esft",
    "flame",
    "gpt-oss",
    "moe-beyond",
    "router-trace",
    "vllm",
)
MANY_FILES: Final = ("esft", "flame", "gpt-oss", "moe-beyond")
"""Formats that may come as a folder or as several files."""
_ENDINGS: Final = (".npz", ".npy", ".txt", ".csv", ".json", ".json.gz", ".jsonl", ".jsonl.gz")
_JSON_KEYS: Final = {"router_data": "gpt-oss", "selections": "router-trace"}
_HEAD_BYTES: Final = 4096


def convert(
    src: str | Path | Sequence[str | Path],
    dst: str | Path,
    *,
    model: ModelProfile | None = None,
    experts: int | None = None,
    phase: str = "as-is",
    keep_order: bool = False,
    format: str | None = None,  # noqa: A002 - the word users know
    progress: Callable[[int], None] | None = None,
) -> TraceMeta:
    """Import `src` (a file, a folder or several files) as the trace `dst`; return its metadata.

    Without `model` a stand-in of the right shape is made, its number of experts from `experts`,
    else from the source, else the largest id + 1. `phase`: "decode" makes each token an iteration
    of its own, numbered from 1; "prefill" puts a sequence's tokens into iteration 0; "as-is" is
    what the source says. Experts are ordered by descending weight, equal weights as they were,
    unless `keep_order`. `format` is one of `FORMATS`, None finds it. `progress` is called with the
    number of requests written so far.

    Raises `TraceError` for a source that breaks its format or disagrees with `model`,
    `UsageError` for a wrong argument or an unwritable `dst`.
    """
    if phase not in PHASE_CHOICES:
        raise UsageError(f"--phase {phase}: must be one of {', '.join(PHASE_CHOICES)}")
    files = _files(src)
    if Path(dst).resolve() in {path.resolve() for path in files}:
        raise UsageError(f"{dst}: is also a source; write the trace to another file")
    source = _open(files, format, model)
    profile, note = _profile(source, model, experts)
    meta = _meta(source, profile, keep_order, note)
    with TraceWriter(dst, meta) as writer:
        number = -1
        for number, sequence in enumerate(source.sequences()):
            rows = request_rows(
                sequence,
                number,
                experts=profile.experts,
                phase=phase,
                keep_order=keep_order,
                weight_scale=source.weight_scale,
                path=source.path,
                shape=(source.layers, source.top_k),
            )
            writer.write_request(rows)
            if progress is not None:
                progress(number + 1)
        if number < 0:
            raise TraceError(f"{source.path}: holds no tokens")
    return writer.meta


def _meta(source: Source, profile: ModelProfile, keep_order: bool, note: str) -> TraceMeta:
    by_weight = source.has_weights and not keep_order
    kept = "source" if keep_order or source.ranked else "unknown"
    return TraceMeta(
        model=profile,
        rank_order="weight" if by_weight else kept,
        score=profile.score,
        has_weights=source.has_weights,
        dataset=source.dataset,
        split=source.split,
        seed=source.seed,
        dtype=source.dtype,
        device=source.device,
        versions=source.versions,
        source=f"{source.format}: {source.path.name}",
        notes=tuple(filter(None, (*source.notes, note))),
    )


# ---- the model -----------------------------------------------------------------------------------


def _profile(
    source: Source, model: ModelProfile | None, experts: int | None
) -> tuple[ModelProfile, str]:
    """Return the profile to write and a note on where its number of experts comes from."""
    declared = source.experts
    if experts is not None:
        if not 1 <= experts <= DROPPED - 1:
            raise UsageError(f"--experts {experts}: must be in 1..{DROPPED - 1}")
        if declared is not None and declared != experts:
            raise TraceError(
                f"{source.path}: states {declared} experts a layer, --experts {experts}"
            )
    if model is not None:
        return _agreeing(source, model, experts if declared is None else declared)
    if source.model is not None:
        return source.model, ""
    note = ""
    count = declared if experts is None else experts
    if count is None:
        count = _largest_id(source) + 1
        note = f"{count} experts a layer: the largest id + 1 (give --experts or --model to be sure)"
    try:
        return ModelProfile.generic(source.layers, count, source.top_k, source.name), note
    except ProfileError as error:
        raise TraceError(f"{source.path}: {error}") from None


def _agreeing(source: Source, model: ModelProfile, experts: int | None) -> tuple[ModelProfile, str]:
    """Return `model` if it can be the one that was recorded.

    An encoder-decoder model may have been recorded in its encoder only.
    """
    leading = [
        sum(stack.layers for stack in model.stacks[: i + 1]) for i in range(len(model.stacks))
    ]
    fits = (
        source.layers in leading
        and source.top_k == model.top_k
        and experts in (None, model.experts)
    )
    if not fits:
        count = "?" if experts is None else str(experts)
        raise TraceError(
            f"{source.path}: {source.layers} layers, {count} experts, top-{source.top_k}; model"
            f" {model.name}: {model.layers} layers, {model.experts} experts, top-{model.top_k};"
            " give the model that was recorded, or none"
        )
    if source.layers == model.layers:
        return model, ""
    stack = model.stacks[leading.index(source.layers)].name
    return model, f"only the first {source.layers} of {model.layers} layers ({stack}) were recorded"


def _largest_id(source: Source) -> int:
    largest = 0
    for sequence in source.sequences():
        ids = sequence.experts
        largest = max(largest, int(ids[ids != DROPPED].max(initial=0)))
    if largest >= DROPPED - 1:
        raise TraceError(f"{source.path}: expert id {largest}; ids above {DROPPED - 2} cannot be")
    return largest


# ---- the format ----------------------------------------------------------------------------------


def _files(src: str | Path | Sequence[str | Path]) -> list[Path]:
    paths = [Path(src)] if isinstance(src, str | Path) else [Path(path) for path in src]
    if not paths:
        raise UsageError("no source given")
    for path in paths:
        if not path.exists():
            raise TraceError(f"{path}: no such file or folder")
        if path.is_dir() and len(paths) > 1:
            raise UsageError(f"{path}: give one folder, or several files, not both")
    return paths


def _open(files: list[Path], name: str | None, model: ModelProfile | None) -> Source:
    if name is not None and name not in FORMATS:
        raise UsageError(f"--format {name}: must be one of {', '.join(FORMATS)}")
    folder = files[0] if files[0].is_dir() else None
    if folder is not None:
        name, files = _folder(folder, name)
    found = name or _sniff(files[0])
    if len(files) > 1 and found not in MANY_FILES:
        raise UsageError(f"format {found} is one file; {len(files)} were given")
    top_k = None if model is None else model.top_k
    openers: dict[str, Callable[[], Source]] = {
        "arrays": lambda: open_arrays(files[0]),
        "bigmoe": lambda: import_bigmoe.open_bigmoe(files[0]),
        "esft": lambda: open_esft(files, top_k),
        "flame": lambda: open_flame(files, top_k),
        "gpt-oss": lambda: open_gptoss(files),
        "moe-beyond": lambda: open_moebeyond(files),
        "router-trace": lambda: open_routertrace(files[0]),
        "vllm": lambda: open_vllm(files[0]),
    }
    source = openers[found]()
    if not 1 <= source.layers <= import_common.MAX_LAYERS:
        raise TraceError(
            f"{source.path}: {source.layers} layers; at most {import_common.MAX_LAYERS}"
        )
    return source if folder is None else replace(source, path=folder)


def _folder(folder: Path, name: str | None) -> tuple[str, list[Path]]:
    """Return the format of a folder's files and those files, from anywhere below it."""
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise TraceError(f"{folder}: cannot list it: {error.strerror}") from None
    by_format: dict[str, list[Path]] = {}
    for path in files:
        if path.name.endswith(_ENDINGS):
            with suppress(TraceError):
                by_format.setdefault(_sniff(path), []).append(path)
    if name is None and len(by_format) > 1:
        raise TraceError(f"{folder}: holds files of {' and '.join(by_format)}; {_hint()}")
    found = name or next(iter(by_format), "")
    if found not in by_format:
        raise TraceError(f"{folder}: holds no file of a known format; {_hint()}")
    return found, by_format[found]


def _hint() -> str:
    return f"name it with --format ({', '.join(FORMATS)})"


def _sniff(path: Path) -> str:
    """Return the format of a file from how it begins."""
    data = import_common.read_head(path, _HEAD_BYTES)
    if data.startswith((b"PK\x03\x04", b"\x93NUMPY")):
        return "arrays"
    if data.startswith(b"PAR1"):
        raise TraceError(f"{path}: is a Parquet file; moesim trace check says if it is a trace")
    text = data.decode("utf-8-sig", "replace").lstrip()
    for name, matches in _tests():
        if matches(text):
            return name
    if text.startswith(("{", "[")):
        whole = import_common.read_text(path)
        for key, name in _JSON_KEYS.items():
            if f'"{key}"' in whole:
                return name
    what = "is empty" if not data else "its format is not known"
    raise TraceError(f"{path}: {what}; {_hint()}")


def _tests() -> Iterator[tuple[str, Callable[[str], bool]]]:
    yield "bigmoe", lambda text: text.startswith(import_bigmoe.FIRST_LINE)
    yield "moe-beyond", lambda text: text.startswith(",".join(HEADER[:2]))
    yield "flame", lambda text: text.startswith("layer_id,token_id,")
    yield "vllm", lambda text: text.startswith("{") and '"type"' in text.split("\n", 1)[0]
    yield "esft", lambda text: "\t" in text and text.split("\t", 1)[0].isdigit()
