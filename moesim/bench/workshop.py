"""What the benchmarks share: the settings, the traces in memory, libCacheSim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moesim.bench.feed import Recording, read
from moesim.bench.rival import OPTION, Part, Rival, write_part
from moesim.degrade import Allowed, Recall
from moesim.errors import MoesimError, NotRunError
from moesim.profile import ModelProfile
from moesim.traces.head import head
from moesim.traces.reader import Columns, TraceReader
from moesim.traces.synth import Synth, synthesise
from moesim.types import Needs
from moesim.workload import Inputs

LAYERS, EXPERTS, TOP_K = 24, 32, 4
"""Shape of the synthetic trace: gpt-oss-20b's."""
TOKENS_A_REQUEST = 500
RECALL = Recall(0.9, 0)


class DisagreementError(MoesimError):
    """Two sides that should have done the same work counted differently."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure on.

    trace : None makes a synthetic one of ``tokens``.
    limit : only the first requests of ``trace``.
    head_tokens : what the slow sides run: the reference engine, plain Python.
    scale_accesses : in each of the two traces of ``scale``.
    memory_bytes : decoded rows of the trace of ``memory``.
    configurations : of ``sweep``, rounded to whole grids.
    """

    trace: Path | None = None
    limit: int | None = None
    repeats: int = 5
    libcachesim_python: str | None = None
    tokens: int = 32_000
    head_tokens: int = 2_000
    scale_accesses: int = 480_000
    memory_bytes: int = 256 << 20
    configurations: int = 1_000


class Workshop:
    """Everything is made when it is first asked for; close it in the end."""

    def __init__(self, settings: Settings, folder: Path, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.folder = folder
        self.say = say
        self.rival_version: str | None = None
        self._held = ExitStack()

    def close(self) -> None:
        """End what was started."""
        self._held.close()

    @cached_property
    def trace(self) -> Path:
        """The trace's file."""
        if self.settings.trace is not None:
            return self.settings.trace
        requests = max(1, self.settings.tokens // TOKENS_A_REQUEST)
        tokens = min(self.settings.tokens, TOKENS_A_REQUEST)
        model = ModelProfile.generic(LAYERS, EXPERTS, TOP_K, "synthetic")
        return self.synthetic("trace", Synth(model, requests, 0, tokens))

    def synthetic(self, name: str, options: Synth) -> Path:
        """A trace made for the occasion."""
        self.say(f"making a synthetic trace of {options.requests * options.tokens} tokens")
        path = self.folder / f"{name}.parquet"
        synthesise(path, options)
        return path

    @cached_property
    def recording(self) -> Recording:
        """The trace, whole or up to ``limit``."""
        return self.read(self.trace, Inputs(), self.settings.limit)

    @cached_property
    def head(self) -> Path:
        """Its first tokens, as a file."""
        path = self.folder / "head.parquet"
        head(self.trace, path, tokens=self.settings.head_tokens)
        return path

    @cached_property
    def short(self) -> Recording:
        """The first tokens."""
        return self.read(self.head, Inputs())

    @cached_property
    def short_ahead(self) -> tuple[Recording, str]:
        """The same with next-layer predictions, and whence they come: the trace, or made."""
        with TraceReader(self.head, Columns.experts_only()) as reader:
            recorded = 1 in reader.meta.ahead
        allowed = Allowed() if recorded else Allowed(recall=RECALL)
        inputs = Inputs(Needs.AHEAD, (1,), allowed)
        return self.read(self.head, inputs), "recorded" if recorded else allowed.names()[0]

    def read(self, path: Path, inputs: Inputs, limit: int | None = None) -> Recording:
        """A trace in memory."""
        self.say(f"reading {path.name}")
        return read(path, inputs, limit)

    @cached_property
    def rival(self) -> Rival:
        """libCacheSim. Raises NotRunError where nobody said where it is."""
        python = self.settings.libcachesim_python
        if python is None:
            raise NotRunError(f"needs libCacheSim: {OPTION} PATH names a Python that has it")
        rival = self._held.enter_context(Rival(python, self.folder))
        self.rival_version = rival.version
        return rival

    @cached_property
    def whole(self) -> list[Part]:
        """The accesses as one stream, in a cache for all layers."""
        recording = self.recording
        capacity = recording.slots * recording.meta.layers
        return [write_part(self.folder / "whole.bin", recording.stream, capacity)]

    @cached_property
    def layered(self) -> Sequence[Part]:
        """The accesses as a stream a layer, each in its own cache."""
        recording = self.recording
        stream, experts = recording.stream, recording.meta.experts
        layer = stream // experts
        return [
            write_part(self.folder / f"layer{n}.bin", stream[layer == n], recording.slots)
            for n in range(recording.meta.layers)
        ]
