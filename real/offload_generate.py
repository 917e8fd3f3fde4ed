"""Generate for prompts with an offloaded model; the text, what it took, and a trace of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moesim.errors import UsageError
from moesim.real.errors import ExecutionError
from moesim.real.offload_model import Offloading, offload
from moesim.real.offload_options import Options, norms_of
from moesim.traces.batches import BatchRecorder, Encoded, Generation
from moesim.traces.gate_taps import Wanted
from moesim.traces.import_arrays import prompt_digest
from moesim.traces.parts import Parts, parts_folder
from moesim.traces.prompt_sources import BUILT_IN, Prompt, PromptSource, open_prompts
from moesim.traces.reader import Int32s, RequestFacts
from moesim.traces.record import Recording, encode, meta_of, plan_of, refuse_place, too_long
from moesim.traces.record_model import load
from moesim.types import AnyArray, Needs

Progress = Callable[[int, int], None]
Said = Callable[[int, str], None]
"""Called with (number of the prompt, what the model said)."""


@dataclass(frozen=True, slots=True)
class Prompted:
    """What to generate. Names are those of the command line.

    prompts : a file, ``builtin``, or the text of one prompt.
    check : compare all tokens with those of the model as it is, which is loaded beside.
    """

    model: str
    prompts: str = BUILT_IN
    max_new_tokens: int = 64
    batch: int = 1
    limit: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    tokenizer: str | None = None
    trace_out: Path | None = None
    check: bool = False
    options: Options = field(default_factory=Options)


def generate(
    asked: Prompted, progress: Progress = lambda done, total: None, said: Said | None = None
) -> dict[str, Any]:
    """Generate for every prompt; the object that ``--json`` prints.

    Raises
    ------
    MoesimError
        For whatever a user can mend. Nothing half-written is kept. ``ExecutionError`` for the
        first prompt of a check whose tokens differ.
    """
    if asked.trace_out is not None:
        refuse_place(asked.trace_out, "--trace-out")
    source = prompts_of(asked.prompts, asked.limit)
    options = asked.options
    model = offload(
        asked.model,
        device=asked.device,
        dtype=asked.dtype,
        tokenizer=asked.tokenizer,
        **{name: getattr(options, name) for name in Options.__slots__},
    )
    return _Generation(asked, model.moesim, source, progress, said).run()


def prepare(threads: int | None) -> None:
    """Ready this process to generate, and nothing else: quiet, and with so many threads.

    Without a number one core is left to the thread that copies; threads that wait for each other
    beside it slow everything.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) - 1))


def prompts_of(text: str, limit: int | None = None) -> PromptSource:
    """A file of prompts, the built-in ones, or one prompt as it is typed.

    Raises
    ------
    UsageError
        If the file is not there, or the text is empty.
    """
    path = Path(text) if len(text) < 4096 and "\n" not in text else None
    named = path is not None and (path.suffix in (".jsonl", ".json", ".parquet", ".toml", ".gz"))
    if text == BUILT_IN or named or (path is not None and _is_file(path)):
        return open_prompts(text, limit=limit)
    if not text.strip():
        raise UsageError("--prompts: is empty; give a file, a text or builtin")
    return PromptSource("text", 1, lambda: iter([Prompt(text)]))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


class _Speaking(BatchRecorder):
    """A recorder that remembers what was said."""

    outputs: Sequence[Int32s]

    def generate(self, batch: Sequence[Encoded]) -> Any:
        """Generate for the batch; token ids [batch, length]."""
        sequences = super().generate(batch)
        self.outputs = self._outputs(sequences, max(len(one.tokens) for one in batch))
        return sequences


class _Generation:
    """Prompts on their way through one offloaded model."""

    def __init__(
        self,
        asked: Prompted,
        handle: Offloading,
        source: PromptSource,
        progress: Progress,
        said: Said | None,
    ) -> None:
        self.asked = asked
        self.handle = handle
        self.source = source
        self.progress = progress
        self.said = said
        self.spoken: list[dict[str, Any]] = []
        wanted = self._wanted()
        embedded = Needs.EMBEDDING in handle.asked.inputs.needs
        self.recording = Recording(
            model=asked.model,
            out=asked.trace_out or Path("trace.parquet"),
            prompts=asked.prompts,
            gate="full" if wanted.logits else "topk",
            ahead=wanted.ahead,
            norms=wanted.norms,
            embeddings="iteration" if embedded else "none",
            generation=Generation(max_new_tokens=asked.max_new_tokens),
            batch_size=asked.batch,
            device=asked.device,
        )
        self.recorder = _Speaking(
            handle.loaded,
            handle.gates,
            wanted,
            self.recording.generation,
            embeddings=self.recording.embeddings,
        )
        self.checked = _Checked(self, wanted) if asked.check else None

    def run(self) -> dict[str, Any]:
        """Generate for every batch, then end the run."""
        try:
            return self._run()
        except BaseException:
            # Between two batches nobody else would end it.
            self.handle.abandon()
            raise

    def _run(self) -> dict[str, Any]:
        trace = self.asked.trace_out
        if trace is None:
            for batch in self._batches():
                self._ran(batch, self._generate(batch))
        else:
            self._record(trace)
        if not self.spoken:
            raise UsageError(f"--prompts {self.asked.prompts}: holds no prompts")
        summary = self.handle.finish(trace)
        return {
            "schema": 1,
            "model": self.handle.loaded.name,
            "hardware": self.handle.asked.hardware.name,
            "device": self.asked.device,
            "trace_out": None if trace is None else str(trace),
            "checked": None if self.checked is None else self.checked.prompts,
            "requests": self.spoken,
            "runs": [summary],
        }

    # ---- batches ---------------------------------------------------------------------------------

    def _batches(self) -> Iterator[list[Encoded]]:
        prompts = self._encoded()
        while batch := list(islice(prompts, self.asked.batch)):
            yield batch

    def _encoded(self) -> Iterator[Encoded]:
        loaded, new = self.handle.loaded, self.asked.max_new_tokens
        for number, prompt in enumerate(self.source.prompts()):
            tokens = encode(loaded, prompt.text) if prompt.text.strip() else []
            why = too_long(loaded, tokens, new) if tokens else "is empty"
            if why is not None:
                raise UsageError(f"--prompts {self.asked.prompts}: prompt {number} {why}")
            facts = RequestFacts(topic=prompt.topic, prompt_digest=prompt_digest(prompt.text))
            yield Encoded(number, np.array(tokens, np.int32), facts)

    def _generate(self, batch: Sequence[Encoded]) -> Sequence[Int32s]:
        self.handle.requests = iter([one.request for one in batch])
        self.recorder.generate(batch)
        return self.recorder.outputs

    def _ran(self, batch: Sequence[Encoded], outputs: Sequence[Int32s]) -> None:
        if self.checked is not None:
            self.checked.compare(batch, outputs)
        tokenizer = self.handle.loaded.tokenizer
        for one, output in zip(batch, outputs, strict=True):
            text = str(tokenizer.decode(output.tolist(), skip_special_tokens=True))
            self.spoken.append(
                {
                    "request": one.request,
                    "prompt_tokens": len(one.tokens),
                    "output_tokens": len(output),
                    "text": text,
                }
            )
            if self.said is not None:
                self.said(one.request, text)
            self.progress(len(self.spoken), self.source.total or len(self.spoken))

    # ---- a trace of it ---------------------------------------------------------------------------

    def _record(self, trace: Path) -> None:
        """Generate with the gates tapped as a recording taps them; the trace, whole or not."""
        handle = self.handle
        meta = meta_of(self.recording, handle.loaded, handle.gates, self.source)
        if self.recording.norms:
            meta = replace(meta, expert_norms=norms_of(handle.bank))
        plan = plan_of(self.recording, meta)
        with ExitStack() as stack:
            parts = stack.enter_context(Parts(trace, plan, resume=False))
            # What is left of a broken run is of no use: another would not be the same one.
            stack.callback(shutil.rmtree, parts_folder(trace), ignore_errors=True)
            stack.enter_context(self.recorder)
            for batch in self._batches():
                handle.requests = iter([one.request for one in batch])
                for rows in self.recorder.record(batch):
                    parts.write(rows)
                self._ran(batch, self.recorder.outputs)
            if self.spoken:
                parts.merge(meta, [one["request"] for one in self.spoken], _unwatched)

    def _wanted(self) -> Wanted:
        inputs, layers = self.handle.asked.inputs, self.handle.gates.layers
        return Wanted(
            logits=all(layer.logits is not None for layer in layers),
            ahead=tuple(inputs.distances) if Needs.AHEAD in inputs.needs else (),
            norms=Needs.NORMS in inputs.needs,
        )


class _Checked:
    """The model as it is, beside the offloaded one; they must say the same.

    ``prompts`` : how many have.
    """

    def __init__(self, ours: _Generation, wanted: Wanted) -> None:
        asked, handle = ours.asked, ours.handle
        if handle.asked.lossy:
            raise UsageError(
                f"--check: {handle.asked.name} executes other experts than the model chose, so "
                "other tokens are no error; `moesim real quality` says what that costs"
            )
        device = asked.device
        plain = load(asked.model, tokenizer=asked.tokenizer, device=device, dtype=asked.dtype)
        # The arithmetic that an offloaded model has.
        plain.model.set_experts_implementation("eager")
        self.prompts = 0
        self._speaking = _Speaking(plain, handle.gates, wanted, ours.recording.generation)

    def compare(self, batch: Sequence[Encoded], outputs: Sequence[Int32s]) -> None:
        """Generate for the batch; ExecutionError naming the first token that differs."""
        self._speaking.generate(batch)
        for one, ours, expected in zip(batch, outputs, self._speaking.outputs, strict=True):
            if not np.array_equal(ours, expected):
                at = int(np.argmin(_equal(ours, expected)))
                raise ExecutionError(
                    f"--check: prompt {one.request}: token {at} is {_token(ours, at)} with its "
                    f"experts offloaded, and {_token(expected, at)} in the model as it is"
                )
        self.prompts += len(batch)


def _equal(one: Int32s, other: Int32s) -> AnyArray:
    """bool: where two outputs agree, False behind the end of the shorter."""
    shared = min(len(one), len(other))
    found: AnyArray = np.append(one[:shared] == other[:shared], False)
    return found


def _token(output: Int32s, at: int) -> str:
    return str(output[at]) if at < len(output) else "none"


def _unwatched(done: int, total: int) -> None:
    pass
