"""SwapMoE's masked gating (ACL 2024, section 3.2, figure 5): a token goes to resident experts only.

The experts that the gate chose keep their ranks where they are routable; each other one gives way
to the likeliest routable expert that the token has not yet, ties by lowest id. So nothing is loaded
on demand. One resident set serves every sequence of a batch, and every stack.

The paper shows no formula. Three readings choose the same experts and differ in the gate value
(``gate_values``). Which one is meant changes no time and no load, only quality:

A: the mask comes before the softmax, so the residents share the whole mass (values grow).
B: the mask comes after it (values shrink).
C: the values of B, scaled so that the token keeps the mass of its own top k.

Where the model normalises its top k to 1, all three are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import NotRunError
from moesim.policies.importance import check_choice
from moesim.protocol import CacheView, RouteSeat, World
from moesim.types import (
    DROPPED,
    AnyArray,
    Evicted,
    ExpertId,
    Landed,
    LayerEvent,
    Needs,
    Note,
    State,
    Swap,
)

VARIANTS = ("A", "B", "C")
FEW = ("drop", "fetch")

RESIDENT = int(State.RESIDENT)


# ---- which experts -------------------------------------------------------------------------------


def masked(
    chosen: AnyArray, gate: AnyArray | None, routable: AnyArray, *, fetch: bool = False
) -> AnyArray:
    """Each token's top k among the routable: uint16 [T, k], by gate rank.

    Where fewer than k are routable, the last ranks are ``DROPPED``; or, with ``fetch``, the best of
    what the token lost. A slot that the model dropped stays dropped.

    Parameters
    ----------
    chosen : uint16 [T, k] of the unmasked gate, by rank.
    gate : [T, E] probabilities or scores, larger is likelier; None: all alike.
    routable : bool [E].
    """
    if len(chosen) == 1:
        return _masked_one(chosen, gate, routable, fetch)
    lost = (chosen != DROPPED) & ~routable[np.where(chosen == DROPPED, 0, chosen)]
    bent = chosen.copy()
    rows = np.flatnonzero(lost.any(axis=1))
    if len(rows):
        likely = np.zeros((len(rows), len(routable)), np.int64) if gate is None else gate[rows]
        bent[rows] = _filled(
            chosen[rows], lost[rows], _spare(chosen[rows], likely, routable), fetch
        )
    return bent


def _masked_one(
    chosen: AnyArray, gate: AnyArray | None, routable: AnyArray, fetch: bool
) -> AnyArray:
    """``masked`` of one token, as most are: a list is quicker than what many tokens take."""
    here: list[bool] = routable.tolist()
    named = [e for e in chosen[0].tolist() if e != DROPPED]
    kept = [e for e in named if here[e]]
    lost = [e for e in named if not here[e]]
    if lost:
        for e in named:
            here[e] = False
        spare = [e for e, is_open in enumerate(here) if is_open]
        if gate is not None:
            likely = gate[0].tolist()
            spare.sort(key=lambda e: -likely[e])
        kept += spare[: len(lost)]
        if fetch:
            kept += lost[: len(named) - len(kept)]
    bent = np.full(chosen.shape, DROPPED, np.uint16)
    bent[0, : len(kept)] = kept
    return bent if lost else chosen.copy()


def _spare(chosen: AnyArray, gate: AnyArray, routable: AnyArray) -> AnyArray:
    """uint16 [T, k]: the likeliest routable experts that a token has not chosen, then DROPPED."""
    tokens, top_k = chosen.shape
    experts = len(routable)
    row = np.arange(tokens)[:, None]
    # One column more takes what was dropped.
    is_open = np.zeros((tokens, experts + 1), bool)
    is_open[:, :experts] = routable
    is_open[row, np.minimum(chosen, experts)] = False
    # Largest first; what is not open comes last, whatever its value.
    order = np.lexsort((-gate, ~is_open[:, :experts]), axis=1)[:, :top_k]
    return np.where(is_open[row, order], order, DROPPED).astype(np.uint16)


def _filled(chosen: AnyArray, lost: AnyArray, spare: AnyArray, fetch: bool) -> AnyArray:
    """What a token keeps, then what stands in for what it lost; what was dropped comes last."""
    row = np.arange(len(chosen))[:, None]
    kept_first = np.where(chosen == DROPPED, 2, lost).argsort(axis=1, kind="stable")
    moved, is_lost = chosen[row, kept_first], lost[row, kept_first]
    rank = np.maximum(is_lost.cumsum(axis=1) - 1, 0)
    stand_in = spare[row, rank]
    if fetch:
        # The best of the lost take the places for which no expert is left.
        found = (spare != DROPPED).sum(axis=1, keepdims=True)
        first_lost = (~is_lost & (moved != DROPPED)).sum(axis=1, keepdims=True)
        at = np.clip(first_lost + rank - found, 0, chosen.shape[1] - 1)
        stand_in = np.where(rank < found, stand_in, moved[row, at])
    filled: AnyArray = np.where(is_lost, stand_in, moved)
    return filled


# ---- at which gate values ------------------------------------------------------------------------


def gate_values(
    probabilities: AnyArray,
    chosen: AnyArray,
    executed: AnyArray,
    routable: AnyArray,
    variant: str,
    *,
    normalised: bool,
) -> AnyArray:
    """What each executed expert's output is multiplied with: float64 [T, k], 0 where dropped.

    Parameters
    ----------
    probabilities : [T, E] of the unmasked gate.
    chosen, executed : uint16 [T, k], by the unmasked and by the masked gate.
    routable : bool [E].
    variant : A, B or C (see the module).
    normalised : whether the model makes its top k sum to 1; then the variants agree.
    """
    own = picked(probabilities, executed)
    total = own.sum(axis=1, keepdims=True)
    if normalised:
        return _shared(own, total, executed, np.ones_like(total))
    if variant == "B":
        return own
    if variant == "A":
        mass = np.where(routable, probabilities, 0).astype(np.float64).sum(axis=1, keepdims=True)
        return _shared(own, mass, executed, np.ones_like(mass))
    return _shared(own, total, executed, picked(probabilities, chosen).sum(axis=1, keepdims=True))


def picked(probabilities: AnyArray, experts: AnyArray) -> AnyArray:
    """float64 [T, k]: the probability of each expert, 0 where dropped."""
    there = experts != DROPPED
    at = np.where(there, experts, 0).astype(np.int64)
    values = np.take_along_axis(probabilities.astype(np.float64), at, axis=1)
    return np.where(there, values, 0.0)


def _shared(values: AnyArray, total: AnyArray, executed: AnyArray, mass: AnyArray) -> AnyArray:
    """``values`` scaled to ``mass``; in equal parts where a total is 0 (rounded probabilities)."""
    there = executed != DROPPED
    parts = np.where(there, mass / np.maximum(there.sum(axis=1, keepdims=True), 1), 0.0)
    scaled: AnyArray = np.where(total > 0, values * (mass / np.where(total > 0, total, 1)), parts)
    return scaled


def mass_kept(probabilities: AnyArray, chosen: AnyArray, executed: AnyArray) -> AnyArray:
    """float64 [T]: gate mass of the executed experts over that of the chosen ones (1 if none).

    The same for all variants: what they do with the rest is ``gate_values``.
    """
    wanted = picked(probabilities, chosen).sum(axis=1)
    kept = picked(probabilities, executed).sum(axis=1)
    share: AnyArray = np.where(wanted > 0, kept / np.where(wanted > 0, wanted, 1), 1.0)
    return share


# ---- which residents -----------------------------------------------------------------------------


class Retired:
    """Residents that a gate may use no more: a newcomer has taken their place.

    Their bytes are the spare room, and go when the next newcomer needs them.
    """

    def __init__(self, size: int) -> None:
        self.mask = np.zeros(size, bool)
        """bool [layers * experts]."""
        self.leaving: dict[ExpertId, ExpertId] = {}
        """Newcomer -> who retires when it lands."""

    def swapped(self, swaps: Sequence[Swap], states: AnyArray) -> None:
        """Swaps of a plan: done at once where the newcomer is resident, else when it lands."""
        for comes, goes in swaps:
            if goes < 0:
                self.leaving.pop(comes, None)
            elif states[comes] == RESIDENT:
                self.mask[comes] = False
                self.mask[goes] = True
            else:
                self.leaving[comes] = goes

    def note(self, fact: Note) -> None:
        """A newcomer has landed, or never will; a retired one has gone."""
        if fact.precision:
            return
        self.mask[fact.expert] = False
        if isinstance(fact, Evicted):
            # Whose bytes its very successor takes has gone before that one lands.
            gone = [comes for comes, goes in self.leaving.items() if goes == fact.expert]
            for comes in gone:
                del self.leaving[comes]
            return
        goes = self.leaving.pop(fact.expert, -1)
        if isinstance(fact, Landed) and goes >= 0:
            self.mask[goes] = True


def slots_of(world: World) -> list[int]:
    """Experts that each layer may hold: at scope global the same number in every layer."""
    if world.scope == "layer":
        held = [world.slots(layer) for layer in range(world.layers)]
    else:
        held = [sum(world.capacity_bytes) // int(world.expert_bytes[0].sum())] * world.layers
    return [min(n, world.experts) for n in held]


@dataclass
class MaskedGate(RouteSeat):
    """Sends each token to its top k among the resident experts (lossy).

    few : what happens where fewer than k are resident, as after a cold start: ``drop`` executes
        fewer, ``fetch`` loads the best of the missing ones on demand.
    variant : A, B or C, the gate values that a quality measure takes (see the module).
    """

    name = "masked"
    source = "ACL 2024, 2024.acl-long.363, section 3.2"
    cost = "O(T E log E)"
    lossy = True
    needs = Needs.GATE
    few: str = "drop"
    variant: str = "C"

    def __post_init__(self) -> None:
        """Known names."""
        check_choice("route.few", self.few, FEW)
        check_choice("route.variant", self.variant, VARIANTS)

    def begin(self, world: World) -> None:
        """Room for the experts of a token in every layer."""
        self.world = world
        self.retired = Retired(world.size)
        least = min(slots_of(world))
        if least < world.top_k:
            raise NotRunError(
                f"not run: --capacity leaves room for {least} experts in a layer, and a token of "
                f"masked routing takes {world.top_k}; give at least {world.top_k}/layer"
            )

    def swapped(self, swaps: Sequence[Swap], cache: CacheView) -> None:
        """Who may be used from when on."""
        self.retired.swapped(swaps, cache.states)

    def note(self, fact: Note) -> None:
        """Landings and evictions."""
        self.retired.note(fact)

    def routable(self, layer: int, cache: CacheView) -> AnyArray:
        """bool [E]: the experts of a layer that may be used now."""
        return routable(layer, self.world.experts, cache.states, self.retired)

    def route(self, event: LayerEvent, cache: CacheView) -> AnyArray | None:
        """None where all that was chosen is there."""
        here = self.routable(event.layer, cache)
        chosen = event.token_experts
        if here[chosen[chosen != DROPPED]].all():
            return None
        return masked(chosen, event.gate, here, fetch=self.few == "fetch")


def routable(layer: int, experts: int, states: AnyArray, retired: Retired) -> AnyArray:
    """bool [E]: the residents of a layer that have not retired."""
    own = slice(layer * experts, (layer + 1) * experts)
    here: AnyArray = (states[own] == RESIDENT) & ~retired.mask[own]
    return here
