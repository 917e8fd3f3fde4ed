"""From counts to the numbers that are reported. Each is defined in ``moesim/README.md``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moesim.result import percentiles
from moesim.serve.report import counted
from moesim.tally import FATES, Counts, Quality, Tally
from moesim.types import Phase


def summarise(tally: Tally, warm: int = 0) -> dict[str, Any]:
    """The summary of one run, plain JSON values; times in ns. TTFT and TPOT are without the first
    ``warm`` requests. ``serving`` is for who knows how requests arrive."""
    total, times = tally.counts(), tally.times
    time_ns = times.total()
    requests = counted(tally, warm)
    tokens = sum(r.output_tokens for r in tally.requests)
    return {
        **_counts(total),
        "hit_rate": _ratio(total.hits, total.accesses),
        "prefill": _counts(tally.phases[Phase.PREFILL]),
        "decode": _counts(tally.phases[Phase.DECODE]),
        "prefetch": _prefetch(tally),
        "served": dict(tally.served),
        "time_ns": time_ns,
        "stall_ns": times.stall,
        "times_ns": asdict(times),
        "layer_stall_ns": list(tally.layer_stall_ns),
        "ttft_ns": percentiles([r.ttft_ns for r in requests if r.first_token_ns >= 0]),
        "tpot_ns": percentiles([t for r in requests if (t := r.tpot_ns) is not None]),
        "after_first_request": _after_first(tally),
        "after_warm": _after_warm(tally, warm),
        "serving": None,
        "tokens_per_s": _ratio(tokens * 10**9, time_ns),
        "output_tokens": tokens,
        "requests": len(tally.requests),
        "link_busy_ns": tally.link_busy_ns,
        "evictions": tally.evictions,
        "bytes_written_back": tally.written_bytes,
        "peak_bytes": tally.peak_bytes,
        "largest_union_bytes": tally.largest_union_bytes,
        "overflows": tally.overflows,
        "initial_loads": tally.initial_loads,
        "initial_bytes": tally.initial_bytes,
        "layer_events": tally.events,
        "steps": tally.steps,
        "jobs": tally.jobs,
        "quality": _quality(tally.quality),
        **({} if tally.ssd is None else {"ssd": asdict(tally.ssd)}),
        "log_digest": tally.log_digest,
        "decision_digest": tally.decision_digest,
        **_devices(tally),
    }


def _devices(tally: Tally) -> dict[str, Any]:
    """What each of several devices did, and how unequal that was."""
    if not tally.devices:
        return {}
    rows = [_device(device) for device in tally.devices]
    even = {name: _imbalance([row[name] for row in rows]) for name in ("accesses", "experts_ns")}
    return {"devices": rows, "imbalance": even}


def _device(tally: Tally) -> dict[str, Any]:
    counts = tally.counts()
    names = ("accesses", "hits", "late_hits", "misses", "loads", "bytes_loaded")
    return {
        **{name: getattr(counts, name) for name in names},
        "hit_rate": _ratio(counts.hits, counts.accesses),
        "experts_ns": tally.times.experts,
        "stall_ns": tally.times.stall,
        "cpu_wait_ns": tally.times.cpu_wait,
        "link_busy_ns": tally.link_busy_ns,
        "evictions": tally.evictions,
        "initial_bytes": tally.initial_bytes,
        "resident_bytes": tally.resident_bytes,
        "slowest": tally.slowest,
    }


def _imbalance(values: list[int]) -> float | None:
    """The largest over the mean."""
    return _ratio(max(values) * len(values), sum(values))


def _counts(counts: Counts) -> dict[str, int]:
    return asdict(counts)


def _prefetch(tally: Tally) -> dict[str, Any]:
    fates = tally.prefetch
    return {
        "planned": fates.planned,
        "overtaken": fates.overtaken,
        "dropped": fates.dropped,
        "issued": fates.issued,
        **fates.count,
        "bytes": {fate: fates.nbytes[fate] for fate in FATES},
        "polluting": fates.polluting,
        "named": tally.named,
        "named_and_demanded": tally.predicted,
    }


def _quality(quality: Quality | None) -> dict[str, Any] | None:
    """The proxies of a lossy policy; shares are None where there is nothing to share."""
    if quality is None:
        return None
    return {
        "agreement": _ratio(quality.agreed, quality.chosen),
        "gate_mass_kept": _ratio(quality.mass_kept, quality.mass),
        "gate_mass_low": _ratio(quality.mass_low, quality.mass),
        **asdict(quality),
    }


def _after_first(tally: Tally) -> dict[str, Any]:
    """TTFT and TPOT without the first request, which pays for the cold cache."""
    rest = tally.requests[1:]
    return {
        "ttft_ns": percentiles([r.ttft_ns for r in rest if r.first_token_ns >= 0]),
        "tpot_ns": percentiles([t for r in rest if (t := r.tpot_ns) is not None]),
    }


def _after_warm(tally: Tally, warm: int) -> dict[str, Any] | None:
    """What was counted from the first step on that began when ``warm`` requests had ended; None
    where there are none to leave out."""
    if not warm:
        return None
    before, total = tally.before, asdict(tally.counts())
    if before is None:
        return {**dict.fromkeys(total, 0), "hit_rate": None, "time_ns": 0, "stall_ns": 0}
    first = asdict(before.counts())
    counts = {name: number - first[name] for name, number in total.items()}
    return {
        **counts,
        "hit_rate": _ratio(counts["hits"], counts["accesses"]),
        "time_ns": tally.times.total() - before.times.total(),
        "stall_ns": tally.times.stall - before.times.stall,
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
