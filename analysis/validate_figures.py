"""Figures of a validation, each as PDF, PNG and SVG, with its data as CSV beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.patches
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesim.analysis.validate import MEAN_TPOT, Report
from moesim.analysis.validate_runs import MEASURED, SIMULATED
from moesim.errors import UsageError

FORMATS = ("pdf", "png", "svg")
# Equal data give equal files, but for the versions of the libraries.
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "moesim",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 9,
}
_UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
_MARKERS = "osD^vP*X"
_COLOURS = {
    "dense": "#8d99ae",
    "expert": "#2a9d8f",
    "stall": "#f6c9c5",
    "demand": "#e76f51",
    "prefetch": "#4878d0",
}
_LINK = ("demand", "prefetch")
_ROWS = ((SIMULATED, "compute"), (SIMULATED, "link"), (MEASURED, "compute"), (MEASURED, "link"))


def scatter(report: Report, folder: Path) -> None:
    """``scatter.*``: simulated against measured, of each configuration; bars span the repeats.

    Those of mean TTFT are the means of each request's own least and most.
    """
    table = scatter_data(report)
    table.to_csv(folder / "scatter.csv", index=False, lineterminator="\n")
    metrics = [m for m in (MEAN_TPOT, "mean TTFT") if (table["metric"] == m).any()]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4 * len(metrics), 4.6), layout="constrained")
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            _scatter(axis, table[table["metric"] == metric], metric)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        _save(figure, folder / "scatter")


def scatter_data(report: Report) -> pd.DataFrame:
    """One row a configuration and metric, in ms."""
    pairs = report.pairs
    ttft = pairs[pairs["metric"] == "TTFT"]
    ids = ["configuration", "policy", "capacity", "variant"]
    numbers = ["simulated", "measured", "least", "most"]
    means = ttft.groupby(ids, sort=True)[numbers].mean().reset_index()
    tpot = pairs[pairs["metric"] == MEAN_TPOT][[*ids, *numbers]]
    table = pd.concat([tpot.assign(metric=MEAN_TPOT), means.assign(metric="mean TTFT")])
    milliseconds = {f"{name}_ms": table[name] / 1e6 for name in numbers}
    return table[["metric", *ids]].assign(**milliseconds).reset_index(drop=True)


def _scatter(axis: Axes, table: pd.DataFrame, metric: str) -> None:
    high = 1.08 * float(table[["simulated_ms", "most_ms"]].max().max())
    low = 0.9 * float(table[["simulated_ms", "least_ms"]].min().min())
    axis.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high],
                      color="#eef0f4", label="within 10 %")  # fmt: skip
    axis.plot([low, high], [low, high], color="#8d99ae", linewidth=0.8)
    policies = sorted(set(table["policy"]))
    capacities = list(dict.fromkeys(table["capacity"]))
    for number, policy in enumerate(policies):
        some = table[table["policy"] == policy]
        colour = matplotlib.colormaps["tab20"](number % 20)
        for place, row in enumerate(some.itertuples()):
            axis.errorbar(
                row.measured_ms,
                row.simulated_ms,
                xerr=[[row.measured_ms - row.least_ms], [row.most_ms - row.measured_ms]],
                fmt=_MARKERS[capacities.index(row.capacity) % len(_MARKERS)],
                color=colour,
                markersize=5,
                linewidth=0.8,
                label=policy if not place else None,
            )
    axis.set(xlabel=f"measured {metric}, ms", ylabel="simulated, ms", aspect="equal")
    axis.set(xlim=(low, high), ylim=(low, high))
    shown = (f"{_SHAPES[i % len(_SHAPES)]} {text}" for i, text in enumerate(capacities))
    axis.set_title(", ".join(shown), fontsize=9)


_SHAPES = ("circle", "square", "diamond", "triangle", "down", "plus", "star", "cross")


# ---- one step on the clock -----------------------------------------------------------------------


def overlay(timelines: tuple[Path, Path], steps: int, step: int, title: str, folder: Path) -> None:
    """``overlay.*``: one step, simulated above measured, on one scale.

    Parameters
    ----------
    timelines : of the simulation and of a measurement. steps : forward passes of the run.

    Raises
    ------
    UsageError
        If a run has no such step.
    """
    table = overlay_data(timelines, steps, step)
    table.to_csv(folder / "overlay.csv", index=False, lineterminator="\n")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        axis = figure.subplots()
        for place, (origin, lane) in enumerate(_ROWS):
            some = table[(table["origin"] == origin) & (table["lane"] == lane)]
            spans = list(zip(some["start_ms"], some["end_ms"] - some["start_ms"], strict=True))
            colours = [_COLOURS[kind] for kind in some["kind"]]
            axis.broken_barh(
                spans, (-place - 0.4, 0.8), facecolors=colours, edgecolors="white", linewidth=0.3
            )
        axis.set_yticks([-i for i in range(len(_ROWS))], [f"{o}: {lane}" for o, lane in _ROWS])
        axis.set(xlabel="ms since the step began", title=f"{title}, step {step}")
        axis.set_xlim(0, float(table["end_ms"].max()))
        axis.spines[["top", "right"]].set_visible(False)
        shown = [k for k in _COLOURS if (table["kind"] == k).any()]
        patches = [matplotlib.patches.Patch(color=_COLOURS[k], label=k) for k in shown]
        figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
        _save(figure, folder / "overlay")


def overlay_data(timelines: tuple[Path, Path], steps: int, step: int) -> pd.DataFrame:
    """Spans of one step: origin, lane, kind, name, start and end in ms since it began."""
    rows: list[dict[str, Any]] = []
    for origin, path in zip((SIMULATED, MEASURED), timelines, strict=True):
        spans = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
        start, end = _window(spans, steps, step, path)
        rows += [{"origin": origin, **row} for row in _inside(spans, start, end)]
    return pd.DataFrame(rows)


def _window(
    spans: Sequence[dict[str, Any]], steps: int, step: int, path: Path
) -> tuple[float, float]:
    """From a step's first dense part to the next one's."""
    begins = [span["ts"] for span in spans if span["cat"] == "dense"]
    each, rest = divmod(len(begins), steps)
    if rest or not 0 <= step < steps - 1:
        raise UsageError(
            f"{path}: has no step {step} with one after it, among {steps} of equal dense parts; "
            "choose another --step"
        )
    return begins[step * each], begins[(step + 1) * each]


def _inside(spans: Sequence[dict[str, Any]], start: float, end: float) -> Iterator[dict[str, Any]]:
    for span in spans:
        first, last = span["ts"], span["ts"] + span["dur"]
        if span["cat"] in _COLOURS and last > start and first < end:
            yield {
                "lane": "link" if span["cat"] in _LINK else "compute",
                "kind": span["cat"],
                "name": span["name"],
                "start_ms": (max(first, start) - start) / 1000,
                "end_ms": (min(last, end) - start) / 1000,
            }


def _save(figure: Figure, stem: Path) -> None:
    for kind in FORMATS:
        path = stem.with_suffix(f".{kind}")
        figure.savefig(path, format=kind, dpi=150, metadata=_UNDATED[kind])
