"""Tables on stdout, made with rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_WIDE = 200


def console() -> Console:
    """Stdout; as wide as needed where it is no terminal."""
    out = Console(highlight=False, soft_wrap=False)
    return out if out.is_terminal else Console(highlight=False, width=_WIDE)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, title: str = ""
) -> None:
    """Print rows; the first ``left`` columns are texts, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=index < left)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_replay(answer: dict[str, Any]) -> None:
    """The answer of a replay: diagnostics, then one row a run, then what was not run."""
    out = console()
    trace = answer["trace"]
    kind = " (synthetic)" if trace["synthetic"] else ""
    costs = f", costs of {answer['costs']}" if answer["costs"] else ""
    out.print(
        f"trace {trace['path']}{kind}: {trace['model']}, {trace['layers']} layers x "
        f"{trace['experts']} experts, top {trace['top_k']}, {trace['requests']} requests; "
        f"{answer['hardware']}{costs} ({answer['source']})"
    )
    for diagnosis in answer["diagnostics"]:
        _print_diagnosis(out, diagnosis)
    ran = [run for run in answer["runs"] if "not_run" not in run]
    rows = [_row(run) for run in ran]
    columns = (
        "policy",
        "capacity",
        "scope",
        "hit",
        "late",
        "miss",
        "TTFT",
        "TPOT",
        "stall",
        "GB moved",
    )
    print_table((*columns, "prefetch used/issued", "peak GB"), rows, left=3)
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


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    name = (
        run["policy"] + (" (bound)" if run["oracle"] else "") + (" (lossy)" if run["lossy"] else "")
    )
    prefetch = run["prefetch"]
    return (
        name + (" *" if run["allowed"] else ""),
        run["capacity"],
        run["scope"],
        _share(run["hits"], run["accesses"]),
        _share(run["late_hits"], run["accesses"]),
        _share(run["misses"], run["accesses"]),
        _ms(run["ttft_ns"]["mean"]),
        _ms(run["tpot_ns"]["mean"]),
        _share(run["stall_ns"], run["time_ns"]),
        f"{run['bytes_loaded'] / 1e9:.2f}",
        f"{prefetch['used'] + prefetch['late']}/{prefetch['issued']}"
        if prefetch["issued"]
        else "-",
        f"{run['peak_bytes'] / 1e9:.2f}",
    )


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
    columns = ("rung", "misses", "time", *(run["policy"] for run in runs))
    print_table(columns, rows, title=f"oracle ladder at {capacity}: time of each run / of the rung")


def _times(rung: dict[str, Any] | None) -> str:
    return f"{1 / rung['of_run']:.3f}" if rung and rung["of_run"] else "-"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _ms(ns: float | None) -> str:
    return "-" if ns is None else f"{ns / 1e6:.3f} ms"
