"""``moesim figures``: the figures of the papers, and our own, from runs that it makes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.ask.arguments import path, positive
from moesim.errors import NotRunError, UsageError

if TYPE_CHECKING:
    from moesim.sweeps import Experiment
    from moesim.sweeps.experiment import Configuration

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

PAPERS = ("finemoe", "swapmoe", "own")
_EXAMPLES = """examples:
  moesim figures --paper finemoe --smoke --out figs
  moesim figures --paper swapmoe --measured tests/data/validation/swapmoe-demo --out figs
  moesim figures --paper finemoe --trace lmsys.parquet --out figs
  moesim figures --paper finemoe --runs sweeps/finemoe --only figure10 --out figs
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``figures`` command."""
    parser = subparsers.add_parser(
        "figures",
        help="draw the papers' figures, and our own",
        description="Draw every figure of FineMoE or SwapMoE that has data, or our own, as PDF and "
        "PNG with its data as CSV. Without --runs the experiment of the paper is swept first, "
        "into OUT/sweep; what is finished there is not made again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--paper", choices=PAPERS, required=True, help="whose figures")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="where they go")
    parser.add_argument(
        "--runs", type=path, metavar="DIR", help="a folder or table that `moesim sweep` made"
    )
    parser.add_argument("--smoke", action="store_true", help="the experiment's small version")
    parser.add_argument(
        "--trace",
        action="append",
        default=[],
        metavar="FILE",
        help="in place of the demo traces, with its own model's bytes and times; may repeat",
    )
    parser.add_argument(
        "--measured",
        type=path,
        metavar="DIR",
        help="what `moesim validate --out` kept (own), or quality-*.json of `moesim real quality "
        "--json` (swapmoe)",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="these figures, with commas"
    )
    parser.add_argument("--jobs", type=positive, metavar="N", help="workers of the sweep")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Sweep if need be, draw, and say what was drawn; 0."""
    from moesim.cli.progress import requests_progress

    if args.measured is not None and not args.measured.is_dir():
        raise UsageError(f"--measured {args.measured}: no such folder")
    with _library():
        from moesim.analysis.claims import compare
        from moesim.analysis.figure_source import read
        from moesim.analysis.figures import draw, names_of

        only = [name.strip() for text in args.only for name in text.split(",")]
        names_of(args.paper, only)
        runs = args.runs if args.runs is not None else _swept(args)
        source = read(runs, _command(args), args.measured)
        with requests_progress(f"figures of {args.paper}", "figures") as progress:
            drawn = draw(args.paper, source, args.out, only, progress)
        compared = None if only else compare(args.paper, source, args.out)
    if args.json:
        told = [{"figure": one.name, "absent": one.absent or None} for one in drawn]
        print(json.dumps({"schema": 1, "out": str(args.out), "runs": str(runs), "figures": told}))
        return 0
    made = [one.name for one in drawn if not one.absent]
    print(f"{args.out}: {', '.join(made)}")
    for one in drawn:
        if one.absent:
            print(f"not drawn: {one.name}: {one.absent}")
    if compared is not None:
        print(f"{compared}: what the paper says, and what was found")
    return 0


def _command(args: argparse.Namespace) -> str:
    """What makes these figures; no paths of this machine but those that were typed."""
    words = ["moesim", "figures", "--paper", args.paper]
    words += ["--smoke"] if args.smoke else []
    words += [word for trace in args.trace for word in ("--trace", trace)]
    words += ["--measured", str(args.measured)] if args.measured is not None else []
    return shlex.join([*words, "--out", str(args.out)])


def _swept(args: argparse.Namespace) -> Path:
    """Where the paper's experiment lies, all of it finished."""
    from moesim.cli.progress import requests_progress
    from moesim.sweeps import read_experiment
    from moesim.sweeps import run as sweep
    from moesim.sweeps.experiment import experiment_path

    experiment = read_experiment(experiment_path(args.paper), smoke=args.smoke)
    experiment = with_traces(experiment, args.trace)
    out: Path = args.out / "sweep"
    jobs = args.jobs or len(os.sched_getaffinity(0))
    with requests_progress(f"sweep {experiment.name}", "configurations") as progress:
        sweep(experiment, out, jobs=jobs, progress=progress)
    return out


def with_traces(experiment: Experiment, traces: list[str]) -> Experiment:
    """The same experiment on other traces: the first case's grids, once for each trace."""
    from moesim.ask.replays import request_of
    from moesim.sweeps.experiment import options_of

    if not traces:
        return experiment
    case = experiment.configurations[0].grid.partition("/")[2]
    first = [c for c in experiment.configurations if c.grid.partition("/")[2] == case]
    names = [Path(trace).stem for trace in traces]
    if len(set(names)) < len(names):
        raise UsageError(f"--trace: two are called {max(names, key=names.count)}; rename one")
    found = [_on(c, trace, name) for trace, name in zip(traces, names, strict=True) for c in first]
    for configuration in found[:: len(first)]:
        request_of(options_of(configuration.options))
    return replace(experiment, configurations=tuple(found))


def _on(configuration: Configuration, trace: str, name: str) -> Configuration:
    options = {k: v for k, v in configuration.options.items() if k != "costs"}
    grid = configuration.grid.partition("/")[0]
    return replace(configuration, grid=f"{grid}/{name}", options={**options, "trace": trace})


@contextmanager
def _library() -> Iterator[None]:
    """Where a library is missing that figures are made with, say which extra brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "pandas", "scipy"):
            raise
        raise NotRunError(
            f"not run: figures need {error.name}, which is not installed; "
            "`pip install 'moesim[figures]'` installs it"
        ) from None
