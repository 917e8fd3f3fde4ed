"""``moesim real campaign``: simulated against measured, as one command."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from moesim.ask.arguments import add_allow, add_compute, add_seed, path, positive, words
from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.campaign import Campaign

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_NEEDS = """It needs torch, pandas, scipy and matplotlib (`pip install 'moesim[real,figures]'`), and
for OLMoE's experts about 7 GB of RAM (with less, experts share buffers). With the defaults it takes
about 12 minutes on two cores that do nothing else. Stopped, it goes on where it was when it is
started again.

examples:
  moesim real campaign --out campaign
  moesim real campaign --out campaign --hardware here.toml --keep tests/data/validation
"""


def add_parser(commands: Subparsers) -> None:
    """Add ``campaign`` to the commands of ``real``."""
    parser = commands.add_parser(
        "campaign",
        help="simulate and measure many configurations, and compare them",
        description="Measure this machine, simulate every policy at every capacity, run each here "
        "with a link made slow enough to stall (in rounds, each once a round, in another order), "
        "and print what `moesim validate` says of them.",
        epilog=_NEEDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="for everything")
    _add_what(parser)
    _add_machine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--keep",
        type=path,
        metavar="DIR",
        help="copy raw tables, profile, readings and the report into DIR/<processor>, small enough "
        "to be committed",
    )
    parser.set_defaults(func=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--trace", default="demo", help="a trace file or a shipped sample [demo]")
    group.add_argument(
        "--costs", default="olmoe-1b-7b", metavar="MODEL", help="size of experts [olmoe-1b-7b]"
    )
    group.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help="may repeat or take commas [seven lossless ones of different speed]",
    )
    group.add_argument(
        "--capacity", action="append", metavar="SIZE", help="may repeat or take commas [15%%,25%%]"
    )
    group.add_argument(
        "--limit", type=positive, default=2, metavar="N", help="requests of a run [2]"
    )
    group.add_argument(
        "--output-tokens",
        type=positive,
        default=7,
        metavar="N",
        help="cut each request after N decoded tokens [7]",
    )
    add_allow(group)
    group.add_argument(
        "--repeats", type=positive, default=7, metavar="N", help="of each measurement [7]"
    )
    add_seed(group)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    add_compute(group)
    group.add_argument(
        "--hardware",
        type=path,
        metavar="FILE",
        help="a profile of this machine by `moesim real calibrate` [measure one]",
    )
    group.add_argument(
        "--bandwidth",
        metavar="RATE",
        help="of the link that is made, e.g. 3GB/s [such that stall is about half of the time; "
        "on CUDA the device's own]",
    )
    group.add_argument("--ram", metavar="SIZE", help="what the banks may take [what is free]")
    group.add_argument(
        "--watchdog",
        type=positive,
        default=120,
        metavar="SECONDS",
        help="give up when a thread has been silent for so long [120]",
    )


def run(args: argparse.Namespace) -> int:
    """Run the campaign and print; 0."""
    from moesim.cli.progress import requests_progress
    from moesim.cli.validate import figures, print_report

    with figures():
        from moesim.campaign import keep
        from moesim.campaign import run as run_campaign

        campaign = _campaign(args)
        report = run_campaign(
            campaign, lambda text: print(f"campaign: {text}", file=sys.stderr), requests_progress
        )
    if args.keep is not None:
        print(f"campaign: kept in {keep(campaign, args.keep)}", file=sys.stderr)
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        print_report(report)
    return 0


def _campaign(args: argparse.Namespace) -> Campaign:
    from moesim.campaign import CAPACITIES, POLICIES, Campaign
    from moesim.capacity import parse_bytes
    from moesim.degrade import parse_allowed
    from moesim.profile import load_model
    from moesim.traces.samples import trace_path

    rate = None
    if args.bandwidth is not None:
        text = args.bandwidth.removesuffix("/s")
        rate = float(parse_bytes(text, "--bandwidth")) if text != args.bandwidth else 0.0
        if not rate:
            raise UsageError(f"--bandwidth {args.bandwidth}: write a rate such as 3GB/s")
    return Campaign(
        out=args.out,
        trace=trace_path(args.trace),
        costs=load_model(args.costs),
        policies=words(args.policy, ",".join(POLICIES)),
        capacities=words(args.capacity, ",".join(CAPACITIES)),
        hardware=args.hardware,
        bytes_per_s=rate,
        limit=args.limit,
        output_tokens=args.output_tokens,
        repeats=args.repeats,
        threads=args.threads or 0,
        ram_bytes=None if args.ram is None else parse_bytes(args.ram, "--ram"),
        watchdog_s=float(args.watchdog),
        seed=args.seed,
        device=args.device,
        allowed=parse_allowed(args.allow),
    )
