"""What fits the RAM: every expert, or experts that share buffers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import UsageError
from moesim.profile import ModelProfile

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
    position_bytes : of the KV cache, for one position in all layers.
    sequences, positions : requests of a batch, and positions of the longest.
    """

    slots: Mapping[int, int]
    expert_bytes: int
    experts: int
    dense_bytes: int
    layers: int
    head_bytes: int
    least_buffers: int
    position_bytes: int = 0
    sequences: int = 1
    positions: int = 0

    @classmethod
    def of(
        cls, model: ModelProfile, slots: Mapping[int, int], sequences: int = 1, positions: int = 0
    ) -> Needs:
        """Those of a model with such a bank of slots and such a KV cache."""
        return cls(
            slots=slots,
            expert_bytes=int(model.expert_bytes_table().max()),
            experts=model.layers * model.experts,
            dense_bytes=int(model.dense_bytes_table().max()),
            layers=model.layers,
            head_bytes=model.head_bytes,
            least_buffers=model.top_k,
            position_bytes=int(model.kv_bytes_table().sum()),
            sequences=sequences,
            positions=positions,
        )

    @property
    def bank_bytes(self) -> int:
        """The bank of slots."""
        return sum(aligned(size) * count for size, count in self.slots.items())

    @property
    def cache_bytes(self) -> int:
        """The KV cache."""
        return self.position_bytes * self.sequences * self.positions

    @property
    def fixed_bytes(self) -> int:
        """What of it is never shared."""
        return self.bank_bytes + self.cache_bytes + aligned(self.head_bytes)

    @property
    def fewest(self) -> int:
        """Experts that must lie apart."""
        return min(self.least_buffers, self.experts)


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
    least = needs.fewest
    if needs.fixed_bytes + least * expert + dense > ram_bytes:
        rest = least * expert + dense + needs.fixed_bytes - needs.bank_bytes
        raise UsageError(
            f"--capacity {capacity}: the bank of slots takes {_gb(needs.bank_bytes)}, and "
            f"{least} experts in host memory, one dense part, the output head and the KV cache "
            f"{_gb(rest)} at the least, but {_gb(ram_bytes)} of RAM may be used; give less "
            "--capacity, a smaller --costs model, or more --ram"
        )
    left = ram_bytes - needs.fixed_bytes
    # Sharing dense weights distorts less than sharing experts, so those come first.
    experts = min(needs.experts, max(least, (left - dense) // max(1, expert)))
    left -= experts * expert
    return Fit(experts, min(needs.layers, max(1, left // max(1, dense))))


def fit_beside(needs: Needs, device_bytes: int, ram_bytes: int, capacity: str) -> Fit:
    """The same where the slots, dense parts and the KV cache lie in a device's own memory, and
    only the experts in RAM.

    Raises
    ------
    UsageError
        If the device's memory or RAM does not hold the least of it. A bank is never made smaller
        than was asked for: that would be another run.
    """
    expert, dense = aligned(needs.expert_bytes), aligned(needs.dense_bytes)
    if needs.fixed_bytes + dense > device_bytes:
        rest = needs.fixed_bytes - needs.bank_bytes + dense
        slot = max(map(aligned, needs.slots))
        raise UsageError(
            f"--capacity {capacity}: the bank of slots takes {_gb(needs.bank_bytes)} and a dense "
            f"part, the output head and the KV cache {_gb(rest)}, but {_gb(device_bytes)} of the "
            f"device's memory are free; give --capacity {max(0, device_bytes - rest) // slot} "
            "experts or less, a smaller --batch, or end what else uses the device"
        )
    if needs.fewest * expert > ram_bytes:
        raise UsageError(
            f"--ram: {needs.fewest} experts in host memory take {_gb(needs.fewest * expert)}, but "
            f"{_gb(ram_bytes)} of RAM may be used; give more --ram, or a smaller --costs model"
        )
    left = device_bytes - needs.fixed_bytes
    return Fit(
        min(needs.experts, ram_bytes // max(1, expert)),
        min(needs.layers, max(1, left // max(1, dense))),
    )


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
