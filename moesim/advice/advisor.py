"""The adviser: what fits, who wins, how latency falls with memory, and what to set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from math import isinf
from typing import Any

from moesim.advice.curve import (
    SHARES,
    TRIAL_REQUESTS,
    TRIAL_SHARES,
    Point,
    curve,
    finalists,
    sizes,
)
from moesim.advice.question import Question, Target
from moesim.advice.room import Room, longest_context, room
from moesim.advice.trust import SHIPPED, Trust, read_trust, variants
from moesim.advice.verdict import knee, least_factor, meets, recommended
from moesim.errors import UsageError
from moesim.policies.presets import PRESETS
from moesim.profile import ModelProfile
from moesim.replays import Progress, replay
from moesim.shape import shaped
from moesim.traces.reader import Columns, TraceReader

Stage = Callable[[str], AbstractContextManager[Progress]]
"""Opens the progress of a named stage."""
ENOUGH = 1.1
"""A link is broken even with when decoding takes no more than this times all resident."""


def advise(question: Question, stage: Stage) -> dict[str, Any]:
    """The answer, as ``--json`` prints it.

    Raises
    ------
    MoesimError
        For a mistake in the request, or a machine that holds not one expert.
    """
    return _Adviser(question, stage).answer()


@dataclass(frozen=True, slots=True)
class _Shortage:
    """What is short, by how much, and that as a sentence."""

    resource: str
    factor: float | None
    text: str


class _Adviser:
    def __init__(self, question: Question, stage: Stage) -> None:
        self.question, self.request, self.stage = question, question.request, stage
        folder = question.validation
        self.trust: Trust = SHIPPED if folder is None else read_trust(folder)
        with TraceReader(self.request.trace, Columns.experts_only()) as reader:
            self.meta = reader.meta
        self.model: ModelProfile = shaped(self.request.costs or self.meta.model, self.meta)
        self.context = longest_context(self.request)
        self.room: Room = room(
            self.model,
            self.request.hardware,
            self.context,
            self.request.batch,
            question.budget_bytes,
            self.request.devices,
        )

    def answer(self) -> dict[str, Any]:
        policies, not_run = self._finalists()
        points = self._curve(policies, self.room.most_bytes)
        self._refuse_targets_of_nothing(points)
        best = recommended(points, self.question.targets)
        shown = points[-1] if best is None else best
        bend = knee(points)
        return {
            "schema": 1,
            "trace": str(self.request.trace),
            "model": self.model.name,
            "hardware": self.request.hardware.name,
            "hardware_source": self.request.hardware.source,
            "context_tokens": self.context,
            "memory": {**asdict(self.room), "left_bytes": self.room.left_bytes},
            "targets": [asdict(target) for target in self.question.targets],
            "trust": asdict(self.trust),
            "curve": [point.to_dict() for point in points],
            "knee": None if bend is None else bend.capacity,
            "recommended": None if best is None else best.to_dict(),
            "surely": best is not None and meets(best, self.question.targets, "high"),
            "break_even": self._break_even(shown),
            "shortages": [] if best else [asdict(s) for s in self._shortages(shown, policies)],
            "not_run": not_run,
        }

    def _refuse_targets_of_nothing(self, points: Sequence[Point]) -> None:
        for target in self.question.targets:
            if all(p.of(target.metric, target.statistic, "expected") is None for p in points):
                raise UsageError(
                    f"--slo {target.metric}: no request of {self.request.trace} has it (all have "
                    "one output token); ask for ttft"
                )

    @property
    def _least_bytes(self) -> int:
        """An expert for each device."""
        return int(self.model.expert_bytes_table().max()) * self.room.devices

    def _sizes(self, most_bytes: int, shares: Sequence[int]) -> list[str]:
        return sizes(self.room.expert_bytes, most_bytes, shares, self._least_bytes)

    def _finalists(self) -> tuple[list[str], list[dict[str, Any]]]:
        policies = self.question.policies or tuple(PRESETS)
        trials = self._sizes(self.room.most_bytes, TRIAL_SHARES)
        trials = trials[:-1] or trials
        with self.stage("first round") as tick:
            return finalists(self.request, policies, trials, self.question.finalists, tick)

    def _curve(self, policies: Sequence[str], most_bytes: int) -> list[Point]:
        capacities = self._sizes(most_bytes, SHARES)
        others = variants(self.request.hardware)
        with self.stage("latency against memory") as tick:
            return curve(self.request, policies, capacities, others, self.trust, tick)

    # ---- what would do ---------------------------------------------------------------------------

    def _break_even(self, point: Point) -> dict[str, Any]:
        """The link with which ``point`` would decode nearly as quickly as with all resident."""
        with self.stage("break-even bandwidth") as tick:
            roof = self._alone("lru", "100%", 1.0, tick, initial="static")
            aim = ENOUGH * _pace(roof)
            rate = self.request.hardware.link.bytes_per_s
            factor = least_factor(
                lambda f: _pace(self._alone(point.policy, point.capacity, f, tick)) <= aim
            )
        return {
            "of": f"{point.policy} at {point.capacity}",
            "all_resident_tpot_ns": roof["tpot_ns"]["mean"],
            "factor": factor,
            "bytes_per_s": None if factor is None or isinf(rate) else rate * factor,
        }

    def _alone(
        self,
        policy: str,
        capacity: str,
        factor: float,
        tick: Progress,
        initial: str = "",
        most: int | None = TRIAL_REQUESTS,
    ) -> dict[str, Any]:
        """One run with a link so much faster, of ``most`` requests; None: of all asked for."""
        request = self.request
        rate = request.hardware.link.bytes_per_s * factor
        hardware = request.hardware if factor == 1.0 else request.hardware.with_bandwidth(rate)
        asked = replace(
            request,
            hardware=hardware,
            policies=(policy,),
            capacities=(capacity,),
            limit=request.limit if most is None else min(request.limit or most, most),
            initial=initial or request.initial,
        )
        run: dict[str, Any] = replay(asked, tick)["runs"][0]
        return run

    # ---- what is short ---------------------------------------------------------------------------

    def _shortages(self, point: Point, policies: Sequence[str]) -> list[_Shortage]:
        """Why no setting meets the targets: the device itself, its memory, its link."""
        targets = self.question.targets
        with self.stage("what is short") as tick:
            roof = self._alone("lru", "100%", 1.0, tick, initial="static", most=None)
        slow = [t for t in targets if (t.of(roof) or 0) > t.most_ns]
        if slow:
            return [_too_slow(target, roof) for target in slow]
        return [s for s in (self._memory(policies), self._link(point)) if s is not None]

    def _memory(self, policies: Sequence[str]) -> _Shortage | None:
        points = self._curve(policies, self.room.expert_bytes)
        found = next((p for p in points if meets(p, self.question.targets, "expected")), None)
        if found is None:
            return None
        short = found.capacity_bytes - self.room.most_bytes
        text = (
            f"memory is short by up to {short / 1e9:.2f} GB: {found.policy} is expected to meet it "
            f"with {found.capacity_bytes / 1e9:.2f} GB for experts ({found.share:.0%} of them)"
        )
        return _Shortage("memory", found.capacity_bytes / self.room.most_bytes, text)

    def _link(self, point: Point) -> _Shortage:
        targets = self.question.targets
        rate = self.request.hardware.link.bytes_per_s

        def does(factor: float) -> bool:
            run = self._alone(point.policy, point.capacity, factor, tick, most=None)
            return all((t.of(run) or 0) <= t.most_ns for t in targets)

        with self.stage("what link would do") as tick:
            factor = least_factor(does)
        if factor is None:
            text = f"no link would do with {point.policy} at {point.capacity}"
        else:
            text = (
                f"the link is short by {factor:.2f} times: {point.policy} at {point.capacity} is "
                f"expected to meet it at {rate * factor / 1e9:.1f} GB/s, and it has "
                f"{rate / 1e9:.1f}"
            )
        return _Shortage("link", factor, text)


def _pace(run: dict[str, Any]) -> float:
    mean = run["tpot_ns"]["mean"]
    return float(run["ttft_ns"]["mean"] if mean is None else mean)


def _too_slow(target: Target, roof: dict[str, Any]) -> _Shortage:
    value = target.of(roof) or 0.0
    factor = value / target.most_ns
    text = (
        f"the device is too slow by {factor:.2f} times: with every expert resident the "
        f"{target.statistic} {target.metric.upper()} is {value / 1e6:.2f} ms, and "
        f"{target.most_ns / 1e6:g} is asked; no memory and no link would do"
    )
    return _Shortage("compute", factor, text)
