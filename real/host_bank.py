"""Every expert of a model in host memory, made up, in regions that a device may read directly."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from moesim.errors import UsageError
from moesim.real.memory import aligned
from moesim.types import AnyArray

REGION_BYTES = 4 << 30
"""A region holds no more, unless one expert does: what is registered at once should be moderate."""

_SHIFT = 64
"""Bytes between what two neighbours take of the random block: their contents differ."""

Pin = Callable[[torch.Tensor], str]
"""Makes a region readable for a device; why not, or an empty text."""


class HostBank:
    """Equal buffers; where there are fewer of them than experts, experts share.

    Parameters
    ----------
    nbytes : of the largest expert.
    count : buffers.
    dtype : what the bytes are read as.
    pin : called for each region.

    Raises
    ------
    UsageError
        If RAM runs out.
    """

    def __init__(
        self, nbytes: int, count: int, dtype: torch.dtype, seed: int, pin: Pin | None = None
    ) -> None:
        self.nbytes = nbytes
        self.count = count
        self.stride = aligned(nbytes)
        self.pinned = pin is not None
        self.why_not = ""
        """Why a device cannot read it directly."""
        self.regions: list[torch.Tensor] = []
        self._each = max(1, min(count, REGION_BYTES // self.stride))
        block = _random(self.stride + count * _SHIFT, dtype, seed)
        for first in range(0, count, self._each):
            self._add(min(self._each, count - first), first, block, pin)
        self._rows = [region.numpy() for region in self.regions]

    def row(self, expert: int) -> AnyArray:
        """uint8 [stride] of an expert."""
        region, place = divmod(expert % self.count, self._each)
        row: AnyArray = self._rows[region][place]
        return row

    def tensor(self, expert: int) -> torch.Tensor:
        """The same as a tensor."""
        region, place = divmod(expert % self.count, self._each)
        return self.regions[region][place]

    def _add(self, count: int, first: int, block: AnyArray, pin: Pin | None) -> None:
        room = _reserved if pin is None else _reserved_pages
        region = room(count, self.stride)
        rows = region.numpy()

        def fill(row: int) -> None:
            at = (first + row) * _SHIFT
            rows[row] = block[at : at + self.stride]

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(fill, range(count)))
        self.regions.append(region)
        if pin is not None and not self.why_not:
            self.why_not = pin(region)
            self.pinned = not self.why_not


def zeros(count: int, stride: int) -> torch.Tensor:
    """uint8 [count, stride] in RAM, written once, so that no page of it is first touched while a
    run is timed."""
    return _reserved(count, stride).fill_(0)


def _reserved(count: int, stride: int) -> torch.Tensor:
    try:
        return torch.empty(count, stride, dtype=torch.uint8)
    except RuntimeError as error:
        raise UsageError(f"RAM ran out: {error}; give less --capacity or --ram") from None


def whole_pages(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] in pages of its own, large ones where the system has them: what a device
    registers is pages, and none may be registered twice.

    Raises
    ------
    OSError
        If RAM runs out.
    """
    held = mmap.mmap(-1, max(1, nbytes))
    with suppress(OSError, AttributeError):
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(held, dtype=torch.uint8)[:nbytes]


def _reserved_pages(count: int, stride: int) -> torch.Tensor:
    try:
        return whole_pages(count * stride).view(count, stride)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"RAM ran out: {error}; give less --capacity or --ram") from None


def _random(nbytes: int, dtype: torch.dtype, seed: int) -> AnyArray:
    """Small normal numbers."""
    made = torch.Generator().manual_seed(seed % (1 << 63))
    numbers = torch.randn(nbytes // dtype.itemsize + 1, generator=made) / 64
    block: AnyArray = numbers.to(dtype).view(torch.uint8).numpy()
    return block
