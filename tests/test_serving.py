"""Laws of serving (``tests/README.md``): schedulers, arrivals, both engines."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cli import main
from moesim.engine.fast import FastEngine
from moesim.engine.feed import Feed
from moesim.errors import UsageError
from moesim.serve.arrivals import poisson_ns
from moesim.serve.continuous import kv_room
from moesim.serve.options import Slo
from moesim.serve.report import report
from moesim.serve.stream import Bank, Served
from moesim.summary import summarise
from moesim.tally import RequestTimes, Tally
from moesim.traces.reader import TraceReader
from moesim.traces.samples import trace_path
from moesim.types import Phase
from moesim.workload import Inputs, Shape, StaticBatch, Step, prepare, take
from tests.harness import inputs_of
from tests.serving_cases import Scene, run_reference, scenes, setup_for
from tests.strategies import DEMAND_ONLY, WATCHED, Case, decode_case, machine

SOME = ["lru", "lfu", "next-gate", "previous-token", "moe-infinity", "finemoe", "fate"]


def run_fast(scene: Scene, name: str = "lru", *options: str, ahead: int = 1) -> Tally:
    """A run of the fast engine, fed ``ahead`` requests at once."""
    setup = setup_for(scene, name, *options)
    engine = FastEngine(setup)
    works = list(scene.works(inputs_of(setup.policy)))
    for first in range(0, len(works), ahead):
        for work in works[first : first + ahead]:
            engine.offer(work)
        engine.advance()
    engine.close()
    while not engine.advance():
        pass
    return engine.tally


# ---- laws of the reference -----------------------------------------------------------------------


@given(scenes(), st.sampled_from(DEMAND_ONLY[:6]))
@settings(max_examples=40)
def test_s1_requests_are_conserved(scene: Scene, name: str) -> None:
    tally, watcher = run_reference(scene, name)
    queue = watcher.inner.queue
    finished = [r for r in tally.requests if r.end_ns >= 0]
    assert len(finished) == len(watcher.ends_ns)
    assert len(watcher.ends_ns) + len(watcher.running) + len(watcher.inner.waiting) == queue.arrived
    came = [w.arrival_ns for w in watcher.works if w.arrival_ns is not None]
    assert queue.arrived == sum(arrival <= watcher.end_ns for arrival in came)
    if not scene.until_ns:
        assert len(finished) == len(scene.stream)
        assert all(
            times.output_tokens == work.iterations
            for times, work in zip(
                sorted(tally.requests, key=lambda r: r.request), watcher.works, strict=True
            )
        )


@given(scenes())
@settings(max_examples=40)
def test_s2_littles_law_is_exact(scene: Scene) -> None:
    tally, watcher = run_reference(replace(scene, until_ns=0))
    assert watcher.integral() == sum(r.end_to_end_ns or 0 for r in tally.requests)
    told = report(tally, watcher.inner.waiting, Slo(), 0, None)
    if watcher.end_ns:
        assert told["mean_in_system"] == watcher.integral() / watcher.end_ns


@given(scenes())
@settings(max_examples=40)
def test_s2_littles_law_where_the_run_is_cut(scene: Scene) -> None:
    tally, watcher = run_reference(replace(scene, until_ns=scene.until_ns or 50))
    told = report(tally, watcher.inner.waiting, Slo(), 0, None)
    if watcher.end_ns:
        assert told["mean_in_system"] == watcher.integral() / watcher.end_ns


@given(scenes())
@settings(max_examples=40)
def test_s4_tokens_of_a_request_are_computed_in_order_and_once(scene: Scene) -> None:
    _, watcher = run_reference(replace(scene, until_ns=0))
    for work in watcher.works:
        parts = watcher.computed[work.index]
        wanted = [(n, work.tokens(n)) for n in range(work.iterations)]
        assert [n for n, _, last in parts if last == work.tokens(n)] == [n for n, _ in wanted]
        for (number, _, last), (following, first, _) in pairwise(parts):
            assert (following, first) in ((number, last), (number + 1, 0))
        assert sum(last - first for _, first, last in parts) == sum(t for _, t in wanted)


@given(scenes())
@settings(max_examples=40)
def test_s4_times_of_a_request_are_in_order(scene: Scene) -> None:
    tally, _ = run_reference(replace(scene, until_ns=0))
    for times in tally.requests:
        assert times.arrival_ns <= times.begin_ns <= times.first_token_ns <= times.end_ns


@given(scenes())
@settings(max_examples=40)
def test_s5_a_continuous_batch_of_one_is_fifo(scene: Scene) -> None:
    alone = replace(scene, case=replace(scene.case, batch=1), token_budget=0)
    fifo, _ = run_reference(replace(alone, scheduler="static"))
    one, _ = run_reference(replace(alone, scheduler="decode-first"))
    other, _ = run_reference(replace(alone, scheduler="prefill-first"))
    assert fifo.log_digest == one.log_digest == other.log_digest
    assert fifo.requests == one.requests == other.requests


@given(scenes())
@settings(max_examples=40)
def test_s6_a_step_keeps_the_budget(scene: Scene) -> None:
    budget = max(2, scene.token_budget)
    scene = replace(scene, token_budget=budget, until_ns=0)
    if scene.scheduler == "static":
        scene = replace(scene, scheduler="decode-first")
    scheduler = scene.make_scheduler()
    for work in scene.works():
        scheduler.offer(replace(work, arrival_ns=None, follows=-1, followed=False))
    scheduler.close()
    now = 0
    while not isinstance(step := scheduler.next_step(now), str):
        now += 1
        if not hasattr(step, "parts"):
            continue
        tokens = sum(part.last - part.first for part in step.parts)
        assert tokens <= budget or len(step.parts) == 1
        assert len(step.parts) <= scene.case.batch
        phases = [part.work.phase(part.number) for part in step.parts]
        if scene.scheduler == "decode-first" and Phase.PREFILL in phases and not scene.users:
            held = {part.work.index for part in step.parts}
            assert all(
                work.index in held or work.phase(work.next_pass) == Phase.PREFILL
                for work in scheduler._running
                if not work.finished
            ), "a prompt went before a request that decodes"


# ---- two engines ---------------------------------------------------------------------------------


@given(scenes(), st.sampled_from(SOME), st.integers(1, 3))
@settings(max_examples=60)
def test_i8_arrivals_and_schedulers_are_the_same_in_both_engines(
    scene: Scene, name: str, ahead: int
) -> None:
    reference, _ = run_reference(scene, name)
    fast = run_fast(scene, name, ahead=ahead)
    assert fast.log_digest == reference.log_digest
    assert fast.requests == reference.requests
    assert summarise(fast, scene.warm) == summarise(reference, scene.warm)
    assert (fast.times, fast.phases, fast.steps) == (
        reference.times, reference.phases, reference.steps,
    )  # fmt: skip


@given(scenes(dropped=False))
@settings(max_examples=40)
def test_i8_gathered_steps_are_the_blocks_that_are_put_together(scene: Scene) -> None:
    setup = setup_for(scene, "fiddler" if scene.warm else "lru")
    gathering, plain = (FastEngine(setup).block_maker() for _ in range(2))
    plain._gatherer = None
    assert gathering._gatherer is not None
    works = list(scene.works())
    # A request alone goes another way.
    step = Step(3, tuple(take(work, scene.token_budget) for work in works))
    made, wanted = gathering.make([step]), plain.make([step])
    gathered = made.events is gathering._gatherer.events
    assert gathered == all(work.bank is not None for work in works)
    assert np.array_equal(made.events, wanted.events)
    accesses = wanted.demand.shape[1]
    assert np.array_equal(made.demand[:, :accesses], wanted.demand)
    assert np.array_equal(made.ids[:accesses], wanted.ids)
    assert np.array_equal(made.table, wanted.table)


def test_i8_the_shipped_trace_is_gathered() -> None:
    with TraceReader(trace_path("demo")) as reader:
        rows = list(islice(reader.requests(), 3))
        works = [prepare(i, one, reader.meta, Inputs()) for i, one in enumerate(rows)]
    bank = Bank()
    bank.fill(enumerate(works))
    assert all(work.bank is not None for work in bank.works.values())


@given(scenes(kv=True))
@settings(max_examples=40)
def test_s7_the_kv_cache_never_takes_what_the_experts_of_a_token_need(scene: Scene) -> None:
    scene = replace(scene, scheduler="decode-first")
    try:
        reference, watcher = run_reference(scene)
    except UsageError as error:
        assert "--kv share" in str(error)
        return
    assert run_fast(scene).log_digest == reference.log_digest
    room = watcher.inner.kv_tokens
    assert all(work.longest <= room for work in watcher.works if work.index in watcher.computed)


def test_s7_a_request_waits_for_room_in_the_kv_cache() -> None:
    """Two requests that fit one by one, and not together, are served one after the other."""
    case = decode_case([[[0]]] * 3, 2, 2, machine(expert_ns=5), options=WATCHED)
    options = replace(WATCHED, share_kv=True)
    case = replace(case, batch=2, options=options, capacity_bytes=(5,))
    # One expert of one byte must stay: four tokens of room.
    assert kv_room((5,), [1], 1, 1) == 4
    for longest, together in ((3, False), (2, True)):
        shape = Shape(0, longest)
        stream = tuple(Served(i, 0, i, 0, shape) for i in range(2))
        tally, _ = run_reference(Scene(case, stream))
        first, second = tally.requests
        assert (second.begin_ns == first.begin_ns) == together
        assert together or second.begin_ns == first.end_ns


def test_s7_a_request_that_never_fits_is_one_clear_line() -> None:
    case = decode_case([[[0]]] * 3, 2, 2)
    case = replace(case, options=replace(WATCHED, share_kv=True), capacity_bytes=(5,))
    with pytest.raises(UsageError, match=r"request 0 needs 9 tokens of KV cache.*room for 4"):
        run_reference(Scene(case, (Served(0, 0, 0, 0, Shape(0, 9)),)))


@given(scenes())
@settings(max_examples=40)
def test_what_warms_the_cache_is_what_a_shorter_stream_counts(scene: Scene) -> None:
    """One by one and back to back: the counts before are those of the warming requests alone."""
    stream = tuple(replace(s, arrival_ns=None, follows=-1, followed=False) for s in scene.stream)
    scene = replace(scene, scheduler="static", users=0, until_ns=0, stream=stream, warm=1)
    scene = replace(scene, case=replace(scene.case, batch=1))
    if len(stream) == 1:
        return
    whole, _ = run_reference(scene)
    alone, _ = run_reference(replace(scene, stream=stream[:1], warm=0))
    assert whole.before is not None
    assert (whole.before.phases, whole.before.times) == (alone.phases, alone.times)


# ---- tiling --------------------------------------------------------------------------------------


@given(scenes())
@settings(max_examples=40)
def test_a_tiled_request_repeats_its_recorded_rows(scene: Scene) -> None:
    """Restated: token t of a prompt is the recorded token t modulo the recorded length."""
    for work in scene.works():
        shape = work.shape
        if shape is None or not shape.prompt_tokens or not work.lead:
            continue
        spans = _first_spans(work)
        for layer, rows in spans.items():
            own = work.block_layers.index(layer)
            low, high = work.blocks[own], work.blocks[own + 1]
            if high - low == work.pass_tokens[0]:
                wanted = [low + t % (high - low) for t in range(shape.prompt_tokens)]
                assert rows == wanted


def _first_spans(work: object) -> dict[int, list[int]]:
    from moesim.workload import Step, layer_spans, take

    step = Step(0, (take(work, 0),))  # type: ignore[arg-type]
    total = np.arange(10_000)
    return {layer: total[spans[0].rows].tolist() for layer, spans in layer_spans(step)}


def test_decoded_passes_cycle_and_positions_go_on() -> None:
    case = decode_case([[[0]], [[1]], [[2]]], 3, 3)
    (work,) = Scene(case, (Served(0, 0, 0, 0, Shape(4, 6, 10)),)).works()
    # Its prompt stands on decoded rows: 0 1 2 0, then the passes 0 1 2 0 1.
    assert _first_spans(work) == {0: [0, 1, 2, 0]}
    assert [work.recorded(n) for n in range(1, 6)] == [0, 1, 2, 0, 1]
    assert [work.context_after(n) for n in range(6)] == [14, 15, 16, 17, 18, 19]
    assert work.longest == 19
    assert [work.phase(n) for n in range(3)] == [Phase.PREFILL, Phase.DECODE, Phase.DECODE]


# ---- queues in closed form -----------------------------------------------------------------------


def one_token(requests: int) -> Case:
    """One layer, one token, all resident: service takes the same time whatever comes."""
    case = decode_case([[[0]]], 2, 2, machine(dense_ns=600, expert_ns=400))
    return replace(case, initial="all", charged=False, options=replace(WATCHED, timeline=False))


def waits_of(rate: Fraction, requests: int, *, continuous: bool) -> np.ndarray:
    """Waiting times through the fast engine, ns."""
    case = one_token(requests)
    when = poisson_ns(rate, requests, 7).tolist()
    name = "decode-first" if continuous else "static"
    scene = Scene(case, tuple(Served(i, 0, i, when[i]) for i in range(requests)), name)
    setup = setup_for(scene, "lru")
    feed = Feed([FastEngine(setup)])
    for work in scene.works(inputs_of(setup.policy)):
        feed.offer(work)
        feed.advance()
    feed.close()
    while not feed.advance():
        pass
    requests_ = feed._engines[0].tally.requests
    assert [r.arrival_ns for r in requests_] == when
    return np.array([r.queue_ns for r in requests_])


def lindley(when: np.ndarray, service_ns: int) -> np.ndarray:
    """W' = max(0, W + S - gap): the waits of a single server, first come, first served."""
    waits = np.zeros(len(when), np.int64)
    for i, gap in enumerate(np.diff(when).tolist()):
        waits[i + 1] = max(0, waits[i] + service_ns - gap)
    return waits


@pytest.mark.parametrize("load", ["0.5", "0.8"])
@pytest.mark.parametrize("continuous", [False, True])
def test_s3_waits_are_lindleys(load: str, continuous: bool) -> None:
    rate = Fraction(load) * 10**6
    waits = waits_of(rate, 1500, continuous=continuous)
    assert np.array_equal(waits, lindley(poisson_ns(rate, 1500, 7), 1000))
    assert waits.max() > 0


@pytest.mark.whole
@pytest.mark.parametrize("load", ["0.5", "0.8"])
def test_s3_the_mean_wait_is_pollaczeks_and_khinchines(load: str) -> None:
    rho = float(load)
    waits = waits_of(Fraction(load) * 10**6, 1_000_000, continuous=True)
    wanted = rho * 1000 / (2 * (1 - rho))
    assert abs(waits.mean() / wanted - 1) < 0.02


# ---- what is said --------------------------------------------------------------------------------


def _tally(rows: list[tuple[int, int, int, int, int]], end_ns: int) -> Tally:
    """(arrival, begin, first token, end, output tokens)."""
    tally = Tally(
        requests=[
            RequestTimes(i, a, b, 1, first, end, tokens)
            for i, (a, b, first, end, tokens) in enumerate(rows)
        ]
    )
    tally.times.idle = end_ns
    return tally


def test_goodput_counts_who_keeps_every_limit() -> None:
    rows = [(0, 0, 10, 30, 3), (0, 5, 30, 40, 2), (100, 100, 105, 105, 1)]
    slo = Slo(ttft_ns=20, tpot_ns=10)
    told = report(_tally(rows, 200), [], slo, 0, None)
    # The second waits too long for its first token; the third has no TPOT to break.
    assert (told["good"], told["counted"]) == (2, 3)
    assert told["goodput_per_s"] == 2 * 10**9 / 105
    assert report(_tally(rows, 200), [], slo, 1, None)["counted"] == 2


def test_overloaded_is_said_where_fewer_go_than_come() -> None:
    def verdict(service: int) -> tuple[bool | None, str]:
        ends, rows = 0, []
        for i in range(100):
            begin = max(ends, 10 * i)
            ends = begin + service
            rows.append((10 * i, begin, ends, ends, 1))
        told = report(_tally(rows, ends), [], Slo(), 0, None)
        return told["overloaded"], told["why"]

    assert verdict(9)[0] is False
    assert verdict(13)[0] is True
    few = report(_tally([(0, 0, 1, 1, 1), (9, 9, 10, 10, 1)], 10), [], Slo(), 0, None)
    assert few["overloaded"] is None


def test_a_closed_loop_never_has_more_in_it_than_users() -> None:
    case = replace(decode_case([[[0]], [[1]]], 2, 2, machine(expert_ns=3)), batch=4)
    stream = tuple(Served(i, 0, i) for i in range(9))
    tally, _ = run_reference(Scene(case, stream, users=2, think_ns=11))
    times = tally.requests
    assert len(times) == 9
    for one in times:
        inside = [r for r in times if r.arrival_ns <= one.arrival_ns < r.end_ns]
        assert len(inside) <= 2
    ends = sorted(r.end_ns for r in times)
    # Each but the first two comes when someone has ended and thought.
    assert [r.arrival_ns for r in times[2:]] == [end + 11 for end in ends[:7]]


def test_the_next_turn_comes_when_the_last_has_ended_and_been_thought_about() -> None:
    case = decode_case([[[0]], [[1]]], 2, 2, machine(expert_ns=3))
    stream = (
        Served(0, 0, 0, 5, followed=True),
        Served(1, 0, 1, None, Shape(0, 2, 2), follows=0),
    )
    tally, _ = run_reference(Scene(case, stream, "static", think_ns=100))
    first, second = tally.requests
    assert (first.arrival_ns, second.arrival_ns) == (5, first.end_ns + 100)


def test_static_batches_are_the_default() -> None:
    assert isinstance(
        Scene(one_token(1), (Served(0, 0, 0),), "static").make_scheduler(), StaticBatch
    )


# ---- the command line ----------------------------------------------------------------------------


def answer(*words: str) -> dict[str, Any]:
    """The only run of ``moesim replay --json`` on the demo."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["replay", "--trace", "demo", "--limit", "12", "--json", *words]) == 0
    (run,) = json.loads(out.getvalue())["runs"]
    return dict(run)


@pytest.mark.parametrize(
    "words",
    [
        "--arrivals poisson:40 --requests 20 --scheduler decode-first --batch 6 --kv share",
        "--arrivals closed:3:20ms --scheduler prefill-first --batch 2 --token-budget 32",
        "--arrivals poisson:40 --turns 3:10ms --shift topic:2 --warm 2 --slo ttft=1ms,tpot=9s",
        "--arrivals poisson:90 --until 60ms --scheduler decode-first --batch 2 --policy next-gate",
        "--shift shuffle --batch 3",
    ],
)
def test_both_engines_answer_the_same(words: str) -> None:
    fast, reference = (
        answer(*words.split(), "--engine", engine) for engine in ("fast", "reference")
    )
    for name in ("engine", "run_dir"):
        del fast[name], reference[name]
    assert fast == reference
    served = fast["serving"]
    assert (served is None) == ("--arrivals" not in words)
    if served is not None:
        parts = served["finished"] + served["running"] + served["waiting"]
        assert served["arrived"] == parts
        assert served["good"] <= served["counted"]


def test_a_log_is_served_from_the_command_line(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    rows = [f"2023-11-16 18:15:{46 + i:02}.68,{5 + i},{2 + i}" for i in range(4)]
    log.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]))
    run = answer("--arrivals", str(log), "--rate", "50", "--out", str(tmp_path / "runs"))
    served = run["serving"]
    assert served["arrived"] == served["finished"] == 4
    assert served["offered_per_s"] == pytest.approx(50)
    assert run["output_tokens"] == 2 + 3 + 4 + 5
    assert served["matching"]["recorded_requests_used"] <= 4
    rows_ = pq.read_table(Path(run["run_dir"]) / "requests.parquet").to_pylist()
    assert [row["prompt_tokens"] for row in rows_] == [5, 6, 7, 8]
    for row in rows_:
        assert row["queue_ns"] == row["begin_ns"] - row["arrival_ns"]
        assert row["end_to_end_ns"] == row["end_ns"] - row["arrival_ns"]
    # What the log says is part of what a run is.
    log.write_text(log.read_text().replace(",5,2", ",5,3"))
    other = answer("--arrivals", str(log), "--rate", "50", "--out", str(tmp_path / "runs"))
    assert other["run_dir"] != run["run_dir"]
