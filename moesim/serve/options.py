"""What a replay is told of serving, beside batch, chunks and arrivals."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from moesim.errors import UsageError
from moesim.serve.quantities import parse_duration_ns

STATIC, DECODE_FIRST, PREFILL_FIRST = SCHEDULERS = ("static", "decode-first", "prefill-first")
TOKEN_BUDGET = 2048
"""Of a step, unless told."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good; None: no such limit."""

    ttft_ns: int | None = None
    tpot_ns: int | None = None
    end_to_end_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Turns:
    """Conversations: ``size`` requests of one topic each; 0: as the log's prefixes say."""

    size: int = 0
    think_ns: int = 0


@dataclass(frozen=True, slots=True)
class Serving:
    """How requests are served.

    scheduler : one of ``SCHEDULERS``. token_budget : of a step, in continuous batching.
    rate : requests a second that the arrivals are brought to. requests : how many arrive; 0: as
    many as the log, or the trace, has. until_ns : no step begins from then on; 0: never.
    warm : so many requests are served before those that are counted.
    shift : topics come in blocks of so many requests; -1: shuffled; 0: as they stand.
    """

    scheduler: str = STATIC
    token_budget: int = TOKEN_BUDGET
    rate: Fraction | None = None
    requests: int = 0
    until_ns: int = 0
    slo: Slo = field(default_factory=Slo)
    warm: int = 0
    turns: Turns | None = None
    shift: int = 0

    def manifest(self) -> dict[str, Any]:
        """Plain JSON values."""
        rate = None if self.rate is None else str(self.rate)
        return {**asdict(self), "rate": rate}


def parse_slo(text: str) -> Slo:
    """Read ``--slo``: ``ttft=2s,tpot=50ms`` and ``e2e=30s``, any of them.

    Raises
    ------
    UsageError
        For anything else.
    """
    limits: dict[str, int] = {}
    names = {"ttft": "ttft_ns", "tpot": "tpot_ns", "e2e": "end_to_end_ns"}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        if name not in names or names[name] in limits:
            raise UsageError(f"--slo {text}: write each of ttft=, tpot=, e2e= at most once")
        limits[names[name]] = parse_duration_ns(value, f"--slo {item.strip()}")
    return Slo(**limits)


def parse_turns(text: str) -> Turns:
    """Read ``--turns``: ``4`` requests of a topic, or ``log``; ``:THINK`` may follow.

    Raises
    ------
    UsageError
        For anything else.
    """
    size, _, think = text.partition(":")
    if size != "log" and (not re.fullmatch(r"[0-9]{1,6}", size) or int(size) < 2):
        raise UsageError(f"--turns {text}: write requests of a conversation, such as 4:10s, or log")
    think_ns = parse_duration_ns(think, f"--turns {text}") if think else 0
    return Turns(0 if size == "log" else int(size), think_ns)


def parse_shift(text: str) -> int:
    """Read ``--shift``: ``shuffle``, or ``topic:32``, blocks of so many requests of a topic.

    Raises
    ------
    UsageError
        For anything else.
    """
    match = re.fullmatch(r"topic:([0-9]{1,9})", text)
    if text == "shuffle":
        return -1
    if not match or not int(match[1]):
        raise UsageError(
            f"--shift {text}: write topic:32 (requests of one topic in a row) or shuffle"
        )
    return int(match[1])
