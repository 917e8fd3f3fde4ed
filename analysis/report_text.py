"""Text from outside made fit to be shown: nothing hidden in it, nothing that a library would run.

HTML is escaped where the page is filled (Jinja2); this is for what escaping does not reach: marks
that turn the direction of writing, control characters, lone surrogates, and delimiters that make
Bokeh read TeX (for which it would ask the network).
"""

from __future__ import annotations

import re
import unicodedata

MOST = 72
"""Longer names are cut in the middle; the run's files have them whole."""

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_TEX = re.compile(r"\$(?=\$)|\\(?=[\[(])")
_JOINT = "\u2060"
"""A word joiner: no width, and a delimiter no more."""


def plain(text: object) -> str:
    """One visible line: hidden characters spelled out, TeX delimiters broken, not too long."""
    seen = "".join(_visible(letter) for letter in str(text))
    if len(seen) > MOST:
        seen = f"{seen[: MOST // 2]}…{seen[-MOST // 2 + 1 :]}"
    return _TEX.sub(lambda found: found[0] + _JOINT, seen)


def _visible(letter: str) -> str:
    if unicodedata.category(letter) not in _HIDDEN:
        return letter
    code = ord(letter)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
