"""The league of policies on one trace and machine, from what ``moesim replay --json`` printed.

    moesim replay --trace demo --policy all --capacity 10%,25%,50% --json > demo.json
    python -m moesim.analysis.league demo.json

One table for each answer, in Markdown: policies that could be used, the quickest first, then
bounds, then lossy ones, which are never ranked together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import MoesimError, UsageError

KINDS = ("", "bound", "lossy")
"""Ranked; seen the future or fitted on the trace itself; changes what is computed."""

Run = dict[str, Any]


def league(answer: dict[str, Any]) -> list[str]:
    """Markdown lines. Each cell is TPOT in ms, and in brackets the share of the demanded experts
    that were resident at the gate; ``<`` is the quickest, ``=`` cannot be told from it (bootstrap,
    95 %). A policy with ``+`` had misses computed on the host."""
    runs = [run for run in answer["runs"] if "not_run" not in run]
    capacities = list(dict.fromkeys(run["capacity"] for run in runs))
    by_policy: dict[str, dict[str, Run]] = {}
    for run in runs:
        by_policy.setdefault(_name(run), {})[run["capacity"]] = run
    lines = [
        f"| policy | {' | '.join(capacities)} |",
        f"|---|{'---|' * len(capacities)}",
    ]
    for kind in KINDS:
        rows = [name for name, row in by_policy.items() if _kind(next(iter(row.values()))) == kind]
        rows.sort(key=lambda name: _pace(by_policy[name], capacities))
        for name in rows:
            cells = [_cell(by_policy[name].get(capacity)) for capacity in capacities]
            marks = " +" if next(iter(by_policy[name].values()))["served"]["cpu"] else ""
            marks += f" ({kind})" if kind else ""
            lines.append(f"| `{name}`{marks} | {' | '.join(cells)} |")
    return lines


def regime(answer: dict[str, Any]) -> str:
    """One line: whose routing, whose bytes, which machine, and what a token touches."""
    trace, first = answer["trace"], answer["diagnostics"][0]
    share = first["token_bytes"] / first["all_expert_bytes"]
    return (
        f"{trace['model']}, {trace['layers']} layers of {trace['experts']} experts, top "
        f"{trace['top_k']}; costs of {answer['model']}; {answer['hardware']}. One token touches "
        f"{100 * share:.0f} % of the experts' bytes; copying one takes "
        f"{first['load_ns'] / 1e3:.0f} us"
    )


def _name(run: Run) -> str:
    return " ".join([run["policy"], *run["set"]])


def _kind(run: Run) -> str:
    if run["lossy"]:
        return "lossy"
    return "bound" if run["oracle"] else ""


def _pace(row: dict[str, Run], capacities: Sequence[str]) -> float:
    """Time relative to nothing: the product orders by how much slower on the mean."""
    pace = 1.0
    for capacity in capacities:
        run = row.get(capacity)
        pace *= float("inf") if run is None else run["tpot_ns"]["mean"] or 1.0
    return pace


def _cell(run: Run | None) -> str:
    if run is None or run["tpot_ns"]["mean"] is None:
        return "-"
    found = run.get("against_best", {})
    mark = " **<**" if found.get("slower") == 0 else " =" if found.get("tie") else ""
    if run["quality"] is not None:
        kept = run["quality"]["gate_mass_kept"]
        mark = "" if kept is None else f", mass {kept:.2f}"
    share = 100 * run["hits"] / max(1, run["accesses"])
    return f"{run['tpot_ns']['mean'] / 1e6:.2f} ({share:.0f}){mark}"


def tables(paths: Iterable[Path]) -> Iterator[str]:
    """The league of each answer, below its regime. UsageError for what is no answer."""
    for path in paths:
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))
            lines = [regime(answer), "", *league(answer), ""]
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise UsageError(
                f"{path}: is not what `moesim replay --json` prints ({type(error).__name__})"
            ) from None
        yield from lines


def main(arguments: Sequence[str]) -> int:
    """Print them all; 0, or 2 for a mistake."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m moesim.analysis.league ANSWER.json ...", file=sys.stderr)
        return 2
    try:
        for line in tables(map(Path, arguments)):
            print(line)
    except MoesimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
