"""Sweeps: many workers over one, and Ray over processes of this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from moesim.bench.figures import Beside, Figure, Promise, Samples
from moesim.bench.measure import interleave
from moesim.bench.processes import MOESIM, wall_ns
from moesim.bench.workshop import DisagreementError, Workshop
from moesim.errors import NotRunError

WORKERS = 2
POLICIES = ("lru", "lfu", "fifo", "slru", "lfru")
SHARES = tuple(f"{share}%" for share in range(10, 60, 5))


def sweep(shop: Workshop) -> Iterator[Figure]:
    """Configurations a second of `moesim sweep`: two workers over one, and Ray over processes."""
    if (os.cpu_count() or 1) < WORKERS:
        raise NotRunError(f"needs {WORKERS} cores")
    experiment, count = _experiment(shop)
    sides: dict[str, tuple[str, ...]] = {"one": ("--jobs", "1"), "two": ("--jobs", str(WORKERS))}
    if find_spec("ray") is not None:
        sides["ray"] = ("--jobs", str(WORKERS), "--executor", "ray")
    timed = _Timed(shop, experiment)
    with _every_core():
        wholes = {name: partial(timed, name, words) for name, words in sides.items()}
        taken = interleave(shop.settings.repeats, wholes)
    facts = {"configurations": count, "workers": WORKERS}
    yield Figure(
        benchmark="sweep",
        case=f"{count} configurations, {WORKERS} workers, whole",
        unit="configurations/s",
        measured=Samples.rates(count, taken["two"]),
        beside=Beside.best_rate("one worker", Samples.rates(count, taken["one"])),
        promise=Promise(least=1.8),
        facts=facts,
    )
    if "ray" in sides:
        yield Figure(
            benchmark="sweep",
            case=f"{count} configurations, Ray, start-up apart",
            unit="configurations/s",
            measured=Samples.rates(count, timed.after_start_ns["ray"]),
            beside=Beside.middle(
                f"{WORKERS} processes", Samples.rates(count, timed.after_start_ns["two"])
            ),
            promise=Promise(least=0.83),
            facts=facts,
        )


class _Timed:
    """Sweeps into fresh folders, whose tables must be equal."""

    def __init__(self, shop: Workshop, experiment: Path) -> None:
        self._shop, self._experiment = shop, experiment
        self._table = b""
        self.after_start_ns: dict[str, list[int]] = {}

    def __call__(self, name: str, words: tuple[str, ...]) -> int:
        self._shop.say(f"sweep: {name}")
        out = self._shop.folder / "swept"
        command = (*MOESIM, "sweep", str(self._experiment), "--out", str(out), *words)
        try:
            whole_ns = wall_ns(self._shop, command)
            # Everything is finished by now: what is left is to start, to ask, and to end.
            start_ns = wall_ns(self._shop, command)
            table = (out / "results.parquet").read_bytes()
        finally:
            shutil.rmtree(out, ignore_errors=True)
        if table != (self._table or table):
            raise DisagreementError("sweep: the tables of two sweeps differ")
        self._table = table
        self.after_start_ns.setdefault(name, []).append(max(1, whole_ns - start_ns))
        return whole_ns


def _experiment(shop: Workshop) -> tuple[Path, int]:
    """An experiment file, and how many configurations it has."""
    each = len(POLICIES) * len(SHARES)
    rates = max(1, round(shop.settings.configurations / each))
    path = shop.folder / "sweep.toml"
    limit = shop.settings.limit
    lines = [
        "[[grid]]",
        'name = "bench"',
        f'trace = "{shop.trace.absolute()}"',
        f"policy = {list(POLICIES)}",
        f"capacity = {list(SHARES)}",
        f"bandwidth = {[f'{4 + number}GB/s' for number in range(rates)]}",
        *([f"limit = {limit}"] if limit else []),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path, rates * each


@contextmanager
def _every_core() -> Iterator[None]:
    """Workers need more than the one core that benchmarks keep to."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
