"""The page's figures: empty Bokeh plots, which the page's script fills and fills again.

Nothing is drawn from Python, so that there is one place that knows which runs a figure shows. What
is the same for every report, looks and tools, is here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from bokeh.core.json_encoder import serialize_json
from bokeh.document import Document
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    FactorRange,
    HoverTool,
    PanTool,
    Range1d,
    ResetTool,
    WheelZoomTool,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

FONT = "system-ui, sans-serif"

BAR_TIP = [
    ("", "@policy"),
    ("", "@what"),
    ("", "@value, @share of it"),
    ("run", "@run"),
]
CELL_TIP = [("", "@row"), ("", "@column"), ("", "@value")]


def script() -> str:
    """Bokeh's own, whole, licence and all."""
    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw[:1])


def document() -> dict[str, Any]:
    """All figures as Bokeh's JSON, with ids that do not depend on what was drawn before."""
    made = Document()
    for plot in _plots():
        made.add_root(plot)
    told: dict[str, Any] = _renumbered(json.loads(serialize_json(made.to_json())), {})
    return told


def _plots() -> Iterator[Any]:
    yield _pareto()
    yield _bars("parts", "ms")
    yield _bars("transfers", "bytes")
    yield _cells("stalls", "layer")
    yield _clock()
    yield _cells("hits", "forward pass")
    yield _cells("entropy", "iteration (0: the prompt)")


def _pareto() -> Any:
    plot = _plot("pareto", 400, "xy")
    lines = ColumnDataSource({"xs": [], "ys": [], "colour": [], "dash": []}, name="pareto-lines")
    front = ColumnDataSource({"x": [], "y": []}, name="pareto-front")
    names = ("x", "y", "colour", "fill", "marker", "policy", "capacity", "value", "stall", "hit")
    points = ColumnDataSource({name: [] for name in (*names, "run", "kind")}, name="pareto-points")
    plot.step(
        "x", "y", source=front, mode="after", line_width=9, line_alpha=0.22, line_color="#009e73"
    )
    plot.multi_line(
        "xs", "ys", source=lines, line_color="colour", line_width=1.6, line_dash="dash",
        line_alpha=0.75,
    )  # fmt: skip
    drawn = plot.scatter(
        "x", "y", source=points, marker="marker", size=10, line_color="colour", line_width=1.8,
        fill_color="colour", fill_alpha="fill",
    )  # fmt: skip
    tip = [("", "@policy"), ("", "@kind"), ("capacity", "@capacity"), ("", "@value")]
    tip += [("stall", "@stall"), ("hits", "@hit"), ("run", "@run")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tip, description="what a point is"))
    return plot


def _bars(name: str, axis: str) -> Any:
    plot = _plot(name, 200, "x", FactorRange(factors=[]))
    columns = ("y", "left", "right", "colour", "policy", "what", "value", "share", "run")
    source = ColumnDataSource({column: [] for column in columns}, name=f"{name}-bars")
    drawn = plot.hbar(
        "y", left="left", right="right", height=0.68, source=source, fill_color="colour",
        line_color=None,
    )  # fmt: skip
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=BAR_TIP, description="what a bar is"))
    plot.xaxis.axis_label = axis
    plot.ygrid.visible = False
    return plot


def _cells(name: str, axis: str) -> Any:
    plot = _plot(name, 200, "x", FactorRange(factors=[]))
    columns = ("x", "y", "width", "colour", "row", "column", "value")
    source = ColumnDataSource({column: [] for column in columns}, name=f"{name}-cells")
    drawn = plot.rect(
        "x", "y", width="width", height=0.94, source=source, fill_color="colour", line_color=None
    )
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=CELL_TIP, description="what a cell is"))
    plot.xaxis.axis_label = axis
    plot.grid.visible = False
    return plot


def _clock() -> Any:
    lanes = ["host", "link: prefetch", "link: demand", "compute"]
    plot = _plot("clock", 260, "x", FactorRange(factors=lanes))
    columns = ("y", "left", "right", "colour", "what", "bytes", "issued", "end", "need", "margin")
    source = ColumnDataSource({column: [] for column in columns}, name="clock-spans")
    drawn = plot.hbar(
        "y", left="left", right="right", height=0.74, source=source, fill_color="colour",
        line_color=None,
    )  # fmt: skip
    tip = [("", "@what"), ("bytes", "@bytes"), ("issued and started", "@issued"), ("end", "@end")]
    tip += [("needed", "@need"), ("", "@margin")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tip, description="what a span is"))
    plot.xaxis.axis_label = "ms from the start of the forward pass"
    plot.ygrid.visible = False
    return plot


def _plot(name: str, height: int, zoom: str, rows: Any = None) -> Any:
    """A figure without data, in the page's colours (`--bk-…` in its style sheet)."""
    along: Any = {"x": "width", "xy": "both"}[zoom]
    box = BoxZoomTool(dimensions=along, description="zoom into what is drawn")
    plot = figure(
        name=name,
        height=height,
        sizing_mode="stretch_width",
        x_range=Range1d(start=0, end=1),
        y_range=rows if rows is not None else Range1d(start=0, end=1),
        tools=[
            box,
            PanTool(dimensions=along, description="move"),
            WheelZoomTool(dimensions=along, modifiers="ctrl", description="zoom (ctrl + wheel)"),
            ResetTool(description="the whole"),
        ],
        toolbar_location="above",
        min_border_right=18,
        output_backend="canvas",
    )
    plot.toolbar.logo = None
    plot.toolbar.active_drag = box
    plot.toolbar.autohide = True
    plot.background_fill_alpha = plot.border_fill_alpha = 0
    plot.outline_line_color = None
    for axis in plot.axis:
        axis.axis_label_text_font = axis.major_label_text_font = FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
        axis.axis_line_color = None
        axis.major_tick_line_color = None
    plot.xaxis.major_label_standoff = 4
    return plot


_ID = re.compile(r"p\d+")


def _renumbered(told: Any, seen: dict[str, str]) -> Any:
    """Bokeh numbers its models by the process; here by the order in which they appear."""
    if isinstance(told, list):
        return [_renumbered(item, seen) for item in told]
    if not isinstance(told, dict):
        return told
    made = {}
    for key, value in told.items():
        if key == "id" and isinstance(value, str) and _ID.fullmatch(value):
            made[key] = seen.setdefault(value, f"m{len(seen)}")
        else:
            made[key] = _renumbered(value, seen)
    return made
