"""What fits the RAM: every expert, or experts that share buffers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import UsageError

ALIGN = 64
"""Slots and buffers begin at whole cache lines, as vector code likes them."""

_SPARED = 1 << 30
"""Bytes left to everything else, or a tenth where that is less."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run would like to hold.

    slots : bytes of a slot -> how many.
    expert_bytes, experts : the largest expert, and how many there are in all.
    dense_bytes, layers : the largest dense part, and how many there are.
    head_bytes : the output head.
    least_buffers : experts that must lie apart in host memory.
    """

    slots: Mapping[int, int]
    expert_bytes: int
    experts: int
    dense_bytes: int
    layers: int
    head_bytes: int
    least_buffers: int

    @property
    def bank_bytes(self) -> int:
        """The bank of slots."""
        return sum(aligned(size) * count for size, count in self.slots.items())


@dataclass(frozen=True, slots=True)
class Fit:
    """How many buffers there are for experts and for dense parts; the others share."""

    expert_buffers: int
    dense_buffers: int


def fit(needs: Needs, ram_bytes: int, capacity: str) -> Fit:
    """Share ``ram_bytes``: the bank of slots first, then experts, then dense parts.

    Raises
    ------
    UsageError
        If not even the least of it fits, naming what is needed and what there is.
    """
    expert, dense = aligned(needs.expert_bytes), aligned(needs.dense_bytes)
    least = min(needs.least_buffers, needs.experts)
    fixed = needs.bank_bytes + aligned(needs.head_bytes)
    if fixed + least * expert + dense > ram_bytes:
        raise UsageError(
            f"--capacity {capacity}: the bank of slots takes {_gb(needs.bank_bytes)}, and "
            f"{least} experts in host memory, one dense part and the output head "
            f"{_gb(least * expert + dense + aligned(needs.head_bytes))} at the least, but "
            f"{_gb(ram_bytes)} of RAM may be used; give less --capacity, a smaller --costs model, "
            "or more --ram"
        )
    left = ram_bytes - fixed
    # Sharing dense weights distorts less than sharing experts, so those come first.
    experts = min(needs.experts, max(least, (left - dense) // max(1, expert)))
    left -= experts * expert
    return Fit(experts, min(needs.layers, max(1, left // max(1, dense))))


def aligned(nbytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-nbytes // ALIGN) * ALIGN


def usable_bytes() -> int:
    """RAM that banks may take now, of this machine and of the container around us."""
    free = min([_available(), *_container()])
    return free - min(_SPARED, free // 10)


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container() -> list[int]:
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = ((root / name).read_text() for name in ("memory.max", "memory.current"))
        return [] if limit.strip() == "max" else [max(0, int(limit) - int(used))]
    except (OSError, ValueError):
        return []


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"
