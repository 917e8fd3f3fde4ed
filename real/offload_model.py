"""``moesim.real.offload``: a HuggingFace MoE model whose experts are fetched as a policy says.

The model generates as ever; its own gates route. Its experts lie in host memory, and a bounded
bank of slots holds those that the policy keeps.
"""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim.configuration import blaming
from moesim.errors import UsageError
from moesim.factlog import FACTS, FactLog, LoggedDeeds, Watched
from moesim.protocol import Policy, restrict
from moesim.real.errors import ExecutionError
from moesim.real.experts_parcel import Experts, Forward, experts_of, register
from moesim.real.offload_bank import HostBank, SlotBank, refuse_short_ram
from moesim.real.offload_lanes import OffloadLanes
from moesim.real.offload_load import fill, load_hollow, move
from moesim.real.offload_options import Asked, Options
from moesim.real.offload_serve import (
    Bending,
    LayerCall,
    LiveRequest,
    LiveServer,
    Pass,
    Rows,
    rows_of,
)
from moesim.real.providers import LiveGates, find_live, true_probabilities
from moesim.real.run import request_row, run_id_of
from moesim.real.slots import SlotLedger
from moesim.result import RunStore, host_facts
from moesim.serving import Report
from moesim.summary import summarise
from moesim.timeline import chrome_events
from moesim.traces.gates import Gates, find_blocks, is_encoder_decoder
from moesim.traces.model_profile import model_profile
from moesim.traces.reader import TraceReader
from moesim.traces.record_model import Loaded, versions
from moesim.traces.schema import TraceMeta
from moesim.types import AnyArray, Needs

DEVICES = ("cpu", "cuda")
_PROBE = 13
"""Tokens of the pass that finds the gates."""
_JOIN_S = 2.0

OpenBank = Callable[[HostBank, SlotLedger, torch.device], SlotBank]
"""Makes the slots; tests put broken ones in their place."""


def offload(
    model: Any,
    policy: str | Callable[[], Policy] = "lru",
    capacity: str = "25%",
    *,
    device: str = "cpu",
    dtype: str = "auto",
    tokenizer: str | None = None,
    **options: Any,
) -> Any:
    """Offload a model's experts; the model, which generates as before.

    Parameters
    ----------
    model : a HuggingFace Mixture-of-Experts model, or what ``moesim record --model`` takes: a
        folder, a hub id, a shipped name. A checkpoint in safetensors is read expert by expert, so
        that the model never lies in memory twice.
    policy, capacity : as on the command line.
    device : cpu, where the slots lie in RAM as well, or cuda.
    dtype : of the weights, where ``model`` is a name.
    options : ``Options``: settings, scope, calibration, out, ...

    ``model.moesim`` is the ``Offloading``: what was counted (``summary``), the end of a run
    (``finish``), another policy (``change``). With a lossless policy logits are bit for bit those
    of the library's ``eager`` experts.

    Raises
    ------
    UsageError
        For a model that cannot be offloaded, by the name of its class, and for wrong options.
    NotRunError
        If the policy needs what a live run of this model cannot tell.
    """
    if device not in DEVICES:
        raise UsageError(f"--device {device}: unknown; choose from {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA GPU is at hand; use --device cpu")
    folder = None
    if isinstance(model, str | Path):
        loaded, folder = load_hollow(str(model), tokenizer=tokenizer, dtype=dtype)
    else:
        loaded = Loaded(type(model).__name__, "", model, None)
    if getattr(loaded.model, "moesim", None) is not None:
        raise UsageError(
            f"{loaded.name}: is offloaded already; `model.moesim.change(...)` gives it another "
            "policy or capacity"
        )
    asked = Options(policy=policy, capacity=capacity, **options)
    loaded.model.moesim = Offloading(loaded, folder, asked, torch.device(device))
    return loaded.model


class Offloading:
    """What an offloaded model has beside itself: banks, policy, and the run under way.

    A *run* is one policy object with its cache, from the first forward pass to ``finish``, or to an
    error or Ctrl-C; the next forward pass begins another, with a cold cache.
    """

    def __init__(
        self,
        loaded: Loaded,
        folder: Path | None,
        options: Options,
        device: torch.device,
        open_bank: OpenBank = SlotBank,
    ) -> None:
        self.loaded = loaded
        self.device = device
        self.open_bank = open_bank
        model = loaded.model.eval()
        with _blank(model):
            gates, calls = find_live(model, _some_tokens(model))
            self.experts: list[Experts] = experts_of(model, gates.layers)
            self.meta = _meta(loaded, gates)
            self.gates: Gates = gates
            self.live = LiveGates(gates, calls, self.meta)
            self.asked, self._options = self._looked_up(options), options
        self.bank = HostBank(self.experts, pin=device.type == "cuda")
        refuse_short_ram(self.bank.nbytes if folder is not None else 0)
        if folder is None:
            move(self.experts, self.bank)
        else:
            fill(model, gates.layers, self.experts, self.bank, folder)
        _place(model, device)
        self.live.place(device)
        self.slots: SlotBank | None = None
        self.run: Run | None = None
        self.requests: Iterator[int] | None = None
        """Numbers of the sequences to come; None: from 0 on."""
        self._driver = _Driver(self)
        self.live.attach()

    # ---- for users -------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What was counted in the run so far; the model must be at rest."""
        run = self._running()
        run.server.tally.requests = list(run.server.times.values())
        return run.summary()

    def finish(self, trace: Path | None = None) -> dict[str, Any]:
        """End the run, and keep its folder where ``out`` says so; its summary.

        trace : what was recorded of it meanwhile.
        """
        run = self._running()
        self.run = None
        return run.finish(trace)

    def change(self, **options: Any) -> None:
        """End the run, and go on with other options, from a cold cache."""
        if {"policy", "capacity"} & options.keys():
            options = {"plan": None, **options}
        changed = replace(self._options, **options)
        asked = self._looked_up(changed)
        if self.run is not None:
            self.finish()
        self.asked, self._options = asked, changed

    # ---- for the model's thread ------------------------------------------------------------------

    def begun(self) -> Run:
        """The run under way, or a new one."""
        if self.run is None:
            self.run = Run(self)
        return self.run

    def abandon(self) -> None:
        """The run ends here, with nothing kept."""
        run, self.run = self.run, None
        if run is not None:
            run.abandon()

    def bank_for(self, ledger: SlotLedger) -> SlotBank:
        """Slots as the ledger counts them; those of the last run where they fit."""
        if self.slots is None or self.slots.counts != ledger.slots:
            self.slots = None
            self.slots = self.open_bank(self.bank, ledger, self.device)
        else:
            self.slots.attend(ledger)
        return self.slots

    def _running(self) -> Run:
        if self.run is None:
            raise UsageError(f"{self.loaded.name}: no run is under way; generate first")
        return self.run

    def _looked_up(self, options: Options) -> Asked:
        asked = Asked(options, self.meta)
        self.live.refuse_blind(asked.name, asked.inputs)
        return asked


# ---- one run -------------------------------------------------------------------------------------


class Run:
    """One policy and its cache, served by a thread of its own."""

    def __init__(self, owner: Offloading) -> None:
        # The threads must not keep the model: when it goes, they go.
        self.asked = owner.asked
        self.score = owner.gates.score
        self.sequences = 0
        self.batch = 0
        """Most sequences of a batch."""
        options = self.asked.options
        self.store = RunStore(options.out) if options.out else None
        self._beside: Path | None = None
        self._log: FactLog | None = None
        self._started = time.perf_counter()
        self._error: BaseException | None = None
        if self.store is not None:
            self._beside = Path(tempfile.mkdtemp(prefix=".real-", dir=self.store.root))
            self._log = FactLog(self._beside / FACTS)
        try:
            self.policy = Watched(self.asked.build(), self._log)
            with blaming(self.asked.spec):
                setup = self.asked.setup(self.policy, owner.bank)
            self.ledger = SlotLedger(setup.world, setup.world.top_k if self.policy.bypass else 0)
            self.bank = owner.bank_for(self.ledger)
            self.lanes = OffloadLanes(
                self.bank,
                self.ledger,
                self.asked.costs,
                paced=options.paced,
                watchdog_s=options.watchdog_s,
                steady=options.steady,
                workers=min(self.asked.hardware.host.workers, os.cpu_count() or 1),
            )
        except BaseException:
            self._drop()
            raise
        try:
            with blaming(self.asked.spec):
                self.server = self._server(setup)
        except BaseException:
            self.lanes.close()
            self._drop()
            raise
        self.bank.on_host = self._on_host
        self._thread = threading.Thread(target=self._serve, name="moesim server", daemon=True)
        self._thread.start()
        self._farewell = weakref.finalize(owner, self.lanes.knock, None)
        self._farewell.atexit = False

    def finish(self, trace: Path | None) -> dict[str, Any]:
        """End the run; its summary, with the folder that keeps it."""
        self._farewell.detach()
        self.lanes.knock(None)
        self._thread.join()
        try:
            if self._error is not None:
                raise self._error
            if self._log is not None:
                self._log.close()
            summary = self.summary()
            folder = self._keep(summary, trace)
            return {**summary, "run_dir": str(folder) if folder else None}
        finally:
            self._drop()

    def abandon(self) -> None:
        """End the run at once."""
        self._farewell.detach()
        self.lanes.abandon()
        self._thread.join(_JOIN_S)
        self._drop()

    def summary(self) -> dict[str, Any]:
        """The summary of a run."""
        made = summarise(self.server.tally)
        moved, busy_ns = made["bytes_loaded"] + made["initial_bytes"], made["link_busy_ns"]
        return {
            **self.asked.facts(),
            "engine": "real",
            "routing": "free",
            "measured": True,
            "device": self.bank.manifest(),
            "paced": self.asked.options.paced,
            "steady": self.asked.options.steady,
            "link_bytes_per_s": moved * 1e9 / busy_ns if busy_ns else None,
            **made,
        }

    # ---- inside ----------------------------------------------------------------------------------

    def _server(self, setup: Any) -> LiveServer:
        log = self._log
        if log is not None:
            log.header(restrict(setup.world, setup.policy.needs))
        return LiveServer(
            setup,
            self.lanes,
            self.ledger,
            deeds=None if log is None else LoggedDeeds(log),
            heard=_unheard if log is None else log.heard,
            timeline=self.asked.options.timeline,
            bending=self._bending(),
            rested=_idle if log is None else log.flush,
            wants_rest=_never if log is None else lambda: log.full,
        )

    def _serve(self) -> None:
        """The server's thread."""
        with self.lanes:
            try:
                with blaming(self.asked.spec):
                    self.server.serve()
            except BaseException as error:
                # Told before the other threads are waited for: one of them may hang.
                self._error = error
                self.lanes.fail(error)

    def _on_host(self, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        layer = self.lanes.layer
        assert layer is not None
        # Asking makes this thread compute with as many others as the model's own: with another
        # number of them a product is rounded otherwise.
        torch.get_num_threads()
        layer.compute(expert, weights)

    def _bending(self) -> Bending | None:
        if not self.policy.lossy:
            return None
        score = self.score
        routing = getattr(self.policy.inner, "routing", None)
        routable = getattr(routing, "routable", None)
        # The view is the server's, which is made later.
        return Bending(
            probabilities=partial(true_probabilities, score=score.kind),
            normalised=score.renormalised,
            scale=score.scale,
            variant=getattr(routing, "variant", "C"),
            routable=None if routable is None else lambda at: routable(at, self.server.view),
        )

    def _keep(self, summary: Mapping[str, Any], trace: Path | None) -> Path | None:
        """Write the run's folder; every repeat has its own."""
        if self.store is None or self._beside is None:
            return None
        digest = None
        if trace is not None:
            with TraceReader(trace) as reader:
                digest = reader.meta.digest
        manifest = {
            **self.asked.manifest(digest, self.batch),
            "engine": "real",
            "device": self.bank.manifest(),
            "paced": self.asked.options.paced,
            "repeat": 0,
        }
        while self.store.path(run_id_of(manifest)).exists():
            manifest["repeat"] += 1
        run_id, spans = run_id_of(manifest), self.server.spans
        calibration = self.asked.options.calibration
        folder = RunStore(self._beside).write(
            run_id,
            manifest,
            summary,
            [request_row(times) for times in self.server.tally.requests],
            None if spans is None else chrome_events(spans, self.asked.meta.experts),
            {
                **host_facts(time.perf_counter() - self._started),
                **self.bank.facts(),
                "trace_path": str(trace.resolve()) if trace else None,
                "calibration_path": str(calibration.resolve()) if calibration else None,
            },
        )
        (self._beside / FACTS).rename(folder / FACTS)
        return folder.rename(self.store.path(run_id))

    def _drop(self) -> None:
        if self._log is not None:
            self._log.abandon()
        if self._beside is not None:
            shutil.rmtree(self._beside, ignore_errors=True)


def _unheard(report: Report) -> None:
    pass


def _idle() -> None:
    pass


def _never() -> bool:
    return False


# ---- the model's thread --------------------------------------------------------------------------


class _Batch:
    """Sequences that go through the model together."""

    def __init__(self, *, follows_ends: bool) -> None:
        self.requests: list[LiveRequest] = []
        self.follows_ends = follows_ends
        self.rows: Rows | None = None
        self.pads: set[int] = set()
        """Tokens that are fed to a sequence which has ended."""
        self.encoded = False
        """The encoder has run, and the decoder's first pass belongs to it."""

    def live(self) -> list[int]:
        """The sequences that have not ended."""
        return [i for i, one in enumerate(self.requests) if not one.ended]

    def ends(self, which: AnyArray) -> None:
        """Some sequences have ended with the token that was just chosen."""
        if self.follows_ends and len(which) == len(self.requests):
            for i in np.flatnonzero(which).tolist():
                self.requests[i].ended = True


class _Driver:
    """Stands in for the model's own ``forward`` and ``generate``, and for its experts."""

    def __init__(self, owner: Offloading) -> None:
        self.owner = owner
        self.model = owner.loaded.model
        self.batch: _Batch | None = None
        self.run: Run | None = None
        model = self.model
        for at, experts in enumerate(owner.experts):
            experts.install(self._experts(at, experts))
        register(model, owner.experts)
        if is_encoder_decoder(model):
            encoder, decoder = model.get_encoder(), model.get_decoder()
            encoder.forward = self._within(encoder.forward, self._encode)
            decoder.forward = self._within(decoder.forward, self._decode)
            model.forward = self._within(model.forward, None)
        else:
            model.forward = self._within(model.forward, self._decode)
        if hasattr(model, "generate"):
            model.generate = self._generating(model.generate)

    # ---- what stands in --------------------------------------------------------------------------

    def _within(self, original: Any, begin: Callable[[dict[str, Any]], None] | None) -> Any:
        """A forward: one pass of the batch, or a batch of its own."""
        parameters = inspect.signature(original)

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._in_batch(follows_ends=False):
                if begin is not None:
                    begin(parameters.bind_partial(*args, **kwargs).arguments | kwargs)
                return original(*args, **kwargs)

        return forward

    def _generating(self, original: Any) -> Any:
        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with self._in_batch(follows_ends=_one_path(self.model, kwargs)) as batch:
                if batch is not None and batch.follows_ends:
                    kwargs["stopping_criteria"] = _watching(self.model, batch, kwargs)
                return original(*args, **kwargs)

        return generate

    @contextmanager
    def _in_batch(self, *, follows_ends: bool) -> Iterator[_Batch | None]:
        """The batch that begins here; None where one is under way."""
        if self.batch is not None:
            yield None
            return
        self.run = self.owner.begun()
        batch = self.batch = _Batch(follows_ends=follows_ends)
        try:
            yield batch
            self._end(batch)
        except BaseException:
            # An error before anything ran leaves the cache as it was.
            if batch.requests:
                self.owner.abandon()
            raise
        finally:
            self.batch = self.run = None

    def _end(self, batch: _Batch) -> None:
        assert self.run is not None
        if not batch.requests:
            return
        for request in batch.requests:
            request.ended = True
        self.run.lanes.arrive(None)
        self.run.lanes.work()

    # ---- passes ----------------------------------------------------------------------------------

    def _encode(self, given: Mapping[str, Any]) -> None:
        assert self.batch is not None
        self._pass(given)
        self.batch.encoded = True

    def _decode(self, given: Mapping[str, Any]) -> None:
        batch = self.batch
        assert batch is not None
        if batch.encoded:
            batch.encoded = False
            batch.rows = rows_of(batch.requests, batch.live(), _mask(given, whole=True))
        else:
            self._pass(given)

    def _pass(self, given: Mapping[str, Any]) -> None:
        """A forward pass begins: say whose, and wait for the word to go on."""
        batch, run = self.batch, self.run
        assert batch is not None and run is not None
        first = not batch.requests
        mask = _mask(given, whole=not first)
        if first:
            batch.requests = self._requests(mask)
        elif len(mask) != len(batch.requests):
            raise ExecutionError(
                f"the batch has changed from {len(batch.requests)} to {len(mask)} sequences; this "
                "way of generating is not supported"
            )
        live = self._still_live(batch, given)
        parts = [(batch.requests[i], len(batch.requests[i].pass_tokens)) for i in live]
        for i in live:
            batch.requests[i].pass_tokens.append(int(mask[i].sum()))
        if Needs.EMBEDDING in run.asked.inputs.needs:
            self._embed(batch, live, given, mask)
        batch.rows = rows_of(batch.requests, live, mask)
        begun = Pass(tuple(parts), len(batch.requests) - len(live))
        if first:
            run.batch = max(run.batch, len(mask))
            run.lanes.knock(begun)
        else:
            run.lanes.arrive(begun)
        run.lanes.work()

    def _requests(self, mask: AnyArray) -> list[LiveRequest]:
        assert self.run is not None
        made = []
        for row in mask:
            index = self.run.sequences
            self.run.sequences += 1
            numbers = self.owner.requests
            number = index if numbers is None else next(numbers)
            made.append(LiveRequest(index, number, int(row.sum())))
        return made

    def _still_live(self, batch: _Batch, given: Mapping[str, Any]) -> list[int]:
        """Whom the pass serves; what has ended is fed padding, or it had not ended."""
        live = batch.live()
        if len(live) == len(batch.requests):
            return live
        ids = given.get("input_ids")
        fed = [None] * len(batch.requests) if ids is None else ids[:, -1].tolist()
        for request, token in zip(batch.requests, fed, strict=True):
            if token not in batch.pads:
                request.ended = False
        return batch.live()

    def _embed(
        self, batch: _Batch, live: Sequence[int], given: Mapping[str, Any], mask: AnyArray
    ) -> None:
        """The model's own input embedding: the mean over the prompt, then of each token."""
        values = given.get("inputs_embeds")
        if values is None:
            with torch.no_grad():
                values = self.model.get_input_embeddings()(given["input_ids"])
        table = values.detach().float().cpu().numpy()
        for i in live:
            mean = table[i][mask[i]].mean(axis=0, dtype=np.float64).astype(np.float16)
            request = batch.requests[i]
            request.embeddings[len(request.pass_tokens) - 1] = mean

    # ---- a layer ---------------------------------------------------------------------------------

    def _experts(self, at: int, experts: Experts) -> Forward:
        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            arguments: dict[int | str, Any] = {0: hidden, **dict(enumerate(args, start=1))}
            arguments.update(kwargs)
            return self._layer(at, experts, hidden, arguments)

        return forward

    def _layer(
        self, at: int, experts: Experts, hidden: torch.Tensor, arguments: Mapping[int | str, Any]
    ) -> torch.Tensor:
        batch, run, live = self.batch, self.run, self.owner.live
        if batch is None or run is None or batch.rows is None:
            raise ExecutionError("a part of an offloaded model was called alone; call the model")
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = batch.rows
        if len(flat) != rows.count:
            raise ExecutionError(
                f"layer {at}: its experts got {len(flat)} rows, and the pass has {rows.count}"
            )
        chosen = live.chosen(at, arguments)
        told = live.told(at, chosen, rows.taken, run.asked.inputs)
        logits = live.logits(at, rows.taken) if run.asked.lossy else None
        live.forget(at)
        call = LayerCall(at, experts, flat, chosen, told, rows, logits)
        run.lanes.arrive(call)
        run.lanes.work()
        return call.sum().view(hidden.shape)


# ---- generating ----------------------------------------------------------------------------------


def _one_path(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether each row of the batch is one sequence to its end: no beams, no assistant."""
    config = kwargs.get("generation_config") or model.generation_config
    beams = kwargs.get("num_beams", getattr(config, "num_beams", 1)) or 1
    return int(beams) == 1 and kwargs.get("assistant_model") is None


def _watching(model: Any, batch: _Batch, kwargs: Mapping[str, Any]) -> Any:
    """The caller's stopping criteria, and one that never stops: both tell who has ended."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    config = kwargs.get("generation_config") or model.generation_config
    ends = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
    ends = model.generation_config.eos_token_id if ends is None else ends
    tokens = [] if ends is None else np.atleast_1d(np.asarray(ends)).tolist()
    pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
    batch.pads = {*tokens, *(() if pad is None else (int(pad),))}

    class Watching(StoppingCriteria):  # type: ignore[misc]
        """Passes a criterion on, and tells the batch."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
            if self.inner is not None:
                done = self.inner(input_ids, scores, **more)
            else:
                done = torch.isin(input_ids[:, -1], torch.tensor(tokens, device=input_ids.device))
            told = done if torch.is_tensor(done) else torch.tensor([done] * len(input_ids))
            batch.ends(told.cpu().numpy())
            return done if self.inner is not None else torch.zeros_like(done)

    given = [Watching(inner) for inner in kwargs.get("stopping_criteria") or ()]
    return StoppingCriteriaList([*given, *([Watching(None)] if tokens else [])])


def _mask(given: Mapping[str, Any], *, whole: bool) -> AnyArray:
    """bool [B, T]: which rows of a pass are no padding. ``whole``: it is no prefill, all are."""
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if tokens is None:
        raise ExecutionError("the model was called without input_ids or inputs_embeds")
    shape = tuple(tokens.shape[:2])
    mask = given.get("attention_mask")
    if whole or mask is None or not torch.is_tensor(mask) or mask.dim() != 2:
        return np.ones(shape, bool)
    made: AnyArray = mask[:, -shape[1] :].bool().cpu().numpy()
    return made if made.any(axis=1).all() else np.ones(shape, bool)


# ---- the model -----------------------------------------------------------------------------------


@contextmanager
def _blank(model: Any) -> Iterator[None]:
    """The experts add nothing meanwhile: what the gates hand over can be seen without weights."""
    before = getattr(model.config, "_experts_implementation", None)
    blocks = list(find_blocks(model))
    experts = experts_of(model, blocks)  # type: ignore[arg-type]
    for one in experts:
        one.install(lambda hidden, *args, **kwargs: torch.zeros_like(hidden))
    register(model, experts)
    try:
        yield
    except BaseException:
        for one in experts:
            one.module.__dict__.pop("forward", None)
        if before is not None:
            model.set_experts_implementation(before)
        raise


def _some_tokens(model: Any) -> list[int]:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return [(5 + 7 * i) % vocabulary for i in range(_PROBE)]


def _meta(loaded: Loaded, gates: Gates) -> TraceMeta:
    """What a recording of the model would say of itself."""
    return TraceMeta(
        model=model_profile(loaded, gates),
        rank_order="weight",
        score=gates.score.kind,
        has_weights=True,
        has_gate=True,
        has_norms=True,
        embedding="iteration",
        dtype=loaded.dtype,
        device=loaded.device,
        versions=versions(),
        source="live",
    )


def _place(model: Any, device: torch.device) -> None:
    """Move all that has storage to the device."""
    if device.type == "cpu":
        return
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for value in held.values():
                if value is not None and value.device.type != "meta":
                    value.data = value.data.to(device)
