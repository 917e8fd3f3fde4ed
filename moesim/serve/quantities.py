"""Durations and rates as they are typed."""

from __future__ import annotations

import re
from fractions import Fraction

from moesim.errors import UsageError

_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}
_LONGEST_NS = 1 << 61


def parse_duration_ns(text: str, what: str) -> int:
    """``50ms``, ``2s``, ``10min`` in whole nanoseconds.

    Raises
    ------
    UsageError
        For anything else, and for what the clock does not hold.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(ns|us|ms|s|min|h)", text)
    if not match:
        raise UsageError(f"{what}: {text!r} is no time; write 50ms, 2s or 10min")
    duration = round(Fraction(match[1]) * _UNITS[match[2]])
    if duration >= _LONGEST_NS:
        raise UsageError(f"{what}: {text} is longer than the clock holds; write less")
    return duration


def parse_rate(text: str, what: str) -> Fraction:
    """Requests a second, exactly as typed, more than none.

    Raises
    ------
    UsageError
        For anything else.
    """
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", text) or not Fraction(text):
        raise UsageError(f"{what}: {text!r} is no rate; write requests a second, such as 2.91")
    return Fraction(text)
