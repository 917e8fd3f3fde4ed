"""The processor as its own device: both banks in RAM, the copy a real copy, compute in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moesim.errors import UsageError
from moesim.profile import ModelProfile
from moesim.real.banked import Banked
from moesim.real.host_bank import HostBank, zeros
from moesim.real.kernels import DenseParts, Experts, numbers_of
from moesim.real.memory import Fit, Needs, aligned
from moesim.real.slots import SlotLedger
from moesim.types import AnyArray
from moesim.workload import Row

_RAM = torch.device("cpu")


class Cpu(Banked):
    """Banks and arithmetic in RAM.

    Every expert is a gated MLP of the model's hidden size. Its width is what its bytes hold in the
    type that is computed with, so that all bytes that were copied are read: for a profile in bf16
    that is the model's own width, for four-bit experts about a quarter of it.

    """

    kind = "cpu"

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
        dtype = compute_type(model.dtype)
        bank = bank or HostBank(needs.expert_bytes, shared.expert_buffers, dtype, seed)
        super().__init__(
            model, ledger, shared, bank, dtype, threads=threads, verify=verify, closing=closing
        )
        self._slots = {size: zeros(n, aligned(size)).numpy() for size, n in needs.slots.items()}
        try:
            self._on_host = self._gated = Experts(model.hidden, dtype, _RAM)
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

    def computed(self) -> None:
        """It is computed when the call is back."""

    # ---- between runs ----------------------------------------------------------------------------

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

    def _slot(self, key: int, slot: int) -> AnyArray:
        row: AnyArray = self._slots[self._ledger.bytes_of[key]][slot]
        return row[: self._ledger.copy_bytes[key]]

    def _check(self, key: int, copy: AnyArray, when: str) -> None:
        if self._verify and not np.array_equal(copy, self._host(key)):
            raise self._other_bytes(key, when)


def compute_type(dtype: str) -> torch.dtype:
    """The profile's type, where the processor multiplies it well."""
    if dtype in ("fp32", "float32"):
        return torch.float32
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if supported else torch.float32
