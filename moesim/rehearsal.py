"""A real run beside its simulation: the same configuration in the reference engine.

What differs when real time runs free is a number here, never a test (law (d) of the design).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from moesim.configuration import Configuration
from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Options
from moesim.engine.setup import Setup as EngineSetup
from moesim.factlog import Watched
from moesim.summary import summarise

Loads = Mapping[int, Set[int]]
"""Layer event -> the experts that it asked for and that arrived."""


def simulated(
    configuration: Configuration,
    real: Loads,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """What the simulator says of a configuration, and how its loads overlap with ``real`` ones."""
    policy = Watched(configuration.build())
    setup = configuration.setup(policy)
    engine = ReferenceEngine(
        EngineSetup(
            policy=policy,
            world=setup.world,
            costs=setup.costs,
            scheduler=setup.scheduler,
            options=Options(allocator="slots"),
            initial=setup.initial,
            initial_charged=setup.initial_charged,
        )
    )
    for count, work in enumerate(configuration.works()):
        engine.offer(work)
        engine.advance()
        progress(count + 1, configuration.requests)
    engine.close()
    while not engine.advance():
        pass
    summary = summarise(engine.tally)
    names = ("hits", "late_hits", "misses", "loads", "bytes_loaded", "time_ns", "stall_ns")
    more = ("times_ns", "ttft_ns", "tpot_ns", "decision_digest")
    return {
        "engine": "reference",
        **{name: summary[name] for name in (*names, *more)},
        "overlap": overlap(real, policy.loads),
    }


def overlap(a: Loads, b: Loads) -> dict[str, Any]:
    """How alike the loads of two runs are, by layer event.

    mean : over the events that loaded anything in either run, loads in both / loads in either.
    equal_events : those of them whose loads are the same.
    """
    events = sorted({e for loads in (a, b) for e, experts in loads.items() if experts})
    none: Set[int] = frozenset()
    pairs = [(a.get(e, none), b.get(e, none)) for e in events]
    shares = [len(x & y) / len(x | y) for x, y in pairs]
    return {
        "mean": sum(shares) / len(shares) if shares else None,
        "events": len(events),
        "equal_events": sum(x == y for x, y in pairs),
        "loads_in_both": sum(len(x & y) for x, y in pairs),
        "loads_in_either": sum(len(x | y) for x, y in pairs),
    }
