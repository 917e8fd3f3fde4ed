"""What is asked for: a replay whose policy and capacity are open, and what it must reach."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from moesim.errors import UsageError
from moesim.replays import Request

METRICS = ("tpot", "ttft")
STATISTICS = ("mean", "p50", "p90", "p99")
USUAL = "p90"
"""The statistic of a target that names none: what nine requests of ten are served within."""
_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_HOW = "write tpot=50ms or ttft.p99=2s (statistics: mean, p50, p90, p99)"


@dataclass(frozen=True, slots=True)
class Target:
    """A service-level objective: ``statistic`` of ``metric`` over requests at most ``most_ns``."""

    metric: str
    statistic: str
    most_ns: int

    def of(self, times: Mapping[str, Any]) -> float | None:
        """The number that it is about, in ns; ``times`` has ``tpot_ns`` and ``ttft_ns``."""
        value = times[f"{self.metric}_ns"][self.statistic]
        return None if value is None else float(value)

    def __str__(self) -> str:
        return f"{self.statistic} {self.metric.upper()} of at most {self.most_ns / 1e6:g} ms"


@dataclass(frozen=True, slots=True)
class Question:
    """What to advise on.

    request : the replay; its policies and capacities are chosen by the adviser.
    targets : what must be met; without any, the quickest setting that wastes no memory is sought.
    budget_bytes : device memory that experts may have; None: what the machine has left.
    policies : candidates; empty: every preset that could be used.
    finalists : how many candidates are followed along the whole curve.
    validation : a folder of ``moesim real campaign`` that says how far simulated times are off;
        None: the shipped one.
    """

    request: Request
    targets: tuple[Target, ...] = ()
    budget_bytes: int | None = None
    policies: tuple[str, ...] = ()
    finalists: int = 4
    validation: Path | None = None


def parse_slo(text: str) -> tuple[Target, ...]:
    """Read ``--slo``: ``tpot=50ms``, ``ttft.p99=2s``, several with commas.

    Raises
    ------
    UsageError
        For another spelling, or a metric that is given twice.
    """
    targets = tuple(_target(part.strip()) for part in text.split(","))
    named = [(t.metric, t.statistic) for t in targets]
    if len(set(named)) < len(named):
        raise UsageError(f"--slo {text}: names one thing twice; give each once")
    return targets


def _target(text: str) -> Target:
    match = re.fullmatch(r"([a-z]+)(?:\.([a-z0-9]+))?=([0-9]+(?:\.[0-9]+)?)(ns|us|ms|s)", text)
    if not match or match[1] not in METRICS or (match[2] or USUAL) not in STATISTICS:
        raise UsageError(f"--slo {text}: {_HOW}")
    most_ns = int(Fraction(match[3]) * _NS[match[4]])
    if not most_ns:
        raise UsageError(f"--slo {text}: must be more than nothing")
    return Target(match[1], match[2] or USUAL, most_ns)
