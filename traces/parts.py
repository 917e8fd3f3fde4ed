"""The folder `x.parts` beside a trace that is being recorded: one part for each finished request.

A part appears whole or not at all, so whatever kills a recording, each request was finished or was
not begun. `recording.json` says what is being recorded; going on with something else is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError, UsageError
from moesim.traces.reader import RequestFacts, RequestRows, fact_items
from moesim.traces.schema import TraceMeta
from moesim.traces.writer import TraceWriter

AnyArray = npt.NDArray[Any]

DENSE: Final = (
    *("starts", "iteration", "position", "layer", "phase", "experts"),
    *("weights", "gate", "input_norm", "token"),
)
PLAN: Final = "recording.json"


def parts_folder(trace: Path) -> Path:
    """Return where the parts of a trace lie."""
    return trace.with_suffix(".parts")


class Parts:
    """The parts of one recording. Use as a context manager, which holds the folder's lock.

    `plan` is everything that determines the rows. Raises `UsageError` if the folder is in use, was
    begun with another plan, or is there although `resume` is not asked for.
    """

    def __init__(self, trace: Path, plan: Mapping[str, Any], *, resume: bool) -> None:
        self.trace = trace
        self.folder = parts_folder(trace)
        self._plan = json.loads(json.dumps(plan))
        self._resume = resume
        self._lock: int | None = None

    def __enter__(self) -> Parts:
        with self._written("begun"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._unlock()
                raise UsageError(f"{self.folder}: another recording is writing there") from None
            try:
                self._same_plan()
            except BaseException:
                self._unlock()
                raise
            for left in self.folder.glob(".*.tmp-*"):
                left.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            if not self.finished():
                shutil.rmtree(self.folder, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _same_plan(self) -> None:
        path = self.folder / PLAN
        if not path.exists() or not self.finished():
            _write_beside(path, json.dumps(self._plan, indent=1).encode())
            return
        if not self._resume:
            raise UsageError(
                f"{self.folder}: holds {len(self.finished())} finished requests of a recording; "
                "go on with --resume, or delete the folder"
            )
        try:
            begun = json.loads(path.read_text())
        except ValueError:
            begun = {}
        for key, value in self._plan.items():
            if begun.get(key) != value:
                raise UsageError(
                    f"{self.folder}: was begun with {key} {_short(begun.get(key))}, now it is "
                    f"{_short(value)}; record with the same, or delete the folder"
                )

    def finished(self) -> set[int]:
        """Return the requests whose parts are there."""
        return {int(path.stem) for path in self.folder.glob("[0-9]*.npz")}

    def facts(self, request: int) -> RequestFacts | None:
        """Return the facts of a finished request; None if its part is damaged."""
        try:
            with self._path(request).open("rb") as file, np.load(file) as arrays:
                return _facts(arrays)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError):
            return None

    def write(self, rows: RequestRows) -> None:
        """Keep a finished request. Raises `UsageError` if there is no room."""
        path = self._path(rows.request)
        with self._written("written"):
            temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            try:
                with temporary.open("wb") as file:
                    arrays: dict[str, Any] = _arrays(rows)
                    np.savez(file, **arrays)
                temporary.replace(path)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def read(self, request: int) -> RequestRows:
        """Return a finished request. Raises `TraceError` if its part is damaged."""
        path = self._path(request)
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                return _rows(request, arrays)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise TraceError(
                f"{path}: is damaged ({' '.join(str(error).split())}); delete it and go on with "
                "--resume"
            ) from None

    def merge(
        self,
        meta: TraceMeta,
        requests: Sequence[int],
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> TraceMeta:
        """Write the trace from the parts of these requests, then delete the folder.

        `progress` is called with (requests written, requests in all). Memory holds one row group.
        """
        try:
            with TraceWriter(self.trace, meta) as writer:
                for done, request in enumerate(sorted(requests), 1):
                    writer.write_request(self.read(request))
                    progress(done, len(requests))
        except UsageError as error:
            raise UsageError(
                f"{error}; the finished requests are kept in {self.folder}, --resume goes on"
            ) from None
        shutil.rmtree(self.folder, ignore_errors=True)
        return writer.meta

    def _path(self, request: int) -> Path:
        return self.folder / f"{request:09d}.npz"

    @contextmanager
    def _written(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = len(self.finished()) if self.folder.is_dir() else 0
            raise UsageError(
                f"{self.folder}: cannot be {what} ({error.strerror or error}); {kept} finished "
                "requests are kept there, --resume goes on with them"
            ) from None


def _write_beside(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- a request as arrays -------------------------------------------------------------------------


def _arrays(rows: RequestRows) -> dict[str, AnyArray]:
    arrays = {name: getattr(rows, name) for name in DENSE if getattr(rows, name) is not None}
    arrays |= {f"ahead{distance}": ids for distance, ids in rows.ahead.items()}
    if rows.embedding:
        arrays["embedded"] = np.array(list(rows.embedding), dtype=np.int32)
        arrays["embedding"] = np.stack(list(rows.embedding.values()))
    known = dict(fact_items(rows.facts))
    if "prompt_embedding" in known:
        arrays["prompt_embedding"] = known.pop("prompt_embedding")
    arrays["facts"] = np.frombuffer(json.dumps(known).encode(), dtype=np.uint8)
    return arrays


def _rows(request: int, arrays: Any) -> RequestRows:
    ahead = [int(name[5:]) for name in arrays.files if name.startswith("ahead")]
    embedding = {}
    if "embedded" in arrays:
        embedding = dict(zip(arrays["embedded"].tolist(), arrays["embedding"], strict=True))
    dense = {name: arrays[name] for name in DENSE if name in arrays}
    return RequestRows(
        request=request,
        ahead={distance: arrays[f"ahead{distance}"] for distance in sorted(ahead)},
        embedding=embedding,
        facts=_facts(arrays),
        **dense,
    )


def _facts(arrays: Any) -> RequestFacts:
    known = json.loads(arrays["facts"].tobytes())
    if "prompt_embedding" in arrays:
        known["prompt_embedding"] = arrays["prompt_embedding"]
    names = {field.name for field in fields(RequestFacts)}
    return RequestFacts(**{name: value for name, value in known.items() if name in names})
