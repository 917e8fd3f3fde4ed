"""The options of a replay: from the command line, a sweep's file or a call in Python alike.

All three go through one parser, so that an option has one name, one meaning and one error.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moesim.ask.arguments import (
    add_allow,
    add_past,
    add_seed,
    add_set,
    path,
    positive,
    refuse_beside_plan,
)
from moesim.ask.arguments import initial as initial_of
from moesim.ask.arguments import tiered as hardware_of
from moesim.ask.arguments import words as words_of
from moesim.ask.serving import add_serving, serving_of
from moesim.errors import MoesimError, UsageError

if TYPE_CHECKING:
    from moesim.capacity import Capacity
    from moesim.replays import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option that says what to replay, and on which machine."""
    _add_what(parser)
    _add_machine(parser)
    _add_serving(parser)
    _add_output(parser)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--trace", help="a trace file, or the shipped sample `demo`")
    group.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help="policy, may repeat or take commas; all [lru]",
    )
    add_set(group)
    group.add_argument(
        "--capacity",
        action="append",
        metavar="SIZE",
        help="24GiB, 25%% of all experts, 192 experts in all, 8/layer or 8:6:4/layer (a number for "
        "each layer); may repeat [25%%]",
    )
    group.add_argument(
        "--plan",
        type=path,
        metavar="FILE",
        help="policy, capacity of each layer and first set as `moesim plan` wrote them",
    )
    group.add_argument(
        "--scope", choices=("global", "layer"), default="global", help="one cache, or one a layer"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N requests")
    add_allow(group)
    add_seed(group)
    group.add_argument(
        "--split",
        metavar="HOW",
        help="serve the test requests alone; policies learn from the others: marked (as the trace "
        "says), or shares such as 7:3",
    )
    add_past(group)


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
        type=positive,
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
        "--dram",
        metavar="SIZE",
        help="host memory for experts, 16GiB or 50%%; the others are read from the drive [all fit]",
    )
    group.add_argument("--ssd", metavar="RATE", help="read rate of the drive instead, e.g. 3GB/s")
    group.add_argument(
        "--precision",
        metavar="NAME",
        help="hold and move experts in it, e.g. int4, or bf16,int4 for policies that use both "
        "[model profile]",
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
        "--batch", type=positive, default=1, help="requests that are served together [1]"
    )
    group.add_argument(
        "--chunk-tokens", type=positive, metavar="N", help="serve prefills in chunks of N tokens"
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
    group.add_argument("--out", type=path, metavar="DIR", help="keep each run in a folder there")
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


def request_from(args: argparse.Namespace) -> Request:
    """What parsed options ask for.

    Raises
    ------
    MoesimError
        Naming the option.
    """
    from moesim.degrade import parse_allowed
    from moesim.engine.setup import Options
    from moesim.past import Share, parse_split
    from moesim.planning.file import planned
    from moesim.policies.presets import PRESETS
    from moesim.profile import load_model
    from moesim.replays import Request
    from moesim.traces.samples import trace_path

    if args.trace is None:
        raise UsageError("--trace: name a trace file, or the shipped sample `demo`")
    if args.timeline and args.out is None:
        raise UsageError("--timeline writes into the run's folder; give --out DIR too")
    initial, experts = initial_of(args.initial)
    policies = words_of(args.policy, "lru")
    capacities: Sequence[str | Capacity] = words_of(args.capacity, "25%")
    trace, settings = trace_path(args.trace), args.set
    costs = None if args.costs is None else load_model(args.costs)
    hardware = hardware_of(args)
    alone, back_to_back = (args.devices or hardware.devices) == 1, args.arrivals == "back-to-back"
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
        dram=args.dram or "",
        precisions=words_of([args.precision], "") if args.precision else (),
        ladder=args.ladder or (policies == ("all",) and alone and back_to_back),
        engine=args.engine,
        out=args.out,
    )


# ---- from names and values -----------------------------------------------------------------------


class _Asked(argparse.ArgumentParser):
    """Tells a mistake as everything below the command line does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def request_of(options: Mapping[str, object]) -> Request:
    """What names and values ask for: ``{"trace": "demo", "policy": ["lru", "lfu"]}``.

    Names are those of the long options, with dashes or underscores. A list gives an option several
    times; a capacity below 1 is a share of all experts (0.25 is 25 %).

    Raises
    ------
    MoesimError
        Naming the option.
    """
    parser = _parser()
    lines = [_line(parser, name, value) for name, value in options.items()]
    return request_from(parser.parse_args([word for line in lines for word in line]))


def option_names() -> list[str]:
    """The names that ``request_of`` takes, with dashes."""
    return sorted(_actions(_parser()))


def problems(options: Mapping[str, object]) -> dict[str, str]:
    """Option -> what is wrong with its value, for each option by itself; "" is its key where only
    all of them together show it."""
    found = {}
    parser = _parser()
    for name, value in options.items():
        try:
            parser.parse_args(_line(parser, name, value))
        except UsageError as error:
            found[name] = str(error)
    if not found:
        try:
            request_of(options)
        except MoesimError as error:
            found[""] = str(error)
    return found


def _parser() -> _Asked:
    parser = _Asked(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    return parser


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.option_strings[0].removeprefix("--"): action for action in parser._actions}


def _line(parser: argparse.ArgumentParser, name: str, value: object) -> list[str]:
    """An option as words of a command line."""
    known, spelled = _actions(parser), name.replace("_", "-")
    if spelled not in known:
        near = difflib.get_close_matches(spelled, known, n=1, cutoff=0.5)
        told = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
        raise UsageError(f"{name}: no such option; {told}")
    flag, action = f"--{spelled}", known[spelled]
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise UsageError(f"{flag} {value!r}: must be true or false")
        return [flag] if value else []
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > 1 and not isinstance(action, argparse._AppendAction):
        raise UsageError(f"{flag}: takes one value, and {len(values)} are given")
    return [f"{flag}={_text(flag, one)}" for one in values if one is not None]


def _text(flag: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise UsageError(f"{flag} {value!r}: must be a text or a number")
    if flag == "--capacity" and isinstance(value, float):
        if not 0 < value <= 1:
            raise UsageError(f"{flag} {value}: a share of all experts is above 0 and at most 1")
        return f"{100 * value:.10g}%"
    return str(value)
