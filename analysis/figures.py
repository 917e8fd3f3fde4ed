"""Every figure of a paper, or our own, from one table of runs: drawn, and written with its data.

Each figure is ``NAME.pdf`` (vector), ``NAME.png`` and ``NAME.csv``; the command and the digests of
what it was drawn from lie in the metadata of both pictures. Equal runs give equal files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesim.analysis import finemoe_figures, own_figures, swapmoe_figures
from moesim.analysis.figure_source import Absent, Drawing, Source, caveats
from moesim.analysis.style import foot, styled
from moesim.errors import UsageError

PAPERS: dict[str, dict[str, Callable[[Source], Drawing]]] = {
    "finemoe": finemoe_figures.FIGURES,
    "swapmoe": swapmoe_figures.FIGURES,
    "own": own_figures.FIGURES,
}
DPI = 200
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One figure of a paper: its files' stem, or why there are none."""

    name: str
    absent: str = ""


def draw(
    paper: str,
    source: Source,
    out: Path,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Drawn]:
    """Draw the figures of a paper into a folder: beside, then moved, so that none is half written.

    only : names of figures; all where empty.

    Raises
    ------
    UsageError
        If a name is unknown, the folder cannot be written, or nothing at all can be drawn.
    """
    wanted = names_of(paper, only)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a folder")
    beside = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        made = list(_each(paper, source, beside, wanted, progress))
        if all(one.absent for one in made):
            raise UsageError(f"{source.path}: none can be drawn; {made[0].name}: {made[0].absent}")
        out.mkdir(exist_ok=True)
        _clear(out, made)
        for path in sorted(beside.iterdir()):
            path.replace(out / path.name)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return made


def _clear(out: Path, made: Sequence[Drawn]) -> None:
    """What could not be drawn anew must not lie there as if it were."""
    for one in made:
        for kind in ("pdf", "png", "csv"):
            (out / f"{one.name}.{kind}").unlink(missing_ok=True)


def names_of(paper: str, only: Sequence[str]) -> list[str]:
    """The figures that are meant; all where ``only`` is empty.

    Raises
    ------
    UsageError
        For a name that is none of the paper's.
    """
    known = PAPERS[paper]
    for name in only:
        if name not in known:
            raise UsageError(f"--only {name}: no such figure of {paper}; known: {', '.join(known)}")
    return [name for name in known if not only or name in only]


def _each(
    paper: str, source: Source, folder: Path, wanted: Sequence[str], progress: Progress | None
) -> Iterator[Drawn]:
    for number, name in enumerate(wanted):
        if progress is not None:
            progress(number, len(wanted))
        try:
            with styled():
                drawing = PAPERS[paper][name](source)
                _write(drawing, source, folder / name, f"{paper} {name}")
        except Absent as reason:
            yield Drawn(name, " ".join(str(reason).split()))
        else:
            yield Drawn(name)


def _write(drawing: Drawing, source: Source, stem: Path, title: str) -> None:
    foot(drawing.figure, [*drawing.notes, *caveats(drawing.rows)])
    drawing.data.to_csv(
        stem.with_suffix(".csv"), index=False, float_format="%.10g", lineterminator="\n"
    )
    # Laid out once, not again for each format.
    drawing.figure.draw_without_rendering()
    drawing.figure.set_layout_engine("none")
    facts = {"Title": title, "Subject": source.command, "Keywords": _digests(drawing, source)}
    drawing.figure.savefig(
        stem.with_suffix(".pdf"), metadata={**facts, "Creator": "moesim", "CreationDate": None}
    )
    drawing.figure.savefig(
        stem.with_suffix(".png"), dpi=DPI, metadata={**facts, "Software": "moesim"}
    )


def _digests(drawing: Drawing, source: Source) -> str:
    """Of the table, and of each trace that the figure rests on."""
    rows = source.table if drawing.rows is None else drawing.rows
    traces = sorted(rows["trace_digest"].dropna().unique())
    return " ".join([f"runs={source.digest}", *(f"trace={digest}" for digest in traces)])
