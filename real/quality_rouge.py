"""Rouge-2 of summaries, by the `rouge-score` package.

Its own words are runs of ASCII letters and digits, which leaves nothing of Russian or Chinese; here
words are runs of any letters and digits, or one ideograph or kana. On ASCII both are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch

from moesim.errors import NotRunError
from moesim.traces.demo_pairs import SUMMARY_TOKENS

_WORD: Final = re.compile(
    r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u4e00-\u9fff]+",
)


class Words:
    """Cuts a text as ``rouge_score`` wants it."""

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case."""
        return _WORD.findall(text.lower())


class Rouge:
    """Rouge-2 F1 (Lin, 2004). Raises NotRunError without `rouge-score`."""

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ModuleNotFoundError:
            raise NotRunError(
                "not run: --task rouge needs rouge-score, which is not installed; "
                "`pip install 'moesim[quality]'` installs it"
            ) from None
        self._scorer = RougeScorer(["rouge2"], tokenizer=Words())

    def __call__(self, meant: str, said: str) -> float:
        """From 0 to 1."""
        return float(self._scorer.score(meant, said)["rouge2"].fmeasure)


def summarise(model: Any, arguments: Mapping[str, Any]) -> list[int]:
    """Tokens of the greedy summary of one text."""
    given = {name: value for name, value in arguments.items() if name != "labels"}
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=SUMMARY_TOKENS, do_sample=False)
    said: list[int] = out[0].tolist()
    return said
