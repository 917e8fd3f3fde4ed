"""Measure a machine into a hardware profile: microbenchmarks only, never a run.

The profile says medians; every reading lies with its quartiles in a Parquet file beside it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from moesim import __version__
from moesim.errors import NotRunError, UsageError
from moesim.profile import (
    HardwareProfile,
    Host,
    Link,
    Memory,
    ModelProfile,
    Table,
    TableExpert,
)
from moesim.real.measure import (
    BYTES,
    CHUNK_BYTES,
    DENSE,
    EXPERT,
    HANDOVER,
    HEAD,
    HOST_EXPERT,
    LINK,
    OPS,
    PLAN,
    STEP,
    SYNC,
    Bench,
    Point,
    Progress,
    Readings,
    Spread,
    grid_of,
    kinds_of,
    points_of,
    take,
)

KINDS = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Calibration:
    """What to measure, and where to write it.

    model : whose experts and dense parts are computed.
    tokens : up to so many at once.
    threads : that compute; 0: all cores but one, which copies.
    ram_bytes : what the banks may take; None: what is free.
    """

    model: ModelProfile
    out: Path
    device: str = "cpu"
    repeats: int = 7
    tokens: int = 128
    threads: int = 0
    ram_bytes: int | None = None
    seed: int = 0


OpenBench = Callable[[Calibration], Bench]


def calibrate(
    request: Calibration,
    progress: Progress = lambda done, total: None,
    open_bench: OpenBench | None = None,
) -> dict[str, Any]:
    """Measure, write the profile and its readings; the object that ``--json`` prints.

    Raises
    ------
    MoesimError
        For a device that is not there, a model that does not fit, a path that cannot be written.
        Nothing half-written is kept.
    """
    _refuse(request)
    with _beside(request.out) as folder:
        bench = (open_bench or bench_of)(request)
        try:
            readings, profile, host = _measured(request, bench, progress)
        finally:
            bench.close()
        kept = request.out.with_suffix(".readings.parquet")
        text = toml_of(profile, readings, kept.name)
        (folder / "profile").write_text(text, encoding="utf-8")
        _write_readings(folder / "readings", readings, host)
        (folder / "readings").replace(kept)
        (folder / "profile").replace(request.out)
    return {
        "schema": 1,
        "path": str(request.out),
        "readings_path": str(kept),
        "profile": profile.to_dict(),
        "readings": [_row(point, spread) for point, spread in readings.points.items()],
        "overheads": {name: _spread(spread) for name, spread in readings.named.items()},
        "host": host,
    }


def bench_of(request: Calibration) -> Bench:
    """The bench of a kind of device."""
    threads = request.threads or max(1, (os.cpu_count() or 1) - 1)
    try:
        if request.device == "cuda":
            from moesim.real.measure_cuda import CudaBench

            return CudaBench(request.model, threads=threads, seed=request.seed)
        from moesim.real.measure_cpu import CpuBench
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise NotRunError(
            "not run: calibration needs torch, which is not installed; "
            "`pip install 'moesim[real]'` installs it"
        ) from None
    return CpuBench(
        request.model,
        threads=threads,
        seed=request.seed,
        ram_bytes=request.ram_bytes,
    )


def profile_of(
    request: Calibration, readings: Readings, memory: Memory, workers: int, provenance: str
) -> HardwareProfile:
    """The profile that readings make: medians, made to rise with size.

    Tables are means over the model's layers, whose kinds were measured one by one.
    """
    named = {name: spread.median for name, spread in readings.named.items()}
    rows = _Rows(request.model, readings)
    curve = rows.link()
    return HardwareProfile(
        name=request.out.stem,
        source="measured",
        provenance=provenance,
        memory=memory,
        link=_link(curve, round(named[HANDOVER])),
        compute=Table(
            expert=rows.by_tokens(EXPERT),
            dense=rows.dense(),
            model=request.model.name,
            head=rows.head(named[STEP]),
        ),
        host=Host(
            sync_ns=round(named[SYNC]),
            plan_ns=round(named[PLAN]),
            policy_ops_per_s=named[OPS],
            policy_bytes_per_s=named[BYTES],
            workers=workers,
            cpu=TableExpert(rows.by_tokens(HOST_EXPERT)),
        ),
    )


class _Rows:
    """Tables out of readings."""

    def __init__(self, model: ModelProfile, readings: Readings) -> None:
        self._readings = readings
        self._counts = [count for _, count in kinds_of(model)]
        # What a profile says is what was measured first of each.
        self._how: dict[str, str] = {}
        for point in readings.points:
            self._how.setdefault(point.what, point.how)

    def link(self) -> tuple[tuple[int, int], ...]:
        """(bytes, ns)."""
        found = self._of(LINK)
        return _rising([(size, ns) for (size, _), ns in found.items()])

    def by_tokens(self, what: str) -> tuple[tuple[int, int], ...]:
        """(tokens, ns)."""
        return _rising([(tokens, ns) for (tokens, _), ns in self._of(what).items()])

    def dense(self) -> tuple[tuple[int, int, int], ...]:
        """(tokens, context, ns)."""
        found = self._of(DENSE)
        made: list[tuple[int, int, int]] = []
        least: dict[int, int] = {}
        for tokens in sorted({tokens for tokens, _ in found}):
            line = {
                context: max(ns, least.get(context, 0))
                for (count, context), ns in found.items()
                if count == tokens
            }
            rising = _rising(line.items())
            made += [(tokens, context, ns) for context, ns in rising]
            least = dict(rising)
        return tuple(made)

    def head(self, step_ns: float) -> tuple[tuple[int, int], ...]:
        """(tokens, ns): the output head, and what the host does once a forward pass."""
        found = self._of(HEAD) or {(1, 0): 0.0, (2, 0): 0.0}
        return _rising([(tokens, ns + step_ns) for (tokens, _), ns in found.items()])

    def _of(self, what: str) -> dict[tuple[int, int], float]:
        """(size, context) -> ns, the mean over layers."""
        found: dict[tuple[int, int], float] = {}
        shares = [count / sum(self._counts) for count in self._counts]
        apart = what in (DENSE, EXPERT, HOST_EXPERT)
        for point, spread in self._readings.points.items():
            if point.what == what and point.how == self._how[what]:
                key = point.size, point.context
                share = shares[point.kind] if apart else 1.0
                found[key] = found.get(key, 0.0) + share * spread.median
        return found


def _rising(rows: Iterable[tuple[int, float]]) -> tuple[tuple[int, int], ...]:
    """Sorted; a time below a smaller size's is noise, and takes that one's."""
    ordered = sorted(rows)
    times = accumulate((round(ns) for _, ns in ordered), max)
    return tuple((size, ns) for (size, _), ns in zip(ordered, times, strict=True))


def _link(curve: Sequence[tuple[int, int]], handover_ns: int) -> Link:
    """The curve; beyond it the rate of its upper half, before it the line of its first points."""
    (first, first_ns), (last, last_ns) = curve[0], curve[-1]
    half, half_ns = min(curve, key=lambda row: abs(row[0] - last // 2))
    if half == last or half_ns == last_ns:
        half = half_ns = 0
    latency_ns = first_ns
    if len(curve) > 1:
        second, second_ns = curve[1]
        latency_ns = first_ns - round((second_ns - first_ns) * first / (second - first))
    return Link(
        bytes_per_s=(last - half) * 1e9 / max(1, last_ns - half_ns),
        latency_ns=max(0, min(latency_ns, first_ns)),
        chunk_bytes=CHUNK_BYTES,
        channels=1,
        curve=tuple(curve),
        handover_ns=handover_ns,
    )


def _measured(
    request: Calibration, bench: Bench, progress: Progress
) -> tuple[Readings, HardwareProfile, dict[str, Any]]:
    model = request.model
    grid = grid_of(model, request.tokens)
    points = points_of(bench, grid, len(kinds_of(model)), head=model.head_bytes > 0)
    readings = take(bench, points, request.repeats, progress)
    facts = bench.facts()
    machine = ", ".join(f"{key} {value}" for key, value in sorted(facts.items()))
    provenance = (
        f"medians of {request.repeats} repeats of microbenchmarks by moesim {__version__}, "
        f"{model.name} on {request.device}: {machine}"
    )
    profile = profile_of(request, readings, bench.memory(), bench.workers(), provenance)
    # What no file says cannot be read back: the round trip is the check of every key.
    profile = HardwareProfile.from_dict(profile.to_dict(), str(request.out))
    host = {
        "moesim": __version__,
        "device": bench.manifest(),
        "model": model.name,
        "model_digest": model.digest,
        "repeats": request.repeats,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    }
    return readings, profile, host


# ---- writing -------------------------------------------------------------------------------------


def toml_of(profile: HardwareProfile, readings: Readings, beside: str) -> str:
    """The profile as a file, with the spread of what it rests on beside each number."""
    named = readings.named
    data = profile.to_dict()
    memory, link, host = data["memory"], data["link"], data["host"]
    compute = data["compute"]
    lines = [
        f"# Measured; every reading with its quartiles: {beside}",
        f"schema = {data['schema']}",
        *(f"{key} = {json.dumps(data[key])}" for key in ("name", "source", "provenance")),
        "",
        "[memory]",
        f"device_bytes = {memory['device_bytes']}",
        f"reserved_bytes = {memory['reserved_bytes']}",
        "",
        "[link]",
        f"bytes_per_s = {link['bytes_per_s']!r}  # beyond the last row of the curve",
        f"latency_ns = {link['latency_ns']}  # of the curve's line at no bytes",
        f"chunk_bytes = {link['chunk_bytes']}  # chosen, not measured",
        f"channels = {link['channels']}",
        f"handover_ns = {link['handover_ns']}{_note(named[HANDOVER])}",
        *_table("curve", ("bytes", "ns"), link["curve"]),
        "",
        "[compute]",
        'kind = "table"',
        f"model = {json.dumps(compute['model'])}",
        *_table("expert", ("tokens", "ns"), compute["expert"]),
        *_table("dense", ("tokens", "context", "ns"), compute["dense"]),
        f"# with the host's work once a forward pass, {round(named[STEP].median)} ns",
        *_table("head", ("tokens", "ns"), compute["head"]),
        "",
        "[host]",
        f"sync_ns = {host['sync_ns']}{_note(named[SYNC])}",
        f"plan_ns = {host['plan_ns']}{_note(named[PLAN])}",
        f"policy_ops_per_s = {host['policy_ops_per_s']!r}{_note(named[OPS])}",
        f"policy_bytes_per_s = {host['policy_bytes_per_s']!r}{_note(named[BYTES])}",
        f"workers = {host['workers']}",
        "",
        "[host.cpu]",
        'kind = "table"',
        *_table("expert", ("tokens", "ns"), host["cpu"]["expert"]),
    ]
    return "\n".join(lines) + "\n"


def _note(spread: Spread) -> str:
    return f"  # half of {spread.repeats} repeats from {spread.q1:.6g} to {spread.q3:.6g}"


def _table(key: str, columns: Sequence[str], rows: Sequence[Sequence[int]]) -> list[str]:
    head = f"{key} = [  # {', '.join(columns)}"
    return [head, *(f"  {json.dumps(list(row))}," for row in rows), "]"]


def _row(point: Point, spread: Spread) -> dict[str, Any]:
    return {**point._asdict(), **_spread(spread)}


def _spread(spread: Spread) -> dict[str, Any]:
    return {
        "median": spread.median,
        "q1": spread.q1,
        "q3": spread.q3,
        "repeats": spread.repeats,
    }


def _write_readings(path: Path, readings: Readings, host: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_row(point, spread) for point, spread in readings.points.items()]
    for name, spread in readings.named.items():
        rows.append(_row(Point(name, "", 0, 0), spread))
    texts, wholes, floats = ("what", "how"), ("kind", "size", "context"), ("median", "q1", "q3")
    schema = pa.schema(
        [
            *((name, pa.string()) for name in texts),
            *((name, pa.int64()) for name in wholes),
            *((name, pa.float64()) for name in floats),
            ("repeats", pa.int64()),
        ],
        metadata={"moesim": json.dumps(dict(host), sort_keys=True)},
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _refuse(request: Calibration) -> None:
    if request.device not in KINDS:
        raise UsageError(f"--device {request.device}: unknown; choose from {', '.join(KINDS)}")
    if request.out.suffix != ".toml":
        raise UsageError(f"--out {request.out}: a profile's name must end in .toml; add that")
    if request.out.is_dir():
        raise UsageError(f"--out {request.out}: is a folder; name a file in it")


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` for what is not whole yet; gone afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".calibrate-", dir=out.parent)
    except OSError as error:
        raise UsageError(
            f"--out {out}: cannot be written ({error.strerror or error}); choose another path"
        ) from None
    try:
        yield Path(folder.name)
    finally:
        with suppress(OSError):
            folder.cleanup()
