"""Measure a CUDA device: copies by events on a stream of their own, compute on another.

Expert and dense part are those of ``cpu.py``, in bf16 or fp32, and attention reads a cache of the
context. What the deciding thread costs, and experts on the host, come from ``measure_cpu.py``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from moesim.errors import UsageError
from moesim.profile import Memory, ModelProfile
from moesim.real.attention import without_cudnn
from moesim.real.cuda import Pins, compute_type, free_cached, pinned, require
from moesim.real.host_bank import whole_pages
from moesim.real.kernels import DenseParts, Inputs, mlp, said_of
from moesim.real.measure import (
    ALONE,
    CHUNK_BYTES,
    COMPUTING,
    CONTEXTS,
    COPYING,
    DENSE,
    EXPERT,
    HANDOVER,
    HEAD,
    HOST_EXPERT,
    HOSTING,
    LINK,
    SYNC,
    Point,
    kinds_of,
    rows_of,
)
from moesim.real.measure_cpu import CpuBench
from moesim.real.measure_service import bench_model
from moesim.real.memory import Fit, Needs, aligned

_CUDA: Any = torch.cuda
_DEVICE = "cuda"

BANK_BYTES = 1 << 29
"""Experts to measure with: more than a device caches."""
PINNED, PAGEABLE = "pinned", "pageable"


class CudaBench:
    """One CUDA device; see ``measure.Bench``."""

    def __init__(self, model: ModelProfile, *, threads: int, seed: int = 0) -> None:
        require(_CUDA)
        self._host_bench = CpuBench(model, threads=threads, seed=seed)
        self._whole = model
        self._kinds = kinds_of(model)
        self.model = bench_model(model, self._kinds, BANK_BYTES)
        self._pins = Pins()
        self._with_cudnn = without_cudnn()
        self.reads_context = bool(self.model.kv_bytes_table().any())
        self._turn = 0
        try:
            self._open(seed)
        except _CUDA.OutOfMemoryError:
            self.close()
            raise UsageError(
                f"--model {model.name}: what it takes to measure does not fit the device's memory;"
                " end what else uses the device, or name a smaller model"
            ) from None
        except BaseException:
            self.close()
            raise

    # ---- for the calibration ---------------------------------------------------------------------

    def measure(self, point: Point) -> float:
        """One run of it, in ns."""
        if point.what == HOST_EXPERT:
            return self._host_bench.measure(point)
        self._turn += 1
        if point.what == LINK:
            return self._link(point)
        work = self._work(point)
        with self._beside(point.how):
            return self._timed(self._compute, work) / self._times(point)

    def overheads(self) -> Mapping[str, float]:
        """Those of the threads, and the way of the routing from the device to the host."""
        found = dict(self._host_bench.overheads())
        start = time.perf_counter_ns()
        with _CUDA.stream(self._compute):
            self._routing.copy_(self._chosen, non_blocking=True)
            routed = _CUDA.Event()
            routed.record()
        routed.synchronize()
        found[SYNC] += time.perf_counter_ns() - start
        # A copy is reported while its last chunk moves, so what is handed over meanwhile costs
        # nothing.
        last = min(CHUNK_BYTES, len(self._landing))
        meanwhile = self._timed(self._copying, lambda: self._copy(self._pinned, last))
        found[HANDOVER] = max(0.0, found[HANDOVER] - meanwhile)
        return found

    def rates(self) -> Mapping[str, float]:
        """Those of the host."""
        return self._host_bench.rates()

    def memory(self) -> Memory:
        """All of the device's; reserved is what a process, its kernels and others hold of it."""
        free, total = _CUDA.mem_get_info()
        return Memory(total, total - min(total - 1, free + self._held))

    def workers(self) -> int:
        """Cores that neither copy, compute nor decide, one at least."""
        return max(1, (os.cpu_count() or 1) - 3)

    def facts(self) -> dict[str, Any]:
        """Versions, the device, the processor."""
        device = _CUDA.get_device_properties(0)
        return {**self._host_bench.facts(), "device_name": device.name, "cuda": torch.version.cuda}

    def manifest(self) -> dict[str, Any]:
        """What was computed with."""
        return {
            "kind": "cuda",
            "compute_dtype": str(self._type).removeprefix("torch."),
            "pinned": self._is_pinned,
            "why_pageable": self._why_not,
            "cudnn_attention": False,
            "context": said_of(self._parts.cache),
        }

    def close(self) -> None:
        """Give everything back."""
        with suppress(RuntimeError):
            _CUDA.synchronize()
        self._with_cudnn()
        self._pins.close()
        for name in ("_bank", "_parts", "_landing", "_chosen", "_routing", "_pinned"):
            self.__dict__.pop(name, None)
        free_cached()
        self._host_bench.close()

    # ---- transfers -------------------------------------------------------------------------------

    @property
    def hows(self) -> Mapping[str, tuple[str, ...]]:
        """Pinned memory first, where it may be had."""
        beside = (ALONE, COMPUTING, HOSTING)
        memory = [PINNED, PAGEABLE] if self._is_pinned else [PAGEABLE]
        return {
            LINK: tuple(f"{kind}, {how}" for kind in memory for how in beside),
            DENSE: (ALONE,),
            EXPERT: (ALONE, COPYING),
            HOST_EXPERT: (ALONE,),
            HEAD: (ALONE,),
        }

    def _link(self, point: Point) -> float:
        kind, _, how = point.how.partition(", ")
        source = self._pinned if kind == PINNED else self._pageable
        with self._beside(how):
            return self._timed(self._copying, lambda: self._copy(source, point.size))

    def _copy(self, source: torch.Tensor, nbytes: int) -> None:
        """Chunk after chunk, as a run would send them."""
        first = self._turn * nbytes % max(1, len(source) - nbytes)
        for begin in range(0, nbytes, CHUNK_BYTES):
            end = min(nbytes, begin + CHUNK_BYTES)
            part = source[first + begin : first + end]
            self._landing[begin:end].copy_(part, non_blocking=True)

    @contextmanager
    def _beside(self, how: str) -> Iterator[None]:
        """Something else goes on before and after what happens inside."""
        if how == HOSTING:
            with self._host_bench.hosting():
                yield
            return
        if how == COMPUTING:
            with _CUDA.stream(self._compute):
                for _ in range(64):
                    self._expert(0, 1)
        elif how == COPYING:
            with _CUDA.stream(self._copying):
                for _ in range(4):
                    self._copy(self._pinned, len(self._landing))
        yield
        _CUDA.synchronize()

    # ---- compute ---------------------------------------------------------------------------------

    def _work(self, point: Point) -> Callable[[], None]:
        if point.what == EXPERT:
            # One after the other, as those that are resident compute: launched side by side.
            def experts() -> None:
                for _ in range(self._times(point)):
                    self._expert(point.kind, point.size)

            return experts
        if point.what == HEAD:
            return lambda: self._parts.head(point.size)
        return lambda: self._parts.dense(point.kind, point.size, rows_of(point), self._turn)

    def _times(self, point: Point) -> int:
        return self.model.top_k if point.what == EXPERT else 1

    def _expert(self, kind: int, tokens: int) -> None:
        """A gated MLP over the bytes of one of the bank's experts."""
        width = int(self.model.expert_bytes_table()[kind]) // self._type.itemsize
        self._turn += 1
        first = self._turn * width % max(1, len(self._bank) - width)
        # A matrix begins where the kernels like it.
        first -= first % 64
        mlp(self._parts.inputs(tokens), self._bank[first : first + width])

    def _timed(self, stream: Any, work: Callable[[], None]) -> float:
        """ns between two events on a stream, launches and all."""
        begin, end = (_CUDA.Event(enable_timing=True) for _ in range(2))
        with torch.inference_mode(), _CUDA.stream(stream):
            begin.record()
            work()
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e6

    # ---- opening ---------------------------------------------------------------------------------

    def _open(self, seed: int) -> None:
        model = self.model
        self._type = compute_type(model.dtype)
        self._compute, self._copying = _CUDA.Stream(), _CUDA.Stream()
        largest = int(model.expert_bytes_table().max())
        made = torch.Generator(_DEVICE).manual_seed(seed % (1 << 63))
        bank = model.experts * int(model.expert_bytes_table().sum())
        self._bank = self._random(bank, made)
        needs = Needs.of(model, {}, positions=CONTEXTS[-1])
        buffers = min(self._whole.layers, -(-BANK_BYTES // needs.dense_bytes))
        inputs = Inputs(model.hidden, self._type, torch.device(_DEVICE))
        self._parts = DenseParts.random(model, needs, Fit(0, buffers), inputs, seed + 1)
        self._landing = torch.empty(largest, dtype=torch.uint8, device=_DEVICE)
        held = buffers * aligned(needs.dense_bytes) + needs.fixed_bytes
        self._held = held + sum(t.nbytes for t in (self._bank, self._landing))
        self._pageable = torch.zeros(2 * largest, dtype=torch.uint8)
        # Exact (torch's own allocator rounds up to powers of two), or pageable where the system
        # refuses.
        self._pinned = whole_pages(2 * largest).fill_(0)
        self._why_not = self._pins.pin(self._pinned)
        self._is_pinned = not self._why_not
        # Experts and weights, as a router says them of one token.
        self._routing = pinned(16 * model.top_k)
        self._chosen = torch.zeros(16 * model.top_k, dtype=torch.uint8, device=_DEVICE)
        # All that was made on the default stream is there for the other two.
        _CUDA.synchronize()

    def _random(self, nbytes: int, made: torch.Generator) -> torch.Tensor:
        count = nbytes // self._type.itemsize
        return torch.empty(count, dtype=self._type, device=_DEVICE).normal_(
            0, 1 / 64, generator=made
        )
