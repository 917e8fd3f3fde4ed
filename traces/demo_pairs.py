"""Pairs of a text and its one-line summary, for the encoder-decoder demo model.

A text is a run of sentences (of code: lines) from a document of `demo_text`, one a line. Its
summary is the one of them that shares most with the rest, which is how PEGASUS (Zhang et al., 2020,
section 3.1) picks the principal sentence; here it stays in the text. So the model learns to choose
and to copy, which a model this small can, and not to put into words of its own, which it cannot.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moesim.errors import UsageError
from moesim.traces.demo_shapes import BOS, EOS, PAD
from moesim.traces.demo_text import Documents

Ids = npt.NDArray[np.uint16]
Sentence = tuple[int, ...]

TEXT_TOKENS: Final = 96
SUMMARY_TOKENS: Final = 24
IGNORED: Final = -100
"""The label of padding."""
LEAST_SENTENCES: Final = 3
LEAST_TOKENS: Final = 6
"""Of a sentence; shorter ones are left out."""
MOST_PAIRS: Final = 12_000
"""Of a topic, for training."""
CODE: Final = ("code", "algebra")
"""Topics whose lines are their sentences."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of one topic as padded ids: texts (n, TEXT_TOKENS), summaries (n, SUMMARY_TOKENS)."""

    texts: Ids
    summaries: Ids


@dataclass(frozen=True, slots=True)
class PairSets:
    """Pairs by topic, for training and held out."""

    train: dict[str, Pairs]
    held: dict[str, Pairs]


def make_pairs(tokenizer: Any, documents: Mapping[str, Documents]) -> PairSets:
    """All topics' pairs as ids; the documents held out give the pairs held out."""
    parts: tuple[dict[str, Pairs], dict[str, Pairs]] = ({}, {})
    for topic, found in documents.items():
        for part, texts in zip(parts, (found.train, found.held), strict=True):
            part[topic] = _topic_pairs(tokenizer, texts, topic in CODE)
        parts[0][topic] = _unseen(parts[0][topic], parts[1][topic])
    return PairSets(*parts)


def _topic_pairs(tokenizer: Any, texts: Sequence[str], by_line: bool) -> Pairs:
    # As much of each document as of any other, so that no long one stands for its topic.
    most = -(-MOST_PAIRS // max(1, len(texts)))
    newline = _newline(tokenizer)
    made = [
        (_joined(passage, newline), [*principal(passage), EOS])
        for text in texts
        for passage in islice(passages(tokenizer(sentences(text, by_line))["input_ids"]), most)
    ]
    return Pairs(
        _padded([text for text, _ in made], TEXT_TOKENS),
        _padded([summary for _, summary in made], SUMMARY_TOKENS),
    )


def _unseen(train: Pairs, held: Pairs) -> Pairs:
    """The pairs for training whose summary no pair held out has."""
    apart = {row.tobytes() for row in held.summaries}
    kept = [row.tobytes() not in apart for row in train.summaries]
    return Pairs(train.texts[kept], train.summaries[kept])


def sentences(text: str, by_line: bool = False) -> list[str]:
    """The sentences of a text (or its lines), their white space made one blank each."""
    cut = r"\n" if by_line else r"(?<=[.!?;:])\s+|(?<=[。！？；])|\n\s*\n"
    found = (" ".join(part.split()) for part in re.split(cut, text))
    return [part for part in found if part] or [""]


def passages(sentences: Iterable[Sequence[int]]) -> Iterator[list[Sentence]]:
    """Runs of sentences (ids that begin with BOS) that fill a text, none of which could be said of
    the whole: each fits a summary, is there once, and has LEAST_TOKENS."""
    run: list[Sentence] = []
    size = 1
    for ids in sentences:
        one = tuple(ids[1:])
        if not LEAST_TOKENS <= len(one) < SUMMARY_TOKENS:
            continue
        if size + len(one) + 1 > TEXT_TOKENS:
            if len(run) >= LEAST_SENTENCES:
                yield run
            run, size = [], 1
        if one not in run:
            run.append(one)
            size += len(one) + 1


def principal(passage: Sequence[Sentence]) -> Sentence:
    """The sentence that shares most with the rest: the largest F1 of common tokens."""
    counts = [Counter(one) for one in passage]
    whole = sum(counts, Counter[int]())

    def shared(number: int) -> float:
        rest = whole - counts[number]
        return (counts[number] & rest).total() / (len(passage[number]) + rest.total())

    return passage[max(range(len(passage)), key=shared)]


def _joined(passage: Sequence[Sentence], newline: int) -> list[int]:
    out = [BOS]
    for one in passage:
        out += [*one, newline]
    return out


def _newline(tokenizer: Any) -> int:
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return int(newline)


def _padded(rows: Sequence[Sequence[int]], width: int) -> Ids:
    out = np.full((len(rows), width), PAD, np.uint16)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out


def arguments(pairs: Pairs) -> dict[str, Any]:
    """The model's arguments for these pairs, as int64 tensors."""
    import torch

    texts = torch.from_numpy(pairs.texts.astype(np.int64))
    labels = torch.from_numpy(pairs.summaries.astype(np.int64))
    mask = (texts != PAD).long()
    return {
        "input_ids": texts,
        "attention_mask": mask,
        "labels": labels.masked_fill(labels == PAD, IGNORED),
    }


def stack(pairs: dict[str, Pairs]) -> Pairs:
    """All topics' pairs, one under the other."""
    ordered = [pairs[name] for name in sorted(pairs)]
    return Pairs(
        np.concatenate([p.texts for p in ordered]), np.concatenate([p.summaries for p in ordered])
    )


def draw(pairs: Pairs, rows: int, key: tuple[int, ...]) -> Pairs:
    """`rows` random pairs, each equally likely."""
    chosen = np.random.default_rng(key).integers(len(pairs.texts), size=rows)
    return Pairs(pairs.texts[chosen], pairs.summaries[chosen])


def alone(pairs: Pairs) -> Pairs:
    """The same summaries, each a text of one line: what copying is learned from first."""
    newline = pairs.texts[0][pairs.texts[0] != PAD][-1]
    lines = np.where(pairs.summaries == EOS, newline, pairs.summaries)
    return Pairs(np.insert(lines, 0, BOS, axis=1), pairs.summaries)


def gapped(pairs: Pairs) -> Pairs:
    """The same pairs, EOS in the text where the summary stood: what no copying can fill.

    This is PEGASUS's own task. Copying alone would leave the routers nothing to learn of the topic.
    """
    texts = np.full_like(pairs.texts, PAD)
    for row, (text, summary) in enumerate(zip(pairs.texts, pairs.summaries, strict=True)):
        line = summary[: int((summary == EOS).argmax())]
        found = np.lib.stride_tricks.sliding_window_view(text, len(line)) == line
        at = int(found.all(1).argmax())
        cut = np.concatenate((text[:at], [EOS], text[at + len(line) :]))
        texts[row, : len(cut)] = cut
    return Pairs(texts, pairs.summaries)


def save(data: PairSets, path: Path) -> None:
    """Write the pairs to a .safetensors file."""
    from safetensors.numpy import save_file

    arrays = {}
    for part, sets in (("train", data.train), ("held", data.held)):
        for topic, pairs in sets.items():
            arrays[f"{part}.{topic}.texts"] = pairs.texts
            arrays[f"{part}.{topic}.summaries"] = pairs.summaries
    beside = path.with_suffix(".part")
    save_file(arrays, beside)
    beside.replace(path)


def load(path: Path) -> PairSets:
    """Read what `save` wrote. Raises `UsageError` if it is not there."""
    from safetensors.numpy import load_file

    if not path.exists():
        raise UsageError(f"{path}: no pairs yet; run `python -m moesim.traces.demo prepare`")
    arrays, out = load_file(path), PairSets({}, {})
    for name in arrays:
        part, topic, column = name.split(".")
        if column == "texts":
            pairs = Pairs(arrays[name], arrays[f"{part}.{topic}.summaries"])
            (out.train if part == "train" else out.held)[topic] = pairs
    return out


# ---- Rouge-2 -----------------------------------------------------------------------------------


def rouge2(said: str, meant: str) -> float:
    """F1 of word pairs (Lin, 2004); words are runs of letters and digits, or one ideograph."""
    ours, theirs = _word_pairs(said), _word_pairs(meant)
    common = sum((ours & theirs).values())
    total = sum(ours.values()) + sum(theirs.values())
    return 2 * common / total if total else 0.0


def _word_pairs(text: str) -> Counter[tuple[str, str]]:
    words = re.findall(
        r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u4e00-\u9fff]+", text.lower()
    )
    return Counter(pairwise(words))
