"""How far simulated times may be off: the simulator's own error, and the machine's assumed rates.

The first is what validation found (``moesim validate``): the ninth decile, over configurations, of
the error of mean TPOT and mean TTFT. The second concerns machines that nobody measured: the same
replay with every rate a fifth lower and a quarter higher.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np

from moesim.errors import UsageError
from moesim.profile import HardwareProfile, Roofline

SLOWER, QUICKER = 0.8, 1.25
"""What the rates of a machine that was not measured may be times, by assumption."""
_FILE = "requests.csv"
_COLUMNS = {"configuration", "origin", "repeat", "ttft_ns", "tpot_ns"}


@dataclass(frozen=True, slots=True)
class Trust:
    """Relative errors of simulated means: the ninth decile over ``configurations`` validated."""

    tpot: float
    ttft: float
    configurations: int
    machine: str

    def of(self, metric: str) -> float:
        """The error of ``tpot`` or ``ttft``."""
        return self.tpot if metric == "tpot" else self.ttft


SHIPPED = Trust(tpot=0.0595, ttft=0.0390, configurations=14, machine="a CPU with two cores")
"""From ``tests/data/validation/amd-epyc``; a test works it out anew."""


def read_trust(folder: Path) -> Trust:
    """The same from a folder that ``moesim real campaign`` or ``moesim validate`` wrote.

    Raises
    ------
    UsageError
        If it holds no requests simulated and measured.
    """
    path = folder / _FILE
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(
            f"--validation {path}: {error.strerror}; name a folder of `moesim real campaign`"
        ) from None
    if not rows or not set(rows[0]) >= _COLUMNS:
        raise UsageError(f"--validation {path}: lacks columns; write it with `moesim validate`")
    tpot, ttft = (_errors(rows, f"{metric}_ns", path) for metric in ("tpot", "ttft"))
    trust = Trust(_decile(tpot), _decile(ttft), len(tpot), folder.name)
    if max(trust.tpot, trust.ttft) >= 1.0:
        raise UsageError(
            f"--validation {path}: simulated times are off by as much as the measured ones, which "
            "tells nothing; calibrate the machine and run it anew"
        )
    return trust


def _decile(errors: Iterable[float]) -> float:
    return float(np.percentile(np.abs(list(errors)), 90))


def _errors(rows: Iterable[Mapping[str, str]], column: str, path: Path) -> list[float]:
    """Simulated over measured less 1, by configuration; means over requests, medians of repeats."""
    times: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    try:
        for row in rows:
            value = float(row[column] or "nan")
            if not math.isnan(value):
                times[row["configuration"], row["origin"]][row["repeat"]].append(value)
    except ValueError as error:
        raise UsageError(f"--validation {path}: {error}; write it anew") from None
    middle = {key: median(fmean(v) for v in repeats.values()) for key, repeats in times.items()}
    both = [c for c, origin in middle if origin == "measured" and (c, "simulated") in middle]
    if not both:
        raise UsageError(f"--validation {path}: nothing is both simulated and measured in it")
    return [middle[c, "simulated"] / middle[c, "measured"] - 1 for c in both]


def variants(hardware: HardwareProfile) -> tuple[HardwareProfile, ...]:
    """The machine with its rates lower and higher; none where they were measured."""
    if hardware.source == "measured":
        return ()
    return tuple(_scaled(hardware, factor) for factor in (SLOWER, QUICKER))


def _scaled(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    link, compute = hardware.link, hardware.compute
    curve = tuple((nbytes, round(ns / factor)) for nbytes, ns in link.curve)
    if isinstance(compute, Roofline):
        compute = replace(
            compute,
            flops_per_s=compute.flops_per_s * factor,
            bytes_per_s=compute.bytes_per_s * factor,
        )
    link = replace(link, bytes_per_s=link.bytes_per_s * factor, curve=curve)
    return replace(hardware, link=link, compute=compute)
