"""numba's decorators, with a cache that notices every edit and types that a checker keeps.

numba's own on-disk cache looks at a function's own file only: an edit in a callee goes unnoticed.
So the compiled code lies in a folder named by a digest of all sources that it is made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("hashing.py", "log.py", "types.py", "engine/*.py", "policies/*.py")
"""What compiled code is made of, below the package."""

SEAL = ".sha256"

# Nothing is allocated in the core, and counting references to the machine's arrays at every call
# would cost more than the work.
_LEAN: dict[str, Any] = {"_nrt": False}
_INNER: dict[str, Any] = {
    **_LEAN,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "forceinline": True,
}


def entry(function: F, *, allocates: bool = False) -> F:
    """Compile a function that Python calls, or load it if it was compiled before."""
    config: Any = numba.config
    if config.DISABLE_JIT:
        # Compiled integers wrap around in silence.
        return cast(F, np.errstate(over="ignore")(function))
    folder = cache_folder()
    options: dict[str, Any] = {} if allocates else dict(_LEAN)
    # numba asks for the folder when it decorates, and nowhere else.
    before = config.CACHE_DIR
    try:
        if folder is not None:
            config.CACHE_DIR = str(folder)
        compiler: Any = numba.njit(cache=folder is not None, **options)
        return cast(F, compiler(function))
    finally:
        config.CACHE_DIR = before


def kernel(function: F) -> F:
    """Compile a function that compiled code calls; always inlined.

    numba would compile it again for every constant that it is called with, and optimise it again
    in each of its callers; so constants count as numbers, and only an ``entry`` is optimised.
    """
    compiler: Any = numba.njit(**_INNER)
    compiled = compiler(function)
    if compiled is not function:
        compiled.compile = _plainly(compiled.compile)
    return cast(F, compiled)


def _plainly(compile_as: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def compile_plainly(signature: Any) -> Any:
        types: Any = numba.types
        plain = [types.unliteral(kind) for kind in signature]
        plain = [types.int64 if isinstance(k, types.IntEnumMember) else k for k in plain]
        config: Any = numba.config
        before = config.OPT
        config.OPT = 1
        try:
            return compile_as(tuple(plain))
        finally:
            config.OPT = before

    return compile_plainly


@cache
def cache_folder() -> Path | None:
    """Where compiled code is kept: ``MOESIM_CACHE``, the user's cache, or the temporary folder.

    None if none of them can be written: then every process compiles for itself.
    """
    given = os.environ.get("MOESIM_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    shared = Path(tempfile.gettempdir()) / f"moesim-{os.getuid()}"
    for place in [given] if given else [home, shared]:
        top = Path(place) / "moesim"
        folder = top / source_digest()
        try:
            top.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Loading runs what lies there, so it must be nobody else's.
            if top.stat().st_uid != os.getuid() or top.stat().st_mode & 0o022:
                continue
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                _distrust(folder)
                return folder
        except OSError:
            continue
    return None


@cache
def source_digest() -> str:
    """16 hex digits over all sources of compiled code, numba and Python."""
    total = hashlib.sha256(f"{numba.__version__} {platform.python_version()}".encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


@cache
def load(*calls: tuple[Any, Any]) -> None:
    """Compile functions for the arguments that they will get, or load what was kept; then seal it.

    Says on stderr that compiling takes a while, unless all of it was kept.
    """
    config: Any = numba.config
    if config.DISABLE_JIT:
        return
    folder = cache_folder()
    if not all(_is_kept(function) for function, _ in calls):
        _announce("once for this version" if folder else "every time: no folder to keep it in")
    with _interruptible():
        for function, signature in calls:
            function.compile(signature)
    if folder is not None:
        _seal(folder)


@cache
def _announce(where: str) -> None:
    """Said once a process."""
    print(f"moesim: compiling the fast engine, {where}", file=sys.stderr)


def _is_kept(function: Any) -> bool:
    path = getattr(function._cache, "cache_path", None)
    name = function.py_func.__qualname__
    return path is not None and any(Path(path).glob(f"*.{name}-*.nbc"))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A Ctrl-C that a callback of the compiler swallows is raised again afterwards."""
    pressed: list[int] = []

    def press(number: int, _: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _seal(folder: Path) -> None:
    """Put a checksum beside each kept file: damaged machine code must never be run."""
    for path in folder.rglob("*.nb?"):
        with contextlib.suppress(OSError):
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            beside.write_text(_checksum(path))
            beside.replace(path.with_name(path.name + SEAL))


def _distrust(folder: Path) -> None:
    """Remove what has no seal, or not its own: numba then compiles again."""
    for path in folder.rglob("*.nb?"):
        seal = path.with_name(path.name + SEAL)
        with contextlib.suppress(OSError):
            if not seal.exists() or seal.read_text() != _checksum(path):
                path.unlink()


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
