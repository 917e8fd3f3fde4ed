"""``moesim real suite``: everything that a machine is asked, within some minutes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from moesim.ask.arguments import path, positive, seed
from moesim.errors import NotRunError, UsageError

_EPILOG = """Run it again to go on: what is finished is not done again. Each model is one process.
Raw results, profiles and the table of each model lie under OUT/kept, small enough to be committed.

examples:
  moesim real suite --device cuda --out suite
  moesim real suite --device cpu --model olmoe-1b-7b --capacity 25% --out suite --minutes 60
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``suite`` to the commands of ``real``."""
    parser = commands.add_parser(
        "suite",
        help="hardware tests, calibration, campaigns and the demo model, in resumable pieces",
        description="Run the hardware tests, the demo model in free mode, and for each model: "
        "measure the machine, simulate and run the policies in its sizes, and compare. On CUDA "
        "copies go as fast as the link does.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="for everything")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="what is measured [cuda]"
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=15.0, metavar="N", help="begin nothing after these [15]"
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME|FILE",
        help="whose sizes, may repeat [gpt-oss-20b, olmoe-1b-7b, mixtral-8x7b]",
    )
    parser.add_argument(
        "--trace",
        action="append",
        default=[],
        metavar="MODEL=FILE",
        help="routing of a model [synthetic, in its shape]",
    )
    parser.add_argument("--policy", metavar="NAMES", help="with commas [eight]")
    parser.add_argument(
        "--capacity", default="", metavar="SIZES", help="with commas [by model: 10%%,25%%,50%%]"
    )
    parser.add_argument("--requests", type=positive, default=2, metavar="N", help="of a run [2]")
    parser.add_argument(
        "--prompt-tokens", type=positive, default=32, metavar="N", help="of a request [32]"
    )
    parser.add_argument(
        "--output-tokens", type=positive, default=24, metavar="N", help="of a request [24]"
    )
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="of each run [3]")
    parser.add_argument("--threads", type=positive, metavar="N", help="that compute [cores - 1]")
    parser.add_argument("--no-demo", action="store_true", help="leave out the demo model")
    parser.add_argument("--seed", type=seed, default=0, help="of every random choice [0]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Do it and print; 0 if all is done, 2 if something failed or time was up."""
    from moesim.cli.table import print_table
    from moesim.real import suite

    asked = suite.Suite(
        out=args.out,
        device=args.device,
        models=tuple(args.model or suite.MODELS),
        policies=args.policy or suite.POLICIES,
        capacity=args.capacity,
        traces=_traces(args.trace),
        requests=args.requests,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        repeats=args.repeats,
        minutes=args.minutes,
        demo=not args.no_demo,
        threads=args.threads or 0,
        seed=args.seed,
    )
    if args.device == "cuda":
        _require_cuda()
    told = suite.run(asked, lambda text: print(f"suite: {text}", file=sys.stderr))
    if args.json:
        print(json.dumps(told))
    else:
        print_table(("piece", "state", "seconds", "said"), suite.summary_rows(told), left=2)
    return 0 if told["done"] else 2


def _require_cuda() -> None:
    try:
        from moesim.real.cuda import require
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise NotRunError(
            "not run: the suite needs torch, which is not installed; "
            "`pip install 'moesim[real]'` installs it"
        ) from None
    # Its pieces use it, each a process of its own.
    require(use=False)


def _traces(given: list[str]) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for text in given:
        model, equals, file = text.partition("=")
        if not (model and equals and file):
            raise UsageError(f"--trace {text}: write MODEL=FILE")
        made[model] = Path(file).resolve()
    return made


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of minutes above 0")
    return value
