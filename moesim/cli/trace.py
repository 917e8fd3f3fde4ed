"""``moesim trace``: look at, verify, cut, import and make traces."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.trace_make import add_convert, add_synth
from moesim.errors import TraceError, UsageError

if TYPE_CHECKING:
    from moesim.traces.schema import TraceMeta
    from moesim.traces.unions import Union

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``trace`` command and its own commands."""
    parser = subparsers.add_parser(
        "trace",
        help="look at, verify, cut, import and make traces",
        description="Look at, verify, cut, import and make routing traces.",
        epilog="example: moesim trace info demo",
    )
    commands = parser.add_subparsers(dest="trace_command", required=True, metavar="COMMAND")
    _add_info(commands)
    _add_check(commands)
    _add_head(commands)
    _add_parts(commands)
    add_convert(commands)
    add_synth(commands)


def run(args: argparse.Namespace) -> int:
    """Run the chosen trace command; its exit code."""
    code: int = args.func(args)
    return code


def _add_info(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "info",
        help="what a trace says about itself",
        description="Print the metadata of a trace. Reads no rows (but for --batch); `trace check` "
        "verifies them.",
        epilog="example: moesim trace info demo --batch 1,2,4,8",
    )
    parser.add_argument("trace", help="trace file, or the name of a shipped sample")
    parser.add_argument(
        "--batch",
        metavar="SIZES",
        help="also how many experts a layer needs when so many requests decode together, e.g. "
        "1,2,4,8,16,32",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run_info)


def _add_check(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "check",
        help="verify every law of the format",
        description="Verify order, ranges, distinct experts, whole layers, weights, counts and "
        "digest; warn where the routing itself looks wrong. Code 2 if a law is broken.",
        epilog="example: moesim trace check my.parquet",
    )
    parser.add_argument("trace", help="trace file, or the name of a shipped sample")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run_check)


def _add_head(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "head",
        help="write the first tokens or requests as a trace",
        description="Write the first tokens or requests of a trace as a trace of its own.",
        epilog="example: moesim trace head demo first.parquet --requests 8",
    )
    parser.add_argument("source", help="trace file to read, or the name of a shipped sample")
    parser.add_argument("target", type=Path, help="trace file to write")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--tokens", type=int, metavar="N", help="first N tokens")
    size.add_argument("--requests", type=int, metavar="N", help="first N requests")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run_head)


def _add_parts(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "parts",
        help="see each expert as several parts, loaded and kept by themselves",
        description="Write a trace in which each expert is several experts of a part of its bytes; "
        "a token that needs one needs all of its parts. For policies that keep halves (moepic).",
        epilog="example: moesim trace parts demo halves.parquet",
    )
    parser.add_argument("source", help="trace file to read, or the name of a shipped sample")
    parser.add_argument("target", type=Path, help="trace file to write")
    parser.add_argument("--parts", type=int, default=2, metavar="N", help="parts (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run_parts)


def run_info(args: argparse.Namespace) -> int:
    """Print what the trace says about itself. Raises `TraceError`."""
    from moesim.traces.reader import TraceReader
    from moesim.traces.samples import trace_path

    path = trace_path(args.trace)
    with TraceReader(path) as reader:
        meta = reader.meta
    size = path.stat().st_size
    together = _unions(path, args.batch, meta)
    if args.json:
        told = {**_head_of(path), "bytes": size, "meta": json.loads(meta.to_json())}
        if args.batch is not None:
            told["batch"] = [asdict(union) for union in together]
        print(json.dumps(told))
        return 0
    for name, value in _described(meta, size):
        print(f"{name:<11}{value}")
    for union in together:
        mean = "-" if union.experts is None else f"{union.experts:.2f}"
        print(f"batch {union.batch:<5}{mean} of {meta.experts} experts a layer")
    return 0


def _unions(path: Path, batch: str | None, meta: TraceMeta) -> list[Union]:
    """What ``--batch`` asks for."""
    if batch is None:
        return []
    from moesim.traces.unions import unions

    sizes = batch.split(",")
    if not all(size.isascii() and size.isdigit() and 0 < int(size) < 1 << 20 for size in sizes):
        raise UsageError(f"--batch {batch}: write sizes such as 1,2,4,8")
    with _progress("counting", meta.rows) as advance:
        return unions(path, [int(size) for size in sizes], advance)


def run_check(args: argparse.Namespace) -> int:
    """Verify the trace. Raises `TraceError` at the first broken law."""
    from moesim.traces.check import check_file
    from moesim.traces.reader import TraceReader
    from moesim.traces.samples import trace_path

    try:
        path = trace_path(args.trace)
        with TraceReader(path) as reader:
            total = reader.meta.rows
        with _progress("checking", total) as advance:
            report = check_file(path, advance)
    except TraceError as error:
        if args.json:
            print(json.dumps({**_head_of(args.trace), "ok": False, "error": str(error)}))
        raise
    if args.json:
        told = {"ok": True, **_counts(report.meta), "warnings": report.warnings}
        print(json.dumps({**_head_of(path), **told}))
        return 0
    for warning in report.warnings:
        print(f"warning: {warning}")
    print(f"{args.trace}: every law holds ({_in_words(report.meta)})")
    return 0


def run_head(args: argparse.Namespace) -> int:
    """Write the head. Raises `TraceError`, `UsageError`."""
    from moesim.traces.head import head
    from moesim.traces.samples import trace_path

    source = trace_path(args.source)
    with _progress("cutting", args.tokens or args.requests) as advance:
        meta = head(
            source,
            args.target,
            tokens=args.tokens,
            requests=args.requests,
            progress=advance,
        )
    if args.json:
        print(json.dumps({**_head_of(args.target), **_counts(meta)}))
    else:
        print(f"{args.target}: {_in_words(meta)}")
    return 0


def run_parts(args: argparse.Namespace) -> int:
    """Write the trace in parts. Raises `TraceError`, `UsageError`."""
    from moesim.traces.expert_parts import in_parts
    from moesim.traces.reader import TraceReader
    from moesim.traces.samples import trace_path

    source = trace_path(args.source)
    with TraceReader(source) as reader:
        total = reader.meta.requests
    with _progress("cutting experts", total) as advance:
        meta = in_parts(source, args.target, args.parts, progress=advance)
    if args.json:
        print(json.dumps({**_head_of(args.target), **_counts(meta)}))
    else:
        print(f"{args.target}: {_in_words(meta)}, top {meta.top_k} of {meta.experts}")
    return 0


def _head_of(path: Path | str) -> dict[str, Any]:
    return {"schema": 1, "path": str(path)}


def _counts(meta: TraceMeta) -> dict[str, Any]:
    names = ("requests", "tokens", "rows", "digest")
    return {"phases": list(meta.phases), **{name: getattr(meta, name) for name in names}}


def _in_words(meta: TraceMeta) -> str:
    return (
        f"{meta.requests:,} requests, {meta.tokens:,} tokens, {meta.rows:,} rows, "
        f"digest {meta.digest[:12]}"
    )


def _described(meta: TraceMeta, size: int) -> Iterator[tuple[str, str]]:
    model = meta.model
    stacks = ", ".join(f"{stack.name} {stack.layers}" for stack in model.stacks)
    yield "model", f"{model.name} ({model.source})"
    yield "shape", f"{model.layers} MoE layers ({stacks}), top {model.top_k} of {model.experts}"
    yield "rows", f"{_in_words(meta)}, {size / 1e6:.1f} MB"
    yield "phases", ", ".join(meta.phases)
    yield "columns", ", ".join(_optional_columns(meta)) or "no optional ones"
    yield "rank order", meta.rank_order
    yield "score", meta.score
    for name in ("dataset", "split", "seed", "dtype", "device", "source"):
        value = getattr(meta, name)
        if value not in (None, ""):
            yield name, str(value)
    if meta.versions:
        yield "versions", ", ".join(f"{name} {text}" for name, text in meta.versions.items())
    for note in meta.notes:
        yield "note", note


def _optional_columns(meta: TraceMeta) -> Iterator[str]:
    flags = {
        "weights": meta.has_weights,
        "gate": meta.has_gate,
        "input_norm": meta.has_norms,
        "token": meta.has_tokens,
        "expert_norms": meta.expert_norms is not None,
    }
    yield from (name for name, there in flags.items() if there)
    yield from (f"ahead{distance}[{width}]" for distance, width in sorted(meta.ahead.items()))
    if meta.embedding != "none":
        yield f"embedding per {meta.embedding}"


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], object] | None]:
    """Yield a function to call with each amount done; None where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)
