"""What recording a model's gates costs, beside generating alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from moesim.bench.figures import Beside, Figure, Promise, Samples
from moesim.bench.measure import Side, interleave
from moesim.bench.workshop import DisagreementError, Workshop
from moesim.errors import NotRunError
from moesim.traces.prompt_sources import BUILT_IN, open_prompts
from moesim.traces.reader import RequestFacts, RequestRows

if TYPE_CHECKING:
    from moesim.traces.batches import BatchRecorder, Encoded
    from moesim.traces.gate_taps import Wanted
    from moesim.traces.record_model import Loaded

MODEL, DTYPE = "demo", "fp32"
BATCH, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 64
ROUNDS = 7
"""At least: a round takes some seconds, and what else goes on takes as much."""


@dataclass(frozen=True, slots=True)
class Way:
    """What is recorded, and what that may cost: recording over generating."""

    case: str
    most: float
    logits: bool = False
    ahead: tuple[int, ...] = ()
    norms: bool = False


WAYS = (
    Way("top-k and weights", 1.10),
    Way("full gates, ahead 1-3, norms", 1.25, logits=True, ahead=(1, 2, 3), norms=True),
)


@dataclass(slots=True)
class Timed:
    """One side: its work, and the CPU time of each run beside what `interleave` keeps."""

    work: Callable[[], object]
    recorder: BatchRecorder | None = None
    cpu_ns: list[int] = field(default_factory=list)

    def run(self) -> int:
        """Work once; wall ns. Tapping the gates, once for a whole recording, is not in them."""
        if self.recorder is None:
            return self._timed()
        with self.recorder:
            return self._timed()

    def _timed(self) -> int:
        began, began_cpu = time.perf_counter_ns(), time.process_time_ns()
        self.work()
        taken_ns = time.perf_counter_ns() - began
        self.cpu_ns.append(time.process_time_ns() - began_cpu)
        return taken_ns


def record(shop: Workshop) -> Iterator[Figure]:
    """Seconds to record a batch of a small model's tokens, beside generating them alone."""
    with _one_thread():
        shop.say(f"record: loading {MODEL}")
        loaded, batch, plain, recorders = _made()
        _check_alike(plain, batch, recorders)
        sides = {"generate": Timed(lambda: plain.generate(batch))}
        for way, recorder in zip(WAYS, recorders, strict=True):
            sides[way.case] = Timed(_recording(recorder, batch), recorder)
        rounds = max(ROUNDS, shop.settings.repeats)
        shop.say(f"record: {rounds} rounds of {len(sides)} sides")
        calls: dict[str, Side] = {name: side.run for name, side in sides.items()}
        taken = interleave(rounds, calls)
    for way in WAYS:
        yield _figure(way, taken, sides, loaded)


def _recording(recorder: BatchRecorder, batch: Sequence[Encoded]) -> Callable[[], object]:
    return lambda: recorder.record(batch)


def _figure(
    way: Way, taken: dict[str, list[int]], sides: dict[str, Timed], loaded: Loaded
) -> Figure:
    ours, theirs = sides[way.case].cpu_ns, sides["generate"].cpu_ns
    return Figure(
        benchmark="record",
        case=way.case,
        unit="s",
        measured=_seconds(taken[way.case]),
        beside=Beside.middle("generate alone", _seconds(taken["generate"])),
        promise=Promise(most=way.most),
        facts={
            "model": f"{loaded.name}, {loaded.dtype} on {loaded.device}",
            "batch": BATCH,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "cpu_time_ratio": median(a / b for a, b in zip(ours, theirs, strict=True)),
        },
    )


def _seconds(taken_ns: Sequence[int]) -> Samples:
    return Samples(tuple(ns / 1e9 for ns in taken_ns))


# ---- the sides -----------------------------------------------------------------------------------


def _made() -> tuple[Loaded, list[Encoded], BatchRecorder, list[BatchRecorder]]:
    """The model, a batch, one recorder that only generates, and one for each way."""
    try:
        import transformers

        from moesim.traces.batches import BatchRecorder, Generation
        from moesim.traces.gate_taps import Wanted
        from moesim.traces.gates import find_gates
        from moesim.traces.record_model import load
    except ModuleNotFoundError as error:
        raise NotRunError(f"needs {error.name}: `pip install '.[record]'` brings it") from None
    transformers.utils.logging.disable_progress_bar()
    loaded = load(MODEL, device="cpu", dtype=DTYPE)
    batch = _batch(loaded)
    gates = find_gates(loaded.model, batch[0].tokens.tolist())
    generation = Generation(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)

    def recorder(wanted: Wanted) -> BatchRecorder:
        return BatchRecorder(loaded, gates, wanted, generation)

    recorders = [recorder(Wanted(way.logits, way.ahead, way.norms)) for way in WAYS]
    return loaded, batch, recorder(Wanted()), recorders


def _batch(loaded: Loaded) -> list[Encoded]:
    """The built-in prompts, one after the other, cut to equal lengths."""
    from moesim.traces.batches import Encoded

    ids: list[int] = []
    for prompt in open_prompts(BUILT_IN).prompts():
        ids += loaded.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    cut = np.array(ids[: BATCH * PROMPT_TOKENS], np.int32).reshape(BATCH, PROMPT_TOKENS)
    return [Encoded(number, tokens, RequestFacts()) for number, tokens in enumerate(cut)]


def _check_alike(
    plain: BatchRecorder, batch: Sequence[Encoded], recorders: Sequence[BatchRecorder]
) -> None:
    """Run every side once; raise DisagreementError unless each recording holds the tokens that
    were generated without it."""
    alone = plain.generate(batch)[:, PROMPT_TOKENS:-1].tolist()
    for way, recorder in zip(WAYS, recorders, strict=True):
        with recorder:
            recorded = [_decoded(rows) for rows in recorder.record(batch)]
        if recorded != alone:
            raise DisagreementError(f"record: with {way.case} other tokens are generated")


def _decoded(rows: RequestRows) -> list[int]:
    """The tokens that went through the model after the prompt."""
    assert rows.token is not None
    tokens: list[int] = rows.token[(rows.iteration > 0) & (rows.token >= 0)].tolist()
    return tokens


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to the one core that the benchmarks stay on; without torch, do nothing."""
    try:
        import torch
    except ModuleNotFoundError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
