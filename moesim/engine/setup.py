"""What an engine is given: one configuration of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.costs import Costs
from moesim.errors import UsageError
from moesim.protocol import Policy, World
from moesim.tally import RequestTimes, Tally
from moesim.types import ExpertId
from moesim.workload import Scheduler

ENGINES = ("fast", "reference")
ORDERS = ("ready", "barrier")


@dataclass(frozen=True, slots=True)
class Options:
    """How the mechanism behaves.

    order : "ready" computes residents first, then arrivals as they land; "barrier" waits for all.
    flat : every access an event of its own (``workload.flat_events``).
    allocator : "bytes" or "slots" (``Ledger``).
    share_kv : the KV cache takes its bytes from the expert cache.
    write_back : what leaves the device is copied to the host, "duplex" beside the loads or "serial"
        before them; "" leaves it out, as an expert never changes.
    check : audit the laws while running.
    timeline : keep what each lane did, for a trace viewer.
    log : keep the digests of the log; the fast engine may do without.
    quick, residents : how the fast engine works; no result depends on them. Closed forms where
        they hold; how residents are kept (``moesim.engine.fields.Order``), or -1: as suits.
    """

    order: str = "ready"
    flat: bool = False
    allocator: str = "bytes"
    share_kv: bool = False
    write_back: str = ""
    check: bool = False
    timeline: bool = False
    log: bool = True
    quick: bool = True
    residents: int = -1


@dataclass(frozen=True, slots=True)
class Dram:
    """Host memory that does not hold every expert: the others lie on the drive.

    nbytes : its room for experts.
    initial : keys that are in it at the start, the least recently used first.
    """

    nbytes: int
    initial: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Setup:
    """One configuration: a fresh policy in its world, on its costs.

    initial : experts resident at the start.
    initial_charged : whether loading them costs time and bytes.
    kv_bytes_per_token : KV cache of one token over all layers, for ``Options.share_kv``.
    warm : requests after whose end counting begins anew; what was counted before is kept apart.
    dram : host memory; None: it holds every expert.
    """

    policy: Policy
    world: World
    costs: Costs
    scheduler: Scheduler
    options: Options = Options()
    initial: Sequence[ExpertId] = ()
    initial_charged: bool = True
    kv_bytes_per_token: int = 0
    warm: int = 0
    dram: Dram | None = None

    def is_warm(self, tally: Tally, requests: Iterable[RequestTimes]) -> bool:
        """Whether what was counted so far must be kept apart now, before a step begins."""
        if not self.warm or tally.before is not None:
            return False
        return sum(times.end_ns >= 0 for times in requests) >= self.warm

    def load_ns(self, nbytes: int, links: int) -> int:
        """One whole load while so many links draw on the host."""
        if not self.costs.hardware.must_share(links):
            return self.costs.load_ns(nbytes)
        return self.costs.shared_ends(nbytes, links)[-1]

    def refuse_crowded(self, context_tokens: int, left_bytes: Sequence[int]) -> None:
        """UsageError where the KV cache leaves a cache less than one expert."""
        largest = np.zeros(len(left_bytes), np.int64)
        sizes = np.repeat(self.world.expert_bytes[0], self.world.experts)
        np.maximum.at(largest, self.world.caches, sizes)
        for nbytes, least in zip(left_bytes, largest.tolist(), strict=True):
            if nbytes < least:
                raise UsageError(
                    f"--kv share: {context_tokens} tokens of KV cache leave {nbytes} bytes for "
                    "experts, less than one; give more --capacity or fewer requests at once"
                )
