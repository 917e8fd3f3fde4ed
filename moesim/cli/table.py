"""Tables on stdout, made with rich."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDE = 200
_LAST = 20
"""Least width of a column that wraps."""
_UNBOUNDED = 10_000


def console() -> Console:
    """Stdout; as wide as needed where it is no terminal. Texts are printed as they are."""
    out = Console(highlight=False, markup=False)
    return out if out.is_terminal else Console(highlight=False, markup=False, width=_WIDE)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, title: str = ""
) -> None:
    """Print rows; the first ``left`` columns are texts, the others numbers.

    Nothing is ever cut: of texts only the last column may wrap, and a table too wide for the
    terminal is left to the terminal.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title or None,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(columns):
        wraps = index == len(columns) - 1 and left == len(columns)
        justify: Literal["left", "right"] = "left" if index < left else "right"
        table.add_column(
            name, justify=justify, no_wrap=not wraps, min_width=_LAST if wraps else None
        )
    drawn = list(rows)
    for row in drawn:
        table.add_row(*row)
    out = console()
    natural = Measurement.get(out, out.options.update(max_width=_UNBOUNDED), table).maximum
    if left == len(columns):
        # What the last column needs beyond this, it wraps.
        longest = max((len(row[-1]) for row in drawn), default=0)
        natural -= max(0, longest - _LAST)
    out.width = max(out.width, natural)
    out.print(table)


def print_replay(answer: dict[str, Any]) -> None:
    """The answer of a replay: diagnostics, then one row a run, then what was not run."""
    out = console()
    trace = answer["trace"]
    kind = " (synthetic)" if trace["synthetic"] else ""
    costs = f", costs of {answer['costs']}" if answer["costs"] else ""
    out.print(
        f"trace {Path(trace['path']).name}{kind}: {trace['model']}, {trace['layers']} layers x "
        f"{trace['experts']} experts, top {trace['top_k']}, {trace['requests']} requests; "
        f"{answer['hardware']}{costs} ({answer['source']})"
    )
    for diagnosis in answer["diagnostics"]:
        _print_diagnosis(out, diagnosis)
    ran = [run for run in answer["runs"] if "not_run" not in run]
    columns = [c for c in COLUMNS if c[2] is None or any(c[2](run) for run in ran)]
    print_table(
        [name for name, _, _ in columns],
        [[cell(run) for _, cell, _ in columns] for run in ran],
        left=2,
    )
    for capacity in dict.fromkeys(run["capacity"] for run in ran if "ladder" in run):
        _print_ladder(capacity, [run for run in ran if run["capacity"] == capacity])
    for note in _notes(ran):
        out.print(note)
    for run in answer["runs"]:
        if "not_run" in run:
            out.print(f"{run['policy']} at {run['capacity']}: {run['not_run']}")


def _print_diagnosis(out: Console, diagnosis: dict[str, Any]) -> None:
    even = diagnosis["break_even_bytes_per_s"]
    share = diagnosis["capacity_bytes"] / diagnosis["all_expert_bytes"]
    out.print(
        f"capacity {diagnosis['capacity']} ({diagnosis['scope']}): "
        f"{diagnosis['capacity_bytes'] / 1e9:.3f} GB, {share:.1%} of the experts; one token "
        f"touches {diagnosis['token_bytes'] / 1e9:.3f} GB; break-even bandwidth "
        + (f"{even / 1e9:.1f} GB/s" if even else "none")
    )
    for warning in diagnosis["warnings"]:
        out.print(f"warning: {warning}", style="yellow")


def _name(run: dict[str, Any]) -> str:
    marks = [mark for mark, on in (("bound", run["oracle"]), ("lossy", run["lossy"])) if on]
    return (
        str(run["policy"])
        + (f" ({', '.join(marks)})" if marks else "")
        + " *" * bool(run["allowed"])
    )


def _used(run: dict[str, Any]) -> str:
    prefetch = run["prefetch"]
    return f"{prefetch['used'] + prefetch['late']}/{prefetch['issued']}"


COLUMNS: tuple[
    tuple[str, Callable[[dict[str, Any]], str], Callable[[dict[str, Any]], object] | None], ...
] = (
    ("policy", _name, None),
    ("capacity", lambda run: run["capacity"], None),
    ("hit %", lambda run: _percent(run["hits"], run["accesses"]), None),
    ("late %", lambda run: _percent(run["late_hits"], run["accesses"]), lambda r: r["late_hits"]),
    ("miss %", lambda run: _percent(run["misses"], run["accesses"]), None),
    ("TTFT ms", lambda run: _ms(run["ttft_ns"]["mean"]), None),
    ("TPOT ms", lambda run: _ms(run["tpot_ns"]["mean"]), None),
    ("stall %", lambda run: _percent(run["stall_ns"], run["time_ns"]), None),
    ("GB", lambda run: f"{run['bytes_loaded'] / 1e9:.2f}", None),
    ("prefetched", _used, lambda run: run["prefetch"]["issued"]),
    ("peak GB", lambda run: f"{run['peak_bytes'] / 1e9:.2f}", None),
)
"""Heading, cell, and when the column is worth its room. GB are moved over the link; prefetched:
used of those issued."""


def _notes(runs: Sequence[dict[str, Any]]) -> Iterable[str]:
    if any(run["oracle"] for run in runs):
        yield "bound: sees the future, or was fitted on this very trace; never ranked as a policy"
    for allowed in dict.fromkeys(name for run in runs for name in run["allowed"]):
        yield f"* rests on --allow {allowed}"
    if any(not run["sizes_equal"] for run in runs):
        yield "expert sizes differ: MIN is a heuristic here, not a bound"


def _print_ladder(capacity: str, runs: Sequence[dict[str, Any]]) -> None:
    """Each rung's own misses and time, then how many times as long each run took."""
    rungs = dict.fromkeys(name for run in runs for name in run["ladder"])
    rows = []
    for name in rungs:
        known = next(run["ladder"][name] for run in runs if name in run["ladder"])
        ratios = [_times(run["ladder"].get(name)) for run in runs]
        rows.append((name, str(known.get("misses", "-")), _ms(known["time_ns"]), *ratios))
    columns = ("rung", "misses", "ms", *(run["policy"] for run in runs))
    print_table(columns, rows, title=f"oracle ladder at {capacity}: time of each run / of the rung")


def _times(rung: dict[str, Any] | None) -> str:
    return f"{1 / rung['of_run']:.3f}" if rung and rung["of_run"] else "-"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else "-"


def _ms(ns: float | None) -> str:
    return "-" if ns is None else f"{ns / 1e6:.2f}"
