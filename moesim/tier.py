"""Host memory that does not hold every expert, and what the drive reads into it.

As ``moesim.loads``, without a clock: a host asks ``next_read`` for what to read, tells ``was_read``
how far it came, and defines ``wake``. The rules are in ``moesim/README.md`` (rule 14).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moesim import log
from moesim.costs import Costs
from moesim.log import LogDigest
from moesim.tally import Reads


class Tier:
    """Copies in host memory by last use, and the reads that are wanted.

    Parameters
    ----------
    now : the time in ns; it enters the log and no decision.
    copy_bytes : bytes of a copy, by key.
    wishes : keys of the queued prefetches that hold no device bytes, most urgent first.
    nbytes, initial : as ``moesim.engine.setup.Dram``.
    """

    def __init__(
        self,
        now: Callable[[], int],
        costs: Costs,
        copy_bytes: Sequence[int],
        wishes: Callable[[], Sequence[int]],
        landed: Callable[[], None],
        journal: LogDigest,
        tally: Reads,
        nbytes: int,
        initial: Sequence[int],
    ) -> None:
        self.tally = tally
        self.capacity = nbytes
        self.used = 0
        self.sent: dict[int, int] = {}
        """Chunks there are of each copy; the least recently used comes first."""
        self.pins: dict[int, int] = {}
        """Copies that the link or a host worker reads from, or is about to."""
        self.waiting: dict[int, Callable[[], None]] = {}
        """What demand waits for, in order, and what happens then."""
        self._now = now
        self._costs = costs
        self._copy_bytes = copy_bytes
        self._wishes = wishes
        self._landed = landed
        self._log = journal
        self._ends: dict[int, tuple[int, ...]] = {}
        for key in initial:
            self.sent[key] = len(self.ends(key))
            self.used += copy_bytes[key]
        tally.start_bytes = self.used

    def has(self, key: int) -> bool:
        """Whether a copy is wholly there."""
        return self.sent.get(key, -1) == len(self.ends(key))

    def ends(self, key: int) -> tuple[int, ...]:
        """Nanoseconds from the start of a read to the end of each of its chunks."""
        nbytes = self._copy_bytes[key]
        if nbytes not in self._ends:
            self._ends[nbytes] = self._costs.read_ends(nbytes)
        return self._ends[nbytes]

    # ---- who needs copies ------------------------------------------------------------------------

    def need(self, key: int, then: Callable[[], None]) -> None:
        """Demand of a copy: ``then`` happens, now or when it is there, and it is pinned."""
        if self.has(key):
            self.tally.dram_hits += 1
            self.pin(key)
            then()
        else:
            self.tally.dram_misses += 1
            self.waiting[key] = then
            self.wake()

    def pin(self, key: int) -> None:
        """A copy is used: it must stay meanwhile."""
        self.pins[key] = self.pins.get(key, 0) + 1
        self._touch(key)

    def unpin(self, key: int) -> None:
        """A use has ended."""
        self.pins[key] -= 1
        if not self.pins[key]:
            del self.pins[key]
        self.wake()

    def wake(self) -> None:
        """Something changed: perhaps the drive may read again."""

    # ---- the drive -------------------------------------------------------------------------------

    def next_read(self) -> int | None:
        """The first that may be read: what demand waits for, then prefetches by priority."""
        wishes = self._wishes()
        full: int | None = None
        for place, key in enumerate((*self.waiting, *wishes)):
            if key in self.sent:
                if not self.has(key):
                    return key
                continue
            nbytes = self._copy_bytes[key]
            if full is not None and nbytes >= full:
                continue
            kept = () if place < len(self.waiting) else wishes
            if self._make_room(nbytes - (self.capacity - self.used), kept):
                self.sent[key] = 0
                self.used += nbytes
                return key
            # What had no room for demand has none for a prefetch.
            full = nbytes
        return None

    def was_read(self, key: int, sent: int, start_ns: int, end_ns: int) -> None:
        """The drive has read chunks of a copy up to ``sent``."""
        moved = self._moved_bytes(key)
        self.sent[key] = sent
        self.tally.bytes_read += self._moved_bytes(key) - moved
        self.tally.busy_ns += end_ns - start_ns
        if not self.has(key):
            return
        self.tally.reads += 1
        self._log.add(log.READ, self._now(), key)
        self._touch(key)
        then = self.waiting.pop(key, None)
        if then is not None:
            self.pin(key)
            then()
        self._landed()

    def finish(self) -> None:
        """The run has ended."""
        self.tally.resident_bytes = sum(self._moved_bytes(key) for key in self.sent)

    # ---- inside ----------------------------------------------------------------------------------

    def _touch(self, key: int) -> None:
        self.sent[key] = self.sent.pop(key)

    def _make_room(self, lacking: int, wished: Sequence[int]) -> bool:
        """Give up what was used longest ago and nothing holds, unless that is too little."""
        victims: list[int] = []
        kept = {*self.pins, *self.waiting, *wished}
        for key in self.sent:
            if lacking <= 0:
                break
            if key not in kept:
                victims.append(key)
                lacking -= self._copy_bytes[key]
        if lacking > 0:
            return False
        for key in victims:
            self._forget(key)
        return True

    def _forget(self, key: int) -> None:
        self.tally.evictions += 1
        self.tally.evicted_bytes += self._moved_bytes(key)
        self.used -= self._copy_bytes[key]
        del self.sent[key]
        self._log.add(log.FORGET, self._now(), key)

    def _moved_bytes(self, key: int) -> int:
        """Bytes that there are of a copy."""
        drive, whole = self._costs.hardware.ssd, self._copy_bytes[key]
        assert drive is not None
        return min(whole, self.sent[key] * (drive.chunk_bytes or whole))
