"""What a planner is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moesim.degrade import Allowed
from moesim.errors import UsageError
from moesim.past import Share
from moesim.planning.fit import ENCODINGS, Fitting
from moesim.planning.genetic import Genetic
from moesim.planning.latency import METRICS
from moesim.planning.space import SPARES
from moesim.planning.trials import QUALITIES
from moesim.profile import HardwareProfile, ModelProfile

METHODS = ("genetic", "uniform", "greedy", "importance", "evolution", "exact")
"""``exact``: dynamic programming where quality is a sum over layers: over the rehearsed quality, or
over what sets that never change would keep."""

RUNS = ("rehearsal", "replay", "real")


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan. Names are those of the command line.

    Raises UsageError for a value out of its range.
    """

    trace: Path
    hardware: HardwareProfile
    budget_bytes: int
    """0: the first of ``shares``."""
    model: ModelProfile | None = None
    """None: the one that the trace was recorded from."""
    policy: str = "swapmoe"
    settings: Sequence[str] = ()
    latency_limit_ns: float = math.inf
    latency_of: str = "tpot"
    quality: str = "mass"
    spare: str = ""
    """"": as the policy needs it."""
    least: int = 0
    """Fewest slots of a layer; 0: the model's top k."""
    period: int = 0
    """0: found by the sweep."""
    swaps: int = 0
    """0: as the policy's preset has it."""
    tolerance: float = 0.02
    """What the sweep of the period takes for a rise of latency, as a share."""
    runs: str = ""
    """What random allocations are run by: the rehearsal (``moesim.planning.rehearse``), of which
    ``checks`` are replayed as well, or replay, or the model itself (``real``, of which ``checks``
    are replayed for their latency); "": the rehearsal where the policy has one."""
    configs: int = 200
    checks: int = 6
    held_out: float = 0.2
    near: float = 0.5
    """Share of the random allocations that fill the budget; the others fill any part of the memory
    between the least and all."""
    encoding: str = "uses"
    fitting: Fitting = field(default_factory=Fitting)
    genetic: Genetic = field(default_factory=Genetic)
    method: str = "genetic"
    latency_weight: float = 0.0
    share: Share | None = None
    allowed: Allowed = field(default_factory=Allowed)
    limit: int | None = None
    chunk_tokens: int = 0
    seed: int = 0
    more_budgets: tuple[int, ...] = ()
    """Other budgets that the same runs shall serve: those that fill a budget fill these in turn."""
    shares: tuple[float, ...] = ()
    """Budgets instead, as shares of the experts' bytes on top of what every plan holds."""

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--latency-of", self.latency_of, METRICS),
            ("--quality", self.quality, tuple(QUALITIES)),
            ("--spare", self.spare, ("", *SPARES)),
            ("--encoding", self.encoding, ENCODINGS),
            ("--method", self.method, METHODS),
            ("--runs", self.runs, ("", *RUNS)),
        ):
            if value not in known:
                raise UsageError(
                    f"{option} {value}: must be one of {', '.join(filter(None, known))}"
                )
        if (self.quality == "loss") != (self.runs == "real"):
            raise UsageError(
                f"--quality {self.quality}: --runs real measures loss, and nothing else does; give "
                "both or neither"
            )
        if self.checks < 2:
            raise UsageError(f"--checks {self.checks}: too few to fit anything; give at least 2")
        if self.configs < 10:
            raise UsageError(f"--configs {self.configs}: too few to fit anything; give at least 10")
