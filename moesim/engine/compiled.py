"""numba's decorators with types that a checker keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def entry(function: F) -> F:
    """Compile a function that Python calls."""
    return cast(F, numba.njit(_nrt=False)(function))


def kernel(function: F) -> F:
    """Compile a function that compiled code calls. Always inlined: a call that passes the whole
    machine would cost more than most of them do."""
    return cast(F, numba.njit(_nrt=False)(function))
