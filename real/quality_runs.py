"""Losses of many runs, one after the other, and a file that keeps them.

Each run is a line of JSON, written whole when the run has ended; what is there already is not run
again. A line that a kill has cut off is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import UsageError
from moesim.real.offload_options import Decided, Options
from moesim.real.quality import Bench
from moesim.types import AnyArray

Progress = Callable[[int, int], None]


class Losses:
    """Measures runs on a text; called with what decides each, it answers minus the loss, nats.

    keep : the file; None: nothing is kept.

    Raises
    ------
    UsageError
        If the file is of another model, text, data type or device.
    """

    def __init__(self, bench: Bench, keep: Path | None, progress: Progress) -> None:
        self._bench = bench
        self._keep = keep
        self._progress = progress
        self._known: dict[str, float] = {}
        self.measured = 0
        """Runs that were not in the file."""
        if keep is not None:
            self._open(keep)

    def __call__(self, runs: Sequence[Decided]) -> AnyArray:
        """float64 [P]: minus each run's loss, nats a token."""
        found = []
        for number, run in enumerate(runs):
            key = _key(run)
            if key not in self._known:
                self._known[key] = self._measure(run, key)
            found.append(-self._known[key])
            self._progress(number + 1, len(runs))
        return np.array(found)

    def _measure(self, run: Decided, key: str) -> float:
        loss = self._bench.loss(
            Options(policy=run.policy, capacity=run.capacity, settings=run.settings)
        )
        self.measured += 1
        facts = loss.run
        line = {
            "key": key,
            "policy": run.policy,
            "settings": list(run.settings),
            "capacity": run.capacity.text,
            "loss_nats": loss.nats,
            "experts_agreement": (facts["quality"] or {"agreement": 1.0})["agreement"],
            "gate_mass_kept": (facts["quality"] or {"gate_mass_kept": 1.0})["gate_mass_kept"],
            "bytes_loaded": facts["bytes_loaded"],
            "peak_bytes": facts["peak_bytes"],
        }
        self._write(line)
        return loss.nats

    # ---- the file --------------------------------------------------------------------------------

    def _header(self) -> dict[str, Any]:
        bench = self._bench
        loaded = bench.handle.loaded
        return {
            "schema": 1,
            "model": loaded.name,
            "dtype": loaded.dtype,
            "device": bench.handle.device.type,
            "text": bench.text.digest,
            "steady": bench.steady,
        }

    def _open(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if not text:
                self._write(self._header())
                return
            *whole, cut = text.split("\n")
            if cut:
                path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
            header, *lines = map(json.loads, whole)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not lines of JSON"
            raise UsageError(f"--runs-file {path}: {reason}; name another file") from None
        # Files that do not say were made when there was no other device.
        if {"device": "cpu", **header} != self._header():
            raise UsageError(
                f"--runs-file {path}: holds runs of another model, text, dtype or device; name "
                "another file"
            )
        self._known = {line["key"]: float(line["loss_nats"]) for line in lines}

    def _write(self, line: dict[str, Any]) -> None:
        if self._keep is None:
            return
        try:
            with self._keep.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            raise UsageError(
                f"--runs-file {self._keep}: cannot be written ({error.strerror})"
            ) from None


def _key(run: Decided) -> str:
    capacity = run.capacity
    facts: list[Any] = [
        run.policy,
        list(run.settings),
        list(capacity.capacity_bytes),
        capacity.scope,
    ]
    facts.append(None if capacity.starts is None else list(capacity.starts))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
