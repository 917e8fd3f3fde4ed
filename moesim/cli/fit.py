"""``moesim fit``: what a policy learns beforehand, from a trace to a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.ask.arguments import path as _path
from moesim.ask.arguments import positive as _positive
from moesim.ask.arguments import seed as _seed
from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.fitting import Progress

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim fit --policy promoe --trace demo --split 7:3 --out promoe.npz
  moesim replay --trace demo --split 7:3 --policy promoe --set prefetch.weights=promoe.npz
  moesim fit --policy moe-beyond --trace demo --split 7:3 --out moe-beyond.npz
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``fit`` command."""
    parser = subparsers.add_parser(
        "fit",
        help="fit a policy's predictor on a trace",
        description="Fit what a policy learns before it serves. ProMoE: for each layer a small "
        "network that names the experts of a later one. MoE-Beyond: for each layer one that names "
        "its experts from the token's embedding and the request so far. A replay refuses to serve "
        "the requests that it was fitted on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--policy", choices=("promoe", "moe-beyond"), default="promoe", help="[promoe]"
    )
    parser.add_argument("--trace", required=True, help="a trace file, or the sample `demo`")
    parser.add_argument(
        "--out", type=_path, required=True, metavar="FILE", help="where to write it, a .npz"
    )
    parser.add_argument(
        "--split",
        metavar="HOW",
        help="fit on the train requests alone and try on the others: marked, or shares such as "
        "7:3; a replay takes the same",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N requests")
    _add_shape(parser)
    parser.add_argument("--seed", type=_seed, default=0, help="of every random choice [0]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the predictor")
    group.add_argument("--stride", type=_positive, default=2, help="layers ahead [2]")
    group.add_argument(
        "--history", type=_positive, default=2, metavar="N", help="layers that ProMoE sees [2]"
    )
    group.add_argument("--hidden", type=_positive, default=128, metavar="N", help="units [128]")
    group.add_argument(
        "--epochs", type=_positive, default=10, metavar="N", help="passes over the samples [10]"
    )
    group.add_argument(
        "--input",
        choices=("gate", "weights", "experts", "embedding"),
        default="",
        help="what it sees. ProMoE of a layer: all probabilities, the chosen experts' weights, or "
        "which they are; MoE-Beyond of a token: its embedding and its request's experts, or these "
        "alone (experts) [the first that the trace has]",
    )


def run(args: argparse.Namespace) -> int:
    """Fit, write and tell; 0."""
    from moesim.fitting import Request, fit, save
    from moesim.past import parse_split
    from moesim.traces.samples import trace_path

    request = Request(
        trace=trace_path(args.trace),
        split=None if args.split is None else parse_split(args.split),
        limit=args.limit,
        stride=args.stride,
        history=args.history,
        hidden=args.hidden,
        epochs=args.epochs,
        kind=args.input,
        seed=args.seed,
        policy=args.policy,
    )
    out = _writable(args.out)
    with _progress() as progress:
        predictor, told = fit(request, progress)
    save(predictor, out)
    if args.json:
        print(json.dumps({"schema": 1, "path": str(out), **told}))
    else:
        _print(args, told)
    return 0


def _writable(path: Path) -> Path:
    """Refuse before the work what could not be written after it."""
    if path.suffix != ".npz":
        raise UsageError(f"--out {path}: must end in .npz")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: no folder {path.parent}; make it first")
    if path.is_dir():
        raise UsageError(f"--out {path}: is a folder; name a file")
    return path


def _print(args: argparse.Namespace, told: dict[str, Any]) -> None:
    print(
        f"{args.out}: fitted on {told['requests']:,} requests, {told['tokens']:,} tokens a layer "
        f"({told['input']})"
    )
    for part, found in told["recall"].items():
        print(
            f"recall on the {part} requests: {found['predictor']:.1%}"
            f" (each layer's most chosen experts: {found['popular']:.1%})"
        )
    split = f" --split {args.split}" if args.split else ""
    print(
        f"next: moesim replay --trace {args.trace}{split} --policy {args.policy} "
        f"--set prefetch.weights={args.out}"
        if split
        else "next: replay another trace with it; this one was seen whole"
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    """One display for each stage."""
    from contextlib import ExitStack

    from moesim.cli.progress import requests_progress

    with ExitStack() as stack:
        stage, show = "", None

        def update(what: str, done: int, total: int) -> None:
            nonlocal stage, show
            if what != stage or show is None:
                stack.close()
                verb, _, unit = what.rpartition(" ")
                stage, show = what, stack.enter_context(requests_progress(verb, unit))
            show(done, total)

        yield update
