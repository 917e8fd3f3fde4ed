"""``moesim bench``: how fast moesim is on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import UsageError

if TYPE_CHECKING:
    from moesim.bench.workshop import Settings

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim bench --list
  moesim bench reference python
  moesim bench --trace x.parquet --libcachesim-python ~/lcs/bin/python --out speed.json
  moesim bench memory --memory-size 5GB
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``bench`` command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the simulator's own speed",
        description="Measure how fast moesim is, beside references measured in the same run, and "
        "whether it keeps what it promises. Without names the quick benchmarks run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks, or `all`")
    parser.add_argument("--list", action="store_true", help="list them, and measure nothing")
    _add_what(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write that object to a file")
    parser.set_defaults(func=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on what")
    group.add_argument(
        "--trace", metavar="T", help="a trace file or `demo` [synthetic, shaped as gpt-oss-20b]"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only its first N requests")
    group.add_argument(
        "--tokens", type=int, metavar="N", help="tokens of the synthetic trace [32000]"
    )
    group.add_argument(
        "--head-tokens",
        type=int,
        metavar="N",
        help="tokens that the reference engine and plain Python run [2000]",
    )
    group.add_argument(
        "--scale-accesses", type=int, metavar="N", help="accesses of each trace of scale [480000]"
    )
    group.add_argument(
        "--memory-size", metavar="SIZE", help="decoded rows of the trace of memory [256MiB]"
    )
    group.add_argument(
        "--configurations", type=int, metavar="N", help="configurations of sweep [1000]"
    )
    group.add_argument(
        "--repeats", type=int, metavar="N", help="rounds, in each of which every side runs once [5]"
    )
    group.add_argument(
        "--libcachesim-python",
        metavar="PATH",
        help="a Python that has libcachesim, for lru, flat and lfu",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0."""
    from moesim.bench.suite import chosen, run

    if args.list:
        _print_list()
        return 0
    # What takes minutes begins only when all that was asked for can be done.
    chosen(args.names)
    settings = _settings(args)
    if args.out is not None:
        _write(args.out, None)
    answer = run(args.names, settings, lambda text: print(f"bench: {text}", file=sys.stderr))
    if args.out is not None:
        _write(args.out, answer)
    if args.json:
        print(json.dumps(answer))
    else:
        _print(answer)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    from moesim.bench.workshop import Settings
    from moesim.capacity import parse_bytes
    from moesim.traces.samples import trace_path

    given: dict[str, Any] = {}
    whole = ("limit", "tokens", "head_tokens", "scale_accesses", "configurations", "repeats")
    for name in whole:
        value = getattr(args, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {value}: must be a whole number of at least 1")
        given[name] = value
    if args.memory_size is not None:
        given["memory_bytes"] = parse_bytes(args.memory_size, "--memory-size")
    given["trace"] = trace_path(args.trace) if args.trace is not None else None
    given["libcachesim_python"] = args.libcachesim_python
    return Settings(**{name: value for name, value in given.items() if value is not None})


def _write(path: Path, answer: dict[str, Any] | None) -> None:
    """Write beside, then rename; without an answer, find out whether that will work."""
    if not path.name or path.is_dir():
        raise UsageError(f"--out {path}: is a folder; name a file to write")
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_text(json.dumps(answer, indent=1) + "\n")
        if answer is not None:
            beside.replace(path)
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)


def _print_list() -> None:
    from moesim.bench.suite import BENCHMARKS
    from moesim.cli.table import print_table

    rows = [(b.name, "yes" if b.quick else "", b.summary) for b in BENCHMARKS]
    print_table(("benchmark", "quick", "what it measures"), rows, left=3)


def _print(answer: dict[str, Any]) -> None:
    from moesim.cli.table import console, print_table

    columns = ("benchmark", "case", "measured", "±", "reference", "", "ratio", "promised", "kept")
    if answer["figures"]:
        print_table(columns, [_row(figure) for figure in answer["figures"]], left=2)
    out = console()
    for refused in answer["not_run"]:
        out.print(f"{refused['benchmark']}: not run: {refused['not_run']}")
    facts = answer["machine"]
    out.print(
        f"{facts['cpu']}, one core of {facts['cores']}; Python {facts['python']}, numba "
        f"{facts['numba']}, numpy {facts['numpy']}; load before: {facts['load_before']}"
    )


def _row(figure: dict[str, Any]) -> tuple[str, ...]:
    unit, reference, ratio = figure["unit"], figure["reference"], figure["ratio"]
    kept = figure["kept"]
    return (
        figure["benchmark"],
        figure["case"],
        _amount(figure["median"], unit),
        f"{figure['half_spread']:.1%}",
        reference["name"] if reference else "-",
        _amount(reference["value"], unit) if reference else "-",
        f"{ratio:.2f}" if ratio is not None else "-",
        _promised(figure),
        "-" if kept is None else "yes" if kept else "NO",
    )


def _promised(figure: dict[str, Any]) -> str:
    if figure["promise"] is None:
        return "-"
    ((kind, value),) = figure["promise"].items()
    sign = "≥" if kind == "at_least" else "≤"
    alone = figure["reference"] is None
    return f"{sign} {_amount(value, figure['unit']) if alone else f'{value:g}'}"


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if unit.endswith("/s"):
        scale, letter = (1e6, "M") if value >= 1e6 else (1e3, "k") if value >= 1e3 else (1, "")
        return f"{value / scale:,.3g} {letter}/s"
    return f"{value:.3g} {unit.partition('/')[0]}"
