"""What the devices share: whose banks they hold, experts on the host, what a manifest says."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesim.profile import ModelProfile
from moesim.real.errors import ExecutionError
from moesim.real.host_bank import HostBank
from moesim.real.kernels import DenseParts, Experts, mlp, numbers_of, said_of, sides
from moesim.real.memory import Fit
from moesim.real.slots import SlotLedger
from moesim.types import AnyArray


class Banked:
    """A model's banks on one device; what differs by device is the subclass's.

    bank : the experts in host memory. verify : compare a slot with the host's expert before and
    after it computes. closing : called when the device is closed.
    """

    kind: str
    _parts: DenseParts
    _on_host: Experts
    """Arithmetic of the host's workers."""

    def __init__(
        self,
        model: ModelProfile,
        ledger: SlotLedger,
        shared: Fit,
        bank: HostBank,
        dtype: torch.dtype,
        *,
        threads: int,
        verify: bool,
        closing: Callable[[], None],
    ) -> None:
        self._model = model
        self._ledger = ledger
        self._shared = shared
        self._bank = bank
        self._type = dtype
        self._threads = threads
        self._threads_before = torch.get_num_threads()
        self._verify = verify
        self._closing = closing

    def host_expert(self, key: int, tokens: int) -> None:
        """A gated MLP over the host's bytes."""
        with torch.inference_mode():
            mlp(self._on_host.inputs(tokens), numbers_of(self._host(key), self._type))

    def manifest(self) -> dict[str, Any]:
        """Banks, and what is computed with."""
        return {
            "kind": self.kind,
            "expert_buffers": self._bank.count,
            "experts": self._model.layers * self._model.experts,
            "dense_buffers": self._shared.dense_buffers,
            "slots": {str(size): count for size, count in self._ledger.slots.items()},
            "compute_dtype": str(self._type).removeprefix("torch."),
            "expert_width": self._width(),
            "context": said_of(self._parts.cache),
            "cache_bytes": self._parts.cache.nbytes,
        }

    def facts(self) -> dict[str, Any]:
        """Versions, threads, processor."""
        return {
            "torch": torch.__version__,
            "threads": self._threads,
            "processor_name": _processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }

    # ---- for the subclass ------------------------------------------------------------------------

    def _host(self, key: int) -> AnyArray:
        """uint8 of an expert in host memory."""
        return self._bank.row(self._ledger.expert(key))[: self._ledger.copy_bytes[key]]

    def _other_bytes(self, key: int, when: str) -> ExecutionError:
        """A slot does not hold what was copied there."""
        place = f"{key // self._model.experts}.{key % self._model.experts}"
        return ExecutionError(f"the slot of expert {place} held other bytes {when} it computed")

    def _width(self) -> int:
        """Of the first expert, as its bytes hold it in the type that is computed with."""
        return sides(self._ledger.copy_bytes[0] // self._type.itemsize, self._model.hidden)[1]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"
