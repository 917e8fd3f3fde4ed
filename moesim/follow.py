"""A run again, from its fact log: the policy alone, or the whole run without a clock.

``refeed`` tells a fresh policy what the log says it was told, and compares every answer.
``follow`` serves the trace again and takes only the order of the lanes' reports from the log:
judging, loads and victims are worked out anew, and compared with what the run did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesim import log
from moesim.configuration import Configuration, blaming
from moesim.costs import make_costs
from moesim.errors import MoesimError, UsageError
from moesim.factlog import (
    CAME,
    DID,
    FACTS,
    NOTE,
    ON,
    PAST,
    ROUTE,
    SCORES,
    VICTIMS,
    FactReader,
    SeenCache,
    answered,
    caches_of,
    plain,
    restored,
)
from moesim.log import LogDigest
from moesim.profile import HardwareProfile, ModelProfile
from moesim.protocol import Policy, World, restrict
from moesim.registry import resolve
from moesim.result import HOST, read_run
from moesim.serving import COPY, DENSE, EXPERT, JOB, Report, Server
from moesim.types import Fact, Job, JobDone, Needs
from moesim.workload import KnownFuture, Row


class FollowError(MoesimError):
    """A run and its repetition differ; the line names the first difference."""


# ---- the policy alone ----------------------------------------------------------------------------


def refeed(folder: Path) -> int:
    """Feed a run's fact log to a fresh policy; how many answers were compared, all equal.

    Raises
    ------
    FollowError
        Naming the first answer that differs.
    UsageError
        If the folder holds no fact log.
    """
    manifest, _ = read_run(folder)
    spec = resolve([manifest["policy"]["name"]], manifest["set"])[0]
    with blaming(spec):
        return _Refed(folder, manifest, spec.build()).run()


class _Refed:
    def __init__(self, folder: Path, manifest: dict[str, Any], policy: Policy) -> None:
        self.folder = folder
        self.policy = policy
        self.reader = FactReader(folder / FACTS)
        world = self._world(manifest)
        layers, caches = caches_of(world.layers, world.scope)
        self.cache = SeenCache(world.size, layers, caches)
        self.jobs: list[Job] = []
        policy.begin(restrict(world, policy.needs))

    def _world(self, manifest: dict[str, Any]) -> World:
        model = ModelProfile.from_dict(manifest["model"])
        hardware = HardwareProfile.from_dict(manifest["hardware"])
        named = {name: restored(value) for name, value in self.reader.header["world"].items()}
        if next(_past(self.folder / FACTS), None) is not None:
            named["past"] = lambda: _past(self.folder / FACTS)
        world = World(**named, costs=make_costs(model, hardware))
        if Needs.FUTURE not in self.policy.needs:
            return world
        demands = (restored(fact["experts"]) for fact in _gates(self.folder / FACTS))
        return World(**named, costs=world.costs, future=KnownFuture(demands, world.size))

    def run(self) -> int:
        compared = 0
        for line, record in enumerate(self.reader, 2):
            if record[0] in (DID, CAME, PAST):
                continue
            answer, expected = self._again(record)
            if json.loads(json.dumps(answer)) != expected:
                raise FollowError(
                    f"{self.folder / FACTS}: line {line}: {record[0]} answered {_short(expected)}, "
                    f"and now {_short(answer)}"
                )
            compared += record[0] != NOTE
        return compared

    def _again(self, record: Sequence[Any]) -> tuple[Any, Any]:
        """(what the fresh policy answers, what the log says)."""
        what, *rest = record
        if what == ON:
            return self._on(rest[0], rest[1]), rest[2]
        if what == SCORES:
            event, experts, expected = rest
            return self.policy.scores(_ids(experts), event).tolist(), expected
        if what == NOTE:
            self.policy.note(restored(rest[0]))
            return None, None
        if what == VICTIMS:
            nbytes, self.cache.candidates, seen, expected = rest
            self.cache.show(seen)
            named = plain(list(self.policy.victims(nbytes, self.cache)))
            self.cache.candidates = ()
            return named, expected
        assert what == ROUTE
        self.cache.show(rest[1])
        return plain(self.policy.route(restored(rest[0]), self.cache)), rest[2]

    def _on(self, fact: dict[str, Any], seen: Sequence[Any]) -> Any:
        self.cache.show(seen)
        if fact["is"] == "JobDone":
            made: Any = JobDone(self.jobs[fact["job"]], fact["event"])
        else:
            made = restored(fact)
        plan = self.policy.on(made, self.cache)
        self.jobs.extend(plan.jobs)
        return answered(plan)


def _ids(experts: Sequence[int]) -> Any:
    return restored({"array": "<i8", "shape": [len(experts)], "of": list(experts)})


def _past(path: Path) -> Iterator[Fact]:
    """The facts that the policy could learn from."""
    for record in FactReader(path):
        if record[0] != PAST:
            return
        yield restored(record[1])


def _gates(path: Path) -> Iterator[dict[str, Any]]:
    for record in FactReader(path):
        if record[0] == ON and record[1]["is"] == "Gate":
            yield record[1]


# ---- the whole run -------------------------------------------------------------------------------


def follow(
    folder: Path, trace: Path | None = None, calibration: Path | None = None
) -> dict[str, Any]:
    """Serve a run's trace again in the order in which its lanes reported.

    ``trace`` and ``calibration``: where they lie now; None: where they lay then.

    Raises
    ------
    FollowError
        Naming the first thing that is done differently.
    UsageError
        If the folder holds no fact log, or the trace is another one.
    """
    manifest, summary = read_run(folder)
    reader = FactReader(folder / FACTS)
    there = _paths(folder)
    trace = trace or _path(there, "trace")
    if trace is None:
        raise UsageError(f"{folder}: does not say where its trace lies; give --trace")
    calibration = calibration or _path(there, "calibration")
    configuration = Configuration.of_run(manifest, trace, calibration)
    script = _Script(reader, configuration.meta.experts)
    with blaming(configuration.spec):
        _serve(configuration, script)
    counts = script.counts
    return {
        "schema": 1,
        "followed": str(folder),
        "equal": True,
        "policy": summary["policy"],
        "capacity": summary["capacity"],
        "layer_events": counts[log.GATE],
        "loads": counts[log.LAND],
        "victims": counts[log.EVICT],
        "reports": script.reports,
    }


def _serve(configuration: Configuration, script: _Script) -> None:
    server = Server(configuration.setup(configuration.build()), script, deeds=script.deeds)
    for work in configuration.works():
        server.offer(work)
        server.advance()
    server.close()
    server.advance()
    script.close()


class _Script:
    """Lanes that report what the log says, and a log of deeds that must be the log's."""

    def __init__(self, reader: FactReader, experts: int) -> None:
        self.deeds = _Compared(self)
        self.counts = dict.fromkeys(range(log.GATE, log.SERVED + 1), 0)
        self.reports = 0
        self._experts = experts
        self._records = (r for r in reader if r[0] in (DID, CAME))
        self._coming = next(self._records, None)
        self._given: list[tuple[str, int]] = []
        """Work that has not been reported."""
        self._at = 0
        self._event = -1

    def now(self) -> int:
        """Time of the newest report."""
        return self._at

    def rest(self) -> None:
        """Time stands still anyway."""

    def resume(self) -> None:
        """Time stands still anyway."""

    def copy(self, key: int, ends: Sequence[int], sent: int) -> None:
        """Wait for the log to say that it was sent."""
        self._given.append((COPY, key))

    def pause(self) -> None:
        """The log knows how far it came."""

    def dense(self, layer: int, tokens: int, rows: Sequence[Row]) -> None:
        """Wait for the log to say so."""
        self._given.append((DENSE, -1))

    def expert(self, key: int, tokens: int) -> None:
        """Wait for the log to say so."""
        self._given.append((EXPERT, key))

    def host_expert(self, key: int, tokens: int) -> None:
        """Wait for the log to say so."""
        self._given.append(("host", key))

    def job(self, number: int, job: Job) -> None:
        """Wait for the log to say so."""
        self._given.append((JOB, number))

    def computed(self) -> None:
        """The reports alone are followed."""

    def next(self) -> Report:
        """The next report of the log."""
        report = Report(*self._take(CAME, "waits for a lane"))
        work = (report.lane, report.key)
        if work not in self._given:
            raise self._differs(_heard(report), "gave that lane no such work")
        self._given.remove(work)
        self._at = report.end_ns
        self.reports += 1
        return report

    def did(self, words: Sequence[int]) -> None:
        """Something was done; the log must say the same."""
        here = self._deed(words)
        then = self._take(DID, here)
        # The second word is the time.
        if [then[0], *then[2:]] != [words[0], *words[2:]]:
            raise self._differs(self._deed(then), here)
        self.counts[words[0]] += 1
        if words[0] == log.GATE:
            self._event = words[2]

    def close(self) -> None:
        """The run is over here; so it must be in the log, but for work that nothing waited for."""
        while self._coming is not None and self._coming[0] == CAME:
            self._coming = next(self._records, None)
        if self._coming is not None:
            raise self._differs(self._deed(self._coming[1:]), "ends")

    def _take(self, kind: str, here: str) -> list[Any]:
        """The next record without its kind, which must be this one."""
        record = self._coming
        if record is None:
            raise self._differs("ends", here)
        if record[0] != kind:
            then = self._deed(record[1:]) if record[0] == DID else _heard(record[1:])
            raise self._differs(then, here)
        self._coming = next(self._records, None)
        return record[1:]

    def _deed(self, words: Sequence[int]) -> str:
        if words[0] == log.GATE:
            judged = [f"{self._expert(w // 4)} a {_STATUS[w % 4]}" for w in words[6:]]
            return f"judges layer event {words[2]} of layer {words[3]} ({', '.join(judged)})"
        if words[0] == log.END:
            return f"ends layer event {words[2]}"
        return f"{_VERBS[words[0]]} expert {self._expert(words[2])}"

    def _expert(self, key: int) -> str:
        return f"{key // self._experts}.{key % self._experts}"

    def _differs(self, then: str, here: str) -> FollowError:
        return FollowError(
            f"after layer event {self._event} the run {then}, and followed now it {here}"
        )


class _Compared(LogDigest):
    """The log of deeds, compared with the run's as it grows."""

    def __init__(self, script: _Script) -> None:
        super().__init__()
        self._script = script

    def add(self, *words: int) -> None:
        """Compare, then append."""
        self._script.did([int(w) for w in words])
        super().add(*words)


_STATUS = ("hit", "late hit", "miss")
_VERBS = {
    log.ISSUE: "issues the load of",
    log.LAND: "lands",
    log.EVICT: "evicts",
    log.DROP: "drops the prefetch of",
    log.CANCEL: "cancels the load of",
    log.SERVED: "computes on the host",
}


def _heard(report: Sequence[Any]) -> str:
    return f"hears that the {report[0]} lane has done {report[1]}"


def _paths(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / HOST).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _path(facts: dict[str, Any], name: str) -> Path | None:
    value = facts.get(f"{name}_path")
    return Path(value) if isinstance(value, str) else None


def _short(value: Any, most: int = 120) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."
