"""``moesim replay``: one trace under policies, capacities and a machine."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from moesim.cli.options import hardware as _hardware
from moesim.cli.options import initial as _initial
from moesim.cli.options import path as _path
from moesim.cli.options import positive as _positive
from moesim.cli.options import refuse_beside_plan
from moesim.cli.options import seed as _seed
from moesim.cli.options import words as _words
from moesim.cli.serving import add_serving, serving_of
from moesim.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesim.capacity import Capacity
    from moesim.replay import Request

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
    _add_what(parser)
    _add_machine(parser)
    _add_serving(parser)
    _add_output(parser)
    parser.set_defaults(func=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--trace", help="a trace file, or the shipped sample `demo`")
    group.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help="policy, may repeat or take commas; all [lru]",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SEAT=NAME",
        help="swap a seat (prefetch=next-gate) or set a parameter (keep.gamma=0.9)",
    )
    group.add_argument(
        "--capacity",
        action="append",
        metavar="SIZE",
        help="24GiB, 25%% of all experts, 192 experts in all, 8/layer or 8:6:4/layer (a number for "
        "each layer); may repeat [25%%]",
    )
    group.add_argument(
        "--plan",
        type=_path,
        metavar="FILE",
        help="policy, capacity of each layer and first set as `moesim plan` wrote them",
    )
    group.add_argument(
        "--scope", choices=("global", "layer"), default="global", help="one cache, or one a layer"
    )
    group.add_argument("--limit", type=_positive, metavar="N", help="only the first N requests")
    group.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="INPUT=HOW",
        help="a stand-in for what the trace lacks: gate=topk, embedding=none, norms=unit, "
        "prefill=decode, ahead=recall:0.8@SEED",
    )
    group.add_argument("--seed", type=_seed, default=0, help="of every random choice [0]")
    group.add_argument(
        "--split",
        metavar="HOW",
        help="serve the test requests alone; policies learn from the others: marked (as the trace "
        "says), or shares such as 7:3",
    )
    group.add_argument(
        "--calibration", type=_path, metavar="TRACE", help="trace that policies learn from instead"
    )
    group.add_argument(
        "--initial",
        metavar="STATE",
        help="cold; static, the most used, or policy, what it asks for (loads charged); or a JSON "
        "file of expert ids (free) [by policy]",
    )
    group.add_argument(
        "--follow",
        type=_path,
        metavar="RUN",
        help="serve a run of `moesim real run` again, its lanes reporting in the order of its log, "
        "and compare loads and victims; only --trace, --calibration and --json count beside it",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--hardware", default="rtx4090", metavar="NAME|FILE", help="hardware profile [rtx4090]"
    )
    group.add_argument(
        "--costs", metavar="MODEL", help="bytes and times of another model than the one recorded"
    )
    group.add_argument("--bandwidth", metavar="RATE", help="link bandwidth instead, e.g. 4GB/s")
    group.add_argument(
        "--devices",
        type=_positive,
        metavar="N",
        help="devices that share the experts out, and --capacity [as --hardware says]",
    )
    group.add_argument(
        "--placement",
        choices=("round-robin", "load", "layers"),
        default="round-robin",
        help="which device owns an expert: dealt one by one, by use in the past, or layers as a "
        "whole [round-robin]",
    )
    group.add_argument(
        "--order",
        choices=("ready", "barrier"),
        default="ready",
        help="compute residents first, or wait for all of a layer's experts [ready]",
    )
    group.add_argument(
        "--allocator",
        choices=("bytes", "slots"),
        default="bytes",
        help="book what a copy weighs, or the largest slot [bytes]",
    )
    group.add_argument(
        "--kv",
        choices=("apart", "share"),
        default="apart",
        help="whether the KV cache takes its bytes from --capacity [apart]",
    )
    group.add_argument(
        "--write-back",
        choices=("duplex", "serial"),
        default="",
        help="copy what leaves the device to the host too, beside loads or before them [not]",
    )


def _add_serving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--batch", type=_positive, default=1, help="requests that are served together [1]"
    )
    group.add_argument(
        "--chunk-tokens", type=_positive, metavar="N", help="serve prefills in chunks of N tokens"
    )
    add_serving(group)
    group.add_argument(
        "--mode",
        choices=("group", "flat"),
        default="group",
        help="a layer's experts are one request, or every access its own (generic caches) [group]",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--out", type=_path, metavar="DIR", help="keep each run in a folder there")
    group.add_argument(
        "--timeline", action="store_true", help="write timeline.json for Perfetto (needs --out)"
    )
    group.add_argument("--ladder", action="store_true", help="also run the oracle ladder")
    group.add_argument("--check", action="store_true", help="audit the laws while running")
    group.add_argument(
        "--engine",
        choices=("fast", "reference"),
        default="fast",
        help="compiled, or written to be read; both give the same answers [fast]",
    )


def run(args: argparse.Namespace) -> int:
    """Replay and print; 0."""
    from moesim.cli.progress import requests_progress
    from moesim.cli.table import print_replay
    from moesim.replay import replay

    if args.follow is not None:
        return _follow(args)
    if args.trace is None:
        raise UsageError("--trace: name a trace file, or the shipped sample `demo`")
    request = _request(args)
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


def _request(args: argparse.Namespace) -> Request:
    from moesim.degrade import parse_allowed
    from moesim.engine.setup import Options
    from moesim.past import Share, parse_split
    from moesim.plan.file import planned
    from moesim.policies.presets import PRESETS
    from moesim.profile import load_model
    from moesim.replay import Request
    from moesim.traces.samples import trace_path

    if args.timeline and args.out is None:
        raise UsageError("--timeline writes into the run's folder; give --out DIR too")
    initial, experts = _initial(args.initial)
    policies = _words(args.policy, "lru")
    capacities: Sequence[str | Capacity] = _words(args.capacity, "25%")
    trace, settings = trace_path(args.trace), args.set
    costs = None if args.costs is None else load_model(args.costs)
    hardware = _hardware(args)
    if args.plan is not None:
        refuse_beside_plan(args)
        plan = planned(args.plan, trace, costs)
        policies, capacities = (plan.policy,), (plan.capacity,)
        settings = [*plan.settings, *settings]
    return Request(
        trace=trace,
        hardware=hardware,
        policies=tuple(PRESETS) if policies == ("all",) else policies,
        capacities=capacities,
        settings=settings,
        scope=args.scope,
        costs=costs,
        options=Options(
            order=args.order,
            flat=args.mode == "flat",
            allocator=args.allocator,
            share_kv=args.kv == "share",
            write_back=args.write_back,
            check=args.check,
            timeline=args.timeline,
        ),
        batch=args.batch,
        chunk_tokens=args.chunk_tokens or 0,
        arrivals=args.arrivals,
        serving=serving_of(args),
        initial=initial,
        initial_experts=experts,
        calibration=args.calibration,
        share=None if args.split is None else Share(parse_split(args.split)),
        allowed=parse_allowed(args.allow),
        limit=args.limit,
        seed=args.seed,
        devices=args.devices or 0,
        placement=args.placement,
        ladder=args.ladder or (policies == ("all",) and args.arrivals == "back-to-back"),
        engine=args.engine,
        out=args.out,
    )
