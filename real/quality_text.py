"""Text that a model's quality is measured on: inputs, one after the other, as one user sends them.

An input is one forward pass: a window of running text that a decoder is asked to foretell, or for
an encoder-decoder a text and its summary. Topic follows topic, or all are shuffled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from moesim.errors import UsageError
from moesim.real.offload_generate import prompts_of
from moesim.traces import demo_pairs, demo_tokens
from moesim.traces.demo_models import FOLDER
from moesim.traces.demo_overview import REPORT
from moesim.traces.demo_text import Documents
from moesim.traces.prompt_sources import BUILT_IN
from moesim.traces.record_model import Loaded
from moesim.types import IntArray

Tensor = torch.Tensor
ORDERS: Final = ("topics", "shuffled")
LEAST_TOKENS: Final = 8
"""Of an input; what is left of a document below that is left out."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which text. Names are those of the command line.

    source : ``builtin``, a file of prompts, or what `python -m moesim.traces.demo prepare` wrote:
        ``tokens.safetensors``, or ``pairs.safetensors`` for an encoder-decoder. Of those only what
        was held out of training is read.
    tokens : about so many in all, as many of each topic. length : most of an input (a decoder's).
    half : the inputs of a topic are dealt in turn to two halves; 1, 2, or 0 for both.
    order : topics or shuffled (by ``seed``).
    """

    source: str = BUILT_IN
    tokens: int = 6144
    length: int = 64
    half: int = 0
    order: str = "topics"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < LEAST_TOKENS:
            raise UsageError(f"--length {self.length}: give at least {LEAST_TOKENS}")
        if self.order not in ORDERS:
            raise UsageError(f"--order {self.order}: must be one of {', '.join(ORDERS)}")


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """One forward pass.

    arguments : of the model, one row. labels : int64 [T], the token that each position is followed
        by, or is to say; below 0 where nothing is asked.
    """

    topic: str
    arguments: Mapping[str, Tensor]
    labels: Tensor

    @property
    def targets(self) -> Tensor:
        """bool [T]: where something is asked."""
        return self.labels >= 0


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """What quality is measured on.

    digest : SHA-256 over topics and tokens, in order. held : how it is known that the model was
        not trained on it; "" where nothing says so.
    """

    source: str
    inputs: tuple[Input, ...]
    digest: str
    held: str

    @property
    def tokens(self) -> int:
        """How many tokens are asked."""
        return sum(int(one.targets.sum()) for one in self.inputs)

    @property
    def topics(self) -> list[str]:
        """In order, each once."""
        return list(dict.fromkeys(one.topic for one in self.inputs))

    def facts(self) -> dict[str, Any]:
        """For a report."""
        return {
            "source": Path(self.source).name,
            "digest": self.digest,
            "held_out": self.held,
            "topics": self.topics,
            "inputs": len(self.inputs),
            "tokens": self.tokens,
        }


def read_text(wanted: Wanted, loaded: Loaded) -> Text:
    """The inputs for a model.

    Raises
    ------
    UsageError
        If the text is not there, is not the one that the model's own training held out of, or
        leaves nothing to measure.
    """
    pairs = bool(loaded.model.config.is_encoder_decoder)
    path = Path(wanted.source)
    held = ""
    if path.suffix == ".safetensors":
        held = _held_of(path, loaded)
        by_topic = _prepared_pairs(path) if pairs else _prepared_windows(path, wanted.length)
    else:
        documents = _documents(wanted.source)
        by_topic = (
            _made_pairs(documents, loaded) if pairs else _cut(documents, loaded, wanted.length)
        )
        if wanted.source == BUILT_IN and (FOLDER / loaded.name).is_dir():
            held = "written for moesim; no demo model saw it"
    inputs = _ordered(_chosen(by_topic, wanted), wanted)
    if not inputs:
        raise UsageError(f"--text {wanted.source}: leaves nothing to measure; give more text")
    return Text(wanted.source, tuple(inputs), _digest(inputs), held)


# ---- where it comes from -------------------------------------------------------------------------

ByTopic = Mapping[str, Sequence[Input]]


def _held_of(path: Path, loaded: Loaded) -> str:
    """That a file is the corpus of a demo model; what it holds out, no training saw."""
    report = FOLDER / loaded.name / REPORT
    if not report.is_file():
        raise UsageError(
            f"--text {path}: is what demo models were trained on, and {loaded.name} is none; give "
            "a file of prompts"
        )
    trained = json.loads(report.read_text(encoding="utf-8"))["training"]["corpus_sha256"]
    if not path.is_file():
        raise UsageError(
            f"--text {path}: no such file; `python -m moesim.traces.demo prepare` makes it"
        )
    if demo_tokens.digest(path) != trained:
        raise UsageError(
            f"--text {path}: is not what {loaded.name} was trained on, so nobody knows what was "
            "held out; prepare it with the packages that the model's card names"
        )
    return "held out of the model's training, by document"


def _prepared_windows(path: Path, length: int) -> ByTopic:
    held = demo_tokens.load(path).held
    return {
        topic: [_window(topic, ids[at : at + length]) for at in range(0, len(ids) - length, length)]
        for topic, ids in held.items()
    }


def _prepared_pairs(path: Path) -> ByTopic:
    return {topic: _pairs(topic, some) for topic, some in demo_pairs.load(path).held.items()}


def _documents(source: str) -> dict[str, list[str]]:
    """Texts by topic; those without one are of one topic."""
    found: dict[str, list[str]] = {}
    for prompt in prompts_of(source).prompts():
        found.setdefault(prompt.topic or "text", []).append(prompt.text)
    return found


def _cut(documents: Mapping[str, Sequence[str]], loaded: Loaded, length: int) -> ByTopic:
    return {
        topic: [_window(topic, ids) for text in texts for ids in _windows(loaded, text, length)]
        for topic, texts in documents.items()
    }


def _windows(loaded: Loaded, text: str, length: int) -> Iterable[IntArray]:
    ids = np.array(loaded.tokenizer(text)["input_ids"], np.int64)
    pieces = (ids[at : at + length] for at in range(0, len(ids), length))
    return [piece for piece in pieces if len(piece) >= LEAST_TOKENS]


def _window(topic: str, ids: Any) -> Input:
    row = torch.from_numpy(np.asarray(ids, np.int64))
    labels = torch.full_like(row, demo_pairs.IGNORED)
    labels[:-1] = row[1:]
    return Input(topic, {"input_ids": row[None]}, labels)


def _made_pairs(documents: Mapping[str, Sequence[str]], loaded: Loaded) -> ByTopic:
    """Pairs as those of the demo: a passage, and the sentence that shares most with the rest."""
    joined = {
        topic: Documents(train=["-"], held=["\n".join(texts)]) for topic, texts in documents.items()
    }
    made = demo_pairs.make_pairs(loaded.tokenizer, joined).held
    return {topic: _pairs(topic, some) for topic, some in made.items()}


def _pairs(topic: str, pairs: demo_pairs.Pairs) -> list[Input]:
    made = []
    for text, summary in zip(pairs.texts, pairs.summaries, strict=True):
        row = demo_pairs.Pairs(text[None][:, text != 0], summary[None][:, summary != 0])
        arguments = demo_pairs.arguments(row)
        made.append(Input(topic, arguments, arguments["labels"][0]))
    return made


# ---- which of it ---------------------------------------------------------------------------------


def _chosen(by_topic: ByTopic, wanted: Wanted) -> list[Sequence[Input]]:
    """Of each topic as many, spread evenly over what there is."""
    halves = {
        topic: inputs[wanted.half - 1 :: 2] if wanted.half else inputs
        for topic, inputs in sorted(by_topic.items())
    }
    share = wanted.tokens / max(1, sum(bool(inputs) for inputs in halves.values()))
    return [_spread(inputs, share) for inputs in halves.values() if inputs]


def _spread(inputs: Sequence[Input], tokens: float) -> Sequence[Input]:
    size = sum(len(one.labels) for one in inputs) / len(inputs)
    count = min(len(inputs), max(1, round(tokens / size)))
    return [inputs[i] for i in np.linspace(0, len(inputs) - 1, count).astype(int).tolist()]


def _ordered(topics: Sequence[Sequence[Input]], wanted: Wanted) -> list[Input]:
    inputs = [one for topic in topics for one in topic]
    if wanted.order == "shuffled":
        order = np.random.default_rng(wanted.seed).permutation(len(inputs))
        inputs = [inputs[i] for i in order.tolist()]
    return inputs


def _digest(inputs: Sequence[Input]) -> str:
    made = hashlib.sha256()
    for one in inputs:
        made.update(one.topic.encode() + b"\n")
        made.update(one.arguments["input_ids"].numpy().tobytes())
        made.update(one.labels.numpy().tobytes())
    return made.hexdigest()
