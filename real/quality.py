"""What a policy costs in quality: an offloaded model against the same model with nothing bent.

Both read the same inputs, teacher-forced, one after the other. The full model runs first, with
room for every expert: bit for bit the library's own. Each policy then keeps its cache from input to
input, so that sets which follow the input (SwapMoE) do so here.

The runs are *steady* (``offload_options.Options``): perplexity does not depend on the machine's
speed, and equal requests give equal numbers. Every pass finds what the passes before it had
planned, and no load takes longer than a pass. Without ``steady`` loads land when they land.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch

from moesim.errors import NotRunError, UsageError
from moesim.real.offload_model import Offloading, offload
from moesim.real.offload_options import Options
from moesim.real.quality_rouge import Rouge, summarise
from moesim.real.quality_text import Input, Text, Wanted, read_text
from moesim.types import AnyArray

TASKS: Final = ("perplexity", "rouge")
TOP: Final = 5
"""Tokens that are compared, beside the likeliest."""

Progress = Callable[[int, int], None]
Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Judged:
    """What is asked. Names are those of the command line.

    runs : how the model is served, one after the other, by name; ``steady`` is added.
    latency_inputs : so many inputs are continued by ``new_tokens`` as well, in real time.
    """

    model: str
    runs: tuple[tuple[str, Options], ...]
    task: str = "perplexity"
    text: Wanted = field(default_factory=Wanted)
    dtype: str = "auto"
    device: str = "cpu"
    steady: bool = True
    latency_inputs: int = 0
    new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UsageError(f"--task {self.task}: must be one of {', '.join(TASKS)}")


def judge(asked: Judged, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Measure the full model, then every run; the object that ``--json`` prints.

    Raises
    ------
    MoesimError
        For whatever a user can mend.
    """
    with Bench(asked.model, asked.text, asked.dtype, asked.device, asked.steady) as bench:
        bench.progress = progress
        bench.ahead = (1 + len(asked.runs)) * len(bench.text.inputs)
        measure = bench.perplexity if asked.task == "perplexity" else bench.rouge
        rows = [measure("full", None)]
        for name, options in asked.runs:
            rows.append(measure(name, options))
        if asked.latency_inputs:
            everything = [("full", FULL), *asked.runs]
            for row, (_, options) in zip(rows, everything, strict=True):
                row |= bench.latency(options, asked.latency_inputs, asked.new_tokens)
        return {
            "schema": 1,
            "model": bench.handle.loaded.name,
            "dtype": bench.handle.loaded.dtype,
            "device": asked.device,
            "task": asked.task,
            "steady": asked.steady,
            "order": asked.text.order,
            "text": bench.text.facts(),
            "rows": rows,
        }


FULL: Final = Options(policy="lru", capacity="100%")
"""Everything is resident once it was used: what the model does without offloading."""


class Bench:
    """A model with its text, and what the full model says of it. A context manager.

    ``progress`` is called with (inputs done, ``ahead``).
    """

    def __init__(
        self, model: str, text: Wanted, dtype: str = "auto", device: str = "cpu",
        steady: bool = True,
    ) -> None:  # fmt: skip
        self.steady = steady
        offloaded = offload(
            model, device=device, dtype=dtype, policy="lru", capacity="100%", steady=steady
        )
        self.model = offloaded
        self.handle: Offloading = offloaded.moesim
        self.text: Text = read_text(text, self.handle.loaded)
        self.progress: Progress = lambda done, total: None
        self.ahead = 0
        self._done = 0
        self._folder = tempfile.TemporaryDirectory(prefix="moesim-quality-")
        self._full: _Full | None = None
        self._said: list[list[int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.handle.abandon()
        self._full = None
        self._folder.cleanup()

    # ---- perplexity ------------------------------------------------------------------------------

    def loss(self, options: Options) -> Loss:
        """How well a run foretells the text, without the full model beside it."""
        self._change(options)
        losses = [self._losses(one)[0] for one in self._inputs()]
        return Loss(np.array([x.mean() for x in losses]), _lengths(losses), self.handle.finish())

    def perplexity(self, name: str, options: Options | None) -> dict[str, Any]:
        """A row of the answer: a run beside the full model; None: the full model itself."""
        started = time.perf_counter()
        if self._full is None:
            self._full = self._read_full()
        self._change(FULL if options is None else options)
        seen = [self._beside(i, one) for i, one in enumerate(self._inputs())]
        run = self.handle.finish()
        return {
            "name": name,
            **_run_facts(run),
            **_compared(seen, self.text),
            "seconds": time.perf_counter() - started,
        }

    def _read_full(self) -> _Full:
        """The full model's distributions, kept on disk: [tokens, vocabulary] in float32."""
        width = int(self.model.config.get_text_config().vocab_size)
        path = Path(self._folder.name) / "full"
        kept = np.memmap(path, np.float32, "w+", shape=(self.text.tokens, width))
        self._change(FULL)
        at = 0
        with torch.no_grad():
            for one in self.text.inputs:
                logs = self._logs(one)
                kept[at : at + len(logs)] = logs.numpy()
                at += len(logs)
        self.handle.finish()
        starts = np.cumsum([0, *(int(one.targets.sum()) for one in self.text.inputs)])
        return _Full(kept, starts)

    def _beside(self, number: int, one: Input) -> _Seen:
        assert self._full is not None
        losses, logs = self._losses(one)
        full = self._full.of(number)
        return _Seen(
            loss=losses,
            kl=(full.exp() * (full - logs)).sum(-1).double().numpy(),
            first=(full.argmax(-1) == logs.argmax(-1)).numpy(),
            top=_shared(full, logs),
        )

    def _losses(self, one: Input) -> tuple[AnyArray, Tensor]:
        """(nats of each token, float64 [T]; log-probabilities [T, vocabulary])."""
        logs = self._logs(one)
        asked = one.labels[one.targets]
        return -logs.gather(1, asked[:, None])[:, 0].double().numpy(), logs

    def _logs(self, one: Input) -> Tensor:
        with torch.no_grad():
            out = self.model(**self._there(one), use_cache=False)
        logs: Tensor = out.logits[0].float().cpu()[one.targets].log_softmax(-1)
        return logs

    # ---- Rouge -----------------------------------------------------------------------------------

    def rouge(self, name: str, options: Options | None) -> dict[str, Any]:
        """A row of the answer: summaries beside those that are meant, and the full model's."""
        config = self.model.config
        if not config.is_encoder_decoder:
            raise NotRunError(
                f"not run: --task rouge needs a model that summarises, and {config.model_type} is "
                "a decoder; use --task perplexity, or --model demo-switch"
            )
        started, scorer = time.perf_counter(), Rouge()
        self._change(FULL if options is None else options)
        said = [summarise(self.model, self._there(one)) for one in self._inputs()]
        run = self.handle.finish()
        if options is None:
            self._said = said
        decode = self.handle.loaded.tokenizer.decode
        pairs = [
            (decode(ours, skip_special_tokens=True), decode(full, skip_special_tokens=True),
             decode(one.labels[one.targets], skip_special_tokens=True))
            for ours, full, one in zip(said, self._said, self.text.inputs, strict=True)
        ]  # fmt: skip
        scores = [scorer(meant, ours) for ours, _, meant in pairs]
        return {
            "name": name,
            **_run_facts(run),
            "rouge2": float(np.mean(scores)),
            "rouge2_to_full": float(np.mean([a == b or scorer(b, a) for a, b, _ in pairs])),
            "same_summaries": float(
                np.mean([a == b for a, b in zip(said, self._said, strict=True)])
            ),
            "by_topic": _by_topic(np.array(scores), np.ones(len(scores)), self.text),
            "seconds": time.perf_counter() - started,
        }

    # ---- latency ---------------------------------------------------------------------------------

    def latency(self, options: Options, inputs: int, new_tokens: int) -> dict[str, Any]:
        """Greedy continuations of some inputs, in real time: what a token takes."""
        self.handle.change(**_changes(replace(options, steady=False)))
        spread = np.linspace(0, len(self.text.inputs) - 1, min(inputs, len(self.text.inputs)))
        for at in spread.astype(int).tolist():
            given = {k: v for k, v in self._there(self.text.inputs[at]).items() if k != "labels"}
            with torch.no_grad():
                self.model.generate(
                    **given, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
                )
        run = self.handle.finish()
        return {
            "tpot_ns": run["tpot_ns"]["mean"],
            "ttft_ns": run["ttft_ns"]["mean"],
            "stall_share": run["stall_ns"] / max(1, run["time_ns"]),
            "paced": run["paced"],
            "peak_bytes_decoding": run["peak_bytes"],
        }

    # ---- inside ----------------------------------------------------------------------------------

    def _change(self, options: Options) -> None:
        self.handle.change(**_changes(replace(options, steady=self.steady)))

    def _inputs(self) -> Any:
        for one in self.text.inputs:
            yield one
            self._done += 1
            self.progress(self._done, max(self.ahead, self._done))

    def _there(self, one: Input) -> dict[str, Tensor]:
        return {name: value.to(self.handle.device) for name, value in one.arguments.items()}


@dataclass(frozen=True, slots=True)
class Loss:
    """How well a text was foretold.

    by_input : float64 [inputs], mean nats of its tokens. tokens : int64 [inputs].
    """

    by_input: AnyArray
    tokens: AnyArray
    run: dict[str, Any]

    @property
    def nats(self) -> float:
        """A token's mean."""
        return float((self.by_input * self.tokens).sum() / self.tokens.sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Full:
    """Log-probabilities of the full model, input after input."""

    kept: AnyArray
    starts: AnyArray

    def of(self, number: int) -> Tensor:
        """[T, vocabulary] of an input."""
        return torch.from_numpy(np.array(self.kept[self.starts[number] : self.starts[number + 1]]))


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """One input under a policy; arrays [T]."""

    loss: AnyArray
    kl: AnyArray
    first: AnyArray
    top: AnyArray


def _changes(options: Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in Options.__slots__}


def _shared(full: Tensor, logs: Tensor) -> AnyArray:
    """float64 [T]: how much of the full model's likeliest ``TOP`` is among this one's."""
    ours, theirs = (x.topk(min(TOP, x.shape[-1]), -1).indices for x in (logs, full))
    return (ours[:, :, None] == theirs[:, None, :]).any(-1).double().mean(-1).numpy()


def _lengths(losses: Sequence[AnyArray]) -> AnyArray:
    return np.array([len(x) for x in losses])


def _compared(seen: Sequence[_Seen], text: Text) -> dict[str, Any]:
    """Means over tokens."""
    loss = np.concatenate([one.loss for one in seen])
    each, tokens = np.array([one.loss.mean() for one in seen]), _lengths([one.loss for one in seen])
    return {
        "loss_nats": float(loss.mean()),
        "perplexity": math.exp(loss.mean()),
        "kl_nats": float(np.concatenate([one.kl for one in seen]).mean()),
        "top1_agreement": float(np.concatenate([one.first for one in seen]).mean()),
        "top5_agreement": float(np.concatenate([one.top for one in seen]).mean()),
        "by_topic": _by_topic(each, tokens, text),
        "loss_by_input": each.tolist(),
    }


def _by_topic(values: AnyArray, tokens: AnyArray, text: Text) -> dict[str, float]:
    """Mean of each topic's inputs, weighed by their tokens."""
    topics = np.array([one.topic for one in text.inputs])
    return {
        topic: float(np.average(values[topics == topic], weights=tokens[topics == topic]))
        for topic in text.topics
    }


def _run_facts(run: dict[str, Any]) -> dict[str, Any]:
    """What a summary says that belongs beside quality."""
    quality = run["quality"] or {"gate_mass_kept": 1.0, "agreement": 1.0}
    names = ("policy", "set", "capacity", "capacity_bytes", "lossy", "misses", "evictions")
    more = ("bytes_loaded", "initial_bytes", "peak_bytes")
    return {
        **{name: run[name] for name in (*names, *more)},
        "gate_mass_kept": quality["gate_mass_kept"],
        "experts_agreement": quality["agreement"],
    }
