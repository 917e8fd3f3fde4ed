"""``moesim report``: a page to look at, made of run folders."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.ask.arguments import path as _path
from moesim.errors import NotRunError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim report runs -o report.html --open
  moesim report runs --trace demo --step 40
  moesim report sweep/results.parquet
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``report`` command."""
    parser = subparsers.add_parser(
        "report",
        help="make a page of run folders",
        description="One self-contained HTML page: which policy is the quickest and how far that "
        "is to be believed, latency against memory, every run in a table, where the time goes, "
        "what the link carries, stall by layer, and a forward pass on the clock where runs kept "
        "one (`moesim replay --timeline`). It opens without a network. "
        "Needs Bokeh (`pip install 'moesim[report]'`).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        type=_path,
        nargs="+",
        metavar="RUNS",
        help="run folders, folders that hold some at any depth, or a sweep's results.parquet",
    )
    parser.add_argument(
        "-o", "--out", type=_path, default=Path("report.html"), metavar="FILE", help="[report.html]"
    )
    parser.add_argument(
        "--trace", metavar="TRACE", help="the trace that was replayed: draws its gates' entropy"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="which forward pass to draw [one of the second half]"
    )
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--json", action="store_true", help="print what it says as one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Write the page, print its answer; 0."""
    from moesim.traces.samples import trace_path

    with _library():
        from moesim.analysis.report import page, write

        trace = trace_path(args.trace) if args.trace is not None else None
        made = page(args.runs, args.step, trace)
    write(args.out, made.html)
    answers = [
        {"setting": name, "headline": one.headline, "lines": one.lines, "belief": one.belief}
        for name, one in made.answers
    ]
    if args.json:
        print(json.dumps({"schema": 1, "page": str(args.out), "runs": made.runs, "said": answers}))
    else:
        print(f"{args.out}: {made.runs} runs, {len(made.html.encode()) / 1e6:.1f} MB")
        for name, one in made.answers:
            print(f"{name}: {one.headline}" if name else one.headline)
    if args.open:
        import webbrowser

        webbrowser.open(args.out.resolve().as_uri())
    return 0


@contextmanager
def _library() -> Iterator[None]:
    """Where a library is missing that the page is made of, say which extra brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("bokeh", "jinja2", "pandas"):
            raise
        raise NotRunError(
            f"not run: a report needs {error.name}, which is not installed; "
            "`pip install 'moesim[report]'` installs it"
        ) from None
