"""A plan and what it has to beat, in the same memory: what to measure on the model itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.capacity import Capacity
from moesim.planning.file import Plan, Planned
from moesim.planning.space import Slots, capacity_of
from moesim.planning.trials import initial_experts
from moesim.types import IntArray

STATIC = ("prune-importance", "prune-magnitude", "prune-random")
"""Sets that never change. They need no spare slot, so they hold more experts in the same memory."""
ON_DEMAND = "lru"


@dataclass(frozen=True, slots=True)
class Contestant:
    """``run.capacity`` has no ``starts`` where the policy chooses its own first set."""

    name: str
    run: Planned


def contestants(plan: Plan, uses: IntArray) -> list[Contestant]:
    """The plan first, then its alternatives, fixed sets, and loads on demand.

    uses : int64 [layers, experts] of the trace that the plan was made on: every allocation of the
        plan's policy starts from its most used experts, as the plan does.
    """
    found = [Contestant(f"{plan.method} (the plan)", _swapping(plan, plan.slots, uses))]
    seen = {plan.slots}
    for one in plan.alternatives:
        if one.slots and one.slots not in seen:
            seen.add(one.slots)
            found.append(Contestant(one.name, _swapping(plan, one.slots, uses)))
    uniform = _static_capacity(plan)
    found += [Contestant(name, Planned(name, (), uniform)) for name in STATIC]
    by_use = next((a.slots for a in plan.alternatives if a.name == "importance"), ())
    for how, slots in (("as the plan", plan.slots), ("by use", by_use)):
        if slots:
            shared = Planned(STATIC[0], (), _static_capacity(plan, slots))
            found.append(Contestant(f"{STATIC[0]}, shared out {how}", shared))
    found.append(Contestant("on demand", Planned(ON_DEMAND, (), uniform)))
    return found


def _swapping(plan: Plan, slots: Slots, uses: IntArray) -> Planned:
    capacity = capacity_of(plan.space, np.array(slots, np.int64))
    return Planned(
        plan.policy, plan.settings, replace(capacity, starts=tuple(initial_experts(uses, slots)))
    )


def _static_capacity(plan: Plan, slots: Slots = ()) -> Capacity:
    """Room without spare slots: as many experts of every layer as fit, or shared out as ``slots``
    with a spare slot each are."""
    space = replace(plan.space, spare="none")
    if slots:
        held = np.array(slots, np.int64) + (plan.spare == "layer")
        return capacity_of(space, np.minimum(held, plan.experts))
    room = plan.budget_bytes - plan.fixed_bytes
    held = np.full(plan.layers, min(plan.experts, room // sum(plan.expert_bytes)), np.int64)
    return capacity_of(space, held)
