"""What the papers claim, beside what the runs show: ``comparison.md``.

A claim has a reason, written by hand, why what is found may differ; the verdict is computed. Signs
and ratios only: neither paper's machine nor its models are here.
"""

# ruff: noqa: E501 - a table of texts
from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pandas as pd

from moesim.analysis import finemoe_figures as finemoe
from moesim.analysis import swapmoe_figures as swapmoe
from moesim.analysis.figure_source import Absent, Source, at_memory, numbers, read
from moesim.analysis.style import name_of
from moesim.errors import UsageError

Verdict = Literal["reproduced", "sign only", "in part", "not reproduced", "not testable here"]
PAGE = "comparison.md"
TELLS = 0.02
"""A difference below 2 % is none."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What the runs show.

    held : of the comparisons that the claim makes, which hold. sized : whether the effect is at
    least half of what the paper says, of each.
    """

    text: str
    held: Sequence[bool]
    sized: Sequence[bool] = ()

    @property
    def verdict(self) -> Verdict:
        """All, some or none."""
        if not self.held:
            return "not testable here"
        if all(self.held):
            return "reproduced" if all(self.sized) else "sign only"
        return "in part" if any(self.held) else "not reproduced"


@dataclass(frozen=True, slots=True)
class Claim:
    """where : in the paper. says : the claim. find : what the runs show, None if they cannot.
    how : simulated, measured, or of the traces. why : why it may differ."""

    where: str
    says: str
    how: str
    find: Callable[[Source], Finding] | None
    why: str


def compare(paper: str, source: Source, out: Path) -> Path | None:
    """Write the page into a folder; None where there is nothing to compare with.

    Raises
    ------
    UsageError
        If it cannot be written.
    """
    if paper not in CLAIMS:
        return None
    target, beside = out / PAGE, out / f".{PAGE}.tmp-{os.getpid()}"
    try:
        beside.write_text(page(paper, source), encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    finally:
        beside.unlink(missing_ok=True)
    return target


def page(paper: str, source: Source) -> str:
    """The comparison as Markdown."""
    lines = [
        f"# {name_of(paper)}: what the paper says, and what was found",
        "",
        "Orders and ratios; absolute times depend on machines and models that differ.",
        "",
        table(paper, source),
        "",
        f"Runs: `{source.digest[:16]}`. Made by `{_code(source.command)}`.",
    ]
    return "\n".join(lines) + "\n"


def table(paper: str, source: Source) -> str:
    """Each claim, the verdict, the finding and the reason, as a Markdown table."""
    lines = ["| where | the paper | found | verdict | why it may differ |", "|---|---|---|---|---|"]
    for claim in CLAIMS[paper]:
        finding = _found(claim, source)
        cells = (
            claim.where,
            claim.says,
            f"{claim.how}: {finding.text}",
            finding.verdict,
            claim.why,
        )
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join(lines)


def _found(claim: Claim, source: Source) -> Finding:
    if claim.find is None:
        return Finding("-", ())
    try:
        return claim.find(source)
    except Absent as reason:
        return Finding(f"not made ({reason})", ())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return text.replace("`", "'")


# ---- FineMoE -------------------------------------------------------------------------------------


def _against(rival: str, column: str, said: str) -> Callable[[Source], Finding]:
    """FineMoE against a rival, each model at the figure's cache size."""

    def find(source: Source) -> Finding:
        rows = source.grid("memory")
        parts = [at_memory(rows[rows["case"] == case]) for case in rows["case"].unique()]
        table = numbers(pd.concat(parts, ignore_index=True))
        wide = table.pivot_table(index="case", columns="policy", values=column, sort=False)
        if rival not in wide or "finemoe" not in wide:
            raise Absent(f"no runs of finemoe and {rival}")
        change = wide["finemoe"] / wide[rival] - 1
        gain = change if column == "hit_rate" else -change
        half = abs(int(said.split()[0])) / 200
        return Finding(_each(change), (gain > TELLS).tolist(), (gain > half).tolist())

    return find


def _each(change: pd.Series[float]) -> str:
    return ", ".join(f"{name_of(case)} {value:+.0%}" for case, value in change.items())


def _grains(source: Source) -> Finding:
    from moesim.analysis import trace_studies

    values = {
        case: trace_studies.entropy_by_grain(trace_studies.maps(path))
        for case, path in source.traces().items()
    }
    told = ", ".join(
        f"{name_of(c)} {coarse:.2f} and {fine:.2f}" for c, (coarse, fine) in values.items()
    )
    return Finding(f"nats, coarse and fine: {told}", [c > f for c, f in values.values()])


def _distances(source: Source) -> Finding:
    data = finemoe.figure4(source).data
    wide = data.pivot_table(
        index=["case", "distance"], columns="policy", values="foretold", sort=False
    )
    fine, coarse = wide[finemoe.GRAINS["finemoe-t"]], wide[finemoe.GRAINS["finemoe-hits"]]
    ends = fine.groupby("case").agg(["first", "last"])
    text = (
        f"fine is above coarse at {(fine > coarse).sum()} of {len(wide)} points; fine falls from the "
        f"nearest to the furthest in {(ends['first'] > ends['last']).sum()} of {len(ends)} models"
    )
    return Finding(text, [*(fine > coarse).tolist(), *(ends["first"] > ends["last"]).tolist()])


def _pearson(source: Source) -> Finding:
    data = finemoe.figure9(source).data
    told = ", ".join(f"{name_of(r.case)} {r.score} {r.pearson:.2f}" for r in data.itertuples())
    return Finding(told, (data["pearson"] >= 0.84).tolist())


def _narrows(source: Source) -> Finding:
    """FineMoE's gain on demand loading is largest in the smallest cache."""
    data = finemoe.figure12(source).data
    mine = data[data["policy"] == "finemoe"].sort_values("memory")
    ends = mine.groupby("case", sort=False)["of_demand"].agg(["first", "last"])
    told = ", ".join(
        f"{name_of(c)} {r['first']:.2f} to {r['last']:.2f}" for c, r in ends.iterrows()
    )
    held = [*(ends["first"] < 1).tolist(), *((1 - ends["first"]) > (1 - ends["last"])).tolist()]
    return Finding(f"TPOT over on demand, smallest to largest cache: {told}", held)


def _tracking(source: Source) -> Finding:
    order = ["Hit count", "Map (T)", "Map (T+S)", "Map (T+S+δ)"]
    return _rising(source, "a", "foretold", order, "foretold of used")


def _keeping(source: Source) -> Finding:
    return _rising(source, "b", "hit_rate", list(finemoe.KEEP.values()), "hit rate")


def _rising(source: Source, panel: str, values: str, order: list[str], what: str) -> Finding:
    """Whether each way in a panel of Figure 14 is above the one before it."""
    data = finemoe.figure14(source).data
    wide = data[data["panel"] == panel].pivot_table(
        index="case", columns="way", values=values, sort=False
    )
    if any(name not in wide for name in order):
        raise Absent(f"not all of {', '.join(order)} were run")
    told = "; ".join(
        f"{name_of(c)} " + " ".join(f"{r[n]:.2f}" for n in order) for c, r in wide.iterrows()
    )
    held = [r[a] < r[b] for _, r in wide.iterrows() for a, b in pairwise(order)]
    return Finding(f"{what}: {told}", held)


def _valley(source: Source) -> Finding:
    data = finemoe.figure15(source).data.sort_values("distance")
    best, held = [], []
    for case, some in data.groupby("case", sort=False):
        at = some.loc[some["tpot_ms"].idxmin(), "distance"]
        best.append(f"{name_of(case)} d = {at}")
        held.append(some["distance"].min() < at < some["distance"].max())
    return Finding(f"quickest TPOT at {', '.join(best)}", held)


def _batches(source: Source) -> Finding:
    rows = source.grid("batch")
    data = numbers(rows).assign(batch=rows["batch"].astype(int))
    best = data.loc[data.groupby("batch")["tpot_ms"].idxmin()]
    told = ", ".join(
        f"{b}: {name_of(p)}" for b, p in zip(best["batch"], best["policy"], strict=True)
    )
    return Finding(f"quickest TPOT, by batch: {told}", (best["policy"] == "finemoe").tolist())


def _store(source: Source) -> Finding:
    data = finemoe.figure18(source).data
    last = data[data["maps"] == data["maps"].max()]
    told = ", ".join(
        f"{name_of(r.case)} {r.maps_mb:.0f} MB, {r.with_embeddings_mb:.0f} MB with embeddings"
        for r in last.itertuples()
    )
    return Finding(told, [*(last["maps_mb"] < 200), *(last["with_embeddings_mb"] < 200)])


def _loaded(source: Source) -> Finding:
    rows = source.grid("online")
    column = "serving.end_to_end_ns.p50"
    if column not in rows:
        raise Absent("the runs had no arrivals")
    wide = rows.pivot_table(index="case", columns="policy", values=column, sort=False)
    best = wide.idxmin(axis=1)
    told = ", ".join(f"{name_of(case)}: {name_of(policy)}" for case, policy in best.items())
    return Finding(f"lowest median latency: {told}", (best == "finemoe").tolist())


_LINK = (
    "One modelled link and a clean engine load routed experts only; the artifact also loads "
    "unrouted ones, which inflates every baseline. On a saturated link a prefetch of the wrong "
    "expert delays the right one."
)
_RATIO = "A relative change, as the paper's plotted scale suggests; at one cache size, unknown in the paper."


def _system(rival: str, ttft: str, tpot: str, hits: str) -> list[Claim]:
    name = name_of(rival)
    found = [
        Claim(
            "Fig. 10",
            f"TTFT {ttft} against {name}",
            "simulated",
            _against(rival, "ttft_ms", ttft),
            _LINK,
        ),
        Claim(
            "Fig. 10",
            f"TPOT {tpot} against {name}",
            "simulated",
            _against(rival, "tpot_ms", tpot),
            _LINK,
        ),
    ]
    if hits:
        find = _against(rival, "hit_rate", hits)
        found.append(Claim("Fig. 10", f"hit rate {hits} against {name}", "simulated", find, _RATIO))
    return found


_FINEMOE = (
    *_system("deepspeed-cache", "-74 %", "-46 %", ""),
    *_system("mixtral-offloading", "-67 %", "-38 %", "+14 %"),
    *_system("promoe-speculative", "-56 %", "-27 %", "+37 %"),
    *_system("moe-infinity", "-53 %", "-22 %", "+68 %"),
    Claim(
        "Fig. 3",
        "whole requests spread over more experts than iterations: coarse entropy is above fine",
        "of the traces",
        _grains,
        "A mean of distributions has at least the mean of their entropies, so the "
        "sign is certain; its size is what tells.",
    ),
    Claim(
        "Fig. 4",
        "fine tracking foretells more than coarse; both fall with distance",
        "simulated",
        _distances,
        "The demos have 8 layers, so distances end at 7; small models keep no long history.",
    ),
    Claim(
        "Figs. 8, 9",
        "scores foretell hits: Pearson 0.84 to 0.97",
        "of the traces",
        _pearson,
        "Single pairs are noisier than means. An embedding of a token says nothing of its context.",
    ),
    Claim(
        "Fig. 11",
        "lowest latency under load",
        "simulated",
        _loaded,
        "Arrivals are Poisson at the paper's rate; the paper's own sample of the Azure log is unknown.",
    ),
    Claim(
        "Fig. 12",
        "at the smallest cache TPOT is lower than on demand by 36 %, and gaps narrow as it grows",
        "simulated",
        _narrows,
        "Where a cache holds less than a token touches, prefetched experts are evicted "
        "before their use.",
    ),
    Claim(
        "Fig. 14a",
        "Hit count < Map (T) < Map (T+S) < Map (T+S+δ)",
        "simulated",
        _tracking,
        "Where gates are peaked, δ is met within k experts and the last two are one.",
    ),
    Claim(
        "Fig. 14b",
        "LRU < LFU < FineMoE's p · freq",
        "simulated",
        _keeping,
        "p is known for layers that a search has covered in this iteration only.",
    ),
    Claim(
        "Fig. 15",
        "TPOT is lowest at a middle distance (3, 6 and 4)",
        "simulated",
        _valley,
        "One expert of the real models takes longer to load than a layer computes, so no distance hides it.",
    ),
    Claim(
        "Fig. 16b",
        "FineMoE is the quickest in most cases, batch 1 to 8",
        "simulated",
        _batches,
        "Predictions of a batch are united; the paper does not say how it merges them.",
    ),
    Claim(
        "Fig. 17",
        "work in the way of an iteration is below 1 %",
        "simulated",
        None,
        "Search and update run beside the model by construction here, so the claim is an assumption.",
    ),
    Claim(
        "Fig. 18",
        "the store takes under 200 MB at 32 K maps",
        "computed",
        _store,
        "True of the maps alone; embeddings of the model's width outweigh them.",
    ),
)


# ---- SwapMoE -------------------------------------------------------------------------------------


def _demand(source: Source) -> Finding:
    data = swapmoe.figure1(source).data
    part = data[data["memory"] < data["memory"].max()].groupby("case", sort=False)["tpot_of_full"]
    spans = part.agg(["min", "max"])
    told = ", ".join(f"{name_of(c)} {r['min']:.1f} to {r['max']:.1f}" for c, r in spans.iterrows())
    return Finding(f"times all resident: {told}", [v > 1 for v in part.min()])


def _transfers(source: Source) -> Finding:
    data = swapmoe.figure2(source).data
    some = data[data["policy"] == "streaming"]
    told = ", ".join(
        f"{name_of(r['case'])} {r['waiting for transfers']:.0f} %" for _, r in some.iterrows()
    )
    return Finding(f"waiting, of the time: {told}", (some["waiting for transfers"] > 50).tolist())


def _quicker(source: Source) -> Finding:
    _, data = swapmoe._relative(source)
    wide = data[data["memory"] < data["memory"].max()].pivot_table(
        index=["case", "memory"], columns="policy", values="tpot_ms", sort=False
    )
    if "swapmoe" not in wide or "lru" not in wide:
        raise Absent("no runs of swapmoe and lru")
    ratio = wide["swapmoe"] / wide["lru"]
    return Finding(
        f"SwapMoE's TPOT is {ratio.min():.2f} to {ratio.max():.2f} of loading on demand",
        (ratio < 1).tolist(),
    )


def _no_gain(source: Source) -> Finding:
    _, data = swapmoe._relative(source)
    some = data[(data["policy"] == "swapmoe") & (data["memory"] < 75)]["tpot_of_full"]
    return Finding(
        f"SwapMoE's TPOT is {some.min():.2f} to {some.max():.2f} of all resident",
        (some < 0.9).tolist(),
    )


def _pruning(rival: str) -> Callable[[Source], Finding]:
    def find(source: Source) -> Finding:
        data = swapmoe.quality(source)
        wide = data.pivot_table(index="budget", columns="name", values="perplexity", sort=False)
        ratio = wide["genetic (the plan)"] / wide[rival]
        told = ", ".join(f"{ratio[b]:.2f} at {b:.0f} %" for b in ratio.index)
        return Finding(f"perplexity over that of {rival}: {told}", (ratio < 1).tolist())

    return find


def _planned(source: Source) -> Finding:
    finding = _pruning("uniform")(source)
    return Finding(finding.text, finding.held)


def _lossless(source: Source) -> Finding:
    data = swapmoe.quality(source)
    wide = data.pivot_table(index="budget", columns="name", values="perplexity", sort=False)
    same = (wide["on demand"] - wide["full"]).abs() < 1e-9
    return Finding(f"equal perplexity at {same.sum()} of {len(same)} budgets", same.tolist())


def _middle(source: Source) -> Finding:
    data = swapmoe.figure9(source).data
    held, told = [], []
    for budget, some in data.groupby("budget", sort=False):
        third = len(some) // 3
        slots = some.sort_values("layer")["slots"]
        middle, outer = (
            slots.iloc[third:-third].mean(),
            pd.concat([slots.iloc[:third], slots.iloc[-third:]]).mean(),
        )
        held.append(bool(middle > outer))
        told.append(f"{budget}: {middle:.1f} and {outer:.1f}")
    return Finding(f"slots a layer, middle and outer: {'; '.join(told)}", held)


def _little_io(source: Source) -> Finding:
    data = swapmoe.table2(source).data
    rate, wait = data["mean link rate, MiB/s"], data["waiting, %"]
    told = f"{rate.min():.0f} to {rate.max():.0f} MiB/s on average"
    return Finding(f"{told}; waiting at most {wait.max():.1f} %", (wait < 1).tolist())


_OWN_MODEL = "Another model and task: a small decoder's perplexity, not Switch's Rouge on SAMSum."
_SWAPMOE = (
    Claim(
        "Fig. 1",
        "on demand is 6.2 to 8.9 times slower than all resident",
        "simulated",
        _demand,
        "The factor is the link's speed over the device's; the sign is what carries over.",
    ),
    Claim(
        "Fig. 2",
        "transfers dominate when layers are swapped whole",
        "simulated",
        _transfers,
        "As in the paper: a layer loads longer than it computes.",
    ),
    Claim(
        "§4.2",
        "SwapMoE is far quicker than loading on demand at equal memory",
        "simulated",
        _quicker,
        "Masked routing waits for nothing; the first set's loading is charged apart.",
    ),
    Claim(
        "Table 1",
        "less memory makes it quicker than all resident too (0.45 s of 0.82 s)",
        "simulated",
        _no_gain,
        "The paper's library ran every resident expert, used or not. An engine that runs the chosen ones "
        "gains nothing from holding fewer.",
    ),
    Claim(
        "Table 2",
        "swaps cost the link little, and inference does not wait",
        "simulated",
        _little_io,
        "The paper's numbers are of a vision model; ours swap after every request.",
    ),
    Claim(
        "Fig. 8",
        "better quality than pruning by weights, at equal memory",
        "measured",
        _pruning("prune-magnitude"),
        _OWN_MODEL
        + " A set chosen anew from one input of 64 tokens fits the next worse than a fixed one.",
    ),
    Claim(
        "-",
        "(not in the paper) better than a fixed set by importance",
        "measured",
        _pruning("prune-importance"),
        "The baseline that isolates swapping; the paper compares with weights alone.",
    ),
    Claim(
        "§4.2",
        "on demand keeps the quality",
        "measured",
        _lossless,
        "Loading on demand changes no output.",
    ),
    Claim(
        "Fig. 9",
        "language models keep more experts in the middle layers",
        "measured",
        _middle,
        _OWN_MODEL + " Here the first layers matter most for the loss.",
    ),
    Claim("Fig. 10", "a planned allocation beats a uniform one", "measured", _planned, _OWN_MODEL),
    Claim(
        "Fig. 10",
        "amortised updates and importance beat token counts and sudden ones",
        "measured",
        None,
        "The paper changes both at once; no such pair of runs is kept here.",
    ),
    Claim(
        "§4.2",
        "14.2 to 4.7 GiB costs 0.041 of Rouge-2",
        "measured",
        None,
        "Needs SwitchT-64 fine-tuned on SAMSum, which nobody has published.",
    ),
)

CLAIMS: dict[str, tuple[Claim, ...]] = {"finemoe": _FINEMOE, "swapmoe": _SWAPMOE}


# ---- the section of the manual -------------------------------------------------------------------

BEGIN, END = "<!-- comparison: made by moesim.analysis.claims -->", "<!-- end of comparison -->"


def section(kept: Path, measured: Path) -> str:
    """Both papers' tables, from kept tables of runs (``finemoe.parquet``, ``swapmoe.parquet``)."""
    parts = []
    for paper in CLAIMS:
        source = read(
            kept / f"{paper}.parquet", f"moesim figures --paper {paper} --out figs", measured
        )
        parts += [f"### {name_of(paper)}", "", table(paper, source), ""]
    return "\n".join([BEGIN, "", *parts, END])


def inserted(manual: str, made: str) -> str:
    """The manual with its section made anew."""
    before, begin, rest = manual.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"the manual has no lines {BEGIN} and {END}")
    return before + made + after


def main(argv: Sequence[str] | None = None) -> int:
    """Make the section anew; 0."""
    parser = argparse.ArgumentParser(description="Write the comparison into the manual.")
    parser.add_argument("manual", type=Path)
    parser.add_argument("kept", type=Path, help="folder of finemoe.parquet and swapmoe.parquet")
    parser.add_argument("measured", type=Path, help="folder of quality-*.json")
    args = parser.parse_args(argv)
    made = inserted(args.manual.read_text(encoding="utf-8"), section(args.kept, args.measured))
    args.manual.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
