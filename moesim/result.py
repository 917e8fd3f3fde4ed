"""Results: a run's summary, and the folder that holds a finished run.

A folder is named by a digest of everything that determines the run, and appears whole or not at
all. Equal inputs give equal bytes; what may differ (host, wall time) is in ``host.json`` alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moesim import __version__
from moesim.errors import UsageError

SCHEMA = 1
MANIFEST, SUMMARY, REQUESTS = "manifest.json", "summary.json", "requests.parquet"
TIMELINE, HOST = "timeline.json", "host.json"
ATTEMPTS = 100


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@cache
def source_digest() -> str:
    """SHA-256 (hex) over the simulator's own source, so that a changed engine is a new run."""
    import moesim

    root = Path(moesim.__file__).parent
    files = [
        path
        for part in ("", "engine", "policies", "serve", "traces")
        for path in sorted((root / part).glob("*.py"))
    ]
    total = hashlib.sha256()
    for path in files:
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, P50, P90, P99 (linear interpolation); None where there are no values."""
    if not len(values):
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    array = np.asarray(values, np.float64)
    p50, p90, p99 = np.percentile(array, [50, 90, 99])
    return {"mean": float(array.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


class RunStore:
    """The folder of runs (``--out``)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(root, error) from None

    def path(self, run_id: str) -> Path:
        """Where a run lies."""
        return self.root / run_id

    def finished(self, run_id: str, *, timeline: bool = False) -> dict[str, Any] | None:
        """The summary of a run made before, or None."""
        folder = self.path(run_id)
        whole = (REQUESTS, HOST, TIMELINE) if timeline else (REQUESTS, HOST)
        if not all((folder / name).is_file() for name in whole):
            return None
        try:
            return read_run(folder)[1]
        except UsageError:
            return None

    def write(
        self,
        run_id: str,
        manifest: Mapping[str, Any],
        summary: Mapping[str, Any],
        requests: Sequence[Mapping[str, Any]],
        timeline: Sequence[Mapping[str, Any]] | None,
        host: Mapping[str, Any],
    ) -> Path:
        """Write a finished run beside, then rename.

        Raises
        ------
        UsageError
            Naming the folder and the reason; nothing is left behind.
        """
        target = self.path(run_id)
        beside = self.root / f".{run_id}.tmp-{os.getpid()}"
        # A killed process of the same number may have left one.
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir()
            (beside / MANIFEST).write_text(_pretty(manifest))
            (beside / SUMMARY).write_text(_pretty(summary))
            (beside / HOST).write_text(_pretty(host))
            _write_requests(beside / REQUESTS, requests)
            if timeline is not None:
                (beside / TIMELINE).write_text(
                    json.dumps({"displayTimeUnit": "ns", "traceEvents": list(timeline)})
                )
            _put(beside, target)
        except OSError as error:
            raise _unwritable(target, error) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return target


def _put(beside: Path, target: Path) -> None:
    """Rename, whatever lies there. Another process may put an equal run there meanwhile."""
    gone = beside.with_name(f"{beside.name}-old")
    for _ in range(ATTEMPTS):
        try:
            beside.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if _holds(target, beside):
            return
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            target.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    raise OSError(errno.EEXIST, "other processes write there")


def _holds(target: Path, beside: Path) -> bool:
    """Whether an equal run lies there whole, which somebody may be reading."""
    if any(not (target / path.name).is_file() for path in beside.iterdir()):
        return False
    try:
        return read_run(target) == read_run(beside)
    except UsageError:
        return False


def host_facts(wall_s: float) -> dict[str, Any]:
    """What may differ between equal runs."""
    return {
        "wall_s": round(wall_s, 6),
        "moesim": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
    }


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and summary of a run folder.

    Raises
    ------
    UsageError
        If it is no finished run.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        summary = json.loads((folder / SUMMARY).read_text())
        if not isinstance(manifest, dict) or not isinstance(summary, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder}: not a finished run ({type(error).__name__}); name a folder that "
            "`moesim replay --out` wrote"
        ) from None
    return manifest, summary


def request_times(folder: Path) -> list[tuple[int, float | None]]:
    """(request, TPOT in ns) of each request of a finished run."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(folder / REQUESTS) as file:
        table = file.read(columns=["request", "tpot_ns"])
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _write_requests(path: Path, requests: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("request", pa.int64()),
            ("arrival_ns", pa.int64()),
            ("begin_ns", pa.int64()),
            ("first_token_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("ttft_ns", pa.int64()),
            ("tpot_ns", pa.float64()),
            ("queue_ns", pa.int64()),
            ("end_to_end_ns", pa.int64()),
            ("prompt_tokens", pa.int64()),
            ("output_tokens", pa.int64()),
            ("stall_ns", pa.int64()),
            ("misses", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(list(requests), schema), path)


class UnwritableError(UsageError):
    """A folder of runs that cannot be written: no run can be kept there, whatever it is."""


def _unwritable(path: Path, error: OSError) -> UnwritableError:
    return UnwritableError(
        f"{path}: cannot be written ({error.strerror or error}); choose another --out"
    )
