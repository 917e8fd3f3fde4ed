"""Where the experts of an offloaded model lie: all of them on the host, some in slots beside it.

Without a GPU both banks are in RAM and a copy is a copy. With one the host bank is pinned, the
slots are in the GPU's memory, and copies run on a stream of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from moesim.errors import UsageError
from moesim.real.device import Arrival
from moesim.real.experts_parcel import Experts, Parcel
from moesim.real.host_bank import whole_pages
from moesim.real.memory import usable_bytes
from moesim.real.slots import SlotLedger
from moesim.workload import Row

Tensor = torch.Tensor
Views = Mapping[str, Tensor]


class HostBank:
    """Every expert of a model in host memory, a region for each layer.

    ``pinned`` : whether the GPU's copy engine can read it. ``why_not`` : what kept it from that.
    """

    def __init__(self, experts: Sequence[Experts], *, pin: bool) -> None:
        self.parcels: list[Parcel] = [one.parcel for one in experts]
        self.counts = [one.count for one in experts]
        self.stride = max(parcel.stride for parcel in self.parcels)
        self.pinned = pin
        self.why_not = ""
        self._regions: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        pairs = zip(self.parcels, self.counts, strict=True)
        return sum(parcel.stride * count for parcel, count in pairs)

    def add_layer(self) -> None:
        """Make room for the next layer.

        Raises
        ------
        UsageError
            If RAM runs out.
        """
        layer = len(self._regions)
        nbytes = self.parcels[layer].stride * self.counts[layer]
        try:
            region = whole_pages(nbytes) if self.pinned else torch.empty(nbytes, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"RAM ran out at layer {layer} of the experts ({self.nbytes / 1e9:.1f} GB in all): "
                f"{error}; use a smaller model or dtype"
            ) from None
        if self.pinned:
            self._pin(region)
        self._regions.append(region.view(self.counts[layer], -1))

    def row(self, layer: int, expert: int) -> Tensor:
        """uint8 [stride] of an expert."""
        return self._regions[layer][expert]

    def views(self, layer: int, expert: int) -> dict[str, Tensor]:
        """An expert's tensors."""
        return self.parcels[layer].views(self.row(layer, expert))

    def _pin(self, region: Tensor) -> None:
        # The library's own pinned memory comes in powers of two, up to twice what is asked for.
        code = torch.cuda.cudart().cudaHostRegister(region.data_ptr(), region.nbytes, 0)  # type: ignore[no-untyped-call]
        if int(code):
            self.pinned = False
            self.why_not = f"pinning {region.nbytes} bytes was refused ({code})"
        else:
            # The callback holds the region, so that it is let go before it is freed.
            weakref.finalize(self, _unpin, region)


class Mover(Protocol):
    """Copies parcels into slots, and knows when a slot may be overwritten."""

    def copy(self, slot: Tensor, source: Tensor, begin: int, end: int) -> Arrival | None:
        """Bytes of a parcel; the last ones are there when it is back, and all before them."""

    def used(self, slot: Tensor) -> None:
        """What computes from the slot has been handed to the device."""


class RamMover:
    """Both banks in RAM."""

    def copy(self, slot: Tensor, source: Tensor, begin: int, end: int) -> None:
        """Bytes of a parcel; back when they are there."""
        # NumPy copies in this thread alone and lets the others run; torch would take their cores.
        np.copyto(slot.numpy()[begin:end], source.numpy()[begin:end])

    def used(self, slot: Tensor) -> None:
        """It has been computed by now."""


class StreamMover:
    """Copies on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last_use: dict[int, torch.cuda.Event] = {}
        """Address of a slot -> when what computes from it has ended."""

    def copy(self, slot: Tensor, source: Tensor, begin: int, end: int) -> Arrival | None:
        """Bytes of a parcel, behind the last use of the slot."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            last_use = self._last_use.pop(slot.data_ptr(), None)
            if last_use is not None:
                self._stream.wait_event(last_use)
            slot[begin:end].copy_(source[begin:end], non_blocking=True)
            arrived: Arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)  # type: ignore[attr-defined]
        if end < len(source):
            # The next chunk is given while this one moves.
            return arrived
        # Waiting leaves the interpreter to the other threads. Kernels that are launched after it
        # see the bytes, so they need not wait for the event themselves.
        arrived.synchronize()
        return None

    def used(self, slot: Tensor) -> None:
        """Mark the computing stream's place, which the next copy into the slot waits for."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._last_use[slot.data_ptr()] = event


class SlotBank:
    """Slots on the device, and both banks' part of a lane's work (``moesim.real.device``).

    ``on_host`` : computes an expert of the layer under way on the host, from its tensors.
    """

    def __init__(self, host: HostBank, ledger: SlotLedger, device: torch.device) -> None:
        self.host = host
        self.device = device
        self.on_host: Callable[[int, Views], None] = _nothing
        self.counts = dict(ledger.slots)
        self._ledger = ledger
        self._mover: Mover = StreamMover(device) if device.type == "cuda" else RamMover()
        self._slots = {size: self._bank(count) for size, count in self.counts.items()}
        self._views: dict[tuple[int, int, Parcel], Views] = {}
        if device.type == "cuda":
            # The zeros are there before another stream copies into them.
            torch.cuda.synchronize(device)

    def attend(self, ledger: SlotLedger) -> None:
        """A new run begins, with the same slots and empty books."""
        assert ledger.slots == self.counts
        self._ledger = ledger

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(count * self.host.stride for count in self.counts.values())

    # ---- what lanes ask --------------------------------------------------------------------------

    def copy(self, key: int, slot: int, begin: int, end: int) -> Arrival | None:
        """Bytes of an expert into its slot."""
        layer, expert = self._place(key)
        # The books count a parcel's bytes without what fills its cache lines.
        if end >= self._ledger.copy_bytes[key]:
            end = self.host.parcels[layer].stride
        return self._mover.copy(self._slot(key, slot), self.host.row(layer, expert), begin, end)

    def views(self, key: int, slot: int) -> Views:
        """The tensors of the expert in a slot."""
        parcel = self.host.parcels[key // self._ledger.experts]
        at = (self._ledger.bytes_of[key], slot, parcel)
        if at not in self._views:
            self._views[at] = parcel.views(self._slot(key, slot))
        return self._views[at]

    def used(self, key: int, slot: int) -> None:
        """An expert has been handed to the device."""
        self._mover.used(self._slot(key, slot))

    def host_expert(self, key: int, tokens: int) -> None:
        """Compute an expert where the host keeps it."""
        layer, expert = self._place(key)
        self.on_host(expert, self.host.views(layer, expert))

    def start_computing(self) -> None:
        """The model computes in its own thread."""

    def dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        """The model does that."""
        raise NotImplementedError

    def expert(self, key: int, slot: int, tokens: int) -> None:
        """The model does that."""
        raise NotImplementedError

    def computed(self) -> None:
        """The model's thread tells."""

    def manifest(self) -> dict[str, Any]:
        """What the banks hold."""
        return {
            "kind": self.device.type,
            "experts": sum(self.host.counts),
            "host_bytes": self.host.nbytes,
            "pinned": self.host.pinned,
            "why_pageable": self.host.why_not,
            "slots": {str(size): count for size, count in self.counts.items()},
            "compute": "the model's own",
        }

    def facts(self) -> dict[str, Any]:
        """Versions, threads, processor."""
        found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if self.device.type == "cuda":
            found["gpu"] = torch.cuda.get_device_name(self.device)
        else:
            found["instructions"] = torch.backends.cpu.get_cpu_capability()
        return found

    def close(self) -> None:
        """The memory goes with this object."""

    # ---- inside ----------------------------------------------------------------------------------

    def _place(self, key: int) -> tuple[int, int]:
        return divmod(self._ledger.expert(key), self._ledger.experts)

    def _slot(self, key: int, slot: int) -> Tensor:
        return self._slots[self._ledger.bytes_of[key]][slot]

    def _bank(self, count: int) -> Tensor:
        """uint8 [count, stride]; every page of it is touched before anything is timed."""
        try:
            bank = torch.zeros(count, self.host.stride, dtype=torch.uint8, device=self.device)
        except (RuntimeError, torch.cuda.OutOfMemoryError):
            raise _short(count * self.host.stride, self._free()) from None
        return bank

    def _free(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return usable_bytes()


def _unpin(region: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(region.data_ptr())  # type: ignore[no-untyped-call]


def refuse_short_ram(nbytes: int) -> None:
    """UsageError if banks of so many bytes do not fit the RAM that is free."""
    free = usable_bytes()
    if nbytes > free:
        raise _short(nbytes, free)


def _short(nbytes: int, free: int) -> UsageError:
    return UsageError(
        f"--capacity: the experts' banks take {nbytes / 1e9:.3f} GB and {free / 1e9:.3f} GB of "
        "memory are free; give less --capacity, or use a smaller model or dtype"
    )


def _nothing(expert: int, weights: Views) -> None:
    raise AssertionError("no layer is under way")
