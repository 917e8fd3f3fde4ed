"""AdapMoE's prefetch (arXiv 2408.10284): the first absent expert ahead. Lossless.

At a layer's gate the next layer's gate is applied to the same hidden state, and of the experts that
it names, best first, the first that is absent is prefetched. If all are there, the layer after that
is looked at, and so on: the distance adapts to what is cached. Needs AHEAD (the trace's ``ahead``
columns, one for each layer looked ahead).

Where the source is silent: ``distance`` layers are looked at (3; the released code has the walk but
looks at the next layer alone, ``distance=1``). What waits in the queue or is on its way counts as
there. Of several tokens the first come first, by rank; the released code does not prefetch in a
prefill. One expert is planned at each gate. A prefetch whose layer has passed leaves the queue.

AdapMoE's gating by sensitivity (fewer experts where a token needs them less) changes what is
computed. It is lossy, and not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.policies.gates_ahead import GatesAhead
from moesim.policies.next_gate import in_order
from moesim.protocol import CacheView
from moesim.types import NO_PLAN, Fact, Gate, Plan, Prefetch, State

ABSENT = int(State.ABSENT)


@dataclass
class FirstAbsent(GatesAhead):
    """Prefetches the first predicted expert that is absent, along the next layers.

    distance : layers looked ahead at most.
    width : predicted experts looked at of each token, best first; 0 takes the model's top k.
    """

    name = "first-absent"
    source = "arXiv 2408.10284"
    cost = "O(T M)"

    def plan(self, fact: Fact, cache: CacheView) -> Plan:
        """At each gate."""
        if not isinstance(fact, Gate):
            return NO_PLAN
        width = self.width or self.world.top_k
        for distance in self.distances:
            target = fact.layer + distance
            if target >= self.world.layers or distance not in fact.source.ahead:
                break
            rows = fact.source.ahead[distance][:, :width]
            for expert in in_order(rows.reshape(-1), target * self.world.experts):
                if cache.states[expert] == ABSENT:
                    return Plan(prefetches=[Prefetch(expert, fact.event + distance)])
        return NO_PLAN
