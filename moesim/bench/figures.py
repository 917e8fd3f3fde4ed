"""What a benchmark reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Promise:
    """What the project promises of a number: at least, or at most."""

    least: float | None = None
    most: float | None = None

    def kept(self, value: float) -> bool:
        """Whether a number keeps it."""
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )

    def to_dict(self) -> dict[str, float]:
        """``at_least`` or ``at_most``."""
        named = {"at_least": self.least, "at_most": self.most}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Samples:
    """The same thing measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    @property
    def half_spread(self) -> float:
        """Half of what lies between the extremes, as a share of the median."""
        return (max(self.values) - min(self.values)) / 2 / self.median

    @classmethod
    def rates(cls, count: int, taken_ns: Sequence[int]) -> Samples:
        """How many a second, each time."""
        return cls(tuple(count * 1e9 / ns for ns in taken_ns))

    @classmethod
    def each(cls, taken_ns: Sequence[int], count: int) -> Samples:
        """Nanoseconds for one of ``count``, each time."""
        return cls(tuple(ns / count for ns in taken_ns))


@dataclass(frozen=True, slots=True)
class Beside:
    """The reference: what it is, its number, and how that came from its samples."""

    name: str
    value: float
    how: str
    samples: Samples

    @classmethod
    def best_rate(cls, name: str, samples: Samples) -> Beside:
        """The reference's best time, which is the hardest to beat."""
        return cls(name, max(samples.values), f"best of {len(samples.values)}", samples)

    @classmethod
    def middle(cls, name: str, samples: Samples) -> Beside:
        """The reference's median."""
        return cls(name, samples.median, f"median of {len(samples.values)}", samples)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of one benchmark. With a reference the ratio is promised, else the number."""

    benchmark: str
    case: str
    unit: str
    measured: Samples
    beside: Beside | None = None
    promise: Promise | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Measured over reference."""
        return None if self.beside is None else self.measured.median / self.beside.value

    @property
    def kept(self) -> bool | None:
        """Whether the promise was kept; None without one."""
        ratio = self.ratio
        value = self.measured.median if ratio is None else ratio
        return None if self.promise is None else self.promise.kept(value)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        beside = self.beside
        return {
            "benchmark": self.benchmark,
            "case": self.case,
            "unit": self.unit,
            "median": self.measured.median,
            "half_spread": self.measured.half_spread,
            "samples": list(self.measured.values),
            "reference": None
            if beside is None
            else {
                "name": beside.name,
                "value": beside.value,
                "how": beside.how,
                "half_spread": beside.samples.half_spread,
                "samples": list(beside.samples.values),
            },
            "ratio": self.ratio,
            "promise": None if self.promise is None else self.promise.to_dict(),
            "kept": self.kept,
            "facts": dict(self.facts),
        }
