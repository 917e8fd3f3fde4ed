"""Where the time of an output token goes: a stacked bar a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {
    "dense": ("attention, norms, router", "#45546c"),
    "experts": ("experts", "#2a9d8f"),
    "cpu_wait": ("waiting for host experts", "#a8c686"),
    "sync": ("routing to the host", "#b7bcc7"),
    "plan": ("policy", "#e9c46a"),
    "stall": ("waiting for loads", "#e76f51"),
    "exchange": ("between devices", "#8d5a97"),
}
"""Parts of a run's time, in the order of the bar; what they are called, and their colour. They
grow lighter towards the middle, so that neighbours differ in grey as well."""


def time_bars(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """A bar for each summary: its time over its output tokens, in ms, by what it went into.

    What came before the first request, and waiting for requests to arrive, is no part of it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(runs)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(runs)
    for part, (label, colour) in PARTS.items():
        widths = [_per_token(run, part) for run in runs]
        if any(widths):
            axes.barh(range(len(runs)), widths, left=left, color=colour, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(runs)), [_name(run) for run in runs], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("ms an output token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def _per_token(run: Mapping[str, Any], part: str) -> float:
    tokens = run["output_tokens"]
    return float(run["times_ns"][part]) / tokens / 1e6 if tokens else 0.0


def _name(run: Mapping[str, Any]) -> str:
    marks = [mark for mark, on in (("bound", run["oracle"]), ("lossy", run["lossy"])) if on]
    return f"{run['policy']}, {run['capacity']}" + (f" ({', '.join(marks)})" if marks else "")
