"""What a lane asks of a machine. One class a kind of device; ``moesim.real.cpu`` is the first."""

from __future__ import annotations

from typing import Any, Protocol

KINDS = ("cpu",)


class Device(Protocol):
    """Banks and arithmetic of one device. Each method is called from one thread only.

    ``key``: an expert's key; ``slot``: where its copy lies, among slots of its size.
    """

    def copy(self, key: int, slot: int, begin: int, end: int) -> None:
        """Copy bytes ``begin`` to ``end`` of an expert into its slot; back when they are there."""

    def start_computing(self) -> None:
        """Called once, by the thread that computes, before it does."""

    def dense(self, layer: int, tokens: int) -> None:
        """Compute a layer's dense part (-1: the output head); back when it is done."""

    def expert(self, key: int, slot: int, tokens: int) -> None:
        """Compute an expert from its slot; back when it is done."""

    def host_expert(self, key: int, tokens: int) -> None:
        """Compute an expert where the host keeps it."""

    def manifest(self) -> dict[str, Any]:
        """What the banks hold and what is computed: a part of the run's manifest."""

    def facts(self) -> dict[str, Any]:
        """Versions, threads, processor: what may differ between equal runs."""

    def close(self) -> None:
        """Give everything back."""
