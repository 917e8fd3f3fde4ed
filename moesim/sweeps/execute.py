"""Run passes: in this process, in processes of this machine, or on a Ray cluster.

Every run is kept in its folder as soon as its pass ends, and a finished run is never made again:
that is all that resuming takes.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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


Cut = Callable[[int], Sequence[Pass]]
"""The passes of a sweep, for so many workers."""
Executor = Callable[[Cut, Path], Iterator[list[Outcome]]]
"""Outcomes of passes as they end, in any order."""


def serve(one: Pass, runs: Path) -> list[Outcome]:
    """Run a pass. If a configuration of it cannot run, the others do."""
    try:
        return _together(one, runs)
    except UnwritableError:
        raise
    except Exception as error:
        # Even a bug of ours in one configuration shall not cost the others.
        if len(one.places) == 1:
            return [Outcome(one.places[0], reason=_reason(error))]
    return [outcome for alone in singles(one) for outcome in serve(alone, runs)]


def _together(one: Pass, runs: Path) -> list[Outcome]:
    from moesim.replays import replay

    answer = replay(request_of({**one.options, "out": str(runs)}))
    found = {(run["policy"], run["capacity"]): run for run in answer["runs"]}
    outcomes = []
    for place, (policy, capacity) in zip(one.places, _pairs(one), strict=True):
        run = found[policy, capacity]
        reason = _reason(run["not_run"]) if "not_run" in run else ""
        outcomes.append(Outcome(place, "" if reason else Path(run["run_dir"]).name, reason))
    return outcomes


def _pairs(one: Pass) -> list[tuple[str, str]]:
    return [(policy, capacity) for policy in one.policies for capacity in one.capacities]


def singles(one: Pass) -> Iterator[Pass]:
    """Each configuration of a pass by itself."""
    for place, (policy, capacity) in zip(one.places, _pairs(one), strict=True):
        yield Pass(one.rest, (policy,), (capacity,), (place,))


def _reason(why: object) -> str:
    if not isinstance(why, Exception) or isinstance(why, MoesimError):
        return _line(why).removeprefix("not run: ")
    last = traceback.extract_tb(why.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"{type(why).__name__}: {_line(why)} ({where}), which is a bug of moesim's"


def _line(what: object) -> str:
    return " ".join(str(what).split())


# ---- here ----------------------------------------------------------------------------------------


def local(jobs: int) -> Executor:
    """Processes of this machine; with one job, this process.

    A worker that is killed is a UsageError; what had ended is kept.
    """

    def execute(cut: Cut, runs: Path) -> Iterator[list[Outcome]]:
        passes = cut(jobs)
        if jobs == 1 or len(passes) <= 1:
            yield from (serve(one, runs) for one in passes)
            return
        from joblib import Parallel, delayed
        from joblib.externals.loky import get_reusable_executor
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        workers = min(jobs, len(passes))
        # A pass at a time: joblib would join short ones, and pass them on together.
        pool = Parallel(n_jobs=workers, batch_size=1, return_as="generator_unordered")
        try:
            yield from pool(delayed(serve)(one, runs) for one in passes)
        except TerminatedWorkerError:
            raise UsageError(
                "--jobs: a worker was killed, perhaps for want of memory; what had ended is kept: "
                "run again, with fewer --jobs"
            ) from None
        finally:
            # joblib keeps workers for whoever comes next, in their old folder and with their old
            # modules; and what is not given back here, its tracker would report line by line.
            get_reusable_executor().shutdown(wait=True, kill_workers=True)

    return execute


# ---- on Ray --------------------------------------------------------------------------------------


def on_ray(address: str | None, jobs: int) -> Executor:
    """A Ray cluster: the one at an address, or one of ``jobs`` workers that is made here.

    Where a worker is lost, each configuration of its pass runs once more, by itself; one whose
    worker is lost again is recorded as failed.
    """

    def execute(cut: Cut, runs: Path) -> Iterator[list[Outcome]]:
        with _cluster(address, jobs) as ray:
            task = ray.remote(_serve_from).options(max_retries=0)
            where = (runs.resolve(), Path.cwd())
            workers = int(ray.cluster_resources().get("CPU", jobs))
            waiting = {task.remote(one, *where): (one, False) for one in cut(workers)}
            while waiting:
                (done, *_), _ = ray.wait(list(waiting), num_returns=1)
                one, again = waiting.pop(done)
                try:
                    yield _collected(ray, done)
                except _LostError as error:
                    if again:
                        yield [Outcome(place, reason=str(error)) for place in one.places]
                    else:
                        waiting |= {task.remote(o, *where): (o, True) for o in singles(one)}

    return execute


class _LostError(Exception):
    """A worker ended before its pass did."""


def _serve_from(one: Pass, runs: Path, folder: Path) -> list[Outcome]:
    """Where the sweep began, so that paths in its file mean the same."""
    os.chdir(folder)
    return serve(one, runs)


def _collected(ray: Any, done: Any) -> list[Outcome]:
    try:
        outcomes: list[Outcome] = ray.get(done)
        return outcomes
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, MoesimError) else error from None
    except ray.exceptions.RayError as error:
        raise _LostError(f"its worker was lost twice ({type(error).__name__})") from None


@contextmanager
def _cluster(address: str | None, jobs: int) -> Iterator[Any]:
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError(
            "--executor ray: needs ray, which is not installed; `pip install 'moesim[ray]'`"
        ) from None
    _refuse_unreachable(address)
    # Nobody asked for reports on their use of Ray.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _own(jobs) if address is None else nullcontext({"address": address}) as where:
        try:
            ray.init(
                **where,
                # Workers must find this very moesim, and whatever policies the user's path has.
                runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
                log_to_driver=False,
                logging_level="ERROR",
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            told = "--executor ray" if address is None else f"--address {address}"
            raise UsageError(f"{told}: {_line(error)}") from None
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _own(jobs: int) -> Iterator[dict[str, Any]]:
    """A cluster of this machine, whose logs go with it."""
    # Names of sockets lie in there, and may have a hundred letters.
    with tempfile.TemporaryDirectory(prefix="moesim-ray-", ignore_cleanup_errors=True) as folder:
        yield {
            "address": "local",
            "num_cpus": jobs,
            "include_dashboard": False,
            "_temp_dir": folder,
        }


def _python_path() -> str:
    return os.pathsep.join(str(Path(p or ".").absolute()) for p in sys.path)


def _refuse_unreachable(address: str | None) -> None:
    """Ray itself tries for half a minute and says much."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        with socket.create_connection((host, int(port)), timeout=REACH_S):
            pass
    except (OSError, OverflowError, ValueError) as error:
        raise UsageError(
            f"--address {address}: no Ray cluster answers there ({_line(error)}); start one with "
            "`ray start --head`, or leave out --address"
        ) from None
