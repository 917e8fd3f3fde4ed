"""How things are timed, and on what."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moesim import __version__

Side = Callable[[], int]
"""Does its work once; tells how many ns of it count."""


def interleave(repeats: int, sides: Mapping[str, Side]) -> dict[str, list[int]]:
    """Every side once a round, so that what disturbs the machine disturbs them alike."""
    taken: dict[str, list[int]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            gc.collect()
            taken[name].append(side())
    return taken


@contextmanager
def one_core() -> Iterator[int | None]:
    """Stay on one core, and keep child processes there; its number, or None where nobody can."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    chosen = max(before)
    os.sched_setaffinity(0, {chosen})
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "moesim": __version__,
        **{name: version(name) for name in ("numba", "llvmlite", "numpy", "pyarrow", "simpy")},
        "load_before": _load(),
    }


def _load() -> float | None:
    """Processes that wanted to run in the last minute: above one, others were at work."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
