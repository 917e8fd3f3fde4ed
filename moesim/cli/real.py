"""``moesim real``: policies on this machine."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import TYPE_CHECKING, Any

from moesim.ask.arguments import (
    add_allow,
    add_compute,
    add_one_policy,
    add_past,
    add_seed,
    initial,
    one_device,
    path,
    positive,
    refuse_beside_plan,
    seed,
    words,
)
from moesim.cli import campaign, generate, quality, suite
from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.configuration import Request
    from moesim.real.run import RealRequest

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim real run --trace demo --policy lru --capacity 25% --costs olmoe-1b-7b --limit 4
  moesim real run --trace demo --policy next-gate --bandwidth 4GB/s --out runs/
  moesim replay --follow runs/0123456789abcdef
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``real`` command."""
    parser = subparsers.add_parser(
        "real",
        help="run a policy on this machine",
        description="Real execution: real copies of real bytes, under the policies of a replay.",
        epilog="example: moesim real run --trace demo --policy lru --capacity 25% --limit 2",
    )
    commands = parser.add_subparsers(dest="real_command", required=True, metavar="COMMAND")
    runner = commands.add_parser(
        "run",
        help="run one policy, its routing forced by a trace",
        description="Run one policy at one capacity on this machine. The trace says which experts "
        "are needed; experts of the model's size are copied and computed. Prints a table, or with "
        "--json the object that `moesim replay --json` prints. Needs torch "
        "(`pip install 'moesim[real]'`).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(runner)
    _add_machine(runner)
    _add_output(runner)
    runner.set_defaults(func=run)
    _add_calibrate(commands)
    generate.add_parser(commands)
    campaign.add_parser(commands)
    suite.add_parser(commands)
    quality.add_parser(commands)


def _add_calibrate(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure this machine into a hardware profile",
        description="Measure the link, the compute and the host by microbenchmarks, and write a "
        "hardware profile for `--hardware`, with every reading and its spread in a Parquet file "
        "beside it. The profile holds for the model that is named. Keep the machine quiet "
        "meanwhile. Needs torch (`pip install 'moesim[real]'`).",
        epilog="example: moesim real calibrate --model olmoe-1b-7b --out here.toml",
    )
    parser.add_argument(
        "--model", required=True, metavar="NAME|FILE", help="model whose parts are computed"
    )
    parser.add_argument(
        "--out", required=True, type=path, metavar="FILE", help="the profile to write, *.toml"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what to measure [cpu]"
    )
    parser.add_argument(
        "--repeats", type=positive, default=7, metavar="N", help="of each measurement [7]"
    )
    parser.add_argument(
        "--tokens", type=positive, default=128, metavar="N", help="most tokens at once [128]"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="that compute [cores - 1]")
    parser.add_argument(
        "--ram", metavar="SIZE", help="what the banks may take, e.g. 8GB [what is free]"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the made-up weights [0]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=calibrate)


def calibrate(args: argparse.Namespace) -> int:
    """Measure, write, print; 0."""
    from moesim.capacity import parse_bytes
    from moesim.cli.progress import requests_progress
    from moesim.profile import load_model
    from moesim.real.calibrate import Calibration
    from moesim.real.calibrate import calibrate as measure

    request = Calibration(
        model=load_model(args.model),
        out=args.out,
        device=args.device,
        repeats=args.repeats,
        tokens=args.tokens,
        threads=args.threads or 0,
        ram_bytes=None if args.ram is None else parse_bytes(args.ram, "--ram"),
        seed=args.seed,
    )
    with requests_progress("calibrate", "rounds") as progress:
        answer = measure(request, progress)
    if args.json:
        print(json.dumps(answer))
    else:
        _print_calibrated(answer)
    return 0


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--trace", required=True, help="a trace file, or the shipped sample `demo`")
    group.add_argument("--policy", metavar="NAME", help="one policy [lru]")
    add_one_policy(group)
    group.set_defaults(capacity=None)
    group.add_argument(
        "--plan",
        type=path,
        metavar="FILE",
        help="policy, capacity of each layer and first set as `moesim plan` wrote them",
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N requests")
    group.add_argument("--batch", type=positive, default=1, help="requests in a static batch [1]")
    group.add_argument(
        "--chunk-tokens", type=positive, metavar="N", help="serve prefills in chunks of N tokens"
    )
    add_allow(group)
    add_seed(group)
    group.add_argument(
        "--split",
        metavar="HOW",
        help="serve the test requests alone, as in `moesim replay`",
    )
    add_past(group)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    add_compute(group)
    group.add_argument(
        "--costs", metavar="MODEL", help="experts of another model's size than the one recorded"
    )
    group.add_argument(
        "--bandwidth",
        metavar="RATE",
        help="let copies take at least the time of such a link, e.g. 4GB/s [as fast as they go]",
    )
    group.add_argument(
        "--hardware",
        default="rtx4090",
        metavar="NAME|FILE",
        help="profile of the link's chunks and latency, and of what is simulated beside [rtx4090]",
    )
    group.add_argument(
        "--ram", metavar="SIZE", help="what the banks may take, e.g. 8GB [what is free]"
    )
    group.add_argument(
        "--watchdog",
        type=_seconds,
        default=120.0,
        metavar="SECONDS",
        help="give up when a thread has been silent for so long [120]",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="compare every copy with its expert, before and after it computes",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--out", type=path, metavar="DIR", help="keep the run, with its fact log, in a folder there"
    )
    group.add_argument(
        "--timeline", action="store_true", help="write timeline.json for Perfetto (needs --out)"
    )


def run(args: argparse.Namespace) -> int:
    """Run and print; 0."""
    from moesim.cli.progress import requests_progress
    from moesim.cli.table import print_replay
    from moesim.real.run import execute
    from moesim.rehearsal import simulated

    request = _request(args)
    with requests_progress("real") as progress:
        # The bar goes through the requests twice: run, then simulated.
        answer = execute(request, progress, partial(simulated, progress=progress))
    if args.json:
        print(json.dumps(answer))
        return 0
    print_replay(answer)
    _print_beside(answer["runs"][0])
    return 0


def _request(args: argparse.Namespace) -> RealRequest:
    from moesim.capacity import parse_bytes
    from moesim.real.run import RealRequest

    if args.timeline and args.out is None:
        raise UsageError("--timeline writes into the run's folder; give --out DIR too")
    return RealRequest(
        what=_what(args),
        device=args.device,
        paced=args.bandwidth is not None,
        ram_bytes=None if args.ram is None else parse_bytes(args.ram, "--ram"),
        threads=args.threads or 0,
        watchdog_s=args.watchdog,
        verify=args.verify,
        timeline=args.timeline,
        out=args.out,
    )


def _what(args: argparse.Namespace) -> Request:
    from moesim.configuration import Request
    from moesim.degrade import parse_allowed
    from moesim.past import Share, parse_split
    from moesim.planning.file import planned
    from moesim.profile import load_model
    from moesim.traces.samples import trace_path

    kind, experts = initial(args.initial)
    trace, settings = trace_path(args.trace), tuple(args.set)
    costs = None if args.costs is None else load_model(args.costs)
    policy, capacity = args.policy or "lru", args.capacity or "25%"
    if args.plan is not None:
        refuse_beside_plan(args)
        plan = planned(args.plan, trace, costs)
        policy, capacity = plan.policy, plan.capacity.text
        kind, experts = "file", plan.capacity.starts or ()
        settings = (*plan.settings, *settings)
    return Request(
        trace=trace,
        hardware=one_device(args),
        policy=_one(policy, "--policy"),
        capacity=_one(capacity, "--capacity"),
        settings=settings,
        scope=args.scope,
        costs=costs,
        batch=args.batch,
        chunk_tokens=args.chunk_tokens or 0,
        initial=kind,
        initial_experts=experts,
        calibration=args.calibration,
        share=None if args.split is None else Share(parse_split(args.split)),
        allowed=parse_allowed(args.allow),
        limit=args.limit,
        seed=args.seed,
    )


def _one(text: str, option: str) -> str:
    named = words([text], "")
    if len(named) > 1:
        raise UsageError(f"{option} {text}: a real run has one; start one run for each")
    return named[0]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0")
    return value


def _print_beside(run: dict[str, Any]) -> None:
    """What the simulator says of the same run."""
    told = run["simulated"]
    measured, modelled = run["tpot_ns"]["mean"], told["tpot_ns"]["mean"]
    alike = told["overlap"]["mean"]
    tpot = "" if measured is None else f"; TPOT {modelled / 1e6:.2f} ms simulated"
    print(
        f"measured on this machine{tpot}; misses {told['misses']} simulated, {run['misses']} real"
        + ("" if alike is None else f"; {alike:.1%} of the loads of an event are the same")
    )


def _print_calibrated(answer: dict[str, Any]) -> None:
    """The readings that a run of one token rests on, with their spread."""
    from moesim.cli.table import print_table

    largest = max(row["size"] for row in answer["readings"] if row["what"] == "link")
    shown = [
        row
        for row in answer["readings"]
        if row["size"] == (largest if row["what"] == "link" else 1) and row["context"] == 0
    ]
    named = [{"what": name, "how": "", **row} for name, row in answer["overheads"].items()]
    print_table(
        ("measured", "beside", "median", "quartiles"),
        [(row["what"], row["how"], *_spread(row)) for row in (*shown, *named)],
    )
    print(
        f"transfers of {largest} bytes, one token; {answer['profile']['name']} is in "
        f"{answer['path']}, all readings in {answer['readings_path']}"
    )


def _spread(row: dict[str, Any]) -> tuple[str, str]:
    if row["what"].endswith("_per_s"):
        return f"{row['median']:.3g} /s", f"{row['q1']:.3g} to {row['q3']:.3g}"
    median, q1, q3 = (row[key] / 1e6 for key in ("median", "q1", "q3"))
    return f"{median:.3f} ms", f"{q1:.3f} to {q3:.3f}"
