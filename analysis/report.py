"""``moesim report``: one self-contained page on one or more run folders.

It works from ``file://`` and asks nothing of the network: library, data and style are inside, and
the page's own security policy allows the scripts whose digests it names and no others. Equal runs
give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from moesim import __version__
from moesim.analysis import report_data
from moesim.analysis.report_entropy import entropy
from moesim.analysis.report_facts import Answer, answer
from moesim.analysis.report_runs import Run, Setting, rate, read, settings
from moesim.analysis.report_text import plain
from moesim.errors import UsageError


@dataclass(frozen=True, slots=True)
class Page:
    """A report, whole. answers : (name of the setting, what is said of it)."""

    html: str
    answers: tuple[tuple[str, Answer], ...]
    runs: int


def page(paths: Sequence[Path], step: int | None = None, trace: Path | None = None) -> Page:
    """Read runs and make their report.

    Parameters
    ----------
    step : forward pass to draw where a timeline was kept; None: one of the second half.
    trace : the trace that was replayed, for the entropy of its gates.

    Raises
    ------
    UsageError
        Naming what is missing or broken: no runs, a damaged run, a newer schema, another trace, a
        step that is not there.
    """
    runs = read(paths)
    found = settings(runs)
    answers = [answer(setting, found) for setting in found]
    kept = [run for setting in found for run in setting.runs]
    names = report_data.Names.of(kept)
    gates = None
    if trace is not None:
        gates = entropy(trace, [str(run.manifest["trace"]) for run in kept])
    figures = report_data.figures(found, names, step, gates)
    html = _filled(found, answers, names, figures, len(runs))
    told = tuple((setting.name, one) for setting, one in zip(found, answers, strict=True))
    return Page(html, told, len(runs))


def write(target: Path, html: str) -> None:
    """Write beside, then rename.

    Raises
    ------
    UsageError
        Naming the file and the reason; nothing is left behind.
    """
    beside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        beside.write_text(html, encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        raise UsageError(f"-o {target}: cannot be written ({error.strerror or error})") from None
    finally:
        beside.unlink(missing_ok=True)


# ---- filling -------------------------------------------------------------------------------------


def _filled(
    found: Sequence[Setting],
    answers: Sequence[Answer],
    names: report_data.Names,
    figures: Mapping[str, Any],
    runs: int,
) -> str:
    import bokeh
    from jinja2 import Environment

    from moesim.analysis.report_charts import document, script

    library, own = script(), _file("report.js")
    sources = " ".join(f"'sha256-{_hash(text)}'" for text in (library, own))
    shell = Environment(autoescape=True).from_string(_file("report.html"))
    return shell.render(
        title=_title(found),
        about=_about(found, runs),
        notes=_notes(found, figures),
        settings=[
            {"name": plain(setting.name), "answer": _shown(one)}
            for setting, one in zip(found, answers, strict=True)
        ],
        columns=report_data.COLUMNS,
        rows=_rows(found, names),
        provenance=[report_data.provenance(run) for setting in found for run in setting.runs],
        data=_inline(figures),
        document=_inline(document()),
        library=library,
        script=own,
        script_sources=sources,
        style=_file("report.css"),
        version=__version__,
        bokeh=bokeh.__version__,
    )


def _file(name: str) -> str:
    return files("moesim.analysis").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _inline(value: Any) -> str:
    """JSON that ends no element and opens none, whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _shown(one: Answer) -> dict[str, Any]:
    """Every line fit to be shown; names in it may be anybody's."""
    return {
        "headline": _sentence(one.headline),
        "lines": [_sentence(line) for line in one.lines],
        "belief": [_sentence(line) for line in one.belief],
        "diagnoses": [_sentence(line) for line in one.diagnoses],
        "warnings": [_sentence(line) for line in dict.fromkeys(one.warnings)],
    }


def _sentence(text: str) -> str:
    """Like ``plain``, but as long as it is."""
    return " ".join(plain(word) for word in text.split(" "))


def _title(found: Sequence[Setting]) -> str:
    models = sorted({plain(setting.facts["model"]["name"]) for setting in found})
    return ", ".join(models[:3])


def _about(found: Sequence[Setting], runs: int) -> str:
    facts = found[0].facts
    link = facts["hardware"].get("link", {}).get("bytes_per_s")
    told = [f"{runs} run{'s' * (runs != 1)}"]
    if len(found) == 1:
        told += [
            f"experts of {plain(facts['model']['name'])}",
            f"{plain(facts['hardware']['name'])}, link {rate(link)}",
            f"trace {plain(facts['trace'])[:12]}",
        ]
        if facts.get("limit"):
            told.append(f"first {plain(facts['limit'])} requests")
    else:
        told.append(f"{len(found)} settings: choose one below")
    return " · ".join(told)


def _notes(found: Sequence[Setting], figures: Mapping[str, Any]) -> list[str]:
    notes = []
    for what, of in (("traces", "trace"), ("models", "model")):
        seen = {json.dumps(setting.facts[of], sort_keys=True) for setting in found}
        if len(seen) > 1:
            notes.append(f"These runs are of {len(seen)} {what}; nothing is compared across them.")
    if len(found) > 1:
        notes.append("Policies are compared within a setting, never across settings.")
    if not figures["clocks"]:
        notes.append("No run kept a timeline, so no forward pass is drawn: replay with --timeline.")
    if figures["entropy"] is None:
        notes.append("The entropy of the gates is drawn where the trace is named with --trace.")
    return notes


def _rows(found: Sequence[Setting], names: report_data.Names) -> list[dict[str, Any]]:
    rows = []
    for at, setting in enumerate(found):
        quickest = _quickest(setting.runs)
        for run in setting.runs:
            best = quickest.get(str(run.summary["capacity"]))
            cells = report_data.cells(run, names, best)
            policy = names.labels.index(run.label)
            rows.append({"setting": at, "policy": policy, "cells": cells})
    return rows


def _quickest(runs: Sequence[Run]) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.tpot_ns or 0.0, run.label)):
        if run.usable and run.tpot_ns:
            found.setdefault(str(run.summary["capacity"]), run)
    return found
