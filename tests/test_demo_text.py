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
from moesim.traces.demo_shapes import BOS, EOS, PAD
from moesim.traces.demo_text import Documents, Part, Source
from moesim.traces.demo_tokens import make_tokenizer

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
    assert list(demo_text._texts(part, path)) == [PAGE]


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


def test_sentences_and_lines() -> None:
    text = "One is\n  here. Two!  Three:\n\nfour\n今日は。明日"
    assert demo_pairs.sentences(text) == ["One is here.", "Two!", "Three:", "four 今日は。", "明日"]
    lines = ["One is", "here. Two! Three:", "four", "今日は。明日"]
    assert demo_pairs.sentences(text, by_line=True) == lines


SENTENCES = st.lists(
    st.lists(st.integers(3, 40), max_size=30).map(lambda ids: [BOS, *ids]), max_size=40
)


@given(SENTENCES)
def test_a_passage_fits_a_text_and_each_of_its_sentences_a_summary(found: list[list[int]]) -> None:
    kept = [one for run in demo_pairs.passages(found) for one in run]
    order = iter(tuple(ids[1:]) for ids in found)
    assert all(one in order for one in kept)
    for run in demo_pairs.passages(found):
        assert len(run) == len(set(run)) >= demo_pairs.LEAST_SENTENCES
        assert 1 + sum(len(one) + 1 for one in run) <= demo_pairs.TEXT_TOKENS
        assert all(demo_pairs.LEAST_TOKENS <= len(one) < demo_pairs.SUMMARY_TOKENS for one in run)


def test_the_principal_sentence_shares_most_with_the_rest() -> None:
    # Of 4, 4 and 4 tokens, 1, 3 and 2 are in the other two.
    assert demo_pairs.principal([(1, 2, 3, 9), (9, 5, 6, 4), (5, 6, 7, 8)]) == (9, 5, 6, 4)


def test_pairs_are_cut_from_their_own_documents() -> None:
    words = ["the red house", "an old blue door", "seven open windows", "no green garden"]
    text = " ".join(f"Here is {a} and there is {b}." for a in words for b in words if a != b)
    documents = {"a": Documents([text, text.replace("Here", "Now")], [text])}
    tokenizer = make_tokenizer(documents, vocabulary=400)
    pairs = demo_pairs.make_pairs(tokenizer, documents)
    held, train = pairs.held["a"], pairs.train["a"]
    assert len(held.texts) and len(train.texts)
    for one, pairs_of in (("Here", held), ("Now", train)):
        texts = tokenizer.batch_decode(pairs_of.texts, skip_special_tokens=True)
        summaries = tokenizer.batch_decode(pairs_of.summaries, skip_special_tokens=True)
        for whole, summary in zip(texts, summaries, strict=True):
            assert summary in whole.split("\n")
            assert summary.startswith(one)


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


def test_a_summary_alone_is_a_text_of_one_line() -> None:
    texts = np.array([[BOS, 7, 8, 5, 9, 6, 5, PAD], [BOS, 9, 5, 7, 5, PAD, PAD, PAD]], np.uint16)
    summaries = np.array([[7, 8, EOS, PAD], [9, EOS, PAD, PAD]], np.uint16)
    alone = demo_pairs.alone(demo_pairs.Pairs(texts, summaries))
    assert alone.texts.tolist() == [[BOS, 7, 8, 5, PAD], [BOS, 9, 5, PAD, PAD]]
    assert alone.summaries is summaries
    assert alone.texts.dtype == np.uint16


def test_a_gap_stands_where_the_summary_stood() -> None:
    texts = np.array(
        [[BOS, 7, 9, 5, 7, 8, 5, 6, 5], [BOS, 9, 5, 7, 5, PAD, PAD, PAD, PAD]], np.uint16
    )
    summaries = np.array([[7, 8, EOS, PAD], [9, EOS, PAD, PAD]], np.uint16)
    gapped = demo_pairs.gapped(demo_pairs.Pairs(texts, summaries))
    assert gapped.texts.tolist() == [
        [BOS, 7, 9, 5, EOS, 5, 6, 5, PAD],
        [BOS, EOS, 5, 7, 5, PAD, PAD, PAD, PAD],
    ]
    assert gapped.summaries is summaries
