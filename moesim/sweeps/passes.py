"""Which configurations share a pass over the trace, and how passes are cut for the workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moesim.sweeps.experiment import Configuration, Option, options_of

MOST = 32
"""Configurations of a pass: a pass that is killed begins anew, so none may be long."""
TURNS = 4
"""Passes for each worker, where there are enough: whoever is done early takes another."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Configurations, by their place in the experiment, that differ in policy and capacity alone.

    Every policy is crossed with every capacity.
    """

    rest: tuple[tuple[str, Option], ...]
    policies: tuple[str, ...]
    capacities: tuple[str, ...]
    places: tuple[int, ...]

    @property
    def options(self) -> dict[str, object]:
        """For ``moesim.ask.replays.request_of``."""
        shared = {"policy": list(self.policies), "capacity": list(self.capacities)}
        return {**options_of(dict(self.rest)), **shared}


def passes(configurations: Sequence[Configuration], jobs: int) -> list[Pass]:
    """Cut an experiment into passes, in its order. Results do not depend on how."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, configuration in enumerate(configurations):
        groups.setdefault((configuration.grid, configuration.rest), []).append(place)
    size = max(1, min(MOST, -(-len(configurations) // (TURNS * max(1, jobs)))))
    return [
        part for places in groups.values() for part in _cut(configurations, tuple(places), size)
    ]


def _cut(
    configurations: Sequence[Configuration], places: tuple[int, ...], size: int
) -> Iterator[Pass]:
    at = {_pair(configurations[place]): place for place in places}
    policies = list(dict.fromkeys(policy for policy, _ in at))
    capacities = list(dict.fromkeys(capacity for _, capacity in at))
    # Runs of one policy at many capacities share more of a pass than those of many policies.
    wide = min(len(capacities), size)
    tall = max(1, size // wide)
    for i in range(0, len(policies), tall):
        for j in range(0, len(capacities), wide):
            some, sizes = policies[i : i + tall], capacities[j : j + wide]
            here = tuple(at[p, c] for p in some for c in sizes)
            yield Pass(configurations[here[0]].rest, tuple(some), tuple(sizes), here)


def _pair(configuration: Configuration) -> tuple[str, str]:
    return str(configuration.options["policy"]), str(configuration.options["capacity"])
