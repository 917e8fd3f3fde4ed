"""Measure the processor as a device, by the executor's own parts.

Dense parts and experts go through the compute lane, as a run sends them, over banks that no cache
holds; what lies between them comes from short services (``measure_service.py``).
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import cycle
from typing import Any

from moesim.costs import make_costs
from moesim.errors import UsageError
from moesim.profile import (
    Constant,
    ConstantExpert,
    HardwareProfile,
    Host,
    Link,
    Memory,
    ModelProfile,
)
from moesim.real.cpu import Cpu
from moesim.real.lanes import Lanes
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
    Point,
    kinds_of,
    rows_of,
)
from moesim.real.measure_policy import PolicyArithmetic
from moesim.real.measure_service import bench_model, between, handover, kept_of, serve, world_of
from moesim.real.memory import Fit, Needs, aligned, usable_bytes
from moesim.real.slots import SlotLedger

BANK_BYTES = 256 << 20
"""Experts to measure with: more than processors cache, for in a run weights come from memory."""
SLOWER = 4
"""In short services a copy lasts so many times as long as it must: devices' links are slower than
memory, and a thread that copied all the time would have a core to itself."""


class CpuBench:
    """The processor; see ``measure.Bench``.

    threads : that compute. ram_bytes : what the banks may take; None: what is free.
    """

    hows: Mapping[str, tuple[str, ...]] = {
        LINK: (ALONE, COMPUTING, HOSTING),
        DENSE: (ALONE,),
        EXPERT: (ALONE, COPYING),
        HOST_EXPERT: (ALONE,),
        HEAD: (ALONE,),
    }

    def __init__(
        self, model: ModelProfile, *, threads: int, seed: int = 0, ram_bytes: int | None = None
    ) -> None:
        self._free_bytes = usable_bytes()
        self._kinds = kinds_of(model)
        self.model = bench_model(model, self._kinds, BANK_BYTES)
        self.reads_context = bool(self.model.kv_bytes_table().any())
        self._costs = make_costs(self.model, _free_machine())
        self._ledger = SlotLedger(world_of(self.model, self._costs, self._all_slots()), 0)
        ram = self._free_bytes if ram_bytes is None else ram_bytes
        self._device = self._open(model, ram, threads, seed)
        self._fill(self._ledger)
        self._slow = make_costs(self.model, _free_machine(self._copied_per_s() / SLOWER))
        self._lanes: Lanes | None = None
        self._turn = 0
        self._arithmetic: PolicyArithmetic | None = None

    # ---- for the calibration ---------------------------------------------------------------------

    def measure(self, point: Point) -> float:
        """One run of it, in ns."""
        lanes = self._open_lanes()
        if point.what == LINK:
            return self._link(lanes, point)
        if point.what == DENSE:
            return self._one(lanes, lambda: lanes.dense(point.kind, point.size, rows_of(point)))
        if point.what == HEAD:
            return self._one(lanes, lambda: lanes.dense(-1, point.size, ()))
        keys = self._keys(point.kind)
        if point.what == HOST_EXPERT:
            return self._one(lanes, lambda: lanes.host_expert(keys[0], point.size))
        with self._copies() if point.how == COPYING else nullcontext():
            return self._train(lanes, keys, point.size)

    def overheads(self) -> Mapping[str, float]:
        """By the reports of two short services."""
        self._close_lanes()
        mixed = serve(self.model, self._slow, self._device, kept_of(self.model))
        absent = serve(self.model, self._slow, self._device, 0)
        return {**between(mixed, self.model.layers), HANDOVER: handover(absent)}

    def rates(self) -> Mapping[str, float]:
        """By the arithmetic of a search for expert maps."""
        if self._arithmetic is None:
            self._arithmetic = PolicyArithmetic()
        return self._arithmetic.rates()

    def memory(self) -> Memory:
        """RAM that was free before the banks were made."""
        return Memory(self._free_bytes, 0)

    def workers(self) -> int:
        """Cores that neither compute nor copy, one at least."""
        return max(1, (os.cpu_count() or 1) - 2)

    def facts(self) -> dict[str, Any]:
        """Versions, threads, processor."""
        return self._device.facts()

    def manifest(self) -> dict[str, Any]:
        """What was computed with."""
        return self._device.manifest()

    def hosting(self) -> AbstractContextManager[None]:
        """Experts compute on the host meanwhile."""
        return self._beside(self._open_lanes(), HOSTING)

    def close(self) -> None:
        """End the threads, give the banks back."""
        self._close_lanes()
        self._device.close()

    # ---- pieces ----------------------------------------------------------------------------------

    def _link(self, lanes: Lanes, point: Point) -> float:
        """A copy from the host's bank to the slots, in this thread."""
        keys = [k for k, n in enumerate(self._ledger.copy_bytes) if n >= point.size]
        self._turn += 1
        key = keys[self._turn % len(keys)]
        with self._beside(lanes, point.how):
            start = time.perf_counter_ns()
            self._copy(key, point.size)
            return time.perf_counter_ns() - start

    def _beside(self, lanes: Lanes, how: str) -> AbstractContextManager[None]:
        if how == COMPUTING:
            return self._busy(lanes, lambda key: lanes.expert(key, 1))
        if how == HOSTING:
            return self._busy(lanes, lambda key: lanes.host_expert(key, 1))
        return nullcontext()

    def _copy(self, key: int, nbytes: int) -> None:
        """As the copy lane does it: in chunks."""
        slot = self._ledger.slot_of[key]
        for begin in range(0, nbytes, CHUNK_BYTES):
            self._device.copy(key, slot, begin, min(nbytes, begin + CHUNK_BYTES))

    def _one(self, lanes: Lanes, give: Callable[[], None]) -> float:
        give()
        report = lanes.next()
        return report.end_ns - report.start_ns

    def _train(self, lanes: Lanes, keys: Sequence[int], tokens: int) -> float:
        """Experts one after the other, as those that are resident compute: time of each."""
        for key in keys:
            lanes.expert(key, tokens)
        reports = [lanes.next() for _ in keys]
        return (reports[-1].end_ns - reports[0].start_ns) / len(keys)

    def _keys(self, kind: int) -> list[int]:
        """As many experts of a kind as a token chooses; others each time."""
        experts = self.model.experts
        self._turn += 1
        places = [(self._turn * self.model.top_k + i) % experts for i in range(self.model.top_k)]
        layers = range(kind, self.model.layers, len(self._kinds))
        layer = layers[self._turn % len(layers)]
        return [layer * experts + place for place in dict.fromkeys(places)]

    @contextmanager
    def _busy(self, lanes: Lanes, give: Callable[[int], None]) -> Iterator[None]:
        """A lane has work before and after what happens inside."""
        keys = [key for _ in range(3) for key in self._keys(0)]
        for key in keys:
            give(key)
        lanes.next()
        yield
        for _ in keys[1:]:
            lanes.next()

    @contextmanager
    def _copies(self) -> Iterator[None]:
        """Copies in another thread, one after the other."""
        stopped = threading.Event()

        def copy() -> None:
            for key in cycle(self._ledger.slot_of):
                self._copy(key, self._ledger.copy_bytes[key])
                if stopped.is_set():
                    return

        thread = threading.Thread(target=copy, name="moesim bench", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    # ---- opening ---------------------------------------------------------------------------------

    def _all_slots(self) -> int:
        return self.model.layers * self.model.experts

    def _open(self, whole: ModelProfile, ram: int, threads: int, seed: int) -> Cpu:
        model = self.model
        needs = Needs.of(model, self._ledger.slots, positions=CONTEXTS[-1])
        fixed = needs.fixed_bytes + model.layers * aligned(needs.dense_bytes)
        buffers = min(needs.experts, (ram - fixed) // aligned(needs.expert_bytes))
        if buffers < needs.least_buffers:
            least = fixed + needs.least_buffers * aligned(needs.expert_bytes)
            raise UsageError(
                f"--model {whole.name}: to measure it takes {least / 1e9:.3f} GB of RAM, but "
                f"{ram / 1e9:.3f} GB may be used; free some, or name a smaller model"
            )
        shared = Fit(buffers, model.layers)
        return Cpu(model, self._ledger, needs, shared, threads=threads, seed=seed)

    def _fill(self, ledger: SlotLedger) -> None:
        for key in range(self._all_slots()):
            ledger.queue(key)
            ledger.reserve(key)
            ledger.land(key)

    def _copied_per_s(self) -> float:
        """Bytes a second of the quickest of a few copies."""
        key = max(self._ledger.slot_of, key=lambda key: self._ledger.copy_bytes[key])
        nbytes = self._ledger.copy_bytes[key]
        taken: list[int] = []
        for _ in range(5):
            start = time.perf_counter_ns()
            self._copy(key, nbytes)
            taken.append(time.perf_counter_ns() - start)
        return nbytes * 1e9 / min(taken)

    def _open_lanes(self) -> Lanes:
        if self._lanes is None:
            self._lanes = Lanes(self._device, self._ledger, self._costs).__enter__()
            self._lanes.resume()
        return self._lanes

    def _close_lanes(self) -> None:
        lanes, self._lanes = self._lanes, None
        if lanes is not None:
            lanes.__exit__(None, None, None)


def _free_machine(bytes_per_s: float = math.inf) -> HardwareProfile:
    """Nothing else is modelled: whatever takes time here is real."""
    return HardwareProfile(
        name="bench",
        source="assumed",
        provenance="no modelled time",
        memory=Memory(1 << 62, 0),
        link=Link(bytes_per_s, 0, CHUNK_BYTES),
        compute=Constant(0, 0),
        host=Host(0, 0, math.inf, math.inf, 1, ConstantExpert(0)),
    )
