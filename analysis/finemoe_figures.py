"""FineMoE's Table 1 and Figures 1, 3, 4 and 8 to 18, from the runs of ``experiments/finemoe.toml``.

Figures 2 and 5 to 7 are schematic. Times are simulated; orders and ratios are what compares with
the paper, for neither its machine nor its models are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moesim.analysis import trace_studies
from moesim.analysis.figure_source import Absent, Drawing, Source, at_memory, is_share, numbers
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
from moesim.errors import MoesimError
from moesim.profile import ModelProfile, load_model

TRACK = {
    "finemoe-hits": "Hit count",
    "speculate": "Speculate",
    "finemoe-t": "Map (T)",
    "finemoe-ts": "Map (T+S)",
    "finemoe": "Map (T+S+δ)",
}
KEEP = {"keep=lru": "LRU", "keep=lfu": "LFU", "keep=map-frequency": "FineMoE (p · freq)"}
GRAINS = {"finemoe-hits": "coarse (request)", "finemoe-t": "fine (iteration)"}
_LATENCY = (("ttft_ms", "TTFT, ms"), ("tpot_ms", "TPOT, ms"), ("hit_rate", "hit rate"))


def _memory_label(rows: pd.DataFrame) -> str:
    return "expert cache, % of all experts" if is_share(rows) else "expert cache, GiB"


def _profiles(source: Source) -> dict[str, ModelProfile]:
    """Of the models whose bytes and times the runs took."""
    rows = source.grid("memory").drop_duplicates("case")
    found = {}
    for case, name in zip(rows["case"], rows["model"], strict=True):
        try:
            found[str(case)] = load_model(str(name))
        except MoesimError:
            raise Absent(f"{name}: no shipped profile; the table needs one of each model") from None
    return found


def table1(source: Source) -> Drawing:
    """Table 1: the models. Bytes are those of the shipped profiles."""
    data = pd.DataFrame([_model_row(case, m) for case, m in _profiles(source).items()])
    figure = Figure(figsize=(TWO_COLUMNS, 0.7 + 0.3 * len(data)), layout="constrained")
    axis = figure.subplots()
    axis.axis("off")
    cells = [[_cell(v) for v in row] for row in data.itertuples(index=False)]
    table = axis.table(
        cellText=cells, colLabels=list(data), loc="center", cellLoc="right", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    table.scale(1, 1.5)
    return Drawing(figure, data, None, ("From the model profiles; routed experts only.",))


def _cell(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def _model_row(case: str, model: ModelProfile) -> dict[str, Any]:
    each = model.expert_bytes_table()
    total = float(each.sum() * model.experts)
    return {
        "model": name_of(case), "MoE layers": model.layers, "experts": model.experts,
        "active": model.top_k, "expert, MiB": float(each[0]) / 2**20,
        "all experts, GB": total / 1e9,
        "idle a token, %": 100 * (1 - model.top_k / model.experts),
        "idle a token, GB": total * (1 - model.top_k / model.experts) / 1e9,
    }  # fmt: skip


def figure1(source: Source) -> Drawing:
    """Figure 1b: latency against memory."""
    rows = source.grid("memory")
    data = numbers(rows)
    return Drawing(_panels(data, "memory", "tpot_ms", _memory_label(rows), "TPOT, ms"), data, rows)


def _panels(data: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str) -> Figure:
    cases = list(dict.fromkeys(data["case"]))
    figure, axes = sheet(1, len(cases), 1.75)
    for axis, case in zip(axes[0], cases, strict=True):
        some = data[data["case"] == case]
        lines(axis, some, x, y)
        log_axis(axis, "x", sorted(some[x].unique()))
        axis.set(title=name_of(case), xlabel=xlabel)
        axis.set_ylim(0)
    axes[0][0].set_ylabel(ylabel)
    legend(figure, axes[0])
    return figure


def figure3(source: Source) -> Drawing:
    """Figure 3: a request's experts as one map and as an iteration's; entropy of both kinds."""
    found = {case: trace_studies.maps(path) for case, path in source.traces().items()}
    entropies = [(case, *trace_studies.entropy_by_grain(m)) for case, m in found.items()]
    figure, axes = sheet(1, 4, 1.75, width_ratios=(1, 1, 1.3, 1.5))
    first = next(iter(found.values()))
    request = first.request == first.request[-1]
    one = first.shares[request & (first.iteration > 0)]
    for axis, values, title in zip(
        axes[0][:2], (one.mean(axis=0), one[len(one) // 2]), ("request", "iteration"), strict=True
    ):
        axis.imshow(values.T, aspect="auto", cmap="cividis", vmin=0, vmax=1, origin="lower")
        axis.set(title=f"(a) one {title}", xlabel="layer")
        axis.grid(visible=False)
    axes[0][0].set_ylabel(f"expert, {name_of(next(iter(found)))}")
    grains = pd.DataFrame(
        [
            {
                "panel": "b",
                "case": c,
                "grain": g,
                "iterations": 1 if g == "fine" else 0,
                "entropy_nats": v,
            }
            for c, coarse, fine in entropies
            for g, v in (("coarse", coarse), ("fine", fine))
        ]
    )
    bars(
        axes[0][2], grains, "case", "grain", "entropy_nats", {"coarse": LOOKS[2], "fine": LOOKS[0]}
    )
    axes[0][2].set(title="(b) entropy", ylabel="nats, mean of layers")
    axes[0][2].tick_params(axis="x", rotation=20)
    axes[0][2].legend(loc="upper left", ncols=2, fontsize=6, handlelength=1.2)
    axes[0][2].set_ylim(0, 1.3 * grains["entropy_nats"].max())
    counted = pd.DataFrame(
        [
            {"panel": "c", "case": c, "grain": "sum", "iterations": n, "entropy_nats": v}
            for c, m in found.items()
            for n, v in trace_studies.entropy_by_count(m)
        ]
    )
    if not counted.empty:
        lines_plain(axes[0][3], counted, "iterations", "entropy_nats")
    axes[0][3].set(title="(c) iterations added up", xlabel="iterations")
    axes[0][3].legend(fontsize=6)
    stand_in = [name_of(case) for case, m in found.items() if not m.whole]
    notes: tuple[str, ...] = ("Of the traces, no simulation.",)
    if stand_in:
        notes += (f"No gates recorded, so of the chosen experts' weights: {', '.join(stand_in)}.",)
    return Drawing(figure, pd.concat([grains, counted], ignore_index=True), None, notes)


def lines_plain(axis: Any, data: pd.DataFrame, x: str, y: str, series: str = "case") -> None:
    """Lines that are too long for a marker at each point."""
    for name, look in looks(list(dict.fromkeys(data[series]))).items():
        some = data[data[series] == name]
        every = max(1, len(some) // 6)
        axis.plot(
            some[x],
            some[y],
            color=look.colour,
            linestyle=look.dash,
            marker=look.marker,
            markevery=every,
            label=name_of(name),
        )


def figure4(source: Source) -> Drawing:
    """Figure 4: what is foretold of what is used, against the distance in layers."""
    rows = source.grid("distance")
    rows = rows[rows["policy"].isin(list(GRAINS))]
    data = numbers(rows).assign(distance=_distance(rows), policy=rows["policy"].map(GRAINS))
    figure = _by_distance(data, (("foretold", "foretold of used"),))
    note = "Hits as the paper's section 4.2.3 has them: experts foretold and used, of those used."
    return Drawing(figure, data, rows, (note,))


def _distance(rows: pd.DataFrame) -> pd.Series[int]:
    return rows["set"].str.extract(r"prefetch\.distance=(\d+)")[0].astype(int)


def _by_distance(data: pd.DataFrame, measures: tuple[tuple[str, str], ...]) -> Figure:
    cases = list(dict.fromkeys(data["case"]))
    figure, axes = sheet(len(measures), len(cases), 1.65)
    for row, (column, label) in zip(axes, measures, strict=True):
        for axis, case in zip(row, cases, strict=True):
            lines(axis, data[data["case"] == case], "distance", column)
            axis.set_xticks(sorted(data["distance"].unique()))
            axis.set_ylim(0)
            if row is axes[0]:
                axis.set_title(name_of(case))
        row[0].set_ylabel(label)
    for axis in axes[-1]:
        axis.set_xlabel("prefetch distance, layers")
    legend(figure, axes[0])
    return figure


def figure8(source: Source) -> Drawing:
    """Figure 8: the better two iterations match, the more experts they share."""
    data = _binned(source)
    kinds = [k for k in ("semantic", "trajectory") if (data["score"] == k).any()]
    figure, axes = sheet(1, len(kinds), 1.9, ONE_COLUMN * min(2, len(kinds)) + 0.2)
    found = looks(list(dict.fromkeys(data["case"])))
    for axis, kind in zip(axes[0], kinds, strict=True):
        lines(axis, data[data["score"] == kind], "value", "hit_rate", "case", found)
        axis.set(title=f"{kind} score", xlabel="cosine", xlim=(0, 1), ylim=(0, 1))
    axes[0][0].set_ylabel("mean hit rate")
    legend(figure, axes[0])
    return Drawing(figure, data, None, _PAIRS_NOTE)


_PAIRS_NOTE = (
    "Of the traces: 20,000 pairs of decode iterations of different requests; bins of 0.1 "
    "with at least 20 pairs.",
)


def _pairs(source: Source) -> Mapping[str, Mapping[str, Any]]:
    found = {c: trace_studies.pairs(trace_studies.maps(p)) for c, p in source.traces().items()}
    found = {case: scores for case, scores in found.items() if scores}
    if not found:
        raise Absent("no trace has two decode iterations to compare")
    return found


def _binned(source: Source) -> pd.DataFrame:
    rows = []
    for case, scores in _pairs(source).items():
        for kind in ("semantic", "trajectory"):
            if kind in scores:
                place = np.clip((np.asarray(scores[kind]) * 10).astype(int), 0, 9)
                for b in range(10):
                    some = scores["hit"][place == b]
                    if len(some) >= 20:
                        rows.append(
                            {
                                "case": case,
                                "score": kind,
                                "value": b / 10 + 0.05,
                                "hit_rate": float(some.mean()),
                                "pairs": len(some),
                            }
                        )
    return pd.DataFrame(rows)


def figure9(source: Source) -> Drawing:
    """Figure 9: Pearson's coefficient between score and hit rate."""
    data = pd.DataFrame(
        [
            {"case": case, "score": kind, "pearson": float(np.corrcoef(s[kind], s["hit"])[0, 1])}
            for case, s in _pairs(source).items()
            for kind in ("semantic", "trajectory")
            if kind in s
        ]
    )
    figure, axes = sheet(1, 1, 1.8, ONE_COLUMN)
    bars(
        axes[0][0], data, "case", "score", "pearson", {"semantic": LOOKS[2], "trajectory": LOOKS[0]}
    )
    axes[0][0].set_ylabel("Pearson, score and hit rate")
    axes[0][0].set_ylim(min(0.0, float(data["pearson"].min())), 1)
    legend(figure, axes[0])
    return Drawing(figure, data, None, ("Of the traces: single pairs, not binned.",))


def figure10(source: Source) -> Drawing:
    """Figure 10: TTFT, TPOT and hit rate of five systems."""
    return _systems(source.grid("memory"))


def figure13(source: Source) -> Drawing:
    """Figure 13: the same on a better GPU."""
    return _systems(source.grid("fast"))


def _systems(rows: pd.DataFrame) -> Drawing:
    rows = pd.concat(
        [at_memory(rows[rows["case"] == c]) for c in rows["case"].unique()], ignore_index=True
    )
    data = numbers(rows)
    found = looks(list(dict.fromkeys(data["policy"])))
    cases = list(dict.fromkeys(data["case"]))
    figure, axes = sheet(len(_LATENCY), len(cases), 1.15)
    for row, (column, label) in zip(axes, _LATENCY, strict=True):
        # A mark for a tie belongs to what was tested.
        some = data if column == "tpot_ms" else data.drop(columns="tie")
        for axis, case in zip(row, cases, strict=True):
            bars(axis, some[some["case"] == case], "case", "policy", column, found)
            axis.set_xticks([])
            if row is axes[0]:
                axis.set_title(name_of(case))
        row[0].set_ylabel(label)
    legend(figure, axes[0])
    size = ", ".join(sorted(set(rows["capacity"])))
    note = f"Cache: {size}. A = stands on what cannot be told from the quickest (95 %, bootstrap)."
    return Drawing(figure, data, rows, (note,))


def figure11(source: Source) -> Drawing:
    """Figure 11: the distribution of end-to-end latency under load."""
    rows = source.grid("online")
    parts = []
    for row in rows.to_dict("records"):
        times = source.requests(row["folder"])
        if "end_to_end_ns" not in times:
            raise Absent("the runs have no end-to-end times; make them again with this moesim")
        ends = np.sort(times["end_to_end_ns"].dropna().to_numpy(float)) / 1e9
        share = np.arange(1, len(ends) + 1) / max(1, len(ends))
        parts.append(
            pd.DataFrame(
                {"case": row["case"], "policy": row["policy"], "latency_s": ends, "share": share}
            )
        )
    data = pd.concat(parts, ignore_index=True)
    cases = list(dict.fromkeys(data["case"]))
    figure, axes = sheet(1, len(cases), 1.7)
    for axis, case in zip(axes[0], cases, strict=True):
        lines_plain(axis, data[data["case"] == case], "latency_s", "share", "policy")
        axis.set(title=name_of(case), xlabel="end-to-end latency, s", ylim=(0, 1))
    axes[0][0].set_ylabel("share of requests")
    legend(figure, axes[0])
    arrivals = ", ".join(sorted(set(rows["arrivals"].astype(str))))
    return Drawing(figure, data, rows, (f"Arrivals: {arrivals} a second; stores start empty.",))


def figure12(source: Source) -> Drawing:
    """Figure 12: TPOT against the cache's size, relative to loading on demand."""
    rows = source.grid("memory")
    data = numbers(rows)
    keys = ["case", "capacity"]
    base = data[data["policy"] == "deepspeed-cache"].set_index(keys)["tpot_ms"]
    if base.empty:
        raise Absent("no runs of deepspeed-cache, to which the others are compared")
    on_demand = pd.Series(
        [base.get(key, np.nan) for key in zip(data["case"], data["capacity"], strict=True)]
    )
    data["of_demand"] = data["tpot_ms"] / on_demand.to_numpy()
    figure = _panels(data, "memory", "of_demand", _memory_label(rows), "TPOT / on demand")
    for axis in figure.axes:
        axis.set_ylim(min(0.6, 0.95 * float(data["of_demand"].min())), None)
    return Drawing(figure, data, rows)


def figure14(source: Source) -> Drawing:
    """Figure 14: ways to track experts, and ways to evict them."""
    track, speculate, keep = (source.grid(name) for name in ("track", "speculate", "keep"))
    ways = numbers(pd.concat([track, speculate.assign(policy="speculate")], ignore_index=True))
    ways = ways.assign(panel="a", way=ways["policy"].map(TRACK))
    caches = numbers(keep).assign(panel="b")
    caches["way"] = caches["setting"].map(KEEP)
    figure, axes = sheet(1, 3, 1.85)
    order = [w for w in TRACK.values() if (ways["way"] == w).any()]
    found = dict(zip(order, (LOOKS[i] for i in (1, 3, 4, 2, 0)), strict=False))
    for axis, column, label in zip(
        axes[0],
        ("foretold", "hit_rate"),
        ("(a) foretold of used", "(a) resident at the gate"),
        strict=False,
    ):
        bars(axis, ways.drop(columns="tie"), "case", "way", column, found)
        axis.set(title=label, ylim=(0, 1))
    kinds = dict(zip(KEEP.values(), (LOOKS[1], LOOKS[2], LOOKS[0]), strict=True))
    bars(axes[0][2], caches.drop(columns="tie"), "case", "way", "hit_rate", kinds)
    axes[0][2].set(title="(b) resident, by eviction", ylim=(0, 1))
    axes[0][2].legend(fontsize=6, loc="upper left", handlelength=1.4)
    legend(figure, axes[0][:2])
    rows = pd.concat([track, speculate, keep], ignore_index=True)
    return Drawing(figure, pd.concat([ways, caches], ignore_index=True), rows)


def figure15(source: Source) -> Drawing:
    """Figure 15: TTFT and TPOT of FineMoE against the prefetch distance."""
    rows = source.grid("distance")
    rows = rows[rows["policy"] == "finemoe"]
    if rows.empty:
        raise Absent("no runs of finemoe in the grid distance/*")
    data = numbers(rows).assign(distance=_distance(rows))
    figure = _by_distance(data, _LATENCY[:2])
    for axis in figure.axes:
        values = np.asarray(axis.lines[0].get_ydata(), np.float64)
        low, high = float(values.min()), float(values.max())
        # A line that hardly moves is shown flat.
        room = max(0.35 * (high - low), 0.05 * high)
        axis.set_ylim(low - room, high + room)
    return Drawing(figure, data, rows)


def figure16(source: Source) -> Drawing:
    """Figure 16: (a) best scores against the store's size; (b) latency against the batch."""
    rows = source.grid("batch")
    batch = numbers(rows).assign(panel="b", batch=rows["batch"].astype(int))
    scores = pd.DataFrame(
        [
            {"panel": "a", "case": case, "maps": size, "semantic": sem, "trajectory": traj}
            for case, path in source.traces().items()
            for size, sem, traj in trace_studies.best_scores(trace_studies.maps(path), _SIZES)
        ]
    )
    figure, axes = sheet(1, 3, 1.8)
    if not scores.empty:
        lines(axes[0][0], scores, "maps", "trajectory", "case")
        for case, look in looks(list(dict.fromkeys(scores["case"]))).items():
            some = scores[(scores["case"] == case) & scores["semantic"].notna()]
            if len(some):
                axes[0][0].plot(
                    some["maps"],
                    some["semantic"].astype(float),
                    color=look.colour,
                    linestyle=":",
                    marker=look.marker,
                    markerfacecolor="white",
                    label=f"{name_of(case)}, semantic",
                )
        log_axis(axes[0][0], "x", [n for n in (62, 250, 1000) if n <= scores["maps"].max()])
        low = min(axes[0][0].get_ylim()[0], 0.5)
        axes[0][0].set_ylim(low - 0.45, 1.02)
        axes[0][0].legend(fontsize=6, loc="lower right", labelspacing=0.2)
    axes[0][0].set(title="(a) best score of a search", xlabel="maps in the store")
    for axis, (column, label) in zip(axes[0][1:], _LATENCY, strict=False):
        lines(axis, batch, "batch", column)
        log_axis(axis, "x", sorted(batch["batch"].unique()))
        axis.set(title=f"(b) {label}", xlabel="batch")
        axis.set_ylim(0)
    legend(figure, axes[0][1:])
    return Drawing(
        figure,
        pd.concat([scores, batch], ignore_index=True),
        rows,
        ("(a) of the traces: trajectory (filled), over all layers.",),
    )


_SIZES = [62, 125, 250, 500, 1000, 1500, 2000]
_STEP = {
    "inference": ("times_ns.dense", "times_ns.experts", "times_ns.cpu_wait"),
    "collect context": ("times_ns.sync",),
    "policy, in the way": ("times_ns.plan",),
    "waiting for experts": ("times_ns.stall",),
}


def figure17(source: Source) -> Drawing:
    """Figure 17: where the time of an iteration goes, of FineMoE."""
    rows = source.grid("memory")
    rows = rows[rows["policy"] == "finemoe"]
    rows = pd.concat(
        [at_memory(rows[rows["case"] == c]) for c in rows["case"].unique()], ignore_index=True
    )
    data = pd.DataFrame({"case": rows["case"]})
    for part, columns in _STEP.items():
        data[part] = sum(rows[c].astype(float) for c in columns) / rows["steps"] / 1e6
    link = rows["link_busy_ns"] / rows["steps"] / 1e6
    ahead = sum(rows[f"prefetch.bytes.{fate}"] for fate in _FATES) / rows["bytes_loaded"].clip(
        lower=1
    )
    data["prefetch, beside (link)"] = link * ahead.clip(upper=1)
    figure, axes = sheet(1, 1, 1.5)
    found = dict(zip(_STEP, (LOOKS[1], LOOKS[3], LOOKS[4], LOOKS[0]), strict=True))
    stacks(axes[0][0], data, "case", list(_STEP), found)
    axes[0][0].plot(
        data["prefetch, beside (link)"],
        range(len(data)),
        "|",
        color="black",
        markersize=16,
        label="link busy with prefetches, beside",
    )
    axes[0][0].set_xlabel("ms an iteration")
    legend(figure, axes[0])
    note = (
        "Map search and update run beside the model and are not in its way; they delay prefetches."
    )
    return Drawing(figure, data, rows, (note,))


_FATES = ("used", "late", "wasted", "cancelled", "unused_at_end")


def figure18(source: Source) -> Drawing:
    """Figure 18: bytes of the store against its capacity, maps of 4-byte numbers."""
    rows = []
    for case, model in _profiles(source).items():
        for size in (1000 * 2**i for i in range(6)):
            cells = model.layers * model.experts
            rows.append(
                {
                    "case": case,
                    "maps": size,
                    "maps_mb": 4e-6 * cells * size,
                    "with_embeddings_mb": 4e-6 * (cells + model.hidden) * size,
                }
            )
    data = pd.DataFrame(rows)
    figure, axes = sheet(1, 1, 1.9, ONE_COLUMN)
    axis = axes[0][0]
    lines(axis, data, "maps", "maps_mb", "case")
    for case, look in looks(list(dict.fromkeys(data["case"]))).items():
        some = data[data["case"] == case]
        axis.plot(
            some["maps"], some["with_embeddings_mb"], color=look.colour, linestyle=":", linewidth=1
        )
    log_axis(axis, "x", sorted(data["maps"].unique()))
    log_axis(axis, "y")
    axis.axhline(200, color="black", linewidth=0.6)
    axis.set(xlabel="maps in the store", ylabel="MB of host memory")
    legend(figure, axes[0])
    return Drawing(
        figure, data, None, ("Computed. Dotted: with embeddings. Line: the paper's 200 MB.",)
    )


FIGURES: dict[str, Callable[[Source], Drawing]] = {
    "table1": table1, "figure1": figure1, "figure3": figure3, "figure4": figure4,
    "figure8": figure8, "figure9": figure9, "figure10": figure10, "figure11": figure11,
    "figure12": figure12, "figure13": figure13, "figure14": figure14, "figure15": figure15,
    "figure16": figure16, "figure17": figure17, "figure18": figure18,
}  # fmt: skip
