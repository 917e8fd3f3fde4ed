"""Run passes: in this process, in processes of this machine, or on a Ray cluster.

Every run is kept in its folder as soon as its pass ends, and a finished run is never made again:
that is all that resuming takes.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.ask.replays import request_of
from moesim.errors import MoesimError, UsageError
from moesim.result import UnwritableError
from moesim.sweeps.passes import Pass

REACH_S = 5.0
"""How long an address may take to answer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the configuration at a place: its run, or why there is none."""

    place: int
    run_id: str = ""
    reason: str = ""


Executor = Callable[[Sequence[Pass], Path], Iterator[list[Outcome]]]
"""Outcomes of passes as they end, in any order."""


def serve(one: Pass, runs: Path) -> list[Outcome]:
    """Run a pass. If a configuration of it cannot run, the others do."""
    try:
        return _together(one, runs)
    except UnwritableError:
        raise
    except MoesimError as error:
        if len(one.places) == 1:
            return [Outcome(one.places[0], reason=_line(error))]
    return [outcome for alone in _singles(one) for outcome in serve(alone, runs)]


def _together(one: Pass, runs: Path) -> list[Outcome]:
    from moesim.replays import replay

    answer = replay(request_of({**one.options, "out": str(runs)}))
    found = {(run["policy"], run["capacity"]): run for run in answer["runs"]}
    outcomes = []
    for place, (policy, capacity) in zip(one.places, _pairs(one), strict=True):
        run = found[policy, capacity]
        reason = _line(run["not_run"]) if "not_run" in run else ""
        outcomes.append(Outcome(place, "" if reason else Path(run["run_dir"]).name, reason))
    return outcomes


def _pairs(one: Pass) -> list[tuple[str, str]]:
    return [(policy, capacity) for policy in one.policies for capacity in one.capacities]


def _singles(one: Pass) -> Iterator[Pass]:
    for place, (policy, capacity) in zip(one.places, _pairs(one), strict=True):
        yield Pass(one.rest, (policy,), (capacity,), (place,))


def _line(what: object) -> str:
    return " ".join(str(what).split())


# ---- here ----------------------------------------------------------------------------------------


def local(jobs: int) -> Executor:
    """Processes of this machine; with one job, this process.

    A worker that is killed is a UsageError; what had ended is kept.
    """

    def execute(passes: Sequence[Pass], runs: Path) -> Iterator[list[Outcome]]:
        if jobs == 1 or len(passes) <= 1:
            yield from (serve(one, runs) for one in passes)
            return
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        pool = Parallel(n_jobs=min(jobs, len(passes)), return_as="generator_unordered")
        try:
            yield from pool(delayed(serve)(one, runs) for one in passes)
        except TerminatedWorkerError:
            raise UsageError(
                "--jobs: a worker was killed, perhaps for want of memory; what had ended is kept: "
                "run again, with fewer --jobs"
            ) from None

    return execute


# ---- on Ray --------------------------------------------------------------------------------------


def on_ray(address: str | None, jobs: int) -> Executor:
    """A Ray cluster: the one at an address, or one of ``jobs`` workers that is made here.

    A pass whose worker is lost runs once more; then its configurations are recorded as failed.
    """

    def execute(passes: Sequence[Pass], runs: Path) -> Iterator[list[Outcome]]:
        with _cluster(address, jobs) as ray:
            task = ray.remote(serve).options(max_retries=1)
            waiting = {task.remote(one, runs.resolve()): one for one in passes}
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1)
                yield _collected(ray, done[0], waiting.pop(done[0]))

    return execute


def _collected(ray: Any, done: Any, one: Pass) -> list[Outcome]:
    try:
        outcomes: list[Outcome] = ray.get(done)
        return outcomes
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, Exception) else error from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        reason = f"its worker was lost twice ({type(error).__name__})"
        return [Outcome(place, reason=reason) for place in one.places]


@contextmanager
def _cluster(address: str | None, jobs: int) -> Iterator[Any]:
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError(
            "--executor ray: needs ray, which is not installed; `pip install 'moesim[ray]'`"
        ) from None
    _refuse_unreachable(address)
    # Workers must find this very moesim, and whatever policies the user's path has.
    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)}}
    own: dict[str, Any] = {"num_cpus": jobs, "include_dashboard": False} if address is None else {}
    try:
        ray.init(
            address=address or "local",
            runtime_env=path,
            log_to_driver=False,
            logging_level="ERROR",
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--address {address}: {_line(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str | None) -> None:
    """Ray itself tries for half a minute and says much."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        with socket.create_connection((host, int(port)), timeout=REACH_S):
            pass
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--address {address}: no Ray cluster answers there ({_line(error)}); start one with "
            "`ray start --head`, or leave out --address"
        ) from None
