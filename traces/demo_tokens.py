"""Turn the documents into tokens once, and hand out training windows by step number.

A window depends on (seed, step) alone, so a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moesim.errors import UsageError
from moesim.traces.demo_shapes import BOS, EOS, VOCABULARY
from moesim.traces.demo_text import Documents

Ids = npt.NDArray[np.uint16]
Rows = npt.NDArray[np.int64]

SPECIAL: Final = ("<pad>", "<s>", "</s>")
VOCABULARY_CHARS: Final = 2_000_000
"""Characters of each topic that the vocabulary is made from."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Running text by topic: each document is BOS, its tokens, EOS."""

    train: dict[str, Ids]
    held: dict[str, Ids]


def make_tokenizer(documents: Mapping[str, Documents], vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE tokenizer with as many characters from every topic; puts BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_first_chars(documents), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _first_chars(documents: Mapping[str, Documents]) -> Iterator[str]:
    for topic in documents.values():
        left = VOCABULARY_CHARS
        for text in topic.train:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def tokenize(tokenizer: Any, documents: Mapping[str, Documents]) -> Tokens:
    """All documents of all topics as ids."""
    return Tokens(
        {name: _ids(tokenizer, topic.train) for name, topic in documents.items()},
        {name: _ids(tokenizer, topic.held) for name, topic in documents.items()},
    )


def _ids(tokenizer: Any, texts: list[str]) -> Ids:
    encoded: Iterable[list[int]] = tokenizer(texts)["input_ids"] if texts else []
    parts = [np.array([*ids, EOS], np.uint16) for ids in encoded]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def save(tokens: Tokens, path: Path) -> None:
    """Write the ids to a .safetensors file."""
    from safetensors.numpy import save_file

    arrays = {f"train.{name}": ids for name, ids in tokens.train.items()}
    arrays |= {f"held.{name}": ids for name, ids in tokens.held.items()}
    beside = path.with_suffix(".part")
    save_file(arrays, beside)
    beside.replace(path)


def load(path: Path) -> Tokens:
    """Read what `save` wrote. Raises `UsageError` if it is not there."""
    from safetensors.numpy import load_file

    if not path.exists():
        raise UsageError(f"{path}: no tokens yet; run `python -m moesim.traces.demo prepare`")
    out = Tokens({}, {})
    for name, ids in load_file(path).items():
        part, _, topic = name.partition(".")
        (out.train if part == "train" else out.held)[topic] = ids
    return out


def windows(streams: Mapping[str, Ids], rows: int, length: int, key: tuple[int, ...]) -> Rows:
    """`rows` random windows, every topic equally likely; int64, shape (rows, length)."""
    rng, names = np.random.default_rng(key), sorted(streams)
    out = np.empty((rows, length), np.int64)
    for row in range(rows):
        ids = streams[names[int(rng.integers(len(names)))]]
        start = int(rng.integers(len(ids) - length + 1))
        out[row] = ids[start : start + length]
    return out


def held_windows(ids: Ids, rows: int, length: int) -> Rows:
    """The first `rows` windows, evenly spread over the stream and not overlapping."""
    most = len(ids) // length
    chosen = np.linspace(0, most - 1, min(rows, most)).astype(np.int64)
    return np.stack([ids[i * length : (i + 1) * length].astype(np.int64) for i in chosen])


def digest(path: Path) -> str:
    """What a run remembers of the tokens it was trained on."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write beside, then replace."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
