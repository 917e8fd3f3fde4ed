"""What a report says in words: the answer first, what it rests on, and what it cannot tell."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from moesim import ladder, ties
from moesim.analysis.report_runs import Run, Setting, rate
from moesim.analysis.validate_runs import KEYS
from moesim.capacity import Capacity
from moesim.costs import make_costs
from moesim.diagnose import diagnostics
from moesim.errors import MoesimError
from moesim.profile import HardwareProfile, ModelProfile
from moesim.result import canonical

_MOST_NAMED = 4


@dataclass(slots=True)
class Answer:
    """Of one setting.

    lines : one a capacity. warnings : what a reader must know before any ranking.
    """

    headline: str
    lines: list[str] = field(default_factory=list)
    belief: list[str] = field(default_factory=list)
    diagnoses: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Place:
    """Who leads at a capacity, and who cannot be told from it."""

    capacity: str
    best: Run
    tied: tuple[Run, ...]
    next: Run | None
    judged: bool
    """Whether chance was weighed: False where the times of single requests are missing."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a trace's metadata would say of a model's shape."""

    layers: int
    experts: int
    top_k: int
    model: ModelProfile

    def stack_ranges(self) -> tuple[tuple[str, int, int], ...]:
        ends = list(accumulate(stack.layers for stack in self.model.stacks))
        starts = [0, *ends[:-1]]
        names = [stack.name for stack in self.model.stacks]
        return tuple(zip(names, starts, ends, strict=True))


def answer(setting: Setting, every: Sequence[Setting]) -> Answer:
    """Rank, compare with the bounds, and say how much of it is to be believed."""
    judged = _mark(setting.runs)
    _climb(setting)
    places = [p for c in setting.capacities() if (p := _place(setting, c, judged)) is not None]
    told = Answer(_headline(setting, places))
    told.lines = [_line(place, setting) for place in places]
    told.lines += _served(places)
    told.belief = [*_belief(setting), *_overload(setting), *_validation(setting, every)]
    if not all("ladder" in place.best.summary for place in places):
        how = "replay with --ladder --out" if _has_ladder(setting) else "such runs have no ladder"
        told.belief.append(f"How far from the bounds is not known: {how}")
    _diagnose(setting, told)
    return told


# ---- who is quickest -----------------------------------------------------------------------------


def _mark(runs: Sequence[Run]) -> bool:
    """Set ``against_best`` in each ranked summary; whether single requests were at hand."""
    ranked = [run for run in runs if run.usable and run.tpot_ns is not None]
    times = [run.tpots() for run in ranked]
    requests = sorted({request for one in times for request in one})
    if not requests or any(set(one) != set(requests) for one in times):
        return False
    arrays = [np.array([_nan(one[r]) for r in requests], np.float64) for one in times]
    summaries = [{**run.summary, "policy": run.label, "capacity": _where(run)} for run in ranked]
    ties.mark(summaries, arrays)
    for run, summary in zip(ranked, summaries, strict=True):
        if "against_best" in summary:
            run.summary["against_best"] = summary["against_best"]
    return True


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _where(run: Run) -> str:
    return str(run.summary["capacity"])


def _place(setting: Setting, capacity: str, judged: bool) -> _Place | None:
    found = [r for r in setting.runs if r.usable and r.tpot_ns and _where(r) == capacity]
    if not found:
        return None
    found.sort(key=lambda r: (r.tpot_ns or 0.0, r.label))
    best, *rest = found
    tied = tuple(run for run in rest if is_tied(run, best))
    behind = next((run for run in rest if run not in tied), None)
    return _Place(capacity, best, tied, behind, judged)


def is_tied(run: Run, best: Run) -> bool:
    """Whether chance over requests, or the spread of repeats, could turn the order round."""
    if run.summary.get("against_best", {}).get("tie"):
        return True
    apart = (run.tpot_ns or 0.0) - (best.tpot_ns or 0.0)
    return apart <= run.spread * (run.tpot_ns or 0.0) + best.spread * (best.tpot_ns or 0.0)


def _headline(setting: Setting, places: Sequence[_Place]) -> str:
    if not places:
        return "No run here is of a policy that could be used: there are bounds or lossy ones alone"
    clear = [place for place in places if not place.tied]
    leaders = list(dict.fromkeys(place.best.label for place in clear))
    told = [
        _leads(name, [p for p in clear if p.best.label == name], len(places)) for name in leaders
    ]
    open_ = [place for place in places if place.tied]
    if open_:
        told.append(
            f"at {_listed([p.capacity for p in open_])} the quickest "
            f"{_listed([p.best.label for p in open_])} cannot be told from the next"
        )
    text = "; ".join(told)
    return text[0].upper() + text[1:] if open_ and not clear else text


def _leads(name: str, places: Sequence[_Place], of: int) -> str:
    capacities = [place.capacity for place in places]
    if all(place.next is None for place in places):
        return f"{name} is the only policy here that could be used ({_listed(capacities)})"
    if len(capacities) == of > 1:
        return f"{name} is the quickest at every capacity ({_listed(capacities)})"
    return f"{name} is the quickest at {_listed(capacities)}"


def _line(place: _Place, setting: Setting) -> str:
    best = place.best
    told = [f"{ms(best.tpot_ns)} ms a token with {best.label}"]
    if place.tied:
        told.append(f"not told apart from {_listed([run.label for run in place.tied])}")
    if place.next is not None:
        gap = (place.next.tpot_ns or 0.0) / (best.tpot_ns or 1.0) - 1
        told.append(f"{place.next.label} is {gap:.1%} slower")
    if not place.tied and place.next is None:
        told.append("the only policy here that could be used")
    told += _distance(best)
    return f"At {place.capacity}: " + "; ".join(told)


def _distance(run: Run) -> Iterator[str]:
    rungs = run.summary.get("ladder", {})
    for name, words in (
        ("hindsight", "the time of hindsight prefetch (a strong heuristic)"),
        (ladder.ROOF, "that of everything resident"),
        ("bound", "the lower bound"),
    ):
        share = rungs.get(name, {}).get("of_run")
        if share:
            yield f"{1 / share:.2f} x {words}"


# ---- how far from the bound ----------------------------------------------------------------------


def _climb(setting: Setting) -> None:
    """Attach the ladder to each run of a capacity whose rungs are all there."""
    roof = next((run for run in setting.runs if run.roof), None)
    if roof is None or any(run.real for run in setting.runs):
        return
    rungs = {(r.label, _where(r)): r.summary for r in setting.runs if r.label in ladder.RUNGS}
    full = {c for c in setting.capacities() if all((name, c) in rungs for name in ladder.RUNGS)}
    some = [run.summary for run in setting.runs if not run.roof and _where(run) in full]
    made = _profiles(setting)
    if some and made is not None:
        model, hardware = made
        load_ns = make_costs(model, hardware).load_ns(int(model.expert_bytes_table().min()))
        ladder.climb(some, rungs, roof.summary, load_ns)


def _profiles(setting: Setting) -> tuple[ModelProfile, HardwareProfile] | None:
    """The profiles that the runs carry; None where a later moesim spells them otherwise."""
    try:
        model = ModelProfile.from_dict(setting.facts["model"])
        return model, HardwareProfile.from_dict(setting.facts["hardware"])
    except (MoesimError, KeyError, TypeError, ValueError):
        return None


def _diagnose(setting: Setting, told: Answer) -> None:
    made = _profiles(setting)
    if made is None:
        return
    model, hardware = made
    costs = make_costs(model, hardware)
    seen: set[str] = set()
    for run in setting.runs:
        where = _where(run)
        if run.roof or where in seen:
            continue
        seen.add(where)
        held = tuple(int(n) for n in run.manifest["capacity"]["bytes"])
        capacity = Capacity(where, str(run.summary["scope"]), held)
        shape = _Shape(model.layers, model.experts, model.top_k, model)
        found = diagnostics(shape, model, costs, capacity, int(setting.facts.get("batch", 1)))
        told.diagnoses.append(_diagnosis(found))
        told.warnings += [str(warning) for warning in found["warnings"]]
    order = {c: i for i, c in enumerate(setting.capacities())}
    told.diagnoses.sort(key=lambda line: order.get(line.partition(": ")[0], 0))


def _diagnosis(found: dict[str, Any]) -> str:
    even = found["break_even_bytes_per_s"]
    share = found["capacity_bytes"] / found["all_expert_bytes"]
    return (
        f"{found['capacity']}: {size(found['capacity_bytes'])}, {share:.1%} of all experts; one "
        f"token touches {size(found['token_bytes'])}; every miss is stall below a link of "
        f"{rate(even) if even else 'any speed'}"
    )


def _has_ladder(setting: Setting) -> bool:
    """Whether ``moesim replay`` would run the oracle ladder: one device, and no arrivals."""
    facts = setting.facts
    timed = facts.get("arrivals", "back-to-back") != "back-to-back"
    timed = timed or any(run.summary.get("serving") for run in setting.runs)
    return not timed and not any(run.summary.get("devices") for run in setting.runs)


def _served(places: Sequence[_Place]) -> Iterator[str]:
    """Where requests arrive: what the quickest of each capacity made of them."""
    for place in places:
        told = place.best.summary.get("serving")
        if not told:
            continue
        waited = told["queue_ns"]["mean"]
        line = f"At {place.capacity}, {told['finished']} of {told['arrived']} requests were served"
        if waited is not None:
            line += f", after waiting {ms(waited)} on average"
        asked = (place.best.manifest.get("serving") or {}).get("slo") or {}
        if told["good_share"] is not None and any(asked.values()):
            line += f"; {told['good_share']:.0%} of those counted kept every limit asked for"
        yield line


def _overload(setting: Setting) -> Iterator[str]:
    told = [(run, run.summary.get("serving") or {}) for run in setting.runs]
    over = [f"{run.label} at {run.summary['capacity']}" for run, s in told if s.get("overloaded")]
    if over:
        yield (
            f"Overloaded: {_listed(over)}. Waiting grows as long as requests arrive, so times to "
            "the first token say how long the run was, not how quick the system is"
        )


# ---- how much is believed ------------------------------------------------------------------------


def _belief(setting: Setting) -> Iterator[str]:
    facts, runs = setting.facts, setting.runs
    hardware = facts["hardware"]
    if runs[0].real:
        yield (
            f"Measured on a device of kind {_kind(facts)}; at most {max(r.repeats for r in runs)} "
            "repeats of a configuration"
        )
    else:
        yield (
            f"Simulated. Times of {hardware['name']} are {_source(hardware.get('source'))}; those "
            f"of the model {facts['model']['name']} are {facts['model'].get('source', 'unknown')}"
        )
    if facts.get("costs"):
        yield f"--costs: another model's routing at the sizes and times of {facts['costs']}"
    allowed = dict.fromkeys(name for run in runs for name in run.summary["allowed"])
    for name in allowed:
        yield f"Rests on the degradation --allow {name} where a policy is marked *"
    if len({run.manifest.get("source_digest") for run in runs if not run.real}) > 1:
        yield "The runs were made by different versions of moesim's source"


def _kind(facts: Any) -> str:
    device = facts.get("device")
    return str(device.get("kind", "unknown")) if isinstance(device, dict) else "unknown"


def _source(source: object) -> str:
    return {
        "measured": "measured (calibrated)",
        "datasheet": "from its datasheet, not measured",
        "assumed": "assumed, not measured",
    }.get(str(source), "of unknown source")


def _validation(setting: Setting, every: Sequence[Setting]) -> Iterator[str]:
    """Simulated runs beside measured ones of the same, where the report was given both."""
    if setting.runs[0].real:
        return
    measured = {_key(r): r for other in every for r in other.runs if r.real and r.tpot_ns}
    errors = [
        (run.tpot_ns or 0.0) / (measured[_key(run)].tpot_ns or 1.0) - 1
        for run in setting.runs
        if _key(run) in measured
    ]
    if errors:
        kinds = _listed(sorted({_kind(o.facts) for o in every if o.runs[0].real}))
        yield (
            f"Against {len(errors)} configuration{'s' * (len(errors) > 1)} measured on {kinds}, "
            "simulated TPOT is off by "
            f"{statistics.fmean(errors):+.1%} in the mean, {max(errors, key=abs):+.1%} at worst"
        )
    else:
        yield "No measured run of the same is among these: moesim real campaign makes them"


def _key(run: Run) -> str:
    """What a simulation and its measurement share."""
    return canonical([run.manifest.get(name) for name in KEYS])


# ---- words ---------------------------------------------------------------------------------------


def ms(ns: float | None) -> str:
    """Milliseconds, three figures at least."""
    if ns is None:
        return "-"
    value = ns / 1e6
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def size(nbytes: float) -> str:
    """Bytes for the eye."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} bytes"


def _listed(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    if len(names) > _MOST_NAMED:
        names = [*names[: _MOST_NAMED - 1], f"{len(names) - _MOST_NAMED + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
