"""Hypothesis strategies for requests that arrive: a case, a stream over its recordings, and how it
is scheduled; and a run of one in either engine, watched from outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from moesim.engine.reference import ReferenceEngine
from moesim.engine.setup import Setup
from moesim.serve.continuous import ContinuousBatch, kv_room
from moesim.serve.stream import Bank, Plan, Served
from moesim.tally import Tally
from moesim.workload import (
    DONE,
    Idle,
    Inputs,
    Queue,
    Scheduler,
    Shape,
    StaticBatch,
    Step,
    Work,
    prepare,
)
from tests.harness import drive, inputs_of, setup_of, spec_of
from tests.strategies import Case, cases


@dataclass(frozen=True, slots=True)
class Scene:
    """A case and how its recordings are served."""

    case: Case
    stream: tuple[Served, ...]
    scheduler: str = "decode-first"
    token_budget: int = 0
    users: int = 0
    think_ns: int = 0
    until_ns: int = 0
    warm: int = 0

    @property
    def timed(self) -> bool:
        """Whether the schedule depends on the clock."""
        return bool(self.users or self.until_ns) or self.stream[0].arrival_ns is not None

    def make_scheduler(self) -> Scheduler:
        """A fresh one."""
        case, queue = self.case, Queue(self.users, self.think_ns)
        if self.scheduler == "static":
            return StaticBatch(case.batch, case.chunk_tokens, queue, self.until_ns)
        sizes = case.model.expert_bytes_table().tolist()
        room = kv_room(case.capacity_bytes, sizes, case.meta.top_k, case.meta.layers)
        return ContinuousBatch(
            case.batch,
            self.token_budget,
            case.chunk_tokens,
            decode_first=self.scheduler == "decode-first",
            kv_tokens=room if case.options.share_kv else -1,
            queue=queue,
            until_ns=self.until_ns,
        )

    def works(self, inputs: Inputs = Inputs()) -> Iterator[Work]:  # noqa: B008
        """The requests of the stream, over one bank."""
        bank = Bank()
        rows = enumerate(self.case.requests)
        bank.fill((i, prepare(i, one, self.case.meta, inputs)) for i, one in rows)
        return bank.serve(Plan(list(self.stream)))


@st.composite
def shapes(draw: st.DrawFn, work: Work) -> Shape | None:
    """Other lengths than were recorded, or the recorded ones."""
    if draw(st.integers(0, 3)) == 0:
        return None
    prompt = draw(st.integers(1, 9)) if work.lead or draw(st.booleans()) else 0
    has_decode = len(work.passes) - 1 > work.lead
    passes = draw(st.integers(1, 7)) if has_decode else 1
    return Shape(prompt, passes, draw(st.sampled_from([0, 0, 0, 5])))


@st.composite
def scenes(draw: st.DrawFn, *, kv: bool = False, **kinds: Any) -> Scene:
    """Any stream over any case under any scheduler."""
    case = draw(cases(arrivals=False, **kinds))
    works = [prepare(i, rows, case.meta, Inputs()) for i, rows in enumerate(case.requests)]
    users = draw(st.sampled_from([0, 0, 1, 3]))
    when, stream = 0, []
    follows = -1
    for index in range(draw(st.integers(1, 6))):
        recorded = draw(st.integers(0, len(works) - 1))
        shape = draw(shapes(works[recorded]))
        when += draw(st.sampled_from([0, 1, 7, 40, 300]))
        turn = index > 0 and not users and draw(st.integers(0, 4)) == 0 and follows != index - 1
        stream.append(
            Served(
                index,
                recorded,
                100 + index,
                None if users or turn else when,
                shape,
                index - 1 if turn else -1,
            )
        )
        if turn:
            stream[index - 1] = replace(stream[index - 1], followed=True)
    if kv:
        options = replace(case.options, share_kv=True)
        # Room for the longest request beside every expert.
        whole = int(case.model.expert_bytes_table().sum()) * case.meta.experts
        case = replace(
            case, capacity_bytes=(whole + draw(st.integers(20, 60)) * case.meta.layers,),
            options=options,
        )  # fmt: skip
    return Scene(
        case,
        tuple(stream),
        draw(st.sampled_from(["static", "decode-first", "prefill-first"])),
        draw(st.sampled_from([0, 1, 2, 5])),
        users,
        draw(st.sampled_from([0, 3, 50])),
        draw(st.sampled_from([0, 0, 1, 60, 400])),
        draw(st.integers(0, 3)),
    )


def setup_for(scene: Scene, name: str, *settings: str) -> Setup:
    """The configuration of a run."""
    spec = spec_of(name, *settings)
    setup = setup_of(scene.case, spec.build(), spec.initial)
    return replace(setup, scheduler=scene.make_scheduler(), warm=scene.warm)


def run_reference(scene: Scene, name: str = "lru", *settings: str) -> tuple[Tally, Watcher]:
    """A run of the reference engine whose scheduler is watched."""
    setup = setup_for(scene, name, *settings)
    watcher = Watcher(setup.scheduler)
    engine = ReferenceEngine(replace(setup, scheduler=watcher))
    tally = drive(engine, watcher.seen(scene.works(inputs_of(setup.policy))))
    watcher.finish(engine.clock.now)
    return tally, watcher


class Watcher:
    """Stands between an engine and its scheduler, and keeps books of its own: who is in the system,
    and what was computed of whom."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.works: list[Work] = []
        self.running: dict[int, Work] = {}
        self.ends_ns: dict[int, int] = {}
        self.computed: dict[int, list[tuple[int, int, int]]] = {}
        """Of each request, by place: (pass, first token, last token), as they were served."""
        self._step: Step | None = None
        self.end_ns = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def seen(self, works: Iterator[Work]) -> Iterator[Work]:
        """Note what is offered."""
        for work in works:
            self.works.append(work)
            yield work

    def next_step(self, now_ns: int) -> Step | Idle | str:
        """Passes a step on, and judges it."""
        self._ended(now_ns)
        answer: Step | Idle | str = self.inner.next_step(now_ns)
        self._judge(answer, now_ns)
        return answer

    def _ended(self, now_ns: int) -> None:
        step, self._step = self._step, None
        for part in step.parts if step else ():
            if part.ends and part.number == part.work.iterations - 1:
                self.ends_ns[part.work.index] = now_ns
                del self.running[part.work.index]

    def _judge(self, answer: Step | Idle | str, now_ns: int) -> None:
        waiting = [
            work
            for work in self.works
            if work.arrival_ns is not None and work.arrival_ns <= now_ns
            and work.index not in self.computed
        ]  # fmt: skip
        if isinstance(answer, Step):
            assert answer.parts, "a step of nobody"
            for part in answer.parts:
                assert part.work.arrival_ns is None or part.work.arrival_ns <= now_ns
                self.running[part.work.index] = part.work
                self.computed.setdefault(part.work.index, []).append(part[1:4])
            self._step = answer
        elif isinstance(answer, Idle) or answer == DONE:
            stopped = 0 < self.inner.until_ns <= now_ns
            assert stopped or not self.running, "work conservation: it rests, and requests run"
            assert stopped or not waiting, "work conservation: it rests, and requests wait"

    def finish(self, now_ns: int) -> None:
        """The run has ended."""
        self.end_ns = now_ns

    def integral(self) -> int:
        """The number in the system over time, integrated step by step."""
        changes = [(w.arrival_ns, 1) for w in self.works if self._came(w)]
        changes += [(end, -1) for end in self.ends_ns.values()]
        total = inside = last = 0
        for when, change in sorted(changes):
            total += inside * (when - last)
            inside, last = inside + change, when
        return total + inside * (self.end_ns - last)

    def _came(self, work: Work) -> bool:
        return work.arrival_ns is not None and work.arrival_ns <= self.end_ns
