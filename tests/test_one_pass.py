"""Law I6 for a whole replay: how the file is read and what runs beside changes no number."""

from __future__ import annotations

from typing import Any

import pytest

from moesim.profile import load_hardware
from moesim.replays import Request, replay
from moesim.traces.samples import trace_path


def runs(**more: Any) -> list[dict[str, Any]]:
    request = Request(trace=trace_path("demo"), hardware=load_hardware("rtx4090"), limit=6, **more)
    return list(replay(request)["runs"])


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("batch_rows", [1, 7, 1000])
def test_the_reader_s_batches_change_nothing(engine: str, batch_rows: int) -> None:
    asked: dict[str, Any] = {"policies": ("lru", "next-gate"), "engine": engine}
    assert runs(**asked, batch_rows=batch_rows) == runs(**asked)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_what_runs_in_the_same_pass_changes_nothing(engine: str) -> None:
    policies, capacities = ("lru", "random", "min", "next-gate"), ("10%", "4/layer")
    together = runs(policies=policies, capacities=capacities, engine=engine)
    alone = [
        runs(policies=(policy,), capacities=(capacity,), engine=engine)[0]
        for policy in policies
        for capacity in capacities
    ]
    for run in together:
        # What compares runs with each other is no part of any.
        run.pop("against_best", None)
    assert together == alone
