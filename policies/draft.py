"""Look-ahead by a draft of the next tokens: what speculative decoding could tell a cache (bound).

SP-MoE (arXiv 2510.10302) and MoE-SpeQ (arXiv 2511.14102) draft some tokens with a small model, and
prefetch the experts that the draft's tokens will need before the large model verifies them. Here
no model drafts: the experts of the next ``tokens`` forward passes are read from the recorded trace
itself, each named rightly with probability ``recall``, else with another expert of its layer in
its place. So every number rests on a *stated* recall, and on a future that only the trace knows:
it is a bound (FUTURE) and never ranked. Nothing is charged for drafting, and a pass verifies one
token: what verifying several at once does to the demand is not modelled.

A draft is finished before a pass begins: at every layer of a pass the rest of it and the ``tokens``
passes after it are known. Nearer needs come first. As SP-MoE's cutoff layer, a limit keeps far
needs from driving out near ones; its rule rests on profiled times, here as many experts are named
as the cache holds, the demand under way included. Past the end of a request the draft goes on with
the next one's prompt.

Draws are hashes of (seed, layer event, expert): a need is named alike as often as it is named.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import UsageError
from moesim.hashing import hash64
from moesim.protocol import CacheView, Future, PrefetchSeat, World
from moesim.types import NO_PLAN, ExpertId, Fact, Gate, IntArray, Needs, Plan, Prefetch

MOST_TOKENS = 64
DRAW_BITS = 53


def drafted(truth: IntArray, experts: int, share: int, seed: int, event: int) -> list[ExpertId]:
    """Kernel: a layer event's demand as a draft has it: each expert, or another of its layer.

    share : the recall in 2**-53.
    """
    draws = hash64(seed, event, truth) >> np.uint64(64 - DRAW_BITS)
    right = draws.astype(np.int64) < share
    if right.all():
        named: list[ExpertId] = truth.tolist()
        return named
    base = int(truth[0]) // experts * experts
    spare = sorted({*range(base, base + experts)} - {*truth.tolist()})
    named = []
    for expert, is_right in zip(truth.tolist(), right.tolist(), strict=True):
        if not is_right and spare:
            expert = spare.pop(int(hash64(seed, event, expert, 1)) % len(spare))
        named.append(expert)
    return named


@dataclass
class Draft(PrefetchSeat):
    """Prefetches what a draft of the next tokens says, at a stated recall (bound).

    tokens : forward passes known beyond the one under way.
    recall : how many of the needed experts the draft names rightly, 0 to 1.
    seed : of the draws.
    """

    name = "draft"
    source = "arXiv 2510.10302; 2511.14102"
    cost = "O(d L n) for d tokens"
    needs = Needs.FUTURE
    tokens: int = 1
    recall: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        """Some tokens, a share, a seed."""
        if not 0 <= self.tokens <= MOST_TOKENS:
            raise UsageError(f"prefetch.tokens={self.tokens}: must lie between 0 and {MOST_TOKENS}")
        if not 0 <= self.recall <= 1:
            raise UsageError(f"prefetch.recall={self.recall}: must lie between 0 and 1")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"prefetch.seed={self.seed}: must be 0 or more, and below 2**63")

    def begin(self, world: World) -> None:
        """Nothing is drafted."""
        assert world.future is not None
        self.world = world
        self.future: Future = world.future
        self.share = int(self.recall * (1 << DRAW_BITS))
        self.known: dict[int, list[ExpertId]] = {}

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        self.known.pop(fact.event, None)
        world = self.world
        passes = self.tokens * (world.layers - world.decode_from)
        last = fact.event + world.layers - 1 - fact.layer + passes
        room = [world.slots(layer) for layer in range(world.layers)]
        room = room if world.scope == "layer" else [min(room)]
        nearest: dict[ExpertId, int] = {}
        self._take(fact.experts.tolist(), -1, nearest, room)
        for event in range(fact.event + 1, min(last, self.future.events - 1) + 1):
            self._take(self._named(event), event, nearest, room)
        wishes = [Prefetch(e, event, -event) for e, event in nearest.items() if event >= 0]
        return Plan(prefetches=wishes)

    def _named(self, event: int) -> list[ExpertId]:
        if event not in self.known:
            truth = self.future.demand(event)
            made = drafted(truth, self.world.experts, self.share, self.seed, event)
            self.known[event] = made if len(truth) else []
        return self.known[event]

    def _take(
        self, experts: list[ExpertId], event: int, nearest: dict[ExpertId, int], room: list[int]
    ) -> None:
        """Name what its cache still has room for."""
        for expert in experts:
            cache = expert // self.world.experts if len(room) > 1 else 0
            if expert not in nearest and room[cache] > 0:
                nearest[expert] = event
                room[cache] -= 1
