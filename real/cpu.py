"""The processor as its own device: both banks in RAM, the copy a real copy, compute in torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from moesim.errors import UsageError
from moesim.profile import ModelProfile
from moesim.real.errors import ExecutionError
from moesim.real.memory import Fit, Needs, aligned
from moesim.real.slots import SlotLedger
from moesim.types import AnyArray

_SHIFT = 64
"""Bytes between what two neighbours take of the random block: their contents differ."""


class Cpu:
    """Banks and arithmetic in RAM.

    Every expert is a gated MLP of the model's hidden size. Its width is what its bytes hold in the
    type that is computed with, so that all bytes that were copied are read: for a profile in bf16
    that is the model's own width, for four-bit experts about a quarter of it.

    verify : compare a slot with the host's expert before and after it computes.
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
    ) -> None:
        self._model = model
        self._ledger = ledger
        self._shared = shared
        self._threads = threads
        self._threads_before = torch.get_num_threads()
        self._verify = verify
        self._type = _compute_type(model.dtype)
        self._made = torch.Generator().manual_seed(seed % (1 << 63))
        try:
            self._experts = self._bank(needs.expert_bytes, shared.expert_buffers)
            self._dense = self._bank(needs.dense_bytes, shared.dense_buffers)
            self._head = self._bank(needs.head_bytes, 1)
            self._slots = {
                size: _block(count, aligned(size)) for size, count in needs.slots.items()
            }
        except RuntimeError as error:
            raise UsageError(f"RAM ran out: {error}; give less --capacity or --ram") from None
        self._dense_bytes: list[int] = model.dense_bytes_table().tolist()
        self._inputs = torch.empty(0, model.hidden)
        self._output = torch.empty(0, model.hidden)

    # ---- the copy lane ---------------------------------------------------------------------------

    def copy(self, key: int, slot: int, begin: int, end: int) -> None:
        """Copy bytes ``begin`` to ``end`` of an expert into its slot."""
        # NumPy copies in this thread alone and lets the others run; torch would take their cores.
        np.copyto(self._slot(key, slot)[begin:end], self._host(key)[begin:end])

    # ---- the compute lane ------------------------------------------------------------------------

    def start_computing(self) -> None:
        """The thread that calls computes with ``threads`` from now on, and has done so once."""
        torch.set_num_threads(self._threads)
        self.dense(0, 1)
        self._gated(self._host(0), 1)

    def dense(self, layer: int, tokens: int) -> None:
        """One matrix of the dense part's bytes; over the context nothing is computed."""
        nbytes = self._model.head_bytes if layer < 0 else self._dense_bytes[layer]
        bank, number = (self._head, 0) if layer < 0 else (self._dense, layer)
        weights = self._weights(bank[number % len(bank)][:nbytes])
        width = min(self._model.hidden, weights.numel())
        if width:
            with torch.inference_mode():
                rows = weights.numel() // width
                functional.linear(
                    self._tokens(tokens)[:, :width], weights[: rows * width].view(rows, width)
                )

    def expert(self, key: int, slot: int, tokens: int) -> None:
        """A gated MLP over the bytes in the slot."""
        copy = self._slot(key, slot)
        self._check(key, copy, "before")
        self._gated(copy, tokens)
        self._check(key, copy, "while")

    # ---- the host's workers ----------------------------------------------------------------------

    def host_expert(self, key: int, tokens: int) -> None:
        """A gated MLP over the host's bytes."""
        with torch.inference_mode():
            mlp(self._tokens(tokens), self._weights(self._host(key)))

    # ---- what is said of it ----------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Banks, and what is computed with."""
        return {
            "kind": "cpu",
            "expert_buffers": self._shared.expert_buffers,
            "experts": self._model.layers * self._model.experts,
            "dense_buffers": self._shared.dense_buffers,
            "slots": {str(size): count for size, count in self._ledger.slots.items()},
            "compute_dtype": str(self._type).removeprefix("torch."),
            "expert_width": _shape(int(self._ledger.copy_bytes[0]), self._type, self._model)[1],
            "context": "not computed",
        }

    def facts(self) -> dict[str, Any]:
        """Versions, threads, processor."""
        return {
            "torch": torch.__version__,
            "threads": self._threads,
            "processor_name": _processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }

    def close(self) -> None:
        """Give the threads back; the memory goes with this object."""
        torch.set_num_threads(self._threads_before)

    # ---- inside ----------------------------------------------------------------------------------

    def _bank(self, nbytes: int, count: int) -> AnyArray:
        """uint8 [count, nbytes rounded up], small normal numbers, each row another part of them."""
        stride = aligned(nbytes)
        bank = _block(count, stride)
        numbers = (stride + count * _SHIFT) // self._type.itemsize + 1
        random = (torch.randn(numbers, generator=self._made) / 64).to(self._type)
        block = random.view(torch.uint8).numpy()
        for row in range(count):
            bank[row] = block[row * _SHIFT : row * _SHIFT + stride]
        return bank

    def _host(self, key: int) -> AnyArray:
        expert = self._ledger.expert(key)
        row: AnyArray = self._experts[expert % len(self._experts)]
        return row[: self._ledger.copy_bytes[key]]

    def _slot(self, key: int, slot: int) -> AnyArray:
        row: AnyArray = self._slots[self._ledger.bytes_of[key]][slot]
        return row[: self._ledger.copy_bytes[key]]

    def _weights(self, nbytes: AnyArray) -> torch.Tensor:
        whole = len(nbytes) // self._type.itemsize * self._type.itemsize
        return torch.from_numpy(nbytes[:whole]).view(self._type)

    def _gated(self, nbytes: AnyArray, tokens: int) -> None:
        with torch.inference_mode():
            result = mlp(self._tokens(tokens), self._weights(nbytes))
            if tokens > len(self._output):
                self._output = torch.zeros_like(self._tokens(tokens))
            if result is not None:
                self._output[:tokens, : result.shape[1]] += result

    def _tokens(self, count: int) -> torch.Tensor:
        """Inputs of so many tokens; any will do, for routing is forced."""
        inputs = self._inputs
        if count > len(inputs):
            inputs = self._inputs = torch.randn(count, self._model.hidden).to(self._type)
        return inputs[:count]

    def _check(self, key: int, copy: AnyArray, when: str) -> None:
        if self._verify and not np.array_equal(copy, self._host(key)):
            experts = self._model.experts
            raise ExecutionError(
                f"the slot of expert {key // experts}.{key % experts} held other bytes {when} it "
                "computed"
            )


def mlp(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
    """down(silu(gate(x)) * up(x)); None where the bytes hold no weight of each."""
    hidden, width = _sides(weights.numel(), inputs.shape[1])
    if not width:
        return None
    split = 2 * width * hidden
    both = functional.linear(inputs[:, :hidden], weights[:split].view(2 * width, hidden))
    inner = functional.silu(both[:, :width]) * both[:, width:]
    return functional.linear(inner, weights[split : 3 * width * hidden].view(hidden, width))


def _shape(nbytes: int, dtype: torch.dtype, model: ModelProfile) -> tuple[int, int]:
    return _sides(nbytes // dtype.itemsize, model.hidden)


def _sides(numbers: int, hidden: int) -> tuple[int, int]:
    """(hidden size, width) of three equal matrices made of so many numbers."""
    hidden = min(hidden, numbers // 3)
    return hidden, numbers // (3 * hidden) if hidden else 0


def _block(count: int, stride: int) -> AnyArray:
    # Written once, so that no page of it is first touched while a run is timed.
    return torch.empty(count * stride, dtype=torch.uint8).fill_(0).numpy().reshape(count, stride)


def _compute_type(dtype: str) -> torch.dtype:
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
