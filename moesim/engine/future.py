"""The demand of a whole run, from a pass without a clock, kept beside memory.

Demand and next uses lie in files without a name that are mapped into memory: the machine may write
them out, and they vanish with the process. 20 bytes an access.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numba
import numpy as np

from moesim.compiled import entry, load
from moesim.engine.block import BlockMaker, load_block_functions
from moesim.errors import UsageError
from moesim.types import NEVER, AnyArray, IntArray
from moesim.workload import KnownFuture, Step

STEPS = 512
"""Steps that are cut at once."""


def foresee(steps: Iterable[Step], maker: BlockMaker, size: int) -> KnownFuture:
    """The demand of all steps. ``size`` : layers * experts.

    Raises
    ------
    UsageError
        If the temporary folder cannot hold it.
    """
    load(*load_block_functions(), *calls())
    first, counts = np.full(size, NEVER, np.int64), np.zeros(size, np.int64)
    try:
        # What is mapped stays when its file is closed.
        with _Column(np.int64) as ends, _Column(np.int32) as ids, _Column(np.int64) as following:
            ends.add(np.zeros(1, np.int64))
            for wanted, lengths in _demands(steps, maker):
                ends.add(np.cumsum(lengths) + ids.length)
                ids.add(wanted)
                counts += np.bincount(wanted, minlength=size)
            table = ends.mapped(), ids.mapped(), following.mapped(ids.length)
        _look_back(*table, first)
    except OSError as error:
        raise UsageError(
            f"{tempfile.gettempdir()}: cannot keep the future of the run there "
            f"({error.strerror}); set TMPDIR to a folder with more room"
        ) from None
    return KnownFuture.of_table(*table, first, counts)


def uses(steps: Iterable[Step], maker: BlockMaker, size: int) -> IntArray:
    """int64 [size]: how many layer events demand each expert."""
    load(*load_block_functions(), *calls())
    counts = np.zeros(size, np.int64)
    for wanted, _ in _demands(steps, maker):
        counts += np.bincount(wanted, minlength=size)
    return counts


def _demands(steps: Iterable[Step], maker: BlockMaker) -> Iterator[tuple[AnyArray, IntArray]]:
    """Expert ids, int32, and how many each layer event demands: some steps at a time."""
    some: list[Step] = []
    for step in steps:
        some.append(step)
        if len(some) == STEPS:
            yield maker.demand(some)
            some = []
    if some:
        yield maker.demand(some)


class _Column:
    """Values in a file without a name."""

    def __init__(self, kind: type) -> None:
        self.length = 0
        self._kind = np.dtype(kind)
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, values: AnyArray) -> None:
        """Append."""
        self._file.write(np.ascontiguousarray(values, self._kind).data)
        self.length += len(values)

    def mapped(self, length: int | None = None) -> AnyArray:
        """All of it; or ``length`` zeros."""
        if length is not None:
            self.length = length
            os.posix_fallocate(self._file.fileno(), 0, max(1, length * self._kind.itemsize))
        self._file.flush()
        if not self.length:
            return np.zeros(0, self._kind)
        # A plain view: to numba a memory map is another type.
        whole: AnyArray = np.memmap(self._file, self._kind, "r+", shape=(self.length,))
        return np.asarray(whole)


def _look_back_at(starts: Any, ids: Any, following: Any, upcoming: Any) -> None:
    """From the last layer event to the first: when each expert is demanded next.

    ``upcoming`` [size] : NEVER at first; then the first demand of each.
    """
    for event in range(len(starts) - 2, -1, -1):
        for i in range(starts[event], starts[event + 1]):
            following[i] = upcoming[ids[i]]
        for i in range(starts[event], starts[event + 1]):
            upcoming[ids[i]] = event


_look_back = entry(_look_back_at)


def calls() -> list[tuple[Any, Any]]:
    """What Python calls here, and the types that it calls it with."""
    i64, i32 = numba.int64[::1], numba.int32[::1]
    return [(_look_back, (i64, i32, i64, i64))]
