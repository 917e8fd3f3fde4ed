"""When requests arrive: as recorded, at random, in a closed loop, or as a log says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from moesim.errors import UsageError
from moesim.hashing import hash64
from moesim.serve import logs
from moesim.serve.quantities import parse_duration_ns, parse_rate
from moesim.types import IntArray

BACK_TO_BACK, RECORDED, POISSON, CLOSED, LOG = (
    "back-to-back", "recorded", "poisson", "closed", "log",
)  # fmt: skip
FORMS = "back-to-back, recorded, poisson:RATE, closed:USERS[:THINK], azure:FILE, mooncake:FILE, "
FORMS += "burstgpt:FILE, or a FILE of one of these kinds"

_POISSON = 0x706F6973
"""Tells this use of the seed from others."""
_LATEST_NS = 1 << 61


@dataclass(frozen=True, slots=True)
class Arrivals:
    """``--arrivals``, parsed.

    rate : requests a second (POISSON). users, think_ns : of a CLOSED loop. path, log_kind : of a
    LOG; the kind is empty where the file tells.
    """

    kind: str = BACK_TO_BACK
    rate: Fraction | None = None
    users: int = 0
    think_ns: int = 0
    path: Path | None = None
    log_kind: str = ""


def parse_arrivals(text: str) -> Arrivals:
    """Read ``--arrivals``.

    Raises
    ------
    UsageError
        Naming the forms that there are.
    """
    head, _, rest = text.partition(":")
    if text in (BACK_TO_BACK, RECORDED):
        return Arrivals(text)
    if head == POISSON:
        return Arrivals(POISSON, parse_rate(rest, f"--arrivals {text}") if rest else None)
    if head == CLOSED:
        return _closed(text, rest)
    if head in logs.KINDS and rest:
        return Arrivals(LOG, path=Path(rest), log_kind=head)
    if not Path(text).is_file():
        raise UsageError(f"--arrivals {text}: unknown, and no file; write {FORMS}")
    return Arrivals(LOG, path=Path(text))


def digest_of_log(arrivals: Arrivals) -> str | None:
    """SHA-256 (hex) of the log that says when requests arrive; None without one."""
    if arrivals.path is None:
        return None
    try:
        return hashlib.sha256(arrivals.path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"--arrivals {arrivals.path}: {error.strerror}") from None


def _closed(text: str, rest: str) -> Arrivals:
    users, _, think = rest.partition(":")
    if not users.isascii() or not users.isdigit() or not 0 < int(users) < 1 << 20:
        raise UsageError(f"--arrivals {text}: write closed:USERS, such as closed:8 or closed:8:2s")
    think_ns = parse_duration_ns(think, f"--arrivals {text}") if think else 0
    return Arrivals(CLOSED, users=int(users), think_ns=think_ns)


def poisson_ns(rate: Fraction, requests: int, seed: int) -> IntArray:
    """Arrivals of a Poisson process, int64 [requests]: the first comes after a gap as well."""
    draws = (hash64(_POISSON, seed, np.arange(requests)) >> np.uint64(11)).astype(np.float64)
    gaps = -np.log((draws + 0.5) / (1 << 53)) * (10**9 / float(rate))
    if float(gaps.sum()) >= _LATEST_NS:
        raise UsageError(f"--rate {float(rate):g}: the last request comes after the clock's end")
    return np.cumsum(np.rint(gaps).astype(np.int64))


def rate_of(arrival_ns: Sequence[int] | IntArray) -> float | None:
    """Requests a second: all but the first over the time from first to last; None for one
    moment."""
    span = int(arrival_ns[-1]) - int(arrival_ns[0]) if len(arrival_ns) else 0
    return (len(arrival_ns) - 1) * 10**9 / span if span else None


def at_rate(arrival_ns: IntArray, rate: Fraction) -> IntArray:
    """The same arrivals, stretched or shrunk from the first on so that they come at a rate."""
    if not len(arrival_ns):
        return arrival_ns
    first = int(arrival_ns[0])
    span = int(arrival_ns[-1]) - first
    if not span:
        raise UsageError("--rate: all requests arrive at one moment, which has no rate")
    scale = Fraction((len(arrival_ns) - 1) * 10**9, span) / rate
    if span * scale >= _LATEST_NS:
        raise UsageError(f"--rate {float(rate):g}: the last request comes after the clock's end")
    return np.array([round((t - first) * scale) for t in arrival_ns.tolist()], np.int64)
