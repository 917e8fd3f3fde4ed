"""What an offloaded model is asked to do, looked up: policy, world, first residents.

The counterpart of ``moesim.configuration`` for runs without a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from moesim.capacity import Capacity, parse_capacity
from moesim.configuration import Configuration, Request
from moesim.costs import Costs, make_costs
from moesim.errors import NotRunError, UsageError
from moesim.past import Past, past_facts
from moesim.profile import HardwareProfile, load_hardware
from moesim.protocol import Policy, SeatPolicy, World, has_mixed, initially
from moesim.real.offload_bank import HostBank
from moesim.registry import PolicySpec, resolve
from moesim.result import source_digest
from moesim.serving import Setup
from moesim.shape import all_precisions, decode_from, expert_norms, fitting
from moesim.traces.schema import TraceMeta
from moesim.types import ExpertId, IntArray, Needs
from moesim.workload import Inputs, StaticBatch


class Decided(Protocol):
    """The part of a plan that determines a run (``moesim.planning.file.Planned``)."""

    @property
    def policy(self) -> str:
        """Its name."""

    @property
    def settings(self) -> tuple[str, ...]:
        """As ``--set``."""

    @property
    def capacity(self) -> Capacity:
        """With the experts that are there at the start."""


class PlanLike(Protocol):
    """What `moesim plan` decided (``moesim.planning.file.load_plan`` reads one)."""

    def run(self, layers: int, experts: int, expert_bytes: Sequence[int]) -> Decided:
        """What a model of this shape is given. Raises UsageError if the plan is for another."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an offloaded model is served. Names are those of the command line.

    policy : a name, ``module:Class``, or what makes a fresh policy.
    capacity : as on the command line, or one that is read already.
    settings : as ``--set``: ``seat=name`` or ``seat.parameter=value``.
    hardware : profile of the link's chunks and latency, by name or path.
    paced : copies take at least the time that the profile's link takes.
    calibration : a trace that policies learn from.
    initial : cold, static, policy or file, with ``initial_experts``; "": as the policy is made for.
    plan : decides policy, capacity and first residents, and settings before ``settings``.
    steady : copies take effect where an expert is waited for and where a pass ends, so that what a
        policy decides does not depend on time. For qualities: times then mean nothing.
    watchdog_s : how long a thread, or the policy, may be silent with work under way.
    out : where to keep each run, with its fact log.
    """

    policy: str | Callable[[], Policy] = "lru"
    capacity: str | Capacity = "25%"
    settings: tuple[str, ...] = ()
    scope: str = "global"
    hardware: str | HardwareProfile = "rtx4090"
    paced: bool = False
    calibration: Path | None = None
    initial: str = ""
    initial_experts: tuple[ExpertId, ...] = ()
    seed: int = 0
    watchdog_s: float = 120.0
    timeline: bool = False
    out: Path | None = None
    plan: PlanLike | None = None
    steady: bool = False


class Asked:
    """Options for a model whose gates are known, with everything looked up.

    Raises
    ------
    MoesimError
        For a mistake in the options.
    """

    def __init__(self, options: Options, meta: TraceMeta) -> None:
        if options.steady and options.out is not None:
            raise UsageError("--out: a steady run has no order of reports to follow; leave it out")
        self.options = options
        self.meta = meta
        self.model = meta.model
        hardware = options.hardware
        self.hardware = load_hardware(hardware) if isinstance(hardware, str) else hardware
        self.costs: Costs = make_costs(self.model, self.hardware)
        self.capacity: Capacity
        if options.plan is not None:
            self.options = options = self._planned(options.plan)
        given = options.capacity
        self.capacity = (
            given
            if isinstance(given, Capacity)
            else parse_capacity(given, options.scope, self.model.expert_bytes_table(), meta.experts)
        )
        self.spec = _spec(options)
        policy = self.build()
        if has_mixed(policy):
            raise NotRunError(
                f"not run: {self.name} executes experts in low precision, and real execution holds "
                "one; replay it"
            )
        distances = policy.prefetch.distances if isinstance(policy, SeatPolicy) else (1,)
        self.inputs = Inputs(policy.needs, distances)
        self.lossy = policy.lossy
        if self.lossy:
            # Bent routing is weighed by the gate.
            self.inputs = Inputs(policy.needs | Needs.GATE, distances)

    def _planned(self, plan: PlanLike) -> Options:
        """The options with what the plan decided."""
        sizes = self.model.expert_bytes_table().tolist()
        decided = plan.run(self.meta.layers, self.meta.experts, sizes)
        return replace(
            self.options,
            policy=decided.policy,
            capacity=decided.capacity,
            settings=(*decided.settings, *self.options.settings),
            plan=None,
        )

    @property
    def name(self) -> str:
        """Of the policy."""
        return self.spec.name

    def build(self) -> Policy:
        """A fresh policy."""
        made = self.options.policy
        return self.spec.build() if isinstance(made, str) else made()

    def setup(self, policy: Policy, bank: HostBank) -> Setup:
        """What a server is given."""
        world = self._world(bank)
        initial, charged = self._initial(policy, world)
        return Setup(policy, world, self.costs, StaticBatch(), initial, charged)

    # ---- the world -------------------------------------------------------------------------------

    def _world(self, bank: HostBank) -> World:
        needs, meta = self.inputs.needs, self.meta
        if Needs.NORMS in needs and meta.expert_norms is None:
            meta = self.meta = replace(meta, expert_norms=norms_of(bank))
        past = self._past
        wants = Needs.CALIBRATION in needs
        if wants and past is None:
            raise NotRunError(
                f"not run: {self.name} needs CALIBRATION; name a trace of this model with "
                "--calibration"
            )
        return World(
            layers=meta.layers,
            experts=meta.experts,
            top_k=meta.top_k,
            expert_bytes=all_precisions(self.model),
            capacity_bytes=self.capacity.capacity_bytes,
            scope=self.capacity.scope,
            decode_from=decode_from(meta),
            seed=self.options.seed,
            costs=self.costs,
            calibration=past.uses if past is not None and wants else None,
            expert_norms=expert_norms(meta),
            past=self._facts() if Needs.PAST in needs else None,
        )

    @cached_property
    def _past(self) -> Configuration | None:
        """The calibration trace."""
        path = self.options.calibration
        if path is None:
            return None
        made = Configuration(
            Request(trace=path, hardware=self.hardware, costs=self.model, capacity="100%")
        )
        shape = (self.meta.layers, self.meta.experts)
        if (made.meta.layers, made.meta.experts) != shape:
            raise UsageError(
                f"--calibration {path}: has {made.meta.layers} layers of {made.meta.experts} "
                f"experts, the model {shape[0]} of {shape[1]}; use a trace of the same model"
            )
        return made

    def _facts(self) -> Past | None:
        past = self._past
        if past is None:
            return None
        return lambda: past_facts(past.works(self.inputs), self.meta.experts)

    # ---- the first residents ---------------------------------------------------------------------

    @property
    def initial_kind(self) -> str:
        """cold, static, policy, file or all."""
        if self.capacity.starts is not None:
            return "file"
        return self.spec.initial if self.spec.initial == "all" else self._asked_initial

    @property
    def _asked_initial(self) -> str:
        return self.options.initial or self.spec.initial

    def _initial(self, policy: Policy, world: World) -> tuple[list[ExpertId], bool]:
        kind = self.initial_kind
        if kind == "cold":
            return [], True
        if kind == "file":
            return fitting(self._listed, world, "slots"), False
        if kind == "all":
            return fitting(range(world.size), world, "slots"), False
        if kind == "policy":
            # What keeps the log of a policy is not made of seats itself.
            inner = getattr(policy, "inner", policy)
            return fitting(initially(inner, world), world, "slots"), True
        return fitting(self._most_used(), world, "slots"), True

    @property
    def _listed(self) -> tuple[ExpertId, ...]:
        """The first residents by name: those of a plan, or of a file."""
        starts = self.capacity.starts
        return self.options.initial_experts if starts is None else starts

    def _most_used(self) -> list[ExpertId]:
        past = self._past
        if past is None:
            raise NotRunError(
                f"not run: {self.name} starts from the most used experts; name a trace of this "
                "model with --calibration, or start cold (--initial cold)"
            )
        uses: IntArray = past.uses
        return [int(e) for e in np.argsort(-uses, kind="stable") if uses[e]]

    # ---- what is said of it ----------------------------------------------------------------------

    def manifest(self, trace: str | None, batch: int) -> dict[str, Any]:
        """All that determines the run; a replay's has the same keys."""
        options = self.options
        calibration = self._past
        return {
            "schema": 1,
            "source_digest": source_digest(),
            "trace": trace,
            "policy": {"name": self.name, "seats": self.spec.manifest()},
            "capacity": {
                "scope": self.capacity.scope,
                "bytes": list(self.capacity.capacity_bytes),
            },
            "capacity_as_typed": self.capacity.text,
            "set": list(options.settings),
            "model": self.model.to_dict(),
            "costs": None,
            "hardware": self.hardware.to_dict(),
            "order": "ready",
            "flat": False,
            "allocator": "slots",
            "kv": "apart",
            "batch": batch,
            "chunk_tokens": 0,
            "arrivals": "back-to-back",
            "limit": None,
            "seed": options.seed,
            "allowed": [],
            "initial": self.initial_kind,
            "initial_experts": list(self._listed),
            "calibration": calibration.meta.digest if calibration else None,
            "split": None,
            "routing": "free",
        }

    def facts(self) -> dict[str, Any]:
        """What a summary says of its run before any number."""
        return {
            "policy": self.name,
            "set": list(self.options.settings),
            "capacity": self.capacity.text,
            "capacity_bytes": sum(self.capacity.capacity_bytes),
            "scope": self.capacity.scope,
            "mode": "group",
            "oracle": False,
            "lossy": self.lossy,
            "allowed": [],
            "sizes_equal": len(set(self.model.expert_bytes_table().tolist())) == 1,
            "initial": self.initial_kind,
        }


def norms_of(bank: HostBank) -> tuple[tuple[float, ...], ...]:
    """Frobenius norm of all matrices of each expert, [layers][experts]."""
    norms = []
    for layer, count in enumerate(bank.counts):
        squares = torch.zeros(count, dtype=torch.float64)
        for expert in range(count):
            for name, weight in bank.views(layer, expert).items():
                if weight.dim() >= 2 and "bias" not in name:
                    norm = torch.linalg.vector_norm(weight, dtype=torch.float32)
                    squares[expert] += float(norm) ** 2
        norms.append(tuple(squares.sqrt().tolist()))
    return tuple(norms)


def _spec(options: Options) -> PolicySpec:
    made = options.policy
    if isinstance(made, str):
        return resolve([made], options.settings)[0]
    if options.settings:
        raise UsageError(f"--set {options.settings[0]}: the policy is given as an object")
    kind = made if isinstance(made, type) else type(made())
    return PolicySpec(kind.__name__, factory=f"{kind.__module__}:{kind.__qualname__}")
