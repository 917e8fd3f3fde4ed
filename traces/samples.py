"""Traces that ship with moesim."""

from __future__ import annotations

from pathlib import Path

from moesim.errors import TraceError

SAMPLES = {name: f"{name}.parquet" for name in ("demo", "demo-mixtral", "demo-qwen", "demo-switch")}


def trace_path(name_or_path: str) -> Path:
    """The file of a shipped sample, or the path itself.

    Raises
    ------
    TraceError
        If there is no such file.
    """
    if name_or_path in SAMPLES:
        return Path(__file__).parent / "samples" / SAMPLES[name_or_path]
    path = Path(name_or_path)
    if not path.exists():
        known = ", ".join(SAMPLES)
        raise TraceError(f"{path}: no such file; name a trace file or a shipped sample ({known})")
    return path
