"""SwapMoE's Tables 1 and 2 and Figures 1, 2 and 7 to 10.

Latency is simulated (``experiments/swapmoe.toml``). Quality is measured: perplexity of the shipped
demo model, kept by ``moesim real quality --json`` as ``quality-*.json`` (``--measured DIR``). The
paper's figures 3 to 6 are schematic.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pandas as pd
from matplotlib.figure import Figure

from moesim.analysis.figure_source import Absent, Drawing, Source, is_share, numbers
from moesim.analysis.plots import bars, lines, stacks
from moesim.analysis.style import (
    LOOKS,
    ONE_COLUMN,
    TWO_COLUMNS,
    legend,
    log_axis,
    looks,
    name_of,
    sheet,
)

_MEASURED = "Measured: perplexity of the shipped demo model on text held out of its training."


def _relative(source: Source) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs over memory, and their numbers beside those of everything resident.

    All resident: every expert was loaded before the first request (the grid ``resident/*``).
    """
    rows = source.grid("memory")
    data = numbers(rows)
    data["memory_gib"] = rows["peak_bytes"].astype(float) / 2**30
    data["gate_mass_kept"] = rows["quality.gate_mass_kept"].astype(float).fillna(1.0)
    resident = numbers(source.grid("resident")).set_index("case")
    for name in ("tpot", "ttft"):
        full = resident[f"{name}_ms"]
        data[f"{name}_of_full"] = data[f"{name}_ms"] / data["case"].map(full)
    return rows, data


def table1(source: Source) -> Drawing:
    """Table 1: SwapMoE under budgets: memory held, latency, quality (a proxy)."""
    rows, data = _relative(source)
    keep = (data["policy"] == "swapmoe").to_numpy()
    some = data[keep].reset_index(drop=True)
    if some.empty:
        raise Absent("no runs of swapmoe in the grid memory/*")
    shown = pd.DataFrame(
        {
            "model": some["case"].map(name_of),
            "budget": some["capacity"],
            "memory held, GiB": some["memory_gib"],
            "TPOT, ms": some["tpot_ms"],
            "TPOT / all resident": some["tpot_of_full"],
            "gate mass kept": some["gate_mass_kept"],
        }
    )
    figure = _table(shown)
    return Drawing(figure, shown, rows[keep], ("Gate mass kept is a proxy of quality.",))


def _table(shown: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(TWO_COLUMNS, 0.8 + 0.21 * len(shown)), layout="constrained")
    axis = figure.subplots()
    axis.axis("off")
    cells = [
        [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
        for row in shown.itertuples(index=False)
    ]
    table = axis.table(
        cellText=cells, colLabels=list(shown), loc="center", cellLoc="right", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    table.scale(1, 1.25)
    return figure


def table2(source: Source) -> Drawing:
    """Table 2: what swapping costs the link. Means; peaks need a timeline."""
    rows = source.grid("memory")
    rows = rows[rows["policy"] == "swapmoe"].reset_index(drop=True)
    if rows.empty:
        raise Absent("no runs of swapmoe in the grid memory/*")
    loaded = rows["bytes_loaded"].astype(float)
    shown = pd.DataFrame(
        {
            "model": rows["case"].map(name_of),
            "budget": rows["capacity"],
            "swapped in, GiB": loaded / 2**30,
            "mean link rate, MiB/s": loaded / 2**20 / (rows["time_ns"] / 1e9),
            "waiting, %": 100.0 * rows["stall_ns"] / rows["time_ns"],
        }
    )
    return Drawing(_table(shown), shown, rows, ("Without the first set of experts.",))


def figure1(source: Source) -> Drawing:
    """Figure 1: loading on demand is slower than having all resident."""
    rows, data = _relative(source)
    keep = (data["policy"] == "lru").to_numpy()
    some = data[keep].sort_values(["case", "memory"])
    figure, axes = sheet(1, 2, 1.8, 5.2)
    for axis, name in zip(axes[0], ("tpot", "ttft"), strict=True):
        lines(axis, some, "memory", f"{name}_of_full", "case")
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set(title=f"on demand, {name.upper()}", xlabel=_memory(rows))
        axis.set_ylim(0)
    axes[0][0].set_ylabel("times all resident")
    legend(figure, axes[0])
    return Drawing(figure, some, rows[keep])


def _memory(rows: pd.DataFrame) -> str:
    return "experts held, %" if is_share(rows) else "experts held, GiB"


_PARTS = {
    "attention, norms, router": ("times_ns.dense", "times_ns.sync", "times_ns.plan"),
    "experts": ("times_ns.experts",),
    "waiting for transfers": ("times_ns.stall",),
}


def figure2(source: Source) -> Drawing:
    """Figure 2: what a token's time goes into when layers are swapped whole."""
    rows = source.grid("layerwise")
    data = pd.DataFrame({"case": rows["case"], "policy": rows["policy"]})
    data["row"] = [
        f"{name_of(c)}: {name_of(p)}" for c, p in zip(rows["case"], rows["policy"], strict=True)
    ]
    for part, columns in _PARTS.items():
        time_ns = sum(rows[column].astype(float) for column in columns)
        data[part] = 100 * time_ns / rows["time_ns"]
    figure, axes = sheet(1, 1, 0.35 + 0.3 * len(data), 5.2)
    found = dict(zip(_PARTS, (LOOKS[1], LOOKS[4], LOOKS[0]), strict=True))
    stacks(axes[0][0], data, "row", list(_PARTS), found)
    axes[0][0].set_xlabel("% of the time")
    axes[0][0].set_xlim(0, 100)
    legend(figure, axes[0])
    return Drawing(figure, data, rows)


def figure7(source: Source) -> Drawing:
    """Figure 7: latency against memory, of SwapMoE, pruning and loading on demand."""
    rows, data = _relative(source)
    cases = list(dict.fromkeys(data["case"]))
    figure, axes = sheet(1, len(cases), 1.9)
    for axis, case in zip(axes[0], cases, strict=True):
        lines(axis, data[data["case"] == case], "memory", "tpot_ms")
        log_axis(axis, "y")
        axis.set(title=name_of(case), xlabel=_memory(rows))
    axes[0][0].set_ylabel("TPOT, ms")
    legend(figure, axes[0], 3)
    note = "Masked routing waits for nothing, so the lossy policies' lines coincide."
    return Drawing(figure, data, rows, (note,))


def quality(source: Source) -> pd.DataFrame:
    """Measured perplexity: share of experts held (%), name, policy, perplexity, stall_share.

    Raises
    ------
    Absent
        If no measurement is kept.
    """
    folder = source.measured
    files = sorted(folder.glob("quality-*.json")) if folder is not None else []
    if not files:
        raise Absent(
            "no quality-*.json; measure some with `moesim real quality --json` and name "
            "their folder: --measured DIR"
        )
    rows = []
    for file in files:
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))["rows"]
            full = next(r for r in kept if r["name"] == "full")
            for r in kept:
                share = 100 * r["capacity_bytes"] / full["capacity_bytes"]
                budget = 100 * min(x["capacity_bytes"] for x in kept) / full["capacity_bytes"]
                rows.append(
                    {
                        "memory": share,
                        "budget": budget,
                        "name": r["name"],
                        "policy": r["policy"],
                        "capacity": r["capacity"],
                        "perplexity": r["perplexity"],
                        "loss_nats": r["loss_nats"],
                    }
                )
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise Absent(
                f"{file}: not what `moesim real quality --json` prints ({error})"
            ) from None
    return pd.DataFrame(rows)


_RIVALS = {
    "genetic (the plan)": "swapmoe", "prune-importance": "prune-importance",
    "prune-magnitude": "prune-magnitude", "prune-random": "prune-random", "on demand": "lru",
}  # fmt: skip


def figure8(source: Source) -> Drawing:
    """Figure 8: quality against memory."""
    data = quality(source)
    full = float(data[data["name"] == "full"]["perplexity"].iloc[0])
    data = data[data["name"].isin(list(_RIVALS))].assign(
        policy=data["name"].map(_RIVALS), lossy=data["name"] != "on demand"
    )
    figure, axes = sheet(1, 1, 2.1, 4.2)
    lines(axes[0][0], data, "memory", "perplexity")
    axes[0][0].axhline(full, color="black", linewidth=0.6)
    axes[0][0].set(xlabel="experts held, %", ylabel="perplexity (lower is better)")
    legend(figure, axes[0])
    return Drawing(figure, data, None, (_MEASURED,))


def figure9(source: Source) -> Drawing:
    """Figure 9: the share of a layer's experts that the plan keeps."""
    data = quality(source)
    some = data[data["name"] == "genetic (the plan)"]
    if some.empty:
        raise Absent("the measurements hold no plan; make them with `moesim real quality --plan`")
    rows = [
        {"budget": f"{budget:.0f} %", "layer": layer, "slots": int(slots)}
        for budget, text in zip(some["budget"], some["capacity"], strict=True)
        for layer, slots in enumerate(str(text).removesuffix("/layer").split(":"))
    ]
    shown = pd.DataFrame(rows)
    shown["share"] = 100 * shown["slots"] / shown.groupby("budget")["slots"].transform("sum")
    figure, axes = sheet(1, 1, 1.9, ONE_COLUMN)
    bars(axes[0][0], shown, "layer", "budget", "share", looks(list(dict.fromkeys(shown["budget"]))))
    axes[0][0].set(xlabel="layer", ylabel="share of the slots, %")
    legend(figure, axes[0], 3)
    return Drawing(
        figure, shown, None, ("Planned on measured perplexity of the shipped demo model.",)
    )


_ABLATION = {
    "genetic (the plan)": "plan and swapping", "uniform": "no plan (uniform)",
    "prune-importance, shared out as the plan": "plan, no swapping",
    "prune-importance": "neither",
}  # fmt: skip


def figure10(source: Source) -> Drawing:
    """Figure 10: the ablation, with the fixed set that the paper leaves out."""
    data = quality(source)
    data = data[data["name"].isin(list(_ABLATION))].copy()
    data["way"] = data["name"].map(_ABLATION)
    data["held"] = [f"{v:.0f} %" for v in data["budget"]]
    figure, axes = sheet(1, 1, 2.0, ONE_COLUMN)
    order = [w for w in _ABLATION.values() if (data["way"] == w).any()]
    found = dict(zip(order, (LOOKS[0], LOOKS[2], LOOKS[3], LOOKS[4]), strict=False))
    bars(axes[0][0], data, "held", "way", "perplexity", found)
    axes[0][0].set(xlabel="experts held", ylabel="perplexity (lower is better)")
    legend(figure, axes[0], 2)
    return Drawing(figure, data, None, (_MEASURED,))


FIGURES: dict[str, Callable[[Source], Drawing]] = {
    "table1": table1, "table2": table2, "figure1": figure1, "figure2": figure2,
    "figure7": figure7, "figure8": figure8, "figure9": figure9, "figure10": figure10,
}  # fmt: skip
