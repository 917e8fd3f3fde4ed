"""numba's decorators with types that a checker keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

# Nothing is allocated in the core, and counting references to the machine's arrays at every call
# would cost more than the work.
_LEAN: dict[str, Any] = {"_nrt": False}
_INNER: dict[str, Any] = {
    **_LEAN,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "forceinline": True,
}


def entry(function: F) -> F:
    """Compile a function that Python calls."""
    compiler: Any = numba.njit(**_LEAN)
    return cast(F, compiler(function))


def kernel(function: F) -> F:
    """Compile a function that compiled code calls; always inlined."""
    compiler: Any = numba.njit(**_INNER)
    return cast(F, compiler(function))
