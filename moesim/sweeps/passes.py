"""Which configurations share a pass over the trace, and how passes are cut for the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from moesim.sweeps.experiment import Configuration, Option, options_of

MOST = 32
"""Configurations of a pass: a pass that is killed begins anew, so none may be long."""
TURNS = 2
"""Passes for each worker among those that are left: the last are short, so that workers end
together, whatever a configuration costs (factoring; Flynn Hummel, Schonberg and Flynn, 1992)."""


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
    size = partial(_size, len(configurations), jobs)
    made: list[Pass] = []
    before = 0
    for places in groups.values():
        made += _cut(configurations, tuple(places), size, before)
        before += len(places)
    return made


def _size(total: int, jobs: int, before: int) -> int:
    """Configurations of the pass that ``before`` others precede."""
    if jobs == 1:
        return min(MOST, -(-total // 4))
    return min(MOST, -(-(total - before) // (TURNS * jobs)))


def _cut(
    configurations: Sequence[Configuration],
    places: tuple[int, ...],
    size: Callable[[int], int],
    before: int,
) -> Iterator[Pass]:
    at = {_pair(configurations[place]): place for place in places}
    policies = list(dict.fromkeys(policy for policy, _ in at))
    capacities = list(dict.fromkeys(capacity for _, capacity in at))
    while policies:
        most = size(before)
        # Runs of one policy at many capacities share more of a pass than those of many policies.
        wide = -(-len(capacities) // -(-len(capacities) // most))
        tall = max(1, most // wide)
        some, policies = policies[:tall], policies[tall:]
        for j in range(0, len(capacities), wide):
            sizes = capacities[j : j + wide]
            here = tuple(at[p, c] for p in some for c in sizes)
            yield Pass(configurations[here[0]].rest, tuple(some), tuple(sizes), here)
        before += len(some) * len(capacities)


def _pair(configuration: Configuration) -> tuple[str, str]:
    return str(configuration.options["policy"]), str(configuration.options["capacity"])
