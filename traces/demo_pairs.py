"""Pairs of a text and its one-line summary, for the encoder-decoder demo model.

A function's source and the first sentence of its docstring; a manual page and the line under its
NAME; a section and its heading. All from the packages of `demo_text`, the summary cut out of the
text. All pairs of a file are held out, or none.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moesim.errors import UsageError
from moesim.traces.demo_shapes import EOS, PAD
from moesim.traces.demo_text import TOPICS, from_roff, is_held, raw_files

Pair = tuple[str, str]
Ids = npt.NDArray[np.uint16]

TEXT_TOKENS: Final = 96
SUMMARY_TOKENS: Final = 24
IGNORED: Final = -100
"""The label of padding."""
_TEXT_CHARS: Final = 1500
_LEAST_CHARS, _MOST_SUMMARY_CHARS = 120, 120


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


def read_pairs(folder: Path) -> dict[str, tuple[list[Pair], list[Pair]]]:
    """For training and held out, by topic; topics without summaries are left out."""
    out = {}
    for topic in TOPICS:
        train: dict[str, str] = {}
        held: dict[str, str] = {}
        for part in topic.parts:
            for text in raw_files(part, folder):
                (held if is_held(text) else train).update(_pairs(part.clean, text))
        for text in train.keys() & held.keys():
            del train[text]
        if held and len(train) > len(held):
            out[topic.name] = (sorted(train.items()), sorted(held.items()))
    return out


def _pairs(kind: str, text: str) -> Iterator[Pair]:
    maker = _MAKERS.get(kind)
    for body, summary in maker(text) if maker else ():
        body, summary = body.strip()[:_TEXT_CHARS], " ".join(summary.split())
        if len(body) >= _LEAST_CHARS and 8 <= len(summary) <= _MOST_SUMMARY_CHARS:
            yield body, summary


def from_python(text: str) -> Iterator[Pair]:
    """A function's source without the first sentence of its docstring, and that sentence."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            first, _, rest = doc.partition("\n\n")
            body = node.body[0]
            head = "\n".join(lines[node.lineno - 1 : body.lineno - 1])
            code = "\n".join(lines[body.end_lineno : node.end_lineno])
            yield f"{head}\n{rest[:600]}\n{code}", re.split(r"(?<=\.)\s", first)[0]


def from_manual_page(text: str) -> Iterator[Pair]:
    """What follows a manual page's NAME section, and the words behind its dash."""
    sections = re.split(r"^\.SH\b", text, maxsplit=2, flags=re.MULTILINE)
    if len(sections) == 3:
        name = " ".join(from_roff(".SH" + sections[1]).split("\n")[1:])
        _, dash, summary = name.partition(" - ")
        if dash:
            yield from_roff(".SH" + sections[2]), summary


def from_rst(text: str) -> Iterator[Pair]:
    """Sections of reStructuredText and their headings."""
    parts = re.split(r"^(\S.*)\n([=\-~^\"*])\2{3,}\s*$", text, flags=re.MULTILINE)
    for heading, body in zip(parts[1::3], parts[3::3], strict=True):
        yield body, re.sub(r":[a-z:]+:`~?([^`<]*)[^`]*`", r"\1", heading).replace("``", "")


_MAKERS: Final[dict[str, Callable[[str], Iterator[Pair]]]] = {
    "python": from_python,
    "roff": from_manual_page,
    "rst": from_rst,
}


# ---- tokens ------------------------------------------------------------------------------------


def tokenize(tokenizer: Any, pairs: Mapping[str, tuple[list[Pair], list[Pair]]]) -> PairSets:
    """All topics' pairs as ids."""
    return PairSets(
        {topic: pad_pairs(tokenizer, train) for topic, (train, _) in pairs.items()},
        {topic: pad_pairs(tokenizer, held) for topic, (_, held) in pairs.items()},
    )


def pad_pairs(tokenizer: Any, pairs: Sequence[Pair]) -> Pairs:
    """Ids, cut and padded; a summary ends in EOS and has no BOS."""
    texts = np.full((len(pairs), TEXT_TOKENS), PAD, np.uint16)
    summaries = np.full((len(pairs), SUMMARY_TOKENS), PAD, np.uint16)
    for row, (text, summary) in enumerate(pairs):
        ids = tokenizer(text)["input_ids"][:TEXT_TOKENS]
        texts[row, : len(ids)] = ids
        ids = [*tokenizer(summary)["input_ids"][1:SUMMARY_TOKENS], EOS]
        summaries[row, : len(ids)] = ids
    return Pairs(texts, summaries)


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
