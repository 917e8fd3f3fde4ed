"""``moesim trace convert`` and ``moesim trace synth``: make traces."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.profile import ModelProfile
    from moesim.traces.schema import TraceMeta

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_FORMATS = (
    "arrays (.npz, .npy), bigmoe (route_trace v1 CSV), esft (text), flame (CSV), gpt-oss"
    " (fingerprint JSON), moe-beyond (CSV), router-trace (v2 JSON), vllm (route log JSONL)"
)


def add_convert(commands: Subparsers) -> None:
    """Add ``trace convert``."""
    parser = commands.add_parser(
        "convert",
        help="import routing that others recorded",
        description=f"Write a trace from a foreign recording. Formats: {_FORMATS}.",
        epilog="example: moesim trace convert routes.csv my.parquet --model olmoe-1b-7b",
    )
    parser.add_argument(
        "source", type=Path, nargs="+", metavar="SRC", help="file, folder, or files (one a layer)"
    )
    parser.add_argument("target", type=Path, metavar="DST", help="trace file to write")
    parser.add_argument("--model", metavar="NAME|FILE", help="profile of the model recorded")
    parser.add_argument("--experts", type=int, metavar="N", help="experts a layer, without a model")
    parser.add_argument(
        "--phase",
        choices=("as-is", "decode", "prefill"),
        default="as-is",
        help="decode: each token is an iteration of its own; prefill: all tokens of a sequence are"
        " iteration 0; as-is (default): what the source says",
    )
    parser.add_argument(
        "--keep-order",
        action="store_true",
        help="keep the source's order of a token's experts; else sorted by weight, descending",
    )
    parser.add_argument("--format", metavar="F", help="name the format instead of finding it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run_convert)


def add_synth(commands: Subparsers) -> None:
    """Add ``trace synth``."""
    parser = commands.add_parser(
        "synth",
        help="make a synthetic trace of any size",
        description="Make a synthetic trace, streaming to disk. Equal options give equal rows, and"
        " the head of a longer trace is the shorter one.",
        epilog="example: moesim trace synth my.parquet --model olmoe-1b-7b --requests 2 "
        "--prompt-tokens 16 --output-tokens 8",
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="trace file to write")
    parser.add_argument("--requests", type=int, required=True, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, required=True, metavar="A")
    parser.add_argument(
        "--output-tokens",
        type=int,
        required=True,
        metavar="B",
        help="the first comes from the prefill, so there are B-1 decode iterations",
    )
    parser.add_argument("--model", metavar="NAME|FILE", help="take the shape of this model")
    parser.add_argument("--layers", type=int, metavar="L", help="MoE layers, without a model")
    parser.add_argument("--experts", type=int, metavar="E", help="experts a layer")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts a token")
    _add_knobs(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run_synth)


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    knobs = parser.add_argument_group("structure")
    knobs.add_argument(
        "--skew", type=float, default=0.5, metavar="S", help="Zipf exponent of popularity (0.5)"
    )
    knobs.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        metavar="P",
        help="autocorrelation from token to token, 0..1 (0.5)",
    )
    knobs.add_argument("--topics", type=int, default=8, metavar="T", help="number of topics (8)")
    knobs.add_argument(
        "--topic-strength",
        type=float,
        default=0.5,
        metavar="S",
        help="standard deviation of the topic's share of a logit (0.5)",
    )
    knobs.add_argument(
        "--cross-layer",
        type=float,
        default=0.2,
        metavar="C",
        help="share of the varying part that all layers have in common, 0..1 (0.2)",
    )
    knobs.add_argument(
        "--gate", choices=("full", "none"), default="none", help="write all logits (none)"
    )
    knobs.add_argument(
        "--ahead", default="", metavar="D,D", help="predict experts so many layers on, as 1,2"
    )
    knobs.add_argument(
        "--recall",
        type=float,
        default=0.8,
        metavar="R",
        help="probability that a predicted expert is a true one (0.8)",
    )
    knobs.add_argument(
        "--embeddings",
        type=int,
        nargs="?",
        const=64,
        default=0,
        metavar="DIM",
        help="write an embedding for each iteration, near its topic's (64 numbers)",
    )


def run_convert(args: argparse.Namespace) -> int:
    """Import a recording. Raises `TraceError`, `UsageError`, `ProfileError`."""
    from moesim.traces.convert import convert

    with _progress("importing requests", None) as progress:
        meta = convert(
            args.source,
            args.target,
            model=_model(args.model),
            experts=args.experts,
            phase=args.phase,
            keep_order=args.keep_order,
            format=args.format,
            progress=progress,
        )
    _report(args, meta)
    return 0


def run_synth(args: argparse.Namespace) -> int:
    """Make a synthetic trace. Raises `UsageError`, `ProfileError`."""
    from moesim.traces.synth import Synth, synth_model, synthesise

    options = Synth(
        model=synth_model(_model(args.model), args.layers, args.experts, args.top_k),
        requests=args.requests,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        skew=args.skew,
        overlap=args.overlap,
        topics=args.topics,
        topic_strength=args.topic_strength,
        cross_layer=args.cross_layer,
        gate=args.gate == "full",
        ahead=_distances(args.ahead),
        recall=args.recall,
        embedding=args.embeddings,
        seed=args.seed,
    )
    with _progress("making requests", options.requests) as progress:
        meta = synthesise(args.target, options, progress)
    _report(args, meta)
    return 0


def _model(name: str | None) -> ModelProfile | None:
    if name is None:
        return None
    from moesim.profile import load_model

    return load_model(name)


def _distances(text: str) -> tuple[int, ...]:
    try:
        found = {int(part) for part in text.split(",") if part.strip()}
    except ValueError:
        raise UsageError(f"--ahead {text}: must be distances such as 1,2") from None
    return tuple(sorted(found))


def _report(args: argparse.Namespace, meta: TraceMeta) -> None:
    if args.json:
        print(json.dumps(_plain(args.target, meta)))
        return
    print(
        f"{args.target}: {meta.requests:,} requests, {meta.tokens:,} tokens, {meta.rows:,} rows"
        f" ({', '.join(meta.phases)}), digest {meta.digest[:12]}"
    )
    for note in meta.notes:
        print(f"note: {note}")


def _plain(path: Path, meta: TraceMeta) -> dict[str, Any]:
    names = ("requests", "tokens", "rows", "digest", "rank_order", "source")
    shape = {name: getattr(meta.model, name) for name in ("name", "layers", "experts", "top_k")}
    return {
        "schema": 1,
        "path": str(path),
        "phases": list(meta.phases),
        **{name: getattr(meta, name) for name in names},
        "model": shape,
        "notes": list(meta.notes),
    }


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None] | None]:
    """Yield a function to call with the number done; None where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
