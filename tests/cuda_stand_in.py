"""As much of ``torch.cuda`` as the executor asks for, in RAM, and a judge of its order.

Work is done at once, so bytes are always right; what the judge watches is whether a device that
works through its streams side by side would have had to. Each stream has a clock of vectors; work
on a stream follows what was given to it before and what it was told to wait for, and nothing else.
Two touches of one slot, of which one writes, must be in order (Lamport's happened-before).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

_lock = threading.Lock()


class Stream:
    """A queue of work with a clock: stream -> how much of it has come before."""

    def __init__(self) -> None:
        self.clock: dict[int, int] = {}

    def tick(self) -> dict[int, int]:
        """Work is given to it."""
        self.clock[id(self)] = self.clock.get(id(self), 0) + 1
        return dict(self.clock)

    def wait_event(self, event: Event) -> None:
        """What follows comes after it."""
        if StandIn.deaf:
            return
        with _lock:
            for stream, count in event.clock.items():
                self.clock[stream] = max(self.clock.get(stream, 0), count)

    def synchronize(self) -> None:
        """Everything is done at once."""

    def query(self) -> bool:
        """Everything is done at once, unless it hangs."""
        return not StandIn.hangs


class Event:
    """A moment of a stream."""

    def __init__(self, **more: bool) -> None:
        self.ns = 0
        self.clock: dict[int, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        """Now, on a stream or the one that work is given to."""
        self.ns = time.perf_counter_ns()
        stream = StandIn.current() if stream is None else stream
        with _lock:
            self.clock = stream.tick()

    def synchronize(self) -> None:
        """It has happened."""
        StandIn.waits += 1
        if StandIn.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel")

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """ms."""
        return (end.ns - self.ns) / 1e6


class StandIn:
    """The module."""

    OutOfMemoryError = MemoryError
    Stream, Event = Stream, Event
    registered: list[int] = []  # noqa: RUF012
    refuses = 0
    deaf = False
    """Streams wait for nothing: the judge must see it."""
    broken = False
    hangs = False
    waits = 0
    strides: dict[int, int] = {}  # noqa: RUF012
    """Of banks of slots, by address."""
    free = 10**9
    emptied = 0
    _here = threading.local()
    touched: dict[int, list[tuple[dict[int, int], int, bool]]] = {}  # noqa: RUF012
    hazards: list[str] = []  # noqa: RUF012

    @classmethod
    def reset(cls) -> None:
        """As new."""
        cls.registered, cls.touched, cls.hazards = [], {}, []
        cls.refuses, cls.deaf, cls.broken, cls.waits, cls.free = 0, False, False, 0, 10**9
        cls.emptied, cls.hangs = 0, False

    @classmethod
    @contextmanager
    def stream(cls, stream: Stream) -> Iterator[None]:
        """Work inside is given to it."""
        before = getattr(cls._here, "stream", None)
        cls._here.stream = stream
        try:
            yield
        finally:
            cls._here.stream = before

    @classmethod
    def current(cls) -> Stream:
        """The stream of this thread."""
        stream: Stream | None = getattr(cls._here, "stream", None)
        assert stream is not None, "work on no stream"
        return stream

    @classmethod
    def touch(cls, address: int, writes: bool, what: str) -> None:
        """Work on a slot, on the stream of this thread."""
        stream = cls.current()
        with _lock:
            now = stream.tick()
            for then, which, wrote in cls.touched.get(address, []):
                ordered = now.get(which, 0) >= then[which]
                if (writes or wrote) and not ordered:
                    cls.hazards.append(f"{what} races with a {'write' if wrote else 'read'}")
            cls.touched.setdefault(address, []).append((now, id(stream), writes))

    is_available = staticmethod(lambda: True)
    get_device_properties = staticmethod(lambda index: SimpleNamespace(name="none"))

    @classmethod
    def synchronize(cls) -> None:
        """Whatever follows comes after all that was."""
        with _lock:
            cls.touched.clear()

    @classmethod
    def empty_cache(cls) -> None:
        """Counted."""
        cls.emptied += 1

    @classmethod
    def mem_get_info(cls) -> tuple[int, int]:
        """(free, total)."""
        return cls.free, 10**10

    @classmethod
    def cudart(cls) -> type[StandIn]:
        """The runtime."""
        return cls

    @classmethod
    def cudaHostRegister(cls, at: int, nbytes: int, flags: int) -> int:  # noqa: N802
        """Pin."""
        if not cls.refuses:
            cls.registered.append(at)
        return cls.refuses

    @classmethod
    def cudaHostUnregister(cls, at: int) -> None:  # noqa: N802
        """Undo."""
        cls.registered.remove(at)


class Watched(torch.Tensor):
    """A slot that tells when it is written."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
            if func is torch.Tensor.copy_:
                StandIn.touch(base_of(args[0]), True, "a copy")
            return made.as_subclass(cls) if func is torch.Tensor.__getitem__ else made


def base_of(part: torch.Tensor) -> int:
    """The address of the slot that a part lies in: its storage's beginning and its row."""
    base = part.untyped_storage().data_ptr()
    stride = StandIn.strides[base]
    return base + (part.data_ptr() - base) // stride * stride
