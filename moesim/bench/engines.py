"""moesim beside itself: fast over reference, and many experts over few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from moesim.bench.feed import Case, Recording, run, spec_of
from moesim.bench.figures import Beside, Figure, Promise, Samples
from moesim.bench.measure import interleave
from moesim.bench.workshop import DisagreementError, Workshop
from moesim.engine.fast import compiled
from moesim.policies import SEATS
from moesim.policies.presets import PRESETS
from moesim.profile import ModelProfile
from moesim.traces.synth import Synth
from moesim.workload import Inputs

PLAIN = "moesim.bench.plain:PlainLRU"


def reference(shop: Workshop) -> Iterator[Figure]:
    """The fast engine over the reference: both whole, from the first request to the end."""
    ahead, whence = shop.short_ahead
    cases = {"lru": (shop.short, 300, {}), "next-gate": (ahead, 200, {"ahead": whence})}
    for name, (recording, least, facts) in cases.items():
        pair = _Pair(shop, "reference", name, recording)
        yield pair.figure("whole", Promise(least=least), facts)
        yield pair.figure("core", None, facts)


def python(shop: Workshop) -> Iterator[Figure]:
    """A policy in plain Python: in the fast engine over in the reference."""
    yield _Pair(shop, "python", PLAIN, shop.short).figure("whole", Promise(least=10), {})


class _Pair:
    """Both engines on the same requests, whose logs must be equal."""

    def __init__(self, shop: Workshop, benchmark: str, policy: str, recording: Recording) -> None:
        self._benchmark, self._name = benchmark, policy.rpartition(":")[2]
        self._fast = Case(recording, spec_of(policy), f"{recording.slots}/layer")
        self._core_ns: list[int] = []
        shop.say(f"{benchmark}: {self._name}")
        self._first = run(self._fast)
        slow = replace(self._fast, fast=False)
        sides = {"whole": partial(self._timed, self._fast), "slow": partial(self._timed, slow)}
        self._taken = interleave(shop.settings.repeats, sides)
        self._taken["core"] = self._core_ns

    def _timed(self, case: Case) -> int:
        ran = run(case)
        if ran.tally.log_digest != self._first.tally.log_digest:
            raise DisagreementError(f"{self._benchmark}: {self._name}: the logs of two runs differ")
        if case.fast:
            self._core_ns.append(ran.core_ns)
        return ran.whole_ns

    def figure(self, share: str, promise: Promise | None, facts: Mapping[str, Any]) -> Figure:
        """Layer events a second: ``whole`` or ``core`` of the fast engine over the reference."""
        events = self._first.tally.events
        return Figure(
            benchmark=self._benchmark,
            case=f"{self._name}, {self._fast.capacity}, {share}",
            unit="layer events/s",
            measured=Samples.rates(events, self._taken[share]),
            beside=Beside.best_rate("reference engine", Samples.rates(events, self._taken["slow"])),
            promise=promise,
            facts={
                "layer_events": events,
                "log_digest": self._first.tally.log_digest,
                **facts,
            },
        )


# ---- many experts over few -----------------------------------------------------------------------

LAYERS = 48
SMALL, LARGE = (32, 4), (512, 10)
"""Experts, and how many of them a token asks for."""


def scale(shop: Workshop) -> Iterator[Figure]:
    """ns an access at 512 experts over 32, one cache that holds 40 % of them, every compiled
    keep seat that is a policy by itself."""
    small, large = _sized(shop, *SMALL), _sized(shop, *LARGE)
    for seat in kept():
        shop.say(f"scale: {seat}")
        yield _grown(shop, seat, small, large)


def kept() -> list[str]:
    """Presets that are a compiled keep seat and nothing else."""
    seats = (name.removeprefix("keep.") for name in SEATS if name.startswith("keep."))
    return sorted(s for s in seats if s in PRESETS and _is_keep_alone(s))


def _is_keep_alone(name: str) -> bool:
    preset = PRESETS[name]
    others = (preset.prefetch, preset.miss, preset.route)
    alone = preset.keep == name and others == ("none", "fetch", "exact")
    return alone and compiled(spec_of(name).build())


def _sized(shop: Workshop, experts: int, top_k: int) -> Recording:
    tokens = max(1, shop.settings.scale_accesses // (LAYERS * top_k))
    model = ModelProfile.generic(LAYERS, experts, top_k, f"{experts}-experts")
    path = shop.synthetic(model.name, Synth(model, 1, 0, tokens))
    return shop.read(path, Inputs())


def _grown(shop: Workshop, seat: str, small: Recording, large: Recording) -> Figure:
    cases = {
        name: Case(recording, spec_of(seat), "40%")
        for name, recording in (("small", small), ("large", large))
    }
    ran = {name: run(case) for name, case in cases.items()}
    sides = {name: lambda case=case: run(case).core_ns for name, case in cases.items()}
    taken = interleave(shop.settings.repeats, sides)
    each = {name: Samples.each(taken[name], ran[name].accesses) for name in cases}
    return Figure(
        benchmark="scale",
        case=f"{seat}, E={LARGE[0]}, k={LARGE[1]}",
        unit="ns/access",
        measured=each["large"],
        beside=Beside.middle(f"E={SMALL[0]}, k={SMALL[1]}", each["small"]),
        promise=Promise(most=1.3 if seat == "lru" else 2.5),
        facts={f"{name}_hit_rate": ran[name].hits / ran[name].accesses for name in cases},
    )
