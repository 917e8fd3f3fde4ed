"""Options of serving, as ``moesim replay`` and what builds on it read them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moesim.ask.arguments import positive
from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.serve.options import Serving


def add_serving(group: argparse._ArgumentGroup) -> None:
    """Add what ``serving_of`` reads, and the arrivals."""
    group.add_argument(
        "--arrivals",
        default="back-to-back",
        metavar="HOW",
        help="when requests arrive: recorded, poisson:2.91 (a second), closed:8 (users) or "
        "closed:8:2s (who think), azure:FILE, mooncake:FILE, burstgpt:FILE or such a FILE "
        "[back-to-back]",
    )
    group.add_argument(
        "--rate", metavar="R", help="bring the arrivals to R requests a second, e.g. 2.91"
    )
    group.add_argument(
        "--requests",
        type=positive,
        metavar="N",
        help="so many requests arrive; recorded ones come again [as many as the log or trace has]",
    )
    group.add_argument("--until", metavar="TIME", help="no step begins from then on, e.g. 600s")
    group.add_argument(
        "--scheduler",
        choices=("static", "decode-first", "prefill-first"),
        default="static",
        help="batches served to their end, or continuous batching [static]",
    )
    group.add_argument(
        "--token-budget",
        type=positive,
        metavar="N",
        help="most tokens of a step in continuous batching [2048]",
    )
    group.add_argument(
        "--slo", metavar="LIMITS", help="what a good request keeps, e.g. ttft=2s,tpot=50ms,e2e=30s"
    )
    group.add_argument(
        "--warm",
        type=int,
        default=0,
        metavar="N",
        help="serve N requests before those that are counted",
    )
    group.add_argument(
        "--turns",
        metavar="HOW",
        help="conversations: 4:10s (requests of one topic, and the time to think between them), or "
        "log:10s, as the prefixes in a Mooncake log say",
    )
    group.add_argument(
        "--shift", metavar="HOW", help="order of the requests: topic:32 (blocks), or shuffle"
    )


def serving_of(args: argparse.Namespace) -> Serving:
    """What the options say.

    Raises
    ------
    UsageError
        Naming the option.
    """
    from moesim.serve.options import (
        STATIC,
        TOKEN_BUDGET,
        Serving,
        Slo,
        parse_shift,
        parse_slo,
        parse_turns,
    )
    from moesim.serve.quantities import parse_duration_ns, parse_rate

    if args.warm < 0:
        raise UsageError(f"--warm {args.warm}: must be at least 0")
    if args.token_budget is not None and args.scheduler == STATIC:
        raise UsageError("--token-budget: only continuous batching has one; give --scheduler too")
    return Serving(
        scheduler=args.scheduler,
        token_budget=args.token_budget or TOKEN_BUDGET,
        rate=None if args.rate is None else parse_rate(args.rate, "--rate"),
        requests=args.requests or 0,
        until_ns=0 if args.until is None else parse_duration_ns(args.until, "--until"),
        slo=Slo() if args.slo is None else parse_slo(args.slo),
        warm=args.warm,
        turns=None if args.turns is None else parse_turns(args.turns),
        shift=0 if args.shift is None else parse_shift(args.shift),
    )
