"""The runs of a report: found, read, and sorted into what may be compared.

Runs may be compared where all that determines them is the same but the policy and the memory it
had. Such a set is a *setting*: one trace, model, machine and way of serving.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.analysis import validate_runs
from moesim.errors import UsageError
from moesim.result import MANIFEST, REQUESTS, SCHEMA, SUMMARY, canonical, read_run, request_times
from moesim.tally import FATES

ROOF = "all resident"
PARTS = (*validate_runs.PARTS, "exchange")
"""Where the compute lane's time goes; runs of one device may not tell of the last."""

_FREE = {
    "policy", "capacity", "capacity_as_typed", "set", "initial", "initial_experts", "allowed",
    "calibration", "source_digest", "schema", "repeat", "kv",
}  # fmt: skip
"""Of a manifest: what may differ within a setting."""

_TELLS_APART = ("initial", "allowed", "calibration", "kv", "engine", "source_digest")
"""What is added to a policy's name where two runs would share it."""

_NUMBERS = (
    "accesses", "hits", "late_hits", "misses", "bytes_loaded", "time_ns", "stall_ns", "peak_bytes",
    "capacity_bytes",
)  # fmt: skip

_FOLDER_COLUMNS = ("run_dir", "folder", "run")
"""Where a sweep's table may name a run's folder."""


@dataclass(slots=True, eq=False)
class Run:
    """One run folder, checked.

    source : SHA-256 of its ``summary.json``.
    repeats : runs of the same that were measured; this is the one of median TPOT.
    """

    folder: Path
    manifest: Mapping[str, Any]
    summary: dict[str, Any]
    source: str
    label: str = ""
    repeats: int = 1
    spread: float = 0.0
    """Half of the range of the repeats' mean TPOT, over their median."""

    @property
    def real(self) -> bool:
        """Whether it was measured."""
        return self.manifest.get("engine") == "real"

    @property
    def roof(self) -> bool:
        """Whether every expert was resident from the start: the top rung of the ladder."""
        return self.manifest.get("initial") == "all"

    @property
    def bound(self) -> bool:
        """Whether it could not be had by a policy; never ranked."""
        return self.roof or bool(self.summary["oracle"])

    @property
    def usable(self) -> bool:
        """Whether it is ranked: no bound, nothing lossy."""
        return not self.bound and not self.summary["lossy"]

    @property
    def tpot_ns(self) -> float | None:
        """Mean time per output token after the first."""
        value: float | None = self.summary["tpot_ns"]["mean"]
        return value

    def tpots(self) -> dict[int, float | None]:
        """Of each request; empty where the run kept none."""
        import pyarrow as pa

        try:
            return dict(request_times(self.folder))
        except (OSError, pa.ArrowException):
            return {}


@dataclass(slots=True, eq=False)
class Setting:
    """Runs that may be compared. ``name`` says what tells this setting from the others."""

    facts: Mapping[str, Any]
    runs: list[Run] = field(default_factory=list)
    name: str = ""

    def capacities(self) -> list[str]:
        """As typed, the smallest first; those of the roof are no choice of anybody's."""
        sized = {str(r.summary["capacity"]): _size(r) for r in self.runs if not r.roof}
        return sorted(sized, key=lambda text: (sized[text], text))


def read(paths: Sequence[Path]) -> list[Run]:
    """Every run below the paths, each once: run folders, folders of any depth that hold some, and
    the Parquet table of a sweep.

    Raises
    ------
    UsageError
        Naming the path, and what is amiss: nothing there, a run that is broken or of a newer
        schema, a table without folders.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in _folders(path):
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise UsageError("no runs: name the folders that `moesim replay --out` wrote")
    return [_run(folder) for folder in folders.values()]


def settings(runs: Iterable[Run]) -> list[Setting]:
    """Sort runs into settings, repeats folded into one; simulated ones first, then by name."""
    found: dict[str, Setting] = {}
    for run in runs:
        facts = {k: v for k, v in run.manifest.items() if k not in _FREE}
        facts["engine"] = "measured" if run.real else "simulated"
        found.setdefault(canonical(facts), Setting(facts)).runs.append(run)
    for setting in found.values():
        _label(setting.runs)
        setting.runs = sorted(_folded(setting.runs), key=_order)
    _name(list(found.values()))
    return sorted(found.values(), key=_place)


# ---- reading -------------------------------------------------------------------------------------


def _folders(path: Path) -> list[Path]:
    if path.suffix == ".parquet" and path.is_file():
        return list(_listed(path))
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; name what `moesim replay --out` wrote")
    found = sorted(p.parent for p in path.rglob(MANIFEST))
    # A run that is being written hides behind a dot.
    found = [f for f in found if not any(n.startswith(".") for n in f.relative_to(path).parts)]
    if not found:
        raise UsageError(
            f"{path}: holds no finished run; name what `moesim replay --out` or `moesim real run "
            "--out` wrote"
        )
    return found


def _listed(table: Path) -> Iterator[Path]:
    """The folders that a sweep's table names, as they are or beside the table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(table).names
        column = next((name for name in _FOLDER_COLUMNS if name in names), None)
        if column is None:
            raise UsageError(f"{table}: has no column {' or '.join(_FOLDER_COLUMNS)}; name folders")
        values = pq.read_table(table, columns=[column])[column].to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{table}: cannot be read ({type(error).__name__})") from None
    for value in values:
        if value is not None:
            told = Path(str(value))
            places = (told, table.parent / told, table.parent / told.name)
            yield next((p for p in places if (p / MANIFEST).is_file()), told)


def _run(folder: Path) -> Run:
    manifest, summary = read_run(folder)
    if manifest.get("schema") != SCHEMA:
        raise UsageError(
            f"{folder}: has schema {manifest.get('schema')!r}, this moesim reads {SCHEMA}; "
            "make the run again, or use the moesim that wrote it"
        )
    try:
        _check(manifest, summary)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder}: {SUMMARY} or {MANIFEST} is not as moesim writes it "
            f"({type(error).__name__}: {error}); make the run again"
        ) from None
    source = hashlib.sha256((folder / SUMMARY).read_bytes()).hexdigest()
    return Run(folder, manifest, summary, source)


def _check(manifest: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """What the page rests on is there, and is a number where it must be one."""
    wanted = [summary[name] for name in _NUMBERS]
    wanted += parts_ns(summary)
    wanted += [summary["prefetch"]["bytes"][fate] for fate in FATES]
    wanted += list(summary["layer_stall_ns"])
    perhaps = [summary[f"{what}_ns"][name] for what in ("ttft", "tpot") for name in ("mean", "p99")]
    for value in [*wanted, *(v for v in perhaps if v is not None)]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{value!r} is no number")
    for key in ("oracle", "lossy"):
        if not isinstance(summary[key], bool):
            raise TypeError(f"{key} is neither true nor false")
    texts = [summary["policy"], summary["capacity"], summary["scope"], *summary["set"]]
    texts += [*summary["allowed"], manifest["trace"], manifest["model"]["name"]]
    if not all(isinstance(text, str) for text in [*texts, manifest["hardware"]["name"]]):
        raise TypeError("a name is no text")


# ---- sorting -------------------------------------------------------------------------------------


def _size(run: Run) -> int:
    return int(run.summary["capacity_bytes"])


def _order(run: Run) -> tuple[bool, bool, str, int, str]:
    return run.bound, run.summary["lossy"], run.label, _size(run), run.folder.name


def _label(runs: Sequence[Run]) -> None:
    """Give each run a name; runs of one name and capacity differ in nothing that was told."""
    for run in runs:
        name = " ".join([str(run.summary["policy"]), *run.summary["set"]])
        run.label = ROOF if run.roof else name
    for key in _TELLS_APART:
        spoken: dict[tuple[str, str], set[str]] = {}
        for run in runs:
            spoken.setdefault(_seat(run), set()).add(canonical(run.manifest.get(key)))
        shared = {label for (label, _), values in spoken.items() if len(values) > 1}
        for run in runs:
            if run.label in shared:
                run.label += f", {key} {_short(run.manifest.get(key))}"


def _seat(run: Run) -> tuple[str, str]:
    return run.label, f"{run.summary['capacity']} {run.summary['scope']}"


def _folded(runs: Sequence[Run]) -> Iterator[Run]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault(_seat(run), []).append(run)
    for group in groups.values():
        times = sorted(r.tpot_ns or 0.0 for r in group)
        middle = sorted(group, key=lambda r: (r.tpot_ns or 0.0, r.folder.name))[len(group) // 2]
        middle.repeats = len(group)
        if middle.tpot_ns:
            middle.spread = (times[-1] - times[0]) / 2 / middle.tpot_ns
        yield middle


def _name(found: Sequence[Setting]) -> None:
    """Name each setting by the facts that vary between settings."""
    told = [_told(setting.facts) for setting in found]
    names = list(dict.fromkeys(name for facts in told for name in facts))
    varying = [name for name in names if len({facts.get(name) for facts in told}) > 1]
    for setting, facts in zip(found, told, strict=True):
        setting.name = ", ".join(f"{name} {facts.get(name, '-')}" for name in varying)


def _place(setting: Setting) -> tuple[bool, list[tuple[bool, float, str]], str]:
    return setting.facts["engine"] == "measured", _natural(setting.name), canonical(setting.facts)


def _natural(name: str) -> list[tuple[bool, float, str]]:
    """Numbers in a name by their size: 8 GB/s before 16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(True, float(p), "") if i % 2 else (False, 0.0, p) for i, p in enumerate(parts)]


def _told(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a setting in words; a profile by its name and link, then by its digest."""
    hardware, model = facts["hardware"], facts["model"]
    link = hardware.get("link", {}).get("bytes_per_s") if isinstance(hardware, dict) else None
    told = {
        "runs": str(facts["engine"]),
        "trace": str(facts["trace"])[:8],
        "model": str(model["name"]),
        "machine": str(hardware["name"]),
        "link": rate(link),
        "profile": _digest([hardware, model]),
    }
    rest = {k: v for k, v in facts.items() if k not in {"engine", "trace", "model", "hardware"}}
    # The link's speed is named already; a digest beside it would say nothing.
    if isinstance(link, int | float):
        plain = {**hardware, "link": {**hardware["link"], "bytes_per_s": 0}}
        told["profile"] = _digest([plain, model])
    return told | {key: _short(value) for key, value in _flat(rest)}


def _flat(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Facts that hold facts (how requests were served), one by one: a digest would say nothing."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat({f"{key}.{name}": one for name, one in value.items()})
        else:
            yield key, value


def rate(value: object) -> str:
    """Bytes per second for the eye."""
    if value == "inf":
        return "without limit"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "unknown"
    return f"{value / 1e9:.3g} GB/s"


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:8]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) == 64 and not text.strip("0123456789abcdef"):
        return text[:8]
    return text if len(text) <= 40 else _digest(value)


def parts_ns(summary: Mapping[str, Any]) -> list[int]:
    """The run's time by ``PARTS``."""
    times = summary["times_ns"]
    return [times[part] for part in validate_runs.PARTS] + [times.get("exchange", 0)]


def tables(run: Run) -> list[str]:
    """Names of the run's files that the page rests on."""
    return [name for name in (SUMMARY, MANIFEST, REQUESTS) if (run.folder / name).is_file()]
