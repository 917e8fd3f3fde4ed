"""The trace format: its columns, its metadata, and the words that both use.

A trace is one Parquet file. Its rows are ordered by (request, iteration, layer, position); there is
one row for each token of each MoE layer. `README.md` in this folder describes every field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from moesim.errors import MoesimError, TraceError
from moesim.types import DROPPED as DROPPED
from moesim.types import Phase

if TYPE_CHECKING:
    from moesim.profile import ModelProfile

SCHEMA_VERSION: Final = 1
MAX_LAYERS: Final = (1 << 15) - 1
MAX_EXPERTS: Final = DROPPED
METADATA_KEY: Final = b"moesim"

PREFILL: Final = int(Phase.PREFILL)
DECODE: Final = int(Phase.DECODE)
PHASES: Final = ("prefill", "decode")
"""Names by code. Iteration 0 is the prefill; iterations 1, 2, ... decode. So a trace without
prefill starts at iteration 1."""

RANK_ORDERS: Final = ("weight", "source", "unknown")
EMBEDDINGS: Final = ("none", "prompt", "iteration")

KEY_COLUMNS: Final = ("request", "iteration", "position", "layer", "phase", "experts")
FACT_COLUMNS: Final = (
    "arrival_ns",
    "prompt_tokens",
    "output_tokens",
    "topic",
    "split",
    "prompt_digest",
    "prompt_embedding",
    "text",
)
"""Facts of a request: on its first row only, null elsewhere. Always in the file."""

UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""`UPGRADES[n]` turns the metadata of schema n into that of schema n + 1; a pure function."""


@dataclass(frozen=True, slots=True)
class TraceMeta:
    """What a trace says about itself; JSON under the Parquet key `moesim`.

    The writer fills `phases`, `requests`, `tokens`, `rows` and `digest` itself; leave them out.
    """

    model: ModelProfile
    rank_order: str = "weight"
    """How `experts` is ordered: by descending `weight`, as the `source` had it, or `unknown`."""
    score: str = "softmax"
    """How weights come from the router's logits (the words of `ModelProfile.score`)."""
    ahead: Mapping[int, int] = field(default_factory=dict)
    """Distance -> number of experts predicted; one column `ahead<distance>` each."""
    has_weights: bool = False
    has_gate: bool = False
    has_norms: bool = False
    has_tokens: bool = False
    embedding: str = "none"
    """`prompt`: in `prompt_embedding` (request fact); `iteration`: in the column `embedding`."""
    dataset: str = ""
    split: str = ""
    seed: int | None = None
    dtype: str = ""
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    expert_norms: tuple[tuple[float, ...], ...] | None = None
    """Norm of each expert's weights, [layers][experts]."""
    expert_parts: int = 1
    """In how many parts an expert of the recorded model stands in the trace; 1: whole."""
    notes: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    """The phases that occur, from `PHASES`."""
    requests: int = 0
    tokens: int = 0
    """Rows that lie on the first layer of their stack: each token once for each stack it passes."""
    rows: int = 0
    digest: str = ""
    """SHA-256 (hex) over the column data; see `TraceDigest`."""
    schema: int = SCHEMA_VERSION

    @property
    def layers(self) -> int:
        """MoE layers in all, over all stacks."""
        return self.model.layers

    @property
    def experts(self) -> int:
        """Routed experts in one layer."""
        return self.model.experts

    @property
    def top_k(self) -> int:
        """K, the width of `experts`."""
        return self.model.top_k

    def stack_ranges(self) -> tuple[tuple[str, int, int], ...]:
        """Return (name, first layer, one past its last layer) for each stack, in layer order."""
        ranges, first = [], 0
        for stack in self.model.stacks:
            ranges.append((stack.name, first, first + stack.layers))
            first += stack.layers
        return tuple(ranges)

    def to_json(self) -> str:
        """Return the metadata as one line of JSON with sorted keys."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["model"] = self.model.to_dict()
        plain["ahead"] = {str(distance): m for distance, m in sorted(self.ahead.items())}
        plain["versions"] = dict(self.versions)
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> TraceMeta:
        """Read metadata of this schema or an older one.

        Raises `TraceError` (without the file's name; the reader adds it) for anything else.
        """
        return _from_plain(_upgraded(_parsed(text)))

    def with_counts(
        self, *, phases: tuple[str, ...], requests: int, tokens: int, rows: int, digest: str
    ) -> TraceMeta:
        """Return a copy with the numbers that only the writer knows."""
        return replace(
            self, phases=phases, requests=requests, tokens=tokens, rows=rows, digest=digest
        )


def arrow_schema(meta: TraceMeta) -> pa.Schema:
    """Return the columns, in file order, that a trace with this metadata has."""
    columns = [
        pa.field("request", pa.int32(), nullable=False),
        pa.field("iteration", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("phase", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        _fixed("experts", pa.uint16(), meta.top_k),
    ]
    if meta.has_weights:
        columns.append(_fixed("weights", pa.float16(), meta.top_k))
    if meta.has_gate:
        columns.append(_fixed("gate", pa.float16(), meta.experts))
    for distance, width in sorted(meta.ahead.items()):
        columns.append(_fixed(f"ahead{distance}", pa.uint16(), width))
    if meta.has_norms:
        columns.append(pa.field("input_norm", pa.float16(), nullable=False))
    if meta.has_tokens:
        columns.append(pa.field("token", pa.int32()))
    if meta.embedding == "iteration":
        columns.append(pa.field("embedding", _half_list()))
    return pa.schema(columns + _fact_fields())


def _fact_fields() -> list[pa.Field]:
    types = {
        "arrival_ns": pa.int64(),
        "prompt_tokens": pa.int32(),
        "output_tokens": pa.int32(),
        "prompt_embedding": _half_list(),
    }
    return [pa.field(name, types.get(name, pa.string())) for name in FACT_COLUMNS]


def _fixed(name: str, element: pa.DataType, width: int) -> pa.Field:
    inner = pa.field("element", element, nullable=False)
    return pa.field(name, pa.list_(inner, width), nullable=False)


def _half_list() -> pa.DataType:
    return pa.list_(pa.field("element", pa.float16(), nullable=False))


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"the metadata is not JSON ({error})") from None
    if not isinstance(plain, dict):
        raise TraceError("the metadata is not a JSON object")
    return plain


def _upgraded(plain: dict[str, Any]) -> dict[str, Any]:
    """Bring older metadata to this schema, one step at a time."""
    version = plain.get("schema")
    if not isinstance(version, int) or isinstance(version, bool):
        raise TraceError("the metadata has no schema number")
    if version > SCHEMA_VERSION:
        raise TraceError(
            f"the trace has schema {version}, this moesim reads up to {SCHEMA_VERSION}; "
            "install a newer moesim"
        )
    while version < SCHEMA_VERSION:
        if version not in UPGRADES:
            raise TraceError(f"schema {version} is not known; record or convert the trace again")
        plain = UPGRADES[version](plain)
        version += 1
    return {**plain, "schema": SCHEMA_VERSION}


def _from_plain(plain: dict[str, Any]) -> TraceMeta:
    from moesim.profile import ModelProfile  # here: a profile may be large to import

    for key in _REQUIRED:
        if key not in plain:
            raise TraceError(f"the metadata lacks {key!r}; record or convert the trace again")
    values = {f.name: plain[f.name] for f in fields(TraceMeta) if f.name in plain}
    for key, value in values.items():
        holds, wanted = _KINDS[key]
        if not holds(value):
            raise TraceError(f"the metadata's {key!r} is not {wanted}")
    try:
        values["model"] = ModelProfile.from_dict(values["model"])
    except (MoesimError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise TraceError(f"the metadata's model profile is damaged ({error})") from None
    values["ahead"] = {int(k): m for k, m in values.get("ahead", {}).items()}
    values["phases"] = tuple(values["phases"])
    values["notes"] = tuple(values.get("notes", ()))
    if values.get("expert_norms") is not None:
        values["expert_norms"] = tuple(tuple(map(float, row)) for row in values["expert_norms"])
    meta = TraceMeta(**values)
    check_meta(meta)
    return meta


def check_meta(meta: TraceMeta) -> None:
    """Refuse metadata that contradicts itself. Raises `TraceError` without the file's name."""
    model = meta.model
    if not 1 <= model.layers <= MAX_LAYERS or sum(s.layers for s in model.stacks) != model.layers:
        raise TraceError(f"{model.layers} MoE layers do not fit the format or the model's stacks")
    if not 1 <= model.top_k <= model.experts <= MAX_EXPERTS:
        raise TraceError(f"top {model.top_k} of {model.experts} experts is impossible")
    if any(d < 1 or not 1 <= m <= model.experts for d, m in meta.ahead.items()):
        raise TraceError("the metadata's 'ahead' needs distances and widths of 1 or more")
    if meta.rank_order not in RANK_ORDERS:
        raise TraceError(f"rank_order {meta.rank_order!r} is not one of {', '.join(RANK_ORDERS)}")
    if meta.embedding not in EMBEDDINGS:
        raise TraceError(f"embedding {meta.embedding!r} is not one of {', '.join(EMBEDDINGS)}")
    norms = meta.expert_norms
    if norms is not None and (
        len(norms) != model.layers or any(len(row) != model.experts for row in norms)
    ):
        raise TraceError("'expert_norms' is not of shape [layers][experts]")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_int(value) and 1 <= value < 1 << 62  # type: ignore[operator]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_norms(value: object) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(row, list) and all(map(_is_number, row)) for row in value)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (_is_int(value) and abs(value) < 1 << 53)  # type: ignore


def _is_widths(value: object) -> bool:
    return isinstance(value, dict) and all(
        k.isascii() and k.isdigit() and len(k) < 6 and _is_count(m) for k, m in value.items()
    )


_TEXT = (_is_text, "a text")
_FLAG = (_is_flag, "true or false")
_COUNT = (_is_count, "a whole number of 1 or more")
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "schema": (_is_int, "a whole number"),
    "model": (lambda value: isinstance(value, dict), "an object"),
    "rank_order": _TEXT,
    "score": _TEXT,
    "ahead": (_is_widths, "an object of distance: width"),
    "has_weights": _FLAG,
    "has_gate": _FLAG,
    "has_norms": _FLAG,
    "has_tokens": _FLAG,
    "embedding": _TEXT,
    "dataset": _TEXT,
    "split": _TEXT,
    "seed": (lambda value: value is None or _is_int(value), "a whole number or null"),
    "dtype": _TEXT,
    "device": _TEXT,
    "versions": (
        lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
        "an object of texts",
    ),
    "source": _TEXT,
    "expert_parts": _COUNT,
    "expert_norms": (_is_norms, "a list of lists of numbers, or null"),
    "notes": (_is_texts, "a list of texts"),
    "phases": (
        lambda value: _is_texts(value) and set(value) <= set(PHASES),  # type: ignore
        "a list of phases",
    ),
    "requests": _COUNT,
    "tokens": _COUNT,
    "rows": _COUNT,
    "digest": (
        lambda value: isinstance(value, str) and len(value) == 64,
        "a SHA-256 in hexadecimal",
    ),
}
_REQUIRED = ("schema", "model", "phases", "requests", "tokens", "rows", "digest")
