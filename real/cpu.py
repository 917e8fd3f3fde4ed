"""The processor as its own device: both banks in RAM, the copy a real copy, compute in torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim.errors import UsageError
from moesim.profile import ModelProfile
from moesim.real.errors import ExecutionError
from moesim.real.host_bank import HostBank, zeros
from moesim.real.kernels import DenseParts, Experts, mlp, numbers_of, said_of, sides
from moesim.real.memory import Fit, Needs, aligned
from moesim.real.slots import SlotLedger
from moesim.types import AnyArray
from moesim.workload import Row

_RAM = torch.device("cpu")


class Cpu:
    """Banks and arithmetic in RAM.

    Every expert is a gated MLP of the model's hidden size. Its width is what its bytes hold in the
    type that is computed with, so that all bytes that were copied are read: for a profile in bf16
    that is the model's own width, for four-bit experts about a quarter of it.

    bank : the experts. verify : compare a slot with the host's expert before and after it computes.
    """

    def __init__(
        self,
        model: ModelProfile,
        ledger: SlotLedger,
        needs: Needs,
        shared: Fit,
        *,
        threads: int,
        seed: int = 0,
        verify: bool = False,
        bank: HostBank | None = None,
        closing: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._ledger = ledger
        self._shared = shared
        self._threads = threads
        self._threads_before = torch.get_num_threads()
        self._verify = verify
        self._closing = closing
        self._type = compute_type(model.dtype)
        self._bank = bank or HostBank(needs.expert_bytes, shared.expert_buffers, self._type, seed)
        self._slots = {size: zeros(n, aligned(size)).numpy() for size, n in needs.slots.items()}
        try:
            self._gated = Experts(model.hidden, self._type, _RAM)
            self._parts = DenseParts.random(model, needs, shared, self._gated.inputs, seed + 1)
        except RuntimeError as error:
            raise UsageError(f"RAM ran out: {error}; give less --capacity or --ram") from None

    # ---- the copy lane ---------------------------------------------------------------------------

    def copy(self, key: int, slot: int, begin: int, end: int) -> None:
        """Copy bytes ``begin`` to ``end`` of an expert into its slot."""
        # NumPy copies in this thread alone and lets the others run; torch would take their cores.
        np.copyto(self._slot(key, slot)[begin:end], self._host(key)[begin:end])

    # ---- the compute lane ------------------------------------------------------------------------

    def start_computing(self) -> None:
        """The thread that calls computes with ``threads`` from now on, and has done so once."""
        torch.set_num_threads(self._threads)
        self.dense(0, 1, self._parts.cache.anyone())
        self.dense(-1, 1, ())
        self._gated.compute(numbers_of(self._host(0), self._type), 1)

    def dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        """A layer's dense part, or the output head."""
        if layer < 0:
            self._parts.head(tokens)
        else:
            self._parts.dense(layer, tokens, rows)

    def expert(self, key: int, slot: int, tokens: int) -> None:
        """A gated MLP over the bytes in the slot."""
        copy = self._slot(key, slot)
        self._check(key, copy, "before")
        self._gated.compute(numbers_of(copy, self._type), tokens)
        self._check(key, copy, "while")

    # ---- the host's workers ----------------------------------------------------------------------

    def host_expert(self, key: int, tokens: int) -> None:
        """A gated MLP over the host's bytes."""
        with torch.inference_mode():
            mlp(self._gated.inputs(tokens), numbers_of(self._host(key), self._type))

    # ---- what is said of it ----------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Banks, and what is computed with."""
        return {
            "kind": "cpu",
            "expert_buffers": self._bank.count,
            "experts": self._model.layers * self._model.experts,
            "dense_buffers": self._shared.dense_buffers,
            "slots": {str(size): count for size, count in self._ledger.slots.items()},
            "compute_dtype": str(self._type).removeprefix("torch."),
            "expert_width": width_of(self._model, self._ledger, self._type),
            "context": said_of(self._parts.cache),
            "cache_bytes": self._parts.cache.nbytes,
        }

    def facts(self) -> dict[str, Any]:
        """Versions, threads, processor."""
        return host_facts(self._threads)

    def lend(self, ledger: SlotLedger) -> bool:
        """Serve another run of the same model and batches from these banks; False: too few slots.

        To fill banks takes longer than a short run.
        """
        fits = all(len(self._slots.get(size, ())) >= n for size, n in ledger.slots.items())
        if fits:
            self._ledger = ledger
        return fits

    def close(self) -> None:
        """Give the threads back; the memory goes with this object."""
        torch.set_num_threads(self._threads_before)
        self._closing()

    # ---- inside ----------------------------------------------------------------------------------

    def _host(self, key: int) -> AnyArray:
        return self._bank.row(self._ledger.expert(key))[: self._ledger.copy_bytes[key]]

    def _slot(self, key: int, slot: int) -> AnyArray:
        row: AnyArray = self._slots[self._ledger.bytes_of[key]][slot]
        return row[: self._ledger.copy_bytes[key]]

    def _check(self, key: int, copy: AnyArray, when: str) -> None:
        if self._verify and not np.array_equal(copy, self._host(key)):
            raise other_bytes(self._model, key, when)


def other_bytes(model: ModelProfile, key: int, when: str) -> ExecutionError:
    """A slot does not hold what was copied there."""
    place = f"{key // model.experts}.{key % model.experts}"
    return ExecutionError(f"the slot of expert {place} held other bytes {when} it computed")


def width_of(model: ModelProfile, ledger: SlotLedger, dtype: torch.dtype) -> int:
    """Width of the first expert, as its bytes hold it in a type."""
    return sides(ledger.copy_bytes[0] // dtype.itemsize, model.hidden)[1]


def host_facts(threads: int) -> dict[str, Any]:
    """Versions, threads, processor."""
    return {
        "torch": torch.__version__,
        "threads": threads,
        "processor_name": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def compute_type(dtype: str) -> torch.dtype:
    """The profile's type, where the processor multiplies it well."""
    if dtype in ("fp32", "float32"):
        return torch.float32
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"
