"""What each action costs on a machine, in whole nanoseconds.

Every cost is exact integer arithmetic on the profile's numbers (a float rate is taken as the exact
fraction that it is), rounded up once, so that engines and orders of evaluation agree to the
nanosecond. More bytes, tokens or context never cost less.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby

import numpy as np

from moesim.errors import ProfileError
from moesim.profile import (
    Constant,
    ConstantExpert,
    Drive,
    HardwareProfile,
    Link,
    ModelProfile,
    Roofline,
    Table,
    TableExpert,
)
from moesim.types import IntArray

_NS = 10**9
_LONGEST = 2**62
"""No action may take longer: two of them must still fit int64."""
_STRENGTH = {"assumed": 0, "datasheet": 1, "computed": 2, "config": 2, "measured": 2}
_Points = Sequence[tuple[int, int]]


def make_costs(model: ModelProfile, hardware: HardwareProfile) -> Costs:
    """The costs of ``model`` on ``hardware``.

    Raises ProfileError when a table was measured for another model, or when one action would take
    longer than the clock holds (146 years).
    """
    compute = hardware.compute
    if isinstance(compute, Table) and compute.model not in ("", model.name):
        raise ProfileError(
            f"{hardware.name}: compute.model: the table was measured for {compute.model!r}, not for"
            f" {model.name!r}; use a roofline or constant profile, or measure this model"
        )
    costs = Costs(model, hardware)
    for layer in range(model.layers):
        nbytes = int(model.expert_bytes_table()[layer])
        slowest = max(
            costs.load_ns(nbytes),
            costs.dense_ns(1, 0, layer),
            costs.expert_ns(1, layer),
            costs.cpu_expert_ns(1, layer),
            costs.read_ns(nbytes) if hardware.ssd else 0,
        )
        if slowest > _LONGEST:
            raise ProfileError(
                f"{hardware.name}: one action of layer {layer} of {model.name} takes {slowest} ns,"
                " more than the clock holds; raise the rate that is too small"
            )
    return costs


class Costs:
    """Times of one model on one machine; made by :func:`make_costs`. All results are int ns.

    A negative count is a ValueError, a fractional one a TypeError; an unknown layer or precision
    an IndexError.
    """

    __slots__ = (
        "_cpu",
        "_dense_bytes",
        "_dense_flops",
        "_device",
        "_drive",
        "_exchange",
        "_expert_bytes",
        "_job_bytes",
        "_job_ops",
        "_kv_bytes",
        "_kv_window",
        "_link",
        "hardware",
        "model",
        "plan_ns",
        "sync_ns",
        "weakest_source",
    )

    def __init__(self, model: ModelProfile, hardware: HardwareProfile) -> None:
        host = hardware.host
        self.model = model
        self.hardware = hardware
        self.sync_ns = host.sync_ns
        self.plan_ns = host.plan_ns
        self.weakest_source = min(
            hardware.source, model.source, key=lambda source: _STRENGTH[source]
        )
        self._link = _Rate(hardware.link.bytes_per_s)
        between = hardware.interconnect
        self._exchange = _Rate(math.inf if between is None else between.bytes_per_s)
        self._drive = _Rate(hardware.ssd.bytes_per_s) if hardware.ssd else None
        self._job_ops = _Rate(host.policy_ops_per_s)
        self._job_bytes = _Rate(host.policy_bytes_per_s)
        compute, cpu = hardware.compute, host.cpu
        self._device = _Roof(compute) if isinstance(compute, Roofline) else compute
        self._cpu = _Roof(cpu) if isinstance(cpu, Roofline) else cpu
        self._dense_bytes: list[int] = model.dense_bytes_table().tolist()
        self._dense_flops: list[int] = model.dense_flops_table().tolist()
        self._kv_bytes: list[int] = model.kv_bytes_table().tolist()
        self._kv_window: list[int] = model.kv_window_table().tolist()
        self._expert_bytes: list[list[int]] = [
            model.expert_bytes_table(i).tolist() for i in range(len(model.precisions))
        ]

    @property
    def alike(self) -> IntArray:
        """int64 [layers]: for each layer the first one whose dense part costs the same."""
        return _first_equal(self._dense_bytes, self._dense_flops, self._kv_bytes, self._kv_window)

    @property
    def experts_alike(self) -> IntArray:
        """int64 [layers]: for each layer the first one whose experts cost the same."""
        return _first_equal(*self._expert_bytes)

    def load_ns(self, nbytes: int) -> int:
        """Time of one whole transfer: the host's hand-over, and the link's own ``link_ns``."""
        return self.hardware.link.handover_ns + self.link_ns(nbytes)

    def link_ns(self, nbytes: int) -> int:
        """Time of one whole transfer on the link alone: latency + ceil(bytes / bandwidth).

        With a measured curve: between its points in a straight line from (0, latency), beyond the
        last one at the link's bandwidth.
        """
        return _transfer_ns(self.hardware.link, self._link, _count(nbytes))

    def read_ns(self, nbytes: int) -> int:
        """Time of one whole read from the drive into host memory, as ``link_ns``."""
        drive = self.hardware.ssd
        assert drive is not None and self._drive is not None, "the machine has no drive"
        return _transfer_ns(drive, self._drive, _count(nbytes))

    def read_ends(self, nbytes: int) -> tuple[int, ...]:
        """Time from the start of a read to the end of each of its chunks, as ``chunk_ends``."""
        assert self.hardware.ssd is not None, "the machine has no drive"
        nbytes = _count(nbytes)
        chunk = self.hardware.ssd.chunk_bytes or max(nbytes, 1)
        inner = tuple(self.read_ns(end) for end in range(chunk, nbytes, chunk))
        return (*inner, self.read_ns(nbytes))

    def chunk_ends(self, nbytes: int) -> tuple[int, ...]:
        """Time from the start of a transfer to the end of each of its chunks, rising.

        The last is ``load_ns(nbytes)`` exactly; latency and hand-over lie in the first. No bytes,
        or no chunk size, is one chunk.
        """
        nbytes = _count(nbytes)
        chunk = self.hardware.link.chunk_bytes or max(nbytes, 1)
        inner = tuple(self.load_ns(end) for end in range(chunk, nbytes, chunk))
        return (*inner, self.load_ns(nbytes))

    def shared_ends(self, nbytes: int, links: int) -> tuple[int, ...]:
        """``chunk_ends`` while so many links draw on the host: each gets an equal part of what it
        gives, and no more than its own rate."""
        alone, share = self.chunk_ends(nbytes), self.hardware.host.links_bytes_per_s / links
        if share >= self.hardware.link.bytes_per_s:
            return alone
        link, chunk = self.hardware.link, self.hardware.link.chunk_bytes or max(nbytes, 1)
        rate, fixed = _Rate(share), link.handover_ns + link.latency_ns
        slow = (fixed + rate.ns(min(chunk * i, nbytes)) for i in range(1, len(alone) + 1))
        return tuple(max(pair) for pair in zip(alone, slow, strict=True))

    def exchange_ns(self, vectors: int, trips: int) -> int:
        """Time in which hidden states travel between devices: so many on each of ``trips`` trips,
        one after the other. None take no time, nor where the profile has no interconnect."""
        between = self.hardware.interconnect
        if between is None or not _count(vectors):
            return 0
        nbytes = vectors * self.model.hidden * _width(self.model.dtype)
        return trips * (between.latency_ns + self._exchange.ns(nbytes))

    def dense_ns(self, tokens: int, context: int, layer: int = 0) -> int:
        """Time of a layer's dense part: attention, norms, router, shared experts.

        ``tokens`` are computed in this event; ``context`` counts the cached positions that they
        read, summed over the rows of the batch. No tokens cost nothing. The roofline charges the
        reading of the KV cache, not the arithmetic over it.
        """
        tokens, context = _count(tokens), _count(context)
        device = self._device
        if tokens == 0:
            return 0
        if isinstance(device, Constant):
            return device.dense_ns
        if isinstance(device, Table):
            return _grid(device.dense, tokens, context)
        window = self._kv_window[layer]
        read = min(context, window * tokens) if window else context
        nbytes = self._dense_bytes[layer] + self._kv_bytes[layer] * read
        return device.ns(nbytes, self._dense_flops[layer] * tokens)

    def expert_ns(self, tokens: int, layer: int = 0, precision: int = 0) -> int:
        """Time of one expert on the device for its ``tokens``; none cost nothing."""
        tokens = _count(tokens)
        device = self._device
        if tokens == 0:
            return 0
        if isinstance(device, Constant):
            return device.expert_ns
        if isinstance(device, Table):
            return math.ceil(_row(device.expert, tokens))
        return self._expert(device, tokens, layer, precision)

    def cpu_expert_ns(self, tokens: int, layer: int = 0, precision: int = 0) -> int:
        """Time of one expert on the host for its ``tokens``; none cost nothing."""
        tokens = _count(tokens)
        cpu = self._cpu
        if tokens == 0:
            return 0
        if isinstance(cpu, ConstantExpert):
            return cpu.expert_ns
        if isinstance(cpu, TableExpert):
            return math.ceil(_row(cpu.expert, tokens))
        return self._expert(cpu, tokens, layer, precision)

    def head_ns(self, tokens: int) -> int:
        """Time of the final norm and output head for ``tokens``, once each forward pass.

        A roofline knows it, and a table that has it apart; other profiles hold it within their
        dense times.
        """
        tokens = _count(tokens)
        model, device = self.model, self._device
        if isinstance(device, Table) and device.head and tokens:
            return math.ceil(_row(device.head, tokens))
        if not isinstance(device, _Roof) or tokens == 0 or model.head_bytes == 0:
            return 0
        return device.ns(model.head_bytes, model.head_flops_per_token * tokens)

    def job_ns(self, ops: int, nbytes: int) -> int:
        """Time of a background policy job on one host worker: the longer of work and traffic."""
        return max(self._job_ops.ns(_count(ops)), self._job_bytes.ns(_count(nbytes)))

    def _expert(self, roof: _Roof, tokens: int, layer: int, precision: int) -> int:
        flops = self.model.expert_flops_per_token * tokens
        return roof.ns(self._expert_bytes[precision][layer], flops)


class _Rate:
    """An amount a second, kept as the exact fraction that the float is; infinite = no time."""

    __slots__ = ("down", "up")

    def __init__(self, per_s: float) -> None:
        finite = not math.isinf(per_s)
        per, one = per_s.as_integer_ratio() if finite else (1, 0)
        self.up = _NS * one
        self.down = per

    def ns(self, amount: int) -> int:
        return -(-amount * self.up // self.down)


class _Roof:
    __slots__ = ("bytes_rate", "flops_rate", "kernel_ns")

    def __init__(self, roofline: Roofline) -> None:
        self.bytes_rate = _Rate(roofline.bytes_per_s)
        self.flops_rate = _Rate(roofline.flops_per_s)
        self.kernel_ns = roofline.kernel_ns

    def ns(self, nbytes: int, flops: int) -> int:
        return max(self.bytes_rate.ns(nbytes), self.flops_rate.ns(flops)) + self.kernel_ns


def _width(dtype: str) -> int:
    """Bytes of one number; two where the name does not tell."""
    bits = dtype.lstrip("abcdefghijklmnopqrstuvwxyz")
    return max(1, int(bits) // 8) if bits.isdecimal() else 2


def _transfer_ns(channel: Link | Drive, rate: _Rate, nbytes: int) -> int:
    if not channel.curve:
        return channel.latency_ns + rate.ns(nbytes)
    last_bytes, last_ns = channel.curve[-1]
    if nbytes >= last_bytes:
        return last_ns + rate.ns(nbytes - last_bytes)
    return math.ceil(_line(((0, channel.latency_ns), *channel.curve), nbytes))


def _count(value: int) -> int:
    # A NumPy integer would overflow silently in the products below.
    count = operator.index(value)
    if count < 0:
        raise ValueError(f"a count must not be negative, got {count}")
    return count


def _line(points: _Points, x: int) -> Fraction:
    """The straight line between the two points around ``x``; flat before the first point.

    Beyond the last it goes on as its last piece did (flat, where there is only one point).
    """
    i = min(bisect_left(points, x, key=lambda point: point[0]), len(points) - 1)
    if i == 0:
        return Fraction(points[0][1])
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + Fraction((y1 - y0) * (x - x0), x1 - x0)


def _row(points: _Points, tokens: int) -> Fraction:
    """Time by tokens: as :func:`_line`, but beyond the last point in proportion to the tokens."""
    last_tokens, last_ns = points[-1]
    if tokens > last_tokens:
        return Fraction(last_ns * tokens, last_tokens)
    return _line(points, tokens)


def _grid(rows: Sequence[tuple[int, int, int]], tokens: int, context: int) -> int:
    """Time by tokens and context. Each token count has its own line over contexts.

    Lines measured with noise may cross; the highest so far counts, so that more tokens never
    cost less.
    """
    lower = upper = Fraction(0)
    lower_tokens = upper_tokens = 0
    for upper_tokens, group in groupby(rows, key=lambda row: row[0]):
        line = [(row[1], row[2]) for row in group]
        upper = max(lower, _line(line, context))
        if upper_tokens >= tokens:
            break
        lower, lower_tokens = upper, upper_tokens
    if tokens >= upper_tokens:
        return math.ceil(upper * Fraction(tokens, upper_tokens))
    if lower_tokens == 0:
        return math.ceil(upper)
    share = Fraction(tokens - lower_tokens, upper_tokens - lower_tokens)
    return math.ceil(lower + (upper - lower) * share)


def _first_equal(*facts: Sequence[int]) -> IntArray:
    """For each place the first one where all facts are the same."""
    first: dict[tuple[int, ...], int] = {}
    places = [first.setdefault(fact, place) for place, fact in enumerate(zip(*facts, strict=True))]
    return np.array(places, np.int64)
