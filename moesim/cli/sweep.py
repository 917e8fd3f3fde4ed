"""``moesim sweep``: all configurations of an experiment file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.ask.arguments import path, positive
from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.sweeps import Experiment, Sweep
    from moesim.sweeps.execute import Executor

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim sweep example --out sweeps/example
  moesim sweep mine.toml --out sweeps/mine --with trace=lmsys.parquet --jobs 8
  moesim sweep finemoe-online --smoke --dry-run
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``sweep`` command."""
    parser = subparsers.add_parser(
        "sweep",
        help="replay all configurations of an experiment file",
        description="Replay every configuration of an experiment file and write one table. What "
        "is finished is not made again: a sweep that was stopped goes on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", help="an experiment file, or the name of a shipped one")
    parser.add_argument("--out", type=path, metavar="DIR", help="where runs and table are kept")
    parser.add_argument(
        "--with",
        dest="instead",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="set an option of every configuration, whatever the file says",
    )
    parser.add_argument("--smoke", action="store_true", help="the file's small version")
    parser.add_argument("--dry-run", action="store_true", help="check, count, and run nothing")
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="workers [as many as there are cores]"
    )
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine, or Ray [local]",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="a Ray cluster [one that is made here]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Sweep and say where the table is; 0, or 2 with every mistake of the file on its own line."""
    from moesim.sweeps import read_experiment
    from moesim.sweeps.experiment import ExperimentError, experiment_path

    try:
        file = experiment_path(args.experiment)
        experiment = read_experiment(file, smoke=args.smoke, instead=_instead(args.instead))
    except ExperimentError as error:
        for line in error.lines:
            print(f"moesim: error: {' '.join(line.split())}", file=sys.stderr)
        return 2
    if args.dry_run:
        _print_plan(experiment, args)
        return 0
    if args.out is None:
        raise UsageError("--out: name a folder for the runs and their table")
    made = _sweep(experiment, args)
    if args.json:
        print(json.dumps(made.to_dict()))
    else:
        _print(made, args.out)
    return 0


def _instead(given: list[str]) -> dict[str, Any]:
    pairs = [text.partition("=") for text in given]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise UsageError(f"--with {name}: write option=value, such as trace=my.parquet")
    return {name: _value(text) for name, _, text in pairs}


def _value(text: str) -> Any:
    """As it would be in the file, where a text needs no quotes."""
    import tomllib

    try:
        read = tomllib.loads(f"it = {text}")
    except tomllib.TOMLDecodeError:
        return text
    usable = list(read) == ["it"] and isinstance(read["it"], bool | int | float | str | list)
    return read["it"] if usable else text


def _jobs(args: argparse.Namespace) -> int:
    from joblib import cpu_count

    return int(args.jobs or cpu_count())


def _executor(args: argparse.Namespace) -> Executor:
    from moesim.sweeps.execute import local, on_ray

    if args.address is not None and args.executor != "ray":
        raise UsageError("--address: names a Ray cluster; give --executor ray too")
    return on_ray(args.address, _jobs(args)) if args.executor == "ray" else local(_jobs(args))


def _sweep(experiment: Experiment, args: argparse.Namespace) -> Sweep:
    from moesim.cli.progress import requests_progress
    from moesim.sweeps import run as sweep

    executor = _executor(args)
    with requests_progress(f"sweep {experiment.name}", "configurations") as progress:
        return sweep(experiment, args.out, jobs=_jobs(args), executor=executor, progress=progress)


def _print_plan(experiment: Experiment, args: argparse.Namespace) -> None:
    from moesim.sweeps.passes import passes

    cut = passes(experiment.configurations, _jobs(args))
    if args.json:
        told = [{"grid": c.grid, **c.options} for c in experiment.configurations]
        print(json.dumps({"schema": 1, "passes": len(cut), "configurations": told}))
        return
    print(
        f"{experiment.name}: {len(experiment.configurations)} configurations in {len(cut)} passes"
    )
    for grid in dict.fromkeys(c.grid for c in experiment.configurations):
        count = sum(c.grid == grid for c in experiment.configurations)
        print(f"  {grid}: {count}")


def _print(made: Sweep, out: Path) -> None:
    ran = made.configurations - made.not_run
    print(f"{made.results}: {ran} configurations in {made.wall_s:.0f} s")
    for reason, count in made.reasons:
        print(f"not run ({count}): {reason}")
    print(f"look at them: moesim report {out}, or pandas.read_parquet({str(made.results)!r})")
