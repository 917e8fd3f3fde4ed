"""The page over all demo models: what each is, and its routing beside that of real models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

REPORT: Final = "report.json"

_HEAD: Final = """\
# Small models, really trained

Mixtures of experts to record gate traces from, without a model hub: `moesim record --model demo`.
They are no useful language models, and hit rates found on them do not carry over to large ones.
What they are for is routing that was learned: it follows the topic, and no expert lies idle. Each
folder has a model card and all numbers (`report.json`);
`python -m moesim.traces.demo train NAME` makes a model again from public packages.
"""

_ROUTING: Final = """\
## Routing, trained and not, beside real models

Means over layers, on held-out text of {topics} topics. The untrained model is the same class with
the weights that training began with. An attention stack that learned nothing averages its context,
so it repeats its experts and tells documents apart by chance; what training adds is that loads
differ between topics and not within one.
"""

_READ: Final = """\
- *overlap*: share of its experts that a token has in common with the one before it; by chance, in
  brackets.
- *information*: between expert and topic, bits. It grows with the number of topics.
- *between*, *within*: Jensen-Shannon divergence of the loads of two topics, and of two halves of
  one topic's documents, bits.
- *largest load*: of an expert, times the mean; mean over layers, and the worst layer.
- *entropy*: of the gate, as a share of ln(experts). The public traces hold the chosen experts only.
- *idle*: experts never chosen, over all layers.

The public traces are GPT-OSS-MoE-ExpertFingerprinting (decode; 421 sequences without repetition,
8 sets of questions), ESFT of DeepSeek (4 domains), moe-beyond (599 chat prompts), DynaNDE-Simulator
(FLAME-MoE, 2,048 tokens) and stratamoe-lab (Switch, 215 tokens of 10 prompts), measured with the
same formulas. Their text is not that of the models above: compare sizes, not digits.
"""

_COLUMNS: Final = (
    "",
    "experts",
    "overlap",
    "information",
    "between",
    "within",
    "largest load",
    "entropy",
    "idle",
)

_REAL: Final = (
    ("gpt-oss-20b", 4, 32, 0.440, 0.0864, 0.0492, 0.0317, 2.42, 3.57),
    ("DeepSeek-V2-Lite, ESFT", 6, 64, 0.278, 0.2491, 0.1584, 0.0031, 2.74, 3.42),
    ("DeepSeek-V2-Lite, chat", 6, 64, 0.267, None, None, 0.0044, 1.84, 2.75),
    ("FLAME-MoE-290M", 6, 64, 0.213, None, None, 0.0101, 1.53, 1.86),
    ("switch-base-8, encoder", 1, 8, 0.176, None, None, 0.0185, 1.89, 2.12),
)
"""Name, top k, experts, overlap, information, divergence between and within topics, largest load:
mean over layers and worst. Measured on the public traces that the page names."""


def write_overview(folder: Path) -> None:
    """Write README.md over the models in `folder`."""
    (folder / "README.md").write_text(overview(read_reports(folder)), encoding="utf-8")


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of the models in `folder`, by name."""
    paths = sorted(folder.glob(f"*/{REPORT}"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def overview(reports: Sequence[Mapping[str, Any]]) -> str:
    """The page, in Markdown."""
    topics = max(len(report["loss"]) for report in reports)
    parts = [
        _HEAD,
        markdown(
            ("", "class", "experts", "parameters", "active", "tokens", "loss", "Rouge-2"),
            map(_model_row, reports),
        ),
        _scores(reports),
        _ROUTING.format(topics=topics),
        markdown(_COLUMNS, [*_own_rows(reports), *map(_real_row, _REAL)]),
        _READ,
    ]
    return "\n".join(parts)


def _scores(reports: Sequence[Mapping[str, Any]]) -> str:
    told = (
        "The loss is the mean over topics on held-out text, nats a token; chance, ln(4096), is"
        f" {math.log(4096):.2f}."
    )
    rouge = [report["rouge2"] for report in reports if "rouge2" in report]
    if not rouge:
        return told + "\n"
    means = {key: _mean(rouge[0], key) for key in ("untrained", "any_line", "first_line")}
    return (
        f"{told}\nRouge-2 (F1) is that of greedy summaries of held-out text; untrained the model"
        f" has {means['untrained']:.3f}, a line\nof the text drawn at random"
        f" {means['any_line']:.3f}, its first line {means['first_line']:.3f}.\n"
    )


def _mean(rouge: Mapping[str, Mapping[str, float]], key: str) -> float:
    return fmean(scores[key] for scores in rouge.values())


def _model_row(report: Mapping[str, Any]) -> list[str]:
    shape = report["shape"]
    rouge = f"{_mean(report['rouge2'], 'model'):.3f}" if "rouge2" in report else ""
    return [
        f"[{report['name']}]({report['name']}/README.md)",
        shape["family"],
        f"top {shape['top_k']} of {shape['experts']}",
        f"{report['parameters'] / 1e6:.1f} M",
        f"{report['active_parameters'] / 1e6:.1f} M",
        f"{report['training']['tokens'] / 1e6:.1f} M",
        f"{report['mean_loss']:.3f}",
        rouge,
    ]


def _own_rows(reports: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for report in reports:
        shape = report["shape"]
        for which in ("trained", "untrained"):
            routing = report["routing"][which]
            name = report["name"] if which == "trained" else f"{report['name']}, untrained"
            numbers = (
                routing["overlap"],
                routing["topic_bits"],
                routing["between_topics_bits"],
                routing["within_topic_bits"],
                routing["largest_load"],
                routing["worst_load"],
            )
            row = _row(name, shape["top_k"], shape["experts"], *numbers)
            yield [*row, f"{routing['gate_entropy']:.3f}", str(routing["dead_experts"])]


def _real_row(real: tuple[Any, ...]) -> list[str]:
    return [*_row(*real), "", "0"]


def _row(
    name: str,
    top_k: int,
    experts: int,
    overlap: float,
    information: float | None,
    between: float | None,
    within: float,
    load: float,
    worst: float,
) -> list[str]:
    return [
        name,
        f"{top_k} of {experts}",
        f"{overlap:.3f} ({top_k / experts:.3f})",
        "" if information is None else f"{information:.3f}",
        "" if between is None else f"{between:.3f}",
        f"{within:.3f}",
        f"{load:.2f}, {worst:.2f}",
    ]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
