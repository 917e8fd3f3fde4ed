"""Ctrl-C, heard even where a library swallows it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_pressed: list[int] = []


@contextmanager
def heard() -> Iterator[None]:
    """Remember each Ctrl-C beside raising it: what runs inside a callback of a library may be told
    to go on, and only ``check`` ends the command then."""
    mine = threading.current_thread() is threading.main_thread()
    # Where it is ignored (a job in the background), it stays so.
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _pressed.clear()
    signal.signal(signal.SIGINT, _press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed and lost; called now and then by long work."""
    if _pressed:
        raise KeyboardInterrupt


def _press(number: int, _: object) -> None:
    _pressed.append(number)
    raise KeyboardInterrupt
