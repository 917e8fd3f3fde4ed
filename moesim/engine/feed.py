"""One stream of requests, cut into blocks once, for all engines that may share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moesim.engine.block import Block, BlockMaker
from moesim.engine.setup import Setup
from moesim.tally import Tally
from moesim.workload import DONE, STARVED, Idle, Passes, Step, Work

BLOCK_EVENTS = 1 << 14
"""Layer events that are prepared at once: few enough that their demand stays in a CPU's cache."""


class Server(Protocol):
    """What a feed drives."""

    setup: Setup
    tally: Tally

    @property
    def now(self) -> int:
        """The time in ns."""

    def block_maker(self) -> BlockMaker:
        """What cuts the workload for it."""

    def serve(self, made: Block) -> None:
        """Run a block of steps."""

    def idle(self, until_ns: int) -> None:
        """Serve nothing before a time."""

    def finish(self) -> None:
        """The run has ended."""


class Feed:
    """Feeds engines that ask the same of the workload. The first one's scheduler decides.

    Where requests have arrival times, steps depend on the clock: then an engine must be fed alone,
    and no further than its scheduler is settled.
    """

    def __init__(self, engines: Sequence[Server]) -> None:
        self._engines = engines
        self._scheduler = engines[0].setup.scheduler
        self._maker = engines[0].block_maker()
        self._layers = engines[0].setup.world.layers
        self._done = False

    def offer(self, work: Work) -> None:
        """The next request of the trace."""
        self._scheduler.offer(work)

    def close(self) -> None:
        """No request follows."""
        self._scheduler.close()

    def advance(self) -> bool:
        """Run until the run is done (True) or the next request is needed (False)."""
        while not self._done:
            steps, verdict = self._gather()
            if steps:
                made = self._maker.make(steps)
                for engine in self._engines:
                    engine.serve(made)
            if isinstance(verdict, Idle):
                for engine in self._engines:
                    engine.idle(verdict.until_ns)
            elif verdict == STARVED:
                return False
            elif verdict == DONE:
                for engine in self._engines:
                    engine.finish()
                self._done = True
        return True

    def _gather(self) -> tuple[list[Passes | Step], Idle | str | None]:
        """Steps that can be prepared now."""
        some: list[Passes | Step] = []
        left = -(-BLOCK_EVENTS // self._layers)
        # Who warms the cache may end with any item.
        warming = any(e.setup.warm and e.tally.before is None for e in self._engines)
        while left > 0 and (not some or (self._scheduler.settled and not warming)):
            steps = self._scheduler.next_steps(self._engines[0].now, left)
            if not isinstance(steps, Passes | Step):
                return some, steps
            some.append(steps)
            left -= steps.steps if isinstance(steps, Passes) else 1
        return some, None
