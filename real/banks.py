"""From a request to a device with full banks: what fits, what is kept from the run before."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from moesim.configuration import Configuration
from moesim.profile import ModelProfile
from moesim.real import cuda
from moesim.real.cpu import Cpu, compute_type
from moesim.real.cuda import Claim, Cuda, Pins
from moesim.real.device import Device
from moesim.real.host_bank import HostBank
from moesim.real.memory import Fit, Needs, fit, fit_beside, usable_bytes
from moesim.real.slots import SlotLedger

if TYPE_CHECKING:
    from moesim.real.run import RealRequest


class HeldBank:
    """The experts of the newest model in host memory; pinned for a CUDA device, which is then this
    process's alone."""

    def __init__(self, device: str) -> None:
        self._bank: HostBank | None = None
        self._known: tuple[object, ...] = ()
        self._claim: Claim | None = None
        self._pins: Pins | None = None
        self.type_of: Callable[[str], torch.dtype] = compute_type
        if device == "cuda":
            cuda.require()
            self._claim, self._pins = Claim(), Pins()
            self.type_of = cuda.compute_type

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return 0 if self._bank is None else self._bank.count * self._bank.stride

    def experts(
        self, model: ModelProfile, needs: Needs, buffers: int, seed: int, *, held: bool = False
    ) -> HostBank:
        """At most so many buffers: those that are there, or new ones. ``held``: those that are
        there may be more, for nothing else wants their room."""
        known = (model.layers * model.experts, needs.expert_bytes, model.dtype, seed)
        large = self._bank is not None and self._bank.count > buffers and not held
        if self._bank is None or known != self._known or large:
            self._drop()
            pin = None if self._pins is None else self._pins.pin
            dtype = self.type_of(model.dtype)
            self._bank = HostBank(needs.expert_bytes, buffers, dtype, seed, pin)
            self._known = known
            if self._pins is not None and not self._bank.pinned:
                # Half pinned would be two speeds in one run.
                self._pins.close()
        return self._bank

    def close(self) -> None:
        """Give everything back."""
        if self._drop() and self._claim is not None:
            self._claim.close()

    def _drop(self) -> bool:
        """Give the experts' memory back; False where a device would not leave it."""
        bank, self._bank = self._bank, None
        if self._pins is not None:
            if cuda.keep_abandoned((self._pins, self._claim), bank):
                self._pins = Pins()
                return False
            self._pins.close()
        return True


def open_device(
    held: HeldBank,
    request: RealRequest,
    configuration: Configuration,
    ledger: SlotLedger,
    closing: Callable[[], None],
) -> Device:
    """A device for a configuration. Raises UsageError for what does not fit."""
    model, what = configuration.model, configuration.request
    capacity = configuration.capacity.text
    needs = Needs.of(model, ledger.slots, what.batch, configuration.longest)
    # What is held already is not free, and may be used.
    ram = usable_bytes() + held.nbytes if request.ram_bytes is None else request.ram_bytes
    threads = request.threads or max(1, (os.cpu_count() or 1) - 1)
    if request.device == "cuda":
        shared = fit_beside(needs, cuda.free_bytes(), ram, capacity)
    else:
        shared = fit(needs, ram, capacity)
    # Beside a device with memory of its own experts alone lie in RAM: a little less of it than the
    # run before found is no reason to fill and pin them all again.
    stays = request.device == "cuda" and request.ram_bytes is None
    bank = held.experts(model, needs, shared.expert_buffers, what.seed, held=stays)
    shared = Fit(bank.count, shared.dense_buffers)
    if request.device == "cuda":
        return Cuda(
            model, ledger, needs, shared, bank,
            threads=threads, seed=what.seed, verify=request.verify, capacity=capacity,
            closing=closing,
        )  # fmt: skip
    return Cpu(
        model, ledger, needs, shared,
        threads=threads, seed=what.seed, verify=request.verify, bank=bank, closing=closing,
    )  # fmt: skip
