"""``moesim bench record``: both sides do the same work, and each way is judged by its promise."""

from __future__ import annotations

import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moesim.bench import record as bench  # noqa: E402
from moesim.cli import main  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of next to nothing."""
    for name, value in {"BATCH": 2, "PROMPT_TOKENS": 5, "NEW_TOKENS": 3, "ROUNDS": 1}.items():
        monkeypatch.setattr(bench, name, value)


def measured(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The figures of one run."""
    threads = torch.get_num_threads()
    assert main(["bench", "record", "--repeats", "1", "--json"]) == 0
    assert torch.get_num_threads() == threads
    out, err = capsys.readouterr()
    assert all(line.startswith("bench: ") for line in err.splitlines())
    figures: list[dict[str, Any]] = json.loads(out)["figures"]
    return figures


def test_both_ways_stand_beside_plain_generation(capsys: pytest.CaptureFixture[str]) -> None:
    figures = measured(capsys)
    assert [f["promise"] for f in figures] == [{"at_most": 1.10}, {"at_most": 1.25}]
    for figure in figures:
        assert figure["reference"]["name"] == "generate alone"
        assert figure["ratio"] == figure["median"] / figure["reference"]["value"]
        assert figure["kept"] == (figure["ratio"] <= figure["promise"]["at_most"])
        assert figure["facts"]["cpu_time_ratio"] > 0
        assert figure["facts"]["model"] == "demo, fp32 on cpu"


def test_a_recording_of_other_tokens_gives_no_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_decoded", lambda rows: [1, 2])
    assert main(["bench", "record"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == ("moesim: error: record: with top-k and weights other tokens are generated")


def test_without_torch_it_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert main(["bench", "record", "--json"]) == 0
    (refused,) = json.loads(capsys.readouterr().out)["not_run"]
    assert refused["benchmark"] == "record"
    assert refused["not_run"].startswith("needs transformers: `pip install '.[record]'`")
