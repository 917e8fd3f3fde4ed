"""What a policy answers, checked: every host asks through this, so that each refuses alike.

A ``PolicyError`` is one line that names the layer event and what was wrong with the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from moesim.errors import PolicyError
from moesim.protocol import Policy, World
from moesim.tally import Quality
from moesim.types import (
    DROPPED,
    NEVER,
    NO_PLAN,
    AnyArray,
    Fact,
    Gate,
    IntArray,
    Job,
    LayerEvent,
    Plan,
    Prefetch,
    Routed,
    Serve,
    State,
    Status,
)
from moesim.view import Window

MISS = int(Status.MISS)
RESIDENT = int(State.RESIDENT)
AS_RECORDED = Routed()
INT64 = np.dtype(np.int64)
LISTS = ("prefetches", "cancel", "reprioritise", "jobs")


class Answers:
    """One policy, asked by one host.

    ``bytes_of`` : bytes booked for each key. ``event`` : the newest layer event, kept by the host.
    """

    def __init__(self, policy: Policy, world: World, view: Window, bytes_of: Sequence[int]) -> None:
        self.policy = policy
        self.event = -1
        self._view = view
        self._bytes_of = bytes_of
        self._size = world.size
        self._experts = world.experts
        self._precisions = len(world.expert_bytes)
        self.quality = Quality() if policy.lossy else None
        self._routed = AS_RECORDED

    def route(self, source: LayerEvent) -> Routed:
        """What to execute instead of what was recorded."""
        answer = self.policy.route(source, self._view) if self.policy.lossy else None
        routed = answer if isinstance(answer, Routed) else Routed(answer)
        wanted = source.token_experts
        experts = None if routed.experts is None else self._experts_of(routed.experts, wanted)
        precisions = routed.precisions
        if precisions is not None:
            precisions = self._precisions_of(precisions, wanted)
        self._routed = Routed(experts, precisions)
        return self._routed

    def _experts_of(self, answer: AnyArray, wanted: AnyArray) -> AnyArray:
        routed = np.asarray(answer)
        if routed.dtype != np.uint16 or routed.shape != wanted.shape:
            raise self._wrong(
                f"route must answer uint16 {list(wanted.shape)}, "
                f"got {routed.dtype} {list(routed.shape)}"
            )
        if len(routed) == 1:
            # One token, as most are: a list is quicker than what many take.
            named = [e for e in routed[0].tolist() if e != DROPPED]
            if len(set(named)) == len(named) and max(named, default=0) < self._experts:
                return routed
        if np.any((routed >= self._experts) & (routed != DROPPED)):
            raise self._wrong(f"route names expert {int(routed.max())} of {self._experts}")
        ordered = np.sort(routed, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != DROPPED)
        if twice.any():
            raise self._wrong(f"route names expert {ordered[:, 1:][twice][0]} twice for one token")
        return routed

    def _precisions_of(self, answer: AnyArray, wanted: AnyArray) -> AnyArray:
        precisions = np.asarray(answer)
        if precisions.dtype != np.uint8 or precisions.shape != wanted.shape:
            raise self._wrong(
                f"precisions of a route must be uint8 {list(wanted.shape)}, "
                f"got {precisions.dtype} {list(precisions.shape)}"
            )
        if precisions.size and precisions.max() >= self._precisions:
            raise self._wrong(
                f"route asks for precision {int(precisions.max())} of {self._precisions}"
            )
        return precisions

    def routed_experts(self, source: LayerEvent) -> AnyArray:
        """uint16 [T, k]: where the tokens of the newest layer event go."""
        routed = self._routed.experts
        return source.token_experts if routed is None else routed

    @property
    def precise(self) -> bool:
        """Whether the newest layer event is executed in full precision."""
        return self._routed.precisions is None

    def plan(self, fact: Fact) -> Plan:
        """What to do about a fact."""
        plan = self.policy.on(fact, self._view)
        if plan is NO_PLAN and self.quality is None:
            return plan
        if not isinstance(plan, Plan):
            raise self._wrong(f"on() answered {type(plan).__name__}, not a Plan")
        self._refuse_strange(plan)
        if isinstance(fact, Gate):
            if plan.serve and not self.policy.lossy:
                self._refuse_skipping(fact, plan)
            if self.quality is not None:
                executed = self.executed(fact, plan)
                _count(self.quality, fact, executed)
                if fact.precisions is not None:
                    self.quality.mass_low += _low(fact, plan, executed, self._experts)
        return plan

    def executed(self, gate: Gate, plan: Plan) -> AnyArray:
        """uint16 [T, k]: what each token of the newest gate gets."""
        routed = self._routed.experts
        executed = gate.source.token_experts if routed is None else routed
        missing = gate.experts[gate.status == MISS].tolist() if plan.serve else []
        skipped = [e % self._experts for e in missing if plan.serve.get(e) == Serve.SKIP]
        return np.where(np.isin(executed, skipped), DROPPED, executed) if skipped else executed

    def _refuse_strange(self, plan: Plan) -> None:
        """Whatever is not what ``Plan`` says, before anything is made of it."""
        for name in LISTS:
            if not isinstance(getattr(plan, name), list | tuple):
                kind = type(getattr(plan, name)).__name__
                raise self._wrong(f"a plan's {name} must be a list or a tuple, got {kind}")
        for wish in plan.prefetches:
            self._refuse_unless(isinstance(wish, Prefetch), "a prefetch", wish)
            if not all(map(_is_whole, wish)):
                for name, value in zip(Prefetch._fields, wish, strict=True):
                    self._refuse_unless(_is_whole(value), f"{name} of a prefetch", value)
        for expert in plan.cancel:
            self._refuse_unless(_is_whole(expert), "an expert to cancel", expert)
        for pair in plan.reprioritise:
            known = isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_whole, pair))
            self._refuse_unless(known, "(expert, priority)", pair)
        for job in plan.jobs:
            known = isinstance(job, Job) and _is_amount(job.ops) and _is_amount(job.nbytes)
            self._refuse_unless(known, "a job", job)
        self._refuse_unless(_is_amount(plan.foreground_ops), "foreground_ops", plan.foreground_ops)
        self._refuse_unless(isinstance(plan.serve, Mapping), "serve", plan.serve)
        for how in plan.serve.values():
            known = isinstance(how, int | np.integer) and how in tuple(Serve)
            self._refuse_unless(known, "a way to serve", how)

    def _refuse_unless(self, known: bool, what: str, got: object) -> None:
        if not known:
            raise self._wrong(f"{what} cannot be {got!r:.80}; see Plan in moesim.types")

    def key(self, expert: int, precision: int = 0) -> int:
        """The key of what a plan names."""
        if not 0 <= expert < self._size or not 0 <= precision < self._precisions:
            raise self._wrong(
                f"a plan names expert {expert} in precision {precision}; ids lie in "
                f"0..{self._size - 1}, precisions in 0..{self._precisions - 1}"
            )
        return int(precision * self._size + expert)

    def replaced(self, wish: Prefetch, key: int, cache_of: Sequence[int]) -> int:
        """The key whose place a wish takes, or -1."""
        if wish.replaces < 0:
            return -1
        replaced = self.key(wish.replaces)
        if cache_of[replaced] != cache_of[key]:
            raise self._wrong(
                f"expert {wish.expert} cannot replace {wish.replaces}, which another cache holds"
            )
        return replaced

    def scores(self, keys: Sequence[int]) -> IntArray:
        """int64 worth of each key's expert now."""
        return self._worth(np.array(keys, np.int64))

    def _worth(self, experts: IntArray) -> IntArray:
        """Of keys, in an array that the policy may keep. A copy of lower precision is worth
        nothing beside a full one."""
        if self._precisions == 1:
            return self._of_experts(experts)
        low = experts >= self._size
        if low.any():
            experts %= self._size
            idle = low & (self._view.states[experts] == RESIDENT)
            worth = self._of_experts(experts).copy()
            worth[idle] = np.iinfo(np.int64).min
            return worth
        return self._of_experts(experts)

    def _of_experts(self, experts: IntArray) -> IntArray:
        worth = np.asarray(self.policy.scores(experts, self.event))
        if worth.dtype != INT64 or worth.shape != experts.shape:
            raise self._wrong(
                f"scores must be int64 [{len(experts)}], got {worth.dtype} {list(worth.shape)}"
            )
        return worth

    def in_order(
        self, candidates: list[int], lacking: int, why_not: Callable[[int], str]
    ) -> list[int]:
        """Candidates (ascending keys) in the order in which they may go, until ``lacking`` bytes
        are free; perhaps more of them. ``why_not`` tells what is wrong with another expert."""
        if not candidates:
            return []
        if not self.policy.scored:
            return self._named(candidates, lacking, why_not)
        return self.by_score(np.array(candidates, np.int64), lacking)

    def by_score(self, candidates: IntArray, lacking: int) -> list[int]:
        """``in_order`` of one or more candidates for a policy that is scored."""
        worth = self._worth(candidates.copy())
        least: int = candidates.item(worth.argmin())
        if self._bytes_of[least] >= lacking:
            return [least]
        ordered: list[int] = candidates[worth.argsort(kind="stable")].tolist()
        return ordered

    def below(self, candidates: list[int], key: int) -> list[int]:
        """Those worth less than what would come in their place."""
        worth = self.scores([*candidates, key])
        return [k for k, w in zip(candidates, worth[:-1], strict=True) if w < worth[-1]]

    def lesser(self, candidates: list[int], key: int, lacking: int) -> list[int] | None:
        """The least of those worth less than ``key`` whose bytes suffice; None if they do not."""
        worth = self.scores([*candidates, key])
        chosen: list[int] = []
        for i in np.argsort(worth[:-1], kind="stable"):
            if worth[i] >= worth[-1]:
                return None
            chosen.append(candidates[i])
            lacking -= self._bytes_of[candidates[i]]
            if lacking <= 0:
                return chosen
        return None

    def _named(
        self, candidates: list[int], lacking: int, why_not: Callable[[int], str]
    ) -> list[int]:
        """Victims that the policy names itself."""
        # Of two copies of an expert the lower precision goes first.
        allowed: dict[int, list[int]] = {}
        for key in sorted(candidates, reverse=True):
            allowed.setdefault(key % self._size, []).append(key)
        with self._view.offering(sorted(allowed)):
            answered = self.policy.victims(lacking, self._view)
            if not isinstance(answered, Iterable):
                raise self._wrong(f"victims() answered {type(answered).__name__}, not expert ids")
            named = list(answered)
        for expert in named:
            if not _is_whole(expert) or expert not in allowed:
                raise self._wrong(
                    f"victim {expert} is {self._reason(expert, why_not)}; "
                    "name experts of cache.candidates only"
                )
        if len(set(named)) < len(named):
            raise self._wrong("a victim was named twice")
        keys = [key for expert in named for key in allowed[expert]]
        if self._sum(keys) < min(lacking, self._sum(candidates)):
            raise self._wrong(f"victims free too little, {lacking} bytes are needed")
        return keys

    def _reason(self, expert: object, why_not: Callable[[int], str]) -> str:
        if not isinstance(expert, int | np.integer) or not 0 <= expert < self._size:
            return f"no expert id below {self._size}"
        return why_not(int(expert))

    def _sum(self, keys: list[int]) -> int:
        return sum(self._bytes_of[k] for k in keys)

    def _refuse_skipping(self, gate: Gate, plan: Plan) -> None:
        for expert in gate.experts[gate.status == MISS].tolist():
            if plan.serve.get(expert, Serve.FETCH) not in (Serve.FETCH, Serve.CPU):
                raise self._wrong(
                    f"skipping expert {expert} changes the result; declare the policy lossy"
                )

    def _wrong(self, what: str) -> PolicyError:
        return PolicyError(f"layer event {self.event}: {what}")


def _count(quality: Quality, gate: Gate, executed: AnyArray) -> None:
    """One layer event of a lossy policy."""
    source = gate.source
    chosen = source.token_experts
    kept = chosen != DROPPED
    agreed = (executed[:, :, None] == chosen[:, None, :]).any(axis=1) & kept
    quality.chosen += int(np.count_nonzero(kept))
    quality.agreed += int(np.count_nonzero(agreed))
    if source.gate is not None:
        quality.mass += _mass(source.gate, chosen)
        quality.mass_kept += _mass(source.gate, executed)
    elif source.weights is not None:
        quality.mass += int(source.weights[kept].sum())
        quality.mass_kept += int(source.weights[agreed].sum())


def _low(gate: Gate, plan: Plan, executed: AnyArray, per_layer: int) -> int:
    """Mass of what is executed in lower precision; the host has every expert in full."""
    assert gate.precisions is not None
    low = np.zeros(per_layer + 1, bool)
    low[gate.experts % per_layer] = gate.precisions > 0
    missing = gate.experts[gate.status == MISS].tolist() if plan.serve else []
    on_host = [e % per_layer for e in missing if plan.serve.get(e) == Serve.CPU]
    low[on_host] = False
    mask = (executed != DROPPED) & low[np.minimum(executed, per_layer)]
    source = gate.source
    if source.gate is not None:
        return _mass(source.gate, np.where(mask, executed, DROPPED))
    if source.weights is None:
        return 0
    # Weights belong to what was chosen, and only a policy without gates keeps to that.
    return int(source.weights[mask & (executed == source.token_experts)].sum())


def _mass(gate: AnyArray, experts: AnyArray) -> int:
    rows, ranks = (experts != DROPPED).nonzero()
    return int(gate[rows, experts[rows, ranks]].sum())


def _is_whole(value: object) -> bool:
    """An integer that every host can keep."""
    if type(value) is int:
        return -NEVER <= value <= NEVER
    known = isinstance(value, int | np.integer)
    return known and -NEVER <= int(value) <= NEVER  # type: ignore[call-overload]


def _is_amount(value: object) -> bool:
    return _is_whole(value) and int(value) >= 0  # type: ignore[call-overload]
