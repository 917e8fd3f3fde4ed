"""What an engine counts. Plain sums; ratios and percentiles are made from them later."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesim.types import Phase, Status

HIT, LATE, MISS = map(int, Status)

FATES = ("used", "late", "wasted", "cancelled", "unused_at_end")
"""How a prefetch that was issued can end: a partition."""

GATHERED = (
    "initial_loads",
    "initial_bytes",
    "evictions",
    "evicted_bytes",
    "written_bytes",
    "link_busy_ns",
    "cancelled_bytes",
    "in_flight_bytes",
    "resident_bytes",
)
"""What several devices count each for itself, beside their phases and prefetches."""


@dataclass(slots=True)
class Counts:
    """Accesses and loads of one phase. An access is one expert of one layer event."""

    accesses: int = 0
    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    loads: int = 0
    """Copies that wholly arrived."""
    bytes_loaded: int = 0
    """Bytes moved, those of cancelled loads included."""
    access_bytes: int = 0
    hit_bytes: int = 0
    late_bytes: int = 0
    miss_bytes: int = 0

    def judged(self, status: int, nbytes: int) -> None:
        """One access."""
        self.accesses += 1
        self.access_bytes += nbytes
        if status == HIT:
            self.hits += 1
            self.hit_bytes += nbytes
        elif status == LATE:
            self.late_hits += 1
            self.late_bytes += nbytes
        else:
            self.misses += 1
            self.miss_bytes += nbytes

    def add(self, other: Counts) -> None:
        """Count what another one counted."""
        for name in Counts.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Fates:
    """Prefetches by fate, in count and bytes."""

    planned: int = 0
    """Wishes that entered the queue."""
    overtaken: int = 0
    """Demanded while still in the queue: they became demand loads."""
    dropped: int = 0
    """Left the queue without being issued: expired, cancelled, or still there at the end."""
    issued: int = 0
    count: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    nbytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    polluting: int = 0
    """Copies that a prefetch evicted and that were missed before the prefetch was used."""

    def end(self, fate: str, nbytes: int) -> None:
        """A prefetch that was issued has met its fate."""
        self.count[fate] += 1
        self.nbytes[fate] += nbytes

    def gather(self, other: Fates) -> None:
        """Count what another one counted."""
        for name in ("planned", "overtaken", "dropped", "issued", "polluting"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for fate in FATES:
            self.count[fate] += other.count[fate]
            self.nbytes[fate] += other.nbytes[fate]


@dataclass(slots=True)
class Times:
    """Where the time of the compute lane went, in ns; the sum is the time of the run. Of several
    devices' lanes the slowest of each layer event counts."""

    initial: int = 0
    dense: int = 0
    experts: int = 0
    sync: int = 0
    plan: int = 0
    stall: int = 0
    """Waiting for experts to arrive."""
    cpu_wait: int = 0
    """Waiting for experts that run on the host."""
    idle: int = 0
    """No request to serve."""
    exchange: int = 0
    """Tokens travel between devices."""

    def total(self) -> int:
        """The time of the run."""
        return (
            self.initial + self.dense + self.experts + self.sync
            + self.plan + self.stall + self.cpu_wait + self.idle + self.exchange
        )  # fmt: skip


@dataclass(slots=True)
class RequestTimes:
    """One request on the clock. ``arrival_ns`` is the admission where the trace has no arrivals."""

    request: int
    arrival_ns: int
    begin_ns: int
    prompt_tokens: int
    first_token_ns: int = -1
    end_ns: int = -1
    output_tokens: int = 0
    stall_ns: int = 0
    """Stall of the steps that it took part in; so are the misses."""
    misses: int = 0

    @property
    def ttft_ns(self) -> int:
        """Arrival to first token."""
        return self.first_token_ns - self.arrival_ns

    @property
    def queue_ns(self) -> int:
        """Arrival to the begin of its first step."""
        return self.begin_ns - self.arrival_ns

    @property
    def end_to_end_ns(self) -> int | None:
        """Arrival to last token; None where the run ended first."""
        return None if self.end_ns < 0 else self.end_ns - self.arrival_ns

    @property
    def tpot_ns(self) -> float | None:
        """Mean time per output token after the first; None with a single one, and unfinished."""
        if self.output_tokens < 2 or self.end_ns < 0:
            return None
        return (self.end_ns - self.first_token_ns) / (self.output_tokens - 1)


@dataclass(slots=True)
class Quality:
    """What a lossy policy leaves of the routing: a proxy, for later rows stay as recorded.

    An expert counts once for each token that chose it. Masses are gate probabilities in 1/16384, or
    weights where the trace has no gates.
    """

    chosen: int = 0
    agreed: int = 0
    """Chosen experts that were executed."""
    mass: int = 0
    """Of the chosen experts."""
    mass_kept: int = 0
    """Of the executed experts, whether chosen or not."""
    mass_low: int = 0
    """That part of ``mass_kept`` that was executed in lower precision."""


@dataclass(slots=True)
class Reads:
    """The drive, and the host memory that it fills."""

    reads: int = 0
    """Copies that wholly arrived in host memory."""
    bytes_read: int = 0
    """Bytes moved, those of unfinished reads included."""
    busy_ns: int = 0
    dram_hits: int = 0
    """Demanded copies that were in host memory when they were asked for."""
    dram_misses: int = 0
    evictions: int = 0
    """Copies and unfinished reads that host memory gave up."""
    evicted_bytes: int = 0
    resident_bytes: int = 0
    """Held at the end, what there is of unfinished reads included."""
    start_bytes: int = 0
    """Held at the start."""
    initial_reads: int = 0
    """For the device's initial state; apart from all of the above."""
    initial_bytes: int = 0

    def conserves(self) -> bool:
        """Whether every byte of host memory came from somewhere and went somewhere."""
        return self.start_bytes + self.bytes_read == self.evicted_bytes + self.resident_bytes


@dataclass(slots=True)
class Tally:
    """Everything that an engine counted in a run."""

    phases: list[Counts] = field(default_factory=lambda: [Counts() for _ in Phase])
    """By ``Phase``."""
    prefetch: Fates = field(default_factory=Fates)
    times: Times = field(default_factory=Times)
    requests: list[RequestTimes] = field(default_factory=list)
    layer_stall_ns: list[int] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=lambda: {"fetch": 0, "cpu": 0, "skip": 0})
    """Misses by how they were served."""
    initial_loads: int = 0
    initial_bytes: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    written_bytes: int = 0
    """Of these, what was copied back to the host."""
    link_busy_ns: int = 0
    cancelled_bytes: int = 0
    in_flight_bytes: int = 0
    """Bytes that had moved of loads not finished at the end."""
    resident_bytes: int = 0
    predicted: int = 0
    """Accesses that a plan had named for their layer event."""
    named: int = 0
    """Experts that plans named."""
    largest_union_bytes: int = 0
    overflows: int = 0
    """Layer events whose demand did not fit their cache and went in waves."""
    steps: int = 0
    events: int = 0
    jobs: int = 0
    quality: Quality | None = None
    """Of a lossy policy."""
    ssd: Reads | None = None
    """Where host memory does not hold every expert."""
    peak_bytes: int = 0
    log_digest: str = ""
    decision_digest: str = ""
    slowest: int = 0
    """Of one of several devices: layer events that it ended last."""
    devices: list[Tally] = field(default_factory=list)
    """What each of several devices did, its lane's own times included; empty where there is one."""
    before: Tally | None = None
    """What had been counted when as many requests had ended as warm the cache."""

    def gather(self) -> None:
        """At the end of a run: what all devices did together."""
        for device in self.devices:
            for mine, its in zip(self.phases, device.phases, strict=True):
                mine.add(its)
            self.prefetch.gather(device.prefetch)
            for name in GATHERED:
                setattr(self, name, getattr(self, name) + getattr(device, name))

    def broken_laws(self, now_ns: int) -> list[str]:
        """Which of the laws that hold at the end of a run do not (``tests/README.md``)."""
        laws = {
            **self._books(),
            "I1: misses": self.counts().misses == sum(self.served.values()),
            "I11: time": self.times.total() == now_ns,
        }
        for number, device in enumerate(self.devices):
            books = device._books()
            laws |= {f"{name} of device {number}": holds for name, holds in books.items()}
        return [name for name, holds in laws.items() if not holds]

    def _books(self) -> dict[str, bool]:
        """The laws that hold for each device as for all."""
        total, prefetch = self.counts(), self.prefetch
        return {
            "I1: accesses": total.accesses == total.hits + total.late_hits + total.misses,
            "I2: bytes": total.bytes_loaded + self.initial_bytes
            == self.evicted_bytes
            + self.resident_bytes
            + self.cancelled_bytes
            + self.in_flight_bytes,
            "prefetch partition": prefetch.issued == sum(prefetch.count.values()),
            "prefetch plan": prefetch.planned
            == prefetch.issued + prefetch.overtaken + prefetch.dropped,
            "I2: drive": self.ssd is None or self.ssd.conserves(),
        }

    def counts(self) -> Counts:
        """Both phases together."""
        total = Counts()
        for phase in self.phases:
            total.add(phase)
        return total
