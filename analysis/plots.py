"""Panels that several figures share: lines over a number, bars by group, bars by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes

from moesim.analysis.style import INK, Look, looks, name_of


def lines(
    axis: Axes,
    data: pd.DataFrame,
    x: str,
    y: str,
    series: str = "policy",
    found: Mapping[str, Look] | None = None,
) -> None:
    """A line a series; panels share looks where ``found`` says them.

    Bounds and lossy policies have hollow markers and say so in the legend.
    """
    for name, look in (found or looks(list(dict.fromkeys(data[series])))).items():
        some = data[data[series] == name].sort_values(x)
        if some.empty:
            continue
        hollow = marked(some)
        axis.plot(
            some[x], some[y], color=look.colour, marker=look.marker, linestyle=look.dash,
            markerfacecolor="white" if hollow else look.colour, label=name_of(name) + hollow,
        )  # fmt: skip


def bars(
    axis: Axes, data: pd.DataFrame, group: str, series: str, y: str, found: Mapping[str, Look]
) -> None:
    """Bars side by side: a group a place, a series a look. A tie with the best has a "=" above."""
    groups = list(dict.fromkeys(data[group]))
    width = 0.84 / max(1, len(found))
    for number, (name, look) in enumerate(found.items()):
        some = data[data[series] == name].drop_duplicates(group)
        at = [groups.index(g) - 0.42 + (number + 0.5) * width for g in some[group]]
        axis.bar(
            at, some[y], width * 0.94, color=look.colour, hatch=look.hatch, edgecolor="white",
            linewidth=0.4, label=name_of(name) + marked(some),
        )  # fmt: skip
        if "tie" in some:
            for place, value, tie in zip(at, some[y], some["tie"], strict=True):
                if tie:
                    axis.text(place, value, "=", ha="center", va="bottom", fontsize=6, color=INK)
    axis.set_xticks(range(len(groups)), [name_of(g).replace("-", "-\n", 1) for g in groups])
    axis.grid(visible=False, axis="x")


def stacks(
    axis: Axes, data: pd.DataFrame, place: str, parts: Sequence[str], found: Mapping[str, Look]
) -> None:
    """A horizontal bar a row, of parts. ``place`` names the column of its label."""
    left = [0.0] * len(data)
    for part in parts:
        look, values = found[part], data[part].fillna(0.0).tolist()
        axis.barh(
            range(len(data)), values, 0.7, left=left, color=look.colour, hatch=look.hatch,
            edgecolor="white", linewidth=0.4, label=part,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.set_yticks(range(len(data)), [name_of(v) for v in data[place]])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")


def marked(some: pd.DataFrame) -> str:
    """What a legend adds to the name of a bound or of a lossy policy."""
    told = [name for name in ("bound", "lossy") if name in some and bool(some[name].any())]
    return f" ({', '.join(told)})" if told else ""
