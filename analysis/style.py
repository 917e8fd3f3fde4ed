"""How the papers' figures look: one palette, one type size, two widths.

Neighbouring colours differ in lightness (CIE L*) by eight or more, so that they are told apart in
grey and by the colour-blind; marker, dash and hatch say the same once more.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

ONE_COLUMN, TWO_COLUMNS = 3.33, 7.0
"""Widths in inches, of a column of a page and of both."""
INK, GREY, PALE = "#1b1f2a", "#6b7280", "#dfe3ea"
LONGEST_NAME = 30

RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "grid.color": PALE,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.2,
    "pdf.fonttype": 42,
    "text.color": INK,
    # A dollar in the name of a trace or a policy is a dollar.
    "text.parse_math": False,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 7,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 7,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a series looks."""

    colour: str
    marker: str
    hatch: str
    dash: str | tuple[int, tuple[float, ...]] = "-"


LOOKS = (
    Look("#a3152b", "o", ""),
    Look("#14213d", "s", "xxx", (0, (5, 1.5))),
    Look("#3b7ea1", "D", "////", (0, (1, 1))),
    Look("#e08e0b", "^", "....", (0, (3, 1, 1, 1))),
    Look("#86d6bd", "v", "\\\\\\\\", (0, (6, 2))),
    Look("#3f2a70", "P", "++", (0, (2, 1))),
    Look("#7c8b2f", "X", "--", (0, (4, 1, 1, 1, 1, 1))),
    Look("#a9a3b8", "*", "oo", (0, (1, 2))),
)
"""The first stands out: what a figure is about."""

NAMES = {
    "finemoe": "FineMoE",
    "moe-infinity": "MoE-Infinity",
    "promoe-speculative": "ProMoE (speculative)",
    "mixtral-offloading": "Mixtral-Offloading",
    "deepspeed-cache": "DeepSpeed + cache",
    "swapmoe": "SwapMoE",
    "prune-importance": "Pruning, by importance",
    "prune-magnitude": "Pruning, by magnitude",
    "prune-random": "Pruning, by chance",
    "lru": "On demand (LRU)",
    "lfu": "LFU",
    "next-gate": "Next gate",
    "odds": "Odds",
    "static": "Static",
    "streaming": "Whole layers",
    "min": "MIN, forced",
    "min-bypass": "MIN with bypass",
    "hindsight": "Hindsight prefetch",
    "fiddler": "Fiddler",
    "mixtral": "Mixtral-8x7B",
    "qwen": "Qwen1.5-MoE",
    "phi": "Phi-3.5-MoE",
    "switch": "Switch",
    "olmoe": "OLMoE",
    "demo": "Demo",
}
_ORDER = (
    ("finemoe", "swapmoe", "fine (iteration)"),
    ("deepspeed-cache", "lru", "min"),
    ("moe-infinity", "prune-magnitude", "lfu", "coarse (request)"),
    ("promoe-speculative", "prune-importance", "next-gate"),
    ("mixtral-offloading", "prune-random", "fiddler"),
    ("odds",),
    ("static", "min-bypass"),
    ("hindsight",),
)
_FIXED = {name: i for i, names in enumerate(_ORDER) for name in names}


def looks(series: Sequence[str]) -> dict[str, Look]:
    """A look for each series; a policy keeps its own from figure to figure where it can."""
    found: dict[str, int] = {}
    for name in series:
        place = _FIXED.get(name)
        if place is not None and place not in found.values():
            found[name] = place
    free = [i for i in range(len(LOOKS)) if i not in found.values()]
    rest = [name for name in series if name not in found]
    # Looks that come twice begin past those of what a figure is about.
    for i, name in enumerate(rest):
        found[name] = free[i] if i < len(free) else (i - len(free) + 3) % len(LOOKS)
    return {name: LOOKS[found[name]] for name in series}


def name_of(series: object) -> str:
    """As it is called on a figure; what is long is cut, what cannot be seen is left out."""
    text = NAMES.get(str(series), str(series))
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def lightness(colour: str) -> float:
    """CIE L* of a colour, 0 (black) to 100 (white)."""
    linear = [_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)


@contextmanager
def styled() -> Iterator[None]:
    """Everything made and saved inside looks alike."""
    with matplotlib.rc_context(RC):
        yield


def sheet(
    rows: int, columns: int, height: float, width: float = TWO_COLUMNS, **more: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure and its panels, [rows][columns]. height : of a row, in inches."""
    figure = Figure(figsize=(width, height * rows + 0.55), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    return figure, [list(row) for row in axes]


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 5) -> None:
    """One legend for all panels, above them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    # In a narrow figure five names do not fit beside each other.
    most = columns if figure.get_figwidth() > ONE_COLUMN + 1 else 2
    figure.legend(
        list(found.values()), list(found), loc="outside upper center",
        ncols=min(most, max(1, len(found))), handlelength=2.4, columnspacing=1.2,
    )  # fmt: skip


def foot(figure: Figure, notes: Sequence[str]) -> None:
    """What a reader must know to trust the figure, below it."""
    width = int(figure.get_figwidth() * 21)
    lines = [line for note in notes for line in textwrap.wrap(note, width)]
    if lines:
        figure.supxlabel(
            "\n".join(lines), fontsize=6, x=0.01, ha="left", color=GREY, linespacing=1.25
        )


def log_axis(axis: Axes, which: str, ticks: Sequence[float] | None = None) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    getattr(axis, f"set_{which}scale")("log")
    real = axis.xaxis if which == "x" else axis.yaxis
    real.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    real.set_major_locator(LogLocator(subs=(1, 2, 5)))
    real.set_minor_formatter(NullFormatter())
    if ticks is not None:
        real.set_ticks(list(ticks))
        real.set_ticks([], minor=True)
