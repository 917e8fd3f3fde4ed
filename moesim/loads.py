"""Loads of one device: what waits for the link, whose bytes make room, and what became of each.

Rules 1, 4, 5, 6 and 8 of the clock (``moesim/README.md``) live here, without a clock: the reference
engine's link and the real executor's copy thread both send what this says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from moesim import log
from moesim.answers import Answers
from moesim.costs import Costs
from moesim.ledger import RESIDENT, Ledger
from moesim.log import LogDigest
from moesim.tally import Tally
from moesim.tier import Tier
from moesim.types import NEVER, Dropped, Evicted, Landed, Phase


@dataclass(eq=False, slots=True)
class Transfer:
    """One load. ``event`` and ``order`` say which plan or demand asked for it, and where in it."""

    key: int
    ends: tuple[int, ...]
    """Nanoseconds from its start to the end of each chunk, alone on the link."""
    phase: Phase
    event: int
    order: int
    sequence: int
    prefetch: bool
    """A plan asked for it; False: a gate did."""
    priority: int = 0
    expires: int = NEVER
    replaces: int = -1
    staged: bool = False
    """Its bytes are outside the capacity, for one use."""
    demanded: bool = False
    cancelled: bool = False
    issued: bool = False
    used: bool = False
    sent: int = 0
    """Chunks that have moved."""


class Loads:
    """Two lanes to one serial channel: demand first, then prefetches by priority.

    A host asks ``_next`` for what to send, tells ``_sent`` how far it came, and defines ``wake``.
    ``now`` tells the time in ns; it enters the log and no decision.
    """

    def __init__(
        self,
        now: Callable[[], int],
        ledger: Ledger,
        answers: Answers,
        costs: Costs,
        tally: Tally,
        staging: int,
        arrived: Callable[[Transfer], None],
        blocked: Callable[[], None],
    ) -> None:
        self.ledger = ledger
        self.answers = answers
        self.tally = tally
        self.log = LogDigest()
        self.decisions = LogDigest()
        self.members: set[int] = set()
        """Keys that the newest layer event demands."""
        self.released: list[int] = []
        """Those of them that have computed and are resident, oldest first."""
        self.flying: dict[int, Transfer] = {}
        self.unused: dict[int, Transfer] = {}
        """Residents that a prefetch brought and nothing has used yet."""
        self.holds: dict[int, tuple[int, int]] = {}
        """Key -> (priority, expiry) of the plan that wants it to stay."""
        self.spans: list[tuple[str, int, int, int]] | None = None
        self.tier: Tier | None = None
        """Host memory, where it does not hold every expert."""
        self._now = now
        self._costs = costs
        self._chunks: dict[int, tuple[int, ...]] = {}
        self._staging = staging
        self._staged = 0
        self._arrived = arrived
        self._blocked = blocked
        self._demand: list[Transfer] = []
        self._prefetch: dict[int, Transfer] = {}
        self._in_service: Transfer | None = None
        self._sequence = 0
        self._displaced: dict[int, Transfer] = {}
        self.caches: Sequence[int] = range(len(ledger.capacity))
        """Those that it fills."""
        self.suffix = ""
        """What its lanes' names end with, where there are several devices."""

    @property
    def event(self) -> int:
        """The newest layer event."""
        return self.answers.event

    def of(self, key: int) -> Loads:
        """The loads of the device that owns a key: these, where there is one device."""
        return self

    # ---- what the gate asks for ------------------------------------------------------------------

    def begin(self, members: set[int]) -> None:
        """A new layer event demands these keys."""
        self.members = members
        self.released.clear()

    def transfer(
        self, key: int, phase: Phase, order: int, *, prefetch: bool, staged: bool = False
    ) -> Transfer:
        """A new load, asked for by the newest layer event."""
        self._sequence += 1
        return Transfer(
            key=key,
            ends=self._ends(self.ledger.copy_bytes[key]),
            phase=phase,
            event=self.event,
            order=order,
            sequence=self._sequence,
            prefetch=prefetch,
            staged=staged,
            demanded=not prefetch,
        )

    def promote(self, keys: Sequence[int]) -> None:
        """Loads under way are demanded: they go first, by rank."""
        for key in keys:
            transfer = self.flying[key]
            transfer.demanded = transfer.used = True
            transfer.cancelled = False
            del self._prefetch[key]
            self._demand.append(transfer)
            self._settle_fate(transfer, "late")

    def demand(self, missing: Sequence[Transfer]) -> None:
        """Put a gate's missing experts on the link, behind those under way, by rank."""
        for transfer in missing:
            self.ledger.queue(transfer.key)
            if self.tier is None:
                self._demand.append(transfer)
            else:
                self.tier.need(transfer.key, partial(self._demand.append, transfer))

    def enqueue(self, transfer: Transfer) -> None:
        """Put a prefetch in the queue; no bytes are held."""
        self.ledger.queue(transfer.key)
        self._prefetch[transfer.key] = transfer
        self.tally.prefetch.planned += 1

    def queued(self, key: int) -> Transfer | None:
        """The prefetch of a key that waits or is in flight, undemanded."""
        return self._prefetch.get(key)

    @property
    def waiting(self) -> int:
        """Prefetches without bytes."""
        return sum(not t.issued for t in self._prefetch.values())

    def unissued(self) -> list[int]:
        """Keys of prefetches without bytes, most urgent first."""
        return [t.key for t in sorted(self._prefetch.values(), key=urgency) if not t.issued]

    def expire(self) -> None:
        """Drop what the newest gate made useless."""
        for transfer in [t for t in self._prefetch.values() if t.expires <= self.event]:
            if not transfer.issued:
                self._drop(transfer)

    def cancel(self, key: int) -> None:
        """Take back a prefetch: at once if it waits, at the end of its chunk if it moves."""
        transfer = self._prefetch.get(key)
        if transfer is None:
            return
        if not transfer.issued:
            self._drop(transfer)
        elif transfer is self._in_service:
            transfer.cancelled = True
        else:
            self._abandon(transfer)

    def use(self, key: int) -> None:
        """A resident is demanded."""
        transfer = self.unused.pop(key, None)
        self.holds.pop(key, None)
        if transfer is not None:
            transfer.used = True
            self._settle_fate(transfer, "used")

    def miss(self, key: int) -> None:
        """A demanded expert is not there; a prefetch of it that still waits gives way to demand."""
        if key in self._prefetch:
            del self._prefetch[key]
            self.ledger.forget(key)
            self.tally.prefetch.overtaken += 1
        guilty = self._displaced.pop(key, None)
        if guilty is not None and not guilty.used:
            self.tally.prefetch.polluting += 1

    def release(self, key: int) -> None:
        """An expert of the newest layer event has computed."""
        transfer = self.flying.get(key)
        if transfer is not None and transfer.staged:
            self._unstage(transfer)
        else:
            self.ledger.pinned.discard(key)
            self.released.append(key)
        self.wake()

    def wake(self) -> None:
        """Something changed: perhaps the link may send again."""

    # ---- the channel -----------------------------------------------------------------------------

    def _next(self) -> Transfer | None:
        """The first that may send: the head of the demand, else prefetches by priority."""
        if self._demand:
            head = self._demand[0]
            if head.issued or self._issue(head):
                return head
        full: set[tuple[int, int]] = set()
        for transfer in sorted(self._prefetch.values(), key=urgency):
            if transfer.issued:
                return transfer
            if self.tier is not None and not self.tier.has(transfer.key):
                continue
            place = (self.ledger.cache_of[transfer.key], self.ledger.bytes_of[transfer.key])
            if place not in full and self._issue(transfer):
                return transfer
            # What had no room at a higher priority has none at a lower one, unless it brings its
            # own victim or its own score decides.
            if transfer.replaces < 0 and not self.answers.policy.bypass:
                full.add(place)
        if self._demand:
            self._blocked()
        return None

    def _sent(self, transfer: Transfer, sent: int, start_ns: int, end_ns: int) -> None:
        """The link has sent chunks up to ``sent``."""
        transfer.sent = sent
        self.tally.link_busy_ns += end_ns - start_ns
        if self.spans is not None:
            lane = "prefetch" if transfer.prefetch and not transfer.demanded else "demand"
            self.spans.append((lane + self.suffix, start_ns, end_ns, transfer.key))
        if transfer.sent == len(transfer.ends):
            self._land(transfer)
        elif transfer.cancelled:
            self._abandon(transfer)

    def _issue(self, transfer: Transfer) -> bool:
        """Choose victims and reserve bytes; False if there is no room now."""
        key = transfer.key
        if transfer.staged:
            if self._staged == self._staging:
                return False
            self._staged += 1
            self.ledger.stage(key)
        else:
            victims = self._victims(transfer)
            if victims is None:
                return False
            for victim in victims:
                self._evict(victim, transfer)
            self.ledger.reserve(key)
        transfer.issued = True
        self.flying[key] = transfer
        self._displaced.pop(key, None)
        if transfer.prefetch:
            self.tally.prefetch.issued += 1
            if self.tier is not None:
                self.tier.pin(key)
        self.log.add(log.ISSUE, self._now(), key, int(transfer.prefetch))
        return True

    # ---- room ------------------------------------------------------------------------------------

    def _victims(self, transfer: Transfer) -> list[int] | None:
        """Who goes for a load: none needed, a list, or None if room cannot be made now."""
        cache = self.ledger.cache_of[transfer.key]
        lacking = self.ledger.bytes_of[transfer.key] - self.ledger.free(cache)
        if transfer.replaces >= 0:
            return self._replaced(transfer, cache, lacking)
        if lacking <= 0:
            return []
        if transfer.prefetch and not transfer.demanded:
            candidates = self._free_to_prefetch(transfer, cache)
        else:
            candidates = self._free_to_demand(cache)
        # A layer event larger than its cache goes in waves: its own experts, oldest first, once
        # they have computed. They come last so that no timing enters the choice before them.
        last = [] if transfer.prefetch else self._computed_members(cache)
        return self._choose(candidates, last, lacking, cache)

    def _free_to_demand(self, cache: int) -> list[int]:
        ledger = self.ledger
        return sorted(ledger.residents[cache] - ledger.pinned - self.members)

    def _computed_members(self, cache: int) -> list[int]:
        residents = self.ledger.residents[cache]
        pinned = self.ledger.pinned
        return [k for k in self.released if k in residents and k not in pinned]

    def _free_to_prefetch(self, transfer: Transfer, cache: int) -> list[int]:
        free = sorted(self.ledger.residents[cache] - self.ledger.pinned)
        free = [k for k in free if not self._held_against(k, transfer.priority)]
        if free and self.answers.policy.bypass:
            free = self.answers.below(free, transfer.key)
        return free

    def _held_against(self, key: int, priority: int) -> bool:
        """Whether another plan's wish for a resident outweighs a new prefetch."""
        hold = self.holds.get(key)
        return hold is not None and hold[1] > self.event and hold[0] >= priority

    def _replaced(self, transfer: Transfer, cache: int, lacking: int) -> list[int] | None:
        key = transfer.replaces
        if self.ledger.state[key] != RESIDENT:
            return [] if lacking <= 0 else None
        if key in self.ledger.pinned or self.ledger.bytes_of[key] < lacking:
            return None
        return [key]

    def _choose(
        self, candidates: list[int], last: list[int], lacking: int, cache: int
    ) -> list[int] | None:
        ledger = self.ledger
        if self._bytes(candidates) + self._bytes(last) < lacking:
            return None
        chosen: list[int] = []
        for key in [*self.answers.in_order(candidates, lacking, self._why_not), *last]:
            if lacking <= 0:
                break
            chosen.append(key)
            lacking -= ledger.bytes_of[key]
        return chosen

    def _bytes(self, keys: list[int]) -> int:
        return sum(self.ledger.bytes_of[k] for k in keys)

    def _why_not(self, expert: int) -> str:
        if expert in self.ledger.pinned or expert in self.members:
            return "pinned"
        if self.ledger.state[expert] != RESIDENT:
            return "absent"
        return "in another cache, or held by a plan of higher priority"

    # ---- what becomes of a load ------------------------------------------------------------------

    def _land(self, transfer: Transfer) -> None:
        key = transfer.key
        counts = self.tally.phases[transfer.phase]
        counts.loads += 1
        counts.bytes_loaded += self.ledger.copy_bytes[key]
        self.log.add(log.LAND, self._now(), key)
        if self.tier is not None:
            self.tier.unpin(key)
        if not transfer.staged:
            del self.flying[key]
            self.ledger.land(key)
        if transfer.demanded:
            self._demand.remove(transfer)
            self._arrived(transfer)
        else:
            del self._prefetch[key]
            self.unused[key] = transfer
            self.hold(key, transfer.priority, transfer.expires)
        self.answers.policy.note(
            Landed(
                self.ledger.expert(key),
                self.ledger.precision(key),
                transfer.event,
                transfer.order,
                not transfer.prefetch,
            )
        )

    def hold(self, key: int, priority: int, expires: int) -> None:
        """A plan wants a resident to stay until a layer event."""
        self.holds[key] = (priority, expires)

    def _abandon(self, transfer: Transfer) -> None:
        key = transfer.key
        moved = self._moved_bytes(transfer)
        self.tally.phases[transfer.phase].bytes_loaded += moved
        self.tally.cancelled_bytes += moved
        self._settle_fate(transfer, "cancelled", moved)
        del self._prefetch[key], self.flying[key]
        self.ledger.abandon(key)
        if self.tier is not None:
            self.tier.unpin(key)
        self.log.add(log.CANCEL, self._now(), key)
        self._note_dropped(key)

    def _drop(self, transfer: Transfer) -> None:
        del self._prefetch[transfer.key]
        self.ledger.forget(transfer.key)
        self.tally.prefetch.dropped += 1
        self.log.add(log.DROP, self._now(), transfer.key)
        self._note_dropped(transfer.key)

    def _note_dropped(self, key: int) -> None:
        self.answers.policy.note(
            Dropped(self.ledger.expert(key), self.ledger.precision(key), self.event)
        )

    def _note_evicted(self, key: int) -> None:
        expert, precision = self.ledger.expert(key), self.ledger.precision(key)
        self.answers.policy.note(Evicted(expert, precision, self.event))

    def _evict(self, key: int, cause: Transfer | None) -> None:
        self.ledger.evict(key)
        self._gone(key)
        self.holds.pop(key, None)
        wasted = self.unused.pop(key, None)
        if wasted is not None:
            self._settle_fate(wasted, "wasted")
        if cause is not None and cause.prefetch and not cause.demanded:
            self._displaced[key] = cause
        self.answers.policy.note(
            Evicted(self.ledger.expert(key), self.ledger.precision(key), self.event)
        )

    def _gone(self, key: int) -> None:
        """A copy's bytes were given up."""
        self.tally.evictions += 1
        self.tally.evicted_bytes += self.ledger.copy_bytes[key]
        self.log.add(log.EVICT, self._now(), key)
        self.decisions.add(log.EVICT, key)

    def _unstage(self, transfer: Transfer) -> None:
        """A staged copy has computed: it takes the place of a lesser resident, or goes."""
        key = transfer.key
        del self.flying[key]
        self._staged -= 1
        victims = self._lesser(key)
        for victim in victims or ():
            self._evict(victim, None)
        adopt = victims is not None
        self.ledger.unstage(key, adopt=adopt)
        self.ledger.pinned.discard(key)
        if not adopt:
            self._gone(key)
            self._note_evicted(key)

    def _lesser(self, key: int) -> list[int] | None:
        """Residents of smaller score whose bytes suffice; None: the copy does not stay."""
        cache = self.ledger.cache_of[key]
        lacking = self.ledger.bytes_of[key] - self.ledger.free(cache)
        if lacking <= 0:
            return []
        free = sorted(self.ledger.residents[cache] - self.ledger.pinned)
        return self.answers.lesser(free, key, lacking)

    def shrink(self, capacity_bytes: Sequence[int]) -> None:
        """New capacities; evict by score until nothing is over, as far as nothing is pinned."""
        self.ledger.resize(capacity_bytes)
        for cache in self.caches:
            lacking = -self.ledger.free(cache)
            free = sorted(self.ledger.residents[cache] - self.ledger.pinned)
            for victim in self._going(free, lacking):
                if lacking <= 0:
                    break
                lacking -= self.ledger.bytes_of[victim]
                self._evict(victim, None)
            self._abandon_paused(cache)

    def _going(self, free: list[int], lacking: int) -> list[int]:
        return self.answers.in_order(free, lacking, self._why_not) if lacking > 0 else []

    def _abandon_paused(self, cache: int) -> None:
        """Give up pre-empted prefetches, the least urgent first, while a cache is over.

        The one that moves always fits: a cache holds at least one expert.
        """
        for transfer in sorted(self._prefetch.values(), key=urgency, reverse=True):
            if self.ledger.free(cache) >= 0:
                return
            paused = transfer.issued and transfer is not self._in_service
            if paused and self.ledger.cache_of[transfer.key] == cache:
                self._abandon(transfer)

    def _settle_fate(self, transfer: Transfer, fate: str, nbytes: int | None = None) -> None:
        if transfer.prefetch:
            moved = self.ledger.copy_bytes[transfer.key] if nbytes is None else nbytes
            self.tally.prefetch.end(fate, moved)

    def _moved_bytes(self, transfer: Transfer) -> int:
        """Bytes of the chunks that have moved."""
        whole = self.ledger.copy_bytes[transfer.key]
        return min(whole, transfer.sent * (self._costs.hardware.link.chunk_bytes or whole))

    def _ends(self, nbytes: int) -> tuple[int, ...]:
        if nbytes not in self._chunks:
            self._chunks[nbytes] = self._costs.chunk_ends(nbytes)
        return self._chunks[nbytes]

    def finish(self) -> None:
        """The run has ended."""
        self.settle()
        self.tally.peak_bytes = self.ledger.peak_bytes
        self.tally.log_digest = self.log.hex()
        self.tally.decision_digest = self.decisions.hex()

    def settle(self) -> None:
        """What is still queued, moving or unused at the end meets its fate."""
        for transfer in list(self._prefetch.values()):
            if transfer.issued:
                moved = self._moved_bytes(transfer)
                self.tally.in_flight_bytes += moved
                self.tally.phases[transfer.phase].bytes_loaded += moved
                self._settle_fate(transfer, "unused_at_end", moved)
            else:
                self.tally.prefetch.dropped += 1
        for transfer in self.unused.values():
            self._settle_fate(transfer, "unused_at_end")
        if self.tier is not None:
            self.tier.finish()
        self.tally.resident_bytes = self.ledger.resident_bytes(self.caches)


def urgency(transfer: Transfer) -> tuple[int, int]:
    """Prefetches go in rising order of this: larger priorities first, then as planned."""
    return (-transfer.priority, transfer.sequence)
