"""What a policy may have learned from: requests of the past, and how a trace is cut into both.

The past is told as facts, in the order in which a policy serving those requests one by one would
have heard them. So a policy learns from the past with the code with which it learns while serving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from moesim.errors import TraceError, UsageError
from moesim.hashing import hash64
from moesim.traces.reader import RequestRows, TraceReader
from moesim.types import Fact, Gate, Status
from moesim.workload import (
    StaticBatch,
    Work,
    begin_facts,
    end_facts,
    layer_events,
    timeless_steps,
)

TRAIN, TEST = "train", "test"
PARTS = (TRAIN, TEST)


@dataclass(frozen=True, slots=True)
class Split:
    """Which requests are the past (``train``), and which are served (``test``).

    shares : (train, test) by which requests are dealt; None: as the trace marks them.
    """

    shares: tuple[int, int] | None = None
    seed: int = 0

    @property
    def text(self) -> str:
        """As typed, and the seed."""
        return "marked" if self.shares is None else f"{self.shares[0]}:{self.shares[1]}@{self.seed}"

    def part(self, rows: RequestRows) -> str:
        """``train`` or ``test``.

        Raises
        ------
        TraceError
            If the trace does not mark the request; without the file's name.
        """
        if self.shares is not None:
            train, test = self.shares
            return TRAIN if hash64(self.seed, rows.request, 0) % (train + test) < train else TEST
        if rows.facts.split not in PARTS:
            raise TraceError(
                f"request {rows.request} is marked neither train nor test; deal the requests with "
                "--split 7:3"
            )
        return str(rows.facts.split)


def parse_split(text: str) -> Split:
    """Read ``--split``: ``marked``, or shares such as ``7:3`` (or ``7:3@SEED``).

    Raises
    ------
    UsageError
        For anything else.
    """
    if text == "marked":
        return Split()
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})(?:@([0-9]{1,9}))?", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise UsageError(f"--split {text}: write marked, or shares of train and test such as 7:3")
    return Split((int(match[1]), int(match[2])), int(match[3] or 0))


@dataclass(frozen=True, slots=True)
class Share:
    """One part of a trace."""

    split: Split
    part: str = TEST

    @property
    def before(self) -> Share:
        """What lies before the part that is served."""
        return Share(self.split, TRAIN)


def requests_of(reader: TraceReader, share: Share | None) -> Iterator[RequestRows]:
    """The requests of a part of a trace; all of them where it is not cut.

    Raises
    ------
    TraceError
        If a request cannot be told to be of either part, or none is of this one.
    """
    if share is None:
        yield from reader.requests()
        return
    empty = True
    for rows in reader.requests():
        try:
            chosen = share.split.part(rows) == share.part
        except TraceError as error:
            raise TraceError(f"{reader.path}: {error}") from None
        if chosen:
            empty = False
            yield rows
    if empty:
        raise TraceError(f"{reader.path}: --split leaves no request to {share.part}")


Past = Callable[[], Iterable[Fact]]
"""The facts of past requests, from the first again at every call."""


def past_facts(works: Iterable[Work], experts: int) -> Iterator[Fact]:
    """What a policy hears when requests are served one by one, with every expert resident."""
    event = 0
    for step in timeless_steps(works, StaticBatch()):
        for begin, _ in begin_facts(step):
            yield begin
        for item in layer_events(step, event, experts):
            demand = item.demand
            status = np.full(len(demand.experts), Status.HIT, np.uint8)
            yield Gate(item.event, demand.experts, demand.tokens, status, demand.phases)
            event += 1
        yield from end_facts(step)
