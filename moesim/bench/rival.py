"""libCacheSim, in a process and an environment of its own.

Its native loop alone is timed: no interpreter runs inside it, and files are mapped before. An
object has size 1, every miss is admitted, the cache starts empty.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moesim.errors import UsageError
from moesim.types import AnyArray

OPTION = "--libcachesim-python"
RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
"""libCacheSim's `oracleGeneral` format. When an object comes next is left out (-1): LRU and LFU do
not look."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stream in a file, and the capacity of its cache in objects."""

    path: Path
    accesses: int
    capacity: int


def write_part(path: Path, stream: AnyArray, capacity: int) -> Part:
    """Write a stream of ids as libCacheSim reads it fastest."""
    records = np.zeros(len(stream), RECORD)
    records["object"] = stream
    records["object"] += 1
    records["size"] = 1
    records["next"] = -1
    records.tofile(path)
    return Part(path, len(stream), capacity)


class Rival:
    """A process that has libCacheSim; use it as a context manager."""

    def __init__(self, python: str, folder: Path) -> None:
        """``folder`` is for what it prints.

        Raises UsageError if the interpreter cannot be run or has no libCacheSim.
        """
        source = Path(__file__).with_name("rival_worker.py").read_text()
        self._python = python
        self._said = (folder / "libcachesim.stderr").open("w+")
        try:
            self._process = subprocess.Popen(
                [python, "-c", source],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                cwd=folder,
                text=True,
            )
        except OSError as error:
            self._said.close()
            raise UsageError(
                f"{OPTION} {python}: {error.strerror}; name a Python that has libcachesim"
            ) from None
        try:
            self.version = str(self._answer()["libcachesim"])
        except BaseException:
            self.close()
            raise

    def time(self, policy: str, parts: Sequence[Part]) -> tuple[int, int]:
        """(ns, hits) of one policy, every part in a cache of its own; the sums over them."""
        asked = {"policy": policy, "parts": [[str(p.path), p.capacity] for p in parts]}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        answer = self._answer()
        ratios = zip(parts, answer["miss_ratios"], strict=True)
        return int(answer["ns"]), sum(_hits(part.accesses, ratio) for part, ratio in ratios)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            # What was not sent yet cannot be sent any more.
            with suppress(OSError):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Rival:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            # An empty line too: the process has ended.
            raise self._died() from None
        return answer

    def _died(self) -> UsageError:
        self._process.kill()
        self._process.wait()
        self._said.seek(0)
        said = [line.strip() for line in self._said if line.strip()]
        last = said[-1] if said else "no answer"
        return UsageError(f"{OPTION} {self._python}: {last}; name a Python that has libcachesim")


def _hits(accesses: int, miss_ratio: float) -> int:
    misses = miss_ratio * accesses
    if abs(misses - round(misses)) > 1e-3:
        raise ArithmeticError(f"a miss ratio of {miss_ratio} of {accesses} is no count")
    return accesses - round(misses)
