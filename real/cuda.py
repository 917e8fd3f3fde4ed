"""A CUDA device: slots, dense parts, KV cache in its memory, copies on a stream of their own.

What waits, waits on events, on the device: a copy for the last use of its slot, an expert for the
last chunk of its copy. The host waits where the routing becomes known, after each dense part, as an
engine must; and the copy thread for the chunk before the one that it has just given.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TextIO

import torch

from moesim.errors import NotRunError, UsageError
from moesim.profile import ModelProfile
from moesim.real.attention import without_cudnn
from moesim.real.banked import Banked
from moesim.real.errors import ExecutionError
from moesim.real.host_bank import HostBank
from moesim.real.kernels import DenseParts, Experts, numbers_of
from moesim.real.measure import kinds_of
from moesim.real.memory import Fit, Needs, aligned
from moesim.real.slots import SlotLedger
from moesim.workload import Row

_CUDA: Any = torch.cuda
_DEVICE = "cuda"
_LOCKS = Path(gettempdir())

WORKSPACE_BYTES = 1 << 30
"""Of a device's free memory, left to kernels and activations; a tenth where that is less."""
_SETTLED = 512
"""Pairs of events kept before those that have passed are added up."""

_PROMPT = 64
"""Tokens of the prompt that kernels are warmed up with."""

_LEAVE_S = 10.0
"""How long a device may take to come to an end."""

_Place = tuple[int, int]
"""Bytes of a slot, and its number among slots of that size."""


class Cuda(Banked):
    """Banks and arithmetic of one device. The experts' width is as in ``cpu.py``.

    bank : the experts, readable for the device where it could be had.
    verify : it waits for what is compared.
    """

    kind = "cuda"

    def __init__(
        self,
        model: ModelProfile,
        ledger: SlotLedger,
        needs: Needs,
        shared: Fit,
        bank: HostBank,
        *,
        threads: int,
        seed: int = 0,
        verify: bool = False,
        capacity: str = "",
        closing: Callable[[], None] = lambda: None,
    ) -> None:
        dtype = compute_type(model.dtype)
        super().__init__(
            model, ledger, shared, bank, dtype, threads=threads, verify=verify, closing=closing
        )
        self._compute, self._copying = _CUDA.Stream(), _CUDA.Stream()
        self._arrived: dict[_Place, Any] = {}
        self._used: dict[_Place, Any] = {}
        self._meter = Meter()
        self._watch = Stopwatch()
        self._with_cudnn = without_cudnn()
        try:
            self._open(needs, seed)
        except _CUDA.OutOfMemoryError:
            self.close()
            raise UsageError(
                f"--capacity {capacity}: the device's memory ran out while the banks were made; "
                "something else uses it. End that, or give less --capacity"
            ) from None
        except BaseException:
            self.close()
            raise
        torch.set_num_threads(threads)

    def _open(self, needs: Needs, seed: int) -> None:
        device = torch.device(_DEVICE)
        self._slots = {
            size: torch.zeros(count, aligned(size), dtype=torch.uint8, device=device)
            for size, count in needs.slots.items()
        }
        self._experts = Experts(self._model.hidden, self._type, device)
        inputs = self._experts.inputs
        self._parts = DenseParts.random(self._model, needs, self._shared, inputs, seed + 1)
        self._on_host = Experts(self._model.hidden, self._type, torch.device("cpu"))
        # Experts and weights of a token, as a router says them.
        self._routing = torch.zeros(16 * self._model.top_k, dtype=torch.uint8, device=device)
        self._known = pinned(16 * self._model.top_k)
        # All that was made on the default stream is there for the other two.
        _CUDA.synchronize()

    # ---- the copy lane ---------------------------------------------------------------------------

    def copy(self, key: int, slot: int, begin: int, end: int) -> Any:
        """Send bytes ``begin`` to ``end``, behind the last use of the slot; the event of their
        arrival."""
        place = self._place(key, slot)
        source = self._bank.tensor(self._ledger.expert(key))
        with _CUDA.stream(self._copying):
            used = self._used.pop(place, None)
            if used is not None:
                self._copying.wait_event(used)
            started, arrived = self._meter.pair()
            started.record(self._copying)
            self._slot(place)[begin:end].copy_(source[begin:end], non_blocking=True)
            arrived.record(self._copying)
        self._meter.add(started, arrived, end - begin)
        self._arrived[place] = arrived
        return arrived

    # ---- the compute lane ------------------------------------------------------------------------

    def start_computing(self) -> None:
        """Every kernel runs once before it is timed: of each kind of layer, for a token and for
        a prompt. Libraries choose others for other shapes, and load them when first used."""
        cache = self._parts.cache
        prompt = max(1, min(_PROMPT, cache.positions or _PROMPT))
        for tokens, context in ((prompt, prompt), (1, prompt), (1, 1)):
            rows = (Row(-1, tokens, context),) if cache.positions else ()
            for layer, _ in kinds_of(self._model):
                self.dense(layer, tokens, rows)
            self.dense(-1, tokens, ())
            with _CUDA.stream(self._compute):
                for size in self._slots:
                    self._experts.compute(numbers_of(self._slots[size][0], self._type), tokens)
        _CUDA.synchronize()
        self._watch = Stopwatch()

    def dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        """A layer's dense part and the way of its routing to the host; or the output head and that
        of its tokens."""
        with _CUDA.stream(self._compute):
            begun = self._watch.start(self._compute)
            if layer < 0:
                self._parts.head(tokens)
            else:
                self._parts.dense(layer, tokens, rows)
            self._known.copy_(self._routing, non_blocking=True)
            known = self._watch.stop(begun, self._compute)
        # While the device is at it, what it has done before can be read.
        self._watch.read()
        known.synchronize()
        self._watch.passed(known, time.perf_counter_ns())

    def expert(self, key: int, slot: int, tokens: int) -> None:
        """A gated MLP over the bytes in the slot, behind their arrival; back when launched."""
        place = self._place(key, slot)
        copy = self._slot(place)[: self._ledger.copy_bytes[key]]
        with _CUDA.stream(self._compute):
            arrived = self._arrived.get(place)
            if arrived is not None:
                self._compute.wait_event(arrived)
            self._check(key, copy, "before")
            begun = self._watch.start(self._compute)
            self._experts.compute(numbers_of(copy, self._type), tokens)
            self._used[place] = self._watch.stop(begun, self._compute)
            self._check(key, copy, "while")

    def computed(self) -> Sequence[tuple[int, int]]:
        """By events around each part, as far as the host has waited for them."""
        return self._watch.told()

    # ---- what is said of it ----------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Banks, and what is computed with."""
        return {
            **super().manifest(),
            "pinned": self._bank.pinned,
            "why_pageable": self._bank.why_not,
            "cudnn_attention": False,
        }

    def facts(self) -> dict[str, Any]:
        """Versions, the device, the processor; how long copies moved, by the device's clock."""
        try:
            _CUDA.synchronize()
            nbytes, spent_ns = self._meter.total()
        except RuntimeError as error:
            # What no lane has waited for comes to light here.
            said = str(error).partition("\n")[0]
            raise ExecutionError(f"the device has failed at the end of the run: {said}") from error
        return {
            **super().facts(),
            "device_name": _CUDA.get_device_properties(0).name,
            "cuda": torch.version.cuda,
            "link_bytes": nbytes,
            "link_ns": spent_ns,
        }

    def close(self) -> None:
        """Give everything back; ``closing`` may have the bank of experts go with it."""
        torch.set_num_threads(self._threads_before)
        self._with_cudnn()
        if not self._is_idle():
            # What a device still works on may not be taken away; it ends with the process.
            _ABANDONED.append((self, self._bank))
            return
        for name in ("_slots", "_parts", "_experts", "_routing", "_known"):
            self.__dict__.pop(name, None)
        self._arrived.clear()
        self._used.clear()
        free_cached()
        self._closing()

    # ---- inside ----------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        """Whether both streams are at their ends, at once or soon; a broken device is."""
        deadline = time.monotonic() + _LEAVE_S
        with suppress(RuntimeError):
            while not (self._compute.query() and self._copying.query()):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
        return True

    def _place(self, key: int, slot: int) -> _Place:
        return self._ledger.bytes_of[key], slot

    def _slot(self, place: _Place) -> torch.Tensor:
        size, slot = place
        return self._slots[size][slot]

    def _check(self, key: int, copy: torch.Tensor, when: str) -> None:
        if not self._verify:
            return
        self._compute.synchronize()
        if not torch.equal(copy.cpu(), self._bank.tensor(self._ledger.expert(key))[: len(copy)]):
            raise self._other_bytes(key, when)


_ABANDONED: list[tuple[object, HostBank]] = []
"""Who has banks that a device did not stop working on, and the experts: never to be freed."""


def keep_abandoned(owner: object, bank: HostBank | None) -> bool:
    """Whether a device still reads a bank; then its owner is kept as well."""
    still = any(bank is one for _, one in _ABANDONED)
    if still and bank is not None:
        _ABANDONED.append((owner, bank))
    return still


def free_cached() -> None:
    """Give back what torch keeps of an idle device's memory for later, cuBLAS's part as well."""
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_clearCublasWorkspaces()
    with suppress(RuntimeError):
        _CUDA.empty_cache()


class Stopwatch:
    """When parts of a stream's work began and ended, in the host's time, by events.

    Nothing waits for it: an event is read after the host has waited for a later one anyway, and
    that one's moment is where both clocks meet. It serves the thread that computes; ``told`` is
    for another, while that one rests.
    """

    def __init__(self) -> None:
        self._launched: list[tuple[Any, Any]] = []
        self._passed: deque[tuple[list[tuple[Any, Any]], Any, int]] = deque()
        self._told: list[tuple[int, int]] = []

    def start(self, stream: Any) -> Any:
        """A part begins, behind all that the stream waits for."""
        begun = _CUDA.Event(enable_timing=True)
        begun.record(stream)
        return begun

    def stop(self, begun: Any, stream: Any) -> Any:
        """It ends; the event of that."""
        ended = _CUDA.Event(enable_timing=True)
        ended.record(stream)
        self._launched.append((begun, ended))
        return ended

    def passed(self, event: Any, moment_ns: int) -> None:
        """The host has just heard, at a moment, of an event behind all parts so far."""
        self._passed.append((self._launched, event, moment_ns))
        self._launched = []

    def read(self) -> None:
        """Turn events that have passed into times."""
        while self._passed:
            parts, event, moment_ns = self._passed.popleft()
            for part in parts:
                begin, end = (moment_ns - round(one.elapsed_time(event) * 1e6) for one in part)
                self._told.append((begin, end))

    def told(self) -> list[tuple[int, int]]:
        """(begin, end) in ns of ``time.perf_counter_ns``, in order, each part once."""
        self.read()
        told, self._told = self._told, []
        return told


class Meter:
    """How long copies moved: the sum of what lies between pairs of events of one stream."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, Any]] = deque()
        self._spent_ms = 0.0
        self._nbytes = 0

    def pair(self) -> tuple[Any, Any]:
        """Two new events."""
        return _CUDA.Event(enable_timing=True), _CUDA.Event(enable_timing=True)

    def add(self, started: Any, arrived: Any, nbytes: int) -> None:
        """A copy between two events that have been recorded."""
        self._pending.append((started, arrived))
        self._nbytes += nbytes
        while len(self._pending) > _SETTLED and self._pending[0][1].query():
            self._settle()

    def total(self) -> tuple[int, int]:
        """(bytes, ns), when all events have passed."""
        while self._pending:
            self._settle()
        return self._nbytes, round(self._spent_ms * 1e6)

    def _settle(self) -> None:
        started, arrived = self._pending.popleft()
        self._spent_ms += started.elapsed_time(arrived)


class Claim:
    """A device for this process alone: two that measure on one would measure each other."""

    def __init__(self) -> None:
        import fcntl

        uuid = getattr(_CUDA.get_device_properties(0), "uuid", "0")
        path = _LOCKS / f"moesim-cuda-{uuid}.lock"
        try:
            self._file: TextIO | None = path.open("a+")
        except OSError:
            # Another user's file: nothing can be said of that user's runs.
            self._file = None
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another"
            self._file.close()
            raise UsageError(
                f"--device cuda: process {holder} of moesim uses this device, and each would "
                "measure the other; wait for it, or end it"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def close(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()


# ---- memory --------------------------------------------------------------------------------------


def require(cuda: Any = None, *, use: bool = True) -> None:
    """NotRunError where there is no CUDA device, or none that answers.

    use : ask it; this process then holds a part of it to its end, and where a device serves one
    process at a time keeps it from all others.
    """
    module = cuda or _CUDA
    if not module.is_available():
        raise NotRunError(
            "not run: --device cuda: torch finds no CUDA device here; "
            "use --device cpu, or install torch for this machine's driver"
        )
    if not use:
        return
    try:
        module.mem_get_info()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise NotRunError(
            f"not run: --device cuda: the device cannot be used ({reason}); "
            "see who holds it, or use --device cpu"
        ) from None


def free_bytes() -> int:
    """Of the device's memory, what banks may take now."""
    free = int(_CUDA.mem_get_info()[0])
    return free - min(WORKSPACE_BYTES, free // 10)


def compute_type(dtype: str) -> torch.dtype:
    """What a profile's weights are computed in."""
    return torch.float32 if dtype in ("fp32", "float32") else torch.bfloat16


def pinned(nbytes: int) -> torch.Tensor:
    """A few zeros that the device reads directly. What is registered takes whole pages, which
    small things would share with others."""
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=_DEVICE == "cuda")


class Pins:
    """Host memory that the device reads directly, as exact regions: torch's own pinned memory is
    rounded up to powers of two."""

    def __init__(self) -> None:
        self._regions: list[torch.Tensor] = []

    def pin(self, region: torch.Tensor) -> str:
        """Register a region; why not, or an empty text."""
        code = int(_CUDA.cudart().cudaHostRegister(region.data_ptr(), region.nbytes, 0))
        if code:
            # The runtime keeps the error for whoever launches the next kernel; that is this.
            with suppress(RuntimeError):
                torch.zeros(1, device=_DEVICE)
            return f"pinning {region.nbytes} bytes was refused (error {code})"
        self._regions.append(region)
        return ""

    def close(self) -> None:
        """Before the memory is freed."""
        while self._regions:
            _CUDA.cudart().cudaHostUnregister(self._regions.pop().data_ptr())
