"""What a lane asks of a machine. One class a kind of device: ``cpu.py``, ``cuda.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from moesim.workload import Row

KINDS = ("cpu", "cuda")


class Arrival(Protocol):
    """A copy on its way; an event of a stream is one."""

    def synchronize(self) -> None:
        """Wait until it is there."""


class Device(Protocol):
    """Banks and arithmetic of one device. Each method is called from one thread only.

    ``key``: an expert's key; ``slot``: where its copy lies, among slots of its size.
    """

    def copy(self, key: int, slot: int, begin: int, end: int) -> Arrival | None:
        """Copy bytes ``begin`` to ``end`` of an expert into its slot; back when they are there
        (None), or when they are on their way. What computes from the slot waits by itself."""

    def start_computing(self) -> None:
        """Called once, by the thread that computes, before it does."""

    def dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        """Compute a layer's dense part (-1: the output head); back when it is done and the host
        knows what came out."""

    def expert(self, key: int, slot: int, tokens: int) -> None:
        """Compute an expert from its slot; back when the slot may be given away."""

    def computed(self) -> Sequence[tuple[int, int]] | None:
        """(begin, end) by ``time.perf_counter_ns`` of each dense part and expert that has been
        computed since this was last asked, in order. None: those who call know it themselves."""

    def host_expert(self, key: int, tokens: int) -> None:
        """Compute an expert where the host keeps it."""

    def manifest(self) -> dict[str, Any]:
        """What the banks hold and what is computed: a part of the run's manifest."""

    def facts(self) -> dict[str, Any]:
        """Versions, threads, processor: what may differ between equal runs. A device with a clock
        of its own says ``link_ns`` and ``link_bytes``: how long copies moved, and how much."""

    def close(self) -> None:
        """Give everything back."""
