"""``moesim validate``: simulated runs beside measured ones."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moesim.ask.arguments import path as _path
from moesim.errors import NotRunError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moesim.analysis.validate import Report
    from moesim.analysis.validate_runs import Matched

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """examples:
  moesim validate runs/0123456789abcdef measured/
  moesim validate simulated/ first/ second/ third/ --out validation
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``validate`` command."""
    parser = subparsers.add_parser(
        "validate",
        help="compare simulated runs with measured ones",
        description="How far simulated times and counts lie from measured ones, beside the spread "
        "of the measurements, and whether policies keep their order. Each name is a run folder or "
        "a folder of run folders; runs are matched by all that determines them but the machine. "
        "Needs pandas, scipy and matplotlib (`pip install 'moesim[figures]'`).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("simulated", type=_path, metavar="SIM", help="what `moesim replay` kept")
    parser.add_argument(
        "measured",
        type=_path,
        nargs="+",
        metavar="REAL",
        help="what `moesim real run` kept; three repeats or more of each",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--out",
        type=_path,
        metavar="DIR",
        help="write tables (CSV), validation.md and figures (PDF, PNG, SVG) there",
    )
    parser.add_argument(
        "--overlay",
        metavar="POLICY@SIZE",
        help="whose step to draw [the first with a timeline of both]",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="which forward pass to draw [one of the second half]"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Compare and print; 0."""
    with figures():
        from moesim.analysis.validate import report
        from moesim.analysis.validate_files import chosen, write
        from moesim.analysis.validate_runs import data_of, matched

    if args.out is None and (args.overlay is not None or args.step is not None):
        raise UsageError("--overlay, --step: say what is drawn into --out; give --out DIR too")
    pairs = matched(args.simulated, args.measured)
    data = data_of(pairs)
    made = report(data)
    if args.out is not None:
        write(args.out, data, made, chosen(pairs, args.overlay, args.step))
    if args.json:
        print(json.dumps(made.to_dict()))
    else:
        print_report(made)
        _print_overlay(pairs, args.out)
    return 0


def print_report(made: Report) -> None:
    """Tables, then what is claimed."""
    from moesim.analysis import validate_text as text
    from moesim.cli.table import console, print_table

    out = console()
    out.print(text.heading(made))
    print_table(text.ERROR_COLUMNS, text.error_rows(made), left=2)
    print_table(text.ORDER_COLUMNS, text.order_rows(made), left=1)
    print_table(text.RUN_COLUMNS, text.run_rows(made), left=2)
    print_table(text.PART_COLUMNS, text.part_rows(made), left=2, title=text.PARTS_TITLE)
    for line in text.claim_lines(made):
        out.print(line)


def _print_overlay(pairs: Sequence[Matched], out: Path | None) -> None:
    if out is not None and not any(pair.with_timeline() for pair in pairs):
        print("no overlay of a step: no configuration has a timeline of both; use --timeline")


@contextmanager
def figures() -> Iterator[None]:
    """Where a library is missing that draws or counts, say which extra brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("pandas", "scipy", "matplotlib"):
            raise
        raise NotRunError(
            f"not run: validation needs {error.name}, which is not installed; "
            "`pip install 'moesim[figures]'` installs it"
        ) from None
