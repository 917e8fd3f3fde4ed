"""KTransformers' placement: which experts live on the device; the host computes the rest. Lossless.

After its documentation (kt-kernel, expert scheduling). ``strategy`` chooses the set that the run
starts with (``--initial policy``, the preset's), as many of this order as fit:

- ``uniform``: equally many of each layer. It asks for no statistics, so a layer's lowest ids.
- ``frequency``: the most used of all layers together on the calibration trace.
- ``front-loading``: the first layers whole.
- ``random``: by chance, a hash of ``SEED`` and the run's seed.

``dynamic`` says how the set changes while serving; each newcomer is copied in the background in the
place of one resident of its layer, so that a layer keeps its number:

- ``none``: not at all.
- ``prefill``: at the gates of a prompt of ``threshold`` tokens or more (KTransformers: 512), the
  layer's residents become its experts with the most tokens in the prompt so far. KTransformers has
  such a prompt's weights on the device anyway; here the copies are charged.
- ``recent``: at each gate at most one swap, if the best absent expert's uses, fading by ``gamma``
  at each event of the layer, exceed (1 + ``gain``) times those of the worst resident (the rule of
  ONNX Runtime's design for an expert cache).

Needs CALIBRATION, for ``frequency`` alone, whatever is chosen: a seat declares one need. Use it
with ``miss=cpu`` (the preset), where nothing else moves; KTransformers' deferral of experts to the
next layer is lossy, and not here.

Where the source is silent: equal numbers change nothing; the lowest id comes, and goes, first. A
swap that waits for the link stays planned. Statistics of long prompts that begin while one is
prefilled begin anew for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.hashing import hash64
from moesim.policies.importance import check_choice
from moesim.protocol import CacheView, PrefetchSeat, World
from moesim.types import (
    NO_PLAN,
    PROBABILITY_ONE,
    AnyArray,
    Dropped,
    ExpertId,
    Fact,
    Gate,
    IntArray,
    Landed,
    Needs,
    Note,
    Phase,
    Plan,
    Prefetch,
    RequestBegin,
    RequestEnd,
    State,
)

ONE = PROBABILITY_ONE
STRATEGIES = ("uniform", "frequency", "front-loading", "random")
DYNAMICS = ("none", "prefill", "recent")
SEED = 42
"""KTransformers' own."""

ABSENT, RESIDENT = int(State.ABSENT), int(State.RESIDENT)


def order(strategy: str, world: World) -> list[ExpertId]:
    """Expert ids, the first wanted first."""
    ids = np.arange(world.size)
    if strategy == "uniform":
        ids = ids.reshape(world.layers, world.experts).T.reshape(-1)
    elif strategy == "random":
        ids = np.argsort(hash64(SEED, world.seed, ids), kind="stable")
    elif strategy == "frequency":
        assert world.calibration is not None
        ranked = np.argsort(-world.calibration, kind="stable")
        ids = ranked[world.calibration[ranked] > 0]
    return [int(e) for e in ids]


def exchanges(worth: IntArray, out: AnyArray, inside: AnyArray, gain: int) -> list[tuple[int, int]]:
    """Kernel: (comes, goes) local ids, best newcomer for worst resident, then the next.

    out, inside : bool [E], who may come and who may go. gain : in 1/16384 of the resident's worth.
    """
    comes = [int(e) for e in np.argsort(-worth, kind="stable") if out[e]]
    goes = [int(e) for e in np.argsort(worth, kind="stable") if inside[e]]
    made = []
    for new, old in zip(comes, goes, strict=False):
        if int(worth[new]) * ONE <= int(worth[old]) * (ONE + gain):
            break
        made.append((new, old))
    return made


@dataclass
class Placement(PrefetchSeat):
    """A set of experts on the device, which may follow prompts or recent use.

    strategy : uniform, frequency, front-loading or random.
    dynamic : none, prefill or recent.
    threshold : tokens of a prompt from which it is followed (dynamic=prefill).
    gain : by how much a newcomer's uses must exceed a resident's (dynamic=recent).
    gamma : what remains of uses at the next event of the layer (dynamic=recent), above 0 to 0.9995.
    """

    name = "placement"
    source = "KTransformers"
    cost = "O(L E log E) a new set"
    needs = Needs.CALIBRATION
    strategy: str = "frequency"
    dynamic: str = "none"
    threshold: int = 512
    gain: float = 0.1
    gamma: float = 0.95

    def __post_init__(self) -> None:
        """Known names, numbers in their range."""
        check_choice("prefetch.strategy", self.strategy, STRATEGIES)
        check_choice("prefetch.dynamic", self.dynamic, DYNAMICS)
        if self.threshold < 1:
            raise UsageError(f"prefetch.threshold={self.threshold}: must be 1 or more")
        if not 0 <= self.gain <= 1024:
            raise UsageError(f"prefetch.gain={self.gain}: must lie between 0 and 1024")
        if not 0 < self.gamma <= 0.9995:
            raise UsageError(f"prefetch.gamma={self.gamma}: must lie above 0 and at most 0.9995")

    def begin(self, world: World) -> None:
        """Nothing was seen."""
        self.world = world
        self.uses = np.zeros((world.layers, world.experts), np.int64)
        self.long: set[int] = set()
        """Requests whose prompts are followed."""
        self.places: dict[ExpertId, ExpertId] = {}
        """Newcomer on its way -> whose place it takes."""

    def initially(self, world: World) -> Sequence[ExpertId]:
        """The strategy's order."""
        return order(self.strategy, world)

    def note(self, fact: Note) -> None:
        """A newcomer is there, or will not come."""
        if isinstance(fact, Landed | Dropped):
            self.places.pop(fact.expert, None)

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """Swaps, where the set is dynamic."""
        if self.dynamic == "prefill":
            return self._follow_prompts(fact, cache)
        if self.dynamic == "recent" and isinstance(fact, Gate):
            uses = self.uses[fact.layer]
            uses[:] = uses * round(self.gamma * ONE) >> 14
            uses[fact.experts - fact.layer * self.world.experts] += ONE
            return self._swaps(fact.layer, cache, round(self.gain * ONE), 1)
        return NO_PLAN

    def _follow_prompts(self, fact: Fact, cache: CacheView) -> Plan:
        if isinstance(fact, RequestBegin) and fact.prompt_tokens >= self.threshold:
            self.long.add(fact.request)
            self.uses[:] = 0
        elif isinstance(fact, RequestEnd):
            self.long.discard(fact.request)
        elif isinstance(fact, Gate) and self._count_prompts(fact):
            return self._swaps(fact.layer, cache, 0, self.world.experts)
        return NO_PLAN

    def _count_prompts(self, gate: Gate) -> bool:
        """Count the tokens of long prompts; whether there were any."""
        found = False
        for slot in gate.source.slots:
            if slot.phase == Phase.PREFILL and slot.request in self.long:
                chosen = gate.source.token_experts[slot.first : slot.first + slot.tokens]
                real = chosen[chosen < self.world.experts]
                self.uses[gate.layer] += np.bincount(real, minlength=self.world.experts)
                found = True
        return found

    def _swaps(self, layer: int, cache: CacheView, gain: int, most: int) -> Plan:
        first = layer * self.world.experts
        states = cache.states[first : first + self.world.experts]
        inside = states == RESIDENT
        for leaving in self.places.values():
            if 0 <= leaving - first < self.world.experts:
                inside[leaving - first] = False
        made = exchanges(self.uses[layer], states == ABSENT, inside, gain)[:most]
        wishes = [Prefetch(first + comes, replaces=first + goes) for comes, goes in made]
        self.places |= {w.expert: w.replaces for w in wishes}
        return Plan(prefetches=wishes) if wishes else NO_PLAN
