"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from moesim.cli.interrupt import check

EVERY_S = 10.0
"""Seconds between lines where stderr is no terminal."""

Progress = Callable[[int, int], None]


@contextmanager
def requests_progress(what: str, unit: str = "requests") -> Iterator[Progress]:
    """A function to call with (requests done, requests in all). It also hears Ctrl-C."""
    with _bar(what, unit) if sys.stderr.isatty() else nullcontext(_lines(what, unit)) as show:

        def update(done: int, total: int) -> None:
            check()
            show(done, total)

        yield update


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def _lines(what: str, unit: str) -> Progress:
    started = last = 0.0
    first = 0

    def update(done: int, total: int) -> None:
        nonlocal started, last, first
        now = time.monotonic()
        if not first:
            # Compiling, where there was any, is over: it says nothing of the rest.
            started, last, first = now, now, done
        elif now - last >= EVERY_S and first < done < total:
            last = now
            left_s = (now - started) * (total - done) / (done - first)
            print(f"{what}: {done}/{total} {unit}, {left_s:.0f} s left", file=sys.stderr)

    return update
