"""What every host does whatever its clock: it tells the policy, judges, books, and applies plans.

A ``Desk`` neither waits nor works. A host derives from it and says when things happen: the time,
how an expert runs on the host, who does a job.
"""

from __future__ import annotations

import numpy as np

from moesim import log
from moesim.answers import Answers
from moesim.ledger import ABSENT, RESIDENT, Ledger
from moesim.loads import Loads, Transfer
from moesim.precision import enough, serving
from moesim.protocol import Policy, World
from moesim.several import Several
from moesim.tally import RequestTimes, Tally
from moesim.types import (
    NEVER,
    AnyArray,
    Fact,
    Gate,
    IntArray,
    Job,
    JobDone,
    Phase,
    Plan,
    Prefetch,
    Routed,
    Serve,
    Status,
)
from moesim.workload import Demand, Item, Part, Step, begin_facts, end_facts, union

HIT, LATE, MISS = map(int, Status)

JUDGED = np.array([MISS, MISS, LATE, HIT], np.uint8)
"""Status at the gate by ``State``: what only waits in the queue is a miss."""


class Desk:
    """The part of a host that has no clock.

    A host sets ``world``, ``tally``, ``ledger``, ``answers`` and ``loads``, and defines ``now``,
    ``run_on_host`` and ``submit``.
    """

    world: World
    tally: Tally
    ledger: Ledger
    answers: Answers
    loads: Loads | Several[Loads]

    def __init__(self) -> None:
        self.times: dict[int, RequestTimes] = {}
        """By place in the trace."""
        self._unserved: frozenset[int] = frozenset()
        """Misses of a gate whose demand is not yet on the link."""
        self.keys: IntArray = np.zeros(0, np.int64)
        """The copies that serve the newest layer event, in demand order."""
        self._named: dict[int, set[int]] = {}

    @property
    def policy(self) -> Policy:
        """The policy that it runs."""
        return self.answers.policy

    # ---- what a host defines ---------------------------------------------------------------------

    def now(self) -> int:
        """The time in ns; it enters results and no decision."""
        raise NotImplementedError

    def run_on_host(self, key: int, tokens: int, layer: int) -> None:
        """Begin to compute a missing expert on the host."""
        raise NotImplementedError

    def submit(self, job: Job) -> None:
        """Begin a policy's background work."""
        raise NotImplementedError

    # ---- a step ----------------------------------------------------------------------------------

    def begin_step(self, step: Step) -> None:
        """Note who begins, and tell the policy."""
        for part in step.parts:
            work = part.work
            if part.number == 0 and part.begins:
                now, prompt = self.now(), work.rows.facts.prompt_tokens or 0
                arrival = now if work.arrival_ns is None else work.arrival_ns
                self.times[work.index] = RequestTimes(work.rows.request, arrival, now, prompt)
        for fact, phase in begin_facts(step):
            self.tell(fact, phase)

    def end_step(self, step: Step) -> None:
        """Note who has ended, and tell the policy."""
        for part in step.parts:
            if part.ends:
                self._end(part)
        for fact in end_facts(step):
            self.tell(fact, Phase.DECODE)
        self.tally.steps += 1

    def _end(self, part: Part) -> None:
        times = self.times[part.work.index]
        times.output_tokens += 1
        if times.first_token_ns < 0:
            times.first_token_ns = self.now()
        if part.number == part.work.iterations - 1:
            times.end_ns = self.now()

    def tally_of(self, key: int) -> Tally:
        """What counts the accesses and loads of a key."""
        return self.tally

    def misses(self) -> int:
        """Misses so far."""
        whole = (self.tally, *self.tally.devices)
        return sum(counts.misses for tally in whole for counts in tally.phases)

    # ---- a gate ----------------------------------------------------------------------------------

    def gate(self, item: Item) -> tuple[Gate, Plan]:
        """Route, judge, pin, and ask for a plan."""
        source, demand = item.event, item.demand
        self.tally.events += 1
        self.answers.event = source.event
        routed = self.answers.route(source)
        if routed.experts is not None:
            demand = union(source, self.world.experts, routed.experts)
        precisions = self._precisions(item, demand, routed)
        keys = self.keys = (
            demand.experts
            if precisions is None
            else demand.experts + precisions.astype(np.int64) * self.world.size
        )
        status = JUDGED[self.ledger.state[keys]]
        gate = Gate(source, demand.experts, demand.tokens, status, demand.phases, precisions)
        self._unserved = frozenset(keys[status == MISS].tolist())
        members = set(keys.tolist())
        self.loads.begin(members)
        self.ledger.pinned |= members
        self._log_gate(gate)
        self._count_named(gate, members)
        self._claim(gate)
        self.loads.expire()
        return gate, self.answers.plan(gate)

    def _precisions(self, item: Item, demand: Demand, routed: Routed) -> AnyArray | None:
        """Of the copies that serve, uint8 [n]; None: all in full."""
        if routed.precisions is None:
            return None
        chosen = item.event.token_experts if routed.experts is None else routed.experts
        allowed = enough(demand.experts, chosen, routed.precisions, self.world.experts)
        return serving(demand.experts, allowed, self.ledger.state.reshape(-1, self.world.size))

    def _log_gate(self, gate: Gate) -> None:
        words = (self.keys * 4 + gate.status).tolist()
        head = (gate.event, gate.layer, len(words), log.DEMAND)
        self.loads.log.add(log.GATE, self.now(), *head, *words)
        self.loads.decisions.add(log.GATE, *head, *words)

    def _count_named(self, gate: Gate, members: set[int]) -> None:
        named = self._named.pop(gate.event, None)
        if named is not None:
            self.tally.named += len(named)
            self.tally.predicted += len(named & members)

    def _claim(self, gate: Gate) -> None:
        """What the gate settles without the policy: hits are used, loads under way promoted."""
        loads, tally = self.loads, self.tally
        nbytes: dict[int, int] = {}
        late: list[int] = []
        rows = zip(self.keys.tolist(), gate.status.tolist(), gate.phases.tolist(), strict=True)
        for key, status, phase in rows:
            cache = self.ledger.cache_of[key]
            nbytes[cache] = nbytes.get(cache, 0) + self.ledger.bytes_of[key]
            self.tally_of(key).phases[phase].judged(status, self.ledger.copy_bytes[key])
            if status == HIT:
                loads.of(key).use(key)
            elif status == LATE:
                late.append(key)
            else:
                loads.of(key).miss(key)
        loads.promote(late)
        tally.largest_union_bytes = max(tally.largest_union_bytes, sum(nbytes.values()))
        tally.overflows += any(n > self.ledger.capacity[cache] for cache, n in nbytes.items())

    def demand(self, gate: Gate, plan: Plan) -> list[int]:
        """Serve the misses; the keys that the compute lane must wait for."""
        self._unserved = frozenset()
        missing: list[Transfer] = []
        for order in np.flatnonzero(gate.status == MISS).tolist():
            key = int(self.keys[order])
            how = plan.serve.get(int(gate.experts[order]), Serve.FETCH)
            if how == Serve.FETCH:
                self.tally.served["fetch"] += 1
                phase, staged = Phase(gate.phases[order]), self.policy.bypass
                missing.append(
                    self.loads.of(key).transfer(key, phase, order, prefetch=False, staged=staged)
                )
            else:
                self._serve_apart(gate, order, key, how)
        self.loads.demand(missing)
        late: list[int] = self.keys[gate.status == LATE].tolist()
        return [*late, *(transfer.key for transfer in missing)]

    def _serve_apart(self, gate: Gate, order: int, key: int, how: Serve) -> None:
        """A miss that the link does not serve."""
        self.loads.log.add(log.SERVED, self.now(), key, how)
        self.loads.decisions.add(log.SERVED, key, how)
        if how == Serve.CPU:
            self.tally.served["cpu"] += 1
            self.run_on_host(key, int(gate.tokens[order]), gate.layer)
        else:
            self.tally.served["skip"] += 1
            self.ledger.pinned.discard(key)

    # ---- plans -----------------------------------------------------------------------------------

    def tell(self, fact: Fact, phase: Phase) -> None:
        """Tell a fact outside a layer event and apply the answer."""
        self.apply(self.answers.plan(fact), phase)
        self.loads.wake()

    def job_done(self, job: Job) -> None:
        """A job's result arrives."""
        self.tell(JobDone(job, self.loads.event), Phase.DECODE)

    def apply(self, plan: Plan, phase: Phase) -> None:
        """Cancel, reprioritise, queue prefetches, submit jobs."""
        for expert in plan.cancel:
            key = self.answers.key(expert)
            self.loads.of(key).cancel(key)
        for expert, priority in plan.reprioritise:
            self._reprioritise(self.answers.key(expert), priority)
        for order, wish in enumerate(plan.prefetches):
            self._prefetch(wish, order, phase)
        for job in plan.jobs:
            self.tally.jobs += 1
            self.submit(job)

    def _reprioritise(self, key: int, priority: int) -> None:
        loads = self.loads.of(key)
        transfer = loads.queued(key)
        if transfer is not None:
            transfer.priority = priority
        elif key in loads.holds:
            loads.hold(key, priority, loads.holds[key][1])

    def _prefetch(self, wish: Prefetch, order: int, phase: Phase) -> None:
        """Queue a wish; where the copy is there or under way, refresh what protects it."""
        key = self.answers.key(wish.expert, wish.precision)
        if wish.expires <= self.loads.event:
            return
        if wish.expires < NEVER:
            self._named.setdefault(wish.expires, set()).add(key)
        replaces = self.answers.replaced(wish, key, self.ledger.cache_of)
        state, loads = self.ledger.state[key], self.loads.of(key)
        pending = loads.queued(key)
        if pending is not None:
            pending.priority, pending.expires = wish.priority, wish.expires
            pending.cancelled = False
        elif state == RESIDENT:
            loads.hold(key, wish.priority, wish.expires)
        elif state == ABSENT and key not in self._unserved:
            # Demand comes first in an event's order; 1 << 19 is more than any demand.
            transfer = loads.transfer(key, phase, (1 << 19) + order, prefetch=True)
            transfer.priority, transfer.expires = wish.priority, wish.expires
            transfer.replaces = replaces
            loads.enqueue(transfer)
