"""The fact log of a run: what the policy was told and answered, what the lanes reported, what
was done, in order.

A file of JSON lines, compressed with zstd. The first line is the header; each later one is a list
whose first item says what it is (``real/README.md`` lists them). Arrays keep their type and shape,
so that a policy which is fed the log is told exactly what it was told in the run.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import MoesimError, PolicyError, UsageError
from moesim.log import LogDigest
from moesim.protocol import CacheView, Policy, World
from moesim.types import (
    AnyArray,
    Dropped,
    Evicted,
    ExpertId,
    Fact,
    Gate,
    IntArray,
    IterationBegin,
    IterationEnd,
    Job,
    JobDone,
    Landed,
    LayerEvent,
    Needs,
    Note,
    Phase,
    Plan,
    RequestBegin,
    RequestEnd,
    Slot,
)

SCHEMA = 2
"""1 held neither norms nor past, so a policy that needs them could not be begun from it alone."""
FACTS = "facts.jsonl.zst"

ON, ROUTE, SCORES, VICTIMS, NOTE = "on", "route", "scores", "victims", "note"
CALLS = (ON, ROUTE, SCORES, VICTIMS, NOTE)
DID, CAME, PAST = "did", "came", "past"

_FULL = 20_000
"""Records after which a log would be written; a batch of requests seldom has more."""
_MOST = 50 * _FULL
"""Records that are kept in memory, whatever happens."""

_TYPES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        RequestBegin, RequestEnd, IterationBegin, IterationEnd, Gate, LayerEvent, Slot,
        Landed, Evicted, Dropped,
    )
}  # fmt: skip


# ---- values --------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """JSON values for a fact, an answer or an array."""
    if isinstance(value, np.ndarray):
        return {"array": value.dtype.str, "shape": list(value.shape), "of": value.ravel().tolist()}
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value):
        named = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return {"is": type(value).__name__, **named}
    if isinstance(value, Slot):
        return {"is": "Slot", **{k: int(v) for k, v in value._asdict().items()}}
    if isinstance(value, Mapping):
        return {"map": [[int(k), plain(v)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def restored(value: Any) -> Any:
    """What ``plain`` was given."""
    if isinstance(value, list):
        return tuple(restored(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return np.array(value["of"], np.dtype(value["array"])).reshape(value["shape"])
    if "map" in value:
        return {k: restored(v) for k, v in value["map"]}
    named = {k: restored(v) for k, v in value.items() if k != "is"}
    if "phase" in named:
        named["phase"] = Phase(named["phase"])
    return _TYPES[value["is"]](**named)


def answered(plan: Plan) -> Any:
    """JSON values of a plan; a job by its declared size, for its result may be anything."""
    return {
        "prefetches": [[int(v) for v in wish] for wish in plan.prefetches],
        "cancel": [int(e) for e in plan.cancel],
        "reprioritise": [[int(e), int(p)] for e, p in plan.reprioritise],
        "serve": [[int(e), int(how)] for e, how in plan.serve.items()],
        "jobs": [[int(job.ops), int(job.nbytes)] for job in plan.jobs],
        "foreground_ops": int(plan.foreground_ops),
    }


def told(fact: Fact, jobs: Sequence[Job]) -> Any:
    """JSON values of a fact; a job by its number, for a policy knows its own."""
    if isinstance(fact, JobDone):
        number = next(i for i, job in enumerate(jobs) if job is fact.job)
        return {"is": "JobDone", "job": number, "event": fact.event}
    return plain(fact)


def world_facts(world: World) -> dict[str, Any]:
    """JSON values of the world; costs and future are made again from the manifest and the log, and
    the past has records of its own."""
    names = (
        *("layers", "experts", "top_k", "capacity_bytes", "scope", "decode_from", "seed"),
        "expert_parts",
    )
    arrays = ("expert_bytes", "calibration", "expert_norms")
    return {name: plain(getattr(world, name)) for name in (*names, *arrays)}


class Changes:
    """What a policy saw of the cache at a call: the changes of ``states`` since the call before."""

    def __init__(self, size: int, layers: Sequence[int]) -> None:
        self._last = np.zeros(size, np.uint8)
        self._layers = layers
        """One layer of each cache."""

    def seen(self, cache: CacheView) -> list[Any]:
        """[changed experts, their states, free bytes by cache, queued, jobs waiting]."""
        changed = np.flatnonzero(cache.states != self._last)
        now = cache.states[changed]
        self._last[changed] = now
        free = [cache.free_bytes(layer) for layer in self._layers]
        return [changed.tolist(), now.tolist(), free, cache.queued, cache.jobs_waiting]


class SeenCache:
    """A view restored from the log."""

    def __init__(self, size: int, layers: Sequence[int], caches: Sequence[int]) -> None:
        self._states = np.zeros(size, np.uint8)
        self.states: AnyArray = self._states.view()
        self.states.flags.writeable = False
        self.candidates: Sequence[ExpertId] = ()
        self.jobs_waiting = 0
        self.queued = 0
        self._caches = caches
        """The cache of each layer."""
        self._free: Sequence[int] = [0] * len(layers)

    def show(self, seen: Sequence[Any]) -> None:
        """Take the next record."""
        changed, now, self._free, self.queued, self.jobs_waiting = seen
        self._states[changed] = now

    def free_bytes(self, layer: int) -> int:
        """Unreserved bytes of the cache that serves ``layer``."""
        return int(self._free[self._caches[layer]])


def caches_of(layers: int, scope: str) -> tuple[list[int], list[int]]:
    """(one layer of each cache, the cache of each layer)."""
    if scope == "layer":
        return list(range(layers)), list(range(layers))
    return [0], [0] * layers


# ---- writing -------------------------------------------------------------------------------------


class FactLog:
    """Collects records and writes them when asked to, so that writing can wait for a pause.

    Only what no memory should hold is written unasked.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._pending: list[Callable[[], list[Any]]] = []
        self._out = pa.CompressedOutputStream(str(path), "zstd")

    @property
    def full(self) -> bool:
        """Whether a pause should be made to write."""
        return len(self._pending) >= _FULL

    def header(self, world: World) -> None:
        """The first line, and the past as the policy may hear it."""
        self._write({"schema": SCHEMA, "world": world_facts(world)})
        for fact in () if world.past is None else world.past():
            self._write([PAST, plain(fact)])

    def add(self, record: Callable[[], list[Any]]) -> None:
        """A record; what it is made of must not change before it is written."""
        self._pending.append(record)
        if len(self._pending) >= _MOST:
            self.flush()

    def heard(self, report: Sequence[Any]) -> None:
        """A report of a lane."""
        self.add(lambda: [CAME, *report])

    def flush(self) -> None:
        """Write what was collected."""
        for record in self._pending:
            self._write(record())
        self._pending.clear()

    def close(self) -> None:
        """Write the rest and close the file."""
        self.flush()
        self._out.close()

    def abandon(self) -> None:
        """Close the file without the rest."""
        self._pending.clear()
        self._out.close()

    def _write(self, value: Any) -> None:
        line = json.dumps(value, separators=(",", ":"), allow_nan=False)
        self._out.write(line.encode() + b"\n")


class LoggedDeeds(LogDigest):
    """The log digest, which also keeps its words in a fact log."""

    def __init__(self, log: FactLog) -> None:
        super().__init__()
        self._log = log

    def add(self, *words: int) -> None:
        """Append words to both."""
        super().add(*words)
        self._log.add(lambda: [DID, *map(int, words)])


class Watched:
    """Passes everything to a policy, keeps what was asked and answered, and blames its errors.

    ``loads`` : layer event -> the experts that it asked for, by demand or plan, and that arrived.

    An error of the policy's own becomes a ``PolicyError`` that names the layer event.
    """

    def __init__(self, policy: Policy, log: FactLog | None = None) -> None:
        self.inner = policy
        self.loads: dict[int, set[ExpertId]] = {}
        self._log = log
        self._event = -1
        self._jobs: list[Job] = []
        self._changes = Changes(0, ())

    @property
    def needs(self) -> Needs:
        """As the policy says."""
        return self.inner.needs

    @property
    def lossy(self) -> bool:
        """As the policy says."""
        return self.inner.lossy

    @property
    def scored(self) -> bool:
        """As the policy says."""
        return self.inner.scored

    @property
    def bypass(self) -> bool:
        """As the policy says."""
        return self.inner.bypass

    def begin(self, world: World) -> None:
        """The run starts."""
        layers, _ = caches_of(world.layers, world.scope)
        self._changes = Changes(world.size, layers)
        self._asked(self.inner.begin, world)

    def route(self, event: LayerEvent, cache: CacheView) -> AnyArray | None:
        """As the policy says."""
        seen = self._seen(cache)
        routed: AnyArray | None = self._asked(self.inner.route, event, cache)
        self._keep(lambda: [ROUTE, plain(event), seen, plain(routed)])
        return routed

    def on(self, fact: Fact, cache: CacheView) -> Plan:
        """As the policy says."""
        if isinstance(fact, Gate):
            self._event = fact.event
        seen = self._seen(cache)
        plan: Plan = self._asked(self.inner.on, fact, cache)
        if self._log is not None and isinstance(plan, Plan):
            answer, jobs = self._asked(answered, plan), self._jobs
            self._keep(lambda: [ON, told(fact, jobs), seen, answer])
            jobs.extend(plan.jobs)
        return plan

    def scores(self, experts: IntArray, event: int) -> IntArray:
        """As the policy says."""
        answer: IntArray = self._asked(self.inner.scores, experts, event)
        if self._log is not None and isinstance(answer, np.ndarray):
            kept = answer.copy()
            self._keep(lambda: [SCORES, event, experts.tolist(), kept.tolist()])
        return answer

    def victims(self, nbytes: int, cache: CacheView) -> Sequence[ExpertId]:
        """As the policy says."""
        seen, offered = self._seen(cache), list(cache.candidates)
        named = list(self._asked(self.inner.victims, nbytes, cache))
        self._keep(lambda: [VICTIMS, nbytes, offered, seen, plain(named)])
        return named

    def note(self, fact: Note) -> None:
        """As the policy says."""
        if isinstance(fact, Landed) and fact.event >= 0:
            self.loads.setdefault(fact.event, set()).add(fact.expert)
        self._keep(lambda: [NOTE, plain(fact)])
        self._asked(self.inner.note, fact)

    def _seen(self, cache: CacheView) -> list[Any]:
        return [] if self._log is None else self._changes.seen(cache)

    def _keep(self, record: Callable[[], list[Any]]) -> None:
        if self._log is not None:
            self._log.add(record)

    def _asked(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except MoesimError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise PolicyError(
                f"layer event {self._event}: {type(error).__name__}: {error} "
                f"({last.filename}:{last.lineno})"
            ) from error


# ---- reading -------------------------------------------------------------------------------------


class FactReader:
    """The records of a fact log, streamed.

    Raises
    ------
    UsageError
        Naming the file, if it is missing, damaged or of another schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = self._read()
        self.header: dict[str, Any] = next(self._lines, {})
        found = self.header.get("schema") if isinstance(self.header, dict) else None
        if found not in range(1, SCHEMA + 1):
            raise UsageError(f"{path}: not a fact log of schema {SCHEMA} (found {found})")

    def __iter__(self) -> Iterator[list[Any]]:
        return self._lines

    def _read(self) -> Iterator[Any]:
        import pyarrow as pa

        try:
            with pa.CompressedInputStream(str(self.path), "zstd") as stream:
                rest = b""
                while chunk := stream.read(1 << 20):
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from map(json.loads, lines)
                if rest:
                    raise ValueError("it ends within a record")
        except FileNotFoundError:
            raise UsageError(
                f"{self.path}: no such file; name a folder that `moesim real run --out` wrote"
            ) from None
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{self.path}: cannot be read ({reason})") from None
