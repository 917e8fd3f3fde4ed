"""What a policy's author imports: the protocol, its seats, and the check of a finished policy."""

from __future__ import annotations

from moesim.conformance import check as check_policy
from moesim.protocol import (
    SEAT_KINDS,
    CacheView,
    CostTable,
    Future,
    KeepSeat,
    MissSeat,
    PlainPolicy,
    Policy,
    PrefetchSeat,
    RouteSeat,
    Seat,
    SeatPolicy,
    World,
    parameters,
    restrict,
)

__all__ = [
    "SEAT_KINDS",
    "CacheView",
    "CostTable",
    "Future",
    "KeepSeat",
    "MissSeat",
    "PlainPolicy",
    "Policy",
    "PrefetchSeat",
    "RouteSeat",
    "Seat",
    "SeatPolicy",
    "World",
    "check_policy",
    "parameters",
    "restrict",
]
