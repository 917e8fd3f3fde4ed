"""``moesim replay``: one trace under policies, capacities and a machine."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.profile import HardwareProfile
    from moesim.replay import Request
    from moesim.types import ExpertId

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim replay --trace demo --policy lru
  moesim replay --trace demo --policy lru,lfu,min --capacity 10%,25%,50% --json
  moesim replay --trace x.parquet --policy lru --set prefetch=next-gate --hardware h100 --out runs/
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
    group.add_argument("--trace", required=True, help="a trace file, or the shipped sample `demo`")
    group.add_argument(
        "--policy", action="append", metavar="NAME", help="policy, may repeat or take commas [lru]"
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
        help="24GiB, 25%% of all experts, 192 experts in all, or 8/layer; may repeat [25%%]",
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
        "ahead=recall:0.8@SEED",
    )
    group.add_argument("--seed", type=_seed, default=0, help="of every random choice [0]")
    group.add_argument(
        "--calibration", type=_path, metavar="TRACE", help="trace that static sets are fitted on"
    )
    group.add_argument(
        "--initial",
        metavar="STATE",
        help="cold, static (loads charged), or a JSON file of expert ids (free) [by policy]",
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


def _add_serving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("serving")
    group.add_argument("--batch", type=_positive, default=1, help="requests in a static batch [1]")
    group.add_argument(
        "--chunk-tokens", type=_positive, metavar="N", help="serve prefills in chunks of N tokens"
    )
    group.add_argument(
        "--arrivals",
        choices=("back-to-back", "recorded"),
        default="back-to-back",
        help="when requests arrive [back-to-back]",
    )
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
        choices=("auto", "fast", "reference"),
        default="auto",
        help="compiled, or written to be read; both give the same answers [auto: fast where the "
        "policy is made of built-in seats]",
    )


def run(args: argparse.Namespace) -> int:
    """Replay and print; 0."""
    from moesim.cli.progress import requests_progress
    from moesim.cli.table import print_replay
    from moesim.replay import replay

    request = _request(args)
    with requests_progress("replay") as progress:
        answer = replay(request, progress)
    if args.json:
        print(json.dumps(answer))
    else:
        print_replay(answer)
    return 0


def _request(args: argparse.Namespace) -> Request:
    from moesim.degrade import parse_allowed
    from moesim.engine.setup import Options
    from moesim.profile import load_model
    from moesim.replay import Request
    from moesim.traces.samples import trace_path

    if args.timeline and args.out is None:
        raise UsageError("--timeline writes into the run's folder; give --out DIR too")
    initial, experts = _initial(args.initial)
    return Request(
        trace=trace_path(args.trace),
        hardware=_hardware(args),
        policies=_words(args.policy, "lru"),
        capacities=_words(args.capacity, "25%"),
        settings=args.set,
        scope=args.scope,
        costs=None if args.costs is None else load_model(args.costs),
        options=Options(
            order=args.order,
            flat=args.mode == "flat",
            allocator=args.allocator,
            share_kv=args.kv == "share",
            check=args.check,
            timeline=args.timeline,
        ),
        batch=args.batch,
        chunk_tokens=args.chunk_tokens or 0,
        arrivals=args.arrivals,
        initial=initial,
        initial_experts=experts,
        calibration=args.calibration,
        allowed=parse_allowed(args.allow),
        limit=args.limit,
        seed=args.seed,
        ladder=args.ladder,
        engine=args.engine,
        out=args.out,
    )


def _hardware(args: argparse.Namespace) -> HardwareProfile:
    from moesim.capacity import parse_bytes
    from moesim.profile import load_hardware

    hardware = load_hardware(args.hardware)
    if args.bandwidth is None:
        return hardware
    if args.bandwidth == "inf":
        return hardware.with_bandwidth(float("inf"))
    if not re.fullmatch(r"[0-9.]+ *[A-Za-z]+/s", args.bandwidth):
        raise UsageError(f"--bandwidth {args.bandwidth}: write a rate such as 25GB/s, or inf")
    rate = parse_bytes(args.bandwidth.removesuffix("/s"), "--bandwidth")
    if not rate:
        raise UsageError("--bandwidth 0: must be more than nothing")
    return hardware.with_bandwidth(float(rate))


def _initial(text: str | None) -> tuple[str, tuple[ExpertId, ...]]:
    """(kind, experts): kind is "", "cold", "static" or "file"."""
    if text is None or text in ("cold", "static"):
        return text or "", ()
    path = Path(text)
    try:
        experts: Any = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(
            f"--initial {text}: {error.strerror}; write cold, static or the path of a JSON file"
        ) from None
    except (ValueError, RecursionError):
        raise UsageError(f"--initial {text}: not JSON; write a list of expert ids") from None
    if not isinstance(experts, list) or not all(type(e) is int for e in experts):
        raise UsageError(f"--initial {text}: must be a list of expert ids (whole numbers)")
    if len(set(experts)) < len(experts):
        raise UsageError(f"--initial {text}: an expert is listed twice; list each once")
    return "file", tuple(experts)


def _words(given: list[str] | None, default: str) -> tuple[str, ...]:
    """Repeated options and commas, in order, each once."""
    words = [w.strip() for text in given or [default] for w in text.split(",")]
    if not all(words):
        raise UsageError(f"{','.join(given or [])!r} names nothing between its commas; fill it in")
    return tuple(dict.fromkeys(words))


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 to 2**63 - 1")
    return value


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("names nothing; write a path")
    return Path(text)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value
