"""Tables on stdout, made with rich."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from moesim.ladder import ROOF, RUNGS

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
    _print_serving(out, [run for run in ran if run.get("serving")])
    for capacity in dict.fromkeys(run["capacity"] for run in ran if "ladder" in run):
        out.print(_rungs(capacity, [run for run in ran if run["capacity"] == capacity]))
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


def _print_serving(out: Console, runs: Sequence[dict[str, Any]]) -> None:
    """How requests that arrive were served, one row a run, and what the numbers rest on."""
    if not runs:
        return
    columns = ["policy", "capacity", "ended", "queue s", "TTFT P50", "P99 s", "end to end P50"]
    columns += ["P99 s", "in system", "good %", "good/s", ""]
    print_table(columns, [_served(run) for run in runs], left=2)
    for run in runs:
        if run["serving"]["overloaded"]:
            out.print(f"{run['policy']} at {run['capacity']}: {run['serving']['why']}")
    matching = runs[0]["serving"]["matching"]
    if matching is not None:
        error, tiled = matching["output_error"]["mean"], matching["passes_tiled"]
        out.print(
            f"served with {matching['recorded_requests_used']} recorded requests; answers differ "
            f"by {error:.0%} in length (mean), {tiled:.0%} of the passes repeat recorded ones"
        )


def _served(run: dict[str, Any]) -> list[str]:
    told = run["serving"]
    ttft, whole = run["ttft_ns"], told["end_to_end_ns"]
    times = (told["queue_ns"]["mean"], ttft["p50"], ttft["p99"], whole["p50"], whole["p99"])
    share = told["good_share"]
    return [
        _name(run),
        run["capacity"],
        f"{told['finished']} of {told['arrived']}",
        *("-" if ns is None else f"{ns / 1e9:.3f}" for ns in times),
        *(_number(told["mean_in_system"]), "-" if share is None else f"{100 * share:.1f}"),
        _number(told["goodput_per_s"]),
        "overloaded" if told["overloaded"] else "",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _name(run: dict[str, Any]) -> str:
    marks = [mark for mark, on in (("bound", run["oracle"]), ("lossy", run["lossy"])) if on]
    if _requantised(run):
        marks.append("+".join(run["held_in"]["precisions"]))
    return (
        str(run["policy"])
        + (f" ({', '.join(marks)})" if marks else "")
        + " *" * bool(run["allowed"])
    )


def _requantised(run: dict[str, Any]) -> bool:
    return bool(run.get("held_in", {}).get("quality") == "unknown")


def _reads(run: dict[str, Any]) -> object:
    return run.get("ssd")


def _in_dram(run: dict[str, Any]) -> str:
    reads = run["ssd"]
    return _percent(reads["dram_hits"], reads["dram_hits"] + reads["dram_misses"])


def _fate(fate: str) -> Callable[[dict[str, Any]], str]:
    return lambda run: str(run["prefetch"][fate])


def _tpot(run: dict[str, Any]) -> str:
    against = run.get("against_best")
    best = against is not None and against["best"] == run["policy"]
    return _ms(run["tpot_ns"]["mean"]) + (" <" if best else " =" if _is_tie(run) else "  ")


def _is_tie(run: dict[str, Any]) -> bool:
    return bool(run.get("against_best", {}).get("tie"))


def _share(name: str) -> Callable[[dict[str, Any]], str]:
    def cell(run: dict[str, Any]) -> str:
        share = (run["quality"] or {}).get(name)
        return "-" if share is None else f"{100 * share:.2f}"

    return cell


def _rung(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda run: _times(run["ladder"].get(name))


def _prefetches(run: dict[str, Any]) -> object:
    return run["prefetch"]["issued"]


def _named(run: dict[str, Any]) -> object:
    return run["prefetch"]["named"]


def _climbs(run: dict[str, Any]) -> object:
    return "ladder" in run


COLUMNS: tuple[
    tuple[str, Callable[[dict[str, Any]], str], Callable[[dict[str, Any]], object] | None], ...
] = (
    ("policy", _name, None),
    ("capacity", lambda run: run["capacity"], None),
    ("hit %", lambda run: _percent(run["hits"], run["accesses"]), None),
    ("late %", lambda run: _percent(run["late_hits"], run["accesses"]), lambda r: r["late_hits"]),
    ("miss %", lambda run: _percent(run["misses"], run["accesses"]), None),
    (
        "predicted %",
        lambda run: (
            _percent(run["prefetch"]["named_and_demanded"], run["accesses"]) if _named(run) else "-"
        ),
        _named,
    ),
    ("TTFT ms", lambda run: _ms(run["ttft_ns"]["mean"]), None),
    ("TPOT ms  ", _tpot, None),
    ("stall %", lambda run: _percent(run["stall_ns"], run["time_ns"]), None),
    ("GB", lambda run: f"{run['bytes_loaded'] / 1e9:.2f}", None),
    ("read GB", lambda run: f"{run['ssd']['bytes_read'] / 1e9:.2f}", _reads),
    ("in DRAM %", _in_dram, _reads),
    ("prefetched", lambda run: str(run["prefetch"]["issued"]), _prefetches),
    ("used", _fate("used"), _prefetches),
    ("late", _fate("late"), _prefetches),
    ("wasted", _fate("wasted"), _prefetches),
    ("cancelled", _fate("cancelled"), _prefetches),
    ("unused", _fate("unused_at_end"), _prefetches),
    ("peak GB", lambda run: f"{run['peak_bytes'] / 1e9:.2f}", None),
    ("agree %", _share("agreement"), lambda run: run["quality"]),
    ("mass %", _share("gate_mass_kept"), lambda run: run["quality"]),
    ("low %", _share("gate_mass_low"), lambda run: (run["quality"] or {}).get("mass_low")),
    *((f"x {name}", _rung(name), _climbs) for name in (*RUNGS, ROOF, "bound")),
)
"""Heading, cell, and when the column is worth its room."""


def _devices(run: dict[str, Any]) -> str:
    """How several devices shared a run."""
    whole = max(1, run["time_ns"])
    busy = [device["link_busy_ns"] / whole for device in run["devices"]]
    hits = [100 * (device["hit_rate"] or 0) for device in run["devices"]]
    return (
        f"{run['policy']} at {run['capacity']} on {len(busy)} devices ({run['placement']}): hit % "
        f"{min(hits):.2f} to {max(hits):.2f}; link busy {min(busy):.0%} to {max(busy):.0%}; the "
        f"most asked device has {run['imbalance']['accesses'] or 1:.2f} x the mean of accesses; "
        + (
            f"exchange {run['times_ns']['exchange'] / whole:.0%} of the time"
            if run["exchange_charged"]
            else "exchange free, for the hardware profile has no [interconnect]"
        )
    )


def _notes(runs: Sequence[dict[str, Any]]) -> Iterable[str]:
    if any("against_best" in run for run in runs):
        yield (
            "< the quickest policy that could be used, at its capacity"
            + (
                "; = not told apart from it (95 % bootstrap over requests)"
                * any(map(_is_tie, runs))
            )
        )
    if any(run["prefetch"]["issued"] for run in runs):
        yield (
            "predicted: demanded experts that a plan had named; prefetched = used + late + wasted "
            "+ cancelled + unused at the end; GB: moved over the link"
        )
    if any(map(_climbs, runs)):
        yield "x rung: time of the run over that of the rung"
    if any(run["lossy"] for run in runs):
        yield (
            "lossy: time is of the recorded path; quality is a proxy: agree, chosen experts that "
            "were executed; mass, their gate mass over that of the chosen; low, what of that "
            "was executed in low precision"
        )
    for run in runs:
        if "devices" in run:
            yield _devices(run)
    for held in {tuple(run["held_in"]["precisions"]) for run in runs if _requantised(run)}:
        shipped = next(run["held_in"]["shipped"] for run in runs if _requantised(run))
        yield f"experts in {held[0]}, shipped in {shipped}: what that does to quality is not known"
    if any(map(_reads, runs)):
        yield (
            "read GB: from the drive into host memory; in DRAM: demanded loads and host runs whose "
            "copy was there"
        )
    if any(run["oracle"] for run in runs):
        yield "bound: sees the future, or was fitted on this very trace; never ranked as a policy"
    for allowed in dict.fromkeys(name for run in runs for name in run["allowed"]):
        yield f"* rests on --allow {allowed}"
    if any(not run["sizes_equal"] for run in runs):
        yield "expert sizes differ: MIN is a heuristic here, not a bound"


def _rungs(capacity: str, runs: Sequence[dict[str, Any]]) -> str:
    """What the rungs of the ladder themselves reach."""
    known = {name: rung for run in reversed(runs) for name, rung in run["ladder"].items()}
    told = (f"{name} {_ms(rung['time_ns'])} ms" for name, rung in known.items())
    return f"oracle ladder at {capacity}: {', '.join(told)}"


def _times(rung: dict[str, Any] | None) -> str:
    return f"{1 / rung['of_run']:.3f}" if rung and rung["of_run"] else "-"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else "-"


def _ms(ns: float | None) -> str:
    return "-" if ns is None else f"{ns / 1e6:.2f}"
