"""Our own figures: simulated against measured, policies against bounds, what the link carried,
which layers wait, and at which bandwidth one policy overtakes another (``experiments/own.toml``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moesim.analysis.figure_source import Absent, Drawing, Source, at_memory, is_share, numbers
from moesim.analysis.plots import lines, stacks
from moesim.analysis.style import (
    INK,
    LOOKS,
    ONE_COLUMN,
    legend,
    log_axis,
    looks,
    name_of,
    sheet,
)

RUNGS = ("min", "min-bypass", "hindsight", "static")
"""The oracle ladder, as policies; all resident is the run at 100 %."""


def validation(source: Source) -> Drawing:
    """Mean TPOT, simulated against measured."""
    file = source.measured / "runs.csv" if source.measured is not None else None
    if file is None or not file.is_file():
        raise Absent(
            "no runs.csv of a validation; make one with `moesim validate --out DIR` and "
            "name it: --measured DIR"
        )
    runs = pd.read_csv(file)
    wanted = ("configuration", "origin", "policy", "capacity", "time_ns", "steps")
    if lacking := [name for name in wanted if name not in runs]:
        raise Absent(f"{file}: lacks {', '.join(lacking)}; it is not of `moesim validate`")
    runs["step_ms"] = runs["time_ns"] / runs["steps"] / 1e6
    keys = ["configuration", "policy", "capacity", "origin"]
    data = runs.groupby(keys)["step_ms"].median().unstack("origin").dropna().reset_index()
    repeats = runs[runs["origin"] == "measured"].groupby("configuration")["step_ms"]
    for name, found in (("least", repeats.min()), ("most", repeats.max())):
        data[name] = data["configuration"].map(found)
    return Drawing(
        _scatter(data),
        data,
        None,
        ("Mean time of a forward pass; bars span the repeats; band: 10 %.",),
    )


def _scatter(data: pd.DataFrame) -> Figure:
    figure, axes = sheet(1, 1, 2.9, ONE_COLUMN)
    axis = axes[0][0]
    values = data[["simulated", "measured"]].to_numpy()
    ends = np.array([0.85 * values.min(), 1.15 * values.max()])
    axis.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#eef0f4")
    axis.plot(ends, ends, color="black", linewidth=0.6)
    for capacity, look in looks(sorted(data["capacity"].unique())).items():
        some = data[data["capacity"] == capacity]
        spread = [some["measured"] - some["least"], some["most"] - some["measured"]]
        axis.errorbar(
            some["measured"],
            some["simulated"],
            xerr=spread,
            fmt=look.marker,
            color=look.colour,
            linewidth=0.7,
            markersize=3.5,
            label=f"cache {name_of(capacity)}",
        )
    axis.set(xlabel="measured, ms", ylabel="simulated, ms", xlim=ends, ylim=ends)
    legend(figure, [axis])
    return figure


def pareto(source: Source) -> Drawing:
    """Latency against memory: policies, and the rungs of the oracle ladder below them."""
    rows = source.grid("pareto")
    data = numbers(rows)
    figure, axes = sheet(1, 1, 2.8)
    axis = axes[0][0]
    lines(axis, data, "memory", "tpot_ms")
    usable = data[~data["bound"] & ~data["lossy"]]
    front = usable.groupby("memory")["tpot_ms"].min()
    axis.step(
        front.index,
        front.cummin(),
        where="post",
        color=INK,
        linewidth=3.5,
        alpha=0.12,
        label="best that can be had",
    )
    log_axis(axis, "x", sorted(data["memory"].unique()))
    log_axis(axis, "y")
    axis.set(
        xlabel=f"expert cache, {'% of all experts' if is_share(rows) else 'GiB'}", ylabel="TPOT, ms"
    )
    legend(figure, [axis], 4)
    return Drawing(figure, data, rows)


FATES = {
    "on demand": LOOKS[1], "used": LOOKS[4], "late": LOOKS[3], "wasted": LOOKS[0],
    "cancelled": LOOKS[2], "unused at end": LOOKS[5],
}  # fmt: skip


def partition(source: Source) -> Drawing:
    """What the link carried, by what became of it."""
    rows = at_memory(source.grid("pareto"))
    rows = rows[~rows["oracle"].astype(bool)].reset_index(drop=True)
    data = numbers(rows)[["case", "policy", "capacity", "lossy"]]
    ahead = pd.DataFrame(
        {
            fate: rows[f"prefetch.bytes.{fate.replace(' ', '_')}"].astype(float)
            / rows["output_tokens"]
            / 2**20
            for fate in list(FATES)[1:]
        }
    )
    total = rows["bytes_loaded"].astype(float) / rows["output_tokens"] / 2**20
    data = data.assign(**{"on demand": (total - ahead.sum(axis=1)).clip(lower=0)}, **ahead)
    data["row"] = [
        name_of(p) + (" (lossy)" if lossy else "")
        for p, lossy in zip(data["policy"], data["lossy"], strict=True)
    ]
    figure, axes = sheet(1, 1, 0.4 + 0.24 * len(data), 5.2)
    stacks(axes[0][0], data, "row", list(FATES), FATES)
    axes[0][0].set_xlabel("MiB an output token, over the link")
    legend(figure, axes[0], 3)
    return Drawing(figure, data, rows, (f"Cache: {rows['capacity'].iloc[0]}.",))


def layers(source: Source) -> Drawing:
    """Which layers wait for experts."""
    rows = at_memory(source.grid("pareto"))
    rows = rows[~rows["oracle"].astype(bool)].reset_index(drop=True)
    data = pd.DataFrame(
        [
            {
                "policy": row["policy"],
                "layer": layer,
                "stall_ms": ns / row["output_tokens"] / 1e6,
                "lossy": row["lossy"],
                "bound": False,
            }
            for row in rows.to_dict("records")
            for layer, ns in enumerate(row["layer_stall_ns"])
        ]
    )
    figure, axes = sheet(1, 1, 2.0, 5.2)
    lines(axes[0][0], data, "layer", "stall_ms")
    axes[0][0].set(xlabel="layer", ylabel="stall, ms an output token")
    axes[0][0].set_ylim(0)
    legend(figure, axes[0], 4)
    return Drawing(figure, data, rows, (f"Cache: {rows['capacity'].iloc[0]}.",))


def bandwidth(source: Source) -> Drawing:
    """TPOT against link bandwidth; rings where the quickest policy changes."""
    rows = source.grid("bandwidth")
    data = numbers(rows).assign(bandwidth_gb_s=_rate(rows))
    crossed = crossings(data)
    figure, axes = sheet(1, 1, 2.6, 5.2)
    axis = axes[0][0]
    lines(axis, data, "bandwidth_gb_s", "tpot_ms")
    for number, (x, y, before, after) in enumerate(crossed):
        axis.plot(x, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=INK)
        axis.annotate(
            f"{name_of(before)} → {name_of(after)}, {x:.2g} GB/s",
            (x, y),
            (8, 14 + 12 * (number % 2)),
            textcoords="offset points",
            fontsize=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
        )
    log_axis(axis, "x", sorted(data["bandwidth_gb_s"].unique()))
    log_axis(axis, "y")
    axis.set(xlabel="link, GB/s", ylabel="TPOT, ms")
    legend(figure, [axis], 3)
    marks = pd.DataFrame(crossed, columns=["bandwidth_gb_s", "tpot_ms", "policy", "overtaken_by"])
    table = pd.concat(
        [data.assign(overtaken_by=None), marks.assign(capacity="crossing")], ignore_index=True
    )
    note = "Rings: where the quickest policy changes, interpolated in the logarithms of both axes."
    return Drawing(figure, table, rows, (note,))


def _rate(rows: pd.DataFrame) -> pd.Series[float]:
    number = rows["bandwidth"].astype(str).str.extract(r"^([\d.]+)\s*([KMGT]?)B/s$")
    if number.isna().any(axis=None):
        raise Absent("bandwidths must be like 8GB/s to stand on one axis")
    scale = number[1].map({"": 1e-9, "K": 1e-6, "M": 1e-3, "G": 1.0, "T": 1e3})
    return number[0].astype(float) * scale


def crossings(data: pd.DataFrame) -> list[tuple[float, float, str, str]]:
    """(GB/s, TPOT in ms, quickest until there, quickest from there on), of usable policies."""
    usable = data[~data["bound"] & ~data["lossy"]]
    table = np.log(
        usable.pivot_table(index="bandwidth_gb_s", columns="policy", values="tpot_ms").dropna(
            axis=1
        )
    )
    found = []
    x = np.log(table.index.to_numpy(float))
    for i in range(len(table) - 1):
        before, after = str(table.iloc[i].idxmin()), str(table.iloc[i + 1].idxmin())
        if before != after:
            gap = (table[before] - table[after]).to_numpy()
            share = gap[i] / (gap[i] - gap[i + 1]) if gap[i] != gap[i + 1] else 0.5
            y = table[before].iloc[i] + share * (table[before].iloc[i + 1] - table[before].iloc[i])
            found.append(
                (float(np.exp(x[i] + share * (x[i + 1] - x[i]))), float(np.exp(y)), before, after)
            )
    return found


FIGURES: dict[str, Callable[[Source], Drawing]] = {
    "validation": validation, "pareto": pareto, "partition": partition, "layers": layers,
    "bandwidth": bandwidth,
}  # fmt: skip
