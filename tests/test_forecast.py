"""How forecasts are delivered: by a job or at once, how late, in what order, at what price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from moesim.errors import UsageError
from moesim.policies.forecast import ForecastSeat, Foresight, priority
from moesim.policy import World
from moesim.types import (
    NO_PLAN,
    Fact,
    Forecast,
    Gate,
    IterationBegin,
    IterationEnd,
    Job,
    JobDone,
    LayerEvent,
    Phase,
    Plan,
    State,
)
from moesim.view import Window

LAYERS, EXPERTS = 6, 4
ABSENT, QUEUED, IN_FLIGHT, RESIDENT = State


class Scripted(ForecastSeat):
    """Says what it was told to say of the next fact."""

    name = "scripted"
    says: Foresight | None = None

    def foresee(self, fact: Fact) -> Foresight | None:
        said, self.says = self.says, None
        return said


class Hosted:
    """A seat and the cache that it sees."""

    def __init__(self, decode_from: int = 0, **parameters: object) -> None:
        self.seat = Scripted(**parameters)  # type: ignore[arg-type]
        self.states = np.zeros(LAYERS * EXPERTS, np.uint8)
        self.waiting = 0
        self.view = Window(self.states, lambda: self.waiting, lambda: 0, lambda layer: 0)
        sizes = np.ones((1, LAYERS), np.int64)
        self.seat.begin(World(LAYERS, EXPERTS, 1, sizes, (9,), "global", decode_from))

    def tell(self, fact: Fact, says: Foresight | None = None) -> Plan:
        self.seat.says = says
        return self.seat.plan(fact, self.view)

    def gate(self, event: int, says: Foresight | None = None, layer: int | None = None) -> Plan:
        at = event % LAYERS if layer is None else layer
        source = LayerEvent(event, 0, at, (), np.zeros((1, 1), np.uint16))
        none = np.zeros(0, np.int64)
        return self.tell(Gate(source, none, none, none, none), says)


def says(*named: tuple[int, Sequence[int]], ops: int = 100, kept: int = 0) -> Foresight:
    """Layers and their experts, each with half of what the one before has."""
    forecasts = []
    for layer, chosen in named:
        shares = np.zeros(EXPERTS, np.int64)
        for rank, expert in enumerate(chosen):
            shares[expert] = 8192 >> rank
        forecasts.append(Forecast(layer, shares, np.array(chosen, np.int64)))
    return Foresight(forecasts, ops, 10 * ops, kept, 10 * kept)


def wishes(plan: Plan) -> list[tuple[int, int, int]]:
    """Expert, the event it is for, its priority."""
    return [(w.expert, w.expires, w.priority) for w in plan.prefetches]


def test_in_the_background_a_job_carries_the_forecast() -> None:
    hosted = Hosted()
    plan = hosted.gate(1, says((4, [2, 0])))
    (job,) = plan.jobs
    assert (job.ops, job.nbytes, plan.prefetches, plan.foreground_ops) == (100, 1000, (), 0)
    hosted.gate(2)
    plan = hosted.tell(JobDone(job, 2))
    # Two layers are left of three when it comes.
    assert wishes(plan) == [(18, 4, priority(8192, 2)), (16, 4, priority(4096, 2))]
    assert [f.layer for f in plan.forecasts] == [4]


def test_in_the_foreground_it_is_there_at_once_and_charged_at_a_gate() -> None:
    hosted = Hosted(background=False)
    begun = hosted.tell(IterationBegin(0, 1, Phase.DECODE, 1), says((0, [1]), (2, [3])))
    assert wishes(begun) == [(1, 0, priority(8192, 1)), (11, 2, priority(8192, 3))]
    assert begun.foreground_ops == 0 and not begun.jobs
    assert hosted.gate(0, says((3, [0]), ops=7)).foreground_ops == 107
    assert hosted.gate(1).foreground_ops == 0


def test_what_was_overtaken_informs_the_keep_seat_alone() -> None:
    hosted = Hosted()
    (job,) = hosted.gate(0, says((1, [0]), (2, [1]))).jobs
    hosted.gate(1)
    plan = hosted.tell(JobDone(job, 1))
    assert wishes(plan) == [(9, 2, priority(8192, 1))]
    assert [f.layer for f in plan.forecasts] == [1, 2]


def test_a_layer_that_is_not_ahead_is_the_next_passs() -> None:
    prompt, decoding = IterationBegin(0, 0, Phase.PREFILL, 1), IterationBegin(0, 1, Phase.DECODE, 1)
    for fact, at in ((prompt, 5 + 1 + 2), (decoding, 5 + 1)):
        hosted = Hosted(decode_from=2, background=False)
        hosted.tell(fact)
        assert [w[1] for w in wishes(hosted.gate(5, says((2, [0]))))] == [at]


def test_priorities_rise_as_their_layer_comes_near() -> None:
    hosted = Hosted(background=False)
    hosted.gate(0, says((4, [2, 0, 3])))
    hosted.states[18:20] = QUEUED, IN_FLIGHT
    assert hosted.gate(1).reprioritise == [(18, priority(8192, 3)), (19, priority(2048, 3))]
    hosted.states[18:20] = RESIDENT, ABSENT
    assert hosted.gate(3).reprioritise == [(18, priority(8192, 1))]
    assert hosted.gate(4) == NO_PLAN
    fixed = Hosted(background=False, refresh=False)
    fixed.gate(0, says((4, [2])))
    fixed.states[18] = QUEUED
    assert fixed.gate(1) == NO_PLAN


@pytest.mark.parametrize("renew", [True, False])
def test_a_newer_forecast_may_take_back_an_older_one(renew: bool) -> None:
    hosted = Hosted(background=False, renew=renew)
    hosted.gate(0, says((4, [0, 1, 2, 3]), (5, [0])))
    hosted.states[16:21] = QUEUED, QUEUED, IN_FLIGHT, RESIDENT, QUEUED
    plan = hosted.gate(1, says((4, [1])))
    # What is resident stays, and so does what was said of another layer.
    assert list(plan.cancel) == ([16, 18] if renew else [])
    # Nobody wishes for what was taken back: it is not taken back twice.
    again = hosted.gate(2, says((4, [3])))
    assert list(again.cancel) == ([17] if renew else [])


def test_a_full_queue_drops_forecasts_and_keeps_what_later_ones_build_upon() -> None:
    hosted = Hosted(queue=2)
    hosted.waiting = 2
    assert hosted.gate(0, says((3, [0]), ops=100, kept=60)) == NO_PLAN
    # A change of what is known has no forecast to lose, but its work to do.
    assert hosted.tell(IterationEnd(0, 0), says(ops=30, kept=30)) == NO_PLAN
    assert hosted.seat.dropped == 1
    hosted.waiting = 1
    (job,) = hosted.gate(1, says((4, [0]), ops=100, kept=60)).jobs
    assert (job.ops, job.nbytes) == (190, 1900)
    (job,) = hosted.gate(2, says((5, [0]), ops=100)).jobs
    assert (job.ops, job.nbytes) == (100, 1000)


def test_a_run_forgets_the_one_before() -> None:
    hosted = Hosted(queue=1)
    hosted.waiting = 1
    hosted.gate(0, says((3, [0]), kept=60))
    hosted.seat.begin(hosted.seat.world)
    hosted.waiting = 0
    (job,) = hosted.gate(0, says((3, [0]))).jobs
    assert (job.ops, hosted.seat.dropped) == (100, 0)


def test_a_queue_has_room_for_a_job() -> None:
    with pytest.raises(UsageError, match=r"prefetch.queue=0: must be 1 or more"):
        Scripted(queue=0)


def test_work_without_a_forecast_is_a_job_all_the_same() -> None:
    hosted = Hosted()
    (job,) = hosted.tell(IterationEnd(0, 0), says(ops=30, kept=30)).jobs
    assert isinstance(job, Job) and job.ops == 30
    assert hosted.tell(JobDone(job, 0)) == NO_PLAN
