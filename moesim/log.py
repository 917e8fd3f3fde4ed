"""The log digest: one number that differs wherever two runs differ.

Each host writes the same words in the same order. A word's part of the digest depends on the word
and on its place, and the parts are added, so a compiled host can fold words without waiting for the
one before, and a reader can fold blocks of any size.
"""

from __future__ import annotations

import numpy as np

from moesim.hashing import finalise

_PLACE = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 15

# What a record begins with. Times follow where the record has one; see `moesim/README.md`.
GATE, DEMAND, END, ISSUE, LAND, EVICT, DROP, CANCEL, SERVED = range(1, 10)
READ, FORGET = 20, 21
"""A copy has arrived in host memory from the drive; it, or the beginning of it, has left."""


class LogDigest:
    """Folds int64 words; ``hex()`` is 16 digits."""

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._sum = np.uint64(0)
        self.words = 0

    def add(self, *words: int) -> None:
        """Append words to the log."""
        self._pending.extend(words)
        if len(self._pending) >= _BLOCK:
            self._fold()

    def _fold(self) -> None:
        words = np.array(self._pending, np.int64).view(np.uint64)
        place = np.arange(self.words + 1, self.words + 1 + len(words), dtype=np.uint64)
        with np.errstate(over="ignore"):
            self._sum += finalise(words + place * _PLACE).sum(dtype=np.uint64)
        self.words += len(words)
        self._pending.clear()

    def hex(self) -> str:
        """The digest of everything added so far."""
        self._fold()
        return self.of(int(self._sum), self.words)

    @staticmethod
    def of(total: int, words: int) -> str:
        """The digest of a number of words whose parts add up to ``total`` (modulo 2**64)."""
        closed = finalise(np.array([(total ^ words) % (1 << 64)], np.uint64))
        return f"{int(closed[0]):016x}"
