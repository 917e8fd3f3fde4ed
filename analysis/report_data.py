"""What a report's page is filled with: plain rows for its table, and numbers for its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from moesim.analysis import report_timeline
from moesim.analysis.report_entropy import Entropy
from moesim.analysis.report_facts import is_tied, ms, size
from moesim.analysis.report_runs import PARTS, Run, Setting, parts_ns, tables
from moesim.analysis.report_text import plain
from moesim.analysis.report_timeline import Timeline
from moesim.errors import MoesimError, UsageError
from moesim.profile import ModelProfile
from moesim.tally import FATES

COLOURS = (
    "#1d7fc0", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8a62b0", "#6b8e23",
)  # fmt: skip
"""Okabe and Ito's, told apart by the colour-blind; some shifted to show on light and
dark, two added."""

MARKERS = ("circle", "square", "triangle", "inverted_triangle", "star", "hex", "plus", "asterisk")
BOUND_COLOUR = "#8a8f98"

MOST_SPANS = 24_000
"""Spans of all timelines together: about a megabyte."""
MOST_TIMELINES = 24


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table. value : what it is sorted by. origin : where the number is from."""

    text: str
    value: float | str | None
    origin: str = ""
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    name: str
    help: str
    text: bool = False


COLUMNS = (
    Column("policy", "with what was set", text=True),
    Column("capacity", "fast memory for experts, as typed"),
    Column("TPOT ms", "time per output token after the first, mean over requests"),
    Column("P99 ms", "its 99th percentile"),
    Column("TTFT ms", "time to first token, mean over requests"),
    Column("stall %", "of the time: waiting for experts to arrive"),
    Column("moved", "bytes over the link"),
    Column("hit %", "of accesses: resident and arrived at the gate"),
    Column("late %", "of accesses: under way at the gate"),
    Column("miss %", "of accesses: neither"),
    Column("peak", "most bytes of experts held at a time"),
    Column("x bound", "time of the run over the lower bound in seconds"),
    Column("run", "its folder", text=True),
)


@dataclass(slots=True)
class Names:
    """Policies in one order, with a look each; names are fit to be shown, and no two alike."""

    labels: list[str]
    shown: list[str]
    bounds: list[bool]
    lossy: list[bool]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Names:
        """In order of kind (usable, lossy, bounds), then of name."""
        kinds: dict[str, tuple[bool, bool]] = {}
        for run in runs:
            kinds.setdefault(run.label, (run.bound, bool(run.summary["lossy"])))
        labels = sorted(kinds, key=lambda label: (*kinds[label], label))
        return cls(
            labels,
            list(_apart(plain(label) for label in labels)),
            [kinds[label][0] for label in labels],
            [kinds[label][1] for label in labels],
        )

    def to_json(self) -> list[dict[str, Any]]:
        """As the page's script reads them."""
        looks = []
        for i, name in enumerate(self.shown):
            colour = BOUND_COLOUR if self.bounds[i] else COLOURS[i % len(COLOURS)]
            turn = i // len(COLOURS) + i
            looks.append(
                {
                    "name": name,
                    "colour": colour,
                    "marker": MARKERS[turn % len(MARKERS)],
                    "bound": self.bounds[i],
                    "lossy": self.lossy[i],
                }
            )
        return looks


def _apart(names: Iterator[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


# ---- the table -----------------------------------------------------------------------------------


def cells(run: Run, names: Names, quickest: Run | None) -> list[Cell]:
    """One row of the table."""
    s, where = run.summary, f"run {plain(run.folder.name)}, summary.json: "
    kind = "bound" if run.bound else "lossy" if s["lossy"] else ""
    name = names.shown[names.labels.index(run.label)]
    best = "quickest" if run is quickest else ""
    if quickest is not None and run is not quickest and run.usable and run.tpot_ns:
        best = "tie" if is_tied(run, quickest) else ""
    bound = s.get("ladder", {}).get("bound", {}).get("of_run")
    spread = f" ± {run.spread:.1%}, {run.repeats} repeats" if run.repeats > 1 else ""
    tpot, ttft = s["tpot_ns"], s["ttft_ns"]
    return [
        Cell(name + " *" * bool(s["allowed"]), name, where + "policy, set", kind),
        Cell(plain(s["capacity"]), s["capacity_bytes"], where + "capacity, capacity_bytes"),
        Cell(ms(tpot["mean"]), tpot["mean"], where + "tpot_ns.mean" + spread, best),
        Cell(ms(tpot["p99"]), tpot["p99"], where + "tpot_ns.p99"),
        Cell(ms(ttft["mean"]), ttft["mean"], where + "ttft_ns.mean"),
        _share(s["stall_ns"], s["time_ns"], where + "stall_ns / time_ns"),
        Cell(size(s["bytes_loaded"]), s["bytes_loaded"], where + "bytes_loaded"),
        _share(s["hits"], s["accesses"], where + "hits / accesses"),
        _share(s["late_hits"], s["accesses"], where + "late_hits / accesses"),
        _share(s["misses"], s["accesses"], where + "misses / accesses"),
        Cell(size(s["peak_bytes"]), s["peak_bytes"], where + "peak_bytes"),
        Cell(f"{1 / bound:.3f}", 1 / bound, "lower bound: its rungs' runs, see moesim/README.md")
        if bound
        else Cell("-", None),
        Cell(plain(run.folder.name)[:12], plain(run.folder.name), plain(run.folder)),
    ]


def _share(part: float, whole: float, origin: str) -> Cell:
    if not whole:
        return Cell("-", None, origin)
    return Cell(f"{100 * part / whole:.2f}", part / whole, origin)


def provenance(run: Run) -> list[str]:
    """Where a row's numbers are from."""
    m, s = run.manifest, run.summary
    digests = (m["trace"], m.get("source_digest") or "-", s.get("decision_digest") or "-")
    files = f"{plain(run.folder)}: {', '.join(tables(run))}"
    return [files, run.source[:16], *(plain(digest)[:16] for digest in digests)]


# ---- the figures ---------------------------------------------------------------------------------


def figures(
    settings: Sequence[Setting], names: Names, step: int | None, gates: Entropy | None
) -> dict[str, Any]:
    """All numbers that the page's figures draw; times in ns."""
    runs = [(i, run) for i, setting in enumerate(settings) for run in setting.runs]
    clocks = list(islice(_clocks(runs, step), MOST_TIMELINES))
    return {
        "policies": names.to_json(),
        "parts": list(PARTS),
        "fates": ["demand", *FATES],
        "settings": [
            {"name": plain(s.name), "capacities": [plain(c) for c in s.capacities()]}
            for s in settings
        ],
        "runs": [_row(i, run, names) for i, run in runs],
        "clocks": _within(clocks),
        "entropy": None if gates is None else _entropy(gates),
    }


def _row(setting: int, run: Run, names: Names) -> dict[str, Any]:
    s = run.summary
    nbytes = s["prefetch"]["bytes"]
    prefetched = sum(nbytes[fate] for fate in FATES)
    return {
        "setting": setting,
        "policy": names.labels.index(run.label),
        "capacity": plain(s["capacity"]),
        "bytes": s["capacity_bytes"],
        "roof": run.roof,
        "run": plain(run.folder.name),
        "tpot": s["tpot_ns"]["mean"],
        "tpot99": s["tpot_ns"]["p99"],
        "ttft": s["ttft_ns"]["mean"],
        "ttft99": s["ttft_ns"]["p99"],
        "stall": s["stall_ns"] / s["time_ns"] if s["time_ns"] else None,
        "moved": s["bytes_loaded"],
        "hit": s["hits"] / s["accesses"] if s["accesses"] else None,
        "time": s["time_ns"],
        "parts": parts_ns(s),
        # Bytes of prefetches that were still moving at the end are in neither.
        "fates": [max(0, s["bytes_loaded"] - prefetched), *(nbytes[fate] for fate in FATES)],
        "layers": s["layer_stall_ns"],
    }


def _clocks(runs: Sequence[tuple[int, Run]], step: int | None) -> Iterator[dict[str, Any]]:
    """The timelines that were kept, those of policies before those of bounds."""
    for at, (_, run) in enumerate(runs):
        model = _model(run)
        sync = run.manifest["hardware"].get("host", {}).get("sync_ns", 0)
        made = None if model is None else report_timeline.read(run.folder, sync, model.layers)
        if made is None or model is None:
            continue
        if step is not None and not 0 <= step < made.steps:
            raise UsageError(f"--step {step}: {run.folder} has steps 0 to {made.steps - 1}")
        chosen = min(3 * made.steps // 4, max(made.steps - 2, 0)) if step is None else step
        steps = sorted({0, chosen})
        rows, each = report_timeline.binned(*made.hits(model.layers))
        yield {
            "run": at,
            "steps": made.steps,
            "passes": [_pass(made, number, model) for number in steps],
            "chosen": steps.index(chosen),
            "hits": rows,
            "each": each,
        }


def _model(run: Run) -> ModelProfile | None:
    try:
        return ModelProfile.from_dict(run.manifest["model"])
    except MoesimError:
        return None


def _pass(made: Timeline, number: int, model: ModelProfile) -> dict[str, Any]:
    """A forward pass; spans are [lane, start, end, layer, expert, needed], ns from its start."""
    start, end = made.window(number)
    spans = [
        [
            span.lane,
            span.start - start,
            span.end - start,
            span.layer,
            span.expert,
            need - start if _is_load(span) and (need := made.need(span)) is not None else None,
        ]
        for span in made.inside(number)
    ]
    sizes = model.expert_bytes_table().tolist()
    return {"step": number, "start": start, "end": end - start, "spans": spans, "bytes": sizes}


def _is_load(span: report_timeline.Span) -> bool:
    return span.lane in ("demand", "prefetch")


def _within(clocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many as the page has room for."""
    kept: list[dict[str, Any]] = []
    spans = 0
    for clock in clocks:
        spans += sum(len(one["spans"]) for one in clock["passes"])
        if kept and spans > MOST_SPANS:
            break
        kept.append(clock)
    return kept


def _entropy(gates: Entropy) -> Mapping[str, Any]:
    return {
        "bits": [[None if v != v else round(v, 4) for v in row] for row in gates.bits.tolist()],
        "of": gates.of,
        "most": gates.most,
        "requests": gates.requests,
        "digest": gates.digest[:16],
    }
