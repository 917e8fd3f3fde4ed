"""The table of benchmarks, and running them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moesim.bench.counting import flat, lfu, lru
from moesim.bench.engines import python, reference, scale
from moesim.bench.figures import Figure
from moesim.bench.maps import maps
from moesim.bench.measure import machine, one_core
from moesim.bench.processes import compile_all, memory, start
from moesim.bench.record import record
from moesim.bench.sweeping import sweep
from moesim.bench.workshop import Settings, Workshop
from moesim.errors import NotRunError, UsageError

ALL = "all"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One entry. ``quick`` ones run unless others are asked for."""

    name: str
    measure: Callable[[Workshop], Iterator[Figure]]
    quick: bool = True

    @property
    def summary(self) -> str:
        """What it measures."""
        return (self.measure.__doc__ or "").splitlines()[0].removesuffix(".")


BENCHMARKS = (
    Benchmark("lru", lru),
    Benchmark("flat", flat),
    Benchmark("lfu", lfu),
    Benchmark("reference", reference),
    Benchmark("python", python),
    Benchmark("scale", scale, quick=False),
    Benchmark("start", start),
    Benchmark("compile", compile_all, quick=False),
    Benchmark("memory", memory, quick=False),
    Benchmark("maps", maps, quick=False),
    Benchmark("record", record, quick=False),
    Benchmark("sweep", sweep, quick=False),
)


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks by name; ``all``, or without names the quick ones.

    Raises
    ------
    UsageError
        For an unknown name, with close matches.
    """
    if not names:
        return [b for b in BENCHMARKS if b.quick]
    known = [b.name for b in BENCHMARKS]
    for name in names:
        if name not in (*known, ALL):
            close = get_close_matches(name.lower(), known, 1)
            meant = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
            raise UsageError(f"bench {name}: no such benchmark{meant}")
    return [b for b in BENCHMARKS if b.name in names or ALL in names]


def run(names: Sequence[str], settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; the object that ``--json`` prints.

    Raises
    ------
    MoesimError
        For a mistake in the settings, and where two sides that should count alike do not.
    """
    benchmarks = chosen(names)
    figures: list[Figure] = []
    refused: list[dict[str, str]] = []
    facts = machine()
    with one_core() as core, tempfile.TemporaryDirectory(prefix="moesim-bench-") as folder:
        shop = Workshop(settings, Path(folder), say)
        try:
            for benchmark in benchmarks:
                try:
                    figures += benchmark.measure(shop)
                except NotRunError as error:
                    refused.append({"benchmark": benchmark.name, "not_run": str(error)})
        finally:
            shop.close()
        facts |= {"core": core, "libcachesim": shop.rival_version}
    return {
        "schema": 1,
        "machine": facts,
        "settings": {**asdict(settings), "trace": str(settings.trace) if settings.trace else None},
        "figures": [figure.to_dict() for figure in figures],
        "not_run": refused,
    }
