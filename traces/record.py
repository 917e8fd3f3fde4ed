"""Record a trace: prompts through a HuggingFace MoE model, its gates tapped, part by part.

Batches are cut from the prompts in their order and each has its own seed, so a recording that was
killed and resumed gives the same rows as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch

from moesim.errors import UsageError
from moesim.traces.batches import EMBEDDINGS, BatchRecorder, Encoded, Generation
from moesim.traces.gate_taps import Wanted
from moesim.traces.gates import Gates, find_gates
from moesim.traces.import_arrays import prompt_digest
from moesim.traces.model_profile import expert_norms, model_profile
from moesim.traces.parts import Parts, parts_folder
from moesim.traces.prompt_sources import BUILT_IN, Prompt, PromptSource, open_prompts
from moesim.traces.reader import RequestFacts, TraceReader
from moesim.traces.record_model import DTYPES, Loaded, load, versions
from moesim.traces.schema import TraceMeta

GATES: Final = ("full", "topk")
DEVICES: Final = ("auto", "cpu", "cuda")
TRAIN, TEST = "train", "test"
SKIPS_TOLD: Final = 5
"""So many prompts that do not fit are told one by one."""
MAX_AHEAD: Final = 99


@dataclass(frozen=True, slots=True)
class Recording:
    """What to record. Raises `UsageError` for a value out of its range."""

    model: str
    out: Path
    prompts: str = BUILT_IN
    gate: str = "full"
    """`full`: the logits over all experts; `topk`: ids and weights only."""
    ahead: tuple[int, ...] = (1, 2, 3)
    """Distances at which later layers' gates are applied to a layer's input."""
    norms: bool = False
    embeddings: str = "none"
    generation: Generation = field(default_factory=Generation)
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"
    limit: int | None = None
    """At most so many prompts."""
    resume: bool = False
    split: tuple[int, int] | None = None
    """Mark requests as train and test in this proportion, within each topic."""
    keep_text: bool = False
    tokenizer: str | None = None
    column: str | None = None
    topic_column: str | None = None

    def __post_init__(self) -> None:
        _one_of("--gate", self.gate, GATES)
        _one_of("--embeddings", self.embeddings, EMBEDDINGS)
        _one_of("--device", self.device, DEVICES)
        _one_of("--dtype", self.dtype, tuple(DTYPES))
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--max-new-tokens", self.generation.max_new_tokens, 1)
        if self.limit is not None:
            _at_least("--limit", self.limit, 1)
        if any(not 1 <= distance <= MAX_AHEAD for distance in self.ahead):
            raise UsageError(f"--ahead: distances must be in 1..{MAX_AHEAD}")
        if self.split is not None and (min(self.split) < 0 or sum(self.split) < 1):
            raise UsageError("--split: must be two numbers from 0 up, such as 7:3")
        if not 0 < self.generation.top_p <= 1:
            raise UsageError("--top-p: must be above 0 and at most 1")
        if not self.generation.temperature > 0:
            raise UsageError("--temperature: must be above 0; leave out --sample for greedy")

    @property
    def wanted(self) -> Wanted:
        """Return what the taps must take."""
        return Wanted(self.gate == "full", tuple(sorted(set(self.ahead))), self.norms)


class Watch(Protocol):
    """Somebody who watches a recording."""

    def requests(self, done: int, total: int | None) -> None:
        """Take how many requests are finished."""

    def tokens(self, count: int) -> None:
        """Take how many tokens went through the model, padding included."""

    def merged(self, done: int, total: int) -> None:
        """Take how many finished requests are in the trace."""

    def say(self, line: str) -> None:
        """Take a line that the user should see."""


class Silence:
    """Nobody watches."""

    def requests(self, done: int, total: int | None) -> None:
        """Ignore it."""

    def tokens(self, count: int) -> None:
        """Ignore it."""

    def merged(self, done: int, total: int) -> None:
        """Ignore it."""

    def say(self, line: str) -> None:
        """Ignore it."""


def record(
    options: Recording, *, watch: Watch | None = None, loaded: Loaded | None = None
) -> TraceMeta:
    """Record a trace and return its metadata.

    `loaded` is a model that is in memory already; else it is loaded as `options` say. Finished
    requests lie in `OUT.parts` until all are done, and stay there after any failure. Raises
    `UsageError` (everything a user can mend) or `TraceError` (what the model gave is no trace).
    """
    watch = watch or Silence()
    if options.resume and options.out.exists() and not parts_folder(options.out).exists():
        watch.say(f"{options.out}: is complete already; nothing to resume")
        with TraceReader(options.out) as reader:
            return reader.meta
    refuse_place(options.out)
    source = open_prompts(
        options.prompts,
        column=options.column,
        topic_column=options.topic_column,
        limit=options.limit,
    )
    first = next(source.prompts(), None)
    if first is None:
        raise UsageError(f"--prompts {options.prompts}: holds no prompts")
    if loaded is None:
        watch.say(f"loading {options.model}")
        loaded = load(
            options.model,
            tokenizer=options.tokenizer,
            device=options.device,
            dtype=options.dtype,
        )
    return _Session(options, loaded, source, watch).run(first)


def encode(loaded: Loaded, text: str) -> list[int]:
    """Return the token ids of a prompt, in the tokenizer's chat template where it has one."""
    tokenizer = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


def too_long(loaded: Loaded, tokens: list[int], new: int) -> str | None:
    """Return why a prompt and so many new tokens do not fit the context; None: they do."""
    limit = loaded.context
    if loaded.model.config.is_encoder_decoder:
        new = 0
    if limit is None or len(tokens) + new <= limit:
        return None
    more = f" and {new} new ones" if new else ""
    return f"has {len(tokens)} tokens{more}; the model's context is {limit}"


class _Session:
    """One recording under way."""

    def __init__(
        self, options: Recording, loaded: Loaded, source: PromptSource, watch: Watch
    ) -> None:
        self._options = options
        self._loaded = loaded
        self._source = source
        self._watch = watch
        self._batch_size = options.batch_size
        self._requests: list[int] = []
        """Requests finished, now or before."""
        self._skipped = 0

    def run(self, first: Prompt) -> TraceMeta:
        """Record every batch that is not there yet, then merge."""
        gates = self._found(first)
        meta = meta_of(self._options, self._loaded, gates, self._source)
        plan = plan_of(self._options, meta)
        recorder = BatchRecorder(
            self._loaded,
            gates,
            self._options.wanted,
            self._options.generation,
            embeddings=self._options.embeddings,
            ticked=self._watch.tokens,
        )
        with Parts(self._options.out, plan, resume=self._options.resume) as parts:
            self._watch.requests(0, self._source.total)
            with recorder:
                for batch in self._batches():
                    self._record(recorder, parts, batch)
            if not self._requests:
                raise UsageError(f"--prompts {self._options.prompts}: no prompt fits the model")
            return parts.merge(meta, self._requests, self._watch.merged)

    def _found(self, first: Prompt) -> Gates:
        try:
            return find_gates(self._loaded.model, encode(self._loaded, first.text) or [0])
        except torch.cuda.OutOfMemoryError:
            raise UsageError(
                f"{self._loaded.name}: leaves no GPU memory to run in; try --dtype bfloat16 or "
                "--device cpu"
            ) from None

    # ---- prompts ----

    def _batches(self) -> Iterator[list[Encoded]]:
        fitting = self._fitting()
        while batch := list(islice(fitting, self._options.batch_size)):
            yield batch

    def _fitting(self) -> Iterator[Encoded]:
        splits = _Splits(self._options.split)
        for number, prompt in enumerate(self._source.prompts()):
            split = splits.next(prompt.topic)
            tokens = encode(self._loaded, prompt.text) if prompt.text.strip() else []
            why = self._why_not(tokens)
            if why is not None:
                self._skip(number, why)
                continue
            facts = RequestFacts(
                topic=prompt.topic,
                split=split,
                prompt_digest=prompt_digest(prompt.text),
                text=prompt.text if self._options.keep_text else None,
            )
            yield Encoded(number, np.array(tokens, dtype=np.int32), facts)

    def _why_not(self, tokens: list[int]) -> str | None:
        if not tokens:
            return "is empty"
        return too_long(self._loaded, tokens, self._options.generation.max_new_tokens)

    def _skip(self, number: int, why: str) -> None:
        self._skipped += 1
        if self._skipped <= SKIPS_TOLD:
            self._watch.say(f"prompt {number} {why}: skipped")
        elif self._skipped == SKIPS_TOLD + 1:
            self._watch.say("more prompts are skipped for the same reasons")

    # ---- batches ----

    def _record(self, recorder: BatchRecorder, parts: Parts, batch: Sequence[Encoded]) -> None:
        """Record a batch, in pieces of the size that fits; leave out pieces that are there."""
        while batch:
            piece, rest = batch[: self._batch_size], batch[self._batch_size :]
            if not self._is_there(parts, piece) and not self._try(recorder, parts, piece):
                continue
            self._requests += [one.request for one in piece]
            self._watch.requests(len(self._requests) + self._skipped, self._source.total)
            batch = rest

    def _is_there(self, parts: Parts, piece: Sequence[Encoded]) -> bool:
        """Whether every request of the piece is finished; refuse parts of other prompts."""
        for one in piece:
            facts = parts.facts(one.request)
            if facts is None:
                return False
            if facts.prompt_digest != one.facts.prompt_digest:
                raise UsageError(
                    f"--prompts {self._options.prompts}: prompt {one.request} is not the one that "
                    f"was recorded; delete {parts.folder} to begin anew"
                )
        return True

    def _try(self, recorder: BatchRecorder, parts: Parts, piece: Sequence[Encoded]) -> bool:
        """Record a piece; where the GPU's memory does not suffice, halve the batch and say so."""
        try:
            for rows in recorder.record(piece):
                parts.write(rows)
            return True
        except torch.cuda.OutOfMemoryError:
            pass  # its frames hold the tensors: they are let go before anything else is tried
        torch.cuda.empty_cache()
        size = len(piece)
        if size == 1:
            tokens = len(piece[0].tokens)
            raise UsageError(
                f"prompt {piece[0].request}: the GPU's memory does not suffice for one prompt of "
                f"{tokens} tokens; try --dtype bfloat16, fewer --max-new-tokens or --device cpu. "
                f"{len(self._requests)} finished requests are kept in {parts.folder}"
            )
        self._batch_size = -(-size // 2)
        self._watch.say(f"out of GPU memory with a batch of {size}: on with {self._batch_size}")
        return False


class _Splits:
    """Deals requests to train and test, evenly within each topic.

    Topics begin at different places of the pattern, so that the whole is even too.
    """

    def __init__(self, split: tuple[int, int] | None) -> None:
        self._split = split
        self._seen: dict[str | None, int] = {}

    def next(self, topic: str | None) -> str | None:
        """Return the split of the next request of a topic."""
        if self._split is None:
            return None
        train, parts = self._split[0], sum(self._split)
        at = self._seen.setdefault(topic, len(self._seen) * 7)
        self._seen[topic] = at + 1
        return TRAIN if (at + 1) * train // parts > at * train // parts else TEST


# ---- what is said about it -----------------------------------------------------------------------


def meta_of(options: Recording, loaded: Loaded, gates: Gates, source: PromptSource) -> TraceMeta:
    """Return what a recording says about itself."""
    wanted = options.wanted
    return TraceMeta(
        model=model_profile(loaded, gates),
        rank_order="weight",
        score=gates.score.kind,
        ahead=dict.fromkeys(wanted.ahead, gates.top_k),
        has_weights=True,
        has_gate=wanted.logits,
        has_norms=wanted.norms,
        has_tokens=True,
        embedding=options.embeddings,
        dataset=source.name,
        split="" if options.split is None else "{}:{} {}:{}".format(*options.split, TRAIN, TEST),
        seed=options.generation.seed if options.generation.sample else None,
        dtype=loaded.dtype,
        device=loaded.device,
        versions=versions(),
        source=f"recorded from {type(loaded.model).__name__}",
        expert_norms=expert_norms(gates),
        notes=tuple(_notes(options, loaded, gates)),
    )


def _notes(options: Recording, loaded: Loaded, gates: Gates) -> Iterator[str]:
    yield gates.score.in_words()
    yield f"{options.generation.in_words()}, batches of {options.batch_size}"
    has_template = getattr(loaded.tokenizer, "chat_template", None)
    yield "prompts: in the tokenizer's chat template" if has_template else "prompts: as they are"
    if options.wanted.ahead:
        yield "ahead: the later layer's gate applied to this layer's gate input"
    if options.embeddings != "none":
        yield "embeddings: the model's input embedding, mean over the prompt, then of each token"


def plan_of(options: Recording, meta: TraceMeta) -> dict[str, Any]:
    """Return everything that determines the rows."""
    options_plain = asdict(options)
    for name in ("out", "resume"):
        del options_plain[name]
    described = {
        name: getattr(meta, name) for name in ("dtype", "device", "versions", "dataset", "notes")
    }
    return {**options_plain, **described, "model profile": meta.model.digest}


def refuse_place(out: Path, option: str = "--out") -> None:
    """Raise `UsageError` where no trace can be written."""
    if out.is_dir():
        raise UsageError(f"{option} {out}: is a folder; name a file to write")
    if out.suffix == ".parts":
        raise UsageError(f"{option} {out}: is the name of the folder for parts; name it .parquet")
    if not out.parent.is_dir():
        raise UsageError(f"{option} {out}: there is no folder {out.parent}")


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value}: must be one of {', '.join(choices)}")


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{option} {value}: must be at least {least}")
