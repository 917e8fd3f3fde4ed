"""``moesim replay``: one trace under policies, capacities and a machine."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from moesim.ask.arguments import path
from moesim.ask.replays import add_arguments, request_from

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim replay --trace demo --policy lru
  moesim replay --trace demo --policy lru,lfu,min --capacity 10%,25%,50% --json
  moesim replay --trace x.parquet --policy lru --set prefetch=next-gate --hardware h100 --out runs/
  moesim replay --trace demo --arrivals poisson:2 --scheduler decode-first --batch 16 --slo ttft=2s
  moesim replay --trace x.parquet --arrivals azure:conv.csv --rate 2.91 --requests 256
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``replay`` command."""
    parser = subparsers.add_parser(
        "replay",
        help="replay a trace under policies",
        description="Replay a trace under one or more policies and capacities, on modelled "
        "hardware, in one pass. Prints a table, or one JSON object with --json.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--follow",
        type=path,
        metavar="RUN",
        help="serve a run of `moesim real run` again, its lanes reporting in the order of its log, "
        "and compare loads and victims; only --trace, --calibration and --json count beside it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Replay and print; 0."""
    from moesim.cli.progress import requests_progress
    from moesim.cli.table import print_replay
    from moesim.replays import replay

    if args.follow is not None:
        return _follow(args)
    request = request_from(args)
    with requests_progress("replay") as progress:
        answer = replay(request, progress)
    if args.json:
        print(json.dumps(answer))
    else:
        print_replay(answer)
    return 0


def _follow(args: argparse.Namespace) -> int:
    """Serve a real run again in the order of its log; 0, for a difference is an error."""
    from moesim.follow import follow
    from moesim.traces.samples import trace_path

    trace = None if args.trace is None else trace_path(args.trace)
    answer = follow(args.follow, trace, args.calibration)
    if args.json:
        print(json.dumps(answer))
    else:
        print(
            f"equal: {answer['policy']} at {answer['capacity']} judged {answer['layer_events']} "
            f"layer events, loaded {answer['loads']} experts and evicted {answer['victims']} as "
            f"the run in {answer['followed']} did"
        )
    return 0
