"""The demo models' text: cleaning, cutting, splitting, summaries and Rouge-2."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import UsageError
from moesim.traces import demo_pairs, demo_text
from moesim.traces.demo_text import Part, Source

PAGE = """.TH LS 1 2022
.SH NAME
ls \\- list \\fIdirectory\\fP contents
.SH SYNOPSIS
.B ls
[OPTION]
.SH DESCRIPTION
List information about the \\fBFILE\\fPs; entries are sorted unless one of the options says not.
.\\" a comment
The default is the current directory, and the exit status tells whether all went well.
"""


def deb(path: Path, files: dict[str, bytes]) -> None:
    """A Debian package with these files, as `dpkg-deb` lays it out."""
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    out = b"!<arch>\n"
    data = lzma.compress(tar_bytes.getvalue())
    for name, body in (("debian-binary", b"2.0"), ("data.tar.xz", data)):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode()
        out += body + b"\n" * (len(body) % 2)
    path.write_bytes(out)


def test_a_manual_page_keeps_its_words_and_loses_its_requests() -> None:
    text = demo_text.from_roff(PAGE)
    assert "ls - list directory contents" in text
    assert "NAME" in text
    assert "comment" not in text
    assert "\\" not in text


def test_html_keeps_text_a_block_a_line() -> None:
    page = "<html><head><title>x</title></head><body><h1>A &amp; b</h1><p>one\u00a0 two</p></body>"
    assert demo_text.from_html(page) == "A & b\none two"


def test_metamath_loses_its_proofs_only() -> None:
    text = "th1 $p |- ph $= ( wph ax-1 ) ABC\n DEF $.\nth2 $a |- ps $."
    assert demo_text.from_metamath(text) == "th1 $p |- ph $= ? $.\nth2 $a |- ps $."


def test_a_package_gives_its_matching_files(tmp_path: Path) -> None:
    path = tmp_path / "manpages-de_1_all.deb"
    files = {"./man/ls.1.gz": gzip.compress(PAGE.encode()), "./doc/other": b"x"}
    deb(path, files)
    part = Part("man_de", r"/man/.*\.gz$", "roff")
    assert list(demo_text.raw_files(part, tmp_path)) == [PAGE]


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    source = Source("x", "pypi", "nothing==1.0", "none")
    with pytest.raises(UsageError, match=r"nothing==1\.0 is missing; run"):
        demo_text.archive(source, tmp_path)


def test_every_part_has_a_source_and_a_cleaner() -> None:
    keys = {source.key for source in demo_text.SOURCES}
    used = {part.source for topic in demo_text.TOPICS for part in topic.parts}
    assert used == keys
    assert {p.clean for t in demo_text.TOPICS for p in t.parts} <= demo_text.CLEANERS.keys()


def test_about_a_twentieth_is_held_out() -> None:
    held = sum(demo_text.is_held(f"document {i}") for i in range(4000))
    assert abs(held / 4000 - demo_text.HELD_OF_256 / 256) < 0.01


def test_a_manual_page_is_summarised_by_its_name_line() -> None:
    ((text, summary),) = demo_pairs.from_manual_page(PAGE)
    assert summary == "list directory contents"
    assert "list directory" not in text


def test_a_function_is_summarised_by_its_docstring() -> None:
    code = 'def f(x):\n    """Double x. Really.\n\n    More.\n    """\n    return 2 * x\n'
    ((text, summary),) = demo_pairs.from_python(code)
    assert summary == "Double x."
    assert "def f(x):" in text
    assert "return 2 * x" in text
    assert "Double" not in text


def test_a_section_is_summarised_by_its_heading() -> None:
    text = "Intro\n=====\n\nFirst.\n\nUsing :mod:`~os.path` now\n------\n\nSecond.\n"
    pairs = dict(demo_pairs.from_rst(text))
    assert {k.strip(): v for k, v in pairs.items()} == {
        "First.": "Intro",
        "Second.": "Using os.path now",
    }


def test_source_that_does_not_parse_gives_no_pairs() -> None:
    assert list(demo_pairs.from_python("def f(:\n")) == []


WORDS = st.lists(
    st.sampled_from(["list", "open", "file", "the", "directory", "文", "件"]), max_size=8
)


@given(WORDS, WORDS)
def test_rouge2_is_a_symmetric_share(said: list[str], meant: list[str]) -> None:
    one, two = " ".join(said), " ".join(meant)
    score = demo_pairs.rouge2(one, two)
    assert score == demo_pairs.rouge2(two, one)
    assert 0.0 <= score <= 1.0
    assert demo_pairs.rouge2(one, one) == (1.0 if len(said) > 1 else 0.0)


def test_rouge2_by_hand() -> None:
    # 2 common pairs of 3 and 4.
    assert demo_pairs.rouge2("the file is open", "The file is not open, open!") == pytest.approx(
        2 * 2 / (3 + 5)
    )


def test_drawn_pairs_depend_on_the_key_alone() -> None:
    ids = np.arange(40, dtype=np.uint16).reshape(10, 4)
    pairs = demo_pairs.Pairs(ids, ids + 1)
    one, two = (demo_pairs.draw(pairs, 5, (0, 7)) for _ in range(2))
    assert (one.texts == two.texts).all()
    assert (one.summaries == one.texts + 1).all()
    assert (one.texts != demo_pairs.draw(pairs, 5, (0, 8)).texts).any()
